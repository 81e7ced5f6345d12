"""Tiny seeded models of real architectures, as folders that ``from_pretrained`` opens.

Two or three layers, random weights, a vocabulary over DNA letters, and real tokenizer files. One family,
``custom_conv``, brings its own code: a convolution over both directions that takes no attention mask.
:func:`build_striped_hyena` gives a model of our own architecture, in memory.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    EsmConfig,
    EsmTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    from genoembed.models.striped_hyena2.shape import Fp8Need

FAMILIES = ("bert", "esm", "modernbert", "llama", "mistral", "gpt_neox", "mamba", "custom_conv")
"""Names that `build_tiny` takes."""
NATIVE_FAMILIES = FAMILIES[:-1]
"""The families whose code is part of transformers."""

_SPECIAL = ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")
_LETTERS = ("A", "C", "G", "T", "N")
_CLS, _PAD, _EOS, _UNK, _MASK = range(len(_SPECIAL))
_WIDTH = 16
_IDS = {"pad_token_id": _PAD, "bos_token_id": _CLS, "eos_token_id": _EOS}
_SHAPE = {"hidden_size": _WIDTH, "num_hidden_layers": 3, "vocab_size": 32}
_HEADS = {**_SHAPE, "num_attention_heads": 2, "intermediate_size": 24}

_CUSTOM_CODE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class TinyConvConfig(PreTrainedConfig):
    model_type = "tiny_conv"

    def __init__(self, vocab_size=32, d_model=16, n_layer=2, **kwargs):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layer = n_layer
        super().__init__(**kwargs)


class TinyConvBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 5, padding=2)

    def forward(self, x):
        return x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2).tanh(), None


class TinyConvModel(PreTrainedModel):
    config_class = TinyConvConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.tower = nn.ModuleList(TinyConvBlock(config.d_model) for _ in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.d_model)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, output_hidden_states=False, **kwargs):
        x = self.embed(input_ids)
        states = [x]
        for block in self.tower:
            x, _ = block(x)
            states.append(x)
        x = self.ln_out(x)
        states[-1] = x
        return BaseModelOutput(
            last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None
        )
"""


