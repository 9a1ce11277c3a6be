"""Where results live: the run store, the result tables (records), and the published values beside them.

A run is a folder ``$FA_RUNS/MODE/EXPERIMENT/RUN`` (default ``data/runs``). A record is one long table for each experiment,
``data/records/EXPERIMENT.csv`` with a sidecar ``.json``; a quick table goes to ``build/quick``. Everything is written under a
temporary name, synced and renamed, so that nothing is ever half there.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fa.errors import UserError
from fa.paths import ROOT, write_bytes
from fa.provenance import environment

COLUMNS = ["run", "rule", "seed", "epoch", "layer", "depth", "metric", "value"]
"""Columns of every record; one for each swept parameter follows ``seed``."""

REFERENCE_COLUMNS = ["paper", "figure", "rule", "seed", "epoch", "layer", "metric", "value", "sd", "n", "source"]
"""Columns of every table of published values; one for each swept parameter may stand beside them."""


# ------------------------------------------------------------------------------------ run store


def runs_root() -> Path:
    """``$FA_RUNS`` (a relative path is taken from the repository's root) or ``data/runs``."""
    return ROOT / os.environ.get("FA_RUNS", "data/runs")


class Folder:
    """The folder of one run: ``config.json``, and ``metrics.csv`` with ``status.json`` once finished, ``checkpoint.pt`` before."""

    def __init__(self, mode: str, config: Any) -> None:
        self.config = config
        self.path = runs_root() / mode / config.experiment / config.run

    @property
    def finished(self) -> bool:
        """Whether the run is done; the status is the last file written."""
        return (self.path / "status.json").exists()

    @property
    def status(self) -> dict[str, Any]:
        """State, seconds, environment."""
        return json.loads((self.path / "status.json").read_text())

    def table(self, swept: Mapping[str, Any]) -> pd.DataFrame:
        """The run's rows, with its identity and swept parameters (column -> value) as columns."""
        rows = _read_csv(self.path / "metrics.csv")
        for column, value in {"run": self.config.run, "rule": self.config.rule, **swept}.items():
            rows[column] = value
        if "seed" not in rows:
            rows["seed"] = self.config.seed
        return rows

    def checkpoint(self) -> dict[str, Any] | None:
        """The latest checkpoint on the CPU, or None; one that does not match its checksum raises."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        digest, _, payload = path.read_bytes().partition(b"\n")
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            raise UserError(f"{path} does not match its checksum; delete it to train that run from its beginning")
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint: a line with the sha256 of what follows, then what ``torch.save`` makes of the state."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        self._write_config()
        write_bytes(self.path / "checkpoint.pt", hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)

    def finish(self, table: pd.DataFrame, status: dict[str, Any]) -> None:
        """Write the run's table and status; its checkpoint goes."""
        self._write_config()
        write_bytes(self.path / "metrics.csv", table.to_csv(index=False, lineterminator="\n").encode())
        status = {**status, "environment": environment()}
        write_bytes(self.path / "status.json", json.dumps(status, indent=1).encode())
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the run against other processes; yields False where another one holds it. A process that dies lets go."""
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


# ------------------------------------------------------------------------------------ records


def _read_csv(path: Path) -> pd.DataFrame:
    """A table whose words are never missing: an empty ``layer`` or ``rule`` is ""."""
    words = ["run", "paper", "figure", "rule", "layer", "metric", "source"]
    table = pd.read_csv(path, dtype={w: str for w in words})
    present = [w for w in words if w in table]
    return table.fillna({w: "" for w in present}).astype({"depth": "Int64"} if "depth" in table else {})


def build(mode: str) -> Path:
    """Folder of what a mode makes and nobody commits: build/MODE, or $FA_BUILD/MODE (relative: from the repository's root)."""
    return ROOT / os.environ.get("FA_BUILD", "build") / mode


def record_path(experiment: str, mode: str = "record") -> Path:
    """Where an experiment's table is, or would be: data/records for record and paper, :func:`build` for quick."""
    folder = build("quick") if mode == "quick" else ROOT / "data" / "records"
    packed = folder / f"{experiment}.csv.gz"
    return packed if packed.exists() else folder / f"{experiment}.csv"


def read(experiment: str, mode: str = "record") -> pd.DataFrame:
    """An experiment's table; ``layer`` is "" for the whole network.

    Raises:
        UserError: there is no such table, or it is not the one that its sidecar was written with.
    """
    path = record_path(experiment, mode)
    if not path.exists():
        raise UserError(f"there is no {path.relative_to(ROOT)}; set mode='quick' or 'paper' to make it")
    if mode != "quick" and hashlib.sha256(path.read_bytes()).hexdigest() != sidecar(experiment, mode).get("sha256"):
        raise UserError(
            f"{path.relative_to(ROOT)} was changed after {experiment}.json, which holds its sha256, was written; restore both, or delete both and collect again"
        )
    return _read_csv(path)


def sidecar(experiment: str, mode: str = "record") -> dict[str, Any]:
    """What made the table: configs, statuses, environments, wall seconds, fingerprints; and the table's sha256.

    Raises:
        UserError: there is none.
    """
    path = record_path(experiment, mode)
    path = path.with_name(f"{experiment}.json")
    if not path.exists():
        raise UserError(f"there is no {path.relative_to(ROOT)}; set mode='quick' or 'paper' to make it")
    return json.loads(path.read_text())


def held(experiment: str, mode: str = "record") -> set[str]:
    """Identities of the runs that an experiment's table holds; none where there is no table."""
    return set(sidecar(experiment, mode)["configs"]) if record_path(experiment, mode).exists() else set()


def reference(experiment: str) -> pd.DataFrame:
    """Published values, in our names and epochs; an empty table where there are none."""
    path = ROOT / "data" / "reference" / f"{experiment}.csv"
    if not path.exists():
        return pd.DataFrame(columns=REFERENCE_COLUMNS)
    return _read_csv(path)


def write(experiment: str, mode: str, table: pd.DataFrame, about: dict[str, Any]) -> Path:
    """Write a table, sorted and in fixed column order, and its sidecar; ``.csv.gz`` above 2 MB. Returns the table's path."""
    swept = [c for c in table.columns if c not in COLUMNS]
    table = table[[*COLUMNS[:3], *swept, *COLUMNS[3:]]]
    table = table.sort_values(
        ["rule", *swept, "seed", "run", "epoch", "depth", "metric"], na_position="first", kind="stable"
    )
    content = table.to_csv(index=False, lineterminator="\n", float_format="%.8g").encode()
    folder = record_path(experiment, mode).parent
    plain, packed = folder / f"{experiment}.csv", folder / f"{experiment}.csv.gz"
    if len(content) > 2_000_000:
        path, stale = write_bytes(packed, gzip.compress(content, mtime=0)), plain
    else:
        path, stale = write_bytes(plain, content), packed
    stale.unlink(missing_ok=True)
    about = {**about, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_bytes(folder / f"{experiment}.json", (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())
    return path
