"""Stream a large genome file through reading, tokenizing and batching: memory and speed, no model.

Makes soft-masked, gzipped FASTA (lines of 60) from a fixed seed: 1e5 records of 2 kb on average, a tenth of
that, and as many bases in a tenth of the records. Streams each in a process of its own: records, work units,
pieces, padded batches. If memory is constant, it does not grow with the bases; it does grow with the records
by the table of ids that guards against duplicates. Then times the encoding of 100 Mb against a NumPy copy.

Example::

    python benchmarks/streaming.py --output benchmarks/results/streaming.json --note "idle machine"
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from describe_machine import describe_machine

SEED = 20240229
LINE = 60
MEAN_LENGTH = 2000
CONTEXT = 8192
BATCH_TOKENS = 65536
ENCODED_BASES = 100_000_000
REPEATS = 5


def write_genome(path: Path, *, num_records: int, mean_length: int = MEAN_LENGTH) -> dict[str, int]:
    """Write the input file.

    Args:
        path: Where to write, gzip.
        num_records: Records; lengths are log-normal, at least 1 base.
        mean_length: Mean of the lengths.

    Returns:
        ``records``, ``bases``, ``soft_masked`` and ``file_bytes``.
    """
    rng = np.random.default_rng(SEED)
    lengths = np.maximum(1, rng.lognormal(np.log(mean_length) - 0.32, 0.8, num_records)).astype(int)
    soft_masked = 0
    with gzip.open(path, "wb", compresslevel=1) as file:
        for first in range(0, num_records, 1000):
            chunk = []
            for number, length in enumerate(lengths[first : first + 1000].tolist(), start=first):
                bases = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, length, dtype=np.uint8)]
                start, end = sorted(rng.integers(0, length + 1, 2).tolist())
                bases[start:end] |= 32  # lower case
                soft_masked += end - start
                whole = length // LINE * LINE
                lines = np.full((whole // LINE, LINE + 1), ord("\n"), np.uint8)
                lines[:, :LINE] = bases[:whole].reshape(-1, LINE)
                tail = bases[whole:].tobytes()
                header = b">contig_%06d length=%d\n" % (number, length)
                chunk.append(header + lines.tobytes() + (tail + b"\n" if tail else b""))
            file.write(b"".join(chunk))
    return {
        "records": num_records,
        "bases": int(lengths.sum()),
        "soft_masked": soft_masked,
        "file_bytes": path.stat().st_size,
    }


def stream(path: str, *, reading_only: bool) -> dict[str, float]:
    """Stream the file once, in this process.

    Args:
        path: The file.
        reading_only: Stop after reading.

    Returns:
        Counts, seconds, Mb/s, and how far the peak of resident memory rose over what the imports needed.
    """
    from genoembed.batching.pad import pad_batch, plan_batches
    from genoembed.pipeline.cutting import Cutter
    from genoembed.pipeline.units import iter_units
    from genoembed.sequences import read_sequences
    from genoembed.tokenization.char import CharTokenizer
    from genoembed.tokenization.hf import build_encoder

    cutter = Cutter(encoder=build_encoder(CharTokenizer()), max_tokens=CONTEXT, is_causal=True)
    pad_batch(  # allocators and lazy imports belong to the baseline
        [cutter.encoder.encode(b"ACGT")], pool_masks=[np.ones(4, np.bool_)], rows=[0], pad_token_id=1
    )
    baseline = _peak_mib()
    started, started_cpu = time.perf_counter(), time.process_time()
    records = bases = batches = slots = 0
    for unit in iter_units(read_sequences(path)):
        records += len(unit.records)
        bases += sum(len(record.sequence) for record in unit.records)
        if reading_only:
            continue
        pieces = [
            piece
            for index, record in enumerate(unit.records)
            for piece in cutter.pieces(record, index, cutter.windows(record))
        ]
        for rows in plan_batches([len(piece.encoded.input_ids) for piece in pieces], max_tokens=BATCH_TOKENS):
            batch = pad_batch(
                [pieces[row].encoded for row in rows],
                pool_masks=[pieces[row].pool_mask for row in rows],
                rows=rows,
                pad_token_id=cutter.encoder.pad_token_id,
            )
            batches += 1
            slots += batch.num_tokens
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return {
        "records": records,
        "bases": bases,
        "batches": batches,
        "slots": slots,
        "seconds": round(seconds, 2),
        "mb_per_s": round(bases / seconds / 1e6, 1),
        "mb_per_cpu_s": round(bases / cpu_seconds / 1e6, 1),
        "baseline_mib": round(baseline, 1),
        "peak_over_baseline_mib": round(_peak_mib() - baseline, 1),
    }


def time_encoding() -> dict[str, float]:
    """Time the encoding of 100 Mb, and a NumPy copy of the same bytes; the best of several runs each."""
    from genoembed.tokenization.char import CharTokenizer
    from genoembed.tokenization.hf import build_encoder

    encoder = build_encoder(CharTokenizer())
    letters = np.frombuffer(b"ACGT", np.uint8)
    sequence = letters[np.random.default_rng(SEED).integers(0, 4, ENCODED_BASES, dtype=np.uint8)].tobytes()
    source = np.frombuffer(sequence, np.uint8)
    view = _best(lambda: encoder.encode(sequence))
    copied = _best(lambda: encoder.encode(sequence).input_ids.copy())
    return {
        "bases": ENCODED_BASES,
        "encode_s": view,
        "encode_and_copy_s": copied,
        "numpy_copy_s": _best(source.copy),
    }


def _best(action) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return round(min(times), 6)


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def _in_own_process(path: Path, *, reading_only: bool) -> dict[str, float]:
    """Peak memory never falls within a process, so each measurement has its own."""
    words = [sys.executable, __file__, "--stream", str(path)] + ["--reading-only"] * reading_only
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def measure(*, num_records: int) -> dict[str, object]:
    """Measure everything.

    Args:
        num_records: Records of the full file.

    Returns:
        Figures, as JSON holds them.
    """
    figures: dict[str, object] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        tenth = max(1, num_records // 10)
        for name, count, length in (
            ("full", num_records, MEAN_LENGTH),
            ("tenth", tenth, MEAN_LENGTH),
            ("long_records", tenth, 10 * MEAN_LENGTH),
        ):
            path = Path(folder, f"{name}.fa.gz")
            figures[name] = {
                "file": write_genome(path, num_records=count, mean_length=length),
                "reading": _in_own_process(path, reading_only=True),
                "reading_tokenizing_batching": _in_own_process(path, reading_only=False),
            }
            started = time.perf_counter()
            with gzip.open(path, "rb") as file:
                while file.read(1 << 20):
                    pass
            figures[name]["gunzip_alone_s"] = round(time.perf_counter() - started, 2)
    figures["encoding"] = time_encoding()
    return figures


def as_markdown(figures: dict) -> str:
    """Format the figures for people.

    Args:
        figures: What ``measure`` gave, and ``note``.

    Returns:
        A page of Markdown.
    """
    lines = ["# Streaming: reading, tokenizing, batching", ""]
    lines += [f"- {key}: {value}" for key, value in figures["machine"].items()]
    lines += [f"- note: {figures['note'] or 'none'}", ""]
    lines += [
        "| file | records | Mb | gzip MB | stages | s | Mb/s | Mb/CPU s | peak over baseline, MiB |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in ("full", "tenth", "long_records"):
        file = figures[name]["file"]
        facts = f"{name} | {file['records']} | {file['bases'] / 1e6:.1f} | {file['file_bytes'] / 1e6:.1f}"
        for stages in ("reading", "reading_tokenizing_batching"):
            run = figures[name][stages]
            lines.append(
                f"| {facts} | {stages.replace('_', ', ')} | {run['seconds']} | {run['mb_per_s']} "
                f"| {run['mb_per_cpu_s']} | {run['peak_over_baseline_mib']} |"
            )
        lines.append(f"| {facts} | gunzip alone (Python's gzip) | {figures[name]['gunzip_alone_s']} | | | |")
    return "\n".join([*lines, "", _memory_words(figures), "", _encoding_words(figures["encoding"])])


def _memory_words(figures: dict) -> str:
    full, tenth, long = (
        figures[name]["reading_tokenizing_batching"]["peak_over_baseline_mib"]
        for name in ("full", "tenth", "long_records")
    )
    more_records = figures["full"]["file"]["records"] - figures["tenth"]["file"]["records"]
    return (
        f"Ten times the bases in as many records: {tenth} MiB become {long} MiB. Ten times the bases in ten "
        f"times the records: {full} MiB; that is {(full - tenth) * 2**20 / more_records:.0f} bytes a further "
        "record, for the table of ids. The baseline is the process with everything imported, "
        f"{figures['full']['reading']['baseline_mib']:.0f} MiB."
    )


def _encoding_words(encoding: dict) -> str:
    megabases = encoding["bases"] / 1e6
    view_us = encoding["encode_s"] * 1e6
    copied_ms, reference_ms = encoding["encode_and_copy_s"] * 1e3, encoding["numpy_copy_s"] * 1e3
    return (
        f"Encoding {megabases:.0f} Mb with `CharTokenizer`: {view_us:.0f} us (ids are a view of the bytes), "
        f"or {copied_ms:.1f} ms with a copy; NumPy's copy of the same bytes {reference_ms:.1f} ms."
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="JSON file for the figures; the page goes beside it")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    parser.add_argument("--reading-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(json.dumps(stream(options.stream, reading_only=options.reading_only)))
        return
    figures = {"note": options.note, **measure(num_records=options.records)}
    page = as_markdown(figures)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(page + "\n")
    print(page)


if __name__ == "__main__":
    main()
