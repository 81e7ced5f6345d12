"""What each task of fine-tuning is: what its labels are, what it is measured by, which options it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genoembed.config.choices import LabelKind

PREDICTION_TASKS = ("classification", "multilabel", "regression", "token")
"""Tasks whose model predicts something of a sequence or of its bases."""
LABEL_KINDS: dict[str, LabelKind] = {
    "classification": "class",
    "multilabel": "multilabel",
    "regression": "regression",
    "token": "token",
    "lm": "none",
}
TASK_METRICS = {
    "classification": ("mcc", "accuracy", "macro_f1", "auroc", "auprc", "loss"),
    "token": ("macro_f1", "mcc", "accuracy", "auroc", "auprc", "loss"),
    "multilabel": ("auprc", "auroc", "macro_f1", "accuracy", "loss"),
    "regression": ("spearman", "pearson", "r2", "loss"),
    "lm": ("loss", "bits_per_token"),
    "contrastive": ("mrr", "recall_at_1", "recall_at_10", "loss"),
    "triplet": ("mrr", "recall_at_1", "recall_at_10", "loss"),
    "retrieval": (
        *("heads_mrr", "mrr", "dense_mrr", "sparse_mrr", "multi_vector_mrr"),
        *("recall_at_1", "recall_at_10", "dense_recall_at_1", "dense_recall_at_10", "loss"),
    ),
}
"""Metrics of each task; the first one stops training unless another is set."""
SMALLER_IS_BETTER = ("loss", "bits_per_token")
COMPARING_TASKS = ("contrastive", "triplet", "retrieval")
_LABELED = (*PREDICTION_TASKS, "contrastive labels", "triplet labels")
_EXAMPLES = ("contrastive examples", "triplet examples", "retrieval")
_ROWS = (
    *PREDICTION_TASKS,
    "lm",
    *(f"{task} {way}" for task in COMPARING_TASKS[:2] for way in ("labels", "views")),
)
_VECTORS = (*(task for task in PREDICTION_TASKS if task != "token"), *COMPARING_TASKS)
_ALL_HEADS = ("retrieval all", "retrieval fix_encoder")
APPLIES_TO: dict[str, tuple[str, ...]] = {
    # what is taken from the model
    "layers": (*PREDICTION_TASKS, *COMPARING_TASKS),
    "fusion": (*PREDICTION_TASKS, *COMPARING_TASKS),
    "pooling": _VECTORS,
    "skip_first": _VECTORS,
    "add_pooler": (*PREDICTION_TASKS, *COMPARING_TASKS),
    "normalize": COMPARING_TASKS,
    # rows: examples have names of their own for what they hold
    "labels": _LABELED,
    "label_columns": _LABELED,
    "label_delimiter": ("multilabel", "token"),
    "ignore_label": ("token",),
    "unlabeled": _LABELED,
    "sequence_column": _ROWS,
    "id_column": _ROWS,
    "split_column": _ROWS,
    "group_column": _ROWS,
    "both_strands": _ROWS,
    "duplicate_sequences": _ROWS,
    "conflicts": _LABELED,
    "several_bases": ("token",),
    "false_negatives": _EXAMPLES,
    "mixed_lengths": (*PREDICTION_TASKS, "lm", "contrastive views", *_EXAMPLES),
    # heads and losses
    "dropout": PREDICTION_TASKS,
    "class_weights": ("classification", "token"),
    "label_smoothing": ("classification", "token"),
    "head_learning_rate": (*PREDICTION_TASKS, *COMPARING_TASKS),
    "contrast": COMPARING_TASKS[:2],
    "temperature": ("contrastive", "retrieval"),
    "scope": ("contrastive examples", "contrastive views"),
    "margin": ("triplet",),
    "distance": ("triplet",),
    "train_group_size": ("contrastive examples", "retrieval"),
    "in_batch_negatives": ("contrastive examples", "contrastive views", "retrieval"),
    "across_devices": ("contrastive", "retrieval"),
    "micro_batch": COMPARING_TASKS,
    "view_mutation_rate": ("contrastive views",),
    "view_crop_fraction": ("contrastive views",),
    "view_reverse_complement": ("contrastive views",),
    "mode": ("retrieval",),
    "distillation": ("retrieval",),
    "self_distillation_start": _ALL_HEADS,
    "term_bases": _ALL_HEADS,
    "vector_width": _ALL_HEADS,
    "vector_window": _ALL_HEADS,
}
"""Options that mean something for some tasks only: for a task, or for one way of doing it, which is where
pairs come from (``contrast``), or for retrieval its ``mode``. What is not here is for all tasks."""


def applies(key: str, task: str, way: str | None = None) -> bool:
    """Return whether an option means something for a task; without a way of doing it, for any way.

    Example:
        >>> applies("margin", "classification"), applies("scope", "contrastive")
        (False, True)
        >>> applies("scope", "contrastive", "labels")
        False
    """
    uses = APPLIES_TO.get(key)
    if uses is None or task in uses:
        return True
    return any(use.startswith(f"{task} ") and way in (None, use.rpartition(" ")[2]) for use in uses)


_USES_SHOWN = 3


def misplaced(key: str, task: str, way: str | None) -> str:
    """Say that an option means nothing for a task.

    Example:
        >>> misplaced("margin", "classification", None)
        "margin is for triplet, but task is 'classification'; leave margin out"
    """
    uses = [" with ".join(use.split()) for use in APPLIES_TO[key]]
    here = f"{task!r} with {way}" if way and applies(key, task) else repr(task)
    if len(uses) > _USES_SHOWN:
        return f"{key} is not for task {here}; leave {key} out"
    return f"{key} is for {' and '.join(uses)}, but task is {here}; leave {key} out"
