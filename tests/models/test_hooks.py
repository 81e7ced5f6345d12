"""Capture: one pass, the right tensors, an early end, and a model that is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genoembed.errors import LayerError
from genoembed.models.layers import capture, first_tensor


class Counting(nn.Module):
    """Adds one, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + 1


class Nested(nn.Module):
    """A parent that does something after its child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Counting()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.child(x) * 10, None


def chain(length: int) -> nn.Sequential:
    return nn.Sequential(*(Counting() for _ in range(length)))


def _fail(*_: object) -> None:
    message = "out of memory"
    raise RuntimeError(message)


def hooks_left(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) for child in module.modules())


def hidden_states(model, batch):
    arguments = {"attention_mask": batch.attention_mask} if model.accepts_attention_mask else {}
    with torch.inference_mode():
        return model.module(batch.input_ids, output_hidden_states=True, **arguments).hidden_states


def test_each_block_equals_the_next_hidden_state(family, tiny_model, batch):
    model = tiny_model(family)
    states = hidden_states(model, batch)
    layers = model.resolve("all")
    # transformers' Mamba leaves the embedding out of hidden_states, and keeps the last block beside the norm
    offset = 0 if family == "mamba" else 1
    # the last entry is behind the final norm, where there is one
    has_norm = model.resolve("final") != model.resolve(-1)
    compared = layers if family == "mamba" or not has_norm else layers[:-1]
    assert len(compared) >= 1
    assert len(states) == len(layers) + 1
    for index, layer in enumerate(compared):
        captured = model.forward(batch, [layer.path])[layer.path]
        torch.testing.assert_close(captured, states[index + offset], rtol=0, atol=1e-6)


def test_all_blocks_at_once_equal_one_at_a_time(family, tiny_model, batch):
    model = tiny_model(family)
    every = [layer.path for layer in model.resolve(["final", "all"])]
    together = model.forward(batch, every)
    assert list(together) == every
    for path in every:
        assert torch.equal(together[path], model.forward(batch, [path])[path])


def test_final_equals_last_hidden_state(family, tiny_model, batch):
    model = tiny_model(family)
    (final,) = model.resolve("final")
    captured = model.forward(batch, [final.path])[final.path]
    torch.testing.assert_close(captured, hidden_states(model, batch)[-1], rtol=0, atol=1e-6)


def test_last_block_before_the_final_norm_leads_to_final(tiny_model, batch):
    model = tiny_model("llama")
    captured = model.forward(batch, ["layers.2", "norm"])
    with torch.inference_mode():
        assert torch.equal(model.module.norm(captured["layers.2"]), captured["norm"])
    assert not torch.allclose(captured["layers.2"], captured["norm"])


def test_early_exit_never_calls_what_is_deeper():
    model = chain(8)
    with capture(model, ["4", "2"]) as outputs:
        model(torch.zeros(1))
    assert [child.calls for child in model] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert {path: value.item() for path, value in outputs.items()} == {"4": 5.0, "2": 3.0}
    assert list(outputs) == ["4", "2"]


def test_early_exit_stops_real_models_too(family, tiny_model, batch):
    model = tiny_model(family)
    called = []
    (first, last) = model.resolve([0, -1])
    model.forward(batch, [last.path])  # the facts about padding are found by running the model, once
    handle = model.module.get_submodule(last.path).register_forward_hook(lambda *_: called.append(1))
    try:
        model.forward(batch, [first.path])
        assert called == []
        model.forward(batch, [last.path])
        assert called == [1]
    finally:
        handle.remove()


def test_forward_afterwards_equals_forward_before(family, tiny_model, batch):
    model = tiny_model(family)
    before = hidden_states(model, batch)
    hooks_before = hooks_left(model.module)  # transformers leaves some of its own behind
    model.forward(batch, [model.resolve(0)[0].path])
    assert hooks_left(model.module) == hooks_before
    after = hidden_states(model, batch)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_parent_and_child_are_both_captured():
    model = nn.Sequential(Nested())
    with capture(model, ["0", "0.child"]) as outputs:
        model(torch.zeros(1))
    assert outputs["0"].item() == 10.0
    assert outputs["0.child"].item() == 1.0


def test_captured_tensor_is_the_one_the_module_returned():
    model = nn.Sequential(nn.Identity())
    given = torch.ones(2, dtype=torch.bfloat16)
    with capture(model, ["0"]) as outputs:
        model(given)
    assert outputs["0"] is given


def test_reduce_is_called_at_once_and_its_result_kept():
    model = chain(3)
    seen = []

    def reduce(path: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append((path, [child.calls for child in model]))
        return tensor.sum()

    with capture(model, ["2", "0"], reduce=reduce) as outputs:
        model(torch.ones(4))
    assert seen == [("0", [1, 0, 0]), ("2", [1, 1, 1])]
    assert {path: value.item() for path, value in outputs.items()} == {"2": 16.0, "0": 8.0}


def test_hooks_go_when_the_body_raises():
    model = chain(2)
    model[0].register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"), capture(model, ["1"]):
        model(torch.zeros(1))
    assert hooks_left(model) == 0


def test_captures_nest_without_stealing_the_end():
    model = chain(3)
    with capture(model, ["2"]) as outer:
        with capture(model, ["0"]) as inner:
            model(torch.zeros(1))
        model(torch.zeros(1))
    assert (inner["0"].item(), outer["2"].item()) == (1.0, 3.0)
    assert hooks_left(model) == 0


def test_models_own_error_handling_does_not_keep_the_end():
    class Swallowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Counting()
            self.reached = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.inner(x)
            except Exception:  # noqa: BLE001 - what careless model code does
                self.reached = True
                return x

    model = Swallowing()
    with capture(model, ["inner"]) as outputs:
        model(torch.zeros(1))
    assert not model.reached
    assert outputs["inner"].item() == 1.0


def test_layer_that_never_runs_is_an_error():
    model = nn.ModuleDict({"used": Counting(), "idle": Counting()})
    with pytest.raises(LayerError, match="layer 'idle' did not run"), capture(model, ["used", "idle"]):
        model["used"](torch.zeros(1))
    assert hooks_left(model) == 0


def test_layer_that_runs_twice_before_the_end_is_an_error():
    shared = Counting()
    model = nn.Sequential(shared, shared, nn.Tanh())
    with pytest.raises(LayerError, match="layer '0' ran more than once"), capture(model, ["0", "2"]):
        model(torch.zeros(1))


@pytest.mark.parametrize(("asked", "expected"), [(["nope"], "layer 'nope' is not in"), ([], "none given")])
def test_paths_are_checked_before_the_pass(asked, expected):
    with pytest.raises(LayerError, match=expected), capture(chain(1), asked):
        pytest.fail("the body must not run")


def test_first_tensor_looks_in_front():
    tensor = torch.zeros(1)
    assert first_tensor({"last_hidden_state": (tensor, None)}, path="p") is tensor
    with pytest.raises(LayerError, match="layer 'p' returns NoneType, expected a tensor"):
        first_tensor((None, tensor), path="p")
