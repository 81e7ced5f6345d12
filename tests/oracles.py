"""Slow, obvious loops that fast code must agree with: in float64, or in exact integers."""

from __future__ import annotations

import math
import struct
from fractions import Fraction


def pool_row(vectors, mask, method):
    """Pool one sequence, given as a list of vectors, and of how much each counts (booleans, or bases)."""
    kept = [vector for vector, is_kept in zip(vectors, mask, strict=True) if is_kept]
    if method == "cls":
        return list(vectors[0])
    if method == "first":
        return list(kept[0])
    if method == "last":
        return list(kept[-1])
    if method == "max":
        return [max(column) for column in zip(*kept, strict=True)]
    weights = [int(weight) for weight in mask if weight]
    if method == "weighted_mean":
        weights = [weight * number for number, weight in enumerate(weights, start=1)]
    columns = list(zip(*kept, strict=True))
    means = [weighted_mean(weights, column) for column in columns]
    if method != "mean_std":
        return means
    squares = [[(value - mean) ** 2 for value in column] for mean, column in zip(means, columns, strict=True)]
    return [*means, *(math.sqrt(weighted_mean(weights, column)) for column in squares)]


def weighted_mean(weights, values):
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


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


def round_float(value, num_bits, lowest):
    """Round an exact number to the nearest float of so many significant bits, ties to even."""
    if value == 0:
        return Fraction(0)
    step = Fraction(2) ** (max(floor_log2(value), lowest) - num_bits + 1)
    return round(value / step) * step


def floor_log2(value):
    """Return the exponent of the largest power of two that is not above the magnitude."""
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= magnitude else exponent - 1


def e4m3(value, scale):
    """Return significand (a signed integer of 4 bits) and exponent of a scaled value; None for NaN."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return int(math.copysign(14, value)), 8
    scaled = round_float(round_float(Fraction(value), 8, -126) * Fraction(scale), 24, -126)
    rounded = round_float(max(Fraction(-448), min(Fraction(448), scaled)), 4, -6)
    exponent = -6 if rounded == 0 else max(-6, floor_log2(rounded))
    significand = rounded / Fraction(2) ** (exponent - 3)
    assert significand.denominator == 1
    return significand.numerator, exponent


def hopper_product(left_rows, right_rows, scales):
    """Multiply rows with rows as FP8 tensor cores of Hopper do, in integers; scales are float32 numbers."""
    left = [[e4m3(value, scales[0]) for value in row] for row in left_rows]
    right = [[e4m3(value, scales[1]) for value in row] for row in right_rows]
    inverses = [round_float(1 / Fraction(scale), 24, -126) for scale in scales]
    factor = round_float(inverses[0] * inverses[1], 24, -126)
    return [[scaled_sum(a, b, factor) for b in right] for a in left]


def scaled_sum(left, right, factor):
    """Add up products of E4M3 numbers in integers, cut where the hardware cuts and nowhere else."""
    if None in left or None in right:
        return math.nan
    unit, total = 40, 0
    for start in range(0, len(left), 32):
        terms = []  # value in units of 2**-40, exponent
        for (a, a_exponent), (b, b_exponent) in zip(
            left[start : start + 32], right[start : start + 32], strict=True
        ):
            if a * b:
                exponent = a_exponent + b_exponent
                terms.append((a * b << (exponent - 6 + unit), exponent))
        if total:
            terms.append((total, abs(total).bit_length() - 1 - unit))
        if terms:
            lowest_bit = max(exponent for _, exponent in terms) - 13 + unit
            total = sum(cut(value, lowest_bit) for value, _ in terms)
            total = cut(total, max(0, abs(total).bit_length() - 14))
    return to_bfloat16(round_float(Fraction(total, 1 << unit) * factor, 24, -126))


def cut(value, lowest_bit):
    """Clear the bits of an integer's magnitude below one of them."""
    kept = abs(value) >> lowest_bit << lowest_bit
    return kept if value >= 0 else -kept


def to_bfloat16(value):
    """Round an exact number to bfloat16; overflow is infinity."""
    rounded = round_float(value, 8, -126)
    try:
        return struct.unpack("f", struct.pack("f", float(rounded)))[0]
    except OverflowError:
        return math.copysign(math.inf, rounded)


def drawable_probabilities(logits, temperature, top_k, top_p):
    """Probability of each token after temperature, top-k and top-p, as a dict; by loops, in float64."""
    likeliest_first = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return {likeliest_first[0]: 1.0}
    kept = likeliest_first if top_k is None else likeliest_first[:top_k]
    largest = logits[kept[0]]
    weights = {token: math.exp((logits[token] - largest) / temperature) for token in kept}
    total = math.fsum(weights.values())
    nucleus, mass = [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    total = math.fsum(weights[token] for token in nucleus)
    return {token: weights[token] / total for token in nucleus}


def inverse_cumulative(probabilities, uniform):
    """Return the first token, in their order, up to which the probabilities sum to more than a number."""
    mass = 0.0
    for token in sorted(probabilities):
        mass += probabilities[token]
        if mass > uniform:
            return token
    return max(probabilities)
