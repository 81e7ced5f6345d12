"""Packed neighbours kept apart: the segments of packed rows, each moved to the start of a chunk.

The operators work chunk by chunk and carry history from chunk to chunk. Laid out so that every segment starts
a chunk, isolation is to drop what is carried there; nothing else changes, and nothing leaks, not even by
rounding.

B rows, L slots of a row, D channels, C chunk length, M chunks, N = M C slots of the one long row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SEGMENT_CHUNK = 64
"""Slots that segments are rounded up to: half of it is lost a segment, but short chunks slow the products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentLayout:
    """Where each slot of packed rows lies in one long row in which every segment starts a chunk."""

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
    changes_BL = F.pad(segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1], (1, 0), value=True)
    flat, starts = segment_ids_BL.flatten(), changes_BL.flatten().nonzero()[:, 0]
    sizes = torch.diff(starts, append=starts.new_tensor([flat.numel()]))
    is_real = flat[starts] >= 0
    starts, sizes = starts[is_real], sizes[is_real]
    rounded = (sizes + chunk - 1) // chunk * chunk
    offsets = rounded.cumsum(0) - rounded
    segment_of_real = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
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
