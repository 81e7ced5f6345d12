"""What of a model learns: all of it, nothing, its last blocks, or adapters of its linear layers.

In: a model and a call that runs it. Out: the same model with ``requires_grad`` set. Promised: whatever does
not take part in that call (blocks behind the cut, heads that are not requested) does not learn.

Low-rank adapters, through peft: the one place that imports it.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from genoembed.errors import ConfigError, MissingExtraError
from genoembed.models.describe import count_up_to
from genoembed.models.layers import find_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from genoembed.config.choices import ComputeDtype, Tuning
    from genoembed.config.finetune import EncoderConfig


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tuned:
    """A model that is set up to learn."""

    module: nn.Module
    adapters: Any = None
    _is_merged: bool = field(default=False)

    def merge(self) -> None:
        """Merge adapters into the weights; for the end of training."""
        if self.adapters is not None and not self._is_merged:
            # a frozen weight of 16 bits would round away most of what its adapter learned
            self.module.float()
            self.adapters.merge_and_unload()
            self._is_merged = True


_LARGE = 10**9
"""Parameters from which on adapters are the default: training all takes 16 bytes for each."""


def with_tuning(config: EncoderConfig) -> EncoderConfig:
    """Choose what learns where the settings leave that to the size of the model."""
    if config.tuning is not None:
        return config
    count = count_up_to(
        config.model, _LARGE, trust_remote_code=config.trust_remote_code, revision=config.revision
    )
    if count < _LARGE:
        return config.changed(tuning="full")
    logger.info(
        "tuning lora: %s has %.1f billion parameters, and training all of them takes about %.0f GB; set "
        "tuning to full for that",
        *(config.model, count / 1e9, count * 16 / 1e9),
    )
    return config.changed(tuning="lora")


def frozen_dtype(tuning: Tuning | None, dtype: ComputeDtype) -> ComputeDtype:
    """Return the type that weights are loaded in: what learns is float32, for its steps are small.

    Example:
        >>> frozen_dtype("lora", "bfloat16"), frozen_dtype("full", "bfloat16")
        ('bfloat16', 'float32')
    """
    return dtype if tuning in ("lora", "frozen") else "float32"


def describe_weights(module: nn.Module) -> str:
    """Say how many weights are trained, and the size of all of them.

    Example:
        >>> frozen = nn.Linear(1000, 1000, bias=False).bfloat16().requires_grad_(False)
        >>> describe_weights(nn.Sequential(frozen, nn.Linear(1000, 2)))
        '2,002 of 1,002,002 parameters are trained; all weights take 2 MB (bfloat16, float32)'
    """
    weights = list(module.parameters())
    learning, total = (sum(p.numel() for p in part) for part in (filter(_learns, weights), weights))
    num_bytes = sum(p.numel() * p.element_size() for p in weights)
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in weights)
    return (
        f"{learning:,} of {total:,} parameters are trained; all weights take {num_bytes / 1e6:,.0f} MB "
        f"({', '.join(dtypes)})"
    )


def _learns(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def set_up_tuning(module: nn.Module, run: Callable[[], Tensor], *, config: EncoderConfig, seed: int) -> Tuned:
    """Choose what learns."""
    order = _run_order(module, run)
    adapters = None
    if config.tuning == "frozen":
        module.requires_grad_(requires_grad=False)
    elif config.tuning == "lora":
        blocks = find_blocks(_base(module))
        linears = [
            path
            for path in order
            if _is_linear(module.get_submodule(path))
            and f"{blocks}." in path
            and not (_is_mamba(module) and path.endswith(".out_proj"))
        ]
        if not linears:
            message = "tuning 'lora': the blocks hold no linear layer; set tuning to 'full' or 'last_n'"
            raise ConfigError(message)
        adapters = add_adapters(module, linears, config=config, seed=seed)
    else:
        if config.tuning == "last_n":
            _keep_last_blocks(module, order, config.last_n)
        _stop_unreached(module, run)
    return Tuned(module, adapters)


def _base(module: nn.Module) -> nn.Module:
    base = getattr(module, "base_model", module)
    return base if isinstance(base, nn.Module) else module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _is_mamba(module: nn.Module) -> bool:
    """Return whether a module is a Mamba model's: its kernels read ``out_proj.weight`` past adapters."""
    return "mamba" in str(getattr(getattr(module, "config", None), "model_type", ""))


def _run_order(module: nn.Module, run: Callable[[], Tensor]) -> list[str]:
    """List the modules that run, in the order in which they start."""
    order: dict[str, None] = {}  # a set that keeps order; a module that runs twice counts where it starts
    handles = [
        child.register_forward_pre_hook(lambda _m, _i, path=path: order.setdefault(path))
        for path, child in module.named_modules()
        if path
    ]
    try:
        with torch.no_grad(), _quiet(module):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _keep_last_blocks(module: nn.Module, order: list[str], last_n: int) -> None:
    """Make trainable the last blocks that run, and what starts after the first of them."""
    base = _base(module)
    prefix = next(f"{name}." if name else "" for name, child in module.named_modules() if child is base)
    stem = f"{prefix}{find_blocks(base)}."
    blocks = [path for path in order if path.startswith(stem) and "." not in path.removeprefix(stem)]
    if len(blocks) < last_n:
        message = f"last_n is {last_n}, but {len(blocks)} blocks run; set last_n to {len(blocks)} or less"
        raise ConfigError(message)
    # by the order of running, not of definition: a final norm may be defined before the blocks
    later = set(order[order.index(blocks[-last_n]) :])
    for path, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            parameter.requires_grad_(path in later)


def _stop_unreached(module: nn.Module, run: Callable[[], Tensor]) -> None:
    """Stop parameters that get no gradient: data-parallel training would wait for it."""
    with torch.enable_grad(), _quiet(module):
        run().sum().backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
        parameter.grad = None


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Without dropout, so that no random number is drawn."""
    # mode by mode: parts of a model may be in another one than the whole
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, is_training in modes.items():
            child.training = is_training


_NAMES_SHOWN = 6


def add_adapters(module: nn.Module, linears: Sequence[str], *, config: EncoderConfig, seed: int) -> Any:
    """Add an adapter to each linear layer, in place; everything else is frozen.

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
    # peft draws from the global generator, which a run leaves as it was
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about kinds of layers that are not ours to choose
        torch.manual_seed(seed)
        try:
            adapted = LoraModel(module, lora, "default")
        except ValueError as error:
            message = f"tuning 'lora': {str(error).splitlines()[0]}; name others in lora_targets"
            raise ConfigError(message) from error
    for adapter in filter(_learns, module.parameters()):
        adapter.data = adapter.data.float()  # peft gives them the type of the weights that they change
    return adapted


def _targets(linears: Sequence[str], requested: Sequence[str]) -> list[str]:
    if not requested:
        return list(linears)
    problems = []
    for end in requested:
        if not any(_ends(path, end) for path in linears):
            ends = sorted({path.rpartition(".")[2] for path in linears})
            near = difflib.get_close_matches(end, ends, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ends[:_NAMES_SHOWN])}"
            problems.append(f"lora_targets: {end!r} is the end of no linear layer in the blocks; {remedy}")
    if problems:
        raise ConfigError(*problems)
    return [path for path in linears if any(_ends(path, end) for end in requested)]


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
