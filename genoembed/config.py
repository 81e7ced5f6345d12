"""What an extraction is asked to do: frozen, checked, and the same keys for Python and the command line.

One dataclass a stage, nested in :class:`EmbedConfig`. :func:`embed_config` takes the flat keys, spreads them
over the stages, and reports everything that is wrong at once.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Pooling: TypeAlias = Literal["mean", "max", "first", "last", "cls", "weighted_mean", "none"]
Fusion: TypeAlias = Literal["none", "concat", "mean", "max", "weighted"]
Strands: TypeAlias = Literal["none", "mean", "concat"]
InvalidPolicy: TypeAlias = Literal["error", "skip", "mask"]
DuplicatePolicy: TypeAlias = Literal["error", "suffix"]
EmptyPolicy: TypeAlias = Literal["error", "skip"]
GapPolicy: TypeAlias = Literal["error", "strip"]
ComputeDtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
StorageDtype: TypeAlias = Literal["float32", "float16"]

DEFAULT_MODEL = "genoembed-mini"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """Which sequences, and what to do with those that are not clean."""

    inputs: tuple[str, ...]
    """Sequence files; ``-`` is standard input."""
    regions: tuple[str, ...] = ()
    """BED or GFF3 files, or places such as ``chr1:1001-2000`` (1-based, inclusive)."""
    flank: int = 0
    """Bases beside each region that the model sees and pooling leaves out."""
    invalid: InvalidPolicy = "error"
    """Letters outside IUPAC DNA."""
    duplicates: DuplicatePolicy = "error"
    """Ids that appear twice."""
    empty: EmptyPolicy = "error"
    """Records without bases."""
    gaps: GapPolicy = "error"
    """Gap letters."""
    keep_case: bool = False
    """Leave soft-masked bases in lower case."""

    def __post_init__(self) -> None:
        problems = _choice_problems(
            ("invalid", self.invalid, InvalidPolicy),
            ("duplicates", self.duplicates, DuplicatePolicy),
            ("empty", self.empty, EmptyPolicy),
            ("gaps", self.gaps, GapPolicy),
        )
        if not self.inputs:
            problems.append("inputs is empty; name at least one sequence file, or '-' for standard input")
        if self.flank < 0:
            problems.append(f"flank is {self.flank}; set flank to 0 or more bases")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, and how it runs."""

    model: str = DEFAULT_MODEL
    """Bundled or registry name, local folder, or Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings."""
    dtype: ComputeDtype = "auto"
    """Type of the activations; ``auto`` is bfloat16 on CUDA, float32 elsewhere."""
    device: str | None = None
    """Torch device; None is CUDA if present, else the CPU."""
    threads: int | None = None
    """Threads of the CPU's matrix products; None leaves torch's choice."""
    batch_tokens: int = 8192
    """Slots of one forward pass, padding included."""

    def __post_init__(self) -> None:
        problems = _choice_problems(("dtype", self.dtype, ComputeDtype))
        if self.threads is not None and self.threads < 1:
            problems.append(f"threads is {self.threads}; set threads to 1 or more")
        if self.batch_tokens < 1:
            problems.append(f"batch_tokens is {self.batch_tokens}; set batch_tokens to 1 or more")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """What is taken from the model."""

    layers: tuple[str, ...] = ("final",)
    """Block numbers, module paths, globs, ``final`` or ``all``."""
    pooling: Pooling = "mean"
    """How tokens become one vector; ``none`` keeps them."""
    skip_first: int = 0
    """Bases at the start of what the model sees that pooling leaves out."""
    fusion: Fusion = "none"
    """How several layers become one matrix."""
    fusion_weights: tuple[float, ...] = ()
    """One weight a layer, for ``weighted``."""
    rc: Strands = "none"
    """Whether and how the reverse complement takes part."""

    def __post_init__(self) -> None:
        problems = _choice_problems(
            ("pooling", self.pooling, Pooling), ("fusion", self.fusion, Fusion), ("rc", self.rc, Strands)
        )
        if not self.layers:
            problems.append("layers is empty; name at least one layer, or leave it out for 'final'")
        if self.skip_first < 0:
            problems.append(f"skip_first is {self.skip_first}; set skip_first to 0 or more bases")
        if self.skip_first and self.pooling == "none":
            problems.append(
                "skip_first leaves bases out of pooling, but pooling is 'none'; set skip_first to 0 and "
                "leave out the first rows of each record when you read the file"
            )
        if self.fusion == "weighted" and not self.fusion_weights:
            problems.append("fusion is 'weighted' without fusion_weights; give one weight a layer")
        if self.fusion != "weighted" and self.fusion_weights:
            problems.append(f"fusion_weights are given, but fusion is {self.fusion!r}; set fusion='weighted'")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowConfig:
    """How sequences longer than the context are cut."""

    window: int | None = None
    """Bases of a window; None is what the model's context holds."""
    stride: int | None = None
    """Bases from window to window; None is three quarters of a window."""
    per_window: bool = False
    """A row a window instead of a row a record."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}; set {name} to 1 or more bases"
            for name, value in (("window", self.window), ("stride", self.stride))
            if value is not None and value < 1
        ]
        if self.window and self.stride and self.stride > self.window:
            problems.append(
                f"stride is {self.stride}, but window is {self.window}: bases between windows would be lost; "
                "set stride to the window or less"
            )
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where the vectors go."""

    output: str
    """The HDF5 file."""
    out_dtype: StorageDtype = "float32"
    """How values are stored; float16 loses small differences."""
    overwrite: bool = False
    """Replace an existing file, once the new one is complete."""

    def __post_init__(self) -> None:
        _raise_all(_choice_problems(("out_dtype", self.out_dtype, StorageDtype)))


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """One extraction."""

    input: InputConfig
    model: ModelConfig
    embedding: EmbeddingConfig
    windows: WindowConfig
    output: OutputConfig

    def __post_init__(self) -> None:
        problems = []
        if self.windows.per_window and self.embedding.pooling == "none":
            problems.append(
                "per_window gives a vector a window, pooling='none' one a token; choose one of the two"
            )
        if self.input.flank and not self.input.regions:
            problems.append(f"flank is {self.input.flank}, but there are no regions; set regions")
        _raise_all(problems)

    def to_dict(self) -> dict[str, object]:
        """Give the configuration as nested dicts that JSON can hold.

        Returns:
            One dict a stage.
        """
        return asdict(self)


