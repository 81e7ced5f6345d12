"""Fuzz every reader: bytes in, and only records or a ``GenoembedError`` may come out.

Each target of ``fuzz_targets.py`` runs in a process of its own, coverage-guided by atheris where it is
installed (``pip install 'genoembed[fuzz]'``), else by plain mutation of the seeds in ``tests/fuzz/corpus``.
Findings are inputs that raise something else, crash the process or take more than five seconds; each is kept
once.

Example::

    python benchmarks/fuzz.py --executions 1000000 --output benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --target fasta --target gff3 --executions 20000
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
ARCHIVES = ROOT / "tests" / "data" / "archives" / "v1"
HANG_S = 5
"""CPU seconds of one input."""
WALL_S = 40
"""After which an input that computes nothing is given up, on a machine that may be busy."""
MAX_BYTES = 4096
MEMORY_BYTES = 8 << 30
INSTRUMENTED = (
    "genoembed.sequences.",
    "genoembed.training.",
    "genoembed.models.trained_folder",
    "genoembed.models.striped_hyena2.convert",
    "Bio.GenBank",
    "Bio.SeqIO.Insdc",
    "tomllib",
    "yaml",
    "json.",
)
"""Modules, by their beginnings, that coverage is taken of."""
# These may take the process with them: every input has a process of its own.
FORKED = ("embeddings", "transform_file")


# --------------------------------------------------------------------------- in the target's process


class Recorder:
    """Runs a target, counts what came out, and keeps one input of each kind of finding.

    Args:
        name: Of the target.
        folder: Where findings and counts go.
    """

    def __init__(self, name: str, folder: Path) -> None:
        import fuzz_targets

        self._target = fuzz_targets.TARGETS[name]
        self._outcome_of = fuzz_targets.outcome_of
        self._folder = folder
        self._files = Path(tempfile.mkdtemp(dir=_memory_folder()))
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")

    def run(self, content: bytes) -> None:
        """Try one input.

        Args:
            content: What the reader gets.
        """
        started = time.process_time()  # a busy machine makes no hang
        try:
            self.outcomes[self._outcome(content)] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            self.outcomes["finding"] += 1
            self._keep(content, error)
        seconds = time.process_time() - started
        if seconds > HANG_S:
            self._keep(content, TimeoutError(f"{seconds:.1f} s"))
        self.slowest_s = max(self.slowest_s, seconds)

    def _outcome(self, content: bytes) -> str:
        if self._target.name in FORKED:
            return _forked(lambda: self._outcome_of(self._target, content, self._files))
        return self._outcome_of(self._target, content, self._files)

    def _keep(self, content: bytes, error: Exception) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        kind = f"{type(error).__name__} {[f'{Path(f.filename).name}:{f.lineno}' for f in frame]}"
        stem = f"finding-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
        if not (self._folder / f"{stem}.txt").exists():
            (self._folder / f"{stem}.bin").write_bytes(content)
            text = "".join(traceback.format_exception(error))
            (self._folder / f"{stem}.txt").write_text(f"{kind}\n{text}")

    def save(self) -> None:
        """Write the counts down."""
        counts = {"outcomes": dict(self.outcomes), "slowest_s": round(self.slowest_s, 2)}
        (self._folder / "counts.json").write_text(json.dumps(counts))


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _forked(action) -> str:
    """Run an action in a child of this process, which has one thread and dies with nothing lost."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (HANG_S, HANG_S))
            try:
                answer = action()
            except Exception:  # noqa: BLE001 - told to the parent
                answer = "!" + traceback.format_exc()
            os.write(write, answer[:4000].encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if not answer or status:
        message = f"the process ended with status {status}: {answer}"
        raise ChildProcessError(message)
    if answer.startswith("!"):
        lines = answer.strip().splitlines()
        raise RuntimeError("\n".join(lines[-8:]))
    return answer


def seeds_of(name: str) -> list[bytes]:
    """Read the seeds of a target.

    Args:
        name: Of the target.

    Returns:
        Their contents.
    """
    import fuzz_targets

    if name in MADE:
        return MADE[name]()
    folder = CORPUS / fuzz_targets.TARGETS[name].corpus
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def _embedding_files() -> list[bytes]:
    """Read files as they were written once, and make small ones as they are written today."""
    from tests.store.blocks import pooled_block, token_block, write_file

    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write_file(Path(folder, "a.h5"), pooled_block(["a", "b"], ("l", "m"))),
            write_file(Path(folder, "b.h5"), token_block([2, 1])),
        ]
        return [path.read_bytes() for path in (*sorted(ARCHIVES.iterdir()), *paths)]


