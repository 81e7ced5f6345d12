"""Fine-tuned folders open in transformers and sentence-transformers, with the numbers of our own verbs.

Heads and layers are random, which is as good as trained ones: what is compared is how they are used.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    pipeline,
)

import genoembed
from genoembed.config.finetune import finetune_config
from genoembed.config.retrieval import ContrastiveConfig
from genoembed.errors import ModelError
from genoembed.finetuning.labels import LabelSpace
from genoembed.finetuning.models import PredictionModel, new_head
from genoembed.finetuning.saved import save_finetuned
from genoembed.models.families import FAMILIES as FAMILIES_OF_OURS
from genoembed.models.load import load_model
from genoembed.retrieval.heads import DenseHead
from genoembed.retrieval.models import ContrastModel
from genoembed.tokenization.hf import build_encoder
from genoembed.training.encoder import Encoder
from tests.finetuning.cases import build_model, sequences, write_fasta

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = Path(__file__).parents[1] / "golden" / "families"
PORTS = ("striped_hyena", "nt_v2", "dnabert2", "hyenadna", "caduceus_ph")
# of different lengths, in both cases, with runs of N and one that is no whole number of words
NEW = ["ACGTTGCAAGGT", "acgtNNacgtggTTTacgannA", "GGGACCATTTA", "TTTTTTTACGACGGATCGATCCGAT"]


def path_of(family, tmp_path):
    return build_model(tmp_path / "model") if family == "striped_hyena" else str(FAMILIES / family)


def save(path, folder, *, task, kind=None, names=(), **options):
    """Save a model with a random head as fine-tuning saves it."""
    config = finetune_config({"task": task, "train": ("x.tsv",), "model": path, "tuning": "full", **options})
    genomic = load_model(path, dtype="float32", device="cpu")
    encoder, space = Encoder(genomic, config.encoder), None
    if kind is None:
        head = DenseHead(encoder.width, add_pooler=config.encoder.add_pooler)
        model = ContrastModel(encoder, head, contrast="views", config=ContrastiveConfig())
    else:
        space = LabelSpace(kind=kind, names=tuple(names))
        head = new_head(space, encoder.width, add_pooler=config.encoder.add_pooler)
        model = PredictionModel(encoder, head, per_token=kind == "token")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, values in head.state_dict().items():
            least = 0.5 if name.endswith("deviation") else -0.5
            values.copy_(torch.rand(values.shape, generator=generator) + least)
    save_finetuned(
        model, folder, config=config, tokenizer=genomic.tokenizer, space=space, source=genomic.location
    )
    return str(folder)


def predicted(folder, tmp_path):
    """Rows of ``predict`` as numbers, by record and column."""
    table = tmp_path / "predicted.tsv"
    fasta = write_fasta(tmp_path / "new.fa", NEW)
    genoembed.predict(folder, fasta, output=table, overwrite=True, threads=1)
    with table.open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def opened(kind, folder):
    """Logits of plain transformers, and what its configuration says of them."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder)
    batch = tokenizer(NEW, padding=True, return_tensors="pt")
    with torch.no_grad():
        return batch, model(**batch).logits, model.config


def assert_predicted(folder, tmp_path, probabilities, config, *, prefix="p_"):
    names = [config.id2label[index] for index in range(config.num_labels)]
    assert config.label2id == {name: index for index, name in enumerate(names)}
    rows = [[float(row[f"{prefix}{name}"]) for name in names] for row in predicted(folder, tmp_path)]
    np.testing.assert_allclose(probabilities.numpy(), rows, rtol=1e-5, atol=1e-6)
    assert np.ptp(rows, axis=0).max() > 1e-4


@pytest.mark.parametrize("family", PORTS)
def test_a_classifier_opens_with_three_lines_of_transformers(family, tmp_path):
    folder = save(
        path_of(family, tmp_path), tmp_path / "final", task="classification", kind="class", names="xyz"
    )
    _, logits, config = opened(AutoModelForSequenceClassification, folder)
    assert config.problem_type == "single_label_classification"
    assert_predicted(folder, tmp_path, torch.softmax(logits, -1), config)


