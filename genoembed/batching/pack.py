"""Packing as one stream: documents laid end to end and cut into rows of one length, for causal training.

In: token ids of documents. Out: batches without padding, in which documents may be cut. For whole documents
with some padding see :mod:`genoembed.batching.bins`. B rows, L slots of a row (the window).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from genoembed.batching.packed_rows import (
    IGNORE_INDEX,
    Document,
    PackCounts,
    as_token_ids,
    build_packed_batch,
    size_problems,
)
from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from genoembed.contracts import PackedBatch

__all__ = ["IGNORE_INDEX", "PackCounts", "pack_stream", "packing_efficiency"]

logger = logging.getLogger(__name__)


def pack_stream(
    documents: Iterable[Document],
    *,
    window: int,
    eod_token_id: int = 0,
    pad_token_id: int = 1,
    batch_size: int = 1,
    drop_last: bool = False,
    on_drop: Callable[[int], None] | None = None,
    counts: PackCounts | None = None,
) -> Iterator[PackedBatch]:
    """Join documents, each followed by EOD, and cut the stream into equal windows.

    Every token is in exactly one slot, in order. Only the end of the stream is padded, and the last batch may
    have fewer rows. A document may be cut: what runs on in the next row is a segment of its own there, and
    starts without context. Labels never reach across a boundary: the first token of a segment is no target,
    an EOD is the target of the document's last token. Padding is a last segment of its row in ``cu_seqlens``
    and ``position_ids`` (so that boundaries cover every slot), is -1 in ``segment_ids``, and takes no loss.

    Args:
        documents: Token ids of one document each: bytes (one byte a token), an integer array, or integers.
        window: Slots of a row, at least 2.
        eod_token_id: Id that ends each document.
        pad_token_id: Id that fills the end of the last row.
        batch_size: Rows of a batch, at least 1.
        drop_last: Leave out the tokens that do not fill the last row, instead of padding it. Their number is
            logged and given to ``on_drop``.
        on_drop: Called once, at the end, with the number of tokens left out, when there are any.
        counts: Filled in as batches are handed on.

    Yields:
        Batches of up to ``batch_size`` rows of ``window`` slots.

    Raises:
        ConfigError: If ``window`` or ``batch_size`` is too small, or a batch too large for int32 boundaries.
        SequenceLengthError: If a document is empty.
        ShapeError: If a document is not a one-dimensional row of integers.

    Example:
        >>> batch = next(pack_stream([b"ACG", b"T"], window=7))
        >>> batch.input_ids.tolist(), batch.labels.tolist()
        ([[65, 67, 71, 0, 84, 0, 1]], [[-100, 67, 71, 0, -100, 0, -100]])
        >>> batch.position_ids.tolist(), batch.cu_seqlens.tolist()
        ([[0, 1, 2, 3, 0, 1, 0]], [0, 4, 6, 7])
    """
    if problems := size_problems(window, batch_size):
        raise ConfigError(*problems)
    tally = PackCounts() if counts is None else counts
    ids = np.empty(batch_size * window, dtype=np.int64)
    is_start = np.zeros(batch_size * window, dtype=np.bool_)
    filled = 0
    for piece, opens_document in _iter_pieces(documents, eod_token_id, window, tally):
        taken = 0
        while taken < len(piece):
            count = min(len(piece) - taken, len(ids) - filled)
            ids[filled : filled + count] = piece[taken : taken + count]
            is_start[filled] |= opens_document and taken == 0
            taken += count
            filled += count
            if filled == len(ids):
                yield _build_rows(ids, is_start, window, tally)
                is_start[:] = False
                filled = 0
    num_left = filled % window
    if drop_last and num_left:
        logger.info("pack_stream: left out %d tokens that do not fill a row of %d", num_left, window)
        tally.dropped_tokens += num_left
        filled -= num_left
        if on_drop is not None:
            on_drop(num_left)
    if filled:
        slots = -(-filled // window) * window
        ids[filled:slots] = pad_token_id
        yield _build_rows(ids[:slots], is_start[:slots], window, tally, num_padding=slots - filled)
    logger.info("pack_stream: %s, efficiency %.4f", tally, tally.efficiency)


def packing_efficiency(batch: PackedBatch) -> float:
    """Give the share of slots that hold a real token (EOD counts, padding does not).

    Args:
        batch: Packed rows.

    Returns:
        A share between 0 and 1.

    Example:
        >>> packing_efficiency(next(pack_stream([b"AC"], window=4)))
        0.75
    """
    return float((batch.segment_ids >= 0).double().mean())


def _iter_pieces(
    documents: Iterable[Document], eod_token_id: int, window: int, counts: PackCounts
) -> Iterator[tuple[NDArray[np.integer], bool]]:
    eod = np.array([eod_token_id], dtype=np.int64)
    position = 0
    for number, document in enumerate(documents, start=1):
        ids = as_token_ids(document, number)
        counts.documents += 1
        counts.cut_documents += position // window != (position + len(ids)) // window
        position = (position + len(ids) + 1) % window
        yield ids, True
        yield eod, False


def _build_rows(
    ids: NDArray[np.int64],
    is_start: NDArray[np.bool_],
    window: int,
    counts: PackCounts,
    *,
    num_padding: int = 0,
) -> PackedBatch:
    num_real_B = np.full(len(ids) // window, window, dtype=np.int64)
    num_real_B[-1] -= num_padding
    return build_packed_batch(
        ids.reshape(-1, window), is_start.reshape(-1, window), num_real_B, counts=counts
    )
