"""Shape of StripedHyena 2, the architecture of Evo 2: its fields and their checks.

Nguyen et al. 2024 (StripedHyena, Evo) and Brixi et al. 2025 (Evo 2, StripedHyena 2) describe the
family; field names follow transformers where it has a name and the original YAML where it has not. Nothing
here needs transformers: its configuration class is
:class:`~genoembed.models.striped_hyena2.configuration.StripedHyena2Config`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

Fp8Need: TypeAlias = Literal["none", "optional", "needed"]
"""Whether the projections of Hyena blocks have FP8 scales, and whether they run in FP8 by default."""

BlockKind: TypeAlias = Literal["attention", "hcl", "hcm", "hcs"]
"""Attention, or a Hyena block with a long (modal), medium (128 taps) or short (7 taps) filter."""

EVO2_7B_PATTERN: dict[str, list[int]] = {
    "attn_layer_idxs": [3, 10, 17, 24, 31],
    "hcs_layer_idxs": [0, 4, 7, 11, 14, 18, 21, 25, 28],
    "hcm_layer_idxs": [1, 5, 8, 12, 15, 19, 22, 26, 29],
    "hcl_layer_idxs": [2, 6, 9, 13, 16, 20, 23, 27, 30],
}
"""Which of Evo 2 7B's 32 blocks is of which kind."""


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "short_filter_length",
    "hcs_filter_length",
    "hcm_filter_length",
    "hcs_filter_groups",
    "hcm_filter_groups",
    "state_size",
    "max_position_embeddings",
)
_POSITIVE = ("rotary_emb_base", "rotary_emb_scaling_factor")
_NOT_NEGATIVE = ("rms_norm_eps", "initializer_range")
_LISTS = ("attn_layer_idxs", "hcl_layer_idxs", "hcm_layer_idxs", "hcs_layer_idxs")
_FLAGS = (
    "interleave",
    "evo2_style_activations",
    "qkv_proj_bias",
    "mha_out_proj_bias",
    "hyena_out_proj_bias",
    "short_filter_bias",
)


