"""The parts of ``gpu.py`` that check numbers on a device: they must be met."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fp8 as fp8_bench
import isolation
import numpy as np
import torch
from gpu_bench import (
    BF16_RMS_RATIO,
    FAMILY_TOLERANCE,
    FAMILY_TOLERANCES,
    GOLDEN,
    OTHER_DEVICE,
    RELATIVE_RMS,
    ROOT,
    SAME,
    SEED,
    SETS,
    Bench,
    Report,
    relative,
    rms,
    small_config,
)
from measuring import GIB, SkippedError
from safetensors.torch import load_file
from torch import nn

import genoembed
from genoembed import StripedHyena2ForCausalLM
from genoembed.batching.pack import pack_bins
from genoembed.contracts import Batch
from genoembed.embedding import RecordEmbedder, clean_sequences
from genoembed.models.precision import full_float32
from genoembed.models.striped_hyena2.convert import convert_checkpoint
from genoembed.models.striped_hyena2.fp8 import emulate_product, has_hopper_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.models.genomic_model import GenomicModel


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
            mask = torch.ones_like(ids_BL)
            batch = Batch(input_ids=ids_BL, attention_mask=mask, pool_mask=mask.bool(), rows=(0,))
            found = model.forward(batch, [final])
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


def _packing(bench: Bench, report: Report) -> None:
    window = 256 if bench.is_tiny else 1024
    documents = [text.encode() for text in bench.sequences([30, 64, 100, 61] * (2 if bench.is_tiny else 12))]
    batch = next(iter(pack_bins(documents, window=window, batch_size=1 if bench.is_tiny else 2)))
    batch = replace(
        batch, input_ids=batch.input_ids.to(bench.device), segment_ids=batch.segment_ids.to(bench.device)
    )
    torch.manual_seed(SEED)
    model = StripedHyena2ForCausalLM(small_config()).eval().to(bench.device)
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
        "StripedHyena 2": StripedHyena2ForCausalLM(small_config()),
        "StripedHyena 2, FP8": StripedHyena2ForCausalLM(small_config(fp8_projections="needed")),
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
                # a last bit of an activation may round to another number of eight bits
                limit = 5e-2 if "FP8" in name else 1e-4
                report.check(f"gradients of {name}{way}", _apart(found, expected), at_most=limit)
                mixed = _gradients_of(model, given, bench.device, is_mixed=True)
                report.check(
                    f"gradients of {name}{way}, autocast to bfloat16", _apart(mixed, expected), at_most=0.1
                )


def _gradients_of(
    model: nn.Module, inputs: Mapping[str, Tensor], device: torch.device, *, is_mixed: bool = False
) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(device).eval()
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    with full_float32():
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


PARTS: dict[str, Callable[[Bench, Report], None]] = {
    "goldens": _goldens,
    "families": _families,
    "invariance": _invariance,
    "packing": _packing,
    "fp8": _fp8,
    "gradients": _gradients,
    "memory": _memory,
}
