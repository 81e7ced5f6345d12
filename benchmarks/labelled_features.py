"""Features of labeled sequences from all layers of a model, in one pass, kept in a folder.

Pooled states (mean, maximum, position-weighted mean, standard deviation) of every numbered layer and of the
residual stream behind its block; for some blocks also the states at places along the sequence: means over
eight windows of equal share and, for short sequences of one length, the state at every base. Each batch is
reduced as soon as a layer has run. What is written is named by the weights, the sequences and the recipe, and
is found again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from genoembed import CharTokenizer, GenomicModel, load_model
from genoembed.batching.pad import pad_batch, plan_batches
from genoembed.contracts import EncodedSequence
from genoembed.pooling.reduce import pool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.contracts import Batch

Which = Literal["trained", "untrained"]

POOLS = ("mean", "max", "weighted_mean", "std")
NUM_WINDOWS = 8
WINDOW_EVERY = 4
BASE_EVERY = 10
LONGEST_BY_BASE = 100
_VERSION = 1
_COMPLETE = "features.json"
_COMPLEMENT = bytes.maketrans(b"ACGTRYKMBVDH", b"TGCAYRMKVBHD")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledSet:
    """Sequences with a label each."""

    name: str
    sequences: tuple[bytes, ...]
    target: NDArray[np.generic]
    task: Literal["classification", "regression"]
    groups: NDArray[np.int64] | None
    """Group of each row where a ``.groups`` file stands beside the table."""

    def reverse_complement(self) -> LabeledSet:
        """Return the same set on the other strand."""
        turned = tuple(sequence.translate(_COMPLEMENT)[::-1] for sequence in self.sequences)
        return replace(self, sequences=turned)

    @property
    def digest(self) -> str:
        """SHA-256 of the sequences in their order."""
        return hashlib.sha256(b"\n".join(self.sequences)).hexdigest()


def read_labeled(path: Path, *, max_rows: int | None = None) -> LabeledSet:
    """Read a table of sequences and labels; labels that are all decimal numbers make a regression.

    Args:
        path: TSV with the header ``sequence<TAB>label``; ``NAME.groups`` beside it has a group a row.
        max_rows: Take the first rows only; None takes all.

    Returns:
        The set, upper-case, U as T.

    Raises:
        ValueError: If the table or its groups are not of this form.
    """
    header, *lines = path.read_text(encoding="ascii").splitlines()
    rows = [line.split("\t") for line in lines]
    if header != "sequence\tlabel" or any(len(row) != 2 or not row[0] for row in rows):
        raise ValueError(f"{path}: not a table of sequence and label; write these two columns with a header")
    groups = None
    beside = path.with_suffix(".groups")
    if beside.exists():
        groups = np.array(beside.read_text(encoding="ascii").split(), dtype=np.int64)
        if len(groups) != len(rows):
            raise ValueError(f"{beside}: {len(groups)} groups, expected {len(rows)}; write one a row")
    labels = [label for _, label in rows]
    is_regression = all(_is_decimal(label) for label in labels)
    return LabeledSet(
        name=path.stem,
        sequences=tuple(sequence.upper().replace("U", "T").encode() for sequence, _ in rows[:max_rows]),
        target=np.array(labels[:max_rows], dtype=np.float64 if is_regression else None),
        task="regression" if is_regression else "classification",
        groups=None if groups is None else groups[:max_rows],
    )


def _is_decimal(label: str) -> bool:
    return "." in label and label.lstrip("-").replace(".", "", 1).isdigit()


def load_which(name: str, which: Which, *, dtype: str, seed: int) -> tuple[GenomicModel, str]:
    """Load a model, or make one of the same configuration that has learned nothing.

    Args:
        name: As ``load_model`` takes it.
        which: The weights as they are, or fresh ones.
        dtype: Type of the weights while running.
        seed: Of fresh weights.

    Returns:
        The model, and what tells its weights from all others.
    """
    model = load_model(name, dtype=dtype)
    if not isinstance(model.tokenizer, CharTokenizer):
        raise ValueError(f"{name}: its tokens are not bases; give a model with the byte tokenizer")
    if which == "trained":
        return model, f"{model.provenance['weights_sha256']}"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = type(model.module)(model.module.config)
    fresh = GenomicModel(module.to(model.device, model.dtype), model.tokenizer, name=f"untrained {name}")
    described = json.dumps(model.module.config.to_diff_dict(), sort_keys=True, default=str)
    return fresh, f"untrained {seed} {hashlib.sha256(described.encode()).hexdigest()}"


def layer_paths(model: GenomicModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Find what the layer numbers mean, and the residual stream behind the same blocks.

    Args:
        model: Any model.

    Returns:
        Module paths of the numbered layers, and of the blocks (the same where numbers mean blocks).
    """
    highest = max(info.index for info in model.layers if info.index is not None)
    numbered = tuple(info.path for info in model.resolve(list(range(highest + 1))))
    return numbered, tuple(path.removesuffix(".mlp.l3") for path in numbered)


