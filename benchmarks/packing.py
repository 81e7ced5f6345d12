"""Measure how much of a batch is real sequence: packed as a stream, packed into bins, padded.

Every way of batching gets the same documents: the records of the FASTA files with an EOD each, cut where they
are longer than the window. Efficiency is real tokens over slots. The speed of the packers is that of one core
on documents in memory, the fastest of several passes; the streaming corpus is timed from the files on.

Example::

    python benchmarks/packing.py genes.fa.gz phages.fa.gz --output benchmarks/results/packing.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from describe_machine import describe_machine

from genoembed.batching.pack import PackCounts, pack_bins, pack_stream
from genoembed.pretraining.corpus import DocumentStream
from genoembed.sequences import read_sequences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROWS_PER_BATCH = 8
BATCHES_PER_GROUP = 50
"""Length grouping sorts this many batches of documents, drawn at random, at a time."""
BUFFERS = (64, 256, 1024, 4096)
SEED = 0
REPEATS = 5


def piece_lengths(documents: Sequence[bytes], window: int) -> list[int]:
    """Tokens of every piece of the documents, EOD included, none over the window.

    Args:
        documents: Sequences.
        window: Most tokens of a piece.

    Returns:
        Lengths in the order of the documents.
    """
    return [
        min(window, len(document) + 1 - start)
        for document in documents
        for start in range(0, len(document) + 1, window)
    ]


def padded_slots(lengths: Sequence[int]) -> int:
    """Slots of batches of ``ROWS_PER_BATCH`` rows, each batch padded to its longest row.

    Args:
        lengths: Tokens of each row, in order.

    Returns:
        Slots of all batches; the last one may have fewer rows.
    """
    batches = [lengths[at : at + ROWS_PER_BATCH] for at in range(0, len(lengths), ROWS_PER_BATCH)]
    return sum(max(batch) * len(batch) for batch in batches)


def grouped_by_length(lengths: Sequence[int]) -> list[int]:
    """Order rows as trainers do that group by length: sort within large random groups.

    Args:
        lengths: Tokens of each row.

    Returns:
        The same lengths, in the order of training.
    """
    shuffled = np.random.default_rng(SEED).permutation(np.asarray(lengths, dtype=np.int64))
    size = ROWS_PER_BATCH * BATCHES_PER_GROUP
    groups = [np.sort(shuffled[at : at + size])[::-1] for at in range(0, len(shuffled), size)]
    return np.concatenate(groups).tolist()


def measure_padding(documents: Sequence[bytes], window: int) -> dict[str, float]:
    """Efficiency of padded batches.

    Args:
        documents: Sequences.
        window: Most tokens of a row.

    Returns:
        Real tokens over slots, by order of the rows.
    """
    lengths = piece_lengths(documents, window)
    random_order = np.random.default_rng(SEED).permutation(np.asarray(lengths, dtype=np.int64)).tolist()
    slots = {
        "padded_to_window": window * len(lengths),
        "padded_random_order": padded_slots(random_order),
        "padded_file_order": padded_slots(lengths),
        "padded_length_grouped": padded_slots(grouped_by_length(lengths)),
    }
    return {name: sum(lengths) / number for name, number in slots.items()}


def measure_packer(pack: Callable[[PackCounts], Iterator[object]], megabases: float) -> dict[str, float]:
    """Run a packer over all documents.

    Args:
        pack: Makes its batches.
        megabases: Size of the documents.

    Returns:
        ``efficiency``, ``rows``, ``cut_documents`` and ``mb_per_s`` (the fastest of ``REPEATS``).
    """
    best = float("inf")
    for _ in range(REPEATS):
        counts = PackCounts()
        start = time.perf_counter()
        for _batch in pack(counts):
            pass
        best = min(best, time.perf_counter() - start)
    return {
        "efficiency": counts.efficiency,
        "rows": counts.rows,
        "cut_documents": counts.cut_documents,
        "mb_per_s": megabases / best,
    }


def measure_corpus(paths: Sequence[Path]) -> dict[str, float]:
    """Time one epoch of the streaming corpus from the files on, and the way back to its end.

    Args:
        paths: FASTA files.

    Returns:
        ``mb_per_s`` of giving documents and ``skip_mb_per_s`` of resuming behind the last one.
    """
    best, best_skip = float("inf"), float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        stream = DocumentStream(paths)
        for _document in stream:
            pass
        best = min(best, time.perf_counter() - start)
        start = time.perf_counter()
        DocumentStream.resume(paths, state=stream.state)
        best_skip = min(best_skip, time.perf_counter() - start)
    megabases = stream.counts.read.bases / 1e6
    return {"mb_per_s": megabases / best, "skip_mb_per_s": megabases / best_skip}


def measure(paths: Sequence[Path], window: int) -> dict[str, object]:
    """Take all figures.

    Args:
        paths: FASTA files.
        window: Slots of a row.

    Returns:
        Facts of the documents, and the figures by way of batching.
    """
    documents = [record.sequence for record in read_sequences(paths, duplicates="suffix")]
    lengths = [len(document) for document in documents]
    megabases = sum(lengths) / 1e6
    options = {"window": window, "batch_size": ROWS_PER_BATCH}
    packed = {"pack_stream": measure_packer(lambda c: pack_stream(documents, counts=c, **options), megabases)}
    for number in BUFFERS:
        packed[f"pack_bins, buffer {number}"] = measure_packer(
            lambda c, number=number: pack_bins(documents, counts=c, buffer_documents=number, **options),
            megabases,
        )
    return {
        "files": [path.name for path in paths],
        "window": window,
        "rows_per_batch": ROWS_PER_BATCH,
        "documents": len(documents),
        "bases": sum(lengths),
        "length_percentiles_5_25_50_75_95": np.percentile(lengths, [5, 25, 50, 75, 95]).round().tolist(),
        "documents_over_window": sum(length + 1 > window for length in lengths),
        "packed": packed,
        "padded": measure_padding(documents, window),
        "corpus": measure_corpus(paths),
    }


def as_markdown(figures: dict[str, object], machine: dict[str, object], note: str) -> str:
    """Write the figures for people.

    Args:
        figures: Of ``measure``.
        machine: Of ``describe_machine``.
        note: What else a reader must know.

    Returns:
        The text of a Markdown file.
    """
    facts = {**machine, **({"note": note} if note else {})}
    facts |= {name: value for name, value in figures.items() if not isinstance(value, dict)}
    padded = figures["padded"]
    lines = [
        "# Packing: real tokens over slots",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    lines += ["", "| batching | efficiency | slots a token | rows | documents cut | Mb/s |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, row in figures["packed"].items():
        share = row["efficiency"]
        lines.append(
            f"| {name} | {share:.2%} | {1 / share:.3f} | {row['rows']} | {row['cut_documents']} "
            f"| {row['mb_per_s']:.0f} |"
        )
    lines += [f"| {name} | {share:.2%} | {1 / share:.3f} | | | |" for name, share in padded.items()]
    corpus = figures["corpus"]
    lines += [
        "",
        f"The streaming corpus gives documents at {corpus['mb_per_s']:.0f} Mb/s from the files on, and finds "
        f"its place again at {corpus['skip_mb_per_s']:.0f} Mb/s.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Packing efficiency and speed.")
    parser.add_argument("files", nargs="+", type=Path, help="FASTA files, plain or compressed")
    parser.add_argument("--window", type=int, default=2048, help="slots of a row (default 2048)")
    parser.add_argument("--output", type=Path, help="JSON file to write, and a .md beside it")
    parser.add_argument("--note", default="", help="state of the machine, for the results")
    options = parser.parse_args(arguments)
    figures, machine = measure(options.files, options.window), describe_machine()
    text = as_markdown(figures, machine, options.note)
    if options.output:
        result = {"machine": machine, "note": options.note, **figures}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
