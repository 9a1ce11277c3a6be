"""p3, Figure 4: accuracy and alignment of ResNet-20 on CIFAR-10. Its paper mode wants a GPU; its small mode fits two
CPU cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fa import models, plot, tables
from fa.experiments import Experiment, of_rules
from fa.experiments.p3_fig2 import DECAYED, OPTIONS, layer_grid
from fa.metrics import linear_layers
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page


RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")  # kp is ours, the paper's figure leaves it out

PAPER = Config(
    "bp", 0, dataset="cifar10", model="resnet20", hidden="", epochs=250, batch=128, lr=0.1, lr_factor=0.1, augment=True,
    precision="bfloat16",
)  # fmt: skip
SMALL = PAPER.vary(dataset="cifar10-16", model="resnet8", epochs=15, precision="float32")
QUICK = PAPER.vary(dataset="digits", model="resnet8", epochs=5, batch=32, augment=False, precision="float32")
SEEDS = {"paper": 5, "small": 3, "quick": 1}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, precision: str = "") -> list[Config]:
    """The authors' configuration.

    Product feedback is implicit: exact here, for W and R share SGD's learning rate, momentum and decay, and cheaper,
    for a convolution then multiplies two matrices of its outputs by its outputs where the population has ten times as
    many units. Paper mode runs forward and backward pass in bfloat16, the authors all in float32; weights, optimizer
    and measurements are in float32.

    Small: 8 layers in place of 20, images of 16x16 pixels, 15 epochs, three seeds; float32, for processors without
    bfloat16. The 351 steps of an epoch and the decay of the first epoch are the paper's, so that the first epoch leaves
    the paper's share of the mismatch.
    Quick: ResNet-8 on digits, one seed, images as they are (a crop would cut 8x8 digits off).
    """
    base = {"paper": PAPER, "small": SMALL, "quick": QUICK}[mode]
    quick, n = mode == "quick", epochs or base.epochs
    base = base.vary(epochs=n, dataset=dataset or base.dataset, precision=precision or base.precision)
    base = base.vary(lr_drops=",".join(str(max(n * e // 250, 1)) for e in (100, 150, 200)))  # the paper's, to scale
    decay = dict(
        first_weight_decay=0.05 if quick else 0.005
    )  # either leaves about a sixth of the mismatch after the first epoch
    of_rule = {rule: dict(options) | (decay if rule in DECAYED else {}) for rule, options in OPTIONS.items()}
    of_rule["dfa"]["lr"] = 0.01 if quick else 0.001
    return of_rules(base, rules, seeds or SEEDS[mode], of_rule)


EXPERIMENT = Experiment(
    "Accuracy and alignment on CIFAR-10", "p3", "34_pfa_fig4_cifar10", RULES, grid, own={"precision": ""}, small=True
)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Li & Benna (2024), Figure 4, replicated. ResNet-20 learns CIFAR-10. a: accuracy on the 5,000 validation
images by epoch (the paper's: after epochs 100, 131, 200 and 250). b, c: validation and test accuracy after the last
epoch of the rules within 5 points of the best, a dot a seed. d: angle between each layer's weight W and the feedback
that carries the error in its place, and ratio of their norms, a line a layer, mean over seeds. e, f: the same after
training, by depth, and mean and range of the layers. Bars and bands in a, b, c, e, f: +/- 1 sd over seeds. Hollow:
the paper's, +/- 1 sd of 5 seeds in a and b, seed 0 in d, e and f."""

SMALL_CAPTION = """Li & Benna (2024), Figure 4, at the scale of two CPU cores: ResNet-8 learns CIFAR-10 at 16x16 pixels
in 15 epochs, the paper's schedule to scale. a: accuracy on the 5,000 validation images by epoch. b, c: validation and
test accuracy after the last epoch of the rules within 5 points of the best, a dot a seed. d: angle between each
layer's weight W and the feedback that carries the error in its place, and ratio of their norms, a line a layer, mean
over seeds. e, f: the same after training, by depth, and mean and range of the layers; KP lies under PFA-o. Bars and
bands: +/- 1 sd over seeds."""


