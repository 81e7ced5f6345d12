"""Retrieval examples: a query, what it should find, and what it should not.

In: JSON lines with ``query``, ``pos`` (a list), ``neg`` (a list, may be empty or left out) and, where a
teacher scored them, ``teacher_scores``; optional ``id`` and ``group``. Out: :class:`RetrievalExample` in file
order, letters cleaned by the policies of ``extract``. Unknown keys are errors, and so is a negative that is
its own query or positive, unless a policy says otherwise.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from genoembed.config.choices import FalseNegativePolicy
from genoembed.errors import ConfigError, LabelError, SequenceFormatError
from genoembed.sequences import InputCounts, Policies, reverse_complement
from genoembed.sequences.reading import clean_record, file_names
from genoembed.sequences.records import Counts, IdRegistry, RawRecord
from genoembed.sequences.tables import iter_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from genoembed.sequences.reading import PathInput
    from genoembed.sequences.tables import TableRow


logger = logging.getLogger(__name__)


_KEYS = ("query", "pos", "neg", "teacher_scores", "id", "group")
# what FlagEmbedding, and data made for sentence-transformers, call them
_FOREIGN_KEYS = {
    "pos_scores": "write teacher_scores: the scores of pos, then those of neg",
    "neg_scores": "write teacher_scores: the scores of pos, then those of neg",
    "positive": "did you mean 'pos'?",
    "negative": "did you mean 'neg'?",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalExample:
    """A query with its positives and negatives, cleaned."""

    id: str
    """Unique within a run: ``id`` of the file, or ``row_1``, ``row_2`` ..."""
    query: bytes
    pos: tuple[bytes, ...]
    """At least one."""
    neg: tuple[bytes, ...] = ()
    """May be empty: negatives then come from the rest of the batch alone."""
    teacher_scores: tuple[float, ...] | None = None
    """A score for each of ``pos``, then for each of ``neg``."""
    group: str | None = None
    """Rows of one group are never negatives of one another."""
    source: str = ""
    line: int | None = None


@dataclass(kw_only=True, slots=True)
class PairCounts(Counts):
    """How much was read, what policies did, and how many negatives there are. The reader adds to it."""

    read: InputCounts = field(default_factory=InputCounts)
    """Sequences (queries, positives and negatives), and what the policies for letters did."""
    rows: int = 0
    """Examples yielded."""
    skipped_rows: int = 0
    """Examples left out because a policy left out one of their sequences."""
    dropped_false_negatives: int = 0
    kept_false_negatives: int = 0
    rows_without_neg: int = 0
    rows_with_teacher: int = 0
    pos: int = 0
    neg: int = 0
    fewest_neg: int | None = None
    """Negatives of the row that has fewest."""
    most_neg: int = 0
    """Negatives of the row that has most; what is over group size - 1 takes turns."""


def read_pairs(
    paths: PathInput | Sequence[PathInput],
    *,
    policies: Policies | None = None,
    false_negatives: FalseNegativePolicy = "error",
    counts: PairCounts | None = None,
) -> list[RetrievalExample]:
    """Read all retrieval examples into memory, for training.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "one.jsonl")
        ...     _ = path.write_text('{"query": "acgt", "pos": ["ACGA"], "neg": []}')
        ...     [(row.query, row.pos, row.neg, row.line) for row in read_pairs(path)]
        [(b'ACGT', (b'ACGA',), (), 1)]
    """
    names = file_names(paths)
    problems = []
    if not names:
        problems.append("no input file; name at least one, or '-' for standard input")
    if false_negatives not in get_args(FalseNegativePolicy):
        choices = ", ".join(get_args(FalseNegativePolicy))
        problems.append(f"false_negatives is {false_negatives!r}; set false_negatives to one of {choices}")
    if problems:
        raise ConfigError(*problems)
    chosen, tally = policies or Policies(), counts or PairCounts()
    ids = IdRegistry(chosen.duplicates)
    examples = []
    number = 0
    for name in names:
        tally.read.files += 1
        for row in iter_rows(name):
            # rows without an id are numbered over all files, those left out too: row_7 is the seventh row
            number += 1
            row_id = _row_id(row, number)
            sequences = _clean(row, row_id, chosen, tally.read)
            if sequences is None:
                tally.skipped_rows += 1
                continue
            # only now: a row that was left out does not use its id up
            row_id = ids.admit(row_id, path=row.path, line=row.line)
            examples.append(_example(row, row_id, sequences, false_negatives, tally))
    logger.info("pairs: %s", tally)
    if not examples:
        message = f"input: no example is left ({tally}); give more, or change the policies"
        raise ConfigError(message)
    unscored = next((row for row in examples if row.teacher_scores is None), None)
    if tally.rows_with_teacher and unscored is not None:
        # a batch has one tensor of scores: a row without any would need scores made up for it
        message = (
            f"{unscored.source}:{unscored.line}: no teacher_scores, but {tally.rows_with_teacher} of "
            f"{tally.rows} rows have them; score all rows or none"
        )
        raise ConfigError(message)
    return examples


def _example(
    row: TableRow, row_id: str, sequences: list[bytes], policy: FalseNegativePolicy, counts: PairCounts
) -> RetrievalExample:
    values: Mapping[str, Any] = row.values
    first_neg = 1 + len(values["pos"])
    query, pos, neg = sequences[0], sequences[1:first_neg], sequences[first_neg:]
    scores = _scores(row, row_id, len(pos) + len(neg))
    # both strands: a negative that is the other strand of a positive is the same molecule
    alike = {either for one in (query, *pos) for either in (one, reverse_complement(one))}
    kept = [index for index, sequence in enumerate(neg) if sequence not in alike]
    num_false = len(neg) - len(kept)
    if num_false and policy == "error":
        problem = (
            f"neg {min(set(range(len(neg))) - set(kept)) + 1} is the query or a positive of its own row "
            "(strands count as one); remove it, or set false_negatives='drop'"
        )
        raise LabelError(problem, path=row.path, line=row.line, record_id=row_id)
    if policy == "keep":
        counts.kept_false_negatives += num_false
        kept = list(range(len(neg)))
    else:
        counts.dropped_false_negatives += num_false
    counts.rows += 1
    counts.pos += len(pos)
    counts.neg += len(kept)
    counts.rows_without_neg += not kept
    counts.rows_with_teacher += scores is not None
    counts.most_neg = max(counts.most_neg, len(kept))
    counts.fewest_neg = len(kept) if counts.fewest_neg is None else min(counts.fewest_neg, len(kept))
    group = values.get("group")
    return RetrievalExample(
        id=row_id,
        query=query,
        pos=tuple(pos),
        neg=tuple(neg[index] for index in kept),
        # a dropped negative takes its score with it, or those after it would be scored as their neighbors
        teacher_scores=scores and scores[: len(pos)] + tuple(scores[len(pos) + index] for index in kept),
        group=None if group is None else str(group),
        source=row.path,
        line=row.line,
    )


def _row_id(row: TableRow, number: int) -> str:
    value = row.values.get("id")
    if value is None:
        return f"row_{number}"
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        problem = f"id is {value!r}, expected a text or a whole number; name the row or leave id out"
        raise SequenceFormatError(problem, path=row.path, line=row.line)
    return str(value).strip()


def _row_problems(row: TableRow) -> Iterator[str]:
    values = row.values
    for key in values:
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            remedy = _FOREIGN_KEYS.get(key) or (
                f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(_KEYS)}; leave it out"
            )
            yield f"{key!r} is not a key of a retrieval example; {remedy}"
    for key in ("query", "pos"):
        if key not in values:
            yield f"no {key!r}, expected query (a sequence) and pos (a list of sequences); add it"
    if not isinstance(values.get("query"), str):
        yield f"query is {_shown(values.get('query'))}, expected one sequence; write it as a text"
    for key in ("pos", "neg"):
        listed = values.get(key, [])
        if key == "neg" and listed is None:
            continue
        if not isinstance(listed, list):
            yield f"{key} is {_shown(listed)}, expected a list of sequences; put it in brackets"
            continue
        for place, item in enumerate(listed, start=1):
            if not isinstance(item, str):
                yield f"item {place} of {key} is {_shown(item)}, expected a sequence; write it as a text"
    if not values.get("pos"):
        yield "pos is empty, expected at least one sequence; add one or remove the row"
    if isinstance(values.get("group"), list | dict):
        yield f"group is {_shown(values['group'])}, expected a text or a number; name one group"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _scores(row: TableRow, row_id: str, num_passages: int) -> tuple[float, ...] | None:
    scores = row.values.get("teacher_scores")
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != num_passages:
        found = f"{len(scores)} numbers" if isinstance(scores, list) else _shown(scores)
        problem = (
            f"teacher_scores: {found} for {num_passages} sequences of pos and neg, expected one each; "
            "fix the row"
        )
        raise LabelError(problem, path=row.path, line=row.line, record_id=row_id)
    for place, score in enumerate(scores, start=1):
        if not _is_finite(score):
            problem = (
                f"item {place} of teacher_scores is {_shown(score)}, expected a finite number; fix the row"
            )
            raise LabelError(problem, path=row.path, line=row.line, record_id=row_id)
    return tuple(float(score) for score in scores)


def _clean(row: TableRow, row_id: str, policies: Policies, counts: InputCounts) -> list[bytes] | None:
    """Clean the query, the positives and the negatives of a row; None if a policy leaves one out."""
    problem = next(_row_problems(row), None)
    if problem is not None:
        raise SequenceFormatError(problem, path=row.path, line=row.line, record_id=row_id)
    values: Mapping[str, Any] = row.values
    named = [("query", values["query"])]
    named += [(f"pos {place}", text) for place, text in enumerate(values["pos"], start=1)]
    named += [(f"neg {place}", text) for place, text in enumerate(values.get("neg") or [], start=1)]
    # names within the row are unique by their making; that rows are is checked where they are read
    ids = IdRegistry("error")
    cleaned = []
    for part, text in named:
        raw = RawRecord(
            id=f"{row_id}, {part}",
            description="",
            path=row.path,
            source=row.path,
            line=row.line,
            body=iter([(text.encode(), row.line)]),
        )
        record = clean_record(raw, policies=policies, ids=ids, counts=counts)
        if record is None:
            return None
        cleaned.append(record.sequence)
    return cleaned