@pytest.mark.parametrize("family", PORTS)
def test_labels_of_bases_open_with_three_lines_of_transformers(family, tmp_path):
    path = path_of(family, tmp_path)
    folder = save(path, tmp_path / "final", task="token", kind="token", names="ab", layers=(0,))
    batch, logits, config = opened(AutoModelForTokenClassification, folder)
    genomic = load_model(path, device="cpu")
    encoder = build_encoder(genomic.tokenizer, add_special_tokens=genomic.special_tokens)
    rows = predicted(folder, tmp_path)
    for index, sequence in enumerate(NEW):
        encoded = encoder.encode(sequence.upper().encode())
        ids = encoded.input_ids
        assert batch["input_ids"][index, : len(ids)].tolist() == ids.tolist()
        starts = np.arange(len(ids)) if encoded.base_start is None else encoded.base_start
        ends = starts + 1 if encoded.base_end is None else encoded.base_end
        probabilities = torch.softmax(logits[index], -1).numpy()
        found = [(int(row["start"]), row) for row in rows if row["id"] == f"s{index}"]
        assert [base for base, _ in found] == list(range(len(sequence)))
        for base, row in found:
            (token,) = np.flatnonzero((starts <= base) & (base < ends))
            expected = [float(row[f"p_{config.id2label[label]}"]) for label in range(2)]
            np.testing.assert_allclose(probabilities[token], expected, atol=1e-6)


@pytest.mark.parametrize("family", PORTS)
@pytest.mark.parametrize("layers", [("final",), (0,)])
def test_an_embedder_opens_in_sentence_transformers(family, layers, tmp_path):
    options = {"layers": layers, "add_pooler": layers == (0,)}
    folder = save(path_of(family, tmp_path), tmp_path / "final", task="contrastive", **options)
    assert_encodes(folder)


def assert_encodes(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    expected = genoembed.embed(NEW, model=folder, dtype="float32").X
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")
    for size in (1, 4):
        np.testing.assert_allclose(model.encode(NEW, batch_size=size), expected, atol=1e-5)


def test_several_labels_and_numbers_open(tmp_path):
    path = path_of("striped_hyena", tmp_path)
    folder = save(path, tmp_path / "labels", task="multilabel", kind="multilabel", names="abc")
    _, logits, config = opened(AutoModelForSequenceClassification, folder)
    assert config.problem_type == "multi_label_classification"
    assert_predicted(folder, tmp_path, torch.sigmoid(logits), config)
    folder = save(path, tmp_path / "numbers", task="regression", kind="regression", names="xy")
    _, numbers, config = opened(AutoModelForSequenceClassification, folder)
    assert config.problem_type == "regression"
    assert_predicted(folder, tmp_path, numbers, config, prefix="")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("striped_hyena", {"layers": (0, 2), "fusion": "concat", "add_pooler": True, "skip_first": 5}),
        (
            "striped_hyena",
            {"layers": ("blocks.1", "blocks.2.mlp.l3"), "fusion": "weighted", "pooling": "max"},
        ),
        ("nt_v1", {"layers": (1,), "skip_first": 5}),
        ("dnabert_k6", {"skip_first": 2}),
        ("dnabert_k6", {"pooling": "cls"}),
        ("gena_lm_bigbird", {"layers": (0, 1), "fusion": "mean"}),
    ],
)
def test_any_layers_and_pooling_open(family, options, tmp_path):
    """The heads that families were published with take one token, or the last layer: ours takes all this."""
    path = path_of(family, tmp_path)
    folder = save(path, tmp_path / "final", task="classification", kind="class", names="xy", **options)
    _, logits, config = opened(AutoModelForSequenceClassification, folder)
    assert_predicted(folder, tmp_path, torch.softmax(logits, -1), config)


