"""MutBERT: a tiny folder in its published layout against a plain computation from one-hot letters."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast

from genoembed import embed, load_model
from genoembed.errors import ModelError
from genoembed.models.families import Published, family_of
from genoembed.models.families.mutbert import MutBertConfig, MutBertForMaskedLM, MutBertModel

CONFIG = {
    "auto_map": {
        "AutoConfig": "modeling_mutbert.RoPEBertConfig",
        "AutoModel": "modeling_mutbert.RoPEBertModel",
        "AutoModelForMaskedLM": "modeling_mutbert.RoPEBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_mutbert.RoPEBertForSequenceClassification",
    },
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 3,
    "pooler_type": "mean",
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "transformers_version": "4.45.2",
    "type_vocab_size": 2,
    "vocab_size": 9,
}
VOCABULARY = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "A", "C", "G", "T")
SEQUENCES = ["ACGTTGCAAGGTNACGTTGCA", "GGC", "TTGACGATACCAGGCATCGATTACAC"]


@pytest.fixture
def folder(tmp_path):
    model = MutBertForMaskedLM(
        MutBertConfig(**{k: v for k, v in CONFIG.items() if k not in ("auto_map", "model_type")})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + ("LayerNorm.weight" in name))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(VOCABULARY)}, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names).save_pretrained(
        tmp_path
    )
    # the published one lists other ids than tokenizer.json, which is what counts
    (tmp_path / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ATCG")))
    return tmp_path


def plain_final(weights, ids_L):
    """Compute one sequence head by head, in float64, from the probabilities of its letters."""
    w = {name: value.double() for name, value in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turned(x_LE):
        half = x_LE.shape[1] // 2
        rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(len(x_LE), dtype=torch.float64)[:, None] * rates
        a, b = x_LE[:, :half], x_LE[:, half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 1)

    letters_LV = F.one_hot(ids_L, 9).double()
    x = letters_LV @ w["bert.embeddings.word_embeddings.weight"]
    x = norm(x + w["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings.LayerNorm")
    for index in range(3):
        block = f"bert.encoder.layer.{index}"
        parts = [linear(x, f"{block}.attention.self.{n}").chunk(4, 1) for n in ("query", "key", "value")]
        heads = [(turned(q) @ turned(k).T / 8**0.5).softmax(-1) @ v for q, k, v in zip(*parts, strict=True)]
        y = linear(torch.cat(heads, 1), f"{block}.attention.output.dense")
        x = norm(x + y, f"{block}.attention.output.LayerNorm")
        y = linear(F.gelu(linear(x, f"{block}.intermediate.dense")), f"{block}.output.dense")
        x = norm(x + y, f"{block}.output.LayerNorm")
    return x


def test_vectors_equal_a_plain_computation_alone_and_in_a_batch(folder):
    model = load_model(str(folder), dtype="float32")
    assert type(model.module) is MutBertModel
    assert (model.padding, model.max_length) == ("mask", 64)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    together = embed(SEQUENCES, model=model).X
    for row, sequence in zip(together, SEQUENCES, strict=True):
        ids = model.tokenizer(sequence)["input_ids"]
        assert ids == [1, *(VOCABULARY.index(base) if base != "N" else 0 for base in sequence), 2]
        expected = plain_final(weights, torch.tensor(ids))[1:-1].mean(0)
        torch.testing.assert_close(torch.tensor(row).double(), expected, rtol=0, atol=1e-5)
        alone = embed([sequence], model=model).X[0]
        torch.testing.assert_close(torch.tensor(row), torch.tensor(alone), rtol=0, atol=1e-5)


def test_masked_language_model_loads_whole(folder):
    config = load_model(str(folder)).module.config
    model, info = AutoModelForMaskedLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert type(model) is MutBertForMaskedLM
    assert not info["missing_keys"]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("missing", [("auto_map",), ("model_type",), ("auto_map", "model_type")])
def test_folder_is_recognized_by_less_than_it_says(missing, folder):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k not in missing}))
    assert isinstance(load_model(str(folder)).module, MutBertModel)


def test_plain_bert_is_not_taken():
    assert family_of(Published(BertConfig().to_dict() | {"architectures": ["BertForMaskedLM"]})) is None


def test_scaled_positions_are_refused(folder):
    scaled = CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(scaled))
    with pytest.raises(ModelError, match=r"rope_scaling is .*expected none"):
        load_model(str(folder))
