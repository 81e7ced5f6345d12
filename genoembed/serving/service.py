"""A model behind a queue: requests of any number of records in, one vector per record out.

One thread owns the model. It takes records of all waiting requests by turns, so that a large request does not
hold up small ones, and embeds them as one work unit of the pipeline: sorted by length, padded under the token
budget, cut into windows, equal ones run once, as ``extract`` does. Promised: the vectors are those of
``extract``; a record that fails fails its own request only; a request that was cancelled is not run.

N records, D features.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genoembed.config.embed import OPTION_STAGE
from genoembed.contracts import FINAL_FOLDER, SequenceRecord
from genoembed.embedding import RecordEmbedder
from genoembed.errors import ConfigError, GenoembedError, ModelError, Problem, Remedy
from genoembed.pipeline.embedding_file import check_comparable, comparable_settings, load_transform
from genoembed.pipeline.request import use_threads
from genoembed.pooling.transform import unit_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats
    from genoembed.pooling.transform import FittedTransform

logger = logging.getLogger(__name__)

UNIT_PASSES = 4
"""Forward passes' worth of tokens in a work unit: enough to find sequences of like length, few enough that a
small request that comes next does not wait long."""
GATHER_S = 0.005
"""How long an idle model waits for further requests to share its first pass."""
_FAILED = "failed:"
_TRIAL = b"ACGTTGCATGACCTGAATCGGATCCTAGCAAT" * 2


class RequestVectors(NamedTuple):
    """What came of a request."""

    vectors_ND: NDArray[np.float32]
    """Empty where a record failed."""
    num_tokens: int
    failed: Mapping[int, str]
    """Records without a vector, by index: why. The first that is found ends the request."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Job:
    """One request on its way."""

    records: Sequence[SequenceRecord]
    future: Future[RequestVectors] = field(default_factory=Future)
    taken: int = 0
    """Records that are in a unit already."""
    rows: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    num_tokens: int = 0
    is_over: bool = False

    @property
    def bases_left(self) -> int:
        return sum(len(record.sequence) for record in self.records[self.taken :])

    def end(self, answer: RequestVectors | BaseException) -> None:
        """Answer, unless the request was cancelled."""
        if self.is_over:
            return
        self.is_over = True
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(answer, BaseException):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


_Place = tuple[_Job, int]
"""A record: of which request, and which of its records."""


