"""What fine-tuning reaches on labeled sets, beside a frozen probe, k-mers and one-hot letters.

The first rows of each ``NAME.tsv`` of a folder (``sequence<TAB>label``) are dealt into five folds; where
``NAME.groups`` stands beside it, rows of one group share a fold. Seed s tests on fold s; of the rest, an
eighth (whole groups) stops training and chooses the best epoch. Fine-tuning is ``genoembed.finetune``, full
and with LoRA. The frozen probe and the plain features are linear models on the same rows, validation rows
included, with layer, pooling and penalty chosen inside them: ``pooled``, one vector a sequence; ``places``,
also vectors at windows and bases. What is measured is kept in the cache folder, so that a run that was
stopped goes on where it was.

``--tries`` measures variants of the recipe on validation rows of a set, and nothing on test rows; it is how
rates and the base were chosen.

Example::

    python benchmarks/finetuning.py labeled/ --cache kept/ --tries splice_uci --sets
    python benchmarks/finetuning.py labeled/ --cache kept/ --json benchmarks/results/finetuning.json \
        --markdown benchmarks/results/finetuning.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from describe_machine import PACKAGES, describe_machine
from labelled_features import LabeledSet, capture_features, load_which, read_labeled
from threadpoolctl import threadpool_limits

import genoembed
from genoembed.probing.cross_validation import encode_target, score_fold, split_folds
from genoembed.probing.sweep import choose_inside, sweep
from genoembed.sequences.composition import BASELINES, usable_baselines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from labelled_features import Features
    from numpy.typing import NDArray

    from genoembed.config.choices import Task

logger = logging.getLogger("finetuning")

SETS = {
    "splice_uci": 1000,
    "prom_uci106": 106,
    "meth_6ma_yeast": 600,
    "prom_ecoli": 500,
    "reg_plant_prom": 300,
}
"""Sets, and how many of their first rows are taken; of others, as many as of the first."""
RECIPE: dict[str, Any] = {"max_epochs": 6, "layers": "blocks.15"}
"""What differs from the package's defaults: half of the blocks and few epochs, for time."""
ARMS: dict[str, dict[str, Any]] = {
    "full": {"tuning": "full", "learning_rate": 1e-3},
    "lora": {"tuning": "lora", "learning_rate": 3e-3},
    "base": {"tuning": "full", "learning_rate": 1e-3, "at_base": 0.75},
}
"""``base`` learns, as labels of bases, what the state at three quarters of the sequence says."""
OF_PLACES = ("splice_uci", "prom_uci106", "meth_6ma_yeast")
"""Sets for ``base`` and ``places``: windows around a site, of one length."""
TRIES: dict[str, dict[str, Any]] = {
    "full, rate 1.2e-4": {"learning_rate": 1.2e-4, "head_learning_rate": 1e-3},
    "full, rate 1e-3": {"learning_rate": 1e-3},
    "LoRA, rate 1.3e-4": {"tuning": "lora", "learning_rate": 4e-4 / 3, "head_learning_rate": 1e-3},
    "LoRA, rate 3e-3": {"learning_rate": 3e-3, "tuning": "lora"},
    "full, one base, rate 1e-3": {"learning_rate": 1e-3, "at_base": 0.75},
}
"""Variants that were tried, by name, before the recipe was fixed."""
METRICS = {"classification": ("mcc", "accuracy", "macro_f1"), "regression": ("spearman", "pearson", "r2")}
TITLES = {
    **{name: name for name in BASELINES},
    "pooled": "frozen, pooled",
    "places": "frozen, places",
    "lora": "LoRA",
    "full": "full",
    "base": "full, one base",
}
PLAIN = tuple(BASELINES)
TUNED = ("lora", "full", "base")
NUM_FOLDS = 5
VALIDATION_PARTS = 8
BLOCKS_EVERY = 4
DELIMITER, IGNORED = ",", "."
_VERSION = 2


