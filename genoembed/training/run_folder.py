"""The folder of a training run: what is in it, who may write into it, and where a run goes on.

In: a folder. Out: checkpoints and the settings of the run. Promised: a run is neither overwritten nor
resumed unless that is requested, and it resumes only with the config that it began with; a file that is
written appears whole.
"""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

from genoembed._version import __version__
from genoembed.atomic import write_text
from genoembed.config.fields import differences
from genoembed.errors import ConfigError
from genoembed.models.trained_folder import FINAL_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"


def refuse_other_run(folder: Path) -> None:
    """Raise if there is a run in the folder."""
    found = [path for path in (folder / RUN_FILE, *folder.glob("checkpoint-*")) if path.exists()]
    if found:
        message = (
            f"{folder}: there is a run already ({found[0].name}); set resume to go on with it, "
            "overwrite to start again, or another output_dir"
        )
        raise ConfigError(message)


def clear_run(folder: Path, *others: str) -> None:
    """Delete what an earlier run has left."""
    names = (RUN_FILE, METRICS_FILE, FINAL_FOLDER, *others)
    for path in (*folder.glob("checkpoint-*"), *(folder / name for name in names)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def compare_with_run(folder: Path, expected: Mapping[str, Any], *, digests: Mapping[str, str]) -> None:
    """Raise if the run in the folder was started with other settings."""
    stored = folder / RUN_FILE
    try:
        found = json.loads(stored.read_text(encoding="utf-8"))["compared"]
    except (OSError, ValueError, KeyError) as error:
        message = f"resume: no run in {folder} ({stored.name} is missing or damaged); set resume to False"
        raise ConfigError(message) from error
    problems = differences(found, expected, where=str(folder))
    for key, message in digests.items():
        others = [problem for problem in problems if not problem.startswith(f"{key}:")]
        if len(others) < len(problems):
            problems = [*others, message]
    if problems:
        raise ConfigError(*problems)


def claim_run(
    folder: Path,
    compared: Mapping[str, Any],
    *,
    resume: bool,
    digests: Mapping[str, str],
    is_first: bool,
    others: tuple[str, ...] = (),
) -> Path | None:
    """Compare with the run that is there and find the checkpoint to go on from, or clear it away."""
    if not resume:
        if is_first:
            clear_run(folder, *others)
        return None
    compare_with_run(folder, compared, digests=digests)
    checkpoint = newest_checkpoint(folder)
    logger.info("resume: %s", checkpoint or f"no checkpoint yet in {folder}, from the start")
    return checkpoint


def write_run(folder: Path, compared: Mapping[str, Any], **facts: object) -> None:
    """Write the settings of a run: those that a resumed run must share, and facts for people."""
    write_json(folder / RUN_FILE, {"genoembed": __version__, "compared": compared, **facts})


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end."""
    complete = [path for path in folder.glob("checkpoint-*") if steps_of(path)]
    return max(complete, key=steps_of, default=None)


def steps_of(checkpoint: Path | None) -> int:
    """Count the steps that a checkpoint is after."""
    if checkpoint is None:
        return 0
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError):
        return 0


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1, default=str) + "\n")
