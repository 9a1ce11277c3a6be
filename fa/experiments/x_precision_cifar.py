"""Across the papers: does bfloat16 change p3's result on CIFAR-10? Four rules, one seed, in both precisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment, p3_fig4
from fa.experiments.x_precision import BOTH, PRECISIONS, columns_by_rule, last, precision_of, tidy, two_precisions
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "usf", "pfa", "pfa_o")


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 4's recipe in both precisions, one seed; the runs in bfloat16 are its own. Quick: two epochs, and of the
    four rules BP and PFA."""
    quick = mode == "quick"
    rules = ("bp", "pfa") if quick and rules == RULES else rules
    plain = p3_fig4.grid(mode, rules, seeds or 1, epochs or (2 if quick else 0), dataset)
    return [c.vary(precision=p) for c in plain for p in PRECISIONS]


EXPERIMENT = Experiment("ResNet-20 in bfloat16 and float32", "x", "40_precision_bf16", RULES, grid, swept=precision_of)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """ResNet-20 in bfloat16 and float32. The network and recipe of Li & Benna (2024), Figure 4, learns
CIFAR-10 with forward and backward passes in float32 or, under autocast, in bfloat16; one run each, seed 0. a:
accuracy on the 5,000 validation images over the last 150 epochs: float32 in colour, bfloat16 dashed; hollow: the
paper's after epochs 150, 200 and 250, mean +/- 1 sd of 5 seeds. b: difference bfloat16 - float32 after the last
epoch; grey: what two independent draws would show, +/- 2 sqrt(2) sd of the paper's five seeds. c: difference of the
angle between each layer's W and its feedback after the last epoch; dots: layers; large: mean of the layers; grey:
tolerance of that mean in the claims."""


def published(page: Page) -> pd.DataFrame:
    """The validation accuracies of the paper's Figure 4; none in quick mode."""
    paper = page.part("p3_fig4").reference()
    return paper[paper.metric == "val_accuracy"]


def tolerances(page: Page) -> tuple[dict[str, float], dict[str, float]]:
    """The tolerances of the claims, by rule: of the accuracy (points), and of the mean angle (degrees); none in
    quick mode."""
    if page.mode == "quick":
        return {}, {}
    claims = page.verdicts().set_index("id").tolerance.astype(float)
    bound = {name.removeprefix("x_precision_cifar_"): value for name, value in claims.items()}
    angles = {"usf": bound["angle_usf"], "pfa": bound["angle"], "pfa_o": bound["angle"]}
    return {rule: bound[f"accuracy_{rule}"] for rule in RULES}, angles


@plot.style()
def draw(page: Page) -> Figure:
    """ResNet-20. a: accuracy in both precisions, a column a rule; b, c: last difference of accuracy and of angles."""
    shown, table, end = plot.in_order([c.rule for c in page.runs]), page.table(), last(tidy(page.table()))
    metric = "val_accuracy" if page.mode != "quick" else "test_accuracy"  # digits have no validation images
    ratios = [*[1] * len(shown), 1.7, 1.7]
    fig, ax = plot.figure([[*(f"a {r}" for r in shown), "b", "c"]], height=2, width_ratios=ratios)
    length, paper = table.epoch.max() if len(table) else 250, published(page)
    rows = table[(table.metric == metric) & (table.epoch > 0.4 * length)]
    for rule in shown:
        look, panel = plot.look(rule), ax[f"a {rule}"]
        curve = rows[rows.rule == rule].pivot(index="epoch", columns="precision", values="value")
        two_precisions(panel, curve.reindex(columns=BOTH), rule)
        theirs = paper[(paper.rule == rule) & paper.epoch.isin([150, 200, 250])]
        plot.published(panel, theirs.epoch, theirs.value, look.color, look.marker, theirs.sd, size=3.4)
        panel.set(xlim=(0.4 * length, 1.04 * length), xlabel=plot.LABELS["epoch"])
        if len(rows):
            panel.set(ylim=(rows.value.min() - 0.5, rows.value.max() + 0.5))
        panel.tick_params(labelleft=rule == shown[0])
    ax[f"a {shown[0]}"].set_ylabel(plot.LABELS[metric])
    band, tolerance = tolerances(page)
    aligned = [r for r in shown if r != "bp"]
    panels = {"b": (shown, metric, band, "Difference (points)"),
              "c": (aligned, "angle_deg", tolerance, "Difference of angle (°)")}  # fmt: skip
    for panel, (names, of, grey, label) in panels.items():
        columns_by_rule(ax[panel], names, len(names) - 0.4, label)
        ax[panel].axhline(0, color="0.3", lw=0.6, zorder=0.5)
        for i, rule in enumerate(names):
            look, d = plot.look(rule), end[(end.rule == rule) & (end.metric == of)].difference
            if rule in grey:
                ax[panel].bar(i, 2 * grey[rule], 0.8, -grey[rule], color="0.88")
            if len(d) > 1:
                ax[panel].plot(np.full(len(d), i - 0.25), d, ".", color=look.color, ms=3, alpha=0.5, mew=0)
            ax[panel].plot(i, d.mean(), look.marker, color=look.color, ms=4.5)
    plot.note(ax["b"], "last epoch")
    plot.note(ax["c"], "last epoch; dots: layers")
    plot.letters([ax[f"a {shown[0]}"], ax["b"], ax["c"]])
    return fig


def text(page: Page) -> str:
    """Tables of ResNet-20 after the last epoch: both precisions, difference, tolerance and the paper's; then
    angles."""
    end, paper, told = last(tidy(page.table())), published(page), []
    for metric in ("val_accuracy", "test_accuracy", "angle_deg"):
        by_rule = end[end.metric == metric].groupby("rule")
        shown = by_rule[[*BOTH, "difference"]].mean()
        if metric == "val_accuracy":
            shown["chance"] = pd.Series(tolerances(page)[0], dtype=float)
            shown[["paper", "sd"]] = paper[paper.epoch == 250].set_index("rule")[["value", "sd"]]
        if metric == "angle_deg":
            shown["largest"] = by_rule.difference.agg(lambda d: d[d.abs().idxmax()])
        shown = shown.loc[plot.in_order(shown.index)]
        told += [plot.LABELS[metric]]
        told += [tables.shown(shown, float_format="{:.2f}".format, na_rep="-") if len(shown) else "nothing yet"]
    return tables.several(*told)
