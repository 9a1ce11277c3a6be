"""Noisy updates: feedback that estimates W under noise, and backprop whose weights, or whose reading of them, are
noisy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments._ends import ends, told
from fa.experiments.p2_tuning import CENTERS
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "frozen", "sa", "aa", "kp", "wm")
LEVELS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Variances v of the noise; a step of rate lr adds lr * N(0, v) to every noisy entry."""
FEEDBACK_RATE = 0.1
KP_SHRINK = 0.006
"""Share of KP's mismatch that a step of the first epoch takes away: learning rate times weight decay."""


class Variant(NamedTuple):
    """A rule with its recipe as this figure trains it, and what is noisy."""

    label: str
    noisy: str
    own: dict[str, Any]


VARIANTS = {
    "bp": Variant("BP, noisy W", "weights", {}),
    "frozen": Variant("BP, noisy reading of W", "feedback", {"every": 1}),
    "kp": Variant("KP", "feedback", {"weight_decay": 1e-4}),
    "sa": Variant("SA", "feedback", CENTERS["sa"][0] | {"feedback_lr": FEEDBACK_RATE}),
    "aa": Variant("AA", "feedback", CENTERS["aa"][0] | {"input": "normal", "feedback_lr": FEEDBACK_RATE}),
    "wm": Variant("WM", "feedback", CENTERS["wm"][0] | {"feedback_lr": FEEDBACK_RATE}),
}
"""Rule -> how it is trained here; another rule is trained with its defaults and noise on its weights."""

MLP = Config(
    "bp", 0, hidden="256,256", epochs=10, batch=128, lr=0.02, lr_drops="", momentum=0.0, weight_decay=0.0,
    measure="estimates",
)  # fmt: skip
RESNET = MLP.vary(dataset="cifar10-16", model="resnet8", hidden="", lr=0.05, augment=True, precision="bfloat16")
PLAIN = RESNET.vary(model="plain4", weights="he", precision="float32")
BASES = {
    "paper": [MLP, RESNET],
    "small": [MLP.vary(epochs=3), PLAIN.vary(epochs=2)],
    "quick": [MLP.vary(dataset="digits", hidden="64,64", epochs=5, batch=32)],
}
SEEDS = {"paper": 3, "small": 3, "quick": 1}
NETWORKS = {"mlp": "MLP", "plain4": "four convolutions", "resnet8": "ResNet-8"}
"""The column ``network`` -> label."""


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Every rule at every level of noise, under SGD of a constant rate without momentum, so that the formula of the
    estimate's variance holds. Coefficients are the middles of page 23's grids; AA's mirror sees normal noise as WM's;
    KP's decay of the first epoch leaves about a twentieth of the initial mismatch.

    Small: the MLP, 3 epochs in place of 10, and a plain stack of four convolutions, 2 epochs, in place of ResNet-8.
    Quick: digits, one seed, three levels.
    """
    levels = LEVELS[::2] if mode == "quick" else LEVELS
    bases = [b.vary(epochs=epochs or b.epochs, dataset=dataset or b.dataset) for b in BASES[mode]]
    return [
        of_rule(base.vary(seed=seed), rule, level)
        for seed in range(seeds or SEEDS[mode])
        for base in bases
        for rule in rules
        for level in levels
    ]


def of_rule(base: Config, rule: str, level: float) -> Config:
    """The run of a rule at a level of noise."""
    variant = VARIANTS.get(rule, Variant(rule, "weights", {}))
    noise = {"update_noise": level, "noisy": variant.noisy} if level else {}
    first = {"first_weight_decay": round(KP_SHRINK / base.lr, 6)} if rule == "kp" else {}
    return base.vary(rule=rule, **variant.own, **first, **noise)


def swept(config: Config) -> dict[str, Any]:
    """The columns that name a run's place: ``network`` and ``level``, the variance of the noise."""
    return {"network": config.model, "level": config.update_noise}


EXPERIMENT = Experiment(
    "Noisy updates: what an estimate of W survives", "p2", "26_noisy_updates", RULES, grid, small=True, swept=swept
)


# ------------------------------------------------------------------------------------------------------------- figure

TEXT = """ a, d: test accuracy after the last epoch against the variance v of the noise: after every step each noisy
entry moves by the learning rate times a normal number of variance v. Noisy are the feedback of SA, AA, KP and WM, the
weights of BP, or BP's reading of W, drawn anew at every step; leftmost: no noise; hollow: levels at which seeds
diverged, which count as chance. b, e: angle between W and the feedback after training, mean of the layers; at the
largest v of b W outgrows the noise of SA, AA and WM. c, f: root mean square of B - W under SA in each layer, side by
side; line: the stationary value of the formula, the same for every layer; dotted: without noise. Levels at which a
seed diverged are left out of b, c, e and f. Bars: +/- 1 sd over seeds."""
SET_UP = "Noise in the updates, as in the code of Kunin et al. (2020); the paper's levels and networks are not known."
CAPTION = f"""{SET_UP} A network of two hidden layers of 256 units learns MNIST, ResNet-8 CIFAR-10 at 16x16
pixels.{TEXT}"""
SMALL_CAPTION = f"""{SET_UP} A network of two hidden layers of 256 units learns MNIST, three epochs, a stack of four
convolutions CIFAR-10 at 16x16 pixels, two epochs.{TEXT}"""


