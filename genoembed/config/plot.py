"""Options of a plot: how points are arranged, colored and drawn."""

from __future__ import annotations

from genoembed.config.choices import MapMethod
from genoembed.config.fields import Config, option

MAP, COLORS, OUTPUT = "The map", "Colors", "Output"


class MapConfig(Config):
    """How vectors become points in the plane."""

    method: MapMethod = option("pca", group=MAP, basic=True, help="How vectors become points in the plane.")
    components: int = option(
        50, ge=2, group=MAP, metavar="N", help="For umap and tsne: principal components that they start from."
    )
    neighbors: int = option(
        15,
        flag="--umap-neighbors",
        ge=2,
        group=MAP,
        metavar="N",
        help="For umap: neighbors of a point; more show the large shape, fewer the small one.",
    )
    min_dist: float = option(
        0.1, ge=0, le=1, group=MAP, metavar="X", help="For umap: how close points may be."
    )
    perplexity: float = option(
        30.0, ge=1, group=MAP, metavar="X", help="For tsne: about how many neighbors a point has."
    )
    seed: int = option(0, group=MAP, metavar="N", help="Random seed of the map and of the sample of points.")


class PlotConfig(MapConfig):
    """How a map is drawn."""

    layer: str | None = option(
        None,
        group=MAP,
        basic=True,
        metavar="NAME",
        shown_default="the file's first",
        help="Which matrix of the file.",
    )
    transform: str | None = option(
        None,
        group=MAP,
        basic=True,
        metavar="FILE.h5",
        help="A transform of fit-transform, applied first.",
        reads=True,
    )
    max_points: int = option(
        100_000, ge=1, group=MAP, metavar="N", help="Draw a random sample of N rows where there are more."
    )
    color: tuple[str, ...] = option(
        (),
        group=COLORS,
        basic=True,
        metavar="COLUMN",
        help="Column of FILE.h5 or of the values. Repeatable: pictures show the first, the page all.",
    )
    values: str | None = option(
        None,
        group=COLORS,
        basic=True,
        metavar="FILE",
        help="A table: ids in its first column, then values.",
        reads=True,
    )
    classes: tuple[str, ...] = option(
        (),
        group=COLORS,
        basic=True,
        metavar="COLUMN",
        help="Columns of the values whose numbers are classes, such as clusters. Repeatable.",
    )
    title: str | None = option(
        None, group=OUTPUT, basic=True, metavar="TEXT", shown_default="the file's name", help="Heading."
    )
    output: tuple[str, ...] = option(
        (),
        group=OUTPUT,
        basic=True,
        short="-o",
        metavar="FILE",
        shown_default="FILE.png and FILE.html",
        help="File to write, ending in .png, .svg, .html or .tsv. Repeatable.",
        writes="picture",
    )
    overwrite: bool = option(False, group=OUTPUT, basic=True, help="Replace existing files.")
