"""The searches and grids of p2_tuning: what a point is, what a run that diverged counts, and a search that is shared and
killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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


# ------------------------------------------------------------------------------------------------ on a PostgreSQL server

N = 40  # trials


def postgres(name: str) -> Path | None:
    """A program of the server, in the path or where Debian's package puts it."""
    found = (
        [Path(there)] if (there := shutil.which(name)) else sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    )
    return found[-1].resolve() if found else None


@pytest.fixture
def server(tmp_path_factory) -> Iterator[str]:
    """The URL of a server of the test's own, on a free port of the loopback; it is stopped afterwards. As it refuses to
    be run by root, root becomes nobody."""
    pytest.importorskip("psycopg", reason="the extra `cluster` is not installed")
    programs = [postgres(name) for name in ("initdb", "postgres", "pg_ctl")]
    runuser = shutil.which("runuser")
    if not all(programs) or os.getuid() == 0 and not runuser:
        pytest.skip("there is no PostgreSQL server here; apt-get install postgresql")
    initdb, serve, ctl = map(str, programs)
    where = tmp_path_factory.mktemp("postgres")
    as_user: list[str] = []
    if os.getuid() == 0:
        as_user = [runuser, "-u", "nobody", "--"]
        for folder in (p for p in where.parents if Path(tempfile.gettempdir()) in p.parents):
            folder.chmod(0o755)  # pytest's are for their owner alone
        shutil.chown(where, "nobody")
    data, calm = str(where / "data"), dict(cwd=where, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [*as_user, initdb, "-D", data, "-U", "fa", "--auth=trust", "--no-sync", "--locale=C", "-E", "UTF8"], **calm
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]  # no socket in a folder, no syncing to the disk
    with open(tmp_path_factory.mktemp("log") / "log", "w") as log:
        process = subprocess.Popen([*as_user, serve, "-D", data, *options], cwd=where, stdout=log, stderr=log)
        try:
            for _ in range(600):
                with socket.socket() as s:
                    if s.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            yield f"postgresql+psycopg://fa@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*as_user, ctl, "-D", data, "-m", "fast", "-w", "stop"], **calm)
            assert process.wait(60) == 0
            with socket.socket() as s:
                assert s.connect_ex(("127.0.0.1", port)) != 0, "the server is stopped"


SEARCHING = f"""
import sys
from fa.experiments import plan
from fa.results.runs import run
whole = plan("p2_tuning", "quick", rules="wm", epochs=1, trials={N}, storage=sys.argv[1])
print(run([c for c in whole if c.part == "search"], workers=1, device="cpu", progress=False), flush=True)
"""


@pytest.mark.slow
def test_a_search_on_a_server_outlives_a_process_that_is_killed(store, server, monkeypatch):
    """Forty trials in two processes, one of them killed midway and started again: forty are finished, none twice."""

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", SEARCHING, server]
        return subprocess.Popen(command, cwd=fa.ROOT, stdout=subprocess.PIPE, text=True)

    monkeypatch.setenv("FA_STORAGE", server)
    runs = [c for c in plan("p2_tuning", "quick", rules="wm", epochs=1, trials=N) if c.part == "search"]
    finished = lambda: sum((store / c.run / "status.json").exists() for c in runs)  # noqa: E731
    killed, other = start(), start()
    while finished() < N // 4 and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    then, again = finished(), start()
    said = [p.communicate()[0].strip() for p in (other, again)]
    trials = _search.study_of(runs[0]).trials
    print(f"killed at {then} of {N} trials; afterwards {len(trials)} trials, {finished()} runs finished")
    print(*said, sep="\n")
    assert N // 4 <= then < N and (other.returncode, again.returncode) == (0, 0)
    assert sorted(t.user_attrs["number"] for t in trials) == list(range(N))
    assert all(t.state.name == "COMPLETE" for t in trials) and finished() == N
    assert len({t.value for t in trials}) > 1 and not (store / "studies").exists(), "all of it is on the server"
