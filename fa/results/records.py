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
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from fa import experiments
from fa.errors import UserError
from fa.paths import ROOT, need_repository, read_csv, told, user_folder, write_bytes, writing
from fa.results import registered
from fa.results.store import RunFolder, locked, read_sidecar, run_seconds

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
    """Folder of what a mode makes and nobody commits: $FA_BUILD/MODE (default: build/MODE in :func:`fa.paths.home`)."""
    return user_folder("FA_BUILD", "build") / mode


def folder_of(mode: str) -> Path:
    """Where a mode's tables are: :func:`build` for quick, else data/records, which only a clone has (`UserError`)."""
    if mode == "quick":
        return build(mode)
    need_repository()
    return ROOT / "data" / "records"


def record_path(name: str, mode: str = "paper") -> Path:
    """Where a record is, or would be."""
    packed = folder_of(mode) / f"{name}.csv.gz"
    return packed if packed.exists() else folder_of(mode) / f"{name}.csv"


def read(name: str, mode: str = "paper") -> pd.DataFrame:
    """One record, with the runs that it holds itself; ``layer`` is "" for the whole network.

    Raises:
        UserError: there is no such table, or its checksum is not the one in its sidecar.
    """
    path = _there(record_path(name, mode), name)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sidecar(name, mode)["sha256"]:
        why = f"{told(path)} was changed after {name}.json, which holds its sha256, was written"
        raise UserError(f"{why}; restore both, or collect again where a collect was killed")
    return read_csv(path)


def sidecar(name: str, mode: str = "paper") -> dict[str, Any]:
    """What made a table's own runs: configs, statuses, environments, wall seconds, a record's fingerprints; its sha256.

    Raises:
        UserError: there is none.
    """
    path = _there(folder_of(mode) / f"{name}.json", name)
    return _sidecar(path, path.stat().st_mtime_ns)


def _there(path: Path, name: str) -> Path:
    if not path.exists():
        raise UserError(f"there is no {told(path)}; {experiments.find(figure_of(name)[0]).remedy} to make it")
    return path


@lru_cache(maxsize=64)
def _sidecar(path: Path, changed: int) -> dict[str, Any]:
    return read_sidecar(path)


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
    where = dict.fromkeys(sidecar(experiment, mode)["configs"], experiment) if mode == "quick" else holders(mode)
    there = [c for c in configs if c.run in where]
    names = list(dict.fromkeys(where[c.run] for c in there))
    if not there:
        raise UserError(f"no record holds a run of {experiment}; {experiments.find(experiment).remedy} to train them")
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
    path = folder_of("paper").parent / "reference" / f"{name}.csv"
    return read_csv(path) if path.exists() else pd.DataFrame(columns=REFERENCE_COLUMNS)


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """Columns and rows in the order of every record."""
    swept = [c for c in table.columns if c not in COLUMNS]
    table = table[[*COLUMNS[:3], *swept, *COLUMNS[3:]]]
    order = ["rule", *swept, "seed", "run", "epoch", "depth", "metric"]
    return table.sort_values(order, na_position="first", kind="stable", ignore_index=True)


def write(name: str, mode: str, table: pd.DataFrame, about: dict[str, Any]) -> Path:
    """Write a table, sorted and in fixed column order, and its sidecar; ``.csv.gz`` above 2 MB. Returns its path.

    The table is put in its place last: until then the old one is there, and :func:`collect` brings a killed call to its
    end.
    """
    content = _sorted(table).to_csv(index=False, lineterminator="\n", float_format="%.8g").encode()
    path = folder_of(mode) / (f"{name}.csv" if len(content) <= 2_000_000 else f"{name}.csv.gz")
    content = content if path.suffix == ".csv" else gzip.compress(content, mtime=0)
    about = {**about, "sha256": hashlib.sha256(content).hexdigest()}
    told, beside = (json.dumps(about, indent=1, sort_keys=True) + "\n").encode(), path.with_name(f"{name}.json")
    if not all(p.exists() and p.read_bytes() == new for p, new in ((path, content), (beside, told))):
        write_bytes(path.with_name(f".{path.name}.new"), content)
        write_bytes(beside, told)
    _mend(name, mode)
    return path


def _mend(name: str, mode: str) -> None:
    """Of a record's tables, the present and those a killed :func:`write` left, keep the one that its sidecar means."""
    folder = folder_of(mode)
    places = [folder / f"{name}.csv{packed}" for packed in ("", ".gz")]
    there = {p: place for place in places for p in (place.with_name(f".{place.name}.new"), place) if p.exists()}
    digest = sidecar(name, mode)["sha256"] if (folder / f"{name}.json").exists() else ""
    right = next((p for p in there if hashlib.sha256(p.read_bytes()).hexdigest() == digest), None)
    with writing(folder):
        for path, place in there.items():
            if path == right:
                os.replace(path, place)
            elif path != there.get(right) and (right or path != place):
                path.unlink()


def lacking(experiment: str, mode: str, configs: Sequence[Any]) -> list[Any]:
    """The runs that :func:`collect` of ``configs`` would miss: planned, in no record, and not finished or not given.
    Of a quick table, and of other settings than the figure's, all runs are those of ``configs``."""
    chosen, whole = {c.run for c in configs}, _whole(experiment, mode, configs)
    held = holders(mode) if whole is not configs else {}
    return [c for c in whole if c.run not in held and not (c.run in chosen and RunFolder(c).finished)]


def _whole(experiment: str, mode: str, configs: Sequence[Any]) -> Sequence[Any]:
    """The figure's plan, if ``configs`` are a part of it and its table is a record; else ``configs``."""
    planned = list({c.run: c for c in experiments.plan(experiment, mode)}.values()) if mode != "quick" else []
    return planned if {c.run for c in configs} <= {c.run for c in planned} else configs


