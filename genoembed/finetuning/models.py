"""Models that predict: an encoder with the head of a task, or a causal model, behind one ``forward``.

In: batches of :mod:`genoembed.finetuning.collate`. Out: ``{"loss": ...}``; or, with ``want``, what evaluation
and prediction need. Everything goes through ``forward``, so that wrappers (data-parallel, sharded) see it.
Models that compare sequences are in :mod:`genoembed.retrieval.models`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ShapeError
from genoembed.training.heads import ClassificationHead, MultilabelHead, RegressionHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from genoembed.finetuning.labels import LabelSpace
    from genoembed.training.encoder import Encoder, Want
    from genoembed.training.inference import SequenceRunner
    from genoembed.training.tuning import Tuned


Head: TypeAlias = ClassificationHead | MultilabelHead | RegressionHead


class PredictionModel(nn.Module):
    """An encoder and a head that predicts something of a sequence, or of each of its tokens."""

    def __init__(self, encoder: Encoder, head: Head, *, per_token: bool = False) -> None:
        super().__init__()
        self.encoder, self.head, self.per_token = encoder, head, per_token

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What gradients are reported of."""
        return {"encoder": self.encoder, "head": self.head}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        vectors: Tensor | None = None,
        want: Want = "loss",
    ) -> dict[str, Any]:
        """Run the encoder, the head, or both."""
        if vectors is None:
            if input_ids is None or attention_mask is None or pool_mask is None:
                message = "batch: input_ids, attention_mask and pool_mask, expected all three, or vectors"
                raise ShapeError(message)
            if self.per_token:
                vectors = self.encoder.hidden(input_ids, attention_mask)
            else:
                layers = self.encoder.pooled_layers(input_ids, attention_mask, pool_mask)
                if want == "layers":
                    return layers
                vectors = self.encoder.fuse(layers)
        logits = self.head(vectors)
        if want == "predict":
            return {"logits": logits, "predictions": self.head.predict(vectors)}
        if labels is None:
            message = "labels: none in the batch, expected one a row"
            raise ShapeError(message)
        return {"loss": self.head.loss(logits, labels)}


class CausalModel(nn.Module):
    """A causal language model on padded rows."""

    def __init__(self, model: PreTrainedModel, tuned: Tuned) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.tuned = tuned

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What gradients are reported of."""
        return {"model": self.model}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pool_mask: Tensor | None = None,
        *,
        want: Want = "loss",
    ) -> dict[str, Any]:
        """Take the loss of the next tokens."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
        targets = labels[:, 1:]
        reduction = "mean" if want == "loss" else "sum"
        nats = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction
        )
        return {"loss": nats} if want == "loss" else {"nats": nats, "tokens": (targets != IGNORE_INDEX).sum()}


def new_head(
    space: LabelSpace,
    width: int,
    *,
    add_pooler: bool = False,
    dropout: float = 0.0,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
    seed: int = 0,
) -> Head:
    """Build the head that predicts what a label space holds."""
    shape: dict[str, Any] = {
        "dropout": dropout,
        "add_pooler": add_pooler,
        "generator": torch.Generator().manual_seed(seed),
    }
    if space.kind == "regression":
        return RegressionHead(width, space.num_outputs, **shape)
    if space.kind == "multilabel":
        return MultilabelHead(width, space.num_outputs, **shape)
    return ClassificationHead(
        width, space.num_outputs, class_weights=class_weights, label_smoothing=label_smoothing, **shape
    )


FEWEST_SEQUENCES, MOST_SEQUENCES, MOST_BASES = 16, 256, 1 << 17
"""Sequences that show a new head its inputs: fewer where they are long."""


def fit_inputs(model: PredictionModel, runner: SequenceRunner, sequences: Sequence[bytes]) -> None:
    """Fit the head to what the encoder gives for some of the sequences."""
    chosen = choose_sequences(sequences)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        if model.per_token:
            states = [tokens.values["states"] for tokens in runner.states(chosen)]
            inputs = torch.cat(states).to(next(model.parameters()).device)
        else:
            inputs = runner.vectors(model, chosen)
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
