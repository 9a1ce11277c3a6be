"""Records: the committed tables of results, and the published values next to them.

A record ``data/records/NAME.csv`` holds runs, a row a measurement, with a sidecar ``NAME.json`` of what made them; a
quick table goes to ``build/quick``. A run lies in one record. A figure's table is the union of its planned runs,
wherever they lie: figures that share a recipe share its runs. NAME is the figure's, with ``_small`` for a figure's
small mode.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from fa import experiments
from fa.errors import UserError
from fa.paths import ROOT, read_csv, relative, write_bytes
from fa.results.store import RunFolder, run_seconds
from fa.train.config import Config
from fa.train.loop import fingerprint

COLUMNS = ["run", "rule", "seed", "epoch", "layer", "depth", "metric", "value"]
"""Columns of every record; one for each swept parameter of its figure follows ``seed``."""

REFERENCE_COLUMNS = ["paper", "figure", "rule", "seed", "epoch", "layer", "metric", "value", "sd", "n", "source"]
"""Columns of every table of published values; one for each swept parameter may follow."""


def name_of(experiment: str, mode: str) -> str:
    """Name of a figure's record, claims and picture in a mode: ``p3_fig4``, or ``p3_fig4_small``."""
    return f"{experiment}_small" if mode == "small" else experiment


def figure_of(name: str) -> tuple[str, str]:
    """(experiment, mode) of a record's name; the inverse of :func:`name_of`.

    Raises:
        UserError: no experiment has such a record.
    """
    experiment, small, rest = name.partition("_small")
    if small and not rest and experiments.find(experiment).small:
        return experiment, "small"
    experiments.find(name)
    return name, "paper"


def build(mode: str) -> Path:
    """Folder of what a mode makes and nobody commits: build/MODE, or $FA_BUILD/MODE (relative: from the repository's
    root)."""
    return ROOT / os.environ.get("FA_BUILD", "build") / mode


def folder_of(mode: str) -> Path:
    """Where a mode's tables are: :func:`build` for quick, else data/records."""
    return build("quick") if mode == "quick" else ROOT / "data" / "records"


def record_path(name: str, mode: str = "paper") -> Path:
    """Where a record is, or would be."""
    packed = folder_of(mode) / f"{name}.csv.gz"
    return packed if packed.exists() else folder_of(mode) / f"{name}.csv"


def read(name: str, mode: str = "paper") -> pd.DataFrame:
    """One record, with the runs that it holds itself; ``layer`` is "" for the whole network.

    Raises:
        UserError: there is no such table, or its checksum is not the one in its sidecar.
    """
    path = record_path(name, mode)
    if not path.exists():
        raise UserError(f"there is no {relative(path)}; set mode='quick', 'small' or 'paper' to make it")
    if mode != "quick" and hashlib.sha256(path.read_bytes()).hexdigest() != sidecar(name, mode).get("sha256"):
        raise UserError(
            f"{relative(path)} was changed after {name}.json, which holds its sha256, was written; "
            "restore both, or delete both and collect again"
        )
    return read_csv(path)


