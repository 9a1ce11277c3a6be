"""Executors on other machines: Dask's scheduler, or Slurm through submitit (the extra ``cluster``).

A job is checked on its worker before anything is trained: its software must be the campaign's. A worker that finds the
campaign's mark in the run store's folder shares the store, and trains there. Any other worker trains in a store of its
own; it is sent the checkpoints that there are, and sends back the files of its runs, which are installed here.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fa.errors import UserError
from fa.paths import write_bytes
from fa.provenance import software
from fa.results.executors import keep_pages, pick_device, unchanged
from fa.results.store import RunFolder
from fa.train import data

KNOWN = "local, dask://HOST:PORT, slurm, slurm:NAME=VALUE,..."


@dataclass(frozen=True)
class Terms:
    """What a worker is told with every job.

    Args:
        folder: the campaign's folder, as the campaign's machine names it: the run store, or the notebooks' outputs.
        mark: name of a file in it, which a worker sees that shares the folder.
        software: of the campaign, name -> version.
        deterministic: what ``torch.use_deterministic_algorithms`` was told.
        storage: where searches are kept, ``$FA_STORAGE`` of the campaign ("": wherever a worker keeps them).
    """

    folder: Path
    mark: str = field(default_factory=lambda: f".{uuid.uuid4().hex}.shared")
    software: dict[str, str] = field(default_factory=software)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    storage: str = field(default_factory=lambda: os.environ.get("FA_STORAGE", ""))

    @property
    def shared(self) -> bool:
        """Whether this machine shares the folder."""
        return (self.folder / self.mark).exists()

    def wrong(self) -> str:
        """What this machine has in another version, as a sentence ("" if nothing)."""
        for name, here in software().items():
            if here != (there := self.software[name]):
                return f"{_me()} has {name} {here}, the campaign {there}; bring both to one version, restart the worker"
        return ""


@dataclass
class Elsewhere(Executor):
    """An executor whose workers may be on other machines, for the jobs of a campaign.

    Args:
        pool: calls functions there, each worker one at a time.
        terms: told to every worker.
        attempts: how often a job is submitted whose worker dies (default 3; 1 where the pool itself tries again).
        device: the workers' own, "cpu" or "cuda" (default: this machine's).
        all_share: whether all workers are known to share the run store, so that no file is sent (default False).
    """

    pool: Executor
    terms: Terms
    attempts: int = 3
    device: str = field(default_factory=lambda: pick_device("auto"))
    all_share: bool = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Send a job, a sequence of runs, as the only argument of ``fn``; with it go the files of the runs that were
        begun, and of the runs whose weights they need. The result is for :meth:`receive`."""
        (job,) = args
        needed = [c for config in job for c in (config, *getattr(config, "needs", ()))]
        files = [] if self.all_share else [(c, found) for c in needed if (found := RunFolder(c).files())]
        return self.pool.submit(_there, fn, job, self.terms, files)

    def receive(self, result: tuple[list[dict[str, Any]], list[tuple[Any, dict[str, bytes]]], str]) -> list[Any]:
        """Install the files of a job's runs in the run store, and return the statuses: a run whose table could not be
        installed is busy or failed.

        Raises:
            UserError: what the worker found wrong, in a sentence that names the worker.
        """
        statuses, files, wrong = result
        for i, (config, found) in enumerate(files):
            lost = RunFolder(config).install(found) if found else "damaged"
            if not wrong and statuses[i]["state"] in ("finished", "diverged") and not RunFolder(config).finished:
                error = "its table came damaged from the worker; call again to have it sent anew"
                statuses[i] = {"state": "busy"} if lost == "busy" else {"state": "failed", "error": error}
        if wrong:
            raise UserError(wrong)
        return statuses


@dataclass
class Sharing(Executor):
    """An executor of the same workers for notebooks, whose files stay where they are written: in a folder that all
    share."""

    pool: Executor
    terms: Terms

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """``fn(*args)`` there, with its streams and environment variables to itself.

        Raises:
            UserError: as the future's exception, from a worker that does not fit.
        """
        return self.pool.submit(_beside, fn, args, self.terms)


_alone = threading.Lock()


def _there(
    work: Callable[[Any], list[dict[str, Any]]], job: Sequence[Any], terms: Terms, files: list[Any]
) -> tuple[list[dict[str, Any]], list[tuple[Any, dict[str, bytes]]], str]:
    """On a worker, do a job. An error of the user is returned as a sentence, for not every pool returns exceptions."""
    if not _alone.acquire(blocking=False):
        return [], [], _threads(_me())
    try:
        if wrong := terms.wrong():
            return [], [], wrong
        with unchanged():
            if shared := terms.shared:
                os.environ["FA_RUNS"] = str(terms.folder)
            if terms.storage:
                os.environ["FA_STORAGE"] = terms.storage
            for config, found in () if shared else (*((c, {}) for c in job), *files):
                RunFolder(config).forget_damaged()
                RunFolder(config).install(found)
            if terms.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(terms.deterministic)
            keep_pages()
            try:
                statuses, wrong = work(job), ""
            except UserError as error:
                statuses, wrong = [], f"{_me()}: {error}"
            kept = [] if shared else [(c, RunFolder(c).files()) for c in job]
            return statuses, kept, wrong
    finally:
        _alone.release()


