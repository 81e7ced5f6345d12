"""Prepare work units for the model: cut, encoded, equal pieces found, padded to batches.

In: work units. Out: slabs, which hold as many pieces of one unit as are in memory at a time, in batches by
length under a budget of tokens. Promised: every piece is in exactly one slab; it runs once if no piece before
it in the unit has the same content, and not at all otherwise. No arithmetic of torch, so a thread may do it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from genoembed.batching.pad import pad_batch, plan_batches
from genoembed.errors import SequenceLengthError, UnreadError, foreign_code, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from genoembed.contracts import Batch, SequenceRecord, Window
    from genoembed.pipeline.cutting import Piece
    from genoembed.pipeline.units import WorkUnit
    from genoembed.tokenization.hf import SequenceEncoder


logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

BATCH_TOKENS = {"cpu": 2048}
"""Slots of a forward pass where the user names none, by kind of device. On a CPU few are faster, as what one
layer hands to the next stays in the cache; docs/CONCEPTS.md has the figures."""
_BATCH_TOKENS_ELSEWHERE = 16384
SLAB_BATCHES = 32
"""Batches' worth of tokens in a slab: enough to find pieces of like length."""
_SHORT, _SHORT_STEP, _STEP = 256, 16, 64
"""Rounded lengths are multiples of a step, a smaller one below a length. Libraries prepare a kernel for every
new shape and keep it: with each length its own, half-precision passes took a third longer and memory grew by
a megabyte per shape."""
_PADDING_PART = 16
"""Of a batch, what may be padding: one 16th, about what a pass costs that runs fewer pieces instead."""


def default_batch_tokens(device: torch.device) -> int:
    """Slots of a forward pass where the user names none, padding included."""
    return BATCH_TOKENS.get(device.type, _BATCH_TOKENS_ELSEWHERE)


class PieceCutter(Protocol):
    """Cuts records: :class:`~genoembed.pipeline.cutting.Cutter`, or what changes the pieces that it gives."""

    @property
    def encoder(self) -> SequenceEncoder:
        """Makes tokens of bases."""

    @property
    def both_strands(self) -> bool:
        """Whether the reverse complement is cut, too."""

    def windows(self, record: SequenceRecord) -> list[Window]:
        """Cut one record."""

    def pieces(self, record: SequenceRecord, record_index: int, windows: Sequence[Window]) -> Iterator[Piece]:
        """Encode the windows of one record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceBatch:
    """One forward pass."""

    pieces: tuple[Piece, ...]
    """What its rows hold."""
    batch: Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Slab:
    """Some pieces of a unit, and how far the unit is cut with them."""

    unit: WorkUnit
    cuts: Sequence[Sequence[Window]]
    """Windows of each record of the unit, on the forward strand."""
    batches: tuple[PieceBatch, ...]
    repeats: tuple[Piece, ...]
    """Pieces whose content another piece has, in this slab or before: they need not run."""
    empty: tuple[Piece, ...]
    """Pieces of which no token counts: they need not run either."""
    cut_records: tuple[int, ...]
    """Records of which this slab holds the last pieces."""
    is_last: bool
    """Whether the unit ends with it."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Records that cannot be cut, by index: why."""


