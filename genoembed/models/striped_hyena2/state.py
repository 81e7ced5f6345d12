"""What a forward pass knows about its rows: positions, padding, packed segments, state of earlier blocks.

A sequence may come in blocks: a :class:`StripedHyena2Cache` holds what later blocks need of earlier ones.
Packed rows are moved to one long row in which every segment starts a chunk (:func:`lay_out_segments`): the
filters' products go chunk by chunk, so that a chunk belongs to one segment, and isolation is exact.

B sequences, L positions, T positions with those of earlier blocks, D hidden size, H heads, E head size,
K taps, S modes, N slots of the long row, M its chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


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

    def append(self, keys_BHLE: Tensor, values_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block's keys and values."""
        start, self.length = self.length, self.length + keys_BHLE.shape[2]
        self._keys = _with_room(self._keys, keys_BHLE, used=start, needed=self.length)
        self._values = _with_room(self._values, values_BHLE, used=start, needed=self.length)
        self._keys[:, :, start : self.length] = keys_BHLE
        self._values[:, :, start : self.length] = values_BHLE
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows.to(self._keys.device))
            self._values = self._values.index_select(0, rows.to(self._values.device))


def _with_room(buffer: Tensor | None, like_BHLE: Tensor, *, used: int, needed: int) -> Tensor:
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    batch, heads, _, size = like_BHLE.shape
    # exactly the requested size at first: a sequence may come as one block
    capacity = needed if buffer is None else max(needed, 2 * buffer.shape[2])
    larger = like_BHLE.new_empty(batch, heads, capacity, size)
    if buffer is not None:
        larger[:, :, :used] = buffer[:, :, :used]
    return larger


@dataclass(slots=True)
class StripedHyena2Cache:
    """State of a forward pass that goes on; made empty, filled by the model, block by block."""

    length: int = 0
    """Tokens seen by each sequence, padding included."""
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
