"""The run store: a folder for each run, ``$FA_RUNS/RUN`` (default ``data/runs``), named by the run's identity and by
nothing else.

Everything is written under a temporary name, synced and renamed, so that nothing is ever half there.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fa.errors import UserError
from fa.paths import ROOT, read_csv, write_bytes
from fa.provenance import environment


def runs_root() -> Path:
    """``$FA_RUNS`` (a relative path is taken from the repository's root) or ``data/runs``."""
    return ROOT / os.environ.get("FA_RUNS", "data/runs")


class RunFolder:
    """The folder of one run: ``config.json``, and ``metrics.csv`` with ``status.json`` once finished,
    ``checkpoint.pt`` before; ``weights.pt`` where the recipe keeps them.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.path = runs_root() / config.run

    @property
    def finished(self) -> bool:
        """Whether the run is done; the status is the last file written."""
        return (self.path / "status.json").exists()

    @property
    def status(self) -> dict[str, Any]:
        """State, seconds, environment."""
        return json.loads((self.path / "status.json").read_text())

    def table(self) -> pd.DataFrame:
        """The run's rows, with the columns ``run``, ``rule`` and ``seed``."""
        rows = read_csv(self.path / "metrics.csv").assign(run=self.config.run, rule=self.config.rule)
        return rows if "seed" in rows else rows.assign(seed=self.config.seed)

    def checkpoint(self) -> dict[str, Any] | None:
        """The latest checkpoint on the CPU, or None.

        Raises:
            UserError: the checkpoint does not match its checksum.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        digest, _, payload = path.read_bytes().partition(b"\n")
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            raise UserError(f"{path} does not match its checksum; delete it to train that run from its beginning")
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint: a line with the sha256 of the rest, then the bytes that ``torch.save`` makes of the
        state.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        self._write_config()
        write_bytes(self.path / "checkpoint.pt", hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)

    def finish(self, table: pd.DataFrame, status: dict[str, Any]) -> None:
        """Write the run's table and status, and remove its checkpoint."""
        self._write_config()
        write_bytes(self.path / "metrics.csv", table.to_csv(index=False, lineterminator="\n").encode())
        status = {**status, "environment": environment()}
        write_bytes(self.path / "status.json", json.dumps(status, indent=1).encode())
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

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

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the run against other processes; yields False where another one holds it.

        A process that dies lets go.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def _write_config(self) -> None:
        write_bytes(self.path / "config.json", json.dumps(asdict(self.config), indent=1).encode())


def run_seconds(status: dict[str, Any]) -> float:
    """Seconds of a finished run; in statuses of records of before, ``share`` or ``together`` tell its part of a joint
    training.
    """
    return status.get("share", status["seconds"] / status.get("together", 1))