def collect(
    experiment: str, mode: str, configs: Sequence[Any], partial: bool = False, given: str = "", own_name: str = ""
) -> tuple[Path, int]:
    """Merge the finished runs of a figure into its record, and write what made them beside it.

    A run that a record holds already keeps its rows, unless every run of the figure's own record is finished in this
    run store: then these take its place. A quick table holds all its runs itself. Runs of other settings than the
    figure's go to build/MODE, and never into a record.

    Args:
        experiment: a name of ``fa.experiments.EXPERIMENTS``.
        mode: "quick" writes build/quick, "small" and "paper" data/records.
        configs: the runs to take from the run store.
        partial: write the table although planned runs are missing; it is marked, and figures made from it say so.
        given: options of the command that trains the missing runs (default: the mode).
        own_name: of the table in build/MODE, of a part of a quick table too (default: the record's name).

    Returns:
        The table's path, and how many runs are new in it. With none it is left as it is.

    Raises:
        UserError: runs are missing and ``partial`` is not set, or none is finished.
    """
    configs = list({c.run: c for c in configs}.values())
    whole, missing = _whole(experiment, mode, configs), lacking(experiment, mode, configs)
    if len(missing) == len(whole) or (missing and not partial):
        remedy = "" if len(missing) == len(whole) else ", or collect with --partial what there is"
        go_on = f"go on with: python -m fa run {experiment}{given or f' --mode {mode}'}{remedy}"
        raise UserError(f"{len(whole) - len(missing)} of {len(whole)} runs of {experiment} are finished; {go_on}")
    name = name_of(experiment, mode)
    if whole is configs and (mode != "quick" or own_name not in ("", name)):
        path = build(mode) / f"{own_name or name}.csv"
        return path, apart(experiment, path, configs)
    with locked(build(mode) / "lock", folder_of(mode)):
        return _merge(experiment, mode, configs, whole)


def _another(folder: RunFolder, about: dict[str, Any]) -> bool:
    """Whether a finished run is from another training than a record's, by its status and its machines."""
    status = dict(folder.status)
    machines = [status.pop("environment"), *status.pop("earlier", [])]
    status.pop("sha256", "")
    return status != about["status"][folder.config.run] or any(m not in about["environments"] for m in machines)


def apart(experiment: str, path: Path, configs: Sequence[Any]) -> int:
    """Write the finished ones of these runs, which are not the figure's own, to a table outside of the records; returns
    how many are new in it. With none it is left as it is."""
    swept = experiments.find(experiment).swept
    finished = {f.config.run: f.table().assign(**swept(f.config)) for f in map(RunFolder, configs) if f.finished}
    content = _sorted(pd.concat(finished.values())).to_csv(index=False, lineterminator="\n").encode()
    if path.exists() and path.read_bytes() == content:
        return 0
    before = set(read_csv(path).run) if path.exists() else set()
    write_bytes(path, content)
    return len(finished.keys() - before) or len(finished)  # with none: all of them were trained again


def _merge(experiment: str, mode: str, configs: Sequence[Any], whole: Sequence[Any]) -> tuple[Path, int]:
    name = name_of(experiment, mode)
    _mend(name, mode)
    where = holders(mode) if mode != "quick" else {}
    before = sidecar(name, mode) if (folder_of(mode) / f"{name}.json").exists() else {}
    held = [c for c in whole if where.get(c.run) == name]
    own = {f.config.run: f for f in map(RunFolder, configs) if f.finished}
    again = [f for run, f in own.items() if run in where and _another(f, sidecar(where[run], mode))]
    mine = [f for f in again if where[f.config.run] == name]
    replaced = bool(mine) and all(c.run in own for c in held)  # never a part: rows of two trainings do not mix
    if stay := len(again) - len(mine) * replaced:
        why = "a record is replaced as a whole, where all of its runs are trained here"
        sys.stderr.write(f"fa: {stay} of these runs have records from another training, which stay: {why}\n")
    kept = [] if replaced else held
    new = [f for run, f in own.items() if run not in where or (replaced and where[run] == name)]
    evidence = new if mode != "quick" else []  # for quick tables, which no test holds, nothing is trained twice
    for f in evidence:
        f.check()
    finished = sum(c.run in where or c.run in own for c in whole)
    if not new and (not kept or before.get("partial") == (finished < len(whole))):
        return record_path(name, mode), 0
    swept = experiments.find(experiment).swept
    tables = [f.table().assign(**swept(f.config)) for f in new]
    if kept:
        table = read(name, mode)
        tables.append(table[table.run.isin([c.run for c in kept])])
    status = {c.run: before["status"][c.run] for c in kept} | {f.config.run: f.status for f in new}
    environments = {json.dumps(e, sort_keys=True) for e in before.get("environments", []) if kept}
    for s in (status[f.config.run] for f in new):
        s.pop("sha256", "")
        environments |= {json.dumps(e, sort_keys=True) for e in (s.pop("environment"), *s.pop("earlier", []))}
    about = {
        "experiment": experiment,
        "mode": mode,
        "claims": before.get("claims") or registered.noted(name),
        "configs": {c.run: asdict(c) for c in (*kept, *(f.config for f in new))},
        "status": status,
        "environments": [json.loads(e) for e in sorted(environments)],
        "fingerprints": registered.fingerprints(kept, [f.config for f in evidence], before.get("fingerprints", {})),
        "planned": len(whole),
        "finished": finished,
        "partial": finished < len(whole),
        "wall_seconds": round(sum(map(run_seconds, status.values())), 1),
    }
    path = write(name, mode, pd.concat(tables), about)
    return path, len(own.keys() - where.keys()) + len(mine) * replaced if before != sidecar(name, mode) else 0
