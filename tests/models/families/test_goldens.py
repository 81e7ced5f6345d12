"""Every golden family against what its official code computed: ids, each block, final, logits; then commands.

The folders lie in `tests/golden/families` as published (tiny seeded weights, official names); its README says
where the numbers come from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from genoembed.cli import main
from genoembed.models.load import load_model
from genoembed.store.reader import open_embeddings

GOLDEN = Path(__file__).parents[2] / "golden" / "families"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
TOLERANCES = {"hyenadna": 1e-4, "ntv3_pre": 2e-5}
CAUSAL = {"hyenadna", "evo1", "generator", "omni_dna"}
ENCODERS_ONLY: set[str] = set()
"""Folders whose weights hold no language-model head."""
FILLED = {"ntv3_pre"}
"""Where the official tokenizer fills sequences up to a multiple, which the model does here."""
SEVERAL_LENGTHS = {
    "ntv3_pre": [
        *(f"core.conv_tower_blocks.{i}" for i in range(3)),
        *(f"core.transformer_blocks.{i}" for i in range(2)),
        *(f"core.deconv_tower_blocks.{i}" for i in range(3)),
    ]
}
"""Blocks in the order of official hidden states that have lengths of their own."""


def outputs_of(family):
    values = load_file(GOLDEN / family / "outputs.safetensors")
    inputs = json.loads((GOLDEN / family / "inputs.json").read_text())
    return {
        name: {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
        for name in inputs
    }


def inputs_of(family):
    return json.loads((GOLDEN / family / "inputs.json").read_text())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return load_model(str(GOLDEN / family), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def outputs(family):
    return outputs_of(family)


def test_family_is_recognized_without_its_name(family, tmp_path):
    folder = shutil.copytree(GOLDEN / family, tmp_path / "x")
    assert load_model(str(folder), dtype="float32").layers


def test_input_ids_equal_the_official_tokenizer(family, model, outputs):
    for name, sequence in inputs_of(family).items():
        ids = model.tokenizer(sequence)["input_ids"]
        expected = outputs[name]["input_ids"].tolist()
        if family in FILLED:
            assert set(expected[len(sequence) :]) <= {model.tokenizer.pad_token_id}
            expected = expected[: len(sequence)]
        assert ids == expected, name


def states(model, ids_BL, mask_BL=None):
    """Return the blocks' outputs and the final states of one forward pass."""
    layers = [layer.path for layer in model.resolve(["all", "final"])]
    with torch.inference_mode():
        found = run(model, ids_BL, mask_BL, layers)
    return [found[path] for path in layers], found[model.resolve("final")[0].path]


def run(model, ids_BL, mask_BL, layers):
    from genoembed.models.behavior import forward_arguments
    from genoembed.models.layers import capture

    mask = mask_BL if model.accepts_attention_mask else None
    with capture(model.module, layers) as found:
        model.module(ids_BL, **forward_arguments(model.module, mask))
    return found


def test_every_block_and_final_equal_the_official_code(family, model, outputs):
    tolerance = TOLERANCES.get(family, 1e-5)
    for name, expected in outputs.items():
        ids = expected["input_ids"].long()
        blocks, final = states(model, ids[None], torch.ones_like(ids)[None])
        torch.testing.assert_close(final[0], expected["final"], rtol=0, atol=tolerance, msg=name)
        if "hidden_states" in expected:
            for index, hidden in enumerate(expected["hidden_states"][1:-1]):
                torch.testing.assert_close(
                    blocks[index][0], hidden, rtol=0, atol=tolerance, msg=f"{name} {index}"
                )


