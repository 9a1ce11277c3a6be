"""Sparse feedback: the grid, and what masks do to the angle between a weight and its feedback."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest
import torch
from torch import nn

import fa
from fa import experiments, theory
from fa.experiments import p3_sparse
from fa.results.page import Page


def test_the_grid_is_the_authors_and_dense_runs_are_figure_2s() -> None:
    runs = experiments.plan("p3_sparse", "paper")
    assert len(runs) == 5 * (1 + 6 * 6) and len({c.run for c in runs}) == len(runs)
    density = [p3_sparse.EXPERIMENT.swept(c)["density"] for c in runs]
    assert Counter(density) == {1.0: 35} | dict.fromkeys(p3_sparse.DENSITIES[:-1], 30)
    dense = {c.run for c, d in zip(runs, density) if d == 1}
    assert dense == {c.run for c in experiments.plan("p3_fig2", "paper", rules=",".join(p3_sparse.RULES))}
    for c, d in zip(runs, density):
        assert c.rule_options.get("implicit") == ((d == 1 or "first") if c.rule in ("pfa", "pfa_o") else None)


@pytest.mark.parametrize("rule", p3_sparse.RULES)
def test_quick_mode_trains_every_rule_at_three_densities(rule: str) -> None:
    runs = experiments.plan("p3_sparse", "quick", rules=rule)
    assert {p3_sparse.EXPERIMENT.swept(c)["density"] for c in runs} == ({1.0} if rule == "bp" else set(p3_sparse.QUICK))
    assert {c.dataset for c in runs} == {"digits"}


@pytest.mark.parametrize("density", p3_sparse.DENSITIES)
def test_angles_of_masked_feedback_are_those_of_the_notebook(density: float) -> None:
    """KP's copy of W ends at arccos sqrt(d), PFA's path at the formula of notebooks 33 and 36; R at its fixed point."""
    n, λ = 400, 10
    for rule, expected in (("kp", p3_sparse.masked_angle(density)), ("pfa", theory.path_angle(λ, density, n))):
        net = nn.Sequential(nn.Linear(500, n))
        nn.init.xavier_uniform_(net[0].weight, generator=torch.Generator().manual_seed(1))
        fb = fa.convert(net, rule, density=density, seed=0)[0].feedback
        with torch.no_grad():
            if rule == "kp":
                fb.B.copy_(net[0].weight)
            else:
                fb.R.copy_(fb.B.T @ net[0].weight)
        measured = fa.alignment(net).angle_deg.item()
        assert measured == pytest.approx(float(expected), abs=0.4)


def test_synapses_per_weight_of_the_notebook_are_those_of_the_tensors() -> None:
    """Panel c counts lambda (in + out) out connections for PFA, in out for FA, each times d."""
    fan_in, out, density = 300, 200, 0.3
    expected = {"fa": fan_in * out, "pfa": 10 * out * (out + fan_in), "pfa_o": out * (out + fan_in)}
    for rule, count in expected.items():
        shown = p3_sparse.synapses(rule, density, {"fc": (fan_in, out)}) * fan_in * out
        assert shown == pytest.approx(density * count)
        fb = fa.convert(nn.Sequential(nn.Linear(fan_in, out)), rule, density=density, seed=0)[0].feedback
        there = (fb.B != 0).sum() + (fb.mask.sum() if rule != "fa" else 0)
        assert there.item() == pytest.approx(density * count, rel=0.02)


def test_a_record_that_lacks_densities_is_partial() -> None:
    """Dense runs of all five seeds come from Figure 2; the page must not take them for the whole."""
    cfg = Page("p3_sparse", rules=["fa", "pfa"])
    runs = [c for c in cfg.runs if "density" not in c.options]
    for there, lacks in ((runs, "10 of 60 runs"), (cfg.runs, "")):
        rows = [{"run": c.run, "rule": c.rule, "seed": c.seed, "epoch": c.epochs} for c in there]
        cfg.__dict__["_made"] = (pd.DataFrame(rows), {})
        assert cfg.partial() == lacks
