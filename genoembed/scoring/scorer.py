"""Run sequences through a model: the log-probability of each token, given those before it or all others.

In: records, and options checked before anything is read. Out: for each strand of a record its tokens and
their log-probabilities, windows joined. A causal model gives those of a sequence; of a masked one, each token
is hidden once, and what it gives is spread evenly over the token's bases.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch

from genoembed.config.choices import (
    ComputeDtype,
    FailurePolicy,
    Fp8Choice,
    ScorePooling,
    ScoreStrands,
    StartChoice,
)
from genoembed.config.embed import DEFAULT_MODEL, ModelConfig, WindowConfig
from genoembed.config.fields import Config, raise_all, unknown_option
from genoembed.errors import ConfigError, EmptyPoolError, PrecisionWarning
from genoembed.models.language_model import LanguageModel, check_has_head
from genoembed.models.masked_model import MaskedModel
from genoembed.pipeline.assemble import strand_pieces
from genoembed.pipeline.batches import SlabBuilder, default_batch_tokens
from genoembed.pipeline.cutting import Cutter, StartingCutter, StartToken, find_start_token
from genoembed.pipeline.forward import LOG_PROBS, LayerReducer, NextTokenReducer, UnitRunner
from genoembed.pipeline.masking import HiddenWordsReducer, MaskedReducer
from genoembed.pipeline.request import LOADING_OPTIONS, load_configured, loading_problems
from genoembed.pipeline.units import RunStats, WorkUnit
from genoembed.sequences.records import reverse_complement
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.assemble import PieceVectors, Taken
    from genoembed.pipeline.cutting import CountedTokens
    from genoembed.pipeline.forward import UnitResults


_CHOICES = {
    "rc": ScoreStrands,
    "start_token": StartChoice,
    "on_error": FailurePolicy,
    "pooling": ScorePooling,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """The model and how it runs, for both ways of scoring."""

    model: str | PathLike[str] | GenomicModel = DEFAULT_MODEL
    revision: str | None = None
    trust_remote_code: bool | None = None
    dtype: ComputeDtype | None = None
    """None is float32: what is looked at here are small differences."""
    fp8: Fp8Choice | None = None
    device: str | None = None
    threads: int | None = None
    batch_tokens: int | None = None
    rc: ScoreStrands = "none"
    start_token: StartChoice = "auto"
    on_error: FailurePolicy = "stop"

    def check(self, *, window: int | None = None, stride: int | None = None, pooling: str = "mean") -> None:
        """Raise if these options are wrong, or those given here."""
        problems: list[str] = []
        for name, value in (
            ("rc", self.rc),
            ("start_token", self.start_token),
            ("on_error", self.on_error),
            ("pooling", pooling),
        ):
            choices = get_args(_CHOICES[name])
            if value not in choices:
                problems.append(f"{name} is {value!r}; set {name} to one of {', '.join(choices)}")
        if not isinstance(self.model, str | PathLike):
            problems += loading_problems({name: getattr(self, name) for name in LOADING_OPTIONS})
        for build in (self._model_config, lambda: WindowConfig(window=window, stride=stride)):
            try:
                build()
            except ConfigError as error:
                problems.extend(error.problems)
        if problems:
            raise ConfigError(*problems)

    def _model_config(self) -> ModelConfig:
        return ModelConfig(
            model=fspath(self.model) if isinstance(self.model, str | PathLike) else self.model.name,
            revision=self.revision,
            trust_remote_code=bool(self.trust_remote_code),
            dtype=self.dtype or "float32",
            fp8=self.fp8 or "auto",
            device=self.device,
            threads=self.threads,
            batch_tokens=self.batch_tokens,
        )

    def load(self) -> LanguageModel | MaskedModel:
        """Load the model and its head."""
        check_has_head(self.model)
        model = self.model
        if isinstance(model, str | PathLike):
            model = load_configured(self._model_config())
        return LanguageModel(model) if model.is_causal else MaskedModel(model)


def run_options(
    model: str | PathLike[str] | GenomicModel, options: Mapping[str, Any], *, call: type[Config]
) -> RunOptions:
    """Collect the options of a call; None stands for the default."""
    unknown = [name for name in options if name not in RunOptions.__dataclass_fields__]
    raise_all(unknown_option(name, call.options()) for name in unknown)
    return RunOptions(model=model, **{name: value for name, value in options.items() if value is not None})


def warn_of_precision(model: GenomicModel) -> None:
    """Warn that differences between alleles get lost in half precision."""
    if model.dtype != torch.float32:
        name = str(model.dtype).removeprefix("torch.")
        message = f"{model.name} runs in {name}: differences between alleles are rounded; set dtype='float32'"
        warnings.warn(PrecisionWarning(message), stacklevel=4)


_DECIDING = ("rc", "window", "stride", "carry_state", "layers", "pooling")
_HALVED = ("records", "bases", "bases_under_way", "windows")
_MASKED_PART_BASES = 1 << 12
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
    carry_state: bool = False
    batch_tokens: int | None = None
    layers: tuple[str, ...] = ()
    """Module paths whose pooled vectors are taken, too."""
    pooling: ScorePooling = "mean"
    on_error: FailurePolicy = "stop"


class StrandScore(NamedTuple):
    """One strand of a record: its tokens from left to right, special tokens left out.

    Of a masked model: its bases, each with an even part of its token's logarithm.
    """

    starts: NDArray[np.int64]
    """First base of each token, on this strand."""
    widths: NDArray[np.int64]
    """Bases of each token."""
    log_probs: NDArray[np.float64]
    """Natural logarithm of each token's probability; NaN where there is none: no token before it, a letter
    other than A, C, G and T in it, or nothing that the tokenizer has a word for."""
    vectors: dict[str, Tensor]
    """Pooled activations of the first window by layer. float32, shape ``(D,)``."""

    @property
    def scored_bases(self) -> int:
        """Bases that have a prediction."""
        return int(self.widths[~np.isnan(self.log_probs)].sum())

    @property
    def log_likelihood(self) -> float:
        """Sum over the tokens that have a prediction; NaN if none has."""
        return float(np.nansum(self.log_probs)) if self.scored_bases else float("nan")


class SequenceScorer:
    """Scores records with one model."""

    def __init__(
        self,
        model: LanguageModel | MaskedModel,
        options: ScorerOptions,
        *,
        on_batch: Callable[[RunStats], None] | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.is_masked = isinstance(model, MaskedModel)
        special_tokens = model.model.special_tokens
        self.start_token: StartToken = find_start_token(
            model.model.tokens, options.start_token, add_special_tokens=special_tokens
        )
        if self.is_masked:
            if options.start_token == "none":
                message = (
                    "start_token is none, but a masked model scores the first base as any other, and reads "
                    "the tokens around a sequence that its tokenizer adds; leave start_token out"
                )
                raise ConfigError(message)
            if self.start_token.is_added:
                self.start_token = StartToken(None, is_added=False)
        context = model.model.max_length
        self._cutter = Cutter(
            encoder=build_encoder(model.model.tokens, add_special_tokens=special_tokens),
            max_tokens=None if context is None else context - int(self.start_token.is_added),
            is_causal=not self.is_masked,
            window=options.window,
            stride=options.stride,
            both_strands=options.rc == "mean",
            carries_state=options.carry_state,
        )
        if options.carry_state:
            carries = isinstance(model, LanguageModel) and model.carries_state
            raise_all(self._cutter.state_problems(model.model, carries=carries))
        size, frame = options.window or self._cutter.context_bases, self._cutter.encoder.frame_bp
        is_whole = size and options.stride and options.stride // frame >= size // frame
        if size is not None and is_whole and not self.is_masked and not options.carry_state:
            message = (
                f"stride is {options.stride}, but window is {size}: the first base of a window would have no "
                f"base before it; set stride to {size // frame * frame - 1} or less"
            )
            raise ConfigError(message)
        slabs = SlabBuilder(
            cutter=self._cutter
            if self.is_masked
            else StartingCutter(cutter=self._cutter, start=self.start_token),
            batch_tokens=options.batch_tokens or default_batch_tokens(model.model.device),
            max_tokens=context,
            # causal: padding is on the right, where no token sees it
            equal_lengths=self.is_masked and model.model.padding == "equal",
            rounds_lengths=model.model.carries_state,
            skips_failed=options.on_error == "skip",
        )
        self._overlap = 1
        self._layer_runner: UnitRunner | None = None
        self._word_runner: UnitRunner | None = None
        self.stats = RunStats()
        self._on_batch = on_batch
        self._before_pairs: RunStats | None = None
        reducer: NextTokenReducer | MaskedReducer
        if isinstance(model, MaskedModel):
            reducer = MaskedReducer(model, self._cutter.encoder)
            reducer.count_copies(self.stats, num_strands=1 + (options.rc == "mean"), on_batch=self._report)
            self._overlap = reducer.overlap
            self._word_runner = UnitRunner(
                HiddenWordsReducer(model), slabs, on_batch=self._report, keeps_tokens=True, stats=self.stats
            )
            if options.layers:  # of rows in which nothing is hidden
                layers = LayerReducer(model.model, options.layers, options.pooling)
                self._layer_runner = UnitRunner(layers, slabs)
        else:
            windows = self._cutter.attention_windows
            if windows is not None and self.start_token.is_added:
                # the start token is a position of the first window
                windows = replace(windows, window=windows.window + 1)
            reducer = NextTokenReducer(model, options.layers, options.pooling, windows=windows)
        unknown = model.model.tokens.unk_token_id
        self._unknown = -1 if unknown is None else int(unknown)
        self._runner = UnitRunner(reducer, slabs, on_batch=self._report, keeps_tokens=True, stats=self.stats)

    @property
    def context_bases(self) -> int | None:
        """Bases that surely fit the model's context; None is no limit."""
        return self._cutter.context_bases

    @property
    def has_token_per_base(self) -> bool:
        """Whether each base has a score of its own."""
        return self.is_masked or self._cutter.has_token_per_base

    @property
    def max_part_bases(self) -> int:
        """Bases that are scored before any are kept: few where each takes a pass of its own."""
        return _MASKED_PART_BASES if self.is_masked else sys.maxsize

    def has_same_words(self, first: bytes, second: bytes) -> bool:
        """Tell whether the tokens of two sequences have the same places, on each strand that is scored."""
        pairs = [(first, second)]
        if self.options.rc == "mean":
            pairs.append((reverse_complement(first), reverse_complement(second)))
        for pair in pairs:
            one, other = (self._cutter.encoder.encode(text) for text in pair)
            for name in ("base_start", "base_end"):
                if not np.array_equal(getattr(one, name), getattr(other, name)):
                    return False
        return True

    def num_windows(self, record: SequenceRecord) -> int:
        """Count the windows that a record is cut into, on the strand that has more."""
        strands = [record]
        if self.options.rc == "mean":
            strands.append(replace(record, sequence=reverse_complement(record.sequence)))
        return max(len(self._cutter.windows(strand)) for strand in strands)

    def identity(self) -> dict[str, Any]:
        """What decides the scores of a record; two runs with the same may share finished units."""
        return {
            **self.model.model.content,
            "model": self.model.model.class_name,
            "dtype": str(self.model.model.dtype),
            "fp8": self.model.model.fp8_numbers,
            "max_length": self.model.model.max_length,
            "start_token": str(self.start_token),
            **{name: getattr(self.options, name) for name in _DECIDING},
        }

    def score(self, records: Sequence[SequenceRecord]) -> list[tuple[StrandScore, ...] | str]:
        """Score a few records, equal ones once; of one that fails, where that is allowed, say why."""
        if not records:
            return []
        results = self._runner(WorkUnit(number=0, records=tuple(records)))
        pooled = results if self._layer_runner is None else self._layer_runner(results.unit)
        failed = {**self._without_vectors(pooled), **pooled.failed, **results.failed}
        return [
            failed[index]
            if index in failed
            else tuple(
                self._strand_score(results, index, is_reverse=is_reverse)._replace(
                    vectors=self._vectors(pooled, index, is_reverse=is_reverse)
                )
                for is_reverse in self._strands
            )
            for index in range(len(records))
        ]

    def score_pairs(
        self, pairs: Sequence[tuple[SequenceRecord, SequenceRecord]]
    ) -> list[tuple[tuple[StrandScore, ...] | str, tuple[StrandScore, ...] | str]]:
        """Score alleles with their reference; each counts as one record, and so does its progress."""
        self._before_pairs = replace(self.stats)
        try:
            found = self.score([record for pair in pairs for record in pair])
        finally:
            half = self._halved(self.stats)
            self._before_pairs = None
        for name in _HALVED:
            setattr(self.stats, name, getattr(half, name))
        return list(zip(found[::2], found[1::2], strict=True))

    def _halved(self, stats: RunStats) -> RunStats:
        """Count pairs as one: the reference's stretch runs only to be compared with."""
        before = self._before_pairs
        if before is None:
            return stats
        counted = {
            name: getattr(before, name) + (getattr(stats, name) - getattr(before, name)) // 2
            for name in _HALVED
        }
        return replace(stats, **counted)

    def _report(self, stats: RunStats) -> None:
        if self._on_batch is not None:
            self._on_batch(self._halved(stats))

    def score_hidden(
        self, pairs: Sequence[tuple[SequenceRecord, SequenceRecord]]
    ) -> list[tuple[tuple[StrandScore, ...], tuple[StrandScore, ...]] | str]:
        """Score alleles that differ in one base by the words that hold it, hidden from a masked model.

        What is left to see is the same of all alleles of a base, so that one pass is enough for them. Vectors
        are of the whole sequences, nothing hidden. Of a pair that fails, where that is allowed, say why.
        """
        if not pairs:
            return []
        assert self._word_runner is not None, "only masked models hide words"
        places = [_first_difference(ref.sequence, alt.sequence) for ref, alt in pairs]
        # a base in words that the tokenizer does not know has no score, and nothing to run for
        run = [n for n, place in enumerate(places) if self._words(pairs[n][0].sequence, place).is_read.any()]
        cores = (replace(pairs[n][0], core_start=places[n], core_end=places[n] + 1, end=-1) for n in run)
        hidden = self._word_runner(WorkUnit(number=0, records=tuple(cores)))
        alleles = WorkUnit(number=0, records=tuple(record for pair in pairs for record in pair))
        pooled = None if self._layer_runner is None else self._layer_runner(alleles)
        failed = {} if pooled is None else {**self._without_vectors(pooled), **pooled.failed}
        row_of = {number: row for row, number in enumerate(run)}

        def scored(number: int, allele: int) -> tuple[StrandScore, ...]:
            sequence, index = pairs[number][allele].sequence, 2 * number + allele
            row = row_of.get(number)
            return tuple(
                self._hidden_score(hidden, row, sequence, places[number], is_reverse=is_reverse)._replace(
                    vectors={} if pooled is None else self._vectors(pooled, index, is_reverse=is_reverse)
                )
                for is_reverse in self._strands
            )

        found: list[tuple[tuple[StrandScore, ...], tuple[StrandScore, ...]] | str] = []
        for number in range(len(pairs)):
            why = failed.get(2 * number) or failed.get(2 * number + 1)
            if number in row_of:
                why = hidden.failed.get(row_of[number]) or why
            found.append(why or (scored(number, 0), scored(number, 1)))
        return found

    @property
    def _strands(self) -> tuple[bool, ...]:
        return (False, True) if self.options.rc == "mean" else (False,)

    def _without_vectors(self, pooled: UnitResults) -> dict[int, str]:
        """Find records of which nothing can be pooled, where that is no error."""
        if self.options.on_error == "stop" or not self.options.layers:
            return {}
        return {
            index: "nothing to pool"
            for index in range(len(pooled.unit.records))
            if not all(strand_pieces(pooled.taken, (index, is_reverse)) for is_reverse in self._strands)
        }

    def _vectors(self, pooled: UnitResults, index: int, *, is_reverse: bool) -> dict[str, Tensor]:
        if not self.options.layers:
            return {}
        parts = strand_pieces(pooled.taken, (index, is_reverse))
        if not parts:
            record = pooled.unit.records[index]
            message = f"record {record.id!r}: none of its letters makes a token; leave the record out"
            raise EmptyPoolError(message)
        return {layer: pooled.vectors.pooled(layer, [parts[0].number])[0] for layer in self.options.layers}

    def _strand_score(self, results: UnitResults, index: int, *, is_reverse: bool) -> StrandScore:
        """Join the windows of a strand; take out what has letters that are no bases."""
        record = results.unit.records[index]
        parts = strand_pieces(results.taken, (index, is_reverse))
        sequence = reverse_complement(record.sequence) if is_reverse else record.sequence
        if self._overlap > 1:
            return _of_overlapping_words(parts, results.vectors, sequence)
        log_probs = np.concatenate([np.zeros(0), *(_log_probs(part, results.vectors) for part in parts)])
        tokens = [_tokens(part) for part in parts]
        spans = np.concatenate([np.zeros((0, 2), np.int64), *(part.spans for part in tokens)])
        # of a token that two windows share, each has as much as it has bases of it
        log_probs *= np.concatenate([np.zeros(0), *(part.shares for part in tokens)])
        log_probs[np.concatenate([np.zeros(0, np.bool_), *(part.is_unread for part in tokens)])] = np.nan
        starts, ends = spans[:, 0], spans[:, 1]
        log_probs[~_are_plain(sequence, starts, ends)] = np.nan
        if self.is_masked:
            return _per_base(starts, ends - starts, log_probs, num_bases=len(sequence))
        return StrandScore(starts, ends - starts, log_probs, {})

    def _hidden_score(
        self, results: UnitResults, row: int | None, sequence: bytes, place: int, *, is_reverse: bool
    ) -> StrandScore:
        """Read off what the hidden words have with this allele in them: the words, or one base of several."""
        if is_reverse:
            sequence, place = reverse_complement(sequence), len(sequence) - 1 - place
        words = self._words(sequence, place)
        widths = words.ends - words.starts
        parts = [] if row is None else strand_pieces(results.taken, (row, is_reverse))
        if not parts:
            return StrandScore(words.starts, widths, np.full(len(widths), np.nan), {})
        words_PV = results.vectors.tokens(LOG_PROBS, [part.number for part in parts]).numpy()
        log_probs = words_PV[np.arange(len(words.ids)), words.ids].astype(np.float64)
        if self._overlap > 1:
            is_base = _PLAIN[sequence[place]] and words.is_read.any()
            mean = np.array([log_probs[words.is_read].mean() if is_base else np.nan])
            return StrandScore(np.array([place]), np.ones(1, np.int64), mean, {})
        log_probs[~words.is_read | ~_are_plain(sequence, words.starts, words.ends)] = np.nan
        return StrandScore(words.starts, widths, log_probs, {})

    def _words(self, sequence: bytes, place: int) -> _Words:
        """Find the tokens that hold a base."""
        encoded = self._cutter.encoder.encode(sequence)
        starts, ends = encoded.base_start, encoded.base_end
        if starts is None or ends is None:
            starts = np.arange(len(encoded.input_ids))
            ends = starts + 1
        columns = np.flatnonzero((starts <= place) & (ends > place))
        ids = np.asarray(encoded.input_ids)[columns].astype(np.int64)
        is_read = ids != self._unknown
        if encoded.is_unread is not None:
            is_read &= ~encoded.is_unread[columns]
        return _Words(ids, starts[columns], ends[columns], is_read)


