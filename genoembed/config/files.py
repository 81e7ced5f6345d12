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

if TYPE_CHECKING:
    from collections.abc import Iterable

LIMITS, CHECKED = "What counts as equal", "What is checked"


class MergeConfig(Config):
    """How units are joined."""

    overwrite: bool = option(False, group=OUTPUT, help="Replace FILE once the new one is complete.")


class CompareConfig(Config):
    """How far two embedding files agree."""

    layer: str | None = option(
        None, group=LIMITS, metavar="NAME", shown_default="all that both files have", help="Which matrix."
    )
    tolerance: float | None = option(
        None,
        ge=0,
        group=LIMITS,
        metavar="X",
        shown_default="1e-5; 1e-2 after half precision, 2e-2 after FP8, 1e-3 where a file stores float16",
        help="Largest difference, relative to the largest value of a vector.",
    )
    output: str | None = option(
        None,
        group=OUTPUT,
        short="-o",
        metavar="FILE",
        help="Write a table with one row per record and layer.",
        writes="table",
    )
    overwrite: bool = option(False, group=OUTPUT, help="Replace FILE.")


class VerifyConfig(FileModel):
    """How a sample of a file is embedded again."""

    sample: int = option(
        32, ge=1, unit="records", group=CHECKED, metavar="N", help="Records to embed again, chosen at random."
    )
    seed: int = option(0, ge=0, group=CHECKED, metavar="N", help="Random seed of the choice.")
    tolerance: float | None = option(
        None,
        ge=0,
        group=CHECKED,
        metavar="X",
        shown_default="as for compare",
        help="Largest difference, relative to the largest value of a vector.",
    )
    certificate: bool = option(
        False,
        group=CHECKED,
        flag="--certify",
        help="Embed each record alone as well: does a vector depend on its batch?",
    )
    regions: tuple[str, ...] = option(
        (),
        group=CHECKED,
        metavar="FILE",
        help="Where the files of regions are now. Repeatable.",
        reads="if there",
    )


class ExportConfig(Config):
    """Which matrix of a file, as what kind of file."""

    to: ExportFormat = option(group=OUTPUT, help="Kind of file; uniprot-h5 has one dataset per record.")
    output: str | None = option(
        None,
        group=OUTPUT,
        short="-o",
        metavar="FILE",
        shown_default="FILE.h5 with another ending",
        help="The file to write.",
        writes="export",
    )
    overwrite: bool = option(False, group=OUTPUT, help="Replace it once the new one is complete.")
    layer: str | None = option(
        None,
        group="Vectors",
        metavar="NAME",
        shown_default="all",
        help="Export this matrix alone; csv and uniprot-h5 hold only one.",
    )


class ModelExportConfig(Config):
    """How a model becomes a folder for sentence-transformers."""

    output: str = option(
        group=OUTPUT, short="-o", metavar="DIR", help="The folder to write.", writes="folder"
    )
    overwrite: bool = option(False, group=OUTPUT, help="Replace DIR once the new one is complete.")
    dtype: ComputeDtype = option("float32", group=MODEL, help="Type of the weights.")
    revision: str | None = same_option(ModelConfig, "revision")
    trust_remote_code: bool = same_option(ModelConfig, "trust_remote_code")


class ConvertConfig(Config):
    """How an original Evo 2 checkpoint becomes a model folder."""

    output: str = option(short="-o", metavar="DIR", help="The folder to write.", writes="folder")
    name: str | None = option(
        None,
        metavar="NAME",
        shown_default="by CKPT's name",
        help="Which of 'genoembed models' the checkpoint is.",
    )
    config: str | None = option(
        None,
        flag="--vortex-config",
        metavar="FILE",
        help="YAML description, as Vortex has them, of a checkpoint of another kind.",
        reads=True,
    )
    overwrite: bool = option(False, help="Replace DIR once the new one is complete.")


class DoctorConfig(Config):
    """What is tested against known answers."""

    model: str = option(
        DEFAULT_MODEL,
        metavar="NAME",
        help="Test this model: a name of 'genoembed models', its repository, or a folder (of a published "
        "model with --as).",
        reads="if there",
    )
    known_as: str | None = option(
        None,
        flag="--as",
        metavar="NAME",
        shown_default="what --model names",
        help="Which published model the weights are, as a short name or repository.",
    )
    tolerance: float | None = option(
        None,
        ge=0,
        metavar="X",
        shown_default="1e-4",
        help="Largest difference to a published vector, relative to its largest value.",
    )
    revision: str | None = same_option(ModelConfig, "revision", group="Options")
    device: str | None = same_option(
        ModelConfig, "device", group="Options", basic=False, shown_default="cpu", help="cpu, cuda, cuda:1 ..."
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
        help="As --model of extract takes it.",
        reads="if there",
    )
    show_all: bool = option(
        False,
        flag="--all",
        help="List every module that can be captured, not only those with short names.",
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
    format: TableFormat = option("auto", group=OUTPUT, help="Kind of table; auto decides by the name.")
    keep_case: bool | None = same_option(  # type: ignore[assignment]
        PolicyConfig, "keep_case", None, shown_default="as in training"
    )
    on_error: FailurePolicy = option(
        "stop",
        group=INPUT,
        basic=True,
        help="A record that fails (values that are not finite, no memory, nothing to pool): stop, or write "
        "NA in its row and exit with 3 at the end.",
    )
    batch_rows: int = option(16, ge=1, group=MODEL, metavar="N", help="Windows of one forward pass.")
    device: str | None = same_option(ModelConfig, "device", basic=False, help="cpu, cuda, cuda:1 ...")
    threads: int | None = same_option(ModelConfig, "threads")
    trust_remote_code: bool = same_option(
        ModelConfig, "trust_remote_code", help="Run the Python code that DIR contains. Read it first."
    )
