"""Fine-tuned models as classes of transformers, so that its Auto classes open what fine-tuning saved.

In: a folder whose ``config.json`` says under ``genoembed`` how the model was cut, pooled and fused. Out:
``AutoModelForSequenceClassification`` and ``AutoModelForTokenClassification`` with the logits that
``predict`` makes its numbers of; ``AutoModel``, where layers other than the last were trained, with these as
its hidden states. Promised: layers, pooling and heads are those of fine-tuning, by the same code.

Tokens know their bases by their ids alone here: a word counts for as many as it has letters, and unknown ones
for one. Windows are for ``predict``; an input longer than the context is an error of the model.

B rows, L padded length, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import can_return_tuple

from genoembed.models.layers import final_candidates
from genoembed.pooling.reduce import pooled_width
from genoembed.training.encoder import LayerEncoder
from genoembed.training.heads import ClassificationHead, MultilabelHead, PredictionHead, RegressionHead

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SETTINGS = "genoembed"
"""Key of ``config.json``."""
HEAD, BASES = "head", "bases"
"""Names of the parts beside the model, which begin the names of their weights."""
SINGLE_LABEL, MULTILABEL, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
"""What transformers calls kinds of labels."""


class TokenBases(nn.Module):
    """How many bases each token stands for, 0 for special ones: what pooling weighs tokens by.

    Args:
        num_ids: Size of the vocabulary.
        overlap: Length of the words that begin at every base; 1 where tokens do not overlap.
    """

    counts: Tensor

    def __init__(self, num_ids: int, *, overlap: int = 1) -> None:
        super().__init__()
        self.register_buffer("counts", torch.ones(num_ids, dtype=torch.int32))
        self.overlap = overlap

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, skip_first: int = 0) -> Tensor:
        """Weigh the tokens of each row; see :func:`genoembed.batching.pad.pool_mask`."""
        counts_BL = torch.where(attention_mask != 0, self.counts[input_ids].long(), 0)
        if self.overlap > 1:
            weights_BL = self._shares(counts_BL > 0, skip_first)
        else:
            ends_BL = counts_BL.cumsum(dim=1)
            starts_BL = ends_BL - counts_BL
            weights_BL = (ends_BL - starts_BL.clamp(min=skip_first)).clamp(min=0)
        is_single = bool((weights_BL <= 1).all()) and self.overlap == 1
        return weights_BL > 0 if is_single else weights_BL.float()

    def _shares(self, is_word_BL: Tensor, skip_first: int) -> Tensor:
        """Give each word an equal part of every base that it shares with others."""
        start_BL = (is_word_BL.cumsum(dim=1) - 1).clamp(min=0)
        num_words_B1 = is_word_BL.sum(dim=1, keepdim=True)
        num_bases_B1 = num_words_B1 + self.overlap - 1
        base = torch.arange(int(num_bases_B1.max()), device=is_word_BL.device)[None]
        cover = torch.minimum(torch.minimum(base + 1, num_bases_B1 - base), num_words_B1)
        share = 1 / cover.clamp(min=1, max=self.overlap).double()
        share = torch.where((base >= skip_first) & (base < num_bases_B1), share, 0)
        before = F.pad(share.cumsum(dim=1), (1, 0))
        end_BL = (start_BL + self.overlap).clamp(max=before.shape[1] - 1)
        return torch.where(is_word_BL, before.gather(1, end_BL) - before.gather(1, start_BL), 0)


class TrainedModel(PreTrainedModel):
    """A model cut at some layers: their fused states.

    Args:
        config: Of the model, with what fine-tuning noted in it; without, the mean of the last layer is taken.
    """

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False

    backbone_class: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        settings: dict[str, Any] = dict(getattr(config, SETTINGS, None) or self._defaults())
        self.encoder = LayerEncoder(
            tuple(settings["layers"]),
            pooling=settings["pooling"],
            fusion=settings["fusion"],
            weights=tuple(settings["fusion_weights"]),
            padding=settings["padding"],
            takes_mask=settings["takes_mask"],
        )
        # not as a submodule: weights have one name, and files one copy of them
        self.encoder.__dict__["backbone"] = self.base_model
        self._build_head(settings)
        self.post_init()

    def _defaults(self) -> dict[str, Any]:
        """Settings of a model that was not fine-tuned here: the mean over what its last norm gives."""
        path = getattr(self.base_model, "final_layer_path", None) or final_candidates(self.base_model)[0]
        width = self.base_model.get_input_embeddings().weight.shape[1]
        return {
            "layers": [path],
            "pooling": "mean",
            "skip_first": 0,
            "fusion": "none",
            "fusion_weights": [],
            "padding": "mask",
            "takes_mask": True,
            "overlap": 1,
            "width": width,
            "add_pooler": False,
        }

    def _build_head(self, settings: dict[str, Any]) -> None:
        """Add what comes after the layers."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PredictionHead):
            init.zeros_(module.input_mean)
            init.ones_(module.input_deviation)
            if isinstance(module, RegressionHead):
                init.zeros_(module.target_mean)
                init.ones_(module.target_deviation)
        elif isinstance(module, TokenBases):
            init.ones_(module.counts)
            for role in ("eos", "pad", "bos"):
                index = getattr(self.config, f"{role}_token_id", None)
                if isinstance(index, int):
                    module.counts[index] = 0
        else:
            super()._init_weights(module)

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return torch.ones_like(input_ids) if attention_mask is None else attention_mask

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> BaseModelOutput:
        """Run the model as far as its deepest layer.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: 1 where a token is real. Shape ``(B, L)``.

        Returns:
            ``last_hidden_state``: the states of the layers, fused. Shape ``(B, L, D)``.
        """
        hidden = self.encoder.hidden(input_ids, self._mask(input_ids, attention_mask))
        return BaseModelOutput(last_hidden_state=hidden)


