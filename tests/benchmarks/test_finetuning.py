"""Fine-tuning against plain features: the same rows for everybody, kept runs, honest tables."""

from __future__ import annotations

import json

import finetuning
import numpy as np
import pytest
import torch

from genoembed import CharTokenizer, StripedHyena2Config, StripedHyena2ForCausalLM


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    config = StripedHyena2Config(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4,
        hcs_layer_idxs=[0], hcm_layer_idxs=[1], hcl_layer_idxs=[2], attn_layer_idxs=[3],
        hcs_filter_groups=4, hcm_filter_groups=4, state_size=4,
    )  # fmt: skip
    StripedHyena2ForCausalLM(config).save_pretrained(folder)
    CharTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def labeled_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "labeled"
    folder.mkdir()
    lines = ["sequence\tlabel"]
    for row in range(120):
        letters = rng.choice(list("ACGT"), size=20, p=[0.4, 0.1, 0.1, 0.4] if row % 2 else [0.25] * 4)
        lines.append(f"{''.join(letters)}\t{'AT' if row % 2 else 'even'}")
    (folder / "at.tsv").write_text("\n".join(lines) + "\n")
    (folder / "at.groups").write_text("\n".join(str(row // 3) for row in range(120)) + "\n")
    return folder


@pytest.fixture
def labeled(labeled_folder):
    return finetuning.read_labeled(labeled_folder / "at.tsv")


def test_parts_cut_no_group_and_test_each_row_once(labeled):
    tested = []
    for seed in range(finetuning.NUM_FOLDS):
        parts = finetuning.part_rows(labeled, seed=seed)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(120))
        groups = [set(labeled.groups[rows]) for rows in parts]
        assert sum(map(len, groups)) == len(set.union(*groups))
        assert 5 < len(parts.validation) < 25
        tested += parts.test.tolist()
    assert sorted(tested) == list(range(120))


def test_tables_hold_the_rows_of_their_side(labeled, tmp_path):
    parts = finetuning.part_rows(labeled, seed=1)
    files = finetuning.write_tables(labeled, parts, tmp_path)
    header, *lines = files["test"].read_text().splitlines()
    assert header == "sequence\tlabel"
    expected = [f"{labeled.sequences[row].decode()}\t{labeled.target[row]}" for row in parts.test]
    assert lines == expected


def test_label_of_one_base_leaves_the_others_out(labeled, tmp_path):
    assert finetuning.label_of_base("IE", 4, 0.5) == ".,.,IE,."
    assert finetuning.label_of_base("1", 3, 0.99) == ".,.,1"
    files = finetuning.write_tables(labeled, finetuning.part_rows(labeled, seed=0), tmp_path, at_base=0.75)
    rows = files["validation"].read_text().splitlines()[1:]
    assert all(row.split("\t")[1].split(",").count(".") == 19 for row in rows)


def test_probe_candidates_are_every_fourth_block_and_places_where_asked():
    names = ["blocks.3 mean", "blocks.3.mlp.l3 mean", "blocks.4 mean", "blocks.0 windows", "blocks.1 bases"]
    assert finetuning.candidate_names(names, places=False) == ["blocks.3 mean"]
    assert finetuning.candidate_names(names, places=True) == [
        "blocks.3 mean", "blocks.0 windows", "blocks.1 bases",
    ]  # fmt: skip


def test_difference_is_of_the_best_on_each_side_and_a_loss_is_bold():
    scores = {
        "4-mer counts": {"mcc": [0.1, 0.3]}, "one-hot letters": {"mcc": [0.5, 0.5]},
        "lora": {"mcc": [0.2, 0.2]}, "full": {"mcc": [0.4, 0.5]}, "places": {"mcc": [0.9, 0.9]},
    }  # fmt: skip
    assert finetuning.difference(scores, "mcc") == "**-0.050 ± 0.071**"
    scores["full"] = {"mcc": [0.6, 0.6]}
    assert finetuning.difference(scores, "mcc") == "+0.100 ± 0.000"
    assert finetuning.difference({"full": scores["full"]}, "mcc") == "-"


def test_benchmark_measures_once_and_writes_what_it_measured(
    model_folder, labeled_folder, tmp_path, capsys, monkeypatch
):
    out, table = tmp_path / "out.json", tmp_path / "out.md"
    arguments = [str(labeled_folder), "--cache", str(tmp_path / "kept"), "--model", str(model_folder),
                 "--quick", "--sets", "at", "--json", str(out), "--markdown", str(table)]  # fmt: skip
    finetuning.main(arguments)
    (result,) = json.loads(out.read_text())["sets"]
    assert set(result["scores"]) == set(finetuning.TITLES) - {"places", "base"}
    assert result["split"] == "grouped"
    assert all(len(values["mcc"]) == 1 for values in result["scores"].values())
    assert result["details"]["full"][0]["steps"] == 2
    assert "| at |" in table.read_text()
    assert "| at |" in capsys.readouterr().out

    monkeypatch.setattr(finetuning, "fine_tune", None)  # what is measured is not measured again
    finetuning.main(arguments)
    assert json.loads(out.read_text())["sets"] == [result]
