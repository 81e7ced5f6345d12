"""The processes of a run: the threads of each, and the group that several form under ``torchrun``."""

from __future__ import annotations

import atexit
import gc
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from genoembed.errors import ConfigError

ValueT = TypeVar("ValueT")


def use_threads(threads: int | None) -> None:
    """Set how many CPU threads torch uses."""
    if threads is None:
        return
    if threads < 1:
        message = f"threads is {threads}; set threads to 1 or more"
        raise ConfigError(message)
    torch.set_num_threads(threads)


def leave_process_group() -> None:
    """End the group while the interpreter lives: its threads can make a process abort that ends with them."""
    gc.collect()  # what is wrapped for the group holds it
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_process_group_at_exit() -> None:
    """Have the group, if there is one, ended before the interpreter is."""
    if dist.is_initialized():
        atexit.register(leave_process_group)


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
    """Give every process what the first one has; a collective call.

    Example:
        >>> from_first(0.5)
        0.5
    """
    if not dist.is_initialized():
        return value
    found: list[Any] = [value]
    dist.broadcast_object_list(found)
    return found[0]
