"""The house rules that are tests: who imports whom, and what a module may look like.

Everything here reads source text only, so that a rule is checked even in code that no test runs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "genoembed"
MODULES = {
    ".".join(("genoembed", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOOR = ("contracts", "errors")
STAGES = ("sequences", "tokenization", "batching", "models", "pooling", "store")
BELOW_VERBS = (*STAGES, "pipeline", "atomic", "config", "registration", "_version", *FLOOR)
"""What every verb may use: the pipeline, the stages and the floor."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one unit (a module or folder right under the package) may import, besides itself and stdlib."""

    internal: tuple[str, ...] = ()
    third_party: tuple[str, ...] = ()
    type_checking: tuple[str, ...] = ()
    """Third-party packages for annotations only."""
    in_functions: tuple[str, ...] = ()
    """Third-party packages for use inside functions only: optional extras."""
    only_in: dict[str, str] = field(default_factory=dict)
    """Third-party packages that a single module of the unit may import, by package."""


RULES = {
    "__init__": Rule(internal=("_version", "registration")),
    "__main__": Rule(internal=("cli",)),
    "_version": Rule(),
    # the floor
    "errors": Rule(),
    "config": Rule(internal=("errors",), third_party=("pydantic", "yaml")),
    "atomic": Rule(internal=("config", "errors")),
    "contracts": Rule(internal=("errors",), third_party=("numpy",), type_checking=("torch",)),
    "registration": Rule(internal=("models", "tokenization"), third_party=("transformers",)),
    # the stages
    "sequences": Rule(
        internal=("config", *FLOOR),
        third_party=("numpy", "Bio", "zstandard"),
        in_functions=("pyarrow", "Bio"),
        only_in={"scipy": "sequences.homology"},
    ),
    "tokenization": Rule(
        internal=FLOOR, third_party=("numpy", "transformers", "tokenizers"), type_checking=("torch",)
    ),
    "batching": Rule(internal=FLOOR, third_party=("torch", "numpy")),
    "pooling": Rule(internal=("config", *FLOOR), third_party=("torch", "numpy")),
    "models": Rule(
        internal=("atomic", "config", *FLOOR),
        third_party=(
            "torch",
            "transformers",
            "safetensors",
            "numpy",
            "yaml",
            "huggingface_hub",
            "accelerate",
        ),
        in_functions=("peft",),
        only_in={
            "numba": "models.striped_hyena2.fp8_numba",
            "triton": "models.striped_hyena2.fp8_triton",
        },
    ),
    "store": Rule(
        internal=("atomic", "config", *FLOOR),
        third_party=("h5py", "numpy"),
        type_checking=("anndata", "pandas", "torch"),
        in_functions=("anndata", "pandas", "torch", "pyarrow"),
    ),
    "pipeline": Rule(
        internal=("atomic", *STAGES, "config", "registration", "_version", *FLOOR),
        third_party=("torch", "numpy", "safetensors"),
        type_checking=("transformers",),
        only_in={"ray": "pipeline.ray"},
    ),
    # the verbs
    "extraction": Rule(internal=BELOW_VERBS, third_party=("torch", "numpy")),
    "embedding": Rule(internal=BELOW_VERBS, third_party=("numpy",)),
    "planning": Rule(internal=("extraction", *BELOW_VERBS), third_party=("numpy", "torch")),
    "editing": Rule(internal=BELOW_VERBS, third_party=("numpy",)),
    "comparison": Rule(internal=BELOW_VERBS, third_party=("numpy",)),
    "verification": Rule(internal=("extraction", "embedding", *BELOW_VERBS), third_party=("numpy", "torch")),
    "transforms": Rule(internal=BELOW_VERBS, third_party=("numpy",)),
    "doctor": Rule(internal=BELOW_VERBS, third_party=("torch", "numpy", "safetensors")),
    "sklearn": Rule(internal=("embedding", *BELOW_VERBS), third_party=("numpy", "sklearn")),
    "scoring": Rule(internal=BELOW_VERBS, third_party=("torch", "numpy"), in_functions=("matplotlib",)),
    "generation": Rule(internal=BELOW_VERBS, third_party=("torch", "numpy")),
    "serving": Rule(
        internal=("embedding", *BELOW_VERBS),
        third_party=("numpy",),
        only_in={"starlette": "serving.app", "uvicorn": "serving.listening"},
    ),
    "searching": Rule(
        internal=("extraction", "embedding", "retrieval", *BELOW_VERBS),
        third_party=("numpy", "torch"),
        only_in={"usearch": "searching.index"},
    ),
    "probing": Rule(
        internal=("extraction", "embedding", "plotting", *BELOW_VERBS),
        third_party=("numpy", "torch"),
        in_functions=("sklearn", "scipy", "matplotlib"),
    ),
    "plotting": Rule(
        internal=BELOW_VERBS, third_party=("numpy",), in_functions=("sklearn", "matplotlib", "umap")
    ),
    "exporting": Rule(
        internal=BELOW_VERBS,
        third_party=("numpy", "h5py"),
        type_checking=("transformers",),
        in_functions=("anndata", "pyarrow"),
    ),
    # training and its three users; fine-tuning trains retrieval models too
    "training": Rule(
        internal=BELOW_VERBS,
        third_party=("torch", "transformers", "numpy", "safetensors", "accelerate"),
        in_functions=("peft", "bitsandbytes", "wandb"),
    ),
    "pretraining": Rule(
        internal=("training", *BELOW_VERBS), third_party=("torch", "transformers", "numpy", "safetensors")
    ),
    "retrieval": Rule(
        internal=("training", *BELOW_VERBS), third_party=("torch", "transformers", "numpy", "safetensors")
    ),
    "finetuning": Rule(
        internal=("training", "retrieval", *BELOW_VERBS),
        third_party=("torch", "transformers", "numpy", "safetensors"),
        in_functions=("pyarrow", "scipy", "sklearn"),
    ),
    "cli": Rule(internal=("__init__", "_version", "config", "errors"), third_party=("click", "rich")),
}
LAZY = {
    ("models.locate", "models.geneb"): "for names that are neither bundled nor Evo 2",
    ("models.names", "models.geneb"): "for names that are neither bundled nor Evo 2",
    ("doctor.run", "doctor.checks"): "torch, after the checks that need no model",
    ("extraction", "pipeline.ray"): "an optional extra, for clusters",
    ("extraction", "pipeline.agreement"): "compares vectors, for --certificate",
    ("finetuning.run", "finetuning.training"): "torch, after the checks that need no model",
    ("pretraining.run", "pretraining.training"): "torch, after the checks that need no model",
    ("serving.run", "serving.app"): "torch, after the checks that need no model",
    ("serving.run", "serving.listening"): "an optional extra, for servers of our own",
    ("probing.run", "probing.scoring"): "torch, after the checks that need no model",
    ("probing.run", "probing.vectors"): "torch, after the checks that need no model",
    ("models.striped_hyena2.blocks", "models.striped_hyena2.fp8"): "for checkpoints trained in FP8",
    ("models.striped_hyena2.fp8", "models.striped_hyena2.fp8_numba"): "an optional extra, for CPUs",
    ("models.striped_hyena2.fp8", "models.striped_hyena2.fp8_triton"): "for GPUs",
    ("models.locate", "models.hub"): "the hub's client, for what is in no local folder",
    ("models.locate", "models.striped_hyena2.convert"): "converts a downloaded checkpoint, once",
    ("models.architecture", "models.remote_code"): "for code of model folders, if it is trusted",
    ("models.load", "models.pretrained"): "transformers, for all that is not a plain StripedHyena 2 folder",
    ("models.language_model", "models.pretrained"): "transformers, for heads that are not tied",
    ("models.masked_model", "models.pretrained"): "transformers, for heads of masked models",
    ("models.describe", "models.architecture"): "transformers, for models of other families",
    (
        "models.genomic_model",
        "models.striped_hyena2.modeling",
    ): "transformers, where its classes are asked for",
    ("models.pretrained", "models.adapters"): "for adapters of peft",
    ("sequences.reading", "sequences.regions"): "for --regions",
    ("sequences.formats", "sequences.tables"): "for tables in the place of sequence files",
    ("config.fields", "config.foreign"): "for options that are none",
}
"""Imports of our own modules inside functions: which, and why most runs need not pay for them."""
LAZY_NAMES = ("", "training")
"""Modules whose public names stand in modules above them, and load on first use."""
BANNED_NAMES = ("utils", "helpers", "common")
MAX_LINES = 600


