"""Campaigns: what is trained, what is not trained again, when they stop; what collect refuses; bad input on the
command line."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pandas as pd
import pytest

import fa
from fa import __main__ as command
from fa import experiments, paths
from fa.results import executors, progress, records
from fa.results import runs as campaign
from fa.results.cluster import Elsewhere
from fa.results.page import Page
from fa.results.store import RunFolder
from fa.results.worker import Terms
from fa.train import loop as train
from fa.train import step as engine


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A run store and a place for tables of the test's own."""
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("FA_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("FA_WORKERS", raising=False)


def plan(rules="bp,pfa", seeds=1, epochs=2):
    return [
        replace(c, hidden="16,16")
        for c in experiments.plan("p3_fig2", "quick", seeds=seeds, epochs=epochs, rules=rules)
    ]


def run(configs, **options):
    return campaign.run(configs, **{"workers": 1, "device": "cpu", "progress": False} | options)


@contextlib.contextmanager
def nothing_trains():
    """Within the block an epoch of training is an error."""
    real = engine.Stepper.begin

    def begin(*a, **k):
        raise AssertionError("trained again")

    engine.Stepper.begin = begin
    try:
        yield
    finally:
        engine.Stepper.begin = real


# ------------------------------------------------------------------------------------------ running


def test_two_workers_give_the_numbers_of_one(monkeypatch, tmp_path):
    configs = plan("bp,pfa,usf")
    assert (run(configs, workers=1).done, len(configs)) == (3, 3)
    alone = [RunFolder(c).table() for c in configs]
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "other"))
    summary = run(configs, workers=2)
    assert (summary.before, summary.done, summary.left, summary.failed) == (0, 3, 0, [])
    for config, want in zip(configs, alone):
        pd.testing.assert_frame_equal(RunFolder(config).table(), want, check_exact=True)


def test_a_finished_run_is_never_trained_twice():
    configs = plan("bp,fa")
    first = run(configs[:1])
    assert (first.before, first.done, first.left) == (0, 1, 0)
    folder = RunFolder(configs[0])
    content = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.path.iterdir()}
    assert content.keys() == {"config.json", "metrics.csv", "status.json", "progress.csv", "lock"}
    assert campaign.missing(configs) == configs[1:]
    with nothing_trains():
        again = run(configs[:1])
    assert (again.before, again.done, again.left, again.failed) == (1, 0, 0, [])
    second = run(configs)
    assert (second.before, second.done, second.left) == (1, 1, 0)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.path.iterdir()} == content
    assert json.loads((folder.path / "config.json").read_text())["rule"] == "bp"


def test_a_budget_stops_a_campaign_and_the_next_call_goes_on(monkeypatch):
    configs = plan("bp,pfa", epochs=3)
    with monkeypatch.context() as m:  # time is up when a run is about to train its first epoch
        m.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: math.inf))
        stopped = run(configs, budget=3600)
    assert (stopped.before, stopped.done, stopped.left, stopped.failed) == (0, 0, 2, [])
    assert all((RunFolder(c).path / "checkpoint.pt").exists() for c in configs)
    done = run(configs, budget=3600)
    assert (done.before, done.done, done.left) == (0, 2, 0)
    undisturbed = train.train(configs[1])
    assert (RunFolder(configs[1]).table().value.to_numpy() == undisturbed.value.to_numpy()).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_budget_leaves_no_time_for_is_not_begun_and_told(workers, monkeypatch, capsys, tmp_path):
    configs = plan("bp,fa,pfa", epochs=1)
    monkeypatch.setattr(campaign, "processes", None)  # none is started
    summary = run(configs, budget=1e-6, workers=workers, progress=True)
    assert (summary.before, summary.done, summary.left, summary.failed) == (0, 0, 3, [])
    assert capsys.readouterr().err == "fa: time was up before any run began; the next call needs a longer budget\n"
    assert not list(tmp_path.iterdir())
    assert campaign.run_one(configs[:2], until=time.time()) == [{"state": "waiting"}] * 2, "its worker came too late"
    clock = iter([0.0, 1.0, 2.0, *[math.inf] * 9])  # begin, before the first worker, the first run, all that follows
    monkeypatch.setattr(campaign, "time", types.SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic))
    monkeypatch.setattr(campaign, "train_runs", lambda runs, *_: [None] * len(runs))
    run(configs, budget=3600)
    assert capsys.readouterr().err == "fa: time was up before 2 of the 3 runs began\n"


