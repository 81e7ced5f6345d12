"""What other people's code raises reaches the user as one line that says whose code failed, and where."""

from __future__ import annotations

import shutil

import pytest
import torch
from click.testing import CliRunner

from genoembed import embed
from genoembed.cli import main
from genoembed.errors import ForeignCodeError, foreign_code
from genoembed.models import genomic_model
from genoembed.models.load import load_model
from tests.by_hand import folder_of, model_of, write_fasta


@pytest.fixture
def brought(tmp_path):
    """Make a folder whose own code can be made to fail."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of("custom_conv"), folder)
    (code,) = folder.glob("*.py")

    def edit(old, new):
        text = code.read_text()
        assert old in text
        code.write_text(text.replace(old, new))
        return folder

    return edit


@pytest.mark.parametrize("error", ["KeyError('rope')", "ValueError('two\\nlines')", "RuntimeError('shapes')"])
def test_a_forward_pass_of_code_that_a_model_brings_is_blamed_on_it(error, brought):
    folder = brought("        x = self.embed(input_ids)\n", f"        raise {error}\n")
    with pytest.raises(
        ForeignCodeError, match=rf"the code that it brings failed at .*\.py:\d+ \({error[:8]}"
    ) as caught:
        embed(["ACGTACGT"], model=str(folder), trust_remote_code=True)
    assert type(caught.value.__cause__).__name__ == error.partition("(")[0]
    assert "\n" not in str(caught.value)


def test_building_a_model_of_brought_code_is_blamed_on_it(brought):
    folder = brought("        self.tower = ", "        assert False\n        self.tower = ")
    with pytest.raises(ForeignCodeError, match=r"this model's code fails at .*\.py:\d+ \(AssertionError"):
        load_model(str(folder), trust_remote_code=True)


def test_a_forward_that_does_not_take_what_models_take_is_blamed(brought):
    folder = brought("self, input_ids, output", "self, *, input_ids, output")
    with pytest.raises(ForeignCodeError, match=r"the code that it brings failed at .*\.py:\d+ \(TypeError"):
        embed(["ACGTACGT"], model=str(folder), trust_remote_code=True)


def test_a_package_is_named():
    model = model_of("bert")
    ids = torch.tensor([[10**6]])
    with pytest.raises(ForeignCodeError, match=r"the package transformers failed at .*:\d+ \(IndexError"):
        with foreign_code("the model"):
            model.module(ids)


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.delattr(genomic_model, "as_rows")  # a mistake of ours, called from a hook of the model
    with pytest.raises(NameError, match="as_rows"):
        embed(["ACGTACGT"], model=model_of("llama"))


def test_the_command_line_says_it_in_one_line(brought, tmp_path):
    folder = brought("        x = self.embed(input_ids)\n", "        raise KeyError('rope')\n")
    fasta = write_fasta(tmp_path / "in.fa", {"r": "ACGTACGT"})
    options = ["--trust-remote-code", "-o", str(tmp_path / "o.h5")]
    found = CliRunner().invoke(
        main,
        ["extract", str(fasta), "--model", str(folder), *options],
    )
    assert found.exit_code == 1
    assert "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("Error: a trial pass of model")
