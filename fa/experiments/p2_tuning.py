"""p2's claim about tuning, measured: searches for metaparameters by Optuna's TPE, and grids that show what trains."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.errors import UserError
from fa.experiments import Experiment
from fa.experiments._ends import CHANCE
from fa.experiments._search import NEAR, SEARCHED, SWITCHES, ask, summed, tell
from fa.experiments._short import measured, network, trained
from fa.train.config import Config, identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "wm", "ia", "sa", "aa", "kp")

CENTERS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "bp": ({}, (), ()),
    "fa": ({}, (), ()),
    "wm": ({"amp": 0.2, "decay": 0.1, "input": "normal"}, ("amp",), ("decay",)),
    "ia": ({"amp": 0.2, "null": 0.1, "decay": 0.1, "input": "normal"}, ("amp",), ("null", "decay")),
    "sa": ({"self_": 0.2, "decay": 0.1}, ("self_",), ("decay",)),
    "aa": ({"amp": 0.2, "sparse": 0.1}, ("amp",), ("sparse",)),
    "kp": ({"weight_decay": 0.005}, ("lr",), ("weight_decay",)),
}
"""Rule -> (middle of its grid, what the horizontal axis multiplies, what the vertical axis multiplies): coefficients
that drive the feedback to W, and those that hold it back. KP has the learning rate and weight decay, which it shares
with W. BP and FA have one point."""


@dataclass(frozen=True)
class Trial:
    """One trial of a search, one point of a grid, or the summary of a rule's trials and points.

    Args:
        rule: a name of ``fa.RULES``.
        seed: of weights, batches and feedback, the same for all; and of the search.
        part: "search": Optuna draws the metaparameters; "grid": ``number`` says them; "summary": no training.
        number: of the trial, or of the point (rows of the grid one after another), from 0.
        trials: of the rule's search (0: it has none).
        side: points along each axis of the rule's grid, each three times the one before.
        model, hidden, dataset, epochs, batch, lr, augment, precision: as in :class:`fa.train.config.Config`.
        revision: of the recipe.
    """

    rule: str
    seed: int
    part: str
    number: int = 0
    trials: int = 0
    side: int = 1
    model: str = "resnet8"
    hidden: str = ""
    dataset: str = "cifar10-16"
    epochs: int = 3
    batch: int = 128
    lr: float = 0.1
    augment: bool = False
    precision: str = "float32"
    revision: int = 1

    run = property(identity)

    @property
    def needs(self) -> list[Trial]:
        """Of a summary the runs that it sums up."""
        if self.part != "summary":
            return []
        sizes = {"search": self.trials, "grid": self.side**2}
        return [replace(self, part=part, number=n) for part, size in sizes.items() for n in range(size)]

    @property
    def asks(self) -> bool:
        """Whether it is a trial of a search, whose storage all of them share."""
        return self.part == "search"

    @property
    def factors(self) -> tuple[float, float]:
        """What a point multiplies the two axes by, (horizontal, vertical)."""
        row, column = divmod(self.number, self.side)
        middle = (self.side - 1) / 2
        return 3.0 ** (column - middle), 3.0 ** (row - middle)

    def metaparameters(self) -> dict[str, Any]:
        """Name -> value; of a trial they are drawn when it is asked for first, and kept in the storage of the search.

        Raises:
            UserError: Optuna is not installed, or its storage cannot be reached.
        """
        if self.part == "grid":
            middle, driving, holding = CENTERS[self.rule]
            drive, hold = self.factors
            scale = dict.fromkeys(driving, drive) | dict.fromkeys(holding, hold)
            middle = {"lr": self.lr, "feedback_lr": 0.1} | middle
            return middle | {name: float(f"{middle[name] * factor:.3g}") for name, factor in scale.items()}
        return {name: float(f"{value:.3g}") for name, value in ask(self).params.items()}

    def recipe(self, chosen: dict[str, Any]) -> Config:
        """The ordinary run that trains with these metaparameters, in the last epoch at a tenth of the rates."""
        base = Config(
            self.rule, self.seed, dataset=self.dataset, model=self.model, hidden=self.hidden, epochs=self.epochs,
            batch=self.batch, lr=self.lr, lr_drops=str(self.epochs - 1), lr_factor=0.1, augment=self.augment,
            precision=self.precision,
        )  # fmt: skip
        if self.part == "grid":
            return base.vary(**chosen)
        chosen = {name: bool(value) if name in SWITCHES else value for name, value in chosen.items()}
        noise, std = chosen.pop("noise"), chosen.pop("input_std")
        return base.vary(**chosen | ({"input": "normal", "input_std": std} if noise else {}))

    def table(self, *needed: pd.DataFrame) -> pd.DataFrame:
        """``epoch`` (the last), ``layer``, ``depth``, ``metric``, ``value``.

        A trial and a point have ``score``, the accuracy on the validation images (on digits, which have none, on the
        test images; :data:`CHANCE` where training diverged), ``diverged`` (0 or 1), ``set_NAME`` for each metaparameter
        that is a number, and each layer's angle and norm ratio. A summary has those of :func:`summed`.
        """
        if self.part == "summary":
            found, rows, status = summed(self, pd.concat(needed)), pd.DataFrame(), {}
        else:
            chosen = self.metaparameters()
            config = self.recipe(chosen)
            score, rows, status = trained(config, network(config))
            numbers = {f"set_{name}": value for name, value in chosen.items() if not isinstance(value, str)}
            found = {"score": score, "diverged": float(status["state"] == "diverged"), **numbers}
            if self.part == "search":
                tell(self, score)
        return measured(self.epochs, found, rows, status)


# ----------------------------------------------------------------------------------------------------------------- plan

PAPER = Trial("bp", 0, "grid", trials=60, side=7, augment=True, precision="bfloat16")
SMALL = replace(
    PAPER, trials=30, side=5, model="mlp", hidden="64,64,64,64", dataset="digits", epochs=5, batch=32, lr=0.01,
    augment=False, precision="float32",
)  # fmt: skip
QUICK = replace(SMALL, trials=0, side=3, hidden="32,32", epochs=2)


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, trials: int = 0, storage: str = ""
) -> list[Trial]:
    """Paper: 60 trials each for WM and IA and 7 x 7 points for every rule, three epochs of ResNet-8 on ``cifar10-16``.

    Small: 30 trials and 5 x 5 points, five epochs of a multilayer perceptron of four hidden layers on digits, whose
    only images to measure the score on are the test images. Quick: two hidden layers, 3 x 3 points, and no search
    unless ``trials`` asks for one.

    Args:
        trials: of a search (0: the mode's own).
        storage: of the searches, a URL that Optuna knows ("": a file in the run store). It is no part of a recipe.
    """
    if storage:
        os.environ["FA_STORAGE"] = storage  # for the processes that train, which inherit it
    base = {"paper": PAPER, "small": SMALL, "quick": QUICK}[mode]
    base = replace(base, epochs=epochs or base.epochs, dataset=dataset or base.dataset, trials=trials or base.trials)
    if unknown := set(rules) - set(RULES):
        raise UserError(f"p2_tuning is about {', '.join(RULES)}, not {', '.join(sorted(unknown))}")
    runs = []
    for seed in range(seeds or 1):
        for rule in rules:
            searched, side = base.trials if rule in SEARCHED else 0, base.side if CENTERS[rule][0] else 1
            summary = replace(base, rule=rule, seed=seed, part="summary", trials=searched, side=side)
            runs += [*summary.needs, summary]
    return runs


def swept(config: Trial) -> dict[str, Any]:
    """The columns that name a run's place: ``part``, ``number``, and of a point what it multiplies the axes by."""
    drive, hold = config.factors if config.part == "grid" else (math.nan, math.nan)
    return {"part": config.part, "number": config.number, "drive": drive, "hold": hold}


EXPERIMENT = Experiment(
    "Tuning of weight mirror and information alignment", "p2", "23_estimation_tuning", RULES, grid,
    own={"trials": 0, "storage": ""}, small=True, swept=swept,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- figure

TEXT = f"""a: score of each trial of the search for the metaparameters of weight mirror (WM) and information alignment
(IA), and the best until then; crosses: training diverged, which counts as chance ({CHANCE:g} %; drawn a little apart).
Grey: BP. b: share of each metaparameter in the variance of the scores (fANOVA). c to g: score of every point of a grid
over two coefficients, one that drives the feedback to W (KP: the learning rate) and one that holds it back (KP: weight
decay), as multiples of its middle; crosses: diverged; framed: within {NEAR:g} points of the grid's best. One seed."""
CAPTION = f"""Tuning of learned feedback (Kunin et al. 2020). ResNet-8 learns CIFAR-10 at 16x16 pixels for three
epochs; score: accuracy on the validation images (%). {TEXT}"""
SMALL_CAPTION = f"""Tuning of learned feedback (Kunin et al. 2020), at a scale of minutes. A multilayer perceptron of
four hidden layers of 64 units learns digits (8x8 pixels, 1,437 images) for five epochs; score: accuracy on the 360
test images (%), for there are no others. {TEXT}"""


@plot.style()
def draw(page: Page) -> Figure:
    """a: the searches; b: importances; c to g: grids."""
    table = page.table()
    rules = [rule for rule in plot.in_order(table.rule if len(table) else RULES) if CENTERS[rule][0]]
    searched = [rule for rule in SEARCHED if ((table.rule == rule) & (table.part == "search")).any()]
    top = [[[["a", "b"]]]] if searched else []
    fig, ax = plot.figure([*top, [[rules]]], height=4.1 if searched else 1.9, height_ratios=[1.25, 1][-1 - len(top) :])
    if searched:
        draw_search(ax["a"], table, searched)
        draw_importance(ax["b"], table, searched)
    score = table[(table.metric == "score") & (table.part == "grid")]
    for rule in rules:
        draw_grid(ax[rule], table[(table.rule == rule) & (table.part == "grid")], rule, score.value.max())
    plot.letters([ax[name] for name in (*"ab"[: 2 * len(top)], *rules)])
    return fig


def draw_search(ax: Axes, table: pd.DataFrame, rules: list[str]) -> None:
    """Panel a: scores by trial, and the best until then."""
    for rule in rules:
        rows, own = table[(table.rule == rule) & (table.part == "search")], plot.look(rule)
        wide = rows[rows.layer == ""].pivot_table(index="number", columns="metric", values="value")
        bad, x = wide.diverged > 0, wide.index + 1
        ax.plot(x, wide.score.cummax(), color=own.color, drawstyle="steps-post")
        ax.plot(x[~bad], wide.score[~bad], own.marker, color=own.color, ms=3, mew=0, alpha=0.8)
        ax.plot(x[bad], wide.score[bad] + (2 if rule == rules[0] else -2), "x", color=own.color, ms=3, mew=0.8)
    if len(bp := table[(table.rule == "bp") & (table.metric == "grid_best")]):
        ax.axhline(bp.value.mean(), color="0.6", lw=0.8, zorder=0)
    top = table[table.metric == "score"].value.max()
    ax.set(xlabel="Trial", ylabel="Score (%)", ylim=(0, 70 if top < 65 else 103))
    plot.rule_key(ax, rules)


def draw_importance(ax: Axes, table: pd.DataFrame, rules: list[str]) -> None:
    """Panel b: a pair of bars for each metaparameter, the most important of all rules at the top."""
    rows = table[table.metric.str.startswith("importance_")]
    wide = rows.pivot_table(index="metric", columns="rule", values="value")
    wide = wide.loc[wide.max(axis=1).sort_values().index]
    for i, rule in enumerate(rules):
        ax.barh([y - 0.2 + 0.4 * (len(rules) - 1 - i) for y in range(len(wide))], wide[rule], 0.36,
                color=plot.look(rule).color)  # fmt: skip
    ax.set(xlabel="Share in the variance of the scores", yticks=range(len(wide)))
    ax.set_yticklabels(wide.index.str.removeprefix("importance_").str.replace("_", " "))
    ax.tick_params(axis="y", length=0)


def draw_grid(ax: Axes, rows: pd.DataFrame, rule: str, best: float) -> None:
    """Panels c to g: the scores of one grid, darkest where they are low."""
    from matplotlib.patches import Rectangle

    plot.note(ax, plot.look(rule).label)
    if rows.empty:
        return
    wide = {
        metric: rows[rows.metric == metric].groupby(["hold", "drive"]).value.mean().unstack("drive")
        for metric in ("score", "diverged")
    }
    score, bad = wide["score"], wide["diverged"] > 0
    ax.imshow(score, origin="lower", cmap="viridis", vmin=CHANCE, vmax=best, aspect="auto")
    for (i, j), value in np.ndenumerate(score.to_numpy()):
        ink = "white" if value < (CHANCE + best) / 2 else "black"
        ax.text(j, i, "×" if bad.iloc[i, j] else f"{value:.0f}", ha="center", va="center", color=ink, fontsize=5)
        if value >= score.max().max() - NEAR:
            ax.add_patch(Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, ec="#D55E00", lw=0.9))
    _, drives, holds = CENTERS[rule]
    ticks = {"x": (score.columns, drives), "y": (score.index, holds)}
    for axis, (factors, names) in ticks.items():
        label = ", ".join(name.rstrip("_").replace("_", " ") for name in names)
        ax.set(**{f"{axis}ticks": range(len(factors)), f"{axis}label": f"{label} (×)"})
        named = [f"{factor:.2g}" for factor in factors]
        if axis == "x" and len(named) > 5:  # there is room for every second one
            named = [name if i % 2 == len(named) // 2 % 2 else "" for i, name in enumerate(named)]
        getattr(ax, f"set_{axis}ticklabels")(named, fontsize=5.5)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def listing(table: pd.DataFrame) -> str:
    """Table: a rule's search (best, median, share that diverged) and its grid (best, share near it, and diverged)."""
    names = ["search_best", "search_median", "search_diverged", "grid_best", "grid_share", "grid_diverged"]
    rows = table[table.metric.isin(names)]
    if rows.empty:
        return tables.several("no run yet")
    wide = rows.pivot_table(index="rule", columns="metric", values="value").reindex(columns=names)
    wide.loc[[rule for rule in wide.index if not CENTERS[rule][0]], "grid_share"] = math.nan  # of one point
    wide = wide.loc[plot.in_order(wide.index)].rename(index=lambda rule: plot.look(rule).label)
    wide.columns = ["search: best", "median", "diverged (%)", "grid: best", "near (%)", "diverged (%) "]
    return tables.shown(wide.rename_axis(None), float_format="{:.1f}".format, na_rep="-")


def chosen(table: pd.DataFrame) -> str:
    """Table: the metaparameters of each search's best trial (of equals the first)."""
    rows, found = table[(table.part == "search") & (table.layer == "")], {}
    for rule in plot.in_order(rows.rule):
        wide = rows[rows.rule == rule].pivot_table(index="number", columns="metric", values="value")
        found[plot.look(rule).label] = wide.loc[wide.score.idxmax()].filter(like="set_")
    if not found:
        return tables.several("no search in these runs")
    both = pd.DataFrame(found).T.rename(columns=lambda name: name.removeprefix("set_"))
    return tables.shown(both.reindex(columns=SEARCHED["ia"]), float_format="{:.3g}".format, na_rep="-")