@plot.style()
def draw(page: Page) -> Figure:
    """a to c: accuracy by epoch and after the last; d: layers by epoch; e, f: layers by depth."""
    table, paper = page.table(), page.reference()
    (metric, *_), ends = measured(table), list("bc"[: len(measured(table))])
    fig, ax, rules = frame(table, ["a", *ends], ["e", "f"])
    plot.accuracy(ax["a"], table, paper[paper.epoch.isin([100, 131, 200, 250])], metric)
    ax["a"].xaxis.get_major_locator().set_params(integer=True)
    plot.rule_key(ax["a"], [*table.rule, *paper.rule], loc="lower right", ncols=4)
    ax["a"].set(xlim=(0, 1.04 * max(table.epoch.max(), 10) if len(table) else 260), ylim=(0, 102))
    for panel, of in zip(ends, measured(table)):
        plot.finals(ax[panel], near(table, of), near(paper, of), of)
        ax[panel].set_ylabel(plot.LABELS[of])
        n = table.seed.nunique()
        plot.note(ax[panel], f"mean ± 1 sd, n = {n} seed{'s' * (n > 1)} (dots)" if n else "mean ± 1 sd, n = 5 seeds")
    layer_grid(ax, table, rules, paper)
    names = list(linear_layers(models.build("resnet20", (3, 32, 32), 10)))
    by_depth(ax["e"], table, "angle_deg", names, paper)
    by_depth(ax["f"], table, "norm_ratio", names, paper)
    ax["e"].set(ylim=(-5, 100), yticks=(0, 30, 60, 90))
    ax["f"].set(ylim=(0, 3))
    for panel, letter in {
        **{p: p for p in ("a", *ends, "e", "f")},
        **{f"angle_deg {r}": "d" for r in rules[:1]},
    }.items():
        plot.letters([ax[panel]], letter)
    return fig


def frame(table: pd.DataFrame, top: list[str], bottom: list[str]) -> tuple[Figure, dict[str, Axes], list[str]]:
    """An empty figure: the panels `top`, a column of two panels for each rule with angles (`layer_grid`), `bottom`.

    Returns:
        figure, panels by name, and those rules.
    """
    rules = plot.in_order(table[table.metric == "angle_deg"].rule)
    grid = [[f"{m} {r}" for r in rules] for m in ("angle_deg", "norm_ratio")]
    rows = [[[top]], *([[grid]] if rules else []), [[bottom]]]
    ratios = [1.5, *([2.2] if rules else []), 1.3]
    return *plot.figure(rows, height=6.2 if rules else 3.6, height_ratios=ratios), rules


def measured(table: pd.DataFrame) -> list[str]:
    """The accuracies that the table has; digits have no validation images."""
    return [m for m in ("val_accuracy", "test_accuracy") if m in set(table.metric)] or ["val_accuracy"]


