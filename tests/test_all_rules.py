"""Page 41: every rule on the same networks; what it shares, what a step costs, and how its points are computed."""

from __future__ import annotations

import math

import pandas as pd
import pytest

import fa
from fa import experiments
from fa.experiments import x_all_rules
from fa.results.runs import drawn

SHARED = {"p3_fig2": 18, "p3_fig4": 21, "p1_scale": 18}  # runs of the small scale


def test_the_small_scale_shares_the_runs_of_other_figures():
    runs = experiments.plan("x_all_rules", "small")
    own = {c.run for c in runs}
    assert len(runs) == len(own) == 2 * 3 * (14 + 13)
    for name, n in SHARED.items():
        mode = "paper" if name == "p3_fig2" else "small"
        assert len(own & {c.run for c in experiments.plan(name, mode)}) == n, name


def test_the_rules_of_a_network_have_one_recipe():
    recipe = (
        "dataset",
        "model",
        "hidden",
        "epochs",
        "batch",
        "lr_drops",
        "lr_factor",
        "momentum",
        "augment",
        "precision",
    )
    for mode in experiments.MODES:
        runs = [c for c in experiments.plan("x_all_rules", mode) if not isinstance(c, x_all_rules.StepCost)]
        for network in {c.model for c in runs}:
            alike = {tuple(getattr(c, name) for name in recipe) for c in runs if c.model == network}
            rules = [c.rule for c in runs if c.model == network and c.seed == 0]
            assert len(alike) == 1 and sorted(rules) == sorted(x_all_rules.RULES)
    assert set(x_all_rules.READS) == set(x_all_rules.RULES) <= set(fa.RULES)


@pytest.mark.parametrize("rule, size", [("fa", 1.0), ("usf", 0.0), ("pfa_o", 1.0), ("wm", 1.0)])
def test_the_cost_of_a_step(rule, size, monkeypatch):
    monkeypatch.setattr(x_all_rules, "ROUNDS", 3)
    runs = experiments.plan("x_all_rules", "quick", rules=f"bp,{rule}")
    cost = next(c for c in runs if isinstance(c, x_all_rules.StepCost) and c.model == "mlp")
    found = drawn(cost).set_index("metric").value
    assert math.isfinite(found.step_cost) and found.step_cost > 0
    assert found.feedback_size == pytest.approx(size, abs=0.3), "entries of the feedback for each weight"


def test_the_points_of_a_network():
    """Paired gaps, the mean angle of the layers below the output, and no number of a seed that diverged."""
    rows = []
    for rule, add, angles in (("bp", 0.0, None), ("fa", -10.0, (60, 80, 5)), ("wm", -80.0, None)):
        for seed in (0, 1):
            if (rule, seed) == ("wm", 1):
                continue  # it diverged
            accuracy = 90 + seed + add - seed * (rule == "fa")
            rows.append([rule, seed, 3, "", None, "test_accuracy", accuracy])
            rows.append([rule, seed, 2, "", None, "test_accuracy", 0.0])
            for depth, angle in enumerate(angles or (), 1):
                rows.append([rule, seed, 3, f"l{depth}", depth, "grad_angle_global_deg", angle + seed])
    table = pd.DataFrame(rows, columns=["rule", "seed", "epoch", "layer", "depth", "metric", "value"])
    found = x_all_rules.summary(table)
    assert found.loc["fa", ["accuracy", "gap", "angle", "n"]].tolist() == [80.0, -10.5, 70.5, 2]
    assert found.loc["wm", ["gap", "n"]].tolist() == [-80.0, 1] and math.isnan(found.loc["wm", "angle"])
    assert found.loc["bp", "gap"] == 0
