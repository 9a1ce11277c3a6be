"""p2's stability argument, measured: how W and B move under WM and IA, where they may rest, and how fast they leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from fa import plot, tables
from fa.errors import UserError
from fa.experiments import Experiment
from fa.experiments import _dynamics as theory
from fa.layers.feedback import generator
from fa.rules import rule as make_rule
from fa.train import data
from fa.train.config import identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

PAIR = {"wm": dict(amp=1.0, decay=0.25), "ia": dict(amp=1.0, null=1.0, decay=0.25)}
"""Coefficients of the pairs: ours, round numbers; the two rules part at input power 2 d / a = 0.5."""

NETWORK = {"wm": dict(amp=0.1, decay=0.02), "ia": dict(amp=0.1, null=0.05, decay=0.02)}
"""Coefficients of the networks: ours; at input power 1 the two rules are above that line."""

POWERS = (0.05, 0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 4.0)
RATES = np.logspace(-2, 1, 31)  # learning rates of the stability map


@dataclass(frozen=True)
class Dynamics:
    """W and B under a rule of their own, apart from any task.

    Args:
        rule: "wm" or "ia".
        part: "pair" (one synapse and its feedback), or a layer of a trained two-layer network, "dense" or "conv".
        forward: whether W descends the objective too (p2's ``update_forward``).
        repeats: networks, numbered in the record's ``seed``; 1 for a pair, in which nothing is drawn.
        power: mean square of the pair's input (default 1, as for noise in networks).
        images: digits on which a network is trained and which are its input (default 256).
        revision: of the recipe.
    """

    rule: str
    part: str
    forward: bool
    repeats: int = 1
    power: float = 1.0
    images: int = 256
    revision: int = 1

    run = property(identity)

    def table(self) -> pd.DataFrame:
        """``seed`` (the network), ``epoch`` (0), ``layer``, ``depth``, ``metric``, ``value``; rates are per step and
        unit of learning rate, and ``..._theory`` is what theory says of a metric.

        A pair: ``rate_sum`` and ``rate_difference`` (of w + b and w - b at the point where the pair may rest), ``end``
        (w in the end) and ``gap`` (|w - b| in the end) where there is one, and ``agree``, the share of learning rates
        at which the pair comes back to that point or leaves it as theory says. A layer: ``relax_slow`` and
        ``relax_fast`` (W rests), or ``grow`` and ``shrink`` (WM), ``grow`` and ``settle`` (IA); and ``accuracy``, of
        the network on its training images in percent.
        """
        rows = []
        if self.part == "pair":
            rule, lr = make_rule(self.rule, **PAIR[self.rule]), torch.from_numpy(RATES)
            found = theory.measured_pair(rule, self.power)
            settled = theory.settles(rule, torch.full_like(lr, self.power), lr).tolist()
            expected = [theory.should_settle(rule, self.power, value) for value in RATES]
            found["agree"] = sum(a == b for a, b in zip(settled, expected)) / len(expected)
            rows = [[0, 0, "", None, metric, value] for metric, value in found.items()]
        else:
            digits = data.Split(*data.load("digits", dtype=torch.float64).train.first(self.images))
            for repeat in range(self.repeats):
                gen = generator(repeat, "dynamics", self.part)
                layers = theory.measured_network(self.part, NETWORK[self.rule], self.rule, self.forward, digits, gen)
                for depth, (layer, found) in enumerate(layers.items(), 1):
                    rows += [[repeat, 0, layer, depth, metric, value] for metric, value in found.items()]
        return pd.DataFrame(rows, columns=["seed", "epoch", "layer", "depth", "metric", "value"])


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Dynamics]:
    """Pairs at eight input powers, and dense and convolutional networks with W at rest and learning: three networks
    each; quick: one."""
    if epochs or dataset:
        raise UserError("p2_dynamics has one length and one data set, the digits; leave epochs and dataset out")
    if unknown := set(rules) - set(PAIR):
        raise UserError(f"p2_dynamics is about wm and ia, not {', '.join(sorted(unknown))}")
    repeats, runs = seeds or (1 if mode == "quick" else 3), []
    for rule in rules:
        runs += [Dynamics(rule, "pair", True, power=power) for power in POWERS]
        runs += [Dynamics(rule, kind, forward, repeats) for kind in ("dense", "conv") for forward in (False, True)]
    return runs


EXPERIMENT = Experiment(
    "Stability of weight mirror and information alignment", "p2", "22_estimation_dynamics", ("wm", "ia"), grid,
    swept=lambda config: {"part": config.part, "forward": int(config.forward), "power": config.power},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Dynamics of weight mirror (WM) and information alignment (IA) when both W and B descend the local
objective. a, b: flow of a pair of a synapse w and its feedback b by the rules' code, input power 1 (brightness:
speed); curves: trajectories; arrows: eigen-directions of WM; filled: stable fixed point, hollow: saddle. c: growth
rates against input power; lines: theory, markers: measured; solid and filled: w + b, dashed and hollow: w - b, around
the point where the pair may rest. d, e: learning rates and powers at which a pair comes back to that point (shaded:
measured); lines: theory, discrete steps (solid), continuous time (dotted). f: growth rates of layers of two-layer
networks trained on digits, measured over theory, a marker a network (n = 3), layer and mode; the band is +/- 2 %."""

MODES = {
    "relax_slow": "slow", "relax_fast": "fast", "grow": "grow", "shrink": "shrink", "settle": "settle"
}  # fmt: skip


def rows_of(table: pd.DataFrame) -> pd.DataFrame:
    """Every rate of every layer: columns rule, part, forward, layer, metric, measured, theory, seed."""
    layers = table[table.part != "pair"]
    keys = ["rule", "part", "forward", "depth", "layer", "seed"]
    measured = layers[layers.metric.isin(list(MODES))].rename(columns={"value": "measured"})
    expected = layers[layers.metric.str.endswith("_theory")].rename(columns={"value": "theory"})
    expected = expected.assign(metric=expected.metric.str.removesuffix("_theory"))
    return measured[[*keys, "metric", "measured"]].merge(expected[[*keys, "metric", "theory"]], on=[*keys, "metric"])


def listing(table: pd.DataFrame) -> str:
    """Table: measured and theoretical rate of every mode of every layer, means of networks; the largest error."""
    rates = rows_of(table)
    if rates.empty:
        return tables.several("no run yet")
    rates = rates.assign(error=100 * (rates.measured / rates.theory - 1).abs())
    keys = ["rule", "part", "forward", "layer", "metric"]
    found = rates.groupby(keys, sort=False).agg(
        measured=("measured", "mean"), theory=("theory", "mean"), error=("error", "max"), n=("seed", "nunique")
    )
    found = found.reset_index().rename(columns={"forward": "W learns", "error": "largest error (%)"})
    found["rule"] = [plot.look(r).label for r in found.rule]
    found["W learns"] = found["W learns"].map({0: "no", 1: "yes"})
    return tables.shown(found, index=False, float_format="{:.4f}".format)


@plot.style()
def draw(page: Page) -> Figure:
    """The figure; ``page`` is what ``fa.notebook`` returns."""
    table = page.table()
    fig, axes = plot.figure("abc;def", height=4.6)
    rules = plot.in_order(table.rule)
    for rule, name in zip(("wm", "ia"), "ab"):
        draw_flow(axes[name], rule)
    draw_rates(axes["c"], table, rules)
    for rule, name in zip(("wm", "ia"), "de"):
        draw_map(axes[name], rule)
    draw_network(axes["f"], rows_of(table))
    plot.letters(axes.values())
    return fig


def draw_flow(ax: Axes, rule: str, reach: float = 1.25) -> None:
    """Panels a and b: streamlines of (w, b), trajectories, eigen-directions and fixed points, at input power 1."""
    import matplotlib as mpl

    r, look = make_rule(rule, **PAIR[rule]), plot.look(rule)
    line = torch.linspace(-reach, reach, 31, dtype=torch.float64)
    b, w = torch.meshgrid(line, line, indexing="ij")
    dw, db = (d.view_as(w).numpy() for d in theory.pairs(r, torch.ones(w.numel()))(w.flatten(), b.flatten()))
    speed = np.log10(np.hypot(dw, db) + 0.02)
    grey = mpl.colors.LinearSegmentedColormap.from_list("", ["0.9", "0.45"])
    ax.streamplot(line.numpy(), line.numpy(), dw, db, color=speed, cmap=grey, linewidth=0.6, density=0.8, arrowsize=0.5)
    starts = torch.tensor([(-1.1, 0.9), (1.1, -0.55), (0.15, -0.05), (-0.1, 0.0)], dtype=torch.float64)
    path = [starts]
    for _ in range(400):
        w, b = theory.walk(r, torch.ones(len(starts)), torch.tensor(0.03), *path[-1].T, steps=1)
        path.append(torch.stack((w, b), 1))
    for x, y in torch.stack(path).permute(1, 2, 0).numpy():  # a start: (2, steps)
        ax.plot(x, y, color=look.color, lw=1.2)
        ax.plot(x[0], y[0], ".", color=look.color, ms=3)
    m = theory.pair_point(r, 1.0)
    if not m:
        for (dx, dy), words in (((0.85, 0.85), "explodes"), ((-0.7, 0.7), "decays")):
            ax.annotate(
                "", (dx, dy) if words == "explodes" else (0.15 * dx, 0.15 * dy),
                (0, 0) if words == "explodes" else (dx, dy), arrowprops={"arrowstyle": "-|>", "lw": 1, "color": "0.1"},
            )  # fmt: skip
    for place, stable in (((0, 0), False), *(((s * m, s * m), True) for s in (1, -1) if m)):
        ax.plot(*place, "o", color="0.1", mfc="0.1" if stable else "white", ms=4.5, zorder=6)
    ax.set(
        xlim=(-reach, reach),
        ylim=(-reach, reach),
        xlabel="Forward weight w",
        ylabel="Feedback weight b",
        aspect="equal",
    )
    ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    ax.set_title(look.label, fontsize=7.5, color=look.color, fontweight="bold")


def draw_rates(ax: Axes, table: pd.DataFrame, rules: list[str]) -> None:
    """Panel c: rates of the sum and the difference against input power."""
    power = np.logspace(np.log10(0.04), np.log10(5), 200)
    for rule in rules:
        r, look = make_rule(rule, **PAIR[rule]), plot.look(rule)
        lines = np.array([theory.pair_rates(r, p) for p in power])
        cut = np.searchsorted(power, 2 * r.decay / r.amp)  # the point where the pair may rest jumps there
        pairs = table[(table.rule == rule) & (table.part == "pair")]
        for i, (name, style, fill) in enumerate((("sum", "-", look.color), ("difference", "--", "white"))):
            for part in (slice(None, cut), slice(cut, None)):
                ax.plot(power[part], lines[part, i], style, color=look.color, lw=0.9)
            rows = pairs[pairs.metric == f"rate_{name}"]
            ax.plot(rows.power, rows.value, look.marker, color=look.color, mfc=fill, ms=4, mew=0.8)
    ax.axhline(0, color="0.75", lw=0.6, zorder=0)
    ax.set(xscale="log", xlabel="Input power σ²", ylabel="Growth rate", ylim=(-7.6, 3.9))
    plot.rule_key(ax, rules, loc="upper left", bbox_to_anchor=None, ncols=1)
    ax.text(1.0, 2.3, "explodes", fontsize=6.5, color=plot.look("wm").color, ha="right")


def draw_map(ax: Axes, rule: str, size: int = 56) -> None:
    """Panels d and e: where a pair comes back to the point at which it may rest, by the rule's code and by theory."""
    r, look = make_rule(rule, **PAIR[rule]), plot.look(rule)
    lr, power = np.logspace(-2, 1, size), np.logspace(-1.5, 1, size)
    at = torch.from_numpy(np.repeat(power, size)), torch.from_numpy(np.tile(lr, size))
    settled = theory.settles(r, *at).view(size, size).numpy().T  # (lr, power)
    ax.pcolormesh(power, lr, np.where(settled, 0.35, np.nan), cmap="Greys", vmin=0, vmax=1, rasterized=True)
    limit = [2 / max(-rate for rate in theory.pair_rates(r, p)) for p in power]
    held = np.array([max(theory.pair_rates(r, p)) < 0 for p in power])
    ax.plot(power[held], np.array(limit)[held], color=look.color, lw=1.2)
    edge = 2 * r.decay / r.amp
    ax.axvline(edge, color=look.color, lw=1.2, ls=":")
    ax.set(xscale="log", yscale="log", xlim=power[[0, -1]], ylim=lr[[0, -1]])
    ax.set(xlabel="Input power σ²", ylabel="Learning rate")
    words = ("both weights die", "w = b = ±m" if theory.pair_point(r, 2 * edge) else "explodes")
    for x, text in zip((0.13, 2.3), words):
        ax.text(x, 0.025, text, ha="center", fontsize=6.5)
    ax.text(0.13, 5, "steps too long", ha="center", fontsize=6.5)
    ax.set_title(look.label, fontsize=7.5, color=look.color, fontweight="bold")


def draw_network(ax: Axes, rates: pd.DataFrame) -> None:
    """Panel f: measured over theoretical rate of every layer and mode."""
    groups = [(part, forward) for part in ("dense", "conv") for forward in (0, 1)]
    ax.axhspan(0.98, 1.02, color="0.92", zorder=0)
    ax.axhline(1, color="0.7", lw=0.6, zorder=0)
    for i, (part, forward) in enumerate(groups):
        for j, rule in enumerate(plot.in_order(rates.rule)):
            rows, look = (
                rates[(rates.part == part) & (rates.forward == forward) & (rates.rule == rule)],
                plot.look(rule),
            )
            x = i + 0.36 * (j - 0.5) + np.linspace(-0.13, 0.13, max(len(rows), 2))[: len(rows)]
            ax.plot(x, rows.measured / rows.theory, look.marker, color=look.color, ms=3, mew=0)
    ax.set(ylabel="Growth rate, measured / theory", ylim=(0.955, 1.045), xlim=(-0.5, len(groups) - 0.5))
    ax.set_xticks(range(len(groups)), [f"{part}\nW {'learns' if forward else 'rests'}" for part, forward in groups])
    ax.tick_params(axis="x", length=0)
