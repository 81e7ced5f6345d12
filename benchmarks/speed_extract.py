"""``extract`` on sequences of mixed lengths against what people do today, and its time outside the forward.

A FASTA file of log-normal lengths (100 bp to 8 kb, fixed seed) is embedded, mean of the last hidden state, by
turns in one process with the same weights and threads, in float32, and in the type that ``auto`` chooses
where that is another:

- ``genoembed.extract``;
- the usual loop: Bio.SeqIO, batches of 8 in file order, padded to the longest, ``output_hidden_states=True``,
  mean with the mask;
- the strongest simple opponents: the same loop over records sorted by length, and one record at a time, which
  in float32 gives what all vectors are compared with;
- sentence-transformers' ``encode`` with mean pooling, its own batching; in float32 only.

The models are loaded before; reading, tokenizing, running and writing the vectors count. Models: the bundled
one, and a 6-layer ESM of random weights with a tokenizer of single letters. Then, on records of 1 kb: the
share of ``extract``'s wall time that is not spent inside the model's forward (pooling hooks run within it)::

    python benchmarks/speed_extract.py --records 96 --rounds 3

Needs sentence-transformers for that row; without it the row is left out, and the page says so.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from Bio import SeqIO
from measuring import Figure, file_results, interleave, option_parser, ratio, spread, use_threads
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, EsmConfig, EsmModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import genoembed
from genoembed.models.registry import BUNDLED_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

SEED = 11
MEDIAN_LENGTH, SIGMA, SHORTEST, LONGEST = 1000, 1.0, 100, 8000
LOOP_ROWS = 8
EXTRACT = "extract"
LETTERS = "ACGTN"
SPECIAL = ("<pad>", "<unk>", "<mask>")
HAS_SENTENCE_TRANSFORMERS = importlib.util.find_spec("sentence_transformers") is not None
GOALS = {"sorted loop of 8": 1.0, "one at a time": 1.0, "sentence-transformers": 1.5}
"""Of a way over ``extract`` in the same type."""
USUAL_GOAL = 4.0
"""Of what people do, a loop of 8 in float32, over ``extract`` as it chooses."""
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of a vector to the one of the unpadded float32 loop, relative to the largest value."""
LARGEST_SHARE = 0.03


def mixed_lengths(num_records: int, *, median: int = MEDIAN_LENGTH, longest: int = LONGEST) -> list[int]:
    """Draw the lengths of the mixed file.

    Args:
        num_records: How many.
        median: Of the log-normal lengths.
        longest: Clipped to this, and to 100 bp at the other end.

    Returns:
        Bases; the same for the same arguments.
    """
    drawn = np.random.default_rng(SEED).lognormal(np.log(median), SIGMA, num_records)
    return np.clip(drawn, SHORTEST, longest).astype(int).tolist()


def write_fasta(path: Path, lengths: Sequence[int]) -> Path:
    """Write random records.

    Args:
        path: The file.
        lengths: Bases of each record.

    Returns:
        The same path.
    """
    rng = np.random.default_rng(SEED)
    letters = np.frombuffer(b"ACGT", np.uint8)
    with path.open("wb") as file:
        for number, length in enumerate(lengths):
            file.write(b">r%06d\n%s\n" % (number, letters[rng.integers(0, 4, length)].tobytes()))
    return path


