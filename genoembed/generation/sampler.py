"""Continue prompts with a causal model: which token comes next is drawn, base by base or word by word.

In: prompts, and how to draw. Out: for each prompt its continuations with their log-likelihoods. Promised: the
same prompt, seed and number of the sample give the same sequence, in whatever batch, order and number of
samples it is made (float32): draws come from a generator of random numbers for each sample, and where
rounding, which differs from batch to batch, could change a draw, the row is scored alone.

B rows, L prompt length, V vocabulary, K tokens that may be drawn.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch

from genoembed.batching.pad import count_unread, is_mostly_unread
from genoembed.errors import (
    ModelError,
    NonFiniteError,
    SequenceLengthError,
    UnreadError,
    foreign_code,
    is_out_of_memory,
)
from genoembed.pipeline.batches import default_batch_tokens, run_in_parts
from genoembed.pipeline.cutting import find_start_token
from genoembed.pipeline.forward import LEAST_BLOCK_TOKENS
from genoembed.pipeline.units import RunStats
from genoembed.tokenization.hf import build_encoder, letter_tokens, unread_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.config.choices import FailurePolicy, StartChoice
    from genoembed.contracts import SequenceRecord
    from genoembed.models.language_model import Continuation, LanguageModel


logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

Ending: TypeAlias = Literal["length", "eod"]
"""Why a sequence ends: it is as long as requested, or the model ended it."""
_PROBE = b"ACGT" * 6
_SURE = 1e-4
"""Difference of log-probabilities in float32 that a draw must not hang on; twenty times what was measured."""
_BLOCK = 4096
"""Positions of a pass that scores one row alone: always the same, so that its rounding is."""
_GONE_SHARE = 2
"""Rows that have ended are taken out when at most one of this many still grows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """Which tokens are sampled, with which probabilities."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy: always the most likely token."""
    top_k: int | None = None
    """Number of most likely tokens to sample from; None for all."""
    top_p: float = 1.0
    """Of these, the smallest set whose probabilities sum to at least this."""


class Draw(NamedTuple):
    """A token that was drawn."""

    place: int
    """Which one of those that may be drawn."""
    is_sure: bool
    """Whether log-probabilities that differ by no more than the tolerance give the same."""


def draw(
    logits_K: NDArray[np.float64], uniform: float, options: SamplingOptions, *, tolerance: float = 0.0
) -> Draw:
    """Draw a token: temperature, then top-k, then top-p, then the inverse of the cumulative distribution.

    Equal logits count in the order of the tokens. All in float64.

    Args:
        logits_K: Of each token; not all of them minus infinity. float64, shape ``(K,)``.
        uniform: Number from 0 to below 1.
        options: How to draw.
        tolerance: By how much log-probabilities may be off.

    Example:
        >>> logits = np.log([0.5, 0.3, 0.2])
        >>> [draw(logits, uniform, SamplingOptions()).place for uniform in (0.1, 0.6, 0.9)]
        [0, 1, 2]
        >>> draw(logits, 0.9, SamplingOptions(top_k=2)).place
        1
    """
    order = np.argsort(-logits_K, kind="stable")
    if options.temperature == 0:
        gap = logits_K[order[0]] - logits_K[order[1]] if len(order) > 1 else np.inf
        return Draw(int(order[0]), bool(gap > tolerance))
    scaled = (logits_K - logits_K[order[0]]) / options.temperature
    slack, num_kept, is_sure = tolerance / options.temperature, len(order), True
    if options.top_k is not None and options.top_k < num_kept:
        num_kept = options.top_k
        is_sure = bool(scaled[order[num_kept - 1]] - scaled[order[num_kept]] > slack)
    weights = np.exp(scaled[order[:num_kept]])
    if options.top_p < 1:
        sums = np.cumsum(weights) / weights.sum()
        fewest = min(int(np.searchsorted(sums, options.top_p)) + 1, num_kept)
        # which tokens are kept is in doubt where a sum is close to the limit, or two tokens at it are equal
        is_sure = is_sure and bool(np.abs(sums[max(0, fewest - 2) : fewest] - options.top_p).min() > slack)
        if fewest < num_kept:
            is_sure = is_sure and bool(scaled[order[fewest - 1]] - scaled[order[fewest]] > slack)
        num_kept = fewest
    # in the order of the tokens, not of their probabilities: nearly equal ones would change places
    kept = np.sort(order[:num_kept])
    sums = np.cumsum(np.exp(scaled[kept]))
    place = min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), num_kept - 1)
    limits = sums[:-1] / sums[-1]
    is_sure = is_sure and (not len(limits) or bool(np.abs(limits - uniform).min() > slack))
    return Draw(int(kept[place]), is_sure)


