"""p2's weight estimation, measured: feedback that follows a moving W, and how far it is behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import plot, tables
from fa.errors import UserError
from fa.experiments import Experiment
from fa.experiments._following import ramp, real_run, rotation
from fa.layers.feedback import generator
from fa.train.config import identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("sa", "aa", "kp", "wm", "ia")

SPEEDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # degrees a step


@dataclass(frozen=True)
class Following:
    """Feedback that follows a forward weight which moves.

    Args:
        rule: "sa", "aa", "kp", "wm" or "ia".
        part: "rotation": W turns at a constant speed, the input is white; "ramp": W moves along a line, the input is
            coloured; "run": W learns, in a network.
        repeats: independent draws, or runs, numbered in the record's ``seed``.
        speed: degrees a step (rotation); 0 elsewhere.
        n_in, n_out: sizes of the layer (default 16 and 8).
        model, dataset: of a run ("" elsewhere).
        steps: of a run (0 elsewhere).
        lr: of a run, for W and feedback (0 elsewhere, where it is 1).
        revision: of the recipe.
    """

    rule: str
    part: str
    repeats: int
    speed: float = 0.0
    n_in: int = 16
    n_out: int = 8
    model: str = ""
    dataset: str = "digits"
    steps: int = 0
    lr: float = 0.0
    revision: int = 1

    run = property(identity)

    def table(self) -> pd.DataFrame:
        """``seed``, ``epoch`` (0), ``layer``, ``depth``, ``metric``, ``value``.

        "rotation": ``angle_deg`` and ``norm_ratio`` of the feedback to W, and ``lag``, the number of steps that the
        feedback is behind, each with ``..._theory``. "ramp": ``lag`` and ``lag_theory`` of each mode of the input
        (layers "mode1", ... by falling power) and ``power``, its mean square. "run": ``lag`` and ``angle_deg`` of each
        layer, and ``lag_theory`` where theory has it.
        """
        measure, rows = {"rotation": rotation, "ramp": ramp, "run": real_run}[self.part], []
        for repeat in range(self.repeats):
            layers = measure(self, generator(repeat, "following", self.part))
            for depth, (layer, found) in enumerate(layers.items(), 1):
                at = [repeat, 0, layer, depth if layer else None]
                rows += [[*at, metric, value] for metric, value in found.items()]
        return pd.DataFrame(rows, columns=["seed", "epoch", "layer", "depth", "metric", "value"])


# --------------------------------------------------------------------------------------------------------------- plan


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Following]:
    """Six speeds of rotation, one ramp (IA's has no theory), and a run: ResNet-8 on ``cifar10-16``, three draws each;
    quick: the two-layer MLP on digits, one draw."""
    if epochs or dataset:
        raise UserError("p2_estimation has runs of a fixed length and data set; leave epochs and dataset out")
    if unknown := set(rules) - set(RULES):
        raise UserError(f"p2_estimation is about {', '.join(RULES)}, not {', '.join(sorted(unknown))}")
    quick, runs = mode == "quick", []
    repeats = seeds or (1 if quick else 3)
    learning = dict(model="mlp", steps=100, lr=0.02) if quick else RESNET
    for rule in rules:
        runs += [Following(rule, "rotation", repeats, speed) for speed in SPEEDS]
        runs += [Following(rule, "ramp", repeats)] if rule != "ia" else []
        runs += [Following(rule, "run", repeats, **learning)]
    return runs


RESNET: dict[str, Any] = dict(model="resnet8", dataset="cifar10-16", steps=100, lr=0.02)

EXPERIMENT = Experiment(
    "Feedback that follows a moving weight", "p2", "25_weight_estimation", RULES, grid,
    swept=lambda config: {"part": config.part, "speed": config.speed},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Feedback that follows a moving weight (Kunin et al. 2020: weight estimation). a, b: one layer, W turns at a
constant speed, white input: angle between feedback and W, and the number of steps that the feedback is behind; lines:
theory (joined), markers: measured (mean of 3 draws; sd are smaller than the marker but for IA's, up to 4.5 degrees and
0.8 steps). SA, AA and WM have one rate here and so one line. KP is not behind: its lag is 0. c: W moves along a line,
coloured input: lag behind the fixed point, by mode. d: ResNet-8 that learns CIFAR-10 at 16x16 pixels, 100 steps: lag of
each layer's feedback, mean +/- 1 sd of 3 runs; grey line: prediction for SA, AA and WM. IA has no lag there, for its
feedback goes elsewhere than to W."""


def listing(table: pd.DataFrame) -> str:
    """Table: angle and lag behind a W that turns, and in a network that learns; measured and of theory."""
    if table.empty:
        return tables.several("no run yet")
    means = table.groupby(["rule", "part", "speed", "metric"]).value.mean().unstack("metric").reset_index()
    turns, runs = means[means.part == "rotation"], means[means.part == "run"]
    rows = [
        {"rule": plot.look(r.rule).label, "W": f"turns {r.speed:g}°/step", "angle": r.angle_deg,
         "theory": r.angle_deg_theory, "lag": r.lag + 0, "theory ": r.lag_theory}
        for r in pd.concat([turns[turns.rule == rule] for rule in plot.in_order(turns.rule)]).itertuples()
    ]  # fmt: skip
    rows += [
        {"rule": plot.look(rule).label, "W": "learns", "angle": r.angle_deg.item(), "theory": math.nan,
         "lag": r.lag.item() if rule != "ia" else math.nan, "theory ": r.lag_theory.item()}
        for rule in plot.in_order(runs.rule) if len(r := runs[runs.rule == rule])
    ]  # fmt: skip
    found = pd.DataFrame(rows).round(2)
    found[["angle", "lag"]] += 0.0  # no minus before a zero
    return tables.shown(found, index=False, float_format="{:.2f}".format, na_rep="-")


@plot.style()
def draw(page: Page) -> Figure:
    """The figure; ``page`` is what ``fa.notebook`` returns."""
    table = page.table()
    fig, axes = plot.figure("ab;cd", height=4.2)
    rules = plot.in_order(table.rule)
    turns = table[table.part == "rotation"]
    for i, rule in enumerate(rules):
        own, size = plot.look(rule), 7.5 - 1.1 * i  # markers at one place lie in each other
        for name, metric in (("a", "angle_deg"), ("b", "lag")):
            of = turns[turns.rule == rule].groupby(["metric", "speed"]).value.mean()
            if metric in of:
                axes[name].plot(of[f"{metric}_theory"].index, of[f"{metric}_theory"], color=own.color, lw=0.9)
                axes[name].plot(of[metric].index, of[metric], own.marker, color=own.color, ms=size, mew=0)
        draw_modes(axes["c"], table[(table.part == "ramp") & (table.rule == rule)], rule, size)
    draw_run(axes["d"], table[table.part == "run"])
    axes["a"].set(
        xscale="log", xlabel="Speed of W (° a step)", ylabel="Angle to W (°)", ylim=(-4, 98), yticks=range(0, 91, 30)
    )
    axes["b"].set(xscale="log", xlabel="Speed of W (° a step)", ylabel="Lag (steps)", ylim=(-0.6, 11))
    axes["c"].set(
        xscale="log",
        xticks=(ticks := (0.25, 0.5, 1, 2, 4)),
        xlabel="Input power of the mode",
        ylabel="Lag (steps)",
        ylim=(-2, 42),
    )
    axes["c"].set_xticklabels([f"{tick:g}" for tick in ticks])
    axes["c"].minorticks_off()
    axes["d"].set(xlabel="Layer, from the input", ylabel="Lag (steps)", ylim=(-1.5, None))
    plot.rule_key(axes["a"], rules, loc="upper left", bbox_to_anchor=None, ncols=1, handlelength=1.4)
    for handle, rule in zip(axes["a"].get_legend().legend_handles, rules):
        handle.set(marker=plot.look(rule).marker, ms=4, mew=0)
    plot.letters(axes.values())
    return fig


def draw_modes(ax: Axes, rows: pd.DataFrame, rule: str, size: float) -> None:
    """Panel c: lag of each mode of one rule against the mode's input power."""
    if rows.empty:
        return
    of, own = rows.groupby(["layer", "metric"]).value.mean().unstack("metric").sort_values("power"), plot.look(rule)
    ax.plot(of.power, of.lag_theory, color=own.color, lw=0.9)
    ax.plot(of.power, of.lag, own.marker, color=own.color, ms=size, mew=0)


def draw_run(ax: Axes, rows: pd.DataFrame) -> None:
    """Panel d: lag of each layer of a network that learns."""
    rules = [rule for rule in plot.in_order(rows.rule) if rule != "ia"]
    for i, rule in enumerate(rules):
        own = plot.look(rule)
        of = rows[(rows.rule == rule) & (rows.metric == "lag")].groupby("depth").value.agg(["mean", "std"])
        x = of.index + 0.12 * (i - (len(rules) - 1) / 2)
        ax.errorbar(x, of["mean"], of["std"], fmt=own.marker, color=own.color, ms=3.5, elinewidth=0.7, mew=0)
    if len(expected := rows[(rows.metric == "lag_theory") & (rows.rule != "kp")]):
        ax.axhline(expected.value.mean(), color="0.6", lw=0.8, zorder=0)
        ax.annotate("theory", (1, expected.value.mean()), (0, -2), ("axes fraction", "data"), "offset points",
                    fontsize="x-small", color="0.4", ha="right", va="top")  # fmt: skip
    ax.set_xticks(sorted(rows.depth.unique()))
    plot.note(ax, plot.repeats(rows))
