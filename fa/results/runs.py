"""Campaigns: train the runs that are missing, in several processes, within a time budget; collect what is finished.

A finished run is never trained twice; one that was stopped, or killed, goes on from its checkpoint. On the CPU each run has one process
and one thread, so that its numbers do not depend on how many run beside it; on CUDA a process trains several at once, those that share a
recipe as one network (:mod:`fa.train.stack`), the others by taking their steps in turn.
"""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import queue
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fa import experiments
from fa.errors import UserError
from fa.results import records
from fa.results.records import Folder
from fa.train import data, stack
from fa.train import step as engine
from fa.train.config import Config
from fa.train.loop import Apart, Member, fingerprint, running, train
from fa.train.step import can_compile

PACK = 15
"""Runs that a process on CUDA trains at once, stacked or in turn: they end together, so that fewer would leave the device idle and more
finish late. 15 are three rules of five seeds."""


@dataclass
class Summary:
    """What a campaign did: numbers of runs finished before, finished now, and left; what failed; wall seconds."""

    before: int
    done: int
    left: int
    failed: list[str]
    seconds: float

    def __str__(self) -> str:
        text = f"{self.before + self.done} of {self.before + self.done + self.left} runs are finished, {self.done} of them now"
        return f"{text}, in {clock(self.seconds)}"


def clock(seconds: float) -> str:
    """ "1h02m", "3m05s", "7s"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


def seconds(text: str) -> float:
    """``"90"``, ``"90s"``, ``"9m"``, ``"1.5h"`` as seconds.

    Raises:
        UserError: anything else.
    """
    try:
        value = float(text.rstrip("smh")) * {"m": 60, "h": 3600}.get(text[-1:], 1)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise UserError(f"a time is written 90s, 9m or 1.5h, not {text!r}")
    return value


def pick_device(device: str) -> str:
    """ "auto" as "cuda" where there is one, else "cpu"; a device that is not there raises."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} is not there; use device='cpu' or 'auto'")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {device!r}; known devices: auto, cpu, cuda")
    return device


def pick_workers(workers: str | int, device: str = "cpu") -> int:
    """ "auto" as ``$FA_WORKERS``, or else the number of processors that this process may use, and on CUDA one."""
    if workers == "auto" and device != "cpu":
        workers = 1
    if workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = os.environ.get("FA_WORKERS") or cores or 1
    try:
        n = int(workers)
    except ValueError:
        n = 0
    if n < 1:
        raise UserError(f"workers={workers!r} is not a positive number or 'auto'")
    return n


def missing(configs: list[Any], mode: str, held: Collection[str] = ()) -> list[Any]:
    """The runs that are neither finished nor among ``held``, runs that a record holds; those that were begun come first."""
    left = [c for c in configs if not Folder(mode, c).finished and c.run not in held]
    return sorted(left, key=lambda c: not (Folder(mode, c).path / "checkpoint.pt").exists())


def recorded(mode: str = "record") -> set[str]:
    """Identities of the runs that any experiment's record holds."""
    return {run for name in experiments.EXPERIMENTS for run in records.held(name, mode)}


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
) -> Summary:
    """Train the missing runs.

    Args:
        configs: runs, from :func:`fa.experiments.plan`.
        mode: "quick" or "paper", a folder of the run store.
        budget: seconds of wall time after which to have stopped, with checkpoints written (default None: no bound).
        workers: processes; "auto": one for each core, and on CUDA one.
        device: "auto", "cpu" or "cuda".
        progress: show it.
        held: identities of runs that a record holds and that are therefore not trained.
        together: runs that a process trains at once (default 0: one on the CPU, :data:`PACK` on CUDA).
        compiled: train through ``torch.compile`` (default None: on CUDA where there is a compiler).

    Raises:
        UserError: from the first run that has one, e.g. a data set that is not there.
    """
    begin = time.monotonic()
    device, todo = pick_device(device), missing(configs, mode, held)
    n = min(pick_workers(workers, device), len(todo))
    if compiled is None:
        compiled = device != "cpu" and can_compile(device)
    if device != "cpu":  # what can be stacked comes together, and first
        keys = list(dict.fromkeys(map(_stack, todo)))
        todo.sort(key=lambda config: (_stack(config) is None, keys.index(_stack(config))))
    packs = pack(todo, together or (1 if device == "cpu" else PACK))
    until = begin + budget if budget else float("inf")
    before = len(configs) - len(todo)
    bar = Progress(f"{configs[0].experiment} {mode}", before, len(configs), todo) if progress and todo else None
    done, failed = 0, []

    def on(kind: str, config: Any, detail: Any) -> None:
        nonlocal done
        if kind == "error":
            raise UserError(detail)
        done += kind == "done"
        if kind == "failed":
            failed.append(f"{config.rule} seed {config.seed} ({config.run}): {detail}")
        if bar:
            bar.event(kind, config, detail)

    try:
        if n > 1:
            _crew(packs, mode, device, until, compiled, n, on)
        else:
            for configs in packs:
                _train(configs, mode, device, until, compiled, on)
    finally:
        if bar:
            bar.close()
    return Summary(before, done, len(todo) - done, failed, time.monotonic() - begin)