def write_esm(folder: Path, *, width: int = 320, num_layers: int = 6) -> Path:
    """Write an ESM of random weights with a tokenizer of single letters and no special tokens around.

    Args:
        folder: Where to write.
        width: Hidden size.
        num_layers: Blocks.

    Returns:
        The folder.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=LONGEST,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    config = EsmConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=20,
        intermediate_size=4 * width,
        max_position_embeddings=LONGEST + 2,
        position_embedding_type="rotary",
        token_dropout=False,
        pad_token_id=vocabulary["<pad>"],
        mask_token_id=vocabulary["<mask>"],
    )
    torch.manual_seed(SEED)
    EsmModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    return folder


def read_fasta(fasta: Path) -> list[str]:
    """Read all sequences, as the usual ways do.

    Args:
        fasta: The file.

    Returns:
        Letters, a text a record.
    """
    with fasta.open() as file:
        return [str(record.seq) for record in SeqIO.parse(file, "fasta")]


@torch.inference_mode()
def usual_loop(
    model: torch.nn.Module, tokenizer: object, fasta: Path, *, rows_per_batch: int, is_sorted: bool = False
) -> NDArray[np.float32]:
    """Embed as people do who have a Hugging Face model and a FASTA file.

    Args:
        model: Loaded with ``AutoModel``.
        tokenizer: Of ``AutoTokenizer``.
        fasta: Input.
        rows_per_batch: Records of a batch.
        is_sorted: Batch records by length, instead of in file order.

    Returns:
        Mean of the last hidden state over the mask, a row a record.
    """
    records = read_fasta(fasta)
    order = sorted(range(len(records)), key=lambda index: len(records[index]) if is_sorted else index)
    vectors = []
    for first in range(0, len(records), rows_per_batch):
        texts = [records[index] for index in order[first : first + rows_per_batch]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        mask = inputs["attention_mask"].unsqueeze(-1)
        vectors.append((hidden * mask).sum(1) / mask.sum(1))
    matrix = torch.cat(vectors).float().numpy()[np.argsort(order)]
    np.save(fasta.with_suffix(".npy"), matrix)
    return matrix


def sentence_encoder(folder: Path) -> Callable[[Path], NDArray[np.float32]]:
    """Load a model into sentence-transformers, with mean pooling.

    Args:
        folder: The model.

    Returns:
        Embeds a FASTA file.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folder))
    transformer.max_seq_length = LONGEST  # nothing is cut
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    encoder = SentenceTransformer(modules=[transformer, pooling], device="cpu")

    def encode(fasta: Path) -> NDArray[np.float32]:
        matrix = encoder.encode(read_fasta(fasta), show_progress_bar=False)
        np.save(fasta.with_suffix(".npy"), matrix)
        return matrix

    return encode


def embed(fasta: Path, model: genoembed.GenomicModel, **options: object) -> NDArray[np.float32]:
    """Embed with genoembed and read the vectors back.

    Args:
        fasta: Input.
        model: Loaded.
        **options: Of ``extract``.

    Returns:
        A row a record.
    """
    report = genoembed.extract(
        fasta, model=model, layers="final", output=fasta.with_suffix(".h5"), overwrite=True, **options
    )
    with genoembed.open_embeddings(report.output) as file:
        return file.X[:]


