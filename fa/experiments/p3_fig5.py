"""p3, Figure 5: ResNet-18 on ImageNet, for whoever has ImageNet and a GPU; and a small stand-in that a CPU trains in half an hour."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fa import models, plot, theory
from fa.experiments import p3_fig4
from fa.experiments.experiment import Experiment
from fa.experiments.p3_fig2 import DECAYED, OPTIONS, layer_grid
from fa.train import data
from fa.train.config import Config
from fa.train.data import SETS, Album
from fa.train.loop import weighted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Notebook

RULES = ("bp", "usf", "pfa", "pfa_o")


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, precision: str = "bfloat16"
) -> list[Config]:
    """The authors' configuration, one seed (the paper's is 2021, ours 0); quick: Figure 4's, or the stand-in's on photographs.

    The authors train under float16 autocast with a scaled loss; bfloat16 is its like that needs no scaling.
    """
    if mode == "quick":
        if isinstance(SETS.get(dataset), Album):
            return [
                replace(c, experiment="p3_fig5", dataset=dataset)
                for c in stand_in("paper", rules, seeds, epochs or 2, "")
            ]
        return [replace(c, experiment="p3_fig5") for c in p3_fig4.grid(mode, rules, seeds, epochs, dataset)]
    n = epochs or 75
    return [Config(
        "p3_fig5", rule, seed, OPTIONS.get(rule, ""), dataset or "imagenet", model="resnet18", hidden="", epochs=n, batch=256, lr=0.1,
        lr_drops=_drops(n), lr_factor=0.1, first_weight_decay=5e-4 if rule in DECAYED else 0.0, augment=True, precision=precision,
    ) for seed in range(seeds or 1) for rule in rules]  # fmt: skip


def stand_in(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """ResNet-18 on 2,000 photographs of 20 classes, scaled to 32x32: 800 steps of 25 images in place of 375,000 of 256.

    The learning rate drops as in the paper, to scale. With 80 steps an epoch in place of 5,004, the first epoch's decay that leaves about as
    much of PFA's mismatch as the paper's 5e-4 is 50 times as strong; later decay is 5e-4 under every rule. Both are our choice.
    """
    if mode == "quick":
        return grid(mode, rules, seeds, epochs, dataset)
    n = epochs or 10
    return [Config(
        "p3_fig5_standin", rule, seed, OPTIONS.get(rule, ""), dataset or "tiny-imagenet-20", model="resnet18", hidden="", epochs=n,
        batch=25, lr=0.1, lr_drops=_drops(n), lr_factor=0.1, weight_decay=5e-4, first_weight_decay=0.025 if rule in DECAYED else 0.0,
        augment=True,
    ) for seed in range(seeds or 1) for rule in rules]  # fmt: skip


def _drops(epochs: int) -> str:
    """The paper's drops after epochs 20, 40 and 60 of 75, to scale."""
    return ",".join(str(max(round(epochs * e / 75), 1)) for e in (20, 40, 60))


EXPERIMENT = Experiment(
    "p3_fig5",
    "Accuracy and alignment on ImageNet",
    "p3",
    "35_pfa_fig5_imagenet",
    RULES,
    grid,
    {"precision": "bfloat16"},
)
STAND_IN = Experiment("p3_fig5_standin", "A small stand-in for ImageNet", "p3", "35_pfa_fig5_imagenet", RULES, stand_in)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Li & Benna (2024), Figure 5, replicated. ResNet-18 learns ImageNet. a, b: top-1 accuracy on the 50,000
validation images, by epoch and after the last. c: angle between each layer's weight W and the feedback that carries
the error in its place, and ratio of their norms, a line a layer. d, e: the same after training, by depth, and mean
and range of the layers; dotted: arccos(1/sqrt(1 + 1/10)). Filled and lines: ours, mean +/- 1 sd over seeds where
there are several. Hollow: the paper's, one run (seed 2021); its PFA-o stops after 66 epochs."""

