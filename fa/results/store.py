"""The run store: a folder for each run, ``$FA_RUNS/RUN`` (default ``data/runs``), named by the run's identity and by
nothing else.

Everything is written under a temporary name, synced and renamed, so that nothing is ever half there. A checkpoint and
a finished table have checksums: what a disk or a hand has damaged is noticed, and never opened as Python.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch

from fa.errors import UserError
from fa.paths import read_csv, read_json, runs_root, write_bytes, writing
from fa.provenance import environment

CHECKPOINTS = ("checkpoint.pt", "checkpoint.old.pt")
"""Names in a run's folder, the latest first."""

FILES = (*CHECKPOINTS, "config.json", "progress.csv", "weights.pt", "metrics.csv", "status.json")
"""All that a run's folder may hold, in the order of its writing: the status makes a run a finished one."""


class RunFolder:
    """The folder of one run: ``config.json``, and ``metrics.csv`` with ``status.json`` once finished,
    ``checkpoint.pt`` and the checkpoint before it, ``checkpoint.old.pt``, until then; ``weights.pt`` where the recipe
    keeps them.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.path = runs_root() / config.run

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return any((self.path / name).exists() for name in CHECKPOINTS)

    @property
    def finished(self) -> bool:
        """Whether the run is done; the status is the last file written."""
        return (self.path / "status.json").exists()

    @property
    def status(self) -> dict[str, Any]:
        """State, seconds, environment, and the sha256 of the table (runs of before that have none).

        Raises:
            UserError: the file is damaged.
        """
        with self._or_again():
            return read_json(self.path / "status.json", state=str, seconds=(int, float), environment=dict)

    def table(self) -> pd.DataFrame:
        """The run's rows, with the columns ``run``, ``rule`` and ``seed``.

        Raises:
            UserError: the table does not match the checksum in the status, or cannot be read.
        """
        path = self.path / "metrics.csv"
        with self._or_again():
            rows = read_csv(path).assign(run=self.config.run, rule=self.config.rule)
            if hashlib.sha256(path.read_bytes()).hexdigest() != (digest := self.status.get("sha256", "")) and digest:
                raise UserError(f"{path} does not match its checksum")
        return rows if "seed" in rows else rows.assign(seed=self.config.seed)

    def checkpoint(self) -> dict[str, Any] | None:
        """The latest checkpoint on the CPU, or None. Where it is damaged, a line on stderr says so and the one before
        it is taken.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        wrong = []
        for path in (self.path / name for name in CHECKPOINTS):
            if not path.exists():
                continue
            try:
                found = _unpacked(path.read_bytes())
            except (OSError, ValueError) as error:
                wrong.append(f"{path} {error}")
                continue
            for sentence in wrong:
                sys.stderr.write(f"fa: {sentence}; the run goes on from the checkpoint before it\n")
            return found
        if wrong:
            raise UserError(f"{wrong[0]}; delete {self.path} to train that run from its beginning")
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint: a line with the sha256 of the rest, then the bytes that ``torch.save`` makes of the
        state. The one before it stays.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        self._write_config()
        line = hashlib.sha256(payload).hexdigest().encode() + b"\n"
        write_bytes(self.path / CHECKPOINTS[0], line + payload, keep=CHECKPOINTS[1])

    def finish(self, table: pd.DataFrame, status: dict[str, Any]) -> None:
        """Write the run's table and status, and remove its checkpoints."""
        self._write_config()
        content = table.to_csv(index=False, lineterminator="\n").encode()
        write_bytes(self.path / "metrics.csv", content)
        status = {**status, "environment": environment(), "sha256": hashlib.sha256(content).hexdigest()}
        write_bytes(self.path / "status.json", json.dumps(status, indent=1).encode())
        for name in CHECKPOINTS:
            (self.path / name).unlink(missing_ok=True)

    def keep(self, weights: dict[str, torch.Tensor]) -> None:
        """Write the trained network's state, name -> tensor, which stays in the folder."""
        buffer = io.BytesIO()
        torch.save({name: t.cpu().clone() for name, t in weights.items()}, buffer)
        write_bytes(self.path / "weights.pt", buffer.getvalue())

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained network's state, name -> tensor, of a run that is finished and whose recipe keeps it.

        Raises:
            UserError: they are not there.
        """
        path = self.path / "weights.pt"
        if not path.exists():
            raise UserError(f"{path} is not there; delete the folder of that run to train it again")
        return torch.load(path, map_location="cpu", weights_only=True)

    def files(self) -> dict[str, bytes]:
        """The folder's content, name -> bytes, to be installed in another store; empty where there is neither a
        checkpoint nor a status, and of a run that another process is training."""
        if self.finished:
            return self._read([name for name in FILES if name not in CHECKPOINTS])
        if not self.begun:
            return {}
        with self.lock() as mine:
            return self._read(FILES) if mine else {}

    def install(self, files: dict[str, bytes]) -> str:
        """Write the content of the run's folder in another store. A finished run stays as it is, and so does a
        checkpoint of as many epochs as the one that comes.

        Returns:
            "" or why a finished run is not installed: "busy", another process holds the run; "damaged", its table is
            not there or does not match its checksum.
        """
        with self.lock() as mine:
            if self.finished:
                return ""
            if not mine:
                return "busy"
            if "status.json" in files:
                if not whole(files):
                    return "damaged"
                files = {name: content for name, content in files.items() if name not in CHECKPOINTS}
            elif _reached(files) <= _reached(self._read(CHECKPOINTS)):
                return ""
            for name in FILES:
                if name in files:
                    write_bytes(self.path / name, files[name])
            for name in CHECKPOINTS:
                if name not in files:
                    (self.path / name).unlink(missing_ok=True)
            return ""

    def forget_damaged(self) -> None:
        """Let a finished run whose table is gone or damaged be a run that is to be trained."""
        with self.lock() as mine:
            if mine and self.finished and not whole(self._read(("status.json", "metrics.csv"))):
                (self.path / "status.json").unlink()

    def check(self) -> None:
        """Raise UserError if the run is not its recipe's: its batch norm saw the images of one rank (fa.train.ddp)."""
        if self.status.get("batch_norm") == "of a rank":
            raise UserError(
                f"run {self.config.run} was trained by {self.status['ranks']} ranks, whose batch norm saw part of the "
                f"batch each, which its recipe does not say; delete {self.path} and train it with --sync-batch-norm"
            )

    def lock(self, wait: bool = False) -> AbstractContextManager[bool]:
        """Hold the run against other processes; yields False where another one holds it, unless we ``wait`` for that
        one. See :func:`locked`."""
        return locked(self.path / "lock", self.path, wait)

    def _read(self, names: Sequence[str]) -> dict[str, bytes]:
        return {name: path.read_bytes() for name in names if (path := self.path / name).exists()}

    def _write_config(self) -> None:
        write_bytes(self.path / "config.json", json.dumps(asdict(self.config), indent=1).encode())

    @contextmanager
    def _or_again(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            what = str(error).partition(";")[0]
            raise UserError(f"{what}; delete {self.path} to train that run again") from error


def whole(files: dict[str, bytes]) -> bool:
    """Whether these are a finished run's files, name -> bytes: a status, and a table that matches its checksum."""
    try:
        digest = json.loads(files["status.json"]).get("sha256", "")
        return digest in ("", hashlib.sha256(files["metrics.csv"]).hexdigest())
    except (KeyError, ValueError, AttributeError):
        return False


def _unpacked(content: bytes) -> dict[str, Any]:
    """A checkpoint from its file's bytes. ValueError says what is wrong with it; none is run as Python."""
    digest, _, payload = content.partition(b"\n")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise ValueError("does not match its checksum")
    try:
        found = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not isinstance(found.get("epoch"), int):
            raise TypeError("no epoch")
    except Exception as error:  # a file that is no checkpoint fails in a way of its own
        raise ValueError(f"is no checkpoint ({type(error).__name__})") from error
    return found


def _reached(files: dict[str, bytes]) -> int:
    """Epochs behind the latest checkpoint among files that can be read, name -> bytes; -1 if there is none."""
    for name in CHECKPOINTS:
        try:
            return _unpacked(files[name])["epoch"]
        except (KeyError, ValueError):
            continue
    return -1


_held: set[IO[str]] = set()  # files of the locks of this process


def _let_go() -> None:
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)  # the lock is free when every process has closed its file