@dataclass(frozen=True)
class Needing:
    """A recipe that needs another run."""

    needs: tuple = ()
    rule: str = "bp"
    run: str = "needing"


def test_the_time_of_a_run_that_others_need_counts_once(monkeypatch):
    now, ends = [0.0], []

    def trained(configs, until, **_):
        now[0] += 4.0
        ends.append(until)
        RunFolder(configs[0]).finish(pd.DataFrame({"value": [0.0]}), {"state": "finished", "seconds": 4.0})
        return [{"state": "finished"}]

    monkeypatch.setattr(campaign, "time", types.SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(campaign, "run_one", trained)
    assert run([Needing(tuple(plan("bp")))], budget=10).left == 0 and ends == [10.0, 10.0]


def test_a_budget_counts_from_the_beginning_of_the_command(monkeypatch, capsys):
    """What the command imports takes seconds."""
    seen = []
    nothing = campaign.Summary(0, 0, 1, [], 0.0)
    monkeypatch.setattr(campaign, "run", lambda configs, budget, *_, **__: seen.append(budget) or nothing)
    now = [0.0]
    monkeypatch.setattr(command, "time", types.SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(executors, "keep_pages", lambda: now.__setitem__(0, 5.0))  # called after the imports
    grid = "run p3_fig2 --mode quick --rules bp --seeds 1 --epochs 1 --workers 1 --device cpu --budget 20s"
    assert command.main(grid.split()) == 0 and seen == [15.0]


def test_runs_that_were_begun_come_first():
    configs = plan("bp,fa,pfa")
    RunFolder(configs[2]).save({"epoch": 0})
    assert campaign.missing(configs) == [configs[2], *configs[:2]]


def test_a_run_that_another_process_trains_is_left_to_it():
    configs = plan("bp,fa")
    with RunFolder(configs[0]).lock() as mine:
        assert mine
        summary = run(configs)
    assert (summary.done, summary.left, summary.failed) == (1, 1, [])
    assert run(configs).done == 1


def test_runs_that_another_process_holds_make_the_command_fail(monkeypatch, capsys):
    configs = plan("bp,fa", epochs=1)
    monkeypatch.setattr(experiments, "plan", lambda *a, **k: configs)
    arguments = ["run", "p3_fig2", "--mode", "quick", "--workers", "1", "--device", "cpu"]
    with RunFolder(configs[0]).lock():
        assert command.main(arguments) == 1
    assert "1 of 2 runs are finished, 1 of them now, 1 is being trained by another process" in capsys.readouterr().out
    assert command.main(arguments) == 0 and "another process" not in capsys.readouterr().out


def test_a_page_waits_for_a_run_that_another_process_trains():
    """Two notebooks of a batch share runs; neither is drawn without them."""
    page = Page("p3_fig2", mode="quick", rules=["bp"], seeds=1, epochs=1)
    (config,) = page.runs
    with ThreadPoolExecutor(1) as pool, RunFolder(config).lock():
        table = pool.submit(page.table)
        with pytest.raises(TimeoutError):
            table.result(timeout=3)
        trained = train.train(config)
        RunFolder(config).finish(trained, trained.attrs["status"])
    assert set(table.result().run) == {config.run} and page.partial() == ""


def test_a_run_without_its_status_is_not_finished():
    """The status is written last: a process that died between table and status left an unfinished run."""
    configs = plan("bp")
    run(configs)
    folder = RunFolder(configs[0])
    want = folder.table()
    (folder.path / "status.json").unlink()
    assert campaign.missing(configs) == configs
    assert run(configs).done == 1
    pd.testing.assert_frame_equal(folder.table(), want, check_exact=True)


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(monkeypatch, capsys):
    configs = plan("bp,fa")
    real = engine.Stepper.begin

    def begin(self, epoch):
        if self.config.rule == "bp":
            raise ZeroDivisionError("by design")
        return real(self, epoch)

    monkeypatch.setattr(engine.Stepper, "begin", begin)
    summary = run(configs)
    assert (summary.done, summary.left) == (1, 1)
    assert len(summary.failed) == 1 and configs[0].run in summary.failed[0] and "by design" in summary.failed[0]
    assert "by design" in capsys.readouterr().err  # with its traceback


DYING = """
import os, sys
from fa.train import step
from fa.results import runs as campaign
sys.path.insert(0, {tests!r})
from test_campaign import plan
configs = plan("bp,fa", epochs=2)
{script}
"""


def script(text, tmp_path, **popen):
    """A campaign in a process of its own, which reads this module."""
    path = tmp_path / "dying.py"
    path.write_text(DYING.format(tests=os.path.dirname(__file__), script=text))
    env = os.environ | {"PYTHONPATH": f"{fa.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a job in the background ignores Ctrl-C)
    return subprocess.Popen([sys.executable, path], env=env, preexec_fn=hear, **pipes, **popen)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_run_goes_on(tmp_path):
    """One run kills its first worker, another one every worker that it gets."""
    done = script(
        """
real = step.Stepper.begin
def begin(self, epoch):
    first = not os.path.exists(os.environ["FA_RUNS"] + "/died")
    if self.config.rule == "bp" or first:
        open(os.environ["FA_RUNS"] + "/died", "w").close()
        os._exit(9)
    return real(self, epoch)
step.Stepper.begin = begin
if __name__ == "__main__":
    summary = campaign.run(configs, workers=2, device="cpu")
    print(summary.done, summary.failed)
""",
        tmp_path,
    )
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert out.startswith("1 ['bp seed 0 (") and "its worker died 3 times" in out
    assert "Traceback" not in err and "2 of 2 runs to train, starting 2 processes ..." in err
    assert err.count("the worker process of bp seed 0 ended (it was killed); another one takes the run up") == 2
    assert err.count("the worker process of fa seed 0") <= 1 and "BrokenProcessPool" not in out + err


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_workers_end_with_the_command(kill, status, tmp_path):
    """Stopped, it says in one sentence how to go on; killed, it can say nothing."""
    arguments = "run p3_fig2 --mode quick --rules bp,fa --seeds 1 --workers 2 --device cpu"
    done = script(
        f"""
import time
from fa.__main__ import main
def begin(self, epoch):
    open(os.environ["FA_RUNS"] + f"/pid{{os.getpid()}}", "w").close()
    time.sleep(600)
step.Stepper.begin = begin
if __name__ == "__main__":
    sys.exit(main({arguments.split()}))
""",
        tmp_path,
        start_new_session=True,
    )
    store = tmp_path / "runs"

    def pids():
        return [int(p.name[3:]) for p in store.glob("pid*")] if store.exists() else []

    def alive():
        return [
            p for p in pids() if os.path.exists(f"/proc/{p}") and "Z" not in open(f"/proc/{p}/stat").read().split()[2]
        ]

    wait_for(lambda: len(pids()) == 2)
    os.killpg(done.pid, kill) if kill == signal.SIGINT else os.kill(done.pid, kill)  # Ctrl-C reaches the whole group
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (status, "") and "Traceback" not in err
    if kill != signal.SIGKILL:
        assert err.splitlines()[-1] == (
            f"fa: stopped; what is finished and checkpointed is kept, go on with: python -m fa {arguments}"
        )
    wait_for(lambda: not alive())


def test_a_second_ctrl_c_is_heard_as_the_first(tmp_path):
    """While workers start, and while the command ends."""
    command_line = [
        sys.executable,
        "-m",
        "fa",
        "run",
        "p3_fig2",
        "--mode",
        "quick",
        "--workers",
        "2",
        "--device",
        "cpu",
    ]
    env = os.environ | {"PYTHONPATH": str(fa.ROOT), "FA_RUNS": str(tmp_path / "runs")}
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear)
    done = subprocess.Popen(command_line, cwd=fa.ROOT, env=env, **pipes)
    assert done.stderr.readline() == "18 of 18 runs to train, starting 2 processes ...\n"
    while done.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(done.pid, signal.SIGINT)
        time.sleep(0.2)
    out, err = done.communicate()
    assert (done.returncode, out) == (130, "") and "Traceback" not in err and err.count("fa: stopped") == 1


def test_a_compiler_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with nothing_trains(), pytest.raises(fa.UserError, match="finds no compiler.*leave --compile out"):
        run(plan("bp"), compiled=True)


def wait_for(condition):
    end = time.monotonic() + 300  # a process starts in seconds, or in minutes where the machine is busy
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_any_executor_serves(tmp_path):
    configs = plan("bp,fa", epochs=1)
    with ThreadPoolExecutor(1) as pool:
        summary = campaign.run(configs, device="cpu", executor=Elsewhere(pool, Terms(tmp_path)), progress=False)
    assert (summary.done, summary.left) == (2, 0)


def test_a_log_says_at_once_what_there_is_to_do(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # in a notebook it is a bar
    run(plan("bp,fa", epochs=1)[:1], progress=False)
    run(plan("bp,fa", epochs=1), progress=True)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "1 of 2 runs to train" and last.startswith("1/1 runs, 1/1 epochs, ") and "fa seed 0 epoch 1" in last


def test_bad_input_stops_a_campaign_with_its_sentence():
    with pytest.raises(fa.UserError, match="unknown option .* known: "):
        run([replace(plan("bp")[0], rule="fa", options="inti=xavier")])


def test_nothing_to_do_is_no_error():
    summary = run([])
    assert (summary.before, summary.done, summary.left) == (0, 0, 0)
    assert "0 of 0 runs" in str(summary)


@pytest.mark.parametrize(
    "text, value",
    [("90", 90), ("90s", 90), ("9m", 540), ("1.5h", 5400), ("0.5", 0.5), ("2h10m", 7800), ("1h02m", 3720)],
)
def test_times(text, value):
    assert progress.seconds(text) == value


@pytest.mark.parametrize("text", ["", "0", "-3m", "9x", "m", "inf", "nan"])
def test_bad_times(text):
    with pytest.raises(fa.UserError, match="9m or 1.5h"):
        progress.seconds(text)


def test_workers(monkeypatch):
    assert executors.pick_workers("auto") >= 1 and executors.pick_workers("3") == 3 and executors.pick_workers(2) == 2
    monkeypatch.setenv("FA_WORKERS", "7")
    assert executors.pick_workers("auto") == 7
    for bad in ("0", "-1", "many", 0, "1.5"):
        with pytest.raises(fa.UserError, match="workers"):
            executors.pick_workers(bad)


def test_clock():
    assert [progress.clock(s) for s in (7, 59.6, 185, 3725, 0)] == ["7s", "1m00s", "3m05s", "1h02m", "0s"]


# ------------------------------------------------------------------------------------------ planning


def test_plan_has_whole_seeds_first():
    configs = experiments.plan("p3_fig2", "paper")
    assert len(configs) == 30 and len({c.run for c in configs}) == 30
    assert [c.seed for c in configs] == [s for s in range(5) for _ in range(6)]
    assert {c.rule for c in configs[:6]} == set(experiments.p3_fig2.RULES)
    assert {c.dataset for c in configs} == {"mnist"} and {c.epochs for c in configs} == {40}
    assert {c.rule: (c.weight_decay, c.first_weight_decay) for c in configs} == {
        "bp": (1e-4, 0), "fa": (1e-4, 0), "dfa": (1e-4, 0), "usf": (1e-4, 0), "pfa": (9e-5, 0.03), "pfa_o": (9e-5, 0.03),
    }  # fmt: skip


def test_plan_of_a_few_rules_is_part_of_the_whole():
    whole = {c.run for c in experiments.plan("p3_fig2", "paper")}
    part = {c.run for c in experiments.plan("p3_fig2", "paper", seeds=2, rules=" pfa , bp")}
    assert len(part) == 4 and part < whole


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(experiment="p9_fig1"), "p3_fig2"),
        (dict(mode="record"), "quick, small, paper"),
        (dict(mode="papr"), "quick, small, paper"),
        (dict(rules="bp,pfaa"), "pfa_o"),
        (dict(dataset="minst"), "mnist"),
        (dict(seeds=-1), "negative"),
        (dict(epochs=-1), "negative"),
        (dict(expand=3), "expansion"),
    ],
)
def test_plan_names_the_known(arguments, word):
    with pytest.raises(fa.UserError, match=word):
        experiments.plan(**{"experiment": "p3_fig2", "mode": "quick"} | arguments)