STAND_IN_CAPTION = """Stand-in for Li & Benna (2024), Figure 5; not ImageNet. ResNet-18 learns 20 classes from 2,000
photographs of 32x32 pixels in 10 epochs. a, b: accuracy on 500 validation images, by epoch and after the last; chance
is 5 percent. c: angle between each layer's weight W and the feedback that carries the error in its place, and ratio
of their norms, a line a layer. d, e: the same after training, by depth, and mean and range of the layers; dotted:
arccos(1/sqrt(1 + 1/10)). One seed a rule, so that there are no error bars."""


def stand_in_of(page: Notebook) -> Notebook:
    """The stand-in on the page of Figure 5: trained in paper mode where its photographs are, else as recorded."""
    trained = page.mode == "paper" and SETS["tiny-imagenet-20"].state(data.root()) == "yes"
    return page.part("p3_fig5_standin", mode="paper" if trained else "record")


@plot.style()
def draw(page: Notebook) -> Figure:
    """Figure 5 or the stand-in: a, b: accuracy by epoch and after the last; c: layers by epoch; d, e: layers by depth."""
    table, paper, metric = page.table(), page.reference(), accuracy_of(page)
    fig, ax, rules = p3_fig4.frame(table, ["a", "a", "b"], ["d", "e"])
    plot.accuracy(ax["a"], table, paper[paper.epoch.isin([1, 2, 6, 11, 20, 31, 40, 51, 60, 66, 75])], metric)
    plot.rule_key(ax["a"], [*table.rule, *paper.rule])
    ax["a"].set(xlim=(0, 1.04 * (table.epoch.max() if len(table) else 75)))
    plot.finals(ax["b"], table, paper, metric)
    ax["b"].set_ylabel(plot.LABELS[metric])
    plot.note(ax["b"], f"last epoch, n = {table.seed.nunique()} seed(s)" if len(table) else "last epoch, n = 1 seed")
    layer_grid(ax, table, rules, paper)
    names = list(weighted(models.build("resnet18", (3, 224, 224), 1000)))
    for panel, of in (("d", "angle_deg"), ("e", "norm_ratio")):
        p3_fig4.by_depth(ax[panel], table, of, names, paper)
    ax["d"].axhline(round(float(theory.path_angle(10)), 2), color="0.3", lw=0.7, ls=":", zorder=0)
    ax["d"].set(ylim=(-3, 92), yticks=(0, 30, 60, 90))
    ax["e"].set(ylim=(0, 3))
    for panel, letter in {**dict(zip("abde", "abde")), **{f"angle_deg {r}": "c" for r in rules[:1]}}.items():
        plot.letters([ax[panel]], letter)
    if page.experiment == "p3_fig5_standin":
        plot.stamp(fig, "stand-in: 2,000 photographs at 32x32, not ImageNet")
    return fig


def accuracy_of(page: Notebook) -> str:
    """The accuracy that is drawn: of the validation images, or of the test images of digits."""
    table = page.table()
    return "val_accuracy" if "val_accuracy" in set(table.metric) or table.empty else "test_accuracy"


def accuracies(page: Notebook) -> str:
    """Text tables of the accuracy after the last epoch, and after epoch 66, the last of the paper's PFA-o."""
    metric = accuracy_of(page)
    told = [plot.LABELS[metric], page.compare(metric)]
    return "\n".join(told + (["after epoch 66", page.compare(metric, epoch=66)] if page.mode != "quick" else []))


def stand_in_alignment(page: Notebook) -> str:
    """Text tables of the stand-in's angle and norm ratio after training: mean, smallest and largest layer."""
    table, told = page.table(), []
    for of in ("angle_deg", "norm_ratio"):
        found = p3_fig4.over_layers(table, of)[["mean", "min", "max"]]
        told += [f"stand-in, not ImageNet: {plot.LABELS[of]} after training; mean, smallest, largest of the layers"]
        told += [p3_fig4.shown(found) if len(table) else "nothing yet"]
    return "\n".join(told)
