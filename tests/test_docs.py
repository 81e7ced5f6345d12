"""What README and docs tell people to type: commands exist as written, and blocks run.

Blocks marked ``bash`` and ``python`` run, page by page, top to bottom, in a folder with a few small files;
``python`` blocks that follow each other are one program, and ``title="needs PACKAGE"`` leaves one out where
the package is not installed. In all other blocks, each ``genoembed`` command line must be one that the
command takes, and each Python call (``py``) one that the function takes: they need models, data or hours that
a test has not.
"""

from __future__ import annotations

import ast
import gzip
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import click
import h5py
import pytest

import genoembed
import genoembed.training
from genoembed.cli import COMMANDS, main
from genoembed.models.registry import find_model
from tests.browser import opened_page
from tests.by_hand import shorten_fasta

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)
RUN = ("bash", "python")
BINARIES = Path(sys.executable).parent


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return language and text of a page's blocks."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(language, text) for language, _, text in found if not languages or language in languages]


def programs(page: Path) -> list[tuple[str, str]]:
    """Return what runs of a page: its ``bash`` blocks, and ``python`` blocks, neighbors joined."""
    found: list[tuple[str, str]] = []
    for language, rest, text in FENCE.findall(page.read_text(encoding="utf-8")):
        needed = re.search(r'title="needs (\w+)"', rest)
        if language not in RUN or (needed and find_spec(needed[1]) is None):
            continue
        if language == "python" and found and found[-1][0] == language:
            found[-1] = (language, found[-1][1] + text)
        else:
            found.append((language, text))
    return found


def command_lines(text: str) -> list[list[str]]:
    """Find the calls of ``genoembed`` in shell text: in lines that go on, in pipes, after ``&&``."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\(.*?\)", "X", line.partition(" #")[0].removeprefix("$ "))
        for piece in re.split(r"&&|\|\||[|;&]|(?<!\d)>", line):
            words = shlex.split(piece) if "genoembed " in piece else []
            if "genoembed" in words[:1]:
                found.append([word.removesuffix(",...") for word in words[1:] if word not in ("...", "…")])
    return found


COMMAND_LINES = [
    pytest.param(words, id=f"{page.name}-{' '.join(words)[:60]}")
    for page in PAGES
    for language, text in blocks(page)
    if language not in ("python", "py", "json", "toml")
    for words in command_lines(text)
]


def test_command_lines_were_found():
    named = {parameter.values[0][0] for parameter in COMMAND_LINES}
    assert named >= {"extract", "finetune", "pretrain", "info", "merge"}


def spoken_command_lines(page: Path) -> list[list[str]]:
    """Find the calls in the text of a page, between backticks; one that only names options is no call."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    quoted = [code.replace("\\|", "|") for code in re.findall(r"`([^`\n]+)`", text)]
    found = [words for code in quoted if code.startswith("genoembed ") for words in command_lines(code)]
    if page.name == "README.md":  # its table has options of extract alone
        found += [["extract", "a.fa", *shlex.split(code)] for code in quoted if re.match("--.* ", code)]
    return [words for words in found if any(not word.startswith("-") for word in words[1:])]


SPOKEN = [
    pytest.param(words, id=" ".join(words)[:70]) for page in PAGES for words in spoken_command_lines(page)
]


def test_table_of_the_readme_is_read():
    found = {words[0] for words in spoken_command_lines(ROOT / "README.md")}
    assert found >= {"extract", "predict", "finetune", "pretrain", "score", "generate", "serve", "merge"}


@pytest.mark.parametrize("words", [*COMMAND_LINES, *SPOKEN])
def test_command_line_is_one_that_the_command_takes(words):
    name, *arguments = words
    if name.startswith("-"):
        return
    assert name in COMMANDS
    command = main.get_command(click.Context(main), name)
    assert command.make_context(name, arguments, parent=click.Context(main, **main.context_settings)).params


CALLS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (_, text) in enumerate(blocks(page, "py"))
]


@pytest.mark.parametrize("text", CALLS)
def test_python_that_is_not_run_calls_functions_as_they_are(text):
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [call for call in calls if ast.unparse(call.func).startswith("genoembed.")]
    for call in named:
        function = getattr(genoembed, ast.unparse(call.func).removeprefix("genoembed."))
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        inspect.signature(function).bind(*call.args, **keywords)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A folder as people have it: sequences, a file of embeddings, labels, a VCF."""
    folder = tmp_path_factory.mktemp("stage")
    shutil.copytree(
        ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.fai")
    )
    # what the pages say works on the start of each sequence, and the whole genomes take long
    for name, bases in (("phages.fa", 3000), ("virus.fa", 2500), ("bacterial_genes.fa.gz", 60)):
        shorten_fasta(folder / "examples" / "data" / name, bases=bases)
    virus = (ROOT / "examples" / "data" / "virus.fa").read_text().splitlines()
    text = "\n".join(virus[:40]) + "\n"
    for name in ("genome.fa", "genome.fasta"):
        (folder / name).write_text(text)
    (folder / "genome.fa.gz").write_bytes(gzip.compress(text.encode()))
    genes = [
        f">gene{number} a gene\n{''.join(virus[1 + 4 * number : 4 + 4 * number])}" for number in range(24)
    ]
    (folder / "genes.fa").write_text("\n".join(genes) + "\n")
    genoembed.extract(folder / "genes.fa", layers=4, output=folder / "embeddings.h5")
    return folder


PAGES_TO_RUN = [page for page in PAGES if blocks(page, *RUN)]
PLAIN = re.compile(r"genoembed ([^|&;<>$`*?~(){}#\\]+)(?:> (\S+))?")
"""A line that needs no shell: a command, and perhaps the file that its output goes to."""


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=lambda page: page.name)
def test_blocks_of_a_page_run(page, stage, tmp_path, warm):
    folder = tmp_path / "home"
    shutil.copytree(stage, folder)
    for language, text in programs(page):
        if language == "python":
            done = warm.run(cwd=folder, code=text, timeout_s=300, env={"MPLBACKEND": "agg"})
            assert done.code == 0, f"{text}\n{done.out}\n{done.err}"
            continue
        for is_plain, lines in groupby(text.replace("\\\n", " ").splitlines(), key=PLAIN.fullmatch):
            run_plain(is_plain, folder, warm) if is_plain else run_shell("\n".join(lines), folder)


