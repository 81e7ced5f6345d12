"""The curve of a run: what a trainer logs, as a file of JSON lines and as lines of text.

What a line of the log says about its steps: means and counts of all processes, and what padding cost.
What a training step of an encoder reports, in addition to its loss.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import uuid
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from genoembed.atomic import reporting_writes, write_text
from genoembed.errors import foreign_code
from genoembed.training.distributed import from_all, whole
from genoembed.training.run_folder import BOARD_FOLDER, WANDB_FOLDER, finite_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from genoembed.config.choices import Reporter


logger = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Append what the trainer logs to a JSON-lines file, losses in bits as well as in nats, and say it."""

    loss_in_bits = True
    """Whether losses are those of a language model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        """Drop the lines of steps that will be trained again, or of an earlier run from scratch."""
        if not state.is_world_process_zero or not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= state.global_step] if state.global_step else []
        if len(kept) < len(lines):
            logger.info(
                "%s: left out %d lines of steps that are trained again", self.path, len(lines) - len(kept)
            )
        with reporting_writes(self.path):
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: object,
        state: Any,
        control: object,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero:
            return
        line: dict[str, float] = {"step": state.global_step, **(logs or {})}
        for name in ("loss", "eval_loss"):
            if self.loss_in_bits and name in line:
                line[f"{name}_bits"] = line[name] / math.log(2)
        said = self.describe(line)
        if said:
            logger.info("%s", said)
        self.write(line)

    def describe(self, line: Mapping[str, float]) -> str:
        """Format a line as text."""
        return describe_line(line)

    def write(self, line: Mapping[str, float]) -> None:
        """Append a line."""
        with reporting_writes(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite_json(line), allow_nan=False) + "\n")


_RISES = 3


class OverfittingHint(TrainerCallback):
    """Say once that the training loss falls while the held-out loss rises.

    It looks at the whole log each time and keeps nothing, so a run that goes on does not say it again.
    """

    def on_evaluate(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        """Look at the last evaluations."""
        history = state.log_history
        places = [place for place, line in enumerate(history) if "eval_loss" in line]
        found = [_overfits(history[: place + 1]) for place in places]
        if found and found[-1] and not any(found[:-1]) and state.is_world_process_zero:
            logger.warning(
                "the training loss falls, but the held-out loss has risen for %d evaluations, to %.4g: rows "
                "are learned by heart; more rows, augmentation, a lower rate, fewer epochs or adapters help",
                _RISES,
                history[places[-1]]["eval_loss"],
            )


def _overfits(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the held-out loss rose at each of the last evaluations, and the training loss fell meanwhile.

    Example:
        >>> lines = [{"loss": 1 / n} if n % 2 else {"eval_loss": float(n)} for n in range(1, 9)]
        >>> _overfits(lines), _overfits(lines[:-2])
        (True, False)
    """
    places = [place for place, line in enumerate(history) if "eval_loss" in line][-1 - _RISES :]
    held_out = [history[place]["eval_loss"] for place in places]
    if len(held_out) <= _RISES or held_out != sorted(set(held_out)):
        return False
    between = [
        [line["loss"] for line in history[start:end] if "loss" in line]
        for start, end in itertools.pairwise(places)
    ]
    first, last = between[0], between[-1]
    return bool(first and last) and sum(last) / len(last) < sum(first) / len(first)


_PROJECT = "genoembed"
_RUN_ID = "run_id"