@contextmanager
def locked(path: Path, guarded: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock against other processes, and remove what a killed one left half written in the folder it guards.

    A process that dies lets go, and one that it has forked, e.g. to decode photographs, holds nothing.

    Args:
        path: file of the lock.
        guarded: the folder that it guards.
        wait: until the lock is free (default); else yield False where another process holds it.

    Raises:
        UserError: the folder cannot be written, or its file system has no locks.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if isinstance(error, BlockingIOError) and not wait:
                yield False
                return
            raise UserError(
                f"{path.parent} cannot be locked (flock: {error.strerror}), so that two processes could train one run; "
                "set FA_RUNS and FA_BUILD to folders on a file system with locks, e.g. a local disk"
            ) from error
        for part in guarded.glob(".*.part"):
            part.unlink(missing_ok=True)
        _held.add(file)
        try:
            yield True
        finally:
            _held.discard(file)


def read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of a record, with a recipe and a status for each run, and the machines that trained them.

    Raises:
        UserError: the file cannot be read, or lacks a part of that.
    """
    about = read_json(path, sha256=str, configs=dict, status=dict, environments=list)
    runs = [(recipe, about["status"].get(run)) for run, recipe in about["configs"].items()]
    whole = all(isinstance(r, dict) and isinstance(s, dict) for r, s in runs) and all(
        isinstance(s.get("state"), str) and isinstance(s.get("seconds"), (int, float)) for _, s in runs
    )
    if not whole or not all(isinstance(machine, dict) for machine in about["environments"]):
        raise UserError(f"{path} is damaged: it lacks the recipe, the status or the machine of a run; restore it")
    return about


def run_seconds(status: dict[str, Any]) -> float:
    """Seconds of a finished run; in statuses of records of before, ``share`` or ``together`` tell its part of a joint
    training.
    """
    return status.get("share", status["seconds"] / status.get("together", 1))
