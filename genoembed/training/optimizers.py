"""How weights are changed: the parameters by rate and weight decay, the optimizer over them, and its scaler.

In: a model, and what its settings say. Out: an optimizer of torch's kind. Promised: the peak rate means the
same for AdamW, its 8-bit form and Adafactor, so defaults and advice hold for all three.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.optimization import Adafactor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from genoembed.config.choices import Optim

POLE_RATE_SCALE = 0.1
"""Poles of long filters move this much slower than everything else."""
_MOMENTUM = 0.9


def is_pole(name: str) -> bool:
    """Return whether a parameter holds poles of a long filter."""
    return name.endswith("log_poles")


def decaying_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay applies to: matrices.

    Example:
        >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
        >>> decaying_parameters(model)
        {'1.weight'}
    """
    # norms and biases are vectors; a row of an embedding is not in every batch, and would shrink meanwhile
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
        and id(parameter) not in embeddings
        and ".filter." not in name
        and not is_pole(name)
    }


def parameter_groups(
    model: nn.Module, *, rate_of: Callable[[str], float], weight_decay: float
) -> list[dict[str, Any]]:
    """Split the parameters that learn by rate and weight decay.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 2), rate_of=lambda name: 0.5, weight_decay=0.1)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(1, 0.5, 0.1), (1, 0.5, 0.0)]
    """
    decaying = decaying_parameters(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if name in decaying else 0.0
            groups.setdefault((rate_of(name), decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def build_optimizer(
    kind: Optim, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Build the optimizer that the settings name."""
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM)
    if kind == "adafactor":
        # with a rate of its own, and scaled by the weights, it would need other rates than AdamW
        return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False)
    if kind == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, betas=betas, eps=eps)


class LossScaler(torch.amp.GradScaler):
    """Scale a float16 loss so that small gradients survive, and count the steps that overflowed.

    A step whose gradient has an infinity is left out and the scale halved, which is how the scale is found.
    """

    num_skipped = 0
    """Steps that were left out; goes on where a run is resumed."""

    def count(self, norm: Tensor | float) -> bool:
        """Return whether a step will be left out, by the norm of its gradient."""
        is_skipped = not math.isfinite(float(norm))
        self.num_skipped += is_skipped
        return is_skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, and the count with it."""
        return super().state_dict() | {"num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up scale and count."""
        super().load_state_dict(dict(state_dict))
        self.num_skipped = int(state_dict["num_skipped"])
