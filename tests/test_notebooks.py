"""Notebooks: their form, their parameters, what they show in each mode, and running them in batch."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest

import fa
from fa import citations, experiments, paths, plot
from fa.results import batch, compare, contents, executors, parameters, records
from fa.results import page as notebooks
from fa.results import table as figure_table
from fa.train.config import Config

PAGES = sorted((fa.ROOT / "notebooks").glob("*.ipynb"))
PLAIN = {"mode": "record", "seeds": 0, "epochs": 0, "rules": "", "dataset": "", "device": "auto"}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def tagged(page: nbformat.NotebookNode, tag: str) -> list:
    return [cell for cell in page.cells if tag in cell.metadata.get("tags", [])]


# ------------------------------------------------------------------------------------------------------------- form


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
class TestForm:
    def test_format_and_kernel(self, path):
        raw = json.loads(path.read_text(encoding="utf-8"))
        nbformat.validate(raw)
        assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 5)
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        assert raw["metadata"]["kernelspec"] == kernel, "as it calls itself: with another name a page opens dirty"
        assert len({cell["id"] for cell in raw["cells"]}) == len(raw["cells"])
        assert re.match(r"# \S", raw["cells"][0]["source"][0] if raw["cells"][0]["source"] else "")

    def test_no_line_of_code_is_wider_than_its_cell(self, path):
        """In a window of 1,440 pixels, JupyterLab's list of files open; a wider one has a scroll bar."""
        code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
        wide = [line for source in code for line in source.splitlines() if len(line) > 120]
        assert not wide

    def test_one_cell_of_plain_parameters_that_papermill_understands(self, path):
        (cell,) = tagged(read(path), "parameters")
        for line in cell.source.splitlines():
            assert re.fullmatch(r"\w+: (int|float|bool|str) = [^=#]+  # [^=]+", line), line
            assert len(line) <= 88, f"read at one glance, in papermill's --help-notebook too: {line}"
        known = papermill.inspect_notebook(str(path))
        assert list(known)[: len(parameters.STANDARD)] == list(parameters.STANDARD)
        for name, kind in parameters.STANDARD.items():
            assert known[name]["inferred_type_name"] == kind.__name__
        assert known["mode"]["default"] == '"record"'

    def test_check_cells_hold_what_nbval_compares(self, path):
        checks = tagged(read(path), "nbval-check-output")
        assert checks, "without a check cell nbval passes whatever the notebook shows"
        for cell in checks:
            assert "keep_output" in cell.metadata.tags and cell.execution_count
            (output,) = cell.outputs
            shown = output.get("data", {}).get("text/html", "") or output.get("text", "")
            assert output.get("name", "stdout") == "stdout" and shown.strip()

    def test_only_kept_outputs_are_stored_and_none_is_an_error(self, path):
        for cell in read(path).cells:
            outputs = cell.get("outputs", [])
            assert not outputs or "keep_output" in cell.metadata.get("tags", []), cell.id
            assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], cell.id

    def test_no_code_cell_is_long(self, path):
        long = {c.id: n for c in read(path).cells if c.cell_type == "code" and (n := c.source.count("\n") + 1) > 25}
        assert not long, "what is longer belongs into the figure's file in fa/experiments/"

    def test_no_path_of_a_machine_or_a_working_folder(self, path):
        for cell in read(path).cells:
            text = cell.source if cell.cell_type == "code" else ""
            text += "".join(
                o.get("text", "") + "".join(o.get("data", {}).get(f"text/{kind}", "") for kind in ("plain", "html"))
                for o in cell.get("outputs", [])
            )
            found = re.search(r"(?<![\w.])(?:\.{1,2}/|~/|/(?:home|Users|root|tmp|work|mnt)\b|[A-Z]:\\)", text)
            assert not found and str(fa.ROOT) not in text, f"{cell.id}: {found}"

    def test_the_figure_is_stored(self, path):
        figures = [o for c in read(path).cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
        assert bool(figures) == any(".draw()" in cell.source for cell in read(path).cells if cell.cell_type == "code")


def test_every_experiment_has_its_notebook_and_the_index_names_all():
    stems = {p.stem for p in PAGES}
    assert {e.notebook for e in experiments.EXPERIMENTS.values()} <= stems
    stored = "".join(str(o.get("data", "")) for c in read(contents.find(["00"])[0]).cells for o in c.get("outputs", []))
    assert not [stem for stem in stems if stem not in stored], "run make refresh NOTEBOOKS=00"


# ------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("change, message", [
    ({"sedes": 3}, "unknown parameter 'sedes'; did you mean 'seeds'. known: mode, seeds, epochs, rules, dataset, device"),
    ({"mode": "fast"}, "unknown mode 'fast'; known: record, quick, small, paper"),
    ({"rules": "bp,pfaa"}, "unknown rule 'pfaa'; did you mean 'pfa'. known: .*pfa_o"),
    ({"dataset": "mnits"}, "unknown data set 'mnits'; did you mean 'mnist'. known: .*mnist"),
    ({"seeds": "3"}, "'seeds' must be of type int, not '3'"),
    ({"seeds": True}, "'seeds' must be of type int"),
    ({"epochs": -1}, "epochs=-1 must not be negative"),
    ({"expansion": 10.5}, "'expansion' must be of type int"),
])  # fmt: skip
def test_bad_parameters_are_refused_by_name(change, message):
    with pytest.raises(fa.UserError, match=message):
        notebooks.notebook(PLAIN | {"expansion": 10} | change, "p3_fig2")