_STAGES = {
    "input": InputConfig,
    "model": ModelConfig,
    "embedding": EmbeddingConfig,
    "windows": WindowConfig,
    "output": OutputConfig,
}
OPTION_STAGE = {field.name: stage for stage, cls in _STAGES.items() for field in fields(cls)}
"""The stage that each flat key belongs to."""


def embed_config(options: Mapping[str, object]) -> EmbedConfig:
    """Build a configuration from flat keys.

    Args:
        options: Values by field name; without ``output`` it is the first input's stem and ``.h5``.

    Returns:
        The configuration.

    Raises:
        ConfigError: If a key is unknown or a value is wrong; everything at once.

    Example:
        >>> config = embed_config({"inputs": ("phage.fa.gz",), "layers": ("28",)})
        >>> config.output.output, config.embedding.layers
        ('phage.h5', ('28',))
    """
    problems = [_unknown_key(key) for key in options if key not in OPTION_STAGE]
    known = {key: value for key, value in options.items() if key in OPTION_STAGE}
    inputs = known.get("inputs")
    if known.get("output") is None and isinstance(inputs, tuple) and inputs:
        known["output"] = default_output(inputs[0])
    parts = {}
    for stage, cls in _STAGES.items():
        try:
            parts[stage] = cls(**{key: value for key, value in known.items() if OPTION_STAGE[key] == stage})
        except ConfigError as error:
            problems.extend(error.problems)
        except TypeError:
            problems.append(f"{stage}: a required key is missing")
    _raise_all(problems)
    return EmbedConfig(**parts)


def default_output(first_input: str) -> str:
    """Name the output after the first input.

    Args:
        first_input: A file name, or ``-``.

    Returns:
        Its stem, without the endings of compression and format, and ``.h5``; in the current folder for ``-``.

    Example:
        >>> default_output("data/genome.fa.gz"), default_output("-")
        ('data/genome.h5', 'embeddings.h5')
    """
    if first_input == "-":
        return "embeddings.h5"
    path = Path(first_input)
    if path.suffix.lower() in {".gz", ".bgz", ".bz2", ".xz", ".zst"}:
        path = path.with_suffix("")
    return os.fspath(path.with_suffix(".h5"))


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key, OPTION_STAGE, n=1)
    return f"{key!r} is no option" + (f"; did you mean {near[0]!r}?" if near else "")


def _choice_problems(*choices: tuple[str, object, object]) -> list[str]:
    return [
        f"{name} is {value!r}; set {name} to one of {', '.join(get_args(alias))}"
        for name, value, alias in choices
        if value not in get_args(alias)
    ]


def _raise_all(problems: Iterable[str]) -> None:
    found = tuple(problems)
    if found:
        raise ConfigError(*found)
