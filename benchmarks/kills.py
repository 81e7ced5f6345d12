"""What is lost when runs are killed, disks are full and inputs are huge, and what it costs to lose nothing.

Parts, all or some of them (``--parts``):

- ``kills``: ``kill -9`` at random moments of a run of the command line, rerun until it is done, over and over
  until so many kills have hit; the file must be that of an undisturbed run, byte for byte.
- ``ray``: the same with a worker of Ray killed every few seconds.
- ``shards``: four jobs that share the units, two of them killed and started again, then ``merge``.
- ``disk``: a disk that fills up, and a folder that cannot be written to (Linux, as root: both are mounted).
- ``size``, ``long``: a million records; one record of 250 Mb; with a tiny model: memory and number of rows.
- ``overhead``: ``extract`` against a bare loop over the same batches, bundled model, 1 kb records.

Killed processes are forked from this one, which has imported everything: the moments fall into the run, not
into imports. Each has the command line, the current folder and SOURCE_DATE_EPOCH of the others::

    python benchmarks/kills.py --note "shared machine"
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from measuring import RESULTS, Figure, file_results, interleave, option_parser, ratio, spread
from speed_growth import write_tiny_models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PARTS = ("kills", "ray", "shards", "disk", "size", "long", "overhead")
MOMENTS = ("reading", "forward", "writing", "merge", "removal")
LARGEST_OVERHEAD = 1.03
LARGEST_RSS_GROWTH_MIB = 200.0
LARGEST_BYTES_A_BASE = 3.0
"""The record itself, and a copy of it while it is read."""
_LOG = "KILLS_LOG"


def write_records(path: Path, num_records: int, lengths: tuple[int, int], *, seed: int = 5) -> Path:
    """Write random records.

    Args:
        path: The file.
        num_records: How many.
        lengths: Shortest and longest.
        seed: Of letters and lengths.

    Returns:
        The same path.
    """
    generator = np.random.default_rng(seed)
    sizes = generator.integers(lengths[0], lengths[1] + 1, num_records)
    letters = np.frombuffer(b"ACGT", np.uint8)
    with path.open("wb") as file:
        for number, size in enumerate(sizes):
            file.write(
                b">r%d\n%s\n" % (number, letters[generator.integers(0, 4, size, dtype=np.uint8)].tobytes())
            )
    return path


def in_child(words: Sequence[str], folder: Path, log: Path | None = None) -> int:
    """Fork a process that runs the command line.

    Args:
        words: Behind ``genoembed``.
        folder: Its current folder.
        log: Each unit that was embedded leaves its number here.

    Returns:
        The process's id.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
        output = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["genoembed", *words]
        if log is not None:
            _log_units(log)
        from genoembed.cli import main

        main(list(words), prog_name="genoembed")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _log_units(log: Path) -> None:
    from genoembed.pipeline.embedder import UnitEmbedder

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    original = UnitEmbedder.rows

    def rows(self, embedded):
        os.write(descriptor, b"%d\n" % embedded.unit.number)
        return original(self, embedded)

    UnitEmbedder.rows = rows


def wait_for(child: int) -> int:
    """Wait for a process.

    Args:
        child: Its id.

    Returns:
        Its exit code, negative for a signal.
    """
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        Hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def moment_of(folder: Path, units_before: int) -> str:
    """Return where in a run a killed process was, from what it left.

    Args:
        folder: Its current folder.
        units_before: Units that were saved when it began.

    Returns:
        One of ``MOMENTS``.
    """
    parts = folder / "out.parts"
    if (folder / "out.h5").exists():
        return "removal"
    if list(parts.glob(".out.h5.*.tmp")):
        return "merge"
    if list(parts.glob(".unit-*.tmp")):
        return "writing"
    return "reading" if len(list(parts.glob("unit-*.json"))) <= units_before else "forward"


