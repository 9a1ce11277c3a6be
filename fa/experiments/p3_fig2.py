"""p3, Figure 2: accuracy and alignment on MNIST, and the recipe that p3's other MNIST figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import plot
from fa.experiments import Experiment, of_rules
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page


RULES = ("bp", "fa", "dfa", "usf", "pfa", "pfa_o")

PAPER = Config("bp", 0)  # MNIST, 784-512-512-10, the authors' configuration: the defaults of Config
QUICK = PAPER.vary(dataset="digits", hidden="64,64", epochs=30, lr=0.05)

OPTIONS = {  # authors' configurations: Xavier everywhere; SF is uniform with the Xavier standard deviation; lambda = 10
    "fa": dict(init="xavier"),
    "dfa": dict(init="xavier"),
    "usf": dict(scale="xavier"),
    "kp": dict(init="xavier"),
    "pfa": dict(init="xavier", expansion=10, implicit=True),
    "pfa_o": dict(init="xavier", implicit=True),
}
DECAYED = ("kp", "pfa", "pfa_o")  # strong decay in the first epoch, so that the feedback aligns; kp so by our choice


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, expansion: int = 10, **own: Any
) -> list[Config]:
    """The authors' configuration; quick: digits, three seeds, and the first epoch's decay over fewer steps."""
    quick = mode == "quick"
    base = QUICK if quick else PAPER
    base = base.vary(dataset=dataset or base.dataset, epochs=epochs or base.epochs)
    if base.epochs != PAPER.epochs:
        base = base.vary(lr_drops=f"{base.epochs // 2},{base.epochs * 3 // 4}")
    decay = dict(weight_decay=9e-5, first_weight_decay=0.2 if quick else 0.03)
    of_rule = {rule: dict(options) | (decay if rule in DECAYED else {}) for rule, options in OPTIONS.items()}
    of_rule["pfa"]["expansion"] = expansion
    return of_rules(base, rules, seeds or (3 if quick else 5), of_rule)


EXPERIMENT = Experiment(
    "Accuracy and alignment on MNIST", "p3", "32_pfa_fig2_mnist", RULES, grid, own={"expansion": 10}
)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Li & Benna (2024), Figure 2, replicated. A 784-512-512-10 ReLU network learns MNIST. a: test accuracy by
epoch (inset: second half). b: test accuracy after the last epoch, a dot a seed. c: angle between each layer's weight
W and the feedback that carries the error in its place. d: ratio of their norms. Lines and filled markers: ours, mean
+/- 1 sd over seeds. Hollow: the paper's, mean +/- 1 sd of 5 seeds in a and b, seed 0 in c and d."""


@plot.style()
def draw(page: Page) -> Figure:
    """a, b: test accuracy by epoch and after the last; c, d: each layer's angle and norm ratio to W, a column a
    rule."""
    table, paper = page.table(), page.reference()
    rules = plot.in_order([*table[table.metric == "angle_deg"].rule, *paper[paper.metric == "angle_deg"].rule])
    mosaic = [["a", *[f"angle_deg {r}" for r in rules]], ["b", *[f"norm_ratio {r}" for r in rules]]]
    fig, ax = plot.figure(mosaic, height=3.5, width_ratios=[2.4, *[1] * len(rules)])
    plot.accuracy(ax["a"], table)
    plot.rule_key(ax["a"], [*table.rule, *paper.rule])
    if page.mode != "quick":
        zoom(ax["a"], table, paper)
        ax["a"].set(xlim=(0, 41), ylim=(90, 100), yticks=range(90, 101, 2))
    plot.finals(ax["b"], table, paper)
    layer_grid(ax, table, rules, paper)
    plot.letters([ax["a"], ax["b"], *[ax[f"{m} {rules[0]}"] for m in ("angle_deg", "norm_ratio") if rules]])
    return fig


def zoom(ax: Axes, table: pd.DataFrame, reference: pd.DataFrame, metric: str = "test_accuracy") -> None:
    """Inset of `plot.accuracy`: the second half of training, at the height where the rules differ."""
    inset = ax.inset_axes((0.37, 0.1, 0.61, 0.48))
    plot.accuracy(inset, table, reference, metric)
    end = table[table.metric == metric]
    end = end[end.epoch >= end.epoch.max() / 2]
    if len(end):
        by_rule = end.groupby(["rule", "epoch"]).value.mean()
        low, high = by_rule.min(), by_rule.max()
        room = high - low
        left = end.epoch.min() - (0.5 if reference.empty else 1.2)  # its markers are shifted sideways
        inset.set(xlim=(left, 1.025 * end.epoch.max()), ylim=(low - 0.15 * room, high + 0.25 * room))
    inset.set(xlabel="", ylabel="")
    inset.xaxis.get_major_locator().set_params(integer=True)
    inset.tick_params(labelsize=5.5)


def layer_grid(
    axes: Mapping[str, Axes], table: pd.DataFrame, rules: Sequence[str], reference: pd.DataFrame | None = None
) -> None:
    """`plot.layers` of every rule, on p3's axes: panels "angle_deg RULE" and "norm_ratio RULE"."""
    last = max((f.epoch.max() for f in (table, reference) if f is not None and len(f)), default=1)
    rows = {
        "angle_deg": ("Angle to W (°)", (-5, 100), (0, 50, 100), 90),  # 90: as random vectors
        "norm_ratio": ("Norm ratio to W", (0, 3), (0, 1, 2, 3), 1),  # 1: as long as W
    }
    for metric, (label, limits, ticks, even) in rows.items():
        for rule in rules:
            ax, first, bottom = axes[f"{metric} {rule}"], rule == rules[0], metric == "norm_ratio"
            ax.axhline(even, color="0.75", lw=0.6, ls=":", zorder=0)
            colors = plot.layers(ax, table, rule, metric, reference)
            ax.set(xlim=(-0.03 * last, 1.03 * last), xticks=(0, last // 2, last), ylim=limits, yticks=ticks)
            ax.set(xlabel=plot.LABELS["epoch"] if bottom else "", ylabel=label if first else "")
            ax.tick_params(labelleft=first, labelbottom=bottom)
            if not bottom:
                ax.set_title(plot.look(rule).label, color=plot.look(rule).color, fontweight="bold")
    if rules:
        named = [list(colors)[round(i * (len(colors) - 1) / 4)] for i in range(5)] if len(colors) > 6 else colors
        shown = {layer: colors[layer] for layer in named}  # from the first to the last
        paper = reference is not None and len(reference) > 0
        axes[f"norm_ratio {rules[-1]}"].legend(handles=plot.key(shown, paper), loc="upper right")