class EmbeddingService:
    """A loaded model with its settings, and the thread that runs it.

    Args:
        model: Name, folder, or a loaded model.
        transform: A file of ``fit_transform``, applied to each vector.
        normalize: Scale vectors to length 1.
        **options: Those of ``embed``.

    Raises:
        ConfigError: If options are wrong, or give no single vector per sequence.
        GenoembedError: If the model or the transform cannot be loaded.
    """

    def __init__(
        self,
        model: str | PathLike[str] | GenomicModel,
        *,
        transform: str | PathLike[str] | None = None,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        given = {key: value for key, value in options.items() if key in OPTION_STAGE}
        self._embedder = RecordEmbedder(model, on_error="skip", **given)
        self.config = self._embedder.config
        self.layers = self._embedder.layers
        if self.config.embedding.fusion == "none" and len(self.layers) > 1:
            problem = Problem(
                f"{len(self.layers)} layers give as many vectors per sequence, but a reply holds one",
                Remedy("fusion", "concat"),
            )
            raise ConfigError(problem)
        self.name = _public_name(self._embedder.model.name)
        self.width = 0
        """Numbers of a vector; known when :meth:`start` has returned."""
        self._transform_path = transform
        self._transform: FittedTransform | None = None
        self._normalizes = normalize
        self._unit_bases = UNIT_PASSES * self._embedder.batch_tokens
        self._waiting: deque[_Job] = deque()
        self._waiting_bases = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def stats(self) -> RunStats:
        """What the forward passes cost so far."""
        return self._embedder.stats

    @property
    def waiting_bases(self) -> int:
        """Bases in the queue."""
        return self._waiting_bases

    @property
    def seconds_of_queue(self) -> float:
        """How long the queue would take at the speed so far."""
        seconds = self.stats.forward_s + self.stats.pooling_s
        return self._waiting_bases * seconds / self.stats.bases if self.stats.bases else 0.0

    def start(self) -> None:
        """Start the thread, and embed a sequence, so that a model that cannot run is known at once."""
        if self._thread is not None:
            return
        # a daemon: a pass that hangs must not keep a process that is told to end
        self._thread = threading.Thread(target=self._work, name="genoembed-model", daemon=True)
        self._thread.start()
        sequence = _TRIAL + b"ACGT" * self.config.embedding.skip_first
        trial = SequenceRecord(id="trial", sequence=sequence)
        answer = self._submit(_Job(records=(trial,))).result()
        if answer.failed:
            message = (
                f"model {self.name!r}: a trial sequence of {len(sequence)} bases has no vector: "
                + (answer.failed[0])
            )
            raise ModelError(message)
        self.width = answer.vectors_ND.shape[1]
        if self._transform_path is not None:
            self.width = self._load_transform(self._transform_path)

    def _load_transform(self, path: str | PathLike[str]) -> int:
        (matrix,) = self._embedder.feature_names
        loaded = load_transform(path)
        here = comparable_settings(self._embedder.provenance, matrix)
        check_comparable(loaded.settings, here, names=(path, "this server"))
        if loaded.transform.input_width != self.width:
            message = (
                f"{fspath(path)}: fitted on vectors of {loaded.transform.input_width} numbers, but those "
                f"here have {self.width}; fit it on a file of this model"
            )
            raise ConfigError(message)
        self._transform = loaded.transform
        return loaded.transform.output_width

    def submit(self, records: Sequence[SequenceRecord]) -> Future[RequestVectors]:
        """Queue a request; cancelling its future takes it out again.

        Raises:
            RuntimeError: If the service is closed.
        """
        return self._submit(_Job(records=records))

    def close(self, *, timeout_s: float | None = None) -> None:
        """End the thread after the unit in hand; what is queued is cancelled."""
        with self._changed:
            self._is_closed = True
            for job in self._waiting:
                job.future.cancel()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _submit(self, job: _Job) -> Future[RequestVectors]:
        with self._changed:
            if self._is_closed:
                message = "the service is closed"
                raise RuntimeError(message)
            self._waiting.append(job)
            self._waiting_bases += job.bases_left
            self._changed.notify_all()
        return job.future

    def _work(self) -> None:
        with use_threads(self.config.model.threads):
            while unit := self._next_unit():
                self._run(unit)
                del unit  # its vectors are not held while the next one is long in coming

    def _next_unit(self) -> list[_Place]:
        """Wait for records; empty when the service is closed."""
        with self._changed:
            while True:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return []
                end = time.monotonic() + GATHER_S
                while self._waiting_bases < self._embedder.batch_tokens and not self._is_closed:
                    left = end - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                if unit := self._take():
                    return unit

    def _take(self) -> list[_Place]:
        """Take one record of each waiting request by turns, up to the size of a unit."""
        unit: list[_Place] = []
        num_bases = 0
        while self._waiting and num_bases < self._unit_bases:
            job = self._waiting.popleft()
            if job.is_over or job.future.cancelled():
                self._waiting_bases -= job.bases_left
                continue
            length = len(job.records[job.taken].sequence)
            unit.append((job, job.taken))
            job.taken += 1
            num_bases += length
            self._waiting_bases -= length
            if job.taken < len(job.records):
                self._waiting.append(job)
        return unit

    def _run(self, unit: Sequence[_Place]) -> None:
        jobs = list(dict.fromkeys(job for job, _ in unit))
        try:
            found = list(self._embedder.rows([job.records[index] for job, index in unit]))
            for (job, index), (row, matrices) in zip(unit, found, strict=True):
                reason = next((flag for flag in row.flags.split(",") if flag.startswith(_FAILED)), "")
                if reason:
                    job.end(_failed(index, reason.removeprefix(_FAILED)))
                    continue
                (job.rows[index],) = matrices.values()
                job.num_tokens += self._embedder.num_tokens(job.records[index])
            for job in jobs:
                if len(job.rows) == len(job.records):
                    job.end(self._answer(job))
        except Exception as error:  # noqa: BLE001 - raised where the answer is waited for
            if len(jobs) == 1:
                _log(error, jobs[0])
                jobs[0].end(error)
                return
            # whichever request it was must not fail the others
            for job in jobs:
                if not job.is_over:
                    self._run([place for place in unit if place[0] is job])

    def _answer(self, job: _Job) -> RequestVectors:
        vectors_ND = np.stack([job.rows[index] for index in range(len(job.records))]).astype(np.float32)
        if self._transform is not None:
            vectors_ND = self._transform.apply(vectors_ND)
        if self._normalizes:
            has_length = np.abs(vectors_ND).max(axis=1) > 0
            vectors_ND[has_length] = unit_rows(vectors_ND[has_length].astype(np.float64))
        return RequestVectors(vectors_ND=vectors_ND, num_tokens=job.num_tokens, failed={})


def _public_name(name: str) -> str:
    """Name a model for requests: of a folder, its last part; where it lies is nobody's business.

    Example:
        >>> _public_name("genoembed-mini"), _public_name("owner/model")
        ('genoembed-mini', 'owner/model')
    """
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path = path.resolve()
    # of a training run, the run: all of them have a "final"
    return path.parent.name if path.name == FINAL_FOLDER else path.name


def _failed(index: int, reason: str) -> RequestVectors:
    return RequestVectors(vectors_ND=np.empty((0, 0), np.float32), num_tokens=0, failed={index: reason})


def _log(error: Exception, job: _Job) -> None:
    """Log why a request failed: in one line, but for a bug of ours."""
    request = job.records[0].id.partition(":")[0]
    is_known = isinstance(error, GenoembedError)
    logger.error("%s failed: %s", request, error, exc_info=None if is_known else error)
