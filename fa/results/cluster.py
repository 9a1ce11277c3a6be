"""Executors on other machines: Dask's scheduler, or Slurm through submitit (the extra ``cluster``).

A job is checked on its worker before anything is trained: its software must be the campaign's. A worker that finds the
campaign's mark in the run store's folder shares the store, and trains there. Any other worker trains in a store of its
own; it is sent the checkpoints that there are, and sends back the files of its runs, which are installed here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from fa.errors import UserError
from fa.paths import write_bytes
from fa.results.executors import Submitted, pick_device, unable
from fa.results.store import RunFolder
from fa.results.worker import Terms, beside, ready, there, threads

KNOWN = "local, dask://HOST:PORT, slurm, slurm:NAME=VALUE,..."

ANSWER = 10.0  # seconds in which a scheduler answers


@dataclass
class Elsewhere(Executor):
    """An executor whose workers may be on other machines, for the jobs of a campaign.

    Args:
        pool: calls functions there, each worker one at a time.
        terms: told to every worker.
        attempts: how often a job is submitted whose worker dies (default 3; 1 where the pool itself tries again).
        device: the workers' own, "cpu" or "cuda" (default: this machine's).
        why: that device, in words.
        waits: whether no worker has begun the job of a future (default: there is a worker for each).
        all_share: whether all workers are known to share the run store, so that no file is sent (default False).
    """

    pool: Executor
    terms: Terms
    attempts: int = 3
    device: str = field(default_factory=lambda: pick_device("auto"))
    why: str = ""
    waits: Callable[[Future], bool] = lambda future: False
    all_share: bool = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Send a job, a sequence of runs, as the only argument of ``fn``; with it go the files of the runs that were
        begun, and of the runs whose weights they need. The result is for :meth:`receive`."""
        (job,) = args
        needed = [c for config in job for c in (config, *getattr(config, "needs", ()))]
        files = [] if self.all_share else [(c, found) for c in needed if (found := RunFolder(c).files())]
        return _sent(self.pool, there, fn, job, self.terms, files)

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
        return _sent(self.pool, beside, fn, args, self.terms)


