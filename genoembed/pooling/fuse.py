"""Fusion: several layers, or two strands, to one matrix.

N rows, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch

from genoembed.config.choices import Fusion, Pooling, Strands
from genoembed.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


def fuse(
    layers: Mapping[str, Tensor], *, method: Fusion, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Fuse the matrices of several layers.

    The fused matrix is named after the method; one layer alone is left as it is, under its own name. Means
    run in float32 at least. No input is modified.

    Args:
        layers: Matrix of each layer by module path, in the requested order. Floating, shapes ``(N,
            D_layer)``.
        method: ``none`` keeps every layer as its own matrix, ``concat`` concatenates them, ``mean`` and
            ``max`` reduce them element by element, ``weighted`` is their mean weighted by ``weights``.
        weights: One number per layer, in the same order, none below 0 and not all 0; they are divided by
            their sum. (For a scalar mix these are the softmax outputs, not the logits.) Only with
            ``weighted``.

    Returns:
        Matrices by name; one only, unless ``method`` is ``none``.

    Raises:
        ConfigError: If ``method`` is unknown, or ``weights`` do not go with it or with the layers.
        ShapeError: If there is no layer, rows differ in number, or widths differ (but for ``none``,
            ``concat``).

    Example:
        >>> layers = {"blocks.0": torch.tensor([[1.0, 2.0]]), "blocks.1": torch.tensor([[3.0, 0.0]])}
        >>> fuse(layers, method="max")
        {'max': tensor([[3., 2.]])}
        >>> fuse(layers, method="weighted", weights=[3, 1])
        {'weighted': tensor([[1.5000, 1.5000]])}
    """
    if problems := [
        *_choice_problems("fusion", method, Fusion),
        *_weight_problems(method, weights, len(layers)),
    ]:
        raise ConfigError(*problems)
    shapes = {name: tuple(matrix.shape) for name, matrix in layers.items()}
    if {len(shape) for shape in shapes.values()} != {2} or len({s[0] for s in shapes.values()}) > 1:
        message = f"fusion: layers have shapes {shapes}, expected (N, D) with one N, at least one layer"
        raise ShapeError(message)
    _check_widths({name: shape[1] for name, shape in shapes.items()}, method)
    if method == "none" or len(layers) == 1:
        return dict(layers)
    matrices = list(layers.values())
    if method == "concat":
        return {method: torch.cat(matrices, dim=1)}
    if method == "max":
        return {method: torch.stack(matrices).amax(dim=0)}
    return {method: _mix(matrices, weights or [1.0] * len(matrices))}


def feature_names(
    widths: Mapping[str, int], *, method: Fusion, strands: Strands = "none", pooling: Pooling = "mean"
) -> dict[str, tuple[str, ...]]:
    """Return the column names of the matrices that ``fuse`` returns.

    ``LAYER:i`` is feature i of a layer, ``LAYER:rc:i`` the same feature on the reverse complement
    (``strands`` is ``concat``), ``METHOD:i`` feature i of layers that were fused element by element.
    ``LAYER:std:i`` is the deviation of feature i over tokens (``pooling`` is ``mean_std``).

    Args:
        widths: Features of each layer on one strand, by module path, in the requested order.
        method: How layers are fused.
        strands: How strands were combined, before the layers were.
        pooling: How tokens were pooled, before that.

    Returns:
        Names of the columns, by name of the matrix.

    Raises:
        ConfigError: If ``method`` or ``strands`` is unknown.
        ShapeError: If there is no layer, or widths differ (but for ``none``, ``concat``).

    Example:
        >>> feature_names({"blocks.0": 2, "blocks.1": 1}, method="concat")
        {'concat': ('blocks.0:0', 'blocks.0:1', 'blocks.1:0')}
        >>> feature_names({"blocks.0": 1}, method="none", strands="concat")
        {'blocks.0': ('blocks.0:0', 'blocks.0:rc:0')}
        >>> feature_names({"blocks.0": 2}, method="none", pooling="mean_std")
        {'blocks.0': ('blocks.0:0', 'blocks.0:std:0')}
    """
    if problems := [*_choice_problems("fusion", method, Fusion), *_choice_problems("rc", strands, Strands)]:
        raise ConfigError(*problems)
    if not widths:
        message = "fusion: no layers, expected at least one"
        raise ShapeError(message)
    _check_widths(widths, method)
    if method == "none" or len(widths) == 1:
        return {layer: _columns(layer, width, strands, pooling) for layer, width in widths.items()}
    if method == "concat":
        columns = (
            name for layer, width in widths.items() for name in _columns(layer, width, strands, pooling)
        )
        return {method: tuple(columns)}
    return {method: _columns(method, next(iter(widths.values())), strands, pooling)}


