"""What an extraction is asked to do: frozen, checked, and the same keys for Python and the command line.

One dataclass a stage, nested in :class:`EmbedConfig`. :func:`embed_config` takes the flat keys, spreads them
over the stages, and reports everything that is wrong at once.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from genoembed.config.choices import (
    ComputeDtype,
    DuplicatePolicy,
    EmptyPolicy,
    Engine,
    FailurePolicy,
    Fusion,
    GapPolicy,
    InvalidPolicy,
    Pooling,
    StorageDtype,
    Strands,
)
from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


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
        _raise_all(field_problems(self, at_least={"flank": (0, "bases")}))
        if not self.inputs:
            message = "inputs is empty; name at least one sequence file, or '-' for standard input"
            raise ConfigError(message)


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
    """Type of weights and activations; ``auto`` is bfloat16 where the device multiplies matrices in it
    (CUDA from Ampere on, CPUs with AMX), float32 elsewhere."""
    device: str | None = None
    """Torch device; None is CUDA if present, else the CPU; ``auto`` spreads the model over all GPUs."""
    threads: int | None = None
    """Threads of the CPU's matrix products; None leaves torch's choice."""
    batch_tokens: int | None = None
    """Slots of one forward pass, padding included; None takes what is fast on the device."""

    def __post_init__(self) -> None:
        _raise_all(field_problems(self, at_least={"threads": (1, ""), "batch_tokens": (1, "slots")}))


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
        _raise_all(field_problems(self, at_least={"skip_first": (0, "bases")}))
        problems = []
        if not self.layers:
            problems.append("layers is empty; name at least one layer, or leave it out for 'final'")
        if self.skip_first and self.pooling == "none":
            problems.append(
                "skip_first leaves bases out of pooling, but pooling is 'none'; set skip_first to 0 and "
                "leave out the first rows of each record when you read the file"
            )
        if self.fusion == "weighted" and not self.fusion_weights:
            problems.append("fusion is 'weighted' without fusion_weights; give one weight a layer")
        if self.fusion != "weighted" and self.fusion_weights:
            problems.append(f"fusion_weights are given, but fusion is {self.fusion!r}; set fusion='weighted'")
        weights = self.fusion_weights
        if weights and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            problems.append(
                f"fusion_weights is {list(weights)}; give finite numbers, none below 0, and not all 0"
            )
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
        _raise_all(field_problems(self, at_least={"window": (1, "bases"), "stride": (1, "bases")}))
        if self.window and self.stride and self.stride > self.window:
            message = (
                f"stride is {self.stride}, but window is {self.window}: bases between windows would be lost; "
                "set stride to the window or less"
            )
            raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where the vectors go."""

    output: str
    """The HDF5 file."""
    out_dtype: StorageDtype = "float32"
    """How values are stored; float16 loses small differences."""
    overwrite: bool = False
    """Replace an existing file, once the new one is complete; finished units of another run are dropped."""
    resume: bool = False
    """Leave an existing file as it is if it is complete and this very run made it."""

    def __post_init__(self) -> None:
        _raise_all(field_problems(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How the work is divided, and what happens when a part of it fails."""

    unit_bases: int = 1_000_000
    """Bases of a work unit, which is embedded and saved as a whole; a longer record is a unit of its own."""
    on_error: FailurePolicy = "stop"
    """A record that fails: stop, or leave its vector out (NaN), say so in its flags, and go on."""
    certificate: int = 0
    """Records to embed alone, too, so that the file can say how far vectors depend on their batch."""
    shard: str | None = None
    """``I/N``: only every Nth unit, beginning with the Ith; ``genoembed merge`` joins them."""
    engine: Engine = "local"
    """This process, or workers of a Ray cluster."""
    workers: int | None = None
    """Workers of Ray; None is one a GPU, or one where there is none."""
    ray_address: str | None = None
    """Ray cluster to connect to; None starts one here, or takes RAY_ADDRESS."""

    def __post_init__(self) -> None:
        problems = list(
            field_problems(
                self, at_least={"unit_bases": (1, "bases"), "certificate": (0, "records"), "workers": (1, "")}
            )
        )
        problems += [] if problems else self._problems()
        _raise_all(problems)

    def _problems(self) -> Iterator[str]:
        if self.shard is not None and read_shard(self.shard) is None:
            yield f"shard is {self.shard!r}; set shard to I/N with I from 1 to N, such as 1/8"
        for key in ("workers", "ray_address"):
            if self.engine != "ray" and getattr(self, key) is not None:
                yield f"{key} is {getattr(self, key)!r}, but engine is {self.engine!r}; set engine to ray"

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


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """One extraction."""

    input: InputConfig
    model: ModelConfig
    embedding: EmbeddingConfig
    windows: WindowConfig
    output: OutputConfig
    run: RunConfig = field(default_factory=RunConfig)

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
        """Give the configuration as nested dicts that JSON can hold."""
        return asdict(self)


_STAGES = {
    "input": InputConfig,
    "model": ModelConfig,
    "embedding": EmbeddingConfig,
    "windows": WindowConfig,
    "output": OutputConfig,
    "run": RunConfig,
}
OPTION_STAGE = {key.name: stage for stage, cls in _STAGES.items() for key in fields(cls)}
"""The stage that each flat key belongs to."""


def embed_config(options: Mapping[str, object]) -> EmbedConfig:
    """Build a configuration from flat keys.

    Example:
        >>> config = embed_config({"inputs": ("phage.fa.gz",), "layers": ("28",)})
        >>> config.output.output, config.embedding.layers
        ('phage.h5', ('28',))
    """
    problems = [_unknown_key(key) for key in options if key not in OPTION_STAGE]
    known = {key: value for key, value in options.items() if key in OPTION_STAGE}
    if known.get("output") is None:
        known["output"] = _default_output(known.get("inputs"))
    parts: dict[str, Any] = {}
    for stage, cls in _STAGES.items():
        values = {key: value for key, value in known.items() if OPTION_STAGE[key] == stage}
        try:
            parts[stage] = cls(**({"inputs": ()} | values if cls is InputConfig else values))
        except ConfigError as error:
            problems.extend(error.problems)
    _raise_all(problems)
    return EmbedConfig(**parts)


def _default_output(inputs: object) -> str:
    """Name the output where inputs are right; where they are not, that is what will be reported."""
    if isinstance(inputs, tuple) and inputs and isinstance(inputs[0], str):
        return default_output(inputs[0])
    return default_output("-")


def default_output(first_input: str) -> str:
    """Name the output after the first input.

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


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key, OPTION_STAGE, n=1)
    return f"{key!r} is no option" + (f"; did you mean {near[0]!r}?" if near else "")


def field_problems(config: object, *, at_least: Mapping[str, tuple[int, str]] | None = None) -> Iterable[str]:
    """Check each field of a dataclass by itself."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        wanted = _mismatch(value, hint)
        smallest, unit = (at_least or {}).get(name, (None, ""))
        if wanted:
            yield f"{name} is {value!r}; set {name} to {wanted}"
        elif smallest is not None and value is not None and value < smallest:
            yield f"{name} is {value}; set {name} to {smallest} or more" + (f" {unit}" if unit else "")


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _mismatch(value: object, hint: Any) -> str:
    """Say in words what a field takes, if the value is something else; empty if it fits."""
    if get_origin(hint) is Literal:
        return "" if value in get_args(hint) else f"one of {', '.join(get_args(hint))}"
    if isinstance(hint, UnionType):
        kind, _ = get_args(hint)
        wanted = "" if value is None else _mismatch(value, kind)
        return f"{wanted}, or leave it out" if wanted else ""
    if get_origin(hint) is dict:
        return "" if isinstance(value, dict) else "a table of names and values"
    if get_origin(hint) is tuple:
        kind, _ = get_args(hint)
        found = [_mismatch(item, kind) for item in value] if isinstance(value, tuple) else [_KINDS[kind]]
        wanted = next(filter(None, found), "")
        return wanted and f"a tuple, each item {wanted}"
    if isinstance(value, bool) and hint is not bool:
        return _KINDS[hint]
    if value == "" and hint is str:
        return "a text that is not empty"
    return "" if isinstance(value, (int, float) if hint is float else hint) else _KINDS[hint]


def _raise_all(problems: Iterable[str]) -> None:
    found = tuple(problems)
    if found:
        raise ConfigError(*found)
