"""What a fine-tuning run is asked to do: frozen, checked, the same keys for Python, file and command line.

In: flat keys, and a TOML or JSON file with the same keys. Out: :class:`FinetuneConfig`, one dataclass a
stage. Promised: an unknown key is an error that names the nearest one, all problems come in one message, and
``to_flat`` gives a file that runs the same training again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from genoembed.training.augment import AugmentConfig
from genoembed.training.finetune_stages import (
    EncoderConfig,
    FinetuneDataConfig,
    FinetuneRecipe,
    ObjectiveConfig,
    Task,
)
from genoembed.training.flat_keys import FlatKeys, raise_all

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

__all__ = [
    "FINETUNE_STAGE",
    "EncoderConfig",
    "FinetuneConfig",
    "FinetuneDataConfig",
    "FinetuneRecipe",
    "ObjectiveConfig",
    "Task",
    "finetune_config",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """One fine-tuning run."""

    objective: ObjectiveConfig
    data: FinetuneDataConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)

    def __post_init__(self) -> None:
        problems = []
        task, tuning = self.objective.task, self.encoder.tuning
        if self.recipe.micro_batch is not None and task not in ("contrastive", "triplet", "retrieval"):
            problems.append(f"micro_batch is for contrastive tasks, but task is {task!r}; leave it out")
        if tuning == "frozen" and task in ("lm", "retrieval"):
            remedy = "mode to 'fix_encoder'" if task == "retrieval" else "tuning to 'lora'"
            problems.append(f"tuning is 'frozen', but task is {task!r}; set {remedy}")
        if tuning == "frozen" and task in ("contrastive", "triplet") and not self.encoder.add_pooler:
            problems.append(
                f"tuning is 'frozen' and task is {task!r}: nothing would learn; set add_pooler to True, or "
                "tuning to 'full', 'last_n' or 'lora'"
            )
        several = len(self.encoder.layers) > 1
        if task == "retrieval" and several and "max" in (self.encoder.fusion, self.encoder.pooling):
            problems.append(
                "retrieval fuses layers before it pools them, which 'max' would tell; set fusion and pooling "
                "to others, or take one layer"
            )
        raise_all(problems)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Give the configuration as nested dicts that JSON can hold."""
        return asdict(self)

    def to_flat(self) -> dict[str, object]:
        """Give the configuration as a file holds it: flat keys, without those that are None."""
        flat = {key: value for stage in self.to_dict().values() for key, value in stage.items()}
        return {key: value for key, value in flat.items() if value is not None}


def _plain(key: str, value: object) -> object:
    """Let layers be a number, a name or several."""
    if key != "layers" or not isinstance(value, int | str | list | tuple):
        return value
    return tuple(map(str, value if isinstance(value, list | tuple) else (value,)))


_KEYS = FlatKeys(
    "fine-tuning",
    plain=_plain,
    objective=ObjectiveConfig,
    data=FinetuneDataConfig,
    encoder=EncoderConfig,
    augment=AugmentConfig,
    recipe=FinetuneRecipe,
)
FINETUNE_STAGE = _KEYS.stage_of
"""The stage that each flat key belongs to."""


def finetune_config(
    options: Mapping[str, object], *, file: str | PathLike[str] | None = None
) -> FinetuneConfig:
    """Build a configuration from flat keys and a file that holds what they leave out.

    Example:
        >>> config = finetune_config({"task": "classification", "train": ("promoters.tsv",)})
        >>> config.encoder.layers, config.recipe.patience
        (('final',), 3)
    """
    values, problems = _KEYS.read(options, file=file)
    if "task" not in values:
        problems.append("task is missing; set task to what is to be learned, such as 'classification'")
    needed: dict[str, dict[str, object]] = {"objective": {"task": "classification"}, "data": {"train": ()}}
    return FinetuneConfig(**_KEYS.build(values, problems, needed=needed))
