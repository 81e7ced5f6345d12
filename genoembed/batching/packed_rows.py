"""What both packers share: documents as integer arrays, rows as a ``PackedBatch``, and the counts.

In: token ids of documents, and rows of slots with marks where segments begin. Out: the five fields of
:class:`~genoembed.contracts.PackedBatch`. B rows, L slots of a row (the window).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from genoembed.contracts import PackedBatch
from genoembed.errors import SequenceLengthError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Document: TypeAlias = "bytes | bytearray | memoryview | NDArray[np.integer] | Sequence[int]"
"""Token ids of one document: bytes (one byte a token), an integer array, or integers."""

IGNORE_INDEX = -100


@dataclass(kw_only=True, slots=True)
class PackCounts:
    """What a packer did so far; it adds to it batch by batch."""

    documents: int = 0
    """Documents read."""
    cut_documents: int = 0
    """Of these, documents that do not lie in one row."""
    rows: int = 0
    """Rows handed on."""
    slots: int = 0
    """Slots of these rows."""
    tokens: int = 0
    """Slots that hold a real token; an EOD counts, padding does not."""
    dropped_tokens: int = 0
    """Tokens left out because they do not fill the last row (only where that was asked for)."""

    @property
    def efficiency(self) -> float:
        """Share of slots that hold a real token; 1 before the first row."""
        return self.tokens / self.slots if self.slots else 1.0


def size_problems(window: int, batch_size: int) -> list[str]:
    """Say what is wrong with the shape of a batch.

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
    if window * batch_size >= 2**31:
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
