"""Which modules of a model can be captured, and what a layer spec means.

A spec is a block number from 0 (negative from the end), a module path (``encoder.layer.5``), a glob over
module paths (``blocks.*.mlp.l3``; ``*`` stays within one dot), ``final`` (what the model returns as
``last_hidden_state``) or ``all`` (every block). Specs resolve to module paths of the *base* model, the one
without language-model head.

A number means the output of that block, which equals ``hidden_states[i + 1]`` of transformers - except at the
last block of a model with a norm after the blocks: there transformers puts the normed states into
``hidden_states[-1]``, while the number means the block's own output and ``final`` the normed states. (The
``hidden_states`` of transformers' Mamba leave out the embedding: block ``i`` is ``hidden_states[i]`` there.)
A model may declare another meaning with a class attribute ``embedding_layer_template``, for instance
``"blocks.{index}.mlp.l3"``.

Nothing here knows the name of an architecture: the block list is the largest, shallowest list of modules
whose length is the depth that the configuration states.
"""

from __future__ import annotations

import difflib
import itertools
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from genoembed.contracts import LayerInfo
from genoembed.errors import LayerError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LayerSpec: TypeAlias = "int | str"

FINAL = "final"
ALL = "all"
_NUMBER = re.compile(r"[+-]?\d+")
_GLOB_CHARACTERS = frozenset("*?[")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim")


def find_blocks(module: nn.Module) -> str:
    """Find the list of blocks of a model by its structure."""
    lists = {
        path: child
        for path, child in module.named_modules()
        if path and isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 0
    }
    if not lists:
        message = f"{type(module).__name__}: it holds no list of blocks; name layers of another model"
        raise ModelError(message)
    depth = _config_number(module, _DEPTH_KEYS)

    def rank(path: str) -> tuple[bool, bool, int, int]:
        child = lists[path]
        size = sum(parameter.numel() for parameter in child.parameters())
        return (len(child) == depth, isinstance(child, nn.ModuleList), size, -path.count("."))

    return max(lists, key=rank)


def final_candidates(module: nn.Module) -> tuple[str, ...]:
    """List the modules that may give ``last_hidden_state``, the likeliest first.

    Norms next to the blocks (or next to what holds them) that are registered after them, the last block,
    norms registered before the blocks, and what holds the blocks. The order of registration is not the order
    of running (Evo 1 registers its final norm before the blocks, DeBERTa one for other tensors after them),
    so a forward pass decides: see :meth:`genoembed.models.behavior.Probe.final_path`.
    """
    blocks_path = find_blocks(module)
    width = _config_number(module, _WIDTH_KEYS)
    after: list[str] = []
    before: list[str] = []
    around: list[str] = []
    path = blocks_path
    while path:
        parent, _, name = path.rpartition(".")
        around += [parent] if parent else []
        seen = False
        for sibling, child in module.get_submodule(parent).named_children():
            if sibling == name:
                seen = True
            elif _is_norm(child, width):
                (after if seen else before).append(f"{parent}.{sibling}".lstrip("."))
        path = parent
    last = len(_blocks(module, blocks_path)) - 1
    return (*after, f"{blocks_path}.{last}", *before, *around)


def list_layers(module: nn.Module) -> tuple[LayerInfo, ...]:
    """List every module whose output can be captured."""
    blocks_path = find_blocks(module)
    return tuple(
        _layer_info(module, path, blocks_path)
        for path, child in module.named_modules()
        if path and not isinstance(child, _CONTAINERS) and path != blocks_path
    )


def num_blocks(module: nn.Module) -> int:
    """Count the blocks of a model."""
    return len(_blocks(module, find_blocks(module)))


def number_template(module: nn.Module) -> str:
    """Return the module path that a layer number means, with ``{index}`` for the number."""
    return getattr(module, "embedding_layer_template", None) or f"{find_blocks(module)}.{{index}}"


def has_numbered_blocks(module: nn.Module) -> bool:
    """Check whether layer numbers mean something: not where the blocks share one module."""
    return (_config_number(module, _DEPTH_KEYS) or num_blocks(module)) == num_blocks(module)


def resolve_layers(
    module: nn.Module,
    specs: LayerSpec | Sequence[LayerSpec],
    *,
    final_path: str | None = None,
    name: str | None = None,
) -> tuple[LayerInfo, ...]:
    """Turn layer specs into module paths; ``final_path`` is what ``final`` means."""
    asked = [specs] if isinstance(specs, (int, str)) else list(specs)
    if not asked:
        message = (
            "layers: none given, expected at least one; name a block number, a module path, 'final' or 'all'"
        )
        raise LayerError(message, spec="")
    resolver = _Resolver(module, final_path=final_path, name=name)
    paths = itertools.chain.from_iterable(resolver.paths(spec) for spec in asked)
    return tuple(_layer_info(module, path, resolver.blocks_path) for path in dict.fromkeys(paths))