@dataclass
class _Call:
    """A call that is made where its pickle is opened, for which it stands."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.fn, self.args


def _sent(pool: Executor, fn: Callable[..., Any], *args: Any) -> Future:
    """``fn(*args)`` there, as bytes: a worker without the package then says so by its job's exception. Dask itself
    reads what a job names before the job begins, and takes a worker that cannot for a dead one."""
    return pool.submit(pickle.loads, pickle.dumps(_Call(fn, args)))


def check(executor: str, device: str = "cpu") -> None:
    """Refuse a name that is no executor's, and what workers could not know.

    Raises:
        UserError: it names the known ones; Slurm's jobs with the device "auto"; a search in a relative path.
    """
    kind, _, rest = executor.partition(":")
    slurm = kind == "slurm" and all(re.match("[^=]+=.", item) for item in _items(rest))
    if not (executor == "local" or slurm or re.fullmatch(r"dask://[^/\s]+:\d{1,5}", executor, re.ASCII)):
        raise UserError(f"unknown executor {executor!r}; known executors: {KNOWN}")
    if slurm and device == "auto":
        raise UserError("this machine does not know the device of Slurm's jobs; give --device cuda, or --device cpu")
    storage = os.environ.get("FA_STORAGE", "")
    if executor != "local" and re.match(r"sqlite(\+\w+)?:(?!////)", storage):
        raise UserError(
            f"the storage {storage} is another file for every worker; give an absolute path that all see, as in "
            "sqlite:////shared/search.db, or a server, postgresql+psycopg://USER@HOST/DATABASE"
        )


@contextmanager
def opened(
    executor: str, folder: Path, datasets: Sequence[str] = (), until: float = math.inf
) -> Iterator[Elsewhere | None]:
    """The executor of that name, until the block ends.

    Args:
        executor: "local": None is yielded. "dask://HOST:PORT": a Dask scheduler. "slurm": jobs of Slurm, with
            submitit's parameters as "slurm:partition=gpu,time=120".
        folder: of the campaign, which workers may share.
        datasets: that workers must have; Dask's are asked before anything is sent.
        until: ``time.time()`` until which to wait for the first of Dask's workers (default: no bound).

    Raises:
        UserError: an unknown executor; its package is not installed; no answer; a worker that does not fit.
    """
    check(executor)
    kind, _, rest = executor.partition(":")
    if executor == "local":
        yield None
        return
    terms = Terms(folder.resolve(), must_share=kind == "slurm")
    mark = write_bytes(folder / terms.mark, b"")
    try:
        with _dask(rest[2:], terms, datasets, until) if kind == "dask" else _slurm(rest, terms) as found:
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
def _dask(address: str, terms: Terms, datasets: Sequence[str], until: float) -> Iterator[Elsewhere]:
    distributed = _package("distributed")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is told in our own sentence

    async def knock() -> None:  # who is no scheduler may never answer, which the client would await
        comm = await asyncio.wait_for(distributed.comm.connect(address, timeout=ANSWER), ANSWER)
        await comm.close()

    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, knock()).result()
        client = distributed.Client(address, timeout=ANSWER, set_as_default=False)
    except Exception as error:  # of the network, or of whatever was read as an answer
        raise UserError(f"no Dask scheduler answers at {address}; start one there with: dask scheduler") from error
    try:
        try:
            found = _asked(client, address, terms, datasets, until)
        except OSError as error:
            raise distributed.comm.CommClosedError(str(error)) from error
        yield found
    except distributed.comm.CommClosedError as error:
        raise UserError(
            f"the Dask scheduler at {address} cannot be reached any more ({error}); finished runs are kept, call "
            "again when it is back"
        ) from error
    finally:
        client.close(timeout=5)


def _asked(client: Any, address: str, terms: Terms, datasets: Sequence[str], until: float) -> Elsewhere:
    """Dask's workers, once there is one and time is not up, as an executor."""
    if not client.nthreads():
        start = f"start one with: dask worker tcp://{address} --nthreads 1"
        sys.stderr.write(f"fa: the scheduler at {address} has no worker yet, and this command waits for one; {start}\n")
        try:
            client.wait_for_workers(1, timeout=max(until - time.time(), 0.1) if until < math.inf else None)
        except TimeoutError:
            pass
    told = client.run(ready, terms, datasets, on_error="return")
    gone = [worker for worker, answer in told.items() if type(answer).__name__ == "CommClosedError"]
    told = {worker: answer for worker, answer in told.items() if worker not in gone}  # one that dies is asked no more
    for worker, n in client.nthreads().items():
        if n > 1:
            raise UserError(threads(f"the worker {worker}"))
    for worker, answer in told.items():
        if isinstance(answer, BaseException):
            raise UserError(f"the worker {worker} {unable(answer)}")
        if answer[0]:
            raise UserError(answer[0])
    devices, all_share = [d for _, _, d in told.values()], bool(told) and all(shared for _, shared, _ in told.values())
    without = devices.count("cpu")
    device = "cuda" if devices and not without else "cpu"
    why = f"{without} of {len(devices)} workers have no GPU; --device cuda is for workers that all have one"
    why = "no worker is there to ask" if not devices else why if 0 < without < len(devices) else "all workers' own"

    def waits(_: Future) -> bool:
        try:
            return not client.nthreads()
        except OSError:  # a scheduler that goes away cancels the jobs
            return False

    pool = client.get_executor(pure=False)  # Dask itself gives a job to another worker when one dies
    return Elsewhere(pool, terms, 1, device, why, waits, all_share)


@contextmanager
def _slurm(parameters: str, terms: Terms) -> Iterator[Elsewhere]:
    submitit = _package("submitit")
    logs = terms.folder / ".slurm" / terms.mark.strip(".")
    try:
        engine = submitit.AutoExecutor(logs, cluster="slurm")
        given = dict(item.split("=", 1) for item in _items(parameters))
        engine.update_parameters(**{f"slurm_{n}": int(v) if v.isdecimal() else v for n, v in given.items()})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"Slurm cannot be used from here ({str(error).splitlines()[0]})") from error
    with Submitted(engine) as pool:
        yield Elsewhere(pool, terms, waits=pool.waits, all_share=True)
    if not pool.failed:  # else the logs say why
        shutil.rmtree(logs, ignore_errors=True)
        if logs.parent.exists() and not any(logs.parent.iterdir()):
            logs.parent.rmdir()