def _beside(fn: Callable[..., Any], args: Sequence[Any], terms: Terms) -> Any:
    """On a worker, call a function that writes to the campaign's folder."""
    if wrong := terms.wrong():
        raise UserError(wrong)
    if not terms.shared:
        raise UserError(
            f"{_me()} does not share {terms.folder}, where the notebooks' outputs go; set FA_BUILD to a "
            "folder that it shares"
        )
    with unchanged():
        return fn(*args)


def _me() -> str:
    return f"the worker on {platform.node()} (process {os.getpid()})"


def _threads(worker: str) -> str:
    return f"{worker} has several threads, and a run has a process to itself; start workers with --nthreads 1"


def _ready(terms: Terms, datasets: Sequence[str]) -> tuple[str, bool, str]:
    """On a worker: what is wrong with it, whether it shares the campaign's folder, and its device."""
    try:
        wrong = terms.wrong()
        for name in datasets if not wrong else ():
            data.load(name)
    except UserError as error:
        wrong = f"{_me()}: {error}"
    return wrong, terms.shared, pick_device("auto")


def check(executor: str) -> None:
    """Refuse a name that is no executor's.

    Raises:
        UserError: it names the known ones.
    """
    kind, _, rest = executor.partition(":")
    slurm = kind == "slurm" and all(re.match("[^=]+=.", item) for item in _items(rest))
    if not (executor == "local" or slurm or re.fullmatch(r"dask://[^/\s]+:\d{1,5}", executor, re.ASCII)):
        raise UserError(f"unknown executor {executor!r}; known executors: {KNOWN}")


@contextmanager
def opened(executor: str, folder: Path, datasets: Sequence[str] = ()) -> Iterator[Elsewhere | None]:
    """The executor of that name, until the block ends.

    Args:
        executor: "local": None is yielded. "dask://HOST:PORT": a Dask scheduler. "slurm": jobs of Slurm, with
            submitit's parameters as "slurm:partition=gpu,time=120".
        folder: of the campaign, which workers may share.
        datasets: that workers must have; Dask's are asked before anything is sent.

    Raises:
        UserError: an unknown executor; its package is not installed; no answer; a worker that does not fit.
    """
    check(executor)
    kind, _, rest = executor.partition(":")
    if executor == "local":
        yield None
        return
    terms = Terms(folder.resolve())
    mark = write_bytes(folder / terms.mark, b"")
    try:
        with _dask(rest[2:], terms, datasets) if kind == "dask" else _slurm(rest, terms) as found:
            yield found
    finally:
        mark.unlink(missing_ok=True)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"this executor needs the package {name}; pip install -e '.[cluster]'") from error


def _items(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


@contextmanager
def _dask(address: str, terms: Terms, datasets: Sequence[str]) -> Iterator[Elsewhere]:
    distributed = _package("distributed")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is told in our own sentence
    try:
        client = distributed.Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(f"no Dask scheduler answers at {address}; start one there with: dask scheduler") from error
    try:
        told = client.run(_ready, terms, datasets, on_error="return")
        for worker, threads in client.nthreads().items():
            if threads > 1:
                raise UserError(_threads(f"the worker {worker}"))
        for worker, answer in told.items():
            if isinstance(answer, BaseException):
                raise UserError(
                    f"the worker {worker} cannot use fa ({type(answer).__name__}: {answer}); install the same fa there"
                )
            if answer[0]:
                raise UserError(answer[0])
        devices = {device for _, _, device in told.values()} or {"cpu"}
        all_share = bool(told) and all(shared for _, shared, _ in told.values())
        pool = client.get_executor(pure=False)  # Dask itself gives a job to another worker when one dies
        yield Elsewhere(pool, terms, 1, "cuda" if devices == {"cuda"} else "cpu", all_share)
    finally:
        client.close(timeout=5)


@contextmanager
def _slurm(parameters: str, terms: Terms) -> Iterator[Elsewhere]:
    submitit = _package("submitit")
    try:
        engine = submitit.AutoExecutor(terms.folder / ".slurm", cluster="slurm")
        given = dict(item.split("=", 1) for item in _items(parameters))
        engine.update_parameters(**{f"slurm_{n}": int(v) if v.isdecimal() else v for n, v in given.items()})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"Slurm cannot be used from here ({str(error).splitlines()[0]})") from error
    with Submitted(engine) as pool:
        yield Elsewhere(pool, terms)


class Submitted(Executor):
    """submitit's jobs as futures.

    Args:
        engine: one of submitit's executors.
        every: seconds between two looks at the jobs (default 1).
    """

    def __init__(self, engine: Any, every: float = 1.0) -> None:
        self.engine, self.every, self.over = engine, every, threading.Event()
        self.flying: dict[Future, Any] = {}
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """A job; one that fails or is killed raises ``BrokenExecutor``."""
        future: Future = Future()
        self.flying[future] = self.engine.submit(fn, *args, **kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancel the jobs that are left."""
        self.over.set()
        self.watch.join()
        for job in self.flying.values():
            job.cancel(check=False)

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            for future, job in [(f, j) for f, j in list(self.flying.items()) if j.done()]:
                try:
                    future.set_result(job.result())
                except Exception as error:  # submitit's own, which hold the job's log
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    future.set_exception(BrokenExecutor(f"job {job.job_id}: {lines[-1]}"))
                del self.flying[future]
