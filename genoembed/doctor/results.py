"""What the tests of an installation or of weights found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KNOWN_ANSWER = "known_answer.json"
"""Beside the bundled weights: a sequence, a layer and the vector they give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorCheck:
    """One known-answer test."""

    name: str
    """What was tested."""
    passed: bool
    """Whether the answer is the known one."""
    detail: str
    """What was found."""
    seconds: float
    """Wall time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedCheck(DoctorCheck):
    """A published vector, and how far the one computed here is from it."""

    verdict: Literal["met", "missed"]
    sequence: str
    absolute: float
    """Largest difference of a value; infinite where the vectors cannot be compared."""
    relative: float
    """The same, relative to the largest value."""
    cosine: float
    tolerance: float
    """Largest relative difference that is met."""
    revision: str | None
    """Commit that the weights are of; None where their folder does not say."""
    known_revision: str
    """Commit that the published vector is of."""
    is_known_revision: bool | None
    """Whether the two are the same; None where the first is unknown."""
