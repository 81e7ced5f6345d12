"""BigBird: each pass by its own length, equal to a fresh model of transformers, whatever ran before."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from genoembed.cli import main
from genoembed.contracts import Batch
from genoembed.errors import ShapeError
from genoembed.models.families.big_bird import BigBirdConfig, BigBirdForMaskedLM, BigBirdModel
from genoembed.models.load import load_model
from genoembed.store.reader import open_embeddings
from tests.models.families.test_goldens import GOLDEN

FOLDER = GOLDEN / "gena_lm_bigbird"
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "block_size": 2,
    "num_random_blocks": 1,
    "pad_token_id": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "eager",
}
VARIANTS = {
    "as it is": {},
    "more random blocks": {"num_random_blocks": 2},
    "larger blocks": {"block_size": 4},
    "no biases, scaled": {"use_bias": False, "rescale_embeddings": True, "num_attention_heads": 2},
    "full attention": {"attention_type": "original_full"},
    "one of the lengths with plans": {"max_position_embeddings": 1024, "block_size": 16},
}


def ids_of(length, seed=0, rows=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 40, (rows, length), generator=generator)


def pair(**settings):
    """Build our model, and a function that runs a fresh model of transformers on the same weights."""
    torch.manual_seed(0)
    ours = BigBirdModel(BigBirdConfig(**SHAPE | settings)).eval()

    def fresh(ids, *, training=False, **inputs):
        theirs = transformers.BigBirdModel(transformers.BigBirdConfig(**SHAPE | settings))
        theirs.load_state_dict(ours.state_dict())
        return theirs.train(training)(ids, output_hidden_states=True, **inputs)

    return ours, fresh


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_a_fresh_model_of_transformers_after_any_input(name, training):
    ours, fresh = pair(**VARIANTS[name])
    ours.train(training)
    lengths = [50, 3, 53, 14, 15, 120, 1] + [1024] * (name == "one of the lengths with plans")
    for length in lengths + lengths[::-1]:
        ids = ids_of(length, rows=2)
        expected = fresh(ids, training=training)
        found = ours(ids, output_hidden_states=True)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state), length
        assert torch.equal(found.pooler_output, expected.pooler_output), length
        for index, hidden in enumerate(found.hidden_states):
            assert torch.equal(hidden, expected.hidden_states[index][:, :length]), (length, index)


def test_mask_is_honored_within_a_mode():
    ours, fresh = pair()
    for length in (10, 40):
        ids = ids_of(length, rows=2)
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        expected = fresh(ids, attention_mask=mask).last_hidden_state
        assert torch.equal(ours(ids, attention_mask=mask).last_hidden_state, expected)


def test_embeddings_as_input_equal_ids():
    ours, _ = pair()
    for length in (9, 51):
        ids = ids_of(length)
        embedded = ours.get_input_embeddings()(ids)
        assert torch.equal(ours(inputs_embeds=embedded).last_hidden_state, ours(ids).last_hidden_state)


def batch_of(*rows):
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=3) for row in rows])
    mask = torch.stack([(torch.arange(length) < len(row)).long() for row in rows])
    return Batch(input_ids=ids, attention_mask=mask, pool_mask=mask.bool(), rows=tuple(range(len(rows))))


def test_same_input_gives_the_same_bits_alone_and_in_any_batch():
    model = load_model(str(FOLDER), device="cpu", dtype="float32")
    layers = [layer.path for layer in model.resolve("all")]
    assert model.padding == "equal"
    for length in (7, 53):
        row = ids_of(length, seed=9)[0]
        before = model.forward(batch_of(row), layers)
        for other in (5, 60, 14, 53, 7):
            model.forward(batch_of(*ids_of(other, seed=other, rows=2)), layers)
        after = model.forward(batch_of(row), layers)
        among = model.forward(batch_of(*ids_of(length, seed=1, rows=2), row), layers)
        for path in layers:
            assert before[path].shape == (1, length, 32)
            assert torch.equal(before[path], after[path])
            torch.testing.assert_close(before[path], among[path][2:], rtol=0, atol=2e-6)
    with pytest.raises(ShapeError, match="rows of different lengths"):
        model.forward(batch_of(ids_of(7)[0], ids_of(53)[0]), layers)


@pytest.mark.parametrize("length", [7, 53])
def test_training_does_not_depend_on_earlier_inputs_nor_on_random_states(length):
    ours, _ = pair()
    ours.train()
    np.random.seed(5)
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()

    def gradient():
        ours.zero_grad()
        ours(ids_of(length)).last_hidden_state.square().sum().backward()
        return ours.encoder.layer[0].attention.self.query.weight.grad.clone()

    before = gradient()
    for other in (60, 3, 41):
        ours(ids_of(other, seed=other)).last_hidden_state.sum().backward()
    assert torch.equal(gradient(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert torch.equal(torch.get_rng_state(), torch_before)
    optimized = {id(parameter) for parameter in ours.parameters()}
    ours(ids_of(60 if length == 7 else 3))
    assert {id(parameter) for parameter in ours.parameters()} == optimized


def test_checkpointed_gradients_equal_plain_ones_of_both_modes_at_once():
    gradients = []
    for checkpointed in (False, True):
        ours, _ = pair()
        ours.train()
        if checkpointed:
            ours.activation_checkpointing_enable()
        # both passes before either is run again: the second must not decide how the first is
        total = sum(ours(ids_of(length)).last_hidden_state.square().sum() for length in (53, 7))
        total.backward()
        gradients.append(ours.encoder.layer[0].attention.self.key.weight.grad)
    assert torch.equal(*gradients)


def test_vectors_of_mixed_lengths_do_not_depend_on_order_or_batches(tmp_path):
    words = ["ACGTTGCAAGGTTTGACGATACCA", "GGCATCGATTACCATGCATTGCGA"]
    records = [(f"r{i}", (words[i % 2] * 12)[: 9 + 17 * i]) for i in range(12)]
    found = {}
    for name, order, options in (
        ("a", 1, ()),
        ("b", -1, ("--batch-tokens", "300")),
        ("c", 1, ("--batch-tokens", "64")),
    ):
        fasta = tmp_path / f"{name}.fa"
        fasta.write_text("".join(f">{name_}\n{sequence}\n" for name_, sequence in records[::order]))
        arguments = ["extract", str(fasta), "--model", str(FOLDER), "-o", str(tmp_path / f"{name}.h5")]
        result = CliRunner().invoke(main, [*arguments, "--dtype", "float32", "--layer", "1", *options])
        assert result.exit_code == 0, result.output
        with open_embeddings(tmp_path / f"{name}.h5") as embeddings:
            found[name] = dict(zip(embeddings.ids, embeddings.X, strict=True))
    for name in ("b", "c"):
        for record, vector in found["a"].items():
            np.testing.assert_allclose(found[name][record], vector, rtol=0, atol=1e-5)


def test_saved_folder_is_plain_big_bird(tmp_path):
    model = load_model(str(FOLDER), dtype="float32")
    whole = AutoModelForMaskedLM.from_pretrained(FOLDER, config=model.module.config, dtype=torch.float32)
    assert type(whole) is BigBirdForMaskedLM
    whole.save_pretrained(tmp_path / "x")
    values = json.loads((tmp_path / "x" / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("big_bird", ["BigBirdForMaskedLM"])
    theirs = transformers.BigBirdForMaskedLM.from_pretrained(tmp_path / "x").eval()
    ids = ids_of(53)
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, whole.eval()(ids).logits)
    config = BigBirdConfig.from_pretrained(tmp_path / "x", num_labels=3)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x", config=config)
    assert head(ids, labels=torch.tensor([2])).loss.isfinite()
    assert isinstance(head.bert, BigBirdModel)


def test_models_that_transformers_builds_stay_its_own():
    load_model(str(FOLDER))
    theirs = AutoModel.from_config(transformers.BigBirdConfig(**SHAPE))
    assert type(theirs) is transformers.BigBirdModel


def test_recognized_without_model_type(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "x")
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"], values["architectures"]
    (folder / "config.json").write_text(json.dumps(values))
    assert load_model(str(folder)).family.name == "BigBird"
