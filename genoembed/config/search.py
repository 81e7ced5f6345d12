"""Options of a search, and of the transform that may precede it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genoembed.config.choices import (
    DuplicatePolicy,
    EmptyPolicy,
    FailurePolicy,
    GapPolicy,
    InvalidPolicy,
    Metric,
    TransformAxes,
    TransformMethod,
)
from genoembed.config.embed import OUTPUT, FileModel, PolicyConfig, TableOutput
from genoembed.config.fields import Config, option, same_option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

NEAR, INDEX, HYBRID = "Neighbors", "Approximate search", "Hybrid search"
QUERIES, FIT = "Queries", "The transform"
_POLICY: dict[str, Any] = {"group": QUERIES, "basic": False, "shown_default": "error"}


class NeighborConfig(Config):
    """Which rows are close to a query."""

    k: int = option(
        10, ge=1, group=NEAR, basic=True, short="-k", flag="--neighbors", metavar="N", help="Hits per query."
    )
    metric: Metric = option(
        "cosine",
        group=NEAR,
        basic=True,
        help="How vectors are compared. For cosine and dot, higher is closer; for euclidean, lower is "
        "closer.",
    )
    layer: str | None = option(
        None,
        group=NEAR,
        basic=True,
        metavar="NAME",
        shown_default="the file's first",
        help="Which matrix of the file.",
    )
    exclude_self: bool = option(
        False, group=NEAR, basic=True, help="Leave out rows of the query's own record."
    )
    transform: str | None = option(
        None,
        group=NEAR,
        basic=True,
        metavar="FILE.h5",
        help="A transform of fit-transform, applied to queries and subjects.",
        reads=True,
    )
    approximate: bool = option(
        False,
        group=INDEX,
        basic=True,
        help="Use an index file next to the embeddings, which is built if it is not there.",
    )
    index: str | None = option(
        None, group=INDEX, metavar="FILE", help="Keep the index in this file.", writes="index"
    )
    effort: int = option(
        128,
        ge=1,
        group=INDEX,
        metavar="N",
        help="Candidates per query; more find more of the true neighbors.",
    )
    measure_recall: int = option(
        0,
        ge=0,
        group=INDEX,
        metavar="N",
        help="Answer N queries exactly as well, and say which share of the hits the index found.",
    )
    search_threads: int = option(
        1, ge=1, group=INDEX, metavar="N", help="CPU threads of the index; with 1, results repeat exactly."
    )

    seed: int = option(
        0, ge=0, group=INDEX, metavar="N", help="Random seed of the queries that recall is measured on."
    )

    def _problems(self) -> Iterator[str]:
        for key in ("index", "measure_recall"):
            if getattr(self, key) and not self.approximate:
                yield Problem(
                    f"{key} is for an approximate search",
                    Remedy("approximate", True),
                    f", or leave {key} out",
                )


class SearchConfig(TableOutput, FileModel, NeighborConfig):
    """One search: the query files and what they are embedded with, the heads, and where the table goes."""

    against: str = option(
        group=NEAR, basic=True, metavar="FILE.h5", help="The embedding file to search.", reads=True
    )
    hybrid: bool = option(
        False, group=HYBRID, help="Score the hits again with the heads of a retrieval model."
    )
    hybrid_weights: tuple[float, ...] | None = option(
        None,
        group=HYBRID,
        metavar="W,W,W",
        shown_default="as the model's training chose them, else 1,0.3,1",
        help="Weights of the dense, sparse and multi-vector scores.",
    )
    depth: int = option(100, ge=1, group=HYBRID, metavar="N", help="Hits per query that are scored again.")
    subject_sequences: tuple[str, ...] = option(
        (),
        group=HYBRID,
        metavar="FILE",
        shown_default="where FILE.h5 says they are",
        help="Sequences of the embedding file. Repeatable.",
        reads=True,
    )
    queries: tuple[str, ...] = option(
        argument=True,
        metavar="QUERY",
        help="Sequence files, or one embedding file; - is standard input.",
        reads=True,
    )
    invalid: InvalidPolicy | None = same_option(PolicyConfig, "invalid", None, **_POLICY)
    duplicates: DuplicatePolicy | None = same_option(PolicyConfig, "duplicates", None, **_POLICY)
    empty: EmptyPolicy | None = same_option(PolicyConfig, "empty", None, **_POLICY)
    gaps: GapPolicy | None = same_option(PolicyConfig, "gaps", None, **_POLICY)
    on_error: FailurePolicy | None = option(
        None,
        group=QUERIES,
        basic=True,
        shown_default="stop",
        help="A query that fails (values that are not finite, no memory, nothing to pool): stop, or leave it "
        "out, and exit with 3 at the end.",
    )


class TransformConfig(Config):
    """How a transform is fitted on the vectors of a background."""

    method: TransformMethod = option(
        "center",
        group=FIT,
        help="Subtract the mean; also give all directions variance 1; or subtract the mean and remove the "
        "strongest directions.",
    )
    components: int | None = option(
        None,
        ge=1,
        group=FIT,
        metavar="N",
        shown_default="one per hundred features; whiten: all",
        help="Directions that remove-top removes, or whiten keeps.",
    )
    layer: str | None = option(
        None, group=FIT, metavar="NAME", shown_default="the file's first", help="Which matrix of the file."
    )
    axes: TransformAxes = option(
        "pca",
        group=FIT,
        help="For whiten: features become principal components, or stay close to the old axes.",
    )
    shrinkage: float = option(
        0.0,
        ge=0,
        le=1,
        group=FIT,
        metavar="SHARE",
        help="For whiten: how far the covariance is drawn to a multiple of the identity.",
    )
    seed: int = option(
        0, ge=0, group=FIT, metavar="N", help="Random seed of the sample that the report is measured on."
    )
    output: str = option(group=OUTPUT, short="-o", metavar="OUT.h5", help="The file to write.", writes="hdf5")
    overwrite: bool = option(False, group=OUTPUT, help="Replace OUT.h5 once the new one is complete.")
