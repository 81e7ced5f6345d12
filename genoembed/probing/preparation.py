"""From stored features to the standardised matrix that a linear model is fitted on.

Features come as *blocks* that are laid side by side: a matrix ``(N, D)``, or vectors at positions
``(N, P, D)``, which are first reduced to their principal components (the same axes for all positions).
Everything that is learnt here (axes, means, deviations) is learnt from the training rows.

N rows, D features, P positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import ConfigError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


COMPONENTS = 32
"""Principal components that are kept of the vector at each position."""


def check_block(block: NDArray[np.floating], *, num_rows: int, name: str) -> NDArray[np.floating]:
    """Refuse features that no model can be fitted on."""
    block = np.asarray(block)
    if block.ndim not in (2, 3) or len(block) != num_rows or 0 in block.shape:
        message = f"{name}: shape {block.shape}, expected ({num_rows}, D) or ({num_rows}, P, D)"
        raise ShapeError(message)
    if not (is_finite := np.isfinite(block).reshape(num_rows, -1).all(axis=1)).all():
        problem = f"{name}: NaN or infinite, expected finite features; embed in float32, or leave it out"
        raise NonFiniteError(problem, record_id=str(int(np.argmin(is_finite))))
    return block


def check_components(components: int) -> None:
    """Refuse a number of components that keeps nothing."""
    if components < 1:
        message = f"components: {components}, expected 1 or more; set components to {COMPONENTS}"
        raise ConfigError(message)


def encode_target(target: NDArray[np.generic], *, task: ProbeTask) -> NDArray[np.generic]:
    """Number the classes, or take the values as float64.

    Example:
        >>> encode_target(np.array(["b", "a", "b"]), task="classification").tolist()
        [1, 0, 1]
    """
    if task == "classification":
        codes: NDArray[np.int64] = np.unique(target, return_inverse=True)[1].reshape(-1).astype(np.int64)
        return codes
    try:
        values = np.asarray(target).astype(np.float64)
    except ValueError as error:
        message = f"target: {error}, expected a number a row; set task to 'classification' for classes"
        raise ConfigError(message) from error
    if not (is_finite := np.isfinite(values)).all():
        message = f"target: row {int(np.argmin(is_finite))} is not finite; leave the row out"
        raise ConfigError(message)
    return values


def lay_out(
    blocks: Sequence[NDArray[np.floating]], train: NDArray[np.bool_], *, components: int
) -> NDArray[np.float64]:
    """Lay blocks side by side, each position's vector as its principal components."""
    parts = [
        block.astype(np.float64)
        if block.ndim == 2
        else _principal_components(block[train], components)(block)
        for block in blocks
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def deviations(mean: NDArray[np.float64], mean_square: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give what to divide by, infinity where only rounding moves a feature."""
    variance = mean_square - mean**2
    return np.where(variance > 1e-12 * mean_square, np.sqrt(np.maximum(variance, 0)), np.inf)


def standardize(
    features: NDArray[np.float64], train: NDArray[np.bool_], test: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Take mean and deviation of the training rows out of training and test rows.

    Example:
        >>> is_first = np.array([True, True, False])
        >>> standardize(np.array([[0.0], [2.0], [5.0]]), is_first, ~is_first)[1].tolist()
        [[4.0]]
    """
    fitted = features[train]
    mean = fitted.mean(axis=0)
    centred = fitted - mean
    scale = deviations(np.abs(mean), mean**2 + (centred**2).mean(axis=0))
    return centred / scale, (features[test] - mean) / scale


def _principal_components(
    vectors: NDArray[np.floating], components: int
) -> Callable[[NDArray[np.floating]], NDArray[np.float64]]:
    """Learn the directions of most variance over all positions."""
    flat = vectors.reshape(-1, vectors.shape[-1]).astype(np.float32)
    mean = flat.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = flat - mean
    axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))[1][:, ::-1][:, :components]

    def project(rows: NDArray[np.floating]) -> NDArray[np.float64]:
        moved = (rows.astype(np.float32) - mean) @ axes.astype(np.float32)
        flattened: NDArray[np.float64] = moved.reshape(len(rows), -1).astype(np.float64)
        return flattened

    return project
