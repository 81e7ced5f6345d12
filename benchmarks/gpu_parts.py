"""The parts of ``gpu.py``: what is checked and measured on a device, at full or at tiny shapes.

In: a device. Out: for each part a `Report` of figures, tables and remarks. A *check* is a figure that must be
met (numbers); a *measurement* may have a goal that is missed (speed). Nothing here names a device but where a
thing exists on one kind only, so that what the tiny mode runs on a CPU is what runs on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # the tests hold the goldens and the integer oracle

import fp8 as fp8_bench
import isolation
import numpy as np
import torch
from describe_machine import describe_machine
from measuring import GIB, Figure, SkippedError, interleave, ratio, spread
from safetensors.torch import load_file
from speed_extract import write_fasta
from speed_limit import count_work
from torch import nn

import genoembed
from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.batching.pack import pack_bins
from genoembed.contracts import Batch
from genoembed.embedding import RecordEmbedder, clean_sequences
from genoembed.models.behavior import forward_arguments
from genoembed.models.genomic_model import GenomicModel
from genoembed.models.layers import capture
from genoembed.models.registry import find_model
from genoembed.models.striped_hyena2 import operators
from genoembed.models.striped_hyena2.convert import convert_checkpoint
from genoembed.models.striped_hyena2.fp8 import emulate_product, has_hopper_sums
from genoembed.models.striped_hyena2.modeling import initialize_module
from genoembed.models.striped_hyena2.network import PlainStripedHyena2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SETS = {"a_base": "evo2_golden_7bstyle.pt", "b_1m": "evo2_golden_40bstyle.pt"}
RELATIVE_RMS, BF16_RMS_RATIO = 1e-5, 1.2
FAMILY_TOLERANCE = 1e-5
FAMILY_TOLERANCES = {"hyenadna": 1e-4, "ntv3_pre": 2e-5}
SAME = {"float32": 1e-5, "bfloat16": 1e-2}
"""How much a vector may depend on its batch, relative to the largest value."""
OTHER_DEVICE = {"float32": 1e-4, "bfloat16": 5e-2}
LIMIT_SHARE = 0.4
LAYER, TINY_LAYER = 28, 3
SEED = 19


class Report:
    """What a part found."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.remarks: list[str] = []
        self.problems: list[str] = []
        """Checks that are not met, and things that failed."""

    def check(
        self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Add a figure that must be met."""
        figure = Figure(name=name, value=value, at_most=at_most, at_least=at_least)
        self.figures.append(figure)
        if not figure.is_met:  # NaN is not met either
            self.problems.append(f"{name} is {value:.3g}, expected {figure.goal}")

    def measure(self, name: str, value: float, **goal: float) -> None:
        """Add a figure that may be missed."""
        self.figures.append(Figure(name=name, value=value, **goal))

    @contextlib.contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Note what fails inside, and go on."""
        try:
            yield
        except torch.OutOfMemoryError:  # the rest would fail, too
            raise
        except Exception as error:
            if "CUDA error" in str(error):  # nothing runs in this process any more
                raise
            self.problems.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "figures": [asdict(figure) for figure in self.figures],
            "tables": self.tables,
            "remarks": self.remarks,
            "problems": self.problems,
        }


