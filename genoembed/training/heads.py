"""Prediction heads: a class, several labels, numbers for a sequence, or a class for each token.

In: pooled vectors (or hidden states, for tokens). Out: logits or numbers, and the loss that goes with them: a
scalar in float32 (float64 for float64 input). What a prediction needs later - mean and deviation of inputs
and of targets, class weights - is in the state dict. Promised: a label is ignored because it says so
(``ignore_index``), never because of the token it belongs to.

B rows, L padded length, D hidden size, C classes, K targets of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, InputError, ModelError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

_INIT_DEVIATION = 0.02
_LEAST_DEVIATION = 0.01
"""Of an input feature, as a share of the median one."""


def new_linear(width: int, outputs: int, *, generator: torch.Generator | None = None) -> nn.Linear:
    """Make a linear layer that starts small: weights from N(0, 0.02^2), biases 0.

    Args:
        width: Size of its input.
        outputs: Size of its output.
        generator: Source of the weights; None is a new one with seed 0, never the global one.

    Returns:
        The layer, on the CPU, in torch's default dtype.

    Example:
        >>> new_linear(3, 2).bias.tolist()
        [0.0, 0.0]
    """
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, outputs)
    generator = generator or torch.Generator().manual_seed(0)
    nn.init.normal_(layer.weight, std=_INIT_DEVIATION, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class PredictionHead(nn.Module):
    """Standard units, dropout, an optional pooler (a linear projection), dropout again, the output layer.

    States of a model have any scale, and are mostly what all sequences share: behind a middle block of a
    StripedHyena they are in the hundreds, and behind the last norm they differ by a twentieth of their mean.
    A new layer with a usual rate learns little from such inputs. ``fit_inputs`` learns mean and deviation of
    each feature once, before training; they are part of the state.

    Args:
        width: Hidden size, D.
        outputs: Numbers for each vector.
        dropout: Share of the input that is dropped in training, 0 up to 1.
        add_pooler: Put a linear projection of D to D before the output; it starts as the identity.
        generator: Source of the weights; None is a new one with seed 0.

    Raises:
        ConfigError: If a size or the dropout is out of range.
    """

    input_mean: Tensor
    input_deviation: Tensor

    def __init__(
        self,
        width: int,
        outputs: int,
        *,
        dropout: float = 0.0,
        add_pooler: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("input_mean", torch.zeros(max(width, 0)))
        self.register_buffer("input_deviation", torch.ones(max(width, 0)))
        problems = [] if outputs >= 1 else [f"outputs is {outputs}; expected 1 or more"]
        if not 0 <= dropout < 1:
            problems.append(f"dropout is {dropout}; set dropout to 0 or more, and below 1")
        if problems:
            raise ConfigError(*problems)
        self.pooler: nn.Linear | None = None
        if add_pooler:
            self.pooler = new_linear(width, width, generator=generator)
            nn.init.eye_(self.pooler.weight)
        self.dropout = nn.Dropout(dropout)
        self.output = new_linear(width, outputs, generator=generator)

    def fit_inputs(self, vectors_ND: Tensor) -> None:
        """Learn mean and standard deviation of the features; until then they are taken as they are.

        A feature that hardly changes gets the deviation of a hundredth of the median one, so that chance is
        not blown up; where nothing changes, deviations are 1.

        Args:
            vectors_ND: What the encoder gives for rows to train on, floating, shape ``(N, D)``.

        Raises:
            ModelError: If a value is NaN or infinite.
            ShapeError: If there is no row, or the width is another.
        """
        if vectors_ND.ndim != 2 or vectors_ND.shape[1] != len(self.input_mean) or not len(vectors_ND):
            message = (
                f"inputs: shape {tuple(vectors_ND.shape)}, expected (N, {len(self.input_mean)}) with a row "
                "or more"
            )
            raise ShapeError(message)
        wide = vectors_ND.double()
        if not bool(wide.isfinite().all()):
            message = "inputs: the encoder gives NaN or infinity; choose another layer, or dtype 'float32'"
            raise ModelError(message)
        deviation = wide.std(dim=0, unbiased=False)
        floor = _LEAST_DEVIATION * float(deviation.median())
        self.input_mean.copy_(wide.mean(dim=0))
        self.input_deviation.copy_(deviation.clamp(min=floor) if floor > 0 else torch.ones_like(deviation))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the outputs of each vector.

        Args:
            vectors: Floating, shape ``(..., D)``.

        Returns:
            In the dtype of the weights, shape ``(..., outputs)``.
        """
        vectors = (vectors.to(self.output.weight.dtype) - self.input_mean) / self.input_deviation
        if self.pooler is not None:
            vectors = self.pooler(self.dropout(vectors))
        outputs: Tensor = self.output(self.dropout(vectors))
        return outputs


