"""Every error and warning that genoembed raises on purpose.

Messages have one form: **where: what was found, against what was expected; what to do.**
Each leaf also subclasses the builtin that people would catch, and carries its facts as fields,
so that no caller needs to parse text::

    GenoembedError
    |-- InputError (ValueError)            path, line, record_id
    |   |-- SequenceFormatError            a file that is not what it seems, or is damaged
    |   |-- AlphabetError                  letters outside the alphabet
    |   |-- DuplicateIdError               an id that appears twice
    |   |-- EmptyRecordError               a record without bases
    |   |-- SequenceLengthError            longer than the context, or shorter than what is required
    |   |-- RegionError                    a BED or GFF3 row that does not fit the reference
    |   |-- VariantError                   a VCF row that does not fit the reference, or cannot be used
    |   `-- LabelError                     a label that is missing, or is none of the task's
    |-- InputFileError (OSError)           path: missing, unreadable
    |-- ConfigError (ValueError)           problems, all reported at once
    |   `-- MissingOptionError             key: an option that these inputs need
    |-- ShapeError (ValueError)
    |-- EmptyPoolError (ValueError)        nothing left to pool
    |-- ModelError (ValueError)
    |   |-- ModelNotFoundError
    |   |-- LayerError                     spec
    |   |-- CheckpointError                path
    |   |-- NonFiniteError                 record_id
    |   `-- DivergenceError                step
    |   `-- ForeignCodeError               path, line: a model's or package's own code failed
    |-- StoreError (OSError)               path
    |   |-- StoreFormatError               foreign or damaged file
    |   `-- SchemaVersionError             found, supported
    `-- MissingExtraError (ImportError)    extra

    GenoembedWarning (UserWarning)
    |-- PoolingMismatchWarning
    |-- PrecisionWarning
    `-- TrainingWarning
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

# controls of terminals (C0, DEL, C1), what turns the direction of text around, separators of lines, halves of
# characters; a tab and a line end are the caller's own layout
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Spell out characters by which a name from a file could act on a terminal, or look like another name.

    Example:
        >>> visible("chr1\x9b2J\u202e1")
        'chr1\\x9b2J\\u202e1'
    """
    return text if text.isprintable() else _HIDDEN.sub(_spelled_out, text)


def _spelled_out(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


Spelling: TypeAlias = Callable[[str], str]
"""How an option is spelled where the reader typed it: its key in Python, its flag on the command line."""


def python_spelling(key: str) -> str:
    """Spell an option as a keyword of a Python call."""
    return key


class Remedy(NamedTuple):
    """The option that helps, and what to set it to; spelled for the reader only when the message is shown."""

    key: str
    value: object = None
    """The value that helps, where it is one."""
    words: str = ""
    """What helps, where it is not a single value, such as ``1 or more``."""

    def spelled(self, spelling: Spelling) -> str:
        """Return the remedy as text.

        Example:
            >>> Remedy("overwrite", True).spelled(python_spelling)
            'set overwrite=True'
            >>> Remedy("overwrite", True).spelled("--{}".format)
            'add --overwrite'
        """
        name = spelling(self.key)
        if self.words:
            joint = "" if self.words.startswith(("above ", "from ", "below ")) else "to "
            return f"set {name} {joint}{self.words}"
        if not name.startswith("-"):
            return f"set {name}={self.value!r}"
        if self.value is False:
            return f"leave {name} out"
        return f"add {name}" if self.value is True else f"add {name} {self.value}"


class Problem(str):
    """What is wrong and what helps; as a text, the way out is spelled for Python.

    Args:
        found: What was found, against what was expected.
        remedy: What to do about it.
        after: More to do or to know, after the remedy.
    """

    found: str
    remedy: Remedy | None
    after: str

    def __new__(cls, found: str, remedy: Remedy | None = None, after: str = "") -> Problem:
        """Make the text."""
        way_out = "" if remedy is None else f"; {remedy.spelled(python_spelling)}"
        problem = super().__new__(cls, f"{found}{way_out}{after}")
        problem.found, problem.remedy, problem.after = found, remedy, after
        return problem

    def spelled(self, spelling: Spelling) -> str:
        """Spell the way out for a reader."""
        way_out = "" if self.remedy is None else f"; {self.remedy.spelled(spelling)}"
        return f"{self.found}{way_out}{self.after}"


class GenoembedError(Exception):
    """Root of every error raised on purpose; goes through pickle, from one process to another.

    Args:
        problem: What was found, what was expected, what to do; a :class:`Problem` where an option helps.
        place: Where it was found.
    """

    def __init__(self, problem: str = "", *, place: str = "") -> None:
        self.problem = problem
        super().__init__(visible(f"{place}: {problem}" if place else problem))

    def spelled(self, spelling: Spelling) -> str:
        """Return the message and its notes with every remedy spelled for a reader."""
        text = "; ".join([str(self), *getattr(self, "__notes__", ())])
        for problem in (self.problem, *getattr(self, "problems", ()), *getattr(self, "__notes__", ())):
            if isinstance(problem, Problem):
                text = text.replace(visible(str(problem)), visible(problem.spelled(spelling)))
        return text

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to build the error again: its constructor takes other arguments than it keeps."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(
    kind: type[GenoembedError], arguments: tuple[object, ...], fields: dict[str, object]
) -> GenoembedError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(fields)
    return error


STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that end a run in good order: finished work is kept."""


def is_ignored(number: int) -> bool:
    """Tell whether whoever started the process wants a hang-up to be ignored, as ``nohup`` does."""
    # SIGINT is ignored where a shell starts jobs in the background; a signal sent on purpose still counts
    return number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended.

    Args:
        number: The signal.
        message: What was kept, and how to go on.
    """

    def __init__(self, number: int = signal.SIGINT, message: str = "") -> None:
        self.number = number
        super().__init__(*([message] if message else []))


class InputError(GenoembedError, ValueError):
    """Input that breaks a rule; knows where.

    Args:
        problem: What was found, what was expected, what to do.
        path: File name as the user gave it (``-`` for standard input).
        line: Line of the file, 1-based.
        record_id: Id of the record.
    """

    def __init__(
        self, problem: str, *, path: str | None = None, line: int | None = None, record_id: str | None = None
    ) -> None:
        self.path = path
        self.line = line
        self.record_id = record_id
        super().__init__(problem, place=_place(path, line, record_id))


def _place(path: str | None, line: int | None, record_id: str | None) -> str:
    place = path or ""
    if line is not None:
        place = f"{place}:{line}" if place else f"line {line}"
    record = f"record {record_id!r}" if record_id is not None else ""
    return ": ".join(part for part in (place, record) if part)


class SequenceFormatError(InputError):
    """A file that is not in the format it seems to be in, or is damaged."""


class AlphabetError(InputError):
    """A record with letters outside the alphabet."""


class DuplicateIdError(InputError):
    """A record id that was seen before."""


class EmptyRecordError(InputError):
    """A record without bases."""


class SequenceLengthError(InputError):
    """A sequence that is longer than the context, or shorter than required."""


class UnreadError(InputError):
    """A sequence that the model's tokenizer has hardly any words for."""


class RegionError(InputError):
    """A BED or GFF3 row that does not fit the reference."""


class VariantError(InputError):
    """A row of a VCF that does not fit the reference, is malformed, or cannot be used."""


class LabelError(InputError):
    """A label that is missing, unreadable, or none of the task's."""


class InputFileError(GenoembedError, OSError):
    """A file that is missing or cannot be read.

    Args:
        problem: What happened and what to do.
        path: File name as the user gave it.
    """

    def __init__(self, problem: str, *, path: str) -> None:
        self.path = path
        super().__init__(problem, place=path)


