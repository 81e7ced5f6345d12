"""Which token a sequence starts with, so that its first base has a prediction, too.

In: a tokenizer. Out: the token's id, and encoded sequences that begin with it, or with none.

Run sequences through a causal model: strands, windows, start token, batches by length.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from genoembed.batching.order import plan_batches
from genoembed.batching.pad import pad_batch
from genoembed.contracts import EncodedSequence, SequenceRecord
from genoembed.errors import ConfigError, NonFiniteError
from genoembed.pipeline.cutting import Cutter
from genoembed.pipeline.units import RunStats
from genoembed.pooling.reduce import RunningPool
from genoembed.sequences.alphabet import reverse_complement
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.choices import ScorePooling, ScoreStrands, StartChoice
    from genoembed.contracts import Batch
    from genoembed.models.language_model import LanguageModel


_PROBE = b"ACGT" * 6


class StartToken(NamedTuple):
    """What stands before a sequence."""

    id: int | None
    """None where nothing does."""
    is_added: bool
    """Whether it has to be put there: some tokenizers do it by themselves."""

    def __str__(self) -> str:
        return "none" if self.id is None else str(self.id)


def find_start_token(tokenizer: PreTrainedTokenizerBase, choice: StartChoice) -> StartToken:
    """Find the token that stands before a sequence in training.

    That is what the tokenizer puts there by itself; else its BOS; else its EOS, which ends the document
    before (EOD, id 0, of Evo 2 and the bundled model).

    Example:
        >>> from genoembed.tokenization.char import CharTokenizer
        >>> find_start_token(CharTokenizer(), "auto")
        StartToken(id=0, is_added=True)
    """
    if choice == "none":
        return StartToken(None, is_added=False)
    encoded = build_encoder(tokenizer).encode(_PROBE)
    if encoded.base_start is not None and encoded.base_start[0] < 0:
        return StartToken(int(encoded.input_ids[0]), is_added=False)
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    token = next((int(index) for index in found if index is not None), None)
    return StartToken(token, is_added=token is not None)


class StartedSequence(NamedTuple):
    """Tokens as the model sees them, and which bases each of them has."""

    encoded: EncodedSequence
    first_base: NDArray[np.int64]
    """-1 for special tokens. Shape ``(L,)``."""
    num_bases: NDArray[np.int64]
    """0 for special tokens. Shape ``(L,)``."""


def start_sequence(
    encoded: EncodedSequence, length: int, start: StartToken, *, is_start: bool
) -> StartedSequence:
    """Put the start token before a sequence, or take off what the tokenizer has put there.

    Example:
        >>> encoded = EncodedSequence(input_ids=np.array([65, 67], dtype=np.uint8))
        >>> started = start_sequence(encoded, 2, StartToken(0, is_added=True), is_start=True)
        >>> started.encoded.input_ids.tolist(), started.first_base.tolist(), started.num_bases.tolist()
        ([0, 65, 67], [-1, 0, 1], [0, 1, 1])
    """
    ids = encoded.input_ids.astype(np.int64)
    first = np.arange(len(ids), dtype=np.int64) if encoded.base_start is None else encoded.base_start
    if start.id is None or not is_start:
        leading = int(np.argmax(first >= 0)) if (first >= 0).any() else 0
        ids, first = ids[leading:], first[leading:]
    elif start.is_added:
        ids, first = np.append(np.int64(start.id), ids), np.append(np.int64(-1), first)
    has_bases = first >= 0
    widths = np.zeros(len(ids), dtype=np.int64)
    widths[has_bases] = np.diff(np.append(first[has_bases], length))
    return StartedSequence(EncodedSequence(input_ids=ids, base_start=first), first, widths)


BATCH_TOKENS = {"cpu": 2_048}
_BATCH_TOKENS_ELSEWHERE = 16_384
_LEAST_BLOCK_TOKENS = 512
_SLAB_BATCHES = 32
"""Batches' worth of tokens that wait together: enough to find rows of like length."""
_SHORT, _SHORT_STEP, _STEP = 256, 16, 64
_PADDING_PART = 16
_PLAIN = np.zeros(256, dtype=np.int64)
_PLAIN[list(b"ACGTacgt")] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerOptions:
    """How sequences are scored."""

    rc: ScoreStrands = "none"
    """``mean``: the reverse complement is scored as well, and both count half."""
    start_token: StartChoice = "auto"
    window: int | None = None
    stride: int | None = None
    batch_tokens: int | None = None
    layers: tuple[str, ...] = ()
    """Module paths whose pooled vectors are taken, too."""
    pooling: ScorePooling = "mean"


