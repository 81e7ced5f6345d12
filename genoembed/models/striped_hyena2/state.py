"""What a forward pass knows about its rows: positions, padding, packed segments, state of earlier blocks.

A sequence may come in blocks: a :class:`StripedHyena2Cache` holds what later blocks need of earlier ones.
Packed rows are moved to one long row in which every segment starts a chunk (:func:`lay_out_segments`): the
filters' products go chunk by chunk, so that a chunk belongs to one segment, and isolation is exact.

B sequences, L positions, T positions with those of earlier blocks, D hidden size, H heads, E head size,
K taps, S modes, N slots of the long row, M its chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWindows:
    """Which positions attention sees in a sequence that is longer than the context.

    Window k begins at ``k * stride``. The first one answers for all its positions, each later one for those
    that the window before it does not have. A position sees what is between the start of its window and
    itself, so which these are depends neither on the sequence's length nor on its neighbors in a batch.
    """

    window: int
    """Positions of a window, at least 1."""
    stride: int
    """From window to window, 1 to ``window``."""

    def start(self, position: int) -> int:
        """Return the first position that a position sees.

        Example:
            >>> windows = AttentionWindows(window=6, stride=4)
            >>> [windows.start(position) for position in (5, 6, 9, 10)]
            [0, 4, 4, 8]
        """
        return (max(0, position - self.window + self.stride) // self.stride) * self.stride

    def end(self, position: int) -> int:
        """Return where the window ends that answers for a position."""
        return self.start(position) + self.window


def iter_spans(length: int, *, block: int, windows: AttentionWindows | None = None) -> Iterator[slice]:
    """Cut positions into blocks of which each lies in one window.

    Example:
        >>> [(span.start, span.stop) for span in iter_spans(5, block=3)]
        [(0, 3), (3, 5)]
        >>> windows = AttentionWindows(window=4, stride=2)
        >>> [(span.start, span.stop) for span in iter_spans(7, block=3, windows=windows)]
        [(0, 3), (3, 4), (4, 6), (6, 7)]
    """
    start = 0
    while start < length:
        stop = min(length, start + block)
        if windows is not None:
            stop = min(stop, windows.end(start))
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockContext:
    """What every block of a forward pass must know about the rows."""

    position_ids_BL: Tensor
    """Rotary positions. int64, ``(B, L)`` or ``(1, L)``."""
    key_mask_BT: Tensor | None = None
    """False where a position is padding on the left. Bool, ``(B, T)``, the positions before this block of the
    sequence first; None where there is none."""
    segments: SegmentLayout | None = None
    """Where packed neighbors begin, if they are to be kept apart; the rows are one long row then."""
    cache: StripedHyena2Cache | None = None
    """What earlier blocks of the sequence left; brought up to date by every block."""
    num_kept: int | None = None
    """Of the positions before this block, those that attention still sees, the last ones; None is all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HyenaState:
    """Where the filters of a Hyena block stand."""

    short: tuple[Tensor, Tensor, Tensor]
    """Last inputs of the short filters of both gates and the value. Each ``(B, K - 1, D)``."""
    inner: Tensor
    """Last inputs of the inner filter, ``(B, K - 1, D)``, or the state of its modes, ``(B, D, S)``."""


