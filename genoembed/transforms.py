"""``fit-transform``: fit a transform on the vectors of a file, and store it.

In: a pooled embedding file, the background. Out: a small HDF5 file that says what its vectors were, so that
vectors of another model or layer are refused.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genoembed.config.fields import named_options
from genoembed.config.paths import check_paths
from genoembed.config.search import TransformConfig
from genoembed.errors import StoreError
from genoembed.pipeline.embedding_file import VectorSource, comparable_settings
from genoembed.pooling.transform import (
    Isotropy,
    fit,
    measure_isotropy,
    measure_moments,
)
from genoembed.sequences.compression import file_facts
from genoembed.store import check_output, open_embeddings
from genoembed.store.transform_file import StoredTransform, write_transform

if TYPE_CHECKING:
    from os import PathLike

    from genoembed.config.choices import TransformAxes, TransformMethod
    from genoembed.pooling.transform import FittedTransform


_SAMPLE_ROWS = 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformReport:
    """What was fitted."""

    output: Path
    """The file that was written."""
    method: TransformMethod
    layer: str
    """Which matrix it was fitted on."""
    num_rows: int
    """Rows that it was fitted on."""
    num_unusable: int
    """Rows with NaN or infinity, which were left out."""
    width: int
    """Features of what it is applied to."""
    output_width: int
    """Features of what comes out."""
    components: int
    """Directions that were kept (``whiten``) or removed (``remove-top``)."""
    explained: float | None
    """Share of the variance along these directions; None for ``center``."""
    before: Isotropy
    """Of a sample of the background."""
    after: Isotropy
    """Of the same sample, transformed."""
    seconds: float


@named_options(TransformConfig)
def fit_transform(
    background: str | PathLike[str],
    *,
    output: str | PathLike[str],
    method: TransformMethod = "center",
    components: int | None = None,
    layer: str | None = None,
    axes: TransformAxes = "pca",
    shrinkage: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> TransformReport:
    """Fit a transform on a file of vectors, and write it.

    The file is read twice, in blocks; sums are float64. Memory and time grow with the square of the width.

    Args:
        background: A pooled file that genoembed wrote: sequences like those to be compared, many of them.
        output: The file to write.
        method: ``center`` takes the mean out; ``whiten`` gives all directions variance 1; ``remove-top``
            takes the mean and the strongest directions out.
        components: ``remove-top``: directions to remove, None is one a hundred features; ``whiten``:
            directions to keep, None is all that have variance.
        layer: Which matrix of the file; None is the first.
        axes: Of ``whiten``: ``pca`` gives principal components, ``zca`` vectors in the old axes.
        shrinkage: Of ``whiten``, 0 to 1: how far directions are treated alike.
        seed: Of the sample that the report is measured on.
        overwrite: Replace an existing file.

    Returns:
        What was fitted, with mean cosine and mean resultant length before and after.

    Raises:
        ConfigError: If options are wrong, or there are too few rows.
        LayerError: If the file has no such matrix.
        StoreError: If a file cannot be read or written, or holds a vector for every token.
    """
    started = time.perf_counter()
    check_paths([background], [(output, "hdf5")], overwrite=overwrite)
    check_output(output, overwrite=overwrite)
    facts_before = file_facts(fspath(background))
    with open_embeddings(background) as file:
        _ = file.X  # a per-token file says here that it has no row a record
        name = layer or file.layers[0]
        source = VectorSource(file[name])
        # a covariance is D x D numbers, and centering needs none
        moments = measure_moments(source, with_covariance=method != "center")
        transform = fit(moments, method=method, components=components, axes=axes, shrinkage=shrinkage)
        chosen = np.random.default_rng(seed).permutation(len(source))[:_SAMPLE_ROWS]
        # in the order of the file, so that rows next to one another are read together
        sample = source.take(np.sort(chosen))
        before = measure_isotropy(sample, seed=seed)
        after = measure_isotropy(transform.apply_float64(sample), seed=seed)
        settings = comparable_settings(file.provenance, name)
    # the mean, the sample and the digest that is stored must be of the same bytes
    if file_facts(fspath(background)) != facts_before:
        problem = "has changed while it was read; run again when nothing writes to it"
        raise StoreError(problem, path=fspath(background))
    facts = {
        "method": method,
        "axes": axes,
        "shrinkage": shrinkage,
        "num_rows": transform.num_rows,
        "recipe": settings,
        "background": {"name": fspath(background), "sha256": facts_before["sha256"]},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "before": before._asdict(),
        "after": after._asdict(),
    }
    arrays = {"mean": transform.mean, "matrix": transform.matrix, "variances": transform.variances}
    write_transform(StoredTransform(arrays=arrays, facts=facts), output, overwrite=overwrite)
    return TransformReport(
        output=Path(output),
        method=method,
        layer=name,
        num_rows=transform.num_rows,
        num_unusable=moments.num_unusable,
        width=transform.input_width,
        output_width=transform.output_width,
        components=transform.components,
        explained=_explained(transform),
        before=before,
        after=after,
        seconds=time.perf_counter() - started,
    )


def _explained(transform: FittedTransform) -> float | None:
    total = float(transform.variances.sum())
    if transform.method == "center" or not total:
        return None
    return float(transform.variances[: transform.components].sum()) / total