def test_blocks_of_several_lengths_equal_the_official_code_on_every_position(family, model, outputs):
    if family not in SEVERAL_LENGTHS:
        pytest.skip("all official hidden states have the length of the input")
    for name, expected in outputs.items():
        ids = expected["input_ids"].long()
        with torch.inference_mode():
            found = run(model, ids[None], None, SEVERAL_LENGTHS[family])
        for index, path in enumerate(SEVERAL_LENGTHS[family]):
            hidden = expected[f"hidden_states.{index}"]
            spread = hidden.repeat_interleave(len(ids) // len(hidden), dim=0)
            torch.testing.assert_close(found[path][0], spread, rtol=0, atol=TOLERANCES[family], msg=name)


def test_final_in_batches_equals_the_official_code(family, model, outputs):
    """Padded where the model allows it; else with others of the same length."""
    tolerance = TOLERANCES.get(family, 1e-5)
    rows = [value for value in outputs.values() if len(value["input_ids"]) <= (model.max_length or 10**9)]
    if model.padding == "equal":
        batches = [[row, row] for row in rows]
    else:
        batches = [rows]
    for batch in batches:
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.full((len(batch), longest), model.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(batch):
            ids[index, : len(row["input_ids"])] = row["input_ids"].long()
            mask[index, : len(row["input_ids"])] = 1
        if model.padding == "equal":  # a neighbor that differs
            ids[1] = ids[1].flip(0)
            batch = batch[:1]
        _, final = states(model, ids, mask)
        for index, row in enumerate(batch):
            found = final[index, : len(row["input_ids"])]
            torch.testing.assert_close(found, row["final"], rtol=0, atol=tolerance)


def test_same_input_gives_the_same_bits_after_others(family, model, outputs):
    name = "len150" if "len150" in outputs else max(outputs, key=lambda key: len(outputs[key]["input_ids"]))
    ids = {key: value["input_ids"].long()[None] for key, value in outputs.items()}
    before = states(model, ids[name])[1]
    for other in ids.values():
        states(model, other)
    assert torch.equal(before, states(model, ids[name])[1])


def test_logits_equal_the_official_code(family, model, outputs):
    if family in ENCODERS_ONLY or not any("logits" in value for value in outputs.values()):
        pytest.skip("the official outputs hold no logits")
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForMaskedLM
    whole, info = auto.from_pretrained(
        GOLDEN / family, config=model.module.config, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"], info["missing_keys"]
    for name, expected in outputs.items():
        if "logits" in expected:
            with torch.inference_mode():
                found = whole.eval()(expected["input_ids"].long()[None]).logits[0]
            tolerance = TOLERANCES.get(family, 1e-5)
            torch.testing.assert_close(found, expected["logits"], rtol=0, atol=tolerance, msg=name)


def test_code_planted_in_the_folder_never_runs(family, tmp_path):
    folder = shutil.copytree(GOLDEN / family, tmp_path / "x")
    marker = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    named = [*(config.get("auto_map") or {}).values(), *(tokenizer.get("auto_map") or {}).values()]
    references = [name for value in named for name in (value if isinstance(value, list) else [value]) if name]
    for module in {reference.rpartition("--")[2].partition(".")[0] for reference in references} | {
        "modeling"
    }:
        (folder / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(7)\n")
    load_model(str(folder))
    load_model(str(folder), trust_remote_code=True)
    assert not marker.exists()


# --- commands on the folder as it lies ------------------------------------------------------------


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "in.fa"
    words = ["ACGTTGCAAGGT", "TTGACGATACCA", "GGCATCGATTAC", "CATGCATTGCGA"]
    rows = [f">r{i}\n{(words[i % 4] * 4)[: 30 + i % 5]}" for i in range(12)]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def labels(fasta):
    path = fasta.with_name("labels.tsv")
    path.write_text("id\tlabel\n" + "".join(f"r{i}\t{'ab'[i % 2]}\n" for i in range(12)))
    return path


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result


def test_extract_layers_and_probe_run_on_the_folder(family, fasta, labels, tmp_path):
    model = ("--model", GOLDEN / family)
    invoke("extract", fasta, *model, "--layer", 1, "-o", tmp_path / "a.h5")
    with open_embeddings(tmp_path / "a.h5") as embeddings:
        assert len(embeddings) == 12
    assert "0" in invoke("layers", model[1]).output
    invoke("probe", fasta, "--labels", labels, *model, "--layer", "0", "-o", tmp_path / "p", "--num-folds", 3)


def test_one_step_of_finetune_runs_on_the_folder(family, fasta, labels, tmp_path):
    run = tmp_path / "run"
    words = ("--task", "classification", "--labels", labels, "--model", GOLDEN / family, "--max-steps", 1)
    invoke("finetune", fasta, *words, "-o", run)
    invoke("predict", run, fasta, "-o", tmp_path / "out.tsv")


def test_score_runs_on_the_folder(family, fasta, tmp_path):
    if family in ENCODERS_ONLY:
        pytest.skip("it has no head")
    invoke("score", fasta, "--model", GOLDEN / family, "-o", tmp_path / "s.tsv")
