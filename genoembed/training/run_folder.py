"""The folder of a training run: what is in it, who may write into it, and where a run goes on.

In: a folder's name. Out: a :class:`RunFolder` that no other process has. Promised: one process at a time; a
folder that is no run is never written into; a run is gone on with only with the inputs, model and options
that it began with; a run that replaces another lies beside it as ``.NAME.partial`` until it is complete, and
the two are then exchanged in one step; what has a name (a checkpoint, ``final``, a JSON file) is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genoembed._version import __version__
from genoembed.atomic import (
    MARKER,
    check_folder,
    lock,
    partial_of,
    put_in_place,
    reporting_writes,
    take_back,
    write_text,
)
from genoembed.config.fields import differences, raise_all
from genoembed.contracts import FINAL_FOLDER, RUN_FILE
from genoembed.errors import ConfigError, Problem, Remedy, StoreError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from os import PathLike

    from genoembed.config.choices import Distributed

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
CONFIG_FILE = "finetune.json"
METRICS_FILE = "metrics.jsonl"
MODEL = "model content"
"""Key of what a run compares: digests of the model that it started from, by name of the file."""
SAVING_FOLDER = ".saving"
"""Where transformers writes a checkpoint before it gets its name."""
_REPLACEMENT = ".replacement"
"""In a run that is to replace another: it tells the new run from the old one, whichever name each has."""
BOARD_FOLDER, WANDB_FOLDER = "tensorboard", "wandb"
CODES_FILE = "kmer_codes.safetensors"
"""Codes of k-mers that token states are taught: eigenvectors found elsewhere may have other signs."""
_OWN_FILES = (RUN_FILE, REPORT_FILE, CONFIG_FILE, METRICS_FILE, CODES_FILE)
_OWN = (*_OWN_FILES, FINAL_FOLDER, BOARD_FOLDER, WANDB_FOLDER)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_LEFTOVER = re.compile(
    rf"\.(checkpoint-\d+|{'|'.join(map(re.escape, _OWN))})\.(partial|old)|{re.escape(SAVING_FOLDER)}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeRules:
    """Which differences between a run and what is requested of it matter, and how they are said."""

    digests: Mapping[str, str]
    """For keys that hold a digest: what is not that of the run."""
    harmless: Collection[str] = ()
    """Keys that change nothing that is learned."""
    newer: Mapping[str, object] = field(default_factory=dict)
    """Keys that runs of earlier versions do not have, and what these runs did."""
    may_grow: Collection[str] = ()
    """Keys that may be larger: steps that are done are the same."""


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for part in values.values() if isinstance(part, dict) for k, v in part.items()}


def _is_newer(key: str, stored: Mapping[str, Any], compared: Mapping[str, Any], rules: ResumeRules) -> bool:
    """Whether a run of an earlier version did what is requested, without a word for it."""
    is_new = key in rules.newer and key not in _flat(stored)
    return is_new and bool(_flat(compared).get(key) == rules.newer[key])


def _may_grow(stored: object, compared: Mapping[str, Any], rules: ResumeRules) -> set[str]:
    """Name the numbers that are larger than those of the run, of those that may be."""
    flat_old, flat_new = (_flat(values) for values in (stored if isinstance(stored, dict) else {}, compared))
    pairs = {key: (flat_old.get(key), flat_new.get(key)) for key in rules.may_grow}
    return {
        key
        for key, (old, new) in pairs.items()
        if isinstance(old, int) and isinstance(new, int) and new > old
    }


def _model_parts(compared: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the digests of a model's files, at the top or in a stage."""
    found = (values.get(MODEL) for values in (compared, *compared.values()) if isinstance(values, dict))
    return next((parts for parts in found if isinstance(parts, dict)), {})