class Parts(NamedTuple):
    """Rows by side."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def part_rows(labeled: LabeledSet, *, seed: int) -> Parts:
    """Deal the rows to the sides; rows of a group stay together.

    Args:
        labeled: The set.
        seed: The fold to test on; also decides which rows validate.

    Returns:
        Row numbers, ascending.
    """
    rest = np.flatnonzero(folds_of(labeled) != seed)
    inner = split_folds(
        labeled.target[rest],
        task=labeled.task,
        groups=None if labeled.groups is None else labeled.groups[rest],
        num_folds=VALIDATION_PARTS,
        seed=seed,
    )
    test = np.flatnonzero(folds_of(labeled) == seed)
    return Parts(rest[inner != 0], rest[inner == 0], test)


def folds_of(labeled: LabeledSet) -> NDArray[np.int64]:
    """Deal the rows into the folds that are tested on."""
    return split_folds(labeled.target, task=labeled.task, groups=labeled.groups, num_folds=NUM_FOLDS, seed=0)


def write_tables(
    labeled: LabeledSet, parts: Parts, folder: Path, *, at_base: float | None = None
) -> dict[str, Path]:
    """Write a table a side, as ``genoembed finetune`` reads it.

    Args:
        labeled: The set.
        parts: Its rows by side.
        folder: Where.
        at_base: Write labels of bases, of which all are ignored but the one at this share of the sequence.

    Returns:
        Files by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for side, rows in parts._asdict().items():
        files[side] = folder / f"{side}.tsv"
        lines = []
        for row in rows:
            sequence, label = labeled.sequences[row].decode(), str(labeled.target[row])
            if at_base is not None:
                label = label_of_base(label, len(sequence), at_base)
            lines.append(f"{sequence}\t{label}")
        files[side].write_text("\n".join(["sequence\tlabel", *lines]) + "\n", encoding="ascii")
    return files


def label_of_base(label: str, bases: int, share: float) -> str:
    """Convert a label of a sequence to labels of its bases, of which one counts.

    Args:
        label: Of the sequence.
        bases: Its length.
        share: Where the base stands, from 0 to below 1.

    Returns:
        A cell of a table.

    Example:
        >>> label_of_base("IE", 4, 0.5)
        '.,.,IE,.'
    """
    labels = [IGNORED] * bases
    labels[int(bases * share)] = label
    return DELIMITER.join(labels)


