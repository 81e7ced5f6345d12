"""Apply a fine-tuned head to sequences: files in, a table out, in constant memory.

``read -> windows -> encoder -> head -> table``. Promised: the same policies for letters, ids and gaps as in
``extract``; sequences longer than the context are seen whole, in windows; the file appears when complete.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.config.fields import named_options
from genoembed.config.files import PredictConfig
from genoembed.config.paths import check_paths, path_strings
from genoembed.errors import ConfigError, EmptyRecordError
from genoembed.finetuning.saved import load_predictor
from genoembed.pipeline.request import use_threads
from genoembed.pipeline.units import iter_units
from genoembed.sequences import InputCounts, read_sequences
from genoembed.store.tables import open_table
from genoembed.tokenization.hf import build_encoder
from genoembed.training.inference import SequenceRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from genoembed.config.choices import TableFormat
    from genoembed.contracts import SequenceRecord
    from genoembed.finetuning.saved import SavedPredictor
    from genoembed.training.inference import TokenValues


__all__ = ["PredictionReport", "predict"]

logger = logging.getLogger(__name__)

PART_RECORDS, PART_BASES = 256, 1 << 20
"""Records, and bases, whose windows are in memory together."""
MULTILABEL_THRESHOLD = 0.5
_POLICIES = ("invalid", "duplicates", "empty", "gaps", "keep_case")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionReport:
    """What a run did."""

    output: str
    """The table; ``-`` is standard output."""
    num_records: int
    """Records that were predicted."""
    num_rows: int
    """Rows of the table: one row per record, or one row per token."""
    task: str
    names: tuple[str, ...]
    """Classes, labels or targets."""
    counts: InputCounts
    """What was read, and what the input policies did."""
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
    target; for labels of bases, one row per token with ``id``, ``start``, ``end`` (0-based, half-open),
    ``label`` and ``p_NAME``.

    Args:
        model: Folder of a fine-tuning run, or ``final`` in it.
        inputs: Sequence files in any format of ``extract``; ``-`` is standard input.
        output: The table; ``-`` is standard output.
        format: ``tsv``, ``csv``, ``parquet``, or ``auto``: by the name of the output.
        overwrite: Replace an existing file.
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
        GenoembedError: If input, model or output fail; the output is then as it was before.
    """
    problems = [
        f"{name} is {value}; set {name} to 1 or more"
        for name, value in (("batch_rows", batch_rows), ("threads", threads))
        if value is not None and value < 1
    ]
    if problems:
        raise ConfigError(*problems)
    check_paths(path_strings(inputs), [(output, "table")], may_read=[model], overwrite=overwrite)
    with use_threads(threads):
        saved = load_predictor(model, device=device, trust_remote_code=trust_remote_code)
        # one for all parts: what it learns of short memory holds for those that follow
        runner = SequenceRunner(
            saved.model.encoder,
            build_encoder(saved.genomic.tokenizer),
            max_tokens=saved.genomic.max_length,
            skip_first=saved.facts.skip_first,
            max_rows=batch_rows,
        )
        counts = InputCounts()
        records = read_sequences(
            inputs,
            counts=counts,
            **{
                "keep_case": bool(saved.facts.values["keep_case"]),
                **{name: value for name, value in policies.items() if value is not None},
            },
        )
        started = time.perf_counter()
        table = open_table(os.fspath(output), format=format, overwrite=overwrite)
        num_records = num_rows = 0
        with table as writer, torch.inference_mode():
            for unit in iter_units(records, max_bases=PART_BASES, max_records=PART_RECORDS):
                columns = _columns(saved, runner, unit.records)
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
        counts=counts,
        seconds=time.perf_counter() - started,
    )


def _columns(
    saved: SavedPredictor, runner: SequenceRunner, records: Sequence[SequenceRecord]
) -> dict[str, Sequence[object]]:
    """Predict a few records."""
    sequences = [record.sequence for record in records]
    ids = [record.id for record in records]
    if saved.space.kind == "token":
        outputs = runner.tokens(saved.model, records)
        return _token_columns(ids, sequences, outputs, saved.space.names)
    vectors = runner.vectors(saved.model, records)
    predictions = saved.model(vectors=vectors, want="predict")["predictions"].float().cpu().numpy()
    names = saved.space.names
    if saved.space.kind == "regression":
        return {"id": ids, **{name: predictions[:, index] for index, name in enumerate(names)}}
    probabilities = {f"p_{name}": predictions[:, index] for index, name in enumerate(names)}
    if saved.space.kind == "multilabel":
        chosen = [
            ",".join(name for name, p in zip(names, row, strict=True) if p >= MULTILABEL_THRESHOLD)
            for row in predictions
        ]
        return {"id": ids, "labels": chosen, **probabilities}
    return {"id": ids, "label": [names[index] for index in predictions.argmax(axis=1)], **probabilities}


def _token_columns(
    ids: Sequence[str], sequences: Sequence[bytes], outputs: Sequence[TokenValues], names: Sequence[str]
) -> dict[str, Sequence[object]]:
    probabilities = np.concatenate([output.values["predictions"].numpy() for output in outputs])
    starts = [output.starts for output in outputs]
    ends = [np.append(start[1:], len(sequence)) for start, sequence in zip(starts, sequences, strict=True)]
    columns: dict[str, Any] = {
        "id": [name for name, start in zip(ids, starts, strict=True) for _ in start],
        "start": np.concatenate(starts),
        "end": np.concatenate(ends),
        "label": [names[index] for index in probabilities.argmax(axis=1)],
    }
    return columns | {f"p_{name}": probabilities[:, index] for index, name in enumerate(names)}