def forecast(
    todo: list[Any], mode: str, budget: float | None = None, workers: str | int = "auto", device: str = "auto"
) -> str:
    """How long the missing runs will take, as those of the run store did on such a device, and in how many calls of ``budget`` seconds.

    An epoch counts as long as one of the same rule, network and data did on average, whatever the figure.
    """
    device = pick_device(device)
    spent: dict[Any, list[float]] = {}
    for path in (records.runs_root() / mode).glob("*/*/status.json"):
        status, config = json.loads(path.read_text()), json.loads((path.parent / "config.json").read_text())
        on_gpu = bool(status["environment"]["gpu"])
        if status["state"] == "finished" and on_gpu == (device != "cpu") and "earlier" not in status:
            per_epoch = _share(status) / config.get("epochs", 1)
            spent.setdefault(_kind(config), []).append(per_epoch)
    unknown = [c for c in todo if _kind(asdict(c)) not in spent]
    total = sum(getattr(c, "epochs", 1) * statistics.fmean(spent[_kind(asdict(c))]) for c in todo if c not in unknown)
    total /= min(pick_workers(workers, device), max(len(todo), 1))
    text = (
        f"about {clock(total)} by the finished runs of their kind"
        if len(unknown) < len(todo)
        else "nothing like them has been trained here yet"
    )
    if unknown and len(unknown) < len(todo):
        text += f", and {len(unknown)} runs of a kind that has not been trained here yet"
    calls = f"; {math.ceil(total / budget)} calls of {clock(budget)}" if budget and not unknown else ""
    return f"{text}{calls}" if todo else "nothing is left to train"


def _share(status: dict[str, Any]) -> float:
    """Seconds of a finished run, where others were trained at once its part of them; statuses of old say how many there were."""
    return status.get("share", status["seconds"] / status.get("together", 1))


def _kind(config: dict[str, Any]) -> tuple[Any, ...]:
    """What the time of an epoch depends on, roughly; sparse feedback costs more than dense."""
    options, precision = config.get("options", ""), config.get("precision", "float32")
    network = (config.get(k) for k in ("rule", "model", "dataset", "hidden"))
    return *network, precision, "density" in options, "implicit" in options


def pack(todo: list[Any], together: int) -> list[list[Any]]:
    """The runs in packs of at most ``together``, in order; what is not trained by :func:`fa.train.loop.train` is a pack of its own, and so is
    a stack."""
    packs: list[list[Any]] = []
    for config in todo:
        trained, last = experiments.find(config.experiment).run is train, packs[-1][-1] if packs else None
        fits = last is not None and experiments.find(last.experiment).run is train and _stack(last) == _stack(config)
        if trained and fits and len(packs[-1]) < together:
            packs[-1].append(config)
        else:
            packs.append([config])
    return packs


def _stack(config: Any) -> Config | None:
    """What runs have in common that can be one stack; None for a run that cannot be in one."""
    return stack.key(config) if isinstance(config, Config) else None