def build_tiny(family: str, folder: Path) -> Path:
    """Write one tiny model with its tokenizer.

    Args:
        family: One of ``FAMILIES``.
        folder: Where to write; made if absent.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if family == "custom_conv":
        _write_custom(folder)
    else:
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        model = AutoModel.from_config(build_config(family)).eval()
        _randomize(model)
        model.save_pretrained(folder)
        torch.set_rng_state(generator_state)
    _write_tokenizer(family, folder)
    return folder


def two_of_each_kind() -> StripedHyena2ForCausalLM:
    """Build a StripedHyena 2 model with two blocks of each kind, in evaluation mode."""
    config = StripedHyena2Config(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        num_hidden_layers=8,
        attn_layer_idxs=[3, 7],
        hcs_layer_idxs=[0, 4],
        hcm_layer_idxs=[1, 5],
        hcl_layer_idxs=[2, 6],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StripedHyena2ForCausalLM(config).eval()


def letters(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Draw byte ids of bases, int64, shape ``(batch, length)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(list(b"ACGT"))[torch.randint(0, 4, (batch, length), generator=generator)]


def build_striped_hyena(*, seed: int = 0, fp8_projections: Fp8Need = "none") -> StripedHyena2ForCausalLM:
    """Build a StripedHyena 2 model of the first four blocks of Evo 2 7B's pattern, one of each kind.

    Args:
        seed: Of the weights; the global generator is left alone.
        fp8_projections: Whether its projections have FP8 scales (of 1) and need them.

    Returns:
        The model, in train mode.
    """
    config = StripedHyena2Config(
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=4,
        num_attention_heads=2,
        hcs_layer_idxs=[0],
        hcm_layer_idxs=[1],
        hcl_layer_idxs=[2],
        attn_layer_idxs=[3],
        fp8_projections=fp8_projections,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StripedHyena2ForCausalLM(config)


def build_six_mers(family: str, folder: Path) -> Path:
    """Write a tiny ``bert`` or ``llama`` whose tokens are words of six bases, then single letters."""
    config = build_config(family)
    words = ["".join(letters) for letters in itertools.product("ACGT", repeat=6)]
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_LETTERS, *words))}
    config.vocab_size = len(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config).eval()
        _randomize(model)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[ACGT]{6}|."), "isolated")
    _save_tokenizer(tokenizer, family, folder)
    return folder


def build_config(family: str) -> PreTrainedConfig:
    """Build the configuration of a native family.

    Args:
        family: One of ``NATIVE_FAMILIES``.

    Returns:
        Its configuration.
    """
    configs = {
        "bert": lambda: BertConfig(**_HEADS, max_position_embeddings=64, **_IDS),
        "esm": lambda: EsmConfig(
            **_HEADS,
            max_position_embeddings=66,
            position_embedding_type="rotary",
            mask_token_id=_MASK,
            token_dropout=True,
            **_IDS,
        ),
        "modernbert": lambda: ModernBertConfig(
            **_HEADS, max_position_embeddings=64, cls_token_id=_CLS, sep_token_id=_EOS, **_IDS
        ),
        "llama": lambda: LlamaConfig(**_HEADS, max_position_embeddings=64, **_IDS),
        "mistral": lambda: MistralConfig(
            **_HEADS, num_key_value_heads=1, max_position_embeddings=64, sliding_window=8, **_IDS
        ),
        "gpt_neox": lambda: GPTNeoXConfig(**_HEADS, max_position_embeddings=64, **_IDS),
        "mamba": lambda: MambaConfig(**_SHAPE, state_size=4, **_IDS),
    }
    return configs[family]()


def _randomize(model: nn.Module) -> None:
    """Make every vector of weights random too: norms at 1 and biases at 0 would hide mistakes."""
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif isinstance(module, (nn.Linear, nn.Embedding)):
                    parameter.normal_(std=0.2)


def _write_tokenizer(family: str, folder: Path) -> None:
    if family == "esm":
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(("<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *_LETTERS)))
        EsmTokenizer(str(vocabulary)).save_pretrained(folder)
        return
    _save_tokenizer(_bpe_tokenizer() if family == "gpt_neox" else _letter_tokenizer(), family, folder)


def _save_tokenizer(tokenizer: Tokenizer, family: str, folder: Path) -> None:
    if family in ("bert", "modernbert"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<cls> $A <eos>", special_tokens=[("<cls>", _CLS), ("<eos>", _EOS)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<cls>",
        pad_token="<pad>",
        eos_token="<eos>",
        sep_token="<eos>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="right",
    ).save_pretrained(folder)


def _letter_tokenizer() -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


def _bpe_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = BpeTrainer(vocab_size=30, special_tokens=list(_SPECIAL), initial_alphabet=list(_LETTERS))
    tokenizer.train_from_iterator(["ACGTACGGTTAACCGGTATATTGCGCNACG", "GATTACAGATTACACCATGG"], trainer)
    return tokenizer


def _write_custom(folder: Path) -> None:
    """Write the custom family without importing its code."""
    (folder / "modeling_tiny_conv.py").write_text(_CUSTOM_CODE)
    config = {
        "model_type": "tiny_conv",
        "architectures": ["TinyConvModel"],
        "auto_map": {
            "AutoConfig": "modeling_tiny_conv.TinyConvConfig",
            "AutoModel": "modeling_tiny_conv.TinyConvModel",
        },
        "vocab_size": 32,
        "d_model": _WIDTH,
        "n_layer": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    weights = {
        "embed.weight": random(32, _WIDTH),
        "ln_out.weight": random(_WIDTH),
        "ln_out.bias": random(_WIDTH),
    }
    for index in range(2):
        block = f"tower.{index}"
        weights[f"{block}.norm.weight"] = random(_WIDTH)
        weights[f"{block}.norm.bias"] = random(_WIDTH)
        weights[f"{block}.conv.weight"] = random(_WIDTH, _WIDTH, 5)
        weights[f"{block}.conv.bias"] = random(_WIDTH)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