def combine_strands(forward_ND: Tensor, reverse_ND: Tensor | None, *, method: Strands) -> Tensor:
    """Combine pooled vectors of sequences with those of their reverse complements.

    Args:
        forward_ND: Vectors of the sequences as given. Floating, shape ``(N, D)``.
        reverse_ND: Vectors of their reverse complements, same shape. Not looked at with ``none``.
        method: ``none`` keeps the forward strand, ``mean`` averages both (the same for either strand),
            ``concat`` puts the reverse strand's features after the forward's.

    Returns:
        Shape ``(N, D)``, or ``(N, 2 D)`` with ``concat``. ``mean`` gives float32 at least.

    Raises:
        ConfigError: If ``method`` is unknown.
        ShapeError: If the reverse strand is missing or has another shape.

    Example:
        >>> combine_strands(torch.tensor([[1.0]]), torch.tensor([[3.0]]), method="mean")
        tensor([[2.]])
    """
    if problems := _choice_problems("rc", method, Strands):
        raise ConfigError(*problems)
    if method == "none":
        return forward_ND
    if reverse_ND is None or reverse_ND.shape != forward_ND.shape:
        found = "nothing" if reverse_ND is None else f"shape {tuple(reverse_ND.shape)}"
        message = f"reverse strand: {found}, expected {tuple(forward_ND.shape)} as the forward strand has"
        raise ShapeError(message)
    if method == "concat":
        return torch.cat([forward_ND, reverse_ND], dim=-1)
    return _mix([forward_ND, reverse_ND], [1.0, 1.0])


def combine_token_strands(forward_TD: Tensor, reverse_TD: Tensor | None, *, method: Strands) -> Tensor:
    """Combine the token vectors of one sequence with those of its reverse complement.

    The reverse strand is turned round first, so that row i of the result is base i of the sequence as given.
    This needs a token for each base.

    Args:
        forward_TD: Token vectors of the sequence. Floating, shape ``(T, D)``.
        reverse_TD: Token vectors of its reverse complement, in reading order of that strand, same shape. Not
            looked at with ``none``.
        method: As in ``combine_strands``.

    Returns:
        Shape ``(T, D)``, or ``(T, 2 D)`` with ``concat``.

    Raises:
        ConfigError: If ``method`` is unknown.
        ShapeError: If the reverse strand is missing or has another shape.

    Example:
        >>> combine_token_strands(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [3.0]]), method="mean")
        tensor([[2.],
                [3.]])
    """
    return combine_strands(forward_TD, None if reverse_TD is None else reverse_TD.flip(0), method=method)


def _mix(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    total = sum(weights)
    mixed = torch.zeros_like(matrices[0], dtype=dtype)
    # one by one: stacked, all layers would be in memory once more, as float32
    for matrix, weight in zip(matrices, weights, strict=True):
        mixed += matrix.to(dtype) * (weight / total)
    return mixed


def _columns(name: str, width: int, strands: Strands, pooling: Pooling) -> tuple[str, ...]:
    parts = ("", "rc:") if strands == "concat" else ("",)
    moments = ("", "std:") if pooling == "mean_std" else ("",)
    per_part = range(width // len(moments))
    return tuple(
        f"{name}:{part}{moment}{index}" for part in parts for moment in moments for index in per_part
    )


def _choice_problems(option: str, value: str, choices: object) -> list[str]:
    known = get_args(choices)
    if value in known:
        return []
    return [f"{option} {value!r}: expected one of {', '.join(known)}; set {option} to one of them"]


def _weight_problems(method: str, weights: Sequence[float] | None, num_layers: int) -> list[str]:
    if method != "weighted":
        return [] if weights is None else [f"weights: given with fusion {method!r}; set fusion to 'weighted'"]
    if weights is None or len(weights) != num_layers:
        found = "none" if weights is None else len(weights)
        return [f"weights: {found} for {num_layers} layers; give one weight per layer"]
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        return [
            f"weights: {list(weights)}, expected finite numbers, none below 0 and not all 0; correct them"
        ]
    return []


def _check_widths(widths: Mapping[str, int], method: str) -> None:
    if method not in ("none", "concat") and len(set(widths.values())) > 1:
        message = (
            f"fusion {method!r}: layers have widths {dict(widths)}, expected one width; set fusion to "
            "'concat' or 'none', or ask for layers of one width"
        )
        raise ShapeError(message)
