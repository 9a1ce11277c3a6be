"""p1's rules on Architecture 1 and CIFAR-10: test accuracy under backprop, random and sign-concordant feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from fa import plot
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

PAPER = Config(
    "bp", 0, dataset="cifar10-24", model="arch1", hidden="", epochs=50, batch=128, lr=1e-3, lr_drops="",
    optimizer="adam", weight_decay=0.0, augment=True, weights="torch", first_steps="1,2,4,8,16,32,64,128,256", keep=True,
)  # fmt: skip
SMALL = PAPER.vary(epochs=8, first_steps="2,8,32,128")
QUICK = PAPER.vary(dataset="digits", model="arch1-same", epochs=4, batch=32, augment=False, first_steps="2,8,32")
SEEDS = {"paper": 3, "small": 3, "quick": 1}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """The set-up of Lance & Kieu (2026) with the hyperparameters that they chose, for they are not known of p1.

    Adam at a constant rate of 0.001; PyTorch's initial weights; decay 1e-4 for backprop, none else; feedback of standard
    deviation 0.01 for fa and 0.1 for frsf. Theirs is normal, ours uniform. brsf is as frsf, DFA's feedback is Nokland's;
    neither is in their paper. The validation images are ours.

    Small: 8 epochs in place of 50, layers measured at fewer steps of the first. Quick: digits, 4 epochs, one seed, with
    padded convolutions, as 8x8 pixels are too few without, and images as they are.
    """
    base = {"paper": PAPER, "small": SMALL, "quick": QUICK}[mode]
    base = base.vary(epochs=epochs or base.epochs)
    if dataset:
        small = dataset not in ("cifar10", "cifar10-24", "imagenet")
        base = base.vary(dataset=dataset, model="arch1-same" if small else "arch1")
    return [recipe(base, variant, seed) for seed in range(seeds or SEEDS[mode]) for variant in of(rules)]


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
    swept=swept,
)  # fmt: skip
