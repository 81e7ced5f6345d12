"""Training steps of the bundled model: before and after a change, and packed against padded.

Before and after: ``--before-src`` names a checkout of an older version. Each version runs in a process of its
own that waits for its turn; steps alternate, on the same weights and rows, and the losses are compared.
Without it, only this version is timed. A step is forward, backward, clipping and AdamW, in float32 and with
products in bfloat16 (autocast), as ``genoembed pretrain`` runs it.

Packed against padded: the documents of the FASTA files (the example genes and a virus by default) in rows of
a window, whole documents kept apart (``pack_bins`` with ``segment_ids``), as a stream, and one document a
row, padded to the longest of the batch, in random order. Same number of rows a batch, passes over all
documents by turns::

    python benchmarks/speed_training.py --before-src ../before
    python benchmarks/speed_training.py markers.fa.gz viruses.fa.gz --parts packing
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from measuring import Figure, Sample, file_results, interleave, option_parser, ratio, spread, use_threads

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

SEED = 5
LEARNING_RATE = 1e-4
EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
LARGEST_LOSS_DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2}


class Trainer:
    """Steps of the bundled model.

    Args:
        dtype: ``float32``, or ``bfloat16`` for autocast.
    """

    def __init__(self, dtype: str) -> None:
        import torch

        from genoembed import StripedHyena2ForCausalLM
        from genoembed.models.registry import BUNDLED_FOLDER

        self.torch = torch
        self.dtype = dtype
        self.model = StripedHyena2ForCausalLM.from_pretrained(BUNDLED_FOLDER, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def step(self, inputs: Mapping[str, Tensor]) -> float:
        """Train on one batch.

        Args:
            inputs: Arguments of the model's forward, labels among them.

        Returns:
            The loss in nats, before the step.
        """
        torch = self.torch
        is_mixed = self.dtype == "bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16) if is_mixed else contextlib.nullcontext():
            loss = self.model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def serve(dtype: str, rows: int, window: int, threads: int) -> None:
    """Make a step for each line of standard input, and answer with its timing and loss.

    Args:
        dtype: Of the products.
        rows: Of a batch.
        window: Tokens of a row.
        threads: 0 leaves torch's choice.
    """
    import torch

    import genoembed

    if threads:
        torch.set_num_threads(threads)
    trainer = Trainer(dtype)
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.tensor(list(b"ACGT"))[torch.randint(4, (rows, window), generator=generator)]
    print(json.dumps({"source": str(Path(genoembed.__file__).parents[1])}), flush=True)
    for _ in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        loss = trainer.step({"input_ids": input_ids, "labels": input_ids})
        answer = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "loss": loss,
        }
        print(json.dumps(answer), flush=True)


class Version:
    """A process that trains with one version of the package, a step when told to.

    Args:
        source: Folder that holds ``genoembed``.
        options: Of the command line.
        dtype: Of the products.
    """

    def __init__(self, source: Path, options: argparse.Namespace, dtype: str) -> None:
        words = [sys.executable, __file__, "--serve", dtype]
        words += [str(options.rows), str(options.window), str(options.threads)]
        environment = os.environ | {"PYTHONPATH": str(source), "TRANSFORMERS_VERBOSITY": "error"}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        found = Path(self._answer()["source"])
        if found.resolve() != source.resolve():
            message = f"{source}: the process took genoembed from {found}; does the folder hold it?"
            raise RuntimeError(message)
        self.losses: list[float] = []

    def step(self) -> Sample:
        """Make a step.

        Returns:
            Its timing.
        """
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.losses.append(answer["loss"])
        return Sample(answer["seconds"], answer["cpu_seconds"], 0.0)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, object]:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            message = f"a training process ended: {self._errors.read()[-2000:]}"
            raise RuntimeError(message)
        return json.loads(line)


def compare_versions(options: argparse.Namespace, dtype: str) -> tuple[list[Figure], list[dict[str, object]]]:
    """Time steps of this version, and of the older one by turns with it.

    Args:
        options: Of the command line.
        dtype: Of the products.

    Returns:
        Figures and a row a version.
    """
    sources = {"after": Path(__file__).parents[1]}
    if options.before_src is not None:
        sources["before"] = options.before_src
    with contextlib.ExitStack() as stack:
        versions = {}
        for name, source in sources.items():
            versions[name] = Version(source, options, dtype)
            stack.callback(versions[name].close)
        samples: dict[str, list[Sample]] = {name: [] for name in versions}
        for number in range(options.rounds + 1):
            for name in sorted(versions, reverse=bool(number % 2)):
                sample = versions[name].step()
                if number:
                    samples[name].append(sample)
    tokens = options.rows * options.window
    rows = [
        {
            "version": name,
            "products": dtype,
            "tokens_per_s": round(tokens / spread(found)["seconds"]),
            "tokens_per_cpu_s": round(tokens / spread(found)["cpu_seconds"]),
            **{key: value for key, value in spread(found).items() if key != "others"},
            "first loss": versions[name].losses[0],
            "last loss": versions[name].losses[-1],
        }
        for name, found in samples.items()
    ]
    figures = []
    if "before" in samples:
        label = f"{dtype}, {options.rows} x {options.window}"
        figures.append(ratio(f"step before over after, {label}", samples["before"], samples["after"]))
        pairs = zip(versions["before"].losses, versions["after"].losses, strict=True)
        figures.append(
            Figure(
                name=f"largest difference of losses, {label}",
                value=max(abs(a - b) for a, b in pairs),
                at_most=LARGEST_LOSS_DIFFERENCE[dtype],
            )
        )
    return figures, rows


def read_documents(paths: Sequence[Path], num_bases: int) -> list[bytes]:
    """Draw documents at random.

    Args:
        paths: FASTA files.
        num_bases: Documents are drawn until they have so many bases together.

    Returns:
        Sequences, in random order.
    """
    from genoembed import read_sequences

    documents = [record.sequence for record in read_sequences(paths, duplicates="suffix")]
    order = np.random.default_rng(SEED).permutation(len(documents))
    totals = np.cumsum([len(documents[index]) for index in order])
    return [documents[index] for index in order[: np.searchsorted(totals, num_bases) + 1]]


def padded_batches(documents: Sequence[bytes], *, window: int, rows: int) -> Iterator[dict[str, Tensor]]:
    """One document a row, cut at the window, EOD behind it, padded to the longest of the batch.

    Args:
        documents: In order.
        window: Most tokens of a row.
        rows: Of a batch; the last one may have fewer.

    Yields:
        Arguments of the model's forward.
    """
    import torch

    from genoembed import CharTokenizer

    tokenizer = CharTokenizer()
    pieces = [
        torch.tensor(list(piece))
        for document in documents
        for whole in (document + bytes([tokenizer.eos_token_id]),)
        for piece in (whole[start : start + window] for start in range(0, len(whole), window))
    ]
    for first in range(0, len(pieces), rows):
        chosen = pieces[first : first + rows]
        pad = torch.nn.utils.rnn.pad_sequence
        yield {
            "input_ids": pad(chosen, batch_first=True, padding_value=tokenizer.pad_token_id),
            "labels": pad(chosen, batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones_like(ids) for ids in chosen], batch_first=True),
        }


def packed_batches(documents: Sequence[bytes], *, window: int, rows: int, way: str) -> Iterator[dict]:
    """Pack the documents.

    Args:
        documents: In order.
        window: Tokens of a row.
        rows: Of a batch.
        way: ``bins, isolated`` or ``stream``.

    Yields:
        Arguments of the model's forward.
    """
    from genoembed.batching.pack import pack_bins, pack_stream

    packer = pack_stream if way == "stream" else pack_bins
    for batch in packer(documents, window=window, batch_size=rows):
        inputs = {"input_ids": batch.input_ids, "labels": batch.labels}
        if way != "stream":
            inputs["segment_ids"] = batch.segment_ids
        yield inputs


def real_tokens(inputs: Mapping[str, Tensor], pad_token_id: int = 1) -> int:
    """Count tokens that are no padding.

    Args:
        inputs: Of a batch.
        pad_token_id: Id of padding.

    Returns:
        Tokens.
    """
    return int((inputs["input_ids"] != pad_token_id).sum())


def compare_packing(
    options: argparse.Namespace, dtype: str, documents: Sequence[bytes]
) -> tuple[list[Figure], list[dict[str, object]]]:
    """Time steps on packed and on padded batches of the same documents by turns.

    Args:
        options: Of the command line.
        dtype: Of the products.
        documents: Sequences.

    Returns:
        Figures and a row a way.
    """
    shape = {"window": options.window, "rows": options.rows}
    batches = {
        "bins, isolated": packed_batches(documents, way="bins", **shape),
        "stream": packed_batches(documents, way="stream", **shape),
        "padded": padded_batches(documents, **shape),
    }
    held = {name: list(found) for name, found in batches.items()}
    trainer = Trainer(dtype)

    def train_on(name: str) -> None:
        for inputs in held[name]:
            trainer.step(inputs)

    samples = interleave(
        {name: lambda name=name: train_on(name) for name in held},
        rounds=options.rounds,
        budget_s=options.budget_s,
        warm_up=False,  # a pass is many steps
    )
    rows = []
    for name, found in samples.items():
        tokens = sum(map(real_tokens, held[name]))
        slots = sum(inputs["input_ids"].numel() for inputs in held[name])
        row = {"way": name, "products": dtype, "batches": len(held[name]), "real tokens": tokens}
        row |= {"slots a token": slots / tokens, "tokens_per_s": round(tokens / spread(found)["seconds"])}
        rows.append({**row, **spread(found)})
    figures = [
        ratio(f"all documents, padded over {name}, {dtype}", samples["padded"], samples[name])
        for name in ("bins, isolated", "stream")
    ]
    return figures, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--serve"]:
        serve(words[1], *map(int, words[2:5]))
        return
    parser = option_parser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="FASTA files with the documents")
    parser.add_argument("--before-src", type=Path, help="checkout of an older version")
    parser.add_argument("--parts", nargs="+", choices=("steps", "packing"), default=["steps", "packing"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--kilobases", type=float, default=40, help="of documents to pack, drawn at random")
    parser.add_argument("--budget-s", type=float, default=300, help="of the passes of a dtype, two at least")
    options = parser.parse_args(words)
    if options.quick:
        options.window, options.rounds, options.kilobases = 512, 2, 3
    use_threads(options.threads)
    files = options.files or [EXAMPLES / "bacterial_genes.fa.gz", EXAMPLES / "virus.fa"]
    figures: list[Figure] = []
    tables: dict[str, list[dict[str, object]]] = {"Steps": [], "Packed and padded": []}
    documents = []
    if "packing" in options.parts:
        documents = read_documents(files, round(options.kilobases * 1000))
    for dtype in options.dtypes:
        if "steps" in options.parts:
            found, rows = compare_versions(options, dtype)
            figures += found
            tables["Steps"] += rows
        if "packing" in options.parts:
            found, rows = compare_packing(options, dtype, documents)
            figures += found
            tables["Packed and padded"] += rows
    remarks = ["bfloat16: autocast of the products; weights and optimizer float32."]
    if documents:
        lengths = np.percentile([len(document) for document in documents], [5, 50, 95]).round().tolist()
        remarks.append(
            f"{len(documents)} documents of {', '.join(path.name for path in files)}; 5th, 50th and 95th "
            f"percentile of their lengths: {lengths}. All ways train on all of them in each round."
        )
    if options.before_src is None:
        remarks.append("No older version was named (--before-src): steps are of this version only.")
    options.files = [path.name for path in files]
    options.before_src = None if options.before_src is None else options.before_src.name
    file_results(
        "speed_training",
        "Training steps of the bundled model",
        options,
        figures=figures,
        tables=tables,
        remarks=remarks,
    )


if __name__ == "__main__":
    main()
