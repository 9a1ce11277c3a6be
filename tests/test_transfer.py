"""p2_transfer: what is carried is what page 23's record says, and what counts where training diverges."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd
import pytest

from fa.experiments import p2_transfer, plan
from fa.experiments.p2_tuning import SMALL
from fa.results.page import Page


@pytest.mark.parametrize("scale, searched_better", [("small", set()), ("paper", {"ia"})])
def test_what_is_carried_is_the_best_point_of_the_grids(scale, searched_better):
    table = Page("p2_tuning", mode="record", scale=scale).table()
    scores = table[(table.part == "grid") & (table.metric == "score")]
    searched = table[(table.part == "search") & (table.metric == "score")]
    better = set()
    for rule, number in p2_transfer.TUNED[scale].items():
        of = scores[scores.rule == rule]
        best = of.loc[of.value.idxmax()]
        assert (best.number, best.value) == (number, of.value.max())
        better |= {rule} if (searched[searched.rule == rule].value > best.value).any() else set()
    assert better == searched_better, "the docstring of TUNED says where a search has found better"


def test_a_run_is_the_tuned_one_but_for_its_network():
    runs = {(c.rule, c.seed, p2_transfer.swept(c)["network"]): c for c in plan("p2_transfer", "small")}
    tuned = runs["wm", 0, "mlp_4x64"]
    assert (tuned.hidden, tuned.dataset, tuned.epochs) == (SMALL.hidden, SMALL.dataset, SMALL.epochs)
    carried = {"model", "hidden", "seed"}
    for (rule, _, network), config in runs.items():
        other = {k for k, v in asdict(config).items() if v != getattr(runs[rule, 0, "mlp_4x64"], k)}
        assert other <= carried | ({"dataset", "epochs"} if network.endswith("mnist") else set()), network
        assert config.metaparameters() == runs[rule, 0, "mlp_4x64"].metaparameters()


@pytest.mark.parametrize("mode", ["quick", "small", "paper"])
def test_every_network_of_a_mode_has_its_name(mode):
    names = {p2_transfer.swept(c)["network"] for c in plan("p2_transfer", mode)}
    known = set(p2_transfer.NETWORKS[p2_transfer.scale(mode)])
    assert names == (set(p2_transfer.SHOWN) if mode == "quick" else known)


def test_gaps_are_paired_by_seed_and_a_run_that_diverged_is_marked():
    score = {("bp", 0): 90.0, ("bp", 1): 80.0, ("wm", 0): 88.0, ("wm", 1): 10.0}
    rows = [
        [f"{rule}{seed}", rule, seed, "n", 4, metric, value]
        for (rule, seed), at in score.items()
        for metric, value in (("score", at), ("diverged", float(at == 10)))
    ]
    table = pd.DataFrame(rows, columns=["run", "rule", "seed", "network", "place", "metric", "value"])
    found = p2_transfer.gaps(table).set_index("seed")
    assert found.value.to_dict() == {0: -2.0, 1: -70.0} and found.diverged.to_dict() == {0: False, 1: True}
    assert (
        p2_transfer.survived(table)[table.rule == "bp"].all()
        and not p2_transfer.survived(table)[table.rule == "wm"].any()
    )


def test_the_size_of_the_error_is_the_product_over_the_layers_above_the_first():
    rows = [["wm", 4, 0, depth, "norm_ratio", value] for depth, value in ((1, 7.0), (2, 2.0), (3, 0.5), (4, 3.0))]
    table = pd.DataFrame(rows, columns=["rule", "place", "seed", "depth", "metric", "value"])
    assert p2_transfer.sizes(table).value.tolist() == [3.0]
