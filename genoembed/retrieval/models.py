"""Models that learn by comparing sequences: an encoder with its heads and loss behind one ``forward``.

In: batches of :mod:`genoembed.finetuning.collate`. Out: ``{"loss": ..., "contrast": ...}``, the latter a
:class:`~genoembed.training.log.LossOutput`; or, with ``want``, what evaluation and search need. Everything
goes through ``forward``, so that wrappers (data-parallel, sharded) see it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genoembed.retrieval.candidates import PairIds
from genoembed.retrieval.contrastive import (
    batch_hard_triplet,
    info_nce,
    supervised_contrastive,
    triplet_margin,
    two_view_loss,
)
from genoembed.retrieval.heads import set_trainable
from genoembed.retrieval.m3 import M3Vectors, join_vectors
from genoembed.retrieval.terms import TokenTerms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from genoembed.config.choices import Contrast, Distance
    from genoembed.config.retrieval import ContrastiveConfig
    from genoembed.retrieval.heads import DenseHead, M3Heads
    from genoembed.retrieval.m3 import M3Loss
    from genoembed.training.encoder import Encoder, Want
    from genoembed.training.log import LossOutput


class ComparingModel(nn.Module, ABC):
    """An encoder and heads that learn from how sequences compare."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *, want: Want = "loss", **batch: Tensor) -> dict[str, Any]:
        """Encode a batch, and take its loss."""
        if want == "predict":
            return {"dense": self.dense(batch["vectors"])}
        if want == "layers":
            return self.encoder.pooled_layers(*_rows(batch, ""))
        vectors = self.encode(batch)
        if want == "hidden":
            return vectors
        contrast = self.contrast_loss([vectors], batch)
        return {"loss": contrast.loss, "contrast": contrast}

    @abstractmethod
    def dense(self, fused_ND: Tensor) -> Tensor:
        """Make fused vectors comparable."""

    @abstractmethod
    def encode(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Represent the rows that a batch has."""

    @abstractmethod
    def contrast_loss(
        self, chunks: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Tensor]
    ) -> LossOutput:
        """Take the loss of a batch."""


class ContrastModel(ComparingModel):
    """An encoder that learns from pairs or triplets."""

    def __init__(
        self,
        encoder: Encoder,
        head: DenseHead,
        *,
        contrast: Contrast,
        config: ContrastiveConfig,
        margin: float | None = None,
        distance: Distance = "euclidean",
    ) -> None:
        super().__init__(encoder)
        self.head, self.contrast = head, contrast
        self.comparison, self.margin, self.distance = config, margin, distance

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What gradients are reported of."""
        return {"encoder": self.encoder} | ({"head": self.head} if self.head.pooler is not None else {})

    def dense(self, fused_ND: Tensor) -> Tensor:
        """Project and normalize; see :class:`ComparingModel`."""
        return self.head.project(fused_ND)

    def encode(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return comparable vectors: ``rows``, or ``query`` and ``passage``, each floating, ``(N, D)``."""
        sides = {"rows": ""} if "input_ids" in batch else {"query": "query_", "passage": "passage_"}
        return {
            name: self.dense(self.encoder.pooled(*_rows(batch, prefix))) for name, prefix in sides.items()
        }

    def contrast_loss(
        self, chunks: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Tensor]
    ) -> LossOutput:
        """Take the loss of vectors; see :class:`ComparingModel`."""
        found = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        if self.contrast == "labels":
            if self.margin is not None:
                return batch_hard_triplet(
                    found["rows"], batch["labels"], margin=self.margin, distance=self.distance
                )
            return supervised_contrastive(
                found["rows"],
                batch["labels"],
                temperature=self.comparison.temperature,
                across_devices=self.comparison.across_devices,
            )
        if self.contrast == "views":
            pairs = found["rows"].unflatten(0, (-1, 2))  # as ViewCollator pads them: both views of a pair
            return two_view_loss(pairs[:, 0], pairs[:, 1], config=self.comparison, ids_B=batch["ids"])
        if self.margin is not None:
            group = found["passage"].unflatten(0, (len(found["query"]), -1))
            return triplet_margin(
                found["query"], group[:, 0], group[:, 1], margin=self.margin, distance=self.distance
            )
        return info_nce(
            found["query"],
            found["passage"],
            config=self.comparison,
            ids=_pair_ids(batch),
            teacher_scores_BG=batch.get("teacher_scores"),
        )


class RetrievalModel(ComparingModel):
    """An encoder with dense, sparse and multi-vector heads."""

    def __init__(self, encoder: Encoder, heads: M3Heads, loss: M3Loss) -> None:
        super().__init__(encoder)
        self.heads, self.loss = heads, loss
        # other modes leave to the tuning of the encoder what of it learns
        if heads.mode == "fix_encoder":
            set_trainable(encoder, heads)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What gradients are reported of."""
        named: dict[str, nn.Module | None] = {
            "encoder": self.encoder,
            "dense": self.heads.dense,
            "sparse": self.heads.sparse,
            "multi_vector": self.heads.multi_vector,
        }
        return {
            name: part
            for name, part in named.items()
            if part is not None and any(p.requires_grad for p in part.parameters())
        }

    def dense(self, fused_ND: Tensor) -> Tensor:
        """Project and normalize; see :class:`ComparingModel`."""
        return self.heads.dense.project(fused_ND)

    def encode(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of :class:`M3Vectors` by name; pairs have the prefix ``query.`` or ``passage.``."""
        sides = {"": ""} if "input_ids" in batch else {"query.": "query_", "passage.": "passage_"}
        found: dict[str, Tensor] = {}
        for name, prefix in sides.items():
            ids, mask, pool_mask = _rows(batch, prefix)
            terms = None
            if f"{prefix}term_ids" in batch:
                terms = TokenTerms(ids=batch[f"{prefix}term_ids"], positions=batch[f"{prefix}term_positions"])
            vectors = self.heads(
                self.encoder.hidden(ids, mask), pool_mask, terms=terms, attention_mask_BL=mask
            )
            found |= {f"{name}{key}": value for key, value in vectors.tensors().items()}
        return found

    def contrast_loss(
        self, chunks: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Tensor]
    ) -> LossOutput:
        """Take the loss of representations; see :class:`ComparingModel`."""
        query, passage = (_of_side(chunks, side) for side in ("query.", "passage."))
        return self.loss(query, passage, ids=_pair_ids(batch), teacher_scores_BG=batch.get("teacher_scores"))


def _of_side(chunks: Sequence[Mapping[str, Tensor]], side: str) -> M3Vectors:
    return join_vectors(
        [{key.removeprefix(side): value for key, value in c.items() if key.startswith(side)} for c in chunks]
    )


def _rows(batch: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    names = ("input_ids", "attention_mask", "pool_mask")
    ids, mask, pool_mask = (batch[f"{prefix}{name}"] for name in names)
    return ids, mask, pool_mask


def _pair_ids(batch: Mapping[str, Tensor]) -> PairIds:
    names = ("query_ids", "passage_ids", "query_labels", "passage_labels", "passage_mask")
    return PairIds(**{name: batch[name] for name in names if name in batch})
