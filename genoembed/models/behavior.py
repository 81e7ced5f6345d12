"""Facts about a model that callers must not guess: is a mask honoured, is it causal, how long may input be.

Found by running the model: a few tokens go in, the end of the input is changed, and the outputs are compared.
No table of architectures. Everything runs without gradients in eval mode, and leaves the model as it was.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genoembed.models.layers import final_candidates, first_tensor, hooked
from genoembed.models.precision import full_float32

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

PaddingPolicy: TypeAlias = Literal["mask", "right", "equal"]
"""``mask``: pad on the right and pass the mask; ``right``: padding on the right cannot be seen, because
the model is causal; ``equal``: neither, so a batch must hold sequences of one length."""

_NUM_REAL = 12
_NUM_PADDED = 16
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "max_seqlen",
)
_MOST_TOKENS = 10**12
"""Tokenizers without a limit state numbers beyond this one."""


def padding_policy(*, accepts_attention_mask: bool, is_causal: bool) -> PaddingPolicy:
    """Return how sequences of different lengths may share a batch.

    Example:
        >>> padding_policy(accepts_attention_mask=False, is_causal=False)
        'equal'
    """
    if accepts_attention_mask:
        return "mask"
    return "right" if is_causal else "equal"


def takes_argument(module: nn.Module, name: str) -> bool:
    """Check whether a model's ``forward`` names an argument (``**kwargs`` do not count)."""
    return name in inspect.signature(module.forward).parameters


def forward_arguments(module: nn.Module, attention_mask: Tensor | None) -> dict[str, Any]:
    """Build the keyword arguments of a forward pass, other than the ids."""
    arguments: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
    if takes_argument(module, "use_cache"):
        arguments["use_cache"] = False
    return arguments