@dataclass(frozen=True)
class Import:
    """One imported module, and where the import stands."""

    target: str
    line: int
    place: str
    """``module``, ``function`` or ``type checking``."""


class _Imports(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Import] = []
        self.relative: list[int] = []
        self._place = "module"

    def _inside(self, place: str, nodes: list[ast.stmt]) -> None:
        before, self._place = self._place, place
        for node in nodes:
            self.visit(node)
        self._place = before

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._inside("function", node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        checking = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self._inside("type checking" if checking else self._place, node.body)
        self._inside(self._place, node.orelse)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, node.lineno, self._place) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self.relative.append(node.lineno)
        elif node.module == "genoembed":
            self.found += [Import(self._member(a.name), node.lineno, self._place) for a in node.names]
        else:
            self.found.append(Import(node.module or "", node.lineno, self._place))

    @staticmethod
    def _member(name: str) -> str:
        # ``from genoembed import errors`` is an import of a unit, ``from genoembed import extract`` of a name
        return f"genoembed.{name}" if name in RULES else "genoembed"


def violations(module: str, source: str) -> list[str]:
    """Check one module's imports against the table."""
    parts = module.split(".")
    unit = parts[1] if len(parts) > 1 else "__init__"
    if unit not in RULES:
        return [f"{module}: unit {unit!r} is not in the table; add it or move the module"]
    visitor = _Imports()
    visitor.visit(ast.parse(source))
    problems = [f"{module}:{line}: relative import" for line in visitor.relative]
    for imported in visitor.found:
        if imported.place == "function" and _lazy(module, imported) in LAZY:
            continue
        complaint = _complaint(".".join(parts[1:]), unit, RULES[unit], imported)
        if complaint:
            problems.append(f"{module}:{imported.line}: {complaint}")
    return problems


