"""Published models that transformers runs itself: tiny folders of their classes, files and tokenizer kinds.

Final states are compared with plain transformers, one sequence at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from genoembed import embed, load_model
from genoembed.models.geneb import OURS, published_models

SEQUENCES = ["ACGTTGCAAGGTACGTTGCATTT", "GGC", "TTGACGATACCAGGCATCGATTACACATGCATTGCGA"]
_SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
_HEADS = {**_SIZE, "num_attention_heads": 4, "max_position_embeddings": 96}

MODELS = {
    "metagene-1": LlamaForCausalLM(LlamaConfig(**_HEADS)),
    "omnina-220m": LlamaForCausalLM(LlamaConfig(**_HEADS, rms_norm_eps=1e-6)),
    "genomeocean-500m": MistralForCausalLM(
        MistralConfig(**_HEADS, num_key_value_heads=2, sliding_window=None, rope_theta=1e6)
    ),
    "gpt2-gene-v1": GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=96)
    ),
    "grover": BertForMaskedLM(BertConfig(**_HEADS, layer_norm_eps=1e-12)),
}
ENCLOSED = {"grover", "genomeocean-500m"}
"""Those whose tokenizer puts a token in front and behind."""
AS_PICKLE = {"omnina-220m", "grover"}
"""Those that have their weights in ``pytorch_model.bin``."""


def write_tokenizer(folder, *, enclosed, padding_side, pad_token):
    tokenizer = Tokenizer(BPE(unk_token="[UNK]"))
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    words = ["ACGTACGGTTAACCGGTATATTGCGCNACG", "GATTACAGATTACACCATGG"]
    tokenizer.train_from_iterator(words, BpeTrainer(vocab_size=36, special_tokens=special))
    if enclosed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        pad_token=pad_token,
        padding_side=padding_side,
    ).save_pretrained(folder)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    model = MODELS[name].eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (weight.dim() == 1))
    model.save_pretrained(tmp_path)
    if name in AS_PICKLE:
        weights = dict(model.state_dict())
        if name == "omnina-220m":  # buffers that old releases of transformers stored
            frequencies = torch.rand(4, dtype=torch.bfloat16)
            weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies for i in range(3)}
        torch.save(weights, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    write_tokenizer(
        tmp_path,
        enclosed=name in ENCLOSED,
        padding_side="left" if name == "genomeocean-500m" else "right",
        pad_token=None if name == "omnina-220m" else "[PAD]",
    )
    return tmp_path


def test_folders_are_of_the_families_that_have_no_golden_one():
    run = [model for model in published_models() if model.is_run and model.class_name != OURS]
    here = {model.family for model in run if model.name in MODELS}
    assert here == {model.family for model in run if not model.golden}


def test_class_is_that_of_the_table(name, folder):
    published = next(model for model in published_models() if model.name == name)
    model = load_model(str(folder), dtype="float32")
    assert type(model.module).__name__ == published.class_name
    assert model.is_causal == (name != "grover")


def test_final_states_equal_plain_transformers_alone_and_in_a_batch(name, folder):
    model = load_model(str(folder), dtype="float32")
    together = embed(SEQUENCES, model=model, layers="final").X
    plain = MODELS[name].base_model
    for row, sequence in zip(together, SEQUENCES, strict=True):
        ids = model.tokenizer(sequence, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = plain(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        tokens = model.tokenizer.convert_ids_to_tokens(ids[0])
        bases = torch.tensor([0 if token.startswith("[") else len(token) for token in tokens])
        assert bases.sum() == len(sequence)
        expected = (hidden * bases[:, None]).sum(0) / len(sequence)  # each base counts once
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
        alone = embed([sequence], model=model, layers="final").X[0]
        np.testing.assert_allclose(row, alone, rtol=0, atol=1e-5)
