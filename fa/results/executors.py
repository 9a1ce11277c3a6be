"""Where the jobs of a campaign are done: in this process, or in worker processes of this machine."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from fa.errors import UserError


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