class _Resolver:
    """The names of one model, and what each spec means among them."""

    def __init__(self, module: nn.Module, *, final_path: str | None, name: str | None) -> None:
        self.module = module
        self.name = name or type(module).__name__
        self.final_path = final_path
        self.blocks_path = find_blocks(module)
        self.depth = len(_blocks(module, self.blocks_path))
        self.stated_depth = _config_number(module, _DEPTH_KEYS) or self.depth
        self.template = number_template(module)
        self.known = {info.path: info for info in list_layers(module)}

    def paths(self, spec: LayerSpec) -> Iterator[str]:
        """Yield the module paths that a spec stands for."""
        text = str(spec).strip()
        if _NUMBER.fullmatch(text):
            yield self._block(int(text), spec)
        elif text == ALL:
            yield from (self._block(index, spec) for index in range(self.depth))
        elif text == FINAL:
            if self.final_path is None:
                message = (
                    f"layer {FINAL!r}: nothing in {self.name} returns last_hidden_state; name a block number"
                )
                raise LayerError(message, spec=FINAL)
            yield self.final_path
        elif _GLOB_CHARACTERS.intersection(text):
            # part by part, so that * stays within one dot: blocks.*.mlp is no module deeper down
            parts = text.split(".")
            split = ((path, path.split(".")) for path in self.known)
            inside = [p for p, own in split if len(own) == len(parts) and all(map(fnmatchcase, own, parts))]
            if not inside:
                raise self._unknown(text)
            yield from inside
        elif text in self.known:
            yield text
        else:
            raise self._unknown(text)

    def _block(self, index: int, spec: LayerSpec) -> str:
        if self.stated_depth != self.depth:
            message = (
                f"layer {str(spec)!r}: {self.name} states {self.stated_depth} blocks, but its list "
                f"{self.blocks_path!r} holds {self.depth}; name a module path or 'final'"
            )
            raise LayerError(message, spec=str(spec))
        if not -self.depth <= index < self.depth:
            raise self._unknown(str(spec))
        return self.template.format(index=index % self.depth)

    def _unknown(self, text: str) -> LayerError:
        names = [*self.known, FINAL, ALL]
        near = difflib.get_close_matches(text, names, n=3, cutoff=0.75)
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        elif _NUMBER.fullmatch(text):
            hint = (
                f"name a block from 0 to {self.depth - 1}, or from -{self.depth} to -1 counted from the end"
            )
        else:
            example = self.template.format(index=0)
            hint = f"name a block number, a module path such as {example!r}, 'final' or 'all'"
        message = f"layer {text!r} is not in {self.name} ({self.blocks_path} 0-{self.depth - 1}); {hint}"
        return LayerError(message, spec=text)


def _blocks(module: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    blocks = module.get_submodule(path)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        message = f"{path}: a {type(blocks).__name__}, expected a list of blocks; name the list itself"
        raise ModelError(message)
    return blocks


def _layer_info(module: nn.Module, path: str, blocks_path: str) -> LayerInfo:
    inside = re.match(re.escape(blocks_path) + r"\.(\d+)(\.|$)", path)
    index = int(inside.group(1)) if inside else None
    is_block = inside is not None and not inside.group(2)
    config_width = _config_number(module, _WIDTH_KEYS)
    width = config_width if is_block else _own_width(module.get_submodule(path), config_width)
    return LayerInfo(path=path, index=index, width=width)


def _own_width(module: nn.Module, config_width: int | None) -> int | None:
    """Read a module's output width from its parameters, where they determine it."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return config_width if _is_norm(module, config_width) else None


def _is_norm(module: nn.Module, width: int | None) -> bool:
    """Recognize a norm: no children, and only vectors of the hidden size as parameters."""
    shapes = {tuple(parameter.shape) for parameter in module.parameters()}
    if any(True for _ in module.children()):
        return False
    if not shapes:
        return "norm" in type(module).__name__.lower()
    return all(len(shape) == 1 for shape in shapes) and (width is None or shapes == {(width,)})


def _config_number(module: nn.Module, keys: Sequence[str]) -> int | None:
    config = getattr(module, "config", None)
    values = (getattr(config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int)), None)
