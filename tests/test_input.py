"""Bad input is one sentence, status 2, and nothing written: the command line, parameters, claims, and the machine that
it all runs on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fa
from fa import __main__ as command
from fa import experiments, paths
from fa.paths import user_folder
from fa.results import batch, cite, claims, parameters, records, registered, report, store
from fa.results.page import Page
from fa.train import data

DRAWN = {p.stem for p in (fa.ROOT / "figures").glob("*.json")}
SMALL = next((n for n in experiments.EXPERIMENTS if f"{n}_small" in DRAWN and n not in DRAWN), "no figure is here")
ONE = "run p3_fig2 --mode quick --rules fa --seeds 1 --epochs 1 --workers 1 --device cpu".split()


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FA_BUILD", str(tmp_path / "build"))
    return tmp_path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The sentence with which a command is refused."""
    capsys.readouterr()
    assert command.main(arguments) == 2, arguments
    out, err = capsys.readouterr()
    assert err.startswith("fa: ") and err.count("\n") == 1 and not out, (arguments, out, err)
    assert not any(p.is_file() for p in folder.rglob("*")), arguments
    return err


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "arguments, word",
    [
        ("run p3_fig2 --budget inf", "2h10m"),
        ("run p3_fig2 --budget 9ms", "2h10m"),
        ("run p3_fig2 --budget 10m2h", "2h10m"),
        ("run p3_fig2 --budget " + "9" * 400, "2h10m"),
        ("run p3_fig2 --device cpu:foo --mode quick", "'cpu:foo'"),
        ("run p3_fig2 --device cpu:0 --mode quick", "'cpu:0'"),
        ("run p3_fig2 --device cuda:99 --mode quick", "'cuda:99' is not there"),
        ("run p3_fig2 --seeds x", "--seeds: 'x' is no whole number from 0 up; see python -m fa run --help"),
        ("run p3_fig2 --seeds 10000000000", "no whole number"),
        ("run p3_fig2 --seeds 999999999", "at most 10,000"),
        ("run p3_fig2 --together -2", "together"),
        ("run p3_fig1", "p3_fig1 is drawn from code: nothing is trained. Draw it with: python -m fa reproduce 31\n"),
        (
            "collect p3_fig1",
            "p3_fig1 is drawn from code: nothing is trained. Draw it with: python -m fa reproduce 31\n",
        ),
        ("run", "EXPERIMENT; see python -m fa run --help"),
        ("fly", "unknown command 'fly'; known: list, run"),
        ("lst", "unknown command 'lst'; did you mean 'list'? known: list, run"),
        ("list --verbose", "unrecognized arguments: --verbose; see python -m fa list --help"),
        ("run --devce cpu", "arguments: --devce; did you mean '--device'? see python -m fa run --help"),
        ("run p3_fig2 --devce=cpu", "arguments: --devce=cpu; did you mean '--device'? see python -m fa run --help"),
        (
            "run p3_fig2 --compile yse",
            "unknown value of --compile 'yse'; did you mean 'yes'? known: auto, yes, no; see",
        ),
        ("run p3_fig2 --mode quik", "unknown mode 'quik'; did you mean 'quick'? known: quick, small, paper"),
        ("reproduce 32 --mode quik", "unknown mode 'quik'; did you mean 'quick'? known: record, quick, small, paper"),
        ("run p3_figg2", "unknown experiment 'p3_figg2'; did you mean 'p3_fig2'? known: "),
        ("run p3_fig2 --rules pfaa", "unknown rule 'pfaa'; did you mean 'pfa'? known: "),
        ("run p3_fig2 --dataset mnits", "unknown data set 'mnits'; did you mean 'mnist'? known: digits"),
        ("run p3_fig2 --device cdua", "unknown device 'cdua'; did you mean 'cuda'? known: auto"),
        ("data mnsit", "unknown data set 'mnsit'; did you mean 'mnist'? known: digits"),
        ("figure p3_fig2 --format pgn", "unknown format 'pgn'; did you mean 'png'? known: pdf, svg, png"),
        ("cite p3_fig2 --format latx", "unknown format 'latx'; did you mean 'latex'? known: text"),
        ("cite p3_figg2", "unknown figure 'p3_figg2'; did you mean 'p3_fig2'? known: p1_accuracy_small"),
        (f"cite {SMALL}", f"{SMALL} has no figure at the paper's scale; {SMALL}_small has\n"),
        (f"figure {SMALL}", f"{SMALL} has no figure at the paper's scale; {SMALL}_small has\n"),
        ("reproduce 32_pfa_fig2_mnits", "'32_pfa_fig2_mnits'; did you mean '32_pfa_fig2_mnist'? known: 00_index"),
        ("reproduce 32 -p sedes=1", "'sedes' of 32_pfa_fig2_mnist; did you mean 'seeds'? known: mode"),
        ("reproduce 3", "'3' is the beginning of 9 notebooks, 30_pfa_table1, 31_pfa_fig1_circuits"),
        ("reproduce 32 -p seeds=1 -p seeds=2", "'seeds' is given twice, as '1' and '2'"),
        ("reproduce 32 --grid seeds=1,2 --grid seeds=3", "'seeds' is given twice"),
        ("reproduce 32 --grid seeds=1,1", "value '1' twice"),
        ("reproduce 32 -p device=cpu:foo", "'cpu:foo'"),
        ("reproduce 32 --mode record -p device=tpu", "'tpu'"),
        ("cite ../data/records/p3_fig2", "unknown figure"),
        ("run p3_fig2 --rules ,", "rules=',' names no rule"),
        ("run p3_fig2 --workers 1_0 --dry-run", "workers='1_0' is not a positive number"),
        (
            "run p3_fig2 --executor dusk://host:80 --dry-run",
            "unknown executor 'dusk://host:80'; known executors: local",
        ),
        ("run p3_fig2 --executor slurm:=1 --dry-run", "unknown executor 'slurm:=1'"),
        ("plan p3_fig2 --device=", "device is empty; give 'here'"),
        ("figure p3_fig2 --width nan", "width=nan must be 1 to 40 inches"),
        ("figure p3_fig2 --width 1e9", "width=1e+09 must be 1 to 40 inches"),
        ("figure p3_fig2 --width 0.01", "width=0.01 must be 1 to 40 inches"),
        ("reproduce 32 --mode small", "p3_fig2 has no mode 'small'; it has quick and paper\n"),
        ("reproduce 33 -p epochs=3", "p3_fig3 draws random matrices"),
        ("reproduce 33 --mode record -p rules=fa", "p3_fig3 is about pfa and pfa_o, not fa"),
        ("reproduce 32 -p expansion=-5", "expansion=-5 must be a whole number from 0 to 10,000"),
        ("reproduce 32 -p expansion=0", "expansion=0 must be positive"),
        ("reproduce 33 -p n_out=0", "n_out=0 outputs has no weights"),
        ("reproduce 35 -p precision=half", "unknown precision 'half'; known: float32, bfloat16"),
        ("reproduce 23 -p trials=1000000000", "trials=1000000000 must be a whole number"),
    ],
)
def test_a_slip_on_the_command_line(arguments: str, word: str, capsys, folders: Path) -> None:
    assert word in refused(arguments.split(), capsys, folders)


