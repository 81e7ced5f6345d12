"""Cases for ``test_across_ranks.py``: one small encoder, and losses over rows that may lie on two ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from genoembed.config.retrieval import ContrastiveConfig, M3HeadsConfig, M3LossConfig
from genoembed.retrieval.candidates import PairIds
from genoembed.retrieval.contrastive import info_nce, supervised_contrastive
from genoembed.retrieval.heads import M3Heads
from genoembed.retrieval.m3 import M3Loss
from genoembed.retrieval.terms import TokenTerms

if TYPE_CHECKING:
    from genoembed.retrieval.m3 import M3Vectors

GROUP, WIDTH, LENGTH = 2, 6, 5
ROWS = {"even": (2, 2), "uneven": (3, 1)}
CASES = (
    "one_way even",
    "one_way uneven",
    "symmetric uneven",
    "full even",
    "full uneven",
    "masked uneven",
    "supervised uneven",
    "m3 even",
    "m3 uneven",
)
ACROSS = {"temperature": 0.3, "across_devices": True}


class Encoder(nn.Module):
    """A layer under the retrieval heads, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.heads = M3Heads(WIDTH, M3HeadsConfig(vector_window=1, normalize_sparse=False))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.double()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, terms: TokenTerms) -> M3Vectors:
        return self.heads(torch.tanh(self.layer(hidden)), mask, terms=terms)


def encoder_of(case: str) -> Encoder:
    """Make an encoder of which the loss uses every parameter."""
    encoder = Encoder()
    if not case.startswith("m3"):
        encoder.heads.sparse = encoder.heads.multi_vector = None
    return encoder


def batch_of(case: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Return the rows of a rank, or of both; those of different ranks differ in padded length."""
    sizes = ROWS[case.split()[1]]
    generator = torch.Generator().manual_seed(2)
    total = sum(sizes)
    batch = {}
    for side, count in (("query", total), ("passage", total * GROUP)):
        batch[f"{side}_hidden"] = torch.randn(count, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
        lengths = torch.full((count,), LENGTH)
        lengths[-sizes[1] * (count // total) :] = LENGTH - 2
        batch[f"{side}_mask"] = torch.arange(LENGTH) < lengths[:, None]
        batch[f"{side}_terms"] = torch.randint(0, 4, (count, LENGTH), generator=generator)
    batch["query_label"] = torch.tensor([0, 1, 2, 0])
    batch["passage_label"] = torch.tensor([0, 1, 1, 5, 2, 0, 0, 6])
    if rank is None:
        return batch
    first = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], total)
    mine = {}
    for name, value in batch.items():
        group = 1 if name.startswith("query") else GROUP
        mine[name] = value[first.start * group : first.stop * group]
        if rank == 1 and name.endswith(("hidden", "mask", "terms")):
            mine[name] = mine[name][:, : LENGTH - 2]
    return mine


def loss_of(case: str, encoder: Encoder, batch: dict[str, torch.Tensor]):
    """Run encoder and loss on some rows."""
    query, passage = (_encode(encoder, batch, side) for side in ("query", "passage"))
    kind = case.split()[0]
    if kind == "supervised":
        # queries 0 and 3, which lie on different ranks, are of one class; 1 and 2 have no fellow
        return supervised_contrastive(query.dense, batch["query_label"], temperature=0.3, across_devices=True)
    if kind == "m3":
        loss = M3Loss(M3LossConfig(self_distillation_start=-1, **ACROSS))
        return loss(query, passage, teacher_scores_BG=_teacher(batch))
    scope = {"masked": "full"}.get(kind, kind)
    ids = PairIds()
    if kind == "masked":
        ids = replace(ids, query_labels=batch["query_label"], passage_labels=batch["passage_label"])
    return info_nce(query.dense, passage.dense, config=ContrastiveConfig(scope=scope, **ACROSS), ids=ids)


def _teacher(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["passage_hidden"][:, 0, 0].reshape(-1, GROUP)


def _encode(encoder: Encoder, batch: dict[str, torch.Tensor], side: str) -> M3Vectors:
    ids = batch[f"{side}_terms"].masked_fill(~batch[f"{side}_mask"], -1)
    terms = TokenTerms(ids=ids, positions=torch.arange(ids.shape[1]).expand_as(ids))
    return encoder(batch[f"{side}_hidden"], batch[f"{side}_mask"], terms)
