"""How fast feedback must follow: the accuracy that lag, momentum and a random start of learned feedback cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments._ends import ends, minus_bp, told
from fa.theory import mismatch_left
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "frozen", "sa", "aa", "wm")
LAGS = (1, 5, 25, 100)
"""Steps that the feedback is behind a W that moves at a constant speed."""
MIDDLE = 5
"""The lag at which rules are compared."""

RATE = 0.2
"""Rate at which the gradient of the feedback draws it to W: 2 decay of SA and WM, 2 sparse of AA on white noise."""
OPTIONS: dict[str, dict[str, Any]] = {
    "sa": {"self_": 0.2, "decay": 0.1},
    "aa": {"amp": 0.2, "sparse": 0.1, "input": "normal"},
    "wm": {"amp": 0.2, "decay": 0.1, "input": "normal"},
}
"""Coefficients whose fixed point is W itself: the middles of page 23's grids, with noise as the mirrors' input."""

PAPER = Config(
    "bp", 0, dataset="cifar10-16", model="resnet8", hidden="", epochs=4, batch=128, lr=0.1, lr_drops="3", lr_factor=0.1,
    augment=True, precision="bfloat16", first_steps="1,2,5,10,20,50,100",
)  # fmt: skip
QUICK = PAPER.vary(
    dataset="digits", model="mlp", hidden="64,64", epochs=3, lr_drops="2", batch=32, lr=0.02, augment=False,
    precision="float32", first_steps="1,2,5,10,20,40",
)  # fmt: skip


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """SA at every lag, with momentum 0.9 and without, from a random start and from a copy of W; AA and WM at one lag;
    frozen backprop, whose copy of W is as far behind on average; BP.

    Quick: a multilayer perceptron on digits, one seed, two lags.
    """
    base = PAPER if mode == "paper" else QUICK
    base = base.vary(epochs=epochs or base.epochs, dataset=dataset or base.dataset)
    base = base.vary(lr_drops=str(max(base.epochs - 1, 1)))
    lags = LAGS if mode == "paper" else LAGS[:2]
    return [
        run
        for seed in range(seeds or (3 if mode == "paper" else 1))
        for rule in rules
        for run in of_rule(base.vary(seed=seed, rule=rule), lags if rule in ("frozen", "sa") else (MIDDLE,))
    ]


def of_rule(base: Config, lags: Sequence[int]) -> list[Config]:
    """The runs of a rule and seed."""
    if base.rule == "frozen":
        return [base.vary(every=2 * lag + 1) for lag in lags]
    if base.rule not in OPTIONS:
        return [base]
    return [
        base.vary(
            **OPTIONS[base.rule], feedback_momentum=momentum, feedback_lr=rate(lag, momentum),
            **{"init": "copy"} if copy else {},
        )
        for lag in lags for momentum in (0.0, 0.9) for copy in (False, True)
    ]  # fmt: skip


def rate(lag: float, momentum: float) -> float:
    """The learning rate at which feedback is so many steps behind."""
    return round((1 - momentum) / (RATE * lag), 6)


def swept(config: Config) -> dict[str, Any]:
    """The columns that name a run's place: ``lag`` in steps, ``momentum`` of the feedback, and its ``start``, "drawn"
    or "copy"."""
    lag, momentum = 0.0, max(config.feedback_momentum, 0.0)
    if config.rule == "frozen":
        lag = (config.rule_options["every"] - 1) / 2
    elif config.feedback_lr:
        lag = round((1 - momentum) / (RATE * config.feedback_lr), 3)
    start = config.rule_options.get("init", "copy" if config.rule in ("bp", "frozen") else "drawn")
    return {"lag": lag, "momentum": momentum, "start": start}


EXPERIMENT = Experiment(
    "How fast feedback must follow the weights", "p2", "28_estimation_lag", RULES, grid, swept=swept
)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """How fast feedback must follow W (ours; the rules of Kunin et al. 2020). ResNet-8 learns CIFAR-10 at 16x16
pixels for four epochs. a: test accuracy after the last epoch minus backprop's, against the lag, the number of steps
that the feedback is behind a W which moves at a constant speed; frozen BP has a copy of W that is as old on average,
but for the last epoch; arrow: means far below the others, from W and from a random start. b: angle between W and SA's
feedback in the first epoch, from a random start, mean of the layers; lines: the formula for a W that rests. c: test
accuracy minus backprop's of SA, AA and WM at a lag of five steps. Filled: the feedback starts as a copy of W; hollow:
at random. Circles: no momentum of the feedback; squares: momentum 0.9. Bars: +/- 1 sd over seeds."""

LOWEST, SHOWN = -12.0, 50  # of panel a, points; of panel b, steps
LOOKS = {0.0: ("o", "-"), 0.9: ("s", "--")}
"""Momentum -> marker, line."""


@plot.style()
def draw(page: Page) -> Figure:
    """a: what lag costs; b: the feedback's first steps; c: other rules."""
    table = page.table()
    fig, ax = plot.figure("abc", height=2.7, width_ratios=[1.15, 1, 0.85])
    gap = minus_bp(ends(table), ["seed"])
    by_lag(ax["a"], gap)
    first_steps(ax["b"], table)
    by_rule(ax["c"], gap)
    plot.letters([ax[p] for p in "abc"])
    return fig


