"""Show a new head what its inputs are like, before training.

In: a model that predicts, and the sequences it is to learn from. Out: nothing; the head knows mean and
deviation of its inputs. Promised: the same sequences give the same numbers, so that a run that goes on has
those of the run that began.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.training.task_models import PredictionModel
    from genoembed.training.windowed import WindowedRunner

MOST_SEQUENCES = 256
FEWEST_SEQUENCES = 16
MOST_BASES = 1 << 17
"""Where sequences are long, fewer of them are looked at, but not fewer than ``FEWEST_SEQUENCES``."""


def fit_inputs(model: PredictionModel, runner: WindowedRunner, sequences: Sequence[bytes]) -> None:
    """Fit the head to what the encoder gives for some of the sequences."""
    chosen = choose_sequences(sequences)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        if model.per_token:
            inputs = runner.states(model.encoder, chosen)
        else:
            inputs = runner.vectors(model, model.encoder, chosen)
    model.head.fit_inputs(inputs)
    model.train(was_training)


def choose_sequences(sequences: Sequence[bytes]) -> list[bytes]:
    """Take sequences at even distances, as many as are needed to know a mean and a deviation.

    Example:
        >>> choose_sequences([b"A", b"C", b"G"])
        [b'A', b'C', b'G']
        >>> len(choose_sequences([b"A"] * 1000)), len(choose_sequences([b"A" * MOST_BASES] * 1000))
        (256, 16)
    """
    mean_bases = sum(map(len, sequences)) / len(sequences)
    wanted = max(FEWEST_SEQUENCES, min(MOST_SEQUENCES, int(MOST_BASES / mean_bases)))
    count = min(wanted, len(sequences))
    return [sequences[index * len(sequences) // count] for index in range(count)]
