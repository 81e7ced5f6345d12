"""The Ray engine against a cluster that is played: deaths, errors, order, totals."""

from __future__ import annotations

import builtins
import logging
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from genoembed import extract, open_embeddings
from genoembed.config.embed import embed_config
from genoembed.errors import (
    ConfigError,
    GenoembedError,
    InputError,
    MissingExtraError,
    ModelError,
    PrecisionWarning,
    SequenceLengthError,
    StoreError,
)
from genoembed.pipeline import ray as ray_module
from genoembed.pipeline.ray import MOST_DEATHS, RayEngine, ray_engine
from tests.by_hand import folder_of, model_of, random_dna, write_fasta

RECORDS = {f"r{number}": random_dna(20 + number, number) for number in range(12)}


class PlayedRayError(Exception):
    """Ray's root of errors."""


class TaskError(PlayedRayError):
    """What Ray makes of an error in a worker."""

    def __init__(self, cause):
        self.cause = cause
        super().__init__(str(cause))


class PlayedCluster:
    """Runs what it is asked for when the result is wanted, in this process, through pickle.

    Args:
        dies: Called with the name of a method, the number of the worker and what it is called with; True
            where the worker dies of it.
        backwards: Whether results come in the opposite order.
    """

    def __init__(self, dies=lambda *_: False, *, gpus=0, backwards=False):
        self.exceptions = SimpleNamespace(RayError=PlayedRayError, RayTaskError=TaskError)
        self.dies = dies
        self.gpus = gpus
        self.backwards = backwards
        self.options = []
        self.actors = []
        self.killed = []
        self.most_on_their_way = 0

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 4.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def remote(self, **settings):
        assert settings == {"concurrency_groups": {"look": 1}}

        def decorate(cls):
            def make(config, packages):
                self.actors.append(
                    PlayedActor(
                        self, len(self.actors) + 1, cls(*pickle.loads(pickle.dumps((config, packages))))
                    )
                )
                return self.actors[-1]

            def options(**chosen):
                self.options.append(chosen)
                return SimpleNamespace(remote=make)

            return SimpleNamespace(options=options)

        return decorate

    def wait(self, results, *, num_returns, timeout):
        assert timeout is not None
        ready = list(reversed(results)) if self.backwards else list(results)
        return ready[:num_returns], ready[num_returns:]

    def get(self, result):
        return result()

    def kill(self, actor):
        actor.is_dead = True
        self.killed.append(actor.number)


class PlayedActor:
    def __init__(self, cluster, number, worker):
        self._cluster, self.number, self._worker = cluster, number, worker
        self.is_dead = False
        self.given = []
        self.start, self.embed, self.look = (self._method(name) for name in ("start", "embed", "look"))

    def _method(self, name):
        def remote(*arguments):
            arguments = pickle.loads(pickle.dumps(arguments))
            kept = []

            def result():
                if not kept:
                    kept.append(self._call(name, arguments))
                return kept[0]

            return result

        return SimpleNamespace(
            remote=remote, options=lambda concurrency_group: SimpleNamespace(remote=remote)
        )

    def _call(self, name, arguments):
        if self.is_dead or self._cluster.dies(name, self.number, *arguments):
            self.is_dead = True
            raise PlayedRayError("the actor died: killed\n\nand much more")
        try:
            return pickle.loads(pickle.dumps(getattr(self._worker, name)(*arguments)))
        except GenoembedError as error:
            raise TaskError(pickle.loads(pickle.dumps(error))) from error


