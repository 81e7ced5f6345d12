"""Big contrastive batches in small memory: the gradient of the whole batch, chunk by chunk (Gao et al. 2021).

First every chunk is encoded without a graph. The loss over all representations gives the gradient of each.
Then every chunk is encoded again, with a graph, and that gradient is sent through it. Promised: the gradient
is that of one pass over all chunks with one graph, dropout included, since a chunk draws the same random
numbers both times. Only the activations of one chunk are held.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from genoembed.training.log import LossOutput

    Representations: TypeAlias = Mapping[str, Tensor]


ChunkT = TypeVar("ChunkT")


def cached_backward(
    chunks: Sequence[ChunkT],
    *,
    encode: Callable[[ChunkT], Representations],
    loss: Callable[[list[Representations]], LossOutput],
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    without_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> LossOutput:
    """Run forward and backward of a batch; gradients are added to those of the parameters.

    Args:
        chunks: The batch in pieces, such as inputs of the encoder for a few rows each.
        encode: Gives the representations of a chunk by name; opens autocast itself if there is any. What is
            not floating (masks, terms) is passed on unchanged.
        loss: Gives the loss of the representations of all chunks, in their order.
        backward: What to do with the loss; a trainer scales it here. The scale reaches all gradients.
        without_sync: Held around all chunks but the last: ``no_sync`` of a model in data-parallel training.

    Returns:
        What ``loss`` gave, its tensor without graph.

    Raises:
        ConfigError: If there is no chunk, or no representation has a gradient.

    Example:
        >>> from genoembed.retrieval.contrastive import info_nce
        >>> layer = torch.nn.Linear(3, 2)
        >>> pairs = [(torch.rand(2, 3), torch.rand(2, 3)) for _ in range(4)]
        >>> def encode(pair):
        ...     return {"query": layer(pair[0]), "passage": layer(pair[1])}
        >>> def loss(parts):
        ...     return info_nce(*(torch.cat([part[key] for part in parts]) for key in ("query", "passage")))
        >>> cached_backward(pairs, encode=encode, loss=loss).statistics.queries
        8
        >>> layer.weight.grad.shape
        torch.Size([2, 3])
    """
    if not chunks:
        message = "chunks: none were given, expected at least one; leave out empty batches"
        raise ConfigError(message)
    states: list[_RandomState] = []
    cached: list[dict[str, Tensor]] = []
    # first pass: values alone, so that a loss over the whole batch needs no graph of the encoder
    with torch.no_grad():
        for chunk in chunks:
            states.append(_RandomState.now())
            cached.append({name: _leaf(value) for name, value in encode(chunk).items()})
    torch.clear_autocast_cache()  # casts made without a graph must not be taken again
    with torch.enable_grad():
        output = loss(list(cached))
        backward(output.loss)
    # what comes later must draw what it would draw after a plain pass, not after the last chunk's second one
    after = _RandomState.now()
    for number, (chunk, state, leaves) in enumerate(zip(chunks, states, cached, strict=True)):
        is_last = number == len(chunks) - 1
        with nullcontext() if is_last else without_sync():
            state.restore()  # the dropout of the first pass, or the gradient would be that of other values
            with torch.enable_grad():
                _send_back(encode(chunk), leaves)
    after.restore()
    return type(output)(loss=output.loss.detach(), statistics=output.statistics, parts=output.parts)


def _leaf(value: Tensor) -> Tensor:
    value = value.detach()
    # integer tensors (terms, masks) can have no gradient
    return value.requires_grad_() if value.is_floating_point() else value


def _send_back(representations: Representations, leaves: Mapping[str, Tensor]) -> None:
    pairs = [
        (value, leaves[name].grad)
        for name, value in representations.items()
        if value.requires_grad and leaves[name].grad is not None
    ]
    if not pairs:
        message = (
            "representations: none has a gradient; let parameters of the encoder or of its heads learn, and "
            "use the representations in the loss"
        )
        raise ConfigError(message)
    torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])


@dataclass(frozen=True, slots=True)
class _RandomState:
    """State of the generators that dropout draws from: the CPU's and the current CUDA device's."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> _RandomState:
        has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if has_cuda else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
