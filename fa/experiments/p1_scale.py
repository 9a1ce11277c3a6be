"""p1's rules beyond one network: LeNet on MNIST and the ResNets of CIFAR-10, two optimizers, and the pieces of DFA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments.p3_fig4 import PAPER as RESNET
from fa.experiments.p3_fig4 import SMALL as SMALL_RESNET
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "dfa", "usf", "brsf", "frsf")
OPTIONS = {"usf": "scale=xavier", "bp": ""}  # of every other rule: init=xavier; BioTorch's
RATES = {"dfa": 0.001}  # SGD's on the ResNets, others 0.1; BioTorch's and p3's
SWAPS: dict[str, dict[str, Any]] = {
    "rate": {"lr": 0.01},
    "block": {"tap": "block"},
    "dense": {"form": "dense"},
}
"""Variant of DFA -> the one piece of its recipe that is swapped."""
VARIANTS = {"sgd": "SGD", "adam": "Adam", "rate": "rate × 10", "block": "error at\nblocks too", "dense": "dense B"}
"""The column ``variant`` -> its label."""
NETWORKS = {"lenet": "LeNet", "resnet8": "ResNet-8", "resnet20": "ResNet-20", "resnet56": "ResNet-56"}

LENET = Config(
    "bp", 0, dataset="mnist", model="lenet", hidden="", epochs=100, batch=64, lr=0.01, lr_drops="50,75", lr_factor=0.1,
    weight_decay=1e-3,
)  # fmt: skip
QUICK = Config(
    "bp", 0, dataset="digits", model="lenet", hidden="", epochs=3, batch=32, lr=0.01, lr_drops="1,2", lr_factor=0.1,
    weight_decay=1e-3,
)  # fmt: skip
BASES = {
    "paper": [LENET, RESNET, RESNET.vary(model="resnet56")],
    "small": [LENET.vary(epochs=10), SMALL_RESNET],
    "quick": [QUICK, QUICK.vary(model="resnet8", epochs=2, lr=0.1, lr_drops="1", weight_decay=1e-4)],
}
SEEDS = {"paper": 3, "small": 3, "quick": 1}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """BioTorch's set-ups: LeNet under SGD; ResNets under SGD and Adam; DFA on the smallest ResNet with one piece
    swapped.

    BioTorch's rates for LeNet on MNIST are not in its repository: ours are 0.01, and 0.001 for DFA. The ResNets'
    recipes are p3's Figure 4, whose runs they share. Small: LeNet with 10 epochs in place of 100; ResNet-8 at 16x16
    pixels with 15 in place of ResNet-20 and -56 with 250; under Adam without brSF and frSF. Quick: digits, as small.
    """
    bases = [b.vary(epochs=epochs or b.epochs, dataset=dataset or b.dataset) for b in BASES[mode]]
    bases = [b.vary(lr_drops=drops(b)) for b in bases]
    return [c for seed in range(seeds or SEEDS[mode]) for b in bases for c in of_network(mode, b, rules, seed)]


def drops(base: Config) -> str:
    """The source's epochs of the drops, to scale: at 2/4 and 3/4 of LeNet's, at 100, 150 and 200 of 250."""
    parts = (0.5, 0.75) if base.model == "lenet" else (0.4, 0.6, 0.8)
    return ",".join(str(max(int(base.epochs * part), 1)) for part in parts)


def of_network(mode: str, base: Config, rules: tuple[str, ...], seed: int) -> list[Config]:
    """The runs of a network and a seed."""

    def recipe(rule: str, **own: Any) -> Config:
        return base.vary(rule=rule, seed=seed, options=OPTIONS.get(rule, "init=xavier")).vary(**own)

    if base.model == "lenet":
        return [recipe(r, lr=base.lr / 10 if r == "dfa" else base.lr) for r in rules]
    sgd = [recipe(r, lr=RATES.get(r, base.lr)) for r in rules]
    adam = [recipe(r, lr=0.001, optimizer="adam") for r in rules if mode == "paper" or r not in ("brsf", "frsf")]
    pieces = SWAPS.values() if "dfa" in rules and base.model != "resnet56" else ()
    return [*sgd, *adam, *(recipe("dfa", **{"lr": RATES["dfa"]} | piece) for piece in pieces)]


def swept(config: Config) -> dict[str, Any]:
    """The columns that name a run's place: ``network`` and ``variant``."""
    if config.optimizer == "adam":
        return {"network": config.model, "variant": "adam"}
    names = {"tap": "block", "form": "dense"}
    own = [name for option, name in names.items() if option in config.rule_options] if config.rule == "dfa" else []
    faster = config.rule == "dfa" and config.model != "lenet" and config.lr > RATES["dfa"]
    return {"network": config.model, "variant": own[0] if own else "rate" if faster else "sgd"}


