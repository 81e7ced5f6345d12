"""Pretraining from another model's predictions: what is learned, what is logged, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import genoembed
from genoembed.config.pretrain import TeacherConfig
from genoembed.errors import ConfigError
from genoembed.pretraining.training import Teacher
from genoembed.tokenization.char import CharTokenizer
from genoembed.training.start import Start, token_rules
from tests.pretraining.test_contrast import RUN, corpus  # noqa: F401
from tests.pretraining.test_start import save_causal

PLAIN = RUN | {"contrast": 0.0, "kmer_codes": 0.0, "max_steps": 1, "save_steps": 1}


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def taught(corpus, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("teacher") / "run"
    genoembed.pretrain(corpus, folder, **PLAIN | {"max_steps": 30, "save_steps": 30, "seed": 3})
    return str(folder / "final")


def test_a_student_comes_near_its_teacher_and_the_logged_loss_stays_that_of_the_tokens(
    corpus,  # noqa: F811
    taught,
    tmp_path,
):
    options = PLAIN | {"max_steps": 20, "save_steps": 20, "teacher": taught}
    genoembed.pretrain(corpus, tmp_path / "run", **options)
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["teacher_loss"] < 0.2 * lines[0]["teacher_loss"]
    genoembed.pretrain(corpus, tmp_path / "plain", **PLAIN)
    (line,) = lines_of(tmp_path / "plain")
    assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
    assert "teacher_loss" not in line
    with pytest.raises(ConfigError, match="teacher: the model is not that of the run in"):
        genoembed.pretrain(
            corpus, tmp_path / "run", resume=True, **options | {"teacher": str(tmp_path / "plain/final")}
        )


def test_a_model_has_nothing_to_learn_from_itself(corpus, taught, tmp_path):  # noqa: F811
    shape = dict.fromkeys(("like", "hidden_size", "layers"))
    options = PLAIN | shape | {"model": taught, "teacher": taught, "teacher_weight": 1.0}
    genoembed.pretrain(corpus, tmp_path / "run", **options)
    (line,) = lines_of(tmp_path / "run")
    assert line["teacher_loss"] == pytest.approx(0, abs=1e-6)
    assert line["grad_norm"] == pytest.approx(0, abs=1e-4)


def test_divergence_is_that_of_the_definition_over_targets(taught):
    tokenizer = CharTokenizer()
    model = genoembed.StripedHyena2ForCausalLM.from_pretrained(taught)
    start = Start(model, tokenizer, token_rules(tokenizer, name="test"), is_new=True)
    teacher = Teacher(TeacherConfig(teacher=taught), start, window=128)
    ids = torch.tensor([list(b"ACGTTGCAAC"), list(b"GGATCCAATT")])
    labels = ids.masked_fill(torch.arange(10) < 4, -100)
    logits = torch.randn(2, 10, 512, generator=torch.Generator().manual_seed(0))
    found = teacher.divergence({"input_ids": ids, "labels": labels}, logits)
    with torch.no_grad():
        wanted = model.eval()(ids).logits.double().softmax(-1)
    gaps = [
        F.kl_div(logits[row, at].double().log_softmax(-1), wanted[row, at], reduction="sum")
        for row in range(2)
        for at in range(3, 9)
    ]
    assert float(found) == pytest.approx(float(torch.stack(gaps).mean()), rel=1e-4)


def test_a_teacher_in_isolated_rows_sees_what_its_student_sees(corpus, taught, tmp_path):  # noqa: F811
    shape = dict.fromkeys(("like", "hidden_size", "layers"))
    options = PLAIN | shape | {"model": taught, "teacher": taught, "teacher_weight": 1.0, "isolate": True}
    genoembed.pretrain(corpus, tmp_path / "run", **options)
    (line,) = lines_of(tmp_path / "run")
    assert line["teacher_loss"] == pytest.approx(0, abs=1e-6)
    tokenizer = CharTokenizer()
    model = genoembed.StripedHyena2ForCausalLM.from_pretrained(taught)
    start = Start(model, tokenizer, token_rules(tokenizer, name="test"), is_new=True)
    with pytest.raises(ConfigError, match=r"teacher: .* keeps documents apart by other inputs"):
        Teacher(TeacherConfig(teacher=taught), start, window=128, isolating=("position_ids",))


def test_a_weight_without_a_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"teacher_weight is 0.5, but there is no teacher"):
        TeacherConfig(teacher_weight=0.5)


def test_a_teacher_with_other_tokens_is_refused(corpus, tmp_path):  # noqa: F811
    save_causal("llama", tmp_path / "llama")
    with pytest.raises(
        ConfigError, match=r"teacher: .*llama has other tokens than the model that is trained"
    ):
        genoembed.pretrain(
            corpus, tmp_path / "run", **PLAIN | {"teacher": str(tmp_path / "llama"), "window": 64}
        )