def uniforms(seed: int, prompt: bytes, sample: int) -> Iterator[float]:
    """Yield the random numbers of one sample, from 0 to below 1; one for each token.

    They depend on the seed, the bases of the prompt and the number of the sample alone, and are the same with
    every version of NumPy: those of its Philox generator, of which the 53 upper bits count.
    """
    digest = hashlib.sha256(b"%d %d " % (seed, sample) + prompt).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    while True:
        yield (bits.random_raw() >> 11) * 2.0**-53


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorOptions:
    """How prompts are continued."""

    length: int = 500
    """Bases of a sequence; the last token may go beyond."""
    num_samples: int = 1
    """Sequences from each prompt."""
    seed: int = 0
    sampling: SamplingOptions = SamplingOptions()
    tag: str = ""
    """Text that the model reads before each prompt."""
    start_token: StartChoice = "auto"
    stop_at_end: bool = True
    """Whether the token that ends a document may be drawn, which ends the sequence."""
    use_cache: bool = True
    batch_rows: int = 32
    """Sequences that grow together."""
    batch_tokens: int | None = None
    on_error: FailurePolicy = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the model reads before the first token that is drawn."""

    ids: tuple[int, ...]
    start: int
    """First base of the record that is read."""
    end: int
    """One past the last one."""
    is_windowed: bool = False
    """Whether the context has no room for the whole record."""
    num_unread: int = 0
    """Bases that the tokenizer has no words for."""


class SampledSequence(NamedTuple):
    """One continuation: what JSON holds."""

    sequence: str
    log_likelihood: float
    """Sum over its bases of ``ln p(base | all before it)``, over the whole vocabulary at temperature 1."""
    ended: Ending


@dataclass(frozen=True, kw_only=True, slots=True)
class _Order:
    """A sequence to be made."""

    record_index: int
    prompt: Prompt
    content: bytes
    """Bases of the record, on which its random numbers depend."""
    number: int
    """Number of the sample, from 1."""


@dataclass(kw_only=True, slots=True)
class _Row:
    """A sequence in the making."""

    order: _Order
    draws: Iterator[float]
    tokens: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    num_bases: int = 0
    log_likelihood: float = 0.0
    ended: Ending | None = None
    failed: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether it takes another token."""
        return self.ended is None and self.failed is None


