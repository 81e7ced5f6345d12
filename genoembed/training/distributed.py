"""The processes of a run: the group that several form under ``torchrun``.

Rows that lie on several processes, seen as one batch, with the gradient that one process would give.
"""

from __future__ import annotations

import atexit
import gc
import os
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from genoembed.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from genoembed.config.choices import Distributed


ValueT = TypeVar("ValueT")


def leave_process_group() -> None:
    """End the group while the interpreter lives: its threads can make a process abort that ends with them."""
    gc.collect()  # what is wrapped for the group holds it
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_process_group_at_exit() -> None:
    """Have the group, if there is one, ended before the interpreter is."""
    if dist.is_initialized():
        atexit.register(leave_process_group)


def num_processes() -> int:
    """Count the processes of a run, before they have formed their group, too."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def load_device(distributed: Distributed) -> str | None:
    """Return where a process loads the model; None leaves the choice to the loader.

    A model that is to be spread over devices may fit none of them, so it is loaded beside them.
    """
    if distributed == "fsdp":
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def wait_for_all() -> None:
    """Go on when all processes have come here: torchrun ends the others when one is gone."""
    if dist.is_initialized():
        dist.barrier()


def from_all(value: ValueT) -> list[ValueT]:
    """Show every process what each has; a collective call.

    Example:
        >>> from_all({"loss": 0.5})
        [{'loss': 0.5}]
    """
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: ValueT) -> ValueT:
    """Return to every process what the first one has; a collective call.

    Example:
        >>> from_first(0.5)
        0.5
    """
    if not dist.is_initialized():
        return value
    found: list[Any] = [value]
    dist.broadcast_object_list(found)
    return found[0]


def whole(values: Any, *, is_kept: bool = True) -> Any:
    """Make tensors whole of which each process holds a part, on the CPU, in mappings and lists too.

    A collective call. Where they are not kept, None stands for each: one process alone needs the memory.

    Example:
        >>> whole({"lr": 0.5, "moments": [torch.zeros(1)]})
        {'lr': 0.5, 'moments': [tensor([0.])]}
    """
    if isinstance(values, dict):
        return {name: whole(value, is_kept=is_kept) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(whole(value, is_kept=is_kept) for value in values)
    if not isinstance(values, torch.Tensor):
        return values
    found = values.full_tensor() if hasattr(values, "full_tensor") else values
    return found.detach().cpu() if is_kept else None


class RankRows:
    """How many rows each rank holds, and where those of this rank stand among all.

    Building one is a collective call: every rank does it, in the same order.

    Example:
        >>> rows = RankRows(3, across=False, device=torch.device("cpu"))
        >>> rows.start, rows.total, float(rows.mean(torch.tensor([1.0, 2.0, 6.0])))
        (0, 3, 3.0)
    """

    def __init__(self, num_rows: int, *, across: bool, device: torch.device) -> None:
        # a loss without gradient is one that is measured, by each process on all rows
        is_learning = across and torch.is_grad_enabled()
        together = is_learning and dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if together else 1
        self.sizes = (num_rows,)
        self.rank = dist.get_rank() if together else 0
        if together:
            counts = torch.zeros(self.world_size, dtype=torch.int64, device=device)
            counts[self.rank] = num_rows
            dist.all_reduce(counts)
            self.sizes = tuple(counts.tolist())
        if min(self.sizes) < 1:
            message = f"rows of each rank: {list(self.sizes)}, expected 1 or more; drop the last, short batch"
            raise ShapeError(message)
        self.start = sum(self.sizes[: self.rank])
        """Number of this rank's first row among all."""
        self.total = sum(self.sizes)
        """Rows of all ranks."""

    def gather(self, rows: Tensor, *, group_size: int = 1, pad: float | None = None) -> Tensor:
        """Concatenate the rows of all ranks; gradients flow back to the rank that a row came from."""
        if self.world_size == 1:
            return rows
        if pad is not None:
            rows = _fill_columns(rows, pad)
        sizes = tuple(size * group_size for size in self.sizes)
        was_bool = rows.dtype == torch.bool
        gathered: Tensor = _Gather.apply(rows.to(torch.uint8) if was_bool else rows, sizes)
        return gathered.bool() if was_bool else gathered

    def mean(self, values_N: Tensor) -> Tensor:
        """Average over the rows of all ranks, as this rank's share of a loss."""
        return values_N.sum() * (self.world_size / self.total)


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all ranks and keeps this rank's part."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        rank = dist.get_rank()
        start = sum(ctx.sizes[:rank])
        return total[start : start + ctx.sizes[rank]], None


def _fill_columns(rows: Tensor, value: float) -> Tensor:
    width = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    missing = int(width) - rows.shape[1]
    filler = rows.new_full((rows.shape[0], missing, *rows.shape[2:]), value)
    return torch.cat([rows, filler], dim=1)
