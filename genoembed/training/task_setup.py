"""What a fine-tuning run is ready with before its first step, and the loaded model that it is made around.

In: a :class:`~genoembed.training.finetune_config.FinetuneConfig`. Out: a model that is cut, with the
collator, encoder of rows and runner that fit it; :class:`TaskSetup` is what tasks make of these.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from genoembed.models.load import load_model
from genoembed.tokenization.hf import build_encoder
from genoembed.training.collate import PaddedCollator
from genoembed.training.encoder import Encoder
from genoembed.training.row_encoding import LabelEncoder, check_lengths
from genoembed.training.windowed import WindowedRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.tokenization.hf import SequenceEncoder
    from genoembed.training.collate import LabelTarget
    from genoembed.training.epoch_rows import EpochDataset
    from genoembed.training.evaluation import Measure
    from genoembed.training.finetune_config import FinetuneConfig
    from genoembed.training.finetune_data import Sides
    from genoembed.training.finetune_stages import Contrast
    from genoembed.training.labels import LabelSpace
    from genoembed.training.negatives import GroupSampler
    from genoembed.training.task_models import CausalModel, ContrastModel, PredictionModel, RetrievalModel

logger = logging.getLogger(__name__)

TaskModel: TypeAlias = "PredictionModel | CausalModel | ContrastModel | RetrievalModel"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSetup:
    """A run that is ready to begin."""

    model: TaskModel
    tokenizer: PreTrainedTokenizerBase
    space: LabelSpace | None
    """What labels mean, for tasks that predict."""
    source: Path | None
    """Folder of the model that was started from."""
    width: int
    """Hidden size."""
    dataset: EpochDataset
    collate: Callable[[Any], dict[str, Tensor]]
    lengths: Sequence[int]
    """Bases of each row."""
    classes: Sequence[object] | None
    """Classes that batches should hold several rows of."""
    measures: dict[str, Measure[Any]]
    """``eval`` and ``test``, as far as rows are held out."""
    digest: str
    """Of all rows."""
    contrast: Contrast | None = None
    group_sampler: GroupSampler | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBase:
    """A loaded model, cut and set up to learn, with how its rows are encoded and padded."""

    genomic: GenomicModel
    encoder: Encoder
    tokens: SequenceEncoder
    runner: WindowedRunner

    def collator(self, target: LabelTarget, config: FinetuneConfig) -> PaddedCollator:
        """Pad as the model can take it."""
        multiple = 1 if self.encoder.padding == "equal" else config.recipe.pad_to_multiple_of
        return PaddedCollator(
            pad_token_id=self.tokens.pad_token_id, target=target, pad_to_multiple_of=multiple
        )

    def label_encoder(self, config: FinetuneConfig, space: LabelSpace | None) -> LabelEncoder:
        """Encode rows for the model."""
        return LabelEncoder(
            encoder=self.tokens,
            max_tokens=self.genomic.max_length,
            space=space,
            skip_first=config.encoder.skip_first,
            several_bases=config.data.several_bases,
        )

    def check(self, sequences: Sequence[bytes], config: FinetuneConfig) -> None:
        """Refuse sequences that do not fit the context."""
        check_lengths(
            sequences,
            self.tokens,
            max_tokens=self.genomic.max_length,
            max_crop_bp=config.augment.max_crop_bp,
        )

    def facts(self, sides: Sides[Any]) -> dict[str, Any]:
        """Give the fields of :class:`TaskSetup` that go by model and data alone."""
        return {
            "tokenizer": self.genomic.tokenizer,
            "source": self.genomic.location,
            "width": self.encoder.width,
            "digest": sides.digest,
        }


def load_base(config: FinetuneConfig) -> LoadedBase:
    """Load the model that a run starts from."""
    wanted = config.encoder
    genomic = load_model(
        wanted.model, dtype="float32", trust_remote_code=wanted.trust_remote_code, revision=wanted.revision
    )
    encoder = Encoder(genomic, wanted, seed=config.recipe.seed)
    logger.info("%s: cut at %s, pooling %s", genomic.name, ", ".join(encoder.layers), encoder.pooling)
    tokens = build_encoder(genomic.tokenizer)
    runner = WindowedRunner.of(
        encoder,
        tokens,
        max_tokens=genomic.max_length,
        skip_first=wanted.skip_first,
        rows=config.recipe.rows_per_device,
        pad_to_multiple_of=config.recipe.pad_to_multiple_of,
    )
    return LoadedBase(genomic=genomic, encoder=encoder, tokens=tokens, runner=runner)
