"""p3's sparse feedback (authors' ``exp_configs/mnist_ffn2_bsparse_sgd``): accuracy on MNIST by feedback density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fa import plot, tables, theory
from fa.experiments import Experiment, p3_fig2
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Page


RULES = ("bp", "fa", "dfa", "usf", "pfa_o", "kp", "pfa")  # pfa last: sparse, it has no form without its population

DENSITIES = (0.05, 0.1, 0.17, 0.3, 0.5, 1.0)  # authors' script
QUICK = (0.1, 0.3, 1.0)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, **own: Any) -> list[Config]:
    """Figure 2's recipe with masks on the feedback; runs at density 1, and bp, are its own. Quick: three densities."""
    quick = mode == "quick"
    runs = []
    for config in p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (20 if quick else 0), dataset):
        implicit = "first" if config.rule_options.get("implicit") else None
        for density in (DENSITIES if not quick else QUICK) if config.rule != "bp" else (1.0,):
            runs.append(config if density == 1 else config.vary(implicit=implicit, density=density))
    return runs


EXPERIMENT = Experiment(
    "Sparse feedback on MNIST", "p3", "36_pfa_sparse", RULES, grid,
    swept=lambda config: {"density": config.rule_options.get("density", 1.0)},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Li & Benna (2024), sparse-feedback figure, replicated. A 784-512-512-10 ReLU network learns MNIST with
feedback of connection density d. a: best test accuracy over 40 epochs; lines and markers: ours, mean +/- 1 sd over
seeds; BP: solid line and band, ours, dashed, the paper's (mean +/- 1 sd of 5 seeds). The paper's other values are
unknown; the axis is close to the authors', and numbers with an arrow are means below it. b: angle between the
W of each hidden layer and its feedback after the last epoch: mean over seeds and both layers, bars from the lower
angle to the higher; dotted: theory; DFA has no such angle. c: as a, against feedback connections for each
forward one."""


def masked_angle(density: float | np.ndarray) -> np.ndarray:
    r"""Angle in degrees between W and m ∘ W, for a mask m of density d that is independent of W: arccos(sqrt(d)).

    It is the angle at which Kolen and Pollack's rule ends under sparse feedback. Source: our derivation.
    """
    return np.degrees(np.arccos(np.sqrt(np.asarray(density, dtype=float))))


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Best test accuracy over the epochs of each run: columns rule, density, seed, value."""
    accuracy = table[table.metric == "test_accuracy"]
    return accuracy.groupby(["rule", "density", "seed"], as_index=False).value.max()


def angles(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the layers' angles after the last epoch of each run."""
    rows = table[table.metric == "angle_deg"]
    return rows[rows.epoch == rows.groupby("run").epoch.transform("max")]


def shapes(page: Page) -> dict[str, tuple[int, int]]:
    """Layer -> (inputs, outputs) of the page's network."""
    pixels = {"digits": 64, "mnist": 784, "cifar10": 3072}[page.runs[0].dataset]
    widths = [pixels, *map(int, page.runs[0].hidden.split(",")), 10]
    return dict(zip(["fc1", "fc2", "fc"], zip(widths, widths[1:])))


def synapses(rule: str, density: float, shapes: Mapping[str, tuple[int, int]], expansion: int = 10) -> float:
    """Expected number of feedback connections for each forward one.

    Args:
        shapes: layer -> (inputs, outputs).
        expansion: of the population under pfa.
    """
    one = {
        "dfa": lambda i, o: 10 * i,
        "pfa": lambda i, o: expansion * o * (o + i),
        "pfa_o": lambda i, o: o * (o + i),
    }.get(rule, lambda i, o: o * i)
    return density * sum(one(i, o) for i, o in shapes.values()) / sum(i * o for i, o in shapes.values())


@plot.style()
def draw(page: Page) -> Figure:
    """a: best accuracy, b: angles, by the density of the feedback; c: best accuracy by the number of connections."""
    ours, angle, layers = best(page.table()), angles(page.table()), shapes(page)
    fig, ax = plot.figure("abc", height=2.5)
    rules = plot.in_order(ours.rule[ours.rule != "bp"])
    for i, rule in enumerate(rules):
        shift = 1.03 ** (i - (len(rules) - 1) / 2)  # so that error bars at one density do not hide each other
        look, rows = plot.look(rule), ours[ours.rule == rule]
        low = rows.groupby("density").value.mean()
        for d, value in low[low < 96.7].items() if page.mode != "quick" else ():  # below the authors' axis
            place = (d * shift * 1.02, 96.72)
            ax["a"].text(*place, f"{value:.1f}\n↓", ha="left", va="bottom", fontsize=6, color=look.color)
        plot.means(ax["a"], rows, "density", rule, lambda d: d * shift, label=look.label)
        plot.means(ax["c"], rows, "density", rule, lambda ds: [synapses(rule, d, layers) for d in ds])
        if rule in set(angle.rule):
            hidden = angle[(angle.rule == rule) & (angle.layer != "fc")]  # the theory is about them
            plot.ranges(ax["b"], hidden, "density", rule, lambda d: d * shift)
    for panel in "ac":
        for values, dash, ddof in ((ours[ours.rule == "bp"].value, "-", 1), (page.reference().value, "--", 0)):
            if len(values):
                middle, half = values.mean(), values.std(ddof=ddof) if len(values) > 1 else 0
                ax[panel].axhline(middle, color="k", ls=dash, lw=0.9, label="BP" if dash == "-" else "BP, paper")
                ax[panel].axhspan(middle - half, middle + half, color="k", alpha=0.1, lw=0)
        if page.mode != "quick":
            ax[panel].set(ylim=(96.7, 98.85), yticks=(97, 97.5, 98, 98.5))
    ticks = sorted(ours.density.unique()) or DENSITIES
    d = np.geomspace(ticks[0], 1, 100)
    ax["b"].plot(d, theory.path_angle(10, d, layers["fc2"][1]), ":", color=plot.look("pfa").color, lw=1)
    ax["b"].plot(d, masked_angle(d), ":", color=plot.look("kp").color, lw=1)
    for panel in "ab":
        ax[panel].set(xscale="log", xlim=(0.87 * ticks[0], 1.15), xlabel=plot.LABELS["density"])
        ax[panel].set(xticks=ticks, xticklabels=[f"{t:g}" for t in ticks])
        ax[panel].minorticks_off()
    ax["a"].set(ylabel="Best test accuracy (%)")
    ax["b"].set(ylabel="Angle to W (°), last epoch", ylim=(-3, 100), yticks=(0, 30, 60, 90))
    ax["c"].set(xscale="log", xlabel="Feedback connections per weight", ylabel="Best test accuracy (%)")
    ax["c"].xaxis.set_major_formatter("{x:g}")
    ax["c"].legend(*ax["a"].get_legend_handles_labels(), loc="lower left", handlelength=1.4)
    plot.note(ax["a"], plot.repeats(ours[ours.rule != "bp"], ["rule", "density"]))
    plot.note(ax["b"], "hidden layers; bars: range")
    plot.letters(list(ax.values()))
    return fig


def accuracies(page: Page) -> str:
    """Tables by density: best accuracy, mean over seeds; what is lost against density 1, paired by seed; the
    paper's BP."""
    ours, paper, told = best(page.table()), page.reference().value, []
    if len(ours):
        seeds = ours.groupby(["rule", "density"]).seed.nunique().groupby("rule").min().rename("n")
        dense = ours[ours.density == 1].set_index(["rule", "seed"]).value
        at_one = dense.reindex(ours.set_index(["rule", "seed"]).index)
        lost = ours.assign(value=at_one.to_numpy() - ours.value.to_numpy())
        for frame in (ours, lost[(lost.density < 1) & (lost.rule != "bp")]):
            shown = frame.pivot_table(index="rule", columns="density", values="value")
            shown = shown.loc[plot.in_order(shown.index)].join(seeds)
            told += [tables.shown(shown, float_format="{:.2f}".format, na_rep="-"), ""]
    bp = f"{paper.mean():.2f}, n {len(paper)}" if len(paper) else "not comparable"
    return tables.several(*told, f"the paper's BP: {bp}; its other values are unknown to us")


def alignment(page: Page) -> str:
    """Tables by density: each layer's angle after the last epoch, mean over seeds; theory for pfa and kp."""
    ours, layers, told = angles(page.table()), shapes(page), []
    if len(ours):
        shown = ours.pivot_table(index=["rule", "layer"], columns="density", values="value", sort=False)
        order = [(r, l) for r in plot.in_order(ours.rule) for l in layers if (r, l) in shown.index]
        told = [tables.shown(shown.loc[order].sort_index(axis=1), float_format="{:.1f}".format, na_rep="-"), ""]
    ds = np.array(sorted(ours.density.unique()) or DENSITIES)
    lines = {f"pfa {layer}": theory.path_angle(10, ds, n) for layer, (_, n) in layers.items()}
    lines["kp"] = masked_angle(ds)
    theirs = pd.DataFrame(lines, index=pd.Index(ds, name="density")).T.rename_axis("theory")
    return tables.several(*told, tables.shown(theirs, float_format="{:.1f}".format))