def _transform_files() -> list[bytes]:
    from genoembed import fit_transform
    from tests.store.blocks import pooled_block, write_file

    with tempfile.TemporaryDirectory() as folder:
        background = write_file(Path(folder, "a.h5"), pooled_block([f"r{row}" for row in range(20)]))
        outputs = [Path(folder, f"{method}.h5") for method in ("center", "whiten", "remove-top")]
        for output in outputs:
            fit_transform(background, output=output, method=output.stem)
        return [output.read_bytes() for output in outputs]


def _index_files() -> list[bytes]:
    import fuzz_targets

    from genoembed.searching.index import open_index

    with tempfile.TemporaryDirectory() as folder:
        source, origin = fuzz_targets.index_source(Path(folder))
        _, path, _ = open_index(source, origin)
        facts = path.with_name(f"{path.name}.json").read_bytes()
        return [facts + b"@@INDEX@@" + path.read_bytes(), facts, b"@@INDEX@@" + path.read_bytes()]


def _storage_recipes() -> list[bytes]:
    return [b"", *(bytes((place, change)) for place in range(16) for change in range(22))]


MADE = {
    "embeddings": _embedding_files,
    "transform_file": _transform_files,
    "search_index": _index_files,
    "storage": _storage_recipes,
}
"""Seeds of targets that hold what depends on the machine or on the time, such as digests."""


