"""Losses on vectors while pretraining: views of pieces, codes of k-mers, and runs that learn with both."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import genoembed
from genoembed.batching.pack import pack_stream
from genoembed.config.pretrain import VectorLossConfig, train_config
from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, LayerError
from genoembed.pretraining.contrast import ViewRows, pooled_contrast
from genoembed.pretraining.kmer_codes import KmerCodes, canonical_numbers, count_kmers, discriminant_codes
from genoembed.sequences import reverse_complement
from genoembed.tokenization.char import CharTokenizer
from genoembed.training.augment import mutated_copy
from genoembed.training.run_folder import CODES_FILE
from genoembed.training.start import token_rules
from tests.pretraining.test_start import save_causal

TOKENIZER = CharTokenizer()
RULES = token_rules(TOKENIZER, name="test")


def dna(length: int, seed: int) -> bytes:
    return "".join(random.Random(seed).choices("ACGT", k=length)).encode()


def batch_of(documents, window):
    rows = list(pack_stream(documents, window=window))[:-1]
    fields = {name: torch.cat([getattr(row, name) for row in rows]) for name in ("input_ids", "labels")}
    return fields, torch.cat([row.segment_ids for row in rows])


def views(rows=2, seed=0):
    return ViewRows(RULES, TOKENIZER.decode_bytes, rows=rows, seed=seed)


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(30, 900), min_size=8, max_size=20),
    window=st.sampled_from([64, 256, 1024]),
    rows=st.integers(1, 3),
)
def test_pieces_lie_within_documents_and_copies_are_no_longer(sizes, window, rows):
    documents = [dna(size, number) for number, size in enumerate([*sizes, 900, 900])]
    batch, segment_ids = batch_of(documents, window)
    found = views(rows).add(batch, segment_ids)
    count = len(segment_ids)
    assert torch.equal(found["input_ids"][:count], batch["input_ids"])
    assert torch.equal(found["labels"][:count], batch["labels"])
    assert (found["labels"][count:] == IGNORE_INDEX).all()
    assert found["input_ids"].shape == (count + rows, window)
    groups, pairs = found["group_ids"], int(found["num_pairs"])
    numbers = sorted(set(groups[groups >= 0].tolist()))
    assert numbers == list(range(len(numbers)))
    for number in numbers:
        places = (groups == number).nonzero()
        is_copy = number < 2 * pairs and number % 2 == 1
        assert len(set(places[:, 0].tolist())) == 1
        assert (places[0, 0] >= count) == is_copy
        assert (places[:, 1].diff() == 1).all()
        bases = bytes(found["input_ids"][groups == number].tolist())
        assert set(bases) <= set(b"ACGT")
        if is_copy:
            assert len(bases) <= int((groups == number - 1).sum())
        else:
            assert any(bases in document for document in documents)


def test_what_is_drawn_depends_on_the_batch_and_the_seed_alone():
    batch, segment_ids = batch_of([dna(700, 1), dna(700, 2)], 256)
    other, other_segments = batch_of([dna(700, 3), dna(700, 4)], 256)
    first = views()
    drawn = first.add(batch, segment_ids)
    first.add(other, other_segments)
    again, elsewhere, seeded = (
        source.add(batch, segment_ids)["input_ids"] for source in (first, views(), views(seed=1))
    )
    assert torch.equal(drawn["input_ids"], again)
    assert torch.equal(drawn["input_ids"], elsewhere)
    assert not torch.equal(drawn["input_ids"], seeded)


def test_copies_are_mutated_cropped_and_half_of_them_turned():
    piece = dna(200, 5)
    numbers = canonical_numbers(6)
    rng = np.random.default_rng(0)
    copies = [mutated_copy(piece, rng) for _ in range(200)]
    assert all(90 <= len(copy) <= 200 for copy in copies)
    turned = kept = 0
    ahead = {piece[at : at + 12] for at in range(189)}
    for copy in copies:
        words = [copy[at : at + 12] for at in range(len(copy) - 11)]
        back = reverse_complement(copy)
        words_back = [back[at : at + 12] for at in range(len(back) - 11)]
        found, found_back = (sum(word in ahead for word in side) for side in (words, words_back))
        turned += found < found_back
        kept += found > found_back
    assert turned + kept > 120  # the others are mutated beyond any 12-mer
    assert 0.35 < turned / (turned + kept) < 0.65
    counts = count_kmers(piece, 6, numbers)
    shared = [np.minimum(counts, count_kmers(copy, 6, numbers)).sum() for copy in copies]
    assert min(shared) < 20 < 150 < max(shared)


def test_contrast_and_its_gradient_by_hand():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([[0, 0, 2, -1], [4, 4, 4, -1], [1, -1, 3, 3]])
    found = pooled_contrast(states, groups, 2)
    vectors = torch.stack([states[groups == number].mean(dim=0) for number in range(5)])
    varying = vectors - vectors.mean(dim=0)
    unit = varying / varying.norm(dim=1, keepdim=True)
    deviation = varying.square().sum(dim=1).mean().sqrt().item()
    expected = vectors.mean(dim=0).norm() / deviation
    for row, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        others = torch.stack([unit[row] @ unit[other] / 0.07 for other in range(5) if other != row])
        expected = expected + (others.logsumexp(0) - unit[row] @ unit[partner] / 0.07) / 4
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found.loss, states)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, states)[0], rtol=1e-6, atol=1e-9)
    plain = (vectors / vectors.norm(dim=1, keepdim=True)).detach()
    no_pairs = [pair for pair in itertools.permutations(range(5), 2) if {*pair} not in ({0, 1}, {2, 3})]
    assert found.mean_cosine == pytest.approx(np.mean([float(plain[a] @ plain[b]) for a, b in no_pairs]))


def test_contrast_spreads_vectors_that_are_nearly_constant():
    batch, segment_ids = batch_of([dna(700, seed) for seed in range(6)], 512)
    found = views(rows=4).add(batch, segment_ids)
    kmers = found["input_ids"].unfold(1, 3, 1).sub(65).clamp(min=0).sum(dim=2)
    table = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    table = (table * 0.05 + 1).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    seen = []
    for _ in range(60):
        states = table[torch.nn.functional.pad(kmers, (2, 0))]
        now = pooled_contrast(states, found["group_ids"], int(found["num_pairs"]))
        optimizer.zero_grad()
        now.loss.backward()
        optimizer.step()
        seen.append(now)
    assert seen[0].mean_cosine > 0.99
    assert seen[-1].mean_cosine < 0.3
    assert seen[-1].loss < 1


def test_gradient_of_the_codes_is_right():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    codes = KmerCodes(table, RULES, k=2)
    ids = torch.tensor([list(b"ACGTNA"), list(b"TTG\0CA")])
    assert torch.autograd.gradcheck(lambda x: codes.loss(x, ids), states)


def test_loss_without_pairs_or_kmers_is_0_and_has_a_gradient():
    states = torch.randn(1, 4, 3, requires_grad=True)
    found = pooled_contrast(states, torch.tensor([[0, 0, -1, 1]]), 1)
    loss = KmerCodes(torch.eye(10), RULES, k=2).loss(states, torch.tensor([list(b"ANGN")]))
    (found.loss + loss).backward()
    assert found.loss.item() == loss.item() == 0
    assert not states.grad.any()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_kmers_are_those_of_both_strands(k):
    numbers = canonical_numbers(k)
    words = ["".join(word) for word in itertools.product("ACGT", repeat=k)]
    canonical = [min(word, reverse_complement(word.encode()).decode()) for word in words]
    order = {word: number for number, word in enumerate(sorted(set(canonical)))}
    assert numbers.tolist() == [order[word] for word in canonical]
    sequence = dna(60, 3) + b"N" + dna(40, 4)
    words = [sequence[at : at + k] for at in range(len(sequence) - k + 1)]
    plain = Counter(order[min(word, reverse_complement(word)).decode()] for word in words if b"N" not in word)
    assert count_kmers(sequence, k, numbers).tolist() == [plain[number] for number in range(len(order))]
    counts = count_kmers(reverse_complement(sequence), k, numbers)
    assert np.array_equal(count_kmers(sequence, k, numbers), counts)


def test_states_that_are_codes_have_no_loss_whatever_is_constant():
    codes = discriminant_codes([dna(3000, seed) for seed in range(4)], k=2, width=6)
    loss = KmerCodes(torch.from_numpy(codes), RULES, k=2)
    sequence = dna(400, 9)
    numbers = canonical_numbers(2)
    states = np.zeros((1, 400, 8), np.float32)
    targets = loss.targets(8).numpy()
    for at in range(1, 400):
        states[0, at, :6] = targets[np.flatnonzero(count_kmers(sequence[at - 1 : at + 1], 2, numbers))[0]]
    ids = torch.tensor([list(sequence)])
    assert float(loss.loss(torch.from_numpy(states) * 3, ids)) < 0.02
    assert float(loss.loss(torch.from_numpy(states) + 1000, ids)) < 0.02
    assert float(loss.loss(torch.from_numpy(-states), ids)) > 1.9


@pytest.mark.parametrize("width", [3, 6, 9])
def test_targets_are_the_first_numbers_of_codes_and_each_holds_a_part_of_all(width):
    codes = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes *= torch.tensor([100.0, 30, 10, 3, 1, 0.3], dtype=torch.float64)
    loss = KmerCodes(codes, RULES, k=2)
    first, targets = codes[:, :width], loss.targets(width)
    torch.testing.assert_close(targets @ targets.T, first @ first.T)
    spread = targets.std(dim=0)
    assert spread.max() / spread.min() < 0.5 * first.std(dim=0).max() / first.std(dim=0).min()
    assert torch.equal(targets, KmerCodes(codes, RULES, k=2).targets(width))


def test_codes_tell_pieces_apart_better_than_as_many_counts():
    documents = [
        "".join(random.Random(seed).choices(["ACG", "TTA", "CAT", "GGC", "ATA"], k=400)).encode()
        for seed in range(60)
    ]
    codes = discriminant_codes(documents, k=4, width=16)
    numbers = canonical_numbers(4)
    assert codes.shape == (136, 16)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-5)
    rng = np.random.default_rng(1)
    pieces = [document[:300] for document in documents]
    copies = [mutated_copy(piece, rng) for piece in pieces]

    def found(table):
        sides = [
            np.stack([count_kmers(view, 4, numbers) / len(view) for view in side]) @ table
            for side in (pieces, copies)
        ]
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (side - side.mean(0) for side in sides)]
        return ((unit[1] @ unit[0].T).argmax(axis=1) == np.arange(60)).mean()

    assert found(codes) > found(np.eye(136)[:, :16]) + 0.1
    # directions that tell more are larger; without weights the ratio is 1.5
    counts = [
        np.stack([count_kmers(view, 4, numbers) / len(view) for view in side]) for side in (pieces, copies)
    ]
    differences = ((counts[0] - counts[1]) @ codes).std(axis=0)
    assert differences[:4].mean() > 1.8 * differences[-4:].mean()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "c.fa"
    path.write_text("".join(f">r{i}\n{dna(200 + 7 * i, i).decode()}\n" for i in range(30)))
    return str(path)


RUN = {
    "like": "evo2_7b",
    "hidden_size": 32,
    "layers": 4,
    "heldout_fraction": 0.2,
    "window": 128,
    "rows_per_device": 2,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "logging_steps": 1,
    "eval_steps": 6,
    "save_steps": 3,
    "dtype": "float32",
    "contrast": 0.05,
    "kmer_codes": 1.0,
    "kmer_size": 3,
    "contrast_layers": ("1", "final"),
}
LAYERS = ("blocks.1.mlp.l3", "norm")


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    genoembed.pretrain(corpus, folder, **RUN)
    return folder


def test_a_run_goes_on_bitwise_with_the_codes_that_it_began_with(corpus, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("final", "checkpoint-6", "report.json"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    genoembed.pretrain(corpus, folder, resume=True, **RUN)
    plain = ("step", "loss", "grad_norm", *(f"{kind}_{path}" for kind in NUMBERS for path in LAYERS))
    assert [[line[key] for key in plain] for line in lines_of(folder)] == [
        [line[key] for key in plain] for line in lines_of(whole)
    ]
    weights = "final/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    with pytest.raises(ConfigError, match=r"contrast: 0.05 in .*, but 0.1 is requested|contrast"):
        genoembed.pretrain(corpus, folder, resume=True, **RUN | {"contrast": 0.1})


NUMBERS = ("kmer_loss", "contrast_loss", "mean_cosine")


def test_losses_fall_and_the_logged_loss_is_that_of_the_next_token(corpus, whole, tmp_path):
    more = {"max_steps": 20, "logging_steps": 5, "save_steps": 20, "contrast": 0.0}
    genoembed.pretrain(corpus, tmp_path / "long", **RUN | more)
    lines = lines_of(tmp_path / "long")
    for path in LAYERS:
        assert lines[-1][f"kmer_loss_{path}"] < lines[0][f"kmer_loss_{path}"] - 0.05
    plain = RUN | {"contrast": 0.0, "kmer_codes": 0.0, "max_steps": 1, "save_steps": 1}
    genoembed.pretrain(corpus, tmp_path / "plain", **plain)
    (line,) = lines_of(tmp_path / "plain")
    # the first step is taken with the same weights on the same documents
    assert line["loss"] == pytest.approx(lines_of(whole)[0]["loss"], rel=1e-5)
    assert not any(key.startswith(NUMBERS) for key in line)


def test_accumulated_batches_weigh_the_losses_as_one_step_does(corpus, tmp_path):
    sizes = {}
    for name, accumulation in (("once", 1), ("twice", 2)):
        options = RUN | {"max_steps": 1, "save_steps": 1, "contrast": 0.0, "kmer_codes": 1000.0}
        rows = {"rows_per_device": 4 // accumulation, "accumulation_steps": accumulation}
        genoembed.pretrain(corpus, tmp_path / name, **options | rows)
        sizes[name] = lines_of(tmp_path / name)[0]["grad_norm"]
    # the mean of two halves centers each by itself, so it is the same but for that
    assert sizes["twice"] == pytest.approx(sizes["once"], rel=0.2)


def test_each_vector_loss_has_its_own_weight(corpus, tmp_path):
    """A second loss of nearly no weight changes nothing of the first, nor what is logged of it."""
    found = {}
    for contrast in (0.0, 1e-9):
        options = RUN | {"max_steps": 1, "save_steps": 1, "kmer_codes": 1000.0, "contrast": contrast}
        genoembed.pretrain(corpus, tmp_path / str(contrast), **options)
        found[contrast] = lines_of(tmp_path / str(contrast))[0]
    for key in ("grad_norm", *(f"kmer_loss_{path}" for path in LAYERS)):
        assert found[1e-9][key] == pytest.approx(found[0.0][key], rel=1e-3)


def test_contrast_moves_the_weights_by_its_weight(corpus, tmp_path):
    norms = []
    for weight in (1000.0, 2000.0):
        options = RUN | {"max_steps": 1, "save_steps": 1, "kmer_codes": 0.0, "contrast": weight}
        genoembed.pretrain(corpus, tmp_path / str(weight), **options)
        norms.append(lines_of(tmp_path / str(weight))[0]["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-2)


def test_joined_layers_learn_codes_as_one_vector(corpus, tmp_path):
    options = RUN | {"max_steps": 20, "logging_steps": 5, "save_steps": 20, "learning_rate": 2e-2}
    options |= {"contrast_layers": ("2+1", "final"), "contrast": 1e-9, "kmer_size": 4}
    genoembed.pretrain(corpus, tmp_path / "run", **options)
    lines = lines_of(tmp_path / "run")
    joined = "blocks.2.mlp.l3+blocks.1.mlp.l3"
    for path in (joined, "norm"):
        assert lines[-1][f"kmer_loss_{path}"] < lines[0][f"kmer_loss_{path}"] - 0.03
    assert f"contrast_loss_{joined}" in lines[0]
    assert load_file(tmp_path / "run" / CODES_FILE)["codes"].shape == (136, 64)


def test_codes_are_of_the_corpus_and_not_of_the_seed(corpus, whole, tmp_path):
    options = RUN | {"max_steps": 1, "save_steps": 1, "seed": 7}
    genoembed.pretrain(corpus, tmp_path / "run", **options)
    assert (tmp_path / "run" / CODES_FILE).read_bytes() == (whole / CODES_FILE).read_bytes()


@pytest.mark.parametrize("family", ["llama"])
def test_other_architectures_learn_so_too(family, corpus, tmp_path):
    save_causal(family, tmp_path / "model")
    shape = dict.fromkeys(("like", "hidden_size", "layers"))
    options = RUN | shape | {"model": str(tmp_path / "model"), "max_steps": 2, "save_steps": 2, "window": 64}
    genoembed.pretrain(corpus, tmp_path / "run", **options)
    assert any(key.startswith("kmer_loss") for key in lines_of(tmp_path / "run")[-1])


def test_what_cannot_be_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="isolate: contrast and kmer_codes look at rows as they are"):
        genoembed.pretrain(corpus, tmp_path / "a", **RUN | {"isolate": True})
    with pytest.raises(ConfigError, match="contrast_layers is empty"):
        VectorLossConfig(contrast_layers=())
    with pytest.raises(LayerError, match="layer '9' is not in"):
        genoembed.pretrain(corpus, tmp_path / "b", **RUN | {"contrast_layers": (9,)})
    with pytest.raises(ConfigError, match=r"contrast_layers: '1\+2\+3' asks for 96 .* only 32"):
        genoembed.pretrain(corpus, tmp_path / "d", **RUN | {"contrast_layers": ("1+2+3",)})
    short = tmp_path / "short.fa"
    short.write_text(">a\nACGTACGT\n>b\nACGGACGT\n>c\nGGGTACGT\n")
    held = tmp_path / "held.fa"
    held.write_text(">d\nACGTTTTTTT\n")
    options = {key: value for key, value in RUN.items() if key != "heldout_fraction"} | {"heldout": str(held)}
    with pytest.raises(ConfigError, match="kmer_codes: the corpus has no document of 20 bases"):
        genoembed.pretrain(short, tmp_path / "c", **options)
    keys = {"corpus": "a", "heldout": "b", "like": "evo2_7b", "max_steps": 1, "contrast_layers": 3}
    assert train_config(keys).vectors.contrast_layers == ("3",)
