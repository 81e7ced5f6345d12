"""The folder of a training run: one process, the old run until the new one is complete, no foreign folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from genoembed.atomic import partial_of, replacing_folder
from genoembed.config.finetune import FinetuneRecipe
from genoembed.config.pretrain import TeacherConfig, VectorLossConfig
from genoembed.config.training import OptimizerConfig
from genoembed.errors import ConfigError, StoreError
from genoembed.finetuning import training as finetuning
from genoembed.pretraining import training as pretraining
from genoembed.training.run_folder import (
    ResumeRules,
    claimed_run,
    files_digest,
    newest_checkpoint,
    write_json,
)

RULES = ResumeRules(digests={"rows": "the rows are not those of"}, harmless=("logging_steps",))
ASKED = {"recipe": {"seed": 0, "logging_steps": 10, "max_steps": 4}, "rows": "a"}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_checkpoint(folder, step):
    with replacing_folder(folder / f"checkpoint-{step}", overwrite=True) as part:
        (part / "model.safetensors").write_bytes(b"weights")
        write_json(part / "trainer_state.json", {"global_step": step})


def finish_run(folder, asked=ASKED, *, text="trained", **claim):
    """Make a run, from its start to its report."""
    with claimed_run(folder, **{"resume": False, "overwrite": False, **claim}) as run:
        run.begin(asked, resume=False)
        write_checkpoint(run.path, 4)
        with replacing_folder(run.path / "final", overwrite=True) as part:
            (part / "weights").write_text(text)
        run.finish({"steps": 4})


def test_complete_run_is_returned_and_no_other(tmp_path):
    folder = tmp_path / "run"
    finish_run(folder)
    with claimed_run(folder, resume=True, overwrite=False) as run:
        assert run.resume(ASKED, RULES) == {"steps": 4}
        same = {**ASKED, "recipe": {**ASKED["recipe"], "logging_steps": 1}}
        assert run.resume(same, RULES) == {"steps": 4}
        with pytest.raises(ConfigError, match="rows: the rows are not those of the run in"):
            run.resume({**ASKED, "rows": "b"}, RULES)
        with pytest.raises(ConfigError, match=r"seed: 1, but 0 in .*; set seed to 0"):
            run.resume({**ASKED, "recipe": {**ASKED["recipe"], "seed": 1}}, RULES)
        assert run.path == folder
    (folder / "final" / "weights").unlink()
    with claimed_run(folder, resume=True, overwrite=False) as run:
        assert run.resume(ASKED, RULES) is None


def test_larger_number_is_allowed_where_it_changes_nothing_that_is_done(tmp_path):
    finish_run(tmp_path / "run")
    more = {**ASKED, "recipe": {**ASKED["recipe"], "max_steps": 9}}
    less = {**ASKED, "recipe": {**ASKED["recipe"], "max_steps": 2}}
    growing = ResumeRules(digests={}, may_grow=("max_steps",), harmless=("logging_steps",))
    with claimed_run(tmp_path / "run", resume=True, overwrite=False) as run:
        assert run.resume(more, growing) is None
        for asked, rules in ((more, RULES), (less, growing)):
            with pytest.raises(ConfigError, match="max_steps: "):
                run.resume(asked, rules)


def test_second_process_is_refused_from_the_first_moment(tmp_path):
    code = (
        "import sys; from genoembed.training.run_folder import claimed_run\n"
        "with claimed_run(sys.argv[1], resume=False, overwrite=sys.argv[2] == 'over'):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    finish_run(tmp_path / "old")
    for name, mode in (("new", "-"), ("old", "over")):
        folder = tmp_path / name
        first = subprocess.Popen(
            [sys.executable, "-c", code, folder, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert first.stdout.readline() == b"in\n"
        for claim in ({"resume": False, "overwrite": True}, {"resume": True, "overwrite": False}):
            with pytest.raises(StoreError, match="is being written by another process"):
                with claimed_run(folder, **claim):
                    pytest.fail("two runs in one folder")
        first.communicate()
        assert first.returncode == 0
    assert not (tmp_path / "new").exists()
    assert names_in(tmp_path) == ["old"]


def test_old_run_stays_until_the_new_one_is_complete(tmp_path):
    folder = tmp_path / "run"
    finish_run(folder, text="old")
    other = {**ASKED, "rows": "b"}

    def fail_after_a_checkpoint():
        with claimed_run(folder, resume=False, overwrite=True) as run:
            assert run.is_replacement
            run.begin(other, resume=False)
            write_checkpoint(run.path, 2)
            raise RuntimeError("a bad record")

    with pytest.raises(RuntimeError, match="a bad record"):
        fail_after_a_checkpoint()
    assert (folder / "final" / "weights").read_text() == "old"
    with pytest.raises(ConfigError, match="a run that is to replace it is not complete yet"):
        with claimed_run(folder, resume=False, overwrite=False):
            pytest.fail("there is an unfinished run")
    with claimed_run(folder, resume=True, overwrite=False) as run:
        assert run.resume(ASKED, RULES) == {"steps": 4}, "the old run is complete, and still there"
        assert run.resume(other, RULES) is None
        assert run.begin(other, resume=True).name == "checkpoint-2"
        with replacing_folder(run.path / "final", overwrite=True) as part:
            (part / "weights").write_text("new")
        run.finish({"steps": 5})
    assert (folder / "final" / "weights").read_text() == "new"
    assert names_in(tmp_path) == ["run"]
    assert names_in(folder) == ["checkpoint-2", "final", "report.json", "run.json"]


def test_folder_that_is_no_run_is_never_written_into_and_foreign_files_are_never_deleted(tmp_path):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"holds no run.json, so it is not a training run"):
            with claimed_run(thesis, resume=False, overwrite=overwrite):
                pytest.fail("not ours")
    finish_run(tmp_path / "run")
    for place in ("notes.txt", "final/notes.txt", "checkpoint-4/notes.txt"):
        (tmp_path / "run" / place).write_text("mine")
        with pytest.raises(StoreError, match=r"holds 'notes.txt', which genoembed did not write"):
            with claimed_run(tmp_path / "run", resume=False, overwrite=True):
                pytest.fail("not ours")
        (tmp_path / "run" / place).unlink()
    assert (thesis / "thesis.txt").read_text() == "mine"
    assert names_in(tmp_path) == ["run", "thesis"]
    assert (tmp_path / "run" / "report.json").exists()


def test_file_put_into_the_old_run_meanwhile_is_not_deleted(tmp_path):
    finish_run(tmp_path / "run", text="old")

    def train():
        with claimed_run(tmp_path / "run", resume=False, overwrite=True) as run:
            run.begin(ASKED, resume=False)
            with replacing_folder(run.path / "final", overwrite=True) as part:
                (part / "weights").write_text("new")
            (tmp_path / "run" / "notes.txt").write_text("mine")
            run.finish({"steps": 5})

    with pytest.raises(StoreError, match=r"holds 'notes.txt'"):
        train()
    (tmp_path / "run" / "notes.txt").rename(tmp_path / "notes.txt")
    with claimed_run(tmp_path / "run", resume=True, overwrite=False) as run:
        assert run.resume(ASKED, RULES) == {"steps": 5}
    assert (tmp_path / "run" / "final" / "weights").read_text() == "new"


def test_rerun_removes_what_killed_processes_left(tmp_path):
    folder = tmp_path / "run"
    finish_run(folder)
    for name in (".final.partial", ".checkpoint-9.partial", ".saving"):
        (folder / name).mkdir()
        (folder / name / "half").write_text("")
    (folder / ".run.json.partial").write_text("{")
    # killed after the exchange, before the old run was gone
    old = partial_of(folder)
    old.mkdir()
    write_json(old / "run.json", {})
    with claimed_run(folder, resume=True, overwrite=False) as run:
        assert run.path == folder
    assert names_in(folder) == ["checkpoint-4", "final", "report.json", "run.json"]
    assert names_in(tmp_path) == ["run"]


def test_a_run_of_an_earlier_version_did_what_a_new_option_does_by_default(tmp_path):
    asked = {"recipe": {"seed": 1, "optim": "adamw"}}
    rules = ResumeRules(digests={}, newer={"optim": "adamw"})
    with claimed_run(tmp_path / "run", resume=False, overwrite=False) as run:
        run.begin({"recipe": {"seed": 1}}, resume=False)
    with claimed_run(tmp_path / "run", resume=True, overwrite=False) as run:
        assert run.resume(asked, rules) is None
        for other in ({"seed": 1, "optim": "sgd"}, {"seed": 2, "optim": "adamw"}):
            with pytest.raises(ConfigError, match="or overwrite to start again"):
                run.resume({"recipe": other}, rules)


def test_half_written_checkpoint_is_never_gone_on_from(tmp_path):
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "genoembed_folder.json").unlink()
    assert newest_checkpoint(tmp_path) is None


def test_folders_made_for_a_run_that_was_refused_go_again(tmp_path):
    with pytest.raises(ConfigError, match="no labels"):
        with claimed_run(tmp_path / "a" / "b", resume=False, overwrite=False):
            raise ConfigError("no labels")
    with pytest.raises(ConfigError, match=r"resume: no run in .*, which does not exist"):
        with claimed_run(tmp_path / "a" / "b", resume=True, overwrite=False):
            pytest.fail("there is no run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, expected a folder"):
        with claimed_run(tmp_path / "file", resume=False, overwrite=True):
            pytest.fail("a file")


@pytest.mark.parametrize("has_old", [False, True])
def test_run_killed_before_it_began_is_gone_on_with_from_the_start(tmp_path, has_old):
    if has_old:
        finish_run(tmp_path / "run", text="old")
        partial_of(tmp_path / "run").mkdir()
    else:
        (tmp_path / "run").mkdir()
    other = {**ASKED, "rows": "b"}
    for expected in (None, {"steps": 5}):
        with claimed_run(tmp_path / "run", resume=True, overwrite=has_old) as run:
            assert run.resume(other, RULES) == expected
            if expected is None:
                assert run.begin(other, resume=True) is None
                with replacing_folder(run.path / "final", overwrite=True) as part:
                    (part / "weights").write_text("new")
                run.finish({"steps": 5})
    assert (tmp_path / "run" / "final" / "weights").read_text() == "new"
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("begins", "expected"), [(False, "run is as it was; run the same again"), (True, "checkpoint-2 is kept")]
)
def test_interruption_says_what_is_kept(tmp_path, begins, expected):
    finish_run(tmp_path / "run")

    def train():
        with claimed_run(tmp_path / "run", resume=False, overwrite=True) as run:
            if begins:
                run.begin(ASKED, resume=False)
                write_checkpoint(run.path, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=expected):
        train()


def test_json_of_a_run_never_holds_what_json_has_not(tmp_path):
    write_json(tmp_path / "a.json", {"loss": float("nan"), "all": [float("inf"), 1.5]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "all": [None, 1.5]}


def test_digest_of_files_is_that_of_their_contents_in_order(tmp_path):
    for name, text in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / name).write_text(text)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert files_digest([a, b]) == files_digest([c, b])
    assert len({files_digest(files) for files in ([a, b], [b, a], [a], [a, c])}) == 4


def test_options_that_runs_of_earlier_versions_lack_are_taken_for_their_defaults():
    defaults = {name: OptimizerConfig.options()[name].default for name in ("optim", "distributed")}
    assert pretraining._RULES.newer == {
        **defaults,
        **VectorLossConfig().to_flat(),
        **TeacherConfig().to_flat(),
    }
    assert finetuning._resume_rules(FinetuneRecipe()).newer == defaults
