"""Take out what all vectors share: center, whiten, or remove the strongest directions.

Vectors of language models lie in a narrow cone, so that every cosine is near 1. A transform is fitted on a
background and then applied to queries and database alike.

``center``: ``x - m`` with m the mean. ``whiten``: principal components divided by their deviations (``pca``),
and turned back to the old axes (``zca``); the covariance may be shrunk towards a multiple of the identity.
``remove-top``: ``x - m`` without its part along the first principal components (Mu & Viswanath 2018,
"All-but-the-top").

N rows, D features, C components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from genoembed.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from genoembed.config.choices import TransformAxes, TransformMethod


METHODS: tuple[TransformMethod, ...] = ("center", "whiten", "remove-top")
LEAST_VARIANCE = 1e-6
"""Directions with less than this share of the largest variance hold rounding only; whitening drops them."""
_ROWS_A_COMPONENT = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedTransform:
    """What is done to a vector: ``(x - mean) @ left``, and of ``remove-top`` ``y - (y @ left) @ left.T``."""

    method: TransformMethod
    axes: TransformAxes
    """Of ``whiten``."""
    mean: NDArray[np.float64]
    """``(D,)``."""
    matrix: NDArray[np.float64]
    """``whiten``: what centered rows are multiplied by, ``(D, C)`` or, for ``zca``, ``(D, D)``.
    ``remove-top``: the directions, ``(D, C)``. ``center``: ``(D, 0)``."""
    variances: NDArray[np.float64]
    """All variances along principal components, the largest first; ``(D,)``, empty for ``center``."""
    num_rows: int
    """Rows that it was fitted on."""

    @property
    def input_width(self) -> int:
        """Features of what it is applied to."""
        return len(self.mean)

    @property
    def output_width(self) -> int:
        """Features of what comes out."""
        return self.matrix.shape[1] if self.method == "whiten" else self.input_width

    @property
    def components(self) -> int:
        """Directions that whitening keeps, or that were removed."""
        if self.method == "whiten" and self.axes == "zca":
            return int(np.linalg.matrix_rank(self.matrix, hermitian=True))
        return int(self.matrix.shape[1])

    def apply(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """Transform vectors. What is not finite stays so."""
        return self.apply_float64(vectors).astype(np.float32)

    def apply_float64(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """Transform vectors and do not round."""
        if vectors.ndim != 2 or vectors.shape[1] != self.input_width:
            message = f"vectors: shape {vectors.shape}, expected (N, {self.input_width}), as the fit had"
            raise ShapeError(message)
        centered: NDArray[np.float64] = np.asarray(vectors, dtype=np.float64) - self.mean
        if self.method == "whiten":
            return centered @ self.matrix
        if self.method == "remove-top":
            centered -= (centered @ self.matrix) @ self.matrix.T
        return centered


class RowBlocks(Protocol):
    """Rows of vectors that are read a block at a time, as often as needed."""

    width: int

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Read all rows: the number of the first, and the block."""


def usable_rows(block: NDArray[np.float64], *, allow_zero: bool) -> NDArray[np.bool_]:
    """Return which rows can be compared.

    Example:
        >>> usable_rows(np.array([[1.0], [np.nan], [0.0]]), allow_zero=False).tolist()
        [True, False, False]
    """
    usable: NDArray[np.bool_] = np.asarray(np.isfinite(block).all(axis=1))
    if not allow_zero:
        usable &= (block != 0).any(axis=1)
    return usable


