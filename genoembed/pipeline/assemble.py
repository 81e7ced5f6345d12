"""From what pieces gave to rows of the file: windows merged, strands combined, layers fused.

What the pieces of a unit gave is held until its rows are built. Pooled vectors are copied into one matrix per
layer: each small tensor that comes from a forward pass is carved out of the hole that a large activation
left, so that the next activation takes new memory, and keeping them would cost many times their size.

N rows, P pieces, K windows of a row, D hidden size, T tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.errors import ConfigError, EmptyPoolError
from genoembed.pooling.fuse import combine_strands, combine_token_strands, fuse
from genoembed.pooling.reduce import merge_windows
from genoembed.sequences.records import contig_places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.config.choices import TokenPooling as PooledBy
    from genoembed.config.embed import EmbeddingConfig
    from genoembed.contracts import SequenceRecord, Window
    from genoembed.pipeline.cutting import CountedTokens


class PieceVectors:
    """Vectors of pieces, numbered as they come."""

    def __init__(self, num_pieces: int) -> None:
        self._block_rows = max(1, num_pieces)
        self._blocks: dict[str, list[Tensor]] = {}
        self._num_pieces = 0

    def add(self, vectors: Mapping[str, Tensor | Sequence[Tensor]]) -> range:
        """Take the pieces of a batch in."""
        first = self._num_pieces
        for layer, batch in vectors.items():
            blocks = self._blocks.setdefault(layer, [])
            if isinstance(batch, torch.Tensor):
                self._copy(blocks, first, batch)
            else:
                blocks.extend(batch)
            self._num_pieces = first + len(batch)
        return range(first, self._num_pieces)

    @property
    def names(self) -> tuple[str, ...]:
        """Layers, or what else was added."""
        return tuple(self._blocks)

    def pooled(self, layer: str, numbers: Sequence[int]) -> Tensor:
        """Gather the vectors of pooled pieces."""
        blocks = self._blocks[layer]
        if len(blocks) == 1:
            return blocks[0][torch.tensor(numbers, dtype=torch.int64)]
        places = (divmod(number, self._block_rows) for number in numbers)
        return torch.stack([blocks[block][row] for block, row in places])

    def tokens(self, layer: str, numbers: Sequence[int]) -> Tensor:
        """Join the token vectors of pieces."""
        parts = [self._blocks[layer][number] for number in numbers]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def give_up(self, layer: str, numbers: Iterable[int]) -> None:
        """Forget the token vectors of pieces."""
        blocks = self._blocks[layer]
        for number in numbers:
            blocks[number] = blocks[number].new_empty((0, blocks[number].shape[1]))

    def num_tokens(self, layer: str, numbers: Sequence[int]) -> int:
        """Count the token vectors of pieces."""
        return sum(len(self._blocks[layer][number]) for number in numbers)

    def _copy(self, blocks: list[Tensor], first: int, batch_PD: Tensor) -> None:
        done = 0
        while done < len(batch_PD):
            block, row = divmod(first + done, self._block_rows)
            if block == len(blocks):
                blocks.append(batch_PD.new_empty((self._block_rows, batch_PD.shape[1])))
            room = min(self._block_rows - row, len(batch_PD) - done)
            blocks[block][row : row + room] = batch_PD[done : done + room]
            done += room


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What one piece gave."""

    number: int
    """Of its vectors, among those of the unit."""
    weight: float
    """Bases that its tokens count for, above 0."""
    tokens: CountedTokens | None
    """What each token that counts stands for, on its strand; None where no one needs it."""


TakenPieces: TypeAlias = "Mapping[tuple[int, bool], Mapping[int, Taken]]"
"""Pieces with at least one token that counts, by record and strand (True is reverse), then by window."""


UnreadBases: TypeAlias = "Mapping[int, Mapping[int, int]]"
"""Bases without words, by record, then by window of the forward strand; those of which there are some."""


def strand_pieces(taken: TakenPieces, key: tuple[int, bool]) -> list[Taken]:
    """Collect what the pieces of one strand of a record gave, in its reading order."""
    return [piece for _, piece in sorted(taken.get(key, {}).items())]


