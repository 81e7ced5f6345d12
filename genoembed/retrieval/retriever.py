"""The sparse and multi-vector heads of a fine-tuned retrieval model, applied to sequences.

In: a folder of ``genoembed finetune --task retrieval``, and sequences of any length. Out: weights of k-mer
terms, and a vector for each window of tokens with the bases that it stands for. Promised: what a sequence
gets does not depend on its batch-mates, and nothing is truncated.

L bases, T tokens, U terms, M vectors, E width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genoembed.config.retrieval import M3HeadsConfig
from genoembed.errors import ConfigError
from genoembed.models.load import load_model
from genoembed.models.trained_folder import read_finetuned
from genoembed.retrieval.heads import M3Heads
from genoembed.retrieval.m3 import M3Loss
from genoembed.retrieval.models import RetrievalModel
from genoembed.retrieval.terms import NO_TERM, KmerTerms, collate_terms
from genoembed.tokenization.hf import build_encoder
from genoembed.training.encoder import load_encoder, load_heads
from genoembed.training.inference import SequenceRunner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts


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
            build_encoder(self.genomic.tokenizer),
            max_tokens=self.genomic.max_length,
            max_rows=self.batch_rows,
        )
        return [
            self._of_one(sequence, tokens.starts, tokens.values["states"])
            for sequence, tokens in zip(sequences, runner.states(sequences), strict=True)
        ]

    def _of_one(self, sequence: bytes, starts: NDArray[np.int64], hidden_TD: Tensor) -> HeadVectors:
        heads = self.model.heads
        assert heads.sparse is not None, "load_retriever refuses a model without"
        assert heads.multi_vector is not None, "load_retriever refuses a model without"
        # one sequence at a time, so that no batch-mate's padding is there to be masked
        hidden_BTD = hidden_TD[None].to(self.genomic.device)
        terms = collate_terms([sequence], self.kmers, base_starts=[starts])
        ids, weights = (values[0].cpu().numpy() for values in heads.sparse(hidden_BTD, terms))
        ids, weights = ids[ids != NO_TERM], weights[ids != NO_TERM]
        is_kept = starts >= self.facts.skip_first
        mask_BT = torch.from_numpy(is_kept)[None].to(self.genomic.device)
        vectors_BME, mask_BM = heads.multi_vector(hidden_BTD, mask_BT)
        return HeadVectors(
            term_ids=ids,
            term_weights=weights.astype(np.float32),
            term_starts=self._places(sequence, ids),
            vectors=vectors_BME[0][mask_BM[0]].float().cpu().numpy(),
            spans=_spans(starts[is_kept], len(sequence), heads.config),
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
    model.to(genomic.device).eval()
    return Retriever(
        facts=facts,
        genomic=genomic,
        model=model,
        kmers=KmerTerms(k=shape["term_bases"]),
        batch_rows=batch_rows,
    )


def _spans(starts: NDArray[np.int64], length: int, config: M3HeadsConfig) -> NDArray[np.int64]:
    """Return which bases the vectors of the multi-vector head stand for."""
    kept = starts[config.skip_first :]
    first = kept[:: config.vector_window]
    return np.stack([first, np.append(first[1:], length)], axis=1).astype(np.int64)