@dataclass(kw_only=True, slots=True)
class _Draft:
    """A slab in the making."""

    fresh: list[Piece] = field(default_factory=list)
    repeats: list[Piece] = field(default_factory=list)
    empty: list[Piece] = field(default_factory=list)
    cut_records: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SlabBuilder:
    """Knows how pieces are cut, and what a forward pass may hold."""

    cutter: PieceCutter
    batch_tokens: int
    """Slots of a batch, padding included."""
    max_rows: int | None = None
    """Pieces of a batch at most."""
    max_tokens: int | None = None
    """Context of the model, special tokens included; None is no limit."""
    equal_lengths: bool
    """Whether padding would change the model's output, so that a batch must hold pieces of one length."""
    rounds_lengths: bool = False
    """Whether batches are padded to few lengths; for models that pad without a mask, which costs more."""
    skips_failed: bool = False
    """Whether a record that cannot be cut is noted, and the others go on."""

    def slabs(self, units: Iterable[WorkUnit]) -> Iterator[Slab]:
        """Prepare unit after unit."""
        for unit in units:
            yield from self._unit_slabs(unit)

    def _unit_slabs(self, unit: WorkUnit) -> Iterator[Slab]:
        cuts = [self.cutter.windows(record) for record in unit.records]
        seen: set[bytes] = set()
        draft = _Draft()
        for index, (record, windows) in enumerate(zip(unit.records, cuts, strict=True)):
            pieces = self.cutter.pieces(record, index, windows)
            while (piece := self._next(pieces, index, draft)) is not None:
                if draft.num_tokens >= SLAB_BATCHES * self.batch_tokens:
                    yield self._slab(draft, unit, cuts, is_last=False)
                    draft = _Draft()
                self._place(piece, draft, seen)
            draft.cut_records.append(index)
        yield self._slab(draft, unit, cuts, is_last=True)

    def _next(self, pieces: Iterator[Piece], index: int, draft: _Draft) -> Piece | None:
        """Cut one more piece of a record; None at its end, or where it cannot be cut."""
        try:
            with foreign_code("the model's tokenizer"):
                return next(pieces, None)
        except (SequenceLengthError, UnreadError) as error:
            if not self.skips_failed:
                raise
            draft.failed[index] = "unread" if isinstance(error, UnreadError) else "too long"
            logger.warning("%s: left without a vector", error)
            return None

    def _place(self, piece: Piece, draft: _Draft, seen: set[bytes]) -> None:
        # repeats are small work, but their tokens are held as well
        draft.num_tokens += len(piece.encoded.input_ids)
        if not piece.pool_mask.any():
            draft.empty.append(piece)
        elif piece.content in seen:
            draft.repeats.append(piece)
        else:
            seen.add(piece.content)
            draft.fresh.append(piece)

    def _slab(
        self, draft: _Draft, unit: WorkUnit, cuts: Sequence[Sequence[Window]], *, is_last: bool
    ) -> Slab:
        # a piece of several vectors runs alone: elsewhere, a row of a batch has one vector
        alone = [(number,) for number, piece in enumerate(draft.fresh) if piece.parts]
        shared = [number for number, piece in enumerate(draft.fresh) if not piece.parts]
        plan = plan_batches(
            [self._padded(len(draft.fresh[number].encoded.input_ids)) for number in shared],
            max_tokens=self.batch_tokens,
            max_rows=self.max_rows,
            max_padding=self.batch_tokens // _PADDING_PART,
            equal_lengths=self.equal_lengths,
        )
        return Slab(
            unit=unit,
            cuts=cuts,
            batches=tuple(
                self._batch(draft.fresh, rows)
                for rows in (*(tuple(shared[row] for row in rows) for rows in plan), *alone)
            ),
            repeats=tuple(draft.repeats),
            empty=tuple(draft.empty),
            cut_records=tuple(draft.cut_records),
            is_last=is_last,
            failed=draft.failed,
        )

    def _batch(self, pieces: Sequence[Piece], rows: Sequence[int]) -> PieceBatch:
        chosen = tuple(pieces[row] for row in rows)
        longest = max(len(piece.encoded.input_ids) for piece in chosen)
        batch = pad_batch(
            [piece.encoded for piece in chosen],
            pool_masks=[piece.pool_mask for piece in chosen],
            rows=rows,
            pad_token_id=self.cutter.encoder.pad_token_id,
            pad_to_multiple_of=self._padded(longest),
        )
        parts = tuple(tokens for _, tokens in chosen[0].parts)
        return PieceBatch(pieces=chosen, batch=replace(batch, parts=parts) if parts else batch)

    def _padded(self, length: int) -> int:
        """Length that a piece is padded to; not beyond the context."""
        if self.equal_lengths or not self.rounds_lengths:
            return length
        step = _STEP if length > _SHORT else _SHORT_STEP
        rounded = -(-length // step) * step
        return rounded if self.max_tokens is None else max(length, min(rounded, self.max_tokens))


def run_in_parts(items: Sequence[_Item], run: Callable[[Sequence[_Item]], _Result]) -> Iterator[_Result]:
    """Run a batch of a caller's own making at once, or in halves where memory does not hold it.

    Example:
        >>> list(run_in_parts([1, 2, 3], sum))
        [6]
    """
    waiting = [items]
    while waiting:
        part = waiting.pop()
        try:
            result = run(part)
        except (RuntimeError, MemoryError) as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
        else:
            yield result
            continue
        half = len(part) // 2
        waiting += [part[half:], part[:half]]
