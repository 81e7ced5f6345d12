"""Which pieces share a forward pass: pieces of like length, under a budget of padded slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.errors import ConfigError, SequenceLengthError

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
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
