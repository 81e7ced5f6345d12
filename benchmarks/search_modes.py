"""What a search finds: vectors as they are and centered, with leading components removed, k-mers, and both.

Two questions, of each layer. *Same class*: every row of a labeled set is a query among the others; how many
of its ten nearest have its label (P@10), and how often does the nearest one (1-NN)? *The source*: fragments
of some rows with letters replaced are queries; how often is the row that one was cut from the nearest (R@1)?
The rows are drawn with the seed, and stay the same for all modes::

    OMP_NUM_THREADS=1 python benchmarks/search_modes.py labeled/*.tsv \\
        --output benchmarks/results/search_modes.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from describe_machine import describe_machine
from labelled_features import read_labeled

import genoembed
from genoembed.config.search import KMER_SIZE
from genoembed.pooling.transform import fit_rows, ruling_directions
from genoembed.searching.kmers import KmerIndex
from genoembed.searching.run import MOST_COMPONENTS, PLAIN_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

LAYERS = ("12", "28", "final")
REMOVED = (0, 1, 2, 4, 8, 12, 16)
KMER_SIZES = (6, 8, 10, 11, 12, 14, 16, 21)
WEIGHTS = (1, 5, 20, 50)
DIVERGENCES = (0.05, 0.1, 0.2, 0.3)
_NEAREST, _SHORTEST, _RRF = 10, 40, 60


def same_class(scores: NDArray[np.float64], labels: NDArray[np.generic]) -> dict[str, float]:
    """Return which share of the nearest rows have the label of the query, the row itself left out.

    Example:
        >>> same_class(np.array([[0, 2, 1], [2, 0, 1], [1, 2, 0.0]]), np.array(["a", "a", "b"]))
        {'p10': 0.3333333333333333, 'nn': 0.6666666666666666}
    """
    others = np.where(np.eye(len(labels), dtype=bool), -np.inf, scores)
    near = np.argsort(-others, axis=1, kind="stable")[:, : min(_NEAREST, len(labels) - 1)]
    hits = labels[near] == labels[:, None]
    return {"p10": float(hits.mean()), "nn": float(hits[:, 0].mean())}


def cosines(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of each pair."""
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other)]
    return np.asarray(units[0] @ units[1].T)