def _has_come(moment: str, folder: Path, units_before: int, units_wanted: int) -> bool:
    parts = folder / "out.parts"
    if moment == "reading":
        return parts.exists()
    if moment == "removal":
        return (folder / "out.h5").exists()
    if moment == "merge":
        return (parts / "input.json").exists() and bool(list(parts.glob(".out.h5.*.tmp")))
    enough = len(list(parts.glob("unit-*.json"))) >= min(units_before + units_wanted, units_wanted * 3)
    return enough and (moment == "writing") == bool(list(parts.glob(".unit-*.tmp")))


def kill_at(moment: str, child: int, folder: Path, units_before: int, generator: random.Random) -> bool:
    """Kill a process when a moment has come, and a little later.

    Args:
        moment: One of ``MOMENTS``.
        child: The process.
        folder: Its current folder.
        units_before: Units that were saved when it began.
        generator: Of the delay.

    Returns:
        Whether it was killed; it may have ended before.
    """
    units_wanted = generator.randint(1, 4)
    while not _has_come(moment, folder, units_before, units_wanted):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.0002)
    # the first unit is saved soon; a rerun loads the model and looks at what is there before
    longest_s = {"reading": 0.2 if units_before else 0.0, "forward": 0.002, "merge": 0.01}
    time.sleep(generator.random() * longest_s.get(moment, 0.0))
    os.kill(child, signal.SIGKILL)
    return wait_for(child) == -signal.SIGKILL


def tiny_words(model: str, fasta: Path, *more: str) -> list[str]:
    """Return a command line.

    Args:
        model: Folder.
        fasta: Input.
        *more: Further words.

    Returns:
        Words behind ``genoembed``.
    """
    words = ["extract", str(fasta), "--model", model, "--layer", "0", "--layer", "final", "--device", "cpu"]
    return [*words, "--dtype", "float32", "--threads", "1", "-o", "out.h5", "-q", *more]


def measure_kills(scratch: Path, model: str, options: object) -> tuple[list[dict[str, object]], list[Figure]]:
    """Kill processes until enough kills have hit, and look at what comes of it.

    Args:
        scratch: A folder.
        model: Folder of the model.
        options: Of the command line.

    Returns:
        A row a series of reruns, and the figures.
    """
    fasta = write_records(scratch / "kills.fa", options.kill_records, (200, 400))
    words = tiny_words(model, fasta, "--unit-bases", "24000")
    whole = _whole(scratch / "whole", words)
    generator = random.Random(7)
    wanted = [MOMENTS[number % len(MOMENTS)] for number in range(options.kills)]
    generator.shuffle(wanted)
    rows: list[dict[str, object]] = []
    hits: Counter[str] = Counter()
    while sum(hits.values()) < options.kills:
        rows.append(_series(scratch / f"series{len(rows)}", words, wanted, hits, generator, options.kills))
        rows[-1]["same bytes"] = rows[-1].pop("digest") == whole["digest"]
        rows[-1]["lost or doubled rows"] = abs(int(rows[-1]["rows"]) - int(whole["rows"]))
        rows[-1]["recomputed units"] = int(rows[-1]["units run"]) - int(whole["units run"])
    kills = sum(hits.values())
    recomputed = sum(int(row["recomputed units"]) for row in rows)
    figures = [
        Figure(name="kill -9: kills that hit", value=kills, at_least=options.kills),
        Figure(name="files that differ", value=sum(not row["same bytes"] for row in rows), at_most=0),
        Figure(
            name="rows lost or doubled", value=sum(row["lost or doubled rows"] for row in rows), at_most=0
        ),
        Figure(name="units recomputed, for each kill", value=recomputed / kills, at_most=1),
    ]
    for moment in MOMENTS:
        figures.append(Figure(name=f"kills that hit while: {moment}", value=hits[moment], at_least=1))
    return rows, figures


def _whole(folder: Path, words: Sequence[str]) -> dict[str, object]:
    folder.mkdir()
    code = wait_for(in_child(words, folder, folder / "log"))
    if code:
        raise SystemExit((folder / "said.txt").read_text())
    return _found(folder)


def _found(folder: Path) -> dict[str, object]:
    import genoembed

    with genoembed.open_embeddings(folder / "out.h5") as file:
        ids = file.ids
    log = folder / "log"
    return {
        "digest": digest(folder / "out.h5"),
        "rows": len(ids),
        "distinct rows": len(set(ids)),
        "units run": len(log.read_text().split()) if log.exists() else 0,
        "left behind": ", ".join(path.name for path in folder.glob("out.parts")) or "-",
    }


