"""The encoder of fine-tuning: cut, masked, pooled and fused as ``extract`` does, with gradient."""

from __future__ import annotations

import pytest
import torch

import genoembed
from genoembed.config.finetune import EncoderConfig
from genoembed.errors import ConfigError, LayerError
from genoembed.finetuning.collate import PaddedCollator, encode_example
from genoembed.pooling.fuse import fuse
from genoembed.tokenization.hf import build_encoder
from genoembed.training.encoder import Encoder
from tests.finetuning.cases import build_model, sequences
from tests.tiny_models import NATIVE_FAMILIES, build_tiny

ROWS = sequences(4, seed=2)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    built = {family: str(build_tiny(family, folder / family)) for family in NATIVE_FAMILIES}
    return built | {"striped_hyena2": build_model(folder / "striped_hyena2")}


def load(folder, **options):
    genomic = genoembed.load_model(folder, dtype="float32", device="cpu")
    return genomic, Encoder(genomic, EncoderConfig(**options))


def batch_of(genomic, rows, *, multiple=1):
    encoder = build_encoder(genomic.tokenizer)
    collate = PaddedCollator(pad_token_id=encoder.pad_token_id, target="none", pad_to_multiple_of=multiple)
    batch = collate([encode_example(row.encode(), encoder) for row in rows])
    return batch["input_ids"], batch["attention_mask"], batch["pool_mask"]


@pytest.mark.parametrize("family", [*NATIVE_FAMILIES, "striped_hyena2"])
def test_vectors_do_not_depend_on_padding_or_batch_mates(folders, family):
    """Fails when the attention mask is not handed over: bidirectional models then see padding."""
    genomic, encoder = load(folders[family], layers=("1",))
    encoder.eval()
    with torch.no_grad():
        together = encoder.pooled(*batch_of(genomic, ROWS, multiple=32))
        alone = torch.cat([encoder.pooled(*batch_of(genomic, [row])) for row in ROWS])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "striped_hyena2"])
@pytest.mark.parametrize("pooling", ["mean", "max", "last", "weighted_mean", "mean_std"])
def test_vectors_are_those_of_extract(folders, family, pooling, tmp_path):
    genomic, encoder = load(folders[family], layers=("0", "1"), fusion="concat", pooling=pooling)
    fasta = tmp_path / "s.fa"
    fasta.write_text("".join(f">s{i}\n{row}\n" for i, row in enumerate(ROWS)))
    genoembed.extract(
        fasta, model=genomic, layers=(0, 1), fusion="concat", pooling=pooling, output=tmp_path / "v.h5"
    )
    with torch.no_grad():
        found = encoder.eval().pooled(*batch_of(genomic, ROWS))
    with genoembed.open_embeddings(tmp_path / "v.h5") as file:
        assert torch.allclose(found, torch.from_numpy(file.X[:]), atol=1e-5)


def test_blocks_behind_the_cut_never_run_and_never_learn(folders):
    genomic, encoder = load(folders["striped_hyena2"], layers=("1",))

    def fail(*_: object) -> None:
        pytest.fail("a block behind the cut ran")

    handle = genomic.module.blocks[2].register_forward_pre_hook(fail)
    encoder.pooled(*batch_of(genomic, ROWS)).sum().backward()
    handle.remove()
    learning = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert not any(".blocks.2." in name or ".norm." in name for name in learning)
    assert any(".blocks.0." in name for name in learning)


def test_learned_fusion_is_that_of_extract_and_gets_a_gradient(folders):
    genomic, encoder = load(folders["striped_hyena2"], layers=("0", "2"), fusion="weighted")
    with torch.no_grad():
        encoder.fusion_logits.copy_(torch.tensor([0.3, -0.8]))
    layers = encoder.pooled_layers(*batch_of(genomic, ROWS))
    fused = encoder.fuse(layers)
    (expected,) = fuse(layers, method="weighted", weights=encoder.fusion_weights).values()
    assert torch.allclose(fused, expected, atol=1e-6)
    fused[:, 0].sum().backward()
    assert encoder.fusion_logits.grad.abs().min() > 0
    _, restored = (
        genomic,
        Encoder(
            genomic,
            EncoderConfig(layers=("0", "2"), fusion="weighted"),
            fusion_weights=encoder.fusion_weights,
        ),
    )
    assert restored.fusion_weights == pytest.approx(encoder.fusion_weights, rel=1e-5)


@pytest.mark.parametrize("fusion", ["mean", "concat", "max", "weighted"])
def test_hidden_states_are_fused_as_vectors_are(folders, fusion):
    genomic, encoder = load(folders["bert"], layers=("0", "2"), fusion=fusion)
    ids, mask, _ = batch_of(genomic, ROWS[:1])
    hidden = encoder.eval().hidden(ids, mask)
    assert hidden.shape == (1, ids.shape[1], encoder.width)
    assert encoder.width == (32 if fusion == "concat" else 16)
    only_third = torch.zeros_like(mask, dtype=torch.bool)
    only_third[:, 3] = True
    assert torch.allclose(hidden[:, 3], encoder.pooled(ids, mask, only_third), atol=1e-6)


def test_frozen_backbone_keeps_no_graph_and_no_dropout(folders):
    genomic, encoder = load(folders["bert"], layers=("1",), tuning="frozen")
    encoder.train()
    assert not encoder.backbone.training
    assert not encoder.pooled(*batch_of(genomic, ROWS)).requires_grad
    _, learning = load(folders["bert"], layers=("1",))
    assert learning.train().backbone.training


def test_encoder_refuses_what_does_not_go_together(folders):
    with pytest.raises(ConfigError, match="fusion is 'mean' for 1 layers"):
        load(folders["bert"], layers=("1",), fusion="mean")
    with pytest.raises(ConfigError, match="last_n is 9, but 2 blocks run; set last_n to 2 or less"):
        load(folders["bert"], layers=("1",), tuning="last_n", last_n=9)
    with pytest.raises(LayerError, match="is not in"):
        load(folders["bert"], layers=("7",))
    with pytest.raises(ConfigError, match=r"the model is causal"):
        load(folders["llama"], layers=("1",), pooling="first")
