"""What can be captured in a model, without its weights.

In: a name, as `load_model` takes it. Out: the layers that the loaded model would have, what a layer number
means, and up to which block. Promised: no weights are fetched or read, and memory does not grow with the
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from genoembed.models.behavior import Probe
from genoembed.models.layers import (
    has_numbered_blocks,
    list_layers,
    num_blocks,
    number_template,
)
from genoembed.models.locate import find_source
from genoembed.models.names import BUNDLED_NAME
from genoembed.models.provenance import weight_sizes
from genoembed.models.striped_hyena2.folder import read_shape
from genoembed.models.striped_hyena2.network import PlainStripedHyena2

if TYPE_CHECKING:
    from torch import nn

    from genoembed.contracts import LayerInfo
    from genoembed.models.registry import ModelSource


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayers:
    """The layers of a model, and what short names mean among them."""

    name: str
    """The model's name as given."""
    layers: tuple[LayerInfo, ...]
    """Every module that can be captured, in the model's order."""
    template: str | None
    """Module path that a layer number means, with ``{index}`` in place of the number; None where the blocks
    share one module, so that numbers mean nothing."""
    num_blocks: int
    """Layer numbers go from 0 to one below this, or from minus this to -1, counted from the end."""
    final: str | None
    """Module path that ``final`` means; None where no module is seen to return the last hidden states, which
    the code of some models shows only with weights."""

    @property
    def numbered(self) -> tuple[str, ...]:
        """Module paths that the layer numbers mean, from 0."""
        if self.template is None:
            return ()
        return tuple(self.template.format(index=index) for index in range(self.num_blocks))


def describe_layers(
    name_or_path: str = BUNDLED_NAME, *, trust_remote_code: bool = False, revision: str | None = None
) -> ModelLayers:
    """List what can be captured in a model; nothing but its configuration is read.

    Names of the registry need no files at all, Hugging Face ids their ``config.json`` (and the code, if it is
    trusted). Modules for which a checkpoint holds no weights, such as an untrained pooler, are listed too.

    Args:
        name_or_path: Bundled or registry name, local folder, short name of a published model, or Hugging Face
            id; looked for in this order.
        trust_remote_code: Run code that the model's repository brings.
        revision: Branch, tag or commit of a Hugging Face repository.

    Returns:
        Its layers, with widths where they are known without running it.

    Raises:
        ModelNotFoundError: If nothing answers to the name.
        ModelError: If the model needs code that is not trusted, or its configuration describes none.

    Example:
        >>> described = describe_layers("evo2_7b")
        >>> described.template, described.num_blocks, described.final
        ('blocks.{index}.mlp.l3', 32, 'norm')
    """
    source = find_source(name_or_path, revision=revision, with_weights=False)
    module = _build(source, trust_remote_code=trust_remote_code)
    return ModelLayers(
        name=name_or_path,
        layers=list_layers(module),
        template=number_template(module) if has_numbered_blocks(module) else None,
        num_blocks=num_blocks(module),
        final=Probe(module, special_ids=(), pad_token_id=None).final_path(),
    )


def count_up_to(
    name: str, limit: int, *, trust_remote_code: bool = False, revision: str | None = None
) -> int:
    """Count the parameters of a model without its weights; below the limit, a number that may be too high."""
    source = find_source(name, revision=revision, with_weights=False)
    sizes = None if source.entry is not None else weight_sizes(source.folder)
    if sizes is not None and sizes.num_values < limit:
        return sizes.num_values  # bytes, of which a parameter takes one or more: no need to build it
    module = _build(source, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in module.parameters())


def _build(source: ModelSource, *, trust_remote_code: bool) -> nn.Module:
    shape = None if source.entry is None else source.entry.shape
    if shape is None and source.folder is not None and source.adapter is None:
        shape = read_shape(source.folder)
    if shape is not None:
        with torch.device("meta"):
            return PlainStripedHyena2(shape)
    from genoembed.models.architecture import build_without_weights, read_config

    config, _ = read_config(source, {"trust_remote_code": trust_remote_code, "revision": source.revision})
    return build_without_weights(source, config, trust_remote_code=trust_remote_code)
