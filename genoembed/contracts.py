"""What stages hand to each other: frozen dataclasses, no behavior beyond checks of their own shape.

Data flows one way: ``SequenceRecord`` (sequences) -> ``Window`` -> ``EncodedSequence`` (tokenization) ->
``Batch`` (batching) -> activations by module path (models) -> pooled rows (pooling) -> ``EmbeddingBlock`` or
``TokenBlock`` (store).

Coordinates are 0-based and half-open. B rows, L padded length, T tokens, D hidden size, N records.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from genoembed.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

Strand: TypeAlias = Literal["+", "-"]

PoolMask: TypeAlias = "NDArray[np.bool_] | NDArray[np.float32]"
"""True where a token counts in pooling; or how many bases it counts for, 0 where it does not."""

FINAL_FOLDER = "final"
"""Folder of the trained model in that of a training run."""
RUN_FILE = "run.json"
"""What every folder of a training run has."""
IGNORE_INDEX = -100
"""Label that losses leave out; torch and transformers take it as such, too."""


class Stretch(NamedTuple):
    """A stretch of a contig."""

    start: int
    """First base, 0-based, on the forward strand."""
    end: int
    """One past its last base."""
    strand: Strand
    """The strand that is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRecord:
    """One sequence as the model will see it, cleaned, with where it came from."""

    id: str
    """First word of the header; unique within a run."""
    sequence: bytes
    """ASCII letters, one byte per base, after all policies; reverse-complemented if ``strand`` is ``-``."""
    description: str = ""
    """The header after the id."""
    contig: str = ""
    """The sequence that ``start`` and ``end`` count on: of a region its contig, else the record itself."""
    source: str = ""
    """File name as the user gave it (``-`` for standard input)."""
    line: int | None = None
    """1-based line of the record's header (or of the BED/GFF3 row), where the format has lines."""
    start: int = 0
    """First base of the embedded part, in the coordinates of the parent sequence."""
    end: int = -1
    """One past the last base of the embedded part; -1 stands for ``start`` plus the core's length. Beyond the
    length of a circular contig where the part spans its origin."""
    strand: Strand = "+"
    """``-`` where a region was taken from the reverse strand."""
    stretches: tuple[Stretch, ...] = ()
    """Where ``sequence``, flanks included, lies on the contig, in reading order; empty: in one stretch."""
    core_start: int = 0
    """First base of ``sequence`` that pooling counts (what is before it is flank)."""
    core_end: int = -1
    """One past the last base of ``sequence`` that pooling counts; -1 stands for the end of ``sequence``."""
    flags: tuple[str, ...] = ()
    """What policies did to this record: ``masked:12``, ``renamed``, ``gaps:3`` ..."""

    def __post_init__(self) -> None:
        # the fields hold places, whatever was given: no reader has to ask
        core_end = len(self.sequence) if self.core_end == -1 else self.core_end
        if not 0 <= self.core_start <= core_end <= len(self.sequence):
            message = f"core {self.core_start}-{core_end} is outside a sequence of {len(self.sequence)} bases"
            raise ShapeError(message)
        object.__setattr__(self, "core_end", core_end)
        if self.end == -1:
            object.__setattr__(self, "end", self.start + core_end - self.core_start)

    @property
    def sha256(self) -> str:
        """SHA-256 of ``sequence``, as hexadecimal digits."""
        return hashlib.sha256(self.sequence).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A piece of a record that fits the model's context, and the bases it answers for."""

    start: int
    """First base the model sees."""
    end: int
    """One past the last base the model sees."""
    core_start: int
    """First base that this window answers for: overlaps count once."""
    core_end: int
    """One past the last base that this window answers for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One alternative allele of a VCF row, as VCF writes it."""

    contig: str
    position: int
    """1-based place of the first base of ``ref``, as in VCF."""
    ref: str
    """Bases of the reference, upper case, at least one."""
    alt: str
    """Bases instead of them, upper case, at least one."""
    id: str = ""
    """The row's ID; empty where it has none."""
    path: str = ""
    """The VCF as the user gave it (``-`` for standard input)."""
    line: int | None = None
    """1-based line of the row."""

    @property
    def start(self) -> int:
        """0-based place of the first base of ``ref``."""
        return self.position - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantContext:
    """A variant with what the model sees of it: the same stretch of a contig with either allele."""

    variant: Variant
    """As the row has it."""
    normalized: Variant
    """The same change, left-aligned and trimmed."""
    start: int
    """First base of the stretch on the contig, 0-based."""
    end: int
    """One past its last base, on the reference."""
    ref_sequence: bytes
    """The stretch as the reference has it, upper case."""
    alt_sequence: bytes
    """The stretch with the alternative allele."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSequence:
    """Token ids of one window, and which bases each token stands for."""

    input_ids: NDArray[np.integer]
    """Token ids, special tokens included. Any integer dtype, shape ``(L,)``; may be a read-only view."""
    base_start: NDArray[np.int64] | None = None
    """First base of each token, -1 for special tokens, shape ``(L,)``. None: token ``i`` is base ``i``."""
    base_end: NDArray[np.int64] | None = None
    """One past the last base of each token, -1 for special tokens; given with ``base_start``. ``(L,)``."""
    is_unread: NDArray[np.bool_] | None = None
    """True where a token says only that the vocabulary lacks its bases, shape ``(L,)``. None: nowhere."""

    def __post_init__(self) -> None:
        if (self.base_start is None) != (self.base_end is None):
            message = "base_start and base_end: expected both or neither"
            raise ShapeError(message)
        for name in ("base_start", "base_end", "is_unread"):
            values = getattr(self, name)
            if values is not None and values.shape != self.input_ids.shape:
                message = f"{name} has shape {values.shape}, input_ids {self.input_ids.shape}"
                raise ShapeError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Padded rows for one forward pass."""

    input_ids: Tensor
    """int64, ``(B, L)``; padding on the right."""
    attention_mask: Tensor
    """int64, ``(B, L)``; 1 where a token is real."""
    pool_mask: Tensor
    """``(B, L)``: bool, True where a token counts in pooling; or float32, the bases that it counts for."""
    rows: tuple[int, ...]
    """For each row, the caller's index of the piece it holds."""
    parts: tuple[slice, ...] = ()
    """Positions of a single row, from left to right, that have a vector each; empty: a vector per row."""

    @property
    def num_tokens(self) -> int:
        """Slots of the batch, padding included."""
        return self.input_ids.shape[0] * self.input_ids.shape[1]

    @property
    def counted(self) -> Tensor:
        """bool, ``(B, L)``; True where a token counts in pooling, if only for a part of its bases."""
        return self.pool_mask != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Sequences concatenated in rows of equal length, for causal training."""

    input_ids: Tensor
    """int64, ``(B, L)``."""
    labels: Tensor
    """int64, ``(B, L)``, aligned with ``input_ids`` (the loss shifts); -100 where no loss is taken."""
    position_ids: Tensor
    """int64, ``(B, L)``; restart at 0 with each segment."""
    segment_ids: Tensor
    """int64, ``(B, L)``; number of the segment within its row, -1 at padding."""
    cu_seqlens: Tensor
    """int32, ``(S + 1,)``; boundaries of the segments in the flattened ``(B * L)`` rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInfo:
    """A module whose output can be captured."""

    path: str
    """Module path from the model's root, as ``get_submodule`` takes it."""
    index: int | None
    """Block number from 0, or None outside the blocks."""
    width: int | None
    """Size of the last dimension of its output, where known without running it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObsRow:
    """What the file says about one row."""

    id: str
    description: str
    length: int
    """Bases that were pooled over (before ``skip_first``)."""
    start: int
    end: int
    strand: Strand
    source: str
    n_windows: int
    sha256: str
    """Of the sequence as the model saw it."""
    flags: str
    """Comma-separated, empty when nothing happened."""
    unread: int = -1
    """Of the bases pooled over, those that the model's tokenizer has no words for; -1 where unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingBlock:
    """Consecutive rows of a pooled file."""

    rows: tuple[ObsRow, ...]
    matrices: Mapping[str, NDArray[np.floating]]
    """One ``(N, D)`` matrix per kept layer (or one, when layers were fused), in the requested order."""

    def __post_init__(self) -> None:
        for name, matrix in self.matrices.items():
            if matrix.ndim != 2 or matrix.shape[0] != len(self.rows):
                message = f"matrix {name!r} has shape {matrix.shape}, expected ({len(self.rows)}, D)"
                raise ShapeError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlock:
    """Consecutive records of a per-token file: ragged rows, concatenated."""

    rows: tuple[ObsRow, ...]
    lengths: NDArray[np.int64]
    """Tokens of each record, ``(N,)``."""
    values: Mapping[str, NDArray[np.floating]]
    """One ``(T, D)`` matrix a kept layer, ``T = lengths.sum()``."""
    spans: NDArray[np.int64]
    """Bases of each token, half-open, counted from the row's first; -1 where unknown. ``(T, 2)``."""

    def __post_init__(self) -> None:
        total = int(self.lengths.sum())
        if self.lengths.shape != (len(self.rows),):
            message = f"lengths has shape {self.lengths.shape}, expected ({len(self.rows)},)"
            raise ShapeError(message)
        if self.spans.shape != (total, 2):
            message = f"spans has shape {self.spans.shape}, expected ({total}, 2)"
            raise ShapeError(message)
        for name, matrix in self.values.items():
            if matrix.ndim != 2 or matrix.shape[0] != total:
                message = f"values of {name!r} have shape {matrix.shape}, expected ({total}, D)"
                raise ShapeError(message)


class ByteTokens:
    """One byte, one token: what encoding needs of ``CharTokenizer``, without transformers.

    Example:
        >>> len(ByteTokens()), ByteTokens().convert_ids_to_tokens([0, 65])
        (512, ['\\x00', 'A'])
    """

    eos_token_id = 0
    pad_token_id = 1
    bos_token_id: int | None = None
    unk_token_id: int | None = None
    all_special_ids = (eos_token_id, pad_token_id)

    def __len__(self) -> int:
        return 512

    @staticmethod
    def convert_ids_to_tokens(ids: Iterable[int]) -> list[str]:
        """Return the character of each token."""
        return [chr(index) for index in ids]


def embed_inputs(embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Embed token ids unless embedded tokens are given; raise `ShapeError` for both and for neither."""
    if (input_ids is None) == (inputs_embeds is None):
        message = "give exactly one of input_ids and inputs_embeds"
        raise ShapeError(message)
    embedded: Tensor = embedding(input_ids) if inputs_embeds is None else inputs_embeds
    return embedded
