"""Options of a pretraining run: one configuration for each stage, nested in :class:`TrainConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.choices import EmptyPolicy, GapPolicy, InvalidPolicy, Packing
from genoembed.config.embed import ModelConfig, PolicyConfig
from genoembed.config.fields import Config, option, same_option
from genoembed.config.training import DATA, OPTIMIZATION, RUN, OptimizerConfig, RunFolderConfig
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from os import PathLike

START, VECTORS, TEACHER = "Starting point", "Vectors", "Teacher"
JOIN = "+"
"""Between the names of layers whose states are concatenated to one vector."""
DOCUMENT_WINDOWS = 8
"""Documents are cut at this many windows unless ``max_document_bp`` says otherwise."""


class StartConfig(Config):
    """Which weights training starts from; exactly one of ``model``, ``like`` and ``shape``."""

    model: str | None = option(
        None,
        group=START,
        basic=True,
        metavar="NAME",
        help="Continue training this causal model: a name from 'genoembed models', a local folder, or "
        "a Hugging Face id.",
        reads="if there",
    )
    revision: str | None = same_option(ModelConfig, "revision", group=START)
    trust_remote_code: bool = same_option(ModelConfig, "trust_remote_code", group=START)
    like: str | None = option(
        None,
        group=START,
        basic=True,
        metavar="NAME",
        help="Train a new model with the architecture of this one from 'genoembed models'.",
    )
    hidden_size: int | None = option(
        None, ge=8, group=START, basic=True, metavar="N", help="With --like: width of the new model."
    )
    layers: int | None = option(
        None,
        ge=1,
        unit="blocks",
        group=START,
        basic=True,
        metavar="N",
        help="With --like: number of blocks of the new model.",
    )
    shape: dict[str, object] | None = option(
        None,
        in_files_only=True,
        help="Train a new model with these fields of StripedHyena2Config; in a file, or from Python.",
    )

    def _problems(self) -> Iterator[str]:
        given = [name for name in ("model", "like", "shape") if getattr(self, name) is not None]
        if len(given) != 1:
            yield (
                f"{' and '.join(given) or 'neither model, like nor shape'} given, expected exactly one: "
                "set model to continue from one, like or shape to start from scratch"
            )
        if self.like is None and (self.hidden_size or self.layers):
            yield Problem(
                "hidden_size and layers shrink like, which is not given",
                Remedy("like", words="a name from 'genoembed models'"),
            )


class DataConfig(Config):
    """Which sequences, and how they become rows."""

    corpus: tuple[str, ...] = option(
        argument=True,
        metavar="CORPUS",
        help="Sequence files to train on, in any format of extract.",
        reads=True,
    )
    heldout: tuple[str, ...] = option(
        (),
        group=DATA,
        basic=True,
        metavar="FILE",
        help="Sequence files to evaluate on. They are never trained on. Repeatable.",
        reads=True,
    )
    heldout_fraction: float | None = option(
        None,
        gt=0,
        lt=1,
        group=DATA,
        basic=True,
        metavar="FRACTION",
        help="Instead of --heldout: fraction of the records to evaluate on, chosen by their bases.",
    )
    heldout_rows: int = option(
        128,
        ge=1,
        unit="rows",
        group=DATA,
        metavar="N",
        help="Rows per evaluation, spread evenly over the held-out sequences.",
    )
    packing: Packing = option(
        "stream",
        group=DATA,
        help="How documents fill the rows. stream: cut documents where a row ends, without padding. "
        "bins: keep documents whole that fit into a row.",
    )
    window: int = option(
        1024, ge=2, unit="tokens", group=DATA, basic=True, metavar="TOKENS", help="Length of a row in tokens."
    )
    isolate: bool = option(
        False, group=DATA, help="Keep the documents of a row apart: none influences another."
    )
    both_strands: bool = option(
        True, group=DATA, help="Replace a document by its reverse complement with probability 1/2."
    )
    n_run_bp: int = option(
        10,
        ge=1,
        unit="bases",
        group=DATA,
        metavar="BASES",
        help="Leave out runs of at least this many N. Each run ends a document.",
    )
    max_document_bp: int | None = option(
        None,
        ge=1,
        unit="bases",
        group=DATA,
        metavar="BASES",
        shown_default="8 windows",
        help="Split longer records into documents of this many bases.",
    )
    shuffle_documents: int = option(
        32768,
        ge=1,
        unit="documents",
        group=DATA,
        metavar="N",
        help="Size of the shuffle buffer in documents.",
    )
    invalid: InvalidPolicy = same_option(PolicyConfig, "invalid", group=DATA, basic=False)
    gaps: GapPolicy = same_option(PolicyConfig, "gaps", group=DATA)
    empty: EmptyPolicy = same_option(PolicyConfig, "empty", group=DATA)

    def _problems(self) -> Iterator[str]:
        if not self.corpus:
            yield "corpus is empty; name at least one sequence file"
        if bool(self.heldout) == (self.heldout_fraction is not None):
            yield (
                "sequences to evaluate on: expected exactly one of heldout_fraction and files; set heldout "
                "to a file that is not in the corpus, or heldout_fraction to a fraction such as 0.02"
            )
        for name in self.heldout:
            if name in self.corpus:
                remedy = Remedy(
                    "heldout", words="other files, or heldout_fraction to a fraction such as 0.02"
                )
                yield Problem(f"heldout: {name} is in the corpus as well", remedy)


class RecipeConfig(OptimizerConfig):
    """How long and how fast to train."""

    max_steps: int = option(
        ge=1, group=OPTIMIZATION, basic=True, metavar="N", help="Number of optimizer steps."
    )
    rows_per_device: int = option(
        4, ge=1, group=OPTIMIZATION, basic=True, metavar="N", help="Rows per batch on each device."
    )
    learning_rate: float | None = option(
        None,
        gt=0,
        group=OPTIMIZATION,
        basic=True,
        metavar="RATE",
        shown_default="2e-3 x sqrt(128 / width), a tenth of it for --model",
        help="Peak learning rate.",
    )
    pole_rate_scale: float = option(
        0.1,
        gt=0,
        group=OPTIMIZATION,
        metavar="X",
        help="Learning rate of the poles of long filters, as a multiple of --learning-rate.",
    )
    warmup_steps: int | None = option(
        None,
        ge=0,
        group=OPTIMIZATION,
        metavar="N",
        shown_default="5 % of all, 200 at most",
        help="Warm-up steps, in which the learning rate rises from a tenth of its peak. Afterwards it "
        "falls to a tenth.",
    )
    weight_decay: float = option(
        0.1,
        ge=0,
        group=OPTIMIZATION,
        metavar="X",
        help="Weight decay of matrices. Vectors, filters and the embedding have none.",
    )
    compile_blocks: bool = option(
        False, group=OPTIMIZATION, help="Compile each block with torch.compile. This does not help on CPUs."
    )
    seed: int = option(
        0,
        ge=0,
        group=OPTIMIZATION,
        metavar="N",
        help="Random seed. It determines initial weights, order of documents, and strands.",
    )
    save_steps: int = option(
        200, ge=1, group=RUN, metavar="N", help="Optimizer steps between two checkpoints."
    )
    eval_steps: int = option(
        200,
        ge=1,
        group=RUN,
        metavar="N",
        help="Optimizer steps between two evaluations.",
    )


class VectorLossConfig(Config):
    """What is learned beside the next token, so that pooled states are good vectors."""

    contrast: float = option(
        0.0,
        ge=0,
        group=VECTORS,
        basic=True,
        metavar="WEIGHT",
        help="Weight of a contrastive loss on mean-pooled states, added to the next-token loss: pieces of "
        "documents are matched with mutated copies of them. 0: no such loss.",
    )
    kmer_codes: float = option(
        0.0,
        ge=0,
        group=VECTORS,
        basic=True,
        metavar="WEIGHT",
        help="Weight of a loss on token states, added to the next-token loss: the target of a state is "
        "the code of the k-mer that ends there. 0: no such loss. Needs one token per base.",
    )
    kmer_size: int = option(
        5, ge=2, le=6, unit="bases", group=VECTORS, metavar="BASES", help="Length of a k-mer."
    )
    contrast_layers: tuple[str, ...] = option(
        ("final",),
        group=VECTORS,
        flag="--contrast-layer",
        metavar="SPEC",
        help="Layer that both losses use, named as in extract. Repeat the option for several layers. "
        "28+24: both concatenated to one vector.",
    )
    contrast_rows: int = option(
        1,
        ge=1,
        unit="rows",
        group=VECTORS,
        metavar="N",
        help="Rows of mutated copies per forward pass, in addition to the rows of documents.",
    )

    @property
    def is_wanted(self) -> bool:
        """Whether anything is learned beside the next token."""
        return bool(self.contrast or self.kmer_codes)

    def _problems(self) -> Iterator[str]:
        if not self.contrast_layers:
            yield "contrast_layers is empty; name at least one layer, or leave it out for 'final'"


class TeacherConfig(Config):
    """Another model's predictions as targets beside the tokens (distillation; Hinton et al. 2015)."""

    teacher: str | None = option(
        None,
        group=TEACHER,
        basic=True,
        metavar="NAME",
        help="Also learn the next-token probabilities of this causal model, named as in --model. "
        "It must have the same tokens.",
        reads="if there",
    )
    teacher_weight: float | None = option(
        None,
        gt=0,
        le=1,
        group=TEACHER,
        metavar="WEIGHT",
        shown_default="0.75",
        help="Fraction of the next-token loss that is the divergence from the teacher. "
        "1: learn from the teacher alone.",
    )

    def _problems(self) -> Iterator[str]:
        if self.teacher is None and self.teacher_weight is not None:
            yield Problem(
                f"teacher_weight is {self.teacher_weight}, but there is no teacher",
                Remedy("teacher", words="a causal model"),
                ", or leave teacher_weight out",
            )


