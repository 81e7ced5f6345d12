"""Code of model folders in the manner of transformers 4: it runs, as it ran there, or its failure is named.

The network below was written for these tests. It uses what transformers 5 has removed, and what would be lost
without values; `expected_states` computes the same with torch alone.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from genoembed.cli import main
from genoembed.errors import ForeignCodeError, ModelError
from genoembed.models.describe import describe_layers
from genoembed.models.language_model import LanguageModel
from genoembed.models.load import load_model
from tests.models.conftest import make_batch

CONFIGURATION = """
from transformers import PretrainedConfig


class OldConfig(PretrainedConfig):
    model_type = "old_model"

    def __init__(self, vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        super().__init__(**kwargs)
        if self.is_decoder and self.add_cross_attention:
            raise ValueError("no cross attention")
"""
MODELING = """
import math

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import (
    PreTrainedModel,
    apply_chunking_to_forward,
    find_pruneable_heads_and_indices,
    prune_linear_layer,
)
from transformers.utils import is_torch_fx_available

from .configuration_old import OldConfig


class OldAttention(nn.Module):
    def __init__(self, config, reach):
        super().__init__()
        self.heads = config.num_attention_heads
        self.width = config.hidden_size // self.heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.pruned_heads = set()
        # computed here and kept in no file; the number is needed as one, which the meta device has not
        slopes = torch.tensor(np.linspace(0.1, reach, self.heads), dtype=torch.float32)
        self.largest = slopes.max().item()
        self.register_buffer("slopes", slopes, persistent=False)

    def prune_heads(self, heads):
        heads, index = find_pruneable_heads_and_indices(heads, self.heads, self.width, self.pruned_heads)
        self.query = prune_linear_layer(self.query, index)
        self.key = prune_linear_layer(self.key, index)
        self.value = prune_linear_layer(self.value, index)
        self.output = prune_linear_layer(self.output, index, dim=1)
        self.heads -= len(heads)
        self.slopes = self.slopes[[head for head in range(len(self.slopes)) if head not in heads]]
        self.pruned_heads |= heads

    def forward(self, x, mask, head_mask):
        batch, length, _ = x.shape
        q, k, v = (
            f(x).view(batch, length, self.heads, self.width).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        places = torch.arange(length, device=x.device)
        distance = (places[:, None] - places[None]).abs() / self.largest
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.width)
        scores = scores - self.slopes[:, None, None].to(x.dtype) * distance.to(x.dtype) + mask
        weights = scores.softmax(-1)
        if head_mask is not None:
            weights = weights * head_mask
        return self.output((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class OldLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.attention = OldAttention(config, 1.0 + index)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask, head_mask):
        x = self.norm(x + self.attention(x, mask, head_mask))
        return x + apply_chunking_to_forward(self.chunk, 0, 1, x)

    def chunk(self, x):
        return torch.tanh(self.dense(x))


class OldPreTrainedModel(PreTrainedModel):
    config_class = OldConfig
    base_model_prefix = "old"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.02)


class OldModel(OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(OldLayer(config, i) for i in range(config.num_hidden_layers))
        POST_INIT

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def _prune_heads(self, heads_to_prune):
        for layer, heads in heads_to_prune.items():
            self.layers[layer].attention.prune_heads(heads)

    def forward(self, input_ids=None, attention_mask=None, head_mask=None, return_dict=None):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = self.get_extended_attention_mask(attention_mask, input_ids.shape)
        head_mask = self.get_head_mask(head_mask, self.config.num_hidden_layers)
        x = self.embed(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, mask, head_mask[index])
        return BaseModelOutput(last_hidden_state=x)


class OldForCausalLM(OldPreTrainedModel):
    _tied_weights_keys = ["head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.old = OldModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    def forward(self, input_ids=None, attention_mask=None):
        return CausalLMOutput(logits=self.head(self.old(input_ids, attention_mask).last_hidden_state))


class OldForMaskedLM(OldForCausalLM):
    def tie_weights(self):
        self.head.weight = self.old.embed.weight
"""


def folder_of(tmp_path, tiny_folder, *, is_decoder=False, post_init=True, auto=None, edit=None, **more):
    """Write a folder as transformers 4 did: code, configuration, weights without what is tied."""
    folder = tmp_path / "old"
    folder.mkdir(parents=True)
    code = MODELING.replace("POST_INIT", "self.post_init()" if post_init else "pass")
    (folder / "modeling_old.py").write_text(code if edit is None else edit(code))
    (folder / "configuration_old.py").write_text(CONFIGURATION)
    auto = auto or {
        "AutoModel": "modeling_old.OldModel",
        "AutoModelForCausalLM": "modeling_old.OldForCausalLM",
        "AutoModelForMaskedLM": "modeling_old.OldForMaskedLM",
    }
    values = {
        "model_type": "old_model",
        "auto_map": {"AutoConfig": "configuration_old.OldConfig", **auto},
        "architectures": ["OldForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "transformers_version": "4.28.1",
        **({"is_decoder": True} if is_decoder else {}),
        **more,
    }
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)
    weights = {"old.embed.weight": torch.randn(32, 16, generator=generator)}
    for index in range(2):
        at = f"old.layers.{index}"
        for name in ("attention.query", "attention.key", "attention.value", "attention.output", "dense"):
            weights[f"{at}.{name}.weight"] = torch.randn(16, 16, generator=generator) * 0.3
            weights[f"{at}.{name}.bias"] = torch.randn(16, generator=generator)
        weights[f"{at}.norm.weight"] = torch.ones(16) + torch.randn(16, generator=generator) * 0.1
        weights[f"{at}.norm.bias"] = torch.randn(16, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for path in tiny_folder("llama" if is_decoder else "bert").glob("*token*"):
        shutil.copy(path, folder)
    return str(folder)


def expected_states(folder, ids, *, is_decoder=False, without_heads=()):
    """Compute the same with torch alone; ids ``(L)``."""
    w = {name: value.double() for name, value in load_file(Path(folder) / "model.safetensors").items()}
    x = w["old.embed.weight"][ids]
    length = len(ids)
    far = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs()
    hidden = torch.full((length, length), -torch.inf).triu(1) if is_decoder else torch.zeros(length, length)
    for index in range(2):
        at = f"old.layers.{index}"

        def linear(x, name, at=at):
            return x @ w[f"{at}.{name}.weight"].T + w[f"{at}.{name}.bias"]

        q, k, v = (
            linear(x, f"attention.{n}").view(length, 2, 8).transpose(0, 1) for n in ("query", "key", "value")
        )
        slopes = torch.tensor([0.1, 1.0 + index], dtype=torch.float32)
        scores = q @ k.transpose(1, 2) / 8**0.5 - slopes[:, None, None] * far / slopes.max() + hidden
        mixed = scores.softmax(-1) @ v
        for head in without_heads:
            mixed[head] = 0
        x = x + linear(mixed.transpose(0, 1).reshape(length, 16), "attention.output")
        x = nn.functional.layer_norm(x, (16,), w[f"{at}.norm.weight"], w[f"{at}.norm.bias"])
        x = x + torch.tanh(linear(x, "dense"))
    return x.float()


IDS = [5, 6, 7, 8, 9, 6, 5, 7]


@pytest.mark.parametrize("post_init", [True, False])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_old_code_computes_what_it_computed(is_decoder, post_init, tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder, is_decoder=is_decoder, post_init=post_init)
    model = load_model(folder, device="cpu", dtype="float32", trust_remote_code=True)
    assert (model.is_causal, model.accepts_attention_mask) == (is_decoder, True)
    found = model.forward(make_batch(IDS, IDS[:3]), ["layers.1"])["layers.1"]
    for row, ids in enumerate((IDS, IDS[:3])):
        expected = expected_states(folder, ids, is_decoder=is_decoder)
        torch.testing.assert_close(found[row, : len(ids)], expected, rtol=0, atol=1e-5)


def test_heads_are_masked_and_pruned(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder)
    module = load_model(folder, device="cpu", dtype="float32", trust_remote_code=True).module
    expected = expected_states(folder, IDS, without_heads=[0])
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        masked = module(ids, head_mask=torch.tensor([0.0, 1.0])).last_hidden_state[0]
        module._prune_heads({0: [0], 1: [0]})
        pruned = module(ids).last_hidden_state[0]
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-5)


def test_old_ties_are_made_and_missed_by_nobody(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder, is_decoder=True)
    model = load_model(folder, device="cpu", dtype="float32", trust_remote_code=True)
    batch = make_batch(IDS)
    found = LanguageModel(model).log_probs(batch, layers=(), take=lambda *_: None, block_tokens=100)
    embedding = load_file(Path(folder) / "model.safetensors")["old.embed.weight"]
    logits = expected_states(folder, IDS, is_decoder=True) @ embedding.T
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    torch.testing.assert_close(found[0, 1:], expected, rtol=0, atol=1e-4)


def test_old_tie_weights_is_called_without_what_it_does_not_take(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder)
    load_model(folder, trust_remote_code=True)
    whole, info = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert whole.head.weight is whole.old.embed.weight


def test_layers_are_listed_though_the_code_needs_values(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder)
    assert describe_layers(folder, trust_remote_code=True).numbered == ("layers.0", "layers.1")


def test_commands_run(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder)
    fasta, labels = tmp_path / "in.fa", tmp_path / "labels.tsv"
    fasta.write_text("".join(f">r{i}\n{'ACGTTGCA' * (i % 3 + 1)}\n" for i in range(12)))
    labels.write_text("id\tlabel\n" + "".join(f"r{i}\t{'ab'[i % 2]}\n" for i in range(12)))
    learn = ("finetune", fasta, "--task", "classification", "--labels", labels, "--model", folder)
    for words in (
        ("extract", fasta, "--model", folder, "--layer", 1, "-o", tmp_path / "a.h5"),
        (*learn, "--max-steps", 1, "-o", tmp_path / "run"),
        ("predict", tmp_path / "run", fasta, "-o", tmp_path / "p.tsv"),
    ):
        result = CliRunner().invoke(main, [*map(str, words), "--trust-remote-code"])
        assert result.exit_code == 0, (words[0], result.output)


BROKEN = {
    "import": (lambda code: "from transformers.onnx import OnnxConfig\n" + code, 1, "ModuleNotFoundError"),
    "name": (
        lambda code: code.replace(
            "import math\n", "import math\nfrom transformers import top_k_top_p_filtering"
        ),
        3,
        "ImportError",
    ),
    "building": (
        lambda code: code.replace("self.embed = nn.Emb", "self.gone()\n        self.embed = nn.Emb", 1),
        None,
        "AttributeError",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_still_fails_is_said_to_be_that_code_with_the_way_out(kind, tiny_folder, tmp_path):
    edit, line, error = BROKEN[kind]
    folder = folder_of(tmp_path, tiny_folder, edit=edit)
    where = rf"modeling_old\.py:{line if line else chr(92) + 'd+'} \({error}"
    words = (
        rf"this model's code was written for transformers 4 and fails at .*{where}.*a model that runs here"
    )
    for open_it in (load_model, describe_layers):
        with pytest.raises(ForeignCodeError, match=words) as caught:
            open_it(folder, trust_remote_code=True)
        assert "config.json" not in str(caught.value)
        assert not hasattr(caught.value, "__notes__")
    result = CliRunner().invoke(main, ["layers", folder, "--trust-remote-code"])
    assert result.exit_code == 1
    assert re.search(words, result.output)


def test_folders_whose_configuration_has_the_same_code_keep_their_own(tiny_folder, tmp_path):
    states = []
    for name, edit in (("a", None), ("b", lambda code: code.replace("torch.tanh(", "torch.relu("))):
        folder = folder_of(tmp_path / name, tiny_folder, edit=edit)
        module = load_model(folder, device="cpu", dtype="float32", trust_remote_code=True).module
        with torch.inference_mode():
            states.append(module(torch.tensor([IDS])).last_hidden_state)
    assert not torch.equal(*states)


def test_code_of_today_is_not_called_old(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder, edit=BROKEN["building"][0], transformers_version="5.1.0")
    with pytest.raises(ForeignCodeError, match=r"this model's code fails at .*modeling_old\.py:\d+"):
        load_model(folder, trust_remote_code=True)


def test_failing_configuration_is_said_to_be_that_code(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder)
    path = Path(folder) / "configuration_old.py"
    path.write_text(path.read_text().replace("if self.is_decoder", "if self.no_such_setting"))
    with pytest.raises(
        ForeignCodeError, match=r"written for transformers 4 and fails at .*configuration_old\.py:\d+"
    ):
        load_model(folder, trust_remote_code=True)


def test_packages_that_are_not_installed_are_named(tiny_folder, tmp_path):
    folder = folder_of(tmp_path, tiny_folder, edit=lambda code: "import mamba_ssm_of_nobody\n" + code)
    with pytest.raises(ModelError, match=r"its code needs packages that are not here .*mamba_ssm_of_nobody"):
        load_model(folder, trust_remote_code=True)


def test_failing_pass_points_to_models_that_run_without_such_code(tiny_folder, tmp_path):
    folder = folder_of(
        tmp_path, tiny_folder, edit=lambda code: code.replace("x = self.embed(input_ids)", "x = self.gone")
    )
    model = load_model(folder, trust_remote_code=True)
    with pytest.raises(
        ForeignCodeError, match=r"it brings failed at .*modeling_old\.py:\d+ .*transformers 4"
    ):
        model.is_causal  # noqa: B018


@pytest.mark.parametrize(
    ("kept", "dtype", "dtypes"),
    [
        ("[]", "bfloat16", None),
        ('["norm"]', "bfloat16", {"bfloat16": 3232, "float32": 64}),
        ('["embed", "layers"]', "float32", None),
    ],
)
def test_types_that_a_model_keeps_are_stated(kept, dtype, dtypes, tiny_folder, tmp_path, caplog):
    line = '    base_model_prefix = "old"'
    folder = folder_of(
        tmp_path,
        tiny_folder,
        edit=lambda c: c.replace(line, f"{line}\n    _keep_in_fp32_modules_strict = {kept}"),
    )
    with caplog.at_level(logging.WARNING):
        made = load_model(folder, dtype="bfloat16", device="cpu", trust_remote_code=True).provenance
    assert (made["dtype"], made.get("dtypes")) == (dtype, dtypes)
    is_forced = dtype == "float32" and dtypes is None
    assert ("its weights stay in float32, whatever is asked (bfloat16)" in caplog.text) is is_forced


def test_without_trust_nothing_runs_and_nothing_is_changed(tiny_folder, tmp_path):
    marker = tmp_path / "ran"
    folder = folder_of(tmp_path, tiny_folder, edit=lambda code: f"open({str(marker)!r}, 'w')\n" + code)
    with pytest.raises(ModelError, match="which runs only if trusted"):
        load_model(folder)
    assert not marker.exists()


def test_classes_of_others_stay_as_they_are(tiny_folder, tmp_path):
    load_model(folder_of(tmp_path, tiny_folder), trust_remote_code=True)

    class Theirs(PreTrainedConfig):
        model_type = "theirs"

    class Model(PreTrainedModel):
        config_class = Theirs

    assert not hasattr(Theirs(), "is_decoder")
    assert not hasattr(PreTrainedModel, "get_head_mask")
    assert not hasattr(Model, "get_head_mask")
    assert Model.get_init_context.__func__ is PreTrainedModel.get_init_context.__func__