def _series(
    folder: Path,
    words: Sequence[str],
    wanted: list[str],
    hits: Counter[str],
    generator: random.Random,
    most: int,
) -> dict[str, object]:
    """Run, kill, run again ... until the output is there and its parts are gone."""
    folder.mkdir()
    kills: Counter[str] = Counter()
    started = time.perf_counter()
    while True:
        units_before = len(list((folder / "out.parts").glob("unit-*.json")))
        child = in_child(words, folder, folder / "log")
        moment = next((moment for moment in wanted if moment in ("reading", "forward", "writing")), None)
        if units_before > 20 or not moment:
            moment = next((moment for moment in wanted if moment in ("merge", "removal")), moment)
        if (
            sum(hits.values()) >= most or moment is None or (folder / "out.h5").exists()
        ):  # nothing is left but to remove the parts
            code = wait_for(child)
            if code:
                raise SystemExit((folder / "said.txt").read_text())
            break
        if not kill_at(moment, child, folder, units_before, generator):
            break  # it was done before
        found = moment_of(folder, units_before)
        if found in wanted:
            wanted.remove(found)
        kills[found] += 1
        hits[found] += 1
    return {
        "kills": sum(kills.values()),
        "while": ", ".join(f"{moment} {number}" for moment, number in kills.items()) or "-",
        **_found(folder),
        "seconds": time.perf_counter() - started,
    }


