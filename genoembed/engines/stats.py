"""What a run has done so far, and which records of a unit are done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genoembed.engines.pieces import Piece
    from genoembed.engines.slabs import Slab


@dataclass(kw_only=True, slots=True)
class RunStats:
    """What the forward passes cost; grows batch by batch."""

    records: int = 0
    """Records that are done."""
    bases: int = 0
    """Bases of records that are done."""
    bases_under_way: int = 0
    """Bases of other records that are done; overlap of windows and the other strand count once."""
    windows: int = 0
    """Windows cut from them, on one strand."""
    repeats: int = 0
    """Windows (of either strand) that were not run: the model would have seen what it had seen before."""
    batches: int = 0
    """Forward passes."""
    real_tokens: int = 0
    """Tokens that were run and are no padding."""
    slots: int = 0
    """Tokens that were run, padding included."""
    forward_s: float = 0.0
    """Seconds in forward passes, without pooling."""
    pooling_s: float = 0.0
    """Seconds in pooling, which happens while a forward pass is under way."""
    halvings: int = 0
    """How often memory was too small for a forward pass, which was then divided."""
    units: int = 0
    """Work units of the input that are done, those among them that were done before."""
    units_kept: int = 0
    """Units that an earlier run had finished."""
    bases_kept: int = 0
    """Their bases."""
    records_kept: int = 0
    """Their records."""

    @property
    def padding_share(self) -> float:
        """Share of the slots that hold padding."""
        return 1 - self.real_tokens / self.slots if self.slots else 0.0


class UnitTally:
    """Counts the records of a unit when their last piece is done."""

    def __init__(self, slab: Slab, stats: RunStats, *, num_strands: int) -> None:
        self._records = slab.unit.records
        self._cuts = slab.cuts
        self._stats = stats
        self._num_strands = num_strands
        # what a record still waits for: being cut to its end, and each of its pieces
        self._waiting = [1] * len(self._records)
        self._under_way = [0] * len(self._records)

    def open(self, slab: Slab) -> None:
        """Take note of the pieces of a slab, before any of them is done."""
        batched = (piece for work in slab.batches for piece in work.pieces)
        for piece in (*batched, *slab.repeats, *slab.empty):
            self._waiting[piece.record_index] += 1
        for index in slab.cut_records:
            self._settle(index, 0)

    def settle(self, piece: Piece) -> None:
        """Count a piece as done."""
        self._settle(piece.record_index, piece.num_bases // self._num_strands)

    def _settle(self, index: int, num_bases: int) -> None:
        stats = self._stats
        self._waiting[index] -= 1
        self._under_way[index] += num_bases
        stats.bases_under_way += num_bases
        if not self._waiting[index]:
            stats.bases_under_way -= self._under_way[index]
            stats.records += 1
            stats.bases += len(self._records[index].sequence)
            stats.windows += len(self._cuts[index])
