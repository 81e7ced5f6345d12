"""What a plan says must be what the run then does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import h5py
import pytest

from genoembed import extract, plan
from genoembed.cli.extract import say_plan
from genoembed.errors import ConfigError, StoreError
from tests.by_hand import STRIPED, model_of, random_dna, write_fasta

RECORDS = {f"record-{number}": random_dna(30 + 7 * number, number) for number in range(12)}


@pytest.fixture
def fasta(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_fasta(tmp_path / "in.fa", RECORDS | {"again": RECORDS["record-3"]})


def stored_bytes(path):
    """Bytes of all vectors of a file, and where records begin."""
    found = []

    def add(name, node):
        if isinstance(node, h5py.Dataset) and (name == "X" or name.startswith(("obsm/", "tokens/"))):
            found.append(node.size * node.dtype.itemsize)

    with h5py.File(path) as file:
        file.visititems(add)
    return sum(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": [0, "final"], "out_dtype": "float16"},
        {"layers": [0, 1], "fusion": "concat", "rc": "concat"},
        {"layers": [0, 1], "fusion": "mean", "rc": "mean", "window": 40, "stride": 25},
        {"per_window": True, "window": 40, "stride": 25},
        {"pooling": "none", "layers": [0, 1]},
        {"pooling": "none", "rc": "concat"},
        {"skip_first": 5, "unit_bases": 100},
    ],
)
@pytest.mark.parametrize("family", ["llama", STRIPED])
def test_plan_is_what_the_run_does(family, options, fasta, tmp_path):
    model = model_of(family)
    found = plan(fasta, model=model, output="out.h5", batch_tokens=256, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fa"]
    report = extract(fasta, model=model, output="out.h5", batch_tokens=256, **options)
    stats = report.stats
    assert (found.units, found.windows) == (stats.units, report.counts.windows)
    assert (found.tokens, found.batches, found.rows) == (stats.real_tokens, stats.batches, report.num_rows)
    assert found.padding_share == pytest.approx(stats.padding_share)
    assert found.counts.bases == report.counts.bases
    assert found.layers == report.layers
    assert found.vector_bytes == stored_bytes(tmp_path / "out.h5")
    assert found.vector_bytes < found.output_bytes < found.disk_bytes
    assert found.measured_batches == min(3, stats.batches)
    assert found.seconds > 0
    assert found.tokens_per_s > 0


def test_size_of_a_file_of_many_rows_is_near_the_estimate(tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {f"contig_{n} some words": random_dna(9, n) for n in range(4096)})
    model = model_of("llama")
    found = plan(fasta, model=model, layers=0, output=tmp_path / "out.h5")
    extract(fasta, model=model, layers=0, output=tmp_path / "out.h5")
    assert found.output_bytes == pytest.approx((tmp_path / "out.h5").stat().st_size, rel=0.15)


def test_shares_add_up_to_the_whole(fasta):
    model = model_of("llama")
    whole = plan(fasta, model=model, unit_bases=100)
    shares = [plan(fasta, model=model, unit_bases=100, shard=f"{number}/3") for number in (1, 2, 3)]
    for name in ("units", "windows", "rows", "tokens", "vector_bytes"):
        assert sum(getattr(share, name) for share in shares) == getattr(whole, name)
    assert [share.counts.records for share in shares] == [whole.counts.records] * 3


def test_finished_units_are_counted_and_their_time_is_not(fasta, tmp_path):
    settings = {"model": model_of("llama"), "unit_bases": 100, "output": "out.h5"}
    extract(fasta, shard="1/2", **settings)
    found = plan(fasta, **settings)
    assert found.units_finished == (found.units + 1) // 2
    assert plan(fasta, shard="1/2", **settings).seconds == 0
    assert plan(fasta, **settings, pooling="max").units_finished == 0


def test_input_without_records_has_nothing_to_measure(tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {"empty": ""})
    found = plan(fasta, model=model_of("llama"), empty="skip", output=tmp_path / "out.h5")
    assert (found.units, found.rows, found.tokens, found.measured_batches) == (0, 0, 0, 0)
    assert (found.seconds, found.tokens_per_s, found.widths) == (None, None, {"norm": 16})


def test_output_that_must_stay_is_refused(fasta, tmp_path):
    (tmp_path / "out.h5").write_bytes(b"precious")
    with pytest.raises(StoreError, match="exists already; set overwrite"):
        plan(fasta, model=model_of("llama"), output="out.h5")
    with pytest.raises(ConfigError, match="'pool' is not an option; did you mean 'pooling'"):
        plan(fasta, model=model_of("llama"), pool="max")


def test_long_sequence_is_measured_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr("genoembed.pipeline.forward.LEAST_BLOCK_TOKENS", 4)
    fasta = write_fasta(tmp_path / "in.fa", {"long": random_dna(64, 1)})
    lengths = []
    original = type(model_of(STRIPED)).forward_in_blocks

    def forward_in_blocks(model, batch, *arguments, **options):
        lengths.append(batch.input_ids.shape[1])
        original(model, batch, *arguments, **options)

    monkeypatch.setattr(type(model_of(STRIPED)), "forward_in_blocks", forward_in_blocks)
    found = plan(fasta, model=model_of(STRIPED), batch_tokens=4, output=tmp_path / "out.h5")
    assert lengths == [16, 16]
    assert found.tokens == 64


def test_command_prints_the_plan_and_writes_nothing(fasta, tmp_path, cli_here):
    from tests.by_hand import folder_of

    words = (
        "extract",
        "in.fa",
        "--model",
        folder_of("llama"),
        "--layer",
        0,
        "--dry-run",
        "-q",
        "--threads",
        1,
    )
    result = cli_here(*words)
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["input", "work", "model", "output", "disk", "memory", "time"]
    assert "13 rows: layers.0 x 16" in result.stdout
    found = json.loads(cli_here(*words, "--json").stdout)
    assert (found["rows"], found["widths"], found["output"]) == (13, {"layers.0": 16}, "in.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fa"]


def test_disk_that_is_too_small_is_warned_of(fasta, caplog, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    say_plan(plan(fasta, model=model_of("llama")), as_json=True)
    assert [text for text in caplog.messages if "of disk, and 1 kB are free" in text]


@pytest.fixture
def cli_here():
    from click.testing import CliRunner

    from genoembed.cli import main

    def run(*words):
        result = CliRunner().invoke(
            main, list(map(str, words)), prog_name="genoembed", catch_exceptions=False
        )
        assert result.exit_code == 0, result.stderr
        return result

    return run
