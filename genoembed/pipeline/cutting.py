"""Cut records into the pieces that a model sees: strands, windows, tokens.

In: records of a work unit. Out: encoded pieces with the tokens that count. Promised: each base of a record's
core counts in exactly one piece of each strand, nothing is truncated.

The reverse complement is cut like a record of its own, so that a sequence and its reverse complement give
the same pieces, strands swapped. Where each window has its own row, it is cut at the same bases instead.

Also here: which token a sequence starts with, so that a causal model predicts its first base, too.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.batching.pad import count_unread, is_mostly_unread, pool_mask
from genoembed.contracts import ByteTokens, EncodedSequence, Window
from genoembed.errors import ConfigError, SequenceLengthError, ShapeError, UnreadError
from genoembed.models.striped_hyena2.state import AttentionWindows
from genoembed.sequences.records import reverse_complement
from genoembed.tokenization.hf import build_encoder, unread_problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.choices import StartChoice
    from genoembed.contracts import PoolMask, SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.tokenization.hf import SequenceEncoder


logger = logging.getLogger(__name__)

_PROBE = b"ACGT" * 6
_BASES_PER_TOKEN = 16
"""No tokenizer in use joins more bases on average: longer records are cut without being tried whole."""
_SHARES = (0.95, 0.85, 0.7, 0.5)
"""Of the bases that fill the context at a record's start; other places may have shorter tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedTokens:
    """What the tokens that count stand for, T of them."""

    spans: NDArray[np.int64]
    """Their bases that count, half-open, ``(T, 2)``."""
    whole: NDArray[np.int64]
    """All of their bases, half-open, ``(T, 2)``."""
    shares: NDArray[np.float64]
    """How much of their bases that is, ``(T,)``; above 0, at most 1."""
    is_unread: NDArray[np.bool_]
    """Whether they say only that the vocabulary lacks their bases, ``(T,)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One row of a forward pass."""

    record_index: int
    """Which record of the unit."""
    window_index: int
    """Which window of this strand, in its reading order; with ``mirror``, of the forward strand."""
    is_reverse: bool
    """Whether this is the reverse complement."""
    start: int
    """First base that the model sees, on this strand."""
    end: int
    """One past the last one."""
    core_start: int
    """First base that counts, on this strand; those skipped do not."""
    core_end: int
    """One past the last one."""
    encoded: EncodedSequence
    pool_mask: PoolMask
    parts: tuple[tuple[int, slice], ...] = ()
    """Numbers of windows and their tokens, where these are pooled apart although they run as one row."""
    num_unread: int = 0
    """Of the bases that count, those that the tokenizer has no words for."""
    content: bytes = field(init=False)
    """SHA-256 of the tokens that the model sees and of which of them count; equal for equal vectors."""

    def __post_init__(self) -> None:
        # the ids of one encoder have one dtype, so equal bytes are equal ids
        digest = hashlib.sha256(np.ascontiguousarray(self.encoded.input_ids).data)
        digest.update(self.pool_mask.data)
        if self.parts:  # a palindrome has the same tokens on both strands, but other windows
            digest.update(repr(self.parts).encode())
        object.__setattr__(self, "content", digest.digest())

    @property
    def num_bases(self) -> int:
        """Bases that count: those of the core that this piece answers for, less those skipped."""
        return max(0, self.core_end - self.core_start)

    @property
    def weight(self) -> float:
        """Bases that the tokens count for: fewer than those that count where some have no token."""
        if self.pool_mask.dtype == np.bool_:
            return int(np.count_nonzero(self.pool_mask))
        return float(self.pool_mask.sum(dtype=np.float64))

    def counted_tokens(self) -> CountedTokens:
        """Find the bases of each token that counts, on this strand."""
        counts = self.pool_mask != 0
        starts, ends = self.encoded.base_start, self.encoded.base_end
        if starts is None or ends is None:
            first = np.flatnonzero(counts)
            starts, ends = first, first + 1
        else:
            starts, ends = starts[counts], ends[counts]
        spans = np.stack([starts, ends], axis=1) + self.start
        within = spans.clip(self.core_start, self.core_end)
        unread = self.encoded.is_unread
        return CountedTokens(
            spans=within,
            whole=spans,
            shares=(within[:, 1] - within[:, 0]) / (spans[:, 1] - spans[:, 0]),
            is_unread=np.zeros(len(spans), np.bool_) if unread is None else unread[counts],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutter:
    """Knows the context of a model and how to fit records into it."""

    encoder: SequenceEncoder
    max_tokens: int | None
    """Context of the model, special tokens included; None is no limit."""
    is_causal: bool
    window: int | None = None
    """Bases of a window; None is what the context holds, where tokens join bases as far as each fits."""
    stride: int | None = None
    """Bases from window to window."""
    skip_first: int = 0
    """Bases at the start of each piece that do not count."""
    both_strands: bool = False
    mirror: bool = False
    """Cut the reverse complement at the same bases as the forward strand."""
    carries_state: bool = False
    """Whether all windows of a strand run as one row, from one to the next; tokens must be bases then."""

    def __post_init__(self) -> None:
        limit, frame = self.context_bases, self.encoder.frame_bp
        problems = []
        for name, size in (("window", self.window), ("stride", self.stride)):
            if size is not None and size < frame:
                problems.append(
                    f"{name} is {size}, but the model's tokens are words of {frame} bases; "
                    f"set {name} to {frame} or more"
                )
            elif size is not None and size % frame:
                whole = size // frame * frame
                logger.warning("%s %d is taken as %d: tokens are words of %d bases", name, size, whole, frame)
        if self.window is not None and limit is not None and self.encoder.aligned and self.window > limit:
            problems.append(
                f"window is {self.window}, but the model's context holds {limit} bases; "
                f"set window to {limit} or less"
            )
        if self.stride is not None and self.window is None:
            if limit is None:
                problems.append(
                    f"stride is {self.stride}, but the model states no context to cut to; set window, too"
                )
            elif self.stride > limit:
                problems.append(
                    f"stride is {self.stride}, but the model's context holds {limit} bases: bases between "
                    f"windows would be lost; set stride to {limit} or less, or set window"
                )
        if problems:
            raise ConfigError(*problems)

    @property
    def context_bases(self) -> int | None:
        """Bases that surely fit the model's context; None is no limit."""
        return None if self.max_tokens is None else self.encoder.max_bases(self.max_tokens)

    @property
    def attention_windows(self) -> AttentionWindows | None:
        """What attention sees of a row, where windows run as one; None is all of it."""
        window = self.window or self.context_bases
        if not self.carries_state or window is None:
            return None
        return AttentionWindows(window=window, stride=min(self.stride or default_stride(window), window))

    def state_problems(self, model: GenomicModel, *, carries: bool | None = None) -> list[str]:
        """Say why a model cannot carry its state from window to window, if it cannot."""
        if not (model.carries_state if carries is None else carries):
            why = "it cannot (StripedHyena 2 models can)"
        elif not self.encoder.aligned:
            why = "its tokens are not single bases"
        else:
            return []
        return [
            f"carry_state asks model {model.name!r} to hand its state on, but {why}; leave carry_state out"
        ]

    @property
    def has_token_per_base(self) -> bool:
        """Whether each base is a token of its own."""
        if self.encoder.aligned:
            return True
        starts, ends = (getattr(self.encoder.encode(_PROBE), name) for name in ("base_start", "base_end"))
        has_bases = ends > starts
        places = np.arange(len(_PROBE))
        return np.array_equal(starts[has_bases], places) and np.array_equal(ends[has_bases], places + 1)

    def windows(self, record: SequenceRecord) -> list[Window]:
        """Cut one record."""
        return self._cut(record.sequence, record.core_start, record.core_end)

    def pieces(self, record: SequenceRecord, record_index: int, windows: Sequence[Window]) -> Iterator[Piece]:
        """Encode the windows of one record, on one strand or both.

        Raises:
            UnreadError: If more than half of the record cannot be read; after its last piece.
            SequenceLengthError: If a window does not fit the context.
        """
        if self.carries_state and len(windows) > 1:
            yield from self._whole_strands(record, record_index, windows)
            return
        num_unread = num_bases = 0
        for number, window in enumerate(windows):
            piece = self._piece(record, record.sequence, window, record_index, number, is_reverse=False)
            num_unread, num_bases = num_unread + piece.num_unread, num_bases + piece.num_bases
            yield piece
        if is_mostly_unread(num_unread, num_bases):
            raise self._unread(record, num_unread, num_bases)
        if not self.both_strands:
            return
        backward = reverse_complement(record.sequence)
        length = len(backward)
        if self.mirror:
            reverse_windows = [self._mirror(window, length) for window in windows]
        else:
            reverse_windows = self._cut(backward, length - record.core_end, length - record.core_start)
        for number, window in enumerate(reverse_windows):
            yield self._piece(record, backward, window, record_index, number, is_reverse=True)

    def _whole_strands(
        self, record: SequenceRecord, record_index: int, windows: Sequence[Window]
    ) -> Iterator[Piece]:
        """Encode all windows of a strand as one piece; with ``mirror``, each is a part of it."""
        length = len(record.sequence)
        strands = [(record.sequence, record.core_start, record.core_end)]
        if self.both_strands:
            backward = reverse_complement(record.sequence)
            strands.append((backward, length - record.core_end, length - record.core_start))
        for number, (sequence, core_start, core_end) in enumerate(strands):
            # nothing behind the core is seen from within it
            window = Window(start=0, end=core_end, core_start=core_start, core_end=core_end)
            is_reverse = number == 1
            piece = self._piece(record, sequence, window, record_index, 0, is_reverse=is_reverse)
            if self.mirror:
                cores = [(cut.core_start, cut.core_end) for cut in windows]
                if is_reverse:
                    cores = [(length - end, length - start) for start, end in cores]
                parts = ((at, slice(*core)) for at, core in enumerate(cores))
                # in reading order, which on the reverse strand is that of the last window first; of a window
                # whose bases are all skipped, nothing is pooled
                kept = sorted(parts, key=lambda part: part[1].start)
                kept = [part for part in kept if piece.pool_mask[part[1]].any()]
                piece = replace(piece, parts=tuple(kept))
            yield piece

    def _unread(self, record: SequenceRecord, num_unread: int, num_bases: int) -> UnreadError:
        core = record.sequence[record.core_start : record.core_end]
        problem = unread_problem(self.encoder, core, num_unread=num_unread, num_bases=num_bases)
        return UnreadError(problem, path=record.source or None, line=record.line, record_id=record.id)

    def _cut(self, sequence: bytes, core_start: int, core_end: int) -> list[Window]:
        for size in self._sizes(sequence):
            windows = list(
                iter_windows(
                    len(sequence),
                    window_bp=size,
                    # a stride of the user's goes with the windows of the context, too
                    stride_bp=None if self.stride is None else min(self.stride, size),
                    causal=self.is_causal,
                    core_start=core_start,
                    core_end=core_end,
                    frame_bp=self.encoder.frame_bp,
                    moves_last=not self.carries_state,
                )
            )
            if self._surely_fits(size) or self._fit(sequence, windows):
                break
        return windows

    def _sizes(self, sequence: bytes) -> Iterator[int]:
        """Window sizes to try, the largest first; the last one surely fits, or is the user's own."""
        length, surely, frame = max(len(sequence), 1), self.context_bases, self.encoder.frame_bp
        if self.window is not None:
            yield self.window // frame * frame
        elif surely is None or length <= surely:
            yield length
        else:
            if not self.encoder.aligned:
                for size in self._larger_sizes(sequence, surely):
                    yield size if size >= length else size // frame * frame
            yield max(surely // frame * frame, frame)

    def _larger_sizes(self, sequence: bytes, surely: int) -> Iterator[int]:
        """Sizes that fit only if tokens join bases there: all of it, what fills the context at its start."""
        assert self.max_tokens is not None, "there is a sure size, so there is a context"
        longest = self.max_tokens * _BASES_PER_TOKEN
        if len(sequence) <= longest:
            yield len(sequence)
        starts = self.encoder.encode(sequence[:longest]).base_start
        room = self.max_tokens - self.encoder.num_special_tokens
        if starts is None or (starts >= 0).sum() <= room:
            return
        filled = int(starts[starts >= 0][room])
        # of non-overlapping k-mers, the remainder at the sequence's end may take one token per base
        rest = (self.encoder.frame_bp - 1) * self.encoder.frame_bp
        for size in (filled, filled - rest, *(int(filled * share) for share in _SHARES)):
            if surely < size < len(sequence):
                yield size

    def _surely_fits(self, size: int) -> bool:
        return self.window is not None or self.context_bases is None or size <= self.context_bases

    def _fit(self, sequence: bytes, windows: Sequence[Window]) -> bool:
        assert self.max_tokens is not None, "what has no context surely fits"
        strands = [(sequence, windows)]
        if self.both_strands and self.mirror:
            mirrored = [self._mirror(window, len(sequence)) for window in windows]
            strands.append((reverse_complement(sequence), mirrored))
        return all(
            len(self.encoder.encode(text[window.start : window.end]).input_ids) <= self.max_tokens
            for text, cuts in strands
            for window in cuts
        )

    def _piece(
        self,
        record: SequenceRecord,
        sequence: bytes,
        window: Window,
        record_index: int,
        window_index: int,
        *,
        is_reverse: bool,
    ) -> Piece:
        whole = window.start == 0 and window.end == len(sequence)
        encoded = self.encoder.encode(sequence if whole else sequence[window.start : window.end])
        is_over = self.max_tokens is not None and len(encoded.input_ids) > self.max_tokens
        if is_over and not self.carries_state:
            problem = (
                f"bases {window.start + 1}-{window.end} make {len(encoded.input_ids)} tokens, "
                f"but the model's context is {self.max_tokens}; set window to {self.context_bases} or less"
            )
            raise SequenceLengthError(
                problem, path=record.source or None, line=record.line, record_id=record.id
            )
        core_start, core_end = window.core_start - window.start, window.core_end - window.start
        counted = pool_mask(encoded, core_start=core_start, core_end=core_end, skip_first=self.skip_first)
        first = min(max(core_start, self.skip_first), core_end)
        return Piece(
            record_index=record_index,
            window_index=window_index,
            is_reverse=is_reverse,
            start=window.start,
            end=window.end,
            core_start=window.start + first,
            core_end=window.core_end,
            encoded=encoded,
            pool_mask=counted,
            num_unread=count_unread(encoded, core_start=first, core_end=core_end),
        )

    def _mirror(self, window: Window, length: int) -> Window:
        """The same core on the reverse complement; a causal model sees what is to the left of it there."""
        core_start, core_end = length - window.core_end, length - window.core_start
        if self.is_causal:
            # context is before the core in reading order, so on the reverse strand it is at the other side
            end = core_end
            start = max(0, end - (window.end - window.start))
        else:
            start, end = length - window.end, length - window.start
        return Window(start=start, end=end, core_start=core_start, core_end=core_end)


class StartToken(NamedTuple):
    """What stands before a sequence."""

    id: int | None
    """None where nothing does."""
    is_added: bool
    """Whether it has to be put there: some tokenizers do it by themselves."""

    def __str__(self) -> str:
        return "none" if self.id is None else str(self.id)


def find_start_token(
    tokenizer: PreTrainedTokenizerBase | ByteTokens, choice: StartChoice, *, add_special_tokens: bool = True
) -> StartToken:
    """Find the token that stands before a sequence in training.

    That is what the tokenizer puts there by itself; else its BOS; else its EOS, which ends the document
    before (EOD, id 0, of Evo 2 and the bundled model).

    Example:
        >>> find_start_token(ByteTokens(), "auto")
        StartToken(id=0, is_added=True)
    """
    if choice == "none":
        return StartToken(None, is_added=False)
    encoded = build_encoder(tokenizer, add_special_tokens=add_special_tokens).encode(_PROBE)
    if encoded.base_start is not None and encoded.base_start[0] < 0:
        return StartToken(int(encoded.input_ids[0]), is_added=False)
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    token = next((int(index) for index in found if index is not None), None)
    return StartToken(token, is_added=token is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingCutter:
    """A cutter whose pieces begin with the start token, or with their first base."""

    cutter: Cutter
    start: StartToken

    @property
    def encoder(self) -> SequenceEncoder:
        """Makes tokens of bases."""
        return self.cutter.encoder

    @property
    def both_strands(self) -> bool:
        """Whether the reverse complement is cut, too."""
        return self.cutter.both_strands

    def windows(self, record: SequenceRecord) -> list[Window]:
        """Cut one record."""
        return self.cutter.windows(record)

    def pieces(self, record: SequenceRecord, record_index: int, windows: Sequence[Window]) -> Iterator[Piece]:
        """Encode the windows of one record, on one strand or both."""
        for piece in self.cutter.pieces(record, record_index, windows):
            yield start_piece(piece, self.start)


def start_piece(piece: Piece, start: StartToken) -> Piece:
    """Prepend the start token to a piece, or remove what the tokenizer has put there.

    Only the first window of a strand starts; the others begin in the middle of a sequence.
    """
    ids = piece.encoded.input_ids.astype(np.int64)
    first, past = piece.encoded.base_start, piece.encoded.base_end
    unread, counted = piece.encoded.is_unread, piece.pool_mask
    if first is None or past is None:
        first = np.arange(len(ids), dtype=np.int64)
        past = first + 1
    if unread is None:
        unread = np.zeros(len(ids), dtype=np.bool_)
    if start.id is None or piece.start > 0:
        kept = slice(int(np.argmax(first >= 0)) if (first >= 0).any() else 0, None)
        ids, first, past, unread, counted = ids[kept], first[kept], past[kept], unread[kept], counted[kept]
    elif start.is_added:
        ids, first, past = np.append(start.id, ids), np.append(-1, first), np.append(-1, past)
        unread = np.append(False, unread)
        counted = np.concatenate([np.zeros_like(counted, shape=1), counted])
    encoded = EncodedSequence(input_ids=ids, base_start=first, base_end=past, is_unread=unread)
    return replace(piece, encoded=encoded, pool_mask=counted)


def default_stride(window_bp: int) -> int:
    """Step between windows when none is set: three quarters of a window, so a quarter overlaps.

    Example:
        >>> default_stride(8192)
        6144
    """
    return max(1, window_bp - window_bp // 4)


def iter_windows(
    length: int,
    *,
    window_bp: int,
    stride_bp: int | None = None,
    causal: bool = False,
    core_start: int = 0,
    core_end: int | None = None,
    frame_bp: int = 1,
    moves_last: bool = True,
) -> Iterator[Window]:
    """Cut a sequence into windows.

    Windows start every ``stride_bp`` bases; the last one is moved left so that it ends with the sequence, and
    no window is shorter than ``window_bp`` unless the sequence is. Where windows overlap, each base belongs
    to the one that shows most of its context. A bidirectional model sees both sides, so the base belongs to
    the window whose middle is nearest: neighbors share their overlap half and half, and the odd base goes to
    the right one. (That the sequence's own ends cost no context does not change this.) A causal model sees
    only what is to the left, so the base belongs to the first window that has it. Windows that answer for no
    base of the core are left out.

    With ``frame_bp``, windows begin, and their shares of the core end, at multiples of it: where tokens are
    non-overlapping k-mers of this length, all windows have the same k-mers. The last window may then be
    shorter by a part of one. ``window_bp`` must be a multiple.

    Without ``moves_last`` the last window begins a stride after the one before, like all others, and is as
    long as what is left.

    Example:
        >>> for w in iter_windows(10, window_bp=6, stride_bp=4):
        ...     print(w.start, w.end, w.core_start, w.core_end)
        0 6 0 5
        4 10 5 10
        >>> [(w.core_start, w.core_end) for w in iter_windows(10, window_bp=6, stride_bp=4, causal=True)]
        [(0, 6), (6, 10)]
    """
    problems = []
    if window_bp < 1:
        problems.append(f"window is {window_bp}, expected at least 1 base; set window to the model's context")
    stride = default_stride(window_bp) if stride_bp is None else stride_bp
    if stride < 1:
        problems.append(f"stride is {stride}, expected at least 1 base; set stride to 1 or more")
    elif window_bp >= 1 and stride > window_bp:
        problems.append(
            f"stride is {stride}, but window is {window_bp}: bases between windows would be lost; "
            f"set stride to {window_bp} or less"
        )
    if problems:
        raise ConfigError(*problems)
    end = length if core_end is None else core_end
    if not 0 <= core_start <= end <= length:
        problem = f"core {core_start}-{end} is outside a sequence of {length} bases"
        raise ShapeError(problem)
    # within a word there is no step, and a sequence shorter than a word has one window anyway
    stride = max(frame_bp, stride // frame_bp * frame_bp)
    # rounded up, so that no window is longer than asked for
    step = frame_bp if moves_last else stride
    last = -(-max(0, length - window_bp) // step) * step
    return _windows(length, window_bp, stride, causal, core_start, end, frame_bp, last)


def _windows(
    length: int,
    window_bp: int,
    stride: int,
    causal: bool,
    core_start: int,
    core_end: int,
    frame_bp: int,
    last: int,
) -> Iterator[Window]:
    start = begin = 0
    while begin < length:
        end = min(start + window_bp, length)
        following = min(start + stride, last)
        if start == last:
            share = length
        else:  # the next window begins at `following`, this one ends at `end`: they overlap in between
            share = end if causal else (following + end) // 2 // frame_bp * frame_bp
        first, past = max(begin, core_start), min(share, core_end)
        if first < past:
            yield Window(start=start, end=end, core_start=first, core_end=past)
        start, begin = following, share