def merge_pieces(
    parts: Sequence[Sequence[Taken]], name: str, vectors: PieceVectors, *, method: PooledBy
) -> Tensor:
    """Merge the pooled vectors of the windows of each row; one vector per row."""
    matrix_ND = vectors.pooled(name, [mine[0].number for mine in parts])
    for row, mine in enumerate(parts):
        if len(mine) > 1:
            # by bases, as in each window: with words of several bases, the mean over bases, not over tokens
            weights = torch.tensor([part.weight for part in mine], dtype=torch.float64)
            windows_KD = vectors.pooled(name, [part.number for part in mine])
            matrix_ND[row] = merge_windows(windows_KD, weights, method=method)
    return matrix_ND


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBuilder:
    """Knows how pieces become rows."""

    layers: tuple[str, ...]
    embedding: EmbeddingConfig
    per_window: bool
    finish: Callable[[Tensor], Tensor] | None = None
    """What a fine-tuned model does to fused vectors, strand by strand."""

    def build(
        self,
        records: Sequence[SequenceRecord],
        cuts: Sequence[Sequence[Window]],
        taken: TakenPieces,
        vectors: PieceVectors,
        failed: Mapping[int, str] | None = None,
        widths: Mapping[str, int] | None = None,
        unread: UnreadBases | None = None,
    ) -> EmbeddingBlock | TokenBlock:
        """Build the rows of a unit."""
        rows: list[ObsRow] = []
        firsts: list[int] = []  # of each row, on its record's sequence
        spoiled: dict[int, ObsRow] = {}
        strands = (False,) if self.embedding.rc == "none" else (False, True)
        parts: dict[bool, list[list[Taken]]] = {is_reverse: [] for is_reverse in strands}
        for index, (record, windows) in enumerate(zip(records, cuts, strict=True)):
            if failed and index in failed:
                row = _failed_row(record, len(windows), failed[index])
                spoiled[len(rows) + len(spoiled)] = _with_unread(row, unread, index, None)
                continue
            for number, row in self._rows(record, windows):
                rows.append(_with_unread(row, unread, index, number))
                firsts.append(record.core_start if number is None else windows[number].core_start)
                for is_reverse in strands:
                    mine = self._parts(taken, (index, is_reverse), number)
                    self._check(mine, record, row, vectors)
                    parts[is_reverse].append(mine)
        block: EmbeddingBlock | TokenBlock
        if spoiled and not rows:
            block = self._no_rows(widths or {})
        elif self.embedding.pooling == "none":
            block = self._token_block(rows, firsts, parts[False], parts.get(True), vectors)
        else:
            block = self._pooled_block(rows, parts[False], parts.get(True), vectors)
        return _with_rows(block, spoiled) if spoiled else block

    def _no_rows(self, widths: Mapping[str, int]) -> EmbeddingBlock | TokenBlock:
        matrices = {name: np.empty((0, width), np.float32) for name, width in widths.items()}
        if self.embedding.pooling == "none":
            none = np.zeros((0, 2), np.int64)
            return TokenBlock(rows=(), lengths=none[:, 0], values=matrices, spans=none)
        return EmbeddingBlock(rows=(), matrices=matrices)

    def nothing_left(
        self, records: Sequence[SequenceRecord], cuts: Sequence[Sequence[Window]], taken: TakenPieces
    ) -> dict[int, str]:
        """Find the records of which nothing is left to pool, in all or in one of their rows."""
        strands = (False,) if self.embedding.rc == "none" else (False, True)
        return {
            index: "nothing to pool"
            for index, (record, windows) in enumerate(zip(records, cuts, strict=True))
            if not all(
                self._parts(taken, (index, is_reverse), number)
                for number, _ in self._rows(record, windows)
                for is_reverse in strands
            )
        }

    def _rows(self, record: SequenceRecord, windows: Sequence[Window]) -> Iterator[tuple[int | None, ObsRow]]:
        """The file's rows of a record, each with the number of its window (None is all of them)."""
        if not self.per_window:
            yield None, _record_row(record, len(windows))
            return
        for number, window in enumerate(windows):
            yield number, _window_row(record, window)

    def _parts(self, taken: TakenPieces, key: tuple[int, bool], number: int | None) -> list[Taken]:
        """Collect the pieces of a row, in the reading order of their strand."""
        if number is None:
            return strand_pieces(taken, key)
        pieces = taken.get(key, {})
        return [pieces[number]] if number in pieces else []

    def _check(
        self, parts: Sequence[Taken], record: SequenceRecord, row: ObsRow, vectors: PieceVectors
    ) -> None:
        if not parts:
            raise empty_pool_error(record, start=row.start, end=row.end, skip_first=self.embedding.skip_first)
        if self.embedding.pooling == "none" and self.embedding.rc != "none":
            num_tokens = vectors.num_tokens(self.layers[0], [part.number for part in parts])
            if num_tokens != row.length:
                message = (
                    f"record {record.id!r}: {num_tokens} tokens for {row.length} bases, but pooling='none' "
                    "with rc needs one token per base; set rc='none'"
                )
                raise ConfigError(message)

    def _pooled_block(
        self,
        rows: Sequence[ObsRow],
        forward: Sequence[Sequence[Taken]],
        reverse: Sequence[Sequence[Taken]] | None,
        vectors: PieceVectors,
    ) -> EmbeddingBlock:
        def combined(layer: str) -> Tensor:
            return combine_strands(
                self._merged(forward, layer, vectors),
                None if reverse is None else self._merged(reverse, layer, vectors),
                method=self.embedding.rc,
            )

        def finished(parts: Sequence[Sequence[Taken]] | None) -> Tensor | None:
            if parts is None or self.finish is None:
                return None
            ((name, fused_ND),) = self._fused(lambda layer: self._merged(parts, layer, vectors)).items()
            names.append(name)
            return self.finish(fused_ND)

        names: list[str] = []
        first_ND = finished(forward)
        if first_ND is None:
            matrices = self._fused(combined)
        else:
            matrix_ND = combine_strands(first_ND, finished(reverse), method=self.embedding.rc)
            matrices = {names[0]: matrix_ND}
        return EmbeddingBlock(
            rows=tuple(rows), matrices={name: matrix.numpy() for name, matrix in matrices.items()}
        )

    def _merged(self, parts: Sequence[Sequence[Taken]], layer: str, vectors: PieceVectors) -> Tensor:
        assert self.embedding.pooling != "none", "token vectors are not merged"
        return merge_pieces(parts, layer, vectors, method=self.embedding.pooling)

    def _token_block(
        self,
        rows: Sequence[ObsRow],
        firsts: Sequence[int],
        forward: Sequence[Sequence[Taken]],
        reverse: Sequence[Sequence[Taken]] | None,
        vectors: PieceVectors,
    ) -> TokenBlock:
        # equal sequences share their pieces
        uses = Counter(part.number for mine in (*forward, *(reverse or ())) for part in mine)

        def joined(layer: str, parts: Sequence[Taken]) -> Tensor:
            numbers = [part.number for part in parts]
            found = vectors.tokens(layer, numbers)
            vectors.give_up(layer, (number for number in numbers if uses[number] == 1))
            return found

        def pieces(layer: str) -> Iterator[Tensor]:
            if reverse is None:
                yield from (joined(layer, [part]) for mine in forward for part in mine)
                return
            for mine, other in zip(forward, reverse, strict=True):
                method = self.embedding.rc
                yield combine_token_strands(joined(layer, mine), joined(layer, other), method=method)

        def combined(layer: str) -> Tensor:
            # piece by piece into one matrix: the tokens of a long record, held twice, may not fit the memory
            found: Tensor | None = None
            done = 0
            for piece_TD in pieces(layer):
                if found is None:
                    found = piece_TD.new_empty((num_tokens, piece_TD.shape[1]))
                found[done : done + len(piece_TD)] = piece_TD
                done += len(piece_TD)
            assert found is not None, "a row has a piece at least"
            return found

        spans = [
            np.concatenate([part.tokens.spans for part in mine if part.tokens is not None]) - first
            for mine, first in zip(forward, firsts, strict=True)
        ]
        num_tokens = sum(len(of_row) for of_row in spans)
        values = self._fused(combined)
        return TokenBlock(
            rows=tuple(rows),
            lengths=np.array([len(of_row) for of_row in spans], dtype=np.int64),
            values={name: matrix.numpy() for name, matrix in values.items()},
            spans=np.concatenate([np.zeros((0, 2), np.int64), *spans]),
        )

    def _fused(self, combined: Callable[[str], Tensor]) -> dict[str, Tensor]:
        layers = {layer: combined(layer) for layer in self.layers}
        return fuse(layers, method=self.embedding.fusion, weights=self.embedding.fusion_weights or None)


