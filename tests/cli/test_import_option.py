"""``--import``: kinds of models that an installed package registers, and what goes wrong with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from genoembed.cli import COMMANDS, main
from genoembed.store.reader import open_embeddings
from tests.tiny_models import _CUSTOM_CODE as CODE
from tests.tiny_models import build_tiny

PACKAGE = """
from transformers import AutoConfig, AutoModel

from their_models.network import TinyConvConfig, TinyConvModel

TinyConvConfig.model_type = "their_conv"
AutoConfig.register("their_conv", TinyConvConfig)
AutoModel.register(TinyConvConfig, TinyConvModel)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Lay out a package on the path, a folder of its kind of model, and sequences."""
    root = tmp_path_factory.mktemp("import")
    package = root / "site" / "their_models"
    package.mkdir(parents=True)
    (package / "network.py").write_text(CODE)
    (package / "__init__.py").write_text(PACKAGE)
    for name, text in (("broken", "1 / 0\n"), ("wanting", "import no_such_module_at_all\n")):
        (root / "site" / f"{name}.py").write_text(text)
    folder = build_tiny("custom_conv", root / "model")
    for path in folder.glob("*.py"):
        path.unlink()
    values = json.loads((folder / "config.json").read_text())
    del values["auto_map"]
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "their_conv"}))
    (root / "in.fa").write_text("".join(f">r{i}\n{'ACGTTGCA' * (i % 3 + 1)}\n" for i in range(12)))
    rows = "".join(f"r{i}\t{'ab'[i % 2]}\n" for i in range(12))
    (root / "labels.tsv").write_text(f"id\tlabel\n{rows}")
    return root


@pytest.fixture
def run(place, warm):
    """Run a command where the package is installed."""

    def run(*words):
        return warm.run(*words, cwd=place, patch=f"import sys; sys.path.insert(0, {str(place / 'site')!r})")

    return run


def test_kind_of_a_package_loads_and_the_file_says_whose_it_is(place, run):
    output = place / "a.h5"
    words = ("extract", place / "in.fa", "--model", "model", "-o", output, "--overwrite")
    without = CliRunner().invoke(
        main, [*map(str, words[:2]), "--model", str(place / "model"), "-o", str(output)]
    )
    assert without.exit_code == 1
    assert "import the package that registers it" in without.output
    found = run(*words, "--import", "their_models")
    assert found.code == 0, found.err
    with open_embeddings(output) as embeddings:
        made = embeddings.provenance["model"]
    assert made["code"] == {"module": "their_models.network", "package": "their_models", "version": None}
    assert {"__init__.py", "network.py"} <= set(made["content"])
    checked = run("verify", output, "in.fa", "--import", "their_models")
    assert checked.code == 0, checked.err


def test_training_imports_it_too(run):
    learn = ("finetune", "in.fa", "--task", "classification", "--labels", "labels.tsv", "--model", "model")
    found = run(*learn, "--max-steps", 1, "-o", "run", "--import", "their_models")
    assert found.code == 0, found.err


@pytest.mark.parametrize(
    ("module", "code", "words"),
    [
        ("their_modles", 2, "no package their_modles is installed here; install it, or check the name"),
        ("json.nothing", 2, r"no package json\.nothing is installed here"),
        ("./their_models", 2, "expected the name of an installed package, such as my_models"),
        ("wanting", 2, "it needs no_such_module_at_all, which is not installed here; install it"),
        ("broken", 1, r"failed at .*broken\.py:1 \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(module, code, words, place, monkeypatch):
    monkeypatch.syspath_prepend(str(place / "site"))
    found = CliRunner().invoke(main, ["layers", str(place / "model"), "--import", module])
    assert found.exit_code == code
    assert re.search(rf"--import {re.escape(module)}: .*{words}", found.output), found.output


def test_every_command_that_loads_models_has_it():
    for name in COMMANDS:
        names = {word for parameter in main.get_command(None, name).params for word in parameter.opts}
        assert ("--import" in names) is ("--trust-remote-code" in names), name


def test_workers_import_what_is_registered_here(place):
    code = (
        "import genoembed.registration as r, their_models, transformers; genoembed = r; "
        "print(r.packages_of_others())"
    )
    path = os.pathsep.join([str(place / "site"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert found.stdout == "('their_models',)\n"