def test_padding_on_the_left_changes_nothing(tmp_path):
    for family in ("striped_hyena", "hyenadna", "caduceus_ph"):
        path = path_of(family, tmp_path)
        folder = save(path, tmp_path / family, task="classification", kind="class", names="xy")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        logits = []
        for side in ("left", "right"):
            tokenizer.padding_side = side
            with torch.no_grad():
                logits.append(model(**tokenizer(NEW, padding=True, return_tensors="pt")).logits)
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_layer_of_transformers_own_model_needs_none_of_our_code(tmp_path):
    folder = save(str(FAMILIES / "nt_v1"), tmp_path / "final", task="contrastive", layers=(0,))
    assert_encodes(folder)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["architectures"] == ["EsmModel"]
    modules = json.loads((tmp_path / "final" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


def test_blocks_behind_the_layer_are_left_out(tmp_path):
    for family, kept in (("striped_hyena", 1), ("dnabert2", 1), ("nt_v1", 2)):
        path = path_of(family, tmp_path)
        folder = save(path, tmp_path / family, task="contrastive", layers=(0,))
        assert AutoModel.from_pretrained(folder).config.num_hidden_layers == kept
        assert len(load_model(folder).layers) < len(load_model(path).layers)
        whole = save(path, tmp_path / f"{family}-whole", task="contrastive")
        assert weights_bytes(folder) < weights_bytes(whole)


def test_export_says_that_the_folder_opens_as_it_is(tmp_path):
    folder = save(str(FAMILIES / "dnabert2"), tmp_path / "final", task="contrastive", layers=(0,))
    with pytest.raises(ModelError, match="SentenceTransformer opens its folder as it is"):
        genoembed.export_model(folder, tmp_path / "out")


def test_folders_of_earlier_releases_are_read_as_before(tmp_path):
    """They have all heads in a file of their own, and nothing else beside the model."""
    path = path_of("striped_hyena", tmp_path)
    kinds = {"classification": ("class", "xy"), "contrastive": (None, "")}
    for task, (kind, names) in kinds.items():
        folder = Path(save(path, tmp_path / task, task=task, kind=kind, names=names, add_pooler=True))

        def read(folder=folder, kind=kind):
            vectors = genoembed.embed(NEW, model=str(folder)).X
            return vectors if kind is None else predicted(str(folder), tmp_path)

        expected = read()
        weights = load_file(folder / "model.safetensors")
        heads = {name: weights.pop(name) for name in list(weights) if name.startswith("head.")}
        for file in folder.glob("*_Dense/model.safetensors"):
            heads |= {f"head.pooler.{name[7:]}": value for name, value in load_file(file).items()}
        for step in folder.glob("[0-9]_*"):
            shutil.rmtree(step)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(heads, folder / "heads.safetensors")
        found = read()
        assert found == expected if kind else np.array_equal(found, expected)


def weights_bytes(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def test_no_weight_is_saved_twice(tmp_path):
    path = path_of("striped_hyena", tmp_path)
    options = {"layers": (0, 1), "fusion": "weighted", "add_pooler": True}
    for task, kind, names in (("classification", "class", "xy"), ("contrastive", None, ())):
        folder = Path(save(path, tmp_path / task, task=task, kind=kind, names=names, **options))
        digests = []
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                digests += [tensors.get_tensor(name).numpy().tobytes() for name in tensors.keys()]
        large = [values for values in digests if len(values) > 200]
        assert len(large) == len(set(large)) > 5
        assert not list(folder.glob("*.py"))


def test_what_does_not_open_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    save(str(FAMILIES / "dnabert_k6"), tmp_path / "words", task="contrastive")
    assert "sentence-transformers does not open it: it reads overlapping k-mers" in caplog.text
    path = path_of("striped_hyena", tmp_path)
    save(path, tmp_path / "skip", task="contrastive", skip_first=3)
    assert "its pooling leaves out the first 3 bases" in caplog.text
    assert not list(tmp_path.glob("*/modules.json"))
    save(str(FAMILIES / "generator"), tmp_path / "rest", task="contrastive")
    assert "words that its tokenizer does not know" in caplog.text


def test_adapters_are_merged_and_open(tmp_path):
    pytest.importorskip("peft")
    path = path_of("striped_hyena", tmp_path)
    rows = "".join(f"{s}\t{'ab'['G' in s[:9]]}\n" for s in sequences(24))
    table = tmp_path / "t.tsv"
    table.write_text(f"sequence\tlabel\n{rows}")
    report = genoembed.finetune(
        table, tmp_path / "run", task="classification", model=path, tuning="lora", max_steps=2,
        rows_per_device=8, dtype="float32", validation_fraction=0.0, test_fraction=0.0,
    )  # fmt: skip
    _, logits, config = opened(AutoModelForSequenceClassification, report.output)
    assert_predicted(report.output, tmp_path, torch.softmax(logits, -1), config)
    found = pipeline("text-classification", model=report.output, top_k=None)(NEW[:1])[0]
    expected = torch.softmax(logits[0], -1)
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        {config.id2label[index]: float(expected[index]) for index in range(2)}, abs=1e-6
    )


def test_every_family_has_both_classes():
    kinds = (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    lacking = [
        (family.name, kind.__name__)
        for family in FAMILIES_OF_OURS
        for kind in kinds
        if family.config_class() not in kind._model_mapping
    ]
    assert not lacking


def test_new_heads_learn_and_models_of_others_open_as_ever(tmp_path):
    path = path_of("striped_hyena", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(NEW, padding=True, return_tensors="pt")
    labels = torch.tensor([0, 1, 2, 0])
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    model(**batch, labels=labels).loss.backward()
    assert model.head.output.weight.grad.abs().max() > 0
    assert model.base_model.blocks[0].mlp.l3.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, again(**batch).logits)
    assert genoembed.embed(NEW, model=str(tmp_path / "again")).X.shape == (4, 16)
    numbers = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    assert numbers(**batch, labels=labels.float()).loss.isfinite()
    assert AutoModelForTokenClassification.from_pretrained(path, num_labels=3)(**batch).logits.shape[2] == 3
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert type(AutoModel.from_config(config)).__name__ == "BertModel"
    head = type(AutoModelForSequenceClassification.from_config(config))
    assert head.__name__ == "BertForSequenceClassification"
