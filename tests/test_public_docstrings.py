"""What users can reach has full docstrings: every argument, what comes back, and what is raised."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import genoembed
import genoembed.training

ROOT = Path(__file__).parents[1]
PARTS = (
    "genoembed.finetuning.collate",
    "genoembed.pooling.fuse",
    "genoembed.pooling.reduce",
    "genoembed.retrieval.contrastive",
    "genoembed.retrieval.distillation",
    "genoembed.retrieval.grad_cache",
    "genoembed.retrieval.heads",
    "genoembed.retrieval.m3",
    "genoembed.sklearn",
    "genoembed.training.heads",
)
"""Modules of which users take parts, beside the public names of ``genoembed`` and its ``training``."""


def public_objects() -> dict[str, set[str]]:
    """Return the public functions and classes of each file."""
    found: dict[str, set[str]] = {}
    objects = [getattr(home, name) for home in (genoembed, genoembed.training) for name in home.__all__]
    for part in PARTS:
        module = importlib.import_module(part)
        objects += [
            value
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == part
        ]
    for value in objects:
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith(
            "genoembed."
        ):
            file = Path(inspect.getsourcefile(inspect.unwrap(value))).relative_to(ROOT).as_posix()
            found.setdefault(file, set()).add(value.__name__)
    return found


@cache
def complaints() -> list[tuple[str, str, str]]:
    """Return what the linter reports: file, function or method, complaint."""
    words = [sys.executable, "-m", "pydoclint.main", "--quiet", "genoembed"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found, file = [], ""
    for line in (ran.stdout + ran.stderr).splitlines():
        if line.startswith("genoembed/"):
            file = line.strip()
        elif match := re.search(r"DOC\d+: (?:Function|Method|Class|Generator) `([\w.]+)`", line):
            found.append((file, match[1], line.strip()))
    return found


def test_linter_sees_something():
    assert len(public_objects()) >= 20
    assert {file for file, _, _ in complaints()}, "the linter said nothing at all: was it run?"


@pytest.mark.parametrize("file", sorted(public_objects()))
def test_public_docstrings_are_complete(file):
    public = public_objects()[file]
    wrong = [
        complaint
        for where, name, complaint in complaints()
        if where == file
        and name.partition(".")[0] in public
        and not any(part.startswith("_") for part in name.split("."))
    ]
    assert wrong == []
