"""Across the papers: does bfloat16 change a result? p3's MNIST recipe under seven rules, in both precisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment, p3_fig2
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page


RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")
PRECISIONS = ("float32", "bfloat16")


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 2's recipe in both precisions; the runs in float32 are its own. Quick: two seeds, 10 epochs.

    Only the arithmetic of forward and backward pass differs: weights, feedback, momenta, weight decay and every
    measurement are in float32 (angles in float64), and one seed has the same initial weights, feedback and batches in
    both.
    """
    quick = mode == "quick"
    plain = p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (10 if quick else 0), dataset)
    return [c.vary(precision=p) for c in plain for p in PRECISIONS]


def precision_of(config: Config) -> dict[str, str]:
    """The swept column."""
    return {"precision": config.precision}


EXPERIMENT = Experiment(
    "Learning curves in bfloat16 and float32", "x", "40_precision_bf16", RULES, grid, swept=precision_of
)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Learning in bfloat16 and float32. The 784-512-512-10 ReLU network of Li & Benna (2024), Figure 2, learns
MNIST with forward and backward passes in float32 or, under autocast, in bfloat16; weights and optimizer are in
float32; same seeds. a: test accuracy by epoch: float32 in colour, mean +/- 1 sd over seeds, bfloat16 dashed. b:
difference bfloat16 - float32, paired by seed, mean +/- 1 sd; grey: what two independent draws of as many seeds would
show, 5 percent for all rules together. c: the same after the last epoch; dots: seeds; grey: +/- 1 sd of seeds;
dotted: 0.1 points. d: ratio of the training losses, bfloat16 / float32, means over seeds, colours as in a; dotted: 10
percent. e: difference of the angle between each layer's W and its feedback after the last epoch, mean +/- 1 sd;
circle, square, diamond: first, second, third layer; grey: +/- 1 sd of seeds; dotted: 1 degree."""

BOTH = list(PRECISIONS)

LAYERS = ["fc1", "fc2", "fc"]
"""The layers of the MNIST network, from the input."""


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each rule, seed, layer, epoch and metric that both precisions have: both values and their
    difference."""
    keys = ["rule", "seed", "layer", "epoch", "metric"]
    pairs = table.pivot_table(index=keys, columns="precision", values="value").reindex(columns=BOTH).dropna()
    return pairs.assign(difference=pairs.bfloat16 - pairs.float32).reset_index()


