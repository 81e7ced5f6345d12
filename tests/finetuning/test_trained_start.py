"""Starting from a model that was trained for vectors: its settings, its heads, a lower rate."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import genoembed
from genoembed.config.finetune import finetune_config
from genoembed.errors import ConfigError, ModelError, PoolingMismatchWarning
from genoembed.finetuning import training
from genoembed.finetuning.preparation import read_task_rows
from genoembed.finetuning.tasks import set_up_task
from genoembed.finetuning.trained_start import TrainedStart, with_trained_settings
from genoembed.finetuning.trainer import FinetuneTrainer
from genoembed.models import hub as hub_client
from genoembed.models.trained_folder import HEADS_FILE, find_facts, read_finetuned, read_heads
from genoembed.retrieval.models import Retriever, load_retriever
from genoembed.retrieval.terms import KmerTerms
from genoembed.tokenization.hf import build_encoder
from genoembed.training.inference import SequenceRunner
from genoembed.training.start import carry_vectors
from tests.finetuning.cases import (
    CONTEXT,
    FAST,
    build_model,
    sequences,
    write_classes,
    write_examples,
    write_fasta,
)
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")
SEQUENCES = [*sequences(4, seed=8, shortest=14), "".join(sequences(9, seed=9))]
SHORT = {**FAST, "max_epochs": 1, "max_steps": 2, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        "labels": write_classes(folder / "c.tsv", 40),
        "views": write_fasta(folder / "v.fa", sequences(30, shortest=16)),
        "examples": write_examples(folder / "e.jsonl", 24),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory, files):
    """Models that were tuned for embeddings in several ways, and one of sentence-transformers."""
    folder = tmp_path_factory.mktemp("tuned")
    options = {"model": build_model(folder / "model"), **SHORT}
    views = genoembed.finetune(
        files["views"], folder / "views", task="contrastive", **options,
        layers=(0, 2), fusion="weighted", pooling="max", skip_first=2, add_pooler=True,
    )  # fmt: skip
    search = genoembed.finetune(
        files["examples"], folder / "search", task="retrieval", train_group_size=2, **options,
        layers=1, pooling="last", add_pooler=True, term_bases=5, vector_window=4, vector_width=6,
    )  # fmt: skip
    apart = genoembed.finetune(
        files["labels"], folder / "apart", task="triplet", layers=1, add_pooler=True, **options
    )
    sentence = build_tiny("bert", folder / "sentence")
    modules = ["Transformer", "Pooling", "Dense"]
    listed = [{"idx": i, "path": f"{i}_{m}" if i else "", "type": f"sentence_transformers.models.{m}"}
              for i, m in enumerate(modules)]  # fmt: skip
    (sentence / "modules.json").write_text(json.dumps(listed))
    dense = {"in_features": 16, "out_features": 16, "bias": True}
    (sentence / "2_Dense").mkdir()
    (sentence / "2_Dense" / "config.json").write_text(
        json.dumps(dense | {"activation_function": "torch.nn.modules.linear.Identity"})
    )
    generator = torch.Generator().manual_seed(0)
    linear = {"linear.weight": torch.randn(16, 16, generator=generator), "linear.bias": torch.ones(16)}
    save_file(linear, sentence / "2_Dense" / "model.safetensors")
    (sentence / "1_Pooling").mkdir()
    (sentence / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "max"}))
    return {"plain": options["model"], "views": views.output, "search": search.output, "apart": apart.output,
            "sentence": str(sentence)}  # fmt: skip


def set_up(path, **options):
    """Make everything that a run has before its first step."""
    config = finetune_config({"train": (path,), **FAST, **options})
    rows = read_task_rows(config)
    facts = find_facts(config.encoder.model)
    config = with_trained_settings(config, facts)
    return config, facts, set_up_task(config, rows, facts)


def first_vectors(config, setup):
    model = setup.model.eval()
    genomic = genoembed.load_model(config.encoder.model, dtype="float32", device="cpu")
    tokens = build_encoder(genomic.tokenizer, add_special_tokens=genomic.special_tokens)
    runner = SequenceRunner(model.encoder, tokens, max_tokens=CONTEXT, skip_first=config.encoder.skip_first)
    vectors = runner.vectors(model, [s.encode() for s in SEQUENCES])
    with torch.no_grad():
        return model(vectors=vectors, want="predict")["dense"].numpy()


TASKS = [
    ("contrastive", "labels", {}),
    ("contrastive", "views", {}),
    ("contrastive", "examples", {"train_group_size": 2}),
    ("triplet", "labels", {}),
    ("triplet", "examples", {"distance": "cosine"}),
    ("retrieval", "examples", {"train_group_size": 2}),
    ("retrieval", "examples", {"train_group_size": 2, "mode": "dense"}),
]


@pytest.mark.parametrize("folder", ["views", "search", "apart", "sentence"])
@pytest.mark.parametrize(("task", "rows", "options"), TASKS, ids=lambda value: str(value))
def test_vectors_before_the_first_step_are_those_of_extract(files, folders, folder, task, rows, options):
    if folder == "views" and task == "retrieval":
        options = {**options, "pooling": "mean"}
        with pytest.raises(ConfigError, match="retrieval fuses layers before it pools them"):
            set_up(files[rows], task=task, model=folders[folder], train_group_size=2)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoolingMismatchWarning)
        config, facts, setup = set_up(files[rows], task=task, model=folders[folder], **options)
    expected = genoembed.embed(SEQUENCES, model=folders[folder], dtype="float32", device="cpu").X
    np.testing.assert_allclose(first_vectors(config, setup), expected, atol=1e-6)
    assert setup.model.normalizes is facts.normalize
    dense = setup.model.heads.dense if task == "retrieval" else setup.model.head
    assert (dense.pooler is not None) is facts.add_pooler


def test_sparse_and_multi_vector_heads_go_on_from_those_of_the_folder(files, folders):
    config, facts, setup = set_up(
        files["examples"], task="retrieval", model=folders["search"], train_group_size=2
    )
    saved = load_retriever(folders["search"])
    assert (config.objective.term_bases, config.objective.vector_width) == (5, 6)
    started = Retriever(facts=facts, genomic=saved.genomic, model=setup.model.eval(), kmers=KmerTerms(k=5))
    texts = [s.encode() for s in SEQUENCES]
    for ours, theirs in zip(started.encode(texts), saved.encode(texts), strict=True):
        for name in ours._fields:
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6)
    assert setup.model.hybrid_weights == saved.model.hybrid_weights
    assert setup.trained == {name for name in setup.model.state_dict() if name.startswith("heads.")}


def test_heads_of_another_shape_start_anew_with_a_warning(files, folders):
    options = {"task": "retrieval", "model": folders["search"], "train_group_size": 2}
    with pytest.warns(PoolingMismatchWarning, match=r"term_bases is 7, it was trained with 5 \(that head"):
        _, _, setup = set_up(files["examples"], term_bases=7, **options)
    assert not any("sparse" in name for name in setup.trained)
    assert any("multi_vector" in name for name in setup.trained)
    with pytest.warns(PoolingMismatchWarning, match="vector_window is 2, it was trained with 4"):
        _, _, setup = set_up(files["examples"], vector_window=2, **options)
    assert not any("multi_vector" in name for name in setup.trained)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "mean"}, r"pooling is 'mean', it was trained with 'max' \(its projection and heads"),
        ({"layers": 1}, r"layers is blocks.1.mlp.l3, it was trained with blocks.0.mlp.l3, blocks.2.mlp.l3; "
                        r"fusion is 'none', it was trained with 'weighted' \(its projection and heads"),
        ({"skip_first": 0}, "skip_first is 0, it was trained with 2"),
        ({"fusion": "mean"}, "fusion is 'mean', it was trained with 'weighted'"),
        ({"add_pooler": False}, "add_pooler is False, it was trained with True; leave it out to take"),
        ({"normalize": False}, "normalize is False, it was trained with True; leave it out to take"),
    ],
)  # fmt: skip
def test_another_choice_warns_as_extract_does(files, folders, options, said):
    with pytest.warns(PoolingMismatchWarning, match=said):
        _, _, setup = set_up(files["views"], task="contrastive", model=folders["views"], **options)
    changed = not options.keys() & {"add_pooler", "normalize"}
    assert (setup.trained == frozenset()) is (changed or "add_pooler" in options)
    if changed:
        assert setup.model.head.pooler is None


def test_predictions_take_layers_and_pooling_but_no_projection(files, folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoolingMismatchWarning)
        config, _, setup = set_up(files["labels"], task="classification", model=folders["views"])
    assert setup.model.encoder.layers == ("blocks.0.mlp.l3", "blocks.2.mlp.l3")
    assert (config.encoder.pooling, config.encoder.skip_first, config.encoder.fusion) == (
        "max",
        2,
        "weighted",
    )
    assert setup.model.encoder.fusion_weights == pytest.approx(find_facts(folders["views"]).fusion_weights)
    assert setup.model.head.pooler is None


def test_a_run_goes_on_slowly_and_says_so(files, folders, tmp_path, monkeypatch, caplog):
    trainers = []
    start = FinetuneTrainer.train_from
    monkeypatch.setattr(FinetuneTrainer, "train_from", lambda s, c: (trainers.append(s), start(s, c))[1])
    options = {"task": "retrieval", "train_group_size": 2, **SHORT, "learning_rate": None}
    with caplog.at_level("INFO", logger="genoembed"):
        report = genoembed.finetune(files["examples"], tmp_path / "run", model=folders["search"], **options)
    assert "x 0.2: the model was tuned for embeddings, which large steps would undo" in caplog.text
    assert "layers, pooling and fusion as it was trained for retrieval" in caplog.text
    (trainer,) = trainers
    assert trainer.args.learning_rate == pytest.approx(0.2 * 1e-3)  # width 16 counts as 128
    assert trainer.rate_of("heads.sparse.linear.weight") == trainer.args.learning_rate
    # what was requested is what runs again, without a warning
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoolingMismatchWarning)
        again = genoembed.finetune(None, tmp_path / "again", config=report.config)
        resumed = genoembed.finetune(
            files["examples"], tmp_path / "run", model=folders["search"], resume=True, **options
        )
    assert again.validation == pytest.approx(report.validation)
    assert resumed == report
    plain = genoembed.finetune(files["examples"], tmp_path / "plain", model=folders["plain"], **options)
    assert plain.steps == 2
    assert trainers[-1].args.learning_rate == pytest.approx(1e-3)
    assert trainers[-1].rate_of("heads.sparse.linear.weight") == 1e-3


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_language_model_made_of_a_tuned_one_embeds_as_before_and_scores(
    files, folders, tmp_path, verb, caplog
):
    options = {"max_steps": 1, "learning_rate": 1e-12, "rows_per_device": 2}
    with caplog.at_level("INFO", logger="genoembed"):
        if verb == "pretrain":
            report = genoembed.pretrain(
                files["views"], tmp_path / "run", model=folders["search"], window=32, heldout_fraction=0.2,
                dtype="float32", **options,
            )  # fmt: skip
        else:
            report = genoembed.finetune(
                files["views"], tmp_path / "run", model=folders["search"], task="lm", **options
            )
    assert "its vectors stay those of" in caplog.text
    found = genoembed.embed(SEQUENCES, model=report.output, dtype="float32", device="cpu")
    expected = genoembed.embed(SEQUENCES, model=folders["search"], dtype="float32", device="cpu")
    assert found.layers == expected.layers == ("blocks.1.mlp.l3",)
    np.testing.assert_allclose(found.X, expected.X, atol=1e-5)
    assert len(load_retriever(report.output).encode([b"ACGTACGTACGT"])) == 1
    assert genoembed.score(files["views"], model=report.output).num_rows == 30
    with pytest.raises(ModelError, match="its next-token head is no longer of use"):
        genoembed.score(files["views"], model=folders["search"])


def test_a_second_language_model_run_keeps_vectors_heads_and_rate(files, folders, tmp_path, caplog):
    options = {"task": "lm", "max_steps": 1, "rows_per_device": 2}
    first = genoembed.finetune(
        files["views"], tmp_path / "a", model=folders["search"], learning_rate=1e-12, **options
    )
    with caplog.at_level("INFO", logger="genoembed"):
        second = genoembed.finetune(files["views"], tmp_path / "b", model=first.output, **options)
    assert "x 0.2: the model was tuned for embeddings" in caplog.text
    expected, *found = (find_facts(folder) for folder in (folders["search"], first.output, second.output))
    for facts in found:
        assert facts.is_tuned
        for key in ("layers", "pooling", "skip_first", "fusion", "normalize", "pooler"):
            assert getattr(facts, key) == getattr(expected, key)
    heads = read_heads(expected.folder, pooler=expected.pooler)
    assert heads.keys() == (kept := read_heads(found[-1].folder)).keys()
    assert all(torch.equal(heads[name], kept[name]) for name in heads)
    start = TrainedStart(facts=found[-1], config=finetune_config({"train": ("x.fa",), "task": "triplet"}))
    assert start.normalizes(usual=not expected.normalize) is expected.normalize


def test_a_language_model_of_an_untuned_one_is_not_tuned_for_vectors(files, folders, tmp_path):
    report = genoembed.finetune(
        files["views"], tmp_path / "run", model=folders["plain"], task="lm", max_steps=1, rows_per_device=2
    )
    assert not read_finetuned(report.output).is_tuned
    assert find_facts(report.output) is None


@pytest.fixture
def hub(monkeypatch):
    """Play a hub with one repository after another, for all but what transformers loads itself."""

    def serve(folder):
        def download(_, name, revision=None):
            if not (Path(folder) / name).is_file():
                raise OSError(name)
            copy = cache / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / name, copy)
            return str(copy)

        cache = Path(tempfile.mkdtemp(dir=root))
        monkeypatch.setattr(hub_client, "hf_hub_download", download)
        return "some/thing"

    monkeypatch.setattr(hub_client, "hub_answers", lambda: True)
    with tempfile.TemporaryDirectory() as root:
        yield serve


@pytest.mark.parametrize("has_modules", [True, False])
def test_heads_of_a_repository_are_fetched_with_what_it_says_of_itself(folders, tmp_path, hub, has_modules):
    folder = folders["search"]
    if not has_modules:  # as of a language model that learned on from it
        folder = tmp_path / "pushed"
        folder.mkdir()
        carry_vectors(find_facts(folders["search"]), folder)
    facts, expected = find_facts(hub(folder)), find_facts(str(folder))
    assert facts is not None
    assert facts.folder != expected.folder
    assert facts.values == expected.values
    assert read_heads(facts.folder).keys() == read_heads(expected.folder).keys()
    carry_vectors(facts, tmp_path)
    assert (tmp_path / HEADS_FILE).is_file()


@pytest.mark.parametrize(
    ("model", "requested"), [("genoembed-mini", False), ("evo2_7b", False), ("some/thing", None)]
)
def test_only_models_known_by_name_are_known_to_bring_no_projection(
    files, tmp_path, monkeypatch, model, requested
):
    seen = []

    def run(config, *_, **__):
        seen.append(config.encoder.add_pooler)
        raise ModelError("enough")

    monkeypatch.setattr(training, "run_finetuning", run)
    with pytest.raises(ModelError, match="enough"):
        genoembed.finetune(files["views"], tmp_path / "run", model=model, task="contrastive")
    assert seen == [requested]


def test_nothing_to_learn_is_refused_unless_the_folder_has_a_projection(files, folders, tmp_path):
    options = {"task": "contrastive", "tuning": "frozen"}
    for model in ("genoembed-mini", folders["plain"]):
        with pytest.raises(ConfigError, match="nothing would learn; set add_pooler=True"):
            genoembed.finetune(files["views"], tmp_path / "run", model=model, **options)
    config, _, setup = set_up(files["views"], model=folders["views"], **options)
    assert config.encoder.add_pooler is None
    assert {name for name, p in setup.model.named_parameters() if p.requires_grad} >= setup.trained > set()
