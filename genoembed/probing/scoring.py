"""The scores of a probe: layers, fusions, baselines and an untrained copy, all on the same rows and folds.

With the preset ``geneb`` also the protocol of that benchmark (arXiv 2606.04525): features as they are, not
standardized; scikit-learn's logistic regression with its default penalty (C = 1), fitted to all training
rows, to ten of each class and to one of each class, drawn with five seeds; scores on held-out rows.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from genoembed.errors import ConfigError, NonFiniteError
from genoembed.pipeline.embedding_file import find_file_settings
from genoembed.plotting.layers import layer_number, order_layers
from genoembed.probing.cross_validation import (
    MetricSummary,
    encode_target,
    measure_predictions,
    prepare,
    summarize_metrics,
)
from genoembed.probing.report import UNTRAINED
from genoembed.probing.rows import assign_folds, group_rows, join_labels, read_row_sequences
from genoembed.probing.scalar_mix import mix_layers
from genoembed.probing.sweep import MEAN, MIX, Scored, Sweep, score_block, shown, sweep
from genoembed.probing.vectors import RowsOfLayers, load_transforms
from genoembed.sequences.composition import BASELINES, usable_baselines
from genoembed.store import open_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.config.probe import ProbeConfig
    from genoembed.probing.rows import LabelTable
    from genoembed.store import EmbeddingFile

logger = logging.getLogger(__name__)

Shots: TypeAlias = "dict[str, dict[str, dict[str, MetricSummary]]]"
"""candidate -> regime -> metric"""

SEEDS = (13, 17, 42, 123, 997)
SHOTS: Mapping[str, int | None] = {"full": None, "10-shot": 10, "1-shot": 1}
"""Training rows of each class by name of the regime; None takes all."""
_MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is learned, and on which folds; with a split, all but the test rows."""

    codes: NDArray[np.generic]
    folds: NDArray[np.int64]
    is_train: NDArray[np.bool_]
    """Rows that have a fold, of all labeled rows."""
    num_groups: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeScores:
    """All scores."""

    sweep: Sweep
    baselines: tuple[Scored, ...]
    untrained: tuple[Scored, ...]
    """The same layers of an untrained copy."""
    shots: Shots
    """With a preset: candidate -> regime -> metric."""
    seconds: dict[str, float]
    """Wall time by step."""


class ProbeRun:
    """One probe over an open file."""

    def __init__(
        self,
        file: EmbeddingFile,
        table: LabelTable,
        options: ProbeConfig,
        layers: int | str | Sequence[int | str] | None,
        *,
        is_checked: bool = False,
    ) -> None:
        self.file, self.options = file, options
        _ = file.X  # a per-token file says here that it has no row a record
        self.layers = _named_layers(file, layers)
        self._transforms = load_transforms(file, self.layers, options.transform)
        self.transform_files = dict(zip(self._transforms, options.transform, strict=True))
        """Where the transform of a layer was read, by layer."""
        self.rows = join_labels(file, table, options, is_checked=is_checked)
        self.notes: list[str] = []
        """What was left out, and why."""
        self._sequences = self._read_sequences()
        self.target = self._assign_folds(table)

    def measure(self, embed_again: Callable[[], Path | str]) -> ProbeScores:
        """Score everything."""
        started = time.perf_counter()
        features = RowsOfLayers(self.file, self.layers, self.rows.rows, transforms=self._transforms)
        target, task = self.target, self.options.task
        train = features.of(target.is_train)
        found = sweep(train, target.codes, target.folds, task=task, top=self.options.top)
        shots = self._shots_of_layers(features, found)
        baselines = self._baselines(shots)
        probed = time.perf_counter()
        untrained = self._untrained(embed_again, shots) if self.options.untrained else ()
        return ProbeScores(
            sweep=found,
            baselines=baselines,
            untrained=untrained,
            shots=shots,
            seconds={"probe": probed - started, "untrained copy": time.perf_counter() - probed},
        )

    def _read_sequences(self) -> list[bytes] | None:
        """Read the sequences, if anything needs them; raise if they are gone."""
        if not self.options.baselines and self.options.cv != "homology":
            return None
        found = read_row_sequences(self.file, self.rows, self.options.sequences)
        if isinstance(found, list):
            return found
        if self.options.baselines:
            self._note(f"baselines were left out: {found}")
        return None

    def _assign_folds(self, table: LabelTable) -> Target:
        rows, options = self.rows, self.options
        groups = group_rows(self.file, rows, table, options, self._sequences)
        is_train = rows.is_train
        return Target(
            codes=encode_target(rows.target[is_train], task=options.task),
            folds=assign_folds(rows, groups, options),
            is_train=is_train,
            num_groups=None if groups is None else len(np.unique(groups[is_train])),
        )

    def _baselines(self, shots: Shots) -> tuple[Scored, ...]:
        """Score what needs no model, one matrix in memory at a time."""
        if self._sequences is None or not self.options.baselines:
            return ()
        target, scored = self.target, []
        everywhere = np.ones(len(target.is_train), np.bool_)
        for name in usable_baselines(self._sequences):
            block, train = BASELINES[name](self._sequences), target.is_train
            found = score_block(
                name, block[train], target.codes, target.folds, task=self.options.task, kind="baseline"
            )
            # shares of k-mers need a scale that the preset's fixed penalty can work with
            shots |= self._shots(name, prepare([block], train, everywhere)[1])
            logger.info("%s: %s", name, shown(found, self.options.task))
            scored.append(found)
        return tuple(scored)

    def _untrained(self, embed_again: Callable[[], Path | str], shots: Shots) -> tuple[Scored, ...]:
        """Score the same layers of a copy that has learned nothing."""
        made = embed_again()
        if isinstance(made, str):
            self._note(f"the untrained copy was left out: {made}")
            return ()
        target, task = self.target, self.options.task
        with open_embeddings(made) as file:
            if file.ids != self.file.ids:
                self._note(f"the untrained copy was left out: {file.path} holds other records")
                return ()
            features = RowsOfLayers(file, self.layers, self.rows.rows)
            train = features.of(target.is_train)
            try:
                found = sweep(
                    train, target.codes, target.folds, task=task, kind="untrained", top=(), average=False
                )
            except NonFiniteError as error:
                self._note(f"the untrained copy was left out: {error}")
                return ()
            if self.options.preset != "none":
                best = max(found.layers, key=lambda layer: layer.metrics["mcc"].mean)
                shots |= self._shots(UNTRAINED, features[best.name])
        return found.layers

    def _shots_of_layers(self, features: Mapping[str, NDArray[np.floating]], found: Sweep) -> Shots:
        """Score the test split for each layer and for the means of all layers."""
        shots: Shots = {}
        if self.options.preset == "none":
            return shots
        for name in features:
            shots |= self._shots(name, features[name])
        if found.mix:
            equal = dict.fromkeys(features, 1 / len(features))
            shots |= self._shots(MEAN, mix_layers(features, equal))
            shots |= self._shots(MIX, mix_layers(features, found.mix))
        return shots

    def _shots(self, name: str, block: NDArray[np.floating]) -> Shots:
        if self.options.preset == "none":
            return {}
        return {name: score_shots(block, _sorted_codes(self.rows.target), ~self.target.is_train)}

    def _note(self, text: str) -> None:
        logger.warning("%s", text)
        self.notes.append(text)


