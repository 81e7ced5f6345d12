"""What keeping packed neighbors apart costs: a training step with segment ids against one without.

Rows of pack_bins and of pack_stream over the documents of the files, a model of the bundled shape with random
weights; steps with and without isolation alternate within one run. Also prints the largest deviation of a
packed forward from separate ones, and whether any gradient crosses a boundary::

    python benchmarks/isolation.py markers.fa.gz viruses.fa.gz --json benchmarks/results/isolation.json
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from describe_machine import describe_machine

import genoembed
from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.batching.pack import pack_bins, pack_stream

if TYPE_CHECKING:
    from genoembed.contracts import PackedBatch


def step_seconds(model: StripedHyena2ForCausalLM, batch: PackedBatch, *, isolate: bool) -> float:
    """Forward and backward of one batch, products in bfloat16."""
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        segment_ids = batch.segment_ids if isolate else None
        loss = model(batch.input_ids, labels=batch.labels, segment_ids=segment_ids).loss
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def check_isolation(model: StripedHyena2ForCausalLM, batch: PackedBatch) -> dict[str, float | int]:
    """Compare each segment with itself alone, and look for gradients outside it."""
    embedded = model.embedding_layer(batch.input_ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, segment_ids=batch.segment_ids).logits
    deviation, crossing, segments = 0.0, 0.0, 0
    for row, numbers in enumerate(batch.segment_ids):
        for number in numbers.unique().tolist():
            if number < 0:
                continue
            places = (numbers == number).nonzero()[:, 0]
            alone = model(batch.input_ids[row, places][None]).logits[0]
            deviation = max(deviation, float((alone - logits[row, places]).detach().abs().max()))
            (gradient,) = torch.autograd.grad(logits[row, places].sum(), embedded, retain_graph=True)
            gradient[row, places] = 0
            crossing = max(crossing, float(gradient.abs().max()))
            segments += 1
    return {
        "segments": segments,
        "largest_deviation_float32": deviation,
        "largest_gradient_across_a_boundary": crossing,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    documents = [
        record.sequence
        for path in arguments.files
        for record in islice(genoembed.read_sequences(path, duplicates="suffix"), 2000)
    ]
    torch.manual_seed(0)
    model = StripedHyena2ForCausalLM(StripedHyena2Config(num_attention_heads=2))
    results: dict[str, object] = {
        "machine": describe_machine(),
        "note": arguments.note,
        "window": arguments.window,
        "rows": arguments.rows,
        "threads": arguments.threads,
    }
    for packer in (pack_bins, pack_stream):
        batch = next(packer(documents, window=arguments.window, batch_size=arguments.rows))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(arguments.pairs + 1):
            for isolate in (bool(pair % 2), not pair % 2):
                elapsed = step_seconds(model, batch, isolate=isolate)
                if pair:
                    seconds[isolate].append(elapsed)
        ratios = [apart / together for apart, together in zip(seconds[True], seconds[False], strict=True)]
        found = {
            "segments_of_the_batch": int(batch.cu_seqlens.numel()) - 1,
            "seconds_isolated": median(seconds[True]),
            "seconds_not_isolated": median(seconds[False]),
            "ratio_median_of_pairs": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            **check_isolation(model.eval(), batch),
        }
        results[packer.__name__] = found
        print(packer.__name__, json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
