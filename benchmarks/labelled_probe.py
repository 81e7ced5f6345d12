"""What a model's frozen states are worth on labeled sequences, beside an untrained copy and plain features.

For every ``NAME.tsv`` of a folder (``sequence<TAB>label``; where ``NAME.groups`` stands beside it, rows of
one group share a fold, else folds are stratified): features of all layers of the model, and of a copy with
fresh weights, in one pass each; then the sweep of ``genoembed probe`` over all of them, with layer, pooling
and combination chosen inside the training folds; and the baselines on the same folds. Finished sets and
features are kept in the cache folder, so that a run that was stopped goes on where it was; give another
folder to measure anew.

Example::

    python benchmarks/labelled_probe.py labeled/ --cache features/ --model genoembed-mini \
        --json benchmarks/results/labelled_probe.json --markdown benchmarks/results/labelled_probe.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from describe_machine import PACKAGES, describe_machine
from labelled_features import BothStrands, Features, LabeledSet, capture_features, load_which, read_labeled
from threadpoolctl import threadpool_limits

from genoembed.probing.cross_validation import METRICS, encode_target, split_folds
from genoembed.probing.sweep import choose_inside, score_block, shown, sweep
from genoembed.sequences.composition import BASELINES, usable_baselines

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed import GenomicModel

logger = logging.getLogger("labelled_probe")

WHICH = ("untrained", "trained")
NUM_FOLDS = 5
SEED = 0
SPREAD_EVERY = 8
_VERSION = 2


def fusions_of(names: Sequence[str], paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Combine layers spread over the depth, of both streams, and places with pooled states.

    Args:
        names: All features, ``PATH POOL``.
        paths: Module paths, numbered layers first and then, where they are others, the blocks.

    Returns:
        Features to lay side by side, by name.
    """
    blocks = [path for path in paths if not path.endswith(".mlp.l3")]
    layers = [path for path in paths if path not in blocks]
    fusions = {}
    for title, stream in (("blocks", blocks), ("layers", layers)):
        spread = stream[SPREAD_EVERY // 2 :: SPREAD_EVERY]
        if len(spread) > 1:
            pools = ("mean",), ("mean", "weighted_mean"), ("mean", "weighted_mean", "std")
            for chosen in pools:
                members = tuple(f"{path} {pool}" for path in spread for pool in chosen)
                fusions[f"{len(spread)} {title} {'+'.join(chosen)}"] = members
                # three ways of pooling on both strands are some thousand features: too dear for every fold
                if f"{members[0]} rc" in names and len(chosen) < 3:
                    both = (*members, *(f"{name} rc" for name in members))
                    fusions[f"{len(spread)} {title} {'+'.join(chosen)}, both strands"] = both
    for kind in ("windows", "bases"):
        places = [name for name in names if name.endswith(f" {kind}")]
        if places:
            early, late = places[len(places) // 4], places[len(places) * 3 // 4]
            pooled = (f"{name.removesuffix(kind)}mean" for name in (early, late))
            fusions[f"{kind} and means"] = tuple(dict.fromkeys((early, *pooled)))
    return fusions


def measure_set(labeled: LabeledSet, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one set: baselines, untrained copy and model on the same folds.

    Args:
        labeled: The set.
        options: Of the command.

    Returns:
        Everything that the tables need, as plain values; only the models asked for.
    """
    result: dict[str, Any] = {
        "set": labeled.name,
        "rows": len(labeled.target),
        "task": labeled.task,
        "classes": _class_counts(labeled),
        "bases": sum(len(sequence) for sequence in labeled.sequences),
        "folds": "stratified" if labeled.groups is None else "grouped",
        "baselines": kept_once(labeled, "baselines", (), options, lambda: measure_baselines(labeled)),
        "models": {},
    }
    for which in options.which:
        model, weights = load_which(options.model, which, dtype=options.dtype, seed=SEED)
        told = (weights, options.dtype, options.strands)
        result["models"][which] = kept_once(
            labeled, which, told, options, lambda m=model, w=weights: measure_model(m, w, labeled, options)
        )
        logger.info("%s: %s measured", labeled.name, which)
    return result


def measure_baselines(labeled: LabeledSet) -> dict[str, Any]:
    """Score composition, k-mers and, for equal lengths, one-hot letters.

    Args:
        labeled: The set.

    Returns:
        Metrics by name of the baseline.
    """
    folds, codes = _folds_and_codes(labeled)
    baselines = {}
    for name in usable_baselines(labeled.sequences):
        matrix = BASELINES[name](labeled.sequences)
        found = score_block(name, matrix, codes, folds, task=labeled.task, kind="baseline")
        baselines[name] = {metric: asdict(summary) for metric, summary in found.metrics.items()}
        logger.info("%s: %s %s", labeled.name, name, shown(found, labeled.task))
    return baselines


def _folds_and_codes(labeled: LabeledSet) -> tuple[NDArray[np.int64], NDArray[np.generic]]:
    folds = split_folds(
        labeled.target, task=labeled.task, groups=labeled.groups, num_folds=NUM_FOLDS, seed=SEED
    )
    return folds, encode_target(labeled.target, task=labeled.task)


def measure_model(
    model: GenomicModel, weights: str, labeled: LabeledSet, options: argparse.Namespace
) -> dict[str, Any]:
    """Score what the probe makes of a model's states.

    Args:
        model: The model.
        weights: Digest of its weights.
        labeled: The set.
        options: Of the command.

    Returns:
        Metrics, choices and CPU seconds.
    """
    features = features_of(model, weights, labeled, options)
    started = time.process_time()
    found = probe_features(features, labeled)
    if options.drop_features:
        for folder in features.folders:
            shutil.rmtree(folder)
    return found | {
        "forward_cpu_seconds": features.cpu_seconds,
        "probe_cpu_seconds": time.process_time() - started,
    }


def kept_once(
    labeled: LabeledSet,
    what: str,
    told: tuple[str, ...],
    options: argparse.Namespace,
    measure: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Measure, or take what an earlier run has measured on the same rows under the same conditions.

    Args:
        labeled: The set.
        what: What is measured; part of the file's name.
        told: Further conditions.
        options: Of the command; gives the cache folder.
        measure: Measures.

    Returns:
        Plain values.
    """
    conditions = json.dumps([_VERSION, what, *told, labeled.digest, str(labeled.target.tolist())])
    name = f"{labeled.name}-{what}-{hashlib.sha256(conditions.encode()).hexdigest()[:16]}.json"
    kept = options.cache / name
    if not kept.exists():
        part = kept.with_suffix(".part")
        part.write_text(json.dumps(measure()), encoding="utf-8")
        part.replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def features_of(
    model: GenomicModel, weights: str, labeled: LabeledSet, options: argparse.Namespace
) -> Features | BothStrands:
    """Run the model over one strand or both, or find what an earlier run has kept."""
    strands = [labeled, labeled.reverse_complement()][: 1 + (options.strands == "both")]
    found = [
        capture_features(model, weights, strand, options.cache, max_tokens=options.batch_tokens)
        for strand in strands
    ]
    return BothStrands(*found) if len(found) > 1 else found[0]


def probe_features(features: Features | BothStrands, labeled: LabeledSet) -> dict[str, Any]:
    """Choose among all features of a model and their fusions inside the training folds, and score the choice.

    Args:
        features: Of one model.
        labeled: Their set.

    Returns:
        Metrics of the choice, what was chosen for each fold, and the first metric of every candidate.
    """
    folds, codes = _folds_and_codes(labeled)
    joined = fusions_of(list(features), features.paths)
    found = sweep(features, codes, folds, task=labeled.task, joined=joined, average=False)
    candidates = (*found.layers, *found.fusions)
    inside = choose_inside(candidates, task=labeled.task)
    logger.info("%s: %s", labeled.name, shown(inside, labeled.task))
    members = {candidate.name: candidate.members for candidate in candidates}
    means = {one.name: one.metrics[METRICS[labeled.task][0]].mean for one in candidates}
    return {
        "metrics": {metric: asdict(summary) for metric, summary in inside.metrics.items()},
        "choices": [
            {"fold": fold, "candidate": name, "members": members[name][fold]}
            for fold, name in enumerate(inside.chosen)
        ],
        "recommended": max(means, key=means.__getitem__),
        "candidates": {name: round(mean, 4) for name, mean in means.items()},
    }


def _class_counts(labeled: LabeledSet) -> dict[str, int]:
    if labeled.task == "regression":
        return {}
    return dict(sorted(Counter(str(label) for label in labeled.target).items()))


def to_markdown(sets: Sequence[Mapping[str, Any]]) -> str:
    """Format results as tables, one per metric.

    Args:
        sets: As ``measure_set`` gives them.

    Returns:
        Markdown.
    """
    parts = []
    for task in ("classification", "regression"):
        chosen = [result for result in sets if result["task"] == task]
        for metric in METRICS[task] if chosen else ():
            parts.append(f"## {task.capitalize()}: {metric}\n\n{_table(chosen, metric)}")
    return "\n".join(parts) + "\n" + _summary(sets)


def _table(sets: Sequence[Mapping[str, Any]], metric: str) -> str:
    titles = ["set", "rows", "folds", *BASELINES, "untrained", "trained", "chosen most often"]
    titles += ["- untrained", "- 6-mer", "- best baseline"]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for result in sets:
        trained, untrained = result["models"]["trained"], result["models"]["untrained"]
        cells = [result["set"], str(result["rows"]), result["folds"]]
        cells += [_cell(result["baselines"].get(name, {}).get(metric)) for name in BASELINES]
        cells += [_cell(untrained["metrics"][metric]), f"**{_cell(trained['metrics'][metric])}**"]
        cells += [_most_chosen(trained["choices"])]
        cells += [
            _difference(trained["metrics"][metric], untrained["metrics"][metric]),
            _difference(trained["metrics"][metric], result["baselines"]["6-mer counts"][metric]),
            _difference(trained["metrics"][metric], _best_baseline(result, metric)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(summary: Mapping[str, Any] | None) -> str:
    return "-" if summary is None else f"{summary['mean']:.3f} ± {summary['sd']:.3f}"


def _most_chosen(choices: Sequence[Mapping[str, Any]]) -> str:
    members, count = Counter(tuple(choice["members"]) for choice in choices).most_common(1)[0]
    shown = members[0] if len(members) == 1 else f"{len(members)} features, {members[0]} first"
    return f"{shown} ({count} of {len(choices)})"


def _best_baseline(result: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    return max((scores[metric] for scores in result["baselines"].values()), key=lambda score: score["mean"])


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return the mean of the differences by fold and their standard deviation; bold where it is a loss."""
    by_fold = np.subtract(first["values"], second["values"])
    text = f"{by_fold.mean():+.3f} ± {by_fold.std(ddof=1):.3f}"
    return f"**{text}**" if by_fold.mean() < 0 else text


def _summary(sets: Sequence[Mapping[str, Any]]) -> str:
    counts = {}
    for name in ("untrained copy", "6-mer", "best baseline"):
        wins = 0
        for result in sets:
            metric = METRICS[result["task"]][0]
            others = {
                "untrained copy": result["models"]["untrained"]["metrics"][metric],
                "6-mer": result["baselines"]["6-mer counts"][metric],
                "best baseline": _best_baseline(result, metric),
            }
            wins += result["models"]["trained"]["metrics"][metric]["mean"] > others[name]["mean"]
        counts[name] = wins
    shown = ", ".join(f"the {name} on {wins}" for name, wins in counts.items())
    return (
        f"Of {len(sets)} sets the trained model is above {shown} (by MCC, or R2 for regressions).\n"
        "Mean and standard deviation (n - 1) over five test folds; differences are taken fold by fold, "
        "losses in bold.\n"
    )


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="labeled sets: NAME.tsv, perhaps with NAME.groups")
    parser.add_argument("--cache", type=Path, required=True, help="folder for features and finished sets")
    parser.add_argument("--model", default="genoembed-mini")
    parser.add_argument(
        "--which",
        nargs="+",
        choices=WHICH,
        default=WHICH,
        help="only these; the tables are written by a run with both",
    )
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--max-rows", type=int, help="first rows of each set only")
    parser.add_argument(
        "--strands",
        choices=("forward", "both"),
        default="forward",
        help="both: features of the reverse complement too, at twice the time",
    )
    parser.add_argument("--dtype", default="bfloat16", help="type of weights and states while running")
    parser.add_argument("--batch-tokens", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drop-features", action="store_true", help="delete a set's features when done")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(arguments)


def find_sets(folder: Path, names: Sequence[str] | None) -> list[Path]:
    """List the tables to measure.

    Args:
        folder: Where they are.
        names: Only these; None takes all.

    Returns:
        Paths in the order of their names.

    Raises:
        ValueError: If there is none, or a name is not there.
    """
    found = {path.stem: path for path in sorted(folder.glob("*.tsv"))}
    missing = [name for name in names or () if name not in found]
    if missing or not found:
        raise ValueError(
            f"{folder}: {missing or 'no NAME.tsv'} not there; it has {', '.join(found) or 'none'}"
        )
    return [path for name, path in found.items() if names is None or name in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure set by set; the files are written anew after each."""
    options = read_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    paths = find_sets(options.folder, options.sets)
    results = []
    with threadpool_limits(options.threads):
        for path in paths:
            results.append(measure_set(read_labeled(path, max_rows=options.max_rows), options))
            if set(options.which) == set(WHICH):
                _write(results, options)
    if set(options.which) == set(WHICH):
        print(to_markdown(results), end="")


def _write(results: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    if options.json:
        machine = describe_machine((*PACKAGES, "scikit-learn"))
        told = {
            "machine": machine | {"threads": options.threads, "note": options.note},
            "model": options.model,
            "dtype": options.dtype,
            "strands": options.strands,
            "folds": NUM_FOLDS,
            "seed": SEED,
            "max_rows": options.max_rows,
            "sets": results,
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(to_markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
