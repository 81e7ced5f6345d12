"""Documents packed into rows of one length, for causal training.

In: token ids of documents. Out: :class:`~genoembed.contracts.PackedBatch`. As one stream, documents are
concatenated and cut into rows; in bins, whole documents are put where they fit best, and the ends of the rows
are padded. B rows, L slots of a row (the window).
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from genoembed.contracts import IGNORE_INDEX, PackedBatch
from genoembed.errors import ConfigError, SequenceLengthError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray


Document: TypeAlias = "bytes | bytearray | memoryview | NDArray[np.integer] | Sequence[int]"
"""Token ids of one document: bytes (one byte per token), an integer array, or integers."""


@dataclass(kw_only=True, slots=True)
class PackCounts:
    """What a packer did so far; it adds to it batch by batch."""

    documents: int = 0
    """Documents read."""
    cut_documents: int = 0
    """Of these, documents that do not lie in one row."""
    rows: int = 0
    """Rows yielded."""
    slots: int = 0
    """Slots of these rows."""
    tokens: int = 0
    """Slots that hold a real token; an EOD counts, padding does not."""
    dropped_tokens: int = 0
    """Tokens left out because they do not fill the last row (only if that was requested)."""

    @property
    def efficiency(self) -> float:
        """Share of slots that hold a real token; 1 before the first row."""
        return self.tokens / self.slots if self.slots else 1.0

    def __str__(self) -> str:
        """Say the counts in words, for a log."""
        cut = f" ({self.cut_documents} cut)" if self.cut_documents else ""
        filled = f"{self.tokens} of {self.slots} slots filled ({100 * self.efficiency:.1f} %)"
        return f"{self.documents} documents{cut} in {self.rows} rows, {filled}"


def size_problems(window: int, batch_size: int) -> list[str]:
    """Return what is wrong with the shape of a batch.

    Args:
        window: Slots of a row.
        batch_size: Rows of a batch.

    Returns:
        A sentence for each problem; empty if there is none.
    """
    problems = []
    if window < 2:
        problems.append(f"window: {window}, expected 2 or more; set window to the context to train on")
    if batch_size < 1:
        problems.append(
            f"batch_size: {batch_size}, expected 1 or more; set batch_size to the rows of a batch"
        )
    if window * batch_size >= 2**31:  # boundaries are int32, as attention kernels for packed rows take them
        problems.append(
            f"window {window} x batch_size {batch_size}: {window * batch_size} slots, expected less "
            "than 2**31; set a smaller window or batch_size"
        )
    return problems


def as_token_ids(document: Document, number: int) -> NDArray[np.integer]:
    """Look at a document as an array.

    Args:
        document: Token ids.
        number: Which document it is, from 1, for messages.

    Returns:
        The ids, shape ``(T,)``; a view where the document is bytes or an array.

    Raises:
        SequenceLengthError: If the document is empty.
        ShapeError: If it is not a one-dimensional row of integers.
    """
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


def build_packed_batch(
    ids_BL: NDArray[np.int64],
    start_BL: NDArray[np.bool_],
    num_real_B: NDArray[np.int64],
    *,
    counts: PackCounts,
) -> PackedBatch:
    """Derive labels, positions, segments and boundaries from rows and the marks of their segments.

    The arrays are copied, so that the caller can fill them again.

    Args:
        ids_BL: Token ids, padding included. Shape ``(B, L)``.
        start_BL: True at the first token of each segment; the first slot of a row is one in any case.
        num_real_B: Slots of each row before its padding, at least 1. Shape ``(B,)``.
        counts: Rows, slots and tokens are added.

    Returns:
        The batch. Padding is a segment of its own in ``position_ids`` and ``cu_seqlens``, is -1 in
        ``segment_ids``, and takes no loss.
    """
    start_BL = start_BL.copy()
    start_BL[:, 0] = True
    padded_B = np.flatnonzero(num_real_B < ids_BL.shape[1])
    start_BL[padded_B, num_real_B[padded_B]] = True
    slot_L = np.arange(ids_BL.shape[1], dtype=np.int64)
    is_padding_BL = slot_L >= num_real_B[:, None]
    # of each slot: the last start at it or before it
    segment_start_BL = np.maximum.accumulate(np.where(start_BL, slot_L, 0), axis=1)
    segment_BL = np.cumsum(start_BL, axis=1, dtype=np.int64) - 1
    segment_BL[is_padding_BL] = -1
    boundaries = np.append(np.flatnonzero(start_BL), ids_BL.size).astype(np.int32)
    counts.rows += len(ids_BL)
    counts.slots += ids_BL.size
    counts.tokens += int(num_real_B.sum())
    return PackedBatch(
        input_ids=torch.from_numpy(ids_BL.copy()),
        labels=torch.from_numpy(np.where(start_BL | is_padding_BL, IGNORE_INDEX, ids_BL)),
        position_ids=torch.from_numpy(slot_L - segment_start_BL),
        segment_ids=torch.from_numpy(segment_BL),
        cu_seqlens=torch.from_numpy(boundaries),
    )


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
        documents: Token ids of one document each: bytes (one byte per token), an integer array, or integers.
        window: Slots of a row, at least 2.
        eod_token_id: Id that ends each document.
        pad_token_id: Id that fills the end of the last row.
        batch_size: Rows of a batch, at least 1.
        drop_last: Leave out the tokens that do not fill the last row, instead of padding it. Their number is
            logged and given to ``on_drop``.
        on_drop: Called once, at the end, with the number of tokens left out, when there are any.
        counts: Updated as batches are yielded.

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
    logger.info("pack_stream: %s", tally)


def packing_efficiency(batch: PackedBatch) -> float:
    """Return the share of slots that hold a real token (EOD counts, padding does not).

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
        # with its EOD: where that falls into the next row, the document does not lie in one
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


