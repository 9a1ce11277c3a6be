"""p3, Figure 4: accuracy and alignment of ResNet-20 on CIFAR-10. Its paper mode wants a GPU; its small mode fits two CPU cores."""

from __future__ import annotations

from fa.experiments import Experiment, of_rules
from fa.experiments.p3_fig2 import DECAYED, OPTIONS
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")  # kp is ours, the paper's figure leaves it out

PAPER = Config(
    "bp", 0, dataset="cifar10", model="resnet20", hidden="", epochs=250, batch=128, lr=0.1, lr_factor=0.1, augment=True,
    precision="bfloat16",
)  # fmt: skip
SMALL = PAPER.vary(dataset="cifar10-16", model="resnet8", epochs=15, precision="float32")
QUICK = PAPER.vary(dataset="digits", model="resnet8", epochs=5, batch=32, augment=False, precision="float32")
SEEDS = {"paper": 5, "small": 3, "quick": 1}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, precision: str = "") -> list[Config]:
    """The authors' configuration.

    Product feedback is implicit: exact here, for W and R share SGD's learning rate, momentum and decay, and cheaper, for a convolution
    then multiplies two matrices of its outputs by its outputs where the population has ten times as many units. Paper mode runs
    forward and backward pass in bfloat16, the authors all in float32; weights, optimizer and measurements are in float32.

    Small: 8 layers in place of 20, images of 16x16 pixels, 15 epochs, three seeds; float32, for processors without bfloat16. The 351 steps of
    an epoch and the decay of the first epoch are the paper's, so that the first epoch leaves the paper's share of the mismatch.
    Quick: ResNet-8 on digits, one seed, images as they are (a crop would cut 8x8 digits off).
    """
    base = {"paper": PAPER, "small": SMALL, "quick": QUICK}[mode]
    quick, n = mode == "quick", epochs or base.epochs
    base = base.vary(epochs=n, dataset=dataset or base.dataset, precision=precision or base.precision)
    base = base.vary(lr_drops=",".join(str(max(n * e // 250, 1)) for e in (100, 150, 200)))  # the paper's, to scale
    decay = dict(
        first_weight_decay=0.05 if quick else 0.005
    )  # either leaves about a sixth of the mismatch after the first epoch
    of_rule = {rule: dict(options) | (decay if rule in DECAYED else {}) for rule, options in OPTIONS.items()}
    of_rule["dfa"]["lr"] = 0.01 if quick else 0.001
    return of_rules(base, rules, seeds or SEEDS[mode], of_rule)


EXPERIMENT = Experiment(
    "Accuracy and alignment on CIFAR-10", "p3", "34_pfa_fig4_cifar10", RULES, grid, own={"precision": ""}, small=True
)
