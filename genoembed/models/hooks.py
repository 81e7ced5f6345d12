"""Capture what named modules return during one forward pass, and stop as soon as all have returned.

In: a module, module paths, optionally a reduction. Out: one tensor per path, in the requested order.
Promised: the hooks are removed whatever happens, modules behind the deepest requested one never run, and the
model computes the same afterwards as before.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from genoembed.errors import LayerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle


class _AllCapturedError(BaseException):
    """Ends the forward pass; not an `Exception`, so that no model's own error handling keeps it."""

    def __init__(self, owner: _Capture) -> None:
        self.owner = owner
        super().__init__("all layers are captured")


class _Capture:
    """What one forward pass has given so far."""

    def __init__(self, paths: Sequence[str], reduce: Callable[[str, Tensor], Tensor] | None) -> None:
        self.reduce = reduce
        self.outputs: dict[str, Tensor] = {}
        self.pending = dict.fromkeys(paths)

    def take(self, path: str, output: object) -> None:
        """Keep one module's output; leave the pass when it was the last requested one."""
        if path not in self.pending:
            message = (
                f"layer {path!r} ran more than once in a forward pass, expected once: it is shared between "
                "blocks; capture a module that runs once"
            )
            raise LayerError(message, spec=path)
        tensor = first_tensor(output, path=path)
        self.outputs[path] = tensor if self.reduce is None else self.reduce(path, tensor)
        del self.pending[path]
        if not self.pending:
            raise _AllCapturedError(self)


@contextmanager
def capture(
    module: nn.Module,
    paths: Sequence[str],
    *,
    reduce: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Capture the outputs of several modules in the one forward pass that the ``with`` body makes.

    The body's statements after the forward call do not run: the pass ends by leaving the body.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh())
        >>> with capture(model, ["0"]) as outputs:
        ...     _ = model(torch.tensor([-1.0, 2.0]))
        >>> outputs["0"]
        tensor([0., 2.])
    """
    state = _Capture(paths, reduce)
    outputs: dict[str, Tensor] = {}
    try:
        with hooked(module, _checked(module, state.pending), state.take):
            yield outputs
    except _AllCapturedError as stop:
        if stop.owner is not state:
            raise
    if state.pending:
        never = next(iter(state.pending))
        message = f"layer {never!r} did not run in the forward pass; capture a module that the model calls"
        raise LayerError(message, spec=never)
    outputs.update({path: state.outputs[path] for path in dict.fromkeys(paths)})


@contextmanager
def hooked(module: nn.Module, paths: Iterable[str], take: Callable[[str, object], object]) -> Iterator[None]:
    """Call back with each path and what its module returns, in the forward passes of the body."""
    handles: list[RemovableHandle] = []
    try:
        for path in paths:

            def hook(_module: nn.Module, _inputs: object, output: object, path: str = path) -> None:
                take(path, output)  # what a hook returns would replace the module's output

            handles.append(module.get_submodule(path).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: object, *, path: str) -> Tensor:
    """Take the activations out of what a module returned."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict) and output:
        return first_tensor(next(iter(output.values())), path=path)
    if isinstance(output, (tuple, list)) and output:
        return first_tensor(output[0], path=path)
    found = type(output).__name__
    message = f"layer {path!r} returns {found}, expected a tensor; name a module inside or around it"
    raise LayerError(message, spec=path)


def as_rows(activations: Tensor, mask_BL: Tensor, *, path: str) -> Tensor:
    """Return activations as ``(B, L, D)``; some models run their blocks on the real tokens only."""
    if activations.dim() == 3 and activations.shape[:2] == mask_BL.shape:
        return activations
    if activations.dim() == 2 and activations.shape[0] == int(mask_BL.sum()):
        rows_BLD = activations.new_zeros(*mask_BL.shape, activations.shape[1])
        # not in place, so that gradients pass
        return rows_BLD.masked_scatter(mask_BL.bool()[..., None], activations)
    batch, length = mask_BL.shape
    message = (
        f"layer {path!r} gives shape {tuple(activations.shape)}, expected one vector per token, "
        f"({batch}, {length}, D); name a block, a norm or an MLP"
    )
    raise LayerError(message, spec=path)


def _checked(module: nn.Module, paths: dict[str, None]) -> list[str]:
    known = {path for path, _ in module.named_modules()}
    for path in paths:
        if path not in known:
            message = f"layer {path!r} is not in {type(module).__name__}; resolve specs to module paths first"
            raise LayerError(message, spec=path)
    if not paths:
        message = "layers: none given to capture, expected at least one; name a module path"
        raise LayerError(message, spec="")
    return list(paths)