LongPolicy: TypeAlias = Literal["cut", "error"]
"""What to do with a document that is longer than a row, its EOD included."""

_LONG_POLICIES = ("cut", "error")
_BUFFER_TOKENS = 2**26
"""A buffer never holds more than about this many tokens, however long its documents are."""


class _Piece(NamedTuple):
    """A document, or as much of a long one as fits a row."""

    ids: NDArray[np.integer]
    """Its tokens, a copy: what the caller does with the document later does not matter."""
    has_eod: bool
    """True if the document ends here, and EOD follows."""

    @property
    def size(self) -> int:
        return len(self.ids) + self.has_eod


def pack_bins(
    documents: Iterable[Document],
    *,
    window: int,
    eod_token_id: int = 0,
    pad_token_id: int = 1,
    batch_size: int = 1,
    long: LongPolicy = "cut",
    buffer_documents: int = 4096,
    open_rows: int = 64,
    seed: int = 0,
    counts: PackCounts | None = None,
) -> Iterator[PackedBatch]:
    """Pack whole documents, each followed by EOD, into the rows where they fit best.

    A buffer of documents is placed longest first, each into the fullest row that still takes it. Rows are
    handed on in random order, documents stand in random order within a row, and the emptiest rows stay open
    for the next buffer. A document that is longer than a row is cut at every ``window`` tokens: pieces before
    the last fill a row each and have no EOD, the last one is placed like a document, and the first token of
    a piece is no target. Fields are as those of ``pack_stream``; any row may end in padding.

    Args:
        documents: Token ids of one document each: bytes (one byte per token), an integer array, or integers.
        window: Slots of a row, at least 2.
        eod_token_id: Id that ends each document.
        pad_token_id: Id that fills the ends of rows.
        batch_size: Rows of a batch, at least 1; the last batch may have fewer.
        long: A document that does not fit a row with its EOD: ``cut`` it (counted), or ``error``.
        buffer_documents: Documents placed together, at least 1; a piece of a cut document counts as one. More
            of them fit better and are shuffled further; memory is this many documents, and at most about
            64 million tokens.
        open_rows: Rows that wait for the next buffer, at most; 0 or more.
        seed: Decides about the order of rows, and of documents within a row.
        counts: Updated as batches are yielded.

    Yields:
        Batches of up to ``batch_size`` rows of ``window`` slots.

    Raises:
        ConfigError: If an option is out of range, or a batch too large for int32 boundaries.
        SequenceLengthError: If a document is empty, or too long and ``long`` is ``error``.
        ShapeError: If a document is not a one-dimensional row of integers.

    Example:
        >>> batch = next(pack_bins([b"ACG", b"AC", b"T"], window=5, batch_size=2))
        >>> sorted(sorted(row) for row in batch.input_ids.tolist())
        [[0, 0, 65, 67, 84], [0, 1, 65, 67, 71]]
        >>> sorted(batch.cu_seqlens.diff().tolist())
        [1, 2, 3, 4]
    """
    problems = size_problems(window, batch_size)
    if long not in _LONG_POLICIES:
        problems.append(f"long is {long!r}; set long to one of {', '.join(_LONG_POLICIES)}")
    if buffer_documents < 1:
        problems.append(f"buffer_documents: {buffer_documents}, expected 1 or more; set it to some thousand")
    if open_rows < 0:
        problems.append(f"open_rows: {open_rows}, expected 0 or more; set it to about 64")
    if problems:
        raise ConfigError(*problems)
    tally = PackCounts() if counts is None else counts
    rng = np.random.default_rng(seed)
    pieces = _iter_pieces_of_bins(documents, window, long, tally)
    batch = _BatchInProgress(batch_size, window, eod_token_id, pad_token_id)
    for row in _iter_rows(pieces, window, buffer_documents, open_rows, rng):
        batch.add(row, rng)
        if batch.is_full:
            yield batch.build(tally)
    if batch.num_rows:
        yield batch.build(tally)
    logger.info("pack_bins: %s", tally)


