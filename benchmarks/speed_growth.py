"""How time and memory of ``extract`` grow: with the bases of the input, and with the length of one sequence.

Every run is a fresh process: it loads the model, embeds one short record, and then the input; its peak of
resident memory and the time behind loading are reported. Inputs are gzipped FASTA of log-normal records, 2 kb
on average, or one random sequence. A tiny model (hidden 8) makes 100 Mb possible, and lets everything
that is not the model show; the bundled model runs the smaller sizes. Growth is the slope of the logarithm of
time over the logarithm of bases; 1 is linear::

    python benchmarks/speed_growth.py --megabases 1 3 10 30 100
"""

from __future__ import annotations

import json
import logging
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from measuring import Figure, file_results, option_parser
from streaming import write_genome

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 3
MEAN_LENGTH = 2000
LARGEST_SLOPE = 1.03
LARGEST_RSS_GROWTH_MIB = 200.0
TINY_SHAPE = {
    "hidden_size": 8,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "hcs_filter_groups": 2,
    "hcm_filter_groups": 2,
    "state_size": 4,
}
TINY_MODELS: dict[str, dict[str, object]] = {
    "tiny": {"hcs_layer_idxs": [0], "num_hidden_layers": 1, "max_position_embeddings": 8192},
    "filters": {
        "hcs_layer_idxs": [0],
        "hcm_layer_idxs": [1],
        "hcl_layer_idxs": [2],
        "num_hidden_layers": 3,
        "max_position_embeddings": 1 << 20,
    },
    "all kinds": {
        "hcs_layer_idxs": [0],
        "hcm_layer_idxs": [1],
        "hcl_layer_idxs": [2],
        "attn_layer_idxs": [3],
        "num_hidden_layers": 4,
        "max_position_embeddings": 1 << 20,
    },
}
"""Models of hidden size 8: one short filter and windows of 8 kb; all filters, and all blocks, with 1 Mb."""


