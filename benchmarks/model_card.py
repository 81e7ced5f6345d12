"""The tables of a model card: labeled sets, nearest neighbors, and fragments that are found again.

``measure`` runs one model (or none: counts of k-mers and one-hot letters) and files its figures; ``table``
prints several such files side by side. One pass per set gives the vectors: mean over tokens of layers 28, 24
and ``final`` side by side, of 28 and 24, of 28, of ``final``, and means and deviations of all three. Each has
the probe of ``genoembed probe`` on the same folds; *nearest* is the share of rows whose nearest other row, by
plain cosine, has their label. *Found again*: queries are 100 bases of windows of 200 bases from held-out
contigs, with letters replaced; the mean of one over the rank of the window. With ``--each-layer``, the mean
of every block's output by itself instead::

    python benchmarks/model_card.py measure labeled/ --heldout heldout.fa --output mini.json
    python benchmarks/model_card.py measure labeled/ --heldout heldout.fa --model none --output counts.json
    python benchmarks/model_card.py measure labeled/ --heldout heldout.fa --untrained --output untrained.json
    python benchmarks/model_card.py table mini.json untrained.json counts.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bits_per_base import read_groups
from labelled_features import load_which, read_labeled
from search_modes import jaccard
from threadpoolctl import threadpool_limits

import genoembed
from genoembed.probing.cross_validation import METRICS, encode_target, split_folds
from genoembed.probing.sweep import score_block
from genoembed.sequences.composition import BASELINES, kmer_frequencies, usable_baselines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from labelled_features import LabeledSet
    from numpy.typing import NDArray

    from genoembed import GenomicModel

LAYERS = ("28", "24", "final")
DIVERGENCES = (0.05, 0.1, 0.2, 0.3, 0.4)
OTHER_STRAND = "0.05, other strand"
JACCARD_K, COSINE_K = 7, 4
_COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")


def vectors_of(
    model: GenomicModel, sequences: Sequence[bytes], *, each_layer: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Embed sequences in one pass; several vectors of each."""
    texts = [sequence.decode() for sequence in sequences]
    if each_layer:
        return dict(genoembed.embed(texts, model=model, layers=("all", "final"), invalid="mask").matrices)
    found = genoembed.embed(texts, model=model, layers=LAYERS, pooling="mean_std", invalid="mask").matrices
    late, early, final = found.values()
    width = final.shape[1] // 2
    return {
        "28+24+final": np.hstack([late[:, :width], early[:, :width], final[:, :width]]),
        "28+24": np.hstack([late[:, :width], early[:, :width]]),
        "28": late[:, :width],
        "final": final[:, :width],
        "28+24+final, mean and deviation": np.hstack([late, early, final]),
    }


def counts_of(sequences: Sequence[bytes]) -> dict[str, NDArray[np.float32]]:
    """Count k-mers, and spell equal lengths out."""
    usable = usable_baselines(sequences)
    return {name: BASELINES[name](sequences) for name in BASELINES if name in usable}


