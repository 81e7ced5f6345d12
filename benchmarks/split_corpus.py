"""Split a corpus of FASTA files into training and held-out sequence, whole contigs at a time.

Every group of organisms (bacteria, virus, plant ...) gives about ``fraction`` of its bases, at least
``least`` and at most ``most``, spread over its genomes (tags). A contig is held out only if hardly any of its
32-mers occur elsewhere in the corpus, on either strand, so that no copy of it stays in the training set.
Source headers read ``>tag|n``; written headers read ``>group|tag|n``. The same files and seed give the same
split, whatever the order in which the files are named.

Example::

    python benchmarks/split_corpus.py corpus/*.fa.gz --train train.fa --heldout heldout.fa
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

GROUP_OF_FILE = {
    "apt_animals": "animals",
    "apt_bacteria": "bacteria",
    "apt_markers": "markers",
    "apt_plant_yeast": "fungi_organelles",
    "apt_protists": "protists",
    "apt_virus": "virus",
    "gh_archaea": "archaea",
    "gh_bacteria": "bacteria",
    "gh_plant": "plant",
    "gh_virus": "virus",
    "pip_eukaryotes": "fungi_organelles",
    "pip_prokaryotes": "bacteria",
}
"""Group by file stem; a file that is not named here is a group of its own."""

GROUP_OF_TAG = {"methanobacterium_MB1_archaeon": "archaea"}
"""Group by tag, where a file holds more than one group."""

PREFERRED = (10_000, 60_000)
"""Lengths of the contigs that a genome gives first; then come shorter ones, and longer ones last."""

ALLOWED = (500, 200_000)
"""Contigs outside these lengths always stay in the training set."""

K = 32
LINE_WIDTH = 80
_CODES = np.full(256, 4, np.uint8)
_CODES[np.frombuffer(b"ACGT", np.uint8)] = np.arange(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contig:
    """One FASTA record of the corpus."""

    group: str
    tag: str
    number: str
    sequence: bytes

    @property
    def header(self) -> str:
        """Header of the written record, without ``>``."""
        return f"{self.group}|{self.tag}|{self.number}"


def read_corpus(files: Iterable[Path]) -> list[Contig]:
    """Read every record, upper-cased, files in the order of their names.

    Args:
        files: FASTA files, plain or gzipped, headers ``>tag|n``.

    Returns:
        All records.

    Raises:
        ValueError: If two records have one header, or a header is not ``tag|n``.
    """
    contigs: dict[str, Contig] = {}
    for path in sorted(files, key=lambda file: file.name):
        stem = path.name.split(".")[0]
        for header, sequence in read_fasta(path):
            tag, bar, number = header.partition("|")
            if not bar:
                raise ValueError(f"{path}: header {header!r}, expected 'tag|n'")
            group = GROUP_OF_TAG.get(tag, GROUP_OF_FILE.get(stem, stem))
            contig = Contig(group=group, tag=tag, number=number, sequence=sequence)
            if contigs.setdefault(contig.header, contig) is not contig:
                raise ValueError(f"{path}: header {header!r} appears twice in group {group!r}; rename one")
    return list(contigs.values())


def read_fasta(path: Path) -> Iterator[tuple[str, bytes]]:
    """Read a FASTA file whole.

    Args:
        path: FASTA file, plain or gzipped.

    Yields:
        First word of the header, and the sequence, upper-cased.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    for block in data.split(b">")[1:]:
        head, _, body = block.partition(b"\n")
        yield head.split()[0].decode("ascii"), b"".join(body.split()).upper()


def split_corpus(
    contigs: Sequence[Contig],
    *,
    fraction: float = 0.02,
    least: int = 60_000,
    most: int = 200_000,
    max_shared: float = 0.02,
    seed: int = 0,
) -> set[str]:
    """Choose the contigs to hold out.

    Args:
        contigs: The corpus.
        fraction: Share of each group's bases to aim at.
        least: Smallest number of bases to aim at in a group.
        most: Largest number of bases to aim at in a group.
        max_shared: Largest share of a contig's 32-mers that may occur elsewhere in the corpus.
        seed: Orders the contigs of a genome.

    Returns:
        Headers of the contigs to hold out.
    """
    groups: dict[str, list[Contig]] = defaultdict(list)
    for contig in contigs:
        groups[contig.group].append(contig)
    queues = {name: _queues(members, seed) for name, members in groups.items()}
    targets = {
        name: int(min(most, max(least, fraction * sum(len(c.sequence) for c in members))))
        for name, members in groups.items()
    }
    candidates = [c for name, genomes in queues.items() for c in _fill(genomes, 6 * targets[name])]
    shared = shared_fractions(candidates, contigs)
    chosen: set[str] = set()
    for name, genomes in queues.items():
        clean = {
            tag: [c for c in queue if shared.get(c.header, 1.0) <= max_shared]
            for tag, queue in genomes.items()
        }
        chosen.update(c.header for c in _fill(clean, targets[name]))
    return chosen