def _lazy(module: str, imported: Import) -> tuple[str, str]:
    return module.removeprefix("genoembed."), imported.target.removeprefix("genoembed.")


def test_lazy_imports_are_those_of_the_list():
    found = set()
    for module, path in MODULES.items():
        visitor = _Imports()
        visitor.visit(ast.parse(path.read_text()))
        found |= {_lazy(module, one) for one in visitor.found if one.place == "function"}
    assert set(LAZY) <= found, "no longer imported in a function: take it off the list"


def _complaint(module: str, unit: str, rule: Rule, imported: Import) -> str | None:
    top, _, rest = imported.target.partition(".")
    if top in sys.stdlib_module_names:
        return None
    if top == "genoembed":
        if module in LAZY_NAMES and imported.place == "type checking":
            return None
        return _internal_complaint(unit, rule, rest.partition(".")[0] or "__init__", imported.place)
    if top in rule.only_in:
        return None if module == rule.only_in[top] else f"{top} is for {rule.only_in[top]} only"
    allowed = {
        "module": rule.third_party,
        "type checking": rule.third_party + rule.type_checking + rule.in_functions,
        "function": rule.in_functions,
    }[imported.place]
    if top in allowed or (imported.place == "function" and unit == "cli" and top in rule.third_party):
        return None
    return f"{unit} may not import {top} in a {imported.place} position"


def _internal_complaint(unit: str, rule: Rule, target: str, place: str) -> str | None:
    if target != unit and target not in rule.internal:
        return f"{unit} may not import genoembed.{target}"
    if place == "function" and unit not in ("cli", "__main__"):
        return "imports of our own modules stand at the top"
    return None


def test_modules_were_seen():
    assert len(MODULES) >= 20
    assert {"genoembed", "genoembed.errors", "genoembed.contracts", "genoembed.cli"} <= set(MODULES)
    assert {module.split(".")[1] for module in MODULES if "." in module} >= {*STAGES, "cli", *FLOOR}


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_the_table(module):
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("genoembed.pooling.reduce", "from genoembed.store import writer", "may not import genoembed.store"),
        ("genoembed.pooling.reduce", "from genoembed import store", "may not import genoembed.store"),
        ("genoembed.pooling.reduce", "import genoembed.models.load", "may not import genoembed.models"),
        ("genoembed.pooling.reduce", "from . import fuse", "relative import"),
        ("genoembed.sequences.formats", "import torch", "may not import torch"),
        ("genoembed.sequences.formats", "if TYPE_CHECKING:\n    import torch", "may not import torch"),
        ("genoembed.sequences.formats", "import scipy", "for sequences.homology only"),
        ("genoembed.contracts", "import torch", "may not import torch"),
        ("genoembed.store.reader", "import pandas", "may not import pandas in a module position"),
        ("genoembed.store.reader", "def f():\n    import h5py", "may not import h5py in a function position"),
        ("genoembed.store.reader", "def f():\n    import genoembed.errors", "stand at the top"),
        ("genoembed.cli.extract", "class A:\n    def f(self):\n        import torch", "may not import torch"),
        ("genoembed.pipeline.embedder", "import ray", "for pipeline.ray only"),
        ("genoembed.models.load", "import requests", "may not import requests"),
        ("genoembed.helper_things", "import os", "not in the table"),
    ],
)
def test_violation_is_caught(module, source, complaint):
    problems = violations(module, source)
    assert len(problems) == 1
    assert complaint in problems[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("genoembed.contracts", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("genoembed.store.reader", "import h5py\ndef to_pandas():\n    import pandas"),
        ("genoembed.sequences.homology", "import scipy"),
        ("genoembed.pooling.reduce", "from genoembed.errors import ShapeError\nimport torch\nimport math"),
        ("genoembed.cli.extract", "def f():\n    from genoembed import extract"),
    ],
)
def test_lawful_import_is_let_through(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_docstring_a_telling_name_and_less_than_600_lines(module):
    source = MODULES[module].read_text()
    assert ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
    assert module.rpartition(".")[2] not in BANNED_NAMES
    assert source.count("\n") < MAX_LINES


def _imported_modules(source: str) -> set[str]:
    """Our modules that a module imports anywhere, for annotations included."""
    visitor = _Imports()
    tree = ast.parse(source)
    visitor.visit(tree)
    found = {imported.target for imported in visitor.found}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES)