def write_tiny_models(folder: Path) -> dict[str, str]:
    """Write the tiny models.

    Args:
        folder: Where to write.

    Returns:
        Name or folder of each model, the bundled one included.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    import genoembed

    disable_progress_bar()
    places = {"mini": "genoembed-mini"}
    for name, shape in TINY_MODELS.items():
        torch.manual_seed(SEED)
        place = folder / name.replace(" ", "_")
        config = genoembed.StripedHyena2Config(**TINY_SHAPE, **shape)
        genoembed.StripedHyena2Model(config).save_pretrained(place)
        genoembed.CharTokenizer().save_pretrained(place)
        places[name] = str(place)
    return places


def write_sequence(path: Path, num_bases: int) -> Path:
    """Write one random sequence.

    Args:
        path: The file.
        num_bases: Its length.

    Returns:
        The same path.
    """
    letters = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(SEED).integers(0, 4, num_bases)]
    path.write_bytes(b">one\n%s\n" % letters.tobytes())
    return path


def run_once(model: str, fasta: str, output: str, threads: int) -> dict[str, float]:
    """Embed a file in this process.

    Args:
        model: Name or folder.
        fasta: Input.
        output: The file to write.
        threads: 0 leaves torch's choice.

    Returns:
        Seconds, CPU seconds, bases, tokens run, and resident memory before and at its peak, in MiB.
    """
    import genoembed

    loaded = genoembed.load_model(model, device="cpu")
    options = {"model": loaded, "threads": threads or None, "overwrite": True}
    short = write_sequence(Path(output).with_suffix(".warm.fa"), 500)
    genoembed.extract(short, output=output, **options)
    before, cpu = _peak_mib(), time.process_time()
    report = genoembed.extract(fasta, output=output, **options)
    return {
        "bases": report.counts.bases,
        "records": report.counts.records,
        "slots": report.stats.slots,
        "seconds": report.seconds,
        "cpu_seconds": time.process_time() - cpu,
        "forward_s": report.stats.forward_s,
        "baseline_mib": before,
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def in_own_process(model: str, fasta: Path, threads: int) -> dict[str, float]:
    """Embed a file in a fresh process.

    Args:
        model: Name or folder.
        fasta: Input.
        threads: 0 leaves torch's choice.

    Returns:
        What ``run_once`` gives.
    """
    output = str(fasta.with_name("out.h5"))
    words = [sys.executable, __file__, "--worker", model, str(fasta), output, str(threads)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def slope(runs: Sequence[dict[str, float]], key: str) -> float:
    """Fit the growth with the number of bases.

    Args:
        runs: One a size.
        key: ``seconds`` or ``cpu_seconds``.

    Returns:
        Slope of a line through the logarithms, least squares.
    """
    bases = [math.log(run["bases"]) for run in runs]
    times = [math.log(run[key]) for run in runs]
    return float(np.polyfit(bases, times, 1)[0])


def measure_sizes(
    name: str, model: str, megabases: Sequence[float], folder: Path, options: object
) -> tuple[list[dict[str, object]], list[Figure]]:
    """Embed files of growing size.

    Args:
        name: Of the model.
        model: Name or folder.
        megabases: Sizes.
        folder: For the files.
        options: Of the command line.

    Returns:
        A row a size, and the figures.
    """
    paths = {}
    for size in megabases:
        paths[size] = folder / f"{size:g}.fa.gz"
        if not paths[size].exists():
            write_genome(paths[size], num_records=max(1, round(size * 1e6 / MEAN_LENGTH)))
    found: dict[float, list[dict[str, float]]] = {size: [] for size in megabases}
    for number in range(options.rounds):
        for size in megabases:
            # the long ones once: a slope needs the short ones to be sure
            if not number or found[size][0]["seconds"] < options.repeat_below_s:
                found[size].append(in_own_process(model, paths[size], options.threads))
    runs = [{key: median(run[key] for run in found[size]) for key in found[size][0]} for size in megabases]
    rows = [
        {"model": name, "Mb": size, **run, "runs": len(found[size])}
        for size, run in zip(megabases, runs, strict=True)
    ]
    label = f"{name}, {megabases[0]:g} to {megabases[-1]:g} Mb"
    rise = runs[-1]["peak_mib"] - runs[0]["peak_mib"]
    figures = [Figure(name=f"rise of peak RSS in MiB, {label}", value=rise, at_most=LARGEST_RSS_GROWTH_MIB)]
    if len(runs) > 1:
        steepness = slope(runs, "seconds")
        cpu = slope(runs, "cpu_seconds")
        figures.append(
            Figure(name=f"slope of time, {label}", value=steepness, cpu=cpu, at_most=LARGEST_SLOPE)
        )
    return rows, figures


def measure_lengths(
    name: str, model: str, lengths: Sequence[int], folder: Path, options: object
) -> tuple[list[dict[str, object]], Figure]:
    """Embed one sequence of growing length.

    Args:
        name: Of the model.
        model: Name or folder.
        lengths: In bases.
        folder: For the files.
        options: Of the command line.

    Returns:
        A row a length, and the rise of the peak.
    """
    rows: list[dict[str, object]] = []
    for length in lengths:
        fasta = write_sequence(folder / "one.fa", length)
        rows.append({"model": name, "length": length, **in_own_process(model, fasta, options.threads)})
    rise = float(rows[-1]["peak_mib"]) - float(rows[0]["peak_mib"])
    label = f"one sequence, {name}, {lengths[0]} to {lengths[-1]} bp"
    return rows, Figure(name=f"rise of peak RSS in MiB, {label}", value=rise)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--worker"]:
        logging.disable(logging.WARNING)
        print(json.dumps(run_once(*words[1:4], threads=int(words[4]))))
        return
    parser = option_parser(__doc__)
    parser.add_argument("--megabases", type=float, nargs="+", default=[1, 3, 10, 30, 100])
    parser.add_argument("--mini-megabases", type=float, nargs="+", default=[0.1, 0.3, 1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--longest-attention", type=int, default=100_000, help="attention grows by the square"
    )
    parser.add_argument("--longest-mini", type=int, default=1_000_000)
    parser.add_argument("--repeat-below-s", type=float, default=30, help="longer runs are made once")
    options = parser.parse_args(words)
    if options.quick:
        options.megabases, options.mini_megabases, options.rounds = [0.1, 0.4], [0.01, 0.02], 1
        options.lengths, options.longest_attention, options.longest_mini = [1000, 20_000], 20_000, 10_000
    sizes, lengths, figures = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = write_tiny_models(folder)
        for name, megabases in (("tiny", options.megabases), ("mini", options.mini_megabases)):
            rows, found = measure_sizes(name, models[name], megabases, folder, options)
            sizes += rows
            figures += found
        limits = {"filters": 2**62, "all kinds": options.longest_attention, "mini": options.longest_mini}
        for name, longest in limits.items():
            chosen = [length for length in options.lengths if length <= longest]
            if chosen:
                rows, found = measure_lengths(name, models[name], chosen, folder, options)
                lengths += rows
                figures.append(found)
    file_results(
        "speed_growth",
        "Growth of time and memory with the input",
        options,
        figures=figures,
        tables={"Size of the input": sizes, "Length of one sequence": lengths},
        remarks=[
            "tiny: one block with a short filter, hidden 8, windows of 8 kb: for the sizes that the bundled "
            "model would take hours for. mini: the bundled model, windows of 8 kb.",
            "filters: all three filters, hidden 8, context 1 Mb, no attention; all kinds: with attention, up "
            f"to {options.longest_attention} bp, as its time grows by the square.",
            "baseline_mib: peak when the model was loaded and had embedded 500 bp. The table of ids that "
            "guards against duplicates grows with the records.",
        ],
    )


if __name__ == "__main__":
    main()
