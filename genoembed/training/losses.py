"""Losses of prediction heads: classification, several labels at once, regression, and labels of tokens.

In: what a head gives and what it should give. Out: a scalar in float32 (float64 for float64 input). Promised:
a label is ignored because it says so (``ignore_index``), never because of the token it belongs to.

B rows, L padded length, C classes, K targets of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, InputError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor


def classification_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    *,
    class_weights_C: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Take the cross-entropy of the right class.

    Args:
        logits_BC: Floating, shape ``(B, C)``.
        labels_B: Class of each row, 0 to C - 1. int64, shape ``(B,)``.
        class_weights_C: Weight of each class's rows; the loss is the weighted mean. Floating, shape ``(C,)``.
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.

    Returns:
        Scalar.

    Raises:
        InputError: If a label is no class.
        ShapeError: If shapes do not belong together.

    Example:
        >>> classification_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    if logits_BC.ndim != 2 or labels_B.shape != logits_BC.shape[:1]:
        raise ShapeError(_shapes("labels", labels_B, logits_BC, "(B,) and (B, C)"))
    _check_classes(labels_B, logits_BC.shape[1])
    weights_C = None if class_weights_C is None else class_weights_C.to(_wide(logits_BC))
    return F.cross_entropy(
        _wide(logits_BC), labels_B, weight=weights_C, label_smoothing=label_smoothing, reduction="mean"
    )


def multilabel_loss(
    logits_BC: Tensor, targets_BC: Tensor, *, positive_weights_C: Tensor | None = None
) -> Tensor:
    """Take the mean binary cross-entropy of all labels, each of which is on or off by itself.

    Args:
        logits_BC: Floating, shape ``(B, C)``.
        targets_BC: 1 where a label is on, 0 where it is off. Any dtype, shape ``(B, C)``.
        positive_weights_C: Weight of what is on, by label. Floating, shape ``(C,)``.

    Returns:
        Scalar.

    Raises:
        InputError: If a target is neither within 0 to 1.
        ShapeError: If shapes do not belong together.

    Example:
        >>> multilabel_loss(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        tensor(0.6931)
    """
    if logits_BC.ndim != 2 or targets_BC.shape != logits_BC.shape:
        raise ShapeError(_shapes("targets", targets_BC, logits_BC, "(B, C) both"))
    targets_BC = targets_BC.to(_wide(logits_BC))
    if not bool(((targets_BC >= 0) & (targets_BC <= 1)).all()):
        message = (
            "targets: a value outside 0 to 1, expected 1 for a label that is on and 0 for one that is off"
        )
        raise InputError(message)
    weights_C = None if positive_weights_C is None else positive_weights_C.to(targets_BC)
    return F.binary_cross_entropy_with_logits(_wide(logits_BC), targets_BC, pos_weight=weights_C)


def regression_loss(predicted_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Take the mean squared error.

    Args:
        predicted_BK: Floating, shape ``(B, K)``.
        targets_BK: Floating, shape ``(B, K)``, finite.

    Returns:
        Scalar.

    Raises:
        InputError: If a target is not finite.
        ShapeError: If shapes differ.

    Example:
        >>> regression_loss(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        tensor(4.)
    """
    if predicted_BK.ndim != 2 or predicted_BK.shape != targets_BK.shape:
        raise ShapeError(_shapes("targets", targets_BK, predicted_BK, "(B, K) both"))
    if not bool(targets_BK.isfinite().all()):
        message = "targets: a value that is no finite number; leave out rows without a target"
        raise InputError(message)
    predicted_BK = _wide(predicted_BK)
    return F.mse_loss(predicted_BK, targets_BK.to(predicted_BK))


def token_classification_loss(
    logits_BLC: Tensor,
    labels_BL: Tensor,
    *,
    class_weights_C: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Take the cross-entropy of the right class of each token that has a label.

    Args:
        logits_BLC: Floating, shape ``(B, L, C)``.
        labels_BL: Class of each token, 0 to C - 1, or ``ignore_index``. int64, shape ``(B, L)``.
        class_weights_C: Weight of each class's tokens. Floating, shape ``(C,)``.
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.
        ignore_index: Label of a token without label, such as padding.

    Returns:
        Scalar: the mean over all tokens of the batch that have a label.

    Raises:
        InputError: If a label is no class, or no token has one.
        ShapeError: If shapes do not belong together.

    Example:
        >>> labels = torch.tensor([[1, -100]])
        >>> token_classification_loss(torch.tensor([[[0.0, 0.0], [9.0, -9.0]]]), labels)
        tensor(0.6931)
    """
    if logits_BLC.ndim != 3 or labels_BL.shape != logits_BLC.shape[:2]:
        raise ShapeError(_shapes("labels", labels_BL, logits_BLC, "(B, L) and (B, L, C)"))
    has_label_BL = labels_BL != ignore_index
    if not bool(has_label_BL.any()):
        message = f"labels: all are {ignore_index}, expected a class for at least one token of a batch"
        raise InputError(message)
    return classification_loss(
        logits_BLC[has_label_BL],
        labels_BL[has_label_BL],
        class_weights_C=class_weights_C,
        label_smoothing=label_smoothing,
    )


def balanced_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Weigh classes so that each counts the same in total: ``N / (C n_c)``.

    Args:
        labels: Classes of all rows or tokens used for training, any shape; ``IGNORE_INDEX`` is left out.
        num_classes: C.

    Returns:
        float64, shape ``(C,)``.

    Raises:
        ConfigError: If a class has no row.
        InputError: If a label is no class.

    Example:
        >>> balanced_class_weights(torch.tensor([0, 0, 0, 1]), 2)
        tensor([0.6667, 2.0000], dtype=torch.float64)
    """
    labels = labels[labels != IGNORE_INDEX]
    _check_classes(labels, num_classes)
    counts = torch.bincount(labels, minlength=num_classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        message = (
            f"class_weights: no row of the training part has class {empty}; leave these classes out, or set "
            "class_weights to numbers of your own"
        )
        raise ConfigError(message)
    return labels.numel() / (num_classes * counts.double())


def _check_classes(labels: Tensor, num_classes: int) -> None:
    if labels.numel() == 0:
        return
    lowest, highest = torch.stack([labels.min(), labels.max()]).tolist()
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        message = f"labels: {wrong} is no class, expected 0 to {num_classes - 1}"
        raise InputError(message)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _shapes(name: str, found: Tensor, beside: Tensor, expected: str) -> str:
    return f"{name}: shape {tuple(found.shape)} beside {tuple(beside.shape)}, expected {expected}"