def _crew(
    packs: list[list[Any]], mode: str, device: str, until: float, compiled: bool, n: int, on: Callable[..., None]
) -> None:
    """Train in ``n`` processes; ``on`` hears of events as they happen."""
    context = multiprocessing.get_context("spawn")
    tasks, events = context.SimpleQueue(), context.Queue()
    for task in [*packs, *[None] * n]:
        tasks.put(task)
    crew = [
        context.Process(target=_work, args=(tasks, events, mode, device, until, compiled), daemon=True)
        for _ in range(n)
    ]
    for process in crew:
        process.start()
    open_runs = sum(map(len, packs))
    try:
        while open_runs:
            try:
                event = events.get(timeout=5)
            except queue.Empty:
                if not any(p.is_alive() for p in crew):
                    raise RuntimeError(
                        "every worker process died; the runs go on from their checkpoints when started again"
                    ) from None
                continue
            open_runs -= event[0] != "epoch"
            on(*event)
    finally:
        for process in crew:
            process.terminate()
            process.join()


def _work(tasks: Any, events: Any, mode: str, device: str, until: float, compiled: bool) -> None:
    def follow() -> None:  # a killed parent must not leave workers behind that train on, unseen
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    while (configs := tasks.get()) is not None:
        _train(configs, mode, device, until, compiled, lambda *event: events.put(event))


def _train(configs: list[Any], mode: str, device: str, until: float, compiled: bool, on: Callable[..., None]) -> None:
    """Train a pack of runs into their folders; ``on`` hears of epochs and, for every run, of what ended it: "done", "stopped",
    "busy", "failed" or "error"."""
    keep_pages()
    records.environment()
    with ExitStack() as locks:
        mine = []
        for config in configs:
            folder = Folder(mode, config)
            if not locks.enter_context(folder.lock()):
                on("busy", config, "another process trains it")
            elif folder.finished:  # by another process, meanwhile
                on("done", config, folder.status["seconds"])
            else:
                mine.append((config, folder))
        for i, table in _tables(mine, device, until, compiled, on):
            config, folder = mine[i]
            if isinstance(table, UserError):
                on("error", config, str(table))
            elif isinstance(table, Exception):
                traceback.print_exception(table)
                on("failed", config, f"{type(table).__name__}: {table}")
            elif table is None:
                on("stopped", config, None)
            else:
                status = table.attrs["status"]
                folder.finish(table, status if len(mine) == 1 else {**status, "together": len(mine)})
                on("done", config, status["seconds"])


def _tables(
    mine: list[tuple[Any, Folder]], device: str, until: float, compiled: bool, on: Callable[..., None]
) -> Iterator[tuple[int, Any]]:
    """(number in the pack, its table, None if time was up, or the exception that ended it), as each ends."""
    sets: dict[str, Any] = {}
    for i, (config, folder) in enumerate(mine):
        e = experiments.find(config.experiment)
        try:
            if e.run is not train:
                yield i, e.run(config, device, folder, until, partial(_tell, on, config))
                return
            if config.dataset not in sets:
                sets[config.dataset] = data.load(config.dataset, device)
                if device != "cpu":
                    torch.cuda.synchronize()  # the runs' own streams do not wait for the one that loads
        except Exception as error:
            yield from ((i, error) for i in range(len(mine)))
            return
    todo, stacking = list(range(len(mine))), device != "cpu"
    while todo:
        members = {}
        for i in todo:
            config, folder = mine[i]
            extra = experiments.find(config.experiment).extra
            try:
                told, extra = partial(_tell, on, config), partial(extra, config) if extra else None
                members[i] = Member(config, folder, told, extra, folder.checkpoint())
            except Exception as error:
                yield i, error
        own, groups = list(members), [[i] for i in members]
        if stacking:
            come = [(members[i].checkpoint or {"epoch": 0})["epoch"] for i in own]
            groups = [[own[k] for k in group] for group in stack.groups([mine[i][0] for i in own], come)]
        crew = [[members[i] for i in group] for group in groups]
        trained = [running(m, device, until, compiled, sets[m[0].config.dataset], len(own)) for m in crew]
        todo, stacking = [], False
        for number, result in engine.together(trained, device):  # what fails as a stack is tried apart
            group = groups[number]
            if isinstance(result, Exception) and len(group) > 1 and not isinstance(result, UserError):
                if not isinstance(result, Apart):
                    traceback.print_exception(result)
                todo += group
            else:
                yield from zip(group, [result] * len(group) if isinstance(result, Exception) else result)
            del result  # an exception holds its stack


