"""Adapters of peft, as folders that name the model they change: LoRA and the like.

In: a folder with ``adapter_config.json`` and the adapter's weights, and the model that these change, loaded.
Out: the same model, with the adapter merged into its layers, which keep their names. Promised: each weight of
the adapter that belongs to the model is used, none of them is random, and nothing is unpickled.
"""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from genoembed.errors import CheckpointError, MissingExtraError, ModelError
from genoembed.models.registry import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from genoembed.models.registry import Adapter

_START = "base_model.model."
"""What peft writes before the name of each weight."""


def merge_adapter(adapter: Adapter, model: nn.Module, *, optional: Iterable[str] = ()) -> None:
    """Add an adapter to the weights of its model, in place.

    Args:
        adapter: Its folder.
        model: The model, or one around it.
        optional: Modules that the model that was trained need not have had, such as a pooler.

    Raises:
        MissingExtraError: If peft is not installed.
        ModelError: If this kind of adapter is not part of any layer.
        CheckpointError: If its weights are damaged, or do not belong to this model.
    """
    peft = _peft()
    weights = _read_weights(adapter.weights)
    prefix = _prefix(weights, {name for name, _ in model.named_modules() if name})
    if prefix is None:
        message = (
            f"none of its weights ({_shown(weights)}) belongs to a layer of {adapter.base}; check that it "
            f"was made for that model, and base_model_name_or_path in {ADAPTER_CONFIG}"
        )
        raise CheckpointError(message, path=str(adapter.folder))
    # what is beside the model, heads and decoders, is left out: embeddings do not depend on it
    parts = tuple(f"{_START}{prefix}{name}." for name, _ in model.named_children())
    inside = {name: value for name, value in weights.items() if name.startswith(parts)}
    absent = [path for path in optional if not any(f"{_START}{prefix}{path}." in name for name in inside)]
    with _set_aside(model, absent), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about training
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
        if config.is_prompt_learning:
            message = (
                f"model {str(adapter.folder)!r}: an adapter of kind {config.peft_type.value} adds tokens to "
                "the input, and changes no layer; name an adapter such as LoRA"
            )
            raise ModelError(message)
        config.inference_mode = True
        # without memory until its weights are there, except where starting values change the model's weights
        is_plain = config.to_dict().get("init_lora_weights", True) in (True, False, "gaussian")
        try:
            adapted = peft.PeftModel(_wrapped(model, prefix), config, low_cpu_mem_usage=is_plain)
            result = peft.set_peft_model_state_dict(adapted, inside, low_cpu_mem_usage=is_plain)
            _check_complete(adapter, adapted, result.unexpected_keys, result.missing_keys)
            adapted.merge_and_unload(safe_merge=True)
        except CheckpointError:
            raise
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            first = str(error).strip().splitlines() or [type(error).__name__]
            message = f"it does not fit {adapter.base} ({first[0]}); check that it was made for that model"
            raise CheckpointError(message, path=str(adapter.folder)) from error
    for parameter in model.parameters():  # peft froze what it did not add
        parameter.requires_grad_(parameter.is_floating_point())


def check_adapter(adapter: Adapter) -> None:
    """Raise if an adapter cannot be merged for want of its weights or of peft, before its model is read."""
    _peft()
    adapter.weights  # noqa: B018


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(package="peft", extra="lora", purpose="a model with an adapter") from error
    return peft


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        message = f"weights of the adapter cannot be read ({type(error).__name__}); fetch them again"
        raise CheckpointError(message, path=str(path)) from error
    return found


def _prefix(weights: Iterable[str], modules: set[str]) -> str | None:
    """Find what the model was called inside the one that was trained, with a dot; empty where it was that."""
    votes: Counter[str] = Counter()
    for name in weights:
        parts = name.removeprefix(_START).split(".")
        starts = (
            start
            for start in range(len(parts))
            for end in range(len(parts), start, -1)
            if ".".join(parts[start:end]) in modules
        )
        start = next(starts, None)
        if start is not None:
            votes["".join(f"{part}." for part in parts[:start])] += 1
    return min(votes, key=lambda prefix: (-votes[prefix], len(prefix))) if votes else None


@contextmanager
def _set_aside(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Take modules out of a model for a while, so that nothing in them is adapted."""
    taken = {path: model.get_submodule(path) for path in paths}
    try:
        for path in taken:
            model.set_submodule(path, nn.Identity())
        yield
    finally:
        for path, module in taken.items():
            model.set_submodule(path, module)


def _wrapped(model: nn.Module, prefix: str) -> nn.Module:
    """Give a model the names that the adapter calls it by."""
    for name in reversed(prefix.split(".")[:-1]):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    return model


def _check_complete(
    adapter: Adapter, adapted: Any, unexpected: Iterable[str], missing: Iterable[str]
) -> None:
    """Raise if weights of the adapter are left over, or parts of it were given none."""
    own = (f".{adapted.base_model.prefix}", ".modules_to_save.")
    on_meta = {name for name, value in adapted.named_parameters() if value.is_meta}
    without = {name for name in on_meta.union(missing) if any(part in name for part in own)}
    for names, problem in ((list(unexpected), "have no place in"), (without, "are missing for")):
        if names:
            message = (
                f"{len(names)} of its weights {problem} {adapter.base} ({_shown(sorted(names))}); check that "
                "it was made for that model"
            )
            raise CheckpointError(message, path=str(adapter.folder))


def _shown(names: Iterable[str]) -> str:
    return next(iter(names), "there are none").removeprefix(_START)
