"""p1's rules on Architecture 1 and CIFAR-10: test accuracy under backprop, random and sign-concordant feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.train.config import Config, format_options, parse_options

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "dfa", "usf", "brsf", "frsf")


class Variant(NamedTuple):
    """A rule with its options as this figure trains it, and how it is drawn."""

    rule: str
    options: str
    label: str
    dashes: tuple[int, ...] = ()


VARIANTS = {
    "bp": Variant("bp", "", "BP"),
    "fa": Variant("fa", "init=0.01", "FA, kernel"),
    "fa_dense": Variant("fa", "form=dense init=0.01", "FA, dense", (3, 1)),
    "dfa": Variant("dfa", "form=dense init=kaiming", "DFA, dense"),
    "usf": Variant("usf", "", "uSF, constant"),
    "usf_track": Variant("usf", "scale=track", "uSF, norm follows W", (3, 1)),
    "usf_clamp": Variant("usf", "clamp_forward=true", "uSF, norm of W held", (1, 1)),
    "brsf": Variant("brsf", "init=0.1", "brSF"),
    "frsf": Variant("frsf", "init=0.1", "frSF"),
}
"""The column ``variant`` -> what it stands for; a rule that is not here is its own variant, with its defaults."""

LABELS = {name: variant.label for name, variant in VARIANTS.items()}
"""Variant -> its name in legends and on axes."""

PAPER = Config(
    "bp", 0, dataset="cifar10-24", model="arch1", hidden="", epochs=50, batch=128, lr=1e-3, lr_drops="",
    optimizer="adam", weight_decay=0.0, augment=True, precision="bfloat16", weights="torch",
    first_steps="1,2,4,8,16,32,64,128,256", keep=True,
)  # fmt: skip
SMALL = PAPER.vary(epochs=8, precision="float32", first_steps="2,8,32,128")
QUICK = PAPER.vary(
    dataset="digits", model="arch1-same", epochs=3, batch=32, augment=False, precision="float32", first_steps="8"
)
SEEDS = {"paper": 3, "small": 3, "quick": 1}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """The set-up of Lance & Kieu (2026) with the hyperparameters that they chose, for they are not known of p1.

    Adam at a constant rate of 0.001; PyTorch's initial weights; decay 1e-4 for backprop, none else; feedback of
    standard deviation 0.01 for fa and 0.1 for frsf. Theirs is normal, ours uniform. brsf is as frsf, DFA's feedback is
    Nokland's; neither is in their paper. The validation images are ours.

    Forward and backward passes are in bfloat16 (ours, for time). Small: 8 epochs in place of 50, in float32, layers
    measured at fewer steps of the first. Quick: digits, 3 epochs, one seed, with padded convolutions, as 8x8 pixels are
    too few without, and images as they are.
    """
    base = asked({"paper": PAPER, "small": SMALL, "quick": QUICK}[mode], epochs, dataset)
    return [recipe(base, variant, seed) for seed in range(seeds or SEEDS[mode]) for variant in of(rules)]


def asked(base: Config, epochs: int, dataset: str) -> Config:
    """The recipe with other epochs (0: its own) and on another data set ("": its own), padded where images are
    small."""
    base = base.vary(epochs=epochs or base.epochs)
    if not dataset:
        return base
    small = dataset not in ("cifar10", "cifar10-24", "imagenet")
    return base.vary(dataset=dataset, model="arch1-same" if small else "arch1")


def of(rules: Sequence[str]) -> list[str]:
    """The variants of some rules, in the order of the legend."""
    known = [name for name, v in VARIANTS.items() if v.rule in rules]
    return [*known, *(r for r in rules if r not in RULES)]


def recipe(base: Config, variant: str, seed: int) -> Config:
    """The run of a variant."""
    own = VARIANTS.get(variant, Variant(variant, "", variant))
    decay = 1e-4 if variant == "bp" else 0.0
    return base.vary(rule=own.rule, seed=seed, weight_decay=decay, **parse_options(own.options))


def variant_of(config: Config) -> str:
    """The variant that a run is."""
    known = {(v.rule, format_options(parse_options(v.options))): name for name, v in VARIANTS.items()}
    return known.get((config.rule, config.options), config.rule)


def swept(config: Config) -> dict[str, Any]:
    """The columns that name a run's place: ``variant``."""
    return {"variant": variant_of(config)}


