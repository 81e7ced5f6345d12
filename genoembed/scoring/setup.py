"""What both ways of scoring share: options checked before anything is read, and the model with its head."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, get_args

import torch

from genoembed.config.choices import ComputeDtype, FailurePolicy, ScorePooling, ScoreStrands, StartChoice
from genoembed.config.embed import DEFAULT_MODEL, ModelConfig, WindowConfig
from genoembed.config.fields import Config, raise_all, unknown_option
from genoembed.errors import ConfigError, ModelError, PrecisionWarning
from genoembed.models.language_model import LanguageModel
from genoembed.models.trained_folder import find_facts
from genoembed.pipeline.request import LOADING_OPTIONS, load_configured, loading_problems

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genoembed.models.genomic_model import GenomicModel


_CHOICES = {
    "rc": ScoreStrands,
    "start_token": StartChoice,
    "on_error": FailurePolicy,
    "pooling": ScorePooling,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """The model and how it runs, for both ways of scoring."""

    model: str | PathLike[str] | GenomicModel = DEFAULT_MODEL
    revision: str | None = None
    trust_remote_code: bool | None = None
    dtype: ComputeDtype | None = None
    """None is float32: what is looked at here are small differences."""
    device: str | None = None
    threads: int | None = None
    batch_tokens: int | None = None
    rc: ScoreStrands = "none"
    start_token: StartChoice = "auto"
    on_error: FailurePolicy = "stop"

    def check(self, *, window: int | None = None, stride: int | None = None, pooling: str = "mean") -> None:
        """Raise if these options are wrong, or those given here."""
        problems: list[str] = []
        for name, value in (
            ("rc", self.rc),
            ("start_token", self.start_token),
            ("on_error", self.on_error),
            ("pooling", pooling),
        ):
            choices = get_args(_CHOICES[name])
            if value not in choices:
                problems.append(f"{name} is {value!r}; set {name} to one of {', '.join(choices)}")
        if not isinstance(self.model, str | PathLike):
            problems += loading_problems({name: getattr(self, name) for name in LOADING_OPTIONS})
        for build in (self._model_config, lambda: WindowConfig(window=window, stride=stride)):
            try:
                build()
            except ConfigError as error:
                problems.extend(error.problems)
        if problems:
            raise ConfigError(*problems)

    def _model_config(self) -> ModelConfig:
        return ModelConfig(
            model=fspath(self.model) if isinstance(self.model, str | PathLike) else self.model.name,
            revision=self.revision,
            trust_remote_code=bool(self.trust_remote_code),
            dtype=self.dtype or "float32",
            device=self.device,
            threads=self.threads,
            batch_tokens=self.batch_tokens,
        )

    def load(self) -> LanguageModel:
        """Load the model and its head."""
        config = self._model_config()
        is_name = isinstance(self.model, str | PathLike)
        if find_facts(config.model if is_name else self.model) is not None:  # type: ignore[arg-type]
            message = (
                f"model {config.model!r} was fine-tuned for vectors or labels, so its next-token head is no "
                "longer of use; set model to the one that it was trained from"
            )
            raise ModelError(message)
        if not isinstance(self.model, str | PathLike):
            return LanguageModel(self.model)
        return LanguageModel(load_configured(config))


def run_options(
    model: str | PathLike[str] | GenomicModel, options: Mapping[str, Any], *, call: type[Config]
) -> RunOptions:
    """Collect the options of a call; None stands for the default."""
    unknown = [name for name in options if name not in RunOptions.__dataclass_fields__]
    raise_all(unknown_option(name, call.options()) for name in unknown)
    return RunOptions(model=model, **{name: value for name, value in options.items() if value is not None})


def warn_of_precision(model: GenomicModel) -> None:
    """Warn that differences between alleles get lost in half precision."""
    if model.dtype != torch.float32:
        name = str(model.dtype).removeprefix("torch.")
        message = f"{model.name} runs in {name}: differences between alleles are rounded; set dtype='float32'"
        warnings.warn(PrecisionWarning(message), stacklevel=4)