@dataclass(slots=True)
class AttentionState:
    """Keys and values of the positions so far, in buffers that double when they are full."""

    length: int = 0
    """Positions held."""
    _keys: Tensor | None = None
    _values: Tensor | None = None
    _unrotated: Tensor | None = None

    def append(
        self, keys_BHLE: Tensor, values_BHLE: Tensor, *, unrotated_BHLE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add a block's keys and values; the keys before rotation, too, if some are to be kept later on."""
        start, self.length = self.length, self.length + keys_BHLE.shape[2]
        self._keys = _with_block(self._keys, keys_BHLE, used=start)
        self._values = _with_block(self._values, values_BHLE, used=start)
        if unrotated_BHLE is not None:
            self._unrotated = _with_block(self._unrotated, unrotated_BHLE, used=start)
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def keep_last(self, count: int, rotate: Callable[[Tensor], Tensor]) -> None:
        """Forget all positions but the last ones, whose keys are rotated to count from 0."""
        assert self._keys is not None, "something was appended"
        assert self._values is not None
        assert self._unrotated is not None
        for buffer in (self._unrotated, self._values):
            # cloned, as the two places may overlap
            buffer[:, :, :count] = buffer[:, :, self.length - count : self.length].clone()
        # from what they were before any rotation: rotated on and on, keys in half precision would drift
        self._keys[:, :, :count] = rotate(self._unrotated[:, :, :count])
        self.length = count

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order."""
        self._keys, self._values, self._unrotated = (
            None if buffer is None else buffer.index_select(0, rows.to(buffer.device))
            for buffer in (self._keys, self._values, self._unrotated)
        )


def _with_block(buffer: Tensor | None, block_BHLE: Tensor, *, used: int) -> Tensor:
    batch, heads, length, size = block_BHLE.shape
    needed = used + length
    if buffer is None or buffer.shape[2] < needed:
        # exactly the requested size at first: a sequence may come as one block
        capacity = needed if buffer is None else max(needed, 2 * buffer.shape[2])
        larger = block_BHLE.new_empty(batch, heads, capacity, size)
        if buffer is not None:
            larger[:, :, :used] = buffer[:, :, :used]
        buffer = larger
    buffer[:, :, used:needed] = block_BHLE
    return buffer


@dataclass(slots=True)
class StripedHyena2Cache:
    """State of a forward pass that goes on; made empty, filled by the model, block by block."""

    length: int = 0
    """Tokens seen by each sequence, padding included."""
    windows: AttentionWindows | None = None
    """What attention sees of them; None is all. The filters see all in either case."""
    hyena: dict[int, HyenaState] = field(default_factory=dict)
    """State of each Hyena block, by block number."""
    attention: dict[int, AttentionState] = field(default_factory=dict)
    """State of each attention block, by block number."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens were seen; transformers asks by this name."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences, in this order; transformers' beam search calls it by this name."""
        for state in self.attention.values():
            state.select(beam_idx)
        for index, hyena in self.hyena.items():
            rows = beam_idx.to(hyena.inner.device)
            first, second, third = (each.index_select(0, rows) for each in hyena.short)
            inner = hyena.inner.index_select(0, rows)
            self.hyena[index] = replace(hyena, short=(first, second, third), inner=inner)


def last_positions(history_BTD: Tensor | None, x_BLD: Tensor, *, count: int) -> Tensor:
    """Return the last positions of a block and what came before it.

    Example:
        >>> last_positions(None, torch.tensor([[[1.0], [2.0]]]), count=3).flatten()
        tensor([0., 1., 2.])
    """
    # a block shorter than the filter still needs what came before it
    joined = x_BLD[:, max(0, x_BLD.shape[1] - count) :]
    if history_BTD is not None:
        joined = torch.cat((history_BTD.to(joined.dtype), joined), dim=1)
    missing = max(0, count - joined.shape[1])
    # cloned: a view would keep the whole block in memory until the next one
    return F.pad(joined[:, joined.shape[1] - count + missing :], (0, 0, missing, 0)).clone()


SEGMENT_CHUNK = 64
"""Slots that segments are rounded up to: half of it is lost a segment, but short chunks slow the products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentLayout:
    """Where each slot of packed rows is in one long row in which every segment starts a chunk."""

    source_N: Tensor
    """For each slot of the long row, its place in the flattened ``(B L)`` rows, or ``B L`` where empty."""
    target_BL: Tensor
    """For each slot of the rows, its place in the long row, or ``N`` for padding. int64, ``(B, L)``."""
    starts_1M: Tensor
    """True where a chunk starts a segment. bool, ``(1, M)``."""
    position_ids_1N: Tensor
    """Positions, from 0 in each segment. int64, ``(1, N)``."""
    lengths: tuple[int, ...]
    """Slots of each segment in the long row, multiples of the chunk; they sum to N."""

    def spread(self, x_BLD: Tensor) -> Tensor:
        """Move rows to the long row; padding is left out, empty slots are 0."""
        # one row of zeros behind the last, to which empty slots point; `collect` gives it to padding
        return F.pad(x_BLD.flatten(0, 1), (0, 0, 0, 1))[self.source_N][None]

    def collect(self, x_1ND: Tensor) -> Tensor:
        """Move the long row back to rows; padding gets 0."""
        return F.pad(x_1ND[0], (0, 0, 0, 1))[self.target_BL]


def lay_out_segments(segment_ids_BL: Tensor, *, chunk: int = SEGMENT_CHUNK) -> SegmentLayout:
    """Plan the long row of packed rows.

    A segment ends where the id changes or the row ends.

    Example:
        >>> layout = lay_out_segments(torch.tensor([[0, 0, 0, 1, -1]]), chunk=2)
        >>> layout.source_N.tolist(), layout.starts_1M.tolist(), layout.lengths
        ([0, 1, 2, 5, 3, 5], [[True, False, True]], (4, 2))
    """
    device = segment_ids_BL.device
    # each row starts a segment, even with the id that the row before ended with
    changes_BL = F.pad(segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1], (1, 0), value=True)
    flat, starts = segment_ids_BL.flatten(), changes_BL.flatten().nonzero()[:, 0]
    sizes = torch.diff(starts, append=starts.new_tensor([flat.numel()]))
    is_real = flat[starts] >= 0
    starts, sizes = starts[is_real], sizes[is_real]
    rounded = (sizes + chunk - 1) // chunk * chunk
    offsets = rounded.cumsum(0) - rounded
    segment_of_real = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    # place within its segment: a count over all real slots, minus the real slots of the segments before
    within = torch.arange(int(sizes.sum()), device=device) - (sizes.cumsum(0) - sizes)[segment_of_real]
    places = starts[segment_of_real] + within
    slots = offsets[segment_of_real] + within
    num_slots = int(rounded.sum())
    source_N = torch.full((num_slots,), flat.numel(), device=device)
    source_N[slots] = places
    target = torch.full_like(flat, num_slots, dtype=torch.int64)
    target[places] = slots
    starts_M = torch.zeros(num_slots // chunk, dtype=torch.bool, device=device)
    starts_M[offsets // chunk] = True
    segment_of_slot = torch.repeat_interleave(torch.arange(len(sizes), device=device), rounded)
    position_ids = torch.arange(num_slots, device=device) - offsets[segment_of_slot]
    return SegmentLayout(
        source_N=source_N,
        target_BL=target.view_as(segment_ids_BL),
        starts_1M=starts_M[None],
        position_ids_1N=position_ids[None],
        lengths=tuple(rounded.tolist()),
    )
