"""Pretraining is tested as all training is: garbage collections look at what a run has made alone."""

from __future__ import annotations

from tests.training.conftest import _imports_are_no_garbage  # noqa: F401
