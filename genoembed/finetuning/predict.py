"""Apply a fine-tuned head to sequences: files in, a table out, in constant memory.

``read -> windows -> encoder -> head -> table``. Promised: the same policies for letters, ids and gaps as in
``extract``; sequences longer than the context are seen whole, in windows; the file appears when complete.
"""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from genoembed.config.choices import FailurePolicy
from genoembed.config.fields import named_options
from genoembed.config.files import PredictConfig
from genoembed.config.paths import check_paths, path_strings
from genoembed.errors import ConfigError, EmptyRecordError
from genoembed.finetuning.saved import load_predictor
from genoembed.pipeline.request import use_threads
from genoembed.pipeline.table_parts import keeping_units
from genoembed.pipeline.units import iter_units
from genoembed.sequences import InputCounts, read_sequences
from genoembed.store.reader import spread
from genoembed.store.tables import open_table
from genoembed.tokenization.hf import build_encoder
from genoembed.training.inference import SequenceRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.config.choices import TableFormat
    from genoembed.contracts import SequenceRecord
    from genoembed.finetuning.labels import LabelSpace
    from genoembed.finetuning.saved import SavedPredictor
    from genoembed.pipeline.units import RunStats


__all__ = ["PredictionReport", "predict"]

logger = logging.getLogger(__name__)

PART_RECORDS, PART_BASES = 256, 1 << 20
"""Records, and bases, whose windows are in memory together."""
MULTILABEL_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionReport:
    """What a run did."""

    output: str
    """The table; ``-`` is standard output."""
    num_records: int
    """Records of the table."""
    num_rows: int
    """Rows of the table: one row per record, or one row per base."""
    task: str
    names: tuple[str, ...]
    """Classes, labels or targets."""
    failed: Mapping[str, str]
    """Records without a prediction, by id: why."""
    counts: InputCounts
    """What was read, and what the input policies did."""
    stats: RunStats
    """What the forward passes cost."""
    seconds: float
    """Wall time, without loading the model."""


@named_options(PredictConfig)
def predict(
    model: str | PathLike[str],
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    output: str | PathLike[str] = "-",
    format: TableFormat = "auto",
    overwrite: bool = False,
    on_error: FailurePolicy = "stop",
    batch_rows: int = 16,
    device: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[InputCounts], None] | None = None,
    **policies: Any,
) -> PredictionReport:
    """Predict labels or numbers for the sequences of files, and write a table.

    Columns are ``id`` and, for classes, ``label`` (the likeliest) and ``p_NAME`` for each; for several
    labels, ``labels`` (those of 0.5 or more, joined by commas) and ``p_NAME``; for numbers, one column a
    target; for labels of bases, one row per base with ``id``, ``start``, ``end`` (0-based, half-open),
    ``label`` and ``p_NAME``: those of its token, or the mean of its tokens where k-mers overlap.

    Args:
        model: Folder of a fine-tuning run, or ``final`` in it.
        inputs: Sequence files in any format of ``extract``; ``-`` is standard input.
        output: The table; ``-`` is standard output.
        format: ``tsv``, ``csv``, ``parquet``, or ``auto``: by the name of the output.
        overwrite: Replace an existing file.
        on_error: ``stop`` at a record that fails, or ``skip``: its row has an id and nothing else.
        batch_rows: Windows of a forward pass.
        device: Torch device; None is CUDA if present, else the CPU.
        threads: CPU threads; None leaves torch's choice.
        trust_remote_code: Run code that the folder brings.
        progress: Called with what was read, after each part.
        **policies: ``invalid``, ``duplicates``, ``empty``, ``gaps`` and ``keep_case``, as for ``extract``.
            None stands for the default, which for ``keep_case`` is what training did.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, or the folder holds no model that predicts.
        GenoembedError: If input, model or output fail; the output is then as it was before, and what was
            predicted is kept for the next run of the same call.
    """
    problems = [
        f"{name} is {value}; set {name} to 1 or more"
        for name, value in (("batch_rows", batch_rows), ("threads", threads))
        if value is not None and value < 1
    ]
    if on_error not in get_args(FailurePolicy):
        problems.append(f"on_error is {on_error!r}; set on_error to one of stop, skip")
    if problems:
        raise ConfigError(*problems)
    check_paths(path_strings(inputs), [(output, "table")], may_read=[model], overwrite=overwrite)
    reading = {name: value for name, value in policies.items() if value is not None}
    table = None if output == "-" else os.fspath(output)
    with (
        use_threads(threads),
        keeping_units(table) as kept,
        # before the model is loaded: a second process with the same output is refused at once
        open_table(os.fspath(output), format=format, overwrite=overwrite) as writer,
        torch.inference_mode(),
    ):
        saved = load_predictor(model, device=device, trust_remote_code=trust_remote_code)
        # one for all parts: what it learns of short memory holds for those that follow
        runner = SequenceRunner(
            saved.model.encoder,
            build_encoder(saved.genomic.tokenizer, add_special_tokens=saved.genomic.special_tokens),
            max_tokens=saved.genomic.max_length,
            skip_first=saved.facts.skip_first,
            max_rows=batch_rows,
            skips_failed=on_error == "skip",
        )
        counts = InputCounts()
        reading = {"keep_case": bool(saved.facts.values["keep_case"]), **reading}
        records = read_sequences(inputs, counts=counts, **reading)
        kept.begin(
            lambda: saved.genomic.content,
            policies={**reading, "on_error": on_error},
            stats=runner.stats,
            drop_other=overwrite,
        )
        started = time.perf_counter()
        num_records = num_rows = 0
        for unit in iter_units(records, max_bases=PART_BASES, max_records=PART_RECORDS):
            values = kept.take(unit, partial(_predict, saved, runner, unit.records))
            columns = _columns(saved.space, unit.records, values)
            writer.write_columns(columns)
            num_records += len(unit.records)
            num_rows += len(next(iter(columns.values())))
            if progress is not None:
                progress(counts)
        if not num_records:
            problem = f"no record is left to predict ({counts}); check the input, or set invalid='mask'"
            raise EmptyRecordError(problem, path=str(inputs))
    return PredictionReport(
        output=os.fspath(output),
        num_records=num_records,
        num_rows=num_rows,
        task=saved.facts.task,
        names=saved.space.names,
        failed=kept.failed,
        counts=counts,
        stats=runner.stats,
        seconds=time.perf_counter() - started,
    )