class _Predictor(TrainedModel):
    """A model with a head."""

    def _build_head(self, settings: dict[str, Any]) -> None:
        embedding = self.base_model.get_input_embeddings().weight
        self.bases = TokenBases(len(embedding), overlap=settings["overlap"])
        self.skip_first = int(settings["skip_first"])
        width, outputs = self._head_width(settings), self.config.num_labels
        problem = self.config.problem_type or (REGRESSION if outputs == 1 else None)
        heads: dict[str | None, type[PredictionHead]] = {
            MULTILABEL: MultilabelHead,
            REGRESSION: RegressionHead,
        }
        with torch.device("cpu"):  # new weights come from a generator there, wherever the rest is built
            self.head: Any = heads.get(problem, ClassificationHead)(
                width, outputs, add_pooler=bool(settings["add_pooler"])
            )

    def _head_width(self, settings: dict[str, Any]) -> int:
        return pooled_width(int(settings["width"]), settings["pooling"])

    def _outputs(self, vectors: Tensor, labels: Tensor | None) -> dict[str, Tensor | None]:
        outputs = self.head(vectors)
        loss = None if labels is None else self.head.loss(outputs, labels)
        is_number = isinstance(self.head, RegressionHead)
        return {"loss": loss, "logits": self.head.predict(vectors) if is_number else outputs}


class SequencePredictor(_Predictor):
    """A model with classes, labels or numbers of sequences."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: object,
    ) -> SequenceClassifierOutput:
        """Score sequences.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: 1 where a token is real. Shape ``(B, L)``.
            labels: A class (int64, ``(B,)``), labels (0 or 1, ``(B, num_labels)``) or numbers for each row.

        Returns:
            ``logits``, shape ``(B, num_labels)``: the numbers themselves, in their own units, where
            ``problem_type`` is ``regression``; ``loss`` where labels are given.
        """
        mask = self._mask(input_ids, attention_mask)
        counted = self.bases(input_ids, mask, skip_first=self.skip_first)
        return SequenceClassifierOutput(
            **self._outputs(self.encoder.pooled(input_ids, mask, counted), labels)
        )


class TokenPredictor(_Predictor):
    """A model with a class of each token."""

    def _head_width(self, settings: dict[str, Any]) -> int:
        return int(settings["width"])

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: object,
    ) -> TokenClassifierOutput:
        """Score tokens.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: 1 where a token is real. Shape ``(B, L)``.
            labels: Class of each token, -100 for none. int64, shape ``(B, L)``.

        Returns:
            ``logits``, shape ``(B, L, num_labels)``; ``loss`` where labels are given.
        """
        hidden = self.encoder.hidden(input_ids, self._mask(input_ids, attention_mask))
        return TokenClassifierOutput(**self._outputs(hidden, labels))


_KINDS: dict[str, type[TrainedModel]] = {
    "Model": TrainedModel,
    "ForSequenceClassification": SequencePredictor,
    "ForTokenClassification": TokenPredictor,
}
_made: dict[tuple[type[PreTrainedConfig], str], type[TrainedModel]] = {}


def trained_class(config: type[PreTrainedConfig], kind: str, *, name: str) -> type[TrainedModel]:
    """Return the class for models with a configuration; the same one each time."""
    if (config, kind) not in _made:
        # what stands there chooses between a class and ours, and has the former's attributes
        known = MODEL_MAPPING[config]
        backbone: type[PreTrainedModel] = known[0] if isinstance(known, tuple) else known.plain_class
        family = next(
            base
            for base in backbone.__mro__[1:]
            if issubclass(base, PreTrainedModel) and base.__name__.endswith("PreTrainedModel")
        )
        exact = {*(getattr(family, "_keep_in_fp32_modules_strict", None) or ()), HEAD}
        values = {
            "__module__": __name__,
            "__doc__": _KINDS[kind].__doc__,
            "config_class": config,
            "base_model_prefix": backbone.base_model_prefix or "model",
            "backbone_class": backbone,
            "_keep_in_fp32_modules_strict": sorted(exact),
        }
        _made[config, kind] = type(name, (_KINDS[kind], family), values)
    return _made[config, kind]