def fine_tune(
    labeled: LabeledSet, seed: int, settings: Mapping[str, Any], options: argparse.Namespace, *, test: bool
) -> dict[str, Any]:
    """Fine-tune once.

    Args:
        labeled: The set.
        seed: Of split and training.
        settings: For ``genoembed.finetune``.
        options: Of the command.
        test: Whether to measure on test rows.

    Returns:
        Metrics by side, steps, and CPU seconds.
    """
    folder = options.cache / f"run-{labeled.name}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = dict(settings)
    at_base = settings.pop("at_base", None)
    parts = part_rows(labeled, seed=seed)
    files = write_tables(labeled, parts, folder / "tables", at_base=at_base)
    task: Task = labeled.task
    if at_base is not None:
        task = "token"
        settings |= {"label_delimiter": DELIMITER, "ignore_label": IGNORED, "metric": "mcc"}
    started, clock = time.process_time(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", genoembed.errors.GenoembedWarning)
        report = genoembed.finetune(
            files["train"],
            folder / "run",
            task=task,
            validation=files["validation"],
            test=files["test"] if test else None,
            test_fraction=0.0,
            model=options.model,
            seed=seed,
            threads=options.threads,
            **settings,
        )
    curve = [json.loads(line) for line in Path(report.metrics).read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(folder)
    return {
        "test": report.test,
        "validation": report.validation,
        "curve": [line[f"eval_{report.metric}"] for line in curve if f"eval_{report.metric}" in line],
        "best_step": report.best_step,
        "steps": report.steps,
        "cpu_seconds": time.process_time() - started,
        "seconds": time.perf_counter() - clock,
    }


class Candidates(Mapping[str, "NDArray[np.floating]"]):
    """Some of the features that were captured, with the rows asked for.

    Args:
        features: All of them.
        names: Which.
    """

    def __init__(self, features: Features, names: Sequence[str]) -> None:
        self._features, self._names = features, tuple(names)

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        return self._features[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def candidate_names(names: Sequence[str], *, places: bool) -> list[str]:
    """Choose what the frozen probe may choose among.

    Args:
        names: All features, ``PATH KIND``.
        places: Whether to allow vectors at windows and bases.

    Returns:
        Pooled states behind every fourth block, and with ``places`` what is there of windows and bases.
    """
    chosen = []
    for name in names:
        path, kind = name.split(" ")
        is_place = kind in ("windows", "bases")
        number = path.removeprefix("blocks.")
        if is_place:
            if places:
                chosen.append(name)
        elif number.isdigit() and int(number) % BLOCKS_EVERY == BLOCKS_EVERY - 1:
            chosen.append(name)
    return chosen


def probe_frozen(labeled: LabeledSet, options: argparse.Namespace, *, places: bool) -> dict[str, Any]:
    """Score the frozen probe on all five folds."""
    model, weights = load_which(options.model, "trained", dtype="float32", seed=0)
    features = capture_features(model, weights, labeled, options.cache, max_tokens=3000)
    started = time.process_time()
    task = labeled.task
    candidates = Candidates(features, candidate_names(list(features), places=places))
    codes = encode_target(labeled.target, task=task)
    found = sweep(candidates, codes, folds_of(labeled), task=task, average=False)
    inside = choose_inside((*found.layers, *found.fusions), task=task)
    return {
        "folds": {metric: list(summary.values) for metric, summary in inside.metrics.items()},
        "choices": list(inside.chosen),
        "forward_cpu_seconds": features.cpu_seconds,
        "cpu_seconds": time.process_time() - started,
    }


def score_plain(labeled: LabeledSet, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Score composition, k-mers and one-hot letters on the folds that are tested on.

    Args:
        labeled: The set.
        seeds: The folds.

    Returns:
        Metrics by fold, by feature.
    """
    folds, codes = folds_of(labeled), encode_target(labeled.target, task=labeled.task)
    scores: dict[str, dict[str, list[float]]] = {}
    for name in usable_baselines(labeled.sequences):
        matrix = BASELINES[name](labeled.sequences)
        found = [score_fold([matrix], codes, folds, seed, task=labeled.task).metrics for seed in seeds]
        scores[name] = {metric: [one[metric] for one in found] for metric in found[0]}
    return scores


def kept_once(
    name: str, told: Sequence[object], options: argparse.Namespace, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Measure, or take what an earlier run has measured under the same conditions.

    Args:
        name: Of the file.
        told: Conditions.
        options: Of the command; gives the cache folder.
        measure: Measures.

    Returns:
        Plain values.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, options.model, *told], sort_keys=True).encode())
    kept = options.cache / f"{name}-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        part = kept.with_suffix(".part")
        part.write_text(json.dumps(measure()), encoding="utf-8")
        part.replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def measure_set(labeled: LabeledSet, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one set with everything.

    Args:
        labeled: The set.
        options: Of the command.

    Returns:
        ``scores``: metrics by method, a value a seed; and what was chosen and spent.
    """
    rows = [labeled.name, labeled.digest, labeled.target.tolist()]
    scores: dict[str, dict[str, list[float]]] = {}
    details: dict[str, Any] = {}
    for arm in options.arms:
        if arm == "base" and labeled.name not in OF_PLACES:
            continue
        settings = options.recipe | ARMS[arm]
        runs = []
        for seed in options.seeds:
            run = kept_once(
                f"{labeled.name}-{arm}-{seed}",
                [*rows, seed, settings],
                options,
                lambda s=seed, w=settings: fine_tune(labeled, s, w, options, test=True),
            )
            logger.info("%s, %s, seed %d: %s", labeled.name, arm, seed, run["test"])
            runs.append(run)
        scores[arm] = {m: [run["test"][m] for run in runs] for m in METRICS[labeled.task]}
        details[arm] = runs
    kinds = ("pooled", "places") if labeled.name in OF_PLACES else ("pooled",)
    for kind in kinds if options.with_probe else ():
        found = kept_once(
            f"{labeled.name}-{kind}",
            [*rows, kind],
            options,
            lambda k=kind: probe_frozen(labeled, options, places=k == "places"),
        )
        scores[kind] = {m: [found["folds"][m][s] for s in options.seeds] for m in METRICS[labeled.task]}
        details[kind] = found
    if options.with_plain:
        told = [*rows, list(options.seeds)]
        plain = kept_once(f"{labeled.name}-plain", told, options, lambda: score_plain(labeled, options.seeds))
        scores |= {name: {m: v[m] for m in METRICS[labeled.task]} for name, v in plain.items()}
    parts = part_rows(labeled, seed=options.seeds[0])
    return {
        "set": labeled.name,
        "task": labeled.task,
        "rows": {side: len(value) for side, value in parts._asdict().items()},
        "bases": len(labeled.sequences[0]),
        "split": "stratified" if labeled.groups is None else "grouped",
        "scores": scores,
        "details": details,
    }


def run_tries(labeled: LabeledSet, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the variants of the recipe on validation rows.

    Args:
        labeled: The set.
        options: Of the command.

    Returns:
        A row a variant: its settings, and the validation metrics at its best epoch.
    """
    rows = []
    for name, settings in TRIES.items():
        found = kept_once(
            f"try-{labeled.name}",
            [labeled.name, labeled.digest, labeled.target.tolist(), options.recipe | settings],
            options,
            lambda s=settings: fine_tune(labeled, 0, options.recipe | s, options, test=False),
        )
        metric = METRICS[labeled.task][0]
        logger.info("%s: %s %.3f after %s", name, metric, found["validation"][metric], found["curve"])
        epochs = len(found["curve"])
        row = {"variant": name, metric: found["validation"][metric], "loss": found["validation"]["loss"]}
        best = round(found["best_step"] / (found["steps"] / epochs))
        rows.append(row | {"best epoch": f"{best} of {epochs}", "CPU seconds": round(found["cpu_seconds"])})
    return rows


def to_markdown(
    results: Sequence[Mapping[str, Any]], tries: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Format results as tables.

    Args:
        results: As ``measure_set`` gives them.
        tries: Of ``run_tries``, by set.

    Returns:
        Markdown.
    """
    parts = []
    for task, metrics in METRICS.items():
        chosen = [result for result in results if result["task"] == task]
        for metric in metrics if chosen else ():
            parts.append(f"## {task.capitalize()}: {metric}\n\n{score_table(chosen, metric)}")
    if results:
        parts.append(
            "Mean and standard deviation (n - 1) over seeds; each seed has its own test rows. Plain features "
            "and the frozen probe are fitted to training and validation rows, and choose inside them; what "
            "is tuned learns from training rows. The last column is the better tuning less the best plain "
            "feature (the better by the mean on test rows, on both sides), seed by seed; losses in bold.\n"
        )
    for name, rows in tries.items():
        parts.append(f"## Tried on validation rows of {name}\n\n{try_table(rows)}")
    return "\n".join(parts)


def score_table(results: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Format one metric.

    Args:
        results: Sets of one task.
        metric: Its name.

    Returns:
        A Markdown table.
    """
    names = [name for name in TITLES if any(name in result["scores"] for result in results)]
    titles = ["set", "rows: train, validation, test", *(TITLES[name] for name in names)]
    titles.append("tuned - plain")
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for result in results:
        cells = [result["set"], ", ".join(str(count) for count in result["rows"].values())]
        cells += [_cell(result["scores"].get(name, {}).get(metric)) for name in names]
        lines.append(f"| {' | '.join([*cells, difference(result['scores'], metric)])} |")
    return "\n".join(lines) + "\n"


def difference(scores: Mapping[str, Mapping[str, Sequence[float]]], metric: str) -> str:
    """Return the best tuned less the best plain score, as text.

    Args:
        scores: Of one set.
        metric: Which.

    Returns:
        Mean and deviation of the differences by seed; bold where it is a loss.
    """
    best = []
    for group in (TUNED, PLAIN):
        values = [scores[name][metric] for name in group if name in scores]
        if not values:
            return "-"
        best.append(max(values, key=np.mean))
    by_seed = np.subtract(*best)
    spread = f" ± {by_seed.std(ddof=1):.3f}" if len(by_seed) > 1 else ""
    text = f"{by_seed.mean():+.3f}{spread}"
    return f"**{text}**" if by_seed.mean() < 0 else text


def try_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format variants as a Markdown table."""
    lines = [f"| {' | '.join(rows[0])} |", f"|{' --- |' * len(rows[0])}"]
    for row in rows:
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="labeled sets: NAME.tsv, perhaps with NAME.groups")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--model", default="genoembed-mini")
    parser.add_argument(
        "--sets", nargs="*", metavar="NAME", default=None, help="default: those of the script"
    )
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="below 5: folds to test on")
    parser.add_argument("--max-rows", type=int, help="first rows of each set only")
    parser.add_argument("--tries", nargs="+", metavar="NAME", default=[], help="variants, too, on these sets")
    parser.add_argument("--only-tuned", action="store_true", help="no probe and no plain features")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rows and steps: does the script work?")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    options.recipe = RECIPE
    if options.quick:
        options.recipe = {"max_steps": 2}
        options.max_rows, options.seeds = 120, [0]
        options.sets = (options.sets or list(SETS))[:1]
    options.sets = list(SETS) if options.sets is None else options.sets
    options.with_probe = options.with_plain = not options.only_tuned
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure set by set; the files are written anew after each."""
    options = read_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "genoembed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    tries: dict[str, list[dict[str, Any]]] = {}
    with threadpool_limits(options.threads):
        for name in options.tries:
            tries[name] = run_tries(_read(name, options), options)
        for name in options.sets:
            results.append(measure_set(_read(name, options), options))
            write_results(results, tries, options)
        write_results(results, tries, options)
    print(to_markdown(results, tries), end="")


def _read(name: str, options: argparse.Namespace) -> LabeledSet:
    rows = options.max_rows or SETS.get(name, next(iter(SETS.values())))
    return read_labeled(options.folder / f"{name}.tsv", max_rows=rows)


def write_results(
    results: Sequence[Mapping[str, Any]],
    tries: Mapping[str, Sequence[Mapping[str, Any]]],
    options: argparse.Namespace,
) -> None:
    """Write what is there so far.

    Args:
        results: Of sets.
        tries: Of variants, by set.
        options: Of the command.
    """
    machine = describe_machine((*PACKAGES, "peft", "scikit-learn"))
    machine |= {"threads": options.threads, "note": options.note or "none"}
    told = {
        "model": options.model,
        "recipe": options.recipe,
        "arms": {arm: ARMS[arm] for arm in options.arms},
        "rows": {name: options.max_rows or SETS.get(name) for name in options.sets},
        "seeds": options.seeds,
    }
    if options.json:
        values = {"machine": machine, **told, "tries": tries, "sets": results}
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        lines = ["# Fine-tuning on labeled sets", ""]
        lines += [f"- {key}: {value}" for key, value in (machine | told).items()]
        text = "\n".join([*lines, "", to_markdown(results, tries)])
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