class ClassificationHead(PredictionHead):
    """One of C classes for each pooled vector, or for each hidden state (``loss`` takes either).

    Args:
        width: Hidden size, D.
        num_classes: C, at least 2.
        class_weights: Weight of each class in the loss, C numbers; None weighs rows alike.
        label_smoothing: Share of the target spread evenly over all classes, 0 up to 1.
        ignore_index: Label of a token without label.
        dropout: As in :class:`PredictionHead`.
        add_pooler: As in :class:`PredictionHead`.
        generator: As in :class:`PredictionHead`.

    Raises:
        ConfigError: If a value is out of range.

    Example:
        >>> head = ClassificationHead(4, 3)
        >>> head(torch.ones(2, 4)).shape, head(torch.ones(2, 5, 4)).shape
        (torch.Size([2, 3]), torch.Size([2, 5, 3]))
    """

    class_weights: Tensor | None

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = IGNORE_INDEX,
        dropout: float = 0.0,
        add_pooler: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_classes, dropout=dropout, add_pooler=add_pooler, generator=generator)
        problems = [] if num_classes >= 2 else [f"num_classes is {num_classes}; expected 2 or more"]
        if not 0 <= label_smoothing < 1:
            problems.append(f"label_smoothing is {label_smoothing}; set it to 0 or more, and below 1")
        if class_weights is not None and (
            class_weights.shape != (num_classes,) or not bool((class_weights > 0).all())
        ):
            problems.append(
                f"class_weights: {class_weights.tolist()}, expected {num_classes} numbers above 0"
            )
        if problems:
            raise ConfigError(*problems)
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        weights = None if class_weights is None else class_weights.detach().to(torch.get_default_dtype())
        self.register_buffer("class_weights", weights)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Take the loss of a batch.

        Args:
            logits: From this head, shape ``(B, C)``, or ``(B, L, C)`` for tokens.
            labels: int64, shape ``(B,)``, or ``(B, L)`` for tokens.

        Returns:
            Scalar.

        Raises:
            InputError: If a label is not a class, or no token has one.
            ShapeError: If shapes do not belong together.
        """
        if logits.ndim == 3:
            return token_classification_loss(
                logits,
                labels,
                class_weights_C=self.class_weights,
                label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index,
            )
        return classification_loss(
            logits, labels, class_weights_C=self.class_weights, label_smoothing=self.label_smoothing
        )

    def predict(self, vectors: Tensor) -> Tensor:
        """Return the probabilities of the classes.

        Args:
            vectors: Floating, shape ``(..., D)``.

        Returns:
            Floating, at least float32, shape ``(..., C)``; sums to 1.
        """
        return torch.softmax(at_least_float32(self(vectors)), dim=-1)


class MultilabelHead(PredictionHead):
    """Each of C labels on or off, for a pooled vector; takes what :class:`PredictionHead` takes.

    Example:
        >>> head = MultilabelHead(4, 3)
        >>> head.predict(torch.zeros(1, 4))
        tensor([[0.5000, 0.5000, 0.5000]], grad_fn=<SigmoidBackward0>)
    """

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Take the loss of a batch.

        Args:
            logits: From this head, shape ``(B, C)``.
            targets: 1 where a label is on, else 0, shape ``(B, C)``.

        Returns:
            Scalar.

        Raises:
            InputError: If a target is outside 0 to 1.
            ShapeError: If shapes do not belong together.
        """
        return multilabel_loss(logits, targets)

    def predict(self, vectors: Tensor) -> Tensor:
        """Return the probability of each label.

        Args:
            vectors: Floating, shape ``(..., D)``.

        Returns:
            Floating, at least float32, shape ``(..., C)``.
        """
        return torch.sigmoid(at_least_float32(self(vectors)))


