"""Campaigns on a cluster: a real Dask scheduler and its workers, submitit's local jobs; killed workers, and workers
that do not fit. ``python tests/cluster_harness.py`` kills many more."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cluster_harness
import pytest
from cluster_harness import N_RUNS, Harness

from fa.errors import UserError
from fa.results import cluster
from fa.results import runs as campaign
from fa.results.store import RunFolder
from fa.train import loop


@pytest.fixture(scope="module")
def lives() -> Iterator[Harness]:
    pytest.importorskip("distributed", reason="needs the extra cluster")
    with cluster_harness.harness() as made:
        yield made


@pytest.mark.parametrize("name", ["dask", "dask:127.0.0.1:8786", "dask://127.0.0.1", "slurm:gpu", "ray", ""])
def test_an_unknown_executor_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown executor .* known executors: local, dask://HOST:PORT"):
        with cluster.opened(name, tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, package", [("dask://127.0.0.1:1", "distributed"), ("slurm", "submitit")])
def test_a_missing_package_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}; pip install -e '\.\[cluster\]'"):
        with cluster.opened(name, tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_files_travel_and_a_finished_run_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, then a table: what arrives is what was sent; nothing replaces what is finished."""
    (config,) = cluster_harness.small_runs(1)
    here, there = tmp_path / "here", tmp_path / "there"

    def at(store: Path) -> RunFolder:
        monkeypatch.setenv("FA_RUNS", str(store))
        return RunFolder(config)

    assert at(there).files() == {}
    loop.train(config, folder=at(there), until=0.0)
    begun = at(there).files()
    assert begun.keys() == {"config.json", "checkpoint.pt"}
    at(here).install(begun)
    assert at(here).checkpoint()["epoch"] == 0 and at(here).files() == begun
    table = loop.train(config, folder=at(there))
    at(there).finish(table, table.attrs["status"])
    done = at(there).files()
    assert done.keys() == {"config.json", "progress.csv", "metrics.csv", "status.json"}
    at(here).install(done)
    assert at(here).files() == done
    at(here).install(begun | {"metrics.csv": b"other"})
    assert at(here).files() == done


class Stopped(Exception):
    """Training was stopped at an epoch."""


