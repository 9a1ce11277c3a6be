"""p3, Figure 4: accuracy and alignment of ResNet-20 on CIFAR-10. Its paper mode wants a GPU."""

from __future__ import annotations

from dataclasses import replace

from fa.experiments.experiment import Experiment
from fa.experiments.p3_fig2 import DECAYED, OPTIONS
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")  # kp is ours, the paper's figure leaves it out


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, precision: str = "") -> list[Config]:
    """The authors' configuration; quick: ResNet-8 on digits, one seed, images as they are (a crop would cut 8x8 digits off).

    Product feedback is implicit: exact here, for W and R share SGD's learning rate, momentum and decay, and cheaper, for a convolution
    then multiplies two matrices of its outputs by its outputs where the population has ten times as many units. Paper mode runs
    forward and backward pass in bfloat16, the authors all in float32; weights, optimizer and measurements are in float32.
    """
    quick = mode == "quick"
    epochs = epochs or (5 if quick else 250)
    first, runs = 0.05 if quick else 0.005, []  # either leaves about a sixth of the mismatch after the first epoch
    for seed in range(seeds or (1 if quick else 5)):
        for rule in rules:
            runs.append(Config(
                "p3_fig4", rule, seed, OPTIONS.get(rule, ""), dataset or ("digits" if quick else "cifar10"),
                model="resnet8" if quick else "resnet20", hidden="", epochs=epochs, batch=32 if quick else 128,
                lr=0.1 if rule != "dfa" else 0.01 if quick else 0.001,
                lr_drops=",".join(str(max(epochs * e // 250, 1)) for e in (100, 150, 200)), lr_factor=0.1,
                first_weight_decay=first if rule in DECAYED else 0.0, augment=not quick,
                precision=precision or ("float32" if quick else "bfloat16"),
            ))  # fmt: skip
    return runs


def small(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """The same recipe with 8 layers in place of 20, on images of 16x16 pixels, in 15 epochs, the drops to scale, three seeds.

    The 351 steps of an epoch and the decay of the first are the paper's, so that as much of the mismatch is left after it as there.
    In float32, for processors without bfloat16. Quick: as the figure's.
    """
    if mode == "quick":
        return [replace(c, experiment="p3_fig4_small") for c in grid(mode, rules, seeds, epochs, dataset)]
    plain = grid(mode, rules, seeds or 3, epochs or 15, dataset or "cifar10-16", "float32")
    return [replace(c, experiment="p3_fig4_small", model="resnet8") for c in plain]


SMALL = Experiment(
    "p3_fig4_small", "Accuracy and alignment on CIFAR-10 at 16x16", "p3", "34_pfa_fig4_cifar10", RULES, small
)
EXPERIMENT = Experiment(
    "p3_fig4", "Accuracy and alignment on CIFAR-10", "p3", "34_pfa_fig4_cifar10", RULES, grid, {"precision": ""}
)
