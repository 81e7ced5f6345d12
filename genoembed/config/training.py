"""Options that both kinds of training share: the folder of the run, and what becomes of an earlier one."""

from __future__ import annotations

from genoembed.config.choices import TrainDtype
from genoembed.config.fields import Config, option

RUN, OPTIMIZATION, DATA, OUTPUT = "The run", "Optimization", "Data", "Output"


class RunFolderConfig(Config):
    """Where a run is, and how it goes on; none of this changes what is learned."""

    output_dir: str = option(
        group=OUTPUT,
        basic=True,
        short="-o",
        flag="--output",
        metavar="DIR",
        help="The folder to write.",
        writes="folder",
    )
    resume: bool = option(False, group=OUTPUT, basic=True, help="Continue from the newest checkpoint in DIR.")
    overwrite: bool = option(
        False, group=OUTPUT, basic=True, help="Start again and drop the run that is in DIR."
    )
    threads: int | None = option(
        None, ge=1, group=RUN, metavar="N", shown_default="PyTorch decides", help="CPU threads of the model."
    )


class OptimizerConfig(Config):
    """How weights are changed."""

    accumulation_steps: int = option(
        1,
        ge=1,
        group=OPTIMIZATION,
        metavar="N",
        help="Forward passes per optimizer step; their gradients add up.",
    )
    max_grad_norm: float = option(
        1.0, gt=0, group=OPTIMIZATION, metavar="X", help="Clip gradients to this norm."
    )
    dtype: TrainDtype = option(
        "auto",
        group=OPTIMIZATION,
        help="Type of matrix products; weights are float32. auto is bfloat16 where the device has it.",
    )
    logging_steps: int = option(
        10, ge=1, group=RUN, metavar="N", help="Optimizer steps between lines of metrics.jsonl."
    )
