"""MutBERT: BERT over single letters, with rotary positions; it calls itself ``bert``.

In: the configuration of a published folder. Out: GENA-LM's rotary BERT under the names of the published
weights, all of each head rotated. The published code reads a probability for each letter at each position;
ids stand for the letters that are certain.
"""

from __future__ import annotations

from typing import Any

from genoembed.models.families.gena_lm import (
    GenaLMConfig,
    GenaLMForMaskedLM,
    GenaLMForTokenClassification,
    GenaLMModel,
)


class MutBertConfig(GenaLMConfig):
    """Configuration of BERT, with the base of its rotary positions."""

    model_type = "mutbert"

    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        # no published model has it; users of its code set it for longer inputs
        if (scaling := kwargs.pop("rope_scaling", None)) is not None:
            message = f"rope_scaling is {scaling}, expected none; remove it"
            raise ValueError(message)
        self.position_embedding_type, self.rotary_dim = "rotary", None
        self.rotary_base = self.rope_theta
        super().__post_init__(**kwargs)


class MutBertModel(GenaLMModel):
    """The encoder; the published pooler is a mean, without weights."""

    config_class = MutBertConfig

    def __init__(self, config: MutBertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)


class MutBertForMaskedLM(GenaLMForMaskedLM):
    """The encoder and the head that it was trained with, tied to the embedding."""

    config_class = MutBertConfig


class MutBertForTokenClassification(GenaLMForTokenClassification):
    """The encoder and a class for each token."""

    config_class = MutBertConfig


AUTO_CLASSES: dict[str, type[Any]] = {
    "AutoConfig": MutBertConfig,
    "AutoModel": MutBertModel,
    "AutoModelForMaskedLM": MutBertForMaskedLM,
    "AutoModelForTokenClassification": MutBertForTokenClassification,
}