def test_a_missing_parameter_and_an_unknown_experiment_are_refused():
    with pytest.raises(fa.UserError, match="parameter 'device' is missing"):
        notebooks.notebook({n: v for n, v in PLAIN.items() if n != "device"})
    with pytest.raises(fa.UserError, match="unknown experiment 'p9_fig9';.* known: .*p3_fig2"):
        notebooks.notebook(PLAIN, "p9_fig9")


def test_in_a_kernel_only_parameter_cells_count():
    """A reader's own scalars do not matter when the cell is run again; a name that papermill injected does."""
    cells = [
        "",
        "\n".join(f"{n}: {type(v).__name__} = {v!r}" for n, v in PLAIN.items()),
        "cfg = fa.notebook(globals())",
    ]
    names = PLAIN | {"In": [*cells, "radius = 3", cells[-1]], "radius": 3}
    assert notebooks.notebook(names).mode == "record"
    injected = "# Parameters\nsedes = 3\n"
    with pytest.raises(fa.UserError, match="unknown parameter 'sedes'"):
        notebooks.notebook(PLAIN | {"In": [*cells[:2], injected, cells[2]], "sedes": 3})
    again = [*cells[:2], injected, cells[2], *cells[1:]]  # the reader has gone back to the notebook's own cell
    assert notebooks.notebook(PLAIN | {"In": again, "sedes": 3}).seeds == 0


def test_own_parameters_come_from_the_experiment():
    cfg = notebooks.notebook(PLAIN | {"expansion": 3, "mode": "quick", "rules": "pfa, bp"}, "p3_fig2")
    assert cfg.own == {"expansion": 3} and cfg.rules == ["pfa", "bp"] and cfg.chosen
    assert {(c.rule, c.dataset) for c in cfg.runs} == {("pfa", "digits"), ("bp", "digits")}
    assert any("expansion=3" in c.options for c in cfg.runs)


def test_another_experiment_of_a_page_has_its_mode_and_device_and_parameters_of_its_own():
    page = notebooks.notebook(PLAIN | {"mode": "quick", "device": "cpu", "rules": "kp", "seeds": 2}, "x_precision")
    part = page.part("p3_fig2")
    assert (part.experiment, part.mode, part.device) == ("p3_fig2", "quick", "cpu")
    assert (part.rules, part.seeds, part.epochs, part.own) == ([], 0, 0, {"expansion": 10})
    assert notebooks.notebook(PLAIN, "x_precision_cifar").part("p3_fig4").name == "p3_fig4", "of the page's own scale"
    with pytest.raises(fa.UserError, match="unknown experiment 'p9_fig9'"):
        page.part("p9_fig9")


def test_record_mode_shows_the_papers_scale_where_it_is_complete_and_else_the_small_one():
    """Figure 4's record at the paper's scale is partial, and ImageNet has none."""
    cfg = notebooks.notebook(PLAIN | {"scale": "", "precision": ""}, "p3_fig5")
    assert (cfg.trained, cfg.name) == ("small", "p3_fig5_small") and cfg.reference().empty
    asked = notebooks.notebook(PLAIN | {"scale": "paper", "precision": ""}, "p3_fig5")
    assert (asked.trained, asked.name, asked.partial()) == ("paper", "p3_fig5", "no run yet") and len(asked.reference())
    with pytest.raises(fa.UserError, match="unknown scale 'large'; known: small, paper"):
        notebooks.notebook(PLAIN | {"scale": "large", "precision": ""}, "p3_fig5")
    with pytest.raises(fa.UserError, match="p3_fig2 has no mode 'small'"):
        notebooks.notebook(PLAIN | {"mode": "small", "expansion": 10}, "p3_fig2").table()


