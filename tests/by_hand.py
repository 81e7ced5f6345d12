"""What `extract` must equal, worked out by hand: plain transformers calls and plain loops.

One unpadded row at a time, hidden states as transformers returns them (hooks of our own where it returns
none), pooling in float64 by loops.
"""

from __future__ import annotations

import gzip
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from transformers import AutoModel

from genoembed import extract, load_model, open_embeddings, read_sequences
from tests.oracles import pool_row
from tests.tiny_models import FAMILIES, build_tiny

if TYPE_CHECKING:
    from genoembed.extraction import ExtractionReport
    from genoembed.models.genomic_model import GenomicModel

STRIPED = "striped_hyena2"
ALL_FAMILIES = (*FAMILIES, STRIPED)
CAUSAL = ("llama", "mistral", "gpt_neox", "mamba", STRIPED)
HAS_SPECIAL_TOKENS = ("bert", "esm", "modernbert")
LETTER_FAMILIES = tuple(family for family in ALL_FAMILIES if family != "gpt_neox")
"""Families whose tokenizer has one token per base."""
CONTEXT = 64
"""Tokens that every tiny family of limited context holds."""

_ROOT = TemporaryDirectory(prefix="genoembed-tiny-")
_LETTER_IDS = {letter: 5 + index for index, letter in enumerate("ACGTN")}
_CLS, _EOS = 0, 2
_COMPLEMENT = str.maketrans("ACGTN", "TGCAN")


def build_family(family: str, folder: Path) -> Path:
    """Write a tiny model of any family, StripedHyena 2 included."""
    if family != STRIPED:
        return build_tiny(family, folder)
    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
    from genoembed.models.striped_hyena2.modeling import StripedHyena2Model
    from genoembed.tokenization.char import CharTokenizer

    config = StripedHyena2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        attn_layer_idxs=[3],
        hcs_layer_idxs=[0],
        hcm_layer_idxs=[1],
        hcl_layer_idxs=[2],
        hcs_filter_groups=4,
        hcm_filter_groups=4,
        state_size=4,
        max_position_embeddings=CONTEXT,
    )
    state = torch.get_rng_state()
    torch.manual_seed(3)
    model = StripedHyena2Model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embedding" in name:
                parameter.normal_(std=0.5)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    CharTokenizer().save_pretrained(folder)
    return folder