class TrainConfig(Config):
    """One pretraining run."""

    start: StartConfig
    data: DataConfig
    recipe: RecipeConfig
    vectors: VectorLossConfig
    teacher: TeacherConfig

    def _problems(self) -> Iterator[str]:
        if self.vectors.is_wanted and self.data.isolate:
            yield Problem(
                "isolate: contrast and kmer_codes look at rows as they are",
                Remedy("isolate", False),
                ", or leave both out",
            )


class PretrainOptions(TrainConfig):
    """A pretraining run and its folder: what the command line and a file may say."""

    folder: RunFolderConfig


KEY_STAGE = {key: name for name, section in TrainConfig.sections().items() for key in section.options()}
"""The stage that each flat key belongs to."""


def train_config(options: Mapping[str, object], *, file: str | PathLike[str] | None = None) -> TrainConfig:
    """Build a configuration from flat keys and a file that holds what they leave out.

    Example:
        >>> keys = {"corpus": ("a.fa",), "heldout_fraction": 0.1, "like": "evo2_7b", "max_steps": 5}
        >>> config = train_config(keys)
        >>> config.data.window, config.recipe.max_steps
        (1024, 5)
    """
    return TrainConfig.build(options, file=file)


class CorpusConfig(Config):
    """What becomes of the records of a corpus."""

    seed: int = option(
        0,
        ge=0,
        help="Random seed. With the epoch, it determines the order of files and documents, and strands.",
    )
    both_strands: bool = option(
        True, help="Replace a document by its reverse complement with probability 1/2."
    )
    n_run_bp: int | None = option(
        10,
        ge=1,
        unit="bases",
        help="Runs of at least this many N are left out and end a document. None keeps them.",
    )
    max_document_bp: int | None = option(
        None,
        ge=1,
        unit="bases",
        help="Cut longer documents into pieces of this many bases; each piece is a document of its own. "
        "None cuts nothing; the documents of one chromosome then stay together however large the buffer.",
    )
    shuffle_documents: int = option(
        32768,
        ge=1,
        unit="documents",
        help="Documents among which the next one is drawn; 1 keeps the order of the files.",
    )
    shuffle_bp: int = option(
        2**28,
        ge=1,
        unit="bases",
        help="Bases that wait in the shuffle at most (one document more, at times).",
    )
    shard: int = option(
        0,
        ge=0,
        help="Which share of the documents to yield, from 0: with several data workers, rank * workers "
        "+ worker.",
    )
    num_shards: int = option(
        1, ge=1, help="Shares in all: ranks times workers. Each reads all files and yields its documents."
    )
    heldout_fraction: float = option(
        0.0, ge=0, lt=1, help="Share of the records that is set aside to measure on; see is_heldout."
    )
    heldout: bool = option(False, help="Yield the records that are set aside, and not the others.")
    invalid: InvalidPolicy = option("error", help="Letters outside IUPAC DNA.")
    gaps: GapPolicy = option("error", help="Gap letters.")
    empty: EmptyPolicy = option("error", help="Records without bases.")

    def _problems(self) -> Iterator[str]:
        if self.shard >= self.num_shards:
            yield f"shard: {self.shard} of {self.num_shards}; set shard to 0 to num_shards - 1"
