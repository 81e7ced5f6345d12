"""Options of scoring: sequences by their likelihood, variants by what they change."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from genoembed.config.choices import (
    ComputeDtype,
    FailurePolicy,
    ScorePooling,
    ScoreStrands,
    StartChoice,
    UnsupportedPolicy,
)
from genoembed.config.embed import (
    INPUT,
    MODEL,
    OUTPUT,
    ModelConfig,
    PolicyConfig,
    RegionConfig,
    TableOutput,
    WindowConfig,
)
from genoembed.config.fields import option, same_option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

SCORES, VARIANTS = "Scores", "Variants (with --vcf or --mutagenesis)"
DEFAULT_FLANK = 512


class ScoreRunConfig(ModelConfig):
    """The model and how it runs, for both ways of scoring."""

    dtype: ComputeDtype = option(
        "float32",
        group=MODEL,
        help="Type of weights and activations. Half precision rounds away the small differences that "
        "matter here.",
    )
    rc: ScoreStrands = option(
        "none", group=SCORES, basic=True, help="mean: score both strands, and average the two scores."
    )
    start_token: StartChoice = option(
        "auto",
        group=SCORES,
        help="Token that the model reads before the first base. auto: the token that starts a sequence "
        "in training, so that the first base gets a score, too. none: no token, and no score for "
        "the first base. Masked models take auto only, and always score the first base.",
    )
    on_error: FailurePolicy = option(
        "stop",
        group=SCORES,
        basic=True,
        help="If a record fails (out of memory, values that are not finite, no base to score, longer "
        "than the context): stop, or skip it. A skipped record gets NA in its row, and the exit "
        "code is 3.",
    )


class ScoreConfig(ScoreRunConfig, PolicyConfig):
    """How sequences are scored."""

    window: int | None = same_option(WindowConfig, "window", group=SCORES)
    stride: int | None = same_option(WindowConfig, "stride", group=SCORES)
    carry_state: bool = same_option(
        WindowConfig,
        "carry_state",
        group=SCORES,
        help="Run each base once: carry the state of the model from window to window instead of reading the "
        "overlap again. For StripedHyena 2. Changes the scores of sequences of several windows.",
    )

    def _problems(self) -> Iterator[str]:
        if self.window and self.stride and self.stride > self.window:
            yield Problem(
                f"stride is {self.stride}, but window is {self.window}: bases between windows would be lost",
                Remedy("stride", words="the window or less"),
            )


class AlleleConfig(ScoreRunConfig):
    """How alleles are scored, wherever they come from."""

    flank: int = option(
        DEFAULT_FLANK,
        ge=1,
        unit="bases",
        group=VARIANTS,
        basic=True,
        metavar="BASES",
        help="Bases on each side of a change that the model reads and scores.",
    )


class MutationConfig(AlleleConfig, RegionConfig):
    """How all changes of single bases are scored."""

    regions: tuple[str, ...] = same_option(
        RegionConfig,
        "regions",
        help="With --mutagenesis: change only the bases of these regions of one FASTA file: a BED, GFF3 or "
        "GTF file, or a place such as chr1:1001-2000 (both ends included). Repeatable.",
    )
    feature: tuple[str, ...] = same_option(
        RegionConfig,
        "feature",
        help="With --mutagenesis: change the bases of features of this type, such as gene or CDS: those of "
        "the GFF3 or GTF files in --regions, or those of INPUT itself (GenBank, EMBL, GFF3 with sequences). "
        "Repeatable.",
    )
    heat_map: str | None = option(
        None,
        group=OUTPUT,
        basic=True,
        metavar="FILE",
        help="With --mutagenesis: heat map of the scores (PNG).",
        writes="picture",
    )

    def _problems(self) -> Iterator[str]:
        if self.heat_map is not None and not self.heat_map.lower().endswith(".png"):
            yield Problem(
                f"heat_map is {self.heat_map!r}", Remedy("heat_map", words="a name that ends in .png")
            )
        yield from self.region_problems()
        if (self.regions or self.feature) and self.gaps == "strip":
            yield Problem(
                "gaps is 'strip', but places in regions are counted with the gaps",
                Remedy("gaps", "error"),
                " and remove them from the file first",
            )


class VariantConfig(AlleleConfig):
    """How variants are scored."""

    unsupported: UnsupportedPolicy = option(
        "skip",
        group=VARIANTS,
        help="With --vcf: alleles without a sequence (symbolic alleles, breakends, *): skip, or stop.",
    )
    layer: str | None = option(
        None,
        group=VARIANTS,
        basic=True,
        metavar="SPEC",
        help="With --vcf: also compare the vectors of this layer, named as in extract.",
    )
    pooling: ScorePooling = option(
        "mean",
        group=VARIANTS,
        flag="--pool",
        help="How to pool the token vectors of a sequence into one vector.",
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
    mutagenesis: bool = option(
        False,
        group=INPUT,
        basic=True,
        help="Score every single-base change of INPUT, or of its --regions.",
    )
    vcf: str | None = option(
        None,
        group=INPUT,
        basic=True,
        metavar="VCF",
        help="Score the variants in this VCF file instead of sequences.",
        reads=True,
    )
    reference: str | None = option(
        None,
        group=INPUT,
        basic=True,
        metavar="FASTA",
        help="With --vcf: FASTA file that the variants were called against.",
        reads=True,
    )
    per_base: str | None = option(
        None,
        group=OUTPUT,
        basic=True,
        metavar="FILE",
        help="Second table, with one row per base.",
        writes="table",
    )
    vectors: str | None = option(
        None,
        group=OUTPUT,
        metavar="FILE",
        help="With --vcf and --layer: HDF5 file for the differences between vectors.",
        writes="hdf5",
    )
    matrix: str | None = option(
        None,
        group=OUTPUT,
        basic=True,
        metavar="FILE",
        help="With --mutagenesis: HDF5 file for the scores, with one row per position and one column "
        "per base.",
        writes="hdf5",
    )


class ScoreOptions(ScoreFiles, MutationConfig, VariantConfig, ScoreConfig):
    """All that the command line and a file may say, about sequences, variants or mutations."""

    def _problems(self) -> Iterator[str]:
        return iter(())


class ScoreTask(NamedTuple):
    """One way of scoring."""

    words: str
    """What is scored, and how that is requested."""
    config: type[ScoreRunConfig]
    files: tuple[str, ...]
    """Which of the options of files it takes."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All options that it takes."""
        return (*self.files, *self.config.options())


SCORE_TASKS = {
    "sequences": ScoreTask("sequences", ScoreConfig, ("inputs", "output", "per_base", "overwrite")),
    "variants": ScoreTask(
        "variants (--vcf)", VariantConfig, ("vcf", "reference", "output", "vectors", "overwrite")
    ),
    "mutations": ScoreTask(
        "mutations (--mutagenesis)",
        MutationConfig,
        ("inputs", "mutagenesis", "output", "matrix", "overwrite"),
    ),
}
