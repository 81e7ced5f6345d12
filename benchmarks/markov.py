"""Bits per base of Markov models on held-out sequence: the bar that a trained model has to clear.

For each order k there are two models. *Plain*: the k bases before decide, counts smoothed by a constant.
*Interpolated*: orders 0 to k mixed, the weight of each order depending on how often its context was seen; the
weights are fitted (EM) on a slice of the training sequence that the counts leave out. Near the start of a
contig, where there are fewer than k bases before, both use the longest order there is, so that every order is
measured on the same bases. Letters other than ACGT end a context and are not scored.

Groups are read from the headers (``>group|...``), or are the file's stem where headers have no bar.

Example::

    python benchmarks/markov.py --train train.fa --heldout heldout.fa --groups
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from describe_machine import describe_machine
from split_corpus import read_fasta

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

BREAK = 4
TUNE_EVERY = 40
TUNE_PIECE = 10_000
CHUNK = 1 << 24
SMOOTHING = 0.5
EM_ROUNDS = 40
BUCKETS = 40
_CODES = np.full(256, BREAK, np.uint8)
_CODES[np.frombuffer(b"ACGT", np.uint8)] = np.arange(4)


class Positions(NamedTuple):
    """The bases of a sequence that can be scored."""

    kmers: NDArray[np.int64]
    """Each base and the ``order`` bases before it, two bits a base, the scored base in the lowest bits."""
    history: NDArray[np.int64]
    """How many bases there are before it (at most ``order``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkovModel:
    """Counts of every order up to the highest, and the weights that mix them."""

    counts: tuple[NDArray[np.int64], ...]
    """For order k, the count of each (k + 1)-mer, ``(4 ** (k + 1),)``."""
    weights: NDArray[np.float64]
    """Weight of order k against all lower ones, by bucket of the context's count, ``(orders, BUCKETS)``."""

    def bits(self, positions: Positions) -> dict[str, NDArray[np.float64]]:
        """Score bases with every order.

        Args:
            positions: The bases.

        Returns:
            ``plain`` and ``interpolated``: bits of each base under each order, ``(orders, N)``.
        """
        plain = np.empty((len(self.counts), len(positions.kmers)))
        mixed = np.empty_like(plain)
        for order in range(len(self.counts)):
            seen, total = _lookup(self.counts[order], positions.kmers)
            plain[order] = (seen + SMOOTHING) / (total + 4 * SMOOTHING)
            lower = mixed[order - 1] if order else np.full(len(seen), 0.25)
            weight = self.weights[order][_bucket(total)]
            mixed[order] = weight * _ratio(seen, total) + (1 - weight) * lower
            if order:
                short = positions.history < order
                plain[order][short] = plain[order - 1][short]
                mixed[order][short] = mixed[order - 1][short]
        return {"plain": -np.log2(plain), "interpolated": -np.log2(mixed)}


def encode(sequences: Iterable[bytes]) -> NDArray[np.uint8]:
    """Concatenate sequences as codes 0-3, with a break after each.

    Args:
        sequences: Upper-case letters.

    Returns:
        uint8 codes; 4 at breaks and at letters outside ACGT.
    """
    return _CODES[np.frombuffer(b"".join(sequence + b"-" for sequence in sequences), np.uint8)]


def scored_positions(codes: NDArray[np.uint8], order: int) -> Positions:
    """List the bases to score, each with the bases before it.

    Args:
        codes: As ``encode`` gives them.
        order: Number of bases before that are looked at.

    Returns:
        One entry for every code below 4.
    """
    at = np.arange(len(codes))
    last_break = np.maximum.accumulate(np.where(codes == BREAK, at, -1))
    history = np.minimum(at - last_break - 1, order)
    padded = np.concatenate([np.zeros(order, np.int64), codes & 3])
    kmers = np.zeros(len(codes), np.int64)
    for offset in range(order + 1):
        kmers = (kmers << 2) | padded[offset : offset + len(codes)]
    known = codes != BREAK
    return Positions(kmers[known], history[known])


def count_kmers(codes: NDArray[np.uint8], order: int) -> NDArray[np.int64]:
    """Count all (order + 1)-mers that hold no break.

    Args:
        codes: As ``encode`` gives them.
        order: Bases before the last one.

    Returns:
        Counts, ``(4 ** (order + 1),)``.
    """
    counts = np.zeros(4 ** (order + 1), np.int64)
    for start in range(0, len(codes), CHUNK):
        positions = scored_positions(codes[max(0, start - order) : start + CHUNK], order)
        counts += np.bincount(positions.kmers[positions.history == order], minlength=len(counts))
    return counts


def add_reverse_complements(counts: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    """Count the other strand too.

    Args:
        counts: As ``count_kmers`` gives them.
        order: Of those counts.

    Returns:
        Counts over both strands.
    """
    reverse = np.zeros(len(counts), np.int64)
    kmers = np.arange(len(counts))
    for _ in range(order + 1):
        reverse = (reverse << 2) | (3 - (kmers & 3))
        kmers >>= 2
    return counts + counts[reverse]


def fit(
    codes: NDArray[np.uint8], tuning: NDArray[np.uint8], *, order: int, both_strands: bool
) -> MarkovModel:
    """Count one part of the training sequence and fit the weights on the other.

    Args:
        codes: Sequence to count.
        tuning: Sequence to fit the weights on.
        order: Highest order.
        both_strands: Count the reverse complement too.

    Returns:
        A model of all orders up to ``order``.
    """
    counts = count_kmers(codes, order)
    if both_strands:
        counts = add_reverse_complements(counts, order)
    tables = [counts]
    for _ in range(order):
        tables.append(tables[-1].reshape(4, -1).sum(axis=0))
    tables.reverse()
    positions = scored_positions(tuning, order)
    weights = np.zeros((order + 1, BUCKETS))
    lower = np.full(len(positions.kmers), 0.25)
    for level, table in enumerate(tables):
        seen, total = _lookup(table, positions.kmers)
        own, bucket, enough = _ratio(seen, total), _bucket(total), positions.history >= level
        weights[level] = _fit_weights(own[enough], lower[enough], bucket[enough])
        weight = weights[level][bucket]
        lower = np.where(enough, weight * own + (1 - weight) * lower, lower)
    return MarkovModel(counts=tuple(tables), weights=weights)


def _fit_weights(
    own: NDArray[np.float64], lower: NDArray[np.float64], bucket: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Maximize the likelihood of ``weight * own + (1 - weight) * lower`` in each bucket by EM."""
    members = np.bincount(bucket, minlength=BUCKETS)
    weight = np.full(BUCKETS, 0.5)
    for _ in range(EM_ROUNDS):
        share = weight[bucket] * own
        share /= share + (1 - weight[bucket]) * lower
        weight = (np.bincount(bucket, weights=share, minlength=BUCKETS) + 0.5) / (members + 1)
    weight[0] = 0.0  # a context that was never seen says nothing
    return np.minimum(weight, 0.9999)


def _lookup(
    table: NDArray[np.int64], kmers: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    kmers = kmers & (len(table) - 1)
    return table[kmers], table.reshape(-1, 4).sum(axis=1)[kmers >> 2]


def _ratio(seen: NDArray[np.int64], total: NDArray[np.int64]) -> NDArray[np.float64]:
    return seen / np.maximum(total, 1)


def _bucket(total: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(total > 0, np.log2(np.maximum(total, 1)).astype(np.int64) + 1, 0)


def split_tuning(sequences: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Set every fortieth piece of ten thousand bases aside.

    Args:
        sequences: Training sequence.

    Returns:
        What to count, and what to fit the weights on.
    """
    count: list[bytes] = []
    tune: list[bytes] = []
    number = 0
    for sequence in sequences:
        for start in range(0, len(sequence), TUNE_PIECE):
            number += 1
            (count if number % TUNE_EVERY else tune).append(sequence[start : start + TUNE_PIECE])
    return count, tune


def read_groups(files: Iterable[Path]) -> dict[str, list[bytes]]:
    """Read FASTA files.

    Args:
        files: FASTA files, plain or gzipped.

    Returns:
        Sequences by group, groups in the order of their names.
    """
    groups: dict[str, list[bytes]] = defaultdict(list)
    for path in files:
        for header, sequence in read_fasta(path):
            group, bar, _ = header.partition("|")
            groups[group if bar else path.name.split(".")[0]].append(sequence)
    return dict(sorted(groups.items()))


def choose_model(
    train: Sequence[bytes], *, order: int, strands: Literal["forward", "both", "better"]
) -> tuple[MarkovModel, str]:
    """Fit the model, on the strands that describe the tuning slice better.

    Args:
        train: Training sequence.
        order: Highest order.
        strands: Strands to count; ``better`` tries both ways.

    Returns:
        The model, and the strands it counted.

    Raises:
        ValueError: If the training sequence is too short to set a slice aside.
    """
    counted, aside = split_tuning(train)
    if not aside:
        raise ValueError(
            f"training sequence: {len(counted)} pieces of {TUNE_PIECE} bases, expected {TUNE_EVERY} or more; "
            "give more training sequence"
        )
    count, tune = encode(counted), encode(aside)
    positions = scored_positions(tune, order)
    best: tuple[float, MarkovModel, str] | None = None
    for name in ("forward", "both"):
        if strands in (name, "better"):
            model = fit(count, tune, order=order, both_strands=name == "both")
            bits = float(model.bits(positions)["interpolated"][-1].mean())
            if best is None or bits < best[0]:
                best = bits, model, name
    assert best is not None
    return best[1], best[2]


def measure(
    model: MarkovModel, heldout: dict[str, list[bytes]]
) -> dict[str, dict[str, dict[str, NDArray[np.float64]]]]:
    """Score held-out sequence.

    Args:
        model: A fitted model.
        heldout: Sequences by group.

    Returns:
        ``figures[kind][group]`` holds ``bits`` (sums, one an order) and ``bases`` (how many).
    """
    figures: dict[str, dict[str, dict[str, NDArray[np.float64]]]] = {"interpolated": {}, "plain": {}}
    for group, sequences in heldout.items():
        positions = scored_positions(encode(sequences), len(model.counts) - 1)
        for kind, bits in model.bits(positions).items():
            figures[kind][group] = {"bits": bits.sum(axis=1), "bases": np.float64(bits.shape[1])}
    return figures


def tabulate(
    groups: dict[str, dict[str, NDArray[np.float64]]], orders: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Turn sums into bits per base.

    Args:
        groups: One kind of ``measure``'s figures.
        orders: Orders to show.

    Returns:
        By row (each group, ``mean of groups``, ``all bases``), the bits per base of each order.
    """
    rows = {name: sums["bits"] / sums["bases"] for name, sums in groups.items()}
    total = sum(sums["bits"] for sums in groups.values()) / sum(sums["bases"] for sums in groups.values())
    rows |= {"mean of groups": np.mean(list(rows.values()), axis=0), "all bases": total}
    return {name: {str(k): round(float(row[k]), 5) for k in orders} for name, row in rows.items()}


def to_markdown(result: dict[str, object], *, show_groups: bool) -> str:
    """Write a result as Markdown.

    Args:
        result: As ``main`` assembles it.
        show_groups: Give each group a row.

    Returns:
        Text that ends in a newline.
    """
    lines = ["# Markov models on held-out sequence (bits per base)", ""]
    lines += [f"- {key}: {value}" for key, value in result.items() if key not in ("bits_per_base", "bases")]
    bases = result["bases"]
    for kind, rows in result["bits_per_base"].items():
        orders = list(rows["all bases"])
        lines += [
            "",
            f"## {kind}",
            "",
            "| group | bases | " + " | ".join(f"order {k}" for k in orders) + " |",
        ]
        lines.append("| --- |" + " ---: |" * (len(orders) + 1))
        for name, row in rows.items():
            if show_groups or name in ("mean of groups", "all bases"):
                cells = " | ".join(f"{row[k]:.4f}" for k in orders)
                lines.append(f"| {name} | {bases.get(name, '')} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Bits per base of Markov models on held-out sequence.")
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="FASTA files, plain or gzipped")
    parser.add_argument(
        "--heldout", nargs="+", type=Path, required=True, help="FASTA files, plain or gzipped"
    )
    parser.add_argument("--orders", nargs="+", type=int, default=[3, 5, 7, 9, 11], help="default 3 5 7 9 11")
    parser.add_argument("--strands", choices=("forward", "both", "better"), default="better")
    parser.add_argument("--groups", action="store_true", help="a row for each group in the printed table")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args(arguments)
    train = [sequence for sequences in read_groups(options.train).values() for sequence in sequences]
    heldout = read_groups(options.heldout)
    model, strands = choose_model(train, order=max(options.orders), strands=options.strands)
    figures = measure(model, heldout)
    bases = {name: int(sums["bases"]) for name, sums in figures["plain"].items()}
    result = {
        **describe_machine(("numpy",)),
        "strands counted": f"{strands} (asked for: {options.strands})",
        "training bases": sum(map(len, train)),
        "bases": bases | {"all bases": sum(bases.values())},
        "bits_per_base": {kind: tabulate(groups, options.orders) for kind, groups in figures.items()},
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(to_markdown(result, show_groups=options.groups), end="")


if __name__ == "__main__":
    main()
