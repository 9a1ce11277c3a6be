"""What stands in the way of random feedback: its gain, the depth of the network, and the sharing of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments._ends import CHANCE, ends, told
from fa.experiments.p1_normalization import name
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "dfa", "usf")
GAINS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DEPTHS = (2, 4, 6, 8, 10)
"""Numbers of convolutions."""
GAINED, COMPARED = 6, 4
"""Convolutions of the network whose gain is varied, and of the two that share weights or do not."""
RATES = {"adam": 1e-3, "sgd": 0.05}
KINDS = {"plain": "plain", "bn": "batch norm", "local": "not shared"}
"""The column ``kind`` -> label."""

PAPER = Config(
    "bp", 0, dataset="cifar10-16", hidden="", epochs=10, batch=128, lr=RATES["adam"], lr_drops="", optimizer="adam",
    weight_decay=0.0, augment=True, weights="he", measure="norms",
)  # fmt: skip
BASES = {
    "paper": PAPER,
    "small": PAPER.vary(epochs=4),
    "quick": PAPER.vary(dataset="digits", epochs=2, batch=32, augment=False),
}
SEEDS = {"paper": 3, "small": 3, "quick": 1}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Plain stacks of 3x3 convolutions, three sweeps: the gain of the feedback, under Adam and SGD; the number of
    convolutions, with and without batch normalisation; and the same network without weight sharing, with DFA as well.

    He's initial weights, so that activity neither grows nor fades with depth; feedback of W's norm, times the gain; no
    decay. The rates are ours. Small: 4 epochs in place of 10. Quick: digits, 2 epochs, one seed, fewer of each.
    """
    base, quick = BASES[mode], mode == "quick"
    base = base.vary(epochs=epochs or base.epochs, dataset=dataset or base.dataset)
    runs = []
    for seed in range(seeds or SEEDS[mode]):
        own = base.vary(seed=seed)
        for rule in rules:
            if rule != "dfa":
                runs += gained(own, rule, (0.1, 1.0, 10.0) if quick else GAINS)
                runs += [
                    own.vary(rule=rule, model=f"plain{n}{kind}")
                    for n in ((2, 4) if quick else DEPTHS)
                    for kind in ("", "-bn")
                ]
            form = {"form": "dense", "init": "kaiming"} if rule == "dfa" else {}
            runs += [own.vary(rule=rule, model=f"plain{COMPARED}{kind}", **form) for kind in ("", "-local")]
    return list({c.run: c for c in runs}.values())


def gained(own: Config, rule: str, gains: tuple[float, ...]) -> list[Config]:
    """The runs of a rule and a seed at every gain, under both optimizers; backprop has no gain to vary."""
    own = own.vary(rule=rule, model=f"plain{GAINED}")
    return [
        own.vary(optimizer=optimizer, lr=rate, **({} if g == 1 else {"gain": g}))
        for optimizer, rate in RATES.items()
        for g in (gains if rule != "bp" else (1.0,))
    ]


def swept(config: Config) -> dict[str, Any]:
    """The columns that name a run's place: ``convolutions``, ``kind``, ``gain`` and ``optimizer``."""
    number, _, kind = config.model.removeprefix("plain").partition("-")
    return {
        "convolutions": int(number),
        "kind": kind or "plain",
        "gain": float(config.rule_options.get("gain", 1)),
        "optimizer": config.optimizer,
    }


EXPERIMENT = Experiment(
    "Obstacles: gain, depth and weight sharing", "p1", "13_fa_obstacles", RULES, grid, small=True, swept=swept
)


# ------------------------------------------------------------------------------------------------------------- figure

TEXT = f""" a: norm of FA's errors at a layer's output divided by the norm of exact backprop's errors, before training,
against the number of feedback matrices above, one colour for each gain g; lines: gain to that power. b: test accuracy
after the last epoch against the gain, {GAINED} convolutions, under Adam (filled) and SGD (open); lines without markers:
BP; crosses at {CHANCE:g} %: runs that diverged. c: test accuracy against the number of convolutions, under Adam, plain
(solid) and with batch normalisation (dashed). d: test accuracy of {COMPARED} convolutions that share their weights
(filled) and of the same network where every place has a kernel of its own (open). e: angle between the errors at a
layer's output and exact backprop's in these two networks after training, by layer. Bars and bands: +/- 1 sd over
seeds."""
SET_UP = "Obstacles to random feedback on CIFAR-10 at 16x16 pixels, in plain stacks of 3x3 convolutions."
CAPTION = f"{SET_UP}{TEXT}"
SMALL_CAPTION = f"{SET_UP} Four epochs in place of ten.{TEXT}"


