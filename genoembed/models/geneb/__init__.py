"""The 40 published models that the GENEB benchmark compares: names, licenses, and how it makes their vectors.

In: the tables beside this file, whose README says where they come from. Out: a `PublishedModel` per row, and
the `KnownAnswer` of those whose published weights have one. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from genoembed.errors import ModelError

_FOLDER = Path(__file__).parent
OURS = "ours"
"""What stands for code of genoembed among the classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """A model of the GENEB benchmark."""

    name: str
    """Short name, as ``--model`` takes it."""
    title: str
    """Name in the paper."""
    family: str
    repo_id: str | None
    """Hugging Face repository; None where the weights are elsewhere."""
    branch: str | None
    """Branch of the repository that the short name stands for; None for its main branch."""
    revision: str | None
    """Commit that the benchmark and the known answers used."""
    license: str
    """License of the weights as their card states it; ``not stated`` where it states none."""
    context: int | None
    """Longest input in tokens, as the model's files state it."""
    num_parameters: int
    width: int
    """Length of its vectors."""
    class_name: str
    """Class of transformers that runs it, ``ours`` for code of genoembed, empty where it is not run."""
    golden: str
    """Family of ``tests/golden/families`` that has its class; empty where none has."""
    has_golden_layout: bool
    """Whether that folder has the layout of the published one, too."""
    reason: str
    """Why it is not run; empty where it is."""
    adds_special_tokens: bool
    """Whether the benchmark has the tokenizer add its special tokens."""
    prefix: str
    """Text that the benchmark puts in front of each sequence."""
    trim: int
    """The benchmark cuts bases at the end until the length is a multiple of this; 0 where it does not."""
    state: str
    """Hidden states that the benchmark takes; ``final`` as for ``--layer``."""
    pooling: str
    """How the benchmark pools them."""
    pools_special_tokens: bool
    """Whether special tokens count in that."""

    @property
    def is_run(self) -> bool:
        """Whether genoembed runs it."""
        return bool(self.class_name)

    @property
    def tested(self) -> str:
        """What was tested here, or why it is not run."""
        if not self.is_run:
            return f"not run: {self.reason}"
        if self.has_golden_layout:
            return f"tiny folder in the published layout ({self.golden})"
        if self.golden:
            return f"same class as a tested folder ({self.golden})"
        if self.class_name == OURS:
            return "tiny folder in its layout, against a plain computation"
        return f"tiny folder of its class ({self.class_name} of transformers)"

    @property
    def rules(self) -> dict[str, str | bool | int]:
        """How the benchmark makes a vector."""
        return {
            "special_tokens": self.adds_special_tokens,
            "prefix": self.prefix,
            "trim_to_multiple": self.trim,
            "state": self.state,
            "pooling": self.pooling,
            "pools_special_tokens": self.pools_special_tokens,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownAnswer:
    """What published weights give for one short input."""

    sequence: str
    revision: str
    """Commit of the repository that the weights were from."""
    num_tokens: int | None
    """Tokens of the input, where recorded."""
    values: tuple[float, ...]
    """The vector, 7 digits."""


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """List the models of the GENEB benchmark (arXiv 2606.04525, table 4), the largest first.

    Returns:
        All 40: those that run here, and those that do not, with the reason.

    Example:
        >>> [model.name for model in published_models() if model.family == "DNABERT-2"]
        ['dnabert-s', 'dnabert-2']
    """
    with (_FOLDER / "models.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(map(_from_row, csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)))


def _from_row(row: dict[str, str]) -> PublishedModel:
    return PublishedModel(
        name=row["name"],
        title=row["title"],
        family=row["family"],
        repo_id=row["repository"] or None,
        branch=row["branch"] or None,
        revision=row["revision"] or None,
        license=row["license"] or "not stated",
        context=int(row["context"]) if row["context"] else None,
        num_parameters=int(row["parameters"]),
        width=int(row["width"]),
        class_name=row["class"],
        golden=row["golden"],
        has_golden_layout=row["tested"] == "layout",
        reason=row["reason"],
        adds_special_tokens=row["special_tokens"] == "yes",
        prefix=row["prefix"],
        trim=int(row["trim"] or 0),
        state=row["state"],
        pooling=row["pooling"],
        pools_special_tokens=row["pools_special"] == "yes",
    )


def published_named(name: str) -> PublishedModel | None:
    """Find a model by its short name or its name in the paper, in any case.

    Example:
        >>> published_named("NT-v2-50M-MS").repo_id
        'InstaDeepAI/nucleotide-transformer-v2-50m-multi-species'
    """
    wanted = name.lower()
    return next((m for m in published_models() if wanted in (m.name, m.title.lower())), None)


def published_in(repo_id: str) -> PublishedModel | None:
    """Find the model of a Hugging Face repository."""
    wanted = repo_id.lower()
    return next((m for m in published_models() if m.repo_id and m.repo_id.lower() == wanted), None)


@cache
def known_answers(title: str) -> tuple[KnownAnswer, ...]:
    """Read what the published weights of a model give, by its name in the paper; empty where unknown."""
    found = []
    with (_FOLDER / "known_answers.jsonl").open(encoding="utf-8") as file:
        for line in file:
            # the vectors are long, and those of the other models need no parsing
            if f'"paper_name": "{title}"' not in line:
                continue
            values = json.loads(line)
            found.append(
                KnownAnswer(
                    sequence=values["input"],
                    revision=values["revision"],
                    num_tokens=values["tokens"],
                    values=tuple(values["values"]),
                )
            )
    return tuple(found)


def repository_of(model: PublishedModel) -> str:
    """Return the repository that a short name stands for.

    Raises:
        ModelError: If the model is not run here.
    """
    if model.is_run and model.repo_id is not None:
        return model.repo_id
    remedy = "choose another of genoembed models"
    if model.repo_id is not None:
        remedy = f"name {model.repo_id} itself to have its own code tried (trust_remote_code)"
    message = f"model {model.name!r}: {model.title} is not run here ({model.reason}); {remedy}"
    raise ModelError(message)