# ------------------------------------------------------------------------------------------ collecting


def test_collect_refuses_a_part_unless_it_is_told():
    configs = plan("bp,fa", seeds=2)
    with pytest.raises(fa.UserError, match="0 of 4 runs of p3_fig2.*python -m fa run p3_fig2 --mode quick"):
        records.collect("p3_fig2", "quick", configs, partial=True)
    run(configs[:3])
    with pytest.raises(fa.UserError, match="3 of 4.*--partial"):
        records.collect("p3_fig2", "quick", configs)
    assert not records.record_path("p3_fig2", "quick").exists()
    path, _ = records.collect("p3_fig2", "quick", configs, partial=True)
    about = records.sidecar("p3_fig2", "quick")
    assert (about["partial"], about["planned"], about["finished"]) == (True, 4, 3)
    assert path == records.record_path("p3_fig2", "quick")
    run(configs)
    records.collect("p3_fig2", "quick", configs)
    about, table = records.sidecar("p3_fig2", "quick"), records.read("p3_fig2", "quick")
    assert (about["partial"], about["finished"], len(about["configs"])) == (False, 4, 4)
    assert table.columns.tolist() == records.COLUMNS and set(table.run) == {c.run for c in configs}
    assert about["fingerprints"] == {}, "no test compares a quick table's: its runs would be trained twice"
    assert all(s["state"] == "finished" and "environment" not in s for s in about["status"].values())
    assert about["environments"]
    whole = table[table.layer == ""]
    assert whole.depth.isna().all() and not table.duplicated(["run", "epoch", "layer", "metric"]).any()
    first = path.read_bytes(), path.with_suffix(".json").read_bytes()
    records.collect("p3_fig2", "quick", configs)
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == first  # no time in it
    records.collect("p3_fig2", "quick", configs[::-1])
    assert path.read_bytes() == first[0]  # whatever the order


