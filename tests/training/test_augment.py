"""Augmentation: pure, seeded, and labels of bases stay with their bases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.config.labeled import AugmentConfig
from genoembed.errors import ConfigError, ShapeError
from genoembed.sequences import reverse_complement
from genoembed.training.augment import (
    Augmented,
    augment,
    augmentation_rng,
    point_mutations,
    random_crop,
    random_strand,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_strand_is_turned_at_its_probability():
    view = Augmented(b"AACG")
    assert random_strand(view, rng(), probability=0.0) is view
    assert random_strand(view, rng(), probability=1.0).sequence == b"CGTT"
    generator = rng()
    turned = sum(random_strand(view, generator, probability=0.3) != view for _ in range(2000))
    assert turned / 2000 == pytest.approx(0.3, abs=0.04)


@settings(max_examples=100)
@given(
    sequence=st.text("ACGTNacgt", min_size=1, max_size=50).map(str.encode),
    fraction=st.floats(0.01, 1.0),
    max_bp=st.none() | st.integers(1, 60),
    seed=st.integers(0, 100),
)
def test_labels_of_bases_follow_crop_and_strand(sequence, fraction, max_bp, seed):
    numbers = tuple(map(str, range(len(sequence))))
    config = AugmentConfig(reverse_complement=0.5, crop_fraction=fraction, max_crop_bp=max_bp)
    view = augment(Augmented(sequence, numbers), rng(seed), config=config)
    places = [int(name) for name in view.token_labels]
    step = places[1] - places[0] if len(places) > 1 else 0
    assert step in (-1, 0, 1)
    assert places == list(range(places[0], places[0] + (step or 1) * len(places), step or 1))
    piece = bytes(sequence[place] for place in sorted(places))
    if len(places) > 1:
        assert view.sequence == (piece if step == 1 else reverse_complement(piece))
    least = min(max_bp or len(sequence), max(1, int(np.ceil(len(sequence) * fraction - 1e-9))))
    assert least <= len(view.sequence) <= min(len(sequence), max_bp or len(sequence))


def test_crop_reaches_every_place_and_length():
    generator = rng()
    sequence = b"ACGTGATC"
    pieces = {random_crop(Augmented(sequence), generator, min_fraction=0.75).sequence for _ in range(300)}
    expected = {sequence[i : i + n] for n in (6, 7, 8) for i in range(8 - n + 1)}
    assert pieces == expected
    assert random_crop(Augmented(sequence), generator).sequence == sequence


def test_mutations_hit_at_their_rate_evenly_and_never_in_place():
    sequence = b"A" * 30_000
    mutated = point_mutations(Augmented(sequence), rng(), rate=0.12).sequence
    counts = {letter: mutated.count(letter) for letter in (b"A", b"C", b"G", b"T")}
    assert len(mutated) == 30_000
    assert 1 - counts[b"A"] / 30_000 == pytest.approx(0.12, abs=0.01)
    assert all(counts[letter] / 30_000 == pytest.approx(0.04, abs=0.006) for letter in (b"C", b"G", b"T"))
    assert sequence == b"A" * 30_000


def test_mutations_keep_case_other_letters_and_labels():
    view = Augmented(b"acgtNRnACGT", tuple("0123456789x"))
    mutated = point_mutations(view, rng(), rate=1.0)
    assert mutated.sequence[4:7] == b"NRn"
    assert mutated.sequence[:4].islower()
    assert mutated.sequence[7:].isupper()
    assert all(a != b for a, b in zip(mutated.sequence[:4], b"acgt", strict=True))
    assert set(mutated.sequence.upper()) <= set(b"ACGTNR")
    assert mutated.token_labels == view.token_labels
    assert point_mutations(view, rng(), rate=0.0) is view


def test_augment_depends_on_seed_epoch_and_row_alone():
    config = AugmentConfig(reverse_complement=0.5, crop_fraction=0.5, mutation_rate=0.1)
    view = Augmented(b"ACGTTGCAAGCT" * 10)

    def one(**key):
        return augment(view, augmentation_rng(**key), config=config)

    assert one(seed=1, epoch=2, row=3) == one(seed=1, epoch=2, row=3)
    others = [one(seed=0, epoch=2, row=3), one(seed=1, epoch=0, row=3), one(seed=1, epoch=2, row=0)]
    assert all(other != one(seed=1, epoch=2, row=3) for other in others)


def test_augment_does_nothing_by_default():
    view = Augmented(b"ACGT", tuple("abcd"))
    assert augment(view, rng(), config=AugmentConfig()) == view


def test_augment_refuses_labels_of_another_length():
    with pytest.raises(ShapeError, match="2 labels for 3 bases"):
        random_crop(Augmented(b"ACG", ("a", "b")), rng())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reverse_complement": 1.5}, "reverse_complement is 1.5; set reverse_complement from 0 to 1"),
        ({"mutation_rate": -0.1}, "mutation_rate is -0.1"),
        ({"crop_fraction": 0.0}, "crop_fraction is 0.0; set crop_fraction above 0"),
        ({"max_crop_bp": 0}, "max_crop_bp is 0; set max_crop_bp to 1 or more bases"),
    ],
)
def test_augment_config_refuses_what_makes_no_sense(options, match):
    with pytest.raises(ConfigError, match=match):
        AugmentConfig(**options)