@plot.style()
def draw(page: Page) -> Figure:
    """a, b: gain; c: depth; d, e: weight sharing."""
    table = page.table()
    fig, ax = plot.figure([list("aabbcc"), list("dddeee")], height=4.7)
    found = ends(table)
    error_norms(ax["a"], table)
    by_gain(ax["b"], found[(found.convolutions == GAINED) & (found.kind == "plain")])
    by_depth(ax["c"], found[(found.optimizer == "adam") & (found.gain == 1) & (found.kind != "local")])
    four = (found.convolutions == COMPARED) & (found.optimizer == "adam") & (found.gain == 1) & (found.kind != "bn")
    shared_or_not(ax["d"], found[four])
    error_angles(ax["e"], table)
    for panel in "bcd":
        ax[panel].set(ylabel=plot.LABELS["test_accuracy"])
    plot.letters([ax[p] for p in "abcde"])
    return fig


def error_norms(ax: Axes, table: pd.DataFrame) -> None:
    """FA's errors over backprop's before training, by the number of feedback matrices that they passed."""
    rows = table[(table.metric == "delta_norm_ratio") & (table.epoch == 0) & (table.rule == "fa")]
    rows = rows[(rows.convolutions == GAINED) & (rows.kind == "plain") & (rows.optimizer == "adam")]
    rows = rows.assign(above=GAINED + 1 - rows.depth)
    gains = sorted(rows.gain.unique())
    for gain, color in zip(gains, plot.depth_colors(range(len(gains))).values()):
        of = rows[rows.gain == gain].groupby("above").value.agg(["mean", "std"])
        ax.errorbar(of.index, of["mean"], of["std"], fmt=".", color=color, ms=5, elinewidth=0.7)
        ax.plot(of.index, gain ** of.index.to_numpy(float), color=color, lw=0.8)
        end = (of.index[-1], of["mean"].iloc[-1])
        ax.annotate(f"g = {gain:g}", end, (5, -3), textcoords="offset points", color=color, fontsize="x-small")
    ax.set(yscale="log", xlabel="Feedback matrices above", ylabel="Error norm over BP's", xlim=(-0.3, GAINED + 1.4))


def by_gain(ax: Axes, rows: pd.DataFrame) -> None:
    """Accuracy against gain: a line a rule and optimizer; BP's as horizontal lines."""
    for optimizer, ls, face in (("adam", "-", {}), ("sgd", "--", {"mfc": "white"})):
        for i, rule in enumerate(plot.in_order(rows.rule)):
            of, own = rows[(rows.rule == rule) & (rows.optimizer == optimizer)], plot.look(rule)
            if rule == "bp":
                mean, sd = of.value.mean(), of.value.std()
                ax.axhline(mean, color=own.color, lw=0.9, ls=ls)
                ax.axhspan(mean - sd, mean + sd, color=own.color, alpha=0.1, lw=0)
                continue
            at = of.groupby("gain").value.agg(["mean", "std"])
            line = {"color": own.color, "ls": ls, "lw": 0.9, "marker": own.marker, "ms": 3.4, "elinewidth": 0.8}
            ax.errorbar(at.index, at["mean"], at["std"], **line, **face)
            size = max(10 - 3 * i, 3)  # crosses of several rules at one place are nested
            ax.plot(of[of.diverged].gain, of[of.diverged].value, "x", color=own.color, ms=size, mew=1, ls="")
    plot.note(ax, "filled: Adam; open: SGD")
    ax.set(xscale="log", xlabel="Gain of the feedback")
    ax.set_xticks((0.01, 0.1, 1, 10))
    ax.set_xlim(0.02, 15)


def by_depth(ax: Axes, rows: pd.DataFrame) -> None:
    """Accuracy against the number of convolutions: a line a rule, plain and with batch normalisation."""
    rules = [r for r in plot.in_order(rows.rule) if r != "dfa"]
    for rule in rules:
        for kind, ls in (("plain", "-"), ("bn", "--")):
            of, own = rows[(rows.rule == rule) & (rows.kind == kind)], plot.look(rule)
            at = of.groupby("convolutions").value.agg(["mean", "std"])
            line = {"color": own.color, "ls": ls, "lw": 0.9, "marker": own.marker, "ms": 3.4, "elinewidth": 0.8}
            ax.errorbar(at.index, at["mean"], at["std"], **line, **({"mfc": "white"} if kind == "bn" else {}))
            ax.plot(of[of.diverged].convolutions, of[of.diverged].value, "x", color=own.color, ms=5, mew=1, ls="")
    plot.note(ax, "filled: plain; open: batch norm")
    ax.set(xlabel="Convolutions", xticks=DEPTHS)
    ax.legend(handles=plot.key({name(r): plot.look(r).color for r in rules}), loc="best")


