"""Options of an extraction: one configuration for each stage, nested in :class:`EmbedConfig`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genoembed.config.choices import (
    ComputeDtype,
    DuplicatePolicy,
    EmptyPolicy,
    Engine,
    FailurePolicy,
    Fp8Choice,
    Fusion,
    GapPolicy,
    InvalidPolicy,
    Pooling,
    RegionPolicy,
    StorageDtype,
    Strands,
)
from genoembed.config.fields import Config, option, same_option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


DEFAULT_MODEL = "genoembed-mini"
INPUT, MODEL, VECTORS, WINDOWS, OUTPUT, RUN = (
    *("Input", "Model", "Vectors", "Long sequences", "Output", "Run"),
)
ONE_PER_LAYER = "one weight per layer, such as 0.2,0.8"


class PolicyConfig(Config):
    """What is done with records that are not clean."""

    invalid: InvalidPolicy = option(
        "error",
        group=INPUT,
        basic=True,
        help="Letters outside the IUPAC DNA alphabet: stop, skip the record, or mask each letter (read "
        "it as N).",
    )
    duplicates: DuplicatePolicy = option(
        "error", group=INPUT, help="A record id that appears again: stop, or append _2, _3, ... to it."
    )
    empty: EmptyPolicy = option("error", group=INPUT, help="A record without bases: stop, or skip it.")
    gaps: GapPolicy = option("error", group=INPUT, help="Gap letters (- . *): stop, or remove them.")
    keep_case: bool = option(
        False,
        group=INPUT,
        help="Keep soft-masked bases in lower case. By default they are converted to upper case.",
    )


class RegionConfig(PolicyConfig):
    """Which parts of the sequences."""

    regions: tuple[str, ...] = option(
        (),
        group=INPUT,
        basic=True,
        metavar="PLACE",
        help="Embed only these regions of one FASTA file: a BED, GFF3 or GTF file, or a place such as "
        "chr1:1001-2000 (both ends included). Repeatable.",
        reads="or a place",
    )
    feature: tuple[str, ...] = option(
        (),
        group=INPUT,
        basic=True,
        metavar="TYPE",
        shown_default="all rows of PLACE but those that are the contig itself",
        help="Embed the features of this type, such as gene or CDS: those of the GFF3 or GTF files in "
        "--regions, or those of INPUT itself (GenBank, EMBL, GFF3 with sequences). Parts of one feature are "
        "joined. Repeatable.",
    )
    name_attribute: str | None = option(
        None,
        group=INPUT,
        metavar="NAME",
        shown_default="ID, locus_tag, gene or Name, the first that is there",
        help="Attribute or qualifier to take the ids of features from.",
    )
    join_by: str | None = option(
        None,
        group=INPUT,
        metavar="NAME",
        shown_default="ID in GFF3, transcript_id in GTF",
        help="Attribute that the parts of a feature share, such as Parent; none: embed each part alone.",
    )
    bad_regions: RegionPolicy = option(
        "error",
        group=INPUT,
        help="Regions that cannot be read (beyond the end of their contig, on a contig that is not there, "
        "parts on both strands): stop, or skip them.",
    )

    def region_problems(self) -> Iterator[Problem]:
        """Say which options of regions are set without any regions."""
        if self.regions or self.feature:
            return
        for key, default in (("name_attribute", None), ("join_by", None), ("bad_regions", "error")):
            if (value := getattr(self, key)) != default:
                yield Problem(
                    f"{key} is {value!r}, but there are no regions and no features",
                    Remedy("feature", words="a type such as 'CDS'"),
                )


class InputConfig(RegionConfig):
    """Which sequences, and what is done with those that are not clean."""

    inputs: tuple[str, ...] = option(
        argument=True,
        metavar="INPUT",
        help="FASTA, FASTQ, GenBank or EMBL files, compressed or not; - is standard input.",
        reads=True,
    )

    flank: int = option(
        0,
        ge=0,
        unit="bases",
        group=INPUT,
        metavar="BASES",
        help="Extra bases on each side of a region: the model reads them, pooling ignores them.",
    )

    def _problems(self) -> Iterator[str]:
        if not self.inputs:
            yield "inputs is empty; name at least one sequence file, or '-' for standard input"
        if self.flank and not self.regions and not self.feature:
            yield Problem(
                f"flank is {self.flank}, but there are no regions",
                Remedy("regions", words="a BED or GFF3 file, or a place such as chr1:1001-2000"),
            )
        yield from self.region_problems()


class ModelConfig(Config):
    """Which model, and how it runs."""

    model: str = option(
        DEFAULT_MODEL,
        group=MODEL,
        basic=True,
        metavar="NAME",
        help="Model: a name from 'genoembed models', a local folder, an Evo 2 checkpoint file, or a "
        "Hugging Face id.",
        reads="if there",
    )
    revision: str | None = option(
        None, group=MODEL, metavar="REV", help="Branch, tag or commit of a Hugging Face repository."
    )
    trust_remote_code: bool = option(
        False,
        group=MODEL,
        help="Run the Python code in the model's folder or repository. Read that code first.",
    )
    dtype: ComputeDtype = option(
        "auto",
        group=MODEL,
        basic=True,
        help="Type of weights and activations. auto: bfloat16 on hardware that is faster in it "
        "(NVIDIA GPUs from Ampere on; CPUs are measured once), else float32. The file records the type.",
    )
    fp8: Fp8Choice = option(
        "auto",
        group=MODEL,
        help="FP8 (8-bit) input projections of Evo 2. auto: use them for checkpoints that need them, "
        "in hardware on Hopper GPUs and emulated elsewhere. emulate: emulate them for every "
        "checkpoint that has FP8 scales. off: do not use them.",
    )
    device: str | None = option(
        None,
        group=MODEL,
        basic=True,
        metavar="DEVICE",
        shown_default="cuda if present, else cpu",
        help="Device: cpu, cuda, cuda:1, ..., or auto to spread a large model over all GPUs.",
    )
    threads: int | None = option(
        None,
        ge=1,
        group=MODEL,
        metavar="N",
        shown_default="all available cores",
        help="Number of CPU threads for the model.",
    )
    batch_tokens: int | None = option(
        None,
        ge=1,
        unit="tokens",
        group=MODEL,
        basic=True,
        metavar="N",
        shown_default="2048 on a CPU, 16384 elsewhere",
        help="Tokens per forward pass, padding included. Fewer tokens need less memory.",
    )


_OF_FILE: dict[str, Any] = {"shown_default": "as recorded in FILE.h5", "basic": False}


class FileModel(Config):
    """The model that made an embedding file: where it is now, and how it runs."""

    model: str | None = same_option(
        ModelConfig,
        "model",
        None,
        help="Model to use if it is no longer where FILE.h5 says: a name, folder or Hugging Face id.",
        **_OF_FILE,
    )
    trust_remote_code: bool = same_option(ModelConfig, "trust_remote_code")
    dtype: ComputeDtype | None = same_option(
        ModelConfig, "dtype", None, help="Type of weights and activations.", **_OF_FILE
    )
    fp8: Fp8Choice | None = same_option(
        ModelConfig, "fp8", None, help="FP8 (8-bit) input projections of Evo 2.", **_OF_FILE
    )
    device: str | None = same_option(ModelConfig, "device", basic=False)
    threads: int | None = same_option(ModelConfig, "threads")
    batch_tokens: int | None = same_option(ModelConfig, "batch_tokens", basic=False)


class EmbeddingConfig(Config):
    """Which layers, and how tokens become vectors."""

    layers: tuple[str, ...] = option(
        ("final",),
        group=VECTORS,
        basic=True,
        flag="--layer",
        metavar="SPEC",
        help="Layer to read; repeat the option for several layers. A number N means the output of "
        "block N; in StripedHyena 2 models such as Evo 2 it means blocks.N.mlp.l3 (the output of "
        "the MLP). Blocks count from 0, and -1 is the last. Also: a module path, a pattern such "
        "as 'blocks.*.mlp.l3', final (after the last norm), or all. 'genoembed layers MODEL' "
        "lists the layers. A model may have layers of its own as the default, with pooling and fusion.",
    )
    pooling: Pooling = option(
        "mean",
        group=VECTORS,
        basic=True,
        flag="--pool",
        help="How to pool the token vectors of a sequence into one vector. none: keep one vector per token.",
    )
    skip_first: int = option(
        0,
        ge=0,
        unit="bases",
        group=VECTORS,
        metavar="BASES",
        help="Number of bases at the start of the model's input that pooling leaves out.",
    )
    fusion: Fusion = option(
        "none",
        group=VECTORS,
        basic=True,
        flag="--fuse",
        help="How to combine several layers. none: keep one matrix per layer.",
    )
    fusion_weights: tuple[float, ...] = option(
        (),
        group=VECTORS,
        metavar="W,W...",
        help="For --fuse weighted: one weight per layer, separated by commas, or one per option.",
    )
    rc: Strands = option(
        "none",
        group=VECTORS,
        basic=True,
        help="Embed the reverse complement as well. mean: average the two vectors. concat: concatenate them.",
    )

    def _problems(self) -> Iterator[str]:
        if not self.layers:
            yield "layers is empty; name at least one layer, or leave it out for 'final'"
        if self.skip_first and self.pooling == "none":
            yield Problem(
                "skip_first leaves bases out of pooling, but pooling is 'none'",
                Remedy("skip_first", 0),
                " and leave out the first rows of each record when you read the file",
            )
        if self.fusion == "weighted" and not self.fusion_weights:
            yield Problem(
                "fusion is 'weighted', but there are no weights",
                Remedy("fusion_weights", words=ONE_PER_LAYER),
            )
        if self.fusion != "weighted" and self.fusion_weights:
            yield Problem(
                f"fusion_weights are given, but fusion is {self.fusion!r}", Remedy("fusion", "weighted")
            )
        if self.fusion_weights and not (min(self.fusion_weights) >= 0 < max(self.fusion_weights)):
            words = "numbers from 0 on, not all of them 0"
            yield Problem(
                f"fusion_weights is {list(self.fusion_weights)}", Remedy("fusion_weights", words=words)
            )


class WindowConfig(Config):
    """How sequences longer than the context are cut."""

    window: int | None = option(
        None,
        ge=1,
        unit="bases",
        group=WINDOWS,
        basic=True,
        metavar="BASES",
        shown_default="what the model's context holds",
        help="Length of a window in bases. Longer sequences are split into overlapping windows.",
    )
    stride: int | None = option(
        None,
        ge=1,
        unit="bases",
        group=WINDOWS,
        metavar="BASES",
        shown_default="3/4 of a window",
        help="Distance in bases between the starts of two windows.",
    )
    per_window: bool = option(
        False, group=WINDOWS, help="Write one row per window instead of one row per record."
    )
    carry_state: bool = option(
        False,
        group=WINDOWS,
        help="Run each base once: carry the state of the model from window to window instead of reading the "
        "overlap again. For StripedHyena 2 and Evo 1. Changes the vectors of sequences of several windows.",
    )

    def _problems(self) -> Iterator[str]:
        if self.window and self.stride and self.stride > self.window:
            yield Problem(
                f"stride is {self.stride}, but window is {self.window}: bases between windows would be lost",
                Remedy("stride", words="the window or less"),
            )


class OutputConfig(Config):
    """Where the vectors go."""

    output: str = option(
        group=OUTPUT,
        basic=True,
        short="-o",
        metavar="FILE",
        shown_default="name of the first INPUT with .h5; embeddings.h5 for -",
        help="HDF5 file to write.",
        writes="hdf5",
    )
    out_dtype: StorageDtype = option(
        "float32",
        group=OUTPUT,
        help="Type of the stored values. float16 halves the file and loses small differences.",
    )
    overwrite: bool = option(
        False,
        group=OUTPUT,
        basic=True,
        help="Replace an existing FILE once the new one is complete. Finished units of a different run "
        "are deleted.",
    )
    resume: bool = option(
        False,
        group=OUTPUT,
        basic=True,
        help="If FILE is complete and was made by this same run, keep it and stop. An interrupted run "
        "continues with or without this option.",
    )


class TableOutput(Config):
    """Where a table goes."""

    output: str | None = option(
        None,
        group=OUTPUT,
        basic=True,
        short="-o",
        metavar="FILE",
        shown_default="standard output",
        help="Table to write.",
        writes="table",
    )
    overwrite: bool = option(
        False, group=OUTPUT, basic=True, help="Replace an existing FILE once the new one is complete."
    )


class RunConfig(Config):
    """How the work is divided, and what happens when a part of it fails."""

    unit_bases: int = option(
        1_000_000,
        ge=1,
        unit="bases",
        group=RUN,
        metavar="BASES",
        help="Bases per work unit. Results are saved unit by unit, and an interruption loses one unit "
        "at most. A longer record is a unit of its own.",
    )
    on_error: FailurePolicy = option(
        "stop",
        group=RUN,
        basic=True,
        help="If a record fails (out of memory, values that are not finite, no base to pool): stop, or "
        "skip it. A skipped record gets a NaN vector and a flag, and the exit code is 3.",
    )
    certificate: int = option(
        0,
        ge=0,
        unit="records",
        group=RUN,
        metavar="N",
        help="Embed N records of the first unit again, each alone, and record how far vectors depend "
        "on their batch.",
    )
    shard: str | None = option(
        None,
        group=RUN,
        metavar="I/N",
        help="Process every Nth unit, starting with the Ith: one of N jobs. 'genoembed merge FILE' "
        "joins their results.",
    )
    engine: Engine = option(
        "local",
        group=RUN,
        help="Where the work is done: in this process, or by workers of a Ray cluster (needs the extra "
        "'ray').",
    )
    workers: int | None = option(
        None,
        ge=1,
        group=RUN,
        metavar="N",
        shown_default="one per GPU, else one",
        help="Number of Ray workers.",
    )
    ray_address: str | None = option(
        None,
        group=RUN,
        metavar="HOST:PORT",
        shown_default="RAY_ADDRESS, else a new cluster",
        help="Address of the Ray cluster, or auto.",
    )

    def _problems(self) -> Iterator[str]:
        if self.shard is not None and read_shard(self.shard) is None:
            words = "I/N with I from 1 to N, such as 1/8"
            yield Problem(f"shard is {self.shard!r}", Remedy("shard", words=words))
        for key in ("workers", "ray_address"):
            if self.engine != "ray" and getattr(self, key) is not None:
                yield Problem(
                    f"{key} is {getattr(self, key)!r}, but engine is {self.engine!r}", Remedy("engine", "ray")
                )

    @property
    def share(self) -> tuple[int, int]:
        """Which units: number of the first, and from one to the next; ``(0, 1)`` is all of them."""
        return (0, 1) if self.shard is None else read_shard(self.shard) or (0, 1)


def read_shard(text: str) -> tuple[int, int] | None:
    """Read which share of the units a text means.

    Example:
        >>> read_shard("3/8"), read_shard("9/8")
        ((2, 8), None)
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None:
        return None
    part, parts = int(found[1]), int(found[2])
    return (part - 1, parts) if 1 <= part <= parts else None


