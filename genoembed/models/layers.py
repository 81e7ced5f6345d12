"""Which modules of a model can be captured, what a layer spec means, and how they are captured.

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

Capturing ends a forward pass as soon as all named modules have returned. Promised: the hooks are removed
whatever happens, modules behind the deepest requested one never run, and the model computes the same
afterwards as before.
"""

from __future__ import annotations

import difflib
import itertools
import re
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from genoembed.contracts import LayerInfo
from genoembed.errors import LayerError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.utils.hooks import RemovableHandle


LayerSpec: TypeAlias = "int | str"

FINAL = "final"
ALL = "all"
_NUMBER = re.compile(r"[+-]?\d+")
_GLOB_CHARACTERS = frozenset("*?[")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
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
    depth = _config_number(module, DEPTH_KEYS)

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
    return tuple(_layer_info(module, path, blocks_path) for path in _layer_paths(module, blocks_path))


def _layer_paths(module: nn.Module, blocks_path: str) -> list[str]:
    return [
        path
        for path, child in module.named_modules()
        if path and not isinstance(child, _CONTAINERS) and path != blocks_path
    ]


def num_blocks(module: nn.Module) -> int:
    """Count the blocks of a model."""
    return len(_blocks(module, find_blocks(module)))


def number_template(module: nn.Module) -> str:
    """Return the module path that a layer number means, with ``{index}`` for the number."""
    return getattr(module, "embedding_layer_template", None) or f"{find_blocks(module)}.{{index}}"


def has_numbered_blocks(module: nn.Module) -> bool:
    """Check whether layer numbers mean something: not where the blocks share one module."""
    return (_config_number(module, DEPTH_KEYS) or num_blocks(module)) == num_blocks(module)


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
        self.stated_depth = _config_number(module, DEPTH_KEYS) or self.depth
        self.template = number_template(module)
        # names only: widths are read off parameters, which takes far longer than a batch of short sequences
        self.known = dict.fromkeys(_layer_paths(module, self.blocks_path))

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
    part = module.get_submodule(path)
    # what a module states comes first: parameters may serve both strands, blocks may widen step by step
    stated = getattr(part, "output_width", None)
    width = stated or (config_width if is_block else _own_width(part, config_width))
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

            def hook(part: nn.Module, inputs: object, output: object, path: str = path) -> None:
                # a block of shortened sequences says how its vectors stand for the positions of the input
                spread = getattr(part, "per_position", None)
                take(path, output if spread is None else spread(inputs, output))
                # what a hook returns would replace the module's output

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
