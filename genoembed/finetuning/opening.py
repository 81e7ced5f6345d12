"""What makes a fine-tuned folder open in transformers and in sentence-transformers.

In: a trained model and the folder that it was saved in. Out: the settings in ``config.json`` by which Auto
classes open it, and the modules of sentence-transformers. Promised: nothing is written that would open as
something else; what cannot be opened is said in the log. Blocks behind the deepest layer of a model for
embeddings are left out, and the shorter model has exactly the weights that are left.
"""

from __future__ import annotations

import copy
import json
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from genoembed.finetuning.models import PredictionModel
from genoembed.models.behavior import evaluating
from genoembed.models.layers import DEPTH_KEYS, find_blocks, number_template
from genoembed.pipeline.sentence_folder import HiddenStates, why_other_vectors, write_sentence_modules
from genoembed.registration import trained_name
from genoembed.retrieval.models import ContrastModel, RetrievalModel
from genoembed.tokenization.hf import count_bases
from genoembed.tokenization.kmer import KmerTokenizer
from genoembed.training.auto_models import MULTILABEL, REGRESSION, SETTINGS, SINGLE_LABEL

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.finetune import FinetuneConfig
    from genoembed.finetuning.labels import LabelSpace
    from genoembed.training.encoder import Encoder

logger = logging.getLogger(__name__)


def num_embeddings(backbone: Any) -> int:
    """Count the tokens that a model embeds."""
    return len(backbone.get_input_embeddings().weight)


_FORGOTTEN = (SETTINGS, "id2label", "label2id", "num_labels", "problem_type")
"""What an earlier run, that this one began with, may have noted."""
_PROBLEM_TYPES = {"class": SINGLE_LABEL, "multilabel": MULTILABEL, "regression": REGRESSION}


def edit_config(folder: Path, opening: Mapping[str, Any], *, cut: ShortModel | None = None) -> None:
    """Write into ``config.json`` what opens the folder; what an earlier run noted there is forgotten."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in _FORGOTTEN}
    depth = {} if cut is None else cut.shorten(kept)
    path.write_text(json.dumps({**kept, **depth, **opening}, indent=2) + "\n", encoding="utf-8")


def opening(
    model: PredictionModel | ContrastModel | RetrievalModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: FinetuneConfig,
    space: LabelSpace | None,
) -> dict[str, Any]:
    """Say what opens the folder: classes of transformers, layers, pooling, labels."""
    encoder = model.encoder
    kinds: list[str] = []
    values: dict[str, Any] = {}
    if _home(encoder.backbone) is None:
        return {}
    if _needs_cut(encoder):
        kinds.append("Model")
    if space is not None and isinstance(model, PredictionModel):
        kinds.append("ForTokenClassification" if model.per_token else "ForSequenceClassification")
        values["id2label"] = dict(enumerate(space.names))
        values["label2id"] = {name: index for index, name in enumerate(space.names)}
        if not model.per_token:
            values["problem_type"] = _PROBLEM_TYPES[space.kind]
    backbone: Any = encoder.backbone
    names = {kind: trained_name(type(backbone), type(backbone.config), kind) for kind in kinds}
    for kind in (kind for kind, name in names.items() if name is None):
        logger.info("no class of transformers (%s) opens a %s; use predict", kind, type(backbone).__name__)
    if any(names.values()):
        values["architectures"] = [name for name in names.values() if name is not None]
    values[SETTINGS] = {
        "layers": list(encoder.layers),
        "pooling": encoder.pooling,
        "skip_first": config.encoder.skip_first,
        "fusion": encoder.fusion,
        "fusion_weights": list(encoder.fusion_weights),
        "padding": encoder.padding,
        "takes_mask": encoder.takes_mask,
        "overlap": tokenizer.k if isinstance(tokenizer, KmerTokenizer) else 1,
        "width": encoder.width,
        "add_pooler": bool(config.encoder.add_pooler),
    }
    return values


def _home(backbone: Any) -> str | None:
    """Return whose code runs the model: ``transformers``, ``genoembed``; None for that of others."""
    home = type(backbone.config).__module__.partition(".")[0]
    return home if home in ("transformers", "genoembed") else None


def _is_last(encoder: Encoder) -> bool:
    return encoder.layers == (encoder.final_path,)


def _needs_cut(encoder: Encoder) -> bool:
    """Whether ``AutoModel`` is to run our code: its own last hidden states are not what was trained."""
    return _home(encoder.backbone) == "genoembed" and (not _is_last(encoder) or encoder.padding == "equal")


def write_sentence_files(
    model: PredictionModel | ContrastModel | RetrievalModel,
    folder: Path,
    heads: dict[str, Tensor],
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: FinetuneConfig,
    cut: ShortModel | None,
) -> None:
    """Make the folder one of sentence-transformers, if its modules can make our vectors; say so if not."""
    encoder, end = model.encoder, finish(model)
    home = _home(encoder.backbone)
    states: HiddenStates | None = None
    skipped = config.encoder.skip_first
    reason = why_other_vectors(tokenizer, pooling=encoder.pooling, skip_first=skipped)
    if home is None:
        reason = "its model runs code of its own"
    elif home == "transformers" and encoder.padding == "equal":
        reason = "it sees padding, and sentence-transformers pads"
    elif home == "transformers" and not _is_last(encoder):
        states = _hidden_states(encoder, cut)
        if states is None:
            reason = f"its vectors are of {', '.join(encoder.layers)} (fusion {encoder.fusion!r})"
    if not _knows_bases(tokenizer):
        logger.warning(
            "words that its tokenizer does not know, such as the rest of a sequence behind its last whole "
            "word, count for one base in transformers and sentence-transformers; extract and predict count "
            "their bases"
        )
    if reason is not None:
        logger.info(
            "%s: sentence-transformers does not open it: %s; use genoembed.embed", folder.name, reason
        )
        return
    projection = None
    if end.pooler is not None:  # once in the folder, where sentence-transformers looks for it
        projection = heads.pop(f"{end.pooler}.weight"), heads.pop(f"{end.pooler}.bias")
    write_sentence_modules(
        folder,
        tokenizer,
        width=encoder.width,
        num_ids=max(num_embeddings(encoder.backbone), len(tokenizer)),
        max_tokens=encoder.max_tokens,
        pooling=encoder.pooling,
        states=states,
        projection=projection,
        normalize=end.normalize,
    )


def _hidden_states(encoder: Encoder, cut: ShortModel | None) -> HiddenStates | None:
    """Find the layers among the hidden states that transformers returns; None where they are not."""
    if encoder.fusion not in ("none", "mean", "weighted"):
        return None
    template = number_template(encoder.backbone)
    ids, mask = encoder.probe_batch
    with torch.no_grad(), evaluating(encoder.backbone):
        returned = encoder.backbone(ids, output_hidden_states=True).hidden_states
        found = encoder.layer_states(ids, mask)
    weights = encoder.fusion_weights or (1.0,) * len(encoder.layers)
    places = {}
    for path, weight in zip(encoder.layers, weights, strict=True):
        index = next((i for i in range(len(returned) - 1) if template.format(index=i) == path), None)
        if index is None or not torch.equal(returned[index + 1], found[path]):
            return None
        places[index + 1] = weight
    return HiddenStates(len(returned) if cut is None else cut.num_blocks + 1, places)


def _knows_bases(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of plain bases tell how many bases they are."""
    if isinstance(tokenizer, KmerTokenizer):
        return True
    text = "ACGTA" * 4 + "CCG"  # no whole number of k-mers
    counts = count_bases(tokenizer, len(tokenizer))
    return sum(counts[index] for index in tokenizer(text)["input_ids"]) == len(text)


