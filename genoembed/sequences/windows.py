"""Long sequences cut into overlapping windows.

In: a length, a window and a stride. Out: :class:`Window` after :class:`Window`, which together show the model
every base and answer for each base exactly once: the base counts in the window where it has most context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.contracts import Window
from genoembed.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator


def default_stride(window_bp: int) -> int:
    """Step between windows when none is set: three quarters of a window, so a quarter overlaps.

    Example:
        >>> default_stride(8192)
        6144
    """
    return max(1, window_bp - window_bp // 4)


def iter_windows(
    length: int,
    *,
    window_bp: int,
    stride_bp: int | None = None,
    causal: bool = False,
    core_start: int = 0,
    core_end: int | None = None,
    frame_bp: int = 1,
) -> Iterator[Window]:
    """Cut a sequence into windows.

    Windows start every ``stride_bp`` bases; the last one is moved left so that it ends with the sequence, and
    no window is shorter than ``window_bp`` unless the sequence is. Where windows overlap, each base belongs
    to the one that shows most of its context. A bidirectional model sees both sides, so the base belongs to
    the window whose middle is nearest: neighbors share their overlap half and half, and the odd base goes to
    the right one. (That the sequence's own ends cost no context does not change this.) A causal model sees
    only what is to the left, so the base belongs to the first window that has it. Windows that answer for no
    base of the core are left out.

    With ``frame_bp``, windows begin, and their shares of the core end, at multiples of it: where tokens are
    non-overlapping k-mers of this length, all windows have the same k-mers. The last window may then be
    shorter by a part of one. ``window_bp`` must be a multiple.

    Example:
        >>> for w in iter_windows(10, window_bp=6, stride_bp=4):
        ...     print(w.start, w.end, w.core_start, w.core_end)
        0 6 0 5
        4 10 5 10
        >>> [(w.core_start, w.core_end) for w in iter_windows(10, window_bp=6, stride_bp=4, causal=True)]
        [(0, 6), (6, 10)]
    """
    problems = []
    if window_bp < 1:
        problems.append(f"window is {window_bp}, expected at least 1 base; set window to the model's context")
    stride = default_stride(window_bp) if stride_bp is None else stride_bp
    if stride < 1:
        problems.append(f"stride is {stride}, expected at least 1 base; set stride to 1 or more")
    elif window_bp >= 1 and stride > window_bp:
        problems.append(
            f"stride is {stride}, but window is {window_bp}: bases between windows would be lost; "
            f"set stride to {window_bp} or less"
        )
    if problems:
        raise ConfigError(*problems)
    end = length if core_end is None else core_end
    if not 0 <= core_start <= end <= length:
        problem = f"core {core_start}-{end} is outside a sequence of {length} bases"
        raise ShapeError(problem)
    # within a word there is no step, and a sequence shorter than a word has one window anyway
    stride = max(frame_bp, stride // frame_bp * frame_bp)
    return _windows(length, window_bp, stride, causal, core_start, end, frame_bp)


def _windows(
    length: int, window_bp: int, stride: int, causal: bool, core_start: int, core_end: int, frame_bp: int
) -> Iterator[Window]:
    # rounded up, so that no window is longer than asked for
    last = -(-max(0, length - window_bp) // frame_bp) * frame_bp
    start = begin = 0
    while begin < length:
        end = min(start + window_bp, length)
        following = min(start + stride, last)
        if start == last:
            share = length
        else:  # the next window begins at `following`, this one ends at `end`: they overlap in between
            share = end if causal else (following + end) // 2 // frame_bp * frame_bp
        first, past = max(begin, core_start), min(share, core_end)
        if first < past:
            yield Window(start=start, end=end, core_start=first, core_end=past)
        start, begin = following, share
