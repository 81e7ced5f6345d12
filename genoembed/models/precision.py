"""Which type a model computes in where nobody says so: one rule for files, scores and loaded models.

bfloat16 where the device multiplies matrices in it, float32 elsewhere. A device that only emulates bfloat16,
or has vector instructions for it but no matrix unit, is not faster in it, and would lose digits for nothing.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Choose the type of weights and activations.

    Example:
        >>> automatic_dtype(torch.device("meta"))
        torch.float32
    """
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = device.type == "cpu" and has_amx()
    return torch.bfloat16 if has_units else torch.float32


def has_amx() -> bool:
    """Check whether this CPU has the matrix unit AMX, and torch and the operating system let it be used.

    So must the user, who forbids it with oneDNN's own variable: ``ONEDNN_MAX_CPU_ISA=AVX2``.
    """
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    # as oneDNN reads it: the newer name first, capitals or not, values that it does not know left out
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return ask is not None and bool(ask()) and limit.lower() not in _WITHOUT_AMX


_WITHOUT_AMX = (
    "sse41 avx avx2 avx2_vnni avx2_vnni_2 avx512_core avx512_core_vnni avx512_core_bf16 avx512_core_fp16"
    " avx10_1_512"
).split()


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Multiply in the types that the operands have, whatever autocast is told.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast(x.device):
        ...     (x @ x).dtype
        torch.float32
    """
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()
