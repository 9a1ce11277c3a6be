"""p2's claim about transfer, measured: metaparameters that were tuned on one network, unchanged on others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from fa import plot, tables
from fa.errors import UserError
from fa.experiments import Experiment
from fa.experiments._ends import minus_bp, told
from fa.experiments.p2_tuning import PAPER, RULES, SMALL, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

TUNED: dict[str, dict[str, int]] = {
    "small": {"wm": 6, "ia": 1, "sa": 6, "aa": 6, "kp": 18},
    "paper": {"wm": 16, "ia": 9, "sa": 16, "aa": 24, "kp": 11},
}
"""Scale -> rule -> number of the best point of page 23's grid at that scale; every rule has as many points. At the
paper scale IA's search found a better trial, a chance that only WM had, too."""


class Network(NamedTuple):
    """A network that the metaparameters are carried to: its label on axes, its place in the sweep over depth (0: it
    has none), the fields of :class:`Trial` in which it differs from the tuned network, and how many seeds it has at
    most."""

    label: str
    depth: int
    changes: dict[str, Any]
    seeds: int = 3


def _mlp(depth: int, width: int, label: str = "", **changes: Any) -> Network:
    swept = 0 if label else depth
    return Network(label or f"{depth} x {width}", swept, {"hidden": ",".join([str(width)] * depth), **changes})


def _conv(model: str, label: str, depth: int = 0, seeds: int = 3) -> Network:
    return Network(label, depth, {"model": model, "hidden": ""}, seeds)


NETWORKS = {
    "small": {
        **{f"mlp_{d}x64": _mlp(d, 64) for d in (1, 2, 4, 6, 8)},
        "mlp_4x16": _mlp(4, 16, "4 x 16"),
        "mlp_4x256": _mlp(4, 256, "4 x 256"),
        "plain4": _conv("plain4", "4 conv"),
        "plain4_bn": _conv("plain4-bn", "4 conv,\nBN"),
        "resnet8": _conv("resnet8", "ResNet-8"),
        "resnet20": _conv("resnet20", "ResNet-20"),
        "mlp_4x64_mnist": _mlp(4, 64, "4 x 64,\nMNIST", dataset="mnist", epochs=2),
    },
    "paper": {
        **{f"resnet{d}": _conv(f"resnet{d}", f"ResNet-{d}", d, 3 if d <= 20 else 2) for d in (8, 14, 20, 32, 56)},
        "plain4": _conv("plain4", "4 conv"),
        "plain4_bn": _conv("plain4-bn", "4 conv,\nBN"),
        "arch1": _conv("arch1", "Arch. 1"),
        "mlp_2x512": _mlp(2, 512, "MLP\n2 x 512", model="mlp"),
    },
}
"""Scale -> value of the column ``network`` -> network."""
LABELS = {name: n.label.replace("\n", " ") for networks in NETWORKS.values() for name, n in networks.items()}
"""Value of the column ``network`` -> its name in texts."""
SHOWN = ("mlp_1x64", "mlp_2x64", "mlp_4x64", "plain4_bn")  # in quick mode
TUNED_ON = {"small": 4, "paper": 8}
"""Scale -> place of the tuned network in the sweep over depth."""
GAP = "Score minus BP's (points)"


def scale(mode: str) -> str:
    """The scale whose metaparameters and networks a mode has."""
    return "paper" if mode == "paper" else "small"


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Trial]:
    """Page 23's runs at the points :data:`TUNED`, recipe and all, on other networks, with more seeds.

    Small: tuned on four hidden layers of 64 units and digits, five epochs; carried to other depths and widths, to
    convolutions on digits, and to MNIST, two epochs. Paper: tuned on ResNet-8 and CIFAR-10 at 16x16 pixels, three
    epochs; carried to deeper ResNets, other convolutional networks and an MLP, ten epochs; two seeds beyond 20 layers.
    Quick: four of the small networks, one seed.
    """
    if unknown := set(rules) - set(RULES):
        raise UserError(f"p2_transfer is about {', '.join(RULES)}, not {', '.join(sorted(unknown))}")
    base, side = (replace(PAPER, epochs=10), PAPER.side) if mode == "paper" else (SMALL, SMALL.side)
    base, points, runs = replace(base, trials=0), TUNED[scale(mode)], []
    for seed in range(seeds or (1 if mode == "quick" else 3)):
        for name, network in NETWORKS[scale(mode)].items():
            if (mode == "quick" and name not in SHOWN) or (not seeds and seed >= network.seeds):
                continue
            at = replace(base, seed=seed, **network.changes)
            at = replace(at, epochs=epochs or at.epochs, dataset=dataset or at.dataset)
            runs += [
                replace(at, rule=rule, number=points.get(rule, 0), side=side if rule in points else 1) for rule in rules
            ]
    return runs


