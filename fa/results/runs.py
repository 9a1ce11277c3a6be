"""Campaigns: train the runs that are missing, in several processes, within a time budget; collect what is finished.

A finished run is never trained twice; one that was stopped, or killed, goes on from its checkpoint. The unit of work
is a plain function, :func:`run_one`, which any ``concurrent.futures.Executor`` can call. On the CPU each run has one
process and one thread, so that its numbers do not depend on how many runs are trained at the same time; on CUDA runs
that share a recipe are one network (:mod:`fa.train.stack`).
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fa import experiments
from fa.errors import UserError
from fa.provenance import environment
from fa.results import records
from fa.results.executors import Here, pick_device, pick_workers, processes
from fa.results.progress import Progress, clock, in_words, run_seconds
from fa.results.records import Folder
from fa.train import stack
from fa.train.config import Config
from fa.train.loop import Run, StackDiverged, fingerprint, train_runs
from fa.train.step import can_compile

STACK = 15
"""Runs of a stack: three rules of five seeds.

Fewer would leave a GPU idle, and more finish late, for they end together.
"""

ATTEMPTS = 3  # of a job whose worker dies


@dataclass
class Summary:
    """What a campaign did: numbers of runs finished before, finished now, and left; what failed; wall seconds."""

    before: int
    done: int
    left: int
    failed: list[str]
    seconds: float

    def __str__(self) -> str:
        finished = self.before + self.done
        text = f"{finished} of {finished + self.left} runs are finished, {self.done} of them now"
        return f"{text}, in {clock(self.seconds)}"


def missing(configs: list[Any], mode: str, held: Collection[str] = ()) -> list[Any]:
    """The runs that are neither finished nor among ``held``, runs that a record holds; those that were begun come
    first.
    """
    left = [c for c in configs if not Folder(mode, c).finished and c.run not in held]
    return sorted(left, key=lambda c: not (Folder(mode, c).path / "checkpoint.pt").exists())


def recorded(mode: str = "record") -> set[str]:
    """Identities of the runs that any experiment's record holds."""
    return {run for name in experiments.EXPERIMENTS for run in records.held(name, mode)}


# ------------------------------------------------------------------------------------ the unit of work


def run_one(
    configs: Sequence[Any], mode: str, device: str = "cpu", until: float = math.inf, compiled: bool = False
) -> list[dict[str, Any]]:
    """Train one run, or several as a stack, into their folders. Calling it again goes on where it stopped.

    Args:
        configs: one run, or several with one :func:`fa.train.stack.key`.
        mode: "quick" or "paper", a folder of the run store.
        device: a torch device.
        until: ``time.time()`` at which to have stopped (default: no bound).
        compiled: train through ``torch.compile`` (default False).

    Returns:
        A status for each run. Its ``state`` is "finished" or "diverged", as in the run's ``status.json``; "stopped"
        where time was up; "busy" where another process trains the run; or "failed", with ``error``.

    Raises:
        UserError: from a run that has one, e.g. a damaged checkpoint; after the other runs were trained.
    """
    environment()  # as it is before a long run
    found: dict[str, dict[str, Any]] = {}
    reached: dict[int, list[Folder]] = defaultdict(list)  # only runs with as many epochs behind them can be stacked
    wrong: UserError | None = None
    with ExitStack() as locks:
        for config in configs:
            folder = Folder(mode, config)
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
        for folders in reached.values():
            found |= _train(folders, device, time.monotonic() + (until - time.time()), compiled)
    if wrong:
        raise wrong
    return [found[config.run] for config in configs]


def _train(folders: Sequence[Folder], device: str, until: float, compiled: bool) -> dict[str, dict[str, Any]]:
    """Run -> status; the runs of a stack that fails are trained again, one by one."""
    try:
        if isinstance(folders[0].config, Config):
            tables = train_runs([Run(f.config, f) for f in folders], device, until, compiled)
        else:  # ADAPTER: what is no training (Figure 3's draws, Table 1's probes) names its function in its experiment
            tables = [experiments.find(f.config.experiment).run(f.config) for f in folders]
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, StackDiverged):
            traceback.print_exception(error)
        if len(folders) == 1:
            return {folders[0].config.run: {"state": "failed", "error": f"{type(error).__name__}: {error}"}}
        tables = []  # not retried here, where the exception holds the stack's memory
    found: dict[str, dict[str, Any]] = {}
    for folder in folders if not tables else ():
        found |= _train([folder], device, until, compiled)
    for folder, table in zip(folders, tables):
        if table is not None:
            folder.finish(table, table.attrs["status"])
        found[folder.config.run] = {"state": "stopped"} if table is None else table.attrs["status"]
    return found


# ------------------------------------------------------------------------------------ a campaign