class RegressionHead(PredictionHead):
    """K numbers for a pooled vector, learned in units of their own deviation.

    ``fit_targets`` must have been called once, with the targets of
    the training part; mean and deviation are then part of the state.

    Args:
        width: Hidden size, D.
        outputs: K.
        dropout: As in :class:`PredictionHead`.
        add_pooler: As in :class:`PredictionHead`.
        generator: As in :class:`PredictionHead`.

    Example:
        >>> head = RegressionHead(4, 1)
        >>> head.fit_targets(torch.tensor([[10.0], [14.0]]))
        >>> head.predict(torch.zeros(1, 4))
        tensor([[12.]], grad_fn=<AddBackward0>)
    """

    target_mean: Tensor
    target_deviation: Tensor

    def __init__(
        self,
        width: int,
        outputs: int = 1,
        *,
        dropout: float = 0.0,
        add_pooler: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, outputs, dropout=dropout, add_pooler=add_pooler, generator=generator)
        self.register_buffer("target_mean", torch.zeros(outputs))
        self.register_buffer("target_deviation", torch.full((outputs,), torch.nan))

    def fit_targets(self, targets_NK: Tensor) -> None:
        """Learn mean and standard deviation of the targets.

        Args:
            targets_NK: Targets of the training part, floating, shape ``(N, K)``.

        Raises:
            ConfigError: If there are too few, one is not finite, or all of a column are equal.
        """
        if targets_NK.ndim != 2 or targets_NK.shape[1] != len(self.target_mean) or len(targets_NK) < 2:
            message = (
                f"targets: shape {tuple(targets_NK.shape)}, expected (N, {len(self.target_mean)}) with two "
                "rows or more"
            )
            raise ConfigError(message)
        wide = targets_NK.double()
        deviation = wide.std(dim=0, unbiased=False)
        if not bool((deviation > 0).all()) or not bool(wide.isfinite().all()):
            message = (
                f"targets: standard deviation {deviation.tolist()}, expected finite numbers above 0; a "
                "target that never changes cannot be learned"
            )
            raise ConfigError(message)
        self.target_mean.copy_(wide.mean(dim=0))
        self.target_deviation.copy_(deviation)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Take the mean squared error in units of the targets' deviation.

        Args:
            outputs: From this head, shape ``(B, K)``.
            targets: In their own units, shape ``(B, K)``, or ``(B,)`` for one target.

        Returns:
            Scalar; 1 for a head that always says the mean.

        Raises:
            ConfigError: If ``fit_targets`` was not called.
            InputError: If a target is not finite.
            ShapeError: If shapes do not belong together.
        """
        self._check_fitted()
        targets = targets[:, None] if targets.ndim == 1 else targets
        standard = (at_least_float32(targets) - self.target_mean) / self.target_deviation
        return regression_loss(outputs, standard)

    def predict(self, vectors: Tensor) -> Tensor:
        """Return the numbers in their own units.

        Args:
            vectors: Floating, shape ``(..., D)``.

        Returns:
            Floating, at least float32, shape ``(..., K)``.

        Raises:
            ConfigError: If ``fit_targets`` was not called.
        """
        self._check_fitted()
        return at_least_float32(self(vectors)) * self.target_deviation + self.target_mean

    def _check_fitted(self) -> None:
        if not bool(self.target_deviation.isfinite().all()):
            message = "regression: mean and deviation of the targets are not known; call fit_targets first"
            raise ConfigError(message)


def classification_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    *,
    class_weights_C: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Take the mean cross-entropy of the right class, weighted by class.

    Args:
        logits_BC: Floating, shape ``(B, C)``.
        labels_B: Number of each row's class, from 0. int64, shape ``(B,)``.
        class_weights_C: Weight of each class, above 0; None weighs rows alike.
        label_smoothing: Share of the target spread evenly over all classes, 0 up to 1.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        InputError: If a label is not a class.
        ShapeError: If shapes do not belong together.

    Example:
        >>> classification_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    if logits_BC.ndim != 2 or labels_B.shape != logits_BC.shape[:1]:
        raise ShapeError(_shapes("labels", labels_B, logits_BC, "(B,) and (B, C)"))
    _check_classes(labels_B, logits_BC.shape[1])
    logits_BC = at_least_float32(logits_BC)
    weights_C = None if class_weights_C is None else class_weights_C.to(logits_BC)
    return F.cross_entropy(logits_BC, labels_B, weight=weights_C, label_smoothing=label_smoothing)


def token_classification_loss(
    logits_BLC: Tensor,
    labels_BL: Tensor,
    *,
    class_weights_C: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Take the mean cross-entropy over all tokens of the batch that have a label.

    Args:
        logits_BLC: Floating, shape ``(B, L, C)``.
        labels_BL: Class of each token, or ``ignore_index``. int64, shape ``(B, L)``.
        class_weights_C: As in :func:`classification_loss`.
        label_smoothing: As in :func:`classification_loss`.
        ignore_index: Label of a token without label.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        InputError: If a label is not a class, or no token has one.
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


def multilabel_loss(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Take the mean binary cross-entropy of all labels, each of which is on or off by itself.

    Args:
        logits_BC: Floating, shape ``(B, C)``.
        targets_BC: 1 where a label is on, else 0; numbers between are shares. Shape ``(B, C)``.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        InputError: If a target is outside 0 to 1.
        ShapeError: If shapes do not belong together.

    Example:
        >>> multilabel_loss(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        tensor(0.6931)
    """
    if logits_BC.ndim != 2 or targets_BC.shape != logits_BC.shape:
        raise ShapeError(_shapes("targets", targets_BC, logits_BC, "(B, C) both"))
    logits_BC = at_least_float32(logits_BC)
    targets_BC = targets_BC.to(logits_BC)
    # written so that NaN is outside, too
    if not bool(((targets_BC >= 0) & (targets_BC <= 1)).all()):
        message = (
            "targets: a value outside 0 to 1, expected 1 for a label that is on and 0 for one that is off"
        )
        raise InputError(message)
    return F.binary_cross_entropy_with_logits(logits_BC, targets_BC)


