"""GradCache has the gradient of one pass with one graph: dropout, autocast and the loss's scale included."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from genoembed.config.retrieval import ContrastiveConfig, M3HeadsConfig, M3LossConfig
from genoembed.errors import ConfigError
from genoembed.retrieval.contrastive import info_nce
from genoembed.retrieval.grad_cache import cached_backward
from genoembed.retrieval.heads import M3Heads
from genoembed.retrieval.m3 import M3Loss, M3Vectors, join_vectors
from genoembed.retrieval.terms import TokenTerms

WIDTH = 8
CONFIG = ContrastiveConfig(temperature=0.2, scope="full")


def model(dropout=0.0, seed=0, dtype=torch.float64):
    layers = nn.Sequential(
        nn.Linear(WIDTH, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, WIDTH), nn.Dropout(dropout)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return layers.to(dtype)


def chunks(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(size * g, WIDTH, generator=generator).to(dtype) for g in (1, 2))
        for size in (3, 1, 4)
    ]


def encode_with(encoder):
    return lambda chunk: {"query": encoder(chunk[0]), "passage": encoder(chunk[1])}


def loss_of(parts):
    query, passage = (torch.cat([part[name] for part in parts]) for name in ("query", "passage"))
    return info_nce(query, passage, config=CONFIG)


def gradients(encoder):
    return torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()])


def test_grad_cache_equals_one_pass_over_the_whole_batch():
    cached, whole = model(), model()
    output = cached_backward(chunks(), encode=encode_with(cached), loss=loss_of)
    query, passage = (torch.cat(side) for side in zip(*chunks(), strict=True))
    plain = info_nce(whole(query), whole(passage), config=CONFIG)
    plain.loss.backward()
    assert output.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert output.statistics.queries == 8
    assert not output.loss.requires_grad
    torch.testing.assert_close(gradients(cached), gradients(whole), rtol=1e-9, atol=1e-12)
    assert float(gradients(cached).norm()) > 0.01


def test_grad_cache_draws_the_same_dropout_twice():
    cached, whole = (model(dropout=0.4).train() for _ in range(2))
    torch.manual_seed(5)
    output = cached_backward(chunks(), encode=encode_with(cached), loss=loss_of)
    state_after = torch.get_rng_state()
    torch.manual_seed(5)
    with_graph = loss_of([encode_with(whole)(chunk) for chunk in chunks()])
    with_graph.loss.backward()
    assert output.loss.item() == with_graph.loss.item()
    torch.testing.assert_close(gradients(cached), gradients(whole), rtol=1e-9, atol=1e-12)
    # and leaves the generator where one pass leaves it
    assert torch.equal(torch.get_rng_state(), state_after)


def test_grad_cache_scales_and_accumulates():
    once, twice = model(), model()
    cached_backward(chunks(), encode=encode_with(once), loss=loss_of)
    for _ in range(2):
        cached_backward(
            chunks(), encode=encode_with(twice), loss=loss_of, backward=lambda loss: (loss * 8).backward()
        )
    torch.testing.assert_close(gradients(twice), 16 * gradients(once))


def test_grad_cache_under_autocast_reaches_the_weights():
    cached, whole = (model(dtype=torch.float32) for _ in range(2))
    batch = chunks(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached_backward(batch, encode=encode_with(cached), loss=loss_of)
        loss_of([encode_with(whole)(chunk) for chunk in batch]).loss.backward()
    difference = (gradients(cached) - gradients(whole)).norm() / gradients(whole).norm()
    assert float(difference) < 0.02
    assert all(float(parameter.grad.norm()) > 0 for parameter in cached.parameters())


def test_grad_cache_holds_one_graph_at_a_time():
    alive, most = [], []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if torch.is_grad_enabled() or x.requires_grad:
                alive.append(1)
                most.append(len(alive))
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            alive.pop()
            return grad

    encoder = model()

    def encode(chunk):
        return {name: Marked.apply(value) for name, value in encode_with(encoder)(chunk).items()}

    cached_backward(chunks(), encode=encode, loss=loss_of)
    assert max(most) == 2  # query and passage of one chunk
    assert len(most) == 6


def test_grad_cache_syncs_with_the_last_chunk_alone():
    events = []

    @contextmanager
    def without_sync():
        events.append("held")
        yield
        events.append("let go")

    cached_backward(chunks(), encode=encode_with(model()), loss=loss_of, without_sync=without_sync)
    assert events == ["held", "let go"] * 2


def test_grad_cache_takes_the_three_representations():
    def run(cached):
        encoder, loss = model(), M3Loss(M3LossConfig(temperature=0.5, self_distillation_start=-1))
        heads = M3Heads(WIDTH, M3HeadsConfig(vector_window=2)).double()
        generator = torch.Generator().manual_seed(1)
        lengths = (5, 3)
        inputs = [torch.randn(3, n, WIDTH, generator=generator, dtype=torch.float64) for n in lengths]
        terms = [torch.randint(0, 3, (3, n), generator=generator) for n in lengths]

        def encode(number):
            states, ids = inputs[number], terms[number]
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            mask = torch.ones(ids.shape, dtype=torch.bool)
            found = heads(encoder(states), mask, terms=TokenTerms(ids=ids, positions=positions))
            return found.tensors()

        def both(parts):
            rows = join_vectors(parts).tensors()
            query = M3Vectors(**{name: value[[0, 3]] for name, value in rows.items()})
            passage = M3Vectors(**{name: value[[1, 2, 4, 5]] for name, value in rows.items()})
            return loss(query, passage)

        if cached:
            cached_backward([0, 1], encode=encode, loss=both)
        else:
            both([encode(0), encode(1)]).loss.backward()
        assert int(loss.forwards) == 1
        return torch.cat([gradients(encoder), gradients(heads)])

    torch.testing.assert_close(run(cached=True), run(cached=False), rtol=1e-9, atol=1e-12)


def test_grad_cache_refuses_nothing_and_what_cannot_learn():
    with pytest.raises(ConfigError, match="chunks: none were given"):
        cached_backward([], encode=encode_with(model()), loss=loss_of)
    frozen = model().requires_grad_(False)
    with pytest.raises(ConfigError, match="none has a gradient; let parameters"):
        cached_backward(chunks(), encode=encode_with(frozen), loss=loss_of)
