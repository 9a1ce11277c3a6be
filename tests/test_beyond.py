"""Beyond the figures: the grids, and what their extra measurement says against matrices and against the recurrence."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from fa import experiments, theory
from fa.experiments import p3_beyond, p3_beyond_cifar
from fa.results import claims
from fa.train import measure
from fa.train.loop import build_network, train


def recurrence(config, steps: int) -> list[float]:
    """Share of the mismatch before training and after each epoch of the recipe, by theory."""
    schedule = [tuple(config.schedule(epoch)[t] for t in ("lr", "weight_decay")) for epoch in range(config.epochs)]
    return theory.mismatch_left(schedule, config.momentum, steps).tolist()


def test_the_grid_reuses_figure_2_and_no_point_has_two_runs() -> None:
    runs = experiments.plan("p3_beyond", "paper")
    swept = p3_beyond.EXPERIMENT.swept
    assert {c.run for c in runs if not c.measure} == {
        c.run for c in experiments.plan("p3_fig2", "paper", rules=",".join(p3_beyond.RULES))
    }
    points = [(c.rule, c.seed, *map(str, swept(c).values())) for c in runs]
    assert len(set(points)) == len(points) == 35 + 3 * (3 * len(p3_beyond.DECAYS) + len(p3_beyond.EXPANSIONS))
    assert sum(c.epochs for c in runs if c.measure == "mismatch") == 294


def test_the_first_epochs_of_figure_2_belong_to_both_series() -> None:
    """Short runs have Figure 2's schedule, so that its runs are one more point of each series."""
    for mode in ("paper", "quick"):
        runs = experiments.plan("p3_beyond", mode, seeds=1, rules="pfa")
        whole = next(c for c in runs if not c.measure)
        for c in runs:
            told = ["lr", "weight_decay"]
            for epoch in range(1, c.epochs if c is not whole else 0):
                assert [c.schedule(epoch)[t] for t in told] == [whole.schedule(epoch)[t] for t in told]


KINDS = [("pfa", True), ("pfa", False), ("pfa_o", True), ("pfa_o", False), ("kp", False)]