def reach(config, folder: RunFolder, epoch: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Train a run until a checkpoint of that epoch is written, as a kill leaves it; returns the folder's files."""
    real = loop.Run.save

    def save(self) -> None:
        real(self)
        if self.epoch == epoch:
            raise Stopped

    with monkeypatch.context() as m:
        m.setattr(loop, "CHECKPOINT_EVERY", -1.0)
        m.setattr(loop.Run, "save", save)
        with pytest.raises(Stopped):
            loop.train(config, folder=folder)
    return folder.files()


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns the folder of a run of four epochs in the store of that name, which becomes this process's."""
    (config,) = cluster_harness.small_runs(1)
    config = config.vary(epochs=4)

    def at(name: str) -> RunFolder:
        monkeypatch.setenv("FA_RUNS", str(tmp_path / name))
        return RunFolder(config)

    return at


def apart(config, files=(), work=campaign.run_one):
    """A job's result from a worker that shares no store."""
    return cluster._there(work, [config], cluster.Terms(Path("/nowhere")), list(files))


def receive(result) -> list[dict]:
    return cluster.Elsewhere(None, cluster.Terms(Path("/nowhere")), 1, "cpu").receive(result)


def test_the_checkpoint_of_more_epochs_stays(stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the worker to the campaign, and from the campaign to the worker."""
    early = reach(stores("a").config, stores("a"), 1, monkeypatch)
    late = reach(stores("b").config, stores("b"), 3, monkeypatch)
    for first, second in ((early, late), (late, early)):
        folder = stores(f"with {len(first['progress.csv'])}")
        folder.install(first)
        assert folder.install(second) == "" and folder.checkpoint()["epoch"] == 3
    broken = late | {"checkpoint.pt": late["checkpoint.pt"][:-9]}
    assert stores("c").install(broken) == "" and stores("c").files() == broken  # the one before it is of epoch 2
    assert stores("c").install(early) == "" and stores("c").files() == broken
    assert stores("a").install({"checkpoint.pt": b"no checkpoint"}) == "" and stores("a").files() == early


def test_a_job_goes_on_from_the_workers_own_later_checkpoint(stores, monkeypatch: pytest.MonkeyPatch) -> None:
    early = reach(stores("here").config, stores("here"), 1, monkeypatch)
    reach(stores("there").config, stores("there"), 3, monkeypatch)
    stopped = partial(campaign.run_one, until=0.0)
    statuses, kept, wrong = apart(stores("there").config, [(stores("there").config, early)], stopped)
    assert (statuses, wrong) == ([{"state": "stopped"}], "") and stores("there").checkpoint()["epoch"] == 3
    stores("here")
    assert receive((statuses, kept, wrong)) == [{"state": "stopped"}] and stores("here").checkpoint()["epoch"] == 3


def test_a_table_that_arrives_while_another_process_holds_the_run_is_not_counted(stores) -> None:
    result = apart(stores("there").config)
    folder = stores("here")
    with folder.lock() as mine:
        assert mine and folder.install(result[1][0][1]) == "busy"
        assert receive(([*result[0]], *result[1:])) == [{"state": "busy"}]
    assert not folder.finished
    assert receive(result)[0]["state"] == "finished" and folder.finished


def test_a_status_without_its_table_is_not_installed_and_the_worker_trains_again(stores) -> None:
    statuses, ((config, files),), _ = apart(stores("there").config)
    other = {"metrics.csv": files["metrics.csv"].replace(b"0", b"1")}
    damaged = [files | other, {n: c for n, c in files.items() if n != "metrics.csv"}, files | {"status.json": b"{"}, {}]
    for found in damaged:
        folder = stores("here")
        [status] = receive(([*statuses], [(config, found)], ""))
        assert status["state"] == "failed" and "came damaged from the worker" in status["error"], found.keys()
        assert not folder.finished
    (stores("there").path / "metrics.csv").write_bytes(other["metrics.csv"])
    again = apart(config)
    stores("here")
    assert receive(again)[0]["state"] == "finished"
    assert stores("here").table().value.tolist() == loop.train(config).value.tolist()


def test_nothing_is_sent_of_a_run_that_another_process_trains(stores, monkeypatch: pytest.MonkeyPatch) -> None:
    early = reach(stores("here").config, stores("here"), 1, monkeypatch)
    with stores("here").lock():
        assert stores("here").files() == {}
    assert stores("here").files() == early
    assert stores("none").files() == {} and not stores("none").path.exists()


@pytest.mark.slow
def test_two_of_three_workers_are_killed_and_the_record_is_that_of_a_pool(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    assert cluster_harness.main(["1"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_workers_that_do_not_share_the_store_go_on_from_its_checkpoints(lives: Harness) -> None:
    """Stopped here, the runs go on there, and come back; a second call finds them finished."""
    lives.folder()
    configs = cluster_harness.small_runs(4)
    stopped = campaign.run(configs, budget=1e-6, workers=1, device="cpu", progress=False)
    assert stopped.done == 0 and all(RunFolder(c).begun for c in configs)
    with lives.cluster(shares=False, places=(0,), prepare=first_epochs_are_forbidden) as (address, _, _):
        with cluster.opened(address, Path(os.environ["FA_RUNS"])) as executor:
            summary = campaign.run(configs, device="cpu", progress=False, executor=executor)
    assert (summary.done, summary.failed) == (4, [])
    assert not any(RunFolder(c).begun for c in configs)
    assert RunFolder(configs[0]).table().value.tolist() == loop.train(configs[0]).value.tolist()


def first_epochs_are_forbidden() -> None:
    real = loop.Run.start

    def start(self, *args) -> None:
        real(self, *args)
        assert self.rows, "no checkpoint came with it"

    loop.Run.start = start


def other_code() -> None:
    cluster.software = lambda: {"fa of code": "0123", "torch": "2.11.0"}


def other_torch() -> None:
    known = cluster.software()
    cluster.software = lambda: known | {"torch": "1.0"}


def no_data() -> None:
    os.environ["FA_DATA"] = "/nowhere"


def no_fa() -> None:
    sys.modules["fa.results.cluster"] = None


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare, threads, options, said",
    [
        (other_code, 1, [], "has fa of code 0123, the campaign"),
        (other_torch, 1, [], "has torch 1.0, the campaign 2.11"),
        (no_data, 1, ["--dataset", "mnist"], "MNIST"),
        (no_fa, 1, [], "cannot use fa"),
        (None, 2, [], "has several threads"),
    ],
)
def test_a_worker_that_does_not_fit_is_named_in_a_sentence(lives: Harness, prepare, threads, options, said) -> None:
    folder = lives.folder()
    with lives.cluster(places=(0,), threads=threads, prepare=prepare) as (address, _, _):
        status, out, err, _ = lives.campaign("--executor", address, *options)
    assert status == 2 and err.startswith("fa: the worker ") and said in err and err.count("\n") == 1, err
    assert not list((folder / "runs").iterdir()) and out == ""


@pytest.mark.slow
def test_a_wrong_address_is_a_sentence(lives: Harness) -> None:
    folder = lives.folder()
    status, _, err, _ = lives.campaign("--executor", f"dask://127.0.0.1:{cluster_harness.free_port()}")
    assert status == 2 and err.startswith("fa: no Dask scheduler answers at 127.0.0.1:") and err.count("\n") == 1, err
    assert not list((folder / "runs").iterdir())


@pytest.mark.slow
def test_a_scheduler_that_goes_away_is_a_sentence_and_finished_runs_are_kept(lives: Harness) -> None:
    folder = lives.folder()
    with lives.cluster(places=(0,)) as (address, served, _):

        def kill() -> None:
            while not list(folder.glob("runs/*/status.json")):
                threading.Event().wait(0.05)
            served.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        status, _, err, _ = lives.campaign("--executor", address)
        killer.join()
    assert status == 2 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("fa: the jobs were cancelled, or their scheduler went away; finished runs")
    assert 0 < len(list(folder.glob("runs/*/status.json"))) < N_RUNS
    assert not list(folder.glob("runs/.*"))


@pytest.mark.slow
def test_jobs_of_submitit(lives: Harness, tmp_path: Path) -> None:
    """Its local engine, in processes of their own; a job whose process is killed is submitted again."""
    submitit = pytest.importorskip("submitit", reason="needs the extra cluster")
    lives.folder()
    configs = cluster_harness.small_runs(2)
    engine = submitit.LocalExecutor(tmp_path)
    store = Path(os.environ["FA_RUNS"])
    real, killed = engine.submit, []

    def submit(*args):
        job = real(*args)
        if not killed:
            killed.append(job.job_id)
            job.cancel()
        return job

    engine.submit = submit
    with cluster.Submitted(engine, every=0.1) as pool:
        summary = campaign.run(
            configs, device="cpu", progress=False, executor=cluster.Elsewhere(pool, cluster.Terms(store))
        )
    assert (summary.done, summary.failed, len(killed)) == (2, [], 1)
    assert RunFolder(configs[0]).table().value.tolist() == loop.train(configs[0]).value.tolist()


@pytest.mark.slow
def test_slurm_that_is_not_here_is_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra cluster")
    with pytest.raises(UserError, match="Slurm cannot be used from here"):
        with cluster.opened("slurm:partition=gpu,time=60", tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_notebooks_run_on_workers_and_one_that_fails_stops_no_other(
    lives: Harness, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its outputs and figures are in the campaign's folder; the failed one is told with its error, and its log has the
    cell."""
    from fa.__main__ import main

    folder = lives.folder()
    given = ["reproduce", "32", "-p", "rules=bp", "-p", "seeds=1", "-p", "epochs=1", "--grid", "dataset=mnist,digits"]
    with lives.cluster(places=(0, 0), prepare=no_data) as (address, _, _):
        status = main([*given, "--executor", address])
    out = capsys.readouterr().out
    assert status == 1 and "1 of 2 ran through" in out, out
    failed, ran = (f"32_pfa_fig2_mnist__dataset={name}" for name in ("mnist", "digits"))
    assert f"failed: {failed}" in out and "UserError: data set mnist: /nowhere/" in out
    outputs = folder / "build" / "quick" / "notebooks"
    assert {p.name for p in outputs.iterdir()} == {f"{n}.{end}" for n in (failed, ran) for end in ("ipynb", "log")}
    log = (outputs / f"{failed}.log").read_text()
    assert 'Exception encountered at "In [' in log and "UserError: data set mnist" in log
    assert list((folder / "build" / "grid" / "dataset=digits").rglob("*.pdf"))


@pytest.mark.slow
def test_workers_keep_a_search_where_the_campaign_does(lives: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were started without a word about it, and share no store."""
    pytest.importorskip("optuna", reason="needs the extra cluster")
    from fa.experiments import plan

    url = f"sqlite:///{lives.folder() / 'search.db'}"
    runs = [c for c in plan("p2_tuning", "quick", rules="wm", epochs=1, trials=3) if c.part == "search"]
    with lives.cluster(shares=False, places=(0,)) as (address, _, _):
        monkeypatch.setenv("FA_STORAGE", url)
        with cluster.opened(address, Path(os.environ["FA_RUNS"])) as executor:
            summary = campaign.run(runs, device="cpu", progress=False, executor=executor)
    assert (summary.done, summary.failed) == (3, [])
    from fa.experiments._search import study_of

    assert sorted(t.user_attrs["number"] for t in study_of(runs[0]).trials) == [0, 1, 2]
