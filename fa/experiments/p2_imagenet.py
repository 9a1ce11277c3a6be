"""p2's question at its own scale: its rules on networks for ImageNet, for whoever has ImageNet and a GPU; the small
mode trains ResNet-18 on 2,000 photographs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments._ends import ends, minus_bp, told
from fa.experiments.p2_tuning import CENTERS
from fa.experiments.p3_fig5 import accuracy_of
from fa.train.config import Config
from fa.train.data import SETS, ImageFolderSource

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "wm", "ia", "sa", "aa", "kp")
NETWORKS = {
    "resnet18": "ResNet-18", "resnet50": "ResNet-50", "resnet50v2": "ResNet-50v2", "resnet101v2": "ResNet-101v2",
    "resnet152v2": "ResNet-152v2", "resnet8": "ResNet-8",
}  # fmt: skip
"""The column ``network`` -> label; p2's networks first, in the order of their layers."""

OWN: dict[str, dict[str, Any]] = {rule: CENTERS[rule][0] | {"feedback_lr": 0.1} for rule in ("wm", "ia", "sa")}
OWN["aa"] = CENTERS["aa"][0] | {"input": "normal"}
"""Rule -> its options and the rate of its feedback: the middles of page 23's grids. AA's mirror sees noise, as WM's.
Its feedback has W's rate, which is 0.1 on ImageNet; with 32 images and maps of a pixel it diverges at 0.1."""

PAPER = Config(
    "bp", 0, dataset="imagenet", model="resnet18", hidden="", epochs=90, batch=256, lr=0.1, lr_factor=0.1,
    nesterov=True, weight_decay=1e-4, augment=True, precision="bfloat16", weights="torch",
)  # fmt: skip
SMALL = PAPER.vary(dataset="tiny-imagenet-20", epochs=18, batch=32, lr=0.0125, nesterov=False)
QUICK = PAPER.vary(
    dataset="digits", model="resnet8", epochs=3, batch=32, lr=0.05, nesterov=False, augment=False, precision="float32"
)
SEEDS = {"paper": 1, "small": 3, "quick": 1}
FIRST_DECAY = {"paper": 0.0, "small": 0.2, "quick": 0.05}
"""Weight decay of KP's first epoch; on ImageNet the ordinary decay is enough."""


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """The recipe of p2's code: warm-up over 5 of 90 epochs, a tenth of the rate after 30, 60 and 80. Five networks, one
    seed; p2's number of seeds is not known, nor are its metaparameters, so that the rules have the middles of page 23's
    grids.

    Small: ResNet-18 alone on 2,000 photographs of 20 classes at 32x32, three seeds, 18 epochs of 62 steps and the
    schedule to scale. The learning rate is p2's times batch / 256, as its code's option ``rescale_lr`` has it; momentum
    is plain. In KP's first epoch a strong weight decay leaves a third of the mismatch. Quick: ResNet-8 on
    digits, three epochs, or the small mode's recipe on photographs.
    """
    recipe, base = base_of(mode, epochs, dataset)
    models = [m for m in NETWORKS if m != "resnet8"] if recipe == "paper" else [base.model]
    own = OWN | {"kp": {"first_weight_decay": FIRST_DECAY[recipe]}}
    return [
        base.vary(seed=seed, model=model, rule=rule, **own.get(rule, {}))
        for seed in range(seeds or SEEDS[mode])
        for model in models
        for rule in rules
    ]


def base_of(mode: str, epochs: int, dataset: str) -> tuple[str, Config]:
    """The scale whose recipe a mode has (photographs are trained as "small" is), and BP's run of seed 0."""
    photographs = isinstance(SETS.get(dataset), ImageFolderSource)
    recipe = "small" if mode == "quick" and photographs else mode
    base = {"paper": PAPER, "small": SMALL, "quick": QUICK}[recipe]
    n = epochs or (QUICK.epochs if mode == "quick" else base.epochs)
    drops = ",".join(str(max(round(n * e / 90), 1)) for e in (30, 60, 80))
    return recipe, base.vary(epochs=n, lr_drops=drops, warmup=round(n * 5 / 90), dataset=dataset or base.dataset)


