"""What a line of the log says about its steps: means and counts of all processes, and what padding cost."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from genoembed.training.collate import PaddingMeter
from genoembed.training.processes import from_all
from genoembed.training.step_statistics import COUNTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(slots=True)
class StepBook:
    """What was trained on since the last line, in this process.

    Example:
        >>> book = StepBook()
        >>> book.add({"loss_dense": 1.0, "queries": 4.0})
        >>> book.add({"loss_dense": 2.0, "queries": 4.0, "spread": math.nan})
        >>> joined_metrics([book, book])
        {'loss_dense': 1.5, 'queries': 8.0}
    """

    padding: PaddingMeter = field(default_factory=PaddingMeter)
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a batch; those that are none are left out."""
        for name, value in numbers.items():
            if math.isfinite(value):
                self.sums[name] += value
                self.steps[name] += 1

    def metrics(self) -> dict[str, float]:
        """Give the numbers of all processes; a collective call."""
        plain = StepBook(self.padding, self.seconds, dict(self.sums), dict(self.steps))
        return joined_metrics(from_all(plain))


def joined_metrics(books: Sequence[StepBook]) -> dict[str, float]:
    """Join what the processes have noted about the same steps."""
    found = {}
    for name in dict.fromkeys(name for book in books for name in book.sums):
        total = sum(book.sums.get(name, 0.0) for book in books)
        found[name] = total / sum(book.steps.get(name, 0) for book in books)
        if name in COUNTED:
            found[name] *= len(books)
    seconds = max(book.seconds for book in books)
    return found | (PaddingMeter.joined([book.padding for book in books]).metrics(seconds) if seconds else {})
