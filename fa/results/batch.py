"""Notebooks in batch: through papermill, several at a time, every parameter checked before anything runs."""

from __future__ import annotations

import ast
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fa.errors import UserError, unknown
from fa.experiments import EXPERIMENTS
from fa.paths import ROOT, read_csv, told, writing
from fa.results import compare
from fa.results.contents import find
from fa.results.executors import each, processes
from fa.results.page import cut, page_of
from fa.results.parameters import check
from fa.results.records import build
from fa.tables import plural

FIGURES = {
    "record": "figures, redrawn from data/records",
    "quick": "figures of quick mode, not at the paper's scale",
    "small": "figures at the small scale",
    "paper": "figures at the paper's scale",
}
FIGURE = re.compile(r'fa\.notebook\(globals\(\), \\"(\w+)\\"')
"""How a notebook's file names its figure."""

COLOR = re.compile(r"\x1b\[[0-9;]*m")
TOLD = 4  # lines of a traceback


@dataclass(frozen=True)
class _Job:
    notebook: Path
    mode: str
    parameters: dict[str, Any]
    grid: dict[str, str]  # its point of a grid, parameter -> value; empty without one
    add: bool = False  # train only what the records lack
    root: Path = field(default_factory=lambda: build("").resolve())  # the campaign's, wherever the job is done

    @property
    def variant(self) -> str:
        """The point of the grid in words; "" without one."""
        return ",".join(f"{k}={v}" for k, v in self.grid.items()).replace("/", "-")

    @property
    def name(self) -> str:
        return self.notebook.stem + (f"__{self.variant}" if self.variant else "")

    @property
    def build(self) -> Path:
        """What $FA_BUILD is for this job: the variants of a grid have tables and figures of their own."""
        return self.root / "grid" / self.variant if self.variant else self.root


def reproduce(
    notebooks: Sequence[str] = (),
    mode: str = "quick",
    parameters: Mapping[str, str] | None = None,
    grid: Mapping[str, Sequence[str]] | None = None,
    jobs: int = 0,
    say: Callable[[str], None] | None = None,
    add: bool = False,
    pool: Executor | None = None,
) -> int:
    """Run notebooks through papermill, several at a time; their outputs and logs go to build/MODE/notebooks/.

    Everything is checked before anything runs. One that fails does not stop the others.

    Args:
        notebooks: names as `find` takes them; none: all, in mode small those of figures that have it.
        mode: "record", "quick", "small" or "paper".
        parameters: name to value, for every notebook.
        grid: name to values; every combination is run, each with tables and figures of its own under build/grid/, and
            build/grid/NAME.csv is one table of them all (:mod:`fa.results.compare`).
        jobs: notebooks at a time; 0: one a core, at most 4.
        say: takes the progress, a line at a time; default: prints.
        add: in small and paper mode, do not train again what data/records/ holds (default: False).
        pool: where the notebooks run, e.g. :class:`fa.results.cluster.Sharing`; default: processes of this machine.
    Returns:
        exit code: 0, or 1 if any notebook failed.
    Raises:
        UserError: a notebook, parameter or value that does not exist; nothing has been run then.
        KeyboardInterrupt: as it came; the notebooks that ran have been stopped.
    """
    say = say or (lambda line: print(line, flush=True))
    if mode == "small" and not notebooks:
        notebooks = [e.notebook for e in EXPERIMENTS.values() if e.small]
    work = _planned(notebooks, mode, dict(parameters or {}), dict(grid or {}), jobs, add)
    jobs = min(jobs or min(os.cpu_count() or 1, 4), len(work))
    outputs, start, failed = build(mode) / "notebooks", time.time(), []
    count = plural(len(work), "notebook")
    say(f"{count}, mode {mode}, {jobs} at a time; logs and outputs in {told(outputs)}/")
    with writing(outputs):
        outputs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as open_:
        new = (lambda: pool) if pool else open_.enter_context(processes())
        execute = partial(_execute, outputs=outputs, jobs=jobs)
        for i, (job, result, why) in enumerate(open_.enter_context(closing(each(execute, work, new, jobs))), 1):
            seconds, error = result or (0.0, f"its process ended ({why})")
            place = f"[{i:>{len(str(len(work)))}}/{len(work)}]"
            say(f"{place} {'FAILED' if error else 'ok':6s} {seconds:6.0f} s  {job.name}")
            if error:
                failed.append(job.name)
                say("\n".join(f"         {line}" for line in error.splitlines()))
    folders = dict.fromkeys([job.build / mode / "figures" for job in work] + [ROOT / "figures"])
    made = [p for folder in folders for p in sorted(folder.glob("*.pdf")) if p.stat().st_mtime >= start - 1]
    say("\n  ".join([f"{FIGURES[mode]}:", *(told(p) for p in made)]) if made else "figures: none")
    if grid:
        points = [(job.grid, job.build / mode) for job in work]
        for path in compare.over_grid(points, build("").resolve() / "grid", since=start - 1):
            say(f"the grid as one table: {told(path)}")
            if lines := compare.last_accuracies(read_csv(path)):
                say(lines)
    if mode != "quick":
        say("report on the records: REPORT.md, written by python -m fa report")
    verdict = f"{len(work) - len(failed)} of {len(work)} ran through, in {time.time() - start:.0f} s"
    say(f"{verdict}; failed: {', '.join(failed)}" if failed else verdict)
    return 1 if failed else 0


