"""What a pretraining run is asked to do: frozen, checked, the same keys for Python, file and command line.

In: flat keys, and a TOML or JSON file with the same keys. Out: :class:`TrainConfig`, one dataclass a stage.
Promised: an unknown key is an error that names the nearest one, and all problems come in one message.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from genoembed.config.choices import EmptyPolicy, GapPolicy, InvalidPolicy, Packing, TrainDtype
from genoembed.config.embed import field_problems
from genoembed.config.fields import FlatKeys, raise_all

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike


DOCUMENT_WINDOWS = 8
"""Documents are cut at this many windows unless ``max_document_bp`` says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What becomes of the records of a corpus."""

    seed: int = 0
    """Decides about the order of files and documents, and about strands; with the epoch. 0 or more."""
    both_strands: bool = True
    """Replace a document by its reverse complement with probability one half."""
    n_run_bp: int | None = 10
    """Runs of at least this many ``N`` are left out and end a document, bases. None keeps them."""
    max_document_bp: int | None = None
    """Cut longer documents every so many bases; each piece is a document of its own. None cuts nothing.
    Without it, the documents of one chromosome stay together however large the buffer."""
    shuffle_documents: int = 32768
    """Documents among which the next one is drawn; 1 keeps the order of the files."""
    shuffle_bp: int = 2**28
    """Bases that wait in the shuffle at most (one document more, at times)."""
    shard: int = 0
    """Which part of the documents to give, from 0: with several data workers, ``rank * workers + worker``."""
    num_shards: int = 1
    """Parts in all: ranks times workers. Each reads all files, and gives every ``num_shards``-th document."""
    heldout_fraction: float = 0.0
    """Share of the records that is set aside to measure on, 0 to below 1; see ``is_heldout``."""
    heldout: bool = False
    """Give the records that are set aside, and not the others."""
    invalid: InvalidPolicy = "error"
    """Letters outside IUPAC DNA: ``error``, ``skip`` the record, or ``mask`` each to ``N``."""
    gaps: GapPolicy = "error"
    """Gap letters ``-``, ``.`` and ``*``: ``error``, or ``strip``."""
    empty: EmptyPolicy = "error"
    """A record without bases: ``error`` or ``skip``."""

    def __post_init__(self) -> None:
        least = {"seed": (0, ""), "n_run_bp": (1, "bases"), "max_document_bp": (1, "bases")}
        least |= {"shuffle_documents": (1, "documents"), "shuffle_bp": (1, "bases")}
        least |= {"shard": (0, ""), "num_shards": (1, "")}
        problems = list(field_problems(self, at_least=least))
        if not problems and self.shard >= self.num_shards:
            problems.append(f"shard: {self.shard} of {self.num_shards}; set shard to 0 to num_shards - 1")
        if not problems and not 0 <= self.heldout_fraction < 1:
            problems.append(f"heldout_fraction is {self.heldout_fraction}; set it to 0 or more, and below 1")
        raise_all(problems)


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
        raise_all(field_problems(self, at_least={"hidden_size": (8, ""), "layers": (1, "blocks")}))
        given = [name for name in ("model", "like", "shape") if getattr(self, name) is not None]
        problems = []
        if len(given) != 1:
            problems.append(
                f"{' and '.join(given) or 'neither model, like nor shape'} given, expected exactly one: "
                "set model to go on from one, like or shape to start from scratch"
            )
        if self.like is None and (self.hidden_size or self.layers):
            problems.append("hidden_size and layers shrink like, which is not given; set like")
        raise_all(problems)


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
        raise_all(problems)


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
        raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One pretraining run."""

    start: StartConfig
    data: DataConfig
    recipe: RecipeConfig

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Give the configuration as nested dicts that JSON can hold."""
        return asdict(self)


_KEYS = FlatKeys("pretraining", start=StartConfig, data=DataConfig, recipe=RecipeConfig)
KEY_STAGE = _KEYS.stage_of
"""The stage that each flat key belongs to."""


def train_config(options: Mapping[str, object], *, file: str | PathLike[str] | None = None) -> TrainConfig:
    """Build a configuration from flat keys and a file that holds what they leave out.

    Example:
        >>> keys = {"corpus": ("a.fa",), "heldout_fraction": 0.1, "like": "evo2_7b", "max_steps": 5}
        >>> config = train_config(keys)
        >>> config.data.window, config.recipe.max_steps
        (1024, 5)
    """
    values, problems = _KEYS.read(options, file=file)
    if "max_steps" not in values:
        problems.append("max_steps is missing; set max_steps to the optimizer steps to train for")
    needed: dict[str, dict[str, object]] = {"data": {"corpus": ()}, "recipe": {"max_steps": 1}}
    return TrainConfig(**_KEYS.build(values, problems, needed=needed))