@pytest.fixture
def fasta(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger("genoembed")
    before = list(root.handlers)
    yield write_fasta(tmp_path / "in.fa", RECORDS)
    root.handlers[:] = before  # workers that are played leave theirs


def run(fasta, monkeypatch, cluster, output="ray.h5", **options):
    monkeypatch.setattr(ray_module, "_import_ray", lambda: cluster)
    settings = {"model": str(folder_of("llama")), "layers": [0, "final"], "unit_bases": 80, "device": "cpu"}
    return extract(fasta, output=output, engine="ray", **settings | options)


def local(fasta, **options):
    settings = {"model": str(folder_of("llama")), "layers": [0, "final"], "unit_bases": 80, "device": "cpu"}
    return extract(fasta, output="local.h5", **settings | options)


def same(one, other):
    with open_embeddings(one) as first, open_embeddings(other) as second:
        assert first.ids == second.ids
        for name in first.obs:
            assert list(first.obs[name]) == list(second.obs[name])
        for layer in first.layers:
            assert first[layer][:].tobytes() == second[layer][:].tobytes()
        told, other_told = dict(first.provenance), dict(second.provenance)
        for provenance in (told, other_told):
            del provenance["config"]
        assert told == other_told


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"pooling": "none", "rc": "concat"}, {"per_window": True, "window": 16}]
)
def test_file_is_that_of_the_local_engine(workers, options, fasta, monkeypatch):
    mine = local(fasta, **options)
    cluster = PlayedCluster(backwards=workers > 1)
    report = run(fasta, monkeypatch, cluster, workers=workers, **options)
    same("local.h5", "ray.h5")
    assert (report.num_rows, report.width, report.layers) == (mine.num_rows, mine.width, mine.layers)
    assert (report.stats.units, report.stats.real_tokens) == (mine.stats.units, mine.stats.real_tokens)
    assert report.stats.records == len(RECORDS)
    assert report.counts == mine.counts
    assert cluster.options == [{"num_cpus": max(1, 4 // workers), "num_gpus": 0, "max_restarts": 0}]
    assert sorted(cluster.killed) == list(range(1, workers + 1))


def test_worker_gets_a_gpu_and_there_is_one_for_each(fasta, monkeypatch, caplog):
    cluster = PlayedCluster(gpus=2)
    monkeypatch.setattr("genoembed.models.load._choose_device", lambda _: __import__("torch").device("cpu"))
    run(fasta, monkeypatch, cluster, device=None)
    assert cluster.options == [{"num_cpus": 1, "num_gpus": 1, "max_restarts": 0}]
    assert len(cluster.actors) == 2
    run(fasta, monkeypatch, PlayedCluster(gpus=2), device=None, workers=3, overwrite=True)
    assert "the cluster has 2 GPUs for 3 workers" in caplog.text
    with pytest.raises(ConfigError, match="device is 'cuda:1', but engine is 'ray'"):
        run(fasta, monkeypatch, cluster, device="cuda:1", overwrite=True)


def test_units_of_a_dead_worker_are_given_to_another(fasta, monkeypatch, caplog):
    local(fasta)

    def dies(method, number, unit=None):
        return method == "embed" and number <= 3  # each of the first three dies over what it is given first

    cluster = PlayedCluster(dies)
    with caplog.at_level(logging.WARNING):
        report = run(fasta, monkeypatch, cluster, workers=2)
    same("local.h5", "ray.h5")
    assert len(cluster.actors) == 5
    assert report.stats.records == len(RECORDS)
    deaths = [record.getMessage() for record in caplog.records if "died over unit" in record.getMessage()]
    assert len(deaths) == 3
    assert deaths[0] == "worker 1 died over unit 0 (the actor died: killed)"


def test_unit_that_ends_every_worker_is_named_and_the_others_are_kept(fasta, monkeypatch):
    def dies(method, _, unit=None):
        return method == "embed" and unit.number == 2

    cluster = PlayedCluster(dies)
    message = (
        rf"{MOST_DEATHS} workers died over unit 2 \(2 records, 'r6' to 'r7'\), the last one: the actor died"
    )
    with pytest.raises(ModelError, match=message) as caught:
        run(fasta, monkeypatch, cluster)
    assert "2 finished units are kept" in caught.value.__notes__[0]
    assert len(cluster.killed) == len(cluster.actors) == MOST_DEATHS
    report = run(fasta, monkeypatch, PlayedCluster())
    assert report.stats.units_kept == 2


def test_workers_that_die_while_they_start_are_no_endless_loop(fasta, monkeypatch):
    with pytest.raises(ModelError, match=rf"{MOST_DEATHS} workers in a row died while they loaded the model"):
        run(fasta, monkeypatch, PlayedCluster(lambda method, *_: method == "start"))
    calls = []

    def dies_at_first(method, *_):
        calls.append(method)
        return method == "start" and calls.count("start") < MOST_DEATHS

    assert run(fasta, monkeypatch, PlayedCluster(dies_at_first)).num_rows == len(RECORDS)


def test_interruption_ends_the_workers_and_says_how_to_go_on(fasta, monkeypatch):
    def interrupt(stats):
        if stats.units >= 2:
            raise KeyboardInterrupt

    cluster = PlayedCluster()
    with pytest.raises(KeyboardInterrupt) as caught:
        run(fasta, monkeypatch, cluster, workers=2, progress=interrupt)
    assert "finished units are kept in" in caught.value.__notes__[0]
    assert sorted(cluster.killed) == [1, 2]
    assert run(fasta, monkeypatch, PlayedCluster()).stats.units_kept >= 2


def test_errors_of_a_worker_come_back_whole(fasta, monkeypatch):
    with pytest.raises(ModelError, match="no-such-model-anywhere"):
        run(fasta, monkeypatch, PlayedCluster(), model="no-such-model-anywhere")


def test_model_that_is_loaded_already_is_refused(fasta, monkeypatch):
    with pytest.raises(ConfigError, match="engine is 'ray', whose workers load the model themselves"):
        run(fasta, monkeypatch, PlayedCluster(), model=model_of("llama"), device=None)


@pytest.mark.parametrize(
    "error",
    [
        StoreError("is full; free some space", path="out.h5"),
        ConfigError("window is 9", "stride is 10"),
        SequenceLengthError("too long", path="in.fa", line=3, record_id="r"),
        MissingExtraError(package="ray", extra="ray", purpose="this"),
    ],
)
def test_errors_survive_pickle(error):
    error.add_note("2 units are kept")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert isinstance(found, InputError) == isinstance(error, InputError)


def test_worker_of_another_kind_is_refused(fasta, monkeypatch):
    from genoembed.pipeline.ray import UnitWorker

    original, calls = UnitWorker.start, []

    def start(self):
        calls.append(self)
        started = original(self)
        if len(calls) > 1:
            started.facts.identity["weights"] = "other"
        return started

    monkeypatch.setattr(UnitWorker, "start", start)
    with pytest.raises(ModelError, match=r"worker 2 is not like the others: weights differ"):
        run(fasta, monkeypatch, PlayedCluster(), workers=2)


def test_warnings_of_the_first_worker_are_shown_once(fasta, monkeypatch):
    from genoembed.pipeline import ray as worker_module

    original = worker_module.load_configured

    def load(config):
        warnings.warn(PrecisionWarning("needs FP8"), stacklevel=2)
        return original(config)

    monkeypatch.setattr(worker_module, "load_configured", load)
    with pytest.warns(PrecisionWarning, match="needs FP8") as caught:
        run(fasta, monkeypatch, PlayedCluster(), workers=3)
    assert len([item for item in caught if item.category is PrecisionWarning]) == 1


def test_no_more_than_a_few_units_are_on_their_way(fasta, monkeypatch):
    most = []
    original = RayEngine._wait

    def wait(self, save):
        most.append(self._num_given)
        return original(self, save)

    monkeypatch.setattr(RayEngine, "_wait", wait)
    monkeypatch.setattr("genoembed.pipeline.threads.Ahead.is_ready", True)  # however slow the reading is
    run(fasta, monkeypatch, PlayedCluster(), workers=2, unit_bases=25)
    assert max(most) == 4


def test_without_ray_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def no_ray(name, *arguments, **options):
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_ray)
    config = embed_config({"inputs": ("x.fa",), "engine": "ray"})
    with (
        pytest.raises(MissingExtraError, match=r"engine='ray' needs ray; .*install .*\[ray\]"),
        ray_engine(config),
    ):
        pass


def test_vectors_come_back_writable_or_not(fasta, monkeypatch):
    """Ray gives arrays that lie in shared memory and are read-only."""
    original = PlayedCluster.get

    def get(self, result):
        found = original(self, result)
        rows = getattr(found, "rows", None)
        if rows is not None:
            for matrix in rows.block.matrices.values():
                assert isinstance(matrix, np.ndarray)
                matrix.flags.writeable = False
        return found

    local(fasta)
    monkeypatch.setattr(PlayedCluster, "get", get)
    run(fasta, monkeypatch, PlayedCluster())
    same("local.h5", "ray.h5")