EXPERIMENT = Experiment(
    "Feedback alignment beyond one network", "p1", "16_fa_scale", RULES, grid, small=True, swept=swept
)


# ------------------------------------------------------------------------------------------------------------- figure

TEXT = """ a: LeNet learns MNIST, test accuracy after the last epoch. b: a ResNet learns CIFAR-10 under SGD (filled)
and, for some rules, Adam (open). c: DFA on the ResNet of b with one piece of its recipe swapped; dotted: FA under SGD.
d: angle between W and the feedback under FA after training, by depth: the first convolution of a block (circles),
the second (squares), the network's first and last layer (diamonds). Dots: seeds; bars: +/- 1 sd over seeds."""
SET_UP = "The rules of Moskovitz, Litwin-Kumar & Abbott (2018) on other networks, in the set-ups of BioTorch."
CAPTION = f"""{SET_UP}{TEXT} Hollow, right of a column: BioTorch's; in c also Li & Benna's (2024) DFA, on
validation images."""
SMALL_CAPTION = f"""{SET_UP} At the scale of two CPU cores: LeNet with 10 epochs in place of 100; ResNet-8 at 16x16
pixels with 15 epochs.{TEXT}"""


@plot.style()
def draw(page: Page) -> Figure:
    """a: LeNet; b: ResNet, two optimizers; c: DFA's pieces; d: FA's angles by depth."""
    table, paper = page.table(), page.reference()
    fig, ax = plot.figure([["a", "b", "b"], ["c", "d", "d"]], height=4.6)
    resnet = next((n for n in NETWORKS if n != "lenet" and n in set(table.network)), "resnet20")
    ends = table[(table.metric == "test_accuracy") & (table.epoch == table.groupby("run").epoch.transform("max"))]
    published = paper[paper.metric == "test_accuracy"]
    for panel, network, variants in (("a", "lenet", ["sgd"]), ("b", resnet, ["sgd", "adam"])):
        places = {(r, v): i + 0.36 * (v == "adam") for i, r in enumerate(RULES) for v in variants}
        ours = ends[ends.network == network]
        column(ax[panel], ours, published[published.network == network] if len(paper) else paper, places)
        ax[panel].set(xticks=[i + 0.18 * (len(variants) - 1) for i in range(len(RULES))])
        ax[panel].set_xticklabels([EXPERIMENT.named(r) for r in RULES])
        plot.note(ax[panel], f"{NETWORKS[network]}, {plot.repeats(ours, ['rule', 'variant'])} (dots)")
    ax["a"].set_ylim(top=103)  # an sd of FA's seeds reaches beyond all accuracies
    pieces = ends[(ends.network == resnet) & (ends.rule == "dfa")]
    places = {("dfa", v): i for i, v in enumerate(VARIANTS)}
    column(ax["c"], pieces, paper[paper.network == resnet] if len(paper) else paper, places)
    fa = ends[(ends.network == resnet) & (ends.rule == "fa") & (ends.variant == "sgd")].value
    ax["c"].axhline(fa.mean(), color=plot.look("fa").color, lw=0.8, ls=":", zorder=0)
    ax["c"].set(xticks=range(len(VARIANTS)), xlabel="DFA, one piece swapped")
    ax["c"].set_xticklabels(VARIANTS.values(), fontsize="small")
    for panel in "abc":
        ax[panel].tick_params(axis="x", length=0)
        ax[panel].set(ylabel=plot.LABELS["test_accuracy"])
    handles = plot.key({"SGD": "0.3", "Adam": "0.3"}, ls="")
    for handle, face in zip(handles, ("0.3", "white")):
        handle.set(marker="o", ms=3.8, mfc=face)
    ax["b"].legend(handles=handles, loc="lower right")
    by_depth(ax["d"], table[(table.network == resnet) & (table.rule == "fa")])
    plot.letters([ax[p] for p in "abcd"])
    return fig


