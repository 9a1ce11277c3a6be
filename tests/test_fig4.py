"""Figure 4: its grid is the paper's, its tables of layers are right, and its recipe has a fingerprint."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from fa import experiments, models
from fa.experiments import p3_fig4
from fa.metrics import linear_layers
from fa.results import records
from fa.train import data
from fa.train import loop as train

PAPER = experiments.plan("p3_fig4", "paper")


def test_the_grid_is_the_authors() -> None:
    """The authors' configuration; kp, which the paper leaves out, has pfa's schedule."""
    assert Counter(c.rule for c in PAPER) == dict.fromkeys(p3_fig4.RULES, 5) and len({c.run for c in PAPER}) == 35
    for c in PAPER:
        assert (c.dataset, c.model, c.batch, c.epochs, c.augment, c.precision) == (
            "cifar10",
            "resnet20",
            128,
            250,
            True,
            "bfloat16",
        )
        learned = c.rule in ("kp", "pfa", "pfa_o")
        assert c.schedule(0) == {"lr": 0.001 if c.rule == "dfa" else 0.1, "weight_decay": 0.005 if learned else 1e-4}
        rates = [c.schedule(e)["lr"] / c.lr for e in (1, 99, 100, 149, 150, 199, 200, 249)]
        assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
        assert {c.schedule(e)["weight_decay"] for e in range(1, 250)} == {1e-4}
        assert c.rule_options.get("init", "xavier") == "xavier" and c.rule_options.get("scale", "xavier") == "xavier"
        assert c.rule_options.get("expansion", 10) == 10


def test_precision_is_another_recipe_and_no_run_of_the_figure() -> None:
    other = experiments.plan("p3_fig4", "paper", precision="float32")
    assert {c.precision for c in other} == {"float32"} and not {c.run for c in other} & {c.run for c in PAPER}


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 25])
def test_a_short_run_keeps_its_first_learning_rate_for_an_epoch(epochs: int) -> None:
    for mode in ("quick", "paper"):
        (c,) = experiments.plan("p3_fig4", mode, seeds=1, epochs=epochs, rules="bp")
        assert c.schedule(0)["lr"] == c.lr


def test_quick_mode_leaves_as_much_of_the_mismatch_as_the_paper_s_first_epoch() -> None:
    """A momentum of 0.9 makes the decay ten times lr x weight decay x steps in the exponent."""
    left = {}
    for mode, images in (("quick", 1437), ("paper", 45000)):
        c = experiments.plan("p3_fig4", mode, rules="pfa_o")[0]
        left[mode] = c.lr * c.first_weight_decay * (images // c.batch) / (1 - c.momentum)
    assert 1.5 < left["paper"] < 2.5 and 1.5 < left["quick"] < 2.5


def test_fingerprints_tell_recipes_apart() -> None:
    """Narrowed to ResNet-8 on digits; augmentation and rule count, precision does not."""
    (c,) = experiments.plan("p3_fig4", "paper", seeds=1, rules="pfa")
    plain = train.fingerprint(c, 2)
    assert plain == train.fingerprint(c, 2) == train.fingerprint(replace(c, precision="float32"), 2)
    assert plain[0] != train.fingerprint(replace(c, augment=False), 2)[0]
    assert plain[1] != train.fingerprint(replace(c, rule="fa", options="init=xavier"), 2)[1]


@pytest.mark.parametrize("rule", ["pfa", "pfa_o"])
def test_implicit_feedback_of_a_resnet_is_exact(rule: str) -> None:
    """The recipe's SGD, momentum and both decays, in float64: with R stored and without, the losses are those of one
    network."""
    sets = data.load("digits", dtype=torch.float64)
    (c,) = experiments.plan("p3_fig4", "quick", seeds=1, rules=rule)
    losses = []
    for config in (c, c.vary(implicit=False)):
        net = train.build_network(config, sets.shape, sets.classes, torch.float64)
        stepper = train.Stepper(net, train.make_optimizer(net, config), config, sets.train)
        losses.append(torch.cat([stepper.epoch(e, 3).clone() for e in (0, 1)]))
    assert torch.allclose(losses[0], losses[1], rtol=1e-9) and losses[0].unique().numel() == 6


def layered() -> pd.DataFrame:
    """Two seeds, two layers, two epochs of an angle; seed 0 has 10, 30 at the end, seed 1 20, 60."""
    rows = [[f"r{s}", "pfa", s, e, layer, d, "angle_deg", float(10 * (s + 1) * (d if d == 1 else 3) if e else 90)]
            for s in (0, 1) for e in (0, 5) for d, layer in ((1, "conv1"), (2, "fc"))]  # fmt: skip
    return pd.DataFrame(rows, columns=records.COLUMNS[:3] + records.COLUMNS[3:])


def test_the_small_scale_is_the_papers_recipe_with_fewer_layers_pixels_and_epochs() -> None:
    small = experiments.plan("p3_fig4", "small")
    assert Counter(c.rule for c in small) == dict.fromkeys(p3_fig4.RULES, 3)
    own = dict(dataset="cifar10-16", model="resnet8", epochs=15, lr_drops="6,9,12", precision="float32")
    assert {c.run for c in small} == {c.vary(**own).run for c in PAPER if c.seed < 3}


def test_summary_over_layers() -> None:
    paper = records.reference("p3_fig4")
    both = p3_fig4.over_layers(layered(), "angle_deg", paper)
    assert list(both.index) == ["fa", "usf", "pfa", "pfa_o"]
    assert both.loc["pfa"].tolist() == [
        30.0,
        15.0,
        45.0,
        17.05,
        14.5,
        19.2,
    ]  # mean over seeds of the layers' mean, least, most
    assert both.loc["fa", ["mean", "min", "max"]].isna().all()
    assert p3_fig4.over_layers(layered(), "angle_deg").paper.isna().all()
    assert p3_fig4.over_layers(layered().iloc[:0], "norm_ratio", paper).loc["pfa_o", "paper"] == 1.0


def test_values_by_depth_are_drawn_where_they_belong() -> None:
    fig, ax = plt.subplots()
    p3_fig4.by_depth(ax, layered(), "angle_deg", ["conv1", "fc"], records.reference("p3_fig4"))
    drawn = {tuple(zip(*line.get_data())) for line in ax.lines if len(line.get_xdata()) == 2}
    assert ((1, 15.0), (2, 45.0)) in drawn  # ours, mean over seeds
    assert ((1, 95.4), (2, 34.8)) in drawn  # the paper's FA
    plt.close(fig)


def test_published_values() -> None:
    t = records.reference("p3_fig4")
    accuracy = t[t.metric == "val_accuracy"]
    assert Counter(accuracy.rule) == dict.fromkeys(("bp", "fa", "dfa", "usf", "pfa", "pfa_o"), 8) and set(
        accuracy.n
    ) == {5}
    assert set(accuracy.epoch) == {100, 101, 111, 131, 150, 151, 200, 250}
    wide = t[t.seed == 0].pivot_table(index="rule", columns="metric", values="value", aggfunc="mean")
    for of in ("angle_deg", "norm_ratio"):
        assert (wide[f"min_{of}"].dropna() < wide[f"mean_{of}"].dropna()[wide[f"min_{of}"].notna()]).all()
    names = list(linear_layers(models.build("resnet20", (3, 32, 32), 10)))
    assert set(t.layer) - {""} == {names[0], names[-1]}