class ConfigError(GenoembedError, ValueError):
    """Options that are wrong alone or together; all of them in one message.

    Args:
        *problems: One sentence a problem, each with its remedy.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class MissingOptionError(ConfigError):
    """An option that was left out, although these inputs need it.

    Args:
        problem: Why it is needed, and what it takes.
        key: The option.
    """

    def __init__(self, problem: str, *, key: str) -> None:
        self.key = key
        super().__init__(problem)


class ShapeError(GenoembedError, ValueError):
    """Arrays whose shapes do not belong together."""


class EmptyPoolError(GenoembedError, ValueError):
    """A sequence of which no token is left to pool."""


class ModelError(GenoembedError, ValueError):
    """A model that cannot do what is requested."""


class ModelNotFoundError(ModelError):
    """A name that is no bundled model, registry entry, folder, checkpoint or Hugging Face id."""


class LayerError(ModelError):
    """A layer that the model does not have.

    Args:
        problem: What is missing and what is there.
        spec: The layer as requested.
    """

    def __init__(self, problem: str, *, spec: str) -> None:
        self.spec = spec
        super().__init__(problem)


class CheckpointError(ModelError):
    """Weights that cannot be read, or do not fit the configuration.

    Args:
        problem: What was found and what to do.
        path: The checkpoint.
    """

    def __init__(self, problem: str, *, path: str) -> None:
        self.path = path
        super().__init__(problem, place=path)


class NonFiniteError(ModelError):
    """A model output that holds NaN or infinity.

    Args:
        problem: What was found and what to do.
        record_id: The record whose output it is.
    """

    def __init__(self, problem: str, *, record_id: str) -> None:
        self.record_id = record_id
        super().__init__(problem, place=f"record {record_id!r}")


class DivergenceError(ModelError):
    """Training that has run into NaN or infinity.

    Args:
        problem: What was found, what is kept, and what to do.
        step: The optimizer step, from 1.
    """

    def __init__(self, problem: str, *, step: int) -> None:
        self.step = step
        super().__init__(problem, place=f"step {step}")


class ForeignCodeError(ModelError):
    """An exception from code that is not genoembed's: of a model folder, or of another package.

    Args:
        problem: What happened and what to do.
        path: File of the code that failed.
        line: Line of it.
    """

    def __init__(self, problem: str, *, path: str, line: int) -> None:
        self.path = path
        self.line = line
        super().__init__(problem)


_OURS = str(Path(__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")
_PASSED_THROUGH = ("torch", "numpy", "accelerate", "safetensors")
"""Packages that fail where they are called wrongly: whoever called them is to blame."""


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Turn what other people's code raises into an error of one line that says whose code failed, and where.

    Whose code it is follows from the traceback, so that our own mistakes keep theirs. Lack of memory and
    errors of ours pass.
    """
    try:
        yield
    except (GenoembedError, MemoryError, BrokenPipeError):
        raise
    except Exception as error:
        found = None if is_out_of_memory(error) else _foreign_place(error)
        if found is None:
            raise
        path, line = found
        text = " ".join(str(error).split()) or "no more is said"
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        remedy = "report it to those who wrote it, or try another version of it"
        if _is_remote(path):
            remedy = (
                "it may have been written for transformers 4; name a model that runs here without such code, "
                "or report it to those who wrote it"
            )
        problem = (
            f"{what}: {_owner(path)} failed at {path}:{line} ({type(error).__name__}: {text}); this is not "
            f"genoembed's code: {remedy}"
        )
        raise ForeignCodeError(problem, path=path, line=line) from error