def empty_pool_error(record: SequenceRecord, *, start: int, end: int, skip_first: int) -> EmptyPoolError:
    """Build the error for bases of a record of which no token counts."""
    where = f"record {record.id!r}: no token is left to pool of bases {start + 1}-{end}"
    if skip_first:
        return EmptyPoolError(f"{where}; skip_first is {skip_first}, set it lower or leave the record out")
    return EmptyPoolError(
        f"{where}: the tokenizer has no token there (letters that it does not know, or a sequence shorter "
        "than its words); leave the record out"
    )


def _with_unread(row: ObsRow, unread: UnreadBases | None, index: int, number: int | None) -> ObsRow:
    found = (unread or {}).get(index)
    if not found:
        return row
    return replace(row, unread=sum(found.values()) if number is None else found.get(number, 0))


def _failed_row(record: SequenceRecord, num_windows: int, reason: str) -> ObsRow:
    row = _record_row(record, num_windows)
    return replace(row, flags=",".join((*record.flags, f"failed:{reason}")))


def _with_rows(
    block: EmbeddingBlock | TokenBlock, spoiled: Mapping[int, ObsRow]
) -> EmbeddingBlock | TokenBlock:
    """Insert the rows without vectors at their places: NaN, or no tokens."""
    num_rows = len(block.rows) + len(spoiled)
    good = np.array([position not in spoiled for position in range(num_rows)])
    others = iter(block.rows)
    rows = tuple(spoiled[at] if at in spoiled else next(others) for at in range(num_rows))
    if isinstance(block, TokenBlock):
        lengths = np.zeros(num_rows, dtype=np.int64)
        lengths[good] = block.lengths
        return replace(block, rows=rows, lengths=lengths)
    matrices = {}
    for name, matrix in block.matrices.items():
        matrices[name] = np.full((num_rows, matrix.shape[1]), np.nan, matrix.dtype)
        matrices[name][good] = matrix
    return EmbeddingBlock(rows=rows, matrices=matrices)