@plot.style()
def draw(page: Page) -> Figure:
    """a: accuracy; b: weight angle; c: SA's error of estimation. A row a network."""
    table = page.table()
    networks = [n for n in NETWORKS if n in set(table.network)] or ["mlp"]
    panels = [list("abc"), list("def")][: len(networks)]
    fig, ax = plot.figure(panels, height=2.7 * len(networks))
    for row, network in zip(panels, networks):
        rows = table[table.network == network]
        by_level(ax[row[0]], ends(rows))
        ax[row[0]].set(ylabel=plot.LABELS["test_accuracy"])
        plot.note(ax[row[0]], f"{NETWORKS[network]}, {plot.repeats(rows, ['rule', 'level'])}")
        by_level(ax[row[1]], angles(rows))
        ax[row[1]].set(ylabel="Weight angle, mean (°)", ylim=(0, 100), yticks=(0, 30, 60, 90))
        estimate(ax[row[2]], rows)
    labels = {VARIANTS[r].label if r in VARIANTS else r: plot.look(r).color for r in plot.in_order(table.rule)}
    ax["a"].legend(handles=plot.key(labels), loc="lower left", fontsize="x-small")
    plot.letters([ax[p] for row in panels for p in row])
    return fig


def angles(table: pd.DataFrame) -> pd.DataFrame:
    """Angle between W and the feedback after the last epoch, mean of the layers, a row a run; of levels at which no
    seed diverged."""
    rows = table[(table.metric == "angle_deg") & (table.epoch == table.epoch.max()) & survived(table)]
    means = rows.groupby(["rule", "level", "seed"], as_index=False).value.mean()
    return means.assign(diverged=False)


def survived(table: pd.DataFrame) -> pd.Series:
    """Of every row of one network, whether all seeds of its rule and level reached the last epoch."""
    last = table.groupby("run").epoch.transform("max") == table.epoch.max()
    return last.groupby([table.rule, table.level]).transform("all")


def by_level(ax: Axes, rows: pd.DataFrame) -> None:
    """A line a rule against the variance of the noise; no noise stands left of the smallest."""
    least = min([v for v in rows.level if v > 0], default=1.0)
    rows = rows.assign(x=rows.level.where(rows.level > 0, least / 10))
    rules = plot.in_order(rows.rule)
    for i, rule in enumerate(rules):
        of, own = rows[rows.rule == rule], plot.look(rule)
        of = of.assign(x=of.x * 1.12 ** (i - (len(rules) - 1) / 2))  # side by side
        at = of.groupby("x").value.agg(["mean", "std"])
        line = {"color": own.color, "lw": 0.9, "marker": own.marker, "ms": 3.4, "elinewidth": 0.8}
        ax.errorbar(at.index, at["mean"], at["std"], **line)
        bad = at["mean"][at.index.isin(of[of.diverged].x)]
        ax.plot(bad.index, bad, own.marker, color=own.color, mfc="white", ms=3.4, zorder=6)
    ticks = sorted(set(rows.x))
    ax.set(xscale="log", xlabel="Variance v of the noise")
    ax.set_xticks(ticks, ["0", *(f"$10^{{{round(np.log10(x))}}}$" for x in ticks[1:])] if ticks else [])
    ax.minorticks_off()


def estimate(ax: Axes, table: pd.DataFrame) -> None:
    """SA's root mean square of B - W by layer, the formula, and the lag without noise."""
    rows = errors(table)
    noisy, still = rows[rows.level > 0], rows[rows.level == 0]
    layers = list(noisy.sort_values("depth").layer.unique())
    for i, (layer, color) in enumerate(zip(layers, plot.depth_colors(range(max(len(layers), 1))).values())):
        at = noisy[noisy.layer == layer].groupby("level").value.agg(["mean", "std"])
        x = at.index * 1.25 ** (i - (len(layers) - 1) / 2)  # side by side, for most dots lie on the line
        ax.errorbar(x, at["mean"], at["std"], fmt=".", color=color, ms=4, elinewidth=0.7, label=layer)
        ax.axhline(still[still.layer == layer].value.mean(), color=color, lw=0.6, ls=":")
    v = np.array(sorted(noisy.level.unique()))
    ax.plot(v, stationary(v), color="0.2", lw=0.9, zorder=0)
    ax.set(xlabel="Variance v of the noise", ylabel="RMS of B - W, SA")
    if layers:
        ax.set(xscale="log", yscale="log")
    if 0 < len(layers) < 6:
        ax.legend(loc="upper left", fontsize="x-small")


def stationary(v: np.ndarray) -> np.ndarray:
    r"""Root mean square of the noise in SA's estimate under plain SGD: :math:`\eta\sqrt{v / (1 - r^2)}` with
    :math:`r = 1 - 2 \eta d`, the feedback's rate :math:`\eta` and decay d. Source: our derivation; each step keeps the
    share r of the noise."""
    r = 1 - 2 * FEEDBACK_RATE * CENTERS["sa"][0]["decay"]
    return FEEDBACK_RATE * np.sqrt(v / (1 - r**2))


def errors(table: pd.DataFrame) -> pd.DataFrame:
    """Root mean square of the entries of B - W under SA after the last epoch, a row a run and layer; of levels at which
    no seed diverged."""
    last = table.epoch == table.epoch.max()
    return table[(table.metric == "estimate_rms") & (table.rule == "sa") & last & survived(table)]


def listing(page: Page) -> str:
    """Tables of test accuracy and of the mean weight angle after the last epoch: a row a rule, a column a level."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    parts = []
    for network in (n for n in NETWORKS if n in set(table.network)):
        rows = table[table.network == network]
        for name, found in (("accuracy", ends(rows)), ("angle", angles(rows))):
            cells = found.groupby(["rule", "level"])[["value", "diverged"]].apply(told).unstack("level")
            cells = cells.loc[plot.in_order(cells.index)].rename_axis(index=None, columns=None)
            cells.index = pd.Index([f"{VARIANTS[r].label if r in VARIANTS else r}, {name}" for r in cells.index])
            parts.append(tables.shown(cells.rename(columns=lambda v: f"v = {v:g}"), na_rep="-"))
    return tables.several(*parts)
