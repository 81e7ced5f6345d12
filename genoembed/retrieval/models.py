"""Models that learn by comparing sequences, and those of them that are saved, applied to sequences.

A model is an encoder with its heads and loss behind one ``forward``. In: batches of
:mod:`genoembed.finetuning.collate`. Out: ``{"loss": ..., "contrast": ...}``, the latter a
:class:`~genoembed.training.log.LossOutput`; or, with ``want``, what evaluation and search need. Everything
goes through ``forward``, so that wrappers (data-parallel, sharded) see it.

From a folder of ``genoembed finetune --task retrieval``, sequences of any length get weights of k-mer terms,
and a vector for each window of tokens with the bases that it stands for. Promised: what a sequence gets does
not depend on its batch-mates, and nothing is truncated.

L bases, T tokens, U terms, M vectors, E width of a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genoembed.config.retrieval import M3HeadsConfig
from genoembed.errors import CheckpointError, ConfigError
from genoembed.models.load import load_model
from genoembed.models.trained_folder import FACTS_FILE, read_finetuned
from genoembed.retrieval.candidates import PairIds
from genoembed.retrieval.contrastive import (
    batch_hard_triplet,
    info_nce,
    supervised_contrastive,
    triplet_margin,
    two_view_loss,
)
from genoembed.retrieval.heads import M3Heads, set_trainable
from genoembed.retrieval.m3 import M3Loss, M3Vectors, join_vectors
from genoembed.retrieval.terms import NO_TERM, KmerTerms, TokenTerms, collate_terms
from genoembed.retrieval.weights import HybridWeights
from genoembed.tokenization.hf import build_encoder
from genoembed.training.encoder import load_encoder, load_heads
from genoembed.training.inference import SequenceRunner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.config.choices import Contrast, Distance
    from genoembed.config.retrieval import ContrastiveConfig
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.retrieval.heads import DenseHead
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

    compares_lengths = False
    """Whether the loss sees how long vectors are; else it compares cosines, whatever is saved."""

    @abstractmethod
    def dense(self, fused_ND: Tensor) -> Tensor:
        """Make the vectors that are saved and embedded of fused ones."""

    def comparable(self, fused_ND: Tensor) -> Tensor:
        """Make the vectors that are compared, in the loss and where it is measured."""
        dense_ND = self.dense(fused_ND)
        # length 1 must not be divided by once more: last bits would change
        if self.compares_lengths or self.normalizes:
            return dense_ND
        return F.normalize(dense_ND, dim=-1)

    @property
    @abstractmethod
    def normalizes(self) -> bool:
        """Whether vectors are saved with length 1."""

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
        self.compares_lengths = margin is not None and distance == "euclidean"

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What gradients are reported of."""
        return {"encoder": self.encoder} | ({"head": self.head} if self.head.pooler is not None else {})

    def dense(self, fused_ND: Tensor) -> Tensor:
        """Project and normalize; see :class:`ComparingModel`."""
        return self.head.project(fused_ND)

    @property
    def normalizes(self) -> bool:
        """Whether vectors are saved with length 1."""
        return self.head.normalize

    def encode(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return comparable vectors: ``rows``, or ``query`` and ``passage``, each floating, ``(N, D)``."""
        sides = {"rows": ""} if "input_ids" in batch else {"query": "query_", "passage": "passage_"}
        return {
            name: self.comparable(self.encoder.pooled(*_rows(batch, prefix)))
            for name, prefix in sides.items()
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
        self.hybrid_weights = HybridWeights()
        """How scores are added where sequences are searched; chosen when a run ends."""
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

    @property
    def normalizes(self) -> bool:
        """Whether vectors are saved with length 1."""
        return self.heads.dense.normalize

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
            made = vectors.tensors()
            if not self.normalizes:  # search compares cosines
                made["dense"] = F.normalize(made["dense"], dim=-1)
            found |= {f"{name}{key}": value for key, value in made.items()}
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


class HeadVectors(NamedTuple):
    """What the heads make of one sequence."""

    term_ids: NDArray[np.int64]
    """Terms, each once, ascending. ``(U,)``."""
    term_weights: NDArray[np.float32]
    """At least 0. ``(U,)``."""
    term_starts: NDArray[np.int64]
    """First base of the first place of each term. ``(U,)``."""
    vectors: NDArray[np.float32]
    """Of length 1, in the order of the sequence. ``(M, E)``."""
    spans: NDArray[np.int64]
    """First base of each vector, and one past its last. ``(M, 2)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retriever:
    """A retrieval model whose sparse and multi-vector heads run."""

    facts: FinetunedFacts
    genomic: GenomicModel
    model: RetrievalModel
    kmers: KmerTerms
    batch_rows: int = 16
    """Windows of a forward pass."""

    @torch.inference_mode()
    def encode(self, sequences: Sequence[bytes]) -> list[HeadVectors]:
        """Run the heads."""
        if not sequences:
            return []
        runner = SequenceRunner(
            self.model.encoder,
            build_encoder(self.genomic.tokenizer, add_special_tokens=self.genomic.special_tokens),
            max_tokens=self.genomic.max_length,
            max_rows=self.batch_rows,
        )
        return [
            self._of_one(sequence, tokens.spans, tokens.values["states"])
            for sequence, tokens in zip(sequences, runner.states(sequences), strict=True)
        ]

    def _of_one(self, sequence: bytes, spans_T2: NDArray[np.int64], hidden_TD: Tensor) -> HeadVectors:
        heads = self.model.heads
        assert heads.sparse is not None, "load_retriever refuses a model without"
        assert heads.multi_vector is not None, "load_retriever refuses a model without"
        # one sequence at a time, so that no batch-mate's padding is there to be masked
        hidden_BTD = hidden_TD[None].to(self.genomic.device)
        terms = collate_terms([sequence], self.kmers, base_starts=[spans_T2[:, 0]])
        ids, weights = (values[0].cpu().numpy() for values in heads.sparse(hidden_BTD, terms))
        ids, weights = ids[ids != NO_TERM], weights[ids != NO_TERM]
        is_kept = spans_T2[:, 0] >= self.facts.skip_first
        mask_BT = torch.from_numpy(is_kept)[None].to(self.genomic.device)
        vectors_BME, mask_BM = heads.multi_vector(hidden_BTD, mask_BT)
        return HeadVectors(
            term_ids=ids,
            term_weights=weights.astype(np.float32),
            term_starts=self._places(sequence, ids),
            vectors=vectors_BME[0][mask_BM[0]].float().cpu().numpy(),
            spans=_spans(spans_T2[is_kept], heads.config),
        )

    def _places(self, sequence: bytes, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where each term first begins."""
        # unique gives the first place of each term; a term is numbered where its k-mer ends
        ends = self.kmers.of(sequence)
        found, first = np.unique(ends, return_index=True)
        return (first[np.searchsorted(found, ids)] - self.kmers.k + 1).astype(np.int64)


def load_retriever(
    folder: str | PathLike[str],
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    batch_rows: int = 16,
) -> Retriever:
    """Load a retrieval model with all its heads."""
    facts = read_finetuned(folder)
    shape = None if facts is None else facts.values.get("retrieval")
    if facts is None or shape is None or shape["mode"] == "dense":
        message = (
            f"{folder}: no sparse and multi-vector heads, expected a model of finetune with task 'retrieval' "
            "and mode 'all' or 'fix_encoder'; search by the dense vectors alone"
        )
        raise ConfigError(message)
    genomic = load_model(str(folder), device=device, dtype="float32", trust_remote_code=trust_remote_code)
    encoder = load_encoder(facts, genomic)
    config = M3HeadsConfig(
        pooling=facts.pooling,  # type: ignore[arg-type]
        add_pooler=facts.pooler is not None,
        normalize_dense=facts.normalize,
        vector_width=shape["vector_width"],
        vector_window=shape["vector_window"],
    )
    model = RetrievalModel(encoder, M3Heads(encoder.width, config, mode=shape["mode"]), M3Loss())
    load_heads(model, facts)
    model.hybrid_weights = saved_weights(facts)
    model.to(genomic.device).eval()
    return Retriever(
        facts=facts,
        genomic=genomic,
        model=model,
        kmers=KmerTerms(k=shape["term_bases"]),
        batch_rows=batch_rows,
    )


def saved_weights(facts: FinetunedFacts) -> HybridWeights:
    """Return how a folder adds the scores of its heads; folders of earlier versions say nothing of it."""
    found = facts.values["retrieval"].get("hybrid_weights")
    try:
        return HybridWeights() if found is None else HybridWeights(*map(float, found))
    except (TypeError, ValueError, ConfigError) as error:
        message = f"hybrid_weights is {found!r}, expected three numbers; fine-tune again"
        raise CheckpointError(message, path=str(facts.folder / FACTS_FILE)) from error


def _spans(spans_T2: NDArray[np.int64], config: M3HeadsConfig) -> NDArray[np.int64]:
    """Return which bases the vectors of the multi-vector head stand for."""
    kept = spans_T2[config.skip_first :]
    first = np.arange(0, len(kept), config.vector_window)
    last = np.minimum(first + config.vector_window, len(kept)) - 1
    return np.stack([kept[first, 0], kept[last, 1]], axis=1)
