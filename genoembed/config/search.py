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
    SearchMode,
    TransformAxes,
    TransformMethod,
)
from genoembed.config.embed import OUTPUT, FileModel, PolicyConfig, TableOutput
from genoembed.config.fields import Config, option, same_option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

NEAR, INDEX, KMERS = "Neighbors", "Approximate search", "Shared k-mers"
KMER_SIZE = 11
"""Length of a k-mer; on labeled sets its Jaccard index found most relatives
(``benchmarks/results/search_modes.md``)."""
QUERIES, FIT = "Queries", "Transform"
_POLICY: dict[str, Any] = {"group": QUERIES, "basic": False, "shown_default": "error"}


class NeighborConfig(Config):
    """Which rows are close to a query."""

    k: int = option(
        10,
        ge=1,
        group=NEAR,
        basic=True,
        short="-k",
        flag="--neighbors",
        metavar="N",
        help="Number of hits per query.",
    )
    mode: SearchMode = option(
        "vectors",
        group=NEAR,
        basic=True,
        help="Rank rows by their vectors, by shared k-mers (no model runs), or by the sum of both scores.",
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
        shown_default="the first",
        help="Layer of the file to use.",
    )
    exclude_self: bool = option(
        False, group=NEAR, basic=True, help="Leave out rows of the query's own record."
    )
    transform: str | None = option(
        None,
        group=NEAR,
        basic=True,
        metavar="FILE.h5",
        help="Transform made by fit-transform. It is applied to queries and subjects.",
        reads=True,
    )
    center: bool | None = option(
        None,
        group=NEAR,
        basic=True,
        shown_default="on for cosines and 24 rows or more, off for fine-tuned models",
        help="Center vectors on the database and remove up to 8 leading components, which all vectors share.",
    )
    approximate: bool = option(
        False,
        group=INDEX,
        basic=True,
        help="Use an index file next to the embeddings. It is built if it does not exist.",
    )
    index: str | None = option(
        None,
        group=INDEX,
        metavar="FILE",
        help="Index file to use, instead of the one next to the embeddings.",
        writes="index",
    )
    effort: int = option(
        128,
        ge=1,
        group=INDEX,
        metavar="N",
        help="Candidates per query. More candidates find more of the true neighbors.",
    )
    measure_recall: int = option(
        0,
        ge=0,
        group=INDEX,
        metavar="N",
        help="Also search exactly for N queries, and report which fraction of the hits the index found.",
    )
    search_threads: int = option(
        1,
        ge=1,
        group=INDEX,
        metavar="N",
        help="Number of CPU threads for the index. With 1, results are reproducible.",
    )

    seed: int = option(
        0,
        ge=0,
        group=INDEX,
        metavar="N",
        help="Random seed. It determines the queries that recall is measured on.",
    )

    kmer_size: int = option(
        KMER_SIZE,
        ge=4,
        le=31,
        unit="bases",
        group=KMERS,
        metavar="BASES",
        help="For --mode kmer and hybrid: length of a k-mer. Shorter ones find more distant relatives, and "
        "more by chance.",
    )

    def _problems(self) -> Iterator[str]:
        if self.mode == "kmer":
            for key in ("transform", "center", "approximate"):
                if getattr(self, key):
                    yield Problem(
                        f"{key} is for vectors, but mode is 'kmer'",
                        Remedy("mode", "vectors"),
                        f", or leave {key} out",
                    )
        if self.mode != "vectors" and self.metric == "euclidean":
            yield Problem(
                f"metric is 'euclidean', but mode {self.mode!r} ranks by scores that grow with similarity",
                Remedy("metric", "cosine"),
            )
        if self.mode == "vectors" and self.kmer_size != KMER_SIZE:
            yield Problem(
                "kmer_size is for a search by k-mers", Remedy("mode", "kmer"), ", or leave kmer_size out"
            )
        if self.center and self.transform is not None:
            yield "center and transform: vectors are transformed once; give one of the two"
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
        group=NEAR, basic=True, metavar="FILE.h5", help="Embedding file to search.", reads=True
    )
    hybrid_weights: tuple[float, ...] | None = option(
        None,
        group=KMERS,
        metavar="W,W[,W]",
        shown_default="1,50; for a retrieval model those chosen in its training, else 1,0.3,1",
        help="For --mode hybrid: weights of the scores of vectors and k-mers, for a retrieval model of its "
        "dense, sparse and multi-vector heads.",
    )
    depth: int = option(
        100,
        ge=1,
        group=KMERS,
        metavar="N",
        help="For --mode hybrid with a retrieval model: number of hits per query that its heads score again.",
    )
    compare_sequences: bool = option(
        True,
        group=KMERS,
        help="Compare the sequences of hits, for the columns shared_kmers and identity.",
    )
    subject_sequences: tuple[str, ...] = option(
        (),
        group=KMERS,
        metavar="FILE",
        shown_default="as recorded in FILE.h5",
        help="Sequence files of the embedding file. Repeatable.",
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
        help="If a query fails (out of memory, values that are not finite, no base to pool): stop, or "
        "skip it. The exit code is then 3.",
    )


class TransformConfig(Config):
    """How a transform is fitted on the vectors of a background."""

    method: TransformMethod = option(
        "center",
        group=FIT,
        help="center: subtract the mean. whiten: also scale all directions to variance 1. remove-top: "
        "subtract the mean and remove the strongest directions.",
    )
    components: int | None = option(
        None,
        ge=1,
        group=FIT,
        metavar="N",
        shown_default="one per 100 features; for whiten, all",
        help="Number of directions that remove-top removes or whiten keeps.",
    )
    layer: str | None = option(
        None, group=FIT, metavar="NAME", shown_default="the first", help="Layer of the file to use."
    )
    axes: TransformAxes = option(
        "pca",
        group=FIT,
        help="For whiten: features become principal components (pca), or stay close to the original "
        "features (zca).",
    )
    shrinkage: float = option(
        0.0,
        ge=0,
        le=1,
        group=FIT,
        metavar="FRACTION",
        help="For whiten: shrinkage of the covariance towards a multiple of the identity.",
    )
    seed: int = option(
        0,
        ge=0,
        group=FIT,
        metavar="N",
        help="Random seed. It determines the rows that the report is measured on.",
    )
    output: str = option(group=OUTPUT, short="-o", metavar="FILE", help="HDF5 file to write.", writes="hdf5")
    overwrite: bool = option(
        False, group=OUTPUT, help="Replace an existing FILE once the new one is complete."
    )