def test_a_record_holds_the_figures_own_runs_and_loses_none(monkeypatch):
    """A part of the figure makes a partial record, other settings go to build/, and nothing new changes nothing."""
    figure, other = plan("bp,fa", seeds=2), plan("kp")
    monkeypatch.setattr(experiments, "plan", lambda *args: figure)
    run([*figure, *other])
    with pytest.raises(fa.UserError, match="2 of 4 runs of p3_fig2.*--mode paper --seeds 1, or collect with --partial"):
        records.collect("p3_fig2", "paper", figure[:2], given=" --mode paper --seeds 1")
    path, new = records.collect("p3_fig2", "paper", figure[:2], partial=True)
    about = records.sidecar("p3_fig2")
    assert (new, about["partial"], about["planned"], about["finished"]) == (2, True, 4, 2)
    assert records.collect("p3_fig2", "paper", figure) == (path, 2)
    about = records.sidecar("p3_fig2")
    assert not about["partial"] and len(about["configs"]) == 4
    assert set(about["fingerprints"]) <= set(about["configs"]) and len(about["fingerprints"]) == 2  # one a recipe
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir()}
    assert records.collect("p3_fig2", "paper", figure[:2], partial=True) == (path, 0)
    assert records.collect("p3_fig2", "paper", figure) == (path, 0)
    elsewhere, new = records.collect("p3_fig2", "paper", [*figure, *other])
    assert (elsewhere, new) == (records.build("paper") / "p3_fig2.csv", 5) and "kp" in elsewhere.read_text()
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.parent.iterdir() if p.suffix} == {
        p: b for p, b in before.items() if p.suffix
    }