def run_plain(line: re.Match[str], folder: Path, warm) -> None:
    """Run a command of genoembed in a process that need not import everything again."""
    options = {"env": {"MPLBACKEND": "agg"}, **({"stdout": folder / line[2]} if line[2] else {})}
    done = warm.run(*shlex.split(line[1]), cwd=folder, timeout_s=300, **options)
    assert done.code == 0, f"{line[0]}\n{done.out}\n{done.err}"


def run_shell(text: str, folder: Path) -> None:
    """Run what needs a shell."""
    environment = {
        **os.environ,
        "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(ROOT),
    }
    words = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def test_r_reads_what_a_file_has(stage, tmp_path):
    """There is no R here: the places that it reads are looked up, in the file of that page."""
    text = "".join(text for _, text in blocks(ROOT / "docs" / "OTHER_TOOLS.md", "r"))
    places = re.findall(r'h5read\("two\.h5", "([^"]+)"\)', text)
    assert len(places) == 8
    genoembed.extract(stage / "genes.fa", layers=(4, "final"), output=tmp_path / "two.h5")
    with h5py.File(tmp_path / "two.h5") as file:
        assert [place for place in places if not isinstance(file.get(place), h5py.Dataset)] == []
        width = find_model("genoembed-mini").config["hidden_size"]
        assert file["X"].shape == file["obsm/norm"].shape == (24, width)
        assert "genoembed-layers" in file.attrs
        codes, categories = file["obs/strand/codes"][:], file["obs/strand/categories"].asstr()[:]
        assert set(categories[codes]) == {"+"}


def test_reference_has_every_public_name():
    named = set(re.findall(r"^::: genoembed\.(\w+)$", (ROOT / "docs" / "API.md").read_text(), flags=re.M))
    errors = {"GenoembedError", "GenoembedWarning"}  # in the tree of errors
    assert set(genoembed.__all__) - named - errors == {"__version__"}