class Reference:
    """One model run by hand.

    Args:
        family: Its family.
        folder: Where it lies.
    """

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.model = AutoModel.from_pretrained(
            folder, trust_remote_code=family == "custom_conv", dtype=torch.float32
        ).eval()
        self._tokenizer = None
        if family == "gpt_neox":
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.states = cache(self._states)

    @property
    def num_special(self) -> int:
        return 2 if self.family in HAS_SPECIAL_TOKENS else 0

    def tokens(self, sequence: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a sequence, and the bases of each token, half-open (none for special tokens)."""
        letters = [(base, base + 1) for base in range(len(sequence))]
        if self.family == STRIPED:
            return list(sequence.encode()), letters
        if self._tokenizer is not None:
            encoding = self._tokenizer.encode(sequence)
            return encoding.ids, encoding.offsets
        ids = [_LETTER_IDS[letter] for letter in sequence]
        if self.num_special:
            return [_CLS, *ids, _EOS], [(0, 0), *letters, (0, 0)]
        return ids, letters

    @property
    def num_blocks(self) -> int:
        return {"custom_conv": 2, STRIPED: 4}.get(self.family, 3)

    def layer_names(self) -> list[str]:
        """Specs of all that can be compared: each block and ``final``."""
        if self.family == STRIPED:
            return [*(f"blocks.{index}" for index in range(self.num_blocks)), "final"]
        return [*(str(index) for index in range(self.num_blocks)), "final"]

    def _states(self, sequence: str) -> dict[str, np.ndarray]:
        """Hidden states of one window, ``(L, D)`` float32, by layer spec."""
        ids = torch.tensor([self.tokens(sequence)[0]])
        blocks = {
            "bert": "encoder.layer",
            "esm": "encoder.layer",
            "custom_conv": "tower",
            STRIPED: "blocks",
        }.get(self.family, "layers")
        last_path = f"{blocks}.{self.num_blocks - 1}"
        kept = {}

        def keep(_module, _inputs, output):
            kept["last"] = output[0] if isinstance(output, tuple) else output

        handle = self.model.get_submodule(last_path).register_forward_hook(keep)
        with torch.no_grad():
            output = self.model(ids, output_hidden_states=True)
        handle.remove()
        # transformers' Mamba leaves the embedding out of hidden_states
        hidden = output.hidden_states[0 if self.family == "mamba" else 1 :]
        states = dict(zip(self.layer_names(), hidden, strict=False))
        states[self.layer_names()[-2]] = kept["last"]
        states["final"] = output.last_hidden_state
        return {name: state.reshape(-1, state.shape[-1]).numpy() for name, state in states.items()}

    def pooled(
        self,
        sequence: str,
        layer: str,
        method: str,
        *,
        core: tuple[int, int] | None = None,
        skip_first: int = 0,
    ) -> np.ndarray:
        """One window's vector: the tokens with bases in the core, pooled by a loop."""
        start, end = core or (0, len(sequence))
        counts = self.counts(sequence, start, end, skip_first)
        return np.array(pool_row(self.states(sequence)[layer].astype(np.float64).tolist(), counts, method))

    def counts(self, sequence: str, start: int, end: int, skip_first: int = 0) -> list[int]:
        """For how many bases each token counts."""
        core = set(range(max(start, skip_first), end))
        return [len(core & set(range(*span))) for span in self.tokens(sequence)[1]]

    def token_vectors(self, sequence: str, layer: str, core: tuple[int, int] | None = None) -> np.ndarray:
        start, end = core or (0, len(sequence))
        return self.states(sequence)[layer][np.array(self.counts(sequence, start, end)) > 0].astype(
            np.float64
        )

    def windows(self, length: int, window: int, stride: int | None = None) -> list[tuple[int, int, int, int]]:
        """Start, end, first and past-the-last base of the core of each window, base by base."""
        stride = stride or window - window // 4
        starts = [0]
        while starts[-1] + window < length:
            starts.append(min(starts[-1] + stride, length - window))
        owner = []
        for base in range(length):
            seen = [start for start in starts if start <= base < start + window]
            if self.family in CAUSAL:
                owner.append(seen[0])
            else:  # the window whose middle is nearest; of two, the right one
                owner.append(min(seen, key=lambda start: (abs(2 * (base - start) + 1 - window), -start)))
        return [
            (start, min(start + window, length), owner.index(start), owner.index(start) + owner.count(start))
            for start in starts
            if start in owner
        ]

    def windowed(
        self,
        sequence: str,
        layer: str,
        method: str,
        *,
        window: int,
        stride: int | None = None,
        skip_first: int = 0,
    ) -> np.ndarray:
        """A long record's vector: windows' vectors, weighed by the bases that count in each."""
        vectors, weights = [], []
        for start, end, first, past in self.windows(len(sequence), window, stride):
            counted = past - max(first, start + skip_first)
            if counted <= 0:
                continue
            vectors.append(
                self.pooled(
                    sequence[start:end],
                    layer,
                    method,
                    core=(first - start, past - start),
                    skip_first=skip_first,
                )
            )
            weights.append(counted)
        if method == "max":
            return np.max(vectors, axis=0)
        if method in ("first", "last"):
            return vectors[0 if method == "first" else -1]
        if method == "mean_std":
            # by the other formula: the mean of squares less the square of the mean
            means, deviations = np.split(np.array(vectors), 2, axis=1)
            squares = np.average(deviations**2 + means**2, axis=0, weights=weights)
            mean = np.average(means, axis=0, weights=weights)
            return np.concatenate([mean, np.sqrt(squares - mean**2)])
        return np.average(vectors, axis=0, weights=weights)


def revcomp(sequence: str) -> str:
    """Read the other strand."""
    return sequence.translate(_COMPLEMENT)[::-1]


def random_dna(length: int, seed: int, letters: str = "ACGT") -> str:
    """Letters drawn by seed."""
    return "".join(np.random.default_rng(seed).choice(list(letters), size=length))


def write_fasta(path: Path, records: dict[str, str] | list[tuple[str, str]], width: int = 60) -> Path:
    """Write records, wrapped."""
    pairs = records.items() if isinstance(records, dict) else records
    with path.open("w") as file:
        for name, sequence in pairs:
            lines = [sequence[start : start + width] for start in range(0, len(sequence), width)]
            file.write("\n".join([f">{name}", *lines]) + "\n")
    return path


def shorten_fasta(path: Path, *, records: int | None = None, bases: int) -> None:
    """Keep the first records of a file, and the first bases of each."""
    kept = [
        f">{record.id} {record.description}\n{record.sequence[:bases].decode()}\n"
        for record in islice(read_sequences(path), records)
    ]
    content = "".join(kept).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@cache
def folder_of(family: str) -> Path:
    """The folder of a family, written once a run of the tests."""
    return build_family(family, Path(_ROOT.name, family))


@cache
def model_of(family: str) -> GenomicModel:
    """The family as genoembed loads it, in float32 on every machine."""
    return load_model(
        str(folder_of(family)), device="cpu", dtype="float32", trust_remote_code=family == "custom_conv"
    )


@cache
def reference_of(family: str) -> Reference:
    """The family as it is run by hand."""
    return Reference(family, folder_of(family))


class Embedded(NamedTuple):
    """What a run wrote."""

    ids: list[str]
    obs: dict[str, list]
    layers: list[str]
    matrices: dict[str, np.ndarray]
    """By module path; per-token runs have values of all records end to end."""
    lengths: list[int]
    """Tokens of each record, in per-token files."""
    provenance: dict
    report: ExtractionReport


def embed(
    folder: Path,
    records: dict[str, str] | list[tuple[str, str]],
    model: GenomicModel | str,
    **options,
) -> Embedded:
    """Write FASTA, extract, read the file back."""
    fasta = write_fasta(folder / "input.fa", records)
    return embed_files(folder, fasta, model, **options)


def embed_files(folder: Path, inputs, model: GenomicModel | str, **options) -> Embedded:
    """Extract from files that are there, and read the output back."""
    output = folder / "output.h5"
    report = extract(inputs, model=model, output=output, overwrite=True, **options)
    with open_embeddings(output) as file:
        return Embedded(
            ids=file.ids,
            obs={column: list(file.obs[column]) for column in file.obs},
            layers=file.layers,
            matrices={layer: file[layer][:] for layer in file.layers},
            lengths=[len(file.tokens(name)) for name in file.ids] if file.kind == "tokens" else [],
            provenance=file.provenance,
            report=report,
        )
