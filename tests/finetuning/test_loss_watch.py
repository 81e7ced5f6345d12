"""Warnings about training that learns nothing: the right one, in time, once, and none where all is well."""

from __future__ import annotations

import warnings

import pytest
import torch

from genoembed.config.retrieval import ContrastiveConfig
from genoembed.errors import GenoembedWarning, TrainingWarning
from genoembed.finetuning.trainer import LossWatch
from genoembed.retrieval.contrastive import info_nce, supervised_contrastive
from genoembed.retrieval.m3 import M3Loss, M3Vectors

CONFIG = ContrastiveConfig(temperature=0.5)


def vectors(count=4, seed=0):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_loss_watch_is_silent_while_a_model_learns():
    watch = LossWatch(patience=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            query = vectors(seed=seed)
            watch.observe(info_nce(query, query + vectors(seed=seed + 9), config=CONFIG))
    assert watch.seen == set()


def test_loss_watch_says_at_once_that_there_is_no_negative():
    watch = LossWatch()
    with pytest.warns(
        TrainingWarning, match="no query has a negative .* raise the batch size or train_group"
    ):
        watch.observe(info_nce(vectors(1), vectors(1)))
    assert issubclass(TrainingWarning, GenoembedWarning)


def test_loss_watch_says_that_the_loss_is_that_of_guessing():
    same = torch.ones(4, 8)
    watch = LossWatch(patience=3, least_spread=0)
    for _ in range(2):
        watch.observe(info_nce(same, same, config=CONFIG))
    with pytest.warns(
        TrainingWarning, match=r"has been 1\.386 for 3 steps, the value of guessing among 4\.0"
    ):
        watch.observe(info_nce(same, same, config=CONFIG))
    watch.observe(info_nce(same, same, config=CONFIG))  # not again
    assert watch.seen == {"chance"}


def test_loss_watch_sees_a_constant_dense_head_beside_others_that_learn():
    tokens, mask = vectors(4)[:, None], torch.ones(4, 1, dtype=torch.bool)
    made = M3Vectors(
        dense=torch.ones(4, 8),
        term_ids=torch.arange(4)[:, None],
        term_weights=torch.ones(4, 1),
        tokens=tokens,
        token_mask=mask,
    )
    watch = LossWatch(patience=1, least_spread=0)
    with pytest.warns(TrainingWarning, match="the pooling is not a constant, as the first token"):
        watch.observe(M3Loss()(made, made))


def test_loss_watch_starts_counting_anew_after_a_good_step():
    same, watch = torch.ones(4, 8), LossWatch(patience=2, least_spread=0)
    for _ in range(3):
        watch.observe(info_nce(same, same, config=CONFIG))
        watch.observe(info_nce(vectors(), vectors(), config=CONFIG))
    assert watch.seen == set()


def test_loss_watch_says_that_a_loss_of_zero_teaches_nothing():
    query = torch.eye(4) * 100
    watch = LossWatch(patience=2)
    watch.observe(info_nce(query, query, config=CONFIG))
    with pytest.warns(TrainingWarning, match=r"exactly 0 for 2 steps with 3\.0 negatives per query"):
        watch.observe(info_nce(query, query, config=CONFIG))
    assert watch.seen == {"zero"}


def test_loss_watch_says_that_vectors_have_collapsed():
    watch = LossWatch(patience=1, near_chance=0)
    near_one = torch.nn.functional.normalize(torch.ones(4, 8) + 1e-3 * vectors(), dim=-1)
    with pytest.warns(TrainingWarning, match=r"almost one vector \(spread .*the encoder has collapsed"):
        watch.observe(info_nce(near_one, near_one, config=CONFIG))


def test_loss_watch_knows_losses_over_labels():
    watch = LossWatch(patience=1, least_spread=0)
    with pytest.warns(TrainingWarning, match="the value of guessing"):
        watch.observe(supervised_contrastive(torch.ones(4, 2), torch.tensor([0, 0, 1, 1])))
    with pytest.warns(TrainingWarning, match="no query has a negative"):
        watch.observe(supervised_contrastive(vectors(2), torch.tensor([0, 1])))