def test_a_figure_that_is_trained_again_takes_the_place_of_its_record(monkeypatch, tmp_path, capsys):
    """Who trains a figure sees his own numbers in its record: all or none, so that no two trainings are mixed."""
    shared, own = plan("bp"), plan("bp,fa", seeds=2)
    plans = {"p3_fig2": shared, "p3_sparse": own}
    monkeypatch.setattr(experiments, "plan", lambda name, *args: plans[name])
    run(own)
    records.collect("p3_fig2", "paper", shared)
    records.collect("p3_sparse", "paper", own)
    first = {name: (records.record_path(name).read_bytes(), records.sidecar(name)) for name in plans}
    held = set(first["p3_sparse"][1]["configs"])
    assert held == {c.run for c in own} - {shared[0].run}

    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs of another machine"))
    monkeypatch.setattr("fa.results.store.environment", lambda: {"python": "another"})
    run(own[:3])
    for config in own[:3]:  # numbers that tell the two apart, after the same time
        folder = RunFolder(config)
        told = {**first["p3_fig2"][1]["status"], **first["p3_sparse"][1]["status"]}[config.run]
        folder.finish(folder.table().assign(value=-1.0), told)
    assert records.collect("p3_sparse", "paper", own)[1] == 0, "one of its runs is not trained here"
    assert "fa: 3 of these runs have records from another training, which stay" in capsys.readouterr().err
    assert {name: (records.record_path(name).read_bytes(), records.sidecar(name)) for name in plans} == first

    run(own)
    assert records.collect("p3_sparse", "paper", own)[1] == 3
    assert "fa: 1 of these runs have records" in capsys.readouterr().err, (
        "the other figure's, which stays in its record"
    )
    told, before = records.sidecar("p3_sparse"), first["p3_sparse"][1]
    assert set(told["configs"]) == held and told["environments"] == [{"python": "another"}]
    assert (told["claims"], told["fingerprints"]) == (before["claims"], before["fingerprints"])
    assert sum(records.read("p3_sparse").groupby("run").value.max() == -1.0) == 2
    assert records.record_path("p3_fig2").read_bytes() == first["p3_fig2"][0]
    assert records.collect("p3_fig2", "paper", shared)[1] == 1
    assert set(records.read("p3_fig2").value) == {-1.0}
    capsys.readouterr()
    assert [records.collect(name, "paper", runs)[1] for name, runs in plans.items()] == [0, 0], "the same trainings"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("add", [False, True])
