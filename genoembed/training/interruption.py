"""Signals that end training: after the step that is being done, with a checkpoint, in all processes alike."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """Let SIGINT and SIGTERM end training after the step that is being done, with a checkpoint.

    A second signal has its usual effect.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        """Step after which training stopped because of a signal."""
        self._is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(_number: int, _frame: FrameType | None) -> None:
            self._is_asked = True
            logger.info("interrupted: saving a checkpoint after this step; interrupt again to stop at once")
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Stop all processes if one was asked to."""
        asked = self._is_asked
        if args.world_size > 1:
            flag = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            asked = bool(flag)
        if asked and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True

    def raise_if_stopped(self, folder: Path, *, total: int | None = None) -> None:
        """End the run as an interruption does, and say how to go on."""
        if self.stopped_at is None:
            return
        of_total = "" if total is None else f" of {total}"
        message = (
            f"{folder / f'checkpoint-{self.stopped_at}'} is saved; run the same again with resume "
            f"to go on at step {self.stopped_at + 1}{of_total}"
        )
        raise KeyboardInterrupt(message)
