"""Interleaved timings, ratios and goals, and the pages they are filed on."""

from __future__ import annotations

import json

import measuring
import pytest
from measuring import Figure, Sample


def test_interleave_takes_turns_and_leaves_the_warm_up_out():
    calls = []
    samples = measuring.interleave(
        {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}, rounds=3
    )
    assert [len(found) for found in samples.values()] == [3, 3, 3]
    rounds = ["".join(calls[at : at + 3]) for at in range(0, 12, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({names[0] for names in rounds[1:]}) == 3


def test_interleave_stops_at_its_budget_but_not_before_the_fewest_rounds():
    calls = []
    samples = measuring.interleave(
        {"a": lambda: calls.append(1)}, rounds=50, budget_s=0.0, min_rounds=3, warm_up=False
    )
    assert len(samples["a"]) == len(calls) == 3


def test_ratio_is_the_median_of_pairs_not_the_ratio_of_medians():
    over = [Sample(2, 3, 0), Sample(30, 30, 0), Sample(4, 4, 0)]
    under = [Sample(1, 1, 0), Sample(10, 5, 0), Sample(4, 4, 0)]
    found = measuring.ratio("x", over, under, at_least=2.5)
    assert (found.value, found.low, found.high, found.cpu) == (2, 1, 3, 3)
    assert found.is_met is False


@pytest.mark.parametrize(
    ("figure", "is_met", "goal"),
    [
        (Figure(name="a", value=1.0), None, ""),
        (Figure(name="a", value=1.0, at_least=1.0), True, "at least 1"),
        (Figure(name="a", value=0.04, at_most=0.03), False, "at most 0.03"),
        (Figure(name="a", value=2.0, at_least=1.0, at_most=3.0), True, "at least 1 and at most 3"),
    ],
)
def test_figure_knows_its_goal(figure, is_met, goal):
    assert figure.is_met is is_met
    assert figure.goal == goal


def test_results_are_filed_for_people_and_programs(tmp_path, capsys):
    options = measuring.option_parser("x").parse_args(["--results", str(tmp_path), "--note", "busy"])
    measuring.file_results(
        "speed_x",
        "X",
        options,
        figures=[Figure(name="ratio", value=2.0, at_least=3.0)],
        tables={"Runs": [{"a": 1, "b": 0.12345}, {"a": 2, "c": "z"}], "None": []},
        remarks=["left out: y"],
    )
    stored = json.loads((tmp_path / "speed_x.json").read_text())
    page = (tmp_path / "speed_x.md").read_text()
    assert stored["figures"][0]["is_met"] is False
    assert stored["note"] == "busy"
    assert stored["tables"]["Runs"][1] == {"a": 2, "c": "z"}
    assert capsys.readouterr().out == page + "\n"
    assert "| ratio | 2 |  |  | at least 3 | no |" in page
    assert "| a | b | c |" in page
    assert "| 1 | 0.1235 |  |" in page
    assert "- left out: y" in page


def test_quick_runs_write_nothing_unless_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    options = measuring.option_parser("x").parse_args(["--quick"])
    measuring.file_results("speed_x", "X", options, figures=[], tables={})
    assert not list(tmp_path.iterdir())