class Bench:
    """The device, the sizes, and what several parts share.

    Args:
        device: Of torch.
        is_tiny: Small shapes.
    """

    def __init__(self, device: str, *, is_tiny: bool) -> None:
        self.name, self.is_tiny = device, is_tiny
        self.device = torch.device(device)
        self.rounds = 1 if is_tiny else 5
        self.layer = TINY_LAYER if is_tiny else LAYER
        self.layers = [self.layer] if is_tiny else [self.layer, "final"]
        self._bundled: dict[str, GenomicModel] = {}
        logging.getLogger("transformers").setLevel(logging.ERROR)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU of CUDA (or ROCm, which says so, too)."""
        return self.device.type == "cuda"

    @property
    def machine(self) -> dict[str, Any]:
        """What a reader must know; ``error`` where the device cannot be used."""
        try:
            torch.zeros(1, device=self.device).tolist()
        except (RuntimeError, AssertionError) as error:
            return {"error": f"device {self.name!r} cannot be used here: {str(error).splitlines()[0]}"}
        facts: dict[str, Any] = describe_machine(
            ("genoembed", "numpy", "torch", "transformers", "triton", "numba")
        )
        if self.is_cuda:
            stated = torch.cuda.get_device_properties(self.device)
            facts |= {"gpu": stated.name, "gpu_gib": round(stated.total_memory / GIB, 1)}
            facts |= {
                "capability": f"{stated.major}.{stated.minor}",
                "cuda": torch.version.cuda or torch.version.hip,
            }
            facts |= {"cudnn": torch.backends.cudnn.version()}
        return facts | {"device": self.name}

    @property
    def parts(self) -> dict[str, Callable[[], Report]]:
        """What can be run, by name."""
        return {name: functools.partial(self._run, part) for name, part in _PARTS.items()}

    def _run(self, part: Callable[[Bench, Report], None]) -> Report:
        report = Report()
        try:
            part(self, report)
        finally:
            if self.is_cuda:
                torch.cuda.empty_cache()
        return report

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def timed(
        self, actions: Mapping[str, Callable[[], object]], *, rounds: int | None = None
    ) -> dict[str, Any]:
        """Run actions by turns, each to the end of its last kernel."""

        def to_the_end(action: Callable[[], object]) -> None:
            action()
            self.synchronize()

        whole = {name: functools.partial(to_the_end, action) for name, action in actions.items()}
        return interleave(whole, rounds=rounds or self.rounds, min_rounds=1)

    @contextlib.contextmanager
    def peak_memory(self, row: dict[str, Any]) -> Iterator[None]:
        """Put the largest memory of the device that the code inside takes into a row."""
        if self.is_cuda:
            self.synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.is_cuda:
            row["peak GiB"] = round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
        """Draw normal numbers, the same on every device."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def sequences(self, lengths: Sequence[int]) -> list[str]:
        """Draw DNA."""
        drawn = np.random.default_rng(SEED).integers(0, 4, sum(lengths))
        letters = np.frombuffer(b"ACGT", np.uint8)[drawn].tobytes().decode()
        ends = np.cumsum(lengths).tolist()
        return [letters[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def bundled(self, dtype: str) -> GenomicModel:
        """Load the bundled model onto the device, once."""
        if dtype not in self._bundled:
            self._bundled[dtype] = genoembed.load_model(device=self.name, dtype=dtype)
        return self._bundled[dtype]

    @cached_property
    def evo2(self) -> GenomicModel:
        """Random weights of Evo 2 7B's shape, made on the device."""
        shape = find_model("evo2_7b").config
        if self.is_tiny:
            shape = {**shape, **_TINY_SHAPE}
        elif self.is_cuda and torch.cuda.mem_get_info(self.device)[0] < 30 * GIB:
            free = torch.cuda.mem_get_info(self.device)[0] / GIB
            raise SkippedError(
                f"Evo 2 7B's shape needs about 30 GiB, and {free:.0f} GiB of the device are free"
            )
        config = StripedHyena2Config(**shape)
        with torch.device("meta"):
            network = PlainStripedHyena2(config).to(torch.bfloat16)
        network = network.to_empty(device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.is_cuda else []):
            torch.manual_seed(SEED)
            for module in network.modules():
                initialize_module(module, config)
        return RandomModel(network, genoembed.CharTokenizer(), name="random weights, Evo 2 7B's shape")


_TINY_SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "hcm_filter_groups": 8,
    "hcs_filter_groups": 8,
    "num_hidden_layers": 4,
    "attn_layer_idxs": [3],
    "hcs_layer_idxs": [0],
    "hcm_layer_idxs": [1],
    "hcl_layer_idxs": [2],
}


class RandomModel(GenomicModel):
    """A model that nobody will look for: its 13 GB need no digest."""

    @property
    def content(self) -> dict[str, str]:
        return {"weights": "random", "config.json": "random", "tokenizer": "random"}


def relative(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """Return the largest difference over the largest value."""
    a, b = (torch.as_tensor(each).detach().cpu().double() for each in (found, expected))
    return float((a - b).abs().max() / b.abs().max())


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return float(x.double().square().mean().sqrt())


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


def _goldens(bench: Bench, report: Report) -> None:
    if not GOLDEN.is_dir():
        raise SkippedError("the stored activations lie in the repository's tests, which are not here")
    for name, checkpoint in SETS.items():
        for dtype in (torch.float32, torch.bfloat16):
            with report.guarded(f"{name}, {dtype}"):
                _golden_set(bench, report, name, checkpoint, dtype)


def _golden_set(bench: Bench, report: Report, name: str, checkpoint: str, dtype: torch.dtype) -> None:
    is_exact = dtype == torch.float32
    inputs = load_file(GOLDEN / name / "inputs.safetensors")
    stored = load_file(GOLDEN / name / ("outputs.safetensors" if is_exact else "outputs_bf16.safetensors"))
    with tempfile.TemporaryDirectory() as scratch:
        weights = GOLDEN / name / ("weights.safetensors" if is_exact else checkpoint)
        folder = convert_checkpoint(
            weights, Path(scratch, "m"), config=GOLDEN / name / "config.yml", dtype=dtype
        )
        model = StripedHyena2ForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(bench.device)
    worst, ratios, seen = 0.0, [], 0
    for case in sorted({key.split("/")[0] for key in stored}):
        positions = stored[f"{case}/positions"]
        wanted = {key.split("/")[1]: value for key, value in stored.items() if key.startswith(f"{case}/")}
        modules = [module for module in wanted if module not in ("positions", "logits", "logits_fp32compute")]
        found: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(path).register_forward_hook(functools.partial(_keep, found, path))
            for path in modules
        ]
        with torch.inference_mode():
            found["logits"] = model(input_ids=inputs[case].to(bench.device)).logits
        for handle in handles:
            handle.remove()
        if is_exact:
            for path in (*modules, "logits"):
                ours = found[path][:, positions].cpu()
                worst = max(worst, rms(ours - wanted[path]) / rms(wanted[path]) / RELATIVE_RMS)
                seen += 1
        elif "logits_fp32compute" in wanted:
            truth, reference = wanted["logits_fp32compute"], wanted["logits"].float()
            ours = found["logits"][:, positions].float().cpu()
            ratios.append(rms(ours - truth) / rms(reference - truth))
            seen += 1
    if not seen:
        raise RuntimeError("nothing was compared")
    if is_exact:
        report.check(
            f"{name}, float32: error of the worst of {seen} outputs over its tolerance", worst, at_most=1
        )
    else:
        label = f"{name}, bfloat16: error of the logits over the reference's own"
        report.check(label, max(ratios), at_most=BF16_RMS_RATIO)


def _keep(found: dict[str, Tensor], path: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
    found[path] = output


def _families(bench: Bench, report: Report) -> None:
    folders = sorted(path for path in (GOLDEN / "families").glob("*") if path.is_dir())
    if not folders:
        raise SkippedError("the families' folders lie in the repository's tests, which are not here")
    rows = []
    for folder in folders[:2] if bench.is_tiny else folders:
        with report.guarded(folder.name):
            rows.append(_family(bench, report, folder))
    report.tables["Families"] = rows


def _family(bench: Bench, report: Report, folder: Path) -> dict[str, Any]:
    values = load_file(folder / "outputs.safetensors")
    names = list(json.loads((folder / "inputs.json").read_text(encoding="utf-8")))
    row: dict[str, Any] = {"family": folder.name, "inputs": len(names)}
    for dtype in ("float32", "bfloat16"):
        model = genoembed.load_model(str(folder), device=bench.name, dtype=dtype)
        final = model.resolve("final")[0].path
        differences = []
        for name in names:
            ids_BL = values[f"{name}.input_ids"].long().to(bench.device)[None]
            mask = torch.ones_like(ids_BL) if model.accepts_attention_mask else None
            with torch.inference_mode(), capture(model.module, [final]) as found:
                model.module(ids_BL, **forward_arguments(model.module, mask))
            expected = values[f"{name}.final"]
            ours = found[final][0].float().cpu()
            differences.append(
                float((ours - expected).abs().max())
                if dtype == "float32"
                else rms(ours - expected) / rms(expected)
            )
        row[f"{dtype}: {'largest difference' if dtype == 'float32' else 'relative rms'}"] = max(differences)
        if dtype == "float32":
            limit = FAMILY_TOLERANCES.get(folder.name, FAMILY_TOLERANCE)
            report.check(
                f"{folder.name}: largest difference to official states", max(differences), at_most=limit
            )
        elif not np.isfinite(max(differences)):
            report.problems.append(f"{folder.name}: bfloat16 gives values that are not finite")
    return row


def _invariance(bench: Bench, report: Report) -> None:
    lengths = [7, 65, 130] if bench.is_tiny else [7, 64, 65, 130, 300, 1000, 1024, 2047, 3000, 777, 5000]
    sequences = bench.sequences(lengths)
    layers = bench.layers
    elsewhere = genoembed.embed(
        sequences, model=genoembed.load_model(device="cpu", dtype="float32"), layers=layers
    )
    for dtype in ("float32", "bfloat16"):
        model = bench.bundled(dtype)
        embed = functools.partial(genoembed.embed, model=model, layers=layers)
        alone = {
            layer: np.concatenate([embed([one]).matrices[layer] for one in sequences])
            for layer in elsewhere.layers
        }
        back = np.arange(len(sequences))[::-1]
        ways = {
            "one batch": embed(sequences, batch_tokens=sum(lengths) * len(lengths)).matrices,
            "small batches": embed(sequences, batch_tokens=512).matrices,
            "reversed": {name: rows[back] for name, rows in embed(sequences[::-1]).matrices.items()},
            "blocks of 512": _in_blocks(bench, model, sequences[-1], elsewhere.layers, alone),
        }
        for way, matrices in ways.items():
            worst = max(relative(matrices[name], alone[name]) for name in elsewhere.layers)
            report.check(f"{dtype}: {way} against one at a time", worst, at_most=SAME[dtype])
        worst = max(relative(alone[name], elsewhere.matrices[name]) for name in elsewhere.layers)
        report.check(f"{dtype} against float32 on a CPU", worst, at_most=OTHER_DEVICE[dtype])


def _in_blocks(
    bench: Bench, model: GenomicModel, sequence: str, layers: Sequence[str], alone: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Embed the last sequence in blocks, padded; the others are taken as they are."""
    padding = 32
    ids = torch.tensor([[*sequence.encode(), *[1] * padding]])
    mask = (torch.arange(ids.shape[1]) < len(sequence))[None]
    batch = Batch(input_ids=ids, attention_mask=mask.long(), pool_mask=mask, rows=(0,))
    sums = dict.fromkeys(layers, 0.0)

    def take(layer: str, hidden_BCD: Tensor, span: slice) -> None:
        kept = mask[:, span, None].to(hidden_BCD.device)
        sums[layer] = sums[layer] + (hidden_BCD.double() * kept).sum(dim=1)

    model.forward_in_blocks(batch, layers, take, block_tokens=64 if bench.is_tiny else 512)
    found = {name: rows.copy() for name, rows in alone.items()}
    for name in layers:
        found[name][-1] = (sums[name][0] / len(sequence)).float().cpu().numpy()
    return found


def _small_config(**changes: Any) -> StripedHyena2Config:
    """Describe a model of each kind of block, of a size that a CPU checks in a moment."""
    return StripedHyena2Config(**_TINY_SHAPE, **changes)


def _packing(bench: Bench, report: Report) -> None:
    window = 256 if bench.is_tiny else 1024
    documents = [text.encode() for text in bench.sequences([30, 64, 100, 61] * (2 if bench.is_tiny else 12))]
    batch = next(iter(pack_bins(documents, window=window, batch_size=1 if bench.is_tiny else 2)))
    batch = replace(
        batch, input_ids=batch.input_ids.to(bench.device), segment_ids=batch.segment_ids.to(bench.device)
    )
    torch.manual_seed(SEED)
    model = StripedHyena2ForCausalLM(_small_config()).eval().to(bench.device)
    found = isolation.check_isolation(model, batch)
    report.check("packed segments", found["segments"], at_least=3)
    report.check(
        "largest deviation of a packed segment",
        found["largest_deviation_float32"],
        at_most=1e-5,
    )
    report.check(
        "largest gradient across a boundary", found["largest_gradient_across_a_boundary"], at_most=0.0
    )


def _fp8(bench: Bench, report: Report) -> None:
    scales = torch.tensor([61.189205, 0.37], device=bench.device)
    forms = fp8_bench.forms_on(bench.device)
    report.remarks.append(f"FP8 forms here: {', '.join(forms)}.")
    if not (ROOT / "tests" / "oracles.py").is_file():
        raise SkippedError("the oracle of integers lies in the repository's tests, which are not here")
    from tests.oracles import hopper_product

    shapes = [(3, 48, 4)] if bench.is_tiny else [(1, 31, 3), (5, 64, 7), (9, 160, 33), (16, 256, 16)]
    for rows, inputs, outputs in shapes:
        spreads = torch.exp2(3 * bench.random(rows, inputs, seed=3).round())
        x_TK = (bench.random(rows, inputs) * spreads).bfloat16()
        weight_NK = bench.random(outputs, inputs, seed=4).bfloat16()
        expected = torch.tensor(
            hopper_product(x_TK.float().tolist(), weight_NK.float().tolist(), scales.tolist())
        )
        for form in forms:
            found = emulate_product(x_TK, weight_NK, scales, form=form).float().cpu()
            others = int((found != expected).sum())
            report.check(
                f"FP8, {form}: numbers that differ from integers', {rows} x {inputs} x {outputs}",
                others,
                at_most=0,
            )
    width = 64 if bench.is_tiny else fp8_bench.WIDTH
    timed = []
    for num_tokens in (4,) if bench.is_tiny else (16, 2048):
        figures, rows_, remarks = fp8_bench.compare(
            num_tokens, width, rounds=bench.rounds, device=bench.device
        )
        report.figures += figures
        report.remarks += remarks
        timed += rows_
    report.tables["FP8: one projection"] = timed
    if has_hopper_sums(bench.device):
        from genoembed.models.striped_hyena2.fp8 import fp8_linear

        x_TK = bench.random(512, width).bfloat16()
        weight_NK = (bench.random(3 * width, width, seed=4) * width**-0.5).bfloat16()
        hardware = fp8_linear(x_TK, weight_NK, scales, is_native=True)
        emulated = fp8_linear(x_TK, weight_NK, scales, is_native=False)
        share = float((hardware != emulated).float().mean())
        report.check(
            "FP8: share of the hardware's numbers that the emulation has otherwise", share, at_most=0.0
        )
    else:
        report.remarks.append(
            "FP8 in hardware was not compared: only GPUs of capability 9 have the sums that are emulated."
        )


def _gradients(bench: Bench, report: Report) -> None:
    torch.manual_seed(SEED)
    cases: dict[str, nn.Module] = {
        "StripedHyena 2": StripedHyena2ForCausalLM(_small_config()),
        "StripedHyena 2, FP8": StripedHyena2ForCausalLM(_small_config(fp8_projections="needed")),
    }
    for family in ("caduceus_ph", "hyenadna", "evo1"):
        folder = GOLDEN / "families" / family
        if folder.is_dir() and not bench.is_tiny:
            cases[family] = genoembed.load_model(str(folder), device="cpu", dtype="float32").module
    ids_BL = torch.tensor([[*text.encode()] for text in bench.sequences([150] * 2)])
    segments_BL = torch.arange(150)[None].expand(2, -1) // 60
    for name, model in cases.items():
        with report.guarded(name):
            vocabulary = model.get_input_embeddings().weight.shape[0]
            inputs: dict[str, Tensor] = {"input_ids": ids_BL % vocabulary}
            ways = {"": inputs}
            if isinstance(model, StripedHyena2ForCausalLM):
                ways[", packed"] = {**inputs, "segment_ids": segments_BL}
            for way, given in ways.items():
                expected = _gradients_of(model, given, torch.device("cpu"))
                found = _gradients_of(model, given, bench.device)
                report.check(f"gradients of {name}{way}", _apart(found, expected), at_most=1e-4)
                mixed = _gradients_of(model, given, bench.device, is_mixed=True)
                report.check(
                    f"gradients of {name}{way}, autocast to bfloat16", _apart(mixed, expected), at_most=0.1
                )


def _gradients_of(
    model: nn.Module, inputs: Mapping[str, Tensor], device: torch.device, *, is_mixed: bool = False
) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(device).eval()
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_mixed):
        output = model(**given)
        states = getattr(output, "logits", None)
        states = output.last_hidden_state if states is None else states
        loss = states.float().square().mean()
    loss.backward()
    return {name: each.grad.cpu() for name, each in model.named_parameters() if each.grad is not None}


def _apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the relative difference of all gradients together; that of other parameters is infinite."""
    if found.keys() != expected.keys() or not found:
        return float("inf")
    squares = [(found[name].double() - expected[name].double()).square().sum() for name in expected]
    total = [expected[name].double().square().sum() for name in expected]
    return float((torch.stack(squares).sum() / torch.stack(total).sum()).sqrt())


def _memory(bench: Bench, report: Report) -> None:
    rows, length = (8, 64) if bench.is_tiny else (512, 2048)
    model = bench.bundled("bfloat16" if bench.is_cuda else "float32")
    sequences = bench.sequences([length] * rows)
    ample = RecordEmbedder(model, layers=[bench.layer])
    records = clean_sequences(sequences, ample.config)
    expected = ample.matrices(records)
    short = RecordEmbedder(model, layers=[bench.layer], batch_tokens=rows * length)
    with _scarce(bench, model, most_tokens=rows * length // 4):
        found = short.matrices(records)
    name = short.layers[0]
    report.check("times that a pass was halved", short.stats.halvings, at_least=1)
    limit = SAME["bfloat16" if bench.is_cuda else "float32"]
    report.check("vectors of halved passes", relative(found[name], expected[name]), at_most=limit)
    report.remarks.append(
        f"Memory: passes of {rows} x {length} tokens did not fit; halved {short.stats.halvings} times."
    )


@contextlib.contextmanager
def _scarce(bench: Bench, model: GenomicModel, *, most_tokens: int) -> Iterator[None]:
    """Leave little memory: 1 GiB of a GPU; on a CPU, passes of too many tokens fail as torch lets them."""
    if bench.is_cuda:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + GIB) / whole)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def refuse(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() > most_tokens:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    handle = model.network.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


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


def _ids(bench: Bench, batch: int, length: int) -> Tensor:
    drawn = np.random.default_rng(SEED).integers(0, 4, (batch, length))
    return torch.from_numpy(np.frombuffer(b"ACGT", np.uint8)[drawn].astype(np.int64)).to(bench.device)


def _kernels(bench: Bench, report: Report) -> None:
    from torch.profiler import ProfilerActivity, profile

    network = bench.evo2.network
    ids_BL = _ids(bench, 1, 64) if bench.is_tiny else _ids(bench, 2, 8192)
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
    if bench.is_cuda != torch.cuda.is_available():
        raise SkippedError("training takes the GPU where there is one")
    steps, window, rows = (2, 128, 2) if bench.is_tiny else (20, 2048, 16)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape: str | Path = folder / "start"
        torch.manual_seed(SEED)
        config = _small_config() if bench.is_tiny else StripedHyena2Config(num_attention_heads=2)
        StripedHyena2ForCausalLM(config).save_pretrained(shape)
        genoembed.CharTokenizer().save_pretrained(shape)
        corpus = write_fasta(
            folder / "corpus.fa", [window // 2, window, window // 4] * (20 if bench.is_tiny else 400)
        )
        ways: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compile_blocks": True}}
        for way, options in ways.items():
            if options and bench.is_tiny:
                continue
            with report.guarded(f"pretraining, {way}"):
                found.append(
                    _pretrain(
                        bench,
                        report,
                        corpus,
                        folder / way,
                        shape,
                        steps=steps,
                        window=window,
                        rows=rows,
                        way=way,
                        **options,
                    )
                )
        with report.guarded("LoRA"):
            found.append(_lora(bench, report, folder, shape, steps=steps, rows=rows))
    report.tables["Training"] = found


def _pretrain(
    bench: Bench,
    report: Report,
    corpus: Path,
    output: Path,
    shape: str | Path,
    *,
    steps: int,
    window: int,
    rows: int,
    way: str,
    **options: Any,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": f"pretraining, {way}",
        "steps": steps,
        "rows": rows,
        "tokens of a row": window,
    }
    started = time.perf_counter()
    with bench.peak_memory(row):
        done = genoembed.pretrain(
            corpus,
            output,
            model=str(shape),
            max_steps=steps,
            window=window,
            rows_per_device=rows,
            logging_steps=max(1, steps // 4),
            eval_steps=steps,
            save_steps=steps,
            heldout_fraction=0.2,
            isolate=True,
            packing="bins",
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


def _lora(
    bench: Bench, report: Report, folder: Path, shape: str | Path, *, steps: int, rows: int
) -> dict[str, Any]:
    if importlib.util.find_spec("peft") is None:
        report.remarks.append("LoRA was left out: peft is not installed.")
        return {"run": "LoRA", "s": "left out"}
    length = 64 if bench.is_tiny else 512
    texts = bench.sequences([length] * (16 if bench.is_tiny else 512))
    table = folder / "rows.tsv"
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
        done = genoembed.finetune(
            table,
            folder / "lora",
            task="regression",
            model=str(shape),
            tuning="lora",
            max_steps=steps,
            rows_per_device=rows,
            logging_steps=1,
            validation_fraction=0.2,
            test_fraction=0.0,
        )
    metrics = Path(folder, "lora", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, metrics) if "loss" in line]
    del done
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
        ids_BL = _ids(bench, batch, length)
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


_PARTS: dict[str, Callable[[Bench, Report], None]] = {
    "peak": _peak,
    "goldens": _goldens,
    "families": _families,
    "invariance": _invariance,
    "packing": _packing,
    "fp8": _fp8,
    "gradients": _gradients,
    "memory": _memory,
    "evo2_7b": _evo2_7b,
    "kernels": _kernels,
    "operators": _operators,
    "extract": _extract,
    "compiled": _compiled,
    "training": _training,
    "vortex": _vortex,
}
