"""What a forward pass is about: token ids, or tokens that are embedded already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor, nn


def embed_inputs(embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Embed token ids unless embedded tokens are given; raise `ShapeError` for both and for neither."""
    if (input_ids is None) == (inputs_embeds is None):
        message = "give exactly one of input_ids and inputs_embeds"
        raise ShapeError(message)
    embedded: Tensor = embedding(input_ids) if inputs_embeds is None else inputs_embeds
    return embedded
