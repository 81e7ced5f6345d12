"""Two dimensions out of many: principal components, UMAP and t-SNE, each with a fixed seed.

UMAP and t-SNE start from the first principal components, as is usual: distances change little, and it is
many times faster. PCA and t-SNE are scikit-learn's, UMAP is umap-learn's.

N rows, D features.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.config.plot import MapConfig
from genoembed.errors import ConfigError, check_installed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genoembed.config.choices import MapMethod
    from genoembed.config.plot import MapConfig


_MAX_EXPONENT = 40
_NAMES = {"pca": "PC", "umap": "UMAP ", "tsne": "t-SNE "}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaneMap:
    """Points in the plane."""

    points: NDArray[np.float32]
    """``(N, 2)``."""
    axis_labels: tuple[str, str]
    settings: str
    """What was used, in words."""


def check_method(method: MapMethod) -> None:
    """Raise if a package that a method needs is missing, before vectors are read."""
    check_installed("sklearn", package="scikit-learn", extra="analysis", purpose="plot")
    if method == "umap":
        check_installed("umap", package="umap-learn", extra="analysis", purpose="method 'umap'")


def lay_out(vectors: NDArray[np.float32], options: MapConfig) -> PlaneMap:
    """Arrange vectors in the plane.

    Example:
        >>> corners = np.array([[3, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]], dtype=np.float32)
        >>> lay_out(corners, MapConfig()).axis_labels
        ('PC1 (90.0 %)', 'PC2 (10.0 %)')
    """
    wanted = 2 if options.method == "pca" else options.components
    centered, exponent = _centered(vectors)
    scores, shares = _principal_components(centered, wanted, options.seed)
    name = _NAMES[options.method]
    scale = f" of vectors divided by 2^{exponent}" if exponent else ""
    if options.method == "pca":
        labels = (f"PC1 ({shares[0]:.1%})".replace("%", " %"), f"PC2 ({shares[1]:.1%})".replace("%", " %"))
        return PlaneMap(points=scores[:, :2], axis_labels=labels, settings=f"PCA{scale}")
    if not scores.any():  # UMAP gives NaN of equal rows, and t-SNE ends the process
        settings = f"all {len(vectors)} vectors are equal, so {name.strip()} has nothing to arrange"
        return PlaneMap(points=scores[:, :2], axis_labels=(f"{name}1", f"{name}2"), settings=settings)
    start = f"of {scores.shape[1]} principal components{scale}, seed {options.seed}"
    if options.method == "umap":
        neighbors = min(options.neighbors, len(vectors) - 1)
        points = _umap(scores, neighbors, options)
        settings = f"UMAP {start}, {neighbors} neighbors, min_dist {options.min_dist:g}"
    else:
        perplexity = min(options.perplexity, (len(vectors) - 1) / 3)
        points = _tsne(scores, perplexity, options)
        settings = f"t-SNE {start}, perplexity {perplexity:.3g}"
    if not np.isfinite(points).all():
        message = f"{name.strip()} finds no place for some of the {len(points)} vectors; set method to 'pca'"
        raise ConfigError(message)
    return PlaneMap(points=points, axis_labels=(f"{name}1", f"{name}2"), settings=settings)


def _centered(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """Take the mean out; numbers whose squares float32 does not hold are divided by a power of two."""
    if (vectors == vectors[0]).all():  # their mean need not be quite the same number
        return np.zeros_like(vectors), 0
    total = 0
    before, most = _exponent(vectors), _MAX_EXPONENT
    if before > most:
        vectors, total = np.ldexp(vectors, -before), before
    centered = vectors - vectors.mean(axis=0)
    after = _exponent(centered)
    if abs(after) > most:
        centered, total = np.ldexp(centered, -after), total + after
    return centered, total


def _exponent(values: NDArray[np.float32]) -> int:
    return int(np.frexp(max(values.max(), -values.min()))[1])


def _principal_components(
    centered: NDArray[np.float32], wanted: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Compute scores ``(N, C)``, C at least 2, and the share of the variance of each component."""
    from sklearn.decomposition import PCA

    num_components = min(wanted, *centered.shape)
    if not centered.any():  # all rows are equal, and no direction has a share
        return np.zeros((len(centered), 2), np.float32), np.zeros(2)
    pca = PCA(n_components=num_components, random_state=seed)
    scores = np.asarray(pca.fit_transform(centered), dtype=np.float32)
    shares = np.asarray(pca.explained_variance_ratio_, dtype=np.float64)
    if num_components < 2:
        scores = np.column_stack([scores, np.zeros_like(scores)])
        shares = np.append(shares, 0.0)
    return scores, shares


def _umap(scores: NDArray[np.float32], neighbors: int, options: MapConfig) -> NDArray[np.float32]:
    with warnings.catch_warnings():
        # of its parts that we do not use, and of running on one thread, which the fixed seed asks for
        warnings.simplefilter("ignore")
        import umap

        model = umap.UMAP(
            n_neighbors=neighbors,
            min_dist=options.min_dist,
            init="pca",
            random_state=options.seed,
            n_jobs=1,
        )
        return np.asarray(model.fit_transform(scores), dtype=np.float32)


def _tsne(scores: NDArray[np.float32], perplexity: float, options: MapConfig) -> NDArray[np.float32]:
    from sklearn.manifold import TSNE

    model = TSNE(
        n_components=2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=options.seed
    )
    return np.asarray(model.fit_transform(scores), dtype=np.float32)