class Comparison:
    """Times the ways of embedding one file with one model.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: object) -> None:
        self.options = options
        self.figures: list[Figure] = []
        self.rows: list[dict[str, object]] = []
        self.remarks: list[str] = []

    def compare(self, name: str, folder: Path, fasta: Path, num_bases: int) -> None:
        """Run everything by turns and compare times and vectors.

        Args:
            name: Of the model.
            folder: Its files.
            fasta: Input.
            num_bases: Of the input.
        """
        found: dict[tuple[str, str], NDArray[np.float32]] = {}
        ways = self._ways(folder, fasta)
        actions = {key: functools.partial(_keep, found, key, action) for key, action in ways.items()}
        samples = interleave(actions, rounds=self.options.rounds, budget_s=self.options.budget_s)
        truth = found["one at a time", "float32"]
        scale = float(np.abs(truth).max())
        for (way, dtype), timings in samples.items():
            difference = float(np.abs(found[way, dtype] - truth).max()) / scale
            label = f"{name}, {dtype}: {way}, difference"
            self.figures.append(Figure(name=label, value=difference, at_most=LARGEST_DIFFERENCE[dtype]))
            row = {"model": name, "way": way, "dtype": dtype}
            row["bases_per_s"] = round(num_bases / spread(timings)["seconds"])
            self.rows.append({**row, **spread(timings)})
        for way, dtype in (key for key in samples if key[0] != EXTRACT):
            label = f"{name}, {dtype}: {way} over extract"
            figure = ratio(label, samples[way, dtype], samples[EXTRACT, dtype], at_least=GOALS.get(way))
            self.figures.append(figure)
        chosen = next(dtype for way, dtype in samples if way == EXTRACT)
        usual = samples["loop of 8", "float32"]
        label = f"{name}: loop of 8 in float32 over extract as it chooses ({chosen})"
        self.figures.append(ratio(label, usual, samples[EXTRACT, chosen], at_least=USUAL_GOAL))

    def _ways(self, folder: Path, fasta: Path) -> dict[tuple[str, str], Callable[[], NDArray[np.float32]]]:
        """List the ways by name and type, the type that ``auto`` chooses first."""
        automatic = genoembed.load_model(str(folder), device="cpu")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ways: dict[tuple[str, str], Callable[[], NDArray[np.float32]]] = {}
        for dtype in dict.fromkeys((automatic.dtype, torch.float32)):
            name = str(dtype).removeprefix("torch.")
            same = dtype == automatic.dtype
            loaded = automatic if same else genoembed.load_model(str(folder), device="cpu", dtype=dtype)
            ways[EXTRACT, name] = functools.partial(embed, fasta, loaded)
            model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
            loop = functools.partial(usual_loop, model, tokenizer, fasta)
            ways["loop of 8", name] = functools.partial(loop, rows_per_batch=LOOP_ROWS)
            ways["sorted loop of 8", name] = functools.partial(loop, rows_per_batch=LOOP_ROWS, is_sorted=True)
            ways["one at a time", name] = functools.partial(loop, rows_per_batch=1)
        if HAS_SENTENCE_TRANSFORMERS:
            ways["sentence-transformers", "float32"] = functools.partial(sentence_encoder(folder), fasta)
        else:
            self.remarks.append("sentence-transformers is not installed: its rows were left out")
        return ways

    def share_outside(self, name: str, folder: Path, fasta: Path) -> None:
        """Measure what share of extract's wall time is spent outside the model's forward.

        Args:
            name: Of the model.
            folder: Its files.
            fasta: Records of 1 kb.
        """
        model = genoembed.load_model(str(folder), device="cpu")
        inside = _time_forward(model.module)
        walls, shares, reported = [], [], []
        for number in range(self.options.rounds + 1):
            inside.clear()
            started = time.perf_counter()
            report = genoembed.extract(
                fasta, model=model, output=fasta.with_suffix(".h5"), overwrite=True, layers="final"
            )
            wall = time.perf_counter() - started
            if number:  # the first run finds out about the model and reads its files for their digest
                walls.append(wall)
                shares.append(1 - sum(inside) / wall)
                reported.append(1 - report.stats.forward_s / report.seconds)
        middle = sorted(shares)[len(shares) // 2]
        self.figures.append(
            Figure(
                name=f"{name}: share of wall time outside the forward, records of 1 kb",
                value=middle,
                low=min(shares),
                high=max(shares),
                at_most=LARGEST_SHARE,
            )
        )
        self.rows.append(
            {
                "model": name,
                "way": "extract, records of 1 kb",
                "bases_per_s": round(report.counts.bases / sorted(walls)[len(walls) // 2]),
                "seconds": sorted(walls)[len(walls) // 2],
                "outside, by its own report": sorted(reported)[len(reported) // 2],
            }
        )


def _keep(
    found: dict[tuple[str, str], NDArray[np.float32]],
    key: tuple[str, str],
    action: Callable[[], NDArray[np.float32]],
) -> None:
    found[key] = action()


def _time_forward(module: torch.nn.Module) -> list[float]:
    """Make a model keep the seconds of each call of its forward; captures leave it by an exception."""
    seconds: list[float] = []
    forward = module.forward

    @functools.wraps(forward)
    def timed(*args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    module.forward = timed
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = option_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=("mini", "esm"), default=["mini", "esm"])
    parser.add_argument("--records", type=int, default=96, help="records of the mixed file")
    parser.add_argument("--median", type=int, default=MEDIAN_LENGTH, help="of their lengths")
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--kilobase-records", type=int, default=64, help="records of 1 kb")
    parser.add_argument(
        "--budget-s", type=float, default=900, help="of the rounds of one model, two at least"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.records, options.kilobase_records, options.rounds = 16, 8, 2
        options.median, options.longest = 300, 1000
    use_threads(options.threads)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    comparison = Comparison(options)
    lengths = mixed_lengths(options.records, median=options.median, longest=options.longest)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"mini": BUNDLED_FOLDER}
        if "esm" in options.models:
            folders["esm"] = write_esm(Path(scratch, "esm"))
        mixed = write_fasta(Path(scratch, "mixed.fa"), lengths)
        kilobases = write_fasta(Path(scratch, "kilobases.fa"), [1000] * options.kilobase_records)
        for name in options.models:
            comparison.compare(name, folders[name], mixed, sum(lengths))
            comparison.share_outside(name, folders[name], kilobases)
    padded = sum(
        max(lengths[at : at + LOOP_ROWS]) * len(lengths[at : at + LOOP_ROWS])
        for at in range(0, len(lengths), LOOP_ROWS)
    )
    file_results(
        "speed_extract",
        "extract against the usual ways",
        options,
        figures=comparison.figures,
        tables={"Runs": comparison.rows},
        remarks=[
            f"Mixed file: {len(lengths)} records, {sum(lengths)} bases, {min(lengths)} to {max(lengths)} bp; "
            f"the loop of 8 runs {padded / sum(lengths):.2f} slots a base.",
            "Differences: largest, to the vectors of one record at a time, over the largest value.",
            "ESM: 6 blocks, hidden 320, 20 heads, random weights.",
            *comparison.remarks,
        ],
        packages=("sentence-transformers",),
    )


if __name__ == "__main__":
    main()