def _planned(
    notebooks: Sequence[str], mode: str, fixed: dict[str, Any], grid: dict[str, Sequence[str]], jobs: int, add: bool
) -> list[_Job]:
    """Every notebook with every combination of the grid, parameters checked."""
    if "mode" in {**fixed, **grid}:
        raise UserError("the mode is one for all; set it by --mode, not as a parameter")
    if twice := fixed.keys() & grid.keys():
        raise UserError(f"parameter {min(twice)!r} is both fixed and in the grid")
    if jobs < 0:
        raise UserError(f"jobs must be 0 (one a core) or more, not {jobs}")
    work = []
    for path, values in itertools.product(find(notebooks), itertools.product(*grid.values())):
        chosen = dict(zip(grid, values))
        work.append(_Job(path, mode, _typed(path, {"mode": mode} | fixed | chosen), chosen, add))
    return work


def _typed(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the notebook's own cell types them; `UserError` for one that it lacks or that means nothing."""
    import papermill

    try:
        default = {n: ast.literal_eval(p["default"]) for n, p in papermill.inspect_notebook(str(path)).items()}
    except Exception as error:  # whatever is wrong with the file
        raise UserError(f"notebook {told(path)} cannot be read ({type(error).__name__}); restore it") from error
    words = {"true": True, "True": True, "false": False, "False": False}
    values = {}
    for name, text in raw.items():
        if name not in default:
            raise unknown("parameter", name, default, path.stem)
        kind = type(default[name])
        try:
            values[name] = words[str(text)] if kind is bool else kind(text)
        except (ValueError, OverflowError, KeyError):
            raise UserError(
                f"parameter {name!r} of {path.stem} must be of type {kind.__name__}, not {text!r}"
            ) from None
    check(default | values, {n: type(v) for n, v in default.items()})
    for figure in dict.fromkeys(FIGURE.findall(path.read_text(encoding="utf-8"))):
        _ = page_of(figure, default | values).runs  # a mode or a rule that the figure does not have
    return values


def _execute(job: _Job, outputs: Path, jobs: int) -> tuple[float, str]:
    """Run one notebook; its kernel inherits this process's environment, and what both say goes to a log.

    Returns:
        seconds, and the error in lines ("" if there was none).
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    if jobs > 1:  # else the threads of two jobs wait for one another
        os.environ.update(FA_WORKERS="1", OMP_NUM_THREADS="1")
    if job.add:
        os.environ["FA_ADD"] = "1"
    own = Path(sys.prefix) / "share" / "jupyter"  # this Python's kernel, whatever else the user has
    os.environ.update(FA_BUILD=str(job.build), JUPYTER_PATH=str(own))
    out = outputs / f"{job.name}.ipynb"
    start, error = time.time(), ""
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        try:
            papermill.execute_notebook(
                job.notebook, out, job.parameters, kernel_name="python3", cwd=ROOT, progress_bar=False, log_output=True
            )
        except PapermillExecutionError as e:
            logging.error(e)
            error = _told(e, out.with_suffix(".log"))
        except Exception as e:  # the notebook's file, the kernel: whatever it is, the other notebooks run
            logging.exception("not run")
            error = cut(f"{type(e).__name__}: see {told(out.with_suffix('.log'))}", 300)
    return time.time() - start, error


def _told(error: Any, log: Path) -> str:
    """papermill's error in lines: what it is, its cell, the end of its traceback, and where the whole is."""
    lines = [line.rstrip() for part in error.traceback for line in COLOR.sub("", part).splitlines() if line.strip()]
    what = cut(f"{error.ename}: {(error.evalue.splitlines() or [''])[0]}", 300)
    where = f"in cell [{error.exec_count}]; all of it is in {told(log)}"
    return "\n".join([what, where, *(f"| {cut(line, 200)}" for line in lines[-TOLD:])])