def test_the_help_and_the_package_say_their_own_words(capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "--help"])
    assert "number of epochs (default: the mode's own)" in capsys.readouterr().out
    with pytest.raises(AttributeError, match="'fa' has no attribute 'vesion'; did you mean '__version__'"):
        fa.vesion
    assert not hasattr(fa, "Rule.kernel"), "as Sphinx asks"


def test_a_budget_of_hours_and_minutes(capsys) -> None:
    assert command.main([*ONE, "--budget", "2h10m", "--dry-run"]) == 0


WORDS = ["p3_fig2", "p3_fig1", "32", "quick", "paper", "record", "fa", "bp,fa", "0", "1", "-1", "9m", "9ms", "inf", "nan",
         "1e9", "cpu", "cpu:foo", "cuda:7", "auto", "mnist", "", ",", "=", "seeds=1", "seeds=1,1", "mode=quick", "a=b", "\n",
         "é", "--", "٣", "1_0", "99999999999", "yes"]  # fmt: skip
OPTIONS = ["--mode", "--seeds", "--epochs", "--rules", "--dataset", "--budget", "--workers", "--device", "--together",
           "--compile", "--partial", "--add", "-p", "--grid", "--jobs", "--help", "-x", "--budge"]  # fmt: skip


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    name=st.sampled_from(["list", "run", "collect", "reproduce", "cite", "", "rnu"]),
    rest=st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(OPTIONS), st.text(max_size=6)), max_size=6),
)
@example(name="run", rest=["p3_fig2", "--mode", "quick", "--budget", "1e9"])
@example(name="reproduce", rest=["32", "-p", "seeds=1_0"])
@example(name="collect", rest=["p3_fig2"])
def test_any_command_line_is_a_command_or_a_sentence(name: str, rest: list[str], capsys, folders: Path) -> None:
    """``fa run`` is a dry one, and notebooks are checked and not run."""
    arguments = [name, *rest, *(["--dry-run"] if name == "run" else [])]
    patch = pytest.MonkeyPatch()
    patch.setattr(batch, "each", lambda *args, **kwargs: (job for job in ()))
    patch.setattr(command, "_list", lambda args: 0)
    patch.setattr(batch, "find", lambda names, real=batch.find: real(names)[:1])
    capsys.readouterr()
    try:
        status = command.main(arguments)
    except SystemExit as end:
        assert end.code == 0 and {"--help", "-h"} & {*arguments}, arguments
        return
    finally:
        patch.undo()
    out, err = capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in err, (arguments, err)
    if status == 2:
        assert err.startswith("fa: ") and not out, (arguments, err)
    written = [p for p in folders.rglob("*") if p.is_file()]
    for path in written:
        path.unlink()  # or every later example would be blamed for it
    assert status == 0 and {p.name for p in written} == {"lock"} or not written, (arguments, written)


