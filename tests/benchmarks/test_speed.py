"""The parts of the speed benchmarks that a wrong figure could come from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import measuring
import pytest
import speed
import speed_extract
import speed_growth
import speed_limit
import speed_training
import speed_vortex
import torch
from measuring import Figure
from torch import nn
from transformers import AutoModel, AutoTokenizer

import genoembed
from genoembed.models import precision
from genoembed.models.striped_hyena2.convert import vortex_arguments

TINY = {**speed_growth.TINY_SHAPE, **speed_growth.TINY_MODELS["all kinds"]}


def tiny_model() -> genoembed.StripedHyena2ForCausalLM:
    torch.manual_seed(0)
    return genoembed.StripedHyena2ForCausalLM(genoembed.StripedHyena2Config(**TINY)).eval()


def test_reference_description_is_a_model_of_ours():
    config = genoembed.StripedHyena2Config(**vortex_arguments(speed_vortex.DESCRIPTION))
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (512, 11, 1408)
    assert speed_vortex.LAST == "blocks.10"


def test_work_of_linears_is_what_the_modules_hold():
    model = tiny_model()
    work = speed_limit.count_work(model.config, batch=3, length=50, item_bytes=4)
    weights = [m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    assert work.linear == 2 * 150 * sum(weights)
    assert work.attention == 2 * 3 * 50 * 50 * model.config.hidden_size
    longer = speed_limit.count_work(model.config, batch=3, length=100, item_bytes=4)
    assert longer.filters == 2 * work.filters
    assert longer.attention == 4 * work.attention


def test_products_alone_run_every_linear(monkeypatch):
    model = tiny_model()
    products = speed_limit.Products(model, batch=2, length=8, dtype=torch.float32)
    products.run_linears()
    products.run_attention()
    assert len(products.weights) == sum(isinstance(m, nn.Linear) for m in model.blocks.modules())
    last = products.weights[-1]
    torch.testing.assert_close(products.outputs[last.shape[0]], products.inputs[last.shape[1]] @ last.T)


def test_backward_memory_is_counted_without_the_weights():
    model = tiny_model()
    short, long = (speed_vortex.saved_bytes_per_token(model, length) for length in (256, 1024))
    assert 0 < long < 1.5 * short


@pytest.mark.parametrize("name", ["mini", "esm"])
def test_usual_ways_and_extract_give_the_same_vectors(tmp_path, name):
    lengths = [130, 400, 100, 220, 100, 310, 150, 120, 90]
    fasta = speed_extract.write_fasta(tmp_path / "a.fa", lengths)
    if name == "mini":
        genoembed.StripedHyena2Model(genoembed.StripedHyena2Config(**TINY)).save_pretrained(tmp_path / name)
        genoembed.CharTokenizer().save_pretrained(tmp_path / name)
    else:
        speed_extract.write_esm(tmp_path / name, width=40, num_layers=2)
    model = AutoModel.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    loop = speed_extract.usual_loop(
        model, AutoTokenizer.from_pretrained(tmp_path / name), fasta, rows_per_batch=8
    )
    loaded = genoembed.load_model(str(tmp_path / name), device="cpu", dtype="float32")
    vectors = speed_extract.embed(fasta, loaded)
    assert vectors.shape == loop.shape == (len(lengths), model.config.hidden_size)
    assert abs(vectors - loop).max() <= 1e-5 * abs(loop).max()
    ordered = speed_extract.usual_loop(
        model, AutoTokenizer.from_pretrained(tmp_path / name), fasta, rows_per_batch=4, is_sorted=True
    )
    assert abs(ordered - loop).max() <= 1e-5 * abs(loop).max()


def test_every_opponent_runs_in_the_type_that_extract_has(tmp_path, monkeypatch):
    genoembed.StripedHyena2Model(genoembed.StripedHyena2Config(**TINY)).save_pretrained(tmp_path / "m")
    genoembed.CharTokenizer().save_pretrained(tmp_path / "m")
    fasta = speed_extract.write_fasta(tmp_path / "a.fa", [130, 40, 100])
    monkeypatch.setattr(speed_extract, "HAS_SENTENCE_TRANSFORMERS", False)
    monkeypatch.setattr(precision, "_decided", {"cpu": True})
    options = SimpleNamespace(rounds=1, budget_s=0)
    comparison = speed_extract.Comparison(options)
    comparison.compare("tiny", tmp_path / "m", fasta, 270)
    ways = {"extract", "loop of 8", "sorted loop of 8", "one at a time"}
    assert {(row["way"], row["dtype"]) for row in comparison.rows} == {
        (way, dtype) for way in ways for dtype in ("bfloat16", "float32")
    }
    names = {figure.name for figure in comparison.figures}
    for dtype in ("bfloat16", "float32"):
        for way in ways - {"extract"}:
            assert f"tiny, {dtype}: {way} over extract" in names
    assert all(figure.is_met for figure in comparison.figures if "difference" in figure.name)


def test_timed_forward_counts_calls_that_a_capture_leaves(tmp_path):
    fasta = speed_extract.write_fasta(tmp_path / "a.fa", [50, 60])
    tiny_model().save_pretrained(tmp_path / "m")
    loaded = genoembed.load_model(str(tmp_path / "m"), device="cpu", dtype="float32")
    seconds = speed_extract._time_forward(loaded.module)
    speed_extract.embed(fasta, loaded)
    assert seconds
    assert min(seconds) > 0


def test_mixed_lengths_are_log_normal_within_bounds():
    lengths = speed_extract.mixed_lengths(2000)
    assert (min(lengths), max(lengths)) == (100, 8000)
    assert 900 < sorted(lengths)[1000] < 1100
    assert speed_extract.mixed_lengths(2000) == lengths


def test_slope_of_linear_growth_is_one():
    runs = [{"bases": size, "seconds": 3e-6 * size, "cpu_seconds": size**2.0} for size in (1e6, 1e7, 1e8)]
    assert speed_growth.slope(runs, "seconds") == pytest.approx(1)
    assert speed_growth.slope(runs, "cpu_seconds") == pytest.approx(2)


def test_growth_run_counts_what_it_embedded(tmp_path):
    fasta = speed_growth.write_sequence(tmp_path / "one.fa", 700)
    tiny_model().save_pretrained(tmp_path / "m")
    found = speed_growth.run_once(str(tmp_path / "m"), str(fasta), str(tmp_path / "out.h5"), threads=0)
    assert (found["records"], found["bases"]) == (1, 700)
    assert found["peak_mib"] >= found["baseline_mib"] > 50


def test_every_way_of_batching_trains_on_the_same_tokens():
    documents = [b"ACGT" * number for number in range(1, 40)]
    total = sum(len(document) + 1 for document in documents)
    shape = {"window": 64, "rows": 3}
    ways = {
        "padded": list(speed_training.padded_batches(documents, **shape)),
        "bins": list(speed_training.packed_batches(documents, way="bins, isolated", **shape)),
        "stream": list(speed_training.packed_batches(documents, way="stream", **shape)),
    }
    assert {sum(map(speed_training.real_tokens, batches)) for batches in ways.values()} == {total}
    assert all("segment_ids" in inputs for inputs in ways["bins"])
    slots = {name: sum(i["input_ids"].numel() for i in batches) for name, batches in ways.items()}
    assert slots["stream"] <= slots["bins"] < slots["padded"]
    assert all(bool((i["labels"][i["input_ids"] == 1] == -100).all()) for i in ways["padded"])


def test_summary_shows_every_part_and_counts_missed_goals(tmp_path):
    options = measuring.option_parser("x").parse_args(["--results", str(tmp_path)])
    for part, value in (("vortex", 6.0), ("limit", 0.1)):
        measuring.file_results(
            f"speed_{part}",
            part,
            options,
            figures=[Figure(name=f"of {part}", value=value, at_least=0.5)],
            tables={},
        )
    page = speed.summary(tmp_path, {"note": "none"})
    assert "of vortex" in page
    assert "of limit" in page
    assert "Goals missed: 1." in page
    assert json.loads((tmp_path / "speed_limit.json").read_text())["figures"][0]["is_met"] is False


def test_part_commands_pass_the_options_on(tmp_path):
    parser = measuring.option_parser("x")
    parser.add_argument("--before-src")
    options = parser.parse_args(["--quick", "--rounds", "2", "--before-src", "old", "--note", "idle"])
    words = speed.part_command("training", options, tmp_path)
    assert words[1].endswith("speed_training.py")
    assert words[2:] == [
        *("--results", str(tmp_path), "--threads", "0", "--rounds", "2", "--note", "idle", "--quick"),
        *("--before-src", "old"),
    ]
    assert "--before-src" not in speed.part_command("limit", options, tmp_path)


def test_fewer_instructions_run_in_their_own_environment_and_folder(tmp_path, monkeypatch):
    runs = []

    def run_part(words, *, instructions=None):
        folder = Path(words[words.index("--results") + 1])
        figure = {"name": f"figure of {instructions}", "value": 1.0}
        (folder / "speed_limit.json").write_text(json.dumps({"figures": [figure]}))
        runs.append((folder.relative_to(tmp_path).as_posix(), instructions))
        return 1.0

    monkeypatch.setattr(speed, "run_part", run_part)
    words = ["--parts", "limit", "two_jobs", "--instructions", "AVX2", "--results", str(tmp_path)]
    assert speed.main(words) == 0
    assert runs == [(".", None), (".", None), ("avx2", "AVX2")]
    page = (tmp_path / "speed.md").read_text()
    assert "own matrix products, at most AVX2" in page
    assert "`avx2/speed_limit.md`" in page
    assert page.index("figure of None") < page.index("figure of AVX2")
