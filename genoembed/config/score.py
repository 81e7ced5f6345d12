"""Options of scoring: sequences by their likelihood, variants by what they change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.choices import (
    ComputeDtype,
    FailurePolicy,
    ScorePooling,
    ScoreStrands,
    StartChoice,
    UnsupportedPolicy,
)
from genoembed.config.embed import INPUT, MODEL, OUTPUT, ModelConfig, PolicyConfig, TableOutput
from genoembed.config.fields import Config, option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

SCORES, VARIANTS = "Scores", "Variants (with --vcf)"
DEFAULT_FLANK = 512


class ScoreRunConfig(ModelConfig):
    """The model and how it runs, for both ways of scoring."""

    dtype: ComputeDtype = option(
        "float32",
        group=MODEL,
        help="Type of weights and activations; half precision rounds the small differences that matter here.",
    )
    rc: ScoreStrands = option(
        "none", group=SCORES, basic=True, help="mean: score both strands, each counting half."
    )
    start_token: StartChoice = option(
        "auto",
        group=SCORES,
        help="What a causal model reads before the first base, so that this base is scored as well: auto "
        "takes the token that begins a sequence in training; with none the first base has no score. Masked "
        "models score the first base in any case, read what their tokenizer adds, and take auto only.",
    )
    on_error: FailurePolicy = option(
        "stop",
        group=SCORES,
        basic=True,
        help="A record that fails (values that are not finite, no memory, nothing to score, longer than the "
        "context): stop, or write NA in its row and exit with 3 at the end.",
    )


class ScoreConfig(ScoreRunConfig, PolicyConfig):
    """How sequences are scored."""

    window: int | None = option(
        None,
        ge=1,
        unit="bases",
        group=SCORES,
        basic=True,
        metavar="BASES",
        shown_default="what the model's context holds",
        help="Length of a window. A longer sequence is cut into overlapping windows.",
    )
    stride: int | None = option(
        None,
        ge=1,
        unit="bases",
        group=SCORES,
        metavar="BASES",
        shown_default="3/4 of a window",
        help="Distance from the start of a window to the start of the next.",
    )

    def _problems(self) -> Iterator[str]:
        if self.window and self.stride and self.stride > self.window:
            yield Problem(
                f"stride is {self.stride}, but window is {self.window}: bases between windows would be lost",
                Remedy("stride", words="the window or less"),
            )


class VariantConfig(ScoreRunConfig):
    """How variants are scored."""

    flank: int = option(
        DEFAULT_FLANK,
        ge=1,
        unit="bases",
        group=VARIANTS,
        basic=True,
        metavar="BASES",
        help="Bases on each side of a change that the model reads and scores with it.",
    )
    unsupported: UnsupportedPolicy = option(
        "skip", group=VARIANTS, help="Alleles without a sequence (symbolic, breakends, *): skip, or stop."
    )
    layer: str | None = option(
        None,
        group=VARIANTS,
        basic=True,
        metavar="SPEC",
        help="Compare the vectors of this layer as well, specified as for extract.",
    )
    pooling: ScorePooling = option(
        "mean", group=VARIANTS, flag="--pool", help="How the tokens of a stretch become one vector."
    )


class ScoreFiles(TableOutput):
    """What scoring reads and writes."""

    inputs: tuple[str, ...] = option(
        (),
        argument=True,
        metavar="INPUT",
        help="Sequence files in any format of extract; - is standard input.",
        reads=True,
    )
    vcf: str | None = option(
        None,
        group=INPUT,
        basic=True,
        metavar="VCF",
        help="Score these variants instead of sequences.",
        reads=True,
    )
    reference: str | None = option(
        None,
        group=INPUT,
        basic=True,
        metavar="FASTA",
        help="With --vcf: the sequences it was called against.",
        reads=True,
    )
    per_base: str | None = option(
        None,
        group=OUTPUT,
        basic=True,
        metavar="FILE",
        help="A second table, with one row per base.",
        writes="table",
    )
    vectors: str | None = option(
        None,
        group=OUTPUT,
        metavar="FILE",
        help="With --vcf and --layer: HDF5 file of differences of vectors.",
        writes="hdf5",
    )


class ScoreOptions(ScoreFiles, VariantConfig, ScoreConfig):
    """All that the command line and a file may say, about sequences or about variants."""

    def _problems(self) -> Iterator[str]:
        return iter(())


def _only(config: type[Config], other: type[Config]) -> tuple[str, ...]:
    return tuple(key for key in config.options() if key not in other.options())


OF_SEQUENCES = ("per_base", *_only(ScoreConfig, VariantConfig))
OF_VARIANTS = ("reference", "vectors", *_only(VariantConfig, ScoreConfig))
"""Options of the one way of scoring that the other does not take."""