@pytest.mark.parametrize("mode", ["quick", "paper"])
def test_every_next_command_works_as_it_is_printed(mode: str, capsys, monkeypatch, folders: Path) -> None:
    """With its mode, its grid and its other options: from a stopped campaign to a table."""
    small = experiments.plan("p3_fig2", "quick", seeds=1, epochs=2, rules="bp,fa")
    small = [c.vary(hidden="16,16") for c in small]

    def plan(*args, rules="", epochs=0, **kwargs):
        chosen = [c for c in small if not rules or c.rule in rules]
        return [c.vary(epochs=epochs) for c in chosen] if epochs else chosen

    monkeypatch.setattr(experiments, "plan", plan)
    monkeypatch.setattr(records, "ROOT", folders)
    for options, file in (
        (["--rules", "fa, fa"], "p3_fig2.csv" if mode == "paper" else "p3_fig2__rules=fa.csv"),
        ([], "p3_fig2.csv"),
        (["--epochs", "1", "--seeds", "1"], "p3_fig2__seeds=1__epochs=1.csv"),
    ):
        next_ = [
            "run",
            "p3_fig2",
            "--mode",
            mode,
            *options,
            "--workers",
            "1",
            "--device",
            "cpu",
            "--budget",
            "0.000001s",
        ]
        said = []
        while next_:
            assert command.main(next_) == 0, capsys.readouterr().err
            said.append(capsys.readouterr().out)
            line = [text for text in said[-1].splitlines() if text.startswith("next: python -m fa ")]
            next_ = shlex.split(line[0])[4:] if line else []
            if next_[:1] == ["run"]:
                assert next_[-6:-4] == ["--budget", "0.000001s"] and next_[-4:] == ["--workers", "1", "--device", "cpu"]
                next_[-5] = "99s"
        assert re.search(rf"/{file}: (1 new run|2 new runs)\n", said[-1]) and len(said) == 3
    kept = folders / ("build/quick" if mode == "quick" else "data/records")
    assert pd.read_csv(kept / "p3_fig2.csv").epoch.max() == 2, "other settings than the figure's stay out of its table"
    assert pd.read_csv(folders / "build" / mode / "p3_fig2__seeds=1__epochs=1.csv").epoch.max() == 1
    if mode == "paper":
        assert set(pd.read_csv(kept / "p3_fig2.csv").rule) == {"bp", "fa"}
        assert not json.loads((kept / "p3_fig2.json").read_text())["partial"]