# ------------------------------------------------------------------------------------------------------------ modes


SCALED = [p for p in PAGES if any("scale: str" in cell.source for cell in tagged(read(p), "parameters"))]


@pytest.mark.parametrize("path", [
    pytest.param(p, id=p.stem, marks=() if p.stem[:2] in ("13", "26", "34") else pytest.mark.slow) for p in SCALED
])  # fmt: skip
def test_a_page_opens_at_its_other_scale_too_with_a_record_or_without(path, monkeypatch, tmp_path):
    monkeypatch.setenv("FA_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    parameters, setup, *rest = [c.source for c in read(path).cells if c.cell_type == "code"]
    exec(f"{parameters}\n{setup}", scope := {})
    scope["scale"] = {"small": "paper", "paper": "small"}[scope["cfg"].trained]
    for code in (setup, *rest):
        exec(code, scope)
    assert scope["cfg"].trained == scope["scale"] and not list(tmp_path.glob("runs/*"))


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """A figure of two rules and three seeds whose committed table this test writes; nothing is trained."""

    def plan(experiment, mode, seeds=0, epochs=0, rules="", dataset="", **own):
        fixed = {"epochs": epochs or 4, "dataset": dataset or "mnist"}
        return [
            Config(r, s, **fixed) for r in (rules.split(",") if rules else ("bp", "pfa")) for s in range(seeds or 3)
        ]

    def table(runs):
        rows = [
            (c.run, c.rule, c.seed, e, "", np.nan, "test_accuracy", 90 + e + c.seed)
            for c in runs
            for e in range(c.epochs + 1)
        ]
        return pd.DataFrame(rows, columns=records.COLUMNS)

    monkeypatch.setattr(experiments, "plan", plan)
    monkeypatch.setattr(figure_table, "plan", plan)
    for module in (notebooks, records, paths):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "data" / "claims").mkdir(parents=True)
    rows = [("p3", "Figure 2", "pfa", "", 4, "", "test_accuracy", 95.5, 0.5, 5, "here")]
    path = tmp_path / "data" / "reference" / "p3_fig2.csv"
    path.parent.mkdir()
    pd.DataFrame(rows, columns=records.REFERENCE_COLUMNS).to_csv(path, index=False)

    def commit(keep=lambda frame: frame, mode="paper"):
        rows = keep(table(runs := plan("p3_fig2", "paper")))
        there = {c.run: asdict(c) for c in runs if c.run in set(rows.run)}
        status = {run: {"state": "finished", "seconds": 1.0} for run in there}
        made = {"configs": there, "status": status, "environments": [{"torch": "9.9", "gpu": "G"}]}
        records.write("p3_fig2", mode, rows, made)

    return SimpleNamespace(commit=commit, plan=plan, open=lambda **p: notebooks.Page("p3_fig2", **p))


def test_record_mode_redraws_and_says_so(figure):
    figure.commit()
    cfg = figure.open()
    assert len(cfg.table()) == 6 * 5 and cfg.partial() == ""
    assert re.match(
        r"Nothing was trained: this page redraws data/records/p3_fig2.csv, "
        r"6 runs \(BP, PFA; 3 seeds\), made with torch 9.9, G",
        cfg.banner(),
    )
    chosen = {c.run for c in figure.plan("p3_fig2", "paper", seeds=2, rules="pfa")}
    assert set(figure.open(rules=["pfa"], seeds=2).table().run) == chosen and len(chosen) == 2


@pytest.mark.parametrize("choice", [{"rules": ["kp"]}, {"seeds": 4}, {"epochs": 9}, {"dataset": "digits", "epochs": 5}])
def test_record_mode_refuses_what_the_table_does_not_hold(figure, choice):
    figure.commit()
    with pytest.raises(fa.UserError, match=r"is not in data/records/p3_fig2.csv; set mode='quick' or 'paper'"):
        figure.open(**choice).table()


