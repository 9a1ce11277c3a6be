"""Campaigns on a cluster: a real Dask scheduler and its workers, submitit's local jobs; killed workers, and workers
that do not fit. ``python tests/cluster_harness.py`` kills many more."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cluster_harness
import pytest
import torch
from cluster_harness import N_RUNS, Harness

from fa.errors import UserError
from fa.experiments.p2_tuning import QUICK
from fa.results import cluster, executors, worker
from fa.results import runs as campaign
from fa.results.executors import Here
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
    return worker.there(work, [config], worker.Terms(Path("/nowhere")), list(files))


def receive(result) -> list[dict]:
    return cluster.Elsewhere(None, worker.Terms(Path("/nowhere")), 1, "cpu").receive(result)


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
    assert (statuses, wrong) == ([{"state": "waiting"}], "") and stores("there").checkpoint()["epoch"] == 3
    stores("here")
    assert receive((statuses, kept, wrong)) == [{"state": "waiting"}] and stores("here").checkpoint()["epoch"] == 3


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


def test_trials_of_a_search_are_refused_where_each_worker_would_have_a_search_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FA_STORAGE", raising=False)
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    search, grid = replace(QUICK, part="search"), QUICK
    called = lambda job: [{"state": "finished"}]  # noqa: E731
    statuses, files, wrong = apart(search, work=called)
    assert (statuses, files) == ([], []) and "does not share the run store, in which the search is kept" in wrong
    assert "--storage" in wrong and apart(grid, work=called)[2] == ""
    monkeypatch.setenv("FA_STORAGE", "sqlite:////shared/search.db")
    assert apart(search, work=called)[2] == ""


@pytest.mark.parametrize("storage", ["sqlite:///search.db", "sqlite://", "sqlite+pysqlite:///a/b.db"])
def test_a_search_in_a_relative_path_is_refused_before_anything_is_sent(storage, capsys, monkeypatch) -> None:
    from fa.__main__ import main

    monkeypatch.setenv("FA_STORAGE", "")
    command = ["run", "p2_tuning", "--mode", "quick", "--storage", storage]
    assert main([*command, "--executor", "dask://127.0.0.1:1"]) == 2
    assert f"fa: the storage {storage} is another file for every worker; give an absolute" in capsys.readouterr().err
    cluster.check("local")
    monkeypatch.setenv("FA_STORAGE", "sqlite:////shared/search.db")
    cluster.check("dask://127.0.0.1:1")


class Idle(Executor):
    """Begins no job."""

    def __init__(self) -> None:
        self.taken: list[Future] = []

    def submit(self, fn, /, *args, **kwargs) -> Future:
        self.taken.append(Future())
        return self.taken[-1]


def test_jobs_that_no_worker_begins_end_with_the_budget(stores, capsys: pytest.CaptureFixture[str]) -> None:
    pool, terms = Idle(), worker.Terms(Path("/nowhere"))
    executor = cluster.Elsewhere(pool, terms, 1, "cpu", waits=lambda future: future is not pool.taken[-1])
    config = stores("here").config
    later = threading.Timer(1.5, lambda: pool.taken[-1].set_result(([{"state": "stopped"}], [], "")))
    later.start()  # the last one was begun, and has until then to stop
    configs = [config.vary(seed=seed) for seed in range(3)]
    summary = campaign.run(configs, budget=1e-6, device="cpu", progress=False, executor=executor)
    later.join()
    assert (summary.done, summary.left, summary.failed) == (0, 3, [])
    assert [future.cancelled() for future in pool.taken] == [True, True, False]
    assert "fa: time was up before 2 of the 3 runs began\n" in capsys.readouterr().err


class Asked:
    """A client of Dask whose workers have these devices."""

    def __init__(self, *devices: str) -> None:
        self.devices = devices
        self.waited: list[float | None] = []

    def nthreads(self) -> dict[str, int]:
        return dict.fromkeys(map(str, range(len(self.devices))), 1)

    def run(self, *_, **__) -> dict[str, tuple]:
        return {str(i): ("", True, device) for i, device in enumerate(self.devices)}

    def wait_for_workers(self, n: int, timeout: float | None) -> None:
        self.waited.append(timeout)
        raise TimeoutError

    def get_executor(self, pure: bool) -> None:
        pass


@pytest.mark.parametrize(
    "devices, taken, why",
    [
        (("cuda", "cuda"), "cuda", "all workers' own"),
        (("cpu",), "cpu", "all workers' own"),
        (("cuda", "cpu", "cuda"), "cpu", "1 of 3 workers have no GPU; --device cuda is for workers that all have one"),
    ],
)
def test_the_device_is_the_workers(devices, taken, why, capsys) -> None:
    found = cluster._asked(Asked(*devices), "host:1", worker.Terms(Path("/nowhere")), [], math.inf)
    assert (found.device, found.why, found.waits(Future())) == (taken, why, False)
    assert capsys.readouterr().err == ""


def test_a_worker_that_dies_while_it_is_asked_stops_nobody() -> None:
    class CommClosedError(OSError):
        """As Dask's."""

    class Dying(Asked):
        def run(self, *_, **__) -> dict[str, object]:
            return {"tcp://gone": CommClosedError("Stream is closed")} | super().run()

    found = cluster._asked(Dying("cuda"), "host:1", worker.Terms(Path("/nowhere")), [], math.inf)
    assert (found.device, found.all_share) == ("cuda", True)
    Dying.run = lambda *_, **__: {"tcp://old": ImportError("no module named fa")}
    with pytest.raises(UserError, match="the worker tcp://old cannot use fa"):
        cluster._asked(Dying("cuda"), "host:1", worker.Terms(Path("/nowhere")), [], math.inf)