def test_a_page_in_paper_mode_shows_the_runs_that_it_trained(add, monkeypatch, tmp_path, capsys):
    """Not the rows of the record, unless it is told to add to them."""
    planned = plan("bp,fa")
    monkeypatch.setattr(experiments, "plan", lambda *args: planned)
    monkeypatch.setattr("fa.results.table.plan", lambda *args, **options: planned)
    run(planned)
    records.collect("p3_fig2", "paper", planned)
    path = records.record_path("p3_fig2")
    records.write("p3_fig2", "paper", records.read("p3_fig2").assign(value=-1.0), records.sidecar("p3_fig2"))
    committed = path.read_bytes()

    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs of another machine"))
    monkeypatch.setenv("FA_ADD", "1" if add else "")
    monkeypatch.setenv("FA_WORKERS", "1")  # in this process, which is on another machine from here on
    monkeypatch.setattr("fa.results.store.environment", lambda: {"python": "another"})
    table = Page("p3_fig2", mode="paper").table()
    assert (path.read_bytes() == committed) == add == all(table.value == -1.0)
    assert [RunFolder(c).finished for c in planned] == [not add] * 2


def test_a_record_that_is_not_there():
    with pytest.raises(fa.UserError, match="mode='quick' or 'paper'"):
        records.read("p3_fig2", "quick")
    with pytest.raises(fa.UserError, match="mode='quick' or 'paper'"):
        records.sidecar("p3_fig2", "quick")


ABOUT = {"configs": {}, "status": {}, "environments": []}


def test_a_large_table_is_packed_and_the_small_one_goes():
    columns = {c: "x" for c in records.COLUMNS} | {"metric": "m" * 250, "seed": 0, "epoch": 0, "depth": pd.NA}
    small = pd.DataFrame([columns | {"value": 1 / 3}])
    path = records.write("big", "quick", small, ABOUT)
    assert path.name == "big.csv" and "0.33333333" in path.read_text()
    large = pd.concat([small.assign(value=i / 7, epoch=i) for i in range(100)] * 80)
    packed = records.write("big", "quick", large, ABOUT)
    assert packed.name == "big.csv.gz" and not path.exists()
    assert len(records.read("big", "quick")) == 8_000
    content = packed.read_bytes()
    assert records.write("big", "quick", large, ABOUT).read_bytes() == content  # no time in it
    assert records.write("big", "quick", small, ABOUT) == path and not packed.exists()


# ------------------------------------------------------------------------------------------ the command line


