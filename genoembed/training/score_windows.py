"""Scores of passages that are longer than a context: windows that overlap, and the best of them.

In: lengths. Out: spans, and from scores of windows the score of each passage, which is their maximum.
Promised: every token of a passage is in a window.

W windows, P passages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genoembed.contracts import Window
from genoembed.errors import SequenceLengthError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_OVERLAP = 80
_OVERLAP_SHARE = 4


def passage_spans(
    length: int, *, context: int, query_tokens: int = 0, special_tokens: int = 0
) -> tuple[Window, ...]:
    """Cut a passage into windows that fit a context together with its query.

    A window has ``context - query_tokens - special_tokens`` tokens and shares with the one before it the
    smaller of 80 tokens and a quarter of its own. The last is shorter. A passage that fits is one window.

    Example:
        >>> spans = passage_spans(1000, context=512, query_tokens=20, special_tokens=2)
        >>> [(span.start, span.end) for span in spans]
        [(0, 490), (410, 900), (820, 1000)]
    """
    window = context - query_tokens - special_tokens
    if length < 1 or window < 1:
        message = (
            f"passage of {length} tokens: {window} of a context of {context} are left for it beside a query "
            f"of {query_tokens} tokens and {special_tokens} special ones, expected 1 or more of each; "
            "shorten the query"
        )
        raise SequenceLengthError(message)
    step = window - min(_MAX_OVERLAP, window // _OVERLAP_SHARE)
    starts = range(0, max(length - window, 0) + step, step)
    spans = []
    for start in starts:
        end = min(start + window, length)
        spans.append(Window(start=start, end=end, core_start=start, core_end=end))
        if end == length:
            break
    return tuple(spans)


def best_window_scores(scores_W: Tensor, passage_W: Tensor, *, num_passages: int) -> Tensor:
    """Give each passage the score of its best window.

    Example:
        >>> best_window_scores(torch.tensor([0.1, 0.7, 0.3]), torch.tensor([0, 0, 1]), num_passages=2)
        tensor([0.7000, 0.3000])
    """
    owners = passage_W.unique().tolist()
    if passage_W.shape != scores_W.shape[-1:] or owners != list(range(num_passages)):
        message = (
            f"windows: shape {tuple(scores_W.shape)} of passages {owners}, expected one or more for each of "
            f"{num_passages} passages"
        )
        raise ShapeError(message)
    start = scores_W.new_full((*scores_W.shape[:-1], num_passages), -torch.inf)
    return start.scatter_reduce(-1, passage_W.to(scores_W.device).expand_as(scores_W), scores_W, "amax")
