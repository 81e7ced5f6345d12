"""The command lines of people who met an error, on their own files: what each of them gives today.

The files are small, of the kind that users sent, and kept beside this module; their sequences are random.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration

from genoembed import open_embeddings
from genoembed.cli import main

FIELD = Path(__file__).parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command line in a folder with the files of a case."""
    monkeypatch.chdir(tmp_path)

    def call(line: str, *, case: str = ""):
        for path in (FIELD / case).iterdir() if case else ():
            shutil.copy(path, tmp_path)
        return CliRunner().invoke(main, shlex.split(line)[1:])

    return call


def test_region_of_a_fasta_with_a_blank_inside_a_line(run, tmp_path):
    spaced = (FIELD / "space_in_line.fa").read_text()
    (tmp_path / "in.fa").write_text(spaced)
    (tmp_path / "plain.fa").write_text(spaced.replace("AAC TCG", "AACTCG"))
    digests = []
    for name in ("in", "plain"):
        line = f"genoembed extract {name}.fa --regions construct:201-260 --layer 3 -o {name}.h5 --overwrite"
        assert run(line).exit_code == 0
        with open_embeddings(tmp_path / f"{name}.h5") as file:
            digests.append((file.obs["sha256"][0], file.obs["length"][0]))
    assert digests[0] == digests[1]
    assert digests[0][1] == 60


def save_t5(folder):
    """An encoder alone, and one with a decoder, as transformers writes them; letters are words."""
    words = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *"ACGTN"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words["</s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    config.decoder_start_token_id = 0
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, kind in (("t5enc", T5EncoderModel), ("t5full", T5ForConditionalGeneration)):
            made[name] = kind(config).eval()
            made[name].save_pretrained(folder / name)
            fast.save_pretrained(folder / name)
    return made, words


def test_encoder_of_an_encoder_decoder(run, tmp_path):
    made, words = save_t5(tmp_path)
    texts = {"a": "ACGTACGTAC", "b": "GGTTCA"}
    (tmp_path / "in.fa").write_text("".join(f">{name}\n{text}\n" for name, text in texts.items()))
    for name, model in made.items():
        result = run(f"genoembed extract in.fa --model ./{name} --dtype float32 -o {name}.h5")
        assert result.exit_code == 0, result.output
        with open_embeddings(tmp_path / f"{name}.h5") as file:
            found = file.X[:]
        for row, text in zip(found, texts.values(), strict=True):
            ids = torch.tensor([[words[letter] for letter in text] + [words["</s>"]]])
            with torch.inference_mode():
                states = model.get_encoder()(ids).last_hidden_state[0, :-1]
            np.testing.assert_allclose(row, states.mean(0).numpy(), rtol=1e-4, atol=1e-5)
    listed = run("genoembed layers ./t5full").output
    assert "block.2" in listed
    assert "decoder" not in listed


@pytest.mark.parametrize(
    ("name", "scored", "said"),
    [
        ("symN", ["snv"], "2 symbolic, 1 breakend"),
        ("sniffles", ["INS1"], "2 symbolic, 1 breakend, 1 unknown"),
        ("delN", [], "1 unknown"),
    ],
)
def test_structural_variants_with_ref_n(run, name, scored, said):
    result = run(
        f"genoembed score --vcf {name}.vcf --reference ref.fa --flank 60 --threads 1", case="10-sv-ref-N"
    )
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()[1:]]
    assert [row[2] for row in rows] == scored
    assert said in result.stderr


def test_iupac_alternative_is_skipped(run):
    result = run("genoembed score --vcf clinvar.vcf --reference ref.fa --flank 60", case="12-late-bad-row")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)
    assert "1 absent, 1 ambiguous" in result.stderr


def test_policy_that_the_error_advises_keeps_finished_units(run):
    line = "genoembed extract in.fa --layer 3 --unit-bases 500 -o lb.h5"
    result = run(line, case="13-policy-remedy-drops-units")
    assert result.exit_code == 1
    assert "set --invalid mask or fix it; 5 finished units are kept" in result.stderr
    result = run(line.replace(" -o", " --invalid mask -o"))
    assert result.exit_code == 0, result.output
    assert "finished by an earlier run: 5 units (25 records)" in result.stderr


@pytest.mark.parametrize(
    ("options", "ids", "said"),
    [
        (
            "--flank 50",
            ["gene-a", "cds-a", "gene-b", "cds-b"],
            "rows by type: CDS 3, gene 2, region 1; 4 features read, joined from 5 rows; "
            "left out as the contig itself: region; option feature chooses types",
        ),
        ("--feature gene", ["gene-a", "gene-b"], "rows by type: CDS 3, gene 2, region 1; 2 features read"),
        ("--feature CDS", ["cds-a", "cds-b"], "2 features read, joined from 3 rows"),
    ],
)
def test_ncbi_annotation(run, tmp_path, options, ids, said):
    result = run(
        f"genoembed extract n.fa --regions n.gff3 {options} --layer 3 -o o.h5 --overwrite", case="23-ncbi-gff"
    )
    assert result.exit_code == 0, result.output
    assert said in result.stderr
    with open_embeddings(tmp_path / "o.h5") as file:
        assert list(file.ids) == ids
        lengths = dict(zip(file.ids, file.obs["length"], strict=True))
        places = dict(zip(file.ids, file.obs["description"], strict=True))
    if "cds-b" in ids:
        assert lengths["cds-b"] == 200
        assert places["cds-b"] == "NC_1:501-600,801-900(-) CDS"
