"""What a worker of a cluster does: it looks whether it fits, trains a job, and says which files came of it."""

from __future__ import annotations

import os
import platform
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fa.errors import UserError
from fa.provenance import software
from fa.results.executors import keep_pages, pick_device, unchanged
from fa.results.store import RunFolder
from fa.train import data


@dataclass(frozen=True)
class Terms:
    """What a worker is told with every job.

    Args:
        folder: the campaign's folder, as the campaign's machine names it: the run store, or the notebooks' outputs.
        mark: name of a file in it, which a worker sees that shares the folder.
        software: of the campaign, name -> version.
        deterministic: what ``torch.use_deterministic_algorithms`` was told.
        storage: where searches are kept, ``$FA_STORAGE`` of the campaign ("": wherever a worker keeps them).
        must_share: whether a worker that does not share the folder is refused (default False).
    """

    folder: Path
    mark: str = field(default_factory=lambda: f".{uuid.uuid4().hex}.shared")
    software: dict[str, str] = field(default_factory=software)
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    storage: str = field(default_factory=lambda: os.environ.get("FA_STORAGE", ""))
    must_share: bool = False

    @property
    def shared(self) -> bool:
        """Whether this machine shares the folder."""
        return (self.folder / self.mark).exists()

    def lacking(self, job: Sequence[Any]) -> str:
        """What a job lacks on this machine, which does not share the folder, as a sentence ("" if nothing)."""
        if self.must_share:
            return f"{_me()} does not share the run store {self.folder}; set FA_RUNS to a folder that it shares"
        if os.environ.get("FA_STORAGE") or not any(getattr(config, "asks", False) for config in job):
            return ""
        return (
            f"{_me()} does not share the run store, in which the search is kept; set FA_RUNS to a folder that it "
            "shares, or give --storage with a URL that it reaches, e.g. postgresql+psycopg://USER@HOST/DATABASE"
        )

    def wrong(self) -> str:
        """What this machine has in another version, as a sentence ("" if nothing)."""
        for name, here in software().items():
            if here != (there := self.software[name]):
                return f"{_me()} has {name} {here}, the campaign {there}; bring both to one version, restart the worker"
        return ""


_alone = threading.Lock()


def there(
    work: Callable[[Any], list[dict[str, Any]]], job: Sequence[Any], terms: Terms, files: list[Any]
) -> tuple[list[dict[str, Any]], list[tuple[Any, dict[str, bytes]]], str]:
    """On a worker, do a job. An error of the user is returned as a sentence, for not every pool returns exceptions."""
    if not _alone.acquire(blocking=False):
        return [], [], threads(_me())
    try:
        if wrong := terms.wrong():
            return [], [], wrong
        with unchanged():
            if shared := terms.shared:
                os.environ["FA_RUNS"] = str(terms.folder)
            if terms.storage:
                os.environ["FA_STORAGE"] = terms.storage
            if wrong := "" if shared else terms.lacking(job):
                return [], [], wrong
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


def beside(fn: Callable[..., Any], args: Sequence[Any], terms: Terms) -> Any:
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


def threads(worker: str) -> str:
    """What is said of a worker that would do two jobs at once."""
    return f"{worker} has several threads, and a run has a process to itself; start workers with --nthreads 1"


def ready(terms: Terms, datasets: Sequence[str]) -> tuple[str, bool, str]:
    """On a worker: what is wrong with it, whether it shares the campaign's folder, and its device."""
    try:
        wrong = terms.wrong()
        for name in datasets if not wrong else ():
            data.load(name)
    except UserError as error:
        wrong = f"{_me()}: {error}"
    return wrong, terms.shared, pick_device("auto")