def _queues(members: Sequence[Contig], seed: int) -> dict[str, list[Contig]]:
    """Order the contigs of each genome of a group, the largest genome first."""

    def preference(contig: Contig) -> tuple[int, str]:
        size = len(contig.sequence)
        rank = 0 if PREFERRED[0] <= size <= PREFERRED[1] else 1 if size < PREFERRED[0] else 2
        return rank, hashlib.sha256(f"{seed}|{contig.header}".encode()).hexdigest()

    genomes: dict[str, list[Contig]] = defaultdict(list)
    for contig in members:
        genomes[contig.tag].append(contig)
    order = sorted(genomes, key=lambda tag: (-sum(len(c.sequence) for c in genomes[tag]), tag))
    return {
        tag: sorted((c for c in genomes[tag] if ALLOWED[0] <= len(c.sequence) <= ALLOWED[1]), key=preference)
        for tag in order
    }


def _fill(queues: dict[str, list[Contig]], target: int) -> list[Contig]:
    """Take contigs until ``target`` bases are there, always from the genome that has given least.

    Contigs longer than preferred come last; one that would bring twice the target is left out.
    """
    waiting = {tag: deque(queue) for tag, queue in queues.items()}
    given = dict.fromkeys(queues, 0)
    taken: list[Contig] = []
    while sum(given.values()) < target and any(waiting.values()):
        tag = min(
            (tag for tag, queue in waiting.items() if queue),
            key=lambda tag: (len(waiting[tag][0].sequence) > PREFERRED[1], given[tag]),
        )
        contig = waiting[tag].popleft()
        if sum(given.values()) + len(contig.sequence) <= 2 * target:
            taken.append(contig)
            given[tag] += len(contig.sequence)
    return taken


def canonical_kmers(sequence: bytes) -> NDArray[np.uint64]:
    """Encode the 32-mers of a sequence; a 32-mer and its reverse complement have one code.

    Args:
        sequence: Upper-case letters; 32-mers with a letter outside ACGT are left out.

    Returns:
        uint64 codes, at most ``len(sequence) - 31`` of them.
    """
    codes = _CODES[np.frombuffer(sequence, np.uint8)]
    if len(codes) < K:
        return np.zeros(0, np.uint64)
    unknown = np.concatenate([[0], np.cumsum(codes > 3)])
    forward = (codes & 3).astype(np.uint64)
    reverse = np.uint64(3) - forward
    size = 1
    while size < K:
        bits = np.uint64(2 * size)
        forward = (forward[:-size] << bits) | forward[size:]
        reverse = (reverse[size:] << bits) | reverse[:-size]
        size *= 2
    return np.minimum(forward, reverse)[unknown[K:] == unknown[:-K]]


def shared_fractions(candidates: Sequence[Contig], contigs: Sequence[Contig]) -> dict[str, float]:
    """Measure how much of each candidate occurs elsewhere in the corpus.

    Args:
        candidates: Contigs to measure; all of them are among ``contigs``.
        contigs: The corpus.

    Returns:
        By header, the share of the candidate's distinct 32-mers that another contig holds.
    """
    own = {c.header: np.unique(canonical_kmers(c.sequence)) for c in candidates}
    if not any(map(len, own.values())):
        return dict.fromkeys(own, 0.0)
    table, holders = np.unique(np.concatenate(list(own.values())), return_counts=True)
    elsewhere = holders > 1
    for contig in contigs:
        if contig.header in own:
            continue
        kmers = np.sort(canonical_kmers(contig.sequence))  # sorted: far faster to look up
        at = np.minimum(np.searchsorted(table, kmers), len(table) - 1)
        elsewhere[at[table[at] == kmers]] = True
    return {
        header: float(elsewhere[np.searchsorted(table, kmers)].mean()) if len(kmers) else 0.0
        for header, kmers in own.items()
    }


def write_fasta(path: Path, contigs: Iterable[Contig]) -> None:
    """Write records with headers ``>group|tag|n``.

    Args:
        path: File to write.
        contigs: Records.
    """
    with path.open("wb") as file:
        for contig in contigs:
            lines = [
                contig.sequence[at : at + LINE_WIDTH] for at in range(0, len(contig.sequence), LINE_WIDTH)
            ]
            file.write(b">" + contig.header.encode() + b"\n" + b"\n".join(lines) + b"\n")


def summarize(contigs: Sequence[Contig], chosen: set[str]) -> dict[str, dict[str, int]]:
    """Count bases and contigs on both sides of the split.

    Args:
        contigs: The corpus.
        chosen: Headers that are held out.

    Returns:
        By group: ``bases``, ``heldout_bases``, ``contigs``, ``heldout_contigs``.
    """
    rows: dict[str, dict[str, int]] = {}
    for contig in contigs:
        row = rows.setdefault(
            contig.group, dict.fromkeys(("bases", "heldout_bases", "contigs", "heldout_contigs"), 0)
        )
        for side in ("", "heldout_") if contig.header in chosen else ("",):
            row[side + "bases"] += len(contig.sequence)
            row[side + "contigs"] += 1
    return dict(sorted(rows.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Split a corpus into training and held-out contigs.")
    parser.add_argument("files", nargs="+", type=Path, help="FASTA files, plain or gzipped, headers >tag|n")
    parser.add_argument("--train", type=Path, required=True, help="FASTA file to write")
    parser.add_argument("--heldout", type=Path, required=True, help="FASTA file to write")
    parser.add_argument("--fraction", type=float, default=0.02, help="share of each group (default 0.02)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    contigs = read_corpus(options.files)
    chosen = split_corpus(contigs, fraction=options.fraction, seed=options.seed)
    write_fasta(options.train, (c for c in contigs if c.header not in chosen))
    write_fasta(options.heldout, (c for c in contigs if c.header in chosen))
    json.dump(summarize(contigs, chosen), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