@pytest.mark.parametrize("mode", ["quick", "paper"])
def test_a_table_of_other_settings_has_the_name_that_a_notebook_gives_it(mode: str, capsys, folders: Path) -> None:
    """Each setting has its own; one that is collected again, be its rules in another order, is unchanged."""
    grid = ["p3_fig2", "--mode", mode, "--dataset", "digits", "--seeds", "1", "--epochs", "1"]
    assert command.main(["run", *grid, "--rules", "fa,bp", "--workers", "1", "--device", "cpu"]) == 0
    for rules, new in (("fa", 1), ("bp,fa", 2), ("fa,bp", 0), ("fa", 0)):
        name = Page("p3_fig2", mode, 1, 1, rules.split(","), "digits").path.name
        assert name == f"p3_fig2__seeds=1__epochs=1__rules={'fa' if rules == 'fa' else 'bp,fa'}__dataset=digits.csv"
        before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folders.rglob("p3_fig2*")}
        capsys.readouterr()
        assert command.main(["collect", *grid, "--rules", rules]) == 0
        path, said = folders / "build" / mode / name, capsys.readouterr().out
        after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folders.rglob("p3_fig2*")}
        assert said == (f"{path}: {new} new run{'s' * (new > 1)}\n" if new else f"nothing new: {path} is unchanged\n")
        assert after.keys() - before.keys() == ({path} if new else set()) and after | before == after
        assert set(pd.read_csv(path).rule) == set(rules.split(","))


EVERY = [
    pytest.param(name, mode, marks=() if mode == "paper" else pytest.mark.slow)
    for name, about in experiments.EXPERIMENTS.items()
    for mode in experiments.MODES
    if about.grid and (mode != "small" or about.small)
]


@pytest.mark.parametrize("name, mode", EVERY)
def test_every_experiment_is_planned_in_words(name: str, mode: str, capsys, folders: Path) -> None:
    """A dry run and a plan of any figure in any mode, whatever makes its runs; and without a run nothing is collected."""
    for options in ([], ["--add"]):
        assert command.main(["run", name, "--mode", mode, "--dry-run", *options]) == 0
        head, *lines, forecast = capsys.readouterr().out.splitlines()
        todo = experiments.plan(name, mode)
        if options:
            todo = [c for c in todo if c.run not in records.holders()]
        assert head == f"{len({c.run for c in todo})} runs planned, 0 finished, {len({c.run for c in todo})} to train"
        told = {line.split()[0]: line for line in lines}
        assert told.keys() == {c.run for c in todo} and forecast.startswith("nothing ")
        for c in todo:
            assert f"  {c.rule}" in told[c.run], told[c.run]
            assert (f"{getattr(c, 'epochs', None)} epochs" in told[c.run]) == hasattr(c, "epochs")
        assert command.main(["plan", name, "--mode", mode, "--device", "epyc", "--all", *options]) == 0
        assert f"{name}, mode {mode}: " in capsys.readouterr().out
    where, own = records.holders() if mode != "quick" else {}, experiments.plan(name, mode)
    status = command.main(["collect", name, "--mode", mode])
    out, err = capsys.readouterr()
    if all(c.run in where for c in own):
        assert status == 0 and out.startswith("nothing new: ") and not err
    else:
        assert (
            status == 2 and not out and err.startswith("fa: ") and f"go on with: python -m fa run {name} --mode" in err
        )
    assert not any(p.is_file() for p in folders.rglob("*") if p.name != "lock")


# -------------------------------------------------------------------------------------------- parameters and claims


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(WORDS))


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.one_of(st.sampled_from([*parameters.STANDARD, "scale", "expansion"]), st.text(max_size=4)), VALUES
    )
)
def test_any_parameters_are_a_page_or_a_sentence(values: dict) -> None:
    good = {"mode": "record", "seeds": 0, "epochs": 0, "rules": "", "dataset": "", "device": "auto"}
    try:
        parameters.check({**good, **values}, {**parameters.STANDARD, "expansion": int} | {"expansion": int})
    except fa.UserError as error:
        assert str(error) and "\n" not in re.sub(r"'[^']*'", "", str(error))


CRITERIA = ["mean(test_accuracy, rule=pfa, epoch=last)", "each(rule, [pfa, fa])", "in [-1, inf]", "sd(", ">", "and", "1e999",
            "(" * 90, "ref(x)", "layer=every", "[", "]", ",", "10**10**10", "lambda: 0", "__import__('os')", "9" * 5000, "x.y",
            "f'{1}'", "not", "if", "0/0", "paired(test_accuracy, rule=pfa, minus=bp)", "falls(test_accuracy, over=epoch)"]  # fmt: skip


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.one_of(st.sampled_from(CRITERIA), st.text(max_size=4)), min_size=1, max_size=4).map(" ".join),
    st.one_of(st.sampled_from(["1", "0", "x", "1.5", "-1", "²", ""]), st.text(max_size=3)),
    st.one_of(st.sampled_from(["1.5", "ref(test_accuracy, rule=pfa)", "unknown", "1.2.3", "-1e"]), st.text(max_size=4)),
)
def test_any_claim_is_one_or_a_sentence(criterion: str, n_min: str, target: str) -> None:
    row = {c: "x" for c in claims.COLUMNS} | {
        "criterion": criterion,
        "n_min": n_min,
        "target": target,
        "tolerance": "none",
    }
    try:
        claims.compiled("p3_fig2", row)
    except fa.UserError as error:
        assert str(error).startswith("claim x")


