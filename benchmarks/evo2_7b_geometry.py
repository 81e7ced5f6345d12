"""Evo 2 7B's real geometry on a small machine: memory and time of ``extract --layer 28`` in bfloat16.

Writes random weights of the registry's ``evo2_7b`` shape as a sharded safetensors folder (13 GB), a few
blocks at a time, and runs the command on one record in a process of its own. Weights are mapped from the
files, so resident memory has two parts: pages of the files, which the system may drop and read again, and
memory that only the process has. Both peaks are reported, with what had to be read from disk. The folder is
removed unless it was there before or is to be kept::

    python benchmarks/evo2_7b_geometry.py /scratch/evo2_7b --json benchmarks/results/evo2_7b_geometry.json

Needs about 14 GB of disk; Linux for the split of the memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from describe_machine import describe_machine

import genoembed
from genoembed.models.registry import count_parameters, find_model
from genoembed.models.striped_hyena2.modeling import StripedHyena2Model, initialize_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

SEED = 7
SAMPLE_S = 0.05
BLOCKS_PER_SHARD = 4
STAYS_FLOAT32 = ("log_poles", "residues", "inv_freq")
GIB = 2**30


def write_random_model(folder: Path, config: genoembed.StripedHyena2Config) -> dict[str, int | float]:
    """Write a folder that ``from_pretrained`` opens, holding a few blocks in memory at a time.

    Args:
        folder: Where to write; made if absent.
        config: Shape of the model.

    Returns:
        ``parameters``, ``bytes``, ``shards`` and ``seconds``.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    weight_map: dict[str, str] = {}
    parts = list(_parts(config))
    total_bytes = 0
    for number, names in enumerate(parts, start=1):
        shard = {name: tensor for part in names for name, tensor in _random_part(config, part)}
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
        total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.dtype, config.architectures = torch.bfloat16, ["StripedHyena2ForCausalLM"]
    config.save_pretrained(folder)
    genoembed.CharTokenizer().save_pretrained(folder)
    return {
        "parameters": count_parameters(config),
        "bytes": total_bytes,
        "shards": len(parts),
        "seconds": time.perf_counter() - started,
    }


def _parts(config: genoembed.StripedHyena2Config) -> Iterator[list[str]]:
    """Names of the modules of each shard."""
    yield ["embedding_layer", "norm"]
    blocks = [f"blocks.{index}" for index in range(config.num_hidden_layers)]
    for first in range(0, len(blocks), BLOCKS_PER_SHARD):
        yield blocks[first : first + BLOCKS_PER_SHARD]


def _random_part(config: genoembed.StripedHyena2Config, name: str) -> Iterator[tuple[str, Tensor]]:
    """Starting weights of one child of the model, in the types in which checkpoints hold them."""
    with torch.device("meta"):
        module = StripedHyena2Model(config).get_submodule(name)
    module = module.to_empty(device="cpu")
    for child in module.modules():
        initialize_module(child, config)
    for key, tensor in module.state_dict().items():
        kept = torch.float32 if key.endswith(STAYS_FLOAT32) else torch.bfloat16
        yield f"{name}.{key}", tensor.to(kept).contiguous()


def write_record(path: Path, num_bases: int) -> Path:
    """Write one random record."""
    letters = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(SEED).integers(0, 4, num_bases)]
    path.write_bytes(b">random length=%d\n%s\n" % (num_bases, letters.tobytes()))
    return path


