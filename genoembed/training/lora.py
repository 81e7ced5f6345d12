"""Low-rank adapters, through peft: the one place that imports it."""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any

import torch

from genoembed.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from genoembed.training.finetune_stages import EncoderConfig

_NAMES_SHOWN = 6


def add_adapters(module: nn.Module, linears: Sequence[str], *, config: EncoderConfig, seed: int) -> Any:
    """Put an adapter beside each linear layer, in place; everything else stops learning.

    The product of each adapter starts at 0, so the model computes what it did before.
    """
    targets = _targets(linears, config.lora_targets)
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise MissingExtraError(package="peft", extra="lora", purpose="tuning 'lora'") from error
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about kinds of layers that are not ours to choose
        torch.manual_seed(seed)
        try:
            return LoraModel(module, lora, "default")
        except ValueError as error:
            message = f"tuning 'lora': {str(error).splitlines()[0]}; name others in lora_targets"
            raise ConfigError(message) from error


def merge_adapters(tuner: Any) -> None:
    """Add each adapter's product to the weights of its layer and take it out, in place."""
    tuner.merge_and_unload()


def _targets(linears: Sequence[str], wanted: Sequence[str]) -> list[str]:
    if not wanted:
        return list(linears)
    problems = []
    for end in wanted:
        if not any(_ends(path, end) for path in linears):
            ends = sorted({path.rpartition(".")[2] for path in linears})
            near = difflib.get_close_matches(end, ends, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ends[:_NAMES_SHOWN])}"
            problems.append(f"lora_targets: {end!r} is the end of no linear layer in the blocks; {remedy}")
    if problems:
        raise ConfigError(*problems)
    return [path for path in linears if any(_ends(path, end) for end in wanted)]


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
