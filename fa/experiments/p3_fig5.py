"""p3, Figure 5: ResNet-18 on ImageNet, for whoever has ImageNet and a GPU; its small mode is a stand-in that a CPU
trains within an hour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fa import models, plot, tables, theory
from fa.experiments import Experiment, of_rules, p3_fig4
from fa.experiments.p3_fig2 import DECAYED, OPTIONS, layer_grid
from fa.metrics import linear_layers
from fa.train.config import Config
from fa.train.data import SETS, ImageFolderSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Page


RULES = ("bp", "usf", "pfa", "pfa_o")

PAPER = Config(
    "bp", 0, dataset="imagenet", model="resnet18", hidden="", epochs=75, batch=256, lr=0.1, lr_factor=0.1, augment=True,
    precision="bfloat16",
)  # fmt: skip
SMALL = PAPER.vary(dataset="tiny-imagenet-20", epochs=10, batch=25, weight_decay=5e-4, precision="float32")


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, precision: str = "") -> list[Config]:
    """The authors' configuration, one seed (the paper's is 2021, ours 0); the learning rate drops after 20, 40 and 60
    of 75 epochs.

    The authors train under float16 autocast with a scaled loss; bfloat16 is its like that needs no scaling.

    Small: 2,000 photographs of 20 classes, scaled to 32x32, 800 steps of 25 images in place of 375,000 of 256, the
    drops to scale. With 80 steps an epoch in place of 5,004, the first epoch's decay is 50 times as strong and leaves
    about the paper's share of PFA's mismatch; later decay is 5e-4 under every rule. Both are our choice. Quick: Figure
    4's, or the small mode's on photographs.
    """
    photographs = isinstance(SETS.get(dataset), ImageFolderSource)
    if mode == "quick" and not photographs:
        return p3_fig4.grid(mode, rules, seeds, epochs, dataset, precision)
    base = PAPER if mode == "paper" else SMALL
    n = epochs or (2 if mode == "quick" else base.epochs)
    drops = ",".join(str(max(round(n * e / 75), 1)) for e in (20, 40, 60))
    base = base.vary(epochs=n, lr_drops=drops, dataset=dataset or base.dataset, precision=precision or base.precision)
    decay = dict(first_weight_decay=5e-4 if mode == "paper" else 0.025)
    of_rule = {rule: dict(options) | (decay if rule in DECAYED else {}) for rule, options in OPTIONS.items()}
    return of_rules(base, rules, seeds or 1, of_rule)


EXPERIMENT = Experiment(
    "Accuracy and alignment on ImageNet", "p3", "35_pfa_fig5_imagenet", RULES, grid, own={"precision": ""}, small=True
)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Li & Benna (2024), Figure 5, replicated. ResNet-18 learns ImageNet. a, b: top-1 accuracy on the 50,000
validation images, by epoch and after the last. c: angle between each layer's weight W and the feedback that carries
the error in its place, and ratio of their norms, a line a layer. d, e: the same after training, by depth, and mean
and range of the layers; dotted: arccos(1/sqrt(1 + 1/10)). Filled and lines: ours, mean +/- 1 sd over seeds where
there are several. Hollow: the paper's, one run (seed 2021); its PFA-o stops after 66 epochs."""

SMALL_CAPTION = """In place of ImageNet, which Li & Benna (2024), Figure 5, is about: ResNet-18 learns 20 classes from
2,000 photographs of 32x32 pixels in 10 epochs. a, b: accuracy on 500 validation images, by epoch and after the last;
chance is 5 percent. c: angle between each layer's weight W and the feedback that carries the error in its place, and
ratio of their norms, a line a layer. d, e: the same after training, by depth, and mean and range of the layers;
dotted: arccos(1/sqrt(1 + 1/10)). One seed a rule, so that there are no error bars."""


@plot.style()
def draw(page: Page) -> Figure:
    """a, b: accuracy by epoch and after the last; c: layers by epoch; d, e: layers by depth."""
    table, paper, metric = page.table(), page.reference(), accuracy_of(page)
    fig, ax, rules = p3_fig4.frame(table, ["a", "a", "b"], ["d", "e"])
    plot.accuracy(ax["a"], table, paper[paper.epoch.isin([1, 2, 6, 11, 20, 31, 40, 51, 60, 66, 75])], metric)
    plot.rule_key(ax["a"], [*table.rule, *paper.rule])
    ax["a"].set(xlim=(0, 1.04 * (table.epoch.max() if len(table) else 75)))
    plot.finals(ax["b"], table, paper, metric)
    ax["b"].set_ylabel(plot.LABELS[metric])
    n = table.seed.nunique() or 1
    plot.note(ax["b"], f"last epoch, n = {n} seed{'s' * (n > 1)}")
    layer_grid(ax, table, rules, paper)
    names = list(linear_layers(models.build("resnet18", (3, 224, 224), 1000)))
    for panel, of in (("d", "angle_deg"), ("e", "norm_ratio")):
        p3_fig4.by_depth(ax[panel], table, of, names, paper)
    ax["d"].axhline(round(float(theory.path_angle(10)), 2), color="0.3", lw=0.7, ls=":", zorder=0)
    ax["d"].set(ylim=(-3, 92), yticks=(0, 30, 60, 90))
    ax["e"].set(ylim=(0, 3))
    for panel, letter in {**dict(zip("abde", "abde")), **{f"angle_deg {r}": "c" for r in rules[:1]}}.items():
        plot.letters([ax[panel]], letter)
    if page.trained == "small":
        plot.stamp(fig, "stand-in: 2,000 photographs at 32x32, not ImageNet")
    return fig


def accuracy_of(page: Page) -> str:
    """The accuracy that is drawn: of the validation images, or of the test images of digits."""
    table = page.table()
    return "val_accuracy" if "val_accuracy" in set(table.metric) or table.empty else "test_accuracy"


def accuracies(page: Page) -> str:
    """Tables of the accuracy after the last epoch, and after epoch 66, the last of the paper's PFA-o."""
    metric = accuracy_of(page)
    told = [plot.LABELS[metric], page.compare(metric)]
    told += ["after epoch 66", page.compare(metric, epoch=66)] if page.trained == "paper" else []
    return tables.several(*told)
