"""Which type a model computes in where nobody says so: one rule for files, scores and loaded models.

bfloat16 where the device multiplies matrices faster in it, float32 elsewhere. A CPU is measured: neither its
name nor its flags tell whether the library that multiplies uses its instructions. The result is kept in the
user's cache folder, so that all processes on a machine decide alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import sys
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from genoembed.atomic import write_text
from genoembed.errors import GenoembedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

logger = logging.getLogger(__name__)

WORTHWHILE_SPEEDUP = 1.3
"""Of products in bfloat16; less is lost again where activations are rounded.

Far from all that is found: 2 with AVX-512 BF16, more with AMX, 0.4 with AVX-512 alone, 0.1 with AVX2.
"""
_ROUNDS = 7
_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ATEN_CPU_CAPABILITY",
)
"""With which users choose the instructions of products."""
_CPU_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part")
"""Of ``/proc/cpuinfo``, for x86 and ARM."""


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Choose the type of weights and activations.

    Example:
        >>> automatic_dtype(torch.device("meta"))
        torch.float32
    """
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_faster = device.type == "cpu" and multiplies_bfloat16()
    return torch.bfloat16 if is_faster else torch.float32


_decided: dict[str, bool] = {}


def multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices in bfloat16 so much faster that it pays.

    Decided once per process, before anything is compiled: compiled code can look the answer up, not find it.
    """
    if "cpu" not in _decided:
        _decided["cpu"] = bfloat16_speedup() >= WORTHWHILE_SPEEDUP
    return _decided["cpu"]


def bfloat16_speedup() -> float:
    """Return how many times faster this CPU's products are in bfloat16; measured on first use only."""
    facts = _product_facts()
    path = _cache_file(facts)
    if path is not None:
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["facts"] == facts and 0 < (speedup := float(found["speedup"])) < 1e6:
                return speedup
    speedup = _measured_speedup()
    logger.debug("products in bfloat16 are %.2f times as fast as in float32, measured", speedup)
    if path is not None:
        # no folder, no permission, or another process that writes the same: it is measured again next time
        with suppress(OSError, GenoembedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"speedup": round(speedup, 3), "facts": facts}))
    return speedup


def _measured_speedup() -> float:
    """Multiply as blocks do, in one thread, in both types by turns; a product's shortest time counts."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others may be at work: with several threads the slowest would count
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            products = {
                dtype: [partial(multiply, a.to(dtype), b.to(dtype)) for multiply, a, b in _typical_products()]
                for dtype in (torch.float32, torch.bfloat16)
            }
            full, half = ([math.inf] * len(found) for found in products.values())
            for number in range(_ROUNDS):
                for index, (in_full, in_half) in enumerate(zip(*products.values(), strict=True)):
                    full[index] = min(full[index], _seconds(in_full))
                    half[index] = min(half[index], _seconds(in_half))
                if number >= _ROUNDS // 2 and sum(half) > 2 * sum(full):
                    break  # emulated: each round takes long, and no other answer will come of it
    finally:
        torch.set_num_threads(num_threads)
    return sum(full) / sum(half)


def _typical_products() -> list[tuple[Callable[..., Tensor], Tensor, Tensor]]:
    """Return linear layers of a narrow and a wider model, and the Toeplitz products of a filter."""
    ones = partial(torch.ones, device="cpu", dtype=torch.float32)  # whatever defaults the caller has set
    return [
        (F.linear, ones(512, 128), ones(384, 128)),
        (F.linear, ones(256, 512), ones(512, 512)),
        (torch.bmm, ones(32, 16, 128), ones(32, 128, 128)),
    ]


def _seconds(product: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started


def _product_facts() -> dict[str, str]:
    """Collect what decides how fast products are."""
    cpu = {"machine": platform.machine(), "processor": os.environ.get("PROCESSOR_IDENTIFIER", "")}
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if not line.strip():
                break  # the next core
            if name.strip() in _CPU_FIELDS:
                cpu[name.strip()] = value.strip()
    chosen = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {"torch": torch.__version__, **cpu, **chosen}


def _cache_file(facts: dict[str, str]) -> Path | None:
    """Return where the speedup of such a machine is kept; None where there is no home folder."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    try:
        if sys.platform == "win32":
            folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            folder = Path.home() / "Library" / "Caches"
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    # a relative XDG_CACHE_HOME is to be ignored, says its specification
    return folder / "genoembed" / f"bfloat16-{digest[:16]}.json" if folder.is_absolute() else None


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


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolve float32 numbers as they are.

    On NVIDIA GPUs, torch lets convolutions of float32 round their factors to the 10 bits of TF32 by default.
    That is less than float32 promises, and other kernels, for batches of other shapes, give other values.
    Matrix products do so only if the user asks for it, and then it is the user's choice.

    Example:
        >>> with full_float32():
        ...     torch.backends.cudnn.allow_tf32
        False
    """
    try:
        is_rounded = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # chosen through torch's newer settings, of which this one speaks no more
        is_rounded = False
    if not is_rounded:
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True