class StripedHyena2Fields:
    """Fields of a StripedHyena 2 model, described at ``StripedHyena2Config``, and their checks.

    The four lists of block numbers together name every block exactly once. Defaults are the pattern of
    Evo 2 7B at a small width. Other keys are kept by the class that this one stands before.
    """

    tie_word_embeddings: bool

    def __init__(  # noqa: PLR0913 - a configuration is a list of fields
        self,
        *,
        vocab_size: int = 512,
        hidden_size: int = 128,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 4,
        intermediate_size: int = 352,
        attn_layer_idxs: Sequence[int] | None = None,
        hcl_layer_idxs: Sequence[int] | None = None,
        hcm_layer_idxs: Sequence[int] | None = None,
        hcs_layer_idxs: Sequence[int] | None = None,
        short_filter_length: int = 3,
        hcs_filter_length: int = 7,
        hcm_filter_length: int = 128,
        hcs_filter_groups: int = 8,
        hcm_filter_groups: int = 8,
        state_size: int = 16,
        rms_norm_eps: float = 1e-6,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scaling_factor: float = 1.0,
        max_position_embeddings: int = 8192,
        interleave: bool = True,
        evo2_style_activations: bool = True,
        mlp_activation: Literal["gelu", "silu"] = "gelu",
        qkv_proj_bias: bool = False,
        mha_out_proj_bias: bool = True,
        hyena_out_proj_bias: bool = True,
        short_filter_bias: bool = False,
        initializer_range: float = 0.02,
        fp8_projections: Fp8Need = "none",
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        given = (attn_layer_idxs, hcl_layer_idxs, hcm_layer_idxs, hcs_layer_idxs)
        default = EVO2_7B_PATTERN if all(idxs is None for idxs in given) else {}
        self.attn_layer_idxs = _listed(attn_layer_idxs or default.get("attn_layer_idxs", []))
        self.hcl_layer_idxs = _listed(hcl_layer_idxs or default.get("hcl_layer_idxs", []))
        self.hcm_layer_idxs = _listed(hcm_layer_idxs or default.get("hcm_layer_idxs", []))
        self.hcs_layer_idxs = _listed(hcs_layer_idxs or default.get("hcs_layer_idxs", []))
        self.short_filter_length = short_filter_length
        self.hcs_filter_length = hcs_filter_length
        self.hcm_filter_length = hcm_filter_length
        self.hcs_filter_groups = hcs_filter_groups
        self.hcm_filter_groups = hcm_filter_groups
        self.state_size = state_size
        self.rms_norm_eps = rms_norm_eps
        self.rotary_emb_base = rotary_emb_base
        self.rotary_emb_scaling_factor = rotary_emb_scaling_factor
        self.max_position_embeddings = max_position_embeddings
        self.interleave = interleave
        self.evo2_style_activations = evo2_style_activations
        self.mlp_activation = mlp_activation
        self.qkv_proj_bias = qkv_proj_bias
        self.mha_out_proj_bias = mha_out_proj_bias
        self.hyena_out_proj_bias = hyena_out_proj_bias
        self.short_filter_bias = short_filter_bias
        self.initializer_range = initializer_range
        self.fp8_projections = fp8_projections
        strangers = [key for key in kwargs if key.endswith("_layer_idxs")]
        kwargs.setdefault("tie_word_embeddings", True)
        kwargs.setdefault("pad_token_id", 1)
        kwargs.setdefault("eos_token_id", 0)
        super().__init__(**kwargs)
        problems = [
            f"{key} is not a kind of block; use attn_, hcl_, hcm_ or hcs_layer_idxs" for key in strangers
        ]
        problems += self._sizes() or self._problems()
        if problems:
            raise ConfigError(*problems)

    def block_kind(self, index: int) -> BlockKind:
        """Return the kind of a block.

        Args:
            index: Block number from 0.

        Returns:
            The kind; the lists are searched in the order attention, hcl, hcm, hcs.

        Raises:
            ConfigError: If no list names the block.
        """
        for kind, idxs in self._layer_lists().items():
            if index in idxs:
                return kind
        message = f"block {index} is in none of attn_, hcl_, hcm_ and hcs_layer_idxs"
        raise ConfigError(message)

    def _layer_lists(self) -> dict[BlockKind, list[int]]:
        return {
            "attention": self.attn_layer_idxs,
            "hcl": self.hcl_layer_idxs,
            "hcm": self.hcm_layer_idxs,
            "hcs": self.hcs_layer_idxs,
        }

    def _sizes(self) -> list[str]:
        """Check each value by itself: a text in place of a number would fail in the first forward pass."""
        expected: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
            (_COUNTS, "a whole number above 0", lambda value: _is_whole(value) and value > 0),
            (_POSITIVE, "a number above 0", lambda value: _is_number(value) and value > 0),
            (_NOT_NEGATIVE, "a number from 0 on", lambda value: _is_number(value) and value >= 0),
            (_FLAGS, "true or false", lambda value: isinstance(value, bool)),
            (
                _LISTS,
                "a list of block numbers",
                lambda value: isinstance(value, list) and all(map(_is_whole, value)),
            ),
        ]
        return [
            f"{name} is {getattr(self, name)!r}, expected {words}"
            for names, words, fits in expected
            for name in names
            if not fits(getattr(self, name))
        ]

    def _problems(self) -> list[str]:
        problems = []
        named = Counter(index for idxs in self._layer_lists().values() for index in idxs)
        if sorted(named.elements()) != list(range(self.num_hidden_layers)):
            problems.append(
                f"the four layer lists must name each of the {self.num_hidden_layers} blocks "
                f"(num_hidden_layers) exactly once; they name {sorted(named.elements())}"
            )
        if self.attn_layer_idxs and self.hidden_size % (2 * self.num_attention_heads):
            problems.append(
                f"hidden_size {self.hidden_size} is not an even multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in ("hcs_filter_groups", "hcm_filter_groups"):
            if self.hidden_size % getattr(self, name):
                problems.append(
                    f"hidden_size {self.hidden_size} is not a multiple of {name} {getattr(self, name)}"
                )
        if not self.hcs_filter_length < 128 <= self.hcm_filter_length:
            problems.append("hcs_filter_length must be below 128 and hcm_filter_length 128 or more")
        if self.mlp_activation not in ("gelu", "silu"):
            problems.append(f"mlp_activation is {self.mlp_activation!r}; it must be 'gelu' or 'silu'")
        if self.fp8_projections not in get_args(Fp8Need):
            choices = ", ".join(get_args(Fp8Need))
            problems.append(f"fp8_projections is {self.fp8_projections!r}; it must be one of {choices}")
        elif self.fp8_projections != "none" and self.qkv_proj_bias:
            problems.append("qkv_proj_bias must be False where fp8_projections is not 'none'")
        if self.short_filter_bias:
            problems.append("short_filter_bias must be False: no released StripedHyena 2 model has one")
        if not self.tie_word_embeddings:
            problems.append("tie_word_embeddings must be True: the logits are a product with the embedding")
        return problems


def _listed(value: object) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


class OtherKeys:
    """Keeps keys that are no fields as attributes, as transformers' configurations do."""

    model_type = "striped_hyena2"
    output_hidden_states = False

    def __init__(self, **kwargs: object) -> None:
        vars(self).update(kwargs)

    def to_dict(self) -> dict[str, Any]:
        """List all keys."""
        return {**vars(self), "model_type": self.model_type}


class StripedHyena2Shape(StripedHyena2Fields, OtherKeys):
    """Shape and constants of a StripedHyena 2 model, without transformers.

    Example:
        >>> shape = StripedHyena2Shape(hidden_size=64, num_attention_heads=4, checkpoint_name="tiny")
        >>> shape.block_kind(3), shape.block_kind(28), shape.to_dict()["checkpoint_name"]
        ('attention', 'hcs', 'tiny')
    """
