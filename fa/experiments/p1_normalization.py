"""p1's rules on Architecture 1 under both readings of strict normalisation: which of them does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments.p1_accuracy import PAPER as ACCURACY
from fa.experiments.p1_accuracy import QUICK, SET_UP, asked, measured
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "usf", "brsf", "frsf")

BASES = {
    "paper": ACCURACY.vary(epochs=10, first_steps="", keep=False),
    "quick": QUICK.vary(epochs=2, first_steps="", keep=False),
}
SEEDS = {"paper": 3, "quick": 1}
SETTINGS = {
    ("fixed", "free"): "neither",
    ("track", "free"): "feedback follows",
    ("fixed", "held"): "W held",
    ("track", "held"): "both",
}
"""(column ``feedback``, column ``forward``) -> label."""
MARKERS = dict(zip(SETTINGS, "o^sD"))


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Every rule in four settings: feedback of fixed norm or of W's norm, W free or held at its initial norm; BP once.

    The set-up of page 11 with 10 epochs in place of 50 and in bfloat16. All feedback starts with W's norm, so that the
    settings differ in what happens to the norms later and in nothing else. Quick: digits, 2 epochs, one seed.
    """
    base = asked(BASES[mode], epochs, dataset)
    return [c for seed in range(seeds or SEEDS[mode]) for r in rules for c in of_rule(base, r, seed)]


def of_rule(base: Config, rule: str, seed: int) -> list[Config]:
    """The runs of a rule and a seed; of BP, and of a rule without a kernel of W's shape, one."""
    if rule in ("bp", "dfa"):
        return [base.vary(rule=rule, seed=seed, weight_decay=1e-4 if rule == "bp" else 0.0)]
    follow = {"scale": "track"} if rule == "usf" else {"norm": "track"}
    held = {"clamp_forward": True}
    chosen = [(follow if f == "track" else {}) | (held if w == "held" else {}) for f, w in SETTINGS]
    return [base.vary(rule=rule, seed=seed, **options) for options in chosen]


def swept(config: Config) -> dict[str, Any]:
    """The columns that name a run's place: ``feedback`` ("fixed" or "track") and ``forward`` ("free" or "held")."""
    options = config.rule_options
    follows = "track" in (options.get("scale"), options.get("norm"))
    return {
        "feedback": "track" if follows else "fixed",
        "forward": "held" if options.get("clamp_forward") else "free",
    }


EXPERIMENT = Experiment(
    "Strict normalisation, in both of its readings", "p1", "14_fa_normalization", RULES, grid, swept=swept
)


# ------------------------------------------------------------------------------------------------------------- figure

TEN = " Ten epochs in place of 50, in bfloat16."
CAPTION = f"""{SET_UP}{TEN} Strict normalisation has two readings: the feedback takes the norm of W at every step
(feedback follows), or W is put back to its initial norm after every step (W held). a, b: test accuracy after the epoch
of the best validation accuracy, under FA and under the sign rules, in neither, either or both; dotted: BP. c: norm of W
after training over its initial norm, by layer, where W is free: feedback of fixed norm (solid) and feedback that
follows (dashed). d: angle between a layer's gradient dW and exact backprop's, after training, in conv1, which lies
below four feedback matrices. Dots: seeds; bars: +/- 1 sd over seeds."""


@plot.style()
def draw(page: Page) -> Figure:
    """a, b: accuracy; c: growth of W by layer; d: gradient angle of the first layer."""
    table = page.table()
    fig, ax = plot.figure([list("abbb"), list("ccdd")], height=4.6)
    metric = measured(table)
    end = table[table.epoch == table.groupby("run").epoch.transform("max")] if len(table) else table
    ends = end[end.metric == metric]
    signs = ends.rule.isin(["usf", "brsf", "frsf", "bp"])
    by_setting(ax["a"], ends[~signs])
    by_setting(ax["b"], ends[signs])
    bp = ends[ends.rule == "bp"].value.mean()
    ax["b"].axhline(bp, color=plot.look("bp").color, lw=0.8, ls=":", zorder=0)
    ax["b"].annotate("BP", (1, bp), (0, 2), ("axes fraction", "data"), "offset points", fontsize="x-small", ha="right")
    ax["a"].set(ylabel=plot.LABELS[metric].replace(", best", ",\nbest"))
    plot.note(ax["b"], plot.repeats(ends, ["rule", "feedback", "forward"]) + " (dots)")
    handles = plot.key(dict.fromkeys(SETTINGS.values(), "0.3"), ls="")
    for handle, marker in zip(handles, MARKERS.values()):
        handle.set(marker=marker, ms=3.8)
    ax["b"].legend(handles=handles, ncols=4, loc="lower right")
    ax["b"].margins(y=0.15)  # room for the key
    growth_by_layer(ax["c"], growth(table))
    first = end[(end.metric == "grad_angle_global_deg") & (end.depth == 1)]
    by_setting(ax["d"], first)
    ax["d"].set(ylabel="Gradient angle of conv1 (°)", ylim=(0, 105), yticks=(0, 30, 60, 90))
    ax["d"].axhline(90, color="0.75", lw=0.6, ls=":", zorder=0)
    plot.letters(ax.values())
    return fig