_LONGEST = 300
_NO_MEMORY = ("DefaultCPUAllocator: ", "out of memory", "_ALLOC_FAILED")
"""What allocators, drivers (``CUDA error: out of memory``) and libraries (cuBLAS, cuDNN, cuFFT) say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory from other failures; only torch's allocator of GPUs has an error of its own."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))


def _foreign_place(error: BaseException) -> tuple[str, int] | None:
    """Find the innermost line that is to blame, if it is not ours."""
    frames = [*walk_tb(error.__traceback__)]
    if frames and isinstance(error, TypeError) and (called := _called_wrongly(frames[-1][0])):
        return called
    for frame, line in reversed(frames):
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            return None
        if not (path.startswith("<") or _is_stdlib(path) or _package(path) in _PASSED_THROUGH):
            return path, line
    return None


def _called_wrongly(frame: FrameType) -> tuple[str, int] | None:
    """Find the ``forward`` that does not take what every model takes: its module is called by torch."""
    module = frame.f_locals.get("self")
    code = getattr(getattr(module, "forward", None), "__code__", None)
    if frame.f_code.co_name != "_call_impl" or code is None or code.co_filename.startswith(_OURS):
        return None
    return code.co_filename, code.co_firstlineno


def _is_stdlib(path: str) -> bool:
    return path.startswith(_STDLIB) and "-packages" not in path


def _package(path: str) -> str | None:
    """Name the installed package that a file belongs to."""
    parts = Path(path).parts
    places = [index for index, part in enumerate(parts[:-1]) if part in ("site-packages", "dist-packages")]
    return parts[places[-1] + 1].removesuffix(".py") if places else None


def _is_remote(path: str) -> bool:
    return "transformers_modules" in Path(path).parts


def _owner(path: str) -> str:
    if _is_remote(path):
        return "the code that it brings"
    package = _package(path)
    return "code outside genoembed" if package is None else f"the package {package}"


class StoreError(GenoembedError, OSError):
    """An embedding file that cannot be written or read.

    Args:
        problem: What happened and what to do.
        path: The file.
    """

    def __init__(self, problem: str, *, path: str) -> None:
        self.path = path
        super().__init__(problem, place=path)


class StoreFormatError(StoreError):
    """A file that genoembed did not write, or that is damaged."""


class SchemaVersionError(StoreError):
    """A file in a newer format than this genoembed reads.

    Args:
        path: The file.
        found: Its schema version.
        supported: The newest schema version that can be read.
    """

    def __init__(self, *, path: str, found: int, supported: int) -> None:
        self.found = found
        self.supported = supported
        super().__init__(
            f"format version {found} is newer than this genoembed reads (1-{supported}); upgrade genoembed",
            path=path,
        )


def install_command(extra: str) -> str:
    """Return the command that adds an optional extra to this installation: from the index, or from a clone.

    An index may not have this version, or not this package: what was installed from a folder, a repository or
    a file is completed from there.
    """
    from importlib import metadata

    try:
        record = json.loads(metadata.distribution("genoembed").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        record = {}
    return _install_command(extra, record, imported_from=Path(__file__).parent.parent)


def _install_command(extra: str, record: Mapping[str, Any], *, imported_from: Path) -> str:
    """Choose by the record of an installation (PEP 610) and the folder of the running code."""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    url = record.get("url", "")
    installed_from = Path(url2pathname(urlsplit(url).path)) if url.startswith("file:") else imported_from
    # the running code first: an older installation may point to a folder that is no longer used
    for clone, option in ((imported_from, "-e "), (installed_from, "")):
        if (clone / "pyproject.toml").is_file():
            pinned = clone / "constraints.txt"
            constraints = f"-c {shlex.quote(str(pinned))} " if pinned.is_file() else ""
            return f"python -m pip install {constraints}{option}{shlex.quote(f'{clone}[{extra}]')}"
    if "vcs_info" in record:
        facts = record["vcs_info"]
        return f"python -m pip install 'genoembed[{extra}] @ {facts['vcs']}+{url}@{facts['commit_id']}'"
    if url and (not url.startswith("file:") or installed_from.is_file()):
        return f"python -m pip install 'genoembed[{extra}] @ {url}'"
    return f"python -m pip install 'genoembed[{extra}]'"


class MissingExtraError(GenoembedError, ImportError):
    """An optional package that is not installed.

    Args:
        package: The package that is missing.
        extra: The extra of genoembed that brings it.
        purpose: What needs it.
    """

    def __init__(self, *, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(f"{purpose} needs {package}; install it with: {install_command(extra)}")


def check_installed(module: str, *, extra: str, purpose: str, package: str | None = None) -> None:
    """Raise if an optional package is not there, before work that would be lost without it."""
    if sys.modules.get(module) is None and find_spec(module) is None:
        raise MissingExtraError(package=package or module, extra=extra, purpose=purpose)


class GenoembedWarning(UserWarning):
    """Root of every warning issued on purpose."""


class PoolingMismatchWarning(GenoembedWarning):
    """Another pooling is requested than the one the model was trained with."""


class PrecisionWarning(GenoembedWarning):
    """Numbers that will differ from what the model was trained to give."""


class TrainingWarning(GenoembedWarning):
    """Training that runs but does not do what it seems to do."""


def first_line(error: BaseException) -> str:
    """Shorten another library's error to a line.

    Example:
        >>> first_line(ValueError("field 'depth':\\n  is text\\nsee above")), first_line(KeyError())
        ("field 'depth': is text", 'KeyError')
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