class WandbLog(TrainerCallback):
    """Send settings and lines to Weights & Biases; a run that goes on adds to the one that it began."""

    def __init__(self, folder: Path, settings: Mapping[str, object], *, name: str) -> None:
        self._folder, self._settings, self._name = folder, settings, name
        self._run: Any = None
        self._least_step = 0

    def on_train_begin(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        """Begin, or go on."""
        if state.is_world_process_zero:
            self._run = self._open()

    def _open(self) -> Any:
        import wandb

        path = self._folder / WANDB_FOLDER / _RUN_ID
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            write_text(path, uuid.uuid4().hex)
        with foreign_code("report_to 'wandb'"):
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=self._name,
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(self._folder),
                config=json.loads(json.dumps(self._settings, default=str)),
            )

    def on_log(self, args: object, state: Any, control: object, **kwargs: Any) -> None:
        """Send a line."""
        if not state.is_world_process_zero:
            return
        if self._run is None:
            # resumed after its last step: nothing is trained, and lines of steps that it has are dropped
            self._run = self._open()
            self._least_step = self._run.step
        self._run.log(finite_json(kwargs["logs"]), step=max(state.global_step, self._least_step))

    def close(self) -> None:
        """Close the run, when all is measured and before its folder moves: the process may do others."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def reporters(
    named: Sequence[Reporter], folder: Path, settings: Mapping[str, object], *, name: str
) -> list[TrainerCallback]:
    """Build the callbacks that send what the trainer logs elsewhere, under the name of the run."""
    found: list[TrainerCallback] = []
    if "tensorboard" in named or ("auto" in named and find_spec("tensorboard")):
        board = TensorBoardCallback()
        board.logging_dir = str(folder / BOARD_FOLDER)
        found.append(board)
    return [*found, WandbLog(folder, settings, name=name)] if "wandb" in named else found


def describe_line(line: Mapping[str, float]) -> str:
    """Format a line of ``metrics.jsonl`` as text for a terminal.

    Example:
        >>> describe_line({"step": 20, "loss_bits": 1.923, "learning_rate": 2e-3, "packing_percent": 100})
        'step 20: loss 1.923 bits, learning rate 0.002, packing 100.0 %'
    """
    said = [text % line[name] for name, text in _WORDS.items() if name in line]
    return f"step {line['step']}: {', '.join(said)}"


_WORDS = {
    "loss_bits": "loss %.3f bits",
    "eval_loss_bits": "held-out loss %.3f bits",
    "eval_bits_per_base": "held-out %.4f bits per base",
    "tokens_per_second": "%.0f tokens/s",
    "learning_rate": "learning rate %.3g",
    "grad_norm": "gradient %.3g",
    "packing_percent": "packing %.1f %%",
    "padding_percent": "padding %.1f %%",
    "padded_cost": "padded batches would cost %.2fx",
    "skipped_steps": "%d steps overflowed",
    "train_runtime": "%.0f s in total",
}


def _step_of(line: str) -> float:
    """Read the step of a line; one that a killed run has cut short counts as later than every step."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


