"""What the parts of ``gpu.py`` share: the device, the sizes, and what a part reports.

A *check* is a figure that must be met (numbers); a *measurement* may have a goal that is missed (speed).
Nothing names a device but where a thing exists on one kind only, so that what the tiny mode runs on a CPU is
what runs on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # the tests hold the goldens and the integer oracle

import numpy as np
import torch
from describe_machine import describe_machine
from measuring import GIB, Figure, SkippedError, interleave

import genoembed
from genoembed import StripedHyena2Config
from genoembed.models.genomic_model import GenomicModel
from genoembed.models.registry import find_model
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

    def run(self, part: Callable[[Bench, Report], None]) -> Report:
        """Run a part, and give back the memory that it took."""
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
            shape = {**shape, **TINY_SHAPE}
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


TINY_SHAPE = {
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


def small_config(**changes: Any) -> StripedHyena2Config:
    """Describe a model of each kind of block, of a size that a CPU checks in a moment."""
    return StripedHyena2Config(**TINY_SHAPE, **changes)


def drawn_ids(bench: Bench, batch: int, length: int) -> Tensor:
    drawn = np.random.default_rng(SEED).integers(0, 4, (batch, length))
    return torch.from_numpy(np.frombuffer(b"ACGT", np.uint8)[drawn].astype(np.int64)).to(bench.device)