def measure_shards(
    scratch: Path, model: str, options: object
) -> tuple[list[dict[str, object]], list[Figure]]:
    """Run four jobs that share the units, kill two of them, start these again, and merge.

    Args:
        scratch: A folder.
        model: Folder of the model.
        options: Of the command line.

    Returns:
        A row, and the figures.
    """
    import genoembed

    fasta = write_records(scratch / "shards.fa", options.kill_records, (200, 400))
    words = tiny_words(model, fasta, "--unit-bases", "24000")
    _whole(scratch / "shards_whole", words)
    folder = scratch / "shards"
    folder.mkdir()
    children = {
        number: in_child([*words, "--shard", f"{number}/4"], folder, folder / "log") for number in range(1, 5)
    }
    kills = sum(kill_at("forward", children[number], folder, 0, random.Random(number)) for number in (2, 4))
    codes = [wait_for(children[number]) for number in (1, 3)]
    refused = wait_for(in_child(["merge", "out.h5"], folder))
    said = (folder / "said.txt").read_text().strip().splitlines()[-1]
    again = [
        wait_for(in_child([*words, "--shard", f"{number}/4"], folder, folder / "log")) for number in (2, 4)
    ]
    merged = wait_for(in_child(["merge", "out.h5"], folder))
    same = 0
    with (
        genoembed.open_embeddings(folder / "out.h5") as one,
        genoembed.open_embeddings(scratch / "shards_whole" / "out.h5") as other,
    ):
        same = int(
            one.ids == other.ids
            and all(one[layer][:].tobytes() == other[layer][:].tobytes() for layer in other.layers)
        )
    row = {"kills": kills, "exit codes": f"{codes} {refused} {again} {merged}", "merge said": said[:200]}
    return [row], [
        Figure(
            name="4 shards, 2 killed and rerun: merged file has the same rows and vectors",
            value=same,
            at_least=1,
        )
    ]


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small file system in memory.

    Args:
        folder: Where.
        size: As ``mount`` takes it.

    Yields:
        The folder.
    """
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def measure_disk(scratch: Path, model: str, options: object) -> tuple[list[dict[str, object]], list[Figure]]:
    """Fill a disk, free it, and make a folder unwritable.

    Args:
        scratch: A folder.
        model: Folder of the model.
        options: Of the command line.

    Returns:
        What was said, and the figures.
    """
    fasta = write_records(scratch / "disk.fa", 40_000, (60, 100))
    words = tiny_words(model, fasta, "--unit-bases", "100000")
    whole = _whole(scratch / "disk_whole", words)
    rows, figures = [], []
    file_bytes = (scratch / "disk_whole" / "out.h5").stat().st_size
    with mounted(scratch / "small", str(3 * file_bytes)) as folder:
        (folder / "ballast").write_bytes(bytes(5 * file_bytes // 2))
        code = wait_for(in_child(words, folder, folder / "log"))
        kept = len(list((folder / "out.parts").glob("unit-*.json")))
        rows.append({"disk": "full", "exit code": code, "units kept": kept, "said": _last_line(folder)})
        (folder / "ballast").unlink()
        code = wait_for(in_child(words, folder, folder / "log"))
        found = _found(folder)
        same = int(found["digest"] == whole["digest"])
        recomputed = int(found["units run"]) - int(whole["units run"])
        rows.append({"disk": "freed", "exit code": code, "units kept": kept, "said": _last_line(folder)})
        figures += [
            Figure(
                name="full disk: file after space was freed is the same, byte for byte",
                value=same,
                at_least=1,
            ),
            Figure(name="full disk: units recomputed", value=recomputed, at_most=1),
        ]
    with mounted(scratch / "readonly", "1m") as folder:
        (folder / "said.txt").touch()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        words_there = [*words[: words.index("-o")], "-o", str(folder / "out.h5"), "-q"]
        outside = scratch / "outside"
        outside.mkdir()
        code = wait_for(in_child(words_there, outside))
        rows.append({"disk": "read-only", "exit code": code, "units kept": 0, "said": _last_line(outside)})
        figures.append(Figure(name="read-only folder: exit code", value=code, at_least=1, at_most=1))
    return rows, figures


def _last_line(folder: Path) -> str:
    text = (folder / "said.txt").read_text().strip()
    return text.splitlines()[-1][:300] if text else "-"


def measure_ray(scratch: Path, model: str, options: object) -> tuple[list[dict[str, object]], list[Figure]]:
    """Kill a worker of Ray every few seconds.

    Args:
        scratch: A folder.
        model: Folder of the model.
        options: Of the command line.

    Returns:
        A row, and the figures.
    """
    fasta = write_records(scratch / "ray.fa", options.ray_records, (200, 400))
    words = [
        sys.executable,
        __file__,
        "--ray-child",
        model,
        str(fasta),
        str(options.kill_every_s),
        str(scratch),
    ]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return [found], [
        Figure(name="Ray: workers killed", value=found["kills"], at_least=3),
        Figure(
            name="Ray: rows and vectors are those of an undisturbed local run",
            value=found["same"],
            at_least=1,
        ),
        Figure(name="Ray: processes left behind", value=found["left"], at_most=0),
    ]


def ray_child(model: str, fasta: str, every_s: float, scratch: Path) -> None:
    """Run under Ray and kill workers meanwhile; print what came of it.

    Args:
        model: Folder.
        fasta: Input.
        every_s: Seconds from kill to kill.
        scratch: A folder.
    """
    import psutil

    import genoembed

    logging.basicConfig(level=logging.WARNING)
    settings = {"model": model, "layers": ["0", "final"], "unit_bases": 20_000, "threads": 1, "device": "cpu"}
    genoembed.extract(fasta, output=scratch / "ray_local.h5", **settings)
    kills, last = 0, time.monotonic()

    def kill(_totals: object) -> None:
        nonlocal kills, last
        if time.monotonic() - last < every_s:
            return
        workers = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.status() != "zombie" and "UnitWorker.embed" in " ".join(child.cmdline()[:1])
        ]
        if workers:
            random.Random(kills).choice(workers).kill()
            kills, last = kills + 1, time.monotonic()

    report = genoembed.extract(
        fasta, output=scratch / "ray.h5", engine="ray", workers=2, progress=kill, **settings
    )
    with (
        genoembed.open_embeddings(scratch / "ray_local.h5") as one,
        genoembed.open_embeddings(scratch / "ray.h5") as other,
    ):
        same = one.ids == other.ids and all(
            one[layer][:].tobytes() == other[layer][:].tobytes() for layer in one.layers
        )
    time.sleep(2)
    left = [child for child in psutil.Process().children(recursive=True) if child.status() != "zombie"]
    found = {
        "kills": kills,
        "rows": report.num_rows,
        "units": report.stats.units,
        "same": int(same),
        "seconds": report.seconds,
        "left": len(left),
    }
    print(json.dumps(found))


def measure_size(
    scratch: Path, model: str, kind: str, sizes: Sequence[int]
) -> tuple[list[dict[str, object]], list[Figure]]:
    """Embed very many records, or a very long one, each in a fresh process.

    Args:
        scratch: A folder.
        model: Folder of the model.
        kind: ``records`` or ``bases``.
        sizes: Of the input, the smallest first.

    Returns:
        A row a size, and the figures.
    """
    rows, figures = [], []
    for size in sizes:
        fasta = scratch / "size.fa"
        if kind == "records":
            write_records(fasta, size, (60, 100))
        else:
            write_records(fasta, 1, (size, size))
        words = [sys.executable, __file__, "--size-child", model, str(fasta), str(scratch / "size.h5")]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        rows.append({kind: size, **json.loads(done.stdout.splitlines()[-1])})
        missing = (size if kind == "records" else 1) - rows[-1]["rows"]
        figures.append(Figure(name=f"rows missing, {size:,} {kind}", value=missing, at_most=0))
    rise = rows[-1]["peak MiB"] - rows[0]["peak MiB"]
    between = f"{sizes[0]:,} to {sizes[-1]:,} {kind}"
    figures.append(
        Figure(name=f"rise of peak RSS in MiB, {between}", value=rise, at_most=LARGEST_RSS_GROWTH_MIB)
        if kind == "records"
        else Figure(
            name=f"rise of peak RSS in bytes per base, {between}",
            value=(rise << 20) / (sizes[-1] - sizes[0]),
            at_most=LARGEST_BYTES_A_BASE,
        )
    )
    return rows, figures


def _peak_mib() -> int:
    """Return the peak of this program alone: what ``getrusage`` says begins with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def size_child(model: str, fasta: str, output: str) -> None:
    """Embed a file in this process and print what it took.

    Args:
        model: Folder.
        fasta: Input.
        output: The file to write.
    """
    import genoembed

    loaded = genoembed.load_model(model, device="cpu", dtype="float32")
    short = write_records(Path(output).with_suffix(".short.fa"), 10, (80, 80))
    settings = {"model": loaded, "layers": "final", "overwrite": True, "threads": 1}
    genoembed.extract(short, output=output, **settings)
    before = _peak_mib()
    cpu = time.process_time()
    report = genoembed.extract(fasta, output=output, **settings)
    found = {
        "rows": report.num_rows,
        "units": report.stats.units,
        "seconds": report.seconds,
        "CPU seconds": time.process_time() - cpu,
        "peak before MiB": before,
        "peak MiB": _peak_mib(),
        "file MB": Path(output).stat().st_size / 1e6,
    }
    print(json.dumps(found))


