"""Records longer than a forward pass run block by block, and give what they give in one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import genoembed
from genoembed.errors import ModelError
from genoembed.models.registry import find_model
from genoembed.models.striped_hyena2.network import StripedHyena2Network
from genoembed.pooling.reduce import pooled_width

WIDTH = find_model("genoembed-mini").config["hidden_size"]
RECORD = ">long\n{}\n>short\n{}\n"


@pytest.fixture
def fasta(tmp_path):
    letters = np.random.default_rng(0).choice(list("ACGT"), 2900)
    path = tmp_path / "long.fa"
    path.write_text(RECORD.format("".join(letters), "".join(letters[:70])))
    return path


@pytest.fixture
def shapes(monkeypatch):
    """Positions of every forward pass of the bundled model."""
    seen = []
    original = StripedHyena2Network.run_blocks

    def watched(self, input_ids, *rest, **options):
        seen.append(input_ids.shape[1])
        return original(self, input_ids, *rest, **options)

    monkeypatch.setattr(StripedHyena2Network, "run_blocks", watched)
    return seen


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "mean_std", "max", "last", "none"])
def test_blocks_change_nothing(fasta, tmp_path, shapes, pooling) -> None:
    layers = [1, "blocks.3", 6] if pooling == "mean" else [3]
    values = {}
    model = genoembed.load_model("genoembed-mini", dtype="float32")
    model.max_length = 8192  # longer than the record, whatever the weights were trained at
    for name, batch_tokens in (("blocks", 512), ("once", 4096)):
        shapes.clear()
        output = tmp_path / f"{name}.h5"
        genoembed.extract(
            fasta, model=model, output=output, layers=layers, pooling=pooling, batch_tokens=batch_tokens
        )
        long = [shape for shape in shapes if shape > 80]
        # 2900 bases, padded to a multiple of 64
        assert long[-6:] == ([512] * 5 + [384] if name == "blocks" else [2944])
        with genoembed.open_embeddings(output) as file:
            if pooling == "none":
                values[name] = [file.tokens(record) for record in ("long", "short")]
            else:
                values[name] = [np.asarray(file[layer][:]) for layer in file.layers]
    assert [value.shape for value in values["once"]] == (
        [(2900, WIDTH), (70, WIDTH)]
        if pooling == "none"
        else [(2, pooled_width(WIDTH, pooling))] * len(layers)
    )
    for blocks, once in zip(values["blocks"], values["once"], strict=True):
        assert np.abs(blocks - once).max() < 1e-5 * np.abs(once).max()


def test_a_model_without_state_says_what_to_do() -> None:
    model = genoembed.load_model("genoembed-mini", device="cpu")
    model.module.carries_state = False
    batch = None
    with pytest.raises(ModelError, match="set window to cut long sequences"):
        model.forward_in_blocks(batch, ["final"], lambda *_: None, block_tokens=8)


def test_rows_of_one_batch_go_block_by_block_together() -> None:
    model = genoembed.load_model("genoembed-mini", device="cpu", dtype="float32")
    ids = torch.tensor(list(b"ACGTTGCAAC" * 9)).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, 50:], mask[1, 50:] = 1, 0
    batch = genoembed.contracts.Batch(input_ids=ids, attention_mask=mask, pool_mask=mask.bool(), rows=(0, 1))
    whole = model.forward(batch, ["blocks.6"])["blocks.6"]
    parts = []
    model.forward_in_blocks(
        batch, ["blocks.6"], lambda _path, hidden, _span: parts.append(hidden), block_tokens=32
    )
    joined = torch.cat(parts, dim=1)
    assert [part.shape[1] for part in parts] == [32, 32, 26]
    assert (joined - whole)[mask.bool()].abs().max() < 1e-5 * whole.abs().max()