def test_reference_has_every_public_part_of_training():
    page = (ROOT / "docs" / "API.md").read_text()
    named = re.findall(r"^::: genoembed\.training\.(\w+)$", page, flags=re.M)
    assert sorted(named) == sorted(genoembed.training.__all__)


def vector_of(model) -> str:
    """Say how the GENEB benchmark makes a vector, as the table in MODELS.md has it."""
    counts = ", special tokens count" if model.pools_special_tokens and model.pooling == "mean" else ""
    parts = [model.pooling + counts]
    if model.is_run and not model.adds_special_tokens:
        parts.append("none are added")
    if model.prefix:
        parts.append(f"`{model.prefix}` in front")
    if model.trim:
        parts.append(f"cut at the end to a multiple of {model.trim}")
    return "; ".join(parts)


def test_models_lists_the_published_models_as_the_table_has_them():
    page = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    expected = [
        (f"`{m.name}`", f"`{m.repo_id}`" if m.repo_id else "-", m.license, vector_of(m), m.tested)
        for m in genoembed.published_models()
    ]
    assert rows == [f"| {' | '.join(cells)} |" for cells in expected]


def test_published_model_of_the_readme_runs_as_it_is_written_there(stage, tmp_path, monkeypatch):
    """From a local folder in the published layout, of the name that the README gives."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith("| Use a published model"))
    name = re.findall(r"`--model (\S+)`", row)[0]
    shutil.copytree(ROOT / "tests" / "golden" / "families" / "nt_v2", tmp_path / name)
    shutil.copy(stage / "genome.fasta", tmp_path)
    monkeypatch.chdir(tmp_path)
    command = next(words for words in command_lines(readme) if words[:2] == ["extract", "genome.fasta"])
    source, *_ = command[1:]
    words = [sys.executable, "-m", "genoembed", "extract", source, "--model", name, "-o", "out.h5"]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with genoembed.open_embeddings("out.h5") as file:
        assert file.provenance["model"]["class"] == "NucleotideTransformerModel"
        assert len(file) == 1


def test_architecture_names_files_and_names_that_exist():
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    quoted = [text for text in re.findall(r"`([^`\n]+)`", page) if not re.search("NAME|OUTPUT", text)]
    paths = [text for text in quoted if re.fullmatch(r"[\w/.]+(\.py|/|\.md)", text)]
    assert len(paths) > 25
    assert [
        path for path in paths if not any((top / path).exists() for top in (ROOT, ROOT / "genoembed"))
    ] == []
    sources = [
        path.read_text() for folder in ("genoembed", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    names = [text for text in quoted if re.fullmatch(r"[A-Za-z_]+", text)]
    assert [name for name in names if not any(re.search(rf"\b{name}\b", text) for text in sources)] == []


def test_architecture_names_eight_files_that_extract_runs(tmp_path):
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page.partition("## The path of one command")[2].partition("\n\nWhat these files call")[0]
    files = re.findall(r"^\| `([\w/]+)\.py`", table, flags=re.M)
    assert len(files) == 8
    (tmp_path / "two.fa").write_text(">a\nACGTACGT\n>b\nGGGT\n")
    program = (
        "import sys\nfrom genoembed.cli import main\n"
        "main(['extract', 'two.fa', '--layer', '2'], standalone_mode=False)\n"
        "print(*(name for name in sys.modules if name.startswith('genoembed')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert {f"genoembed.{name.replace('/', '.')}" for name in files} <= set(done.stdout.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, built without a warning."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_loads_nothing_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        names = loaded.findall(page.read_text(encoding="utf-8"))
        assert any(name.endswith("site/iframe-worker.js") for name in names), page
        assert [name for name in names if re.match(r"(\w+:)?//", name)] == [], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_site_is_searched_from_files_and_its_signatures_wrap(site):
    with opened_page(site / "API.html", viewport={"width": 390, "height": 800}) as page:
        wide = "[...document.querySelectorAll('pre > code')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"{wide}.length") == 0
        page.keyboard.press("/")
        page.keyboard.type("reverse complement")
        page.wait_for_function("document.querySelectorAll('.md-search-result__item').length > 5")
        assert page.problems == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