@dataclass(kw_only=True, slots=True)
class PaddingMeter:
    """Counts what padding costs.

    The training loop adds each batch that it really runs: what workers have prepared ahead is not counted.

    Example:
        >>> meter = PaddingMeter()
        >>> meter.add(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
        >>> meter.slots, meter.tokens, meter.padding_share
        (8, 6, 0.25)
    """

    batches: int = 0
    rows: int = 0
    slots: int = 0
    """Padding included."""
    tokens: int = 0
    """Real ones."""
    longest: int = 0
    """Slots of the longest row."""

    def add(self, attention_mask: Tensor) -> None:
        """Count a batch, (B, L), by its mask: 1 where a token is real."""
        rows, length = attention_mask.shape
        self.batches += 1
        self.rows += rows
        self.slots += rows * length
        self.tokens += int(attention_mask.sum())
        self.longest = max(self.longest, length)

    @classmethod
    def joined(cls, meters: Sequence[PaddingMeter]) -> PaddingMeter:
        """Add up what several processes have counted."""
        sums = {
            name: sum(getattr(m, name) for m in meters) for name in ("batches", "rows", "slots", "tokens")
        }
        return cls(**sums, longest=max(meter.longest for meter in meters))

    @property
    def padding_share(self) -> float:
        """Share of the slots that is padding."""
        return 1 - self.tokens / self.slots if self.slots else 0.0

    @property
    def packed_slots(self) -> int:
        """Slots of the same sequences, concatenated, one end token after each, in rows of the longest."""
        if not self.longest:
            return 0
        return -(-(self.tokens + self.rows) // self.longest) * self.longest

    @property
    def packed_padding_share(self) -> float:
        """Share of the packed slots that holds no token of a sequence: end tokens and the last row's rest."""
        return 1 - self.tokens / self.packed_slots if self.packed_slots else 0.0

    def metrics(self, seconds: float) -> dict[str, float]:
        """Return the numbers for a log; ``padded_cost`` is slots over packed slots."""
        return {
            "padding_percent": 100 * self.padding_share,
            "packed_padding_percent": 100 * self.packed_padding_share,
            "padded_cost": self.slots / self.packed_slots if self.packed_slots else 1.0,
            "tokens_per_second": self.tokens / seconds,
            "slots_per_second": self.slots / seconds,
        }


@dataclass(slots=True)
class StepBook:
    """What was trained on since the last line, in this process.

    Example:
        >>> book = StepBook()
        >>> book.add({"loss_dense": 1.0, "queries": 4.0})
        >>> book.add({"loss_dense": 2.0, "queries": 4.0, "spread": math.nan})
        >>> joined_metrics([book, book])
        {'loss_dense': 1.5, 'queries': 8.0}
    """

    padding: PaddingMeter = field(default_factory=PaddingMeter)
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a batch; those that are none are left out."""
        for name, value in numbers.items():
            if math.isfinite(value):
                self.sums[name] += value
                self.steps[name] += 1

    def metrics(self) -> dict[str, float]:
        """Return the numbers of all processes; a collective call."""
        plain = StepBook(self.padding, self.seconds, dict(self.sums), dict(self.steps))
        return joined_metrics(from_all(plain))


def joined_metrics(books: Sequence[StepBook]) -> dict[str, float]:
    """Join what the processes have noted about the same steps."""
    found = {}
    for name in dict.fromkeys(name for book in books for name in book.sums):
        total = sum(book.sums.get(name, 0.0) for book in books)
        found[name] = total / sum(book.steps.get(name, 0) for book in books)
        if name in COUNTED:
            found[name] *= len(books)
    seconds = max(book.seconds for book in books)
    return found | (PaddingMeter.joined([book.padding for book in books]).metrics(seconds) if seconds else {})


COUNTED = ("queries", "left_out", "masked_false_negatives")
"""Numbers of a step that add up over ranks; the others are means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStatistics:
    """What one step really compared, on this rank."""

    queries: int
    """Queries (or anchors) that took part."""
    left_out: int = 0
    """Anchors that did not, because the batch held no partner for them."""
    negatives_per_query: float
    """Negatives really used, averaged over queries; after masks, those of other ranks included."""
    masked_false_negatives: int
    """Pairs of query and candidate left out because label or identity say that they belong together."""
    positive_score: float
    """Mean similarity of the positives, before the temperature."""
    negative_score: float
    """Mean similarity of the negatives that were used, before the temperature; NaN where there is none."""
    chance_loss: float
    """Loss of an encoder that distinguishes nothing: the mean of ln(1 + negatives); NaN for other losses."""
    spread: float
    """Variance of the vectors over their mean squared length: 0 if all are equal, 1 if they are centered."""

    def as_metrics(self) -> dict[str, float]:
        """Return all numbers by name, as loggers take them."""
        return {name: float(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss, and what it was made of."""

    loss: Tensor
    """Scalar with gradient. Its average over ranks is the loss of the whole batch."""
    statistics: StepStatistics
    parts: Mapping[str, float] = field(default_factory=dict)
    """Terms of the loss by name, before their weights."""


def score_statistics(
    scores_BC: Tensor, targets_B: Tensor, *, temperature: float, masked: int, spread: float
) -> StepStatistics:
    """Read off a matrix of scores what a cross-entropy over it compares.

    Example:
        >>> scores = torch.tensor([[0.8, 0.2, -torch.inf], [0.4, 0.6, 0.2]])
        >>> found = score_statistics(scores, torch.tensor([0, 1]), temperature=1.0, masked=1, spread=1.0)
        >>> found.negatives_per_query, round(found.positive_score, 4), round(found.negative_score, 4)
        (1.5, 0.7, 0.2667)
    """
    scores_BC = scores_BC.detach()
    positive_B = scores_BC.gather(1, targets_B[:, None])[:, 0]
    used_BC = scores_BC.isfinite().scatter(1, targets_B[:, None], value=False)
    used_B = used_BC.sum(dim=1)
    negative = torch.where(used_BC, scores_BC, 0).sum() / used_B.sum()
    wide = _widest(scores_BC)
    numbers = torch.stack(
        [
            used_B.to(wide).mean(),
            positive_B.to(wide).mean() * temperature,
            negative.to(wide) * temperature,
            torch.log1p(used_B.to(wide)).mean(),
        ]
    ).tolist()
    return StepStatistics(
        queries=len(scores_BC),
        negatives_per_query=numbers[0],
        masked_false_negatives=masked,
        positive_score=numbers[1],
        negative_score=numbers[2],
        chance_loss=numbers[3],
        spread=spread,
    )


@torch.no_grad()
def relative_spread(vectors_ND: Tensor) -> float:
    """Measure how much of the vectors' length is difference between them.

    Example:
        >>> relative_spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        1.0
        >>> relative_spread(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        0.0
    """
    wide_ND = vectors_ND.detach().to(_widest(vectors_ND))
    from_center = (wide_ND - wide_ND.mean(dim=0)).square().sum(dim=1).mean()
    length = wide_ND.square().sum(dim=1).mean()
    return float(from_center / length) if bool(length > 0) else 0.0


@torch.no_grad()
def gradient_norms(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """Measure the gradient that has reached each part of a model.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> gradient_norms({"dense": layer})
        {'dense': 5.0}
    """
    norms = {}
    for name, module in modules.items():
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        squares = [grad.to(torch.float32).square().sum() for grad in grads]
        norms[name] = float(whole(torch.stack(squares).sum()).sqrt()) if squares else 0.0
    return norms


def _widest(values: Tensor) -> torch.dtype:
    """Return the widest floating dtype of a device."""
    return torch.float32 if values.device.type == "mps" else torch.float64
