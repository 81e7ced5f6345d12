"""The probe over labeled sets: features as pooling gives them, kept and found again, on the same folds."""

from __future__ import annotations

import json

import labelled_features
import labelled_probe
import numpy as np
import pytest
import torch

from genoembed import CharTokenizer, StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.pooling.reduce import pool
from genoembed.sequences.composition import BASELINES


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
def few_folds(monkeypatch):
    """Three folds instead of five: penalties are chosen inside each, so time grows with the square."""
    monkeypatch.setattr(labelled_probe, "NUM_FOLDS", 3)


@pytest.fixture
def labeled_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "labeled"
    folder.mkdir()
    lines = ["sequence\tlabel"]
    for row in range(60):
        letters = rng.choice(list("ACGT"), size=20, p=[0.4, 0.1, 0.1, 0.4] if row % 2 else [0.25] * 4)
        lines.append(f"{''.join(letters)}\t{'AT' if row % 2 else 'even'}")
    (folder / "at.tsv").write_text("\n".join(lines) + "\n")
    (folder / "at.groups").write_text("\n".join(str(row // 3) for row in range(60)) + "\n")
    values = [f"{line.split(chr(9))[0]}{'GA' * (row % 3)}\t{row % 7 - 3.5}" for row, line in enumerate(lines)]
    (folder / "length.tsv").write_text("\n".join([lines[0], *values[1:]]) + "\n")
    return folder


def test_read_labeled_tells_classes_from_values(labeled_folder):
    classes = labelled_features.read_labeled(labeled_folder / "at.tsv", max_rows=31)
    assert (classes.task, len(classes.sequences), len(classes.groups)) == ("classification", 31, 31)
    values = labelled_features.read_labeled(labeled_folder / "length.tsv")
    assert (values.task, values.groups, values.target[0]) == ("regression", None, -2.5)


def test_read_labeled_refuses_tables_and_groups_of_another_form(labeled_folder):
    (labeled_folder / "at.groups").write_text("1\n2\n")
    with pytest.raises(ValueError, match="2 groups, expected 60"):
        labelled_features.read_labeled(labeled_folder / "at.tsv")
    (labeled_folder / "bad.tsv").write_text("seq,label\nACGT,1\n")
    with pytest.raises(ValueError, match="not a table of sequence and label"):
        labelled_features.read_labeled(labeled_folder / "bad.tsv")


def test_window_means_and_pools_leave_padding_out():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 20, 3, generator=rng)
    mask = torch.arange(20)[None] < torch.tensor([[20], [11]])
    hidden[1, 11:] = torch.nan
    means = labelled_features.window_means(hidden, mask)
    for row, length in enumerate((20, 11)):
        window = np.arange(length) * 8 // length
        for number in range(8):
            expected = hidden[row, :length][window == number].mean(0)
            torch.testing.assert_close(means[row, number], expected)
    pools = labelled_features.pool_all(hidden, mask)
    torch.testing.assert_close(pools[1, 1], hidden[1, :11].amax(0))
    torch.testing.assert_close(pools[1, 3], hidden[1, :11].std(0, correction=0))


def test_window_means_of_short_sequences_are_zero_where_no_base_falls():
    means = labelled_features.window_means(torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
    assert means[0, :, 0].tolist() == [1, 0, 1, 0, 0, 1, 0, 0]


def test_captured_features_are_the_states_of_the_sequences_alone(model_folder, labeled_folder, tmp_path):
    labeled = labelled_features.read_labeled(labeled_folder / "length.tsv")
    model, weights = labelled_features.load_which(str(model_folder), "trained", dtype="float32", seed=0)
    features = labelled_features.capture_features(model, weights, labeled, tmp_path / "kept", max_tokens=90)
    assert next(iter(features)) == "blocks.0.mlp.l3 mean"
    assert len(features) == 8 * 4 + 1
    ids = torch.tensor([list(labeled.sequences[7])])
    states = {}
    handle = model.module.blocks[2].register_forward_hook(lambda _m, _i, out: states.update(out=out))
    with torch.inference_mode():
        model.module(ids)
    handle.remove()
    hidden = states["out"][0] if isinstance(states["out"], tuple) else states["out"]
    expected = pool(hidden, torch.ones(1, len(ids[0]), dtype=torch.bool), method="weighted_mean")[0]
    np.testing.assert_allclose(features["blocks.2 weighted_mean"][7], expected, rtol=2e-3, atol=1e-4)


def test_untrained_copy_is_seeded_and_another_model(model_folder):
    (first, told), (again, same), (other, differs) = (
        labelled_features.load_which(str(model_folder), "untrained", dtype="float32", seed=seed)
        for seed in (0, 0, 1)
    )
    trained, _ = labelled_features.load_which(str(model_folder), "trained", dtype="float32", seed=0)
    name = "blocks.1.mlp.l3.weight"
    weights = [model.module.get_parameter(name) for model in (first, again, other, trained)]
    assert told == same != differs
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_benchmark_measures_once_and_goes_on_where_it_was(
    model_folder, labeled_folder, few_folds, tmp_path, capsys, monkeypatch
):
    out, table = tmp_path / "out.json", tmp_path / "out.md"
    arguments = [str(labeled_folder), "--cache", str(tmp_path / "kept"), "--model", str(model_folder),
                 "--dtype", "float32", "--strands", "both", "--json", str(out), "--markdown", str(table),
                 "--drop-features"]  # fmt: skip
    labelled_probe.main([*arguments, "--sets", "at"])
    first = json.loads(out.read_text())["sets"]
    assert [result["set"] for result in first] == ["at"]
    assert first[0]["folds"] == "grouped"
    assert set(first[0]["baselines"]) == set(BASELINES)
    assert set(first[0]["models"]) == {"trained", "untrained"}
    assert first[0]["models"]["trained"]["metrics"]["accuracy"]["mean"] > 0.6
    assert "blocks.3 weighted_mean rc" in first[0]["models"]["untrained"]["candidates"]
    assert not any(path.is_dir() for path in (tmp_path / "kept").iterdir())

    monkeypatch.setattr(labelled_probe, "score_block", None)  # what is measured is not measured again
    labelled_probe.main([*arguments, "--sets", "at"])
    assert json.loads(out.read_text())["sets"] == first
    assert "| at | 60 | grouped |" in table.read_text()
    assert "| at | 60 | grouped |" in capsys.readouterr().out


def test_benchmark_measures_values_of_sequences_of_many_lengths(
    model_folder, labeled_folder, few_folds, tmp_path
):
    out = tmp_path / "out.json"
    places = [str(labeled_folder), "--cache", str(tmp_path / "kept"), "--model", str(model_folder)]
    labelled_probe.main([*places, "--dtype", "float32", "--sets", "length", "--json", str(out)])
    (result,) = json.loads(out.read_text())["sets"]
    assert (result["task"], result["folds"]) == ("regression", "stratified")
    assert set(result["baselines"]) == set(list(BASELINES)[:3])
    assert set(result["models"]["trained"]["metrics"]) == {"r2", "pearson", "spearman"}


def test_fusions_spread_over_the_depth_and_both_strands():
    layers = [f"blocks.{number}.mlp.l3" for number in range(32)]
    blocks = [f"blocks.{number}" for number in range(32)]
    names = [f"{path} {pool}" for path in (*layers, *blocks) for pool in labelled_features.POOLS]
    names += [f"{path} windows" for path in blocks[::4]]
    fusions = labelled_probe.fusions_of([*names, *(f"{name} rc" for name in names)], (*layers, *blocks))
    assert fusions["4 blocks mean"] == tuple(f"blocks.{number} mean" for number in (4, 12, 20, 28))
    assert fusions["4 layers mean, both strands"][4:] == tuple(
        f"blocks.{number}.mlp.l3 mean rc" for number in (4, 12, 20, 28)
    )
    assert fusions["windows and means"] == ("blocks.8 windows", "blocks.8 mean", "blocks.24 mean")
    assert {name for members in fusions.values() for name in members} <= {
        *names, *(f"{name} rc" for name in names)
    }  # fmt: skip
    assert not any("both strands" in name for name in labelled_probe.fusions_of(names, (*layers, *blocks)))


def test_find_sets_names_what_is_missing(labeled_folder):
    assert [path.stem for path in labelled_probe.find_sets(labeled_folder, None)] == ["at", "length"]
    with pytest.raises(ValueError, match=r"\['att'\] not there; it has at, length"):
        labelled_probe.find_sets(labeled_folder, ["att"])
