"""Describe the machine and the versions a figure was taken with; no names of hosts, users or folders.

Example::

    python benchmarks/describe_machine.py
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("genoembed", "h5py", "numpy", "torch", "transformers")


def describe_machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | int | float]:
    """Collect what a reader needs to judge a figure.

    Args:
        packages: Distributions whose versions to state; those that are not installed are left out.

    Returns:
        ``date`` (UTC), ``cpu``, ``cores`` (that this process may use), ``ram_gib``, ``system``, ``python``,
        and a version a package; ``gpu`` if torch is loaded and sees one.
    """
    facts: dict[str, str | int | float] = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "ram_gib": _ram_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float:
    if not hasattr(os, "sysconf"):
        return 0.0
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


if __name__ == "__main__":
    print(json.dumps(describe_machine(), indent=1))
