"""Packing: documents laid end to end in rows of one length, for causal training.

B rows, L slots of a row (the window), S segments, T tokens.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from genoembed.contracts import PackedBatch
from genoembed.errors import ConfigError, SequenceLengthError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100


def pack_stream(
    documents: Iterable[bytes | bytearray | memoryview | NDArray[np.integer] | Sequence[int]],
    *,
    window: int,
    eod_token_id: int = 0,
    pad_token_id: int = 1,
    batch_size: int = 1,
    drop_last: bool = False,
    on_drop: Callable[[int], None] | None = None,
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
    if problems := _size_problems(window, batch_size):
        raise ConfigError(*problems)
    ids = np.empty(batch_size * window, dtype=np.int64)
    is_start = np.zeros(batch_size * window, dtype=np.bool_)
    filled = 0
    for piece, opens_document in _iter_pieces(documents, eod_token_id):
        taken = 0
        while taken < len(piece):
            count = min(len(piece) - taken, len(ids) - filled)
            ids[filled : filled + count] = piece[taken : taken + count]
            is_start[filled] |= opens_document and taken == 0
            taken += count
            filled += count
            if filled == len(ids):
                yield _build_batch(ids, is_start, window)
                is_start[:] = False
                filled = 0
    num_rows, num_left = divmod(filled, window)
    if drop_last and num_left:
        logger.info("pack_stream: left out %d tokens that do not fill a row of %d", num_left, window)
        if on_drop is not None:
            on_drop(num_left)
    elif num_left:
        num_rows += 1
        ids[filled : num_rows * window] = pad_token_id
        is_start[filled] = True
    if num_rows:
        slots = num_rows * window
        num_padding = max(0, slots - filled)
        yield _build_batch(ids[:slots], is_start[:slots], window, num_padding=num_padding)


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


def _size_problems(window: int, batch_size: int) -> list[str]:
    problems = []
    if window < 2:
        problems.append(f"window: {window}, expected 2 or more; set window to the context to train on")
    if batch_size < 1:
        problems.append(
            f"batch_size: {batch_size}, expected 1 or more; set batch_size to the rows of a batch"
        )
    if window * batch_size >= 2**31:
        problems.append(
            f"window {window} x batch_size {batch_size}: {window * batch_size} slots, expected less "
            "than 2**31; set a smaller window or batch_size"
        )
    return problems


def _iter_pieces(
    documents: Iterable[bytes | bytearray | memoryview | NDArray[np.integer] | Sequence[int]],
    eod_token_id: int,
) -> Iterator[tuple[NDArray[np.integer], bool]]:
    eod = np.array([eod_token_id], dtype=np.int64)
    for number, document in enumerate(documents, start=1):
        yield _as_ids(document, number), True
        yield eod, False


def _as_ids(
    document: bytes | bytearray | memoryview | NDArray[np.integer] | Sequence[int], number: int
) -> NDArray[np.integer]:
    if len(document) == 0:
        message = f"document {number}: no tokens, expected at least one; leave empty documents out"
        raise SequenceLengthError(message)
    if isinstance(document, (bytes, bytearray)):
        return np.frombuffer(document, dtype=np.uint8)
    ids = np.asarray(document)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        message = f"document {number}: {ids.dtype} of shape {ids.shape}, expected integers of shape (T,)"
        raise ShapeError(message)
    return ids


def _build_batch(
    ids: NDArray[np.int64], is_start: NDArray[np.bool_], window: int, *, num_padding: int = 0
) -> PackedBatch:
    ids_BL = ids.reshape(-1, window).copy()
    start_BL = is_start.reshape(-1, window).copy()
    start_BL[:, 0] = True
    slot_L = np.arange(window, dtype=np.int64)
    segment_start_BL = np.maximum.accumulate(np.where(start_BL, slot_L, 0), axis=1)
    segment_BL = np.cumsum(start_BL, axis=1, dtype=np.int64) - 1
    labels_BL = np.where(start_BL, IGNORE_INDEX, ids_BL)
    if num_padding:
        segment_BL[-1, -num_padding:] = -1
        labels_BL[-1, -num_padding:] = IGNORE_INDEX
    boundaries = np.append(np.flatnonzero(start_BL), ids_BL.size).astype(np.int32)
    return PackedBatch(
        input_ids=torch.from_numpy(ids_BL),
        labels=torch.from_numpy(labels_BL),
        position_ids=torch.from_numpy(slot_L - segment_start_BL),
        segment_ids=torch.from_numpy(segment_BL),
        cu_seqlens=torch.from_numpy(boundaries),
    )
