"""Options of the commands that compare, check, export and convert files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.choices import (
    ComputeDtype,
    ExportFormat,
    FailurePolicy,
    TableFormat,
)
from genoembed.config.embed import (
    DEFAULT_MODEL,
    INPUT,
    MODEL,
    OUTPUT,
    FileModel,
    ModelConfig,
    PolicyConfig,
    TableOutput,
)
from genoembed.config.fields import Config, option, same_option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterable

LIMITS, CHECKED, ROWS = "Tolerance", "Checks", "Rows"


class MergeConfig(Config):
    """How units are joined."""

    overwrite: bool = option(
        False, group=OUTPUT, help="Replace an existing FILE once the new one is complete."
    )


class CompareConfig(Config):
    """How far two embedding files agree."""

    layer: str | None = option(
        None,
        group=LIMITS,
        metavar="NAME",
        shown_default="all that both files have",
        help="Layer of the file to use.",
    )
    tolerance: float | None = option(
        None,
        ge=0,
        group=LIMITS,
        metavar="X",
        shown_default="1e-5; 1e-2 after half precision, 2e-2 after FP8, 1e-3 where a file stores float16",
        help="Largest allowed difference, relative to the largest value of the vector.",
    )
    output: str | None = option(
        None,
        group=OUTPUT,
        short="-o",
        metavar="FILE",
        help="Table to write, with one row per record and layer.",
        writes="table",
    )
    overwrite: bool = option(
        False, group=OUTPUT, help="Replace an existing FILE once the new one is complete."
    )


class SubsetConfig(Config):
    """Which rows of an embedding file are taken."""

    ids: str | None = option(
        None,
        group=ROWS,
        metavar="FILE",
        reads=True,
        help="File with one id per line; - is standard input. The id of a record stands for all its windows.",
    )
    where: tuple[str, ...] = option(
        (),
        group=ROWS,
        metavar="COLUMN=VALUE",
        help="Take rows whose column has this value: a column that info lists, or id. Also !=, and <, <=, >, "
        ">= for numbers. Repeatable; all must hold.",
    )
    output: str = option(group=OUTPUT, short="-o", metavar="FILE", help="File to write.", writes="hdf5")
    overwrite: bool = same_option(MergeConfig, "overwrite")

    def _problems(self) -> Iterable[str]:
        if self.ids is None and not self.where:
            yield Problem("no rows are requested", Remedy("ids", words="a list, or set where"))


class JoinConfig(Config):
    """How files become one."""

    output: str = same_option(SubsetConfig, "output")
    overwrite: bool = same_option(MergeConfig, "overwrite")


class AnnotateConfig(Config):
    """How columns of a table become columns of a file."""

    output: str | None = option(
        None,
        group=OUTPUT,
        short="-o",
        metavar="FILE",
        shown_default="FILE.h5 itself, once the new one is complete",
        help="File to write.",
        writes="hdf5",
    )
    overwrite: bool = option(
        False,
        group=OUTPUT,
        help="Replace columns of the same names that were added earlier, and an existing FILE.",
    )


class VerifyConfig(FileModel):
    """How a sample of a file is embedded again."""

    sample: int = option(
        32,
        ge=1,
        unit="records",
        group=CHECKED,
        metavar="N",
        help="Number of records to embed again, chosen at random.",
    )
    seed: int = option(
        0, ge=0, group=CHECKED, metavar="N", help="Random seed. It determines which records are chosen."
    )
    tolerance: float | None = option(
        None,
        ge=0,
        group=CHECKED,
        metavar="X",
        shown_default="as for compare",
        help="Largest allowed difference, relative to the largest value of the vector.",
    )
    certificate: bool = option(
        False,
        group=CHECKED,
        flag="--certify",
        help="Embed each record alone as well, to check that its vector does not depend on its batch.",
    )
    regions: tuple[str, ...] = option(
        (),
        group=CHECKED,
        metavar="FILE",
        help="Files of regions, if they are no longer where FILE.h5 says. Repeatable.",
        reads="if there",
    )


class ExportConfig(Config):
    """Which matrix of a file, as what kind of file."""

    to: ExportFormat = option(
        group=OUTPUT, help="Format of the output. uniprot-h5 has one dataset per record."
    )
    output: str | None = option(
        None,
        group=OUTPUT,
        short="-o",
        metavar="FILE",
        shown_default="FILE.h5 with the ending of the format",
        help="File to write.",
        writes="export",
    )
    overwrite: bool = option(
        False, group=OUTPUT, help="Replace an existing FILE once the new one is complete."
    )
    layer: str | None = option(
        None,
        group="Vectors",
        metavar="NAME",
        shown_default="all",
        help="Layer of the file to use. csv and uniprot-h5 hold only one.",
    )


class ModelExportConfig(Config):
    """How a model becomes a folder for sentence-transformers."""

    output: str = option(group=OUTPUT, short="-o", metavar="DIR", help="Folder to write.", writes="folder")
    overwrite: bool = option(
        False, group=OUTPUT, help="Replace an existing DIR once the new one is complete."
    )
    dtype: ComputeDtype = option("float32", group=MODEL, help="Type of the weights.")
    revision: str | None = same_option(ModelConfig, "revision")
    trust_remote_code: bool = same_option(ModelConfig, "trust_remote_code")


class ConvertConfig(Config):
    """How an original Evo 2 checkpoint becomes a model folder."""

    output: str = option(short="-o", metavar="DIR", help="Folder to write.", writes="folder")
    name: str | None = option(
        None,
        metavar="NAME",
        shown_default="from the name of CKPT",
        help="Name of the checkpoint in 'genoembed models'.",
    )
    config: str | None = option(
        None,
        flag="--vortex-config",
        metavar="FILE",
        help="Description of a model that 'genoembed models' does not list, as a YAML file in the "
        "format of Vortex.",
        reads=True,
    )
    overwrite: bool = option(False, help="Replace an existing DIR once the new one is complete.")


class DoctorConfig(Config):
    """What is tested against known answers."""

    model: str = option(
        DEFAULT_MODEL,
        metavar="NAME",
        help="Model to test: a name from 'genoembed models', its repository, or a folder (of a "
        "published model with --as).",
        reads="if there",
    )
    known_as: str | None = option(
        None,
        flag="--as",
        metavar="NAME",
        shown_default="as named by --model",
        help="Published model that the weights belong to: a short name or repository.",
    )
    tolerance: float | None = option(
        None,
        ge=0,
        metavar="X",
        shown_default="1e-4",
        help="Largest allowed difference, relative to the largest value of the vector.",
    )
    revision: str | None = same_option(ModelConfig, "revision", group="Options")
    device: str | None = same_option(
        ModelConfig,
        "device",
        group="Options",
        basic=False,
        shown_default="cpu",
        help="Device: cpu, cuda, cuda:1, ...",
    )

    def _problems(self) -> Iterable[str]:
        if self.model == DEFAULT_MODEL and self.known_as is not None:
            yield f"known_as is {self.known_as!r}, but no model is named; set model to the weights to test"
        if self.model == DEFAULT_MODEL and self.tolerance is not None:
            yield f"tolerance is {self.tolerance:g}, but it is for published vectors; set model to one"


class LayersConfig(Config):
    """Which model's layers are listed."""

    model: str = option(
        DEFAULT_MODEL,
        argument=True,
        metavar="MODEL",
        help="Model: a name from 'genoembed models', a local folder, an Evo 2 checkpoint file, or a "
        "Hugging Face id.",
        reads="if there",
    )
    show_all: bool = option(
        False,
        flag="--all",
        help="List every module that can be read, not only those with short names.",
    )
    revision: str | None = same_option(ModelConfig, "revision")
    trust_remote_code: bool = same_option(ModelConfig, "trust_remote_code")


class PredictConfig(TableOutput, PolicyConfig):
    """How a fine-tuned model predicts."""

    inputs: tuple[str, ...] = option(
        argument=True,
        metavar="INPUT",
        help="Sequence files in any format of extract; - is standard input.",
        reads=True,
    )
    format: TableFormat = option("auto", group=OUTPUT, help="Format of the table. auto: by the file name.")
    keep_case: bool | None = same_option(  # type: ignore[assignment]
        PolicyConfig, "keep_case", None, shown_default="as in training"
    )
    on_error: FailurePolicy = option(
        "stop",
        group=INPUT,
        basic=True,
        help="If a record fails (out of memory, values that are not finite, no base to pool): stop, or "
        "skip it. A skipped record gets NA in its row, and the exit code is 3.",
    )
    batch_rows: int = option(
        16,
        ge=1,
        group=MODEL,
        metavar="N",
        help="Sequences or windows per forward pass. Fewer need less memory.",
    )
    device: str | None = same_option(
        ModelConfig, "device", basic=False, help="Device: cpu, cuda, cuda:1, ..."
    )
    threads: int | None = same_option(ModelConfig, "threads")
    trust_remote_code: bool = same_option(ModelConfig, "trust_remote_code")
