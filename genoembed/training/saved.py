"""What all fine-tuned folders share: the encoder that was trained, and the weights of its heads.

In: a loaded model, and what its folder says about it. Out: an encoder that gives the vectors of training, and
heads with their weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.finetune import EncoderConfig
from genoembed.errors import CheckpointError
from genoembed.models.trained_folder import HEADS_FILE, read_heads
from genoembed.training.encoder import Encoder

if TYPE_CHECKING:
    from torch import nn

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts


def load_encoder(facts: FinetunedFacts, genomic: GenomicModel) -> Encoder:
    """Cut and pool a model as it was fine-tuned."""
    config = EncoderConfig(
        model=genomic.name,
        layers=facts.layers,
        pooling=facts.pooling,  # type: ignore[arg-type]
        skip_first=facts.skip_first,
        fusion=facts.fusion,  # type: ignore[arg-type]
        tuning="frozen",
    )
    return Encoder(genomic, config, fusion_weights=facts.fusion_weights or None)


def load_heads(model: nn.Module, facts: FinetunedFacts) -> None:
    """Load saved weights into everything but the backbone."""
    saved = read_heads(facts.folder)
    wanted = {name for name in model.state_dict() if not name.startswith("encoder.backbone.")}
    saved = {
        name: value for name, value in saved.items() if name in wanted or not name.endswith("class_weights")
    }
    if set(saved) != wanted:
        names = sorted(set(saved) ^ wanted)
        message = f"weights {', '.join(names[:3])} are missing or have no place; fine-tune again"
        raise CheckpointError(message, path=str(facts.folder / HEADS_FILE))
    try:
        model.load_state_dict(saved, strict=False)
    except RuntimeError as error:
        message = f"weights have another shape ({str(error).splitlines()[-1].strip()}); fine-tune again"
        raise CheckpointError(message, path=str(facts.folder / HEADS_FILE)) from error
