"""Slow, obvious float64 loops that fast code must agree with."""

from __future__ import annotations

import math


def pool_row(vectors, mask, method):
    """Pool one sequence, given as a list of vectors and a list of booleans."""
    kept = [vector for vector, is_kept in zip(vectors, mask, strict=True) if is_kept]
    if method == "cls":
        return list(vectors[0])
    if method == "first":
        return list(kept[0])
    if method == "last":
        return list(kept[-1])
    if method == "max":
        return [max(column) for column in zip(*kept, strict=True)]
    weights = [1] * len(kept) if method == "mean" else list(range(1, len(kept) + 1))
    return [
        math.fsum(weight * value for weight, value in zip(weights, column, strict=True)) / sum(weights)
        for column in zip(*kept, strict=True)
    ]


def pack_rows(documents, window, eod, pad):
    """Pack documents token by token; one dict a row."""
    stream = [
        (token, position == 0) for document in documents for position, token in enumerate([*document, eod])
    ]
    rows = []
    for start in range(0, len(stream), window):
        row = {"input_ids": [], "labels": [], "position_ids": [], "segment_ids": []}
        segment, position = -1, 0
        for slot in range(window):
            if start + slot >= len(stream):
                is_first_pad = start + slot == len(stream)
                position = 0 if is_first_pad else position + 1
                values = (pad, -100, position, -1)
            else:
                token, opens_document = stream[start + slot]
                is_first = opens_document or slot == 0
                segment += is_first
                position = 0 if is_first else position + 1
                values = (token, -100 if is_first else token, position, segment)
            for key, value in zip(row, values, strict=True):
                row[key].append(value)
        rows.append(row)
    return rows


def pad_rows(rows, pad, multiple):
    """Pad lists on the right to the smallest multiple that holds the longest."""
    length = max(len(row) for row in rows)
    while length % multiple:
        length += 1
    return [list(row) + [pad] * (length - len(row)) for row in rows]