class EmbedConfig(Config):
    """One extraction."""

    input: InputConfig
    model: ModelConfig
    embedding: EmbeddingConfig
    windows: WindowConfig
    output: OutputConfig
    run: RunConfig = RunConfig()

    def _problems(self) -> Iterator[str]:
        if self.windows.per_window and self.embedding.pooling == "none":
            yield "per_window gives one vector per window, pooling='none' one per token; choose one of them"


OPTION_STAGE = {key: name for name, section in EmbedConfig.sections().items() for key in section.options()}
"""The stage that each flat key belongs to."""


def embed_config(options: Mapping[str, object]) -> EmbedConfig:
    """Build a configuration from flat keys.

    Example:
        >>> config = embed_config({"inputs": ("phage.fa.gz",), "layers": ("28",)})
        >>> config.output.output, config.embedding.layers
        ('phage.h5', ('28',))
    """
    given = {"inputs": ()} | dict(options)
    if given.get("output") is None:
        given["output"] = _default_output(given["inputs"])
    return EmbedConfig.build(given)


def _default_output(inputs: object) -> str:
    """Return the output's name if the inputs are valid; if they are not, that is reported elsewhere."""
    first = inputs[0] if isinstance(inputs, tuple | list) and inputs else inputs
    return default_output(os.fspath(first)) if isinstance(first, str | os.PathLike) else default_output("-")


def default_output(first_input: str) -> str:
    """Return the output's default name, made from the first input.

    Example:
        >>> default_output("data/genome.fa.gz"), default_output("-")
        ('data/genome.h5', 'embeddings.h5')
    """
    path = Path(first_input)
    if first_input == "-" or not path.name:
        return "embeddings.h5"
    if path.suffix.lower() in {".gz", ".bgz", ".bz2", ".xz", ".zst"}:
        path = path.with_suffix("")
    return os.fspath(path.with_suffix(".h5"))


class ExtractOptions(EmbedConfig):
    """An extraction, or what it would need: what the command line and a file may say."""

    dry_run: bool = option(
        False,
        group=RUN,
        help="Write nothing. Read INPUT once, run three batches, and print what the run would need: "
        "units, tokens, memory, disk space and time.",
    )
