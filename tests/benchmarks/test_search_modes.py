"""Search modes: the script on a table of a few rows."""

from __future__ import annotations

import json

import numpy as np
import search_modes


def test_modes_are_measured_and_filed(tmp_path, capsys):
    random = np.random.default_rng(0)
    rows = ["".join(random.choice(list(letters), 60)) for letters in ("ACGT", "AATC") for _ in range(15)]
    table = tmp_path / "toy.tsv"
    labels = ["even"] * 15 + ["rich"] * 15
    table.write_text("sequence\tlabel\n" + "".join(map("{}\t{}\n".format, rows, labels)))
    words = [str(table), "--layer", "1", "--fragments", "4", "--output", str(tmp_path / "out.json")]
    search_modes.main(words)
    (found,) = json.loads((tmp_path / "out.json").read_text())["sets"]
    assert found["rows"] == 30
    (layer,) = found["class"]
    assert set(found["class"][layer]["vectors as they are"]) == {"p10", "nn"}
    assert found["source"][layer]["k-mers"][0] == 1  # a fragment with three letters in sixty replaced
    assert "| k-mers | 1.000 |" in (tmp_path / "out.md").read_text()
    assert "## toy: 30 rows, chance 0.500" in capsys.readouterr().out