def conditions(rows: pd.DataFrame) -> list[tuple[tuple[float, str], pd.DataFrame]]:
    """Rows by (momentum, start)."""
    return [(key, of) for key, of in rows.groupby(["momentum", "start"])]


def by_lag(ax: Axes, gap: pd.DataFrame) -> None:
    """Panel a: a line for SA at each momentum and start, and one for frozen backprop; means far below the others are
    written at the bottom."""
    low: dict[float, list[float]] = {}
    for rule in ("frozen", "sa"):
        color = plot.look(rule).color
        for j, ((momentum, start), of) in enumerate(conditions(gap[gap.rule == rule])):
            marker, line = LOOKS[momentum] if rule == "sa" else ("^", ":")
            at, shift = of.groupby("lag").value.agg(["mean", "std"]), 1.1 ** (j - 1.5 if rule == "sa" else 0)
            style = {"color": color, "marker": marker, "mfc": color if start == "copy" else "white", "ms": 3.6}
            shown = at.mask(at["mean"] < LOWEST)
            ax.errorbar(at.index * shift, shown["mean"], shown["std"], ls=line, lw=0.9, elinewidth=0.7, **style)
            for lag, mean in at["mean"][at["mean"] < LOWEST].items():
                ax.plot(lag * shift, LOWEST, **style)
                low.setdefault(lag, []).append(mean)
    for lag, means in low.items():
        text = "\N{DOWNWARDS ARROW} " + ", ".join(f"\N{MINUS SIGN}{-mean:.0f}" for mean in means)
        ax.annotate(text, (lag * 1.3, LOWEST), va="center", fontsize="x-small", color=plot.look("sa").color)
    ax.axhline(0, color="0.75", lw=0.6, ls=":", zorder=0)
    ax.set(xscale="log", xlabel="Lag (steps)", ylabel="Test accuracy minus BP (points)", ylim=(LOWEST - 0.8, 2))
    ax.set_yticks(range(-10, 3, 2))
    ax.set_xticks(LAGS, [str(lag) for lag in LAGS])
    ax.minorticks_off()
    plot.note(ax, plot.repeats(gap, ["rule", "lag", "momentum", "start"]))
    frozen = plot.key({"frozen BP": plot.look("frozen").color}, marker="^", ls=":", ms=3.6)
    ax.legend(handles=[*keys(), *frozen], loc="lower left", bbox_to_anchor=(0, 0.1), fontsize="x-small")


def keys() -> list[Any]:
    """The legend of SA's lines: momentum and start."""
    from matplotlib.lines import Line2D

    color = plot.look("sa").color
    return [
        Line2D([], [], color=color, marker=marker, ls=line, mfc=face, ms=3.6, label=f"SA, momentum {m:g}, {word}")
        for m, (marker, line) in LOOKS.items() for face, word in ((color, "from W"), ("white", "random"))
    ]  # fmt: skip