def swept(config: Trial) -> dict[str, Any]:
    """The column that names a run's place: ``network``."""
    widths = config.hidden.split(",")
    name = f"mlp_{len(widths)}x{widths[0]}" if config.model == "mlp" else config.model.replace("-", "_")
    other = config.dataset not in (SMALL.dataset, PAPER.dataset)
    return {"network": name + f"_{config.dataset}" * other}


EXPERIMENT = Experiment(
    "Transfer of metaparameters to other networks", "p2", "24_estimation_transfer", RULES, grid, small=True,
    swept=swept, labels=LABELS,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

TEXT = """a: score minus backprop's, paired by seed, against depth; dotted: the tuned network. b: the same in other
networks, a dot a seed, a line their mean. Hollow in a, crosses in b: a seed diverged, which counts as chance (10 %). c:
angle between W and the feedback after training, mean of the layers. d: product of the norm ratios of feedback and W
over all layers but the first, a dot a seed, lines: medians; in a plain network whose feedback is parallel to W, the
factor by which the error has the wrong size at the first layer. A rule is left out of c and d on a network where one of
its seeds diverged. Rules are shifted sideways in a, c and d. Bars: +/- 1 sd over seeds."""
CAPTION = f"""Transfer (Kunin et al. 2020): metaparameters from the best points of page 23's grids, tuned on ResNet-8
and CIFAR-10 at 16x16 pixels, unchanged on deeper ResNets and on other networks, ten epochs; score: accuracy on the
validation images (%). {TEXT}"""
SMALL_CAPTION = f"""Transfer (Kunin et al. 2020), at a scale of minutes: metaparameters tuned on a multilayer perceptron
of four hidden layers of 64 units and digits, unchanged on perceptrons of other depths and widths, on convolutional
networks, and on MNIST; score: accuracy on the test images (%). {TEXT}"""


@plot.style()
def draw(page: Page) -> Figure:
    """a: gap to BP by depth; b: in other networks; c: weight angle, d: size of the error, by depth."""
    table = placed(page)
    fig, ax = plot.figure([["a", "b", "b"], ["c", "d", "d"]], height=4.4)
    deep, found = table[table.place > 0], gaps(table)
    by_depth(ax["a"], found[found.place > 0])
    ax["a"].set_ylabel(GAP)
    elsewhere(ax["b"], found[found.place == 0], page)
    of_layers = deep[survived(deep)]
    angles = of_layers[of_layers.metric == "angle_deg"]
    by_depth(ax["c"], angles.groupby(["rule", "place", "seed"], as_index=False).value.mean())
    ax["c"].set(ylabel="Weight angle, mean (°)", ylim=(0, 92), yticks=(0, 30, 60, 90))
    by_depth(ax["d"], sizes(of_layers), dots=True)
    ax["d"].set(yscale="log", ylabel="Product of norm ratios")
    low, high = ax["d"].get_ylim()
    ax["d"].yaxis.set_major_formatter("{x:g}")
    ax["d"].yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    for panel in "acd":
        ax[panel].axvline(TUNED_ON[scale(page.trained)], color="0.75", lw=0.7, ls=":", zorder=0)
        ax[panel].set_xlabel("Layers of the ResNet" if page.trained == "paper" else "Hidden layers")
    plot.rule_key(ax["b"], [r for r in table.rule if r != "bp"])
    plot.letters([ax[p] for p in "abcd"])
    return fig


def placed(page: Page) -> pd.DataFrame:
    """The table, with ``place``: of a network in the sweep its depth, of others 0."""
    networks = NETWORKS[scale(page.trained)]
    depths = {name: network.depth for name, network in networks.items()}
    table = page.table()
    return table.assign(place=table.network.map(depths).fillna(0).astype(int) if len(table) else 0)


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """A row a run of another rule than backprop: ``value``, its score minus backprop's with the same seed and network
    (points; chance where training diverged), and whether it ``diverged``."""
    scores, bad = (table[table.metric == metric] for metric in ("score", "diverged"))
    rows = minus_bp(scores.assign(diverged=scores.run.map(bad.set_index("run").value) > 0), ["network", "seed"])
    return rows[rows.rule != "bp"].dropna(subset="value")


def survived(table: pd.DataFrame) -> pd.Series:
    """Of every row, whether no seed of its rule and network diverged."""
    lost = (table.metric == "diverged") & (table.value > 0)
    return ~lost.groupby([table.rule, table.network]).transform("any") if len(table) else lost


def sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Product of the norm ratios of all layers but the first, a row a run."""
    rows = table[(table.metric == "norm_ratio") & (table.depth > 1)]
    return rows.groupby(["rule", "place", "seed"], as_index=False).value.prod()


def by_depth(ax: Axes, rows: pd.DataFrame, dots: bool = False) -> None:
    """A line a rule, broken where it has no rows, means or, with ``dots``, seeds and medians; hollow where a seed
    diverged."""
    places, rules = sorted(set(rows.place)), plot.in_order(rows.rule)
    step = 0.012 * (max(places) - min(places)) if places else 0.0
    for i, rule in enumerate(rules):
        of, own, shift = rows[rows.rule == rule], plot.look(rule), step * (i - (len(rules) - 1) / 2)
        none = pd.DataFrame({"place": [p for p in places if p not in set(of.place)], "seed": 0, "value": float("nan")})
        every = pd.concat([of, none]) if len(none) else of
        if dots:
            ax.plot(of.place + shift, of.value, own.marker, color=own.color, ms=3, mew=0, alpha=0.8)
            medians = every.groupby("place").value.median()
            ax.plot(medians.index + shift, medians, color=own.color, lw=0.9)
        else:
            plot.means(ax, every, "place", rule, at=lambda x, shift=shift: x + shift, ms=3.2)
        if "diverged" in of and of.diverged.any():
            bad = of[of.place.isin(of[of.diverged].place)].groupby("place").value.mean()
            ax.plot(bad.index + shift, bad, own.marker, color=own.color, mfc="white", ms=3.2, zorder=6)
    ax.set_xticks(places)


def elsewhere(ax: Axes, rows: pd.DataFrame, page: Page) -> None:
    """A column a network, in it a place a rule: a dot a seed and their mean; crosses for seeds that diverged."""
    known = {name: network.label for name, network in NETWORKS[scale(page.trained)].items()}
    names = sorted(set(rows.network), key=lambda n: (list(known).index(n) if n in known else len(known), n))
    rules = plot.in_order(rows.rule)
    for i, name in enumerate(names):
        for j, rule in enumerate(rules):
            of, own = rows[(rows.network == name) & (rows.rule == rule)], plot.look(rule)
            x = i + 0.78 * ((j + 0.5) / len(rules) - 0.5)
            for bad, marker in ((False, "."), (True, "x")):
                seeds = of[of.diverged == bad].value
                ax.plot([x] * len(seeds), seeds, marker, color=own.color, ms=3.2, mew=0.7 * bad, alpha=0.8)
            ax.plot([x - 0.05, x + 0.05], [of.value.mean()] * 2, color=own.color, lw=1.4)
    ax.axhline(0, color="0.75", lw=0.6, zorder=0)
    ax.set_xticks(range(len(names)), [known.get(name, name) for name in names])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel=GAP, xlim=(-0.6, max(len(names), 1) - 0.4))


def listing(page: Page) -> str:
    """Table: a row a network: backprop's score, and every rule's score minus it (points), mean ± sd over seeds."""
    table = placed(page)
    if table.empty:
        return tables.several("no run yet")
    scores = table[(table.metric == "score") & (table.rule == "bp")]
    found = gaps(table)
    cells = found.groupby(["network", "rule"])[["value", "diverged"]].apply(told).unstack("rule")
    cells = cells[plot.in_order(cells.columns)].rename(columns=lambda rule: plot.look(rule).label)
    bp = scores.assign(diverged=False).groupby("network")[["value", "diverged"]].apply(told)
    known = [name for name in NETWORKS[scale(page.trained)] if name in bp.index]
    cells.insert(0, "BP", bp.reindex(cells.index))
    order = [*known, *(name for name in cells.index if name not in known)]
    return tables.shown(cells.loc[order].rename(index=LABELS).rename_axis(index=None, columns=None), na_rep="-")


def point(page: Page) -> str:
    """Table: the metaparameters that are carried, a row a rule."""
    base, rows = PAPER if page.trained == "paper" else SMALL, {}
    for rule, number in TUNED[scale(page.trained)].items():
        rows[plot.look(rule).label] = replace(base, rule=rule, number=number).metaparameters()
    rows[plot.look("kp").label].pop("feedback_lr")  # KP's feedback learns at the rate of W
    names = ["lr", "weight_decay", "feedback_lr", "amp", "self_", "null", "sparse", "decay", "input"]
    shown = pd.DataFrame(rows).T.reindex(columns=names)
    return tables.shown(shown.rename(columns=lambda name: name.rstrip("_")), na_rep="-")
