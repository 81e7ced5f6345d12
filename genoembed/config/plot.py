"""Options of a plot: how points are arranged, colored and drawn."""

from __future__ import annotations

from genoembed.config.choices import MapMethod, Theme
from genoembed.config.fields import Config, option

MAP, COLORS, OUTPUT = "Map", "Colors", "Output"


class MapConfig(Config):
    """How vectors become points in the plane."""

    method: MapMethod = option(
        "pca", group=MAP, basic=True, help="How to reduce the vectors to two dimensions."
    )
    components: int = option(
        50,
        ge=2,
        group=MAP,
        metavar="N",
        help="For umap and tsne: number of principal components to start from.",
    )
    neighbors: int = option(
        15,
        flag="--umap-neighbors",
        ge=2,
        group=MAP,
        metavar="N",
        help="For umap: number of neighbors of a point. More neighbors show the overall shape, fewer "
        "show details.",
    )
    min_dist: float = option(
        0.1, ge=0, le=1, group=MAP, metavar="X", help="For umap: smallest distance between points."
    )
    perplexity: float = option(
        30.0, ge=1, group=MAP, metavar="X", help="For tsne: effective number of neighbors of a point."
    )
    seed: int = option(
        0, group=MAP, metavar="N", help="Random seed. It determines the map and the sample of points."
    )


class PlotConfig(MapConfig):
    """How a map is drawn."""

    layer: str | None = option(
        None,
        group=MAP,
        basic=True,
        metavar="NAME",
        shown_default="the first",
        help="Layer of the file to use.",
    )
    transform: str | None = option(
        None,
        group=MAP,
        basic=True,
        metavar="FILE.h5",
        help="Transform made by fit-transform. It is applied first.",
        reads=True,
    )
    max_points: int = option(
        100_000, ge=1, group=MAP, metavar="N", help="Draw a random sample of N rows if the file has more."
    )
    color: tuple[str, ...] = option(
        (),
        group=COLORS,
        basic=True,
        metavar="COLUMN",
        help="Column of FILE.h5 or of --values to color by. Repeatable: pictures show the first, the "
        "page can switch.",
    )
    values: str | None = option(
        None,
        group=COLORS,
        basic=True,
        metavar="FILE",
        help="Table of values: ids in the first column, values in the others.",
        reads=True,
    )
    classes: tuple[str, ...] = option(
        (),
        group=COLORS,
        basic=True,
        metavar="COLUMN",
        help="Column of --values whose numbers are classes, such as clusters. Repeatable.",
    )
    title: str | None = option(
        None,
        group=OUTPUT,
        basic=True,
        metavar="TEXT",
        shown_default="name of the file",
        help="Heading of the map.",
    )
    theme: Theme = option(
        "light", group=OUTPUT, help="Background of pictures. The page follows the browser's settings."
    )
    output: tuple[str, ...] = option(
        (),
        group=OUTPUT,
        basic=True,
        short="-o",
        metavar="FILE",
        shown_default="FILE.png and FILE.html",
        help="File to write, ending in .png, .svg, .pdf, .html or .tsv. Repeatable.",
        writes="picture",
    )
    overwrite: bool = option(
        False, group=OUTPUT, basic=True, help="Replace an existing FILE once the new one is complete."
    )