def column(ax: Axes, ours: pd.DataFrame, theirs: pd.DataFrame, places: dict[tuple[str, str], float]) -> None:
    """A column a rule and variant: seeds as dots, mean +/- 1 sd, published values hollow at its right."""
    for (rule, variant), x in places.items():
        own = plot.look(rule)
        values = ours[(ours.rule == rule) & (ours.variant == variant)].value
        if len(values):
            face = {"mfc": "white"} if variant in ("adam", "alexnet") else {}
            ax.plot([x - 0.13] * len(values), values, ".", color=own.color, ms=2.5, alpha=0.45, mew=0)
            sd = values.std() if len(values) > 1 else None
            line = {"fmt": own.marker, "color": own.color, "ms": 3.8, "elinewidth": 0.9, "capsize": 1.6}
            ax.errorbar(x, values.mean(), sd, **line, **face)
        known = theirs[(theirs.rule == rule) & (theirs.variant == variant)] if len(theirs) else theirs
        plot.published(ax, [x + 0.14] * len(known), known.value, own.color, "d")
    ax.set_xlim(min(places.values()) - 0.5, max(places.values()) + 0.5)


def by_depth(ax: Axes, rows: pd.DataFrame) -> None:
    """Weight angle after training by depth, a line an optimizer, a marker a place in the block."""
    rows = rows[(rows.metric == "angle_deg") & (rows.epoch == rows.groupby("run").epoch.transform("max"))]
    for variant, ls in (("sgd", "-"), ("adam", "--")):
        of = rows[rows.variant == variant].groupby(["depth", "layer"]).value.agg(["mean", "std"]).reset_index()
        color, face = plot.look("fa").color, {"mfc": "white"} if variant == "adam" else {}
        ax.plot(of.depth, of["mean"], color=color, ls=ls, lw=0.8, label=VARIANTS[variant], zorder=1)
        for place, marker in (("conv1", "o"), ("conv2", "s"), ("", "D")):
            part = of[of.layer.map(block_place) == place]
            line = {"color": color, "marker": marker, "ls": "", "ms": 3.4, "elinewidth": 0.8}
            ax.errorbar(part.depth, part["mean"], part["std"], **line, **face)
    ax.axhline(90, color="0.75", lw=0.6, ls=":", zorder=0)
    ax.set(xlabel="Layer, from the input", ylabel="Weight angle (°)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if len(rows):
        ax.legend(loc="lower left")


def block_place(layer: str) -> str:
    """ "conv1" or "conv2" of a layer within a block, "" of any other."""
    return layer.rpartition(".")[2] if "." in layer else ""


def accuracies(page: Page) -> str:
    """Table of test accuracies after the last epoch: network, rule, optimizer or swapped piece; mean, sd, n, and the
    published value."""
    table, paper = page.table(), page.reference()
    if table.empty:
        return tables.several("no run yet")
    ends = table[(table.metric == "test_accuracy") & (table.epoch == table.groupby("run").epoch.transform("max"))]
    places = ["network", "rule", "variant"]
    ours = ends.groupby(places).value.agg(["mean", "std", "count"]).set_axis(["ours", "sd", "n"], axis=1)
    if len(paper):
        known = paper[(paper.metric == "test_accuracy") & paper.source.str.startswith("BioTorch")]
        ours = ours.join(known.set_index(places).value.rename("BioTorch"))
    order = {"network": list(NETWORKS).index, "rule": plot.in_order(ends.rule).index, "variant": list(VARIANTS).index}
    ours = ours.reset_index().sort_values(places, key=lambda c: c.map(order[c.name]))
    return tables.shown(ours, index=False, float_format="{:.2f}".format, na_rep="-")