class _Words(NamedTuple):
    """Tokens of a sequence, P of them."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    is_read: NDArray[np.bool_]


def _first_difference(first: bytes, second: bytes) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next(place for place, (one, other) in pairs if one != other)


def _are_plain(sequence: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell of spans whether all of their letters are A, C, G or T."""
    plain = np.append(0, np.cumsum(_PLAIN[np.frombuffer(sequence, dtype=np.uint8)]))
    are_plain: NDArray[np.bool_] = plain[ends] - plain[starts] == ends - starts
    return are_plain


def _per_base(
    starts: NDArray[np.int64], widths: NDArray[np.int64], log_probs: NDArray[np.float64], *, num_bases: int
) -> StrandScore:
    """Spread what tokens have evenly over their bases; NaN at those that no token has."""
    values = np.full(num_bases, np.nan)
    places = np.repeat(starts - np.cumsum(widths) + widths, widths) + np.arange(widths.sum())
    values[places] = np.repeat(log_probs / widths, widths)
    return StrandScore(np.arange(num_bases), np.ones(num_bases, np.int64), values, {})


def _of_overlapping_words(parts: Sequence[Taken], values: PieceVectors, sequence: bytes) -> StrandScore:
    """Join the bases of the windows of a strand, of a model whose words each begin at the next base."""
    log_probs = np.full(len(sequence), np.nan)
    for part in parts:
        tokens = _tokens(part)
        first, past = int(tokens.spans[:, 0].min()), int(tokens.spans[:, 1].max())
        origin = int(tokens.whole[0, 0])
        found = values.tokens(LOG_PROBS, [part.number]).numpy()
        log_probs[first:past] = found[first - origin : past - origin]
        # a base of which all words hold another letter has none to be read off
        steps = np.zeros(int(tokens.whole[-1, 1]) - origin + 1, np.int64)
        starts, ends = (tokens.whole[~tokens.is_unread] - origin).T
        np.add.at(steps, starts, 1)
        np.add.at(steps, ends, -1)
        is_read = np.cumsum(steps)[first - origin : past - origin] > 0
        log_probs[first:past][~is_read] = np.nan
    log_probs[_PLAIN[np.frombuffer(sequence, dtype=np.uint8)] == 0] = np.nan
    return StrandScore(np.arange(len(sequence)), np.ones(len(sequence), np.int64), log_probs, {})


def _tokens(part: Taken) -> CountedTokens:
    assert part.tokens is not None, "the runner keeps them"
    return part.tokens


def _log_probs(part: Taken, values: PieceVectors) -> NDArray[np.float64]:
    """Log-probabilities of all tokens of a piece that count: NaN for one that no token precedes."""
    found = values.tokens(LOG_PROBS, [part.number]).numpy()
    lacking = len(_tokens(part).spans) - len(found)
    return np.concatenate([np.full(lacking, np.nan), found])
