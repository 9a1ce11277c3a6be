"""Where the jobs of a campaign are done: in this process, or in worker processes of this machine."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

from fa.errors import UserError, unknown


def pick_device(device: str, needed: bool = True) -> str:
    """ "auto" as "cuda" where there is one, else "cpu"; one that is unknown raises, and if it is needed one that is not
    there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device, re.ASCII):
        raise unknown("device", device, ("auto", "cpu", "cuda", "cuda:0", "cuda:1"), more=", ...")
    if needed and device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r} is not there; use device='cpu' or 'auto'")
    return device


def pick_workers(workers: str | int, device: str = "cpu") -> int:
    """ "auto" as ``$FA_WORKERS``, or else the number of processors that this process may use, and on CUDA one."""
    name = "workers"
    if workers == "auto" and device != "cpu":
        workers = 1
    if workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers, name = os.environ.get("FA_WORKERS") or cores or 1, "FA_WORKERS"
    if not re.fullmatch(r"0*[1-9]\d{0,8}", str(workers), re.ASCII):
        raise UserError(f"{name}={workers!r} is not a positive number or 'auto'; leave it out for one process a core")
    return int(workers)


class Here(Executor):
    """Makes a call at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """The call's result or exception, as a future that is done; Ctrl-C goes through."""
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Submitted(Executor):
    """submitit's jobs as futures.

    Args:
        engine: one of submitit's executors.
        every: seconds between two looks at the jobs (default 1).

    Attributes:
        failed: whether a job failed or was killed.
    """

    def __init__(self, engine: Any, every: float = 1.0) -> None:
        self.engine, self.every, self.over = engine, every, threading.Event()
        self.flying: dict[Future, Any] = {}
        self.failed = False
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """A job; one that fails or is killed raises ``BrokenExecutor``."""
        future: Future = Future()
        self.flying[future] = self.engine.submit(fn, *args, **kwargs)
        return future

    def waits(self, future: Future) -> bool:
        """Whether a job is in the queue still: Slurm makes its log when it begins."""
        job = self.flying.get(future)
        return job is not None and not job.paths.stdout.exists()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancel the jobs that are left."""
        self.over.set()
        self.watch.join()
        for job in self.flying.values():
            job.cancel(check=False)

    def _watch(self) -> None:
        while not self.over.wait(self.every):
            for future, job in list(self.flying.items()):
                if not (future.cancelled() or job.done()):
                    continue
                if not future.set_running_or_notify_cancel():
                    job.cancel(check=False)
                else:
                    try:
                        future.set_result(job.result())
                    except Exception as error:  # submitit's own, which hold the job's log
                        lines = str(error).strip().splitlines() or [type(error).__name__]
                        future.set_exception(BrokenExecutor(f"job {job.job_id}: {lines[-1]}"))
                        self.failed = True
                del self.flying[future]


@contextmanager
def unchanged() -> Iterator[None]:
    """After the block the environment variables and the two output streams of this process are what they were before
    it: a worker of a cluster serves other campaigns as well."""
    variables, streams = dict(os.environ), [os.dup(1), os.dup(2)]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
            os.close(stream)


@contextmanager
def processes() -> Iterator[Callable[[], Executor]]:
    """Yields a function that starts a worker process, as an executor of one; a worker that dies then takes no other
    one with it.

    The processes end when this one leaves the block or is killed, for then a pipe closes that each of them waits for.
    """
    context, made = multiprocessing.get_context("spawn"), []
    theirs, ours = context.Pipe(duplex=False)

    def new() -> Executor:
        made.append(ProcessPoolExecutor(1, context, _prepare, (theirs, torch.are_deterministic_algorithms_enabled())))
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
        try:
            made[-1].submit(int)  # starts the process; it never hears Ctrl-C, to which this process answers
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
        return made[-1]

    try:
        yield new
    except BaseException:
        ours.close()  # now, not when their runs are through
        raise
    finally:
        for pool in made:
            pool.shutdown(cancel_futures=True)


def unable(error: BaseException) -> str:
    """What is said of a worker that cannot import what a job needs."""
    return f"cannot use fa ({type(error).__name__}: {error}); install the same fa there"


def each(
    work: Callable[[Any], Any],
    jobs: Sequence[Any],
    new: Callable[[], Executor],
    n: int,
    attempts: int = 1,
    say: Callable[[Any, str], None] = lambda job, why: None,
    until: float = math.inf,
    waits: Callable[[Future], bool] = lambda future: False,
) -> Iterator[tuple[Any, Any, str]]:
    """Do jobs, ``n`` at a time; a job whose worker dies is given to a new one, and takes no other job with it.

    Args:
        work: job -> result.
        jobs: in order; what starts first is first in it.
        new: makes a worker, an executor that does one job at a time.
        n: number of workers.
        attempts: how often a job is tried whose worker dies (default 1).
        say: told of a job that is taken up again, and why.
        until: ``time.time()`` after which jobs that no worker has begun are cancelled (default: none ever is).
        waits: whether no worker has begun the job of a future (default: there is a worker for each).

    Yields:
        (job, result, "") as they end, (job, None, why) of one whose workers died, or (job, None, "") of one that was
        not begun in time.

    Raises:
        UserError: from a job; a worker cannot import what a job needs; or jobs were cancelled by whoever makes the
            workers.
    """
    waiting, deaths = deque((job, 1) for job in jobs), 0
    flying: dict[Future, tuple[Executor, Any, int]] = {}
    free = [new() for _ in range(n)]
    try:
        while waiting or flying:
            while waiting and free:
                worker, (job, attempt) = free.pop(), waiting.popleft()
                try:
                    flying[worker.submit(work, job)] = worker, job, attempt
                except BrokenExecutor:  # it was killed while it had nothing to do
                    waiting.appendleft((job, attempt))
                    deaths += 1
                    if deaths > attempts * n:
                        raise UserError("worker processes are killed as they start; is there room for them?") from None
                    free.append(new())
            left = min(max(until - time.time(), 1.0), threading.TIMEOUT_MAX) if until < math.inf else None
            ended = wait(flying, left, return_when=FIRST_COMPLETED).done
            for future in [f for f in flying if waits(f)] if not ended and time.time() >= until else ():
                if future.cancel():
                    worker, job, _ = flying.pop(future)
                    free.append(worker)
                    yield job, None, ""
            for future in ended:
                worker, job, attempt = flying.pop(future)
                if future.cancelled():
                    raise UserError(
                        "the jobs were cancelled, or their scheduler went away; finished runs are kept, call again "
                        "when it is back"
                    )
                error = future.exception()
                if isinstance(error, ImportError):
                    raise UserError(f"a worker {unable(error)}")
                if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
                    free.append(worker)
                    yield job, future.result(), ""
                    continue
                free.append(new())
                why = "it was killed" if isinstance(error, BrokenExecutor) else f"{type(error).__name__}: {error}"
                if attempt < attempts:
                    waiting.appendleft((job, attempt + 1))
                    say(job, why)
                else:
                    yield job, None, why
    finally:
        for future in flying:
            future.cancel()


def _prepare(pipe: Any, deterministic: bool) -> None:
    """Called in a new worker process; ``deterministic``: what ``torch.use_deterministic_algorithms`` was told."""

    def follow() -> None:
        pipe.poll(None)  # nothing is ever sent: it returns when the other end closes
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.use_deterministic_algorithms(deterministic)
    keep_pages()


def keep_pages() -> None:
    """Let glibc keep freed memory: a fresh 1.6 MB gradient at every step costs more in page faults than its matrix
    product.

    It holds for the rest of the process, so that only processes which do nothing but train should call it.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
