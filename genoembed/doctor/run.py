"""Known-answer tests of an installation, or of a published model's weights: can vectors be trusted here?

In: the name or folder of a model. Out: a check per test. What a name asks for is found out here, before torch
is imported; `genoembed.doctor.checks` tests it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.config.fields import named_options
from genoembed.config.files import DoctorConfig
from genoembed.doctor.results import KNOWN_ANSWER
from genoembed.errors import ConfigError, ModelError
from genoembed.models.geneb import known_answers, published_in, published_models, published_named
from genoembed.models.names import BUNDLED_NAME, EVO2_NAMES, model_folder, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable

    from genoembed.doctor.results import DoctorCheck
    from genoembed.models.geneb import PublishedModel


@named_options(DoctorConfig)
def run_doctor(
    *,
    model: str = BUNDLED_NAME,
    known_as: str | None = None,
    tolerance: float | None = None,
    revision: str | None = None,
    device: str | None = None,
    on_check: Callable[[DoctorCheck], None] | None = None,
) -> list[DoctorCheck]:
    """Test this installation, or the weights of a published model, against known answers.

    Args:
        model: The bundled model, or a folder that holds a known answer next to its weights: the installation
            is tested. A published model, by its short name or repository, or a folder with its weights: its
            vectors are compared with published ones, on the inputs, states and pooling that these have. An
            Evo 2 checkpoint, by its name or folder: the FP8 product is tested, and that its scales are there.
        known_as: Which published model the weights are, as a short name or repository; None takes ``model``.
        tolerance: Largest difference to a published vector, relative to its largest value; None is 1e-4.
        revision: Branch, tag or commit of a Hugging Face repository.
        device: Where a published model runs, in float32; None is the CPU.
        on_check: Called with each result as soon as it is there.

    Returns:
        One result a test; all are run, whatever fails. Those of a published model also say the verdict,
        differences, tolerance, and the revisions of the weights and of the published vector.

    Raises:
        ConfigError: If an option is wrong, or nothing says which published model the weights are.
        ModelError: If no vectors are published of the model, it is not run here, or it cannot be loaded.
    """
    options = {"known_as": known_as, "tolerance": tolerance, "revision": revision, "device": device}
    DoctorConfig.build({"model": model, **options})
    published = _published(model, known_as)
    for key, value in (("tolerance", tolerance), ("revision", revision)):
        if value is not None and published is None:
            message = f"{key} is {value!r}, but no vectors are published of {model!r}; leave {key} out"
            raise ConfigError(message)
    from genoembed.doctor.checks import check_published, evo2_tests, installation_tests, run_tests

    if published is not None:
        return check_published(
            published, model, device=device, revision=revision, tolerance=tolerance, on_check=on_check
        )
    is_evo2 = known_as is None and _is_evo2(model)
    tests = evo2_tests(model, device) if is_evo2 else installation_tests(model, device)
    return run_tests(tests, on_check)


def _published(model: str, known_as: str | None) -> PublishedModel | None:
    """Find which published model is meant; None for a model that brings its own known answer."""
    folder = Path(model).expanduser()
    name = known_as if known_as is not None or folder.exists() else model
    if model == BUNDLED_NAME or (known_as is None and (folder / KNOWN_ANSWER).is_file()):
        return None
    if known_as is None and _is_evo2(model):
        return None
    found = None if name is None else published_named(name) or published_in(name)
    with_answers = ", ".join(m.name for m in published_models() if m.is_run and known_answers(m.title))
    if found is None and name is None:
        message = (
            f"model {model!r}: nothing says which published model this folder holds; set known_as to one of "
            f"{with_answers}"
        )
        raise ConfigError(message)
    if found is None:
        key = "model" if known_as is None else "known_as"
        message = f"{key} is {name!r}, which 'genoembed models' does not list; {suggestion(str(name))}"
        raise ConfigError(message)
    if not found.is_run:
        message = (
            f"model {found.name!r}: {found.title} is not run here ({found.reason}); choose {with_answers}"
        )
        raise ModelError(message)
    if not known_answers(found.title):
        message = f"model {found.name!r}: no vectors of {found.title} are known; they are of {with_answers}"
        raise ModelError(message)
    return found


def _is_evo2(model: str) -> bool:
    """Check whether a name or folder is that of an Evo 2 checkpoint with FP8 scales."""
    if model in EVO2_NAMES:
        return True
    try:
        values = json.loads((model_folder(model) / "config.json").read_text(encoding="utf-8"))
        kind, need = values["model_type"], values["fp8_projections"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return kind == "striped_hyena2" and need in ("optional", "needed")
