"""Whether matrix products of a training run are done in bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genoembed.models.precision import automatic_dtype

if TYPE_CHECKING:
    from genoembed.training.run_config import TrainDtype


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
