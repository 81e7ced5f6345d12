"""Run a probe: options, labels and the folder are checked, layers embedded and measured, results written.

Promised: whatever can be refused without a model is refused before torch is imported; one process at a time
writes a folder; results that are there stay until new ones are complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from genoembed.atomic import lock, partial_of, put_in_place, reporting_writes, take_back, write_text
from genoembed.config.embed import InputConfig, default_output
from genoembed.config.fields import raise_all, unknown_option
from genoembed.config.probe import EXTRACTION_KEYS, FIXED, ProbeConfig
from genoembed.errors import (
    ConfigError,
    MissingOptionError,
    Problem,
    Remedy,
    StoreError,
    check_installed,
)
from genoembed.pipeline.embedding_file import find_embedding_file, find_file_settings
from genoembed.plotting.layers import SUMMARY, DrawnScore, LayerScores
from genoembed.probing.cross_validation import METRIC_WORDS, METRICS
from genoembed.probing.recommendation import choose_layer, extraction_line, transform_note
from genoembed.probing.report import (
    ProbeReport,
    compare_baselines,
    describe_classes,
    metric_names,
    verdict,
)
from genoembed.probing.rows import (
    RecordTable,
    assign_folds,
    check_labels,
    group_rows,
    join_labels,
    read_labels,
)
from genoembed.probing.sweep import choose_inside
from genoembed.sequences import read_sequences
from genoembed.sequences.formats import holds_records
from genoembed.store import open_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats
    from genoembed.probing.rows import LabelTable
    from genoembed.probing.scoring import ProbeRun, ProbeScores
    from genoembed.store import EmbeddingFile


def divide_options(options: Mapping[str, Any]) -> tuple[ProbeConfig, dict[str, Any]]:
    """Split options into those of the probe and those of the extraction.

    Example:
        >>> mine, rest = divide_options({"cv": "homology", "window": 500, "device": None})
        >>> mine.cv, rest
        ('homology', {'window': 500})
    """
    given = {name: value for name, value in options.items() if value is not None}
    own = ProbeConfig.options()
    raise_all(
        f"{name} is decided by the probe; leave it out"
        if name in FIXED
        else unknown_option(name, (*own, *EXTRACTION_KEYS))
        for name in sorted(set(given) - {*own, *EXTRACTION_KEYS})
    )
    mine = ProbeConfig.build({name: value for name, value in given.items() if name in own})
    return mine, {name: value for name, value in given.items() if name not in own}


PLOTS: Mapping[str, Literal["png", "svg"]] = {"layers.png": "png", "layers.svg": "svg"}
EMBEDDINGS, UNTRAINED = "embeddings.h5", "untrained.h5"
_OWN = re.compile(
    r"probe\.json|layers\.(png|svg)|(embeddings|untrained)\.(h5|parts)"
    r"|\.(probe\.json|layers\.(png|svg)|(embeddings|untrained)\.h5)\.partial"
)
"""Names in a folder of results; one with others is not written into."""


def probe(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    labels: str | PathLike[str] | None = None,
    model: str | PathLike[str] | GenomicModel | None = None,
    layers: int | str | Sequence[int | str] | None = None,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[RunStats], None] | None = None,
    **options: Any,
) -> ProbeReport:
    """Measure which layer of a model predicts a label, and whether plain sequence features do as well.

    One pass takes the pooled states of all layers into a file, which stays. Each layer, and fusions of them,
    then get the same cross-validated linear probe: logistic regression for classes, ridge regression for
    values.

    Args:
        inputs: Sequence files, or one pooled embedding file, whose layers are probed as they are.
        labels: Table with one row per record: TSV, CSV, JSON lines or Parquet. None where ``inputs`` is such
            a table, with a column ``sequence``, as ``finetune`` takes it.
        model: As for ``extract``; for an embedding file, where the untrained copy's configuration is, if not
            where the file says.
        layers: As for ``extract``; None is ``all``. For an embedding file, names of its layers.
        output: Folder for the results; None is the first input's stem and ``.probe``.
        overwrite: Replace earlier results, and vectors that other settings made.
        progress: As for ``extract``.
        **options: Fields of :class:`~genoembed.config.probe.ProbeConfig`: ``task``, ``cv``,
            ``num_folds``, ``seed``, ``id_column``, ``label_column``, ``group_column``, ``split_column``,
            ``split``, ``unmatched``, ``homolog_identity``, ``top``, ``baselines``, ``untrained``, ``preset``,
            ``sequences``, ``plot``. For sequences also options of ``extract``: ``pooling``, ``window``,
            ``dtype``, ``device`` and so on. None stands for the default.

    Returns:
        Scores, a recommendation, and what it is worth.

    Raises:
        ConfigError: If options are wrong, or labels and records do not go together.
        GenoembedError: If input, model or output fail.
    """
    names = [fspath(inputs)] if isinstance(inputs, str | PathLike) else [fspath(name) for name in inputs]
    wanted, extraction = divide_options(options)
    given = find_embedding_file(names, what="inputs")
    folder = Path(default_output(names[0])).with_suffix(".probe") if output is None else Path(output)
    _check_packages(wanted)
    written = [SUMMARY, *(PLOTS if wanted.plot else ())]
    with _claimed(folder, written, overwrite=overwrite) as place:
        table = read_labels(_table_of(names, labels, given), wanted, has_sequences=labels is None)
        check_labels(table, wanted)
        places = extraction.get("regions") or ()
        read = [*names, *([places] if isinstance(places, str | PathLike) else places)]
        # what can be read only once is left to the pass, and checked after it
        is_checked = given is None and not any(map(_is_read_once, read))
        if is_checked:
            _check_records(names, table, wanted, extraction)
        started = time.perf_counter()
        # not at the top: importing torch takes seconds, and all that came before may have been refused
        from genoembed.probing.scoring import ProbeRun
        from genoembed.probing.vectors import embed_layers, embed_untrained

        if given is None:
            found = embed_layers(
                names,
                place / EMBEDDINGS,
                model="genoembed-mini" if model is None else model,
                overwrite=overwrite,
                progress=progress,
                layers="all" if layers is None else layers,
                **extraction,
            )
            was_extracted = found.seconds > 0
        else:
            _check_file_options(given, extraction)
            was_extracted = False
        seconds = {"pass": time.perf_counter() - started}
        with open_embeddings(place / EMBEDDINGS if given is None else given) as file:
            run = ProbeRun(file, table, wanted, None if given is None else layers, is_checked=is_checked)
            measured = run.measure(
                lambda: embed_untrained(
                    file,
                    place / UNTRAINED,
                    model=model,
                    seed=wanted.seed,
                    overwrite=overwrite,
                    sequences=wanted.sequences,
                    progress=progress,
                    options=extraction,
                )
            )
            report = _build_report(run, measured, folder)
            pooling = _pooling(file)
        report = replace(
            report,
            embeddings=folder / EMBEDDINGS if given is None else report.embeddings,
            was_extracted=was_extracted,
            seconds={**seconds, **report.seconds},
        )
        with reporting_writes(folder):
            if wanted.plot:
                report = replace(report, plots=_plot(report, pooling, place))
            # last: a folder with this file is complete
            write_text(place / SUMMARY, json.dumps(report.to_dict(), indent=1) + "\n")
    return report


def _check_records(
    names: Sequence[str], table: LabelTable, options: ProbeConfig, extraction: Mapping[str, Any]
) -> None:
    """Join labels with records and assign folds before a model loads, so that what is wrong shows at once."""
    reading = {name: value for name, value in extraction.items() if name in InputConfig.options()}
    ids: list[str] = []
    sources: list[str] = []
    sequences: list[bytes] = []
    for record in read_sequences(names, **reading):
        ids.append(record.id)
        sources.append(record.source)
        if options.cv == "homology":
            sequences.append(record.sequence[record.core_start : record.core_end])
    records = RecordTable(path=Path(names[0]), ids=ids, sources=sources)
    rows = join_labels(records, table, options)
    kept = [sequences[row] for row in rows.rows] if sequences else None
    assign_folds(rows, group_rows(records, rows, table, options, kept), options)


def _table_of(names: Sequence[str], labels: str | PathLike[str] | None, given: Path | None) -> str:
    """Return the table that has the labels: the one that is named, or the input itself."""
    if labels is not None:
        return fspath(labels)
    if _is_read_once(names[0]) and names[0] != "-":
        message = f"{names[0]}: a table is read twice, for its labels and its sequences; name a file, no pipe"
        raise ConfigError(message)
    if len(names) > 1 or given is not None or holds_records(names[0]):
        problem = Problem(
            f"{names[0]} has sequences, but no labels", Remedy("labels", words="the table of their labels")
        )
        raise MissingOptionError(problem, key="labels")
    return names[0]


def _is_read_once(name: str | PathLike[str]) -> bool:
    """Return whether a name is standard input, a pipe or another stream, which is empty when read again."""
    path = Path(name)
    return fspath(name) == "-" or (path.exists() and not path.is_file() and not path.is_dir())


@contextmanager
def _claimed(folder: Path, written: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield where results are written: the folder, or one beside it that replaces it once it is complete.

    No other process has it meanwhile. What a killed run left there is gone on with.
    """
    take_back(folder)
    if folder.exists() and not folder.is_dir():
        problem = "is a file, expected a folder; set output to another name"
        raise StoreError(problem, path=str(folder))
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if _OWN.fullmatch(path.name) is None:
            problem = f"holds {path.name!r}, which no probe wrote; set output to another folder, or move it"
            raise StoreError(problem, path=str(folder))
    there = [name for name in written if (folder / name).exists()]
    if there and not overwrite:
        problem = Problem(
            f"{there[0]} exists already", Remedy("overwrite", True), ", or choose another folder"
        )
        raise StoreError(problem, path=str(folder))
    beside = partial_of(folder)
    made = [path for path in (beside if there else folder, *folder.parents) if not path.exists()]
    locks: list[int] = []
    try:
        with reporting_writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(lock(folder, output=folder))
            if (beside / SUMMARY).exists():  # the old results, where a kill came between exchange and removal
                shutil.rmtree(beside)
            if there:
                beside.mkdir(exist_ok=True)
                locks.append(lock(beside, output=folder))
                _link_vectors(folder, beside)
        yield beside if there else folder
        if there:
            put_in_place(beside, folder)
            shutil.rmtree(beside, ignore_errors=True)
    finally:
        for path in made if locks else []:  # folders made here in which nothing was put
            with suppress(OSError):
                path.rmdir()
        for descriptor in locks:
            os.close(descriptor)


