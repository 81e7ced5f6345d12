"""The learning rate where none is set: by what learns, the width of the model and the number of rows.

In: what is known of a run before its first step. Out: a :class:`Rate`, with the reason that the log gives.

Sources. All weights: 3e-5 at width 768 (Zhou et al. 2024, DNABERT-2), above it in inverse proportion to the
width (Yang et al. 2022). Adapters: 2e-4 (Hu et al. 2022). Below 2,000 rows a third less (Mosbach et al. 2021:
small steps). At width 128 these are too low: 1e-3 and 3e-3 on 700 rows did better
(benchmarks/results/finetuning.md); between the widths, rates lie on a line in logarithms. New heads: 1e-3
(Kingma and Ba 2015, Adam's own).

Many rows: BGE-M3's authors take 1e-5 below 1e4 rows, 5e-6 at 1e5 and 2e-6 to 3e-6 at 1e6, at width 1024:
half of it for ten times the rows. That share is taken here. The level is not: their model makes embeddings by
then, which large steps would undo, while a language model has yet to learn them, at 2.3e-5 for that width.
Adapters keep their rate: Hu et al. took theirs on 4e4 to 4e5 rows.

A model that was tuned for embeddings before goes on at a fifth. E5 (Wang et al. 2022) is fine-tuned at a
tenth of the rate of its contrastive pre-training (1e-5 after 1e-4, large); BGE-M3 (Chen et al. 2024) is
pre-trained at 5e-5, and its authors advise 1e-5 or 5e-6 to go on: a fifth to a tenth. Sets here are small and
make few steps, so the larger share is taken; that is 4.5e-6 at width 1024.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from genoembed.config.choices import Schedule, Tuning

HEAD_RATE = 1e-3
TUNED_SHARE = 0.2
"""Of the rate, for a model whose embeddings were trained before."""
FEW_ROWS = 2_000
"""Rows below which a set is small: more epochs, and lower rates."""
_FEW_SHARE = 2 / 3
_NARROW, _WIDE = 128, 768
_FULL_RATES, _LORA_RATES = (1.5e-3, 3e-5), (4.5e-3, 2e-4)
"""At the width ``_NARROW`` and at ``_WIDE``, for sets that are neither small nor large."""
_MANY_ROWS, _MOST_ROWS = 1e4, 1e6
_NEW_RATE, _GOING_ON_SHARE = 2e-3, 0.1


class Rate(NamedTuple):
    """A peak learning rate."""

    value: float
    why: str
    """What it was chosen by."""


def encoder_rate(width: int, *, tuning: Tuning | None, num_rows: int, is_tuned: bool = False) -> Rate:
    """Choose the rate of a model that is fine-tuned; ``is_tuned`` if its embeddings were trained before.

    Example:
        >>> [round(encoder_rate(w, tuning="full", num_rows=500).value, 6) for w in (128, 768, 4096)]
        [0.001, 2e-05, 4e-06]
        >>> print(encoder_rate(1024, tuning="full", num_rows=100_000).why)
        width 1024, tuning full; x 0.5 for 100,000 rows
    """
    tuning = tuning or "full"  # as with_tuning says of all but large models
    uses_adapters = tuning == "lora"
    narrow, wide = _LORA_RATES if uses_adapters else _FULL_RATES
    place = math.log(max(width, _NARROW) / _NARROW) / math.log(_WIDE / _NARROW)
    rate = narrow * (wide / narrow) ** min(place, 1.0)
    if width > _WIDE and not uses_adapters:
        rate *= _WIDE / width
    share = size_share(num_rows, uses_adapters=uses_adapters)
    why = f"width {width}, tuning {tuning}" + (f"; x {share:.2g} for {num_rows:,} rows" if share < 1 else "")
    return _gone_on(Rate(rate * share, why), is_tuned=is_tuned)


def _gone_on(rate: Rate, *, is_tuned: bool) -> Rate:
    why = f"{rate.why}; x {TUNED_SHARE:g}: the model was tuned for embeddings, which large steps would undo"
    return Rate(rate.value * TUNED_SHARE, why) if is_tuned else rate


def size_share(num_rows: int, *, uses_adapters: bool) -> float:
    """Return the share of the rate that a set of this size takes.

    Example:
        >>> [round(size_share(int(n), uses_adapters=False), 2) for n in (700, 1e4, 1e5, 1e6, 1e7)]
        [0.67, 1.0, 0.5, 0.25, 0.25]
    """
    if num_rows < FEW_ROWS:
        return _FEW_SHARE
    if uses_adapters:
        return 1.0
    return float(0.5 ** math.log10(min(max(num_rows, _MANY_ROWS), _MOST_ROWS) / _MANY_ROWS))


def pretraining_rate(width: int | None, *, is_new: bool, is_tuned: bool = False) -> Rate:
    """Choose the rate of a causal model that is trained on a corpus; no width is that of a small model.

    Example:
        >>> pretraining_rate(512, is_new=True)
        Rate(value=0.001, why='width 512, new weights')
    """
    wide = max(width or _NARROW, _NARROW)
    rate = _NEW_RATE * math.sqrt(_NARROW / wide) * (1 if is_new else _GOING_ON_SHARE)
    why = "new weights" if is_new else "a tenth of that for new weights"
    return _gone_on(Rate(rate, f"width {width}, {why}" if width else why), is_tuned=is_tuned)


_FIRST_SHARE = 0.1
"""Of the peak rate, in the first step of a warm-up: none at all would waste the step."""


def warmup_share(step: int, warmup: int) -> float:
    """Compute the share of the peak rate in a step of the warm-up, from 0."""
    return _FIRST_SHARE + (1 - _FIRST_SHARE) * step / warmup


def rate_share(step: int, *, schedule: Schedule, least: float, warmup: int, total: int) -> float:
    """Compute the learning rate of a step, from 0, as a share of its peak.

    Example:
        >>> shares = [rate_share(n, schedule="linear", least=0.2, warmup=3, total=8) for n in range(9)]
        >>> [round(share, 2) for share in shares]
        [0.1, 0.4, 0.7, 1.0, 0.84, 0.68, 0.52, 0.36, 0.2]
    """
    if step < warmup:
        return warmup_share(step, warmup)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return least + (1 - least) * left[schedule]