def last(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs after the last epoch."""
    return pairs[pairs.epoch == pairs.epoch.max()]


def compared(table: pd.DataFrame) -> list[str]:
    """The rules that have runs in bfloat16."""
    return plot.in_order(table.rule[table.precision == "bfloat16"])


def summary(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Means over seeds in both precisions, mean and sd of the paired difference, the sd of seeds (pooled), and n."""
    of = rows.groupby(list(by), sort=False)
    pooled = np.sqrt(of[BOTH].var().mean(axis=1))
    shown = of[BOTH].mean().join(of.difference.agg(["mean", "std", "count"]))
    shown.insert(4, "seeds", pooled)
    return shown.set_axis([*BOTH, "difference", "sd", "sd of seeds", "n"], axis=1)


def chance(shown: pd.DataFrame, rules: int) -> pd.Series:
    """Difference that two independent draws of n seeds show, 5 % for all `rules` together (Student's t); of a
    summary."""
    from scipy.stats import t

    return t.ppf(1 - 0.05 / (2 * rules), 2 * (shown.n - 1)) * shown["sd of seeds"] * np.sqrt(2 / shown.n)


@plot.style()
def draw(page: Page) -> Figure:
    """a: accuracy in both precisions, b: the difference, a column a rule; c to e: last accuracy, loss, angles."""
    table, pairs = page.table(), tidy(page.table())
    shown = compared(table) or list(dict.fromkeys(c.rule for c in page.runs))
    mosaic = [[[[f"{p} {r}" for r in shown] for p in "ab"]], [[["c", "d", "e"]]]]
    fig, ax = plot.figure(mosaic, height=4.9, height_ratios=(1.7, 1))
    _draw_curves(ax, pairs, shown, compared(table), page.mode == "quick")
    _draw_ends(ax, pairs, shown, compared(table))
    plot.letters([ax[f"a {shown[0]}"], ax[f"b {shown[0]}"], ax["c"], ax["d"], ax["e"]])
    return fig


def _draw_curves(ax: dict[str, Axes], pairs: pd.DataFrame, shown: list[str], rules: list[str], quick: bool) -> None:
    """Panels a and b, a column a rule."""
    accuracy = pairs[(pairs.metric == "test_accuracy") & (pairs.epoch > 0)]
    by_epoch, length = summary(accuracy, ["rule", "epoch"]), pairs.epoch.max() if len(pairs) else 1
    low = by_epoch[BOTH].min().min() if len(by_epoch) else 90
    for rule in shown:
        look, a, b = plot.look(rule), ax[f"a {rule}"], ax[f"b {rule}"]
        rows = accuracy[accuracy.rule == rule].groupby("epoch")
        mean, sd = rows[BOTH].mean(), rows[BOTH].std().fillna(0)
        low_32, high_32 = mean.float32 - sd.float32, mean.float32 + sd.float32
        a.fill_between(mean.index, low_32, high_32, color=look.color, alpha=0.25, lw=0)
        two_precisions(a, mean, rule)
        if rule in rules:
            d = by_epoch.loc[rule]
            noise, spread = chance(d, len(rules)), d["sd"].fillna(0)
            b.fill_between(d.index, -noise, noise, color="0.85", lw=0)
            b.fill_between(d.index, d.difference - spread, d.difference + spread, color=look.color, alpha=0.35, lw=0)
            b.plot(d.difference, color=look.color, lw=0.9)
        b.axhline(0, color="0.3", lw=0.5)
        b.set_yscale("symlog", linthresh=0.1, linscale=1)
        b.set(ylim=(-8, 8), xlabel=plot.LABELS["epoch"])
        b.set(yticks=(-1, -0.1, 0, 0.1, 1), yticklabels=("−1", "−0.1", "0", "0.1", "1"))
        b.minorticks_off()
        for panel in (a, b):
            panel.set(xlim=(0, 1.03 * length), xticks=(length // 4, 3 * length // 4))
            panel.tick_params(labelleft=rule == shown[0])
        a.set(ylim=(max(91.5, low - 0.3), 98.8) if not quick else (low - 2, 101))
        a.tick_params(labelbottom=False)
    ax[f"a {shown[0]}"].set_ylabel(plot.LABELS["test_accuracy"])
    ax[f"b {shown[0]}"].set_ylabel("Difference (points)")


def two_precisions(ax: Axes, mean: pd.DataFrame, rule: str) -> None:
    """A rule's panel: its name, float32 in its colour and bfloat16 dashed."""
    look = plot.look(rule)
    ax.set_title(look.label, color=look.color, fontweight="bold")
    ax.plot(mean.float32, color=look.color, lw=1.2)
    ax.plot(mean.bfloat16, color="k" if rule != "bp" else "0.6", ls=(0, (2, 1.5)), lw=0.8)


def _draw_ends(ax: dict[str, Axes], pairs: pd.DataFrame, shown: list[str], rules: list[str]) -> None:
    """Panels c to e: differences after the last epoch by rule and by layer, and the ratio of the training losses."""
    end, length = last(pairs), pairs.epoch.max() if len(pairs) else 1
    ends = end[end.metric == "test_accuracy"]
    final = summary(ends, ["rule"])
    for rule in rules:
        look, row, i = plot.look(rule), final.loc[rule], shown.index(rule)
        seeds = ends[ends.rule == rule].difference
        ax["c"].bar(i, 2 * row["sd of seeds"], 0.8, -row["sd of seeds"], color="0.88")
        ax["c"].plot(np.full(len(seeds), i - 0.22), seeds, ".", color=look.color, ms=3, alpha=0.5, mew=0)
        line = {"fmt": look.marker, "color": look.color, "ms": 4, "elinewidth": 0.9, "capsize": 1.6}
        ax["c"].errorbar(i + 0.08, row.difference, row["sd"], **line)
        loss = pairs[(pairs.rule == rule) & (pairs.metric == "train_loss")].groupby("epoch")[BOTH].mean()
        ax["d"].plot(loss.bfloat16 / loss.float32, color=look.color, lw=1)
    angles = summary(end[end.metric == "angle_deg"], ["rule", "layer"])
    aligned = [r for r in shown if r in set(angles.index.get_level_values("rule"))]
    for i, rule in enumerate(aligned):
        for j, layer in enumerate(LAYERS):
            row, x = angles.loc[(rule, layer)], i + 0.26 * (j - 1)
            ax["e"].bar(x, 2 * row["sd of seeds"], 0.22, -row["sd of seeds"], color="0.88")
            line = {"fmt": "osD"[j], "color": plot.look(rule).color, "ms": 3.2, "elinewidth": 0.8, "capsize": 1.3}
            ax["e"].errorbar(x, row.difference, row["sd"], **line)
    panels = {"c": (shown, 0.1, "Difference, last epoch (points)"), "e": (aligned, 1, "Difference of angle (°)")}
    for panel, (names, margin, label) in panels.items():
        for y in (-margin, 0, margin):
            ax[panel].axhline(y, color="0.3", lw=0.6, ls=":" if y else "-", zorder=0.5)
        columns_by_rule(ax[panel], names, max(len(names) - 0.4, 0.6), label)
    ax["d"].axhline(1, color="0.3", lw=0.6, zorder=0.5)
    for y in (0.9, 1.1):
        ax["d"].axhline(y, color="0.3", lw=0.6, ls=":", zorder=0.5)
    ax["d"].set(xlim=(0, 1.03 * length), xlabel=plot.LABELS["epoch"], ylabel="Ratio of training losses")
    plot.note(ax["c"], f"{plot.repeats(ends)} (dots)" if len(ends) else "")


def columns_by_rule(ax: Axes, rules: list[str], end: float, label: str) -> None:
    """The axes of a panel with a column a rule."""
    ax.set(xticks=range(len(rules)), xlim=(-0.6, end), ylabel=label)
    ax.set_xticklabels([plot.look(r).label for r in rules])
    ax.tick_params(axis="x", length=0)
    ax.use_sticky_edges = False  # else the longest grey bar would end at the frame


def text(page: Page, metric: str, by: Sequence[str] = ("rule",), digits: int = 2, scale: float = 1) -> str:
    """Table: the summary of `metric` after the last epoch, in units of 1/`scale`; of the accuracy, `chance`
    too."""
    rules, rows = compared(page.table()), last(tidy(page.table()))
    rows = rows[rows.metric == metric].sort_values(list(by), key=lambda names: names.map([*rules, *LAYERS].index))
    rows = rows.assign(**{column: scale * rows[column] for column in (*BOTH, "difference")})
    shown = summary(rows, by)
    if metric == "test_accuracy":
        shown.insert(5, "chance", chance(shown, len(rules)))
    form = {"float_format": f"{{:.{digits}f}}".format, "formatters": {"n": "{:.0f}".format}, "na_rep": "-"}
    return tables.shown(shown, **form) if len(shown) else tables.several("nothing yet")