def score_shots(
    features: NDArray[np.floating],
    codes: NDArray[np.int64],
    is_test: NDArray[np.bool_],
    *,
    seeds: Sequence[int] = SEEDS,
    shots: Mapping[str, int | None] = SHOTS,
) -> dict[str, dict[str, MetricSummary]]:
    """Fit on few and on all training rows, and score the test rows.

    Where all rows are used, seeds change nothing: there is one fit, and the deviation is 0.

    Example:
        >>> codes = np.arange(40) % 2
        >>> scores = score_shots(np.eye(2)[codes] * 9, codes, np.arange(40) >= 20)
        >>> list(scores), scores["1-shot"]["mcc"].mean
        (['full', '10-shot', '1-shot'], 1.0)
    """
    rows = np.flatnonzero(~is_test)
    if not is_test.any() or len(np.unique(codes[rows])) < 2:
        message = (
            f"split: {int(is_test.sum())} test rows and {len(np.unique(codes[rows]))} classes to train on, "
            "expected test rows and two classes or more; check the split"
        )
        raise ConfigError(message)
    results = {}
    for regime, shot in shots.items():
        # without drawing, every seed gives the same fit
        drawn = [rows] if shot is None else [_draw(codes, rows, shot, seed) for seed in seeds]
        scores = [_fit_and_score(features, codes, chosen, is_test) for chosen in drawn]
        results[regime] = summarize_metrics(scores * (len(seeds) if shot is None else 1), ddof=0)
    return results


def _draw(codes: NDArray[np.int64], rows: NDArray[np.int64], shot: int, seed: int) -> NDArray[np.int64]:
    """Draw that many rows of each class, fewer where it has fewer, class by class."""
    # the legacy generator, because the benchmark's rows are those that it draws
    random = np.random.RandomState(seed)
    parts = []
    for code in np.unique(codes[rows]):
        members = np.flatnonzero(codes[rows] == code)
        parts.append(rows[random.choice(members, size=min(shot, len(members)), replace=False)])
    return np.concatenate(parts)


def _fit_and_score(
    features: NDArray[np.floating],
    codes: NDArray[np.int64],
    train: NDArray[np.int64],
    is_test: NDArray[np.bool_],
) -> dict[str, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(max_iter=_MAX_STEPS)
    with warnings.catch_warnings():
        # features as they are can be badly scaled; what 1,000 steps reach is what the protocol scores
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features[train], codes[train])
    return measure_predictions(codes[is_test], classifier.predict(features[is_test]), task="classification")


def _sorted_codes(target: NDArray[np.generic]) -> NDArray[np.int64]:
    """Number the classes in the order of their names, or of their values where all are whole numbers."""
    try:
        ordered: NDArray[np.generic] = target.astype(np.int64)
    except ValueError:
        ordered = target
    return encode_target(ordered, task="classification").astype(np.int64)


def _named_layers(file: EmbeddingFile, layers: int | str | Sequence[int | str] | None) -> list[str]:
    """Find layers of a file by name, in the order of the model: an earlier one is preferred."""
    settings = find_file_settings(file)
    are_ordered = settings is not None and settings.requested_layers == ("all",)
    stored = file.layers if are_ordered else order_layers(file.layers)
    if layers is None or layers in ("all", ["all"], ("all",)):
        return stored
    asked = [layers] if isinstance(layers, int | str) else list(layers)
    by_number = {str(layer_number(name)): name for name in stored}
    names = [by_number.get(str(layer), str(layer)) for layer in asked]
    for name in names:
        _ = file[name]
    # what is no layer, as a matrix that another program added, has no place in the model
    return [name for name in stored if name in names] + [
        name for name in dict.fromkeys(names) if name not in stored
    ]