def cosines(queries: NDArray[np.floating], rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return plain cosines of all pairs, ``(Q, N)``."""
    units = [
        matrix.astype(np.float64) / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
        for matrix in (queries, rows)
    ]
    return np.asarray(units[0] @ units[1].T)


def measure_set(labeled: LabeledSet, vectors: Mapping[str, NDArray[np.floating]]) -> dict[str, Any]:
    """Probe each kind of vectors, and look at nearest neighbors."""
    folds = split_folds(labeled.target, task=labeled.task, groups=labeled.groups, num_folds=5, seed=0)
    codes = encode_target(labeled.target, task=labeled.task)
    metric = METRICS[labeled.task][0]
    result: dict[str, Any] = {"metric": metric, "rows": len(codes), "probe": {}, "nearest": {}}
    for name, matrix in vectors.items():
        found = score_block(name, matrix, codes, folds, task=labeled.task, kind="baseline").metrics[metric]
        result["probe"][name] = [found.mean, found.sd]
        if labeled.task == "classification":
            scores = cosines(matrix, matrix)
            np.fill_diagonal(scores, -np.inf)
            target = np.asarray(labeled.target)
            result["nearest"][name] = float((target[scores.argmax(1)] == target).mean())
    return result


def replace_letters(sequence: bytes, share: float, random: np.random.Generator) -> bytes:
    """Replace a share of the letters by others.

    Example:
        >>> text = replace_letters(b"ACGT" * 5, 0.2, np.random.default_rng(0))
        >>> sum(a != b for a, b in zip(text, b"ACGT" * 5, strict=True))
        4
    """
    letters = np.frombuffer(sequence, dtype=np.uint8).copy()
    places = random.choice(len(letters), round(share * len(letters)), replace=False)
    alphabet = np.frombuffer(b"ACGT", dtype=np.uint8)
    codes = np.searchsorted(alphabet, letters[places])
    letters[places] = alphabet[(codes + random.integers(1, 4, len(places))) % 4]
    return letters.tobytes()


def draw_fragments(heldout: Path, number: int) -> tuple[list[bytes], dict[str, list[bytes]]]:
    """Draw windows of held-out contigs, and queries from each."""
    random = np.random.default_rng(5)
    contigs = [contig for group in read_groups(heldout).values() for contig in group if len(contig) >= 300]
    windows: list[bytes] = []
    while len(windows) < number:
        contig = contigs[random.integers(len(contigs))]
        start = int(random.integers(len(contig) - 200))
        window = contig[start : start + 200]
        if not window.translate(None, b"ACGT"):
            windows.append(window)
    queries: dict[str, list[bytes]] = {}
    for share in DIVERGENCES:
        starts = random.integers(101, size=number)
        queries[f"{share:g}"] = [
            replace_letters(window[start : start + 100], share, random)
            for window, start in zip(windows, starts, strict=True)
        ]
    queries[OTHER_STRAND] = [text.translate(_COMPLEMENT)[::-1] for text in queries["0.05"]]
    return windows, queries


def mean_reciprocal_rank(scores_QN: NDArray[np.floating]) -> float:
    """Return the mean of one over the rank of each query's own row."""
    own = np.diagonal(scores_QN)[:, None]
    return float((1 / (scores_QN >= own).sum(axis=1)).mean())


def measure_fragments(
    model: GenomicModel | None, heldout: Path, number: int, *, each_layer: bool
) -> dict[str, dict[str, float]]:
    """Find windows by diverged fragments; without a model, by k-mers."""
    windows, queries = draw_fragments(heldout, number)
    if model is None:
        spectra = kmer_frequencies(windows, k=COSINE_K)
        return {
            f"{JACCARD_K}-mers, Jaccard": {
                name: mean_reciprocal_rank(jaccard(texts, windows, JACCARD_K))
                for name, texts in queries.items()
            },
            f"{COSINE_K}-mers, cosine": {
                name: mean_reciprocal_rank(cosines(kmer_frequencies(texts, k=COSINE_K), spectra))
                for name, texts in queries.items()
            },
        }
    subjects = vectors_of(model, windows, each_layer=each_layer)
    asked = {name: vectors_of(model, texts, each_layer=each_layer) for name, texts in queries.items()}
    found = {}
    for kind, rows in subjects.items():
        mean = rows.mean(axis=0)
        for title, shift in ((kind, 0), (f"{kind}, centered", mean)):
            found[title] = {
                name: mean_reciprocal_rank(cosines(one[kind] - shift, rows - shift))
                for name, one in asked.items()
            }
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a model, or counts, on all sets and fragments; finished sets of an earlier run stay."""
    started = time.process_time()
    model, weights = None, "none"
    if options.model != "none":
        which = "untrained" if options.untrained else "trained"
        model, weights = load_which(options.model, which, dtype=options.dtype, seed=0)
    results: dict[str, Any] = {"weights": weights, "rows": options.rows, "sets": {}}
    if options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if (before["weights"], before["rows"]) == (weights, options.rows):
            results = before
    for path in sorted(options.folder.glob("*.tsv")):
        if path.stem in results["sets"] or (options.sets and path.stem not in options.sets):
            continue
        labeled = read_labeled(path, max_rows=options.rows)
        vectors = (
            counts_of(labeled.sequences)
            if model is None
            else vectors_of(model, labeled.sequences, each_layer=options.each_layer)
        )
        results["sets"][path.stem] = measure_set(labeled, vectors)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        sys.stderr.write(f"{path.stem}: {time.process_time() - started:.0f} CPU seconds so far\n")
    if options.heldout is not None:
        results["fragments"] = measure_fragments(
            model, options.heldout, options.fragments, each_layer=options.each_layer
        )
    results["cpu_seconds"] = time.process_time() - started
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def page(files: Sequence[Path]) -> str:
    """Write the tables of several files side by side, in Markdown."""
    found = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    sets = sorted(set.intersection(*(set(results["sets"]) for _, results in found)))
    columns = [
        (stem, kind)
        for stem, results in found
        for kind in dict.fromkeys(kind for one in results["sets"].values() for kind in one["probe"])
    ]
    heads = [f"{stem}: {kind}" for stem, kind in columns]
    tables = dict(found)
    lines = [f"| set | score | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    for name in sets:
        cells = [tables[stem]["sets"][name]["probe"].get(kind) for stem, kind in columns]
        shown = ["-" if cell is None else f"{cell[0]:.3f} ± {cell[1]:.3f}" for cell in cells]
        lines.append(f"| {name} | {tables[columns[0][0]]['sets'][name]['metric']} | {' | '.join(shown)} |")
    lines += ["", f"| nearest of the same class | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for name in sets:
        near = [tables[stem]["sets"][name]["nearest"].get(kind) for stem, kind in columns]
        if any(value is not None for value in near):
            shown = ["-" if value is None else f"{value:.3f}" for value in near]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    names = [*(f"{share:g}" for share in DIVERGENCES), OTHER_STRAND]
    lines += ["", f"| found again, letters replaced | {' | '.join(names)} |"]
    lines.append("| --- " * (1 + len(names)) + "|")
    for stem, results in found:
        for kind, ranks in results.get("fragments", {}).items():
            lines.append(f"| {stem}: {kind} | {' | '.join(f'{ranks[name]:.3f}' for name in names)} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, or print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="run one model over all sets")
    one.add_argument("folder", type=Path, help="labeled sets: NAME.tsv, perhaps with NAME.groups")
    one.add_argument("--heldout", type=Path, help="FASTA of contigs to cut fragments from")
    one.add_argument("--model", default="genoembed-mini", help="name or folder; none: counts instead")
    one.add_argument("--untrained", action="store_true", help="with fresh weights")
    one.add_argument("--each-layer", action="store_true", help="every block by itself, and final")
    one.add_argument("--rows", type=int, default=400, help="first rows of each set")
    one.add_argument("--sets", nargs="+", metavar="NAME", help="only these")
    one.add_argument("--fragments", type=int, default=200, help="windows to find again")
    one.add_argument("--dtype", default="bfloat16", help="type of weights and states")
    one.add_argument("--output", type=Path, required=True, help="JSON file; its name is that of the columns")
    several = commands.add_parser("table", help="print files side by side")
    several.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args(words)
    if options.command == "table":
        sys.stdout.write(page(options.files))
        return
    with threadpool_limits(1):
        measure(options)


if __name__ == "__main__":
    main()