IMPORTED = {module: _imported_modules(path.read_text()) - {module} for module, path in MODULES.items()}


def circles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Find the groups of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in imported[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    reached = {module: reachable(module) for module in imported}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in imported
        if module in reached[module]
    }
    return sorted(map(list, groups))


def test_no_modules_import_each_other_not_even_for_annotations():
    assert circles(IMPORTED) == []


def test_circle_is_found():
    imported = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(imported) == [["a", "b", "c"]]


def _public_names(source: str) -> set[str]:
    """Names that a module defines at its top level, without those that start with an underscore."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


EVERYWHERE = {"logger", "AUTO_CLASSES"}
"""Names that are no words of ours, and what every port of a family has."""


def test_no_public_name_stands_in_two_modules():
    homes: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for name in _public_names(path.read_text()):
            homes.setdefault(name, []).append(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert len(homes) > 300
    assert {name: twice[name] for name in twice if name not in EVERYWHERE} == {}
    assert set(twice) >= EVERYWHERE, "stands once: take it off the list"


SMALL = 120
REASONS = {
    "genoembed.models.hub": "imports the hub's client, which local folders do not wait for",
    "genoembed.doctor.run": "the public call and its checks, which need no torch",
    "genoembed.pretraining.run": "the public call and its checks, which need no torch",
    "genoembed.training.optimizers": "what an optimizer is made of, which needs no trainer to be tested",
    "genoembed.serving.listening": "uvicorn, which other ASGI servers do without",
    "genoembed.sequences.composition": "features without a model, which the benchmarks take by themselves",
}
"""Modules under 120 lines with one importer, and why each is a module of its own."""


def test_small_module_with_one_importer_has_a_reason():
    importers = {module: [other for other in IMPORTED if module in IMPORTED[other]] for module in MODULES}
    small = {
        module
        for module, path in MODULES.items()
        # commands and families are imported by name
        if not module.startswith(("genoembed.cli.", "genoembed.models.families."))
        and path.name not in ("__init__.py", "__main__.py")
        and path.read_text().count("\n") < SMALL
        and len(importers[module]) <= 1
    }
    assert len(importers["genoembed.errors"]) > 50
    assert small - set(REASONS) == set(), "join it with its importer, or give a reason"
    assert set(REASONS) <= small, "no longer small with one importer: take it off the list"


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("genoembed.cli")])
def test_library_does_not_print(module):
    calls = [
        f"{module}:{node.lineno}"
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


LOADED = "; import sys; print(sorted({'torch', 'transformers', 'h5py'} & set(sys.modules)))"


def _run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return ran.stdout


def test_import_of_the_package_and_of_its_parts_is_light():
    assert _run("import genoembed, genoembed.training" + LOADED).splitlines()[-1] == "[]"


MOST_LOADED = 60
"""Modules with code of ours that run to embed two records, from the command to the file; only shrinks."""


def test_extraction_loads_few_modules(tmp_path):
    fasta, output = tmp_path / "two.fa", tmp_path / "two.h5"
    fasta.write_text(">a\nACGTACGTACGT\n>b\nGGGTTTACGACG\n")
    words = ["extract", str(fasta), "--layer", "28", "--output", str(output)]
    code = f"""
import sys
from genoembed.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code, end.code
assert not {{"transformers", "accelerate", "torch._dynamo", "scipy"}} & set(sys.modules)
print(*(name for name in sys.modules if name in {set(MODULES)!r}))
"""
    names = _run(code).splitlines()[-1].split()
    loaded = {name for name in names if len(ast.parse(MODULES[name].read_text()).body) > 1}
    assert output.is_file()
    assert {"genoembed.cli.extract", "genoembed.store.writer"} <= loaded
    assert len(loaded) <= MOST_LOADED, sorted(loaded)


def test_loaded_modules_would_be_seen():
    assert _run("import h5py" + LOADED).splitlines()[-1] == "['h5py']"


@pytest.mark.parametrize("words", [["--help"], ["extract", "--help"], ["--version"], ["models"]])
def test_help_is_light(words):
    code = f"""
import sys
from genoembed.cli import main
sys.argv = ["genoembed", *{words!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    lines = _run(code + LOADED.removeprefix("; ")).splitlines()
    assert lines[-1] == "[]"
    assert any("genoembed" in line for line in lines[:-1])


def test_entry_points_answer():
    (script,) = entry_points(group="console_scripts", name="genoembed")
    assert script.value == "genoembed.__main__:run"
    ran = subprocess.run(
        [sys.executable, "-m", "genoembed", "--help"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("Usage: ")
