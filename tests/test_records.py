"""The committed records: whole, unaltered, and made by recipes that are still the present ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

from fa import ROOT, UserError, experiments
from fa.results import records
from fa.train.config import Config
from fa.train.loop import fingerprint

RECORDS = sorted(p.stem for p in (ROOT / "data" / "records").glob("*.json"))


@pytest.mark.parametrize("experiment", RECORDS)
def test_the_table_is_what_was_collected(experiment: str) -> None:
    path, about = records.record_path(experiment), records.sidecar(experiment)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"], (
        f"{path.name} was altered after it was collected"
    )
    assert path.stat().st_size < 2_000_000
    table = records.read(experiment)
    assert set(records.COLUMNS) <= set(table.columns)
    assert set(table.run) == set(about["configs"]) == set(about["status"])
    swept = [c for c in table.columns if c not in records.COLUMNS]
    assert not table.duplicated(["run", "seed", "epoch", "layer", "metric", *swept]).any()


@pytest.mark.parametrize("experiment", RECORDS)
def test_a_run_is_named_by_its_settings(experiment: str) -> None:
    planned = {c.run for c in experiments.plan(*records.figure_of(experiment))}
    about, held = records.sidecar(experiment), records.holders()
    assert set(about["configs"]) <= planned, (
        f"{experiment} holds runs that are not planned any more; train and collect it again"
    )
    assert about["partial"] == (not planned <= set(held))


@pytest.mark.parametrize("experiment", RECORDS)
def test_no_record_is_outgrown(experiment: str) -> None:
    about = records.sidecar(experiment)
    moved = []
    for run, told in about["fingerprints"].items():
        if fingerprint(Config(**about["configs"][run])) != told:
            moved.append(about["configs"][run]["rule"])
    assert not moved, (
        f"{experiment}: the recipe of {', '.join(moved)} changed since it was trained; raise its revision and train again"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "figures").glob("*.json")), ids=lambda p: p.stem)
def test_a_figure_is_drawn_from_the_present_table(path: Path) -> None:
    figure = json.loads(path.read_text())
    table = ROOT / (figure.get("table") or figure["code"])  # a drawing has no table
    assert hashlib.sha256(table.read_bytes()).hexdigest() == figure["sha256"], f"{path.stem} is older than {table.name}"


def test_a_missing_record_says_how_to_make_it() -> None:
    with pytest.raises(UserError, match="set mode='quick', 'small' or 'paper'"):
        records.read("p9_fig9")


def test_a_table_comes_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA_BUILD", str(tmp_path))
    rows = {
        "run": "a",
        "rule": "fa",
        "seed": 0,
        "epoch": [1, 1],
        "layer": ["", "fc1"],
        "depth": [None, 1],
        "metric": "m",
    }
    table = pd.DataFrame({**rows, "value": [1 / 3, 2.0]})
    path = records.write("x", "quick", table, {"partial": False})
    again = records.read("x", "quick")
    assert list(again.layer) == ["", "fc1"] and again.value.tolist() == pytest.approx([1 / 3, 2.0], rel=1e-7)
    assert records.sidecar("x", "quick")["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in sorted(tmp_path.glob("quick/*"))] == ["x.csv", "x.json"]  # nothing half written is left


def test_a_table_that_was_edited_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads it, a report or a collection that would give it a new checksum."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    rows = [["r", "bp", 0, 1, "", None, "test_accuracy", 98.0]]
    path = records.write("p3_fig2", "paper", pd.DataFrame(rows, columns=records.COLUMNS), {"configs": {}})
    assert records.read("p3_fig2").value.tolist() == [98.0]
    path.write_text(path.read_text().replace("98", "99"))
    with pytest.raises(UserError, match="p3_fig2.csv was changed after"):
        records.read("p3_fig2")