def run(
    configs: list[Any],
    mode: str,
    budget: float | None = None,
    workers: str | int = "auto",
    device: str = "auto",
    progress: bool = True,
    held: Collection[str] = (),
    together: int = 0,
    compiled: bool | None = None,
    executor: Executor | None = None,
) -> Summary:
    """Train the missing runs.

    Args:
        configs: runs, from :func:`fa.experiments.plan`.
        mode: "quick" or "paper", a folder of the run store.
        budget: seconds of wall time after which to have stopped, with checkpoints written (default None: no bound).
        workers: processes; "auto": one for each core, and on CUDA one. A single one is this process itself.
        device: "auto", "cpu" or "cuda".
        progress: show it.
        held: identities of runs that a record holds and that are therefore not trained.
        together: runs of a stack on CUDA (default 0: :data:`STACK`; 1: no stacks). On the CPU every run is trained
            alone.
        compiled: train through ``torch.compile`` (default None: on CUDA where there is a compiler).
        executor: calls :func:`run_one` in place of processes of this machine, e.g. Dask's ``client.get_executor()``;
            all jobs are submitted at once, and ``workers`` does not matter. Its machines must share the run store.

    Raises:
        UserError: from the first run that has one, e.g. a data set that is not there.
    """
    begin = time.time()
    device, todo = pick_device(device), missing(configs, mode, held)
    if compiled is None:
        compiled = device != "cpu" and can_compile(device)
    jobs = stack.groups(todo, 1 if device == "cpu" else together or STACK)
    n = min(pick_workers(workers, device), len(jobs)) if executor is None else len(jobs)
    until = begin + budget if budget else math.inf
    work = partial(run_one, mode=mode, device=device, until=until, compiled=compiled)
    done, failed, deaths = 0, [], Counter()
    waiting, flying = deque(jobs), {}
    with ExitStack() as open_:
        if progress and todo:
            started = f"starting {n} processes ..." if n > 1 and executor is None else ""
            open_.enter_context(Progress([Folder(mode, c) for c in todo], len(configs), started))
        new = (lambda: executor) if executor else Here if n <= 1 else open_.enter_context(processes())
        open_.callback(lambda: [future.cancel() for future in flying])  # of an interrupted campaign
        free = [new() for _ in range(n)]
        while waiting or flying:
            while waiting and free:
                worker, job = free.pop(), waiting.popleft()
                flying[worker.submit(work, job)] = worker, job
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                worker, job = flying.pop(future)
                try:
                    results = future.result()
                except UserError:
                    raise
                except Exception as error:  # not a run's own, which is a status: the worker is lost
                    worker, why = new(), f"{type(error).__name__}: {error}"
                    deaths[job[0].run] += 1
                    results = [{"state": "failed", "error": f"its worker died {ATTEMPTS} times, {why}"}] * len(job)
                    if deaths[job[0].run] < ATTEMPTS:
                        waiting.appendleft(job)
                        sys.stderr.write(f"fa: a worker died ({why}); {in_words(job[0])} is taken up again\n")
                        results = []
                free.append(worker)
                for config, status in zip(job, results):
                    done += status["state"] in ("finished", "diverged")
                    if status["state"] == "failed":
                        failed.append(f"{in_words(config)} ({config.run}): {status['error']}")
    return Summary(len(configs) - len(todo), done, len(todo) - done, failed, time.time() - begin)


def collect(experiment: str, mode: str, configs: list[Any], partial: bool = False) -> Path:
    """Merge the finished runs of an experiment into its record, and write what made it beside.

    A planned run that the run store lacks, because another machine trained it, is taken from the record, or, where
    figures share it, from another experiment's: the figure's that it is named after, or any that holds it.

    Args:
        experiment: a name of ``fa.experiments.EXPERIMENTS``.
        mode: "quick" writes build/quick, "paper" data/records.
        configs: all planned runs.
        partial: write the table although runs are missing; it is marked, and figures made from it say so.

    Raises:
        UserError: runs are missing and ``partial`` is not set, or none is finished; or "paper" and the record holds
            runs of the figure that ``configs`` leaves out, which would be lost.
    """
    planned = {c.run for c in experiments.plan(experiment, mode)} if mode == "paper" else set()
    if lost := planned & records.held(experiment, mode) - {c.run for c in configs}:
        raise UserError(
            f"the record of {experiment} holds {len(lost)} runs of the figure that these settings leave out; "
            "collect it without --rules and --seeds"
        )
    swept = experiments.find(experiment).swept
    folders = [f for f in (Folder(mode, c) for c in configs) if f.finished]
    tables = [f.table(swept(f.config)) for f in folders]
    status = {f.config.run: f.status for f in folders}
    environments = {
        json.dumps(e, sort_keys=True) for s in status.values() for e in (s.pop("environment"), *s.pop("earlier", []))
    }
    lacking = [c for c in configs if c.run not in status]
    for name in (
        dict.fromkeys((experiment, *(c.experiment for c in lacking), *experiments.EXPERIMENTS)) if lacking else ()
    ):
        stays = [c for c in lacking if c.run not in status and c.run in records.held(name, mode)]
        if not stays:
            continue
        before, table = records.sidecar(name, mode), records.read(name, mode)
        for c in stays:  # its rows are the same in every figure, the swept columns are each figure's own
            rows = table[table.run == c.run].drop(columns=list(experiments.find(name).swept(c)))
            tables.append(rows.assign(**swept(c)))
        status |= {c.run: before["status"][c.run] for c in stays}
        environments |= {json.dumps(e, sort_keys=True) for e in before["environments"]}
    done = [c for c in configs if c.run in status]
    if not done or (len(done) < len(configs) and not partial):
        remedy = "" if not done else ", or collect with --partial what there is"
        raise UserError(
            f"{len(done)} of {len(configs)} runs of {experiment} are finished; "
            f"go on with: python -m fa run {experiment} --mode {mode}{remedy}"
        )
    about = {
        "experiment": experiment,
        "mode": mode,
        "partial": len(done) < len(configs),
        "planned": len(configs),
        "finished": len(done),
        "configs": {c.run: asdict(c) for c in done},
        "status": status,
        "environments": [json.loads(e) for e in sorted(environments)],
        "fingerprints": fingerprints(done),
        "wall_seconds": round(sum(map(run_seconds, status.values())), 1),
    }
    return records.write(experiment, mode, pd.concat(tables), about)


def fingerprints(configs: list[Any]) -> dict[str, list[str]]:
    """Run -> fingerprint, for one seed of every recipe: see :func:`fa.train.loop.fingerprint`."""
    first: dict[Any, Any] = {}
    for config in configs:
        if isinstance(config, Config):
            first.setdefault(replace(config, seed=0), config)
    return {config.run: fingerprint(config) for config in first.values()}