def test_a_partial_table_is_shown_and_named(figure):
    figure.commit(lambda t: t[(t.seed < 2) & ~((t.rule == "bp") & (t.epoch > 1))])
    assert figure.open().partial() == "2 of 3 seeds, 1 of 4 epochs"
    assert "PARTIAL: 2 of 3 seeds" in figure.open().banner()
    figure.commit(lambda t: t[t.rule == "bp"])
    assert figure.open().partial() == "without PFA"


def test_a_run_that_diverged_is_counted_and_drawn_and_not_taken_for_a_part(figure, monkeypatch):
    """Divergence is a result: its record is whole, and page and picture say which rule diverged."""
    short = figure.plan("p3_fig2", "paper")[0]
    figure.commit(lambda rows: rows[(rows.run != short.run) | (rows.epoch < 3)])
    about = records.sidecar("p3_fig2")
    about["status"][short.run] = {"state": "diverged", "epoch": 3, "step": 7, "seconds": 1.0}
    records.write("p3_fig2", "paper", records.read("p3_fig2"), about)
    cfg, said = figure.open(), []
    assert cfg.partial() == "" and cfg.diverged() == "1 of 6 runs diverged: BP"
    assert "1 of 6 runs diverged: BP" in cfg.banner() and "PARTIAL" not in cfg.banner()
    monkeypatch.setattr(plot, "stamp", lambda fig, text: said.append(text))
    monkeypatch.setattr(plot, "save", lambda *args, **kwargs: None)
    cfg.save(None, "caption")
    assert said == ["1 of 6 runs diverged: BP"]
    assert figure.open(rules=["pfa"]).diverged() == ""


def test_without_a_table_the_published_values_stand_alone(figure):
    cfg = figure.open()
    assert cfg.table().empty and list(cfg.table().columns) == records.COLUMNS
    assert cfg.partial() == "no run yet" and cfg.banner().startswith(
        "Nothing was trained, and there is no data/records"
    )
    assert re.search(r"pfa +- +- +- +95.50 +0.50 +5", cfg.compare("test_accuracy"))


def test_comparison_is_of_the_last_epoch_with_sample_sd(figure):
    figure.commit()
    lines = [line.split() for line in figure.open().compare("test_accuracy").splitlines()]
    assert lines[1:] == [
        ["bp", "95.00", "1.00", "3", "-", "-", "-"],
        ["pfa", "95.00", "1.00", "3", "95.50", "0.50", "5"],
    ]
    assert figure.open(epochs=9).reference().empty, "values of another experiment are not the paper's"


def test_a_comparison_may_be_by_a_column_other_than_the_rule(figure):
    figure.commit()
    lines = [line.split() for line in figure.open(rules=["bp"]).compare("test_accuracy", by=["seed"]).splitlines()]
    assert [line[0] for line in lines[1:]] == ["0", "1", "2"] and all(line[3] == "1" for line in lines[1:])


def test_a_comparison_of_what_is_not_there_says_why(figure):
    figure.commit()
    cfg = figure.open()
    known = "known: test_accuracy$"
    with pytest.raises(fa.UserError, match=f"unknown metric 'test_acuracy'; did you mean 'test_accuracy'. {known}"):
        cfg.compare("test_acuracy")
    with pytest.raises(fa.UserError, match="unknown column 'rul'; did you mean 'rule'. known: run, rule, seed"):
        cfg.compare("test_accuracy", by=["rul"])
    assert cfg.compare("test_accuracy", epoch=77) == "no test_accuracy at epoch 77"
    assert figure.open(rules=["bp"]).compare("angle_deg") == "BP has no feedback, so no angle"
    assert cfg.compare("angle_deg") == "no angle_deg in these runs"


def test_before_the_first_run_a_comparison_has_nothing_yet(figure):
    assert figure.open().compare("angle_deg") == "no angle_deg yet"


def test_a_page_says_what_would_train_what_it_lacks():
    """The modes that its figure has; and published values where there are any."""
    asked = notebooks.Page("p3_fig5", scale="paper")
    assert asked.banner().endswith("yet: published values only. To train: set mode='quick', 'small' or 'paper'.")
    with pytest.raises(fa.UserError, match=r"p3_fig4\w*.csv\S*; set mode='quick', 'small' or 'paper'$"):
        notebooks.Page("p3_fig4", rules=["kp"], seeds=99).table()