BAD = {
    "experiment": (["run", "p3_fig99"], "p3_fig2"),
    "mode": (["run", "p3_fig2", "--mode", "quik"], "quick, small, paper"),
    "record cannot train": (["run", "p3_fig2", "--mode", "record"], "quick, small, paper"),
    "rule": (["run", "p3_fig2", "--rules", "bp,pfaa"], "pfa_o"),
    "data set": (["run", "p3_fig2", "--dataset", "minst"], "mnist"),
    "seeds": (["run", "p3_fig2", "--seeds", "-1"], "from 0 up"),
    "epochs": (["run", "p3_fig2", "--mode", "quick", "--epochs", "-2"], "from 0 up"),
    "budget": (["run", "p3_fig2", "--mode", "quick", "--budget", "9x"], "9m or 1.5h"),
    "workers": (["run", "p3_fig2", "--mode", "quick", "--workers", "none"], "workers"),
    "device": (["run", "p3_fig2", "--mode", "quick", "--device", "tpu"], "cpu, cuda"),
    "no data": (["run", "p3_fig2", "--mode", "paper", "--budget", "1s"], "mnist"),
    "nothing to train": (["run", "p3_fig3", "--epochs", "3"], "epochs"),
    "wrong rule for it": (["run", "p3_fig3", "--rules", "fa"], "pfa_o"),
    "nothing to collect": (["collect", "p3_fig2", "--mode", "quick"], "0 of 18"),
    "parameter": (["reproduce", "-p", "seeds"], "NAME=VALUE"),
    "grid": (["reproduce", "--grid", "seeds"], "NAME=VALUE"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_status_2(case, monkeypatch, capsys, tmp_path):
    arguments, word = BAD[case]
    monkeypatch.setenv("FA_DATA", str(tmp_path / "empty"))
    with nothing_trains():
        assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert word in err and err.startswith("fa: ") and err.count("\n") == 1 and not out
    assert not list(tmp_path.rglob("*.csv"))


def test_bad_input_from_the_shell(tmp_path):
    def fa_(*arguments):
        env = os.environ | {"FA_RUNS": str(tmp_path / "runs")}
        return subprocess.run(
            [sys.executable, "-m", "fa", *arguments], cwd=fa.ROOT, env=env, capture_output=True, text=True
        )

    bad = fa_("run", "p3_fig2", "--rules", "pfaa")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1) and "pfa_o" in bad.stderr
    unknown = fa_("run", "p3_fig2", "--seed", "3")
    assert unknown.returncode == 2 and "--seed" in unknown.stderr and "Traceback" not in unknown.stderr
    assert not (tmp_path / "runs").exists()


def test_dry_run_writes_nothing(capsys, tmp_path):
    assert command.main(["run", "p3_fig2", "--mode", "quick", "--rules", "bp,pfa", "--seeds", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("2 runs planned, 0 finished, 2 to train")
        and out.endswith("nothing like them has been trained here yet\n")
        and out.count("\n") == 4
    )
    assert not list(tmp_path.iterdir())


def test_run_then_collect_from_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", records.ROOT)
    (records.ROOT / "data" / "claims").mkdir(parents=True)
    grid = ["p3_fig2", "--mode", "quick", "--rules", "bp", "--seeds", "1", "--epochs", "1"]
    assert command.main(["run", *grid, "--workers", "1", "--device", "cpu"]) == 0
    assert "1 of 1 runs are finished, 1 of them now" in capsys.readouterr().out
    assert command.main(["collect", *grid]) == 0
    path = records.build("quick") / "p3_fig2__seeds=1__epochs=1__rules=bp.csv"
    assert capsys.readouterr().out == f"{path}: 1 new run\n"
    assert command.main(["list"]) == 0
    assert "p3_fig2" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ forecast


def test_a_forecast_goes_by_the_finished_runs_of_the_same_kind():
    configs = plan("bp,fa", seeds=2)
    assert "nothing like them" in progress.forecast(configs, device="cpu")
    run(configs[:2])
    for config, seconds in zip(configs[:2], (60.0, 30.0)):
        path = RunFolder(config).path / "status.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": seconds}))
    left = campaign.missing(configs)
    assert [c.rule for c in left] == ["bp", "fa"]
    assert progress.forecast(left, budget=40.0, workers=1, device="cpu") == (
        "about 1m30s by the finished runs of their kind; 3 calls of 40s"
    )
    assert "about 45s" in progress.forecast(left, workers=2, device="cpu")
    half = [replace(left[0], epochs=1), replace(left[1], hidden="9")]
    said = progress.forecast(half, budget=1.0, workers=1, device="cpu")
    assert f"about {60 / configs[0].epochs:.0f}s" in said and "1 run of a kind" in said and "calls" not in said
    assert progress.forecast([], device="cpu") == "nothing is left to train"