class Finish(NamedTuple):
    """What is done to pooled vectors."""

    normalize: bool = False
    pooler: str | None = None
    """Name of the projection."""


def finish(model: PredictionModel | ContrastModel | RetrievalModel) -> Finish:
    if isinstance(model, PredictionModel):
        return Finish()
    dense, name = (
        (model.head, "head") if isinstance(model, ContrastModel) else (model.heads.dense, "heads.dense")
    )
    return Finish(dense.normalize, f"{name}.pooler" if dense.pooler is not None else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortModel:
    """What is left of a model."""

    depth: int
    """Blocks of the whole model."""
    num_blocks: int
    """Blocks that are kept."""
    left_out: frozenset[str]
    """Names of weights."""

    def shorten(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those settings of a ``config.json`` that are others for fewer blocks.

        Example:
            >>> short = ShortModel(depth=3, num_blocks=2, left_out=frozenset())
            >>> short.shorten({"n_layer": 3, "attn_layer_idxs": [0, 2], "layer_types": ["a", "b", "a"]})
            {'n_layer': 2, 'attn_layer_idxs': [0], 'layer_types': ['a', 'b']}
        """
        found: dict[str, Any] = {}
        for key, value in values.items():
            if key in DEPTH_KEYS and value == self.depth:
                found[key] = self.num_blocks
            elif key.endswith("_idxs") and isinstance(value, list):
                found[key] = [index for index in value if index < self.num_blocks]
            elif isinstance(value, list) and len(value) == self.depth:
                found[key] = value[: self.num_blocks]
        return found


def shortened(encoder: Encoder) -> ShortModel | None:
    """Find what can be left out; None where nothing can."""
    backbone: Any = encoder.backbone
    stem = f"{find_blocks(backbone)}."
    depth = len(backbone.get_submodule(stem.rstrip(".")))
    if not all(path.startswith(stem) for path in encoder.layers):
        return None
    deepest = max(int(path.removeprefix(stem).partition(".")[0]) for path in encoder.layers)
    # transformers norms the last of its hidden states, so that a block more keeps the states before the norm
    is_theirs = type(backbone).__module__.startswith("transformers.")
    spare = int(is_theirs and not str(encoder.final_path).startswith(stem))
    num_blocks = deepest + 1 + spare
    if num_blocks >= depth:
        return None
    names = frozenset(
        name
        for name in backbone.state_dict()
        if name.startswith(stem) and int(name.removeprefix(stem).partition(".")[0]) >= num_blocks
    )
    short = ShortModel(depth=depth, num_blocks=num_blocks, left_out=names)
    misfits = _misfits(backbone, short)
    # such as a head on the attention of all blocks, which no hidden state depends on
    if misfits is None or any(name.partition(".")[0] == stem.partition(".")[0] for name in misfits):
        return None
    return replace(short, left_out=names | misfits)


def _misfits(backbone: Any, short: ShortModel) -> frozenset[str] | None:
    """Name the weights that are kept and have another shape in the shorter model; None if it is no model."""
    values = backbone.config.to_dict()
    # a configuration may refuse the settings, and code of others raise anything: then all blocks are kept
    with suppress(Exception), torch.device("meta"):
        config = type(backbone.config).from_dict(copy.deepcopy(values | short.shorten(values)))
        built = type(backbone)(config).state_dict()
        whole = backbone.state_dict()
        if built.keys() == whole.keys() - short.left_out:
            return frozenset(name for name in built if built[name].shape != whole[name].shape)
    return None
