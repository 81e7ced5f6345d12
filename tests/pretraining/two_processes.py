"""What ``test_run_distributed.py`` starts with torchrun: a run that writes down the documents of its rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import genoembed
from genoembed.pretraining.corpus import DocumentStream


def main() -> None:
    """Train, and write ``documents.RANK.json`` into the output folder."""
    corpus, heldout, output = sys.argv[1:]
    seen: list[str] = []
    inner = DocumentStream.__next__

    def watched(self: DocumentStream) -> bytes:
        document = inner(self)
        if self.config.num_shards > 1:
            seen.append(document.decode())
        return document

    DocumentStream.__next__ = watched
    report = genoembed.pretrain(
        corpus,
        output,
        heldout=heldout,
        like="evo2_7b",
        hidden_size=32,
        layers=4,
        window=16,
        both_strands=False,
        shuffle_documents=1,
        rows_per_device=2,
        max_steps=3,
        logging_steps=1,
        eval_steps=3,
        save_steps=3,
        dtype="float32",
    )
    rank = os.environ["RANK"]
    Path(output, f"documents.{rank}.json").write_text(json.dumps([seen, report.bits_per_base]))


if __name__ == "__main__":
    main()
    # without the interpreter's farewell: torch 2.13 aborts there in about 1 of 25 runs of any gloo program
    sys.stdout.flush()
    os._exit(0)
