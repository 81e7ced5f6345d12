"""Run sequences through a causal model: the log-probability of each token, given those before it.

In: records, and options checked before anything is read. Out: for each strand of a record its tokens and
their log-probabilities, windows joined.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch

from genoembed.config.choices import ComputeDtype, FailurePolicy, ScorePooling, ScoreStrands, StartChoice
from genoembed.config.embed import DEFAULT_MODEL, ModelConfig, WindowConfig
from genoembed.config.fields import Config, raise_all, unknown_option
from genoembed.errors import ConfigError, EmptyPoolError, PrecisionWarning
from genoembed.models.language_model import LanguageModel, check_has_head
from genoembed.pipeline.assemble import strand_pieces
from genoembed.pipeline.batches import SlabBuilder, default_batch_tokens
from genoembed.pipeline.cutting import Cutter, StartingCutter, find_start_token
from genoembed.pipeline.forward import LOG_PROBS, NextTokenReducer, UnitRunner
from genoembed.pipeline.request import LOADING_OPTIONS, load_configured, loading_problems
from genoembed.pipeline.units import WorkUnit
from genoembed.sequences.records import reverse_complement
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.assemble import PieceVectors, Taken
    from genoembed.pipeline.cutting import CountedTokens, StartToken
    from genoembed.pipeline.forward import UnitResults
    from genoembed.pipeline.units import RunStats


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
            device=self.device,
            threads=self.threads,
            batch_tokens=self.batch_tokens,
        )

    def load(self) -> LanguageModel:
        """Load the model and its head."""
        check_has_head(self.model)
        if not isinstance(self.model, str | PathLike):
            return LanguageModel(self.model)
        return LanguageModel(load_configured(self._model_config()))


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


_DECIDING = ("rc", "window", "stride", "layers", "pooling")
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
    on_error: FailurePolicy = "stop"


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
        model: LanguageModel,
        options: ScorerOptions,
        *,
        on_batch: Callable[[RunStats], None] | None = None,
    ) -> None:
        self.model = model
        self.options = options
        special_tokens = model.model.special_tokens
        self.start_token: StartToken = find_start_token(
            model.model.tokenizer, options.start_token, add_special_tokens=special_tokens
        )
        context = model.model.max_length
        self._cutter = Cutter(
            encoder=build_encoder(model.model.tokenizer, add_special_tokens=special_tokens),
            max_tokens=None if context is None else context - int(self.start_token.is_added),
            is_causal=True,
            window=options.window,
            stride=options.stride,
            both_strands=options.rc == "mean",
        )
        size, frame = options.window or self._cutter.context_bases, self._cutter.encoder.frame_bp
        if size is not None and options.stride is not None and options.stride // frame >= size // frame:
            message = (
                f"stride is {options.stride}, but window is {size}: the first base of a window would have no "
                f"base before it; set stride to {size // frame * frame - 1} or less"
            )
            raise ConfigError(message)
        slabs = SlabBuilder(
            cutter=StartingCutter(cutter=self._cutter, start=self.start_token),
            batch_tokens=options.batch_tokens or default_batch_tokens(model.model.device),
            max_tokens=context,
            equal_lengths=False,  # causal: padding is on the right, where no token sees it
            rounds_lengths=model.model.carries_state,
            skips_failed=options.on_error == "skip",
        )
        reducer = NextTokenReducer(model, options.layers, options.pooling)
        self._runner = UnitRunner(reducer, slabs, on_batch=on_batch, keeps_tokens=True)
        self.stats = self._runner.stats

    @property
    def context_bases(self) -> int | None:
        """Bases that surely fit the model's context; None is no limit."""
        return self._cutter.context_bases

    @property
    def has_token_per_base(self) -> bool:
        """Whether each base is a token of its own."""
        return self._cutter.has_token_per_base

    def num_windows(self, record: SequenceRecord) -> int:
        """Count the windows that a record is cut into."""
        return len(self._cutter.windows(record))

    def identity(self) -> dict[str, Any]:
        """What decides the scores of a record; two runs with the same may share finished units."""
        return {
            **self.model.model.content,
            "model": type(self.model.model.module).__name__,
            "dtype": str(self.model.model.dtype),
            "max_length": self.model.model.max_length,
            "start_token": str(self.start_token),
            **{name: getattr(self.options, name) for name in _DECIDING},
        }

    def score(self, records: Sequence[SequenceRecord]) -> list[tuple[StrandScore, ...] | str]:
        """Score a few records, equal ones once; of one that fails, where that is allowed, say why."""
        if not records:
            return []
        results = self._runner(WorkUnit(number=0, records=tuple(records)))
        strands = (False, True) if self.options.rc == "mean" else (False,)
        failed = dict(results.failed)
        if self.options.on_error == "skip" and self.options.layers:
            for index in range(len(records)):
                if not all(strand_pieces(results.taken, (index, is_reverse)) for is_reverse in strands):
                    failed.setdefault(index, "nothing to pool")
        return [
            failed[index]
            if index in failed
            else tuple(self._strand_score(results, index, is_reverse=is_reverse) for is_reverse in strands)
            for index in range(len(records))
        ]

    def _strand_score(self, results: UnitResults, index: int, *, is_reverse: bool) -> StrandScore:
        """Join the windows of a strand; take out what has letters that are no bases."""
        record = results.unit.records[index]
        parts = strand_pieces(results.taken, (index, is_reverse))
        if not parts and self.options.layers:
            message = f"record {record.id!r}: none of its letters makes a token; leave the record out"
            raise EmptyPoolError(message)
        log_probs = np.concatenate([np.zeros(0), *(_log_probs(part, results.vectors) for part in parts)])
        tokens = [_tokens(part) for part in parts]
        spans = np.concatenate([np.zeros((0, 2), np.int64), *(part.spans for part in tokens)])
        # of a token that two windows share, each has as much as it has bases of it
        log_probs *= np.concatenate([np.zeros(0), *(part.shares for part in tokens)])
        log_probs[np.concatenate([np.zeros(0, np.bool_), *(part.is_unread for part in tokens)])] = np.nan
        sequence = reverse_complement(record.sequence) if is_reverse else record.sequence
        plain = np.append(0, np.cumsum(_PLAIN[np.frombuffer(sequence, dtype=np.uint8)]))
        starts, ends = spans[:, 0], spans[:, 1]
        log_probs[plain[ends] - plain[starts] != ends - starts] = np.nan
        vectors = {
            layer: results.vectors.pooled(layer, [parts[0].number])[0] for layer in self.options.layers
        }
        return StrandScore(starts, ends - starts, log_probs, vectors)


def _tokens(part: Taken) -> CountedTokens:
    assert part.tokens is not None, "the runner keeps them"
    return part.tokens


def _log_probs(part: Taken, values: PieceVectors) -> NDArray[np.float64]:
    """Log-probabilities of all tokens of a piece that count: NaN for one that no token precedes."""
    found = values.tokens(LOG_PROBS, [part.number]).numpy()
    lacking = len(_tokens(part).spans) - len(found)
    return np.concatenate([np.full(lacking, np.nan), found])