def run_extract(folder: Path, fasta: Path, output: Path, *, layer: str, threads: int) -> dict[str, object]:
    """Run the command and watch its memory.

    Args:
        folder: The model.
        fasta: Input.
        output: The file to write.
        layer: Layer spec.
        threads: Of the matrix products.

    Returns:
        Seconds (of the process; of the run behind loading; of the forward pass), peaks of resident memory in
        GiB, page faults, and what the output holds.

    Raises:
        RuntimeError: If the command fails.
    """
    words = [
        sys.executable,
        "-m",
        "genoembed",
        "extract",
        str(fasta),
        "--model",
        str(folder),
        "--layer",
        layer,
    ]
    words += ["--dtype", "bfloat16", "--threads", str(threads), "-o", str(output), "--overwrite", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peaks = _watch(process)
        told, errors = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        message = f"extract ended with {process.returncode}: {errors[-2000:]}"
        raise RuntimeError(message)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(told)
    with genoembed.open_embeddings(output) as file:
        matrix, layers = file.X[:], file.layers
    return {
        "seconds": seconds,
        "seconds_behind_loading": report["seconds"],
        "seconds_forward": report["stats"]["forward_s"],
        "peak_rss_gib": after.ru_maxrss * 1024 / GIB,
        **{f"peak_{name}_gib": value / GIB for name, value in peaks.items()},
        "major_faults": after.ru_majflt - before.ru_majflt,
        "minor_faults": after.ru_minflt - before.ru_minflt,
        "read_from_disk_gib": (after.ru_inblock - before.ru_inblock) * 512 / GIB,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "layers": list(layers),
        "shape": list(matrix.shape),
        "is_finite": bool(np.isfinite(matrix).all()),
        "rms": float(np.sqrt(np.mean(matrix.astype(np.float64) ** 2))),
    }


def _watch(process: subprocess.Popen[str]) -> dict[str, int]:
    """Peaks of the process's own memory and of mapped files, in bytes, sampled until it ends."""
    peaks = {"anonymous": 0, "mapped_files": 0}
    status = Path(f"/proc/{process.pid}/status")
    fields = {"RssAnon": "anonymous", "RssFile": "mapped_files"}
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            name, _, value = line.partition(":")
            if name in fields:
                peaks[fields[name]] = max(peaks[fields[name]], int(value.split()[0]) * 1024)
        time.sleep(SAMPLE_S)
    return peaks


def measure(folder: Path, *, model: str, layer: str, num_bases: int, threads: int) -> dict[str, object]:
    """Write the weights unless they are there, and run.

    Args:
        folder: Of the model.
        model: Registry name that gives the shape.
        layer: Layer spec.
        num_bases: Of the record.
        threads: Of the matrix products.

    Returns:
        Figures, as JSON holds them.
    """
    config = genoembed.StripedHyena2Config.from_dict(find_model(model).shape.to_dict())
    written = None if (folder / "config.json").is_file() else write_random_model(folder, config)
    with tempfile.TemporaryDirectory() as scratch:
        fasta = write_record(Path(scratch, "record.fa"), num_bases)
        found = run_extract(folder, fasta, Path(scratch, "out.h5"), layer=layer, threads=threads)
    return {
        "machine": describe_machine() | {"threads": threads},
        "model": {"shape": model, "weights": "random", "dtype": "bfloat16", "num_bases": num_bases},
        "layer": layer,
        "written": written,
        "extract": found,
    }


def as_markdown(figures: dict, note: str) -> str:
    """Format the figures for people."""
    lines = [f"# Geometry of {figures['model']['shape']} on a small machine", ""]
    lines += [f"- {key}: {value}" for key, value in figures["machine"].items()]
    lines += [f"- model: random weights, {figures['model']['dtype']}"]
    lines += [f"- input: one record of {figures['model']['num_bases']} bases"]
    if figures["written"]:
        written = figures["written"]
        lines.append(
            f"- files: {written['parameters']:,} parameters, {written['bytes'] / GIB:.2f} GiB in "
            f"{written['shards']} shards, written in {written['seconds']:.0f} s"
        )
    lines += [f"- note: {note or 'none'}", "", "| figure | value |", "| --- | ---: |"]
    for name, value in figures["extract"].items():
        lines.append(f"| {name} | {f'{value:.2f}' if isinstance(value, float) else value} |")
    lines += [
        "",
        "Peak RSS counts pages of the mapped weight files, which the system may drop at any time; "
        "`peak_anonymous` is what the process needs for itself. `seconds_behind_loading` holds the digest of "
        "the weight files as well as the forward pass.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the weights go (never into the repository)")
    parser.add_argument("--model", default="evo2_7b", help="registry name that gives the shape")
    parser.add_argument("--layer", default="28")
    parser.add_argument("--bases", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", action="store_true", help="leave the weights where they are")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--json", type=Path, help="file for the figures; the page goes beside it")
    options = parser.parse_args(arguments)
    was_there = options.folder.exists()
    try:
        figures = measure(
            options.folder,
            model=options.model,
            layer=options.layer,
            num_bases=options.bases,
            threads=options.threads,
        )
    finally:
        if not (options.keep or was_there):
            shutil.rmtree(options.folder, ignore_errors=True)
    page = as_markdown(figures, options.note)
    if options.json is not None:
        options.json.write_text(json.dumps({"note": options.note, **figures}, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
