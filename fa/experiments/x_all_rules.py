"""Across the papers: every rule on the same networks, one recipe each: accuracy, alignment and the cost of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment, of_rules, p3_fig2, p3_fig4
from fa.experiments.p2_tuning import CENTERS
from fa.layers.hooks import converted
from fa.metrics import linear_layers
from fa.train import data
from fa.train.config import Config, identity
from fa.train.network import build_network
from fa.train.step import Stepper, make_optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "dfa", "usf", "brsf", "frsf", "wm", "ia", "sa", "aa", "kp", "pfa", "pfa_o", "frozen")
NETWORKS = {"mlp": "MLP, MNIST", "resnet8": "ResNet-8, CIFAR-10", "resnet20": "ResNet-20, CIFAR-10"}
"""The column ``network`` -> its label."""
SEEDS = {"paper": 3, "small": 3, "quick": 1}
ROUNDS = 15  # steps of a rule that are timed, each between two of backprop

OTHERS: dict[str, dict[str, Any]] = {rule: {"init": "xavier"} for rule in ("brsf", "frsf")} | {"frozen": {}} | {
    rule: dict(CENTERS[rule][0], feedback_lr=0.1) for rule in ("wm", "ia", "sa", "aa")
}  # fmt: skip
"""Options of the rules that p3's recipes do not have: Xavier's scale, as p3's; p2's coefficients are the middles of
page 23's grids."""


@dataclass(frozen=True)
class StepCost:
    """The time of a training step under a rule, beside a step of backprop of the same network.

    Args:
        rule, seed, options, dataset, model, hidden, batch, lr: as in :class:`fa.train.config.Config`.
        revision: of the recipe.
    """

    rule: str
    seed: int
    options: str
    dataset: str
    model: str
    hidden: str
    batch: int
    lr: float
    revision: int = 1

    run = property(identity)

    def table(self) -> pd.DataFrame:
        """``step_cost``: CPU time of a step over that of backprop's, the median of :data:`ROUNDS` pairs of steps in
        turn; ``feedback_size``: entries of the feedback over those of the weights of the layers that have it."""
        names = ("dataset", "model", "hidden", "batch", "lr", "options")
        own = Config(self.rule, self.seed, **{name: getattr(self, name) for name in names})
        sets = data.load(self.dataset)
        nets = [build_network(c, sets.shape, sets.classes) for c in (own, own.vary(rule="bp", options=""))]
        steppers = [Stepper(net, make_optimizer(net, own), own, sets.train) for net in nets]
        for stepper in steppers:
            stepper.begin(0)
        ratios = []
        for number in range(ROUNDS + 3):
            seconds = []
            for stepper in steppers if number % 2 else steppers[::-1]:
                begin = time.process_time()
                stepper.step()
                seconds.append(time.process_time() - begin)
            ratios.append(seconds[0] / seconds[1] if number % 2 else seconds[1] / seconds[0])
        kept = [t for m in converted(nets[0]).values() for t in m.feedback.state_dict().values()]
        entries = [t.numel() for t in kept if t.is_floating_point()]  # the state of a noise generator is none
        weights = [layer.weight.numel() for layer in linear_layers(nets[0]).values()]
        rows = {"step_cost": float(np.median(ratios[3:])), "feedback_size": sum(entries) / sum(weights)}
        table = pd.DataFrame({"epoch": 0, "layer": "", "metric": list(rows), "value": list(rows.values())})
        return table.reindex(columns=["epoch", "layer", "depth", "metric", "value"])


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Any]:
    """p3's recipes for MNIST and CIFAR-10, whose runs are shared, with the other rules added; and the cost of a step.

    Small: the MLP as in p3's Figure 2; ResNet-8 as in the small Figure 4. Paper: the MLP, and ResNet-20 as in Figure 4.
    Quick: both on digits.
    """
    n = seeds or SEEDS[mode]
    quick, known = mode == "quick", tuple(dict.fromkeys(["bp", *(r for r in rules if r not in OTHERS)]))
    wide = p3_fig2.grid("quick" if quick else "paper", known, n, epochs or 8 * quick, dataset)
    deep = p3_fig4.grid(mode, known, n, epochs or 2 * quick, dataset)
    others = [r for r in rules if r in OTHERS]
    runs = [c for part in (wide, deep) for c in [*part, *added(part[0], others, n)] if c.rule in rules]
    runs.sort(key=lambda c: c.seed)  # whole seeds first
    return [*runs, *(cost(c) for c in runs if c.rule != "bp")]


def added(plain: Config, rules: list[str], seeds: int) -> list[Config]:
    """The runs of other rules with the recipe of a network's run under BP."""
    return of_rules(plain, rules, seeds, OTHERS)


