"""Configuration of Caduceus: the fields of the published ``config.json``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAMBA: dict[str, Any] = {
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init": "random",
    "dt_scale": 1.0,
    "dt_init_floor": 1e-4,
    "conv_bias": True,
    "bias": False,
    "use_fast_path": True,
}
"""Settings of a mixer and their defaults; the last chooses between kernels, of which there are none here."""
_INITIALIZER: dict[str, Any] = {
    "initializer_range": 0.02,
    "rescale_prenorm_residual": True,
    "n_residuals_per_layer": 1,
}


class CaduceusConfig(PreTrainedConfig):
    """Shape and flags of a Caduceus model, as its ``config.json`` has them.

    Args:
        d_model: Width of one strand; hidden states are twice as wide with ``rcps``.
        n_layer: Blocks.
        vocab_size: Rows of the embedding; rounded up to a multiple of ``pad_vocab_size_multiple``.
        pad_vocab_size_multiple: See ``vocab_size``.
        ssm_cfg: Settings of the mixers that differ from Mamba's defaults, such as ``d_state`` and ``expand``.
        rms_norm: Root-mean-square norms; else layer norms with a bias.
        norm_epsilon: Added to the mean square (or variance).
        residual_in_fp32: Keep the residual stream in float32 whatever the weights are in.
        fused_add_norm: With ``rcps``, every block swaps the strands before its norm. (The name is that of a
            kernel, but the official code swaps in one and not in the other: these are two different models.)
        initializer_cfg: Settings of the initialization.
        bidirectional: A second mixer reads from right to left.
        bidirectional_strategy: ``add`` the outputs of the two or multiply them (``ew_multiply``).
        bidirectional_weight_tie: The two share their input and output projections.
        rcps: Carry both strands.
        complement_map: Id of the complement of each token. Weights bring their own, which is the one used.

    Raises:
        ConfigError: If the fields do not describe a model.

    Example:
        >>> config = CaduceusConfig(d_model=8, rcps=True, vocab_size=12, complement_map={"1": 0, "0": 1})
        >>> config.hidden_size, config.vocab_size, config.complement_map[0], config.complement_map[15]
        (16, 16, 1, 15)
    """

    model_type = "caduceus"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "n_layer"}

    d_model: int = 256
    n_layer: int = 4
    vocab_size: int = 12
    pad_vocab_size_multiple: int = 8
    ssm_cfg: dict[str, Any] | None = None
    rms_norm: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    initializer_cfg: dict[str, Any] | None = None
    bidirectional: bool = True
    bidirectional_strategy: str | None = "add"
    bidirectional_weight_tie: bool = True
    rcps: bool = False
    complement_map: dict[int, int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("hidden_size", None)  # follows from the others
        self.ssm_cfg = dict(self.ssm_cfg or {})
        self.bidirectional_strategy = self.bidirectional_strategy or "add"
        if self.pad_vocab_size_multiple > 0:
            self.vocab_size += -self.vocab_size % self.pad_vocab_size_multiple
        if self.complement_map is not None:
            # JSON has text keys, which files written with sorted keys have in the order 0, 1, 10, 11, 2
            given = {int(token): int(other) for token, other in self.complement_map.items()}
            self.complement_map = {token: given.get(token, token) for token in range(self.vocab_size)}
        super().__post_init__(**kwargs)
        self.hidden_size = self.d_model * (2 if self.rcps else 1)
        if problems := list(self._problems()):
            raise ConfigError(*problems)

    def mamba(self, name: str) -> Any:
        """Return a setting of the mixers."""
        value = (self.ssm_cfg or {}).get(name, _MAMBA[name])
        return math.ceil(self.d_model / 16) if name == "dt_rank" and value == "auto" else value

    @property
    def inner_size(self) -> int:
        """Channels of a mixer."""
        return int(self.mamba("expand") * self.d_model)

    def initializer(self, name: str) -> Any:
        """Return a setting of the initialization."""
        return (self.initializer_cfg or {}).get(name, _INITIALIZER[name])

    def _problems(self) -> Iterator[str]:
        if self.bidirectional_strategy not in ("add", "ew_multiply"):
            yield f"bidirectional_strategy is {self.bidirectional_strategy!r}, expected add or ew_multiply"
        if unknown := sorted(set(self.ssm_cfg or {}) - set(_MAMBA)):
            yield f"ssm_cfg has {', '.join(unknown)}: its mixers are not Mamba 1, which is what runs here"
        values = (self.complement_map or {}).values()
        if not all(0 <= value < self.vocab_size for value in values):
            yield f"complement_map leads out of the vocabulary, expected ids below {self.vocab_size}"