def _iter_pieces_of_bins(
    documents: Iterable[Document], window: int, long: LongPolicy, counts: PackCounts
) -> Iterator[_Piece]:
    for number, document in enumerate(documents, start=1):
        ids = as_token_ids(document, number)
        size = len(ids) + 1
        counts.documents += 1
        if size > window:
            if long == "error":
                message = (
                    f"document {number}: {len(ids)} tokens and EOD, but window is {window}; "
                    f"set long='cut', or window to {size} or more"
                )
                raise SequenceLengthError(message)
            counts.cut_documents += 1
        for start in range(0, size, window):
            yield _Piece(ids[start : start + window].copy(), has_eod=start + window >= size)


def _iter_rows(
    pieces: Iterable[_Piece], window: int, buffer_documents: int, open_rows: int, rng: np.random.Generator
) -> Iterator[list[_Piece]]:
    shelf = _Shelf(window)
    for buffer, is_last in _iter_buffers(pieces, buffer_documents):
        rng.shuffle(buffer)
        buffer.sort(key=lambda piece: piece.size, reverse=True)  # stable: equal lengths stay shuffled
        for piece in buffer:
            shelf.place(piece)
        rows = shelf.take_rows(keep=0 if is_last else open_rows)
        # placed by length, rows would come out sorted by it: batches must not
        yield from (rows[index] for index in rng.permutation(len(rows)))


def _iter_buffers(pieces: Iterable[_Piece], buffer_documents: int) -> Iterator[tuple[list[_Piece], bool]]:
    buffer: list[_Piece] = []
    num_tokens = 0
    for piece in pieces:
        if len(buffer) >= buffer_documents or num_tokens >= _BUFFER_TOKENS:
            yield buffer, False
            buffer, num_tokens = [], 0
        buffer.append(piece)
        num_tokens += piece.size
    if buffer:
        yield buffer, True


class _Shelf:
    """Rows that are being filled, found by the room they have left."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._num_rows = 0
        self._full: list[list[_Piece]] = []
        self._open: dict[int, list[_Piece]] = {}
        self._room: list[tuple[int, int]] = []
        """Free slots and number of each open row, sorted."""

    def place(self, piece: _Piece) -> None:
        """Add a piece to the fullest row with room for it, the oldest of equals, or to a new one."""
        # numbers of rows begin at 0: -1 stands before all rows with exactly this room
        at = bisect_left(self._room, (piece.size, -1))
        if at < len(self._room):
            room, number = self._room.pop(at)
        else:
            room, number = self._window, self._num_rows
            self._num_rows += 1
            self._open[number] = []
        self._open[number].append(piece)
        if room > piece.size:
            insort(self._room, (room - piece.size, number))
        else:
            self._full.append(self._open.pop(number))

    def take_rows(self, *, keep: int) -> list[list[_Piece]]:
        """Yield the full rows and all open ones but the ``keep`` emptiest."""
        num_taken = max(0, len(self._room) - keep)
        # sorted by room, so the fullest come first
        rows = self._full + [self._open.pop(number) for _, number in self._room[:num_taken]]
        self._room = self._room[num_taken:]
        self._full = []
        return rows


class _BatchInProgress:
    """Arrays that take one row after another."""

    def __init__(self, batch_size: int, window: int, eod_token_id: int, pad_token_id: int) -> None:
        self._ids_BL = np.empty((batch_size, window), dtype=np.int64)
        self._start_BL = np.zeros((batch_size, window), dtype=np.bool_)
        self._num_real_B = np.zeros(batch_size, dtype=np.int64)
        self._eod_token_id = eod_token_id
        self._pad_token_id = pad_token_id
        self.num_rows = 0

    @property
    def is_full(self) -> bool:
        return self.num_rows == len(self._ids_BL)

    def add(self, row: list[_Piece], rng: np.random.Generator) -> None:
        """Concatenate the pieces of a row, in random order."""
        ids_L, start_L = self._ids_BL[self.num_rows], self._start_BL[self.num_rows]
        start_L[:] = False
        filled = 0
        for index in rng.permutation(len(row)) if len(row) > 1 else (0,):
            piece = row[index]
            start_L[filled] = True
            ids_L[filled : filled + len(piece.ids)] = piece.ids
            filled += piece.size
            if piece.has_eod:
                ids_L[filled - 1] = self._eod_token_id
        ids_L[filled:] = self._pad_token_id
        self._num_real_B[self.num_rows] = filled
        self.num_rows += 1

    def build(self, counts: PackCounts) -> PackedBatch:
        """Make a batch of the rows so far, and start again."""
        rows = slice(0, self.num_rows)
        self.num_rows = 0
        return build_packed_batch(
            self._ids_BL[rows], self._start_BL[rows], self._num_real_B[rows], counts=counts
        )
