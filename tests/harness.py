"""A process that is killed, or whose disk is full, at a chosen moment of a campaign; for tests/test_kill.py.

``python tests/harness.py [N]`` kills a campaign at each of its writes, N times at random moments (default 50), and N/5
times two campaigns on one store; then it fills the disk at each write. It prints what became of each.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOAD = [
    "fa.__main__",
    "fa.experiments",
    "fa.results.records",
    "fa.results.runs",
    "sklearn.datasets",
    "torch._dynamo",
    "pytest",  # the tests' own main module, which a child imports
]
GRID = ["p3_fig2", "--seeds", "1"]
LIFE = [  # two calls of fa run, each with its merge; the second one goes on in the record of the first
    ["run", *GRID, "--rules", "bp", "--workers", "1", "--device", "cpu"],
    ["collect", *GRID, "--rules", "bp", "--partial"],
    ["run", *GRID, "--workers", "1", "--device", "cpu"],
    ["collect", *GRID],
]
OPERATIONS = ("fsync", "replace", "unlink")  # of a write: what happens between them no reader can see


def victim(folder: str, place: int, after: float, full: bool, out: str) -> None:
    """Live a life in ``folder``: in a process of its own, whose record is of two small runs.

    Args:
        folder: holds the run store, the records, and what this process says.
        place: number of the operation on the disk, from 1, at which it is killed or the disk is full (0: none).
        after: seconds after which it is killed (0: never).
        full: the disk is full from ``place`` on, in place of a kill.
        out: name of the file for stdout and stderr.
    """
    root = Path(folder)
    os.environ.update(FA_RUNS=str(root / "runs"), FA_BUILD=str(root / "build"))
    with open(root / out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    from fa import __main__ as command
    from fa import experiments
    from fa.results import records, registered
    from fa.results.store import RunFolder
    from fa.train import loop, step

    planned, begin = experiments.plan, step.Stepper.begin

    def plan(name: str, mode: str, seeds: int = 0, epochs: int = 0, rules: str = "", dataset: str = "") -> list:
        configs = planned(name, "quick", seeds=1, epochs=2, rules=rules or "bp,pfa")
        return [c.vary(hidden="16,16") for c in configs]

    def trained_once(self: step.Stepper, epoch: int) -> None:
        assert not RunFolder(self.config).finished, f"{self.config.rule} is trained twice"
        begin(self, epoch)

    count, lock = itertools.count(1), threading.Lock()

    def hit(name: str) -> None:
        with lock:
            now = next(count)
        if place and (now == place or full and now > place):
            if not full:
                os.kill(os.getpid(), signal.SIGKILL)
            if name != "unlink":  # a full disk still removes
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def patched(name: str):
        real = getattr(os, name)

        def operation(*args, **kwargs):
            hit(name)
            return real(*args, **kwargs)

        return operation

    loop.CHECKPOINT_EVERY = 0.0  # after every epoch
    experiments.plan, step.Stepper.begin = plan, trained_once
    records.ROOT = registered.ROOT = root
    for name in OPERATIONS:
        setattr(os, name, patched(name))
    if after:
        threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    since = time.monotonic()
    status = next((s for s in map(command.main, LIFE) if s), 0)
    sys.stdout.flush()
    (root / f"{out}.told").write_text(f"{next(count) - 1} {time.monotonic() - since}")
    os._exit(status)


class Harness:
    """Lives in folders below ``where``, held against one that nobody disturbs."""

    def __init__(self, where: Path) -> None:
        self.where, self.numbers = where, itertools.count()
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.whole = self.new()
        assert self.end(self.start(self.whole)) == 0, (self.whole / "said").read_text()
        operations, seconds = (self.whole / "said.told").read_text().split()
        self.operations, self.seconds = int(operations), float(seconds)

    def new(self) -> Path:
        """A folder for a life."""
        folder = self.where / str(next(self.numbers))
        folder.mkdir()
        return folder

    def start(
        self, folder: Path, place: int = 0, after: float = 0, full: bool = False, out: str = "said"
    ) -> BaseProcess:
        """Start a process; see :func:`victim`."""
        process = self.context.Process(target=victim, args=(str(folder), place, after, full, out))
        process.start()
        return process

    def end(self, process: BaseProcess) -> int:
        """Its exit status; negative: the signal that killed it."""
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    def goes_on(self, folder: Path) -> str:
        """Live again, undisturbed, in a folder where a life was cut short; returns what is wrong with its end."""
        status = self.end(self.start(folder))
        said = (folder / "said").read_text()
        if status:
            return f"status {status}: {said}"
        if "Traceback" in said:
            return said
        here, there = (self.record(f) for f in (folder, self.whole))
        left = [p.name for p in folder.rglob(".*") if p.name.endswith((".part", ".new"))]
        wrong = [name for name in there if here.get(name) != there[name]]
        return ", ".join([f"another {name}" for name in wrong] + [f"{name} is left" for name in left])

    @staticmethod
    def record(folder: Path) -> dict[str, object]:
        """What must not depend on what happened on the way."""
        record = folder / "data" / "records" / "p3_fig2.csv"
        about = json.loads(record.with_suffix(".json").read_text())
        tables = {p.parent.name: p.read_bytes() for p in sorted(folder.glob("runs/*/metrics.csv"))}
        names = ("claims", "configs", "fingerprints", "planned", "finished", "partial", "sha256", "environments")
        states = {run: status["state"] for run, status in about["status"].items()}
        return {"record": record.read_bytes(), "states": states, **tables, **{name: about[name] for name in names}}

    def killed_at(self, place: int) -> str:
        """What is wrong after a kill at an operation on the disk."""
        folder = self.new()
        status = self.end(self.start(folder, place))
        return self.goes_on(folder) if status == -signal.SIGKILL else f"it was not killed, status {status}"

    def killed_after(self, *seconds: float) -> str:
        """What is wrong after kills at these moments, of so many processes on one store."""
        folder = self.new()
        processes = [self.start(folder, after=s, out=f"said{i}") for i, s in enumerate(seconds)]
        statuses = [self.end(process) for process in processes]
        said = "".join((folder / f"said{i}").read_text() for i in range(len(seconds)))
        fine = {0, 2, -signal.SIGKILL} | ({1} if "being trained by another process" in said else set())
        if "Traceback" in said or not set(statuses) <= fine:
            return f"status {statuses}: {said}"
        return self.goes_on(folder)

    def full_at(self, place: int) -> str:
        """What is wrong with a campaign whose disk is full from an operation on, and after it has room again."""
        folder = self.new()
        status, said = self.end(self.start(folder, place, full=True)), (folder / "said").read_text()
        told = [line for line in said.splitlines() if "No space left on device" in line]
        if status != 2 or len(told) != 1 or "Traceback" in said:
            return f"status {status}: {said}"
        return self.goes_on(folder)

    def moments(self, n: int, seed: int = 0) -> Iterator[float]:
        """Random moments of a life."""
        rng = random.Random(seed)
        return (rng.uniform(0.01, self.seconds) for _ in range(n))


@contextmanager
def harness() -> Iterator[Harness]:
    """A harness in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="fa-kill-") as folder:
        yield Harness(Path(folder))


def main(arguments: Sequence[str]) -> int:
    """Run everything; returns the exit status."""
    n, failed = int(arguments[0]) if arguments else 50, 0
    with harness() as h:
        moments, pairs = list(h.moments(n)), list(h.moments(2 * (n // 5), seed=1))
        trials = [
            (f"killed at each of {h.operations} operations on the disk", h.killed_at, [(k,) for k in range(1, h.operations + 1)]),
            (f"killed at {n} random moments", h.killed_after, [(m,) for m in moments]),
            (f"two processes on one store, both killed, {n // 5} times", h.killed_after, list(zip(pairs[::2], pairs[1::2]))),
            ("disk full from each operation on", h.full_at, [(k,) for k in range(1, h.operations + 1)]),
        ]  # fmt: skip
        for what, trial, cases in trials:
            wrong = {case: said for case in cases if (said := trial(*case)) and "not killed, status 0" not in said}
            print(f"{what}: {len(cases) - len(wrong)} of {len(cases)} end with the record of an undisturbed run")
            for case, said in wrong.items():
                print(f"  {case}: {said}")
            failed += len(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
