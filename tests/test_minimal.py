"""`import fa` and a campaign need torch, numpy and pandas, and nothing else that is not Python's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fa

ALONE = """
import sys

hidden = set("torchvision matplotlib seaborn sklearn scipy tqdm papermill nbformat nbclient nbval jupyterlab ipywidgets "
             "IPython ipykernel traitlets PIL pytest hypothesis "
             "distributed dask submitit optuna psycopg sqlalchemy".split())

class Hide:  # what is hidden is not there: nothing is found, nothing raises but the import itself
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]

import torch
import fa
assert "torch._dynamo" not in sys.modules, "importing fa imports the compiler, which takes a second"
from fa.train import data
from fa.__main__ import main

def split(n):
    gen = torch.Generator().manual_seed(n)
    return data.Split(torch.randn(n, 1, 8, 8, generator=gen), torch.randint(10, (n,), generator=gen))

data.load = lambda name, device="cpu", *args, **kwargs: data.Data(name, 10, split(128), None, split(32))
status = main("run p3_fig2 --mode quick --seeds 1 --epochs 1 --workers 1 --device cpu".split())
status += main(["list"])
assert not {m.partition(".")[0] for m in sys.modules} & hidden
sys.exit(status)
"""


def test_a_campaign_runs_without_the_rest(tmp_path: Path) -> None:
    env = {**os.environ, "FA_RUNS": str(tmp_path), "PYTHONPATH": str(fa.ROOT)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 runs are finished" in done.stdout
    assert len(list(tmp_path.glob("*/metrics.csv"))) == 6


def test_what_needs_no_torch_does_not_wait_for_it(tmp_path: Path) -> None:
    """Torch and pandas are two seconds of an import; where they are not to be had, these commands answer all the same."""
    env = {**os.environ, "FA_BUILD": str(tmp_path), "FA_RUNS": str(tmp_path), "PYTHONPATH": str(fa.ROOT)}

    def said(command: str, without: str = "") -> str:
        hide = "import sys; sys.modules |= dict.fromkeys('torch numpy pandas matplotlib'.split()); " if without else ""
        program = f"{hide}from fa.__main__ import main; main({command.split()})"
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
        return done.stdout + done.stderr

    assert said("--version", "torch") == f"fa {fa.__version__}\n"
    assert "usage: python -m fa" in said("--help", "torch") and "--budget" in said("run --help", "torch")
    assert said("lst", "torch").startswith("fa: unknown command 'lst'; did you mean 'list'?")
    first = said("list")  # makes the plans
    assert "p3_fig2" in first and said("list", "torch") == first
    plans = tmp_path / "plans.json"
    for changed in (plans.read_text().replace('"code": "', '"code": "0'), "{"):  # of other code; damaged
        plans.write_text(changed)
        assert said("list") == first and said("list", "torch") == first


def test_the_library_comes_with_its_first_name() -> None:
    program = """
import sys, fa
assert "torch" not in sys.modules and {*fa.__all__} <= {*dir(fa)} and not hasattr(fa, "__wrapped__")
assert "dfa" in fa.RULES and fa.rules.RULES is fa.RULES and fa.theory.decay_for is fa.decay_for
from fa import *
assert convert is fa.convert is fa.layers.convert.convert and notebook is fa.notebook
"""
    env = {**os.environ, "PYTHONPATH": str(fa.ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_any_module_may_be_the_first_that_is_imported() -> None:
    program = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path("fa").rglob("*.py")):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if not name.endswith("__main__"):
        for known in [m for m in sys.modules if m.partition(".")[0] == "fa"]:
            del sys.modules[known]
        importlib.import_module(name)
        assert "dfa" in importlib.import_module("fa").RULES, name
"""
    env = {**os.environ, "PYTHONPATH": str(fa.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=fa.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


EXTRAS = """
import sys

import fa.experiments, fa.results.batch, fa.results.cluster, fa.results.page, fa.results.plan, fa.results.report
from fa.__main__ import main

status = main("run p3_fig2 --mode quick --seeds 1 --epochs 1 --rules bp --workers 1 --device cpu".split())
for name in fa.experiments.EXPERIMENTS:
    fa.experiments.plan(name, "quick") if fa.experiments.EXPERIMENTS[name].grid else None
extras = "distributed dask submitit optuna psycopg sqlalchemy".split()
assert not (found := [name for name in extras if name in sys.modules]), found
sys.exit(status)
"""


def test_what_clusters_and_searches_need_is_not_imported_without_them(tmp_path: Path) -> None:
    """Although it is there."""
    env = {**os.environ, "FA_RUNS": str(tmp_path), "PYTHONPATH": str(fa.ROOT)}
    done = subprocess.run([sys.executable, "-c", EXTRAS], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 runs are finished" in done.stdout
