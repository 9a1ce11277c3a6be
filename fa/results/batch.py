"""Notebooks in batch: through papermill, several at a time, every parameter checked before anything runs."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fa.errors import UserError
from fa.paths import ROOT
from fa.results.page import check, cut, find, relative
from fa.results.records import build


@dataclass(frozen=True)
class _Job:
    notebook: Path
    mode: str
    parameters: dict[str, Any]
    variant: str  # which values of a grid; empty without one
    add: bool = False  # train only what the records lack

    @property
    def name(self) -> str:
        return self.notebook.stem + (f"__{self.variant}" if self.variant else "")

    @property
    def build(self) -> Path:
        """What $FA_BUILD is for this job: the variants of a grid have tables and figures of their own."""
        root = build("").resolve()
        return root / "grid" / self.variant if self.variant else root


def reproduce(
    notebooks: Sequence[str] = (),
    mode: str = "quick",
    parameters: Mapping[str, str] | None = None,
    grid: Mapping[str, Sequence[str]] | None = None,
    jobs: int = 0,
    say: Callable[[str], None] | None = None,
    add: bool = False,
) -> int:
    """Run notebooks through papermill, several at a time; their outputs and logs go to build/MODE/notebooks/.

    Everything is checked before anything runs. One that fails does not stop the others.

    Args:
        notebooks: names as `find` takes them; none: all.
        mode: "record", "quick" or "paper".
        parameters: name to value, for every notebook.
        grid: name to values; every combination is run, each with tables and figures of its own under build/grid/.
        jobs: notebooks at a time; 0: one a core, at most 4.
        say: takes the progress, a line at a time; default: prints.
        add: in paper mode, do not train again what data/records/ holds (default: False).
    Returns:
        exit code: 0, or 1 if any notebook failed.
    Raises:
        UserError: a notebook, parameter or value that does not exist; nothing has been run then.
    """
    say = say or (lambda line: print(line, flush=True))
    grid, fixed = dict(grid or {}), {"mode": mode, **(parameters or {})}
    if "mode" in {**(parameters or {}), **grid}:
        raise UserError("the mode is one for all; set it by --mode, not as a parameter")
    if twice := fixed.keys() & grid.keys():
        raise UserError(f"parameter {min(twice)!r} is both fixed and in the grid")
    if jobs < 0:
        raise UserError(f"jobs must be 0 (one a core) or more, not {jobs}")
    work = []
    for path, values in itertools.product(find(notebooks), itertools.product(*grid.values())):
        combination = dict(zip(grid, values))
        variant = ",".join(f"{k}={v}" for k, v in combination.items()).replace("/", "-")
        work.append(_Job(path, mode, _typed(path, fixed | combination), variant, add))
    jobs = min(jobs or min(os.cpu_count() or 1, 4), len(work))
    outputs, start, failed = build(mode) / "notebooks", time.time(), []
    count = f"{len(work)} notebook" + "s" * (len(work) != 1)
    say(f"{count}, mode {mode}, {jobs} at a time; logs and outputs in {relative(outputs)}/")
    with ThreadPoolExecutor(jobs) as pool:
        for i, done in enumerate(as_completed([pool.submit(_execute, job, outputs, jobs) for job in work]), 1):
            job, seconds, error = done.result()
            say(
                f"[{i:>{len(str(len(work)))}}/{len(work)}] {'FAILED' if error else 'ok':6s} {seconds:6.0f} s  {job.name}"
            )
            if error:
                failed.append(job.name)
                say(f"         {error}")
    folders = {job.build / mode / "figures" for job in work} | ({ROOT / "figures"} if mode == "paper" else set())
    figures = sorted(p for folder in folders for p in folder.glob("*.pdf") if p.stat().st_mtime >= start - 1)
    say("\n  ".join(["figures:", *(relative(p) for p in figures)]) if figures else "figures: none")
    say("report: REPORT.md")
    verdict = f"{len(work) - len(failed)} of {len(work)} ran through, in {time.time() - start:.0f} s"
    say(f"{verdict}; failed: {', '.join(failed)}" if failed else verdict)
    return 1 if failed else 0


def _typed(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the notebook's own cell types them; `UserError` for one that it lacks or that means nothing."""
    import papermill

    default = {n: ast.literal_eval(p["default"]) for n, p in papermill.inspect_notebook(str(path)).items()}
    words = {"true": True, "True": True, "false": False, "False": False}
    values = {}
    for name, text in raw.items():
        if name not in default:
            raise UserError(f"unknown parameter {name!r} of {path.stem}; known: {', '.join(default)}")
        kind = type(default[name])
        try:
            values[name] = words[str(text)] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise UserError(
                f"parameter {name!r} of {path.stem} must be of type {kind.__name__}, not {text!r}"
            ) from None
    check(default | values, {n: type(v) for n, v in default.items()})
    return values


def _execute(job: _Job, outputs: Path, jobs: int) -> tuple[_Job, float, str]:
    """Run one notebook in a process of its own; what it says goes to a log beside its output."""
    out = outputs / f"{job.name}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    alone = {} if jobs == 1 else {"FA_WORKERS": "1", "OMP_NUM_THREADS": "1"}  # threads of two jobs wait for one another
    env = os.environ | {"FA_BUILD": str(job.build)} | alone | ({"FA_ADD": "1"} if job.add else {})
    env["JUPYTER_PATH"] = str(
        Path(sys.prefix) / "share" / "jupyter"
    )  # this Python's kernel, whatever else the user has
    command = [sys.executable, "-m", "papermill", str(job.notebook), str(out), "-k", "python3", "--cwd", str(ROOT)]
    command += ["--no-progress-bar", "--log-output", "-y", json.dumps(job.parameters)]
    start = time.time()
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        code = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    return job, time.time() - start, _reason(out) if code else ""


def _reason(out: Path) -> str:
    """The error of a failed notebook in a line, or where to look."""
    try:
        cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
        error = next(o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error")
        return cut(f"{error['ename']}: {error['evalue'].splitlines()[0]}", 300)
    except (OSError, ValueError, KeyError, IndexError, StopIteration):
        return f"see {relative(out.with_suffix('.log'))}"


def refresh(notebooks: Sequence[str] = (), say: Callable[[str], None] | None = None) -> None:
    """For those who commit: run notebooks in place in record mode and strip them, so that they store what Run All shows.

    Args:
        notebooks: names as `find` takes them; none: all.
        say: takes the progress, a line at a time; default: prints.
    """
    import nbformat
    from nbclient import NotebookClient

    for path in find(notebooks):
        page = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(ROOT)}}
        NotebookClient(page, kernel_name="python3", resources=where, timeout=600, coalesce_streams=True).execute()
        for cell in page.cells:
            cell.metadata.pop("execution", None)
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        page.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
        nbformat.write(page, path)
        subprocess.run([sys.executable, "-m", "nbstripout", "--keep-count", "--keep-id", str(path)], check=True)
        (say or print)(f"refreshed {relative(path)}")