def _link_vectors(old: Path, new: Path) -> None:
    """Give a folder the vectors of an earlier run: with the same settings, they are used again."""
    for name in (EMBEDDINGS, UNTRAINED):
        if (old / name).exists() and not (new / name).exists():
            try:
                os.link(old / name, new / name)
            except OSError:  # a file system without links
                shutil.copyfile(old / name, new / name)


def _build_report(run: ProbeRun, measured: ProbeScores, folder: Path) -> ProbeReport:
    """Build the report from scores, text and options."""
    options, sweep = run.options, measured.sweep
    task, metric, pooling = options.task, METRICS[options.task][0], _pooling(run.file)
    inside = choose_inside(sweep.layers, task=task)
    again = choose_inside(measured.untrained, task=task) if measured.untrained else None
    others = [(one.name, one.metrics[metric]) for one in measured.baselines]
    others += [] if again is None else [("the untrained copy", again.metrics[metric])]
    comparisons = compare_baselines(inside, others, task=task)
    either = choose_inside((*sweep.layers, *sweep.fusions), task=task) if sweep.fusions else None
    choice = choose_layer(sweep.layers, either or inside, fusions=sweep.fusions, pooling=pooling, task=task)
    return ProbeReport(
        output=folder,
        embeddings=run.file.path,
        was_extracted=False,
        task=task,
        metrics=metric_names(task),
        cv=options.cv,
        num_folds=options.num_folds,
        num_groups=run.target.num_groups,
        num_rows=int(run.target.is_train.sum()),
        counts=run.rows.counts,
        classes=describe_classes(run.rows.target.tolist()) if task == "classification" else {},
        layers=sweep.layers,
        fusions=sweep.fusions,
        baselines=measured.baselines,
        untrained=measured.untrained,
        inside=inside,
        inside_fusion=either,
        inside_untrained=again,
        choice=choice,
        command=extraction_line(run.file.provenance, choice, weights=sweep.mix, are_all=_are_all(run)),
        comparisons=tuple(comparisons),
        verdict=verdict(inside, comparisons, task=task),
        fusion_weights=sweep.mix,
        shots=measured.shots,
        num_test=int((~run.target.is_train).sum()),
        notes=tuple(filter(None, (transform_note(choice, run.transform_files), *run.notes))),
        plots=(),
        seconds=measured.seconds,
    )


