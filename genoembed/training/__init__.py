"""Train models: what kinds of training share, and the parts of them for loops of one's own.

Collators, heads, losses and samplers are names of this module, loaded on first use (PEP 562): importing it
stays light. They work with ``transformers.Trainer``, rows of ``datasets``, ``peft`` and
sentence-transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genoembed.batching.pack import pack_bins, pack_stream
    from genoembed.config.retrieval import ContrastiveConfig, M3HeadsConfig, M3LossConfig
    from genoembed.finetuning.row_collators import PackedCollator, PairCollator, RowCollator
    from genoembed.finetuning.sampling import ClassSampler, GroupSampler, LengthGroupedSampler, RankBatches
    from genoembed.pooling.reduce import pool
    from genoembed.retrieval.candidates import PairIds, sequence_identity
    from genoembed.retrieval.contrastive import (
        SentenceContrastiveLoss,
        batch_hard_triplet,
        info_nce,
        supervised_contrastive,
        triplet_margin,
        two_view_loss,
    )
    from genoembed.retrieval.grad_cache import cached_backward
    from genoembed.retrieval.heads import DenseHead, M3Heads, MultiVectorHead, SparseHead, set_trainable
    from genoembed.retrieval.m3 import M3Loss, M3Vectors, hybrid_scores
    from genoembed.retrieval.terms import KmerTerms, TokenTerms, collate_terms
    from genoembed.training.heads import (
        ClassificationHead,
        MultilabelHead,
        RegressionHead,
        classification_loss,
        multilabel_loss,
        regression_loss,
        token_classification_loss,
    )
    from genoembed.training.log import LossOutput, StepStatistics

_HOMES = {
    "ClassSampler": "genoembed.finetuning.sampling",
    "ClassificationHead": "genoembed.training.heads",
    "ContrastiveConfig": "genoembed.config.retrieval",
    "DenseHead": "genoembed.retrieval.heads",
    "GroupSampler": "genoembed.finetuning.sampling",
    "KmerTerms": "genoembed.retrieval.terms",
    "LengthGroupedSampler": "genoembed.finetuning.sampling",
    "LossOutput": "genoembed.training.log",
    "M3Heads": "genoembed.retrieval.heads",
    "M3HeadsConfig": "genoembed.config.retrieval",
    "M3Loss": "genoembed.retrieval.m3",
    "M3LossConfig": "genoembed.config.retrieval",
    "M3Vectors": "genoembed.retrieval.m3",
    "MultiVectorHead": "genoembed.retrieval.heads",
    "MultilabelHead": "genoembed.training.heads",
    "PackedCollator": "genoembed.finetuning.row_collators",
    "PairCollator": "genoembed.finetuning.row_collators",
    "PairIds": "genoembed.retrieval.candidates",
    "RankBatches": "genoembed.finetuning.sampling",
    "RegressionHead": "genoembed.training.heads",
    "RowCollator": "genoembed.finetuning.row_collators",
    "SentenceContrastiveLoss": "genoembed.retrieval.contrastive",
    "SparseHead": "genoembed.retrieval.heads",
    "StepStatistics": "genoembed.training.log",
    "TokenTerms": "genoembed.retrieval.terms",
    "batch_hard_triplet": "genoembed.retrieval.contrastive",
    "cached_backward": "genoembed.retrieval.grad_cache",
    "classification_loss": "genoembed.training.heads",
    "collate_terms": "genoembed.retrieval.terms",
    "hybrid_scores": "genoembed.retrieval.m3",
    "info_nce": "genoembed.retrieval.contrastive",
    "multilabel_loss": "genoembed.training.heads",
    "pack_bins": "genoembed.batching.pack",
    "pack_stream": "genoembed.batching.pack",
    "pool": "genoembed.pooling.reduce",
    "regression_loss": "genoembed.training.heads",
    "sequence_identity": "genoembed.retrieval.candidates",
    "set_trainable": "genoembed.retrieval.heads",
    "supervised_contrastive": "genoembed.retrieval.contrastive",
    "token_classification_loss": "genoembed.training.heads",
    "triplet_margin": "genoembed.retrieval.contrastive",
    "two_view_loss": "genoembed.retrieval.contrastive",
}

__all__ = [
    "ClassSampler",
    "ClassificationHead",
    "ContrastiveConfig",
    "DenseHead",
    "GroupSampler",
    "KmerTerms",
    "LengthGroupedSampler",
    "LossOutput",
    "M3Heads",
    "M3HeadsConfig",
    "M3Loss",
    "M3LossConfig",
    "M3Vectors",
    "MultiVectorHead",
    "MultilabelHead",
    "PackedCollator",
    "PairCollator",
    "PairIds",
    "RankBatches",
    "RegressionHead",
    "RowCollator",
    "SentenceContrastiveLoss",
    "SparseHead",
    "StepStatistics",
    "TokenTerms",
    "batch_hard_triplet",
    "cached_backward",
    "classification_loss",
    "collate_terms",
    "hybrid_scores",
    "info_nce",
    "multilabel_loss",
    "pack_bins",
    "pack_stream",
    "pool",
    "regression_loss",
    "sequence_identity",
    "set_trainable",
    "supervised_contrastive",
    "token_classification_loss",
    "triplet_margin",
    "two_view_loss",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module 'genoembed.training' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
