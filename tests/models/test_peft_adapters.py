"""Folders of peft: loaded on the model that they name, merged, and identified with it."""

from __future__ import annotations

import builtins
import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from genoembed.cli import main
from genoembed.errors import CheckpointError, MissingExtraError, ModelError, ModelNotFoundError
from genoembed.models import hub, locate
from genoembed.models.describe import describe_layers
from genoembed.models.load import load_model
from genoembed.models.locate import model_content
from tests.models.families.test_goldens import GOLDEN

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 6, 7, 8, 9, 6, 5]])
LORA = peft.LoraConfig
pytestmark = [  # of peft, where these tests use it themselves
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def adapted(tmp_path, tiny_folder):
    """Return a maker of adapter folders, and of the model that peft makes with them."""

    def make(config, auto=AutoModel, base="bert", name="adapter", **options):
        folder = tmp_path / name
        path = tmp_path / "base"
        if not path.exists():
            shutil.copytree(tiny_folder(base), path)
        model = peft.get_peft_model(auto.from_pretrained(path, dtype=torch.float32, **options), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
        model.save_pretrained(folder)
        whole = model.eval().base_model.model
        return folder, getattr(whole, whole.base_model_prefix, whole)

    return make


KINDS = {
    "trained as it is": (AutoModel, LORA(r=2, target_modules=["query", "value"])),
    "trained with a head": (AutoModelForMaskedLM, LORA(r=2, target_modules=["query", "dense"])),
    "trained to classify": (
        AutoModelForSequenceClassification,
        LORA(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"),
    ),
    "by a pattern": (
        AutoModelForMaskedLM,
        LORA(r=2, target_modules=r"bert\.encoder\.layer\.\d+\.attention\.self\.(query|key)"),
    ),
    "by full names": (AutoModelForMaskedLM, LORA(r=2, target_modules=["bert.encoder.layer.0.output.dense"])),
    "every linear layer": (AutoModel, LORA(r=2, target_modules="all-linear")),
    "with whole embeddings": (
        AutoModelForMaskedLM,
        LORA(r=2, target_modules=["query"], modules_to_save=["word_embeddings"]),
    ),
    "DoRA": (AutoModelForMaskedLM, LORA(r=2, target_modules=["key"], use_dora=True, use_rslora=True)),
    "PiSSA": (AutoModel, LORA(r=2, target_modules=["query"], init_lora_weights="pissa")),
    "IA3": (
        AutoModel,
        peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_equals_the_model_that_peft_runs(kind, adapted, tiny_model):
    auto, config = KINDS[kind]
    folder, reference = adapted(config, auto)
    before = torch.get_rng_state()
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode():
        found = model.module(IDS).last_hidden_state
        torch.testing.assert_close(found, reference(IDS).last_hidden_state, rtol=0, atol=1e-5)
        assert (found - tiny_model("bert").module(IDS).last_hidden_state).abs().max() > 0.05
    assert [layer.path for layer in model.layers] == [layer.path for layer in tiny_model("bert").layers]
    assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_weights_in_an_older_file_are_read(adapted):
    folder, reference = adapted(LORA(r=2, target_modules=["query"]))
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    model = load_model(str(folder), device="cpu", dtype="float32")
    with torch.inference_mode():
        expected = reference(IDS).last_hidden_state
        torch.testing.assert_close(model.module(IDS).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_encoder_of_an_adapted_encoder_decoder_is_taken(tmp_path, tiny_folder):
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path / "base")
    for path in tiny_folder("llama").glob("*token*"):
        shutil.copy(path, tmp_path / "base")
    whole = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    made = peft.get_peft_model(whole, LORA(r=2, target_modules=["q", "v"], init_lora_weights=False))
    made.save_pretrained(tmp_path / "adapter")
    model = load_model(str(tmp_path / "adapter"), device="cpu", dtype="float32")
    with torch.inference_mode():
        expected = made.eval().base_model.model.get_encoder()(IDS).last_hidden_state
        torch.testing.assert_close(model.module(IDS).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_adapter_of_a_ported_family_loads(tmp_path):
    base = load_model(str(GOLDEN / "gena_lm"), dtype="float32")
    whole = AutoModelForMaskedLM.from_pretrained(GOLDEN / "gena_lm", config=base.module.config)
    made = peft.get_peft_model(whole, LORA(r=2, target_modules=["query"], init_lora_weights=False))
    made.save_pretrained(tmp_path / "x")
    values = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(GOLDEN / "gena_lm")
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(values))
    model = load_model(str(tmp_path / "x"), device="cpu", dtype="float32")
    assert model.family.name == "GENA-LM"
    with torch.inference_mode():
        expected = made.eval().base_model.model.bert(IDS).last_hidden_state
        torch.testing.assert_close(model.module(IDS).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_identity_covers_adapter_and_base(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    base = folder.parent / "base"

    def identities():
        model = load_model(str(folder), device="cpu", dtype="float32")
        assert model.content == model_content(str(folder))
        return model.provenance["content_sha256"], model.provenance["weights_sha256"]

    found = [identities()]
    plain = load_model(str(base), device="cpu", dtype="float32").provenance
    assert plain["weights_sha256"] != found[0][1]
    for path, name in (
        (
            folder / "adapter_model.safetensors",
            "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight",
        ),
        (base / "model.safetensors", "encoder.layer.0.attention.self.query.weight"),
    ):
        weights = load_file(path)
        weights[name] += 0.5
        save_file(weights, path, metadata={"format": "pt"})
        found.append(identities())
    assert len({weights for _, weights in found}) == 3
    for path, key, value in (
        (folder / "adapter_config.json", "lora_alpha", 5),
        (base / "config.json", "layer_norm_eps", 1e-4),
    ):
        values = json.loads(path.read_text()) | {key: value}
        path.write_text(json.dumps(values))
        found.append(identities())
    assert len({content for content, _ in found}) == 5
    made = load_model(str(folder)).provenance
    assert made["adapter"] == {"kind": "LORA", "base": str(base), "base_revision": None}
    assert (made["id"], made["checkpoint"]) == (str(folder), None)


def rename_base(folder, name):
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": name}))


def test_base_is_found_beside_the_adapter(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    expected = load_model(str(folder)).content
    for name in ("base", "../base", "/gone/to/base", "someone/base"):
        rename_base(folder, name)
        found = load_model(str(folder)).content
        assert found["weights"] == expected["weights"]


def test_base_that_is_nowhere_is_named(adapted, monkeypatch):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    monkeypatch.setattr("genoembed.models.hub.hub_answers", lambda: False)
    for name in ("/gone/to/nowhere", "someone/nothing"):
        rename_base(folder, name)
        words = rf"adapter of '{name}', which is not found .*base_model_name_or_path"
        for open_it in (load_model, describe_layers, model_content):
            with pytest.raises(ModelNotFoundError, match=words):
                open_it(str(folder))


def test_adapter_of_an_adapter_is_refused(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    shutil.copytree(folder, folder.parent / "second")
    rename_base(folder.parent / "second", str(folder))
    with pytest.raises(ModelError, match="which is an adapter itself"):
        load_model(str(folder.parent / "second"))


def test_layers_are_those_of_the_base(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    assert describe_layers(str(folder)).numbered == describe_layers(str(folder.parent / "base")).numbered


def change(folder, edit):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(edit(weights), path)


FIRST = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != FIRST},
            r"1 of its weights are missing for .*query\.lora_A",
        ),
        (
            lambda w: w | {FIRST.replace("query", "key"): w[FIRST].clone()},
            r"1 of its weights have no place in",
        ),
        (
            lambda w: {k.replace("encoder.layer", "h"): v for k, v in w.items()},
            r"none of its weights .* belongs",
        ),
        (lambda w: w | {FIRST: torch.zeros(2, 5)}, r"it does not fit .*size mismatch|it does not fit"),
        (lambda w: w | {FIRST: w[FIRST] * torch.nan}, r"it does not fit .*NaN"),
    ],
)
def test_weights_that_do_not_belong_to_the_base_are_refused(edit, words, adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    change(folder, edit)
    with pytest.raises(CheckpointError, match=words):
        load_model(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "it describes no adapter"),
        ("[]", "it describes no adapter"),
        ('{"peft_type": "LORA"}', "it describes no adapter"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "it names no base_model_name_or_path"),
        (
            '{"peft_type": "LORA", "base_model_name_or_path": "x", "megatron_config": {"a": 1}}',
            "it names code to import",
        ),
    ],
)
def test_descriptions_that_are_none_are_refused(content, words, adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        load_model(str(folder))


def test_a_rank_beyond_the_weights_takes_no_memory(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"r": 10**12}))
    with pytest.raises(CheckpointError, match="it does not fit"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_folder_without_weights_is_named(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        load_model(str(folder))


def test_adapters_that_add_tokens_are_refused(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    values = {
        "peft_type": "PREFIX_TUNING",
        "base_model_name_or_path": str(folder.parent / "base"),
        "num_virtual_tokens": 3,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="PREFIX_TUNING adds tokens to the input"):
        load_model(str(folder))


def test_missing_peft_is_named(adapted, monkeypatch):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    import_module = builtins.__import__

    def without_peft(name, *rest, **options):
        if name == "peft":
            raise ImportError(name)
        return import_module(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[lora\]"):
        load_model(str(folder))


def test_tokenizer_of_the_adapter_goes_first(adapted):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    for path in (folder.parent / "base").glob("*token*"):
        shutil.copy(path, folder)
    described = folder / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"model_max_length": 37}))
    assert load_model(str(folder)).tokenizer.model_max_length == 37


def test_commands_run_on_an_adapter(adapted, tmp_path):
    folder, _ = adapted(
        LORA(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), AutoModelForCausalLM, base="llama"
    )
    fasta, labels = tmp_path / "in.fa", tmp_path / "labels.tsv"
    fasta.write_text("".join(f">r{i}\n{'ACGTTGCA' * (i % 3 + 1)}\n" for i in range(12)))
    labels.write_text("id\tlabel\n" + "".join(f"r{i}\t{'ab'[i % 2]}\n" for i in range(12)))
    learn = ("finetune", fasta, "--task", "classification", "--labels", labels, "--model", folder)
    for words in (
        ("extract", fasta, "--model", folder, "--layer", 1, "-o", tmp_path / "a.h5"),
        ("verify", tmp_path / "a.h5", fasta),
        (*learn, "--max-steps", 1, "-o", tmp_path / "run"),
        ("predict", tmp_path / "run", fasta, "-o", tmp_path / "p.tsv"),
    ):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, (words[0], result.output, result.exception)


def test_scores_are_those_of_the_adapted_model(tmp_path, tiny_folder):
    from transformers import LlamaForCausalLM

    from tests.tiny_models import build_config

    torch.manual_seed(0)
    LlamaForCausalLM(build_config("llama")).save_pretrained(tmp_path / "base")
    for path in tiny_folder("llama").glob("*token*"):
        shutil.copy(path, tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LORA(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    made = peft.get_peft_model(whole, config)
    made.save_pretrained(tmp_path / "adapter")
    merged = made.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for path in tiny_folder("llama").glob("*token*"):
        shutil.copy(path, tmp_path / "merged")
    fasta = tmp_path / "in.fa"
    fasta.write_text(">a\nACGTTGCAAGTC\n>b\nGGCATTA\n")
    tables = []
    for name in ("adapter", "merged", "base"):
        words = ["score", str(fasta), "--model", str(tmp_path / name), "-o", str(tmp_path / f"{name}.tsv")]
        result = CliRunner().invoke(main, [*words, "--dtype", "float32"])
        assert result.exit_code == 0, result.output
        tables.append((tmp_path / f"{name}.tsv").read_text())
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def hub_with(monkeypatch, folders):
    """Play a hub that has these repositories; returns what it was asked for."""
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        path = folders.get(repository, folders[next(iter(folders))].parent / "none") / name
        if not path.is_file():
            raise OSError(name)
        return str(path)

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    return asked


def test_adapter_of_the_hub_is_fetched_and_its_base_found(adapted, monkeypatch):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    expected = load_model(str(folder), device="cpu", dtype="float32")
    asked = hub_with(monkeypatch, {"some/adapter": folder})
    model = load_model("some/adapter", device="cpu", dtype="float32", revision="abc")
    assert model.name == "some/adapter"
    assert model.content["weights"] == expected.content["weights"]
    assert ("some/adapter", "adapter_model.safetensors", "abc") in asked
    with torch.inference_mode():
        assert torch.equal(model.module(IDS).last_hidden_state, expected.module(IDS).last_hidden_state)


def test_cached_adapter_and_base_load_without_a_network(adapted, tmp_path, monkeypatch):
    folder, _ = adapted(LORA(r=2, target_modules=["query"]))
    expected = load_model(str(folder), device="cpu", dtype="float32")
    rename_base(folder, "some/base")
    for name, source in (("adapter", folder), ("base", folder.parent / "base")):
        repository = tmp_path / "hub" / f"models--some--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        shutil.copytree(source, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(locate.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    model = load_model("some/adapter", device="cpu", dtype="float32")
    with torch.inference_mode():
        assert torch.equal(model.module(IDS).last_hidden_state, expected.module(IDS).last_hidden_state)
