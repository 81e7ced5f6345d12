"""Which passages a query is compared with: all but its homologs and equals, which would be false negatives.

In: labels and identities of queries and passages. Out: masks over pairs. Promised: a positive is never left
out, and what is left out is counted.

Passages lie in groups of G, the positive first: those of query i are ``i * G`` to ``i * G + G - 1``.
B queries of this rank, Q queries of all ranks, P = Q * G passages of all ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

from genoembed.errors import ShapeError
from genoembed.sequences.records import reverse_complement

if TYPE_CHECKING:
    from torch import Tensor

    from genoembed.training.distributed import RankRows


UNKNOWN = -1
"""A label or identity that matches nothing, itself included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairIds:
    """What shows that a passage is no negative of a query. All of it is optional."""

    query_ids: Tensor | None = None
    """Identity of each query: a hash of its sequence, or the number of its homology cluster.
    int64, ``(B,)``."""
    passage_ids: Tensor | None = None
    """Identity of each passage, numbered as ``query_ids`` are. int64, ``(B * G,)``."""
    query_labels: Tensor | None = None
    """Class of each query. int64, ``(B,)``."""
    passage_labels: Tensor | None = None
    """Class of each passage. int64, ``(B * G,)``."""
    passage_mask: Tensor | None = None
    """False for a slot that only fills up a group. Bool, ``(B * G,)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateMasks:
    """Who is compared with whom."""

    passages: Tensor
    """True where a passage is a candidate of a query, its positive included. Bool, ``(B, P)``."""
    pairs: Tensor
    """True where another query, or its positive, may be a negative; False for itself. Bool, ``(B, Q)``."""
    targets: Tensor
    """Column of each query's positive in ``passages``. int64, ``(B,)``."""
    masked: int
    """Pairs of query and passage that were left out as false negatives."""


def sequence_identity(sequence: bytes) -> int:
    """Assign equal numbers to equal sequences and to the two strands of one molecule, for ``PairIds``.

    Args:
        sequence: Letters, one byte a base.

    Returns:
        A number from 0 to 2**63 - 1, the same in every process.

    Example:
        >>> sequence_identity(b"AAC") == sequence_identity(b"GTT")
        True
    """
    molecule = min(sequence, reverse_complement(sequence))
    # not hash(), which differs from process to process; shifted, because int64 has a sign and UNKNOWN is -1
    digest = hashlib.blake2b(molecule, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def allowed_passages(masks: CandidateMasks, *, in_batch_negatives: bool, group_size: int) -> Tensor:
    """Narrow candidates down to the query's own group, if in-batch negatives are off: (B, P)."""
    if in_batch_negatives:
        return masks.passages
    column_P = torch.arange(masks.passages.shape[1], device=masks.passages.device)
    return masks.passages & (column_P // group_size == masks.targets[:, None] // group_size)


def check_groups(num_queries: int, num_passages: int, ids: PairIds) -> int:
    """Check that passages come in groups of one size, and that identities fit.

    Example:
        >>> check_groups(2, 8, PairIds())
        4
    """
    if num_queries < 1 or num_passages < 1 or num_passages % num_queries:
        message = (
            f"passages: {num_passages} for {num_queries} queries, expected the same number for each query, "
            "its positive first"
        )
        raise ShapeError(message)
    for field in fields(ids):
        value = getattr(ids, field.name)
        expected = num_queries if field.name.startswith("query") else num_passages
        if value is not None and value.shape != (expected,):
            message = f"{field.name}: shape {tuple(value.shape)}, expected ({expected},)"
            raise ShapeError(message)
    mask = ids.passage_mask
    group_size = num_passages // num_queries
    if mask is not None and not bool(mask[::group_size].all()):
        message = "passage_mask: False for a positive, expected True for the first passage of each group"
        raise ShapeError(message)
    return group_size


def candidate_masks(ids: PairIds, rows: RankRows, *, group_size: int, device: torch.device) -> CandidateMasks:
    """Decide who is compared with whom.

    A passage is left out if it has the query's label, or is the query, or is the query's positive, under
    another number. Two queries are related if they or their positives share an identity, or their labels
    agree; then each other's positives are left out, too.
    """
    every = _gathered(ids, rows, group_size, device)
    num_queries = rows.sizes[rows.rank]
    own_B = rows.start + torch.arange(num_queries, device=device)
    targets_B = own_B * group_size
    excluded_BP = torch.zeros(num_queries, rows.total * group_size, dtype=torch.bool, device=device)
    related_BQ = torch.zeros(num_queries, rows.total, dtype=torch.bool, device=device)
    if every.query_labels is not None:
        labels_B = every.query_labels[own_B]
        related_BQ |= _same(labels_B, every.query_labels)
        if every.passage_labels is not None:
            excluded_BP |= _same(labels_B, every.passage_labels)
    sides = ((every.query_ids, 1), (every.passage_ids, group_size))
    # identities of all queries, and of all positives
    known = [ids_N[::step] for ids_N, step in sides if ids_N is not None]
    for own_Q in known:
        for other_Q in known:
            related_BQ |= _same(own_Q[own_B], other_Q)
        if every.passage_ids is not None:
            excluded_BP |= _same(own_Q[own_B], every.passage_ids)
    # of a related query the positive alone: its negatives were given for it, and may be anything to this one
    excluded_BP[:, ::group_size] |= related_BQ
    is_own_BQ = own_B[:, None] == torch.arange(rows.total, device=device)
    # last: the query's own positive shares its label and often its identity, but is what it must find
    excluded_BP = excluded_BP.scatter(1, targets_B[:, None], value=False)
    real_P = every.passage_mask
    masked = int((excluded_BP if real_P is None else excluded_BP & real_P).sum())
    passages_BP = ~excluded_BP if real_P is None else ~excluded_BP & real_P
    return CandidateMasks(
        passages=passages_BP, pairs=~(related_BQ | is_own_BQ), targets=targets_B, masked=masked
    )


def _gathered(ids: PairIds, rows: RankRows, group_size: int, device: torch.device) -> PairIds:
    found = {}
    for field in fields(ids):
        value = getattr(ids, field.name)
        if value is not None:
            size = 1 if field.name.startswith("query") else group_size
            found[field.name] = rows.gather(value.to(device), group_size=size)
    return replace(ids, **found)


def _same(own_B: Tensor, other_N: Tensor) -> Tensor:
    return (own_B[:, None] == other_N[None, :]) & (own_B[:, None] != UNKNOWN)