def unit_rows(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale each row to length 1.

    Example:
        >>> unit_rows(np.array([[3e-200, 4e-200]])).tolist()
        [[0.6, 0.8]]
    """
    # squares of very small or very large values would leave the range of float64
    scaled = vectors / np.abs(vectors).max(axis=1, keepdims=True)
    unit: NDArray[np.float64] = scaled / np.sqrt((scaled * scaled).sum(axis=1, keepdims=True))
    return unit


class Moments(NamedTuple):
    """What was counted over all usable rows."""

    num_rows: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    """``(D, D)``, of the rows as they are (divided by N)."""
    num_unusable: int
    """Rows with NaN or infinity, which were left out."""


def measure_moments(source: RowBlocks, *, with_covariance: bool = True) -> Moments:
    """Measure mean and covariance in two passes, in float64."""
    # two passes: where all vectors point the same way, mean squares less the squared mean lose their digits
    total, num_rows = np.zeros(source.width), 0
    for _, block in source.blocks():
        rows = block[usable_rows(block, allow_zero=True)]
        total += rows.sum(axis=0)
        num_rows += len(rows)
    if num_rows < 2:
        message = f"background: {num_rows} rows to fit on, expected 2 or more; take a larger file"
        raise ConfigError(message)
    mean = total / num_rows
    covariance = np.zeros((source.width, source.width) if with_covariance else (0, 0))
    if with_covariance:
        for _, block in source.blocks():
            centered = block[usable_rows(block, allow_zero=True)] - mean
            covariance += centered.T @ centered
        covariance /= num_rows
    return Moments(num_rows, mean, covariance, len(source) - num_rows)


def fit(
    moments: Moments,
    *,
    method: TransformMethod,
    components: int | None = None,
    axes: TransformAxes = "pca",
    shrinkage: float = 0.0,
) -> FittedTransform:
    """Make a transform of what was measured."""
    width = len(moments.mean)
    _check_options(width, method=method, components=components, axes=axes, shrinkage=shrinkage)
    if method == "center":
        matrix, variances = np.zeros((width, 0)), np.zeros(0)
    else:
        variances, directions = _principal_directions(moments.covariance)
        if method == "remove-top":
            matrix = directions[:, : components or max(1, width // _ROWS_A_COMPONENT)]
        else:
            matrix = _whitening(variances, directions, components or width, axes, shrinkage)
    return FittedTransform(
        method=method,
        axes=axes,
        mean=moments.mean,
        matrix=np.ascontiguousarray(matrix),
        variances=variances,
        num_rows=moments.num_rows,
    )


def ruling_directions(variances: NDArray[np.float64], *, most: int, directions: int) -> int:
    """Count the leading components without which the rest varies in many directions.

    Args:
        variances: Of components, largest first, shape ``(D,)``.
        most: What is returned where the rest has fewer directions even without that many.
        directions: How many are enough, by the participation ratio of the rest.

    Example:
        >>> ruling_directions(np.array([900.0, 300, *[1] * 20]), most=8, directions=8)
        2
    """
    rests = (variances[count:] for count in range(most))
    is_even = (rest.sum() ** 2 >= directions * (rest**2).sum() for rest in rests)
    return next((count for count, found in enumerate(is_even) if found), most)


def fit_rows(rows: NDArray[np.floating], *, components: int) -> FittedTransform:
    """Center and remove the strongest directions, as ``remove-top`` does, fitted on rows in memory.

    At least half of the directions in which rows differ stay. Takes whichever of the two products of the rows
    is smaller, so that few wide rows are fast.

    Example:
        >>> rows = np.array([[3.0, 1.0], [-3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
        >>> fit_rows(rows, components=1).apply_float64(np.array([[9.0, 2.0]])).tolist()
        [[0.0, 1.0]]
    """
    wide = np.asarray(rows, dtype=np.float64)
    mean = wide.mean(axis=0)
    centered = wide - mean
    if len(wide) < wide.shape[1]:
        variances, left = _principal_directions(centered @ centered.T)
        lengths = np.sqrt(variances[:components])
        directions = (centered.T @ left[:, :components]) / np.where(lengths > 0, lengths, 1)
    else:
        variances, directions = _principal_directions(centered.T @ centered)
    # of rows that differ in few directions some must stay, or rounding is all that is compared
    kept = min(components, int((variances > LEAST_VARIANCE * variances[0]).sum()) // 2)
    return FittedTransform(
        method="remove-top",
        axes="pca",
        mean=mean,
        matrix=np.ascontiguousarray(directions[:, :kept]),
        variances=variances / len(wide),
        num_rows=len(wide),
    )


def _check_options(
    width: int, *, method: TransformMethod, components: int | None, axes: TransformAxes, shrinkage: float
) -> None:
    problems = []
    if method not in METHODS:
        problems.append(f"method is {method!r}; set method to one of {', '.join(METHODS)}")
    if axes not in ("pca", "zca"):
        problems.append(f"axes is {axes!r}; set axes to 'pca' or 'zca'")
    if not 0 <= shrinkage <= 1:
        problems.append(f"shrinkage is {shrinkage}; set shrinkage to 0 to 1")
    if components is not None and not 1 <= components <= width:
        problems.append(f"components is {components}; set components to 1 to {width}, the features")
    if components is not None and method == "center":
        problems.append(f"components is {components}, but method is 'center'; leave components out")
    if method != "whiten" and (shrinkage or axes != "pca"):
        problems.append(f"shrinkage and axes are for 'whiten', and method is {method!r}; leave them out")
    if problems:
        raise ConfigError(*problems)


def _principal_directions(
    covariance: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return variances, the largest first, and directions as columns, their largest entry above 0."""
    variances, directions = np.linalg.eigh(covariance)
    # rounding can put a variance of 0 below 0
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
    # an eigenvector has no sign of its own: with one, the same background gives the same axes everywhere
    largest = directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])]
    return variances, directions * np.where(largest < 0, -1.0, 1.0)


def _whitening(
    variances: NDArray[np.float64],
    directions: NDArray[np.float64],
    components: int,
    axes: TransformAxes,
    shrinkage: float,
) -> NDArray[np.float64]:
    shrunk = (1 - shrinkage) * variances + shrinkage * variances.mean()
    kept = int((shrunk > LEAST_VARIANCE * shrunk[0]).sum())
    if not kept:
        message = "background: all rows are equal, expected rows that differ; take another file"
        raise ConfigError(message)
    kept = min(kept, components)
    scaled = directions[:, :kept] / np.sqrt(shrunk[:kept])
    whitening: NDArray[np.float64] = scaled if axes == "pca" else scaled @ directions[:, :kept].T
    return whitening


class Isotropy(NamedTuple):
    """How alike the directions of vectors are."""

    mean_cosine: float
    """Mean over random pairs; 0 where directions are spread evenly."""
    resultant: float
    """Length of the mean of the vectors at length 1, from 0 (even) to 1 (all the same)."""


def measure_isotropy(vectors: NDArray[np.floating], *, pairs: int = 20_000, seed: int = 0) -> Isotropy:
    """Measure how alike the directions of vectors are.

    Example:
        >>> measure_isotropy(np.array([[1.0, 0.0], [2.0, 0.0]]))
        Isotropy(mean_cosine=1.0, resultant=1.0)
    """
    wide = np.asarray(vectors, dtype=np.float64)
    wide = wide[usable_rows(wide, allow_zero=False)]
    if len(wide) < 2:
        return Isotropy(np.nan, np.nan)
    unit = unit_rows(wide)
    generator = np.random.default_rng(seed)
    first = generator.integers(0, len(unit), pairs)
    # at a distance of 1 to N - 1, so that no row is paired with itself
    second = (first + generator.integers(1, len(unit), pairs)) % len(unit)
    cosine = float((unit[first] * unit[second]).sum(axis=1).mean())
    return Isotropy(cosine, float(np.linalg.norm(unit.mean(axis=0))))
