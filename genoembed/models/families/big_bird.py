"""BigBird as its configuration says, whatever it ran on before.

transformers' BigBird changes itself at the first input that is too short for blocks: from then on, it has
full attention, and its outputs depend on what it has seen. Here, each pass chooses by its own length: full
attention up to ``(5 + 2 * num_random_blocks) * block_size`` tokens, block-sparse attention beyond. As both
this choice and the blocks follow the padded length, only sequences of one length may share a batch.

Names are those of transformers, so that saved folders open there, too.

B rows, L positions, P positions of whole blocks, D hidden size.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.big_bird import modeling_big_bird as upstream

from genoembed.models.precision import without_autocast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions


class BigBirdConfig(transformers.BigBirdConfig):
    """Configuration of BigBird; a class of its own, so that models built by transformers stay as they are."""


class _SelfAttention(upstream.BigBirdBlockSparseAttention):
    """Both attentions on the same weights; what masks a pass brings tells which is meant."""

    def __init__(self, config: BigBirdConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.is_decoder = config.is_decoder
        self.layer_idx = seed

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if band_mask is None or from_mask is None or to_mask is None:
            full: tuple[Tensor, Tensor] = upstream.BigBirdSelfAttention.forward(
                self, hidden_states, attention_mask, **kwargs
            )
            return full
        # whole blocks are needed here only: outside, a block's output has a row for each token and no more.
        # what is added cannot be seen, since its keys are masked
        length, dtype = hidden_states.shape[1], self.query.weight.dtype
        hidden_BPD = F.pad(hidden_states.to(dtype), (0, 0, 0, from_mask.shape[2] - length))
        masks = (band_mask.to(dtype), from_mask.to(dtype), to_mask.to(dtype))
        # autocast changes the type of some of what upstream scatters into one tensor, which torch refuses
        with _numpy_state_kept(), without_autocast(hidden_states.device):
            output_BPD, weights = super().forward(hidden_BPD, *masks, from_blocked_mask, to_blocked_mask)
        return output_BPD[:, :length], weights


class _Attention(upstream.BigBirdAttention):
    """Attention without a mode of its own: gradient checkpointing runs it again after other inputs."""

    def __init__(self, config: BigBirdConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.self = _SelfAttention(config, seed)

    def set_attention_type(self, value: str, layer_idx: int | None = None) -> None:
        pass

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output_BLD, weights = self.self(hidden_states, **kwargs)
        return self.output(output_BLD, hidden_states), weights


class BigBirdModel(upstream.BigBirdModel):
    """The encoder, whose passes do not depend on each other."""

    config_class = BigBirdConfig
    sees_padding = True
    """Whether padding changes real positions, masked or not."""

    def __init__(self, config: BigBirdConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for index, layer in enumerate(self.encoder.layer):
            layer.attention = _Attention(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        given = inputs_embeds if input_ids is None else input_ids
        length = 0 if given is None else given.shape[1]
        few = (5 + 2 * self.config.num_random_blocks) * self.config.block_size
        is_full = length <= few or self.config.add_cross_attention
        # read by what follows, which would set it for good
        self.attention_type = "original_full" if is_full else self.config.attention_type
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _pad_to_block_size(self, *, attention_mask: Tensor, **inputs: Any) -> tuple[Any, ...]:
        """Pad the mask alone: attention pads its input by it."""
        missing = -attention_mask.shape[1] % self.config.block_size
        names = ("token_type_ids", "position_ids", "inputs_embeds")
        mask = F.pad(attention_mask, (0, missing))
        return (0, inputs["input_ids"], mask, *(inputs[name] for name in names))


class _WithOurEncoder:
    """A model with a head: that of transformers, around the encoder above."""

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False

    def __init__(self, config: BigBirdConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.bert = BigBirdModel(config)
        self.post_init()  # type: ignore[attr-defined]


class BigBirdForMaskedLM(_WithOurEncoder, upstream.BigBirdForMaskedLM):
    """The encoder and the head that it was trained with."""

    config_class = BigBirdConfig


class BigBirdForSequenceClassification(_WithOurEncoder, upstream.BigBirdForSequenceClassification):
    """The encoder and a class, or a number, for each sequence."""

    config_class = BigBirdConfig


class BigBirdForTokenClassification(_WithOurEncoder, upstream.BigBirdForTokenClassification):
    """The encoder and a class for each token."""

    config_class = BigBirdConfig


@contextmanager
def _numpy_state_kept() -> Iterator[None]:
    """Give numpy's global random state back: in training, each layer seeds it to draw its random blocks."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


AUTO_CLASSES = {
    "AutoConfig": BigBirdConfig,
    "AutoModel": BigBirdModel,
    "AutoModelForMaskedLM": BigBirdForMaskedLM,
    "AutoModelForSequenceClassification": BigBirdForSequenceClassification,
    "AutoModelForTokenClassification": BigBirdForTokenClassification,
}