def first_steps(ax: Axes, table: pd.DataFrame) -> None:
    """Panel b: SA's angle to W by step of the first epoch, and the formula."""
    rows = table[(table.metric == "angle_deg") & (table.rule == "sa") & (table.start == "drawn") & (table.epoch < 1)]
    rows = rows[rows.lag == MIDDLE]
    if rows.empty:
        return
    rows = rows.assign(step=(rows.epoch / rows.epoch[rows.epoch > 0].min()).round())  # the first is step 1
    means = rows.groupby(["momentum", "seed", "step"], as_index=False).value.mean()
    for momentum, of in means.groupby("momentum"):
        marker, line = LOOKS[momentum]
        found = of[of.step <= SHOWN].groupby("step").value.agg(["mean", "std"])
        style = {"color": plot.look("sa").color, "mfc": "white", "ms": 3.6, "elinewidth": 0.7}
        ax.errorbar(found.index, found["mean"], found["std"], fmt=marker, label=f"momentum {momentum:g}", **style)
        last = int(found.index.max())
        ax.plot(range(last + 1), settling(MIDDLE, momentum, last), color="0.3", ls=line, lw=0.8, zorder=0)
    ax.set(xlabel="Step of the first epoch", ylabel="Angle of SA's feedback to W (°)")
    ax.set(ylim=(-4, 100), yticks=(0, 30, 60, 90))
    ax.legend(fontsize="x-small")
    plot.note(ax, f"lag {MIDDLE}, random start")


def settling(lag: float, momentum: float, steps: int) -> np.ndarray:
    r"""Angle in degrees between a W that rests and feedback that started at random, after 0, 1, ... steps.

    .. math:: B_t = (1 - c_t) W + c_t B_0, \qquad \theta_t = \mathrm{atan2}(|c_t|, 1 - c_t)

    for a B_0 of W's size, orthogonal to it; c_t is the share of the mismatch that is left. Source: our derivation.
    """
    rate = (1 - momentum) / lag
    c = np.array([mismatch_left([(rate, 1.0)], momentum, t)[-1] for t in range(steps + 1)])
    return np.degrees(np.arctan2(np.abs(c), 1 - c))


def by_rule(ax: Axes, gap: pd.DataFrame) -> None:
    """Panel c: SA, AA and WM at one lag, a point for each momentum and start."""
    rules, middle = [r for r in OPTIONS if r in set(gap.rule)], gap[gap.lag == MIDDLE]
    for i, rule in enumerate(rules):
        color = plot.look(rule).color
        for j, ((momentum, start), of) in enumerate(conditions(middle[middle.rule == rule])):
            face, mean = color if start == "copy" else "white", of.value.mean()
            ax.errorbar(i + 0.17 * (j - 1.5), mean, of.value.std(), marker=LOOKS[momentum][0], color=color, mfc=face,
                        ms=3.6, elinewidth=0.7)  # fmt: skip
    ax.axhline(0, color="0.75", lw=0.6, ls=":", zorder=0)
    ax.set(xticks=range(len(rules)), ylabel="Test accuracy minus BP (points)", xlim=(-0.6, max(len(rules), 1) - 0.4))
    ax.set_xticklabels([plot.look(r).label for r in rules])
    ax.tick_params(axis="x", length=0)
    plot.note(ax, f"lag {MIDDLE}")


def listing(page: Page) -> tables.Shown:
    """Table: a row a rule, lag, momentum and start: test accuracy after the last epoch, minus BP's, and the angle."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    keys = ["rule", "lag", "momentum", "start"]
    last = ends(table)
    gap = minus_bp(last, ["seed"])
    angle = table[(table.metric == "angle_deg") & (table.epoch == table.epoch.max())].groupby(keys).value.mean()
    rows = []
    for at, of in last.groupby(keys):
        less = gap.merge(pd.DataFrame([at], columns=keys))
        found = {"test accuracy": told(of), "minus BP": told(less), "angle": angle.get(at, math.nan)}
        rows.append(dict(zip(keys, at)) | found)
    order = plot.in_order(table.rule)
    every = pd.DataFrame(rows).sort_values(keys, key=lambda c: c.map(order.index) if c.name == "rule" else c)
    every.loc[every["rule"] == "bp", ["lag", "momentum"]] = math.nan
    every.loc[every["rule"] == "bp", "start"] = "-"
    every.loc[every["rule"] == "frozen", ["momentum", "angle"]] = math.nan  # its angle depends on the step at hand
    every["rule"] = [plot.look(rule).label for rule in every["rule"]]
    return tables.shown(every, index=False, float_format="{:.3g}".format, na_rep="-")
