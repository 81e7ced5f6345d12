"""Filters laid out once: used again for the same weights, never for others."""

from __future__ import annotations

import pytest
import torch

from genoembed import StripedHyena2Config, StripedHyena2Model
from genoembed.models.striped_hyena2 import operators
from genoembed.models.striped_hyena2.operators import convolution_matrix, modal_matrices


@pytest.fixture
def model() -> StripedHyena2Model:
    torch.manual_seed(0)
    config = StripedHyena2Config(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
        attn_layer_idxs=[],
        hcs_layer_idxs=[],
        hcm_layer_idxs=[0],
        hcl_layer_idxs=[1],
    )
    return StripedHyena2Model(config).eval()


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """Names of what is laid out, in order."""
    made: list[str] = []
    for build in (convolution_matrix, modal_matrices):

        def counted(*weights, build=build, **rest):
            made.append(build.__name__)
            return build(*weights, **rest)

        monkeypatch.setattr(operators, build.__name__, counted)
    return made


IDS = torch.tensor([list(b"ACGTTGCA" * 20)])


def test_filters_are_laid_out_once_for_weights_length_and_dtype(model, builds) -> None:
    both = ["convolution_matrix", "modal_matrices"]
    with torch.inference_mode():
        first = model(IDS).last_hidden_state
        again = model(IDS).last_hidden_state
        assert torch.equal(first, again)
        assert builds == both
        model(IDS[:, :150])  # as many chunks are covered by the same matrices
        assert builds == both
        model(IDS[:, :20])
        assert builds == both * 2


@pytest.mark.parametrize(
    "name", ["blocks.0.filter.h", "blocks.1.filter.log_poles", "blocks.1.filter.residues"]
)
def test_changed_weights_are_laid_out_anew_even_behind_the_version_counter(model, name) -> None:
    with torch.inference_mode():
        before = model(IDS).last_hidden_state
    model.get_parameter(name).data.mul_(1.5)
    with torch.inference_mode():
        kept = model(IDS).last_hidden_state
    fresh = StripedHyena2Model(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(kept, fresh(IDS).last_hidden_state)
    assert not torch.equal(kept, before)


def test_training_lays_out_anew_and_gives_gradients(model, builds) -> None:
    for _ in range(2):
        model(IDS).last_hidden_state.sum().backward()
    assert len(builds) == 4
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        kept = model(IDS).last_hidden_state
    assert torch.equal(kept, model(IDS).last_hidden_state.detach())
