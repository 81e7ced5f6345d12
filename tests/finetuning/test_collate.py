"""Padded batches: labels by position, exact multiples, even batches, and what padding costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.errors import ShapeError
from genoembed.finetuning.collate import EncodedExample, PaddedCollator, encode_example, encode_token_example
from genoembed.finetuning.sampling import LengthGroupedSampler
from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.hf import build_encoder
from genoembed.training.log import PaddingMeter

ENCODER = build_encoder(CharTokenizer())


def rows(*sequences, eos=None, labels=None):
    labels = labels or [None] * len(sequences)
    if eos is not None:
        return [EncodedExample.of_ids(np.array([*sequence, eos])) for sequence in sequences]
    return [
        encode_example(sequence, ENCODER, label=label)
        for sequence, label in zip(sequences, labels, strict=True)
    ]


def evo2_tokenizer():
    """As Evo 2 users set it up: padding with EOS."""
    tokenizer = CharTokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    return tokenizer


def test_collate_genuine_eos_keeps_its_label_where_padding_is_eos():
    tokenizer = evo2_tokenizer()
    collate = PaddedCollator(pad_token_id=tokenizer.pad_token_id, target="causal")
    batch = collate(rows(b"ACGT", b"AC", eos=tokenizer.eos_token_id))
    assert batch["input_ids"].tolist() == [[65, 67, 71, 84, 0], [65, 67, 0, 0, 0]]
    assert batch["labels"].tolist() == [[65, 67, 71, 84, 0], [65, 67, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_collate_genuine_eos_counts_in_a_models_loss():
    torch.manual_seed(0)
    model = StripedHyena2ForCausalLM(
        StripedHyena2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            hcs_layer_idxs=[0],
            hcm_layer_idxs=[],
            hcl_layer_idxs=[],
            attn_layer_idxs=[1],
            hcs_filter_groups=8,
            hcm_filter_groups=8,
        )
    ).eval()
    collate = PaddedCollator(pad_token_id=0, target="causal")
    batch = collate(rows(b"ACGTACGT", b"AC", eos=0))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        output = model(**inputs)
    logits = output.logits.double().log_softmax(-1)
    taken = [-logits[0, place, batch["input_ids"][0, place + 1]] for place in range(8)]
    taken += [-logits[1, place, batch["input_ids"][1, place + 1]] for place in range(2)]  # "C", then EOS
    assert len(taken) == 10
    assert float(output.loss) == pytest.approx(float(torch.stack(taken).mean()), rel=1e-5)


@settings(max_examples=100)
@given(
    sequences=st.lists(st.text("ACGT\0\1", min_size=1, max_size=20).map(str.encode), min_size=1, max_size=5),
    pad_token_id=st.sampled_from([0, 1, 65]),
    multiple=st.integers(1, 9),
)
def test_collate_knows_padding_by_position_whatever_the_ids(sequences, pad_token_id, multiple):
    collate = PaddedCollator(pad_token_id=pad_token_id, target="causal", pad_to_multiple_of=multiple)
    batch = collate(rows(*sequences))
    longest = max(map(len, sequences))
    length = batch["input_ids"].shape[1]
    assert length % multiple == 0
    assert longest <= length < longest + multiple
    assert {tensor.shape for tensor in batch.values()} == {(len(sequences), length)}
    for row, sequence in enumerate(sequences):
        n = len(sequence)
        assert batch["labels"][row].tolist() == [*sequence, *[-100] * (length - n)]
        assert batch["input_ids"][row].tolist() == [*sequence, *[pad_token_id] * (length - n)]
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (length - n)
        assert batch["pool_mask"][row].tolist() == [True] * n + [False] * (length - n)


@pytest.mark.parametrize(
    ("length", "multiple", "padded"), [(4, 4, 4), (5, 4, 8), (3, 4, 4), (8, 4, 8), (1, 8, 8)]
)
def test_collate_pads_to_the_smallest_multiple_and_labels_with_tokens(length, multiple, padded):
    bases = b"ACGTACGT"[:length]
    token = encode_token_example(bases, ENCODER, base_labels=np.arange(length))
    batch = PaddedCollator(pad_token_id=1, target="token", pad_to_multiple_of=multiple)([token])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, padded)


def test_collate_token_labels_are_ignored_at_padding_only():
    examples = [
        encode_token_example(b"ACG", ENCODER, base_labels=np.array([0, 1, -100])),
        encode_token_example(b"A", ENCODER, base_labels=np.array([0])),
    ]
    batch = PaddedCollator(pad_token_id=0, target="token")(examples)
    assert batch["labels"].tolist() == [[0, 1, -100], [0, -100, -100]]


def test_collate_labels_of_sequences_keep_their_type():
    classes = rows(b"AC", b"A", labels=[np.array(1), np.array(0)])
    numbers = rows(b"AC", b"A", labels=[np.array([0.5], np.float32), np.array([2], np.float32)])
    collate = PaddedCollator(pad_token_id=1, target="sequence")
    assert (collate(classes)["labels"].dtype, collate(classes)["labels"].tolist()) == (torch.int64, [1, 0])
    assert (collate(numbers)["labels"].dtype, collate(numbers)["labels"].shape) == (torch.float32, (2, 1))
    assert "labels" not in PaddedCollator(pad_token_id=1, target="none")(classes)


def test_collate_refuses_labels_that_do_not_fit():
    collate = PaddedCollator(pad_token_id=1, target="sequence")
    with pytest.raises(ShapeError, match=r"labels of shapes .* in one batch"):
        collate(rows(b"A", b"C", labels=[np.array(1), None]))
    with pytest.raises(ShapeError, match="row 0: no label, expected"):
        PaddedCollator(pad_token_id=1, target="token")(rows(b"AC"))
    with pytest.raises(ShapeError, match=r"row 0: labels of shape \(\), expected \(2,\)"):
        PaddedCollator(pad_token_id=1, target="token")(rows(b"AC", labels=[np.array(1)]))


def test_collate_agrees_with_the_tokenizers_own_padding():
    tokenizer = CharTokenizer()
    ours = PaddedCollator(pad_token_id=1, target="none", pad_to_multiple_of=8)(rows(b"ACGTA", b"AC"))
    theirs = tokenizer(["ACGTA", "AC"], padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    pool=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_sampler_gives_every_row_once_longest_first_the_same_each_time(lengths, batch_size, pool, epoch):
    sampler = LengthGroupedSampler(lengths, batch_size=batch_size, seed=7, pool_batches=pool)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    assert list(sampler) == order
    whole = order[: len(order) // batch_size * batch_size]
    if whole:
        assert max(lengths[i] for i in order[:batch_size]) == max(lengths[i] for i in whole)


def test_sampler_batches_are_even_and_shuffled_and_change_with_the_epoch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 2000, 640)
    sampler = LengthGroupedSampler(lengths, batch_size=16, seed=0)

    def slots(order):
        return sum(lengths[order[i : i + 16]].max() * 16 for i in range(0, len(order), 16))

    order = list(sampler)
    real = lengths.sum()
    assert slots(order) / real < 1.06 < 1.6 < slots(list(range(640))) / real
    firsts = [int(lengths[order[i : i + 16]].max()) for i in range(16, 640, 16)]
    assert firsts != sorted(firsts, reverse=True)
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.5  # lengths do not run down an epoch
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_sampler_works_in_a_data_loader():
    sequences = [b"A" * n for n in (1, 9, 2, 8, 1, 9)]
    examples = rows(*sequences)
    loader = DataLoader(
        examples,
        batch_size=2,
        sampler=LengthGroupedSampler([len(row) for row in examples], batch_size=2),
        collate_fn=PaddedCollator(pad_token_id=1, target="none"),
    )
    shapes = [tuple(batch["input_ids"].shape) for batch in loader]
    assert sorted(shapes) == [(2, 1), (2, 8), (2, 9)]
    assert shapes[0] == (2, 9)


def test_meter_counts_padding_and_the_packed_alternative():
    meter = PaddingMeter()
    collate = PaddedCollator(pad_token_id=1, target="none")
    for batch in ([b"A" * 10, b"A" * 2], [b"A" * 4, b"A" * 4]):
        meter.add(collate(rows(*batch))["attention_mask"])
    assert (meter.batches, meter.rows, meter.slots, meter.tokens, meter.longest) == (2, 4, 28, 20, 10)
    assert meter.padding_share == pytest.approx(8 / 28)
    assert meter.packed_slots == 30  # 20 tokens and 4 ends in rows of 10
    metrics = meter.metrics(seconds=2.0)
    assert metrics["padding_percent"] == pytest.approx(800 / 28)
    assert metrics["packed_padding_percent"] == pytest.approx(100 / 3)
    assert metrics["padded_cost"] == pytest.approx(28 / 30)
    assert (metrics["tokens_per_second"], metrics["slots_per_second"]) == (10, 14)


def test_meter_without_batches_divides_by_nothing():
    metrics = PaddingMeter().metrics(seconds=1.0)
    assert metrics["padding_percent"] == metrics["packed_padding_percent"] == 0
    assert metrics["padded_cost"] == 1
