"""Saved models of masked families in the hands of plain transformers and peft, after `import genoembed`."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from genoembed.cli import main
from genoembed.models.load import load_model

GOLDEN = Path(__file__).parents[2] / "golden" / "families"
FAMILIES = ("nt_v1", "nt_v2", "dnabert2")
ATTENTION = {"nt_v1": ["query", "value"], "nt_v2": ["query", "value"], "dnabert2": ["Wqkv"]}
SEQUENCES = ["ACGTTGCAAGGTACCA", "TTGACG", "GGCATCGATTACAGGACCA"]
HEADS = (
    (AutoModelForMaskedLM, "logits"),
    (AutoModelForSequenceClassification, "logits"),
    (AutoModelForTokenClassification, "logits"),
    (AutoModel, "last_hidden_state"),
)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def published(family):
    return load_model(str(GOLDEN / family), device="cpu", dtype="float32")


def with_head(auto, published, **changes):
    """Load a published folder under a head; transformers has to be told what the folder is."""
    config = copy.deepcopy(published.module.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return auto.from_pretrained(published.location, config=config, dtype=torch.float32)


def batch_of(published):
    return published.tokenizer(SEQUENCES, padding=True, return_tensors="pt")


def run(model, batch, key):
    with torch.inference_mode():
        return model.eval()(**batch)[key]


RELOAD = """
import sys
from pathlib import Path

import genoembed
import torch
import transformers
from safetensors.torch import load_file

root = Path(sys.argv[1])
for folder in sorted(root.iterdir()):
    auto = getattr(transformers, folder.name.partition(".")[0])
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"], info
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        {sequences}, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        found = next(iter(model.eval()(**batch).values()))
    assert torch.equal(found, load_file(folder / "expected")["found"]), folder
    print(folder.name)
"""


def test_saved_folders_open_in_plain_transformers(tmp_path):
    """In another process, which has seen no model of the families yet."""
    for family in FAMILIES:
        published = load_model(str(GOLDEN / family), device="cpu", dtype="float32")
        for auto, key in HEADS:
            folder = tmp_path / f"{auto.__name__}.{family}"
            model = with_head(auto, published, num_labels=3)
            model.save_pretrained(folder)
            published.tokenizer.save_pretrained(folder)
            save_file({"found": run(model, batch_of(published), key).contiguous()}, folder / "expected")
    code = RELOAD.replace("{sequences}", repr(SEQUENCES))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == len(FAMILIES) * len(HEADS)


def test_saved_base_model_loads_here_as_the_published_one(published, tmp_path):
    published.module.save_pretrained(tmp_path / "x")
    published.tokenizer.save_pretrained(tmp_path / "x")
    again = load_model(str(tmp_path / "x"), device="cpu", dtype="float32")
    batch = batch_of(published)
    assert (again.max_length, again.padding) == (published.max_length, published.padding)
    assert again.family.name == published.family.name
    found, expected = (run(model.module, batch, "last_hidden_state") for model in (again, published))
    assert torch.equal(found, expected)


def test_saved_weights_have_the_published_names(family, published, tmp_path):
    with_head(AutoModelForMaskedLM, published).save_pretrained(tmp_path / "x")
    saved = set(load_file(tmp_path / "x" / "model.safetensors"))
    if (GOLDEN / family / "model.safetensors").exists():
        stored = set(load_file(GOLDEN / family / "model.safetensors"))
    else:
        stored = set(torch.load(GOLDEN / family / "pytorch_model.bin", weights_only=True))
    # not used with rotary positions; tied to the embedding
    left_out = {"esm.embeddings.position_embeddings.weight", "cls.predictions.decoder.weight"}
    assert saved <= stored
    assert stored - saved <= left_out


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("auto", [auto for auto, _ in HEADS if auto is not AutoModel])
def test_trainer_takes_a_step(auto, published, tmp_path):
    model = with_head(auto, published, num_labels=3)
    model.activation_checkpointing_enable()
    tokenizer = published.tokenizer

    def collate(rows):
        batch = tokenizer(rows, padding=True, return_tensors="pt")
        per_token = auto is not AutoModelForSequenceClassification
        labels = batch["input_ids"] % 3 if per_token else torch.tensor([0, 2])
        return batch | {"labels": labels}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        **{"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"},
        **{"remove_unused_columns": False, "disable_tqdm": True},
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    result = Trainer(model=model, args=arguments, train_dataset=SEQUENCES[:2], data_collator=collate).train()
    assert result.training_loss > 0
    after = dict(model.named_parameters())
    unchanged = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert not {name for name in unchanged if "contact_head" not in name}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_finds_the_attention(family, published, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_head(AutoModelForSequenceClassification, published)
    # as in BERT, the pooler is new as well, and peft knows of the classifier only
    learned = ["pooler"] if family == "dnabert2" else None
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=ATTENTION[family], modules_to_save=learned
    )
    adapted = peft.get_peft_model(model, config)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == len(ATTENTION[family]) * model.config.num_hidden_layers
    batch = batch_of(published)
    adapted(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    adapted.save_pretrained(tmp_path / "adapter")
    base = with_head(AutoModelForSequenceClassification, published)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(run(again, batch, "logits"), run(adapted, batch, "logits"))


def test_finetune_finds_linear_layers_for_adapters(family, tmp_path):
    pytest.importorskip("peft")
    rows = "".join(f">r{i}\n{'ACGTTGCAAGGTACCA' * 2}{'ACGT'[i % 4]}\n" for i in range(12))
    (tmp_path / "in.fa").write_text(rows)
    labels = "id\tlabel\n" + "".join(f"r{i}\t{'ab'[i % 2]}\n" for i in range(12))
    (tmp_path / "labels.tsv").write_text(labels)
    words = ["finetune", tmp_path / "in.fa", "--labels", tmp_path / "labels.tsv", "--max-steps", 1]
    words += ["--task", "classification", "--tuning", "lora", "--model", GOLDEN / family]
    result = CliRunner().invoke(main, [str(word) for word in [*words, "-o", tmp_path / "run"]])
    assert result.exit_code == 0, result.output


def test_tokenizer_files_of_the_published_folder_open_in_plain_transformers(family, published):
    plain = AutoTokenizer.from_pretrained(GOLDEN / family)
    for sequence in (*SEQUENCES, "ACGTNNACGTAC", "acgtac"):
        assert plain(sequence)["input_ids"] == published.tokenizer(sequence)["input_ids"]
