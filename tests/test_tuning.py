"""The searches and grids of p2_tuning: what a point is, what a run that diverged counts, and a search that is shared and
killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import fa
from fa.experiments import _search, plan
from fa.experiments.p2_tuning import QUICK, Trial
from fa.results.runs import drawn, run
from fa.results.store import RunFolder
from fa.results.table import FigureTable

SEARCH = replace(QUICK, rule="wm", part="search", trials=4)


def test_the_middle_of_a_grid_and_its_corners():
    point = replace(QUICK, rule="sa", part="grid", side=3)
    options = [replace(point, number=n).recipe(replace(point, number=n).metaparameters()).options for n in (0, 2, 4, 6)]
    assert options == [
        "decay=0.0333 self_=0.0667", "decay=0.0333 self_=0.6", "decay=0.1 self_=0.2", "decay=0.3 self_=0.0667"
    ]  # fmt: skip
    kp = replace(point, rule="kp", number=5)
    config = kp.recipe(kp.metaparameters())
    assert (config.lr, config.weight_decay) == (0.03, 0.005) and kp.factors == (3.0, 1.0)


def test_a_trial_is_the_run_of_its_metaparameters():
    chosen = {"amp": 0.1, "decay": 0.2, "feedback_lr": 0.3, "init": 0.04, "input_std": 2.0,
             "noise": 1.0, "center": 0.0, "normalize": 1.0}  # fmt: skip
    config = SEARCH.recipe(chosen)
    assert config.options == "amp=0.1 center=false decay=0.2 init=0.04 input=normal input_std=2 normalize=true"
    assert config.feedback_lr == 0.3 and "input" not in SEARCH.recipe(chosen | {"noise": 0.0}).options


def test_training_that_diverges_counts_as_chance_and_is_marked(monkeypatch):
    monkeypatch.setattr(Trial, "metaparameters", lambda self: {"amp": 1e6, "decay": 0.1, "input": "normal"})
    table = drawn(replace(QUICK, rule="wm", part="grid", epochs=1))
    found = table.set_index("metric").value
    assert (found["score"], found["diverged"]) == (10, 1) and table.attrs["status"]["state"] == "diverged"


def test_the_share_of_a_grid_near_its_best():
    summary = replace(QUICK, rule="sa", part="summary", side=2)
    scores = {"a": (90.0, 0), "b": (88.0, 0), "c": (87.9, 0), "d": (10.0, 1)}
    rows = [
        [c.run, m, v]
        for c, values in zip(summary.needs, scores.values())
        for m, v in zip(("score", "diverged"), values)
    ]
    found = _search.summed(summary, pd.DataFrame(rows, columns=["run", "metric", "value"]))
    assert found == {"grid_best": 90, "grid_diverged": 25, "grid_share": 50}


def test_a_summary_reads_the_tables_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    summary = replace(QUICK, rule="bp", part="summary", side=1, epochs=1)
    assert run([summary], workers=1, device="cpu", progress=False).left == 0  # its point is trained first
    assert RunFolder(summary).table().set_index("metric").value["grid_share"] == 100


def test_where_a_search_is_kept_is_no_parameter_of_its_figure(monkeypatch):
    monkeypatch.setenv("FA_STORAGE", "")
    page = FigureTable("p2_tuning", "quick", own={"storage": "sqlite:////there/search.db", "trials": 4})
    assert page.own_name == "p2_tuning__trials=4" and len(page.runs) == 62
    assert os.environ["FA_STORAGE"] == "sqlite:////there/search.db"  # where the processes that train look for it


def test_without_optuna_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(fa.UserError, match=r"needs Optuna: pip install -e '.\[tuning\]'"):
        SEARCH.metaparameters()


# --------------------------------------------------------------------------------- with Optuna, which the lock leaves out


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("optuna", reason="the extra `tuning` is not installed")
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    monkeypatch.setenv("FA_STORAGE", "")
    return tmp_path


@pytest.mark.parametrize("url", ["", "sqlite:///{}/search.db"])
def test_a_trial_is_drawn_once_and_counted_once(store, monkeypatch, url):
    """Asked again, as after a kill, it has the same metaparameters; the next one's depend on what was told."""
    monkeypatch.setenv("FA_STORAGE", url.format(store))
    first = SEARCH.metaparameters()
    assert SEARCH.metaparameters() == first and set(first) == set(_search.SEARCHED["wm"])
    _search.tell(SEARCH, 50.0)
    _search.tell(SEARCH, 60.0)
    [trial] = _search.study_of(SEARCH).trials
    assert (trial.value, trial.user_attrs["number"]) == (50, 0)
    assert replace(SEARCH, number=1).metaparameters() != first


def test_a_storage_that_cannot_be_used_is_named(store, monkeypatch):
    monkeypatch.setenv("FA_STORAGE", "nosuch://there")
    with pytest.raises(fa.UserError, match="storage of the search cannot be used .*FA_STORAGE"):
        SEARCH.metaparameters()


CAMPAIGN = """
from fa.experiments import plan
from fa.results.runs import run
print(run(plan("p2_tuning", "quick", rules="wm", trials=6), workers=1, device="cpu", progress=False))
"""


@pytest.mark.slow
def test_a_search_that_two_processes_share_and_one_is_killed_of_ends_whole(store):
    """No trial is lost and none is counted twice."""

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", CAMPAIGN], cwd=fa.ROOT)

    runs = plan("p2_tuning", "quick", rules="wm", trials=6)
    killed, other = start(), start()
    while sum((store / c.run / "status.json").exists() for c in runs) < 2 and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.wait() == 0 and start().wait() == 0
    trials = _search.study_of(runs[0]).trials
    assert sorted(t.user_attrs["number"] for t in trials) == list(range(6))
    assert all(t.state.is_finished() for t in trials) and all((store / c.run / "status.json").exists() for c in runs)