class RunFolder:
    """A run's folder, while this process has it."""

    def __init__(self, target: Path, path: Path) -> None:
        self.target = target
        """Name that the user gave it."""
        self.has_begun = False
        """Whether anything was written into it."""
        self.path = path
        """Where the run is written: the target, or beside it what is going to replace it."""

    @property
    def is_replacement(self) -> bool:
        """Whether the run is going to replace another."""
        return self.path != self.target

    @property
    def name(self) -> str:
        """The name that the user gave the run, also where that was a dot."""
        return self.target.resolve().name

    @property
    def final(self) -> Path:
        """The folder of the trained model, under the name that it has in the end."""
        return self.target / FINAL_FOLDER

    def begun_recipe(self) -> Mapping[str, Any] | None:
        """Return the settings of the run that is there, or of the one that this replaces."""
        compared = _read((self.path if _has_run(self.path) else self.target) / RUN_FILE).get("compared")
        recipe = compared.get("recipe") if isinstance(compared, dict) else None
        return recipe if isinstance(recipe, dict) else None

    def resume(self, compared: Mapping[str, Any], rules: ResumeRules) -> dict[str, Any] | None:
        """Return the report of the run if it is complete, None to go on with it.

        Raises if another run was requested than the one that is there.
        """
        if not _has_run(self.path):
            logger.info("resume: no run in %s yet, from the start", self.path)
            is_done = self.is_replacement and not self._differences(self.target, compared, rules)
            return self._report(self.target) if is_done else None
        problems = self._differences(self.path, compared, rules)
        if self.is_replacement and problems and not self._differences(self.target, compared, rules):
            return self._report(self.target)
        if not problems and (report := self._report(self.path)):
            if _is_first():
                with reporting_writes(self.target):
                    self.publish()
            logger.info("resume: the run in %s is complete", self.target)
            return report
        grown = _may_grow(_read(self.path / RUN_FILE).get("compared"), compared, rules)
        raise_all(problem for problem in problems if problem.partition(":")[0] not in grown)
        return None

    @staticmethod
    def _differences(folder: Path, compared: Mapping[str, Any], rules: ResumeRules) -> list[str]:
        stored = _read(folder / RUN_FILE).get("compared")
        if not isinstance(stored, dict):
            message = f"resume: {folder / RUN_FILE} is damaged"
            raise ConfigError(Problem(message, Remedy("overwrite", True), " to start again"))
        problems: list[str] = []
        parts = {*_model_parts(stored), *_model_parts(compared)}
        for problem in differences(stored, _plain(compared), where=str(folder)):
            key = problem.partition(":")[0]
            if key in rules.digests or key in parts:
                what = rules.digests.get(key)
                found = f"{key}: {what}" if what else f"model: {key} is not that of"
                found += f" the run in {folder}"
                problems.append(
                    Problem(found, Remedy("overwrite", True), " to start again, or give what it began with")
                )
            elif key not in rules.harmless and not _is_newer(key, stored, compared, rules):
                problems.append(problem)
        return problems

    @staticmethod
    def _report(folder: Path) -> dict[str, Any] | None:
        report = _read(folder / REPORT_FILE)
        return report if report and is_complete(folder / FINAL_FOLDER) else None

    def begin(self, compared: Mapping[str, Any], *, resume: bool, **facts: object) -> Path | None:
        """Note what is requested; return the checkpoint to go on from, or clear away what is left of others.

        To be called when nothing can be refused any more, by the first process alone.
        """
        resume = resume and _has_run(self.path)
        checkpoint = newest_checkpoint(self.path) if resume else None
        self.has_begun = True
        with reporting_writes(self.target):
            if not resume:
                self.path.mkdir(exist_ok=True)
                for path in self.path.iterdir():
                    _remove(path)
                if self.is_replacement:
                    (self.path / _REPLACEMENT).touch()
            (self.path / REPORT_FILE).unlink(missing_ok=True)
            write_json(self.path / RUN_FILE, {"genoembed": __version__, "compared": compared, **facts})
        if resume:
            logger.info("resume: %s", checkpoint or f"no checkpoint yet in {self.path}, from the start")
        return checkpoint

    def finish(self, report: Mapping[str, Any]) -> None:
        """Note what came of the run, and let it replace the one whose name it was given."""
        with reporting_writes(self.target):
            write_json(self.path / REPORT_FILE, report)
            self.publish()

    def publish(self) -> None:
        """Let a complete run replace the one whose name it was given."""
        if not self.is_replacement:
            return
        _check_own(self.target)
        put_in_place(self.path, self.target)
        (self.target / _REPLACEMENT).unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)