def test_a_figure_without_published_values_does_not_say_that_it_shows_them(figure, monkeypatch):
    said = []
    monkeypatch.setattr(plot, "stamp", lambda fig, text: said.append(text))
    monkeypatch.setattr(plot, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(notebooks.Page, "trail", lambda page: {})
    for only in (": published values only", ""):
        cfg = figure.open()
        cfg.save(None, "caption")
        assert f"there is no data/records/p3_fig2.csv yet{only}. To train" in cfg.banner()
        assert said.pop() == f"no run yet{only}"
        (records.ROOT / "data" / "reference" / "p3_fig2.csv").unlink(missing_ok=True)


@pytest.mark.parametrize("name, chosen", [
    ("p3_fig2", {}), ("p3_fig2", {"rules": ["kp"]}), ("p3_fig2", {"rules": ["bp"], "seeds": 1}), ("x_precision", {}),
])  # fmt: skip
def test_the_banner_names_every_record_that_holds_its_runs_and_no_other(name, chosen):
    cfg = notebooks.Page(name, **chosen)
    said, held = cfg.banner(), records.holders()
    named = re.findall(r"data/records/(\w+)\.csv", said)
    assert sorted(named) == sorted({held[c.run] for c in cfg.runs}) and cfg.path.name.partition(".")[0] in named
    assert ("1 run (BP; 1 seed)" in said) == ("seeds" in chosen)


def test_where_figures_go_and_what_they_say(figure, monkeypatch):
    from fa import plot

    stamped, saved = [], []
    monkeypatch.setattr(plot, "stamp", lambda fig, text: stamped.append(text))
    monkeypatch.setattr(plot, "save", lambda fig, name, caption, folder, **trail: saved.append((folder, trail)))
    monkeypatch.setattr(citations, "figure", lambda name, paper: f"{name} after {paper}")
    monkeypatch.setenv("FA_ADD", "1")
    two = figure.plan("p3_fig2", "paper", seeds=2)
    figure.commit(lambda t: t[t.seed < 2])
    figure.commit(lambda t: t[t.seed < 2], "quick")
    monkeypatch.setattr(figure_table.runs, "run", lambda missing, **_: SimpleNamespace(failed=[], busy=0))
    monkeypatch.setattr(records, "collect", lambda *_, **__: None)
    for mode in ("record", "quick", "paper"):
        cfg = figure.open(mode=mode)
        assert set(cfg.table().run) == {c.run for c in two}
        cfg.save(None, "caption")
    folders = [folder.relative_to(notebooks.ROOT).as_posix() for folder, _ in saved]
    assert folders == ["build/record/figures", "build/quick/figures", "figures"]
    assert stamped == [
        "partial: 2 of 3 seeds",
        "quick mode, mnist: not the paper's scale · partial: 2 of 3 seeds",
        "partial: 2 of 3 seeds",
    ]
    trail = saved[0][1]
    assert trail["table"] == "data/records/p3_fig2.csv" and trail["runs"] == 4 and trail["machine"] == "torch 9.9, G"
    assert trail["sha256"] == plot.sha256(notebooks.ROOT / trail["table"])


# ------------------------------------------------------------------------------------------------------------ batch


def test_notebooks_are_found_by_their_beginning():
    assert [p.stem for p in contents.find(["32"])] == ["32_pfa_fig2_mnist"]
    assert contents.find() == PAGES
    assert contents.find(["notebooks/32_pfa_fig2_mnist.ipynb", "32"]) == contents.find(["32"])
    with pytest.raises(fa.UserError, match="unknown notebook '99'; known: 00_index"):
        contents.find(["99"])
    with pytest.raises(
        fa.UserError, match="'4' is the beginning of 2 notebooks, 40_.*, 41_.*; give the numbers of some"
    ):
        contents.find(["32", "4"])


@pytest.mark.parametrize("call, message", [
    ({"parameters": {"sedes": "3"}}, "unknown parameter 'sedes' of 32_pfa_fig2_mnist; did you mean 'seeds'. known: mode, seeds"),
    ({"grid": {"seeds": ["1", "two"]}}, "'seeds' of 32_pfa_fig2_mnist must be of type int, not 'two'"),
    ({"parameters": {"seeds": "1"}, "grid": {"seeds": ["1"]}}, "'seeds' is both fixed and in the grid"),
    ({"parameters": {"mode": "quick"}}, "set it by --mode"),
    ({"parameters": {"rules": "bp,nobody"}}, "unknown rule 'nobody'"),
    ({"mode": "fast"}, "unknown mode 'fast'"),
    ({"jobs": -1}, "jobs must be 0"),
])  # fmt: skip
def test_batch_refuses_before_anything_runs(call, message, monkeypatch):
    monkeypatch.setattr(batch, "processes", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(fa.UserError, match=message):
        batch.reproduce(["32"], **call)


def test_batch_goes_on_after_a_failure_and_counts_it(monkeypatch, tmp_path):
    seen = []

    def execute(job, outputs, jobs):
        seen.append((job.name, job.parameters))
        return 1.0, "ValueError: no\n| in f" if job.parameters["seeds"] == 2 else ""

    monkeypatch.setattr(batch, "_execute", execute)
    monkeypatch.setenv("FA_BUILD", str(tmp_path))
    lines: list[str] = []
    grid, pool = {"seeds": ["1", "2", "3"]}, ThreadPoolExecutor(1)
    assert batch.reproduce(["32"], "record", {"rules": "bp"}, grid, say=lines.append, pool=pool) == 1
    assert [name for name, _ in seen] == [f"32_pfa_fig2_mnist__seeds={n}" for n in (1, 2, 3)]
    assert seen[0][1] == {"mode": "record", "rules": "bp", "seeds": 1}
    assert sum("FAILED" in line for line in lines) == 1 and "         ValueError: no\n         | in f" in lines
    assert lines[-1].endswith("failed: 32_pfa_fig2_mnist__seeds=2")


def test_a_cell_that_fails_is_told_with_its_number_the_end_of_its_traceback_and_its_log(monkeypatch, tmp_path):
    page = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in ("1", "def f():\n    1 / 0", "f()")]
    )
    page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(page, tmp_path / "page.ipynb")
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    (tmp_path / "out").mkdir()
    job = batch._Job(tmp_path / "page.ipynb", "quick", {}, {})
    with executors.unchanged():
        seconds, error = batch._execute(job, tmp_path / "out", 1)
    assert seconds > 0 and (tmp_path / "out" / "page.log").is_file()
    lines = error.splitlines()
    assert lines[0] == "ZeroDivisionError: division by zero"
    assert lines[1] == f"in cell [3]; all of it is in {tmp_path / 'out' / 'page.log'}"
    assert len(lines) == 2 + batch.TOLD and all(line.startswith("| ") for line in lines[2:])
    assert lines[-1] == "| ZeroDivisionError: division by zero" and any("1 / 0" in line for line in lines[2:])
    assert "\x1b" not in error