# -------------------------------------------------------------------------------------------------------- the machine


def raises(number: int):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_A09_a_file_system_without_locks_is_a_sentence(number: int, monkeypatch, capsys, folders: Path) -> None:
    monkeypatch.setattr(store.fcntl, "flock", raises(number))
    assert command.main(ONE) == 2
    out, err = capsys.readouterr()
    assert not out and f"cannot be locked (flock: {os.strerror(number)})" in err and "set FA_RUNS" in err
    assert not list(folders.rglob("*.json"))


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN])
def test_A09_a_run_that_another_process_trains_is_said_to_be(number: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(store.fcntl, "flock", raises(number))
    assert command.main(ONE) == 1
    assert "0 of 1 runs are finished, 0 of them now, 1 is being trained by another process" in capsys.readouterr().out


def test_A09_a_lock_that_is_refused_to_one_who_waits_is_a_sentence(monkeypatch, tmp_path: Path) -> None:
    """A notebook that waits for another one's runs would ask again for ever."""
    monkeypatch.setattr(store.fcntl, "flock", raises(errno.EAGAIN))
    with pytest.raises(fa.UserError, match="cannot be locked"), store.locked(tmp_path / "lock", tmp_path):
        pass
    with store.locked(tmp_path / "lock", tmp_path, wait=False) as mine:
        assert not mine


@pytest.mark.parametrize("value", ["file:///runs", "s3://bucket/runs", "'/runs'", '"/runs"', " /runs", "/runs\n"])
def test_A25_a_url_or_a_quoted_path_is_a_sentence(value: str, monkeypatch, capsys, folders: Path) -> None:
    for variable in ("FA_RUNS", "FA_DATA", "FA_BUILD"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(fa.UserError, match=f"{variable}=.* is no folder's path; give the path alone"):
            user_folder(variable, "x")
    assert "FA_RUNS=" in refused(ONE, capsys, folders)


def test_A25_a_tilde_or_a_variable_is_the_home_folder_in_every_variable(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, place in (
        ("FA_DATA", data.root),
        ("FA_RUNS", store.runs_root),
        ("FA_BUILD", lambda: records.build("quick").parent),
    ):
        monkeypatch.setenv(variable, "~/x")
        assert place() == tmp_path / "x", variable
        monkeypatch.setenv(variable, "$HOME/x")  # as a file of settings has it, which no shell expands
        assert place() == tmp_path / "x", variable
        monkeypatch.setenv(variable, "elsewhere")
        assert place() == fa.ROOT / "elsewhere", variable
        monkeypatch.setenv(variable, "")
        assert place() == fa.ROOT / {"FA_DATA": "data", "FA_RUNS": "data/runs", "FA_BUILD": "build"}[variable]
        monkeypatch.setenv(variable, "~nobody-of-that-name/x")
        with pytest.raises(fa.UserError, match=f"{variable}=~nobody-of-that-name/x names the home"):
            place()
        for path in ("$NOT_SET/x", "/scratch/$NOT_SET/x", "data/${NOT_SET}"):
            monkeypatch.setenv(variable, path)
            with pytest.raises(fa.UserError, match=re.escape(f"{variable}={path} names a variable that is not set")):
                place()
        monkeypatch.setenv(variable, "/scratch/a$/x")
        assert place() == Path("/scratch/a$/x"), variable
    assert user_folder("FA_NOT_SET", "x") == fa.ROOT / "x"
    (tmp_path / "clone").symlink_to(fa.ROOT)
    for root in ("~/clone", ""):
        monkeypatch.setenv("FA_ROOT", root)
        assert runpy.run_path(str(fa.ROOT / "fa" / "paths.py"))["ROOT"] == fa.ROOT


@pytest.mark.parametrize("arguments", ["cite p3_fig2", "reproduce 32", "report", "list", "run p3_fig2 --mode quick"])
def test_A26_outside_a_clone_it_says_so(arguments: str, tmp_path: Path, monkeypatch, capsys, folders: Path) -> None:
    monkeypatch.setattr(fa.paths, "ROOT", tmp_path)
    said = refused(arguments.split(), capsys, folders)
    assert f"{tmp_path} is no clone of the repository" in said and "set FA_ROOT" in said


def test_what_reads_a_clone_says_so_outside_of_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fa.paths, "ROOT", tmp_path)
    for call in (
        report.write,
        lambda: fa.cite("p3_fig2"),
        lambda: cite.draw("p3_fig2"),
        lambda: records.read("p3_fig2"),
        lambda: records.sidecar("p3_fig2"),
        lambda: records.reference("p3_fig2"),
        records.holders,
        Page("p3_fig2").table,
    ):
        with pytest.raises(fa.UserError, match=f"{tmp_path} is no clone of the repository, .* set FA_ROOT"):
            call()


def test_an_installed_package_writes_to_the_working_folder(tmp_path: Path) -> None:
    """Runs, builds and data of a package that lies away from its repository; never beside it."""
    site, work = tmp_path / "site-packages", tmp_path / "work"
    shutil.copytree(fa.ROOT / "fa", site / "fa", ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    program = """
from fa.experiments import plan
from fa.results import records, runs, store
from fa.train import data
runs.run(plan("p3_fig2", "quick", 1, 1, "bp"), workers=1, device="cpu", progress=False)
print(data.root(), data._folder("mine"), records.build("quick"), store.runs_root(), sep="\\n")
"""
    env = {n: v for n, v in os.environ.items() if n not in ("FA_ROOT", "FA_RUNS", "FA_BUILD", "FA_DATA")}
    env |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=work, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert done.stdout.split() == [str(work / place) for place in ("data", "mine", "build/quick", "data/runs")]
    assert list(work.glob("data/runs/*/status.json")) and [p.name for p in site.iterdir()] == ["fa"]


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_written_is_named_as_the_working_folder_needs_it(inside, monkeypatch, capsys, tmp_path) -> None:
    """From the repository's root where the reader stands in it, and else whole: `fa report` changes the clone."""
    monkeypatch.chdir(fa.ROOT / "notebooks" if inside else tmp_path)
    monkeypatch.setattr(report, "write", lambda: [fa.ROOT / "REPORT.md"])
    monkeypatch.setattr(cite, "draw", lambda *_: [fa.ROOT / "build" / "x.pdf", tmp_path / "x.pdf"])
    monkeypatch.setattr(batch, "_execute", lambda job, outputs, jobs: (1.0, ""))
    monkeypatch.setattr(batch, "processes", lambda: contextlib.nullcontext(lambda: ThreadPoolExecutor(1)))
    before = "" if inside else f"{fa.ROOT}/"
    assert command.main(["report"]) == 0 and capsys.readouterr().out == f"{before}REPORT.md\n"
    assert command.main(["figure", "p3_fig2"]) == 0
    assert capsys.readouterr().out == f"{before}build/x.pdf\n{tmp_path}/x.pdf\n"
    assert command.main(["reproduce", "32", "--mode", "record"]) == 0
    assert f"logs and outputs in {tmp_path}/build/record/notebooks/\n" in capsys.readouterr().out


def test_A28_a_notebook_that_ipython_runs_in_a_session_with_variables() -> None:
    """``%run`` leaves no cells of the notebook in the session's history: the session's own names do not count."""
    good = {"mode": "record", "seeds": 0, "epochs": 0, "rules": "", "dataset": "", "device": "auto"}
    for own in ("my_lr = 0.1", "mode = 'quick'; seeds = 3; my_lr = 0.1"):
        session = {"my_lr": 0.1, "In": ["", own, "%run notebooks/32_pfa_fig2_mnist.ipynb"]}
        assert parameters.given(good | session, list(parameters.STANDARD)) == good


@pytest.mark.parametrize("change", [lambda cell: f"%matplotlib inline\n{cell}", lambda cell: f"%%time\n{cell}",
                                    lambda cell: f"!ls\n{cell}", lambda cell: f"here = %pwd\nfiles = !ls\n{cell}", lambda cell: f"{cell}\nfa.notebook?",
                                    lambda cell: f"{cell}  # enough?",
                                    lambda cell: cell.replace("mode = 'record'\nseeds = 0", "mode, seeds = 'record', 0")])  # fmt: skip
def test_A28_a_misspelled_name_is_seen_beside_lines_for_ipython(change) -> None:
    good = {"mode": "record", "seeds": 0, "epochs": 0, "rules": "", "dataset": "", "device": "auto"}
    cell = "\n".join(f"{name} = {value!r}" for name, value in good.items()) + "\nepoch = 3"
    found = parameters.given({**good, "epoch": 3, "other": 1, "In": ["", change(cell)]}, list(parameters.STANDARD))
    assert found == {**good, "epoch": 3}


def test_A31_a_notebook_becomes_a_script_of_python() -> None:
    for path in (fa.ROOT / "notebooks").glob("*.ipynb"):
        told = json.loads(path.read_text(encoding="utf-8"))["metadata"]["language_info"]
        assert (told.get("file_extension"), told.get("nbconvert_exporter")) == (".py", "python"), path.name
        assert told.get("mimetype") == "text/x-python" and "version" not in told


def test_A32_a_pipe_that_closes_is_silence() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = [sys.executable, "-m", "fa", "cite", "p3_fig2"]
    done = subprocess.run(run, cwd=fa.ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 141


@pytest.mark.parametrize(
    "arguments, variable", [(ONE, "FA_RUNS"), (["reproduce", "32", "--mode", "quick"], "FA_BUILD")]
)
def test_A32_a_folder_that_cannot_be_made_is_a_sentence(arguments, variable, monkeypatch, capsys) -> None:
    monkeypatch.setenv(variable, "/dev/null/none")
    monkeypatch.setattr(batch, "processes", lambda: pytest.fail("it ran"))
    assert command.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fa: /dev/null/none/") and "cannot be written (Not a directory)" in said


def test_A34_the_cells_of_a_notebook_stay_in_one_process() -> None:
    import importlib.util

    from xdist import scheduler

    spec = importlib.util.spec_from_file_location("root_conftest", fa.ROOT / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hook = module.pytest_xdist_make_scheduler
    assert hook.pytest_impl["optionalhook"] and "LoadScopeScheduling" in hook.__code__.co_names
    assert scheduler.LoadScopeScheduling


@pytest.mark.parametrize("choice", [
    ["-k", "Cell and 2"], *(pytest.param(c, marks=pytest.mark.slow) for c in (["-p", "backwards"], ["--lf"])),
])  # fmt: skip
def test_A34_a_notebook_runs_whole_whatever_is_chosen_of_it(choice: list[str], tmp_path: Path) -> None:
    shutil.copy(fa.ROOT / "conftest.py", tmp_path)
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "outputs": [], "execution_count": None, "source": line}
             for i, line in enumerate(("a = 1", "b = a + 1", "assert a + b == 3"))]  # fmt: skip
    book = {"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}},
            "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    (tmp_path / "book.ipynb").write_text(json.dumps(book))
    (tmp_path / "backwards.py").write_text(
        "import pytest\n@pytest.hookimpl(trylast=True)\ndef pytest_collection_modifyitems(items): items.reverse()\n"
    )
    failed = tmp_path / ".pytest_cache" / "v" / "cache" / "lastfailed"
    failed.parent.mkdir(parents=True)
    failed.write_text('{"book.ipynb::Cell 2": true}')
    run = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q", "--collect-only", *choice]
    done = subprocess.run(run, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.stdout.split()[:6] == [part for i in range(3) for part in ("book.ipynb::Cell", str(i))], done.stdout


@pytest.mark.parametrize("name", ["data/records/p3_fig2.csv", "data/records/p3_fig2.json", "figures/p3_fig2.png",
                                  "figures/p3_fig2.pdf", "REPORT.md", "notebooks/00_index.ipynb"])  # fmt: skip
def test_A35_no_filter_of_the_reader_changes_bytes(name: str, tmp_path: Path) -> None:
    """As Git LFS or jq, set for all repositories: records and figures have checksums."""
    if subprocess.run(["git", "-C", fa.ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a clone")
    wide = tmp_path / "attributes"
    wide.write_text("* filter=lfs ident working-tree-encoding=UTF-16 eol=crlf\n")
    ask = ["git", "-C", fa.ROOT, "-c", f"core.attributesFile={wide}", "check-attr"]
    ask += ["filter", "ident", "working-tree-encoding", "--", name]
    told = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == ["unset"] * 3


def test_A35_no_filter_of_the_reader_strips_notebooks(tmp_path: Path) -> None:
    """With nbstripout set for all repositories, a notebook that is committed and checked out keeps its outputs."""
    done = subprocess.run(["git", "-C", fa.ROOT, "rev-parse"], capture_output=True)
    if done.returncode:
        pytest.skip("not a clone")
    wide = tmp_path / "attributes"
    wide.write_text("*.ipynb filter=nbstripout diff=ipynb\n")
    ask = ["git", "-C", fa.ROOT, "-c", f"core.attributesFile={wide}", "check-attr", "filter", "diff", "--"]
    told = subprocess.run([*ask, "notebooks/00_index.ipynb"], capture_output=True, text=True, check=True).stdout
    assert "filter: unset" in told and "diff: unspecified" in told


# ------------------------------------------------------------------------------------------- streams and environment


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of the shell, in which ``fa`` is the command."""
    env = os.environ | {"PYTHONPATH": str(fa.ROOT)} | variables
    line = line.replace("fa ", f"{shlex.quote(sys.executable)} -m fa ")
    return subprocess.run(["bash", "-c", line], cwd=fa.ROOT, env=env, capture_output=True, text=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_is_a_sentence() -> None:
    said = "fa: the output cannot be used (No space left on device); make room or give access, and call again\n"
    for line, unbuffered in (("cite p3_fig2", ""), ("report --help", ""), ("--version", ""), ("--help", "1")):
        done = shell(f"fa {line} > /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (2, said), line


def test_streams_that_are_closed_are_silence() -> None:
    done = shell("fa cite p3_fig2 >&-; echo $?; fa cite nope 2>&-; echo $?")
    assert done.stdout == "0\n2\n" and done.stderr == ""


def test_an_encoding_that_lacks_a_letter_gets_an_escape(tmp_path: Path) -> None:
    done = shell("fa data", PYTHONIOENCODING="ascii", FA_DATA=str(tmp_path / "Küche"))
    assert not done.returncode and not done.stderr and "K\\xfcche" in done.stdout


@pytest.mark.parametrize("variable, value, said", [
    ("FA_WORKERS", "many", "FA_WORKERS='many' is not a positive number or 'auto'"),
    ("FA_WORKERS", "-1", "FA_WORKERS='-1' is not a positive number or 'auto'"),
    ("FA_RUNS", "~nobody-of-that-name/x", "FA_RUNS=~nobody-of-that-name/x names the home"),
])  # fmt: skip
def test_nonsense_in_the_environment_is_a_sentence(variable, value, said, monkeypatch, capsys, folders: Path) -> None:
    monkeypatch.setenv(variable, value)
    dry = "run p3_fig2 --mode quick --device cpu --dry-run".split()
    assert said in refused(dry, capsys, folders)


def test_a_switch_is_on_or_off(monkeypatch) -> None:
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FA_ADD", value)
        assert paths.user_switch("FA_ADD") is on
    monkeypatch.delenv("FA_ADD")
    assert paths.user_switch("FA_ADD") is False
    monkeypatch.setenv("FA_ADD", "maybe")
    with pytest.raises(fa.UserError, match="FA_ADD=maybe is neither 1 .yes. nor 0 .no."):
        paths.user_switch("FA_ADD")


@pytest.mark.parametrize("change", [lambda text: text.replace("n_min", "n_mim"), lambda text: text + "stray,line\n",
                                    lambda text: text + '"' + 140_000 * "x"])  # fmt: skip
def test_a_damaged_table_of_claims_stops_a_run_before_it_begins(change, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "clone" / "data" / "claims"
    folder.mkdir(parents=True)
    content = (fa.ROOT / "data" / "claims" / "p3_fig2.csv").read_text(encoding="utf-8")
    (folder / "p3_fig2.csv").write_text(change(content), encoding="utf-8")
    monkeypatch.setattr(registered, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(data, "load", lambda name: None)
    assert command.main(["run", "p3_fig2", "--mode", "paper", "--workers", "1", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("fa: ") and err.count("\n") == 1 and "p3_fig2.csv cannot be read" in err


def test_a_budget_stops_runs_that_make_their_tables_themselves(capsys, folders: Path) -> None:
    """Such a run has no checkpoints: it is begun in time, or not."""
    grid = ["p1_signs", "--mode", "quick", "--seeds", "1"]
    command.main(["run", *grid, "--budget", "0.000001s", "--workers", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.startswith("0 of ") and "next: python -m fa run p1_signs --mode quick --seeds 1 --budget" in out
    assert not list(folders.rglob("status.json"))