def _record_row(record: SequenceRecord, num_windows: int) -> ObsRow:
    return ObsRow(
        id=record.id,
        description=record.description,
        length=record.core_end - record.core_start,
        start=record.start,
        end=record.end,
        strand=record.strand,
        source=record.source,
        n_windows=num_windows,
        sha256=record.sha256,
        flags=",".join(record.flags),
        unread=0,
    )


def _joined_extent(record: SequenceRecord, window: Window) -> tuple[int, int]:
    """Return the first base of a window of a joined feature on the contig, and one past its last."""
    places = contig_places(record).places
    # over the origin of a circular contig, places go on counting, as the record's end does
    wrapped = places[record.core_start : record.core_end]
    wrapped = wrapped[wrapped < record.start]
    seen = places[window.core_start : window.core_end]
    if len(wrapped):
        seen = np.where(seen < record.start, seen + record.end - 1 - wrapped.max(), seen)
    return int(seen.min()), int(seen.max()) + 1


def _window_row(record: SequenceRecord, window: Window) -> ObsRow:
    """Describe one window by the bases it answers for, in the parent's coordinates, and what it sees."""
    before, after = window.core_start - record.core_start, record.core_end - window.core_end
    if record.strand == "-":
        # windows go from left to right over the sequence, which is the parent's reverse complement
        before, after = after, before
    start, end = record.start + before, record.end - after
    if record.stretches:
        start, end = _joined_extent(record, window)
    return ObsRow(
        id=f"{record.id}:{start + 1}-{end}",  # as places are written: from 1, both ends included
        description=record.description,
        length=window.core_end - window.core_start,
        start=start,
        end=end,
        strand=record.strand,
        source=record.source,
        n_windows=1,
        sha256=hashlib.sha256(record.sequence[window.start : window.end]).hexdigest(),
        flags=",".join(record.flags),
        unread=0,
    )
