"""Beyond p3, on CIFAR-10: how small the expansion may be before accuracy falls; ResNet-20 for a GPU, and, small,
ResNet-8 for a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fa import plot, tables, theory
from fa.experiments import Experiment, p3_beyond, p3_fig2, p3_fig4
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Page


RULES = ("bp", "fa", "pfa", "pfa_o")
EXPANSIONS = {"paper": (1, 2, 3, 5, 10, 20, 50), "small": (0.25, 1, 2, 5, 10, 50), "quick": (0.25, 1, 10)}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 4's recipe in 100 epochs in place of 250, drops to scale; quick: Figure 2's on digits.

    Small: 8 layers in place of 20, in 10 epochs, drops to scale. The 351 steps of an epoch and the decay of the first
    epoch are the paper's, so that the first epoch leaves the paper's share of the mismatch.
    """
    if rules == RULES and mode != "small":
        rules = tuple(r for r in rules if r != "fa")
    if mode == "quick":
        plain = p3_fig2.grid(mode, rules, seeds or 2, epochs or 12, dataset)
    elif mode == "small":
        plain = [c.vary(model="resnet8") for c in p3_fig4.grid("paper", rules, seeds or 3, epochs or 10, dataset)]
    else:
        plain = p3_fig4.grid(mode, rules, seeds or 3, epochs or 100, dataset)
    sizes = EXPANSIONS[mode]
    return [c.vary(expansion=λ) if c.rule == "pfa" else c for c in plain for λ in (sizes if c.rule == "pfa" else (10,))]


EXPERIMENT = Experiment(
    "Expansion and accuracy on CIFAR-10", "p3", "38_pfa_beyond_cifar10", RULES, grid, small=True,
    swept=lambda config: {"expansion": p3_beyond.expansion_of(config)},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Beyond Li & Benna (2024): expansion of the feedback population under PFA; ResNet-20 on CIFAR-10, 100
epochs. a: validation accuracy after the last epoch, mean +/- 1 sd over seeds; lines: BP and PFA-o. b: angle between
each layer's W and the path B R, mean over seeds and layers, bars from the lowest layer to the highest; dotted:
arccos(1/sqrt(1 + 1/expansion)). c: angle between the gradient of each layer's W and exact backprop's, as in b,
without the output layer, whose gradient is exact."""

SMALL_CAPTION = """Beyond Li & Benna (2024): expansion of the feedback population under PFA; ResNet-8 on CIFAR-10, 10
epochs. a: validation accuracy after the last epoch, mean +/- 1 sd over seeds; lines: BP, FA and PFA-o. b: angle
between each layer's W and the path B R, mean over seeds and layers, bars from the lowest layer to the highest;
dotted: arccos(1/sqrt(1 + 1/expansion)). c: angle between the gradient of each layer's W and exact backprop's, as in
b, without the output layer, whose gradient is exact."""


def tidy(table: pd.DataFrame) -> tuple[str, pd.DataFrame, pd.DataFrame]:
    """The metric of accuracy (digits have no validation images), its rows after the last epoch, and those of the
    layers.

    The output layer's gradient is exact and left out.
    """
    last = table[table.epoch == table.groupby("run").epoch.transform("max")]
    metric = "val_accuracy" if "val_accuracy" in set(last.metric) or table.empty else "test_accuracy"
    exact = (last.metric == "grad_angle_global_deg") & (last.layer == "fc")
    layers = last[last.metric.isin(["angle_deg", "norm_ratio", "grad_angle_global_deg"]) & ~exact]
    return metric, last[last.metric == metric], layers


@plot.style()
def draw(page: Page) -> Figure:
    """a: accuracy, b: path angle, c: gradient angle, against the expansion; ResNet-20 or ResNet-8, as the page is."""
    metric, accuracy, layers = tidy(page.table())
    pfa = layers[layers.rule == "pfa"]
    sizes = sorted(pfa.expansion.unique()) or EXPANSIONS[page.trained]
    fig, ax = plot.figure("abc", height=2.4)
    plot.means(ax["a"], accuracy[accuracy.rule == "pfa"], "expansion", "pfa")
    p3_beyond.levels(ax["a"], accuracy, [r for r in plot.in_order(accuracy.rule) if r != "pfa"])
    for panel, name in (("b", "angle_deg"), ("c", "grad_angle_global_deg")):
        plot.ranges(ax[panel], pfa[pfa.metric == name], "expansion", "pfa")
        ax[panel].set(ylim=(-3, 100), yticks=(0, 30, 60, 90))
        plot.note(ax[panel], "bars: range of the layers")
    λ = np.geomspace(sizes[0], sizes[-1], 60)
    ax["b"].plot(λ, theory.path_angle(λ), ":", color="0.2", lw=0.9)
    labels = {"a": plot.LABELS[metric], "b": "Path angle (°)", "c": plot.LABELS["grad_angle_global_deg"]}
    for panel, label in labels.items():
        ax[panel].set(xscale="log", xlim=(0.8 * sizes[0], 1.25 * sizes[-1]), xlabel=plot.LABELS["expansion"])
        ax[panel].set(ylabel=label, xticks=sizes, xticklabels=[f"{s:g}" for s in sizes])
        ax[panel].minorticks_off()
    rules = {plot.look(r).label: plot.look(r).color for r in plot.in_order(accuracy.rule)}
    ax["a"].legend(handles=plot.key(rules), loc="lower right")
    if accuracy.empty:
        ax["a"].set_yticks([])
    plot.note(ax["a"], plot.repeats(accuracy))
    plot.letters(list(ax.values()))
    return fig


def text(page: Page) -> str:
    """Table after the last epoch: accuracy (mean, sd, n over seeds); path angle, theory, gain and gradient
    angle (means)."""
    _, accuracy, layers = tidy(page.table())
    if accuracy.empty:
        angles = [f"{theory.path_angle(λ):.1f}° at {λ:g}" for λ in EXPANSIONS[page.trained]]
        return tables.several("theory: " + ", ".join(angles))
    shown = accuracy.groupby(["rule", "expansion"], dropna=False).value.agg(["mean", "std", "count"])
    shown = shown.set_axis(["accuracy", "sd", "n"], axis=1)
    for name, title in (("angle_deg", "path"), ("norm_ratio", "gain"), ("grad_angle_global_deg", "gradient")):
        shown[title] = layers[layers.metric == name].groupby(["rule", "expansion"], dropna=False).value.mean()
    wanted = [float(theory.path_angle(λ)) if rule == "pfa" else np.nan for rule, λ in shown.index]
    shown.insert(4, "theory", wanted)
    return tables.shown(shown, float_format="{:.2f}".format, na_rep="-")