def _tell(on: Callable[..., None], config: Any, epoch: int, values: dict[str, float]) -> None:
    on("epoch", config, (epoch, values))


def collect(experiment: str, mode: str, configs: list[Any], partial: bool = False) -> Path:
    """Merge the finished runs of an experiment into its record, and write what made it beside.

    A planned run that the run store lacks, because another machine trained it, is taken from the record, or, where figures share
    it, from another experiment's: the figure's that it is named after, or any that holds it.

    Args:
        experiment: a name of ``fa.experiments.EXPERIMENTS``.
        mode: "quick" writes build/quick, "paper" data/records.
        configs: all planned runs.
        partial: write the table although runs are missing; it is marked, and figures made from it say so.

    Raises:
        UserError: runs are missing and ``partial`` is not set, or none is finished; or "paper" and the record holds runs of the figure
            that ``configs`` leaves out, which would be lost.
    """
    planned = {c.run for c in experiments.plan(experiment, mode)} if mode == "paper" else set()
    if lost := planned & records.held(experiment, mode) - {c.run for c in configs}:
        raise UserError(
            f"the record of {experiment} holds {len(lost)} runs of the figure that these settings leave out; collect it without --rules and --seeds"
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
            f"{len(done)} of {len(configs)} runs of {experiment} are finished; go on with: python -m fa run {experiment} --mode {mode}{remedy}"
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
        "wall_seconds": round(sum(map(_share, status.values())), 1),
    }
    return records.write(experiment, mode, pd.concat(tables), about)


def fingerprints(configs: list[Any]) -> dict[str, list[str]]:
    """Run -> fingerprint, for one seed of every recipe: see :func:`fa.train.loop.fingerprint`."""
    first: dict[Any, Any] = {}
    for config in configs:
        if isinstance(config, Config):
            first.setdefault(replace(config, seed=0), config)
    return {config.run: fingerprint(config) for config in first.values()}


def keep_pages() -> None:
    """Let glibc keep freed memory: a fresh 1.6 MB gradient at every step costs more in page faults than its matrix product."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


class Progress:
    """A bar in a terminal or a notebook; in a log a line at most every half minute and at the end."""

    def __init__(self, label: str, before: int, planned: int, todo: list[Any]) -> None:
        self.label, self.runs, self.planned = label, before, planned
        self.total = sum(getattr(c, "epochs", 1) for c in todo)
        self.reached: dict[str, int] = {}  # run -> its latest epoch, which may have been trained earlier
        self.fresh = 0  # epochs trained since now
        self.began = self.written = time.monotonic()
        self.latest = ""
        self.bar = None
        if sys.stderr.isatty() or "ipykernel" in sys.modules:
            try:
                from tqdm.auto import tqdm

                self.bar = tqdm(total=self.total, desc=label, unit="epoch", dynamic_ncols=True)
            except ImportError:
                pass
        if not self.bar:
            self.write()

    def event(self, kind: str, config: Any, detail: Any) -> None:
        """Take note of one event."""
        if kind == "epoch":
            epoch, values = detail
            self.fresh += 1
            self.reached[config.run] = epoch
            test = values.get("test_accuracy")
            self.latest = f"{config.rule} seed {config.seed} epoch {epoch}" + (
                f": {test:.2f} %" if test is not None else ""
            )
        elif kind == "done":
            self.runs += 1
            self.reached[config.run] = getattr(config, "epochs", 1)
        if self.bar:
            self.bar.update(sum(self.reached.values()) - self.bar.n)
            self.bar.set_postfix_str(f"{self.runs}/{self.planned} runs, {self.latest}")
        elif time.monotonic() - self.written > 30:
            self.write()

    def write(self) -> None:
        """One line for a log."""
        self.written = time.monotonic()
        spent, epochs = self.written - self.began, sum(self.reached.values())
        left = f", {clock(spent * (self.total - epochs) / self.fresh)} left" if self.fresh else ""
        sys.stderr.write(
            f"{self.label}: {self.runs}/{self.planned} runs, {epochs}/{self.total} epochs, {clock(spent)}{left}  {self.latest}\n"
        )
        sys.stderr.flush()

    def close(self) -> None:
        """The end."""
        if self.bar:
            self.bar.close()
        else:
            self.write()