def test_batch_says_what_the_figures_are_and_names_the_report_where_it_is_about_them(monkeypatch, tmp_path):
    monkeypatch.setenv("FA_BUILD", str(tmp_path))

    def execute(job, outputs, jobs):
        folder = job.build / job.mode / "figures"
        folder.mkdir(parents=True)
        (folder / "p3_fig2.pdf").write_text("")
        return 1.0, ""

    def told(mode, grid):
        lines: list[str] = []
        assert batch.reproduce(["32"], mode, {}, grid, say=lines.append, pool=ThreadPoolExecutor(1)) == 0
        return lines[-3:]

    monkeypatch.setattr(batch, "_execute", execute)
    monkeypatch.setattr(batch, "told", lambda path: path.relative_to(tmp_path).as_posix())
    quick = told("quick", {"expansion": ["1", "10", "3"]})
    shown = "".join(f"\n  grid/expansion={n}/quick/figures/p3_fig2.pdf" for n in (1, 10, 3))
    assert quick[1] == "figures of quick mode, not at the paper's scale:" + shown
    assert not any("REPORT" in line for line in quick)
    figures, report, _ = told("record", {})
    assert figures.startswith("figures, redrawn from data/records:\n  record/figures/p3_fig2.pdf")
    assert "REPORT.md" in report


BATCH = """
import sys
from pathlib import Path
from fa.__main__ import main
from fa.results import batch
batch.find = lambda names: sorted(Path({folder!r}).glob("*.ipynb"))
if __name__ == "__main__":
    sys.exit(main({arguments}))
"""


