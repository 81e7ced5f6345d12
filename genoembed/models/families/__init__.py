"""The published model families that genoembed runs with code of its own.

Most genomic models were published with Python code for one release of transformers. Here, each such family
has a module with its configuration, network and heads, under the names that the published weights have. A
family is recognized by what a folder says and holds, never by a repository's name; the folder's own code
never runs.

In: a model folder. Out: its `Family`, None where transformers' own classes and tokenizers are enough.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open

from genoembed.models.provenance import backbone_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Published:
    """A model folder as it was published, or what of it is at hand."""

    config: Mapping[str, Any]
    """What its ``config.json`` says."""
    folder: Path | None = None
    """None where only ``config.json`` was fetched."""

    @property
    def model_type(self) -> str | None:
        """The kind of model that it says it is; some folders say none."""
        return self.config.get("model_type")

    @property
    def classes(self) -> frozenset[str]:
        """Names of the classes that it was made for, without their modules."""
        named = [*(self.config.get("architectures") or ()), *(self.config.get("auto_map") or {}).values()]
        return frozenset(name.rpartition(".")[2] for name in named if isinstance(name, str))

    @property
    def modules(self) -> frozenset[str]:
        """Names of the modules that its own classes are in."""
        named = (self.config.get("auto_map") or {}).values()
        references = [name.rpartition("--")[2] for name in named if isinstance(name, str)]
        return frozenset(reference.partition(".")[0] for reference in references)

    @cached_property
    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its weights by name; empty where they cannot be read, which loading them explains."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in backbone_files(self.folder) if self.folder is not None else ():
            try:
                if path.suffix == ".safetensors":
                    with safe_open(path, framework="numpy") as file:
                        shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                else:
                    stored = torch.load(path, map_location="meta", weights_only=True, mmap=True)
                    shapes |= {name: tuple(value.shape) for name, value in stored.items()}
            except Exception:  # noqa: BLE001
                return {}
        return shapes

    def shape_of(self, ending: str) -> tuple[int, ...] | None:
        """Return the shape of the first weight whose name ends so."""
        return next((shape for name, shape in self.weights.items() if name.endswith(ending)), None)

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Tokens of its ``vocab.txt``, in the order of their ids; empty where there is none."""
        path = None if self.folder is None else self.folder / "vocab.txt"
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path is not None else []
        except (OSError, ValueError):  # said by the tokenizer's loader
            return ()
        return tuple(line.split()[0] for line in lines if line.strip())

    @property
    def word_length(self) -> int | None:
        """Length of its words where all have the same, special tokens apart: the k of k-mers."""
        words = [token for token in self.vocabulary if token[0] + token[-1] not in ("[]", "<>")]
        lengths = {len(word) for word in words}
        return lengths.pop() if len(lengths) == 1 and all(word.isalpha() for word in words) else None

    def has_weight(self, ending: str) -> bool:
        """Check whether a weight's name ends so."""
        return any(name.endswith(ending) for name in self.weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family of models: how a folder of it is recognized, and what runs it."""

    name: str
    """As its authors call it."""
    model_type: str
    """Type of its configuration here, which is what folders that genoembed saves say."""
    is_like: Callable[[Published], bool]
    """Recognizes a published folder."""
    port: str | None = None
    """Module here whose ``AUTO_CLASSES`` run it; None where transformers' class for ``model_type`` does."""
    tokenizer: str | None = None
    """``module:function`` that builds its tokenizer from a folder; None where `AutoTokenizer` does."""
    special_tokens: bool = True
    """Whether its authors embed sequences with the special tokens that its tokenizer adds."""

    def config_class(self) -> type[PreTrainedConfig]:
        """Return its configuration; from now on, transformers' Auto classes know the family."""
        if self.port is None:
            return transformers.CONFIG_MAPPING[self.model_type]
        classes = importlib.import_module(self.port).AUTO_CLASSES
        config: type[PreTrainedConfig] = classes["AutoConfig"]
        for name, ours in classes.items():
            key = self.model_type if name == "AutoConfig" else config
            getattr(transformers, name).register(key, ours, exist_ok=True)
        return config

    def read_config(self, values: Mapping[str, Any]) -> PreTrainedConfig:
        """Build the configuration of a published folder; what it says of its own code is left out."""
        left_out = ("auto_map", "model_type")
        kept = {key: value for key, value in values.items() if key not in left_out}
        return self.config_class().from_dict(kept)

    def load_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase | None:
        """Build the tokenizer of a published folder; None where `AutoTokenizer` is to do it."""
        described = folder / "tokenizer_config.json"
        values = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        # saved by transformers since, with all that it needs
        if self.tokenizer is None or (folder / "tokenizer.json").is_file():
            return None
        module, _, function = self.tokenizer.partition(":")
        return getattr(importlib.import_module(module), function)(folder, values)


def _is_evo1(published: Published) -> bool:
    """StripedHyena 1; the second has three kinds of filters, and logarithms of its poles."""
    settings = {"hyena_layer_idxs", "attn_layer_idxs", "state_size"}
    is_said = "StripedHyenaModelForCausalLM" in published.classes or settings <= published.config.keys()
    return is_said or published.has_weight("filter.poles")


def _is_omni_dna(published: Published) -> bool:
    """OLMo with the names of the ai2-olmo package; transformers' Olmo has others."""
    if published.weights:
        return published.has_weight("transformer.blocks.0.att_proj.weight")
    settings = {"n_layers", "mlp_ratio", "layer_norm_with_affine", "rope_full_precision"}
    return published.model_type == "olmo-gfm" or settings <= published.config.keys()


def _is_hyenadna(published: Published) -> bool:
    settings = {"hyena_order", "short_filter_order", "filter_order", "d_model"}
    names = {"HyenaDNAModel", "HyenaDNAForCausalLM", "HyenaDNAForSequenceClassification"}
    is_said = bool(published.classes & names) or settings <= published.config.keys()
    return is_said or published.has_weight("mixer.filter_fn.implicit_filter.0.weight")


def _is_big_bird(published: Published) -> bool:
    """Recognize BigBird, such as GENA-LM's of 4096 tokens, that does not say what it is."""
    return published.model_type is None and {"num_random_blocks", "block_size"} <= set(published.config)


def _is_gena_lm(published: Published) -> bool:
    """Recognize what calls itself BERT, but has GENA-LM's norms or positions."""
    if published.model_type not in (None, "bert"):
        return False
    config = published.config
    is_rotary = config.get("position_embedding_type") == "rotary" and "rotary_dim" in config
    return (
        bool(config.get("pre_layer_norm"))
        or is_rotary
        or published.has_weight("encoder.layer.0.pre_attention_ln.weight")
    )


def _is_mutbert(published: Published) -> bool:
    """Recognize what calls itself BERT, but has rotary positions and none to add."""
    if published.model_type not in (None, "bert"):
        return False
    names_it = any(name.startswith("RoPEBert") for name in published.classes)
    return names_it or {"rope_theta", "pooler_type"} <= published.config.keys()


def _is_dnabert(published: Published) -> bool:
    """BERT whose words are k-mers of one length; the published folders do not say what they are."""
    if published.model_type not in (None, "bert"):
        return False
    names_bert = any(name.startswith("Bert") for name in published.classes)
    if published.folder is None:
        return names_bert and published.config.get("vocab_size") in _DNABERT_SIZES
    has_words = (published.word_length or 1) > 1
    return has_words and (names_bert or published.has_weight("embeddings.token_type_embeddings.weight"))


def _is_generator(published: Published) -> bool:
    """Llama that reads non-overlapping k-mers."""
    if published.model_type not in (None, "llama"):
        return False
    has_words = published.vocabulary[:1] == ("<oov>",) and published.word_length is not None
    return has_words or "GENERatorForCausalLM" in published.classes


_DNABERT_SIZES = frozenset(5 + 4**k for k in range(3, 7))
"""Special tokens and k-mers of its four vocabularies."""


def _is_esm(published: Published) -> bool:
    """Whether a folder is of ESM's kind, for proteins or DNA; published ones do not all say so."""
    if published.weights and not published.has_weight(".attention.LayerNorm.weight"):
        return False
    is_named = any(name.startswith("Esm") for name in published.classes)
    if published.classes and not is_named:  # such as SegmentNT, which turns positions otherwise
        return False
    is_likely = is_named or "add_bias_fnn" in published.config or bool(published.weights)
    return published.model_type == "esm" or (published.model_type is None and is_likely)


def _is_gated_esm(published: Published) -> bool:
    """Whether its feed-forward networks are gated: their two matrices tell, or a setting only they have."""
    if not _is_esm(published):
        return False
    widened = published.shape_of("encoder.layer.0.intermediate.dense.weight")
    narrowed = published.shape_of("encoder.layer.0.output.dense.weight")
    if widened and narrowed:
        return widened[0] == 2 * narrowed[-1]
    return "add_bias_fnn" in published.config or published.modules >= {"esm_config", "modeling_esm"}


def _is_six_mer_esm(published: Published) -> bool:
    """Whether it is ESM as transformers has it, with 4,096 6-mers, five bases and four special tokens."""
    return _is_esm(published) and published.config.get("vocab_size") == 4**6 + 9


def _is_caduceus(published: Published) -> bool:
    return (
        any(name.startswith("Caduceus") for name in published.classes)
        or {"rcps", "bidirectional_weight_tie"} <= set(published.config)
        or published.has_weight(".mamba_fwd.A_log")
    )


def _is_dnabert2(published: Published) -> bool:
    """BERT with gates, and one product for queries, keys and values; its like is MosaicBERT."""
    if published.model_type not in (None, "bert"):
        return False
    if published.weights:
        parts = ("attention.self.Wqkv.weight", "mlp.gated_layers.weight")
        return all(published.has_weight(f"encoder.layer.0.{part}") for part in parts)
    return "alibi_starting_size" in published.config or "bert_layers" in published.modules


def _is_ntv3(published: Published) -> bool:
    """Recognize the pre-trained models; those trained on tracks have parts that read a species."""
    if published.model_type not in (None, "ntv3") or "bigwigs_per_species" in published.config:
        return False
    keys = {"num_downsamples", "conv_init_embed_dim", "token_embed_dim"}
    return (
        any(name.lower().startswith("ntv3pretrained") for name in published.classes)
        or keys <= set(published.config)
        or published.has_weight("core.deconv_tower_blocks.0.conv.conv.weight")
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        name="DNABERT-2",
        model_type="dnabert2",
        is_like=_is_dnabert2,
        port="genoembed.models.families.dnabert2",
    ),
    Family(
        name="GENA-LM",
        model_type="gena_lm",
        is_like=_is_gena_lm,
        port="genoembed.models.families.gena_lm",
    ),
    Family(
        name="MutBERT",
        model_type="mutbert",
        is_like=_is_mutbert,
        port="genoembed.models.families.mutbert",
    ),
    Family(
        name="BigBird",
        model_type="big_bird",
        is_like=_is_big_bird,
        port="genoembed.models.families.big_bird",
    ),
    Family(
        name="DNABERT",
        model_type="bert",
        is_like=_is_dnabert,
        tokenizer="genoembed.tokenization.kmer:overlapping_kmers",
    ),
    Family(
        name="GENERator",
        model_type="llama",
        is_like=_is_generator,
        tokenizer="genoembed.tokenization.published:generator_kmers",
    ),
    Family(
        name="Nucleotide Transformer v2",
        model_type="nucleotide_transformer",
        is_like=_is_gated_esm,
        port="genoembed.models.families.nucleotide_transformer",
    ),
    Family(name="Nucleotide Transformer v1", model_type="esm", is_like=_is_six_mer_esm),
    Family(
        name="Caduceus",
        model_type="caduceus",
        is_like=_is_caduceus,
        port="genoembed.models.families.caduceus",
        tokenizer="genoembed.tokenization.published:hyena_characters",
        special_tokens=False,
    ),
    Family(
        name="Omni-DNA",
        model_type="omni_dna",
        is_like=_is_omni_dna,
        port="genoembed.models.families.omni_dna",
    ),
    Family(
        name="HyenaDNA",
        model_type="hyenadna",
        is_like=_is_hyenadna,
        port="genoembed.models.families.hyenadna",
        tokenizer="genoembed.tokenization.published:hyena_characters",
        special_tokens=False,
    ),
    Family(
        name="Evo 1",
        model_type="stripedhyena",
        is_like=_is_evo1,
        port="genoembed.models.families.evo1",
        tokenizer="genoembed.tokenization.published:evo1_bytes",
    ),
    Family(
        name="NTv3",
        model_type="ntv3",
        is_like=_is_ntv3,
        port="genoembed.models.families.ntv3",
        tokenizer="genoembed.tokenization.published:ntv3_characters",
    ),
)
"""In the order of asking: the first that recognizes a folder has it."""


def family_of(published: Published) -> Family | None:
    """Recognize a folder's family."""
    ours = (family for family in FAMILIES if family.port and family.model_type == published.model_type)
    return next(ours, None) or next((family for family in FAMILIES if family.is_like(published)), None)
