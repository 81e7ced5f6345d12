"""Which pieces share a forward pass, padding them to one batch, and which of their tokens count in pooling.

B rows, L padded length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from genoembed.contracts import Batch
from genoembed.errors import ConfigError, SequenceLengthError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.contracts import EncodedSequence, PoolMask


def plan_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    max_rows: int | None = None,
    max_padding: int | None = None,
    equal_lengths: bool = False,
) -> list[tuple[int, ...]]:
    """Group pieces by length so that no batch has over ``max_tokens`` slots.

    Shortest first, ties by input order: same input, same batches. Every index is in exactly one batch. The
    slots of a batch are its rows times its longest piece. A piece over the budget is never cut or dropped: it
    goes alone.

    Example:
        >>> plan_batches([3, 9, 2, 3], max_tokens=9)
        [(2, 0, 3), (1,)]
        >>> plan_batches([3, 9, 2, 3], max_tokens=9, equal_lengths=True)
        [(2,), (0, 3), (1,)]
        >>> plan_batches([3, 9, 2, 3], max_tokens=99, max_padding=4)
        [(2, 0, 3), (1,)]
    """
    problems = [
        f"{name}: {value}, expected {least} or more; set {name} to {least} or more"
        for name, value, least in (
            ("max_tokens", max_tokens, 1),
            ("max_rows", max_rows, 1),
            ("max_padding", max_padding, 0),
        )
        if value is not None and value < least
    ]
    if problems:
        raise ConfigError(*problems)
    if empty := [index for index, length in enumerate(lengths) if length < 1]:
        message = f"piece {empty[0]}: no tokens, expected at least one; leave empty pieces out"
        raise SequenceLengthError(message)
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    num_real = 0
    # a stable sort: equal lengths stay in input order, so that the same input gives the same batches
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        # sorted by length: the piece at hand is the longest, so it sets the width of the whole batch
        is_full = (len(batch) + 1) * length > max_tokens or len(batch) == max_rows
        # the padding of the pieces before it, if it came in
        is_longer = max_padding is not None and len(batch) * length - num_real > max_padding
        if batch and (is_full or is_longer or (equal_lengths and length != lengths[batch[0]])):
            batches.append(tuple(batch))
            batch, num_real = [], 0
        batch.append(index)
        num_real += length
    if batch:
        batches.append(tuple(batch))
    return batches


def pad_batch(
    pieces: Sequence[EncodedSequence],
    *,
    pool_masks: Sequence[PoolMask],
    rows: Sequence[int],
    pad_token_id: int,
    pad_to_multiple_of: int = 1,
) -> Batch:
    """Pad pieces on the right to the longest of them.

    Real tokens and padding are distinguished by position, never by id: a token that equals ``pad_token_id``
    stays real. No piece is changed or shared: the batch has its own memory.

    Example:
        >>> from genoembed.contracts import EncodedSequence
        >>> ids = [np.frombuffer(sequence, dtype=np.uint8) for sequence in (b"ACGT", b"AC")]
        >>> pieces = [EncodedSequence(input_ids=row) for row in ids]
        >>> masks = [np.ones(len(row), dtype=np.bool_) for row in ids]
        >>> batch = pad_batch(pieces, pool_masks=masks, rows=[7, 3], pad_token_id=1, pad_to_multiple_of=4)
        >>> batch.input_ids.tolist()
        [[65, 67, 71, 84], [65, 67, 1, 1]]
        >>> batch.attention_mask.tolist(), batch.rows
        ([[1, 1, 1, 1], [1, 1, 0, 0]], (7, 3))
    """
    if pad_to_multiple_of < 1:
        message = f"pad_to_multiple_of: {pad_to_multiple_of}, expected 1 or more; set it to 1 for no rounding"
        raise ConfigError(message)
    if not pieces or not len(pieces) == len(pool_masks) == len(rows):
        message = (
            f"pad_batch: {len(pieces)} pieces, {len(pool_masks)} pool masks and {len(rows)} rows, expected "
            "the same number of each, at least one"
        )
        raise ShapeError(message)
    longest = max(len(piece.input_ids) for piece in pieces)
    # rounded up by a division of negative numbers, which is exact where floats would not be
    padded = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    ids_BL = np.full((len(pieces), padded), pad_token_id, dtype=np.int64)
    attention_BL = np.zeros((len(pieces), padded), dtype=np.int64)
    # one kind for all rows: a token that counts for one base weighs the same in either
    pool_BL = np.zeros((len(pieces), padded), dtype=np.result_type(*pool_masks))
    for row, (piece, mask) in enumerate(zip(pieces, pool_masks, strict=True)):
        length = len(piece.input_ids)
        if mask.shape != (length,):
            message = f"row {row}: pool mask of shape {mask.shape}, expected ({length},) as its tokens have"
            raise ShapeError(message)
        ids_BL[row, :length] = piece.input_ids
        attention_BL[row, :length] = 1
        pool_BL[row, :length] = mask
    return Batch(
        input_ids=torch.from_numpy(ids_BL),
        attention_mask=torch.from_numpy(attention_BL),
        pool_mask=torch.from_numpy(pool_BL),
        rows=tuple(rows),
    )


def pool_mask(encoded: EncodedSequence, *, core_start: int, core_end: int, skip_first: int = 0) -> PoolMask:
    """Mark the tokens that count in pooling, by the bases that they count for.

    A token counts if one of its bases is in ``[core_start, core_end)`` and not among the ``skip_first`` first
    bases of the piece: by the number of these bases. A base that several tokens have (overlapping k-mers)
    counts an equal part for each, so that every base counts once, in whichever windows it is seen. Special
    tokens never count. The mask may come out empty; pooling says so (``EmptyPoolError``), not this function.

    Returns:
        Shape ``(L,)``: bool where each token that counts does so for one base, else float32.

    Example:
        >>> from genoembed.contracts import EncodedSequence
        >>> starts, ends = np.array([-1, 0, 6, -1]), np.array([-1, 6, 12, -1])
        >>> encoded = EncodedSequence(input_ids=np.array([0, 5, 6, 2]), base_start=starts, base_end=ends)
        >>> pool_mask(encoded, core_start=0, core_end=12).tolist()
        [0.0, 6.0, 6.0, 0.0]
        >>> pool_mask(encoded, core_start=5, core_end=8).tolist()
        [0.0, 1.0, 2.0, 0.0]
    """
    if skip_first < 0:
        message = f"skip_first: {skip_first}, expected 0 or more; set skip_first to 0 to keep every base"
        raise ConfigError(message)
    if not 0 <= core_start <= core_end:
        message = f"core {core_start}-{core_end}: expected 0 <= core_start <= core_end"
        raise ShapeError(message)
    first = max(core_start, skip_first)
    if encoded.base_start is None or encoded.base_end is None:
        mask = np.zeros(len(encoded.input_ids), dtype=np.bool_)
        mask[first:core_end] = True
        return mask
    starts, ends = np.maximum(encoded.base_start, first), np.minimum(encoded.base_end, core_end)
    counts = ends > starts
    weights = np.where(counts, ends - starts, 0).astype(np.float64)
    is_word = encoded.base_end > encoded.base_start
    if (encoded.base_start[is_word][1:] < encoded.base_end[is_word][:-1]).any():
        cover = _cover(encoded.base_start[is_word], encoded.base_end[is_word], max(core_end, first))
        cover[:first] = 0
        shares = np.append(0, np.cumsum(np.divide(1, cover, out=np.zeros(len(cover)), where=cover > 0)))
        weights[counts] = shares[ends[counts]] - shares[starts[counts]]
    stored = weights.astype(np.float32)
    return counts if (stored[counts] == 1).all() else stored


def count_unread(encoded: EncodedSequence, *, core_start: int, core_end: int) -> int:
    """Count the bases of the core that no token stands for, or only tokens that say nothing about them.

    Example:
        >>> from genoembed.contracts import EncodedSequence
        >>> starts, ends = np.array([0, 6]), np.array([6, 12])
        >>> encoded = EncodedSequence(
        ...     input_ids=ends, base_start=starts, base_end=ends, is_unread=np.array([False, True])
        ... )
        >>> count_unread(encoded, core_start=4, core_end=14)
        8
    """
    if encoded.base_start is None or encoded.base_end is None:
        return 0
    is_word = encoded.base_end > encoded.base_start
    if encoded.is_unread is not None:
        is_word &= ~encoded.is_unread
    cover = _cover(encoded.base_start[is_word], encoded.base_end[is_word], core_end)
    return core_end - core_start - int(np.count_nonzero(cover[core_start:]))


def is_mostly_unread(num_unread: int, num_bases: int) -> bool:
    """Whether a sequence has no vector worth having: it would be that of unknown letters."""
    return num_unread * 2 > num_bases


def _cover(starts: NDArray[np.int64], ends: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Count the tokens that stand for each of the first bases."""
    steps = np.bincount(np.minimum(starts, length), minlength=length + 1)
    steps -= np.bincount(np.minimum(ends, length), minlength=length + 1)
    return np.cumsum(steps[:length])
