"""Options that kinds of training share: the folder of the run, the optimizer, the learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from genoembed.config.choices import ComputeDtype, Distributed, Optim, Reporter, Schedule
from genoembed.config.embed import ModelConfig
from genoembed.config.fields import Config, option, same_option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN, OPTIMIZATION, DATA, OUTPUT = "Run", "Optimization", "Data", "Output"


class RunFolderConfig(Config):
    """Where a run is, and how it goes on; none of this changes what is learned."""

    output_dir: str = option(
        group=OUTPUT,
        basic=True,
        short="-o",
        flag="--output",
        metavar="DIR",
        help="Folder to write.",
        writes="folder",
    )
    resume: bool = option(False, group=OUTPUT, basic=True, help="Continue from the newest checkpoint in DIR.")
    overwrite: bool = option(False, group=OUTPUT, basic=True, help="Delete the run in DIR and start again.")
    threads: int | None = same_option(ModelConfig, "threads", group=RUN)


class OptimizerConfig(Config):
    """How weights are changed."""

    accumulation_steps: int = option(
        1,
        ge=1,
        group=OPTIMIZATION,
        metavar="N",
        help="Forward passes per optimizer step. Their gradients are added.",
    )
    max_grad_norm: float = option(
        1.0, gt=0, group=OPTIMIZATION, metavar="X", help="Clip the norm of the gradient to this value."
    )
    dtype: ComputeDtype = option(
        "auto",
        group=OPTIMIZATION,
        help="Type of matrix products; trained weights stay float32. auto: bfloat16 if the device "
        "is faster in it. float16 is for older GPUs.",
    )
    optim: Optim = option(
        "adamw",
        group=OPTIMIZATION,
        help="Optimizer: AdamW; AdamW with 8-bit states (bitsandbytes); Adafactor, which needs little "
        "memory; or SGD with momentum, which needs --learning-rate.",
    )
    gradient_checkpointing: bool = option(
        False,
        group=OPTIMIZATION,
        help="Recompute activations in the backward pass: less memory, a third more time.",
    )
    distributed: Distributed = option(
        "ddp",
        group=RUN,
        help="With torchrun: ddp keeps the whole model on each GPU; fsdp splits it over the GPUs, for "
        "models that do not fit on one.",
    )
    logging_steps: int = option(
        10, ge=1, group=RUN, metavar="N", help="Optimizer steps between two lines of metrics.jsonl."
    )
    report_to: tuple[Reporter, ...] = option(
        ("auto",),
        group=RUN,
        help="Where else to write the metrics: TensorBoard files in DIR, Weights & Biases, or nowhere. "
        "auto: TensorBoard if it is installed. Repeatable.",
    )

    def _problems(self) -> Iterator[str]:
        if self.optim == "sgd" and getattr(self, "learning_rate", None) is None:
            remedy = Remedy("learning_rate", words="a rate, such as 0.01")
            yield Problem("optim is 'sgd', which has no default rate", remedy)
        if self.distributed == "fsdp" and self.optim not in ("adamw", "sgd"):
            found = f"optim {self.optim!r} needs whole matrices, but distributed 'fsdp' cuts them"
            yield Problem(found, Remedy("optim", "adamw"))
        if self.distributed == "fsdp" and self.dtype == "float16":
            found = "dtype 'float16' scales the loss in each process by itself, not for distributed 'fsdp'"
            yield Problem(found, Remedy("dtype", "bfloat16"))
        if len(self.report_to) > 1 and {"auto", "none"} & {*self.report_to}:
            yield f"report_to names {' and '.join(self.report_to)}; name auto or none alone"


class ScheduleConfig(OptimizerConfig):
    """How the learning rate goes."""

    schedule: Schedule = option(
        "cosine",
        group=OPTIMIZATION,
        help="Learning rate after the warm-up. plateau: reduce it when the metric stops improving.",
    )
    warmup_fraction: float | None = option(
        None,
        ge=0,
        lt=1,
        group=OPTIMIZATION,
        metavar="FRACTION",
        shown_default="0.1; 0 for plateau",
        help="Warm-up as a fraction of all steps.",
    )
    warmup_steps: int | None = option(
        None,
        ge=0,
        group=OPTIMIZATION,
        metavar="N",
        help="Warm-up steps, in which the learning rate rises from a tenth of its peak. Instead of "
        "--warmup-fraction.",
    )
    min_learning_rate: float = option(
        0.0,
        ge=0,
        group=OPTIMIZATION,
        metavar="RATE",
        help="Learning rate at the end of cosine and linear, and lowest rate of plateau.",
    )
    plateau_factor: float = option(
        0.5,
        gt=0,
        lt=1,
        group=OPTIMIZATION,
        metavar="X",
        help="For plateau: factor by which the learning rate is reduced.",
    )
    plateau_patience: int = option(
        1,
        ge=0,
        group=OPTIMIZATION,
        metavar="N",
        help="For plateau: evaluations without improvement before the rate is reduced.",
    )

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for key in ("plateau_factor", "plateau_patience"):
            if self.schedule != "plateau" and getattr(self, key) != type(self).own_options()[key].default:
                found = f"{key} is for schedule 'plateau', but schedule is {self.schedule!r}"
                yield Problem(found, Remedy("schedule", "plateau"), f", or leave {key} out")
        if self.warmup_fraction is not None and self.warmup_steps is not None:
            yield "warmup_fraction and warmup_steps are both set; leave one out"

    def num_warmup_steps(self, total: int) -> int:
        """Count the steps with a rising rate.

        Example:
            >>> [ScheduleConfig(schedule=name).num_warmup_steps(200) for name in ("cosine", "plateau")]
            [20, 0]
        """
        if self.warmup_steps is not None:
            return self.warmup_steps
        usual = 0.0 if self.schedule == "plateau" else 0.1
        return math.ceil((usual if self.warmup_fraction is None else self.warmup_fraction) * total)

    @property
    def has_steady_rate(self) -> bool:
        """Whether no step's rate depends on how many steps there are to come."""
        is_known = self.warmup_steps is not None or self.num_warmup_steps(1) == 0
        return self.schedule in ("constant", "plateau") and is_known
