"""The parts of ``gpu.py`` that measure speed and memory on a device."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu_bench import LIMIT_SHARE, SAME, SEED, TINY_SHAPE, Bench, Report, drawn_ids, relative
from measuring import SkippedError, ratio, spread
from speed_extract import write_fasta
from speed_limit import count_work

import genoembed
from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.models.registry import find_model
from genoembed.models.striped_hyena2 import operators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from genoembed.models.genomic_model import GenomicModel


def _peak(bench: Bench, report: Report) -> None:
    size, copied = (64, 1 << 16) if bench.is_tiny else (8192, 1 << 31)
    source, target = (torch.ones(copied, dtype=torch.uint8, device=bench.device) for _ in range(2))
    actions: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for name in ("float32", "bfloat16", "float16"):
        left, right = (bench.random(size, size, dtype=getattr(torch, name), seed=seed) for seed in (1, 2))
        actions[name] = functools.partial(torch.mm, left, right)
    samples = bench.timed(actions)
    rows = [
        {"product": name, "size": size, "TFLOP/s": 2 * size**3 / spread(samples[name])["seconds"] / 1e12}
        for name in ("float32", "bfloat16", "float16")
    ]
    rows.append(
        {"product": "copy", "size": copied, "GB/s": 2 * copied / spread(samples["copy"])["seconds"] / 1e9}
    )
    report.tables["Limits"] = rows


def _evo2_7b(bench: Bench, report: Report) -> None:
    model = bench.evo2
    cases = [(2, 64), (1, 128)] if bench.is_tiny else [(64, 1024), (16, 8192), (1, 131072)]
    size = 64 if bench.is_tiny else 8192
    left, right = (bench.random(size, size, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    config = _first_blocks(model.network.config, bench.layer + 1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for batch, length in cases:
            fasta = write_fasta(Path(scratch, f"{length}.fa"), [length] * batch)
            row: dict[str, Any] = {"records": batch, "bases each": length}
            extract = functools.partial(
                genoembed.extract,
                fasta,
                model=model,
                layers=bench.layer,
                output=fasta.with_suffix(".h5"),
                overwrite=True,
                window=max(length, 256),
            )
            with bench.peak_memory(row):
                reports: list[Any] = []
                samples = bench.timed(
                    {
                        "extract": lambda reports=reports, run=extract: reports.append(run()),
                        "square": lambda: torch.mm(left, right),
                    },
                    rounds=min(3, bench.rounds),
                )
            with genoembed.open_embeddings(fasta.with_suffix(".h5")) as file:
                is_finite = bool(np.isfinite(file.X[:]).all())
            report.check(f"finite vectors, {batch} x {length}", float(is_finite), at_least=1)
            seconds = spread(samples["extract"])["seconds"]
            work = count_work(config, batch, length, item_bytes=2)
            flops = work.linear + work.attention
            peak = 2 * size**3 / spread(samples["square"])["seconds"]
            goal = {"at_least": LIMIT_SHARE} if length == 8192 else {}
            report.measure(f"share of the bfloat16 limit, {batch} x {length}", flops / seconds / peak, **goal)
            inside = reports[-1].stats.forward_s
            report.measure(
                f"share of extract outside the forward, {batch} x {length}", 1 - inside / reports[-1].seconds
            )
            row |= {"tokens/s": round(batch * length / seconds), "s": seconds, "forward s": inside}
            rows.append(
                row | {"TFLOP": flops / 1e12, "TFLOP/s": flops / seconds / 1e12, "limit TFLOP/s": peak / 1e12}
            )
    report.tables["extract, random weights of Evo 2 7B's shape, bfloat16"] = rows
    report.remarks.append(
        f"Limit: a bfloat16 product of {size} x {size} in the same rounds. Work: linear layers and causal "
        f"attention of blocks 0 to {bench.layer}, that of the filters left out."
    )


def _first_blocks(config: Any, count: int) -> StripedHyena2Config:
    """Describe a model of the first blocks alone."""
    values = {key: value for key, value in config.to_dict().items() if key in find_model("evo2_7b").config}
    for key in [key for key in values if key.endswith("_layer_idxs")]:
        values[key] = [index for index in values[key] if index < count]
    return StripedHyena2Config(**{**values, "num_hidden_layers": count})


def _kernels(bench: Bench, report: Report) -> None:
    from torch.profiler import ProfilerActivity, profile

    network = bench.evo2.network
    ids_BL = drawn_ids(bench, 1, 64) if bench.is_tiny else drawn_ids(bench, 2, 8192)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.is_cuda else [])]
    with torch.inference_mode():
        network(ids_BL)
        bench.synchronize()
        with profile(activities=activities) as found:
            network(ids_BL)
            bench.synchronize()
    key = "self_device_time_total" if bench.is_cuda else "self_cpu_time_total"
    averages = sorted(found.key_averages(), key=lambda each: -getattr(each, key))
    # operators have the time of the kernels that they launch as well: on a GPU, kernels alone
    if bench.is_cuda:
        averages = [each for each in averages if str(each.device_type).endswith("CUDA")]
    total = sum(getattr(each, key) for each in averages)
    report.tables[f"Kernels of a pass of {ids_BL.shape[0]} x {ids_BL.shape[1]} tokens"] = [
        {
            "kernel": each.key[:110].replace("|", "/"),
            "calls": each.count,
            "ms": round(getattr(each, key) / 1e3, 3),
            "share": getattr(each, key) / total,
        }
        for each in averages[:20]
    ]
    report.measure("ms of all kernels of a pass", total / 1e3)


def _operators(bench: Bench, report: Report) -> None:
    model = bench.evo2
    batch, length = (1, 64) if bench.is_tiny else (2, 8192)
    width = model.network.config.hidden_size
    x_BLD = bench.random(batch, length, width, dtype=torch.bfloat16)
    blocks = {
        kind: model.network.blocks[index]
        for kind, index in (("hcs", 0), ("hcm", 1), ("hcl", 2), ("attention", 3))
    }
    short = blocks["hcs"].filter.short_filter_weight[:width, 0]
    long_taps = (
        blocks["hcs"].filter.h[:, 0].repeat_interleave(width // blocks["hcs"].filter.h.shape[0], dim=0)
    )
    poles = blocks["hcl"].filter.log_poles[..., 0]
    positions = torch.arange(length, device=bench.device)[None]
    from genoembed.models.striped_hyena2.state import BlockContext

    context = BlockContext(position_ids_BL=positions)
    actions: dict[str, Callable[[], object]] = {
        "short filter, 3 taps": lambda: operators.causal_fir(x_BLD, short),
        "short filter, 3 taps, shifted and added": lambda: operators._shift_and_add(x_BLD, short, zeros=2),
        "inner short filter, 7 taps": lambda: operators.causal_fir(x_BLD, long_taps),
        "inner short filter, 7 taps, shifted and added": lambda: operators._shift_and_add(
            x_BLD, long_taps, zeros=6
        ),
        "medium filter": lambda: operators.causal_convolution(
            x_BLD, blocks["hcm"].filter.h[:, 0], blocks["hcm"].filter.D
        ),
        "long filter": lambda: operators.modal_convolution(
            x_BLD, poles, blocks["hcl"].filter.residues, blocks["hcl"].filter.D
        ),
        "projections": lambda: blocks["hcs"].projections.project_parts(x_BLD),
        "norm": lambda: blocks["hcs"].pre_norm(x_BLD),
        "MLP": lambda: blocks["hcs"].mlp(x_BLD),
        "attention": lambda: blocks["attention"].inner_mha_cls(x_BLD, context),
        **{f"block: {kind}": functools.partial(block, x_BLD, context) for kind, block in blocks.items()},
    }
    with torch.inference_mode():
        samples = bench.timed(actions)
        same = relative(
            actions["short filter, 3 taps"](), operators._shift_and_add(x_BLD, short, zeros=2)[:, :length]
        )
    report.check("short filter, both ways", same, at_most=SAME["bfloat16"])
    report.tables[f"Operators, {batch} x {length} x {width}, bfloat16"] = [
        {"operator": name, "ms": 1e3 * spread(taken)["seconds"]} for name, taken in samples.items()
    ]


def _extract(bench: Bench, report: Report) -> None:
    dtype = "bfloat16" if bench.is_cuda else "float32"
    model = bench.bundled(dtype)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count, length in [(4, 64)] if bench.is_tiny else [(4096, 1000), (512, 8000)]:
            fasta = write_fasta(Path(scratch, f"{length}.fa"), [length] * count)
            run = functools.partial(
                genoembed.extract,
                fasta,
                model=model,
                layers=bench.layers[-1],
                output=Path(scratch, "o.h5"),
                overwrite=True,
            )
            row: dict[str, Any] = {"records": count, "bases each": length}
            reports: list[Any] = []
            with bench.peak_memory(row):
                actions = {"extract": lambda reports=reports, run=run: reports.append(run())}
                if not bench.is_tiny or count:
                    actions["loop"] = functools.partial(
                        _plain_loop, bench, model, fasta, rows_per_batch=16384 // length or 1
                    )
                samples = bench.timed(actions, rounds=min(3, bench.rounds))
            seconds = spread(samples["extract"])["seconds"]
            report.figures.append(
                ratio(
                    f"plain loop of equal lengths over extract, {count} x {length}",
                    samples["loop"],
                    samples["extract"],
                )
            )
            rows.append(
                {
                    **row,
                    "tokens/s": round(count * length / seconds),
                    "s": seconds,
                    "forward s": reports[-1].stats.forward_s,
                }
            )
    report.tables[f"extract, bundled model, {dtype}"] = rows


@torch.inference_mode()
def _plain_loop(bench: Bench, model: GenomicModel, fasta: Path, *, rows_per_batch: int) -> np.ndarray:
    """Embed records of one length as a script would; the mean over tokens in float32."""
    lines = fasta.read_text(encoding="ascii").splitlines()[1::2]
    found = []
    for first in range(0, len(lines), rows_per_batch):
        ids = np.stack(
            [np.frombuffer(line.encode(), np.uint8) for line in lines[first : first + rows_per_batch]]
        )
        states = model.module(torch.from_numpy(ids.astype(np.int64)).to(bench.device)).last_hidden_state
        found.append(states.float().mean(dim=1).cpu())
    matrix = torch.cat(found).numpy()
    np.save(fasta.with_suffix(".npy"), matrix)
    return matrix


def _compiled(bench: Bench, report: Report) -> None:
    network = bench.evo2.network
    batch, length = (1, 64) if bench.is_tiny else (2, 8192)
    x_BLD = bench.random(batch, length, network.config.hidden_size, dtype=torch.bfloat16)
    from genoembed.models.striped_hyena2.state import BlockContext

    context = BlockContext(position_ids_BL=torch.arange(length, device=bench.device)[None])
    rows = []
    # the compiler of CPUs needs a C++ compiler and minutes; what it is given is looked at all the same
    backend = "eager" if bench.is_tiny else "inductor"
    for kind, index in (("hcs", 0), ("hcm", 1), ("hcl", 2), ("attention", 3))[: 1 if bench.is_tiny else 4]:
        with report.guarded(f"compiled {kind} block"), torch.inference_mode():
            block = network.blocks[index]
            expected = block(x_BLD, context)  # first: what is decided once is decided by now
            torch._dynamo.reset()
            broken = torch._dynamo.explain(block)(x_BLD, context).graph_break_count
            started = time.perf_counter()
            compiled = torch.compile(block, dynamic=False, backend=backend)
            difference = relative(compiled(x_BLD, context), expected)
            bench.synchronize()
            row = {
                "block": kind,
                "graph breaks": broken,
                "compiling s": time.perf_counter() - started,
                "difference": difference,
            }
            samples = bench.timed(
                {"eager": lambda b=block: b(x_BLD, context), "compiled": lambda c=compiled: c(x_BLD, context)}
            )
            row |= {f"{name} ms": 1e3 * spread(taken)["seconds"] for name, taken in samples.items()}
            rows.append(row)
            report.check(f"graph breaks of the {kind} block", broken, at_most=0)
            report.check(f"compiled {kind} block", difference, at_most=5e-2)
            report.figures.append(
                ratio(f"eager over compiled, {kind} block", samples["eager"], samples["compiled"])
            )
    report.tables[f"Blocks compiled by {backend}, {batch} x {length}"] = rows


def _training(bench: Bench, report: Report) -> None:
    with _run_folder(bench) as (start, corpus):
        rows = [_pretrain(bench, report, start, corpus, way="kept apart", isolate=True, packing="bins")]
        with report.guarded("LoRA"):
            rows.append(_lora(bench, report, start))
    report.tables["Training"] = rows


def _compiled_training(bench: Bench, report: Report) -> None:
    if bench.is_tiny:
        raise SkippedError("the compiler of CPUs needs a C++ compiler and minutes")
    # rows of one length: segments kept apart have lengths of their own, and each would be compiled anew
    shape = {"isolate": False, "packing": "stream"}
    with _run_folder(bench) as (start, corpus):
        report.tables["Training, compiled blocks against eager ones"] = rows = []
        for way, is_compiled in (("eager", False), ("compiled", True)):
            rows.append(_pretrain(bench, report, start, corpus, way=way, compile_blocks=is_compiled, **shape))
    eager, compiled = rows
    gain = compiled["tokens/s, last"] / eager["tokens/s, last"]
    report.measure("tokens/s of compiled over eager blocks in training", gain)
    difference = abs(compiled["last loss"] - eager["last loss"])
    report.check("last loss, compiled and eager", difference, at_most=0.05)


@contextlib.contextmanager
def _run_folder(bench: Bench) -> Iterator[tuple[Path, Path]]:
    """Write a small model of random weights and a corpus into a folder of their own."""
    if bench.is_cuda != torch.cuda.is_available():
        raise SkippedError("training takes the GPU where there is one")
    shape = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408, "num_hidden_layers": 7}
    kinds = {"attn": [3], "hcs": [0, 4], "hcm": [1, 5], "hcl": [2, 6]}
    shape |= {f"{kind}_layer_idxs": indices for kind, indices in kinds.items()}
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch, "start")
        torch.manual_seed(SEED)
        config = StripedHyena2Config(**(TINY_SHAPE if bench.is_tiny else shape))
        StripedHyena2ForCausalLM(config).save_pretrained(start)
        genoembed.CharTokenizer().save_pretrained(start)
        lengths = [64, 128, 32] * 20 if bench.is_tiny else [1024, 2048, 512] * 400
        yield start, write_fasta(Path(scratch, "corpus.fa"), lengths)


def _pretrain(
    bench: Bench, report: Report, start: Path, corpus: Path, *, way: str, **options: Any
) -> dict[str, Any]:
    steps, window, rows = (2, 128, 2) if bench.is_tiny else (20, 2048, 16)
    shape = {"steps": steps, "rows": rows, "tokens of a row": window}
    row: dict[str, Any] = {"run": f"pretraining, {way}", **shape}
    started = time.perf_counter()
    with bench.peak_memory(row):
        done = genoembed.pretrain(
            corpus,
            start.parent / way.replace(" ", "-"),
            model=str(start),
            max_steps=steps,
            window=window,
            rows_per_device=rows,
            logging_steps=max(1, steps // 4),
            eval_steps=steps,
            save_steps=steps,
            heldout_fraction=0.2,
            **options,
        )
    lines = [json.loads(line) for line in Path(done.metrics).read_text(encoding="utf-8").splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    report.check(
        f"pretraining, {way}: finite losses", float(bool(losses) and np.isfinite(losses).all()), at_least=1
    )
    return row | {
        "s": time.perf_counter() - started,
        "tokens/s, last": speeds[-1],
        "first loss": losses[0],
        "last loss": losses[-1],
        "bits per base": done.bits_per_base,
    }


def _lora(bench: Bench, report: Report, start: Path) -> dict[str, Any]:
    steps, rows = (2, 2) if bench.is_tiny else (20, 16)
    if importlib.util.find_spec("peft") is None:
        report.remarks.append("LoRA was left out: peft is not installed.")
        return {"run": "LoRA", "s": "left out"}
    length = 64 if bench.is_tiny else 512
    texts = bench.sequences([length] * (16 if bench.is_tiny else 512))
    table = start.parent / "rows.tsv"
    lines = [f"r{number}\t{text}\t{text.count('G') / length:.4f}" for number, text in enumerate(texts)]
    table.write_text("\n".join(["id\tsequence\tlabel", *lines, ""]), encoding="utf-8")
    row: dict[str, Any] = {
        "run": "fine-tuning, LoRA",
        "steps": steps,
        "rows": rows,
        "tokens of a row": length,
    }
    started = time.perf_counter()
    with bench.peak_memory(row):
        genoembed.finetune(
            table,
            start.parent / "lora",
            task="regression",
            model=str(start),
            tuning="lora",
            max_steps=steps,
            rows_per_device=rows,
            logging_steps=1,
            validation_fraction=0.2,
            test_fraction=0.0,
        )
    metrics = (start.parent / "lora" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, metrics) if "loss" in line]
    report.check("LoRA: finite losses", float(bool(losses) and np.isfinite(losses).all()), at_least=1)
    return row | {"s": time.perf_counter() - started, "last loss": losses[-1]}


def _vortex(bench: Bench, report: Report) -> None:
    from tests.vortex_live import HAS_VTX, cast_reference

    if not HAS_VTX:
        raise SkippedError(
            "the reference implementation is not installed: pip install --no-deps vtx einops tqdm"
        )
    import speed_vortex

    ours, reference = (model.to(bench.device) for model in speed_vortex.build_pair())
    ours.to(torch.bfloat16)
    cast_reference(reference, torch.bfloat16)
    for batch, length in [(1, 64)] if bench.is_tiny else [(16, 1024), (2, 8192)]:
        ids_BL = drawn_ids(bench, batch, length)
        samples = bench.timed(
            {
                "vortex": lambda ids=ids_BL: speed_vortex.run_to_last_block(reference, ids),
                "ours": lambda ids=ids_BL: speed_vortex.run_to_last_block(ours, ids),
            }
        )
        figure = ratio(
            f"Vortex over genoembed, hidden 512, {batch} x {length}",
            samples["vortex"],
            samples["ours"],
            at_least=1.0,
        )
        report.figures.append(figure)


PARTS: dict[str, Callable[[Bench, Report], None]] = {
    "peak": _peak,
    "evo2_7b": _evo2_7b,
    "kernels": _kernels,
    "operators": _operators,
    "extract": _extract,
    "compiled": _compiled,
    "training": _training,
    "compiled_training": _compiled_training,
    "vortex": _vortex,
}
