"""What holds of every figure: its file, its grid, its record; and of a run, which is its recipe."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pandas as pd
import pytest

import fa
from fa import experiments
from fa.results import records
from fa.train.config import Config, format_options, parse_options

EVERY = sorted(experiments.EXPERIMENTS)
TRAINED = [name for name in EVERY if experiments.find(name).grid]
MODES = [
    (name, mode) for name in TRAINED for mode in experiments.MODES if mode != "small" or experiments.find(name).small
]


# ------------------------------------------------------------------------------------------------------------ a run


def test_a_run_is_its_recipe_and_nothing_else():
    """No figure's name, no order of options, no way of writing a number."""
    assert "experiment" not in {f.name for f in dataclasses.fields(Config)}
    a = Config("pfa", 0, "init=xavier implicit=true expansion=10", lr=1)
    b = Config("pfa", 0, "expansion=10.0 implicit=true init=xavier", lr=1.0)
    assert a == b and a.run == b.run and a.options == "expansion=10 implicit=true init=xavier"
    assert a.run != a.vary(seed=1).run and a.run != a.vary(measure="mismatch").run and a.run != a.vary(revision=2).run


def test_vary_changes_a_field_or_an_option_and_nothing_else():
    base = Config("pfa", 3, "expansion=100 init=xavier implicit=true", batch=10)
    small = base.vary(expansion=5, implicit=None, epochs=4, density=0.1)
    assert (small.options, small.epochs, small.batch, small.seed) == ("density=0.1 expansion=5 init=xavier", 4, 10, 3)
    assert base.vary() == base and base.vary(expansion=100) == base
    assert base.vary(options="", expansion=5).options == ""  # the field itself, where it is named
    with pytest.raises(fa.UserError, match="precision"):
        base.vary(precision="float8")


@pytest.mark.parametrize("options", [{}, {"a": 1, "b": 0.25}, {"x": True, "y": "xavier", "z": 1e-5}, {"n": 0.1 + 0.2}])
def test_options_survive_their_text(options):
    assert parse_options(format_options(options)) == options


# ------------------------------------------------------------------------------------------------------------ plans


def test_no_list_names_the_figures():
    files = {p.stem for p in (fa.ROOT / "fa" / "experiments").glob("*.py") if not p.stem.startswith("_")}
    assert files == set(EVERY)
    for name, about in experiments.EXPERIMENTS.items():
        assert about is experiments.find(name) and about.paper in ("p1", "p2", "p3", "x") and about.title
        assert set(about.rules) <= set(fa.RULES)
        assert (fa.ROOT / "notebooks" / f"{about.notebook}.ipynb").exists()
    notebooks = [e.notebook for e in experiments.EXPERIMENTS.values()]
    assert notebooks == sorted(notebooks)


@pytest.mark.parametrize("name, mode", MODES)
def test_a_grid_has_every_rule_and_no_run_twice(name, mode):
    runs = experiments.plan(name, mode)
    assert runs and len({c.run for c in runs}) == len(runs)
    left_out = {
        ("x_precision_cifar", "quick"),
        ("p3_beyond_cifar", "quick"),
        ("p3_beyond_cifar", "paper"),
        ("p3_fig5", "small"),
    }
    if (name, mode) not in left_out:
        assert {c.rule for c in runs} == set(experiments.find(name).rules)
    if mode == "quick":
        assert {getattr(c, "dataset", "digits") for c in runs} == {"digits"}
    columns = {tuple(experiments.find(name).swept(c)) for c in runs}
    assert len(columns) == 1, "the swept columns are alike for every run of a figure"


@pytest.mark.parametrize("name", TRAINED)
def test_fewer_seeds_and_rules_are_a_part_of_the_figure(name):
    about = experiments.find(name)
    whole = {c.run for c in experiments.plan(name, "paper")}
    part = experiments.plan(
        name, "paper", seeds=1 if hasattr(experiments.plan(name, "paper")[0], "seed") else 0, rules=about.rules[-1]
    )
    assert part and {c.run for c in part} <= whole and {c.rule for c in part} == {about.rules[-1]}


def test_figures_share_the_runs_of_equal_recipes():
    runs = {name: {c.run for c in experiments.plan(name, "paper")} for name in TRAINED}
    shared = {(a, b): len(runs[a] & runs[b]) for a, b in itertools.combinations(sorted(runs), 2) if runs[a] & runs[b]}
    assert (
        shared["p3_fig2", "p3_sparse"] == 30
        and shared["p3_beyond", "p3_fig2"] == 30
        and shared["p3_fig2", "x_precision"] == 30
    )
    assert shared["p3_fig2", "p3_table1"] == 15 and shared["p3_fig4", "x_precision_cifar"] == 4


# ---------------------------------------------------------------------------------------------------------- records


def test_a_run_lies_in_one_record_under_its_own_name():
    names = sorted(p.stem for p in records.folder_of("paper").glob("*.json"))
    seen: dict[str, str] = {}
    for name in names:
        experiment, mode = records.figure_of(name)
        planned = {c.run: c for c in experiments.plan(experiment, mode)}
        about = records.sidecar(name)
        for run, recipe in about["configs"].items():
            assert run not in seen, f"{run} lies in {seen[run]} and in {name}"
            seen[run] = name
            assert run in planned, f"{name} holds {run}, which its figure does not plan"
            kind = type(planned[run])
            assert kind(**recipe).run == run, f"{name}: {run} is not the identity of its recipe"
        assert set(about["status"]) == set(about["configs"]) == set(records.read(name).run)
        assert {s["state"] for s in about["status"].values()} <= {"finished", "diverged"}
    assert records.holders() == seen


@pytest.mark.parametrize("name, mode", [(n, m) for n, m in MODES if m != "quick"])
def test_a_figures_table_is_the_union_of_its_runs(name, mode):
    planned = experiments.plan(name, mode)
    held = records.holders()
    if not any(c.run in held for c in planned):
        pytest.skip("no record yet")
    table, about = records.union(name, mode, planned)
    assert set(table.run) == {c.run for c in planned if c.run in held} == set(about["configs"])
    assert about["partial"] == (about["finished"] < about["planned"] == len(planned))
    swept = list(experiments.find(name).swept(planned[0]))
    assert list(table.columns[:3]) == ["run", "rule", "seed"] and set(swept) <= set(table.columns)
    assert set(table.columns) - set(records.COLUMNS) - set(swept) <= {"expansion", "share"}, "another figure's column"
    assert not table.duplicated(
        ["run", "seed", "epoch", "layer", "metric", *set(table.columns) & {"expansion", "share"}]
    ).any()
    by_run = {c.run: c for c in planned}
    for run, rows in table.drop_duplicates("run").set_index("run").iterrows():
        want = experiments.find(name).swept(by_run[run])
        assert all(rows[k] == v or (pd.isna(rows[k]) and pd.isna(v)) for k, v in want.items())


def test_every_figure_has_a_complete_record():
    """At the paper's scale or, where that wants an accelerator, at the small one."""
    held, lacking = records.holders(), set()
    for name in TRAINED:
        scales = ["paper", *(["small"] if experiments.find(name).small else [])]
        if not any(all(c.run in held for c in experiments.plan(name, scale)) for scale in scales):
            lacking.add(name)
    assert not lacking


def test_sidecars_say_no_machines_path():
    for path in records.folder_of("paper").glob("*.json"):
        assert not any(word in path.read_text() for word in ('"/', "/home", "/tmp")), path.name
        json.loads(path.read_text())
