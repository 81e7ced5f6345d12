"""Run work units in the workers of a Ray cluster: each holds the model once, and is given unit after unit.

Three parts: the cluster (connect to one, or start one on this machine that ends with the run), what runs in a
worker process, and the engine that hands out units. Only this module imports the package.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import warnings
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genoembed.config.cores import available_cores, threads_of_each
from genoembed.errors import ConfigError, GenoembedError, GenoembedWarning, MissingExtraError, ModelError
from genoembed.models.precision import automatic_dtype
from genoembed.models.trained_folder import find_facts
from genoembed.pipeline.embedder import UNIT_BYTES, RunFacts, UnitEmbedder, run_facts
from genoembed.pipeline.request import load_configured
from genoembed.pipeline.threads import read_ahead
from genoembed.pipeline.units import RunStats
from genoembed.registration import packages_of_others

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from genoembed.config.embed import EmbedConfig, ModelConfig
    from genoembed.pipeline.threads import Ahead
    from genoembed.pipeline.units import WorkUnit
    from genoembed.store import UnitRows


UNITS_A_WORKER = 2
"""One is embedded, one waits: a worker need not wait for the next."""


@contextmanager
def connected(ray: Any, config: EmbedConfig) -> Iterator[None]:
    """Connect to the requested cluster; one that is connected already is used, and stays connected."""
    if ray.is_initialized():
        yield
        return
    address = config.run.ray_address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None or address == "local":
        options |= _local_options(config)
    else:
        options["address"] = address
    try:
        with _signals_left_alone(), _no_reports_sent(), _threads_left_to_ray():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        first_line = str(error).strip().partition("\n")[0]
        message = (
            f"ray_address is {address!r}, where no cluster answers ({first_line}); start one with 'ray start "
            "--head', or leave ray_address out to use this machine"
        )
        raise ConfigError(message) from error
    try:
        yield
    finally:
        ray.shutdown()


def _local_options(config: EmbedConfig) -> dict[str, Any]:
    """Return the settings of a local cluster: as small as the run needs, and closed to the network."""
    workers = config.run.workers or 1
    threads = config.model.threads or threads_of_each(workers)
    return {
        "address": "local",
        "num_cpus": workers * threads,
        "include_dashboard": False,
        "object_store_memory": (workers * (UNITS_A_WORKER + 1) + 1) * UNIT_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_system_config": {"worker_niceness": 0},  # the workers are the run, as this process is otherwise
    }


@contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _no_reports_sent() -> Iterator[None]:
    """Keep Ray from sending statistics of use to its makers, unless the user has decided otherwise."""
    key = "RAY_USAGE_STATS_ENABLED"
    before = os.environ.get(key)
    os.environ.setdefault(key, "0")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key, None)


@contextmanager
def _threads_left_to_ray() -> Iterator[None]:
    """Keep this process's number of threads from workers unless the user set it: Ray sets each its own."""
    kept = None if available_cores().is_set else os.environ.pop("OMP_NUM_THREADS", None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ["OMP_NUM_THREADS"] = kept


def found_from_anywhere(model: ModelConfig) -> ModelConfig:
    """Make the path of a local model absolute: workers have another current folder."""
    path = Path(model.model)
    return model.changed(model=str(path.resolve())) if path.exists() else model


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a worker says when it has loaded the model."""

    facts: RunFacts
    warned: tuple[GenoembedWarning, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a worker sends back for a unit."""

    rows: UnitRows
    stats: RunStats
    """Its totals."""
    logged: tuple[tuple[int, str], ...]
    """Warnings: level and text."""


class UnitWorker:
    """Lives in a worker process and is called from the one that was started."""

    def __init__(self, config: EmbedConfig, packages: Sequence[str] = ()) -> None:
        self._config = config
        self._packages = packages
        self._embedder: UnitEmbedder | None = None
        self._heard = _Heard()

    def start(self) -> Started:
        """Load the model."""
        config = self._config
        if config.model.threads is not None:
            torch.set_num_threads(config.model.threads)
        logging.getLogger("genoembed").addHandler(self._heard)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", GenoembedWarning)
            for package in self._packages:
                importlib.import_module(package)
            model = load_configured(config.model)
            self._embedder = UnitEmbedder(
                model, config, facts=find_facts(config.model.model, revision=config.model.revision)
            )
            facts = run_facts(config, self._embedder)
        ours = tuple(item.message for item in caught if isinstance(item.message, GenoembedWarning))
        return Started(facts=facts, warned=ours)

    def embed(self, unit: WorkUnit) -> Finished:
        """Embed a unit; the next batches are prepared in a thread meanwhile."""
        assert self._embedder is not None, "it was started"
        with read_ahead(self._embedder.runner.lay_out([unit]), depth=1) as slabs:
            (embedded,) = self._embedder.runner.run(slabs)
        rows = self._embedder.rows(embedded)
        return Finished(rows=rows, stats=replace(self._embedder.stats), logged=self._heard.take())

    def look(self) -> RunStats:
        """Return the totals so far; may be called while a unit is embedded."""
        return RunStats() if self._embedder is None else replace(self._embedder.stats)


class _Heard(logging.Handler):
    """Keeps warnings until they are sent on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: deque[tuple[int, str]] = deque(maxlen=100)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[int, str], ...]:
        taken = tuple(self._records)
        self._records.clear()
        return taken


logger = logging.getLogger(__name__)

MOST_DEATHS = 4
"""Of workers over one unit, or in a row while they load the model."""
_LOOK_S = 0.5
_KEPT = ("units_kept", "bases_kept", "records_kept")
"""Totals that the process counts that reads the input."""


@contextmanager
def ray_engine(
    config: EmbedConfig, *, on_totals: Callable[[RunStats], None] | None = None
) -> Iterator[RayEngine]:
    """Connect to a cluster, or start one here, and let workers load the model."""
    ray = _import_ray()
    device = config.model.device
    if device is not None and ":" in device:
        message = (
            f"device is {device!r}, but engine is 'ray', whose workers see one GPU each; leave device out"
        )
        raise ConfigError(message)
    with connected(ray, config):
        engine = RayEngine(ray, config, on_totals)
        try:
            engine.start()
            yield engine
        finally:
            engine.stop()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError(package="ray", extra="ray", purpose="engine='ray'") from error
    return ray


class _Worker:
    """A worker as the process sees it that hands out units."""

    def __init__(self, number: int, actor: Any) -> None:
        self.number = number
        self.actor = actor
        self.starting: Any = actor.start.remote()
        """None when it has started."""
        self.units: deque[tuple[WorkUnit, Any]] = deque()
        """Given to it, in order, with what stands for the result."""
        self.settled = RunStats()
        """Its totals when it finished a unit."""
        self.now = RunStats()
        self.looking: Any = None

    def give(self, unit: WorkUnit) -> None:
        self.units.append((unit, self.actor.embed.remote(unit)))

    def look(self) -> None:
        if self.looking is None and self.starting is None:
            self.looking = self.actor.look.options(concurrency_group="look").remote()

    def awaited(self) -> list[Any]:
        starting = [] if self.starting is None else [self.starting]
        return [*starting, *(result for _, result in self.units)]


class RayEngine:
    """Hands work units to workers, and saves what comes back."""

    def __init__(self, ray: Any, config: EmbedConfig, on_totals: Callable[[RunStats], None] | None) -> None:
        self.stats = RunStats()
        self._ray = ray
        self._config = config
        self._on_totals = on_totals
        self._facts: RunFacts | None = None
        self._workers: list[_Worker] = []
        self._num_made = 0
        self._returned: deque[WorkUnit] = deque()
        self._deaths: dict[int, int] = {}
        self._failed_starts = 0
        self._buried = RunStats()
        self._make = self._maker()

    @property
    def facts(self) -> RunFacts:
        """What the run is, as its first worker says."""
        assert self._facts is not None, "it was started"
        return self._facts

    def start(self) -> None:
        """Make the workers, and wait until one has loaded the model."""
        available = int(self._ray.cluster_resources().get("GPU", 0))
        wanted = self._config.run.workers or (available if self._uses_gpus else 0) or 1
        if self._uses_gpus and wanted > available:
            logger.warning(
                "the cluster has %d GPUs for %d workers; the others begin when there are more",
                available,
                wanted,
            )
        self._workers = [self._new_worker() for _ in range(wanted)]
        logger.info("%d workers of Ray load the model", wanted)
        while self._facts is None:
            self._wait(None)

    def run(self, units: Iterable[WorkUnit], save: Callable[[UnitRows], None]) -> None:
        """Embed units and save them as they come back, in any order."""
        with read_ahead(units, depth=1) as ahead:
            while self._hand_out(ahead):
                self._wait(save)

    def stop(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()

    def _maker(self) -> Any:
        """Return a function that starts a worker, on a GPU if the cluster has any, else on processors."""
        resources = self._ray.cluster_resources()
        self._uses_gpus = resources.get("GPU", 0) >= 1 and self._config.model.device != "cpu"
        threads = self._config.model.threads
        if threads is None:
            workers = self._config.run.workers or 1
            threads = 1 if self._uses_gpus else max(1, int(resources.get("CPU", 1)) // workers)
        kind = self._ray.remote(concurrency_groups={"look": 1})(UnitWorker)
        options = kind.options(num_cpus=threads, num_gpus=int(self._uses_gpus), max_restarts=0)
        model = found_from_anywhere(self._config.model)
        if model.dtype == "auto" and not self._uses_gpus:
            # decided here, once: workers may run on machines of several kinds
            dtype = automatic_dtype(torch.device("cpu"))
            model = model.changed(dtype=str(dtype).removeprefix("torch."))
        config = self._config.changed(model=model)
        packages = packages_of_others()  # whose kinds of models are known here
        return lambda: options.remote(config, packages)

    def _new_worker(self) -> _Worker:
        self._num_made += 1
        return _Worker(self._num_made, self._make())

    def _hand_out(self, ahead: Ahead[WorkUnit]) -> bool:
        """Assign units to workers that have room; return whether there is anything left to wait for."""
        has_more = True
        for room in range(UNITS_A_WORKER):
            for worker in self._workers:
                if worker.starting is None and len(worker.units) == room and has_more:
                    unit = self._next_unit(ahead)
                    has_more = unit is not None
                    if unit is not None:
                        worker.give(unit)
        return bool(self._returned or self._num_given) or not ahead.has_ended

    @property
    def _num_given(self) -> int:
        return sum(len(worker.units) for worker in self._workers)

    def _next_unit(self, ahead: Ahead[WorkUnit]) -> WorkUnit | None:
        """Return a unit; None if there is none, or none yet and results to wait for meanwhile."""
        if self._returned:
            return self._returned.popleft()
        return next(ahead, None) if ahead.is_ready or not self._num_given else None

    def _wait(self, save: Callable[[UnitRows], None] | None) -> None:
        """Wait a little for whatever comes first."""
        awaited = [result for worker in self._workers for result in worker.awaited()]
        ready, _ = self._ray.wait(awaited, num_returns=1, timeout=_LOOK_S)
        if ready:
            ready, _ = self._ray.wait(awaited, num_returns=len(awaited), timeout=0)
        for worker in list(self._workers):
            if worker.starting is not None and worker.starting in ready:
                self._begin(worker)
            elif save is not None and worker.units and worker.units[0][1] in ready:
                self._finish(worker, save)
            elif any(result in ready for _, result in worker.units):
                self._finish(worker, save)  # the first one is not ready only if the worker is dead
        self._look()

    def _begin(self, worker: _Worker) -> None:
        started = self._get(worker, worker.starting)
        if started is None:
            return
        worker.starting = None
        self._failed_starts = 0
        if self._facts is None:
            for warning in started.warned:
                warnings.warn(warning, stacklevel=2)
            self._facts = replace(started.facts, told=self._told(started.facts))
        elif started.facts.identity != self._facts.identity:
            keys = [
                key for key, value in self._facts.identity.items() if started.facts.identity.get(key) != value
            ]
            message = (
                f"worker {worker.number} is not like the others: {', '.join(keys)} differ; install the same "
                "versions, and the same model, on all machines of the cluster"
            )
            raise ModelError(message)

    def _told(self, facts: RunFacts) -> dict[str, Any]:
        """Return the provenance with the model's name as the user gave it, not as workers find it."""
        told = dict(facts.told)
        return told | {"model": dict(told["model"]) | {"id": self._config.model.model}}

    def _finish(self, worker: _Worker, save: Callable[[UnitRows], None] | None) -> None:
        assert save is not None, "units are assigned only when there is something to save them"
        finished = self._get(worker, worker.units[0][1])
        if finished is None:
            return
        worker.units.popleft()
        for level, text in finished.logged:
            logger.log(level, "worker %d: %s", worker.number, text)
        worker.settled = worker.now = finished.stats
        save(finished.rows)

    def _get(self, worker: _Worker, result: Any) -> Any:
        """Fetch a result; None where its worker, or the machine that held it, is gone."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(result)
        except errors.RayTaskError as error:
            if isinstance(error.cause, GenoembedError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            self._bury(worker, error)
            return None

    def _bury(self, worker: _Worker, error: Exception) -> None:
        """Replace a worker that died, and queue its units again."""
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        self._buried = _sum([self._buried, worker.settled])
        reason = " ".join(str(error).split("\n\n")[0].split())
        units = [unit for unit, _ in worker.units]
        if not units:
            self._failed_starts += 1
            logger.warning("worker %d died while it loaded the model (%s)", worker.number, reason)
            if self._failed_starts >= MOST_DEATHS:
                message = (
                    f"{self._failed_starts} workers in a row died while they loaded the model ({reason}); "
                    "see whether it fits the memory of a worker, or set workers lower"
                )
                raise ModelError(message) from error
        else:
            self._blame(units[0], worker, reason, error)
        self._returned.extendleft(reversed(units))
        self._workers.append(self._new_worker())

    def _blame(self, unit: WorkUnit, worker: _Worker, reason: str, error: Exception) -> None:
        """Count the deaths over a unit, and give up when there are too many."""
        deaths = self._deaths[unit.number] = self._deaths.get(unit.number, 0) + 1
        logger.warning("worker %d died over unit %d (%s)", worker.number, unit.number, reason)
        if deaths >= MOST_DEATHS:
            message = (
                f"{deaths} workers died over unit {unit.number} ({len(unit.records)} records, "
                f"{unit.records[0].id!r} to {unit.records[-1].id!r}), the last one: {reason}; set "
                "batch_tokens or unit_bases lower if memory is short, or leave these records out"
            )
            raise ModelError(message) from error

    def _look(self) -> None:
        """Take the totals of workers in that have said them meanwhile, and ask again."""
        asked = [worker.looking for worker in self._workers if worker.looking is not None]
        ready = self._ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []
        for worker in self._workers:
            if worker.looking in ready:
                worker.now = self._seen(worker)
                worker.looking = None
            worker.look()
        totals = _sum([self._buried, *(worker.now for worker in self._workers)])
        for name, value in asdict(totals).items():
            if name not in _KEPT:
                setattr(self.stats, name, value)
        if self._on_totals is not None and self._facts is not None:
            self._on_totals(self.stats)

    def _seen(self, worker: _Worker) -> RunStats:
        try:
            found: RunStats = self._ray.get(worker.looking)
        except self._ray.exceptions.RayError:  # what it was given comes back as lost, too
            return worker.settled
        return found if found.batches >= worker.now.batches else worker.now


def _sum(parts: list[RunStats]) -> RunStats:
    """Add totals up."""
    return RunStats(**{key.name: sum(getattr(part, key.name) for part in parts) for key in fields(RunStats)})