def page_of(path: Path, code: str) -> None:
    """A notebook of a parameters cell and one more."""
    parameters = "\n".join(f"{n}: {type(v).__name__} = {v!r}" for n, v in PLAIN.items())
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.mark.slow
@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_batch_begins_no_other_notebook_and_says_how_to_go_on(stop, status, tmp_path):
    """Ctrl-C reaches the whole group; kernels end, too."""
    for name in "abc":
        page_of(
            tmp_path / f"{name}.ipynb",
            f"import os, time\nopen({str(tmp_path / name)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)",
        )
    arguments = ["reproduce", "--mode", "quick", "--jobs", "1"]
    (tmp_path / "main.py").write_text(BATCH.format(folder=str(tmp_path), arguments=arguments))
    env = os.environ | {"FA_BUILD": str(tmp_path / "build"), "PYTHONPATH": str(fa.ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    batch_ = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"],
        env=env,
        start_new_session=True,
        **pipes,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a job in the background ignores it

    def wait_for(condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end and batch_.poll() is None or condition()
            time.sleep(0.1)

    wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "a").read_text())
    kernel = int((tmp_path / "a").read_text())
    os.killpg(batch_.pid, stop) if stop == signal.SIGINT else os.kill(batch_.pid, stop)
    out, err = batch_.communicate(timeout=60)
    assert batch_.returncode == status and "Traceback" not in err
    assert err == (
        "fa: stopped; what is finished and checkpointed is kept, go on with: python -m fa reproduce --mode quick --jobs 1\n"
    )
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{kernel}") and "Z" not in Path(f"/proc/{kernel}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "the kernel goes on"
        time.sleep(0.1)
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def test_batch_runs_notebooks_in_processes_with_logs_and_environments_of_their_own(monkeypatch, tmp_path):
    """Two notebooks at once, for real; one that fails, or whose process is killed, does not stop the others."""
    show = "import os\nprint(mode, seeds, *(os.environ.get(n) for n in ('FA_BUILD', 'FA_WORKERS', 'FA_ADD')))"
    deadly = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"
    for name, code in {"good": show, "bad": "raise ValueError('no\\nmore')", "deadly": deadly}.items():
        page_of(tmp_path / f"{name}.ipynb", code)
    monkeypatch.setattr(batch, "find", lambda names: [tmp_path / f"{n}.ipynb" for n in ("deadly", "bad", "good")])
    monkeypatch.setenv("FA_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("FA_WORKERS", raising=False)
    lines: list[str] = []
    assert batch.reproduce(mode="paper", parameters={"seeds": "2"}, jobs=2, say=lines.append, add=True) == 1
    assert lines[-1].startswith("1 of 3 ran through") and {*lines[-1].partition("failed: ")[2].split(", ")} == {
        "bad",
        "deadly",
    }
    assert (
        any(line.startswith("         ValueError: no\n") for line in lines)
        and "         its process ended (it was killed)" in lines
    )
    assert f"paper 2 {tmp_path / 'build'} 1 1" in (tmp_path / "build" / "paper" / "notebooks" / "good.log").read_text()
    assert "ValueError" in (tmp_path / "build" / "paper" / "notebooks" / "bad.log").read_text()
    assert "FA_WORKERS" not in os.environ, "environments are the notebooks' own"


def test_mode_small_is_of_the_figures_that_have_it(monkeypatch):
    jobs = []
    monkeypatch.setattr(batch, "_execute", lambda job, **_: jobs.append(job.notebook.stem[:2]) or (1.0, ""))
    assert batch.reproduce(mode="small", say=lambda line: None, pool=ThreadPoolExecutor(1)) == 0
    assert jobs == ["11", "12", "13", "16", "17", "18", "23", "24", "26", "27", "34", "35", "38", "41"]


def test_the_variants_of_a_grid_keep_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("FA_BUILD", str(tmp_path))
    assert records.build("quick") == tmp_path / "quick"
    assert records.record_path("p3_fig2", "quick") == tmp_path / "quick" / "p3_fig2.csv"
    jobs = [batch._Job(PAGES[0], "quick", {}, {"seeds": f"{n}"}) for n in (1, 2)]
    assert jobs[0].build != jobs[1].build and jobs[0].build.is_relative_to(tmp_path)


def test_the_points_of_a_grid_are_joined_to_one_table(tmp_path):
    """Rows and parameters of every point; an older table is not the grid's."""
    head = "run,rule,seed,epoch,layer,depth,metric,value\n"
    for n, base in ((1, 50.0), (3, 60.0)):
        folder = tmp_path / f"expansion={n}" / "quick"
        folder.mkdir(parents=True)
        rows = [f"{rule}{n}{seed},{rule},{seed},{epoch},,,test_accuracy,{base + add + seed + epoch}" for rule, add in (("pfa", 5), ("bp", 9)) for seed in (0, 1) for epoch in (1, 2)]  # fmt: skip
        (folder / f"p3_fig2__expansion={n}.csv").write_text(head + "\n".join(rows) + "\n")
    old = tmp_path / "expansion=1" / "quick" / "p3_fig3.csv"
    old.write_text(head)
    os.utime(old, (1, 1))
    points = [({"expansion": str(n)}, tmp_path / f"expansion={n}" / "quick") for n in (1, 3)]
    (path,) = compare.over_grid(points, tmp_path, since=100)
    table = pd.read_csv(path)
    assert path == tmp_path / "p3_fig2.csv" and len(table) == 16 and list(table)[0] == "grid_expansion"
    printed = [line.split() for line in compare.last_accuracies(table).splitlines()]
    assert printed[1:] == [["grid_expansion", "BP", "PFA"], ["1", "61.50", "57.50"], ["3", "71.50", "67.50"]]
    assert compare.over_grid(points[:0], tmp_path) == []


def test_the_command_line_ends_with_a_sentence_and_not_with_a_traceback(tmp_path):
    command = [sys.executable, "-m", "fa", "reproduce", "32", "-p", "sedes=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown parameter 'sedes'" in done.stderr and "Traceback" not in done.stderr


def test_papermill_fails_on_a_misspelled_parameter(tmp_path):
    """As a user runs it, from any folder; the record is not needed for it."""
    page = contents.find(["00"])[0]
    command = [sys.executable, "-m", "papermill", str(page), "out.ipynb", "-p", "sedes", "3", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "unknown parameter 'sedes'" in done.stderr


def test_quick_mode_of_a_notebook_from_another_folder(tmp_path):
    """The whole way: papermill, training on digits, table, figure, verdicts; in a folder of its own."""
    command = [sys.executable, "-m", "papermill", str(contents.find(["32"])[0]), "out.ipynb", "--no-progress-bar"]
    command += ["-p", "mode", "quick", "-p", "seeds", "2", "-p", "epochs", "6", "-p", "rules", "bp,fa,pfa"]
    env = os.environ | {"FA_BUILD": str(tmp_path / "build"), "FA_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    name = "p3_fig2__seeds=2__epochs=6__rules=bp,fa,pfa"
    table = pd.read_csv(tmp_path / "build" / "quick" / f"{name}.csv")
    assert set(table.rule) == {"bp", "fa", "pfa"} and set(table.seed) == {0, 1} and table.epoch.max() == 6
    last = table[(table.metric == "test_accuracy") & (table.epoch == 6)].groupby("rule").value.mean()
    assert last["bp"] > 80, "backprop learns digits in six epochs"
    figure = json.loads((tmp_path / "build" / "quick" / "figures" / f"{name}.json").read_text(encoding="utf-8"))
    assert figure["dataset"] == "digits" and figure["runs"] == 6
    outputs = [o for c in read(tmp_path / "out.ipynb").cells for o in c.get("outputs", [])]
    shown = unescape("".join(o.get("data", {}).get("text/html", "") for o in outputs))
    assert "Made here, mode 'quick'" in shown and "not tested" in shown
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 1, "nobody looks: no figure while it trains"
    assert not [o for o in outputs if "epoch/s" in str(o) or "widget" in str(o.get("data", {}).keys())], "no bar at 0 %"


def test_a_rule_of_a_page_is_trained_anew_when_its_code_has_changed(monkeypatch, tmp_path):
    """Its code is no part of a run's identity."""
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FA_BUILD", str(tmp_path / "build"))

    def angle(factor):
        class Mine(fa.Rule):
            name = "mine"

            def kernel(self, W):
                return factor * W

        Mine.__module__ = "__main__"
        monkeypatch.setitem(fa.RULES, "mine", dataclass(frozen=True)(Mine))
        table = notebooks.Page("p3_fig2", mode="quick", rules=["mine"], seeds=1, epochs=1, device="cpu").table()
        return table[(table.metric == "angle_deg") & (table.epoch == 1)].value

    assert angle(2.0).max() < 1e-3 and angle(-3.0).min() > 179.9


def test_a_rule_named_twice_is_one():
    assert experiments.plan("p3_fig2", "quick", rules="bp, kp,bp") == experiments.plan(
        "p3_fig2", "quick", rules="bp,kp"
    )
