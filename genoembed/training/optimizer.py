"""AdamW as both kinds of training use it: which parameters decay, and a Trainer that builds it.

Whether matrix products of a training run are done in bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from genoembed.models.precision import automatic_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from genoembed.config.choices import TrainDtype


ADAM_EPSILON = 1e-8


def is_pole(name: str) -> bool:
    """Tell whether a parameter holds poles of a long filter, which move slower than all else."""
    return name.endswith("log_poles")


def decaying_parameters(model: nn.Module) -> set[str]:
    """Name the parameters that weight decay pulls to zero: matrices.

    Example:
        >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
        >>> decaying_parameters(model)
        {'1.weight'}
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
        and id(parameter) not in embeddings
        and ".filter." not in name
        and not is_pole(name)
    }


class AdamWTrainer(Trainer):
    """A Trainer with AdamW over groups of parameters."""

    def __init__(
        self,
        *,
        groups: Callable[[nn.Module], list[dict[str, Any]]],
        rate: float,
        betas: tuple[float, float],
        **arguments: Any,
    ) -> None:
        self._groups, self._rate, self._betas = groups, rate, betas
        self._adamw: torch.optim.Optimizer | None = None
        super().__init__(**arguments)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW, once."""
        if self._adamw is None:
            self._adamw = torch.optim.AdamW(
                self._groups(model or self.model), lr=self._rate, betas=self._betas, eps=ADAM_EPSILON
            )
        self.optimizer = self._adamw
        return self._adamw


def has_bfloat16() -> bool:
    """Tell whether the hardware multiplies in bfloat16: elsewhere that is slower than float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return automatic_dtype(device) == torch.bfloat16


def uses_bfloat16(dtype: TrainDtype) -> bool:
    """Resolve what a recipe asks for.

    Example:
        >>> uses_bfloat16("float32"), uses_bfloat16("bfloat16")
        (False, True)
    """
    return has_bfloat16() if dtype == "auto" else dtype == "bfloat16"


MAX_LOG_POLE = -1e-4
"""Modes of the long filter must decay: at this bound one fades over 10,000 bases."""


class ClampPoles(TrainerCallback):
    """Keep every mode of the long filters decaying: a positive pole would explode."""

    @torch.no_grad()
    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Clamp after each optimizer step."""
        for name, parameter in kwargs["model"].named_parameters():
            if is_pole(name):
                parameter.clamp_(max=MAX_LOG_POLE)