def shared_or_not(ax: Axes, rows: pd.DataFrame) -> None:
    """Two columns a rule: weights shared, and not; seeds as dots, mean +/- 1 sd."""
    rules = plot.in_order(rows.rule)
    for i, rule in enumerate(rules):
        for shift, kind, face in ((-0.15, "plain", {}), (0.15, "local", {"mfc": "white"})):
            of, own = rows[(rows.rule == rule) & (rows.kind == kind)].value, plot.look(rule)
            if len(of):
                ax.plot([i + shift - 0.07] * len(of), of, ".", color=own.color, ms=2.5, alpha=0.45, mew=0)
                line = {"fmt": own.marker, "color": own.color, "ms": 3.8, "elinewidth": 0.9, "capsize": 1.6}
                ax.errorbar(i + shift, of.mean(), of.std() if len(of) > 1 else None, **line, **face)
    ax.set(xticks=range(len(rules)), xlim=(-0.5, max(len(rules) - 0.5, 0.5)))
    ax.set_xticklabels([name(r) for r in rules])
    ax.tick_params(axis="x", length=0)
    plot.note(ax, "filled: shared; open: a kernel for each place; " + plot.repeats(rows, ["rule", "kind"]))


def error_angles(ax: Axes, table: pd.DataFrame) -> None:
    """Angle of the errors to backprop's by layer, after training, shared and not; the output layer's error is exact."""
    rows = sharing(table, "delta_angle_global_deg")
    rows = rows[rows.depth <= COMPARED]
    for rule in plot.in_order(rows.rule):
        for kind, ls, face in (("plain", "-", {}), ("local", "--", {"mfc": "white"})):
            at = rows[(rows.rule == rule) & (rows.kind == kind)].groupby("depth").value.agg(["mean", "std"])
            own = plot.look(rule)
            line = {"color": own.color, "ls": ls, "lw": 0.9, "marker": own.marker, "ms": 3.8, "elinewidth": 0.8}
            ax.errorbar(at.index, at["mean"], at["std"], **line, **face)
    ax.axhline(90, color="0.75", lw=0.6, ls=":", zorder=0)
    ax.set(ylabel=plot.LABELS["delta_angle_global_deg"], ylim=(0, 105), yticks=(0, 30, 60, 90))
    ax.set_xticks(range(1, COMPARED + 1), [f"conv{i}" for i in range(1, COMPARED + 1)])
    ax.legend(handles=plot.key({name(r): plot.look(r).color for r in plot.in_order(rows.rule)}), loc="lower left")
    plot.note(ax, "filled: shared; open: a kernel for each place")


def sharing(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of a metric after the last epoch in the two networks of panel d."""
    rows = table[(table.metric == metric) & (table.epoch == table.epoch.max()) & (table.optimizer == "adam")]
    return rows[(rows.convolutions == COMPARED) & (rows.kind != "bn") & (rows.gain == 1)]


def listing(page: Page) -> str:
    """Tables of test accuracy after the last epoch, mean +/- sd over seeds: by gain; by depth; shared and not."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    found = ends(table)
    gain = found[(found.convolutions == GAINED) & (found.kind == "plain")]
    adam = found[(found.optimizer == "adam") & (found.gain == 1)]
    parts = {
        "gain": wide(gain, ["rule", "optimizer"], "gain"),
        "convolutions": wide(adam[(adam.kind != "local") & (adam.rule != "dfa")], ["rule", "kind"], "convolutions"),
        "weights": wide(adam[(adam.convolutions == COMPARED) & (adam.kind != "bn")], ["rule"], "kind"),
    }
    return tables.several(*(part for part in parts.values()))


def wide(rows: pd.DataFrame, by: list[str], over: str) -> str:
    """A row for each combination of ``by``, a column for each value of ``over``."""
    cells = rows.groupby([*by, over])[["value", "diverged"]].apply(told).unstack(over)
    order = {r: i for i, r in enumerate(plot.in_order(rows.rule))}
    cells = cells.sort_index(key=lambda i: i.map(order) if i.name == "rule" else i).reset_index()
    cells["rule"] = [name(r) for r in cells.rule]
    cells = cells.rename(columns={**KINDS, "plain": "shared"} if over == "kind" else {})
    if "kind" in cells:
        cells["kind"] = [KINDS[k] for k in cells.kind]
    return tables.shown(cells.rename_axis(columns=None), index=False, na_rep="-")