def _are_all(run: ProbeRun) -> bool:
    """Return whether the layers that are probed are what ``all`` means to the model."""
    settings = find_file_settings(run.file)
    return (
        settings is not None and settings.requested_layers == ("all",) and list(run.layers) == run.file.layers
    )


def _pooling(file: EmbeddingFile) -> str | None:
    settings = find_file_settings(file)
    return None if settings is None else settings.pooling


def _plot(report: ProbeReport, pooling: str | None, place: Path) -> tuple[Path, ...]:
    metric = METRICS[report.task][0]
    folds = f"{report.num_folds} {report.cv} folds"
    layers, lines, untrained = (
        [DrawnScore(one.name, one.kind, one.metrics[metric].mean, one.metrics[metric].sd) for one in group]
        for group in (report.layers, (*report.fusions, *report.baselines), report.untrained)
    )
    scores = LayerScores(
        layers=layers,
        lines=lines,
        untrained=untrained,
        chosen=report.choice.name,
        metric=METRIC_WORDS[metric],
        title=f"{report.num_rows:,} rows, {folds}, {pooling or 'stored'} pooling",
    )
    for name, kind in PLOTS.items():
        (place / name).write_bytes(scores.draw(kind))
    return tuple(report.output / name for name in PLOTS)


def _check_packages(options: ProbeConfig) -> None:
    """Raise if vectors could not be probed or drawn, before a pass makes them."""
    check_installed("sklearn", package="scikit-learn", extra="analysis", purpose="a probe")
    if options.plot:
        check_installed("matplotlib", extra="analysis", purpose="a plot by layer")


def _check_file_options(file: Path, options: Mapping[str, Any]) -> None:
    allowed = {"batch_tokens", "device", "threads", "trust_remote_code", "unit_bases"}
    if useless := sorted(set(options) - allowed):
        message = f"{', '.join(useless)}: the rows of {file} are embedded already; leave it out"
        raise ConfigError(message)