class StrandScore(NamedTuple):
    """One strand of a record: its tokens from left to right, special tokens left out."""

    starts: NDArray[np.int64]
    """First base of each token, on this strand."""
    widths: NDArray[np.int64]
    """Bases of each token."""
    log_probs: NDArray[np.float64]
    """Natural logarithm of each token's probability; NaN where there is none: no token before it, or a letter
    other than A, C, G and T in it."""
    vectors: dict[str, Tensor]
    """Pooled activations by layer. float32, shape ``(D,)``."""
    num_windows: int

    @property
    def scored_bases(self) -> int:
        """Bases that have a prediction."""
        return int(self.widths[~np.isnan(self.log_probs)].sum())

    @property
    def log_likelihood(self) -> float:
        """Sum over the tokens that have a prediction; NaN if none has."""
        return float(np.nansum(self.log_probs)) if self.scored_bases else float("nan")


class _Waiting(NamedTuple):
    """Tokens of a row, and which of them count."""

    encoded: EncodedSequence
    counted: NDArray[np.bool_]


@dataclass(slots=True)
class _Row:
    """A window of a strand of a record, as a row of a forward pass."""

    owner: int
    """Number of the strand: twice the record's, plus 1 for the reverse complement."""
    starts: NDArray[np.int64]
    """First base, on the strand, of each token of bases that this window answers for."""
    widths: NDArray[np.int64]
    """Bases of these tokens."""
    waiting: _Waiting | None
    """What the model is to see; None once it has."""
    key: bytes
    """Equal for rows that are equal to the model."""
    log_probs: NDArray[np.float32] | None = None
    """Of these tokens."""
    vectors: dict[str, Tensor] = field(default_factory=dict)


