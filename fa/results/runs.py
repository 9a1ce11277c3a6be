"""Campaigns: train the runs that are missing, in several processes, within a time budget.

A finished run is never trained twice; one that was stopped, or killed, goes on from its checkpoint. The unit of work
is a plain function, :func:`run_one`, which any ``concurrent.futures.Executor`` can call, on other machines too
(:mod:`fa.results.cluster`). On the CPU each run has one process and one thread, so that its numbers do not depend on
how many runs are trained at the same time; on CUDA runs that share a recipe are one network (:mod:`fa.train.stack`).
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from fa.errors import UserError
from fa.provenance import environment
from fa.results.cluster import Elsewhere
from fa.results.executors import Here, each, pick_device, pick_workers, processes
from fa.results.progress import Progress, clock, in_words
from fa.results.store import RunFolder
from fa.train import stack
from fa.train.config import Config
from fa.train.ddp import ONE_PROCESS, Ranks, lost
from fa.train.loop import Run, StackDiverged, train_runs
from fa.train.step import can_compile, numerics

STACK = 15
"""Runs of a stack: three rules of five seeds.

Fewer would leave a GPU idle, and more finish late, for they end together.
"""

ATTEMPTS = 3  # of a job whose worker dies


@dataclass
class Summary:
    """What a campaign did: numbers of runs finished before, finished now, and left; what failed; wall seconds; how many
    of those left another process is training."""

    before: int
    done: int
    left: int
    failed: list[str]
    seconds: float
    busy: int = 0

    def __str__(self) -> str:
        finished = self.before + self.done
        text = f"{finished} of {finished + self.left} runs are finished, {self.done} of them now"
        are = "is" if self.busy == 1 else "are"
        text += f", {self.busy} {are} being trained by another process" if self.busy else ""
        return f"{text}, in {clock(self.seconds)}"


def missing(configs: list[Any]) -> list[Any]:
    """The runs that are not finished; those that were begun come first."""
    left = [c for c in configs if not RunFolder(c).finished]
    return sorted(left, key=lambda c: not RunFolder(c).begun)


# ------------------------------------------------------------------------------------ the unit of work


def run_one(
    configs: Sequence[Any],
    device: str = "cpu",
    until: float = math.inf,
    compiled: bool = False,
    ranks: Ranks = ONE_PROCESS,
) -> list[dict[str, Any]]:
    """Train one run, or several as a stack, into their folders. Calling it again goes on where it stopped.

    Args:
        configs: one run, or several with one :func:`fa.train.stack.key`.
        device: a torch device.
        until: ``time.time()`` at which to have stopped (default: no bound).
        compiled: train through ``torch.compile`` (default False).
        ranks: the processes that train one run together, of which this is rank 0 (:mod:`fa.train.ddp`).

    Returns:
        A status for each run. Its ``state`` is "finished" or "diverged", as in the run's ``status.json``; "stopped"
        where time was up, "waiting" where it was up before the run was taken up; "busy" where another process trains
        the run; or "failed", with ``error``.

    Raises:
        UserError: from a run that has one, e.g. a damaged checkpoint; after the other runs were trained.
    """
    if time.time() >= until:
        return [{"state": "waiting"}] * len(configs)
    environment()  # as it is before a long run
    found: dict[str, dict[str, Any]] = {}
    reached: dict[int, list[RunFolder]] = defaultdict(list)  # only runs with as many epochs behind them can be stacked
    wrong: UserError | None = None
    with ExitStack() as locks:
        for config in configs:
            folder = RunFolder(config)
            if not locks.enter_context(folder.lock()):
                found[config.run] = {"state": "busy"}
            elif folder.finished:
                found[config.run] = folder.status
            else:
                try:
                    checkpoint = folder.checkpoint() if len(configs) > 1 else None
                    reached[checkpoint["epoch"] if checkpoint else 0].append(folder)
                except UserError as error:
                    wrong = error
        until = time.monotonic() + (until - time.time())
        waiting = deque(reached.values())
        while waiting:
            folders, tables = waiting.popleft(), []
            try:
                if isinstance(folders[0].config, Config):
                    tables = train_runs([Run(f.config, f) for f in folders], device, until, compiled, None, ranks)
                else:  # it has no checkpoints: it is begun in time, or not
                    tables = [drawn(f.config) if time.monotonic() < until else None for f in folders]
            except UserError:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                if not isinstance(error, StackDiverged) and not lost(error):
                    traceback.print_exception(error)
                if ranks.size > 1:  # the other ranks are in the middle of that run
                    told = f"run {folders[0].config.run} lost a rank ({why.partition(chr(10))[0]})"
                    raise UserError(f"{told}; call again to go on with it") from error
                if len(folders) == 1:
                    found[folders[0].config.run] = {"state": "failed", "error": why}
                else:  # the runs of a stack that fails are trained again, one by one
                    waiting.extend([folder] for folder in folders)
            for folder, table in zip(folders, tables):
                if table is not None:
                    folder.finish(table, table.attrs["status"])
                found[folder.config.run] = {"state": "stopped"} if table is None else table.attrs["status"]
    if wrong:
        raise wrong
    return [found[config.run] for config in configs]


def drawn(config: Any) -> pd.DataFrame:
    """The table of a run whose recipe makes it itself, in one thread, from the weights of the runs that it needs, if
    any, or from their tables where they keep no weights."""
    begin, needed = time.monotonic(), map(RunFolder, getattr(config, "needs", ()))
    with numerics("cpu"):
        table = config.table(*(f.weights() if getattr(f.config, "keep", False) else f.table() for f in needed))
    status = {"state": "finished", **table.attrs.get("status", {}), "seconds": round(time.monotonic() - begin, 1)}
    table.attrs["status"] = status
    return table


# ------------------------------------------------------------------------------------ a campaign


def run(
    configs: list[Any],
    budget: float | None = None,
    workers: str | int = "auto",
    device: str = "auto",
    progress: bool = True,
    together: int = 0,
    compiled: bool | None = None,
    executor: Elsewhere | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Summary:
    """Train the missing runs, and before them those whose weights they need (``needs`` of a run's recipe).

    Args:
        configs: runs, from :func:`fa.experiments.plan`.
        budget: seconds of wall time after which to have stopped, with checkpoints written (default None: no bound).
        workers: processes; "auto": one for each core, and on CUDA one. A single one is this process itself.
        device: "auto", "cpu" or "cuda".
        progress: show it.
        together: runs of a stack on CUDA (default 0: :data:`STACK`; 1: no stacks). On the CPU every run is trained
            alone.
        compiled: train through ``torch.compile`` (default None: on CUDA where there is a compiler).
        executor: calls :func:`run_one` in place of processes of this machine, see :func:`fa.results.cluster.opened`;
            all jobs are submitted at once, and ``workers`` does not matter.
        ranks: the processes that train one run at a time together, of which this is rank 0 (:mod:`fa.train.ddp`).

    Raises:
        UserError: from the first run that has one, e.g. a data set that is not there; or a rank is gone.
    """
    begin = time.time()
    until = begin + budget if budget else math.inf
    device, todo = pick_device(device, needed=executor is None), missing(configs)
    ranks.check(todo)
    if needed := missing(list({c.run: c for config in todo for c in getattr(config, "needs", ())}.values())):
        first = run(needed, budget, workers, device, progress, together, compiled, executor, ranks)
        if first.left:
            left = len(missing(configs))  # some of them may be needed by others of them
            done = len(todo) - left
            return Summary(len(configs) - len(todo), done, left, first.failed, first.seconds, first.busy)
    if compiled and executor is None and not can_compile(device):
        raise UserError("torch.compile finds no compiler on this machine; install one (g++), or leave --compile out")
    if compiled is None:
        compiled = device != "cpu" and can_compile(device)
    jobs = stack.groups(todo, 1 if device == "cpu" or ranks.size > 1 else together or STACK)
    if waiting := len(todo) if executor is None and time.time() >= until else 0:
        jobs = []  # no process is started for them
    workers = 1 if ranks.size > 1 else workers
    n = min(pick_workers(workers, device), len(jobs)) if executor is None else len(jobs)
    work = partial(run_one, device=device, until=until, compiled=compiled, ranks=ranks)
    done, busy, failed, attempts = 0, 0, [], executor.attempts if executor else ATTEMPTS
    with ExitStack() as open_:
        if progress and jobs:
            started = f"starting {n} processes ..." if n > 1 and executor is None else ""
            open_.enter_context(Progress([RunFolder(c) for c in todo], len(configs), started))
        new = (lambda: executor) if executor else Here if n <= 1 else open_.enter_context(processes())
        bound = (until, executor.waits) if executor else ()
        ended = open_.enter_context(closing(each(work, jobs, new, n, attempts, _taken_up, *bound)))
        for job, results, why in ended:
            if results and executor:
                results = executor.receive(results)
            elif not (results or why):
                results = [{"state": "waiting"}] * len(job)
            results = results or [{"state": "failed", "error": f"its worker died {attempts} times: {why}"}] * len(job)
            for config, status in zip(job, results):
                done += status["state"] in ("finished", "diverged")
                busy += status["state"] == "busy"
                waiting += status["state"] == "waiting"
                if status["state"] == "failed":
                    failed.append(f"{in_words(config)} ({config.run}): {status['error']}")
    if waiting:
        which = f"{waiting} of the {len(todo)} runs" if waiting < len(todo) else "any run"
        remedy = "" if waiting < len(todo) else "; the next call needs a longer budget"
        sys.stderr.write(f"fa: time was up before {which} began{remedy}\n")
    return Summary(len(configs) - len(todo), done, len(todo) - done, failed, time.time() - begin, busy)


def _taken_up(job: Sequence[Any], why: str) -> None:
    sys.stderr.write(f"fa: the worker process of {in_words(job[0])} ended ({why}); another one takes the run up\n")