EXPERIMENT = Experiment(
    "Accuracy of feedback alignment in a convolutional network", "p1", "11_fa_accuracy", RULES, grid, small=True,
    swept=swept, labels=LABELS,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

SET_UP = """Architecture 1 of Moskovitz, Litwin-Kumar & Abbott (2018) learns CIFAR-10 in crops of 24x24 pixels, in the
set-up of Lance & Kieu (2026), for the paper's own is not known."""
BFLOAT16 = " Forward and backward passes are in bfloat16."
SCALED = " Eight epochs in place of 50."
BARS = "Bars and bands: +/- 1 sd over seeds."

TEXT = """ a: accuracy on the 10,000 test images by epoch. b: test accuracy after the epoch of the best validation
accuracy, a dot a seed."""
CAPTION = f"{SET_UP}{BFLOAT16}{TEXT} Hollow: Lance & Kieu's, one seed. {BARS}"
SMALL_CAPTION = f"{SET_UP}{SCALED}{TEXT} {BARS}"


@plot.style()
def draw(page: Page) -> Figure:
    """a: test accuracy by epoch; b: that of the best validation epoch."""
    table = page.table()
    fig, ax = plot.figure("ab", height=2.9, width_ratios=(1.25, 1))
    rows = table[(table.metric == "test_accuracy") & (table.epoch > 0)]
    curves(ax["a"], rows, "epoch")
    ax["a"].xaxis.get_major_locator().set_params(integer=True)
    ax["a"].set(ylabel=plot.LABELS["test_accuracy"], ylim=(10, 100 if rows.value.max() > 80 else 80))
    ax["a"].legend(handles=key(rows.variant), loc="center right", bbox_to_anchor=(1, 0.41), ncols=2)
    metric = measured(table)
    finals(ax["b"], table[table.metric == metric], page.reference())
    ax["b"].set(ylabel=plot.LABELS[metric])
    plot.note(ax["b"], plot.repeats(table[table.metric == metric], ["variant"]) + " (dots)")
    plot.letters(ax.values())
    return fig


def measured(table: pd.DataFrame) -> str:
    """The accuracy that the figure compares: without validation images that of the last epoch."""
    return "chosen_test_accuracy" if "chosen_test_accuracy" in set(table.metric) else "test_accuracy"


def look(variant: str) -> dict[str, Any]:
    """Colour, marker and line of a variant: its rule's, dashed where the rule has another variant."""
    own = VARIANTS.get(variant, Variant(variant, "", variant))
    base = plot.look(own.rule)
    return {"color": base.color, "marker": base.marker, "ls": (0, own.dashes) if own.dashes else "-"}


def label(variant: str) -> str:
    """Name of a variant in legends and on axes."""
    return LABELS.get(variant) or plot.look(variant).label


def in_order(variants: Sequence[str] | pd.Series) -> list[str]:
    """The distinct variants in the order of the legend, unknown ones after them."""
    known = set(variants)
    return [v for v in VARIANTS if v in known] + sorted(known - set(VARIANTS))


def key(variants: Sequence[str] | pd.Series) -> list[Any]:
    """Legend handles of the variants."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=look(v)["color"], ls=look(v)["ls"], lw=1.1, label=label(v)) for v in in_order(variants)
    ]


def curves(ax: Axes, rows: pd.DataFrame, x: str) -> None:
    """A line a variant, mean and a band of +/- 1 sd over the rows that share ``x``."""
    for variant in in_order(rows.variant):
        own = look(variant)
        plot.curves(ax, rows[rows.variant == variant], x, "variant", {variant: own["color"]}, linestyle=own["ls"])


def by_layer(ax: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    """A line a variant over the layers, mean +/- 1 sd over seeds."""
    for variant in in_order(rows.variant):
        of_layer = rows[rows.variant == variant].groupby("layer").value.agg(["mean", "std"])
        of_layer = of_layer.loc[[n for n in names if n in of_layer.index]]
        line = {"ms": 2.6, "lw": 0.9, "elinewidth": 0.7} | look(variant)
        ax.errorbar([list(names).index(n) for n in of_layer.index], of_layer["mean"], of_layer["std"], **line)
    ax.set(xticks=range(len(names)), xlim=(-0.3, len(names) - 0.7), xlabel="")
    ax.set_xticklabels(names)


def finals(ax: Axes, rows: pd.DataFrame, reference: pd.DataFrame) -> None:
    """Last values, a column a variant: seeds as dots, mean +/- 1 sd, published ones hollow."""
    rows = rows[rows.epoch == rows.epoch.max()]
    names = in_order(rows.variant if len(rows) else reference.get("variant", []))
    for i, variant in enumerate(names):
        own, values = look(variant), rows[rows.variant == variant].value
        theirs = reference[reference.variant == variant] if len(reference) else reference
        if len(values):
            ax.plot(np.full(len(values), i - 0.25), values, ".", color=own["color"], ms=2.5, alpha=0.45, mew=0)
            sd = values.std() if len(values) > 1 else None
            line = {"fmt": own["marker"], "color": own["color"], "ms": 3.8, "elinewidth": 0.9, "capsize": 1.6}
            ax.errorbar(i, values.mean(), sd, **line)
        plot.published(ax, [i + 0.25] * len(theirs), theirs.value, own["color"], own["marker"])
    ax.set(xticks=range(len(names)), xlim=(-0.6, max(len(names) - 0.4, 0.6)))
    ax.set_xticklabels([label(v) for v in names], rotation=40, ha="right", rotation_mode="anchor")
    ax.tick_params(axis="x", length=0)


def accuracies(page: Page) -> str:
    """Table of the accuracies of panel b: our mean, sd and n, and the published value."""
    return page.compare(measured(page.table()), by=("variant",))


def layer_table(page: Page, metric: str, epoch: float | None = None) -> str:
    """Table of a layer metric, mean over seeds, a row a variant; at the last epoch if none is given."""
    table = page.table()
    rows = table[(table.metric == metric) & (table.epoch == (table.epoch.max() if epoch is None else epoch))]
    if rows.empty:
        return tables.several(f"no {metric} yet")
    names = rows.sort_values("depth").layer.unique()
    means = rows.pivot_table(index="variant", columns="layer", values="value").loc[in_order(rows.variant), names]
    means.index = pd.Index([label(v) for v in means.index])
    return tables.shown(means.rename_axis(columns=None), float_format="{:.2f}".format, na_rep="-")
