"""How each command is run in the matrix: on a tiny input and a tiny model, in a folder of its own.

The files of :func:`build_world` lie in the folder in which a command runs, so that words name them plainly.
A new command fails the matrix until it has a column here.
"""

from __future__ import annotations

import gzip
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.promises.warm import Ran

MODEL = ("--model", "model")
SPEED = ("--threads", "1")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One command."""

    words: tuple[str, ...]
    """A complete call, without the output option and its value."""
    inputs: tuple[str, ...] = ()
    """Files among the words."""
    output: tuple[str, str] | None = None
    """The option that names what is written ("" where it is an argument), and a name for it."""
    is_folder: bool = False
    """Whether a folder is written."""
    more_outputs: tuple[tuple[str, str], ...] = ()
    """Further options that name files to write."""
    has_overwrite: bool = True
    runs_forward: bool = False
    """Whether a model runs."""
    trains: bool = False
    goes_on: bool = False
    """Whether a killed run goes on where it was."""
    resume: tuple[str, ...] = ()
    """What has to be said so that it does."""
    requires: bool = True
    """Whether an option or argument is required."""
    model_option: str = ""
    """The option that names a model folder to read ("0" where it is the first argument)."""
    why_fresh: str = "nothing unfinished is gone on with: what it wrote is written anew"
    bad_options: tuple[tuple[str, ...], ...] = ()
    """Options that are wrong in a way that needs no model to see."""
    changing: tuple[str, str] | None = None
    """An option and another value, under which what is finished is worth nothing."""

    def call(self, command: str, *more: str, output: str | None = None) -> list[str]:
        """Give the whole call."""
        said = [] if self.output is None else [self.output[0], output or self.output[1]]
        return [command, *self.words, *[word for word in said if word], *more]


COLUMNS = {
    "extract": Column(
        words=("seqs.fa", *MODEL, "--layer", "1", *SPEED),
        inputs=("seqs.fa",),
        output=("-o", "out.h5"),
        runs_forward=True,
        goes_on=True,
        bad_options=(
            ("--window", "8", "--stride", "9"),
            ("--pool", "median"),
            ("--batch-tokens", "0"),
            ("--regions", "absent.bed"),
            ("-o", "absent/out.h5"),
        ),
        changing=("--layer", "2"),
    ),
    "merge": Column(words=(), inputs=(), output=("", "shared.h5"), goes_on=True),
    "layers": Column(requires=False, words=("model",)),
    "models": Column(requires=False, words=()),
    "info": Column(words=("one.h5",), inputs=("one.h5",)),
    "convert": Column(
        words=("original.pt", "--vortex-config", "original.yml"),
        inputs=("original.pt", "original.yml"),
        output=("-o", "converted"),
        is_folder=True,
    ),
    "pretrain": Column(
        words=(
            "seqs.fa",
            *MODEL,
            "--heldout",
            "queries.fa",
            "--max-steps",
            "3",
            "--window",
            "32",
            "--rows-per-device",
            "2",
            "--save-steps",
            "1",
            "--eval-steps",
            "2",
            "--contrast",
            "0.1",
            "--kmer-codes",
            "0.1",
            *SPEED,
        ),
        inputs=("seqs.fa", "queries.fa"),
        model_option="--model",
        output=("-o", "pretrained"),
        is_folder=True,
        runs_forward=True,
        trains=True,
        goes_on=True,
        resume=("--resume",),
        bad_options=(("--max-steps", "0"), ("--packing", "tight"), ("--learning-rate", "inf")),
        changing=("--seed", "5"),
    ),
    "finetune": Column(
        words=(
            "train.tsv",
            "--task",
            "classification",
            *MODEL,
            "--layer",
            "1",
            "--max-epochs",
            "2",
            "--split",
            "random",
            "--rows-per-device",
            "4",
            *SPEED,
        ),
        inputs=("train.tsv",),
        model_option="--model",
        output=("-o", "tuned2"),
        is_folder=True,
        runs_forward=True,
        trains=True,
        goes_on=True,
        resume=("--resume",),
        bad_options=(
            ("--max-epochs", "0"),
            ("--learning-rate", "inf"),
            ("--min-epochs", "9", "--max-epochs", "2"),
            ("--margin", "0.5"),
        ),
        changing=("--seed", "5"),
    ),
    "predict": Column(
        why_fresh="its input here is one unit; tests/finetuning/test_predict.py changes what it goes on with",
        words=("tuned/final", "queries.fa", *SPEED),
        inputs=("queries.fa",),
        output=("-o", "predicted.tsv"),
        runs_forward=True,
        goes_on=True,
        bad_options=(("--batch-rows", "0"), ("--format", "xml")),
    ),
    "search": Column(
        words=("queries.fa", "--against", "one.h5", "-k", "2", *SPEED),
        inputs=("queries.fa", "one.h5"),
        output=("-o", "hits.tsv"),
        runs_forward=True,
        bad_options=(("--neighbors", "0"), ("--metric", "manhattan"), ("--layer", "blocks.9")),
    ),
    "fit-transform": Column(
        words=("one.h5",),
        inputs=("one.h5",),
        output=("-o", "centered.h5"),
        bad_options=(("--method", "squeeze"), ("--shrinkage", "7")),
    ),
    "probe": Column(
        why_fresh="its vectors are an output of extract, which has this cell",
        words=(
            "seqs.fa",
            "--labels",
            "labels.tsv",
            *MODEL,
            "--layer",
            "1",
            "--num-folds",
            "3",
            "--no-plot",
            *SPEED,
        ),
        inputs=("seqs.fa", "labels.tsv"),
        model_option="--model",
        output=("-o", "probed"),
        is_folder=True,
        runs_forward=True,
        goes_on=True,
        bad_options=(("--num-folds", "1"), ("--label-column", "absent"), ("--cv", "leave")),
    ),
    "plot": Column(
        words=("one.h5", "--values", "values.tsv", "--color", "kind"),
        inputs=("one.h5", "values.tsv"),
        output=("-o", "map.png"),
        bad_options=(("--method", "som"), ("--color", "absent"), ("--max-points", "0")),
    ),
    "compare": Column(
        words=("one.h5", "two.h5"),
        inputs=("one.h5", "two.h5"),
        output=("-o", "differences.tsv"),
        bad_options=(("--tolerance", "-1"), ("--layer", "absent")),
    ),
    "verify": Column(
        words=("one.h5", "--sample", "2", *SPEED),
        inputs=("one.h5",),
        runs_forward=True,
        bad_options=(("--sample", "0"), ("--tolerance", "-1")),
    ),
    "subset": Column(
        words=("one.h5", "--ids", "some.txt", "--where", "length>40"),
        inputs=("one.h5", "some.txt"),
        output=("-o", "some.h5"),
        bad_options=(("--where", "length"), ("--where", "absent=1"), ("--where", "length=long")),
    ),
    "join": Column(
        words=("one.h5", "more.h5"),
        inputs=("one.h5", "more.h5"),
        output=("-o", "joined.h5"),
    ),
    "annotate": Column(
        words=("one.h5", "values.tsv"),
        inputs=("one.h5", "values.tsv"),
        output=("-o", "annotated.h5"),
    ),
    "export": Column(
        words=("one.h5", "--to", "csv"),
        inputs=("one.h5",),
        output=("-o", "vectors.csv"),
        bad_options=(("--layer", "absent"),),
    ),
    "export-model": Column(
        words=("model",),
        model_option="0",
        inputs=(),
        output=("-o", "sentence"),
        is_folder=True,
        bad_options=(("--dtype", "int3"),),
    ),
    "score": Column(
        why_fresh="one unit here; tests/scoring/test_score_goes_on.py changes what it goes on with",
        requires=False,
        words=("queries.fa", *MODEL, *SPEED),
        inputs=("queries.fa",),
        output=("-o", "scores.tsv"),
        more_outputs=(("--per-base", "bases.tsv"),),
        runs_forward=True,
        goes_on=True,
        bad_options=(("--window", "8", "--stride", "9"), ("--flank", "3")),
    ),
    "generate": Column(
        why_fresh="one unit here; tests/generation/test_goes_on.py changes what it goes on with",
        words=("queries.fa", *MODEL, "-n", "2", "--length", "4", *SPEED),
        inputs=("queries.fa",),
        output=("-o", "generated.fa"),
        runs_forward=True,
        goes_on=True,
        bad_options=(("--top-p", "0"), ("--temperature", "-1"), ("--length", "0")),
    ),
    "serve": Column(  # a dry run, which ends by itself; test_serve.py has the cells of a server that listens
        requires=False,
        words=(*MODEL, "--layer", "1", "--port", "0", "--dry-run", *SPEED),
        runs_forward=True,
        bad_options=(
            ("--port", "70000"),
            ("--pool", "none"),
            ("--window", "8", "--stride", "9"),
            ("--max-queue", "0"),
        ),
    ),
    "doctor": Column(
        requires=False,
        words=(),
        runs_forward=True,
        bad_options=(("--tolerance", "-1"), ("--as", "nt-v2-50m")),
    ),
}

VARIANTS = Column(
    why_fresh="one unit here; tests/scoring/test_score_goes_on.py changes what it goes on with",
    requires=False,
    words=("--vcf", "calls.vcf", "--reference", "reference.fa", *MODEL, "--flank", "20", *SPEED),
    inputs=("calls.vcf", "reference.fa"),
    output=("-o", "variants.tsv"),
    more_outputs=(("--vectors", "deltas.h5"),),
    runs_forward=True,
    goes_on=True,
)
"""A second form of ``score``."""

MUTATIONS = Column(
    why_fresh="one unit here; tests/scoring/test_mutagenesis.py changes what it goes on with",
    requires=False,
    words=("--mutagenesis", "reference.fa", "--regions", "place.bed", *MODEL, "--flank", "20", *SPEED),
    inputs=("reference.fa", "place.bed"),
    output=("-o", "mutations.tsv"),
    more_outputs=(("--matrix", "mutations.h5"), ("--heat-map", "mutations.png")),
    runs_forward=True,
    goes_on=True,
    bad_options=(("--flank", "0"), ("--heat-map", "map.svg"), ("--per-base", "bases.tsv")),
)
"""A third one."""

ALL = {**COLUMNS, "score --vcf": VARIANTS, "score --mutagenesis": MUTATIONS}


@dataclass(frozen=True)
class Promise:
    """A row of the matrix."""

    what: str
    why_not: Callable[[str, Column], str]
    """Why a command does not have it; empty where it has."""


def _writes(_name: str, column: Column) -> str:
    return "" if column.output else "it writes no file"


def _runs_a_model(name: str, column: Column) -> str:
    if name == "doctor":
        return "it runs the bundled model alone, and what fails is its result"
    return "" if column.runs_forward else "no model runs"


def _reads_and_writes(_name: str, column: Column) -> str:
    if not column.output:
        return "it writes no file"
    if not column.output[0]:
        return "its output is made from the parts beside it, and is no file that it reads"
    return "" if column.inputs or column.model_option else "it reads no file"


def _infers(name: str, column: Column) -> str:
    if column.trains:
        return "the rows of a training step are part of its result: an error says what to set lower"
    return _runs_a_model(name, column)


def _embeds_records(name: str, column: Column) -> str:
    if column.trains:
        return "a loss that is not finite ends training (promise 12)"
    if name == "verify":
        return "it repeats what a file holds: a vector that is not finite is a difference, its result"
    return _runs_a_model(name, column)


PROMISES = {
    1: Promise(
        "what is required and left out is named", lambda _, c: "" if c.requires else "nothing is required"
    ),
    2: Promise(
        "cheap checks come before torch",
        lambda _, c: "" if c.inputs or c.bad_options else "it reads no file, and its options cannot be wrong",
    ),
    3: Promise("no output is an input", _reads_and_writes),
    4: Promise(
        "an output is replaced on request, if it is ours, by a complete one",
        lambda _, c: (
            "its output is made from the parts beside it" if c.output and not c.output[0] else _writes(_, c)
        ),
    ),
    5: Promise("a kill leaves the old output or the new one", _writes),
    6: Promise("a signal ends it in one line", lambda *_: ""),
    7: Promise("a full disk or a closed pipe is one line", lambda *_: ""),
    8: Promise("one process an output", _writes),
    9: Promise(
        "unfinished work of something else is refused", lambda _, c: "" if c.changing else c.why_fresh
    ),
    10: Promise("short of memory, the result is the same", _infers),
    11: Promise("a record that fails is named, and skipped on request", _embeds_records),
    12: Promise(
        "training that diverges ends in a sentence", lambda _, c: "" if c.trains else "nothing is trained"
    ),
    13: Promise("one JSON object, and what was written in the last line", lambda *_: ""),
    14: Promise("what foreign code raises is one line", _runs_a_model),
}


def having(promise: int) -> dict[str, Column]:
    """Return the commands that a promise is for."""
    return {name: column for name, column in ALL.items() if not PROMISES[promise].why_not(name, column)}


LETTERS = "ACGT"


def build_world(folder: Path, run: Callable[..., Ran]) -> None:
    """Make what the commands read."""
    import shutil

    import torch

    from genoembed import CharTokenizer, StripedHyena2Config, StripedHyena2ForCausalLM

    golden = Path(__file__).parents[1] / "golden" / "a_base"
    shutil.copy(golden / "evo2_golden_7bstyle.pt", folder / "original.pt")
    shutil.copy(golden / "config.yml", folder / "original.yml")
    config = StripedHyena2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        hcs_layer_idxs=[0],
        hcm_layer_idxs=[1],
        hcl_layer_idxs=[2],
        attn_layer_idxs=[3],
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        StripedHyena2ForCausalLM(config).save_pretrained(folder / "model")
    CharTokenizer().save_pretrained(folder / "model")
    draw = random.Random(3)
    texts = ["".join(draw.choices(LETTERS, k=40 + index)) for index in range(12)]
    kinds = ["one" if index % 2 else "two" for index in range(12)]
    (folder / "seqs.fa").write_text("".join(f">s{n} note\n{text}\n" for n, text in enumerate(texts)))
    (folder / "queries.fa").write_text("".join(f">q{n}\n{text[3:]}\n" for n, text in enumerate(texts[:3])))
    (folder / "some.txt").write_text("s1\ns3\n")
    (folder / "labels.tsv").write_text(
        "id\tlabel\n" + "".join(f"s{n}\t{kind}\n" for n, kind in enumerate(kinds))
    )
    (folder / "values.tsv").write_text(
        "id\tkind\n" + "".join(f"s{n}\t{kind}\n" for n, kind in enumerate(kinds))
    )
    rows = "".join(f"{text}\t{kind}\n" for text, kind in zip(texts, kinds, strict=True))
    (folder / "train.tsv").write_text("sequence\tlabel\n" + rows)
    reference = "".join(draw.choices(LETTERS, k=300))
    (folder / "reference.fa").write_text(f">chr1\n{reference}\n")
    (folder / "place.bed").write_text("chr1\t120\t123\n")
    header = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    other = {"A": "C", "C": "G", "G": "T", "T": "A"}
    calls = "".join(
        f"chr1\t{at}\t.\t{reference[at - 1]}\t{other[reference[at - 1]]}\t.\t.\t.\n" for at in (50, 120, 200)
    )
    (folder / "calls.vcf").write_text(header + calls)
    with gzip.open(folder / "seqs.fa.gz", "wt") as file:
        file.write((folder / "seqs.fa").read_text())
    for words in (
        ["extract", "seqs.fa", *MODEL, "--layer", "1", "-o", "one.h5", *SPEED],
        ["extract", "seqs.fa", *MODEL, "--layer", "1", "--batch-tokens", "64", "-o", "two.h5", *SPEED],
        ["extract", "queries.fa", *MODEL, "--layer", "1", "-o", "more.h5", *SPEED],
        [
            "extract",
            "seqs.fa",
            *MODEL,
            "--layer",
            "1",
            "-o",
            "shared.h5",
            "--unit-bases",
            "100",
            "--shard",
            "1/2",
        ],
        [
            "extract",
            "seqs.fa",
            *MODEL,
            "--layer",
            "1",
            "-o",
            "shared.h5",
            "--unit-bases",
            "100",
            "--shard",
            "2/2",
        ],
        COLUMNS["finetune"].call("finetune", output="tuned"),
    ):
        ran = run(*words, cwd=folder)
        assert ran.code == 0, ran.err