def name(rule: str) -> str:
    """A rule's name on p1's pages."""
    return EXPERIMENT.named(rule)


def by_setting(ax: Axes, rows: pd.DataFrame) -> None:
    """Four columns a rule, one a setting: seeds as dots, mean +/- 1 sd."""
    rules = [r for r in plot.in_order(rows.rule) if r != "bp"]
    for i, rule in enumerate(rules):
        for j, (feedback, forward) in enumerate(SETTINGS):
            of = rows[(rows.rule == rule) & (rows.feedback == feedback) & (rows.forward == forward)].value
            x, color = i + 0.17 * (j - 1.5), plot.look(rule).color
            ax.plot([x - 0.05] * len(of), of, ".", color=color, ms=2.5, alpha=0.45, mew=0)
            line = {"fmt": MARKERS[feedback, forward], "color": color, "ms": 3.8, "elinewidth": 0.9, "capsize": 1.6}
            if len(of):
                ax.errorbar(x, of.mean(), of.std() if len(of) > 1 else None, **line)
    ax.set(xticks=range(len(rules)), xlim=(-0.5, max(len(rules) - 0.5, 0.5)))
    ax.set_xticklabels([name(r) for r in rules])
    ax.tick_params(axis="x", length=0)


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """Norm of W after training over its initial norm: a row a run and layer."""
    norms = table[table.metric == "weight_norm"]
    last = norms.groupby("run").epoch.transform("max")
    start = norms[norms.epoch == 0].set_index(["run", "layer"]).value
    end = norms[norms.epoch == last].set_index(["run", "layer"])
    return end.assign(value=end.value / start).reset_index()


def growth_by_layer(ax: Axes, rows: pd.DataFrame) -> None:
    """A line a rule and kind of feedback over the layers, where W is free."""
    names = list(rows.sort_values("depth").layer.unique())
    free = rows[(rows.forward == "free") & (rows.rule != "bp")]
    rules = plot.in_order(free.rule)
    for rule in rules:
        for feedback, ls in (("fixed", "-"), ("track", "--")):
            of = free[(free.rule == rule) & (free.feedback == feedback)].groupby("layer").value.agg(["mean", "std"])
            of = of.loc[[n for n in names if n in of.index]]
            line = {"color": plot.look(rule).color, "ls": ls, "lw": 0.9, "elinewidth": 0.7, "marker": ".", "ms": 3}
            ax.errorbar([names.index(n) for n in of.index], of["mean"], of["std"], **line)
    ax.set(xticks=range(len(names)), ylabel="Weight norm over initial")
    ax.set_xticklabels(names)
    ax.axhline(1, color="0.75", lw=0.6, ls=":", zorder=0)
    styles = [*plot.key({"norm of B fixed": "0.3"}), *plot.key({"norm of B follows W": "0.3"}, ls="--")]
    handles = plot.key({name(r): plot.look(r).color for r in rules})
    ax.legend(handles=[*handles, *styles], loc="upper right", ncols=2)


def accuracies(page: Page) -> str:
    """Table: a row a rule, a column a setting; mean +/- sd over seeds of the accuracy in panels a and b."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    ends = table[(table.metric == measured(table)) & (table.epoch == table.groupby("run").epoch.transform("max"))]
    found = ends.groupby(["rule", "feedback", "forward"]).value.agg(["mean", "std"])
    text = found.apply(lambda row: f"{row['mean']:.2f} ± {row['std']:.2f}", axis=1)
    wide = text.unstack(["feedback", "forward"]).reindex(index=plot.in_order(ends.rule), columns=list(SETTINGS))
    wide.index = pd.Index([name(r) for r in wide.index])
    wide.columns = pd.Index(SETTINGS.values())
    return tables.shown(wide, na_rep="-")