EXPERIMENT = Experiment(
    "Learned feedback on photographs", "p2", "27_estimation_imagenet", RULES, grid, small=True,
    swept=lambda config: {"network": config.model},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

TEXT = """ c, d, e: by layer of ResNet-18, after training: angle between the weight W and the feedback, norm of the
feedback over that of W, and angle between the gradient of W and exact backprop's; 90 degrees: no relation. A run
that diverges counts as chance, is a cross in b, and is left out of c to e. Bars and bands: +/- 1 sd over seeds."""
CAPTION = f"""Rules of Kunin et al. (2020) on ImageNet; their accuracies are not known to us. a: top-1 accuracy of
ResNet-18 on the 50,000 validation images, by epoch. b: accuracy after the last epoch minus backprop's, by
network.{TEXT}"""
SMALL_CAPTION = f"""In place of ImageNet, on which Kunin et al. (2020) train: ResNet-18 learns 20 classes from 2,000
photographs of 32x32 pixels in 18 epochs. a: accuracy on 500 validation images, by epoch; dotted: chance, 5 percent. b:
accuracy after the last epoch minus backprop's; dots: seeds.{TEXT} Shaded: 3x3 convolutions of maps of one pixel, most
of whose weights meet nothing but zeros; WM, IA and AA cannot learn those."""
PANELS = {"c": "angle_deg", "d": "norm_ratio", "e": "grad_angle_global_deg"}


@plot.style()
def draw(page: Page) -> Figure:
    """a: accuracy by epoch; b: gap to BP; c, d, e: layers by depth."""
    table, metric = page.table(), accuracy_of(page)
    networks = [n for n in NETWORKS if n in set(table.network)] or ["resnet18"]
    shown = table[table.network == networks[0]]
    fig, ax = plot.figure([[[["a", "b"]]], [[["c", "d", "e"]]]], height=4.6)
    plot.accuracy(ax["a"], shown, metric=metric)
    ax["a"].axhline(chance_of(page), color="0.6", lw=0.7, ls=":", zorder=0)
    ax["a"].set_ylim(bottom=0)
    ax["a"].xaxis.get_major_locator().set_params(integer=True)
    plot.rule_key(ax["a"], table.rule if len(table) else RULES)
    gaps(ax["b"], gap_to_bp(page), networks)
    plot.note(ax["b"], plot.repeats(table, ["network", "rule"]))
    last = shown[shown.epoch == shown.epoch.max()]
    for panel, of in PANELS.items():
        rows = last[(last.metric == of) & (last.depth > 0)]
        for rule in plot.in_order(rows.rule):
            plot.means(ax[panel], rows[rows.rule == rule], "depth", rule, ms=2.4)
        ax[panel].set(xlabel="Layer, from the input", ylabel=plot.LABELS[of].replace("Angle", "Weight angle"))
        if page.trained == "small" and panel != "e":
            for depth in rows[rows.layer.str.match(r"layer4\.\d\.conv")].depth.unique():
                ax[panel].axvspan(depth - 0.5, depth + 0.5, color="0.93", lw=0, zorder=0)
    for panel in "ce":
        ax[panel].set(ylim=(-3, 100), yticks=(0, 30, 60, 90))
    ax["d"].set_ylim(bottom=0)
    plot.letters([ax[p] for p in "abcde"])
    if page.trained == "small":
        plot.stamp(fig, "stand-in: 2,000 photographs at 32x32, not ImageNet")
    return fig


def padding_angle(size: int, kernel: int = 3, stride: int = 1) -> float:
    """Degrees between W and the matrix that WM settles at, by the zeros around a map alone.

    White noise on a map of ``size`` x ``size`` pixels, padded by ``kernel // 2``, has a diagonal second moment: the
    share of positions at which an entry of the kernel meets a pixel. W's entries count as equally large. Source: our
    derivation.
    """
    at = np.arange(0, size, stride)[:, None] + np.arange(kernel) - kernel // 2  # (positions, kernel), of one axis
    seen = np.outer(*[((at >= 0) & (at < size)).mean(0)] * 2)  # (kernel, kernel)
    return float(np.degrees(np.arccos(min(seen.sum() / (kernel * np.sqrt((seen**2).sum())), 1.0))))


def padding(page: Page) -> str:
    """Table: the mean weight angle under WM in each stage, in the convolutions whose maps have more than a pixel, and
    what the zeros around the maps of the small scale alone would make of it (degrees)."""
    table = page.table()
    rows = table[(table.metric == "angle_deg") & (table.rule == "wm") & (table.epoch == table.epoch.max())]
    if rows.empty or page.trained != "small":
        return tables.several("no run of the small scale is shown")
    stages = {"layer1": (8, 1), "layer2": (8, 2), "layer3": (4, 2)}  # map that the stage gets, and its first stride
    found = []
    for stage, (size, stride) in stages.items():
        plain = padding_angle(size // stride)
        alone = [padding_angle(size, 3, stride), plain, plain, plain] + [0.0] * (
            stride > 1
        )  # the 1x1 shortcut sees all
        ours = rows[rows.layer.str.startswith(stage)].value.mean()
        found.append([stage, ours, np.mean(alone)])
    return tables.shown(
        pd.DataFrame(found, columns=["stage", "WM", "zeros alone"]), index=False, float_format="{:.1f}".format
    )


def chance_of(page: Page) -> float:
    """Percent: the accuracy of a run that diverged."""
    return 100 / SETS[page.runs[0].dataset].classes


def gap_to_bp(page: Page) -> pd.DataFrame:
    """Accuracy after the last epoch (``accuracy``), and the same minus BP's of that seed and network (``value``), a row
    a run; ``diverged`` where it is chance's."""
    rows = ends(page.table(), accuracy_of(page), chance_of(page)).reset_index(drop=True)
    return minus_bp(rows.assign(accuracy=rows.value), ["network", "seed"])


def gaps(ax: Axes, rows: pd.DataFrame, networks: list[str]) -> None:
    """Of one network a column a rule, seeds as dots; of several a line a rule, from the shallowest to the deepest."""
    rules = [r for r in plot.in_order(rows.rule) if r != "bp"]
    for i, rule in enumerate(rules):
        own, of = plot.look(rule), rows[rows.rule == rule]
        x = of.network.map(networks.index).astype(float) if len(networks) > 1 else pd.Series(float(i), of.index)
        at = of.value.groupby(x).agg(["mean", "std"])
        line = {"color": own.color, "marker": own.marker, "ms": 3.8, "lw": 0.9, "elinewidth": 0.9, "capsize": 1.6}
        ax.errorbar(at.index + 0.1, at["mean"], at["std"].where(at["std"].notna(), 0), **line)
        for kind, some in (("x", of[of.diverged]), (".", of[~of.diverged])):
            ax.plot(
                x[some.index] - 0.15, some.value, kind, color=own.color, ms=4 if kind == "x" else 3, ls="", alpha=0.7
            )
    ticks = [NETWORKS[n].removeprefix("ResNet-") for n in networks] if len(networks) > 1 else rules
    ax.axhline(0, color="0.6", lw=0.7, ls=":", zorder=0)
    ax.set(xticks=range(len(ticks)), ylabel="Accuracy minus BP's (points)")
    ax.set_xticklabels(ticks if len(networks) > 1 else [plot.look(r).label for r in rules])
    ax.set(xlabel="ResNet" if len(networks) > 1 else "", xlim=(-0.6, max(len(ticks) - 0.4, 0.6)))


def accuracy_cells(page: Page) -> dict[str, pd.Series]:
    """Two columns of a table, by network and rule: accuracy after the last epoch, and the gap to BP; mean ± sd."""
    found, keys = gap_to_bp(page), ["network", "rule"]
    return {
        "accuracy": found.assign(value=found.accuracy).groupby(keys)[["value", "diverged"]].apply(told),
        "minus BP": found[found.rule != "bp"].groupby(keys)[["value", "diverged"]].apply(told),
    }


def listing(page: Page) -> str:
    """Table: a row a network and rule: accuracy and gap to BP, and after training weight angle, norm ratio and gradient
    angle, means of the layers; of the angles those of layers whose maps have more than a pixel stand beside them."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    parts, keys = accuracy_cells(page), ["network", "rule"]
    last = table[(table.epoch == table.epoch.max()) & (table.depth > 0)]
    for name, of in {"weight angle": "angle_deg", "norm ratio": "norm_ratio", "gradient angle": PANELS["e"]}.items():
        rows = last[last.metric == of]
        parts[name] = rows.groupby(keys).value.mean()
        if page.trained == "small" and of == "angle_deg":
            parts[f"{name}, conv1 to layer3"] = rows[~rows.layer.str.match("layer4|fc")].groupby(keys).value.mean()
    wide = pd.DataFrame(parts)
    order = [(n, r) for n in NETWORKS for r in plot.in_order(table.rule) if (n, r) in wide.index]
    wide = wide.loc[order].reset_index()
    wide = wide.assign(network=wide.network.map(NETWORKS), rule=[plot.look(r).label for r in wide.rule])
    wide["minus BP"] = wide["minus BP"].fillna("-")
    return tables.shown(wide, index=False, float_format="{:.2f}".format, na_rep="-")