@pytest.mark.parametrize("rule, implicit", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.02, 0.2])
def test_what_is_left_of_the_mismatch_follows_the_recurrence(
    rule: str, decay: float, implicit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On digits, in every layer; c where R is implicit, else R - B^T W (for kp B - W) itself."""
    config = next(c for c in experiments.plan("p3_beyond", "quick", seeds=1, rules=rule) if c.epochs == 4)
    config = config.vary(implicit=implicit or None, expansion=3 if rule == "pfa" else None)
    config = config.vary(epochs=2, first_weight_decay=decay, hidden="32", measure="mismatch")
    first, seen = {}, {}

    def measured(config, net, epoch, sets):
        for name, layer in net.named_children():
            fb, W = layer.feedback, layer.weight.detach()
            if implicit:
                share = fb.c.item()
            else:
                D = (fb.B - W if rule == "kp" else fb.R - fb.B.T @ W).detach()
                first.setdefault(name, D)
                share = ((D * first[name]).sum() / first[name].square().sum()).item()
            seen.setdefault(name, []).append(share)
        return measure.mismatch(config, net, epoch, sets)

    monkeypatch.setitem(measure.MEASURES, "mismatch", measured)
    table = train(config)
    expected = recurrence(config, 1437 // config.batch)
    for name, shares in seen.items():
        assert shares == pytest.approx(expected, abs=2e-5)
        rows = table[(table.metric == "mismatch_left") & (table.layer == name)].sort_values("epoch").value
        assert rows.tolist() == (pytest.approx(expected, abs=2e-5) if implicit else [])


def test_the_mismatch_is_that_of_the_matrices() -> None:
    """kp and pfa_o: from norm and angle of the feedback weight; pfa: the row that implicit feedback has."""
    rng, rows = np.random.default_rng(0), []
    W, K = rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 6, 5))  # two epochs
    norms = [np.linalg.norm(m, axis=(1, 2)) for m in (W, K)]
    angle = np.degrees(np.arccos((W * K).sum((1, 2)) / norms[0] / norms[1]))
    for rule, (epoch, own) in itertools.product(("kp", "pfa"), enumerate((1.0, -0.3))):
        of = {
            "norm_ratio": norms[1][epoch] / norms[0][epoch],
            "angle_deg": angle[epoch],
            "weight_norm": norms[0][epoch],
        }
        of |= {"mismatch_left": own} if rule == "pfa" else {}
        rows += [(rule, 0.03, rule, "fc1", epoch, metric, value) for metric, value in of.items()]
    table = pd.DataFrame(rows, columns="rule decay run layer epoch metric value".split())
    left = p3_beyond.shares(table).set_index(["rule", "epoch"]).left
    D = np.linalg.norm(W - K, axis=(1, 2))
    assert left["kp"].tolist() == pytest.approx([1, D[1] / D[0]]) and left["pfa"].tolist() == [1.0, 0.3]


def test_the_claims_about_decay_have_the_recurrences_targets() -> None:
    """937 steps an epoch; each claim asks for a decay that the grid has."""
    swept = p3_beyond.EXPERIMENT.swept
    runs = {swept(c)["decay"]: c for c in experiments.plan("p3_beyond", "paper", seeds=1, rules="kp")}
    found = [c for c in claims.load() if c.id.startswith("p3_beyond_left_")]
    for claim in found:
        decay = float(re.search(r"decay=([0-9.]+)", claim.criterion)[1])
        assert float(claim.target) == pytest.approx(recurrence(runs[decay], 60000 // 64)[1], abs=1e-6)
    assert len(found) == len(p3_beyond.DECAYS)


def test_what_resnet8_has_left_has_the_recurrences_target() -> None:
    """351 steps an epoch, and a learning rate that drops."""
    config = experiments.plan("p3_beyond_cifar", "small", seeds=1, rules="pfa_o")[0]
    (claim,) = [c for c in claims.load() if c.id == "p3_beyond_cifar_small_left"]
    assert float(claim.target) == pytest.approx(recurrence(config, 45000 // 128)[-1], abs=1e-5)


def test_the_cifar_grid_is_the_papers_recipe_in_fewer_epochs() -> None:
    runs = experiments.plan("p3_beyond_cifar", "paper")
    assert len(runs) == 3 * (2 + len(p3_beyond_cifar.EXPANSIONS["paper"])) == len({c.run for c in runs})
    for c in runs:
        assert (c.dataset, c.model, c.batch, c.augment) == ("cifar10", "resnet20", 128, True)
        assert (c.lr, c.lr_drops, c.lr_factor) == (0.1, "40,60,80", 0.1)
        assert c.first_weight_decay == (0.005 if c.rule in ("pfa", "pfa_o") else 0)
    assert sorted({c.rule_options["expansion"] for c in runs if c.rule == "pfa"}) == list(
        p3_beyond_cifar.EXPANSIONS["paper"]
    )


def test_the_resnet8_grid_is_the_same_recipe_with_fewer_layers() -> None:
    runs = experiments.plan("p3_beyond_cifar", "small")
    assert len(runs) == 3 * (3 + len(p3_beyond_cifar.EXPANSIONS["small"])) == len({c.run for c in runs})
    for deep in experiments.plan("p3_beyond_cifar", "paper", rules="pfa_o"):
        same = replace(deep, model="resnet8", epochs=10, lr_drops="4,6,8")
        assert same in runs
    assert sorted({c.rule_options["expansion"] for c in runs if c.rule == "pfa"}) == list(
        p3_beyond_cifar.EXPANSIONS["small"]
    )


DEEP = [("paper", 20, size) for size in p3_beyond_cifar.EXPANSIONS["paper"]]
SHALLOW = [("small", 8, size) for size in p3_beyond_cifar.EXPANSIONS["small"]]


@pytest.mark.parametrize("mode, layers, size", DEEP + SHALLOW)
def test_every_expansion_has_a_population_in_every_layer(mode: str, layers: int, size: float) -> None:
    runs = experiments.plan("p3_beyond_cifar", mode, seeds=1, rules="pfa")
    config = next(c for c in runs if c.rule_options["expansion"] == size)
    net = build_network(config, (3, 32, 32), 10)
    weights = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weights) == layers and all(m.feedback.BBt.shape == (m.weight.shape[0],) * 2 for m in weights)