class Features(Mapping[str, "NDArray[np.floating]"]):
    """Features by name, each read from its file when it is asked for.

    Args:
        folder: A folder that ``capture_features`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folders = (folder,)
        facts = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        self.paths: tuple[str, ...] = tuple(facts["paths"])
        self.cpu_seconds: float = facts["cpu_seconds"]
        self._pooled = np.load(folder / "pooled.npy", mmap_mode="r")
        self._places = {
            kind: np.load(folder / f"{kind}.npy", mmap_mode="r")
            for kind in ("windows", "bases")
            if facts[kind]
        }
        self._where = {
            f"{path} {name}": (self._pooled, (layer, number))
            for layer, path in enumerate(self.paths)
            for number, name in enumerate(POOLS)
        } | {
            f"{path} {kind}": (stored, (layer,))
            for kind, stored in self._places.items()
            for layer, path in enumerate(facts[kind])
        }

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        stored, index = self._where[name]
        return np.asarray(stored[index], dtype=np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class BothStrands(Mapping[str, "NDArray[np.floating]"]):
    """Features of the sequences, and those of their reverse complements, whose names end in `` rc``.

    Args:
        forward: Of the sequences as they are.
        reverse: Of the reverse complements.
    """

    def __init__(self, forward: Features, reverse: Features) -> None:
        self._strands = forward, reverse
        self.folders = (*forward.folders, *reverse.folders)
        self.paths = forward.paths
        self.cpu_seconds = forward.cpu_seconds + reverse.cpu_seconds

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        return self._strands[name.endswith(" rc")][name.removesuffix(" rc")]

    def __iter__(self) -> Iterator[str]:
        forward, reverse = self._strands
        return iter([*forward, *(f"{name} rc" for name in reverse)])

    def __len__(self) -> int:
        return sum(map(len, self._strands))


def capture_features(
    model: GenomicModel, weights: str, labeled: LabeledSet, cache: Path, *, max_tokens: int
) -> Features:
    """Run the model over a set once, or find what an earlier run has written.

    Args:
        model: The model.
        weights: What tells its weights from all others.
        labeled: The set.
        cache: Folder for features.
        max_tokens: Tokens of a batch.

    Returns:
        All features.
    """
    told = json.dumps([_VERSION, weights, str(model.dtype), labeled.digest, POOLS, NUM_WINDOWS])
    folder = cache / f"{labeled.name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    if not (folder / _COMPLETE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        numbered, blocks = layer_paths(model)
        store = _Store.make(folder, labeled, (*numbered, *blocks), blocks, model)
        lengths = [len(sequence) for sequence in labeled.sequences]
        for rows in plan_batches(lengths, max_tokens=max_tokens):
            store.take(model, _batch(labeled, rows, model))
        store.close(folder)
        facts = {
            "paths": store.paths,
            "windows": store.window_paths,
            "bases": store.base_paths,
            "tokens": sum(lengths),
            "cpu_seconds": time.process_time() - started,
        }
        # written last: a folder without it is not complete
        (folder / _COMPLETE).write_text(json.dumps(facts), encoding="utf-8")
    return Features(folder)


def _batch(labeled: LabeledSet, rows: Sequence[int], model: GenomicModel) -> Batch:
    if model.max_length is not None:
        longest = max(len(labeled.sequences[row]) for row in rows)
        if longest > model.max_length:
            raise ValueError(f"{labeled.name}: {longest} bases, more than the model's {model.max_length}")
    return pad_batch(
        [EncodedSequence(input_ids=np.frombuffer(labeled.sequences[row], dtype=np.uint8)) for row in rows],
        pool_masks=[np.ones(len(labeled.sequences[row]), dtype=np.bool_) for row in rows],
        rows=rows,
        pad_token_id=model.tokenizer.pad_token_id,
    )


class _Store:
    """Arrays on disk that batches are written into."""

    @classmethod
    def make(
        cls,
        folder: Path,
        labeled: LabeledSet,
        paths: Sequence[str],
        blocks: Sequence[str],
        model: GenomicModel,
    ) -> _Store:
        """Allocate the arrays for a set."""
        store = cls()
        store.paths = list(dict.fromkeys(paths))
        lengths = {len(sequence) for sequence in labeled.sequences}
        by_base = len(lengths) == 1 and max(lengths) <= LONGEST_BY_BASE
        store.window_paths = list(blocks[::WINDOW_EVERY])
        store.base_paths = list(blocks[1::BASE_EVERY]) if by_base else []
        num_rows = len(labeled.sequences)
        width = next(info.width for info in model.layers if info.path == blocks[0]) or _width(model)
        layers = len(store.paths)
        store.pooled = _array(folder / "pooled.npy", (layers, len(POOLS), num_rows, width))
        store.windows = _array(
            folder / "windows.npy", (len(store.window_paths), num_rows, NUM_WINDOWS, width)
        )
        if by_base:
            shape = (len(store.base_paths), num_rows, max(lengths), width)
            store.bases = _array(folder / "bases.npy", shape)
        return store

    def take(self, model: GenomicModel, batch: Batch) -> None:
        """Run a batch, and keep of each layer what is wanted."""
        rows, mask_BL = list(batch.rows), batch.pool_mask

        def reduce(path: str, hidden_BLD: Tensor) -> Tensor:
            hidden_BLD = hidden_BLD.float().cpu()
            self.pooled[self.paths.index(path), :, rows] = _halved(pool_all(hidden_BLD, mask_BL), path)
            if path in self.window_paths:
                means = window_means(hidden_BLD, mask_BL)
                self.windows[self.window_paths.index(path), rows] = _halved(means, path)
            if path in self.base_paths:
                self.bases[self.base_paths.index(path), rows] = _halved(hidden_BLD, path)
            return hidden_BLD.new_empty(0)

        model.forward(batch, layers=self.paths, reduce=reduce)

    def close(self, folder: Path) -> None:
        """Write everything to the disk."""
        self.pooled.flush()
        self.windows.flush()
        if self.base_paths:
            self.bases.flush()


def pool_all(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Pool in every way of ``POOLS``.

    Args:
        hidden_BLD: States, float32.
        mask_BL: True where a token counts.

    Returns:
        float32, ``(B, len(POOLS), D)``.
    """
    pooled = {name: pool(hidden_BLD, mask_BL, method=name) for name in POOLS[:3]}
    kept_BLD = torch.where(mask_BL[..., None], hidden_BLD - pooled["mean"][:, None], 0.0)
    variance_BD = (kept_BLD**2).sum(1) / mask_BL.sum(1, keepdim=True)
    return torch.stack([*pooled.values(), variance_BD.sqrt()], dim=1)


def window_means(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Average over windows of equal share of each sequence; empty ones (short sequences) are 0.

    Args:
        hidden_BLD: States, float32; padding stands on the right.
        mask_BL: True where a token counts.

    Returns:
        float32, ``(B, NUM_WINDOWS, D)``.
    """
    lengths_B1 = mask_BL.sum(1, keepdim=True)
    window_BL = torch.arange(mask_BL.shape[1])[None] * NUM_WINDOWS // lengths_B1
    member_BLW = (window_BL[..., None] == torch.arange(NUM_WINDOWS)) & mask_BL[..., None]
    kept_BLD = torch.where(mask_BL[..., None], hidden_BLD, 0.0)
    sums_BWD = torch.bmm(member_BLW.float().transpose(1, 2), kept_BLD)
    return sums_BWD / member_BLW.sum(1).clamp_min(1)[..., None]


def _array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def _halved(features: Tensor, path: str) -> NDArray[np.float16]:
    halved = features.numpy().astype(np.float16)
    if not np.isfinite(halved).all():
        raise ValueError(f"{path}: states beyond what float16 holds; leave the layer out, or store float32")
    return halved


def _width(model: GenomicModel) -> int:
    return int(model.module.config.hidden_size)