def measure_overhead(scratch: Path, options: object) -> tuple[list[dict[str, object]], list[Figure]]:
    """Time ``extract`` and a bare loop over its batches by turns.

    Args:
        scratch: A folder.
        options: Of the command line.

    Returns:
        Timings, and the ratio.
    """
    import genoembed
    from genoembed.config.embed import embed_config
    from genoembed.pipeline.embedder import UnitEmbedder
    from genoembed.pipeline.units import iter_units
    from genoembed.sequences import read_sequences

    fasta = write_records(scratch / "kb.fa", options.overhead_records, (1000, 1000))
    model = genoembed.load_model("genoembed-mini", device="cpu", dtype="float32")
    model.is_causal, model.provenance  # noqa: B018 - found once, in either case
    config = embed_config({"inputs": (str(fasta),)})
    layout = UnitEmbedder(model, config)
    units = iter_units(read_sequences([str(fasta)]))
    batches = [work.batch for slab in layout.runner.lay_out(units) for work in slab.batches]
    output = scratch / "overhead.h5"

    def bare() -> None:
        for batch in batches:
            mask = batch.pool_mask[..., None]
            hidden = model.forward(batch, layout.layers)[layout.layers[0]]
            (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def whole() -> None:
        genoembed.extract(fasta, model=model, output=output, overwrite=True)

    samples = interleave({"bare": bare, "extract": whole}, rounds=options.rounds, budget_s=options.budget_s)
    rows = [{"what": name, **spread(found)} for name, found in samples.items()]
    figure = ratio(
        f"extract over bare forward passes, bundled model, {options.overhead_records} records of 1 kb",
        samples["extract"],
        samples["bare"],
        at_most=LARGEST_OVERHEAD,
    )
    return rows, [figure]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--ray-child"]:
        return ray_child(words[1], words[2], float(words[3]), Path(words[4]))
    if words[:1] == ["--size-child"]:
        return size_child(*words[1:4])
    parser = option_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--kill-records", type=int, default=4000)
    parser.add_argument("--ray-records", type=int, default=20_000)
    parser.add_argument("--kill-every-s", type=float, default=4)
    parser.add_argument("--many", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--long", type=int, nargs="+", default=[25_000_000, 250_000_000])
    parser.add_argument("--overhead-records", type=int, default=32)
    parser.add_argument("--budget-s", type=float, default=300, help="of the timings")
    options = parser.parse_args(words)
    if options.quick:
        options.kills, options.kill_records, options.ray_records, options.rounds = 3, 200, 400, 1
        options.many, options.long, options.overhead_records = [100, 1000], [10_000, 100_000], 2
    tables, figures = {}, []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = write_tiny_models(scratch)
        model = models["tiny"]
        parts: dict[str, Callable[[], tuple[list[dict[str, object]], list[Figure]]]] = {
            "kills": lambda: measure_kills(scratch, models["filters"], options),
            "shards": lambda: measure_shards(scratch, model, options),
            "disk": lambda: measure_disk(scratch, model, options),
            "ray": lambda: measure_ray(scratch, model, options),
            "size": lambda: measure_size(scratch, model, "records", options.many),
            "long": lambda: measure_size(scratch, model, "bases", options.long),
            "overhead": lambda: measure_overhead(scratch, options),
        }
        _import_all()
        for name in (name for name in parts if name in options.parts):
            tables[name], found = parts[name]()
            figures += [replace(figure, name=f"{name}: {figure.name}") for figure in found]
            print(name, *(f"{figure.name}: {figure.value:g}" for figure in found), sep="\n  ", flush=True)
    others = _filed_before(options)
    figures += [figure for name, found in others.items() for figure in found[0]]
    tables |= {name: rows for name, (_, rows) in others.items()}
    file_results(
        "kills",
        "Killed runs, full disks, huge inputs",
        options,
        figures=sorted(figures, key=lambda figure: PARTS.index(figure.name.partition(":")[0])),
        tables={name: tables[name] for name in PARTS if name in tables},
        remarks=[
            "Tiny model: one block with a short filter (kills: three with all filters), hidden 8, "
            "windows of 8 kb (1 Mb), float32, one thread.",
            "A unit counts as run when its rows were built, whether it was saved then or not; a unit in the "
            "middle of its forward passes when the process was killed is lost as well.",
            "Moments are told from what a killed process left behind.",
            "Parts may have been run one after the other, with other settings than above.",
        ],
    )


def _filed_before(options: object) -> dict[str, tuple[list[Figure], list[dict[str, object]]]]:
    """Return figures and rows of the parts that are not run this time, if they are in the results already."""
    path = (options.results or RESULTS) / "kills.json"
    if options.quick or not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    figures = [
        Figure(**{key: value for key, value in figure.items() if key != "is_met"})
        for figure in before["figures"]
    ]
    return {
        name: ([figure for figure in figures if figure.name.startswith(f"{name}:")], rows)
        for name, rows in before["tables"].items()
        if name not in options.parts
    }


def _import_all() -> None:
    """Import what the forked processes need; no thread of torch may run before they are forked."""
    import torch

    import genoembed.cli.extract
    import genoembed.extraction  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
