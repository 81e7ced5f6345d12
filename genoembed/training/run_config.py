"""What a pretraining run is asked to do: frozen, checked, the same keys for Python, file and command line.

In: flat keys, and a TOML or JSON file with the same keys. Out: :class:`TrainConfig`, one dataclass a stage.
Promised: an unknown key is an error that names the nearest one, and all problems come in one message.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_origin, get_type_hints

from genoembed.config import EmptyPolicy, GapPolicy, InvalidPolicy, field_problems
from genoembed.errors import ConfigError, InputFileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from os import PathLike

Packing: TypeAlias = Literal["stream", "bins"]
TrainDtype: TypeAlias = Literal["auto", "float32", "bfloat16"]

DOCUMENT_WINDOWS = 8
"""Documents are cut at this many windows unless ``max_document_bp`` says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """Which weights training starts from; exactly one of ``model``, ``like`` and ``shape``."""

    model: str | None = None
    """Go on from this causal model: bundled or registry name, local folder, or Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings."""
    like: str | None = None
    """Start from scratch with the shape of this StripedHyena 2 model of the registry."""
    hidden_size: int | None = None
    """Shrink ``like`` to this width."""
    layers: int | None = None
    """Shrink ``like`` to its first so many blocks."""
    shape: dict[str, object] | None = None
    """Start from scratch with these fields of ``StripedHyena2Config``; only in a file, or from Python."""

    def __post_init__(self) -> None:
        _raise_all(field_problems(self, at_least={"hidden_size": (8, ""), "layers": (1, "blocks")}))
        given = [name for name in ("model", "like", "shape") if getattr(self, name) is not None]
        problems = []
        if len(given) != 1:
            problems.append(
                f"{' and '.join(given) or 'neither model, like nor shape'} given, expected exactly one: "
                "set model to go on from one, like or shape to start from scratch"
            )
        if self.like is None and (self.hidden_size or self.layers):
            problems.append("hidden_size and layers shrink like, which is not given; set like")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which sequences, and how they become rows."""

    corpus: tuple[str, ...]
    """Sequence files to train on."""
    heldout: tuple[str, ...] = ()
    """Sequence files to measure on."""
    heldout_fraction: float | None = None
    """Instead of files: share of the corpus's records, chosen by their bases, that is measured on."""
    heldout_rows: int = 128
    """Rows measured each time, spread evenly over what is held out."""
    packing: Packing = "stream"
    """``stream`` cuts documents and pads nothing, ``bins`` keeps those whole that fit a window."""
    window: int = 1024
    """Tokens of a row."""
    isolate: bool = False
    """Keep packed neighbours from seeing each other, exactly."""
    one_strand: bool = False
    """Keep strands as they are, instead of the reverse complement with probability one half."""
    n_run_bp: int = 10
    """Runs of at least this many ``N`` are left out and end a document."""
    max_document_bp: int | None = None
    """Cut longer records every so many bases; None is eight windows."""
    shuffle_documents: int = 32768
    """Documents among which the next one is drawn."""
    invalid: InvalidPolicy = "error"
    """Letters outside IUPAC DNA."""
    gaps: GapPolicy = "error"
    """Gap letters."""
    empty: EmptyPolicy = "error"
    """Records without bases."""

    def __post_init__(self) -> None:
        least = {
            "heldout_rows": (1, "rows"),
            "window": (2, "tokens"),
            "n_run_bp": (1, "bases"),
            "max_document_bp": (1, "bases"),
            "shuffle_documents": (1, "documents"),
        }
        problems = list(field_problems(self, at_least=least))
        if not self.corpus:
            problems.append("corpus is empty; name at least one sequence file")
        if bool(self.heldout) == (self.heldout_fraction is not None):
            problems.append(
                "heldout or heldout_fraction, expected exactly one of them; set heldout to a file that is "
                "not in the corpus, or heldout_fraction to a share such as 0.02"
            )
        if isinstance(self.heldout, tuple) and isinstance(self.corpus, tuple):
            problems += [
                f"heldout: {name} is in the corpus, too; hold out other files, or set heldout_fraction"
                for name in self.heldout
                if name in self.corpus
            ]
        fraction = self.heldout_fraction
        if isinstance(fraction, float | int) and not 0 < fraction < 1:
            problems.append(f"heldout_fraction is {fraction}; set it between 0 and 1, such as 0.02")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeConfig:
    """How long and how fast to train."""

    max_steps: int
    """Optimizer steps."""
    rows_per_device: int = 4
    """Rows of one forward pass, on each device."""
    accumulation_steps: int = 1
    """Forward passes a step."""
    learning_rate: float | None = None
    """Peak rate; None is 2e-3 at width 128, falling with the root of the width; a tenth of it to go on."""
    pole_rate_scale: float = 0.1
    """Poles of long filters move this much slower."""
    warmup_steps: int | None = None
    """Steps of linear warm-up before the cosine; None is a twentieth of all, 200 at most."""
    weight_decay: float = 0.1
    """On matrices; vectors, filters and the embedding have none."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    dtype: TrainDtype = "auto"
    """Type of matrix products; ``auto`` is bfloat16 where the device has it, else float32, as weights are."""
    compile_blocks: bool = False
    """Compile each block with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    seed: int = 0
    """Initial weights, order of documents, strands."""
    save_steps: int = 200
    """Steps between checkpoints."""
    eval_steps: int = 200
    """Steps between measurements on what is held out."""
    logging_steps: int = 10
    """Steps between lines of ``metrics.jsonl``."""

    def __post_init__(self) -> None:
        counted = ("max_steps", "rows_per_device", "accumulation_steps", "save_steps", "eval_steps")
        least = {name: (1, "") for name in (*counted, "logging_steps")} | {
            "seed": (0, ""),
            "warmup_steps": (0, ""),
        }
        problems = list(field_problems(self, at_least=least))
        if not problems:
            problems += [
                f"{name} is {value}; set {name} above 0"
                for name in ("learning_rate", "pole_rate_scale", "max_grad_norm")
                if (value := getattr(self, name)) is not None and not value > 0
            ]
            if not self.weight_decay >= 0:
                problems.append(f"weight_decay is {self.weight_decay}; set weight_decay to 0 or more")
        _raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One pretraining run."""

    start: StartConfig
    data: DataConfig
    recipe: RecipeConfig

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Give the configuration as nested dicts that JSON can hold.

        Returns:
            One dict a stage.
        """
        return asdict(self)