def mutated(seed: bytes, others: list[bytes], tokens: tuple[bytes, ...], rng: random.Random) -> bytes:
    """Change a seed in one to eight places.

    Args:
        seed: Where to start.
        others: What to splice in.
        tokens: Pieces of the format.
        rng: Source of chance.

    Returns:
        The changed bytes.
    """
    content = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(content) + 1)
        length = min(len(content) - place, rng.choice((1, 1, 2, 4, 8, 64)))
        kind = rng.randrange(8)
        if kind == 0:
            content[place : place + length] = rng.randbytes(length)
        elif kind == 1 and length:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length] * rng.choice((1, 2, 30))
        elif kind == 4 and tokens:
            content[place:place] = rng.choice(tokens)
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            content[place : place + length] = other[start : start + rng.randrange(64)]
        elif kind == 6:
            content[place : place + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
        elif rng.random() < 0.2:
            del content[place:]
    return bytes(content)


def run_mutations(name: str, folder: Path, executions: int, seed: int) -> None:
    """Fuzz without coverage.

    Args:
        name: Of the target.
        folder: For findings and counts.
        executions: How often.
        seed: Of the chance.
    """
    import fuzz_targets

    recorder = Recorder(name, folder)
    seeds, rng = seeds_of(name), random.Random(seed)
    tokens = fuzz_targets.TARGETS[name].tokens
    for number in range(executions):
        chosen = seeds[number] if number < len(seeds) else mutated(rng.choice(seeds), seeds, tokens, rng)
        (folder / "last.bin").write_bytes(chosen)
        recorder.run(chosen)
    recorder.save()


def run_atheris(name: str, folder: Path, executions: int, seed: int) -> None:
    """Fuzz guided by coverage; ends the process.

    Args:
        name: Of the target.
        folder: For findings, counts and the grown corpus.
        executions: How often.
        seed: Of the chance.
    """
    import atheris
    import fuzz_targets

    recorder = Recorder(name, folder)
    for content in seeds_of(name):
        recorder.run(content)  # imports what the target needs
    for module in [module for key, module in sys.modules.items() if f"{key}.".startswith(INSTRUMENTED)]:
        _instrument(module, atheris.instrument_func)
    grown = folder / "corpus"
    grown.mkdir(exist_ok=True)
    for number, content in enumerate(seeds_of(name)):
        (grown / f"seed{number}").write_bytes(content)
    words = folder / "words.dict"
    tokens = fuzz_targets.TARGETS[name].tokens
    words.write_text("".join(_quoted(token) for token in tokens))
    done = 0

    def one(content: bytes) -> None:
        nonlocal done
        recorder.run(content)
        done += 1
        if done % 1000 == 0 or done >= executions:
            recorder.save()

    options = [f"-runs={executions}", f"-timeout={WALL_S}", f"-max_len={MAX_BYTES}", f"-seed={seed}"]
    options += ["-rss_limit_mb=4096", f"-artifact_prefix={folder}/native-", "-print_final_stats=1"]
    options += [f"-dict={words}"] if tokens else []
    atheris.Setup([sys.argv[0], str(grown), *options], one)
    atheris.Fuzz()


def _instrument(module: types.ModuleType, instrument) -> None:
    """Instrument functions and methods where they are: much quicker than at import."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    for holder in (module, *(found for found in classes if found.__module__ == module.__name__)):
        for value in list(vars(holder).values()):
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                instrument(function)


def _quoted(token: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in token[:64]) + '"\n'


# ----------------------------------------------------------------------------------------- the driver


def fuzz_target(name: str, *, executions: int, seed: int, folder: Path, guided: bool) -> dict[str, object]:
    """Fuzz one target until it has had its executions, starting again where the process died.

    Args:
        name: Of the target.
        executions: How often, at least.
        seed: Of the chance.
        folder: For findings.
        guided: With atheris.

    Returns:
        Figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = native = hangs = 0
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    started = time.perf_counter()
    while done < executions and native < 20:
        words = [
            sys.executable,
            __file__,
            "--child",
            name,
            str(folder),
            str(executions - done),
            str(seed + done),
        ]
        words += [] if guided else ["--unguided"]
        with (folder / "log.txt").open("w") as log:
            code = subprocess.run(words, stdout=log, stderr=log, check=False, cwd=ROOT).returncode
        log_text = (folder / "log.txt").read_text(errors="replace")
        counts_file = folder / "counts.json"
        counts = (
            json.loads(counts_file.read_text()) if counts_file.exists() else {"outcomes": {}, "slowest_s": 0}
        )
        counts_file.unlink(missing_ok=True)
        outcomes.update(counts["outcomes"])
        slowest = max(slowest, counts["slowest_s"])
        done += max(1, sum(counts["outcomes"].values()))
        if code:
            native += 1
            hangs += "ERROR: libFuzzer: timeout" in log_text
            (folder / f"native{native}.log").write_text(log_text[-20_000:])
    findings = [path.read_text().splitlines()[0] for path in sorted(folder.glob("finding-*.txt"))]
    hangs += sum(line.startswith("TimeoutError") for line in findings)
    return {
        "executions": done,
        "seconds": round(time.perf_counter() - started, 1),
        "outcomes": dict(outcomes.most_common()),
        "findings": findings,
        "died": native,
        "hangs": hangs,
        "slowest_s": slowest,
        "guided": guided,
    }


def measure(names: list[str], *, executions: int, seed: int, folder: Path) -> dict[str, object]:
    """Fuzz targets one after the other.

    Args:
        names: Targets.
        executions: Of all together; each gets its share.
        seed: Of the chance.
        folder: For findings.

    Returns:
        Figures.
    """
    import fuzz_targets
    from describe_machine import describe_machine

    has_atheris = importlib.util.find_spec("atheris") is not None
    total = sum(fuzz_targets.TARGETS[name].share for name in names)
    figures: dict[str, object] = {
        "machine": describe_machine(),
        "seed": seed,
        "hang_s": HANG_S,
        "targets": {},
    }
    for name in names:
        share = max(100, round(executions * fuzz_targets.TARGETS[name].share / total))
        guided = has_atheris and name not in FORKED
        found = fuzz_target(name, executions=share, seed=seed, folder=folder / name, guided=guided)
        figures["targets"][name] = found
        print(name, json.dumps(found), file=sys.stderr, flush=True)
    return figures


def as_markdown(figures: dict) -> str:
    """Format the figures for people.

    Args:
        figures: What ``measure`` gave.

    Returns:
        A page of Markdown.
    """
    lines = [
        "# Fuzzing of the readers",
        "",
        *(f"- {key}: {value}" for key, value in figures["machine"].items()),
    ]
    lines += [f"- hang: over {figures['hang_s']} s; seed {figures['seed']}", ""]
    lines += ["| target | guided | executions | records | refused | findings | died | hangs | slowest, s |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    totals: Counter[str] = Counter()
    for name, row in figures["targets"].items():
        records = row["outcomes"].get("records", 0)
        refused = sum(count for key, count in row["outcomes"].items() if key.endswith("Error"))
        totals.update(
            runs=row["executions"], found=len(row["findings"]), died=row["died"], hangs=row["hangs"]
        )
        lines += [
            f"| {name} | {'yes' if row['guided'] else 'no'} | {row['executions']:,} | {records:,} "
            f"| {refused:,} "
            f"| {len(row['findings'])} | {row['died']} | {row['hangs']} | {row['slowest_s']} |"
        ]
    lines += [
        "",
        f"Together {totals['runs']:,} executions, {totals['found']} findings, {totals['died']} deaths,",
    ]
    lines += [f"{totals['hangs']} hangs."]
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    if sys.argv[1:2] == ["--child"]:
        name, folder, executions, seed = sys.argv[2:6]
        run = run_mutations if "--unguided" in sys.argv else run_atheris
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        sys.argv[1:] = []
        run(name, Path(folder), int(executions), int(seed))
        return
    import fuzz_targets

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", action="append", choices=sorted(fuzz_targets.TARGETS))
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, help="folder for inputs that are findings")
    parser.add_argument("--output", type=Path, help="JSON file for the figures; the page goes beside it")
    options = parser.parse_args()
    folder = options.findings or Path(tempfile.mkdtemp())
    names = options.target or list(fuzz_targets.TARGETS)
    figures = measure(names, executions=options.executions, seed=options.seed, folder=folder)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(as_markdown(figures) + "\n")
    print(as_markdown(figures))


if __name__ == "__main__":
    main()
