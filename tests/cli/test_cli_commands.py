"""The commands around ``extract``: layers, models, info, convert, doctor."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import genoembed
from tests.tiny_models import build_tiny

ROOT = Path(__file__).parents[2]
ARCHIVES = ROOT / "tests" / "data" / "archives" / "v1"
GOLDEN = ROOT / "tests" / "golden" / "a_base"
BUNDLED = Path(genoembed.__file__).parent / "models" / "bundled" / "config.json"


def test_layers_says_what_a_number_means(cli, tiny):
    result = cli("layers", tiny)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["--layer", "module", "path", "block", "width"]
    assert [line.split() for line in lines[1:6]] == [
        *([str(n), f"blocks.{n}.mlp.l3", str(n), "32"] for n in range(4)),
        ["final", "norm", "-", "32"],
    ]
    assert lines[6] == (
        "--layer N means blocks.N.mlp.l3, N from 0 to 3, or from -4 to -1 counted from the end."
    )
    assert len(lines) == 8
    assert "--all" in lines[7]


def test_layers_all_lists_every_module_once(cli, tiny):
    model = genoembed.load_model(tiny)
    lines = cli("layers", tiny, "--all").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:-1]] == [layer.path for layer in model.layers]
    facts = json.loads(cli("layers", tiny, "--json").stdout)
    assert (facts["template"], facts["num_blocks"], facts["final"]) == ("blocks.{index}.mlp.l3", 4, "norm")
    table = facts["layers"]
    assert [row["path"] for row in table] == [layer.path for layer in model.layers]
    assert {row["path"] for row in table if row["is_number"]} == {x.path for x in model.resolve("all")}
    assert [row["path"] for row in table if row["is_final"]] == ["norm"]


def test_layers_of_another_family_are_its_blocks(cli, tmp_path):
    lines = cli("layers", build_tiny("bert", tmp_path / "bert")).stdout.splitlines()
    named = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert [named[str(n)] for n in range(2)] == ["encoder.layer.0", "encoder.layer.1"]
    # without a norm after the blocks, the last block is the final layer
    assert any(line.split()[:4] == ["2", "or", "final", "encoder.layer.2"] for line in lines)


def test_code_of_a_model_runs_only_if_trusted(cli, fasta):
    folder = build_tiny("custom_conv", fasta.parent / "conv")
    refused = cli("extract", fasta, "--model", folder, "--layer", 0, "-q")
    assert refused.exit_code == 1
    assert refused.stderr.endswith("read the code, then add --trust-remote-code\n")
    trusted = cli("extract", fasta, "--model", folder, "--layer", 0, "--trust-remote-code")
    assert trusted.exit_code == 0, trusted.stderr


def test_layers_of_a_registry_model_needs_no_weights(cli, monkeypatch):
    monkeypatch.setattr(genoembed, "load_model", lambda *_, **__: pytest.fail("weights were asked for"))
    lines = cli("layers", "evo2_40b").stdout.splitlines()
    assert lines[50].split() == ["49", "blocks.49.mlp.l3", "49", "8192"]
    assert lines[52].startswith("--layer N means blocks.N.mlp.l3, N from 0 to 49,")


def test_layers_without_numbers_say_so(cli, tmp_path):
    config = {"model_type": "albert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Integers mean nothing here" in cli("layers", tmp_path).stdout


@pytest.mark.parametrize("command", ["layers", "extract"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"model_type": "no-such-kind"}', "its config.json is of no kind that transformers reads"),
        ("{", "its config.json cannot be read"),
        (
            '{"model_type": "striped_hyena2", "hidden_size": 0}',
            "hidden_size is 0, expected a whole number above 0",
        ),
        (None, "a folder without config.json"),
    ],
)
def test_useless_model_folder_is_one_line(command, content, problem, cli, fasta):
    folder = fasta.parent / "model"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    words = [command, folder] if command == "layers" else [command, fasta, "--model", folder, "-q"]
    result = cli(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert problem in result.stderr
    assert str(folder) in result.stderr
    assert result.stderr.count("\n") == 1


def test_model_folder_without_weights_is_one_line(cli, fasta, tiny):
    folder = fasta.parent / "model"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    assert cli("layers", folder).exit_code == 0
    result = cli("extract", fasta, "--model", folder, "-q")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "no weights were found" in result.stderr


def test_registry_model_out_of_reach_is_one_line(cli, fasta):
    result = cli("extract", fasta, "--model", "evo2_7b_microviridae", "-q")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "with genoembed convert, and set --model to that folder" in result.stderr


def test_layers_of_an_unknown_model_is_one_line(cli, tmp_path):
    result = cli("layers", tmp_path / "nothing")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path}/nothing: file or folder not found;")
    assert result.stderr.count("\n") == 1


def test_models_lists_the_bundled_one_first_and_says_what_fp8_means(cli):
    lines = cli("models").stdout.splitlines()
    known = genoembed.known_models()
    assert [line.split()[0] for line in lines[1 : len(known) + 1]] == [model.name for model in known]
    assert lines[1].startswith("genoembed-mini ")
    assert lines[1].split()[1:3] == [
        str(known[0].config["num_hidden_layers"]),
        str(known[0].config["hidden_size"]),
    ]
    row = next(line for line in lines if line.startswith("evo2_7b "))
    for fact in ("32", "4096", "1,048,576", "6.58 G", "Apache-2.0", "13.8 GB"):
        assert fact in row
    assert sum(line.startswith(("FP8 yes: trained with 8-bit", "FP8 no: ")) for line in lines) == 2


def test_models_json_holds_every_model(cli):
    models = {model["name"]: model for model in json.loads(cli("models", "--json").stdout)}
    named = (*genoembed.known_models(), *genoembed.published_models())
    assert set(models) == {model.name for model in named}
    assert (models["dnabert-2"]["repo_id"], models["dnabert-2"]["geneb"]["pools_special_tokens"]) == (
        "zhihan1996/DNABERT-2-117M",
        True,
    )
    assert models["enformer"]["tested"].startswith("not run: own architecture")
    assert models["evo2_40b"]["needs_fp8"] is True
    assert models["evo2_40b"]["layers"] == 50
    assert [file["name"] for file in models["evo2_40b"]["files"]] == [
        "evo2_40b.pt.part0",
        "evo2_40b.pt.part1",
    ]


def test_info_says_what_is_in_a_file_and_how_it_was_made(cli, fasta, tiny):
    cli("extract", fasta, "--model", tiny, "--layer", 2, "--rc", "mean", "--invalid", "mask", "-o", "out.h5")
    lines = cli("info", "out.h5").stdout.splitlines()
    facts = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in lines}
    assert facts["rows"] == "3"
    assert facts["first ids"] == "a, b, c"
    assert facts["matrix"] == "blocks.2.mlp.l3: 3 x 32 float32"
    assert facts["layers"] == "blocks.2.mlp.l3"
    assert facts["model: id"] == tiny
    assert len(facts["model: weights_sha256"]) == 64
    assert "pooling=mean" in facts["config: embedding"]
    assert "rc=mean" in facts["config: embedding"]
    assert "invalid=mask" in facts["config: input"]
    assert f"name={fasta}" in facts["inputs"]


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("pooled", "pooled", "float32"), ("tokens", "tokens", "float16")]
)
def test_info_reads_the_first_files(name, kind, dtype, cli):
    assert cli("info", ARCHIVES / f"{name}.h5").exit_code == 0
    facts = json.loads(cli("info", ARCHIVES / f"{name}.h5", "--json").stdout)
    assert (facts["kind"], facts["num_rows"], facts["schema_version"]) == (kind, 3, 1)
    assert facts["first_ids"][0] == "chr1"
    assert [matrix["name"] for matrix in facts["matrices"]] == ["blocks.28.mlp.l3", "blocks/10"]
    assert {matrix["dtype"] for matrix in facts["matrices"]} == {dtype}
    assert facts["provenance"]["note"] == "Grüße"


def test_info_shows_only_the_first_ids(cli, fasta, tiny):
    fasta.write_text("".join(f">r{n}\nACGT\n" for n in range(8)))
    cli("extract", fasta, "--model", tiny, "--layer", 0)
    assert "r0, r1, r2, r3, r4 and 3 more" in cli("info", "seqs.h5").stdout


def test_info_of_something_else_is_one_line(cli, fasta):
    result = cli("info", fasta)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {fasta}: ")
    assert result.stderr.count("\n") == 1


def test_convert_makes_a_folder_that_extract_takes(cli, fasta):
    checkpoint = GOLDEN / "evo2_golden_7bstyle.pt"
    result = cli("convert", checkpoint, "--vortex-config", GOLDEN / "config.yml", "-o", "golden")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "golden\n"
    assert "genoembed extract INPUT --model golden" in result.stderr
    assert cli("extract", fasta, "--model", "golden", "--layer", 0).exit_code == 0
    again = cli("convert", checkpoint, "--vortex-config", GOLDEN / "config.yml", "-o", "golden")
    assert again.exit_code == 1
    assert again.stderr == ("Error: golden: exists already; add --overwrite, or choose another output\n")
    replaced = cli(
        "convert", checkpoint, "--vortex-config", GOLDEN / "config.yml", "-o", "golden", "--overwrite", "-q"
    )
    assert (replaced.exit_code, replaced.stderr) == (0, "")


@dataclass(frozen=True)
class FakeCheck:
    name: str
    passed: bool
    detail: str = "as it should be"
    seconds: float = 0.25


@pytest.mark.parametrize(("passed", "code"), [((True, True), 0), ((True, False), 1)])
def test_doctor_prints_each_check_and_fails_with_one(passed, code, cli, monkeypatch):
    checks = [FakeCheck(name=f"check {n}", passed=value) for n, value in enumerate(passed)]

    def run_doctor(*, on_check):
        for check in checks:
            on_check(check)
        return checks

    monkeypatch.setattr(genoembed, "run_doctor", run_doctor)
    result = cli("doctor")
    assert result.exit_code == code
    lines = result.stdout.splitlines()
    assert lines[0] == "ok      check 0: as it should be (0.2 s)"
    assert lines[1].startswith("ok  " if passed[1] else "FAILED  check 1")
    assert lines[2] == f"2 checks, {passed.count(False)} failed"


@pytest.mark.skipif(not BUNDLED.is_file(), reason="the bundled model is not in this checkout")
def test_defaults_embed_with_the_bundled_model(cli, fasta):
    result = cli("extract", fasta)
    assert result.exit_code == 0, result.stderr
    with genoembed.open_embeddings("seqs.h5") as embeddings:
        assert embeddings.provenance["model"]["id"] == "genoembed-mini"
        assert len(embeddings) == 3
    assert cli("layers").stdout.splitlines()[29].split()[:2] == ["28", "blocks.28.mlp.l3"]
    assert cli("doctor").exit_code == 0
