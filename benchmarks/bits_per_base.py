"""Bits per base of a causal model on held-out sequence, by group, beside interpolated Markov models.

Every base is scored once, with at least ``--context`` bases before it where the contig has them. Headers are
``>group|tag|n``, as split_corpus.py writes them. Give markov.py's JSON with ``--markov`` for the comparison.

    python benchmarks/bits_per_base.py genoembed-mini --heldout heldout.fa --markov markov_heldout.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

import genoembed
from genoembed.models.registry import BUNDLED_FOLDER


def score_contig(model, sequence: bytes, *, window: int, context: int, rows: int, dtype) -> tuple[float, int]:
    """Sum of -log2 p over the ACGT bases after the first, and their number."""
    ids = torch.tensor(list(sequence))
    starts = range(0, max(1, len(ids) - context), window - context)
    pieces = [(start, ids[start : start + window]) for start in starts]
    bits, count = 0.0, 0
    for first in range(0, len(pieces), rows):
        group = pieces[first : first + rows]
        batch = torch.ones(len(group), max(len(piece) for _, piece in group), dtype=torch.long)
        for row, (_, piece) in enumerate(group):
            batch[row, : len(piece)] = piece
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = model(batch).logits.float()
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")
        for row, (start, piece) in enumerate(group):
            skipped = context if start else 1
            targets = piece[skipped:]
            is_base = torch.isin(targets, torch.tensor(list(b"ACGT")))
            bits += float(loss[row, skipped - 1 : len(piece) - 1][is_base].double().sum()) / math.log(2)
            count += int(is_base.sum())
    return bits, count


def read_groups(path: Path) -> dict[str, list[bytes]]:
    """Contigs by the group in their header."""
    groups = defaultdict(list)
    for record in genoembed.read_sequences(path, duplicates="suffix"):
        groups[record.id.split("|")[0]].append(record.sequence)
    return groups


def print_comparison(summary: dict, markov: dict) -> None:
    """Set each group beside the best Markov order for it (negative differences: the model is better)."""
    ours = {name: entry["bits_per_base"] for name, entry in summary["groups"].items()}
    ours["mean of groups"], ours["all bases"] = summary["mean_of_groups"], summary["all_bases"]
    orders = list(next(iter(markov.values())))
    print("| group | model | best Markov (order) | difference |", *(f" order {k} |" for k in orders), sep="")
    print("| --- " * (4 + len(orders)) + "|")
    for name, bits in ours.items():
        best = min(markov[name], key=markov[name].get)
        others = "".join(f" {markov[name][k]:.4f} |" for k in orders)
        difference = bits - markov[name][best]
        print(f"| {name} | {bits:.4f} | {markov[name][best]:.4f} ({best}) | {difference:+.4f} |{others}")


def main() -> None:
    """Score, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="genoembed-mini or a folder")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--window", type=int, default=1024, help="tokens the model sees at once")
    parser.add_argument(
        "--context", type=int, default=512, help="bases before the first scored one of a window"
    )
    parser.add_argument("--rows", type=int, default=4, help="windows of a forward pass")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit", type=int, help="bases of each group at most, for a quick look")
    parser.add_argument("--markov", type=Path, help="JSON of markov.py on the same held-out file")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = BUNDLED_FOLDER if arguments.model == "genoembed-mini" else arguments.model
    model = genoembed.StripedHyena2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    totals = {}
    for group, contigs in read_groups(arguments.heldout).items():
        bits, count = 0.0, 0
        for contig in contigs:
            room = None if arguments.limit is None else max(0, arguments.limit - count)
            if room == 0:
                break
            more_bits, more = score_contig(
                model,
                contig[:room],
                window=arguments.window,
                context=arguments.context,
                rows=arguments.rows,
                dtype=getattr(torch, arguments.dtype),
            )
            bits, count = bits + more_bits, count + more
        totals[group] = {"bases": count, "bits_per_base": bits / count}
        print(f"{group:20s} {count:>9,d} bases  {bits / count:.4f} bits per base", flush=True)
    bases = sum(entry["bases"] for entry in totals.values())
    summary = {
        "mean_of_groups": sum(entry["bits_per_base"] for entry in totals.values()) / len(totals),
        "all_bases": sum(entry["bits_per_base"] * entry["bases"] for entry in totals.values()) / bases,
        "groups": totals,
    }
    print(f"mean of groups {summary['mean_of_groups']:.4f}, all bases {summary['all_bases']:.4f}")
    if arguments.markov:
        print_comparison(summary, json.loads(arguments.markov.read_text())["bits_per_base"]["interpolated"])
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
