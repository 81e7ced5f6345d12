"""The metrics of each task, and the one that chooses the best step.

In: predictions and truth, or scores and which passages are relevant. Out: numbers by name. Promised: vectors
that are all alike do not rank well, since a tie counts against the relevant passage. N rows, C classes,
K targets, Q queries, P passages.
"""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

from genoembed.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


RECALL_AT = (1, 10)


def ranking_metrics(
    scores_QP: torch.Tensor, relevant_QP: torch.Tensor, *, allowed_QP: torch.Tensor | None = None
) -> dict[str, float]:
    """Rank the best relevant passage of each query among the others.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
        >>> ranking_metrics(scores, torch.tensor([[True, False, False], [False, False, True]]))["mrr"]
        0.75
    """
    allowed_QP = torch.ones_like(relevant_QP) if allowed_QP is None else allowed_QP
    relevant_QP = relevant_QP & allowed_QP
    has_relevant_Q = relevant_QP.any(dim=1)
    if not bool(has_relevant_Q.any()):
        message = (
            "ranking: no query has a relevant passage among the others; hold out more rows of each group"
        )
        raise ConfigError(message)
    scores_QP, relevant_QP = scores_QP[has_relevant_Q].float(), relevant_QP[has_relevant_Q]
    others_QP = allowed_QP[has_relevant_Q] & ~relevant_QP
    best_Q = scores_QP.masked_fill(~relevant_QP, -torch.inf).amax(dim=1)
    rank_Q = 1 + (others_QP & ~(scores_QP < best_Q[:, None])).sum(dim=1)
    metrics = {"mrr": float((1 / rank_Q.double()).mean())}
    metrics |= {f"recall_at_{k}": float((rank_Q <= k).double().mean()) for k in RECALL_AT}
    return metrics | {"ranked_queries": float(len(rank_Q))}


TASK_METRICS = {
    "classification": ("mcc", "accuracy", "macro_f1", "auroc", "auprc", "loss"),
    "token": ("macro_f1", "mcc", "accuracy", "auroc", "auprc", "loss"),
    "multilabel": ("auprc", "auroc", "macro_f1", "accuracy", "loss"),
    "regression": ("spearman", "pearson", "r2", "loss"),
    "lm": ("loss", "bits_per_token"),
    "contrastive": ("mrr", "recall_at_1", "recall_at_10"),
    "triplet": ("mrr", "recall_at_1", "recall_at_10"),
    "retrieval": ("mrr", "recall_at_1", "recall_at_10"),
}
"""Metrics of each task; the first one stops training unless another is set."""
SMALLER_IS_BETTER = ("loss", "bits_per_token")


def check_metrics_installed() -> None:
    """Raise if predictions could not be measured."""
    if find_spec("sklearn") is None:
        raise MissingExtraError(package="scikit-learn", extra="finetune", purpose="measuring predictions")


def class_metrics(true_N: NDArray[np.int64], probability_NC: NDArray[np.floating]) -> dict[str, float]:
    """Compare probabilities of classes with the truth.

    Example:
        >>> found = class_metrics(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]))
        >>> found["accuracy"], found["auroc"]
        (1.0, 1.0)
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guess_N = probability_NC.argmax(axis=1)
    hot_NC = np.eye(probability_NC.shape[1], dtype=np.int64)[true_N]
    columns = [1] if probability_NC.shape[1] == 2 else range(probability_NC.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that do not occur
        return {
            "accuracy": float(accuracy_score(true_N, guess_N)),
            "macro_f1": float(f1_score(true_N, guess_N, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(true_N, guess_N)),
            **_areas(hot_NC, probability_NC, columns),
        }


def multilabel_metrics(
    true_NC: NDArray[np.floating], probability_NC: NDArray[np.floating]
) -> dict[str, float]:
    """Compare probabilities of labels with the truth."""
    from sklearn.metrics import accuracy_score, f1_score

    on_NC, guess_NC = (true_NC > 0.5).astype(int), (probability_NC > 0.5).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels that do not occur
        return {
            "accuracy": float(accuracy_score(on_NC, guess_NC)),
            "macro_f1": float(f1_score(on_NC, guess_NC, average="macro", zero_division=0)),
            **_areas(on_NC, probability_NC, range(on_NC.shape[1])),
        }


def number_metrics(true_NK: NDArray[np.floating], guess_NK: NDArray[np.floating]) -> dict[str, float]:
    """Compare predicted numbers with the true ones.

    Example:
        >>> number_metrics(np.array([[1.0], [2.0], [9.0]]), np.array([[0.0], [1.0], [2.0]]))["spearman"]
        1.0
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import r2_score

    r2 = float(r2_score(true_NK, guess_NK)) if len(true_NK) > 1 else math.nan
    pairs = list(zip(true_NK.T.astype(np.float64), guess_NK.T.astype(np.float64), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constants
        found = {
            name: [correlation(*pair).statistic if len(true_NK) > 1 else math.nan for pair in pairs]
            for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr))
        }
    # a constant correlates with nothing: 0, where scipy gives NaN, by which no best step can be chosen
    return {name: float(np.nan_to_num(values).mean()) for name, values in found.items()} | {"r2": r2}


def _areas(
    on_NC: NDArray[np.integer], probability_NC: NDArray[np.floating], columns: Sequence[int] | range
) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    varied = [c for c in columns if 0 < on_NC[:, c].sum() < len(on_NC)]
    if not varied:
        return {"auroc": math.nan, "auprc": math.nan}
    pairs = [(on_NC[:, c], probability_NC[:, c]) for c in varied]
    return {
        "auroc": float(np.mean([roc_auc_score(*pair) for pair in pairs])),
        "auprc": float(np.mean([average_precision_score(*pair) for pair in pairs])),
    }
