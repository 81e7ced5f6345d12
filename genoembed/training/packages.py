"""The optional packages that settings of training name: missing ones are refused before torch is imported."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from genoembed.config.fields import raise_all
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genoembed.config.training import OptimizerConfig


def check_packages(recipe: OptimizerConfig) -> None:
    """Raise if a package that the settings need is not installed."""
    raise_all(_missing(recipe))


def _missing(recipe: OptimizerConfig) -> Iterator[str]:
    if recipe.optim == "adamw_8bit" and find_spec("bitsandbytes") is None:
        found = "optim is 'adamw_8bit', which bitsandbytes does, and that is not installed"
        yield Problem(found, Remedy("optim", "adafactor"), ", or install bitsandbytes")
    for name in recipe.report_to:
        if name in ("tensorboard", "wandb") and find_spec(name) is None:
            found = f"report_to names {name!r}, which is not installed"
            yield Problem(found, Remedy("report_to", "none"), f", or install {name}")
