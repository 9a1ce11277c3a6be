"""The learning rates at which a network learns, against the lag of its feedback behind W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments._ends import CHANCE, told
from fa.experiments._short import measured, network, trained
from fa.experiments.p2_lag import LAGS, OPTIONS, rate
from fa.train.config import Config, identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "frozen", "sa")
RATES = (0.001, 0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Short:
    """A short run at one learning rate of W, whose feedback has one lag.

    Args:
        rule: a name of ``fa.RULES``.
        seed: of weights, batches and feedback.
        lr: learning rate of W.
        lag: of the feedback, in steps (0: the rule has none to set).
        momentum: of the feedback; W's is 0.9.
        hidden, dataset, epochs, batch: as in :class:`fa.train.config.Config`.
        revision: of the recipe.
    """

    rule: str
    seed: int
    lr: float
    lag: int = 0
    momentum: float = 0.0
    hidden: str = "64,64,64,64"
    dataset: str = "mnist"
    epochs: int = 1
    batch: int = 32
    revision: int = 1

    run = property(identity)

    def recipe(self) -> Config:
        """The ordinary run; SA's feedback starts at random."""
        names = ("hidden", "dataset", "epochs", "batch", "lr")
        base = Config(self.rule, self.seed, lr_drops="", **{name: getattr(self, name) for name in names})
        if self.rule == "frozen":
            return base.vary(every=2 * self.lag + 1)
        if self.rule == "sa":
            return base.vary(
                **OPTIONS["sa"], feedback_momentum=self.momentum, feedback_lr=rate(self.lag, self.momentum)
            )
        return base

    def table(self) -> pd.DataFrame:
        """``epoch`` (the last), ``layer``, ``depth``, ``metric``, ``value``: ``score``, the accuracy on the
        validation images (on MNIST and digits, which have none, on the test images), or :data:`CHANCE` where training
        ``diverged`` (0 or 1); and each layer's angle and norm ratio."""
        config = self.recipe()
        score, rows, status = trained(config, network(config))
        found = {"score": score, "diverged": float(status["state"] == "diverged")}
        return measured(self.epochs, found, rows, status)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Short]:
    """BP, frozen backprop and SA, with momentum of the feedback and without, at every lag and learning rate, one epoch
    of MNIST. Quick: digits, one seed, two lags, two rates.
    """
    quick, runs = mode == "quick", []
    lags, rates = (LAGS[:2], RATES[::2]) if quick else (LAGS, RATES)
    for seed in range(seeds or (1 if quick else 3)):
        for rule in rules:
            places = [(lag, momentum) for lag in lags for momentum in ((0.0, 0.9) if rule == "sa" else (0.0,))]
            for lag, momentum in places if rule in ("frozen", "sa") else [(0, 0.0)]:
                shared = dict(dataset=dataset or ("digits" if quick else "mnist"), epochs=epochs or (5 if quick else 1))
                runs += [Short(rule, seed, lr, lag, momentum, **shared) for lr in rates]
    return runs


EXPERIMENT = Experiment(
    "Learning rates that a lag allows", "p2", "28_estimation_lag", RULES, grid,
    swept=lambda config: {"lag": config.lag, "momentum": config.momentum, "lr": config.lr},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = f"""The learning rates that a lag allows (ours; the rules of Kunin et al. 2020). A multilayer perceptron of
four hidden layers of 64 units learns MNIST for one epoch in batches of 32; accuracy (%) on the test images, mean
over seeds, by learning rate of W and lag of the feedback in steps; where seeds differ, how many come above 50 %. A
dagger: at least one seed diverged, which counts as chance ({CHANCE:g} %). Lowest row: BP. a: SA without momentum of the
feedback, from a random start. b: SA with momentum 0.9. c: frozen BP, whose copy of W is as old on average."""


@plot.style()
def draw(page: Page) -> Figure:
    """a: SA without momentum; b: with; c: frozen backprop."""
    rows = scores(page.table())
    fig, ax = plot.figure("abc", height=2.2)
    panels = {
        "a": ("sa", 0.0, "SA, no momentum"),
        "b": ("sa", 0.9, "SA, momentum 0.9"),
        "c": ("frozen", 0.0, "frozen BP"),
    }
    for panel, (rule, momentum, text) in panels.items():
        own = rows[(rows.rule == rule) & (rows.momentum == momentum)]
        by_rate(ax[panel], pd.concat([rows[rows.rule == "bp"], own]))
        ax[panel].set(xlabel="Learning rate of W", ylabel="Lag (steps)" if panel == "a" else "")
        n = rows.groupby(["rule", "lag", "lr"]).seed.nunique()
        plot.note(ax[panel], f"{text}, n = {n.max()} seeds" if len(n) else text)
    plot.letters([ax[p] for p in "abc"])
    return fig


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """A row a run: its score, and whether it diverged."""
    wide = table[table.layer == ""].pivot(index="run", columns="metric", values="value")
    about = table.drop_duplicates("run").set_index("run")[["rule", "seed", "lag", "momentum", "lr"]]
    wide = wide.reindex(columns=["score", "diverged"])
    return about.assign(value=wide["score"], diverged=wide["diverged"] > 0).reset_index()


def by_rate(ax: Axes, rows: pd.DataFrame) -> None:
    """A row a lag, a column a learning rate, darkest where the accuracy is low."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if rows.empty:
        return
    wide = rows.pivot_table(index="lag", columns="lr", values="value")
    bad = rows.assign(bad=rows.diverged.astype(float)).pivot_table(index="lag", columns="lr", values="bad") > 0
    learned, n = (
        rows.assign(k=k).pivot_table(index="lag", columns="lr", values="k", aggfunc="sum") for k in (rows.value > 50, 1)
    )
    ax.imshow(wide, origin="lower", cmap="viridis", vmin=CHANCE, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(wide.to_numpy()):
        ink = "white" if value < (CHANCE + 100) / 2 else "black"
        text = f"{value:.1f}" + "†" * bool(bad.iloc[i, j])
        if 0 < (few := learned.iloc[i, j]) < n.iloc[i, j]:
            text = f"{few} of {n.iloc[i, j]}"
        ax.text(j, i, text, ha="center", va="center", color=ink, fontsize=6.5)
    ax.set(xticks=range(len(wide.columns)), yticks=range(len(wide)))
    ax.set_xticklabels([f"{lr:g}" for lr in wide.columns])
    ax.set_yticklabels([f"{lag}" if lag else "BP" for lag in wide.index])


def listing(page: Page) -> tables.Shown:
    """Table: a row a rule, momentum and lag, a column a learning rate: test accuracy."""
    rows = scores(page.table())
    if rows.empty:
        return tables.several("no run yet")
    cells = rows.groupby(["rule", "momentum", "lag", "lr"]).apply(told, include_groups=False).unstack("lr")
    cells = cells.sort_index(key=lambda at: at.map(RULES.index) if at.name == "rule" else at)
    cells = cells.rename(index=lambda rule: plot.look(rule).label, level="rule").rename(columns="{:g}".format)
    return tables.shown(cells.reset_index().rename_axis(None, axis=1), index=False, na_rep="-")
