"""Retrieval of mutated fragments: families held out whole, and two questions asked of each ranking."""

from __future__ import annotations

import json

import numpy as np
import pytest
import retrieval
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


def random_dna(length, rng):
    return bytes(rng.choice(list(b"ACGT"), size=length).tolist())


def test_families_are_held_out_whole():
    groups = np.array([0, 0, 0, 1, 1, *range(2, 60), 60, 60, 61, 61, 62, 62, 63, 63, 64, 64])
    sides = retrieval.part_families(groups, seed=0)
    assert sorted(np.concatenate(sides).tolist()) == list(range(len(groups)))
    families = [set(groups[rows]) for rows in sides]
    assert sum(map(len, families)) == len(set.union(*families))
    assert len(sides.test) == pytest.approx(len(groups) / 5, abs=4)


def test_query_is_a_fragment_with_substitutions_at_the_rate():
    rng = np.random.default_rng(0)
    document = random_dna(4000, rng)
    same = retrieval.cut_query(document, 7, rng, bases=60, rate=0.0)
    assert (same.document, len(same.sequence)) == (7, 60)
    assert same.sequence in document
    query = retrieval.cut_query(document, 7, rng, bases=4000, rate=0.3)
    changed = np.mean([a != b for a, b in zip(query.sequence, document, strict=True)])
    assert changed == pytest.approx(0.3, abs=0.03)
    assert len(retrieval.cut_query(b"ACGT", 0, rng, bases=60, rate=0.5).sequence) == 4


def test_jaccard_is_that_of_canonical_kmer_sets():
    # ACG and CGT are one canonical 3-mer; GTA and TAC another
    scores = retrieval.jaccard_scores([b"ACGT", b"GTAC"], [b"ACG", b"ACGTA", b"TTT"], k=3)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 0.0]]))


def test_ranking_asks_for_the_source_and_without_it_for_a_relative():
    groups = np.array([5, 5, 9])
    queries = [retrieval.Query(b"A", 0, 0.05), retrieval.Query(b"A", 2, 0.3)]
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]])
    found = retrieval.measure_ranking(scores, queries, groups)
    assert found["source"]["all"]["mrr"] == 0.75
    assert found["source"]["5%"]["recall_at_1"] == 1
    assert found["source"]["30%"]["recall_at_1"] == 0
    # the second query has no relative; the first finds one behind a stranger
    assert found["family"]["all"] == {
        "mrr": 0.5, "recall_at_1": 0.0, "recall_at_10": 1.0, "ranked_queries": 1.0,
    }  # fmt: skip
    assert "30%" not in found["family"]


def test_examples_have_the_document_as_positive_and_its_family_as_group(tmp_path):
    rng = np.random.default_rng(1)
    documents = [random_dna(40, rng) for _ in range(4)]
    path = retrieval.write_examples(
        tmp_path / "a" / "b.jsonl", documents, np.array([3, 3, 4, 5]), np.array([1, 3]),
        bases=20, copies=2, seed=0,
    )  # fmt: skip
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["pos"] for row in rows] == [[documents[i].decode()] for i in (1, 3, 1, 3)]
    assert [row["group"] for row in rows] == ["3", "5", "3", "5"]
    assert rows[0]["query"] != rows[2]["query"]


def test_benchmark_trains_and_measures_before_and_after(model_folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines, groups = ["sequence\tlabel"], []
    for family in range(40):
        parent = random_dna(60, rng)
        for _ in range(1 + family % 2):
            child = retrieval.cut_query(parent, 0, rng, bases=60, rate=0.1).sequence
            lines.append(f"{child.decode()}\tgene")
            groups.append(str(family))
    table, out = tmp_path / "genes.tsv", tmp_path / "out.json"
    table.write_text("\n".join(lines) + "\n")
    arguments = [str(table), "--cache", str(tmp_path / "kept"), "--model", str(model_folder), "--quick",
                 "--json", str(out), "--markdown", str(tmp_path / "out.md")]  # fmt: skip
    with pytest.raises(SystemExit, match="no families"):
        retrieval.main(arguments)
    table.with_suffix(".groups").write_text("\n".join(groups) + "\n")
    retrieval.main(arguments)
    found = json.loads(out.read_text())["found"]
    assert set(found) == {"k-mers", "before", "before, spent", "all heads", "all heads, spent"}
    assert set(found["before"][0]) == set(found["all heads"][0]) == {
        "dense", "sparse", "multi_vector", retrieval.USUAL, retrieval.OWN,
    }  # fmt: skip
    # before training, the sparse head weighs all terms alike
    assert found["before"][0]["sparse"]["source"]["5%"]["recall_at_1"] > 0.8
    assert found["all heads, spent"][0]["steps"] == 2
    assert len(found["all heads, spent"][0]["hybrid_weights"]) == 3
    assert "| all heads | hybrid, own weights |" in capsys.readouterr().out