def regression_loss(predicted_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Take the mean squared error.

    Args:
        predicted_BK: Floating, shape ``(B, K)``.
        targets_BK: In the units of the predictions, finite, shape ``(B, K)``.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        InputError: If a target is not finite.
        ShapeError: If shapes do not belong together.

    Example:
        >>> regression_loss(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        tensor(4.)
    """
    if predicted_BK.ndim != 2 or predicted_BK.shape != targets_BK.shape:
        raise ShapeError(_shapes("targets", targets_BK, predicted_BK, "(B, K) both"))
    if not bool(targets_BK.isfinite().all()):
        message = "targets: a value is not a finite number; leave out rows without a target"
        raise InputError(message)
    predicted_BK = at_least_float32(predicted_BK)
    return F.mse_loss(predicted_BK, targets_BK.to(predicted_BK))


def at_least_float32(values: Tensor) -> Tensor:
    """Widen half precision: losses and scores sum over many terms."""
    return values if values.dtype == torch.float64 else values.float()


def _check_classes(labels: Tensor, num_classes: int) -> None:
    if labels.numel() == 0:
        return
    lowest, highest = torch.stack([labels.min(), labels.max()]).tolist()
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        message = f"labels: {wrong} is not a class, expected 0 to {num_classes - 1}"
        raise InputError(message)


def _shapes(name: str, found: Tensor, beside: Tensor, expected: str) -> str:
    return f"{name}: shape {tuple(found.shape)} with {tuple(beside.shape)}, expected {expected}"