class SequenceGenerator:
    """Continues prompts with one model."""

    def __init__(
        self,
        model: LanguageModel,
        options: GeneratorOptions,
        *,
        on_batch: Callable[[RunStats], None] | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.stats = RunStats()
        self.num_rescored = 0
        """Draws that rounding could have changed, for which a row was scored alone."""
        tokenizer = model.model.tokens
        special_tokens = model.model.special_tokens
        self.start_token = find_start_token(tokenizer, options.start_token, add_special_tokens=special_tokens)
        with foreign_code("the model's tokenizer"):
            self._words = letter_tokens(tokenizer)
        if not self._words:
            message = (
                f"model {model.model.name!r}: no token of its vocabulary is made of the letters A, C, G and "
                "T, so it generates no DNA; set model to a causal model of DNA"
            )
            raise ModelError(message)
        end = tokenizer.eos_token_id
        self._end_id = int(end) if options.stop_at_end and end is not None else None
        self._encoder = build_encoder(tokenizer, add_special_tokens=special_tokens)
        self._tag_ids = self._encode_tag()
        self._shortest = min(map(len, self._words.values()))
        self._check_words()
        self._drawable = np.array(sorted([*self._words, *([] if self._end_id is None else [self._end_id])]))
        self.is_cached = options.use_cache and model.state_argument is not None
        """Whether the model carries its state from token to token."""
        self._on_batch = on_batch
        self._max_rows = options.batch_rows
        batch_tokens = options.batch_tokens or default_batch_tokens(model.model.device)
        self._block_tokens = max(batch_tokens, LEAST_BLOCK_TOKENS)
        # half precision and FP8 round too coarsely: almost every draw would be in doubt
        is_fine = model.model.dtype == torch.float32 and model.model.fp8_numbers == "off"
        self._tolerance = _SURE if is_fine else 0.0
        self._room = self._prompt_tokens()

    def _check_words(self) -> None:
        """Raise if tokens overlap: the next one would not begin where the last one ends."""
        encoded = self._encoder.encode(_PROBE)
        first, past = encoded.base_start, encoded.base_end
        if first is not None and past is not None and (first[first >= 0][1:] < past[first >= 0][:-1]).any():
            message = (
                f"model {self.model.model.name!r}: its tokens are overlapping k-mers, so a sampled one need "
                "not continue the one before it; set model to one with non-overlapping tokens"
            )
            raise ModelError(message)

    def _encode_tag(self) -> tuple[int, ...]:
        """Encode what stands before each prompt, without what the tokenizer adds."""
        tag = self.options.tag
        if not tag:
            return ()
        with foreign_code("the model's tokenizer"):
            ids = self.model.model.tokenizer(tag, add_special_tokens=False)["input_ids"]
        unknown = self.model.model.tokens.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            message = (
                f"tag is {tag!r}, which the tokenizer of {self.model.model.name} cannot read; leave tag out, "
                "or set model to one with a token for each of its letters"
            )
            raise ModelError(message)
        return tuple(map(int, ids))

    def _prompt_tokens(self) -> int | None:
        """Return how many tokens of a prompt the context has room for; None is no limit."""
        context = self.model.model.max_length
        if context is None:
            return None
        drawn = -(-self.options.length // self._shortest)
        before = len(self._tag_ids) + (self.start_token.id is not None)
        if context - before - drawn < 1:
            most = max(0, context - before - 1) * self._shortest
            message = (
                f"length is {self.options.length}, but the context of {self.model.model.name} holds "
                f"{context} tokens, prompt included; set length to {most} or less"
            )
            raise ModelError(message)
        return context - drawn

    @property
    def room(self) -> int | None:
        """Tokens of a prompt, start token and tag included, that the model reads at most."""
        return self._room

    def prompt(self, record: SequenceRecord) -> Prompt:
        """Encode a record, the last bases of it where the context has no room for all."""
        # words of one length end where the prompt does; what is left over is at its start
        skipped = len(record.sequence) % self._encoder.frame_bp
        sequence = record.sequence[skipped:]
        with foreign_code("the model's tokenizer"):
            encoded = self._encoder.encode(sequence)
        ids = encoded.input_ids.astype(np.int64)
        first = encoded.base_start
        first = np.arange(len(ids)) if first is None else first
        has_bases = np.flatnonzero(first >= 0)
        if not len(has_bases):
            problem = (
                f"its {len(record.sequence)} bases make no token to begin with; give a prompt of "
                f"{self._encoder.frame_bp} bases or more"
            )
            raise SequenceLengthError(
                problem, path=record.source or None, line=record.line, record_id=record.id
            )
        num_unread = count_unread(encoded, core_start=0, core_end=len(sequence))
        if is_mostly_unread(num_unread, len(sequence)):
            problem = unread_problem(self._encoder, sequence, num_unread=num_unread, num_bases=len(sequence))
            raise UnreadError(problem, path=record.source or None, line=record.line, record_id=record.id)
        # what a tokenizer puts behind a sequence ends it; what it puts before is the start token, or none
        ids, first = ids[has_bases[0] : has_bases[-1] + 1], first[has_bases[0] : has_bases[-1] + 1]
        before = (*([] if self.start_token.id is None else [self.start_token.id]), *self._tag_ids)
        is_windowed = self._room is not None and len(before) + len(ids) > self._room
        if is_windowed:
            assert self._room is not None
            # a window begins in the middle of a sequence; a tag says what the sequence is, wherever it begins
            before = before if self._tag_ids else ()
            ids, first = ids[-(self._room - len(before)) :], first[-(self._room - len(before)) :]
        return Prompt(
            ids=(*before, *map(int, ids)),
            start=skipped + int(first[first >= 0][0]),
            end=len(record.sequence),
            is_windowed=is_windowed,
            num_unread=num_unread,
        )

    def generate(self, records: Sequence[SequenceRecord]) -> list[list[SampledSequence] | str]:
        """Continue a few prompts; of one that fails, where that is allowed, say why."""
        made: list[list[SampledSequence] | str] = [[] for _ in records]
        orders = []
        for index, record in enumerate(records):
            try:
                prompt = self.prompt(record)
            except (SequenceLengthError, UnreadError) as error:
                if self.options.on_error == "stop":
                    raise
                logger.warning("%s: left out", error)
                made[index] = "unread" if isinstance(error, UnreadError) else "too short"
                continue
            self.stats.unread += prompt.num_unread
            orders += [
                _Order(record_index=index, prompt=prompt, content=record.sequence, number=number)
                for number in range(1, self.options.num_samples + 1)
            ]
        rows = [row for batch in self._batches(orders) for row in self._run(batch, records)]
        # batches are made by length, so prompts are out of order, but the samples of one are not
        for row in rows:
            samples = made[row.order.record_index]
            if row.failed is not None:
                made[row.order.record_index] = row.failed
            elif isinstance(samples, list):
                assert row.ended is not None
                samples.append(SampledSequence("".join(row.words), row.log_likelihood, row.ended))
        self.stats.records += len(records)
        return made

    def _batches(self, orders: Sequence[_Order]) -> Iterator[list[_Order]]:
        """Group orders whose prompts have as many tokens: nothing is padded, so every model is exact."""
        lengths: dict[int, list[_Order]] = {}
        for order in orders:
            lengths.setdefault(len(order.prompt.ids), []).append(order)
        for length, group in lengths.items():
            # a prompt is read once for all its samples; the token budget limits the prompts of a pass
            num_prompts = max(1, self._block_tokens // length)
            batch: list[_Order] = []
            seen: set[tuple[int, ...]] = set()
            for order in group:
                is_new = order.prompt.ids not in seen
                if batch and (len(batch) >= self._max_rows or (is_new and len(seen) >= num_prompts)):
                    yield batch
                    batch, seen = [], set()
                batch.append(order)
                seen.add(order.prompt.ids)
            if batch:
                yield batch

    def _run(self, batch: Sequence[_Order], records: Sequence[SequenceRecord]) -> list[_Row]:
        """Make sequences, in halves where memory does not hold all: each begins anew, with the same draws."""

        def run(orders: Sequence[_Order]) -> list[_Row]:
            if len(orders) > self._max_rows:
                raise MemoryError  # as was seen with others: halved without a pass that fails
            rows = [
                _Row(order=order, draws=uniforms(self.options.seed, order.content, order.number))
                for order in orders
            ]
            try:
                self._grow(rows, records)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(rows) > 1:
                    self._halve(len(rows))
                    raise
                if self.options.on_error == "stop":
                    raise self._no_memory(rows[0]) from error.with_traceback(None)
                rows[0].failed = "no memory"
            return rows

        return [row for part in run_in_parts(batch, run) for row in part]

    def _halve(self, num_rows: int) -> None:
        self._max_rows = max(1, num_rows // 2)
        self.stats.halvings += 1
        logger.warning(
            "no memory for %d sequences at a time on %s: at most %d from here on",
            num_rows,
            self.model.model.device,
            self._max_rows,
        )

    def _no_memory(self, row: _Row) -> ModelError:
        message = (
            f"device {str(self.model.model.device)!r} has no memory left for a sequence after "
            f"{len(row.order.prompt.ids)} tokens; set length lower, shorten the prompt, or set dtype to "
            "bfloat16 or device to one with more memory"
        )
        return ModelError(message)

    def _grow(self, rows: Sequence[_Row], records: Sequence[SequenceRecord]) -> None:
        """Draw token after token, until every row has ended."""
        before, self.stats.bases_under_way = self.stats.bases_under_way, 0
        try:
            state, batch = self._read(rows), list(rows)
            while True:
                self._draw(batch, state.logits_BV, records)
                num_going = sum(row.goes_on for row in batch)
                if not num_going:
                    break
                if _GONE_SHARE * num_going < len(batch):
                    state.select([place for place, row in enumerate(batch) if row.goes_on])
                    batch = [row for row in batch if row.goes_on]
                # a row that has ended takes its last token again, which nobody looks at
                last_B = torch.tensor([row.tokens[-1] if row.tokens else 0 for row in batch])
                self._timed(len(batch), partial(state.append, last_B))
            self.stats.bases += sum(row.num_bases for row in rows)
        finally:
            self.stats.bases_under_way = before

    def _read(self, rows: Sequence[_Row]) -> Continuation:
        """Read the prompts, each once, and have one row for each sample."""
        prompts = list(dict.fromkeys(row.order.prompt.ids for row in rows))
        ids_BL = torch.tensor(prompts)
        state = self._timed(
            ids_BL.numel(),
            partial(self.model.start, ids_BL, block_tokens=self._block_tokens, use_cache=self.is_cached),
        )
        places = {ids: place for place, ids in enumerate(prompts)}
        chosen = [places[row.order.prompt.ids] for row in rows]
        if chosen != list(range(len(prompts))):
            state.select(chosen)
        return state

    def _timed(self, num_tokens: int, run: Callable[[], _Result]) -> _Result:
        """Run a pass and count what it cost."""
        started = time.perf_counter()
        with foreign_code("the model's forward pass"):
            result = run()
        self.stats.forward_s += time.perf_counter() - started
        self.stats.batches += 1
        self.stats.slots += num_tokens
        self.stats.real_tokens += num_tokens
        if self._on_batch is not None:
            self._on_batch(self.stats)
        return result

    def _draw(self, rows: Sequence[_Row], logits_BV: Tensor, records: Sequence[SequenceRecord]) -> None:
        """Draw the next token of each row that goes on."""
        logits_BV = logits_BV.double()
        totals_B = logits_BV.logsumexp(dim=1)
        drawable_K = self._drawable[self._drawable < logits_BV.shape[1]]
        logits_BK = logits_BV[:, torch.from_numpy(drawable_K)].numpy()
        for row, logits_K, total in zip(rows, logits_BK, totals_B.tolist(), strict=True):
            if not row.goes_on:
                continue
            if not (np.isfinite(total) and np.isfinite(logits_K.max())):
                row.failed = self._not_finite(records[row.order.record_index])
                continue
            place = self._draw_one(row, logits_K, drawable_K)
            self._add(row, int(drawable_K[place]), float(logits_K[place]) - total)

    def _draw_one(self, row: _Row, logits_K: NDArray[np.float64], drawable_K: NDArray[np.int64]) -> int:
        uniform, sampling = next(row.draws), self.options.sampling
        found = draw(logits_K, uniform, sampling, tolerance=self._tolerance)
        if found.is_sure or not self._tolerance:
            return found.place
        # rounding differs with the rows of a batch, and could decide here: the row alone does
        ids_1L = torch.tensor([[*row.order.prompt.ids, *row.tokens]])
        alone_1V = self._timed(ids_1L.numel(), partial(self.model.next_logits, ids_1L, block_tokens=_BLOCK))
        self.num_rescored += 1
        return draw(alone_1V[0].double().numpy()[drawable_K], uniform, sampling).place

    def _add(self, row: _Row, token: int, log_prob: float) -> None:
        row.tokens.append(token)
        if token == self._end_id:
            row.ended = "eod"
            return
        word = self._words[token]
        row.words.append(word)
        row.num_bases += len(word)
        row.log_likelihood += log_prob
        self.stats.bases_under_way += len(word)
        if row.num_bases >= self.options.length:
            row.ended = "length"

    def _not_finite(self, record: SequenceRecord) -> str:
        if self.options.on_error == "stop":
            problem = (
                "the next-token head gives values that are not finite; set dtype='float32', leave the record "
                "out, or set on_error to skip"
            )
            raise NonFiniteError(problem, record_id=record.id)
        return "not finite"