def fused_ranks(scores: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Add reciprocal ranks (Cormack, Clarke and Buettcher 2009), the alternative to a weighted sum."""
    ranks = [np.argsort(np.argsort(-one, axis=1, kind="stable"), axis=1) for one in scores]
    return np.asarray(sum(1 / (_RRF + 1 + rank) for rank in ranks))


def all_scores(
    asked: NDArray[np.float64], rows: NDArray[np.float64], shares: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Score all pairs by vectors in each way, and by vectors and k-mers."""
    found = {"vectors as they are": cosines(asked, rows)}
    for removed in REMOVED:
        transform = fit_rows(rows, components=removed)
        found[f"centered, {removed} removed"] = cosines(
            transform.apply_float64(asked), transform.apply_float64(rows)
        )
    most = fit_rows(rows, components=MOST_COMPONENTS)
    ruling = ruling_directions(most.variances, most=MOST_COMPONENTS, directions=MOST_COMPONENTS)
    usual_fit = fit_rows(rows, components=ruling)
    usual = cosines(usual_fit.apply_float64(asked), usual_fit.apply_float64(rows))
    found["centered, the default of search"] = usual
    found |= {f"hybrid, 1 : {weight}": usual + weight * shares for weight in WEIGHTS}
    return found | {"hybrid, reciprocal ranks": fused_ranks([usual, shares])}


def jaccard(queries: Sequence[bytes], rows: Sequence[bytes], kmer_size: int) -> NDArray[np.float64]:
    """Return the share of k-mers in common of all pairs, ``(Q, N)``."""
    return KmerIndex(queries, kmer_size).jaccard(rows).T


def cut_fragment(sequence: bytes, divergence: float, random: np.random.Generator) -> bytes:
    """Cut 60 % of a sequence out, and replace a share of its letters.

    Example:
        >>> len(cut_fragment(b"ACGT" * 50, 0.1, np.random.default_rng(0)))
        120
    """
    length = max(min(len(sequence), _SHORTEST), len(sequence) * 3 // 5)
    start = int(random.integers(0, len(sequence) - length + 1))
    letters = np.frombuffer(sequence[start : start + length], dtype=np.uint8).copy()
    places = random.choice(length, round(divergence * length), replace=False)
    codes = np.searchsorted(np.frombuffer(b"ACGT", dtype=np.uint8), letters[places])
    letters[places] = np.frombuffer(b"ACGT", dtype=np.uint8)[(codes + random.integers(1, 4, len(places))) % 4]
    return letters.tobytes()


def embed_layers(texts: Sequence[str], layers: Sequence[str], model: str) -> dict[str, NDArray[np.generic]]:
    """Embed in one pass; ``28+24`` concatenates layers 28 and 24, as ``fuse="concat"`` does."""
    parts = list(dict.fromkeys(part for layer in layers for part in layer.split("+")))
    matrices = genoembed.embed(texts, layers=parts, model=model, invalid="mask").matrices
    names = dict(zip(parts, matrices, strict=True))
    joined = {"+".join(names[part] for part in layer.split("+")): layer.split("+") for layer in layers}
    return {name: np.hstack([matrices[names[part]] for part in own]) for name, own in joined.items()}


def measure_set(
    path: Path, *, layers: Sequence[str], rows: int, fragments: int, seed: int, model: str
) -> dict[str, Any]:
    """Measure one labeled set."""
    labeled = read_labeled(path)
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(len(labeled.sequences))[:rows])
    sequences = [labeled.sequences[row] for row in chosen]
    labels = np.asarray(labeled.target)[chosen]
    sources = random.permutation(len(sequences))[:fragments]
    asked = {
        divergence: [cut_fragment(sequences[row], divergence, random) for row in sources]
        for divergence in (DIVERGENCES if fragments else ())
    }
    texts = sequences + [text for queries in asked.values() for text in queries]
    vectors = embed_layers(texts, layers, model)
    chance = float(np.mean([(labels == label).mean() for label in labels]))
    result: dict[str, Any] = {"name": labeled.name, "rows": len(sequences), "chance": chance}
    result["kmers"] = {k: same_class(jaccard(sequences, sequences, k), labels) for k in KMER_SIZES}
    shares = jaccard(sequences, sequences, KMER_SIZE)
    result["class"] = {
        layer: {
            name: same_class(scores, labels)
            for name, scores in all_scores(matrix[: len(sequences)], matrix[: len(sequences)], shares).items()
        }
        for layer, matrix in vectors.items()
    }
    found: dict[str, dict[str, list[float]]] = {}
    for number, (_, queries) in enumerate(asked.items()):
        at = slice(len(sequences) + number * fragments, len(sequences) + (number + 1) * fragments)
        of_queries = jaccard(queries, sequences, KMER_SIZE)
        for layer, matrix in vectors.items():
            every = all_scores(matrix[at], matrix[: len(sequences)], of_queries) | {"k-mers": of_queries}
            for name, scores in every.items():
                hit = float((scores.argmax(axis=1) == sources).mean())
                found.setdefault(layer, {}).setdefault(name, []).append(hit)
    return result | {"source": found}


def page(results: dict[str, Any]) -> str:
    """Write the results for people."""
    lines = ["# Search: vectors, k-mers, and both", ""]
    lines += [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += [f"- {name}: {value}" for name, value in results["settings"].items()]
    lines += [
        "- centered: the mean of the rows is subtracted and leading components are removed; hybrid: cosine "
        f"(the default of `search`) : Jaccard index of canonical {KMER_SIZE}-mers",
        f"- the default of `search`: centered, up to {MOST_COMPONENTS} removed, until the rest varies in "
        f"effectively {MOST_COMPONENTS} directions; of `--mode hybrid`: 1 : "
        f"{PLAIN_WEIGHTS.sparse:g}; of `--mode kmer`: {KMER_SIZE}-mers",
    ]
    for one in results["sets"]:
        lines += ["", f"## {one['name']}: {one['rows']} rows, chance {one['chance']:.3f}", ""]
        layers = list(one["class"])
        lines += [f"| same class: 1-NN / P@10 | {' | '.join(layers)} |", f"| --- |{' ---: |' * len(layers)}"]
        for name in one["class"][layers[0]]:
            cells = [one["class"][layer][name] for layer in layers]
            lines.append(f"| {name} | {' | '.join(_cell(cell) for cell in cells)} |")
        lines += [
            "",
            f"| k | {' | '.join(map(str, one['kmers']))} |",
            f"| --- |{' ---: |' * len(one['kmers'])}",
        ]
        lines.append(f"| k-mers, 1-NN / P@10 | {' | '.join(map(_cell, one['kmers'].values()))} |")
        if one["source"]:
            lines += ["", f"| the source, R@1 at letters replaced of | {' | '.join(map(str, DIVERGENCES))} |"]
            lines.append(f"| --- |{' ---: |' * len(DIVERGENCES)}")
            for layer in layers:
                for name, values in one["source"][layer].items():
                    if name != "k-mers" or layer == layers[-1]:
                        shown = " | ".join(f"{value:.3f}" for value in values)
                        lines.append(f"| {'' if name == 'k-mers' else layer + ', '}{name} | {shown} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, float]) -> str:
    return f"{found['nn']:.3f} / {found['p10']:.3f}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="tables of sequence and label")
    parser.add_argument(
        "--layer",
        action="append",
        help=f"a layer, or several to concatenate (28+24); default {', '.join(LAYERS)}",
    )
    parser.add_argument("--rows", type=int, default=400, help="rows of each set")
    parser.add_argument("--fragments", type=int, default=100, help="fragments at each divergence; 0 is none")
    parser.add_argument("--model", default="genoembed-mini", help="name or folder")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--output", type=Path, help="JSON file; a page with .md is written next to it")
    chosen = parser.parse_args(words)
    settings = {name: getattr(chosen, name) for name in ("rows", "fragments", "seed")}
    settings["model"] = chosen.model
    sets = []
    results = {
        "machine": describe_machine(("genoembed", "numpy", "torch")),
        "settings": settings,
        "sets": sets,
    }
    for path in chosen.tables:
        sets.append(
            measure_set(
                path,
                layers=chosen.layer or LAYERS,
                rows=chosen.rows,
                fragments=chosen.fragments,
                seed=chosen.seed,
                model=chosen.model,
            )
        )
        sys.stderr.write(f"{path.stem}: done\n")
        if chosen.output is not None:
            chosen.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            chosen.output.with_suffix(".md").write_text(page(results), encoding="utf-8")
    sys.stdout.write(page(results))


if __name__ == "__main__":
    main()