def cost(config: Config) -> StepCost:
    """The cost of a step of a run."""
    names = ("rule", "seed", "options", "dataset", "model", "hidden", "batch", "lr")
    return StepCost(**{name: getattr(config, name) for name in names})


EXPERIMENT = Experiment(
    "Every rule of the three papers on the same networks", "x", "41_all_rules", RULES, grid, small=True,
    swept=lambda config: {"network": config.model},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

TEXT = """ a, b: test accuracy after the last epoch minus backprop's, seed by seed, against the angle between the
gradient of each layer below the output and exact backprop's, mean of the layers, after training; in words: rules
without an angle, and rules that diverged, with the number of their seeds. c: CPU time of a training step over the time
of a step of backprop, median and range of seeds. Bars in a, b: +/- 1 sd over seeds."""
CAPTION = f"""Every rule of the three papers with p3's recipes: the network of Figure 2 on MNIST (a), ResNet-20 on
CIFAR-10 (b).{TEXT}"""
SMALL_CAPTION = f"""Every rule of the three papers with one recipe for each network: the network of p3's Figure 2 on
MNIST, 40 epochs (a); ResNet-8 on CIFAR-10 at 16x16 pixels, 15 epochs (b).{TEXT}"""


@plot.style()
def draw(page: Page) -> Figure:
    """a, b: accuracy gap against gradient angle, a network each; c: the cost of a step."""
    table = page.table()
    networks = [n for n in NETWORKS if n in set(table.network)] or ["mlp", "resnet8"]
    fig, ax = plot.figure([["a", "b"], ["c", "c"]], height=5.2)
    for panel, network in zip("ab", networks):
        points(ax[panel], summary(table[table.network == network]))
        ax[panel].set(xlabel="Gradient angle, mean of layers (°)", ylabel="Test accuracy minus BP's (points)")
        plot.note(ax[panel], f"{NETWORKS[network]}, {plot.repeats(table[table.network == network])}")
    costs(ax["c"], table[table.metric == "step_cost"], networks)
    plot.letters([ax[p] for p in "abc"])
    fig.draw_without_rendering()  # from here on the panels stay where they are
    for panel, network in zip("ab", networks):
        names(ax[panel], summary(table[table.network == network]))
    return fig


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Of one network a row a rule: ``accuracy``, ``gap`` to BP and gradient ``angle`` after the last epoch, mean over
    seeds, each with its sd (``gap_sd``, ...), the number of seeds that have them, ``n``, and of those that
    ``diverged``."""
    rows = rows[~rows.metric.isin(["step_cost", "feedback_size"])]
    last = rows[rows.epoch == rows.epoch.max()]
    accuracy = last[last.metric == "test_accuracy"].pivot_table(index="seed", columns="rule", values="value")
    below = last[(last.metric == "grad_angle_global_deg") & (last.depth < last.depth.max())]
    angle = below.groupby(["seed", "rule"]).value.mean().unstack("rule")
    gap = accuracy.sub(accuracy["bp"], axis=0) if "bp" in accuracy else accuracy * np.nan
    found = {"accuracy": accuracy, "gap": gap, "angle": angle.reindex(columns=accuracy.columns)}
    parts = {name: frame.mean() for name, frame in found.items()}
    parts |= {f"{name}_sd": frame.std() for name, frame in found.items()}
    seeds = rows.groupby("rule").seed.nunique()
    summed = pd.DataFrame(parts).reindex(plot.in_order(rows.rule))
    n = accuracy.count().reindex(summed.index, fill_value=0)
    return summed.assign(n=n, diverged=seeds - n)


PLACES = tuple((x, y) for x in (3, -3, 12) for y in (3, -9, 10, -16))
"""Where a name may stand beside its point, in points; the first that is free is taken."""


def points(ax: Axes, found: pd.DataFrame) -> None:
    """A point a rule, named; BP is the corner."""
    ax.set_xlim(-17, 98)
    ax.set_xticks((0, 30, 60, 90))
    ax.axhline(0, color="0.75", lw=0.6, ls=":", zorder=0)
    for rule, row in found.iterrows():
        own, angle = plot.look(str(rule)), 0.0 if rule == "bp" else row["angle"]
        line = {"fmt": own.marker, "color": own.color, "ms": 4.2, "elinewidth": 0.7}
        ax.errorbar(angle, row["gap"], row["gap_sd"], row["angle_sd"] if rule != "bp" else None, **line)
    lost = found[found["angle"].isna() & found["gap"].notna() & (found.index != "bp")]
    bad = found[found["diverged"] > 0]
    words = {
        "without an angle: ": [f"{plot.look(str(r)).label} {gap:.1f}" for r, gap in lost["gap"].items()],
        "diverged: ": [
            f"{plot.look(str(r)).label} ({k} of {k + n})" for r, k, n in zip(bad.index, bad["diverged"], bad["n"])
        ],
    }
    text = "\n".join(head + ", ".join(of) for head, of in words.items() if of)
    ax.text(0.02, 0.02, text, transform=ax.transAxes, fontsize="x-small")


def names(ax: Axes, found: pd.DataFrame) -> None:
    """The rules' names beside their points, none over another name or point; of a figure whose layout is final."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    at = found["angle"].fillna(0.0).where(found["angle"].notna() | (found.index == "bp"))  # nan: no point
    spots = {str(r): ax.transData.transform((at[r], found["gap"][r])) for r in found.index if at[r] == at[r]}
    taken = [Bbox.from_extents(*(spot - 5), *(spot + 5)) for spot in spots.values()]
    for rule in sorted(spots, key=lambda rule: -spots[rule][1]):  # the upper point of two gets the upper place
        spot, place = (at[rule], found["gap"][rule]), {"textcoords": "offset points", "fontsize": "x-small"}
        place["color"] = plot.look(rule).color
        leader = {"arrowstyle": "-", "lw": 0.4, "color": place["color"], "shrinkA": 0, "shrinkB": 2}
        text = ax.annotate(plot.look(rule).label, spot, PLACES[0], arrowprops=leader, **place)
        text.set_in_layout(False)
        for x, y in PLACES:
            text.xyann = (-x if at[rule] < 1 else x, y)  # left of the points at 0 degrees is room
            text.set_ha("left" if text.xyann[0] > 0 else "right")
            text.get_window_extent()  # puts the text where it now belongs
            box = Text.get_window_extent(text)  # without its leader
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def costs(ax: Axes, rows: pd.DataFrame, networks: list[str]) -> None:
    """The cost of a step: a column a rule, a marker a network."""
    rules = plot.in_order(rows.rule)
    for shift, face, network in ((-0.12, {}, networks[0]), (0.12, {"mfc": "white"}, networks[-1])):
        of = rows[rows.network == network].groupby("rule").value.agg(["median", "min", "max"])
        for i, rule in enumerate(rules):
            if rule in of.index:
                own, (middle, low, high) = plot.look(rule), of.loc[rule]
                line = {"fmt": own.marker, "color": own.color, "ms": 4, "elinewidth": 0.8} | face
                ax.errorbar(i + shift, middle, [[middle - low], [high - middle]], **line)
    ax.axhline(1, color="0.75", lw=0.6, ls=":", zorder=0)
    ax.set(xticks=range(len(rules)), ylabel="Step over a step of BP")
    ax.set_xticklabels([plot.look(r).label for r in rules])
    ax.tick_params(axis="x", length=0)
    plot.note(ax, f"filled: {NETWORKS[networks[0]]}; open: {NETWORKS[networks[-1]]}; median and range of seeds")


READS = {
    "bp": "W", "fa": "nothing", "dfa": "nothing", "usf": "signs of W", "brsf": "signs of W", "frsf": "signs of W",
    "wm": "activity", "ia": "activity", "sa": "W", "aa": "activity, sent up", "kp": "W's updates",
    "pfa": "W's updates", "pfa_o": "W's updates", "frozen": "W, at times",
}  # fmt: skip
"""Rule -> what its feedback knows of W; pages 21 and 30 measure it."""


def listing(page: Page) -> str:
    """Table: a row a network and rule: accuracy, gap to BP, gradient angle, cost of a step, size of the feedback, and
    what the feedback knows of W."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    parts = []
    for network in (n for n in NETWORKS if n in set(table.network)):
        rows = table[table.network == network]
        found = summary(rows)[["accuracy", "accuracy_sd", "n", "diverged", "gap", "angle"]]
        for name in ("step_cost", "feedback_size"):
            found[name] = rows[rows.metric == name].groupby("rule").value.median()
        parts.append(found.reset_index(names="rule").assign(network=network))
    every = pd.concat(parts)
    every["knows"] = [READS.get(r, "-") for r in every.rule]
    every["rule"] = [plot.look(r).label for r in every.rule]
    named = {"accuracy_sd": "sd", "angle": "gradient angle", "step_cost": "step", "feedback_size": "feedback / W"}
    every = every[["network", *every.columns.drop(["network"])]].rename(columns=named)
    return tables.shown(every, index=False, float_format="{:.2f}".format, na_rep="-")
