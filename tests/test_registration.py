"""``import genoembed`` teaches transformers our classes in every import order, and imports nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from genoembed import CharTokenizer, StripedHyena2Model
from tests.models.test_striped_hyena2_model import tiny_config

OPENERS = {
    "AutoConfig": "StripedHyena2Config",
    "AutoModel": "StripedHyena2Model",
    "AutoModelForCausalLM": "StripedHyena2ForCausalLM",
    "AutoTokenizer": "CharTokenizer",
}
STEPS = {
    "genoembed": "import genoembed",
    "transformers": "import transformers",
    "auto classes": "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer",
    "auto modules": "from transformers.models.auto import modeling_auto, tokenization_auto",
    "our configuration": "import genoembed.models.striped_hyena2.configuration",
    "our blocks": "import genoembed.models.striped_hyena2.blocks",
    "our initialization": "import genoembed.models.striped_hyena2.modeling",
    "our model": "import genoembed.models.striped_hyena2.modeling",
    "our tokenizer": "import genoembed.tokenization.char",
    "our name": "from genoembed import StripedHyena2ForCausalLM, CharTokenizer",
    "torch": "import torch",
}
ORDERS = [
    ("genoembed",),
    ("transformers", "genoembed"),
    ("auto classes", "genoembed"),
    ("our model",),
    ("our blocks",),
    ("our initialization",),
    ("our tokenizer",),
    ("auto modules", "our tokenizer"),
    ("torch", "transformers", "our configuration", "our name"),
]


def run(code: str) -> str:
    """Run code in a fresh interpreter; its standard output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("registration")
    StripedHyena2Model(tiny_config()).save_pretrained(path)
    CharTokenizer().save_pretrained(path)
    return path


def run_forked(codes: list[str]) -> list[str]:
    """Run each code in a process that has imported other packages, but not transformers nor genoembed.

    A first child finds out which packages those are. Importing them once saves most of the time.
    """
    driver = """
import importlib, json, os, sys

def fork(code):
    child = os.fork()
    if child == 0:
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)

def tested():
    return [name for name in sys.modules if name.partition(".")[0] in ("transformers", "genoembed")]

codes, listing = json.load(sys.stdin)
fork("import genoembed, json, sys; genoembed.StripedHyena2ForCausalLM, genoembed.CharTokenizer;"
     f"json.dump([name for name in sys.modules], open({listing!r}, 'w'))")
for name in json.load(open(listing)):
    if name.partition(".")[0] not in ("transformers", "genoembed", "__main__"):
        try:
            importlib.import_module(name)
        except Exception:
            pass
for code in codes:
    assert not tested()
    fork(code)
"""
    with tempfile.TemporaryDirectory() as scratch:
        given = json.dumps([codes, str(Path(scratch) / "modules.json")])
        done = subprocess.run(
            [sys.executable, "-c", driver], input=given, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = done.stdout.splitlines()
    assert len(answers) == len(codes), done.stderr[-2000:]
    return answers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so as to import torch once")
def test_auto_classes_open_our_folder_in_every_import_order(folder) -> None:
    body = (
        "; import transformers; print(*(type(getattr(transformers, name).from_pretrained("
        f"{str(folder)!r})).__name__ for name in {list(OPENERS)}))"
    )
    # one class alone must be enough too: transformers then loads less of itself
    alone = ["AutoConfig", "AutoTokenizer"]
    codes = ["; ".join(STEPS[step] for step in order) + body for order in ORDERS] + [
        f"import genoembed; from transformers import {opener}; "
        f"print(type({opener}.from_pretrained({str(folder)!r})).__name__)"
        for opener in alone
    ]
    expected = [" ".join(OPENERS.values())] * len(ORDERS) + [OPENERS[opener] for opener in alone]
    assert run_forked(codes) == expected


def test_fresh_process_opens_our_folder(folder) -> None:
    code = (
        "import genoembed; from transformers import AutoModel; "
        f"print(type(AutoModel.from_pretrained({str(folder)!r})).__name__)"
    )
    assert run(code) == "StripedHyena2Model"


def test_importing_genoembed_loads_neither_torch_nor_transformers() -> None:
    heavy = "('torch', 'transformers', 'numpy', 'h5py')"
    assert run(f"import genoembed, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_installing_twice_changes_nothing() -> None:
    code = """
import sys, genoembed
from genoembed import registration
registration.install()
print(sum(type(finder).__name__ == "_AutoClassWatcher" for finder in sys.meta_path))
import transformers.models.auto.configuration_auto as auto
registration.install()
print(type(auto.AutoConfig.for_model("striped_hyena2")) is genoembed.StripedHyena2Config)
"""
    assert run(code).split() == ["1", "True"]


def test_watched_modules_keep_their_source_and_reload() -> None:
    # inspect, debuggers and importlib.reload ask the loader for more than running the module
    code = """
import genoembed, importlib, inspect
import transformers.models.auto.configuration_auto as auto
from genoembed.models.striped_hyena2 import configuration
print("class AutoConfig" in inspect.getsource(auto))
print("class StripedHyena2Config" in inspect.getsource(configuration))
importlib.reload(auto)
print(auto.AutoConfig.for_model("striped_hyena2").model_type)
"""
    assert run(code).split() == ["True", "True", "striped_hyena2"]