def test_dask_without_a_worker_is_told_at_once_and_the_wait_is_bounded(capsys) -> None:
    for until, bounded in ((math.inf, False), (0.0, True)):
        client = Asked()
        found = cluster._asked(client, "host:1", worker.Terms(Path("/nowhere")), [], until)
        assert (found.device, found.all_share, found.waits(Future())) == ("cpu", False, True)
        assert (client.waited != [None]) == bounded
        said = capsys.readouterr().err
        assert "host:1 has no worker yet, and this command waits for one; start one with: dask worker tcp://h" in said


def test_the_device_of_slurms_jobs_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    from fa.__main__ import main

    assert main(["run", "p3_fig2", "--mode", "quick", "--executor", "slurm:partition=gpu"]) == 2
    assert "does not know the device of Slurm's jobs; give --device cuda" in capsys.readouterr().err


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which begin no job; returns the file of those that are cancelled."""
    pytest.importorskip("submitit", reason="needs the extra cluster")
    (tmp_path / "bin").mkdir()
    cancelled = tmp_path / "cancelled"
    does = {"srun": "", "sacct": "", "sbatch": "echo Submitted batch job 7", "scancel": f'echo "$@" >> {cancelled}'}
    for name, line in does.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return cancelled


def test_jobs_of_slurm_that_are_pending_past_the_budget_are_cancelled(slurm: Path, stores) -> None:
    """No checkpoint is in what is sent, for the run store is shared; nothing is left of it at the end."""
    folder = stores("here")
    folder.save({"epoch": 0, "net": torch.zeros(100_000)})
    with cluster.opened("slurm:partition=gpu", folder.path.parent) as executor:
        sent = []
        real = executor.pool.submit
        executor.pool.submit = lambda *args: (
            real(*args),
            sent.extend(p.stat().st_size for p in folder.path.parent.rglob("*.pkl")),
        )[0]
        summary = campaign.run([folder.config], budget=1e-6, device="cpu", progress=False, executor=executor)
    assert (summary.done, summary.left, summary.failed) == (0, 1, [])
    assert slurm.read_text().split()[0] == "7"
    assert len(sent) == 1 and sent[0] < 50_000
    assert [p.name for p in folder.path.parent.iterdir()] == [folder.config.run]
    missed = worker.there(campaign.run_one, [folder.config], replace(executor.terms, folder=Path("/nowhere")), [])
    assert missed[0] == [] and "does not share the run store /nowhere; set FA_RUNS to a folder" in missed[2]


def test_an_address_where_something_else_than_dask_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, and says nothing, or what is no answer."""
    pytest.importorskip("distributed", reason="needs the extra cluster")
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    for said in (b"", b"HTTP/1.0 400 Bad request\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            taken: list[socket.socket] = []

            def serve(server=server, said=said, taken=taken) -> None:
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(server.accept()[0])
                        taken[-1].sendall(said)

            threading.Thread(target=serve, daemon=True).start()
            port = server.getsockname()[1]
            with pytest.raises(UserError, match=f"no Dask scheduler answers at 127.0.0.1:{port}; start one"):
                with cluster.opened(f"dask://127.0.0.1:{port}", tmp_path):
                    pass
            for connection in taken:
                connection.close()
    assert not list(tmp_path.iterdir())


def test_a_connection_that_breaks_is_the_schedulers_and_no_full_disk(tmp_path: Path, monkeypatch) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra cluster")

    async def connect(*_, **__) -> SimpleNamespace:
        async def close() -> None:
            pass

        return SimpleNamespace(close=close)

    class Broken(Asked):
        def run(self, *_, **__) -> dict[str, tuple]:
            raise distributed.comm.CommClosedError("Stream is closed")

        def close(self, timeout: float) -> None:
            pass

    monkeypatch.setattr(distributed.comm, "connect", connect)
    monkeypatch.setattr(distributed, "Client", lambda *_, **__: Broken("cpu"))
    with pytest.raises(UserError, match="the Dask scheduler at 127.0.0.1:1 cannot be reached any more .Stream is"):
        with cluster.opened("dask://127.0.0.1:1", tmp_path):
            pass
    monkeypatch.setattr(
        distributed, "Client", lambda *_, **__: (client := Broken("cpu"), setattr(client, "run", Asked("cpu").run))[0]
    )
    with pytest.raises(UserError, match="cannot be reached any more"):
        with cluster.opened("dask://127.0.0.1:1", tmp_path):
            raise distributed.comm.CommClosedError("Stream is closed")
    with pytest.raises(OSError, match="No space left"):
        with cluster.opened("dask://127.0.0.1:1", tmp_path):
            raise OSError(28, "No space left on device")


def test_a_worker_that_joins_late_and_cannot_import_the_package_ends_the_campaign(
    stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Here):
        """Does what is sent as bytes."""

        def submit(self, fn, /, *args, **kwargs) -> Future:
            assert (fn, [type(a) for a in args]) == (pickle.loads, [bytes])
            with monkeypatch.context() as m:
                m.setitem(sys.modules, "fa.results.worker", None)
                return super().submit(fn, *args, **kwargs)

    config, executor = stores("here").config, cluster.Elsewhere(Late(), worker.Terms(Path("/nowhere")), 1, "cpu")
    with pytest.raises(UserError, match="a worker cannot use fa .ModuleNotFoundError: import of fa.results.worker"):
        campaign.run([config.vary(seed=seed) for seed in range(10)], device="cpu", progress=False, executor=executor)


@pytest.mark.slow
def test_two_of_three_workers_are_killed_and_the_record_is_that_of_a_pool(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("distributed")
    assert cluster_harness.main(["1"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_workers_that_do_not_share_the_store_go_on_from_its_checkpoints(lives: Harness, monkeypatch) -> None:
    """Stopped here, the runs go on there, and come back; a second call finds them finished."""
    lives.folder()
    configs = cluster_harness.small_runs(4)
    real = campaign.train_runs
    with monkeypatch.context() as patch:  # time is up as soon as they have begun
        patch.setattr(campaign, "train_runs", lambda runs, device, until, *more: real(runs, device, 0.0, *more))
        stopped = campaign.run(configs, workers=1, device="cpu", progress=False)
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
    worker.software = lambda: {"fa of code": "0123", "torch": "2.11.0"}


def other_torch() -> None:
    known = worker.software()
    worker.software = lambda: known | {"torch": "1.0"}


def no_data() -> None:
    os.environ["FA_DATA"] = "/nowhere"


def no_fa() -> None:
    sys.modules["fa.results.worker"] = None


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
@pytest.mark.parametrize(
    "prepare, said", [(no_fa, "a worker cannot use fa"), (other_torch, "has torch 1.0, the campa")]
)
def test_a_worker_that_joins_late_and_does_not_fit_ends_the_command(lives: Harness, prepare, said) -> None:
    """It is there when the first run is finished, and would fail all that are left."""
    folder = lives.folder()
    with lives.cluster(places=(0,)) as (address, _, _):
        late = []

        def join() -> None:
            while not list(folder.glob("runs/*/status.json")):
                threading.Event().wait(0.05)
            port, store = int(address.rpartition(":")[2]), str(folder / "late")
            late.append(lives.start(cluster_harness.worker, port, store, True, 0, 1, prepare))

        joining = threading.Thread(target=join, daemon=True)
        joining.start()
        status, out, err, _ = lives.campaign("--executor", address, "--seeds", "40")
        joining.join()
        for process in late:
            process.kill()
            process.join()
    assert status == 2 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("fa: ") and said in err.splitlines()[-1], err[-500:]
    assert 0 < len(list(folder.glob("runs/*/status.json"))) < 240


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
    with executors.Submitted(engine, every=0.1) as pool:
        summary = campaign.run(
            configs, device="cpu", progress=False, executor=cluster.Elsewhere(pool, worker.Terms(store))
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
    log = f"{folder}/build/quick/notebooks/{failed}.log"
    assert re.search(rf"in cell \[\d+\]; all of it is in {log}\n +\| ", out), out
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
