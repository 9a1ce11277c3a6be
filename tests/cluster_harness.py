"""A Dask scheduler and its workers as processes of this machine, workers killed at chosen moments; for
tests/test_cluster.py.

``python tests/cluster_harness.py [N]`` trains 24 runs on three workers, kills two of them at random moments, one while
it writes, and holds the record against that of processes that nobody disturbs: N times (default 20) with workers that
share the run store, and N times with workers that do not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOAD = ["distributed", "fa.__main__", "fa.experiments", "fa.results.records", "fa.results.runs", "sklearn.datasets"]
GRID = ["p3_fig2", "--mode", "quick", "--seeds", "4"]
N_RUNS = 24


def scheduler(port: int) -> None:
    """Serve as a scheduler on a port of the loopback, until killed."""
    from distributed import Scheduler

    logging.getLogger("distributed").setLevel(logging.CRITICAL)

    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", port=port, dashboard=False) as served:
            await served.finished()

    asyncio.run(serve())


def worker(port: int, store: str, shares: bool, place: int, threads: int, prepare: Callable[[], None] | None) -> None:
    """Serve as a worker, until killed.

    Args:
        port: of the scheduler.
        store: the worker's own run store.
        shares: whether it sees the campaign's mark, and so shares the campaign's store.
        place: number of the operation on the disk, from 1, at which it is killed (0: none).
        threads: in which it does jobs.
        prepare: called first, e.g. to make it another version.
    """
    from distributed import Worker

    from fa.results import worker as served_by
    from fa.train import loop

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    os.environ.update(FA_RUNS=store)
    loop.CHECKPOINT_EVERY = 0.0  # after every epoch
    if not shares:
        served_by.Terms.shared = property(lambda terms: False)
    if prepare:
        prepare()
    count, lock = itertools.count(1), threading.Lock()

    def patched(name: str) -> None:
        real = getattr(os, name)

        def operation(*args, **kwargs):
            with lock:
                if next(count) == place:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, operation)

    async def serve() -> None:
        async with Worker(
            f"tcp://127.0.0.1:{port}", nthreads=threads, dashboard=False, local_directory=store
        ) as served:
            for name in ("fsync", "replace", "unlink") if place else ():
                patched(name)
            await served.finished()

    asyncio.run(serve())


class Harness:
    """Campaigns in folders below ``where``, held against one of this machine's own processes."""

    def __init__(self, where: Path) -> None:
        self.where, self.numbers = where, itertools.count()
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def start(self, target: Callable[..., None], *args: object) -> BaseProcess:
        """A process that ends with this one."""
        process = self.context.Process(target=target, args=args, daemon=True)
        process.start()
        return process

    @contextmanager
    def cluster(
        self, shares: bool = True, places: Sequence[int] = (0, 0, 0), threads: int = 1,
        prepare: Callable[[], None] | None = None,
    ) -> Iterator[tuple[str, BaseProcess, list[BaseProcess]]]:  # fmt: skip
        """Yields the address of a scheduler, its process, and those of its workers."""
        port, own = free_port(), self.where / f"workers{next(self.numbers)}"
        served = self.start(scheduler, port)
        workers = [
            self.start(worker, port, str(own / str(i)), shares, p, threads, prepare) for i, p in enumerate(places)
        ]
        try:
            from distributed import Client

            with Client(f"tcp://127.0.0.1:{port}", timeout=60, set_as_default=False) as client:
                client.wait_for_workers(len(places), timeout=60)
            yield f"dask://127.0.0.1:{port}", served, workers
        finally:
            for process in [*workers, served]:
                process.kill()
                process.join()

    def folder(self) -> Path:
        """For a campaign: its run store and its record."""
        made = self.where / str(next(self.numbers))
        made.mkdir()
        os.environ.update(FA_RUNS=str(made / "runs"), FA_BUILD=str(made / "build"))
        return made

    def campaign(self, *options: str) -> tuple[int, str, str, float]:
        """``fa run`` in this process: its exit status, what it said on both streams, and its seconds."""
        out, err, begin = StringIO(), StringIO(), time.monotonic()
        with redirect_stdout(out), redirect_stderr(err), tiny():
            from fa.__main__ import main

            status = main(["run", *GRID, "--device", "cpu", *options])
        return status, out.getvalue(), err.getvalue(), time.monotonic() - begin

    def record(self, folder: Path) -> dict[str, object]:
        """What must not depend on where the runs were trained."""
        from fa import experiments
        from fa.results import records

        with tiny():
            path, _ = records.collect("p3_fig2", "quick", experiments.plan("p3_fig2", "quick", seeds=4))
        about = json.loads(path.with_suffix(".json").read_text())
        tables = {p.parent.name: p.read_bytes() for p in sorted(folder.glob("runs/*/metrics.csv"))}
        names = ("configs", "fingerprints", "planned", "finished", "partial", "sha256", "environments")
        states = {run: status["state"] for run, status in about["status"].items()}
        return {"record": path.read_bytes(), "states": states, **tables, **{name: about[name] for name in names}}

    def undisturbed(self) -> tuple[dict[str, object], float]:
        """The record of this machine's own processes, and the seconds of a cluster whose workers live."""
        folder = self.folder()
        status, _, err, _ = self.campaign("--workers", "2")
        assert status == 0, err
        whole = self.record(folder)
        self.folder()
        with self.cluster() as (address, _, _):
            status, _, err, seconds = self.campaign("--executor", address)
        assert status == 0, err
        return whole, seconds

    def killed(self, shares: bool, place: int, moment: float, whole: dict[str, object]) -> str:
        """What is wrong with a campaign whose first worker is killed at an operation on the disk, and its second one
        after ``moment`` seconds."""
        folder = self.folder()
        with self.cluster(shares, (place, 0, 0)) as (address, _, workers):
            timer = threading.Timer(moment, workers[1].kill)
            timer.start()
            status, out, err, _ = self.campaign("--executor", address)
            late = timer.is_alive()
            timer.join()
            ends = [w.exitcode for w in workers]
        wanted = f"{N_RUNS} of {N_RUNS} runs are finished, {N_RUNS} of them now"
        if status or not out.startswith(wanted) or "Traceback" in err:
            return f"status {status}: {out}{err}"
        if late and moment > 1:  # this campaign was over sooner than the undisturbed one
            return self.killed(shares, place, moment / 2, whole)
        if ends[0] != -signal.SIGKILL or late:
            return f"a worker was not killed before the end: {ends}"
        found = self.record(folder)
        wrong = [f"another {name}" for name in whole if found.get(name) != whole[name]]
        return ", ".join(wrong + [f"{p.name} is left" for p in folder.rglob(".*") if p.suffix in (".part", ".shared")])


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def tiny() -> Iterator[None]:
    """Within the block the runs of a plan are small."""
    from fa import experiments

    planned = experiments.plan
    experiments.plan = lambda *a, **k: [c.vary(hidden="16,16", epochs=2) for c in planned(*a, **k)]
    try:
        yield
    finally:
        experiments.plan = planned


def small_runs(n: int) -> list:
    """The first runs of the campaign."""
    from fa import experiments

    with tiny():
        return experiments.plan("p3_fig2", "quick", seeds=4)[:n]


@contextmanager
def harness() -> Iterator[Harness]:
    """A harness in a temporary folder."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="fa-cluster-") as folder:
        try:
            yield Harness(Path(folder))
        finally:
            os.environ.clear()
            os.environ.update(before)


def main(arguments: Sequence[str]) -> int:
    """Run everything; returns the exit status."""
    n, failed = int(arguments[0]) if arguments else 20, 0
    with harness() as h:
        whole, seconds = h.undisturbed()
        for shares in (True, False):
            rng, wrong = random.Random(shares), {}
            for _ in range(n):
                case = rng.randint(1, 100), round(rng.uniform(0.05, 0.7 * seconds), 2)
                if said := h.killed(shares, *case, whole):
                    wrong[case] = said
            how = "share the run store" if shares else "have stores of their own"
            print(
                f"two of three workers killed, which {how}: {n - len(wrong)} of {n} end with the record of a pool",
                flush=True,
            )
            for case, said in wrong.items():
                print(f"  {case}: {said}")
            failed += len(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
