"""The scores of a probe: layers, fusions, baselines and an untrained copy, all on the same rows and folds."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from genoembed.errors import NonFiniteError
from genoembed.probing.few_shot import ShotSummary, score_shots
from genoembed.probing.folds import split_folds
from genoembed.probing.preparation import encode_target, standardize
from genoembed.probing.report import UNTRAINED, layer_number
from genoembed.probing.rows import group_rows, join_labels, read_row_sequences
from genoembed.probing.scalar_mix import mix_layers
from genoembed.probing.sweep import MEAN, MIX, Scored, Sweep, score_block, shown, sweep_layers
from genoembed.probing.vectors import RowsOfLayers, load_transforms
from genoembed.sequences.composition import composition, kmer_frequencies
from genoembed.store import open_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.config.probe import ProbeConfig
    from genoembed.pooling.transform import FittedTransform
    from genoembed.probing.rows import LabelTable
    from genoembed.probing.sweep import Kind
    from genoembed.store import EmbeddingFile

logger = logging.getLogger(__name__)

Shots: TypeAlias = dict[str, dict[str, dict[str, ShotSummary]]]

_BASELINES: Mapping[str, Callable[[Sequence[bytes]], NDArray[np.float32]]] = {
    "4-mer counts": lambda sequences: kmer_frequencies(sequences, k=4),
    "6-mer counts": lambda sequences: kmer_frequencies(sequences, k=6),
    "GC content and length": composition,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is learnt, and on which folds; with a split, all but the test rows."""

    codes: NDArray[np.generic]
    folds: NDArray[np.int64]
    is_train: NDArray[np.bool_]
    """Rows that folds were dealt to, of all labelled rows."""
    num_groups: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
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
    ) -> None:
        self.file, self.options = file, options
        _ = file.X  # a per-token file says here that it has no row a record
        self.layers = _named_layers(file, layers)
        self._transforms = load_transforms(file, self.layers, options.transform)
        self.rows = join_labels(file, table, options)
        self.notes: list[str] = []
        """What was left out, and why."""
        self._sequences = self._read_sequences()
        self.target = self._deal(table)

    def measure(self, embed_again: Callable[[], Path | str]) -> Measured:
        """Score everything."""
        started = time.perf_counter()
        features = self._features(self.file, self._transforms)
        sweep = self._sweep(features, fusions=True, kind="layer")
        shots = self._shots_of_layers(features, sweep)
        baselines = self._baselines(shots)
        probed = time.perf_counter()
        untrained = self._untrained(embed_again, shots) if self.options.untrained else ()
        return Measured(
            sweep=sweep,
            baselines=baselines,
            untrained=untrained,
            shots=shots,
            seconds={"probe": probed - started, "untrained copy": time.perf_counter() - probed},
        )

    def _sweep(self, features: RowsOfLayers, *, fusions: bool, kind: Kind) -> Sweep:
        target = self.target
        return sweep_layers(
            features.of(target.is_train),
            target.codes,
            target.folds,
            task=self.options.task,
            fusions=fusions,
            kind=kind,
            top=self.options.top,
        )

    def _read_sequences(self) -> list[bytes] | None:
        """Read the sequences, if anything needs them; say so where they are gone."""
        if not self.options.baselines and self.options.cv != "homology":
            return None
        found = read_row_sequences(self.file, self.rows, self.options.sequences)
        if isinstance(found, list):
            return found
        if self.options.baselines:
            self._note(f"k-mer baselines were left out: {found}")
        return None

    def _deal(self, table: LabelTable) -> Target:
        rows, options = self.rows, self.options
        groups = group_rows(self.file, rows, table, options, self._sequences)
        is_train = np.ones(len(rows.rows), np.bool_) if rows.is_test is None else ~rows.is_test
        folds = split_folds(
            rows.target[is_train],
            task=options.task,
            groups=None if groups is None else groups[is_train],
            num_folds=options.num_folds,
            seed=options.seed,
        )
        return Target(
            codes=encode_target(rows.target[is_train], task=options.task),
            folds=folds,
            is_train=is_train,
            num_groups=None if groups is None else len(np.unique(groups[is_train])),
        )

    def _features(
        self, file: EmbeddingFile, transforms: Mapping[str, FittedTransform] | None = None
    ) -> RowsOfLayers:
        return RowsOfLayers(file, self.layers, self.rows.rows, transforms=transforms)

    def _baselines(self, shots: Shots) -> tuple[Scored, ...]:
        """Score what needs no model, one matrix in memory at a time."""
        if self._sequences is None or not self.options.baselines:
            return ()
        scored = []
        for name, build in _BASELINES.items():
            block = build(self._sequences)
            scored.append(self._score(name, block, "baseline"))
            shots |= self._shots(name, self._standardized(block))
            logger.info("%s: %s", name, shown(scored[-1], self.options.task))
        return tuple(scored)

    def _standardized(self, block: NDArray[np.floating]) -> NDArray[np.float64]:
        """Give shares of k-mers a scale that the preset's fixed penalty can work with."""
        everywhere = np.ones(len(block), np.bool_)
        return standardize(block.astype(np.float64), self.target.is_train, everywhere)[1]

    def _untrained(self, embed_again: Callable[[], Path | str], shots: Shots) -> tuple[Scored, ...]:
        """Score the same layers of a copy that has learnt nothing."""
        made = embed_again()
        if isinstance(made, str):
            self._note(f"the untrained copy was left out: {made}")
            return ()
        with open_embeddings(made) as file:
            if file.ids != self.file.ids:
                self._note(f"the untrained copy was left out: {file.path} holds other records")
                return ()
            features = self._features(file)
            try:
                found = self._sweep(features, fusions=False, kind="untrained")
            except NonFiniteError as error:
                self._note(f"the untrained copy was left out: {error}")
                return ()
            if self.options.preset != "none":
                means = [layer.metrics["mcc"].mean for layer in found.layers]
                shots |= self._shots(UNTRAINED, features[found.layers[int(np.argmax(means))].name])
        return found.layers

    def _score(self, name: str, block: NDArray[np.floating], kind: Kind) -> Scored:
        target = self.target
        return score_block(
            name, block[target.is_train], target.codes, target.folds, task=self.options.task, kind=kind
        )

    def _shots_of_layers(self, features: Mapping[str, NDArray[np.floating]], sweep: Sweep) -> Shots:
        """Score the test split for each layer and for the fusions of all layers."""
        if self.options.preset == "none":
            return {}
        shots: Shots = {}
        for name in features:
            shots |= self._shots(name, features[name])
        if sweep.mix:
            equal = dict.fromkeys(features, 1 / len(features))
            shots |= self._shots(MEAN, mix_layers(features, equal))
            shots |= self._shots(MIX, mix_layers(features, sweep.mix))
        return shots

    def _shots(self, name: str, block: NDArray[np.floating]) -> Shots:
        if self.options.preset == "none":
            return {}
        return {name: score_shots(block, _sorted_codes(self.rows.target), ~self.target.is_train)}

    def _note(self, text: str) -> None:
        logger.warning("%s", text)
        self.notes.append(text)


def _sorted_codes(target: NDArray[np.generic]) -> NDArray[np.int64]:
    """Number the classes in the order of their names, or of their values where all are whole numbers."""
    try:
        ordered: NDArray[np.generic] = target.astype(np.int64)
    except ValueError:
        ordered = target
    return encode_target(ordered, task="classification").astype(np.int64)


def _named_layers(file: EmbeddingFile, layers: int | str | Sequence[int | str] | None) -> list[str]:
    """Find layers of a file by name."""
    if layers is None or layers in ("all", ["all"], ("all",)):
        return file.layers
    asked = [layers] if isinstance(layers, int | str) else list(layers)
    by_number = {str(layer_number(name)): name for name in file.layers}
    names = [by_number.get(str(layer), str(layer)) for layer in asked]
    for name in names:
        _ = file[name]
    return names
