"""Gradient checkpointing: activations of blocks are computed again in the backward pass, instead of kept.

In: a model of transformers, and the modules whose outputs are captured. Out: the same model, which computes
the same gradients in less memory. Promised: a model, or a choice of layers, that cannot is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.modeling_layers import GradientCheckpointingLayer

from genoembed.errors import ModelError, Problem, Remedy
from genoembed.models.layers import find_blocks

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn


def checkpoint_activations(model: nn.Module, *, captured: Collection[str] = ()) -> None:
    """Have each block compute its activations again, but for blocks inside which something is captured.

    What a hook takes inside a block that runs twice would lose its way to the loss.
    """
    problem = _switch_on(model, captured)
    if problem is not None:
        more = ", and fewer rows_per_device with more accumulation_steps"
        remedy = Remedy("gradient_checkpointing", False)
        raise ModelError(Problem(f"gradient_checkpointing: {problem}", remedy, more))


def _switch_on(model: nn.Module, captured: Collection[str]) -> str | None:
    """Switch it on, or return why that cannot be."""
    name = type(model).__name__
    if not getattr(model, "supports_gradient_checkpointing", False):
        return f"{name} does not offer it"
    # the newer name of the same method
    enable: Any = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )
    try:
        enable({"use_reentrant": False})
    except ValueError:  # a model that says so, and has nothing to switch on
        return f"{name} does not offer it"
    blocks = {
        path: block for path, block in model.named_modules() if isinstance(block, GradientCheckpointingLayer)
    }
    for path, block in blocks.items():
        if any(inner.startswith(f"{path}.") for inner in captured):
            block.gradient_checkpointing = False
    if blocks and not any(block.gradient_checkpointing for block in blocks.values()):
        return "every block gives a layer from its inside"
    # blocks of an older kind run twice with their hooks, and none of them can be left out
    if not blocks and any(path.startswith(f"{find_blocks(model)}.") for path in captured):
        return f"{name} can do it for layers behind its blocks alone"
    return None
