"""p3, Figure 5: ResNet-18 on ImageNet, for whoever has ImageNet and a GPU; and a small stand-in that a CPU trains in half an hour."""

from __future__ import annotations

from dataclasses import replace

from fa.experiments import p3_fig4
from fa.experiments.experiment import Experiment
from fa.experiments.p3_fig2 import DECAYED, OPTIONS
from fa.train.config import Config
from fa.train.data import SETS, ImageFolderSource

RULES = ("bp", "usf", "pfa", "pfa_o")


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, precision: str = "bfloat16"
) -> list[Config]:
    """The authors' configuration, one seed (the paper's is 2021, ours 0); quick: Figure 4's, or the stand-in's on photographs.

    The authors train under float16 autocast with a scaled loss; bfloat16 is its like that needs no scaling.
    """
    if mode == "quick":
        if isinstance(SETS.get(dataset), ImageFolderSource):
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