def near(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of the rules that end within 5 points of the best."""
    of = rows[rows.metric == metric]
    end = of[of.epoch == of.epoch.max()].groupby("rule").value.mean()
    return rows[rows.rule.isin(end.index[end >= end.max() - 5])]


def accuracies(page: Page) -> str:
    """Tables of the accuracies after the last epoch, ours and the paper's."""
    return tables.several(*[part for of in measured(page.table()) for part in (plot.LABELS[of], page.compare(of))])


def alignment(page: Page) -> str:
    """Tables of angle and norm ratio after training: mean, smallest and largest layer, ours and the paper's."""
    found = {of: over_layers(page.table(), of, page.reference()) for of in ("angle_deg", "norm_ratio")}
    parts = [(plot.LABELS[of], tables.shown(t, float_format="{:.2f}".format, na_rep="-")) for of, t in found.items()]
    return tables.several(*[part for labelled in parts for part in labelled])


def over_layers(table: pd.DataFrame, metric: str, reference: pd.DataFrame | None = None) -> pd.DataFrame:
    """Mean, smallest and largest value of a rule's layers at the last epoch; ours is the mean over seeds.

    Args:
        table: a record; may be empty.
        metric: of layers, such as "angle_deg".
        reference: published values, as the metrics mean_, min_ and max_METRIC.

    Returns:
        index `rule`, columns `mean`, `min`, `max` (ours), `paper`, `from`, `to`; nan where there is none.
    """
    data = table[(table.metric == metric) & (table.layer != "")]
    by_seed = data[data.epoch == data.epoch.max()].groupby(["rule", "seed"]).value.agg(["mean", "min", "max"])
    names = {f"mean_{metric}": "paper", f"min_{metric}": "from", f"max_{metric}": "to"}
    theirs = pd.DataFrame({"rule": [], "epoch": [], "metric": [], "value": []}) if reference is None else reference
    theirs = theirs[theirs.metric.isin(list(names))]
    theirs = theirs[theirs.epoch == theirs.groupby("rule").epoch.transform("max")]
    theirs = theirs.pivot(index="rule", columns="metric", values="value").rename(columns=names)
    both = by_seed.groupby("rule").mean().join(theirs.reindex(columns=list(names.values())), how="outer")
    return both.rename_axis("rule").loc[plot.in_order(both.index)].astype(float)


def by_depth(
    ax: Axes, table: pd.DataFrame, metric: str, names: Sequence[str], reference: pd.DataFrame | None = None
) -> None:
    """A layer metric at the last epoch by depth, a line a rule, mean ± 1 sd over seeds; right: `over_layers`;
    hollow: paper.

    Args:
        names: the layers, in order from the input, for a table that has none.
    """
    data = table[(table.metric == metric) & (table.layer != "")]
    data = data[data.epoch == data.epoch.max()]
    names = list(data.sort_values("depth").layer.unique()) or list(names)
    place = {name: i for i, name in enumerate(names, 1)}
    summary, step = over_layers(table, metric, reference), len(names) / 20  # one twentieth of the layers' width
    for i, (rule, row) in enumerate(summary.iterrows()):
        own, at = plot.look(rule), len(names) + (2.2 + 1.8 * i) * step
        of = data[data.rule == rule].groupby("layer").value.agg(["mean", "std"])
        if len(of):
            of = of.loc[[n for n in names if n in of.index]]
            line = {"color": own.color, "marker": own.marker, "ms": 2.2, "lw": 0.8, "elinewidth": 0.6}
            ax.errorbar([place[n] for n in of.index], of["mean"], of["std"], **line)
            bars = [[row["mean"] - row["min"]], [row["max"] - row["mean"]]]
            line = {"fmt": own.marker, "color": own.color, "ms": 3.4, "elinewidth": 0.8, "capsize": 1.4}
            ax.errorbar(at, row["mean"], bars, **line)
        if reference is not None:
            known = reference[(reference.rule == rule) & (reference.metric == metric) & reference.layer.isin(names)]
            plot.published(ax, known.layer.map(place), known.value, own.color, own.marker, size=3.2)
            if np.isfinite(row["paper"]):
                bars = [[row["paper"] - row["from"]], [row["to"] - row["paper"]]] if np.isfinite(row["from"]) else None
                plot.published(ax, at + 0.75 * step, row["paper"], own.color, own.marker, sd=bars, size=3.2)
    end = len(names) + (2.2 + 1.8 * max(len(summary), 1)) * step
    ax.axvline(len(names) + 1.1 * step, color="0.8", lw=0.6)
    ticks = [1, *range(5, len(names) + 1, 5)] if len(names) > 8 else list(place.values())
    middle = (len(names) + 1.1 * step + end) / 2
    ax.set(xlim=(1 - step, end), xticks=[*ticks, middle], xlabel="Layer, from the input", ylabel=plot.LABELS[metric])
    ax.set_xticklabels([*map(str, ticks), "mean, range"])
    ax.xaxis.get_major_ticks()[-1].tick1line.set_visible(False)
