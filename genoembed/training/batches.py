"""Views and groups padded to batches, and batches cut into the pieces that are encoded one at a time.

In: rows of :mod:`genoembed.training.epoch_rows`. Out: tensors by name.

B rows (queries), G passages of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from genoembed.training.candidates import UNKNOWN
from genoembed.training.kmer_terms import KmerTerms, collate_terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from genoembed.training.collate import PaddedCollator
    from genoembed.training.encode import EncodedExample
    from genoembed.training.epoch_rows import Group, ViewPair


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewCollator:
    """Pads pairs of views, one after the other: first and second of the first pair, and so on."""

    rows: PaddedCollator

    def __call__(self, pairs: Sequence[ViewPair]) -> dict[str, Tensor]:
        """Pad pairs to one batch."""
        batch = self.rows([view for pair in pairs for view in (pair.first, pair.second)])
        return {**batch, "ids": torch.tensor([pair.identity for pair in pairs])}


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCollator:
    """Pads queries and passages, with the terms of their k-mers where the sparse head wants them."""

    rows: PaddedCollator
    terms: KmerTerms | None = None

    def __call__(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Pad groups to one batch."""
        size = len(groups[0].passages)
        batch = self.side(
            [group.query for group in groups], [group.sequences[0] for group in groups], "query_"
        )
        batch |= self.side(
            [passage for group in groups for passage in group.passages],
            [sequence for group in groups for sequence in group.sequences[1:]],
            "passage_",
        )
        labels = torch.tensor([group.label for group in groups])
        passage_labels = torch.full((len(groups), size), UNKNOWN)
        passage_labels[:, 0] = labels
        batch |= {
            "query_ids": torch.tensor([group.ids[0] for group in groups]),
            "passage_ids": torch.tensor([number for group in groups for number in group.ids[1:]]),
            "query_labels": labels,
            "passage_labels": passage_labels.flatten(),
            "passage_mask": torch.tensor([is_real for group in groups for is_real in group.is_real]),
        }
        if groups[0].teacher_scores is not None:
            batch["teacher_scores"] = torch.tensor([group.teacher_scores for group in groups])
        return batch

    def side(
        self, examples: Sequence[EncodedExample], sequences: Sequence[bytes], prefix: str
    ) -> dict[str, Tensor]:
        """Pad one side."""
        found = {f"{prefix}{name}": value for name, value in self.rows(examples).items()}
        if self.terms is not None:
            starts = [example.encoded.base_start for example in examples]
            terms = collate_terms(sequences, self.terms, base_starts=starts)
            found |= {f"{prefix}term_ids": terms.ids, f"{prefix}term_positions": terms.positions}
        return found


def split_batch(batch: dict[str, Tensor], *, rows: int) -> list[dict[str, Tensor]]:
    """Cut a contrastive batch into pieces that are encoded one at a time."""
    count = len(
        batch["query_input_ids"] if "query_input_ids" in batch else batch.get("ids", batch["input_ids"])
    )
    inputs = {name: value for name, value in batch.items() if name.endswith(_ENCODED)}
    pieces = []
    for start in range(0, count, rows):
        piece = {}
        for name, value in inputs.items():
            each = len(value) // count
            piece[name] = value[start * each : (start + rows) * each]
        pieces.append(piece)
    return pieces


_ENCODED = ("input_ids", "attention_mask", "pool_mask", "term_ids", "term_positions")