@contextmanager
def claimed_run(output_dir: str | PathLike[str], *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Take a run's folder for this process, or refuse; an interruption says what is kept and how to go on.

    Of several processes under torchrun, the first one holds the lock for all.
    """
    given = Path(output_dir)
    target = given.expanduser()
    is_first = _is_first()
    take_back(target)
    if target.exists() and not target.is_dir():
        problem = "is a file, expected a folder; set output_dir to another name"
        raise StoreError(problem, path=str(given))
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    if resume and not overwrite and made and not partial_of(target).exists():
        message = f"resume: no run in {given}, which does not exist"
        raise ConfigError(Problem(message, Remedy("resume", False)))
    locks: list[int] = []
    folder = RunFolder(target, target)
    try:
        if is_first:
            with reporting_writes(given):
                target.mkdir(parents=True, exist_ok=True)
                locks.append(lock(target, output=given))
        folder = _place(target, resume=resume, overwrite=overwrite)
        if is_first:
            with reporting_writes(given):
                if folder.is_replacement:
                    folder.path.mkdir(exist_ok=True)
                    locks.append(lock(folder.path, output=given))
                _clear_leftovers(folder)
        if resume and (folder.path / FINAL_FOLDER).exists():
            check_folder(folder.path / FINAL_FOLDER, overwrite=True)
        yield folder
    except KeyboardInterrupt as stop:
        if not str(stop):
            stop.args = (_what_is_kept(folder),)
        raise
    finally:
        # folders made here in which nothing was put; without the lock they may be another process's
        for path in [partial_of(target), *made] if locks and not folder.has_begun else []:
            with suppress(OSError):
                path.rmdir()
        for descriptor in locks:
            os.close(descriptor)


def _what_is_kept(folder: RunFolder) -> str:
    """Say how to go on after an interruption that left no time for a checkpoint."""
    kept = newest_checkpoint(folder.path) if folder.has_begun else None
    if kept is not None:
        return f"{kept} is kept; run the same again with resume to go on from it"
    as_it_was = _has_run(folder.target) and (folder.is_replacement or not folder.has_begun)
    where = f"{folder.target} is as it was" if as_it_was else f"nothing was trained yet for {folder.target}"
    return f"{where}; run the same again"


def _is_first() -> bool:
    """Whether this is the first of several processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_processes(distributed: Distributed) -> None:
    """Raise if one process is to hold a model that is for several, or accelerate would spread it, too."""
    if distributed == "fsdp" and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        found = "distributed is 'fsdp', which spreads the model over several processes, but there is one"
        raise ConfigError(Problem(found, Remedy("distributed", "ddp"), ", or start several with torchrun"))
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        found = (
            "accelerate is set to use FSDP of its own, which parts the embedding from the scores of tokens"
        )
        raise ConfigError(
            Problem(found, Remedy("distributed", "fsdp"), ", and leave --use_fsdp of accelerate launch out")
        )


def _place(target: Path, *, resume: bool, overwrite: bool) -> RunFolder:
    """Choose where a run is written, and refuse a folder that is not ours, or a run that is to stay."""
    beside = partial_of(target)
    has_run, has_replacement = _has_run(target), _has_run(beside) and (beside / _REPLACEMENT).exists()
    if resume and has_replacement:
        return RunFolder(target, beside)
    if resume and has_run and not overwrite:
        return RunFolder(target, target)
    if has_replacement and not overwrite:
        message = f"{target}: a run that is to replace it is not complete yet ({beside})"
        raise ConfigError(
            Problem(message, Remedy("resume", True), " to go on with it, or overwrite to start again")
        )
    if has_run and not overwrite:
        message = f"{target}: there is a run already ({RUN_FILE})"
        raise ConfigError(
            Problem(
                message,
                Remedy("resume", True),
                " to go on with it, overwrite to start again, or another output_dir",
            )
        )
    if not target.exists() or not any(
        path for path in target.iterdir() if not _LEFTOVER.fullmatch(path.name)
    ):
        return RunFolder(target, target)
    _check_own(target)
    return RunFolder(target, beside)


def _has_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


def _check_own(folder: Path) -> None:
    """Refuse to replace a folder that is no run, or into which somebody has put something."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not _has_run(folder):
        problem = (
            f"holds no {RUN_FILE}, so it is not a training run; set output_dir to another name, or remove it"
        )
        raise StoreError(problem, path=str(folder))
    known = {*_OWN, _REPLACEMENT, MARKER}
    for path in sorted(folder.iterdir()):
        is_checkpoint = _CHECKPOINT.fullmatch(path.name) is not None
        if path.name not in known and not is_checkpoint and not _LEFTOVER.fullmatch(path.name):
            problem = (
                f"holds {path.name!r}, which genoembed did not write; move it, or set output_dir to another "
                "name"
            )
            raise StoreError(problem, path=str(folder))
        if (is_checkpoint or path.name == FINAL_FOLDER) and (path / MARKER).exists():
            check_folder(path, overwrite=True)


def _clear_leftovers(folder: RunFolder) -> None:
    """Remove what killed processes left: half-written files, and the old run after an exchange."""
    beside = partial_of(folder.target)
    if beside.is_dir() and not folder.is_replacement:
        shutil.rmtree(beside)
    for path in folder.path.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            _remove(path)
    if not folder.is_replacement:
        (folder.target / _REPLACEMENT).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that is complete."""
    complete = [path for path in folder.glob("checkpoint-*") if steps_of(path) and is_complete(path)]
    return max(complete, key=steps_of, default=None)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds every file that was written into it."""
    listed = _read(folder / MARKER).get("files")
    return isinstance(listed, list) and all((folder / str(name)).is_file() for name in listed)


def steps_of(checkpoint: Path | None) -> int:
    """Count the steps that a checkpoint is after."""
    if checkpoint is None:
        return 0
    try:
        return int(_read(checkpoint / "trainer_state.json").get("global_step", 0))
    except (ValueError, TypeError):
        return 0


def files_digest(paths: Iterable[str]) -> str:
    """Compute one SHA-256 for the contents of files, in order; names do not count."""
    whole = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def finite_json(value: Any) -> Any:
    """Replace numbers that JSON does not have (NaN, infinities) by None.

    Example:
        >>> finite_json({"loss": float("nan"), "steps": [1, 2.5]})
        {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    return [finite_json(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(finite_json(values), indent=1, default=str, allow_nan=False) + "\n")


def _plain(values: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(finite_json(values), default=str))


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; what is missing or damaged is empty."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
