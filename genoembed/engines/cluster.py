"""Connect to a Ray cluster, or start one on this machine that ends with the run.

The package comes as an argument: only ``genoembed.engines.ray`` imports it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genoembed.engines.embedder import UNIT_BYTES
from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genoembed.config import EmbedConfig, ModelConfig

UNITS_A_WORKER = 2
"""One is embedded, one waits: a worker need not wait for the next."""


@contextmanager
def connected(ray: Any, config: EmbedConfig) -> Iterator[None]:
    """Connect to the cluster that is asked for; one that is connected already is taken, and stays so."""
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
        with _signals_left_alone(), _no_reports_sent():
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
    """Say what a cluster of this machine is to be: as small as the run needs, and closed to the network."""
    workers = config.run.workers or 1
    threads = config.model.threads or max(1, _available_cpus() // workers)
    return {
        "address": "local",
        "num_cpus": workers * threads,
        "include_dashboard": False,
        "object_store_memory": (workers * (UNITS_A_WORKER + 1) + 1) * UNIT_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_system_config": {"worker_niceness": 0},  # the workers are the run, as this process is otherwise
    }


def _available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray takes."""
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


def found_from_anywhere(model: ModelConfig) -> ModelConfig:
    """Give a local folder by its whole path: workers have another current folder."""
    path = Path(model.model)
    return replace(model, model=str(path.resolve())) if path.exists() else model
