"""Numbers and tables as plain text that people read and ``grep`` and ``awk`` take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_STEP = 1000
_PREFIXES = ("", "k", "M", "G", "T")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Say how many.

    Example:
        >>> count(1, "record"), count(1200, "gap letter")
        ('1 record', '1,200 gap letters')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def magnitude(number: float, unit: str) -> str:
    """Shorten a number to three digits and a prefix.

    Example:
        >>> magnitude(512, "b"), magnitude(4_641_652, "b"), magnitude(13_766_621_200, "B")
        ('512 b', '4.64 Mb', '13.8 GB')
    """
    scale = 0
    while round(number) >= _STEP and scale < len(_PREFIXES) - 1:
        number, scale = number / _STEP, scale + 1
    return f"{number:.3g} {_PREFIXES[scale]}{unit}" if scale else f"{number:.0f} {unit}"


def duration(seconds: float) -> str:
    """Write a time as a clock would.

    Example:
        >>> duration(75), duration(3675)
        ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def aligned(rows: Iterable[Sequence[object]], *, header: Sequence[str] | None = None) -> str:
    """Lay rows out in columns, two spaces apart.

    Example:
        >>> print(aligned([("a", 5), ("bc", 10)], header=("name", "size")))
        name  size
        a        5
        bc      10
    """
    body = [tuple(row) for row in rows]
    lines: list[Sequence[object]] = [header, *body] if header is not None else [*body]
    if not lines:
        return ""
    is_number = [all(isinstance(cell, int | float) for cell in column) for column in zip(*body, strict=True)]
    texts = [[_cell(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    shapes = list(zip(widths, is_number or [False] * len(widths), strict=True))
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, (width, right) in zip(line, shapes, strict=True)
        ).rstrip()
        for line in texts
    )


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