_STAGES: dict[str, type[Any]] = {"start": StartConfig, "data": DataConfig, "recipe": RecipeConfig}
KEY_STAGE = {field.name: stage for stage, cls in _STAGES.items() for field in fields(cls)}
"""The stage that each flat key belongs to."""
_TUPLES = {
    name
    for cls in _STAGES.values()
    for name, hint in get_type_hints(cls).items()
    if get_origin(hint) is tuple
}


def train_config(options: Mapping[str, object], *, file: str | PathLike[str] | None = None) -> TrainConfig:
    """Build a configuration from flat keys and a file that holds what they leave out.

    Args:
        options: Values by key; None stands for the file's value, or the default.
        file: TOML or JSON (told by ``.json``) with the same keys, and a table ``shape`` for a new model.

    Returns:
        The configuration.

    Raises:
        ConfigError: If a key is unknown or missing, or a value wrong; everything at once.
        InputFileError: If the file cannot be read.

    Example:
        >>> keys = {"corpus": ("a.fa",), "heldout_fraction": 0.1, "like": "evo2_7b", "max_steps": 5}
        >>> config = train_config(keys)
        >>> config.data.window, config.recipe.max_steps
        (1024, 5)
    """
    in_file = {} if file is None else read_config_file(Path(file))
    problems = [f"{file}: {_unknown(key)}" for key in in_file if key not in KEY_STAGE]
    problems += [_unknown(key) for key in options if key not in KEY_STAGE]
    given = {key: value for key, value in options.items() if value is not None}
    values = {key: _plain(key, value) for key, value in (in_file | given).items() if key in KEY_STAGE}
    parts: dict[str, Any] = {}
    for stage, cls in _STAGES.items():
        of_stage = {key: value for key, value in values.items() if KEY_STAGE[key] == stage}
        if stage == "recipe" and "max_steps" not in of_stage:
            problems.append("max_steps is missing; set max_steps to the optimizer steps to train for")
            of_stage["max_steps"] = 1
        try:
            parts[stage] = cls(**({"corpus": ()} | of_stage if stage == "data" else of_stage))
        except ConfigError as error:
            problems += error.problems
    _raise_all(problems)
    return TrainConfig(**parts)


def read_config_file(path: Path) -> dict[str, object]:
    """Read flat keys and values.

    Args:
        path: TOML, or JSON (told by ``.json``).

    Returns:
        Values by key, unchecked.

    Raises:
        ConfigError: If the file is not what its name says.
        InputFileError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        message = f"cannot be read ({error.strerror}); name a TOML or JSON file"
        raise InputFileError(message, path=str(path)) from error
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except ValueError as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        message = f"{path}: not {kind} ({error}); mend the file"
        raise ConfigError(message) from error
    if not isinstance(values, dict):
        message = f"{path}: {type(values).__name__}, expected keys and values; write an object"
        raise ConfigError(message)
    return values


def _plain(key: str, value: object) -> object:
    if key not in _TUPLES:
        return value
    return tuple(value) if isinstance(value, list | tuple) else value


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, KEY_STAGE, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(sorted(KEY_STAGE))}"
    return f"{key!r} is no option of pretraining; {remedy}"


def differences(found: Mapping[str, object], expected: Mapping[str, object], *, where: str) -> list[str]:
    """Say where a stored run is not the one that is asked for.

    Args:
        found: Nested plain values of the stored run.
        expected: Those of this run.
        where: Name of the stored run.

    Returns:
        A sentence for each value that differs.

    Example:
        >>> differences({"data": {"window": 32}}, {"data": {"window": 64}}, where="run")
        ['window: 64, but 32 in run; set window to 32, or overwrite to start again']
    """
    old, new = dict(_leaves(found)), dict(_leaves(expected))
    return [
        f"{key}: {new.get(key)!r}, but {old.get(key)!r} in {where}; "
        f"set {key} to {old.get(key)!r}, or overwrite to start again"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _leaves(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict) and key != "shape":
            yield from _leaves(value)
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def _raise_all(problems: Any) -> None:
    found = tuple(problems)
    if found:
        raise ConfigError(*found)
