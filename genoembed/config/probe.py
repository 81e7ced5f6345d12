"""Options of a probe: how layers are compared, and the options of extraction that the user may set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.choices import Folding, Preset, ProbeTask, UnmatchedPolicy
from genoembed.config.embed import (
    OUTPUT,
    VECTORS,
    EmbedConfig,
    EmbeddingConfig,
    InputConfig,
    ModelConfig,
    RunConfig,
    WindowConfig,
)
from genoembed.config.fields import Config, option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

LABELS, FOLDS, COMPARISONS = "Labels", "Folds", "Comparisons"
MIN_FOLDS = 3
TOP = (2, 4)
FIXED = (
    *("fusion", "fusion_weights", "per_window", "shard", "output", "overwrite", "resume", "inputs"),
    *("engine", "workers", "ray_address", "certificate", "out_dtype"),
)
"""Options of an extraction that a probe decides by itself, or has its own of."""


class ProbeConfig(Config):
    """How layers are compared."""

    task: ProbeTask = option(
        "classification", group=LABELS, basic=True, help="Type of the labels: classes or numbers."
    )
    cv: Folding = option(
        "stratified",
        group=FOLDS,
        basic=True,
        help="How to divide rows into folds: at random with the classes spread evenly (stratified); "
        "with groups, homologs or chromosomes kept in one fold. A chromosome is the id before "
        "':', or the file.",
    )
    num_folds: int = option(5, ge=MIN_FOLDS, group=FOLDS, metavar="N", help="Number of folds.")
    seed: int = option(
        0,
        group=FOLDS,
        metavar="N",
        help="Random seed. It determines the folds and the weights of the untrained copy.",
    )
    id_column: str = option("id", group=LABELS, metavar="NAME", help="Column of the record ids.")
    label_column: str = option(
        "label", group=LABELS, basic=True, metavar="NAME", help="Column of the labels."
    )
    group_column: str | None = option(
        None,
        group=FOLDS,
        metavar="NAME",
        shown_default="group",
        help="For --cv grouped: column of groups that stay together.",
    )
    split_column: str | None = option(
        None,
        group=LABELS,
        metavar="NAME",
        shown_default="split",
        help="For --preset geneb: column with the values train and test.",
    )
    split: str | None = option(
        None,
        group=LABELS,
        metavar="FILE",
        help="For --preset geneb: table of ids and splits, instead of a column.",
        reads=True,
    )
    unmatched: UnmatchedPolicy = option(
        "error", group=LABELS, help="A label without a record: stop, or warn and continue."
    )
    homolog_identity: float = option(
        0.8,
        gt=0,
        le=1,
        group=FOLDS,
        metavar="FRACTION",
        help="For --cv homology: sequence identity from which on sequences count as homologs, "
        "estimated from shared k-mers.",
    )
    top: tuple[int, ...] = option(
        TOP,
        group=COMPARISONS,
        metavar="K",
        help="Concatenate the best K layers as one more candidate. Repeatable.",
    )
    baselines: bool = option(
        True,
        group=COMPARISONS,
        help="Score the baselines as well: k-mers, GC content with length, and one-hot letters.",
    )
    untrained: bool = option(
        True,
        group=COMPARISONS,
        basic=True,
        help="Score a copy of the model with random weights as well. This doubles the cost.",
    )
    preset: Preset = option(
        "none",
        group=LABELS,
        help="geneb: also train on all, ten and one rows of each class, with five seeds, and score a "
        "test split.",
    )
    sequences: tuple[str, ...] = option(
        (),
        group=COMPARISONS,
        metavar="FILE",
        help="Sequence files of an embedding file, if they are no longer where it says. Repeatable.",
        reads=True,
    )
    transform: tuple[str, ...] = option(
        (),
        group=COMPARISONS,
        metavar="FILE.h5",
        help="Transform made by fit-transform. It is applied to the layer that it was fitted on. Repeatable.",
        reads=True,
    )
    plot: bool = option(True, group=OUTPUT, help="Draw the score by layer, as PNG and SVG.")

    def _problems(self) -> Iterator[str]:
        if any(number < 2 for number in self.top):
            yield Problem(
                f"top is {list(self.top)}", Remedy("top", words=f"numbers of 2 or more, such as {list(TOP)}")
            )
        if self.preset == "none" and (self.split or self.split_column):
            yield Problem(
                "split and split_column are for a preset", Remedy("preset", "geneb"), ", or leave them out"
            )
        if self.split and self.split_column:
            yield "split names a table and split_column a column of the labels; give one of the two"
        if self.preset != "none" and self.task != "classification":
            yield Problem(
                f"preset 'geneb' is for classes, but task is {self.task!r}",
                Remedy("task", "classification"),
            )
        if self.group_column and self.cv != "grouped":
            yield Problem(
                f"group_column is given, but cv is {self.cv!r}",
                Remedy("cv", "grouped"),
                ", or leave group_column out",
            )


class ProbeFiles(Config):
    """What a probe reads and writes."""

    inputs: tuple[str, ...] = option(
        argument=True,
        metavar="INPUT",
        help="Sequence files; a table of sequences and labels, as finetune takes it; or one embedding file, "
        "whose layers are probed.",
        reads=True,
    )
    labels: str | None = option(
        None,
        group=LABELS,
        basic=True,
        metavar="FILE",
        shown_default="INPUT, if it is a table with a column 'sequence'",
        help="Table of labels, one row per record: TSV, CSV, JSON lines or Parquet.",
        reads=True,
    )
    output: str | None = option(
        None,
        group=OUTPUT,
        basic=True,
        short="-o",
        metavar="DIR",
        shown_default="name of INPUT with .probe",
        help="Folder to write.",
        writes="folder",
    )
    overwrite: bool = option(
        False,
        group=OUTPUT,
        basic=True,
        help="Replace earlier results, and vectors that were made with other settings.",
    )


EXTRACTION_KEYS = tuple(key for key in EmbedConfig.options() if key not in FIXED)
"""Options of an extraction that a probe of sequences takes."""


class ProbeVectors(EmbeddingConfig):
    """How layers are read; a probe looks at all of them."""

    layers: tuple[str, ...] = option(
        ("all",),
        group=VECTORS,
        flag="--layer",
        metavar="SPEC",
        help="Layer to read, named as in extract. Repeatable.",
    )


class ProbeOptions(ProbeFiles, ProbeConfig):
    """All that the command line and a file may say: the probe, and the extraction of sequences."""

    input: InputConfig
    model: ModelConfig
    embedding: ProbeVectors
    windows: WindowConfig
    run: RunConfig


PROBE_KEYS = (*ProbeFiles.options(), *ProbeConfig.options(), *EXTRACTION_KEYS)