def sidecar(name: str, mode: str = "paper") -> dict[str, Any]:
    """What made a record's own runs: configs, statuses, environments, wall seconds, fingerprints; and the table's
    sha256.

    Raises:
        UserError: there is none.
    """
    path = folder_of(mode) / f"{name}.json"
    if not path.exists():
        raise UserError(f"there is no {relative(path)}; set mode='quick', 'small' or 'paper' to make it")
    return _sidecar(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _sidecar(path: Path, changed: int) -> dict[str, Any]:
    return json.loads(path.read_text())


def holders(mode: str = "paper") -> dict[str, str]:
    """Run -> name of the record that holds it."""
    names = sorted(p.stem for p in folder_of(mode).glob("*.json"))
    return {run: name for name in names for run in sidecar(name, mode)["configs"]}


def union(experiment: str, mode: str, configs: Sequence[Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A figure's table and what made it: its planned runs, wherever they lie.

    Args:
        experiment: a name of ``fa.experiments.EXPERIMENTS``; its swept columns are made from the runs' recipes.
        mode: "quick", "small" or "paper".
        configs: the runs, as planned.

    Returns:
        The rows of the runs that are there, and ``records`` (names), ``configs`` (run -> recipe), ``status``,
        ``environments`` (of the records that hold them), ``planned``, ``finished``, ``partial``, ``wall_seconds``.

    Raises:
        UserError: none of the runs is there.
    """
    where = holders(mode)
    if mode == "quick":
        own = sidecar(experiment, mode)["configs"]
        where = {run: experiment for run in own}
    there = [c for c in configs if c.run in where]
    names = list(dict.fromkeys(where[c.run] for c in there))
    if not there:
        raise UserError(f"no record holds a run of {experiment}; set mode='quick', 'small' or 'paper' to train them")
    sides, swept = [sidecar(name, mode) for name in names], experiments.find(experiment).swept
    columns = pd.DataFrame([{"run": c.run, **swept(c)} for c in there]).drop_duplicates("run")
    runs, tables = set(columns.run), []
    for name in names:  # without that record's own swept columns
        theirs = experiments.find(figure_of(name)[0]).swept(next(c for c in there if where[c.run] == name))
        rows = read(name, mode)
        tables.append(rows[rows.run.isin(runs)].drop(columns=[*{*theirs, *columns} & {*rows} - {"run"}]))
    table = pd.concat(tables, ignore_index=True).merge(columns, on="run", how="left")
    status = {run: s for side in sides for run, s in side["status"].items() if run in runs}
    environments = {json.dumps(e, sort_keys=True) for side in sides for e in side["environments"]}
    return _sorted(table), {
        "records": names,
        "configs": {c.run: asdict(c) for c in there},
        "status": status,
        "environments": [json.loads(e) for e in sorted(environments)],
        "planned": len({c.run for c in configs}),
        "finished": len(runs),
        "partial": len(runs) < len({c.run for c in configs}),
        "wall_seconds": round(sum(map(run_seconds, status.values())), 1),
    }


def reference(name: str) -> pd.DataFrame:
    """Published values, in our names and epochs; an empty table where there are none."""
    path = ROOT / "data" / "reference" / f"{name}.csv"
    return read_csv(path) if path.exists() else pd.DataFrame(columns=REFERENCE_COLUMNS)


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """Columns and rows in the order of every record."""
    swept = [c for c in table.columns if c not in COLUMNS]
    table = table[[*COLUMNS[:3], *swept, *COLUMNS[3:]]]
    order = ["rule", *swept, "seed", "run", "epoch", "depth", "metric"]
    return table.sort_values(order, na_position="first", kind="stable", ignore_index=True)


def write(name: str, mode: str, table: pd.DataFrame, about: dict[str, Any]) -> Path:
    """Write a table, sorted and in fixed column order, and its sidecar; ``.csv.gz`` above 2 MB. Returns the table's
    path."""
    content = _sorted(table).to_csv(index=False, lineterminator="\n", float_format="%.8g").encode()
    folder = folder_of(mode)
    plain, packed = folder / f"{name}.csv", folder / f"{name}.csv.gz"
    if len(content) > 2_000_000:
        path, stale = write_bytes(packed, gzip.compress(content, mtime=0)), plain
    else:
        path, stale = write_bytes(plain, content), packed
    stale.unlink(missing_ok=True)
    about = {**about, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_bytes(folder / f"{name}.json", (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())
    return path


def collect(experiment: str, mode: str, configs: list[Any], partial: bool = False) -> tuple[Path, int]:
    """Merge the finished runs of a figure into its record, and write what made them beside it.

    A run that another record holds stays there. A run that the record holds already keeps its rows. A quick table holds
    all runs itself.

    Args:
        experiment: a name of ``fa.experiments.EXPERIMENTS``.
        mode: "quick" writes build/quick, "small" and "paper" data/records.
        configs: all planned runs.
        partial: write the table although runs are missing; it is marked, and figures made from it say so.

    Returns:
        The record's path, and how many runs are new in it. With none the record is left as it is.

    Raises:
        UserError: runs are missing and ``partial`` is not set, or none is finished; or the record holds runs of the
            figure that ``configs`` leaves out, which would be lost.
    """
    name, path = name_of(experiment, mode), record_path(name_of(experiment, mode), mode)
    where = holders(mode) if mode != "quick" else {}
    own = {run for run, record in where.items() if record == name}
    planned = {c.run for c in experiments.plan(experiment, mode)} if own else set()
    if lost := planned & own - {c.run for c in configs}:
        raise UserError(
            f"the record of {experiment} holds {len(lost)} runs of the figure that these settings leave out; "
            "collect it without --rules and --seeds"
        )
    configs = list({c.run: c for c in configs}.values())
    new = [f for f in (RunFolder(c) for c in configs if c.run not in where) if f.finished]
    done = [c for c in configs if c.run in where] + [f.config for f in new]
    if not done or (len(done) < len(configs) and not partial):
        remedy = "" if not done else ", or collect with --partial what there is"
        raise UserError(
            f"{len(done)} of {len(configs)} runs of {experiment} are finished; "
            f"go on with: python -m fa run {experiment} --mode {mode}{remedy}"
        )
    if not new:
        return path, 0
    before = sidecar(name, mode) if own else {}
    kept = [c for c in configs if c.run in own]
    swept = experiments.find(experiment).swept
    tables = [f.table().assign(**swept(f.config)) for f in new]
    if kept:
        table = read(name, mode)
        tables.append(table[table.run.isin([c.run for c in kept])])
    status = {c.run: before["status"][c.run] for c in kept} | {f.config.run: f.status for f in new}
    environments = {json.dumps(e, sort_keys=True) for e in before.get("environments", [])}
    for f in new:
        s = status[f.config.run]
        environments |= {json.dumps(e, sort_keys=True) for e in (s.pop("environment"), *s.pop("earlier", []))}
    mine = [*kept, *(f.config for f in new)]
    about = {
        "experiment": experiment,
        "mode": mode,
        "configs": {c.run: asdict(c) for c in mine},
        "status": status,
        "environments": [json.loads(e) for e in sorted(environments)],
        "fingerprints": _fingerprints(mine, before.get("fingerprints", {})),
        "planned": len(configs),
        "finished": len(done),
        "partial": len(done) < len(configs),
        "wall_seconds": round(sum(map(run_seconds, status.values())), 1),
    }
    return write(name, mode, pd.concat(tables), about), len(new)


def _fingerprints(configs: list[Any], known: dict[str, list[str]]) -> dict[str, list[str]]:
    """Run -> fingerprint, for one seed of every recipe: see :func:`fa.train.loop.fingerprint`. Those known are never
    made anew."""
    by_run = {c.run: c for c in configs}
    recipes = {replace(by_run[run], seed=0): run for run in known if run in by_run}
    for config in configs:
        if isinstance(config, Config):
            recipes.setdefault(replace(config, seed=0), config.run)
    return {run: known.get(run) or fingerprint(by_run[run]) for run in recipes.values()}