class SequenceScorer:
    """Scores records with one model."""

    def __init__(
        self,
        model: LanguageModel,
        options: ScorerOptions,
        *,
        on_batch: Callable[[RunStats], None] | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.start_token: StartToken = find_start_token(model.model.tokenizer, options.start_token)
        self.batch_tokens = options.batch_tokens or BATCH_TOKENS.get(
            model.model.device.type, _BATCH_TOKENS_ELSEWHERE
        )
        """Slots of a forward pass, padding included."""
        self.stats = RunStats()
        context = model.model.max_length
        self._cutter = Cutter(
            encoder=build_encoder(model.model.tokenizer),
            max_tokens=None if context is None else context - int(self.start_token.is_added),
            is_causal=True,
            window=options.window,
            stride=options.stride,
        )
        size = options.window or self._cutter.context_bases
        if size is not None and options.stride is not None and options.stride >= size:
            message = (
                f"stride is {options.stride}, but window is {size}: the first base of a window would have no "
                f"base before it; set stride to {size - 1} or less"
            )
            raise ConfigError(message)
        self._on_batch = on_batch

    @property
    def context_bases(self) -> int | None:
        """Bases that surely fit the model's context; None is no limit."""
        return self._cutter.context_bases

    @property
    def has_token_per_base(self) -> bool:
        """Whether each base is a token of its own."""
        probe = b"ACGT" * 6
        starts = self._cutter.encoder.encode(probe).base_start
        return starts is None or starts[starts >= 0].tolist() == list(range(len(probe)))

    def num_windows(self, record: SequenceRecord) -> int:
        """Count the windows that a record is cut into."""
        return len(self._cutter.windows(record))

    def score(self, records: Sequence[SequenceRecord]) -> list[tuple[StrandScore, ...]]:
        """Score a few records; what is equal to the model runs once."""
        rows: list[_Row] = []
        fresh: list[_Row] = []
        first: dict[bytes, _Row] = {}
        num_tokens = 0
        for row in (row for index, record in enumerate(records) for row in self._rows(record, index)):
            rows.append(row)
            if first.setdefault(row.key, row) is not row:
                row.waiting = None
                self.stats.repeats += 1
                continue
            fresh.append(row)
            num_tokens += _num_tokens(row)
            if num_tokens >= _SLAB_BATCHES * self.batch_tokens:
                self._run(fresh, records)
                fresh, num_tokens = [], 0
        self._run(fresh, records)
        self.stats.bases_under_way = 0  # from here on they are counted record by record
        for row in rows:
            row.log_probs, row.vectors = first[row.key].log_probs, first[row.key].vectors
        strands: dict[int, list[_Row]] = {}
        for row in rows:
            strands.setdefault(row.owner, []).append(row)
        sides = (0,) if self.options.rc == "none" else (0, 1)
        return [
            tuple(_joined(strands[2 * index + side], records[index], is_reverse=side == 1) for side in sides)
            for index in range(len(records))
        ]

    def count(self, record: SequenceRecord, strands: Sequence[StrandScore]) -> None:
        """Add a record that is done to the totals."""
        self.stats.records += 1
        self.stats.bases += len(record.sequence)
        self.stats.windows += strands[0].num_windows

    def _rows(self, record: SequenceRecord, index: int) -> Iterator[_Row]:
        yield from self._strand_rows(record, 2 * index)
        if self.options.rc == "mean":
            yield from self._strand_rows(_turned(record), 2 * index + 1)

    def _strand_rows(self, record: SequenceRecord, owner: int) -> Iterator[_Row]:
        windows = self._cutter.windows(record)
        for window, piece in zip(windows, self._cutter.pieces(record, 0, windows), strict=True):
            tokens = start_sequence(
                piece.encoded, window.end - window.start, self.start_token, is_start=window.start == 0
            )
            bases = tokens.first_base + window.start
            counted = (tokens.first_base >= 0) & (bases >= window.core_start) & (bases < window.core_end)
            digest = hashlib.sha256(tokens.encoded.input_ids.data)
            digest.update(counted.data)
            yield _Row(
                owner=owner,
                starts=bases[counted],
                widths=tokens.num_bases[counted],
                waiting=_Waiting(tokens.encoded, counted),
                key=digest.digest(),
            )

    def _run(self, rows: Sequence[_Row], records: Sequence[SequenceRecord]) -> None:
        plan = plan_batches(
            [self._padded(_num_tokens(row)) for row in rows],
            max_tokens=self.batch_tokens,
            max_padding=self.batch_tokens // _PADDING_PART,
        )
        for numbers in plan:
            chosen = [rows[number] for number in numbers]
            waiting = [row.waiting for row in chosen if row.waiting is not None]
            batch = pad_batch(
                [each.encoded for each in waiting],
                pool_masks=[each.counted for each in waiting],
                rows=numbers,
                pad_token_id=self._cutter.encoder.pad_token_id,
                pad_to_multiple_of=self._padded(max(map(_num_tokens, chosen))),
            )
            self._run_batch(batch, chosen, records)

    def _run_batch(self, batch: Batch, rows: Sequence[_Row], records: Sequence[SequenceRecord]) -> None:
        started = time.perf_counter()
        pools = {layer: RunningPool(self.options.pooling) for layer in self.options.layers}

        def take(layer: str, hidden_BCD: Tensor, span: slice) -> None:
            pools[layer].add(hidden_BCD, batch.pool_mask[:, span].to(hidden_BCD.device))

        log_probs_BL = self.model.log_probs(
            batch,
            layers=self.options.layers,
            take=take,
            block_tokens=max(self.batch_tokens, _LEAST_BLOCK_TOKENS),
        )
        pooled = {layer: pool.pooled().cpu() for layer, pool in pools.items()}
        for number, row in enumerate(rows):
            row.vectors = {layer: vectors_BD[number] for layer, vectors_BD in pooled.items()}
            _settle(row, log_probs_BL[number].numpy(), records[row.owner // 2])
        stats = self.stats
        stats.batches += 1
        stats.slots += batch.num_tokens
        stats.real_tokens += int(batch.attention_mask.sum())
        stats.forward_s += time.perf_counter() - started
        bases = sum(int(row.widths.sum()) for row in rows)
        stats.bases_under_way += bases // (1 if self.options.rc == "none" else 2)
        if self._on_batch is not None:
            self._on_batch(stats)

    def _padded(self, length: int) -> int:
        """Round lengths where each new shape costs a kernel, as in extraction; not beyond the context."""
        if not self.model.model.carries_state:
            return length
        step = _STEP if length > _SHORT else _SHORT_STEP
        rounded = -(-length // step) * step
        context = self.model.model.max_length
        return rounded if context is None else max(length, min(rounded, context))


def _turned(record: SequenceRecord) -> SequenceRecord:
    sequence = reverse_complement(record.sequence)
    return SequenceRecord(id=record.id, sequence=sequence, source=record.source, line=record.line)


def _num_tokens(row: _Row) -> int:
    assert row.waiting is not None, "it has not run yet"
    return len(row.waiting.counted)


def _settle(row: _Row, log_probs_L: NDArray[np.float32], record: SequenceRecord) -> None:
    """Keep what counts of a row's log-probabilities, and give its tokens up."""
    assert row.waiting is not None, "it has not run yet"
    counted = row.waiting.counted
    predicted = counted.copy()
    predicted[0] = False  # no token precedes it
    finite = np.isfinite(log_probs_L[: len(counted)][predicted]).all()
    if not finite or not all(bool(torch.isfinite(vector).all()) for vector in row.vectors.values()):
        problem = "the model gives values that are not finite; set dtype='float32', or leave the record out"
        raise NonFiniteError(problem, record_id=record.id)
    row.log_probs = log_probs_L[: len(counted)][counted]
    row.waiting = None


def _joined(rows: Sequence[_Row], record: SequenceRecord, *, is_reverse: bool) -> StrandScore:
    """Lay the windows of a strand end to end; take out what has letters that are no bases."""
    sequence = reverse_complement(record.sequence) if is_reverse else record.sequence
    plain = np.append(0, np.cumsum(_PLAIN[np.frombuffer(sequence, dtype=np.uint8)]))
    starts = np.concatenate([row.starts for row in rows])
    widths = np.concatenate([row.widths for row in rows])
    log_probs = np.concatenate([_values(row) for row in rows]).astype(np.float64)
    log_probs[plain[starts + widths] - plain[starts] != widths] = np.nan
    return StrandScore(starts, widths, log_probs, rows[0].vectors, len(rows))


def _values(row: _Row) -> NDArray[np.float32]:
    assert row.log_probs is not None, "every row has run, or one that is equal to it"
    return row.log_probs