def _predict(
    saved: SavedPredictor, runner: SequenceRunner, records: Sequence[SequenceRecord]
) -> list[list[Any] | str]:
    """Predict a few records: numbers, or bases and their numbers; text where one failed."""
    if saved.space.kind == "token":
        tokens = runner.tokens(saved.model, records)
        of_bases = (spread(item.values["predictions"].numpy(), item.spans) for item in tokens)
        good: Iterator[list[Any]] = iter([item.bases.tolist(), item.values.tolist()] for item in of_bases)
    else:
        vectors = runner.vectors(saved.model, records)
        found = saved.model(vectors=vectors, want="predict")["predictions"] if len(vectors) else vectors
        good = iter(found.float().tolist())
    return [runner.failed.get(index) or next(good) for index in range(len(records))]


def _columns(
    space: LabelSpace, records: Sequence[SequenceRecord], values: Sequence[list[Any] | str]
) -> dict[str, Sequence[object]]:
    """Build the table's rows of a few records."""
    if space.kind == "token":
        return _token_columns(space.names, records, values)
    names, ids = space.names, [record.id for record in records]
    lacking = [math.nan] * len(names)
    predictions: NDArray[Any] = np.array(
        [lacking if isinstance(value, str) else value for value in values], dtype=np.float32
    )
    has_failed = [isinstance(value, str) for value in values]
    columns: dict[str, Any] = {"id": ids}
    if space.kind == "regression":
        return columns | {name: predictions[:, index] for index, name in enumerate(names)}
    probabilities = {f"p_{name}": predictions[:, index] for index, name in enumerate(names)}
    if space.kind == "multilabel":
        chosen = [
            ",".join(name for name, p in zip(names, row, strict=True) if p >= MULTILABEL_THRESHOLD)
            for row in predictions
        ]
    else:
        chosen = [names[index] for index in predictions.argmax(axis=1)]
    column = "labels" if space.kind == "multilabel" else "label"
    labels = [None if failed else label for failed, label in zip(has_failed, chosen, strict=True)]
    return columns | {column: labels, **probabilities}


def _token_columns(
    names: Sequence[str], records: Sequence[SequenceRecord], values: Sequence[list[Any] | str]
) -> dict[str, Sequence[object]]:
    """Build a row per base; a record that failed has one, of its length and without a label."""
    ids: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    labels: list[str | None] = []
    rows = []
    for record, value in zip(records, values, strict=True):
        first, found = ([0], [[math.nan] * len(names)]) if isinstance(value, str) else value
        ids += [record.id] * len(first)
        starts += first
        ends += [len(record.sequence)] if isinstance(value, str) else [base + 1 for base in first]
        rows.append(np.array(found, dtype=np.float32))
        chosen = rows[-1].argmax(axis=1)
        labels += [None] if isinstance(value, str) else [names[index] for index in chosen]
    probabilities = np.concatenate(rows)
    columns: dict[str, Any] = {"id": ids, "start": starts, "end": ends, "label": labels}
    return columns | {f"p_{name}": probabilities[:, index] for index, name in enumerate(names)}
