"""Configuration of NTv3: the fields of the published ``config.json``."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedConfig

from genoembed.errors import ConfigError


class Ntv3Config(PreTrainedConfig):
    """Shape of a pre-trained NTv3 model, as its ``config.json`` has it.

    Settings of the precision of single stages (``stem_compute_dtype`` and the like) are kept, but not
    followed: all stages run in the dtype of the weights, norms in float32.

    Args:
        alphabet_size: Rows of the embedding.
        pad_token_id: Token that fills up sequences.
        mask_token_id: Token of masked positions.
        num_downsamples: How often the length is halved.
        attention_heads: Heads of a transformer block.
        key_size: Channels of a head; the heads together are as wide as ``embed_dim``.
        token_embed_dim: Width of the embedding.
        conv_init_embed_dim: Width of the stem and of the final states.
        embed_dim: Width of the transformer. Those of the steps between lie evenly between the two.
        ffn_embed_dim: Inner width of the gated MLP.
        num_layers: Transformer blocks.
        layer_norm_eps: Added to the variance in the transformer's norms.
        num_hidden_layers_head: Layers of the head before its last.
        use_skip_connection: Add to each block up what went into the block down of that length.
        deconv_upsample_type: How blocks up double the length: ``repeat+conv`` repeats, ``conv_transpose``
            puts zeros between.
        deconv_phase: Where ``conv_transpose`` puts the vectors: at ``odd`` or ``even`` positions.

    Raises:
        ConfigError: If the fields do not describe a model.
    """

    model_type = "ntv3"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "conv_init_embed_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "attention_heads",
        "intermediate_size": "ffn_embed_dim",
        "vocab_size": "alphabet_size",
    }

    alphabet_size: int = 11
    pad_token_id: int | None = 1
    mask_token_id: int | None = 2
    num_downsamples: int = 7
    attention_heads: int = 8
    key_size: int | None = 32
    token_embed_dim: int = 16
    conv_init_embed_dim: int = 256
    embed_dim: int = 256
    ffn_embed_dim: int = 1024
    num_layers: int = 2
    layer_norm_eps: float = 1e-5
    num_hidden_layers_head: int = 0
    use_skip_connection: bool = True
    deconv_upsample_type: str = "repeat+conv"
    deconv_phase: str = "odd"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # re-saved ones have the name of the official code's enumeration before it
        spelled = self.deconv_upsample_type.rpartition(".")[2].lower().replace("-", "_").replace("+", "_")
        repeats = {"repeat_conv": True, "repeatconv": True, "conv_transpose": False, "convtranspose": False}
        heads, self.key_size = self.attention_heads, self.key_size or self.embed_dim // self.attention_heads
        problems = []
        if spelled in repeats:
            self.deconv_upsample_type = "repeat+conv" if repeats[spelled] else "conv_transpose"
        else:
            known = "expected repeat+conv or conv_transpose"
            problems.append(f"deconv_upsample_type is {self.deconv_upsample_type!r}, {known}")
        if self.num_downsamples < 1 or self.num_layers < 1:
            problems.append("num_downsamples and num_layers must be above 0")
        if self.deconv_phase not in ("odd", "even"):
            problems.append(f"deconv_phase is {self.deconv_phase!r}, expected odd or even")
        if self.key_size * heads != self.embed_dim or self.key_size % 2:
            problems.append(
                f"{heads} heads of {self.key_size} channels are not as wide as embed_dim, {self.embed_dim}"
            )
        self.tie_word_embeddings = False  # the two have different widths
        super().__post_init__(**kwargs)
        if problems:
            raise ConfigError(*problems)

    @property
    def widths(self) -> list[int]:
        """Channels at each length, from the whole sequence to the shortest."""
        even = np.linspace(self.conv_init_embed_dim, self.embed_dim, self.num_downsamples + 1)
        return [int(width) for width in even]