def context_length(module: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Read how many tokens (special ones included) a model takes.

    Its configuration decides; where that has no limit, the tokenizer's counts, if it states one.
    """
    config = getattr(module, "config", None)
    # T5 has no positions to run out of: its n_positions is the length that it was trained with
    is_relative = isinstance(getattr(config, "relative_attention_num_buckets", None), int)
    keys = [key for key in _LENGTH_KEYS if not (is_relative and key == "n_positions")]
    values = (getattr(config, key, None) for key in keys)
    limit = next((value for value in values if isinstance(value, int) and value > 0), None)
    if limit is not None:
        return limit - _position_offset(module)
    stated = getattr(tokenizer, "model_max_length", None)
    return int(stated) if isinstance(stated, int | float) and 0 < stated < _MOST_TOKENS else None


def _position_offset(module: nn.Module) -> int:
    """Positions lost because they start behind the padding id: an embedding that keeps both says so."""
    for child in module.modules():
        padding_idx = getattr(child, "padding_idx", None)
        if isinstance(padding_idx, int) and isinstance(getattr(child, "position_ids", None), Tensor):
            return padding_idx + 1
    return 0


class Probe:
    """Runs one model on a handful of tokens, and reads from its outputs how it behaves."""

    def __init__(self, module: nn.Module, *, special_ids: Sequence[int], pad_token_id: int | None) -> None:
        self.module = module
        weight = _embedding_weight(module)
        self.is_half = weight.dtype != torch.float32
        limit = context_length(module) or _NUM_PADDED
        self.num_padded = min(_NUM_PADDED, limit)
        self.num_real = min(_NUM_REAL, self.num_padded - 1)
        barred = set(special_ids)
        ordinary = torch.tensor([i for i in range(min(weight.shape[0], 1024)) if i not in barred])
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(ordinary), (self.num_padded,), generator=generator)
        self.ids = ordinary[picks].to(weight.device)
        self.other_ids = ordinary[(picks + 1) % len(ordinary)].to(weight.device)
        self.pad_id = int(ordinary[0]) if pad_token_id is None else pad_token_id

    def is_causal(self) -> bool:
        """Check that no token sees a later one."""
        if getattr(self.module, "is_causal_by_construction", False):
            return True
        changed = torch.cat((self.ids[: self.num_real], self.other_ids[self.num_real :]))
        return self._same(self._run(self.ids), self._run(changed), tolerance=1e-3 if self.is_half else 1e-5)

    def accepts_attention_mask(self) -> bool:
        """Check whether the model takes an attention mask and uses it."""
        if not takes_argument(self.module, "attention_mask") or getattr(self.module, "sees_padding", False):
            return False
        if getattr(self.module, "is_causal_by_construction", False):
            return True
        mask = (torch.arange(self.num_padded, device=self.ids.device) < self.num_real).long()
        padded = torch.cat(
            (self.ids[: self.num_real], torch.full_like(self.ids, self.pad_id)[self.num_real :])
        )
        other = torch.cat((self.ids[: self.num_real], self.other_ids[self.num_real :]))
        masked = self._run(padded, mask)
        alone = self._run(self.ids[: self.num_real], mask[: self.num_real])
        # what is masked changes nothing, to the bit mostly; a shorter row is summed in another order
        return self._same(masked, self._run(other, mask), tolerance=1e-5) and self._same(
            masked, alone, tolerance=2e-2 if self.is_half else 1e-4
        )

    def final_path(self) -> str | None:
        """Find the module whose output is ``last_hidden_state``, None if none is seen to return it.

        A pass on the meta device shows it, too: the one tensor is passed on, or a view of it. There the code
        of some models fails for want of values, and None is the answer.
        """
        declared = getattr(self.module, "final_layer_path", None)
        if declared is not None:
            return str(declared)
        candidates = final_candidates(self.module)
        outputs, last = self._run_and_keep(candidates)
        if last is None:
            return None
        found = {path: first_tensor(outputs[path], path=path) for path in candidates if path in outputs}
        found = {path: output for path, output in found.items() if output.numel() == last.numel()}
        # the same memory first: this much is seen on the meta device as well, so that both passes agree
        same = [path for path, output in found.items() if _memory(output) == _memory(last)]
        if not same and not last.is_meta:
            same = [path for path, output in found.items() if torch.equal(output.reshape(last.shape), last)]
        return same[0] if same else None

    def _run_and_keep(self, paths: Sequence[str]) -> tuple[dict[str, object], Tensor | None]:
        """Run once; return what modules gave first, and the last hidden states, None if the run failed."""
        outputs: dict[str, object] = {}
        with hooked(self.module, paths, outputs.setdefault):
            if not self.ids.is_meta:
                return outputs, self._run(self.ids)
            for answer in (True, False):
                with suppress(*_WITHOUT_VALUES), torch.no_grad(), _AnswerForValues(answer):
                    outputs.clear()
                    return outputs, self._run(self.ids)
        return {}, None

    def _run(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        arguments = forward_arguments(self.module, None if mask is None else mask[None])
        # inference mode would hide questions about values from the mode that answers them
        with torch.inference_mode(not ids.is_meta), evaluating(self.module):
            output = self.module(ids[None], **arguments)
        last = getattr(output, "last_hidden_state", None)
        return last if isinstance(last, Tensor) else first_tensor(output, path="")

    def _same(self, first: Tensor, second: Tensor, *, tolerance: float) -> bool:
        """Compare the real positions, relative to the largest entry."""
        a, b = first[:, : self.num_real].float(), second[:, : self.num_real].float()
        return bool((a - b).abs().max() <= tolerance * a.abs().max())


_WITHOUT_VALUES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
"""What a model's code raises on the meta device, where tensors have a shape but no values."""


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _AnswerForValues(TorchDispatchMode):
    """Answers where a model asks a meta tensor for a value, which is "is nothing masked?", mostly."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.answer if args[0].dtype == torch.bool else int(self.answer)
        return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode and to full float32; restore the mode of each of its modules afterwards.

    All passes that embed, score or generate run within it.
    """
    # usually none: to set the mode of hundreds of modules takes a millisecond, for each batch
    trained = [child for child in module.modules() if child.training]
    if trained:
        module.eval()
    try:
        with full_float32():
            yield
    finally:
        for child in trained:
            child.training = True


def _embedding_weight(module: nn.Module) -> Tensor:
    """Find the token embedding: what the model names as such, else the first embedding with weights."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        embedding = getter() if getter is not None else None
    except NotImplementedError:  # custom code need not name it
        embedding = None
    if embedding is None:
        embedding = next(child for child in module.modules() if isinstance(child, nn.Embedding))
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return weight
