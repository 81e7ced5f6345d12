"""Packing into bins: whole documents, best-fit into rows of one length, the ends of the rows padded.

In: token ids of documents, from a stream of any length. Out: the same batches as
:func:`~genoembed.batching.pack.pack_stream`. Promised: every token is in exactly one slot; a document is cut
only if it is longer than a row; memory is bounded by the buffer and the open rows; the same documents and
seed give the same batches. B rows, L slots of a row (the window).
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from genoembed.batching.packed_rows import (
    Document,
    PackCounts,
    as_token_ids,
    build_packed_batch,
    size_problems,
)
from genoembed.errors import ConfigError, SequenceLengthError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from genoembed.contracts import PackedBatch

LongPolicy: TypeAlias = Literal["cut", "error"]
"""What to do with a document that is longer than a row, its EOD included."""

_LONG_POLICIES = ("cut", "error")
_BUFFER_TOKENS = 2**26
"""A buffer never holds more than about this many tokens, however long its documents are."""

logger = logging.getLogger(__name__)


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
    """Lay whole documents, each followed by EOD, into the rows where they fit best.

    A buffer of documents is placed longest first, each into the fullest row that still takes it. Rows are
    handed on in random order, documents stand in random order within a row, and the emptiest rows stay open
    for the next buffer. A document that is longer than a row is cut at every ``window`` tokens: pieces before
    the last fill a row each and have no EOD, the last one is placed like a document, and the first token of
    a piece is no target. Fields are as those of ``pack_stream``; any row may end in padding.

    Args:
        documents: Token ids of one document each: bytes (one byte a token), an integer array, or integers.
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
        counts: Filled in as batches are handed on.

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
    pieces = _iter_pieces(documents, window, long, tally)
    batch = _BatchInProgress(batch_size, window, eod_token_id, pad_token_id)
    for row in _iter_rows(pieces, window, buffer_documents, open_rows, rng):
        batch.add(row, rng)
        if batch.is_full:
            yield batch.build(tally)
    if batch.num_rows:
        yield batch.build(tally)
    logger.info("pack_bins: %s, efficiency %.4f", tally, tally.efficiency)


def _iter_pieces(
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
        yield from _shuffled(shelf.take_rows(keep=0 if is_last else open_rows), rng)


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


def _shuffled(rows: list[list[_Piece]], rng: np.random.Generator) -> Iterator[list[_Piece]]:
    for index in rng.permutation(len(rows)):
        yield rows[index]


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
        """Put a piece into the fullest row that takes it, the oldest of equals, or into a new one."""
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
        """Hand out the full rows and all open ones but the ``keep`` emptiest."""
        num_taken = max(0, len(self._room) - keep)
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
        """Lay the pieces of a row end to end, in random order."""
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
