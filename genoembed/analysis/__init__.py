"""What stored embeddings are worth: linear probes, and what plain sequence features reach beside them.

Needs the extra ``analysis``; scikit-learn is imported when a probe runs, not before.
"""

from __future__ import annotations

from genoembed.analysis.baselines import baseline_features, composition, kmer_frequencies, one_hot
from genoembed.analysis.folds import split_folds
from genoembed.analysis.linear import cross_validate
from genoembed.analysis.metrics import MetricSummary, measure
from genoembed.analysis.probe import CandidateScore, Choice, ProbeResult, probe

__all__ = [
    "CandidateScore",
    "Choice",
    "MetricSummary",
    "ProbeResult",
    "baseline_features",
    "composition",
    "cross_validate",
    "kmer_frequencies",
    "measure",
    "one_hot",
    "probe",
    "split_folds",
]
