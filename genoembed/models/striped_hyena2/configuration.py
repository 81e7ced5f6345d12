"""Configuration of StripedHyena 2 as transformers has it.

The fields and their checks are those of :mod:`genoembed.models.striped_hyena2.shape`.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from genoembed.models.striped_hyena2.shape import StripedHyena2Fields


class StripedHyena2Config(StripedHyena2Fields, PreTrainedConfig):
    """Shape and constants of a StripedHyena 2 model.

    The four lists of block numbers together name every block exactly once. Defaults are the
    pattern of Evo 2 7B at a small width.

    Args:
        vocab_size: Rows of the embedding (512 for byte tokens).
        hidden_size: Width of the residual stream; a multiple of the head and group counts.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads of an attention block.
        intermediate_size: Inner width of the gated MLP.
        attn_layer_idxs: Blocks with attention.
        hcl_layer_idxs: Blocks with the long, modal filter.
        hcm_layer_idxs: Blocks with the medium filter.
        hcs_layer_idxs: Blocks with the short filter.
        short_filter_length: Taps of the filter on the projections.
        hcs_filter_length: Taps of the short inner filter (below 128).
        hcm_filter_length: Taps of the medium inner filter (128 or more).
        hcs_filter_groups: Filters of a short block; each serves neighboring channels.
        hcm_filter_groups: Filters of a medium block.
        state_size: Real poles of a long filter, per channel.
        rms_norm_eps: Added to the root mean square, outside the root.
        rotary_emb_base: Base of the rotary frequencies, where a checkpoint brings none.
        rotary_emb_scaling_factor: Positions are divided by this (1 = no interpolation).
        max_position_embeddings: Context in tokens; not enforced by the forward pass.
        interleave: Whether the projections' channels come in triples (as in Evo 2) or in thirds.
        evo2_style_activations: GELU in block 0 only, identity elsewhere (else GELU everywhere).
        mlp_activation: ``gelu`` (exact) or ``silu``.
        qkv_proj_bias: Whether the input projections have a bias.
        mha_out_proj_bias: Whether an attention block's output projection has a bias.
        hyena_out_proj_bias: Whether a Hyena block's output projection has a bias.
        short_filter_bias: Must be False: no released model has one.
        initializer_range: Standard deviation of the embedding at initialization.
        fp8_projections: Whether the projections of Hyena blocks have the scales of Evo 2's training in FP8:
            ``none``; ``optional``, which runs without FP8 unless it is requested; or ``needed``.
        **kwargs: Anything a transformers configuration takes.

    Raises:
        ConfigError: If the fields do not describe a model; all problems at once.

    Example:
        >>> config = StripedHyena2Config(hidden_size=64, num_attention_heads=4)
        >>> config.block_kind(3), config.block_kind(28)
        ('attention', 'hcs')
    """

    model_type = "striped_hyena2"
    # transformers writes a constructor of its own into every class that has none
    __init__ = StripedHyena2Fields.__init__
