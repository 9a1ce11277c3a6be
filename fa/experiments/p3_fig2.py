"""p3, Figure 2: accuracy and alignment on MNIST, and the recipe that p3's other MNIST figures share."""

from __future__ import annotations

from typing import Any

from fa.experiments import Experiment, of_rules
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "pfa", "pfa_o")

PAPER = Config("bp", 0)  # MNIST, 784-512-512-10, the authors' configuration: the defaults of Config
QUICK = PAPER.vary(dataset="digits", hidden="64,64", epochs=30, lr=0.05)

OPTIONS = {  # authors' configurations: Xavier everywhere; SF is uniform with the Xavier standard deviation; lambda = 10
    "fa": dict(init="xavier"),
    "dfa": dict(init="xavier"),
    "usf": dict(scale="xavier"),
    "kp": dict(init="xavier"),
    "pfa": dict(init="xavier", expansion=10, implicit=True),
    "pfa_o": dict(init="xavier", implicit=True),
}
DECAYED = ("kp", "pfa", "pfa_o")  # strong decay in the first epoch, so that the feedback aligns; kp so by our choice


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, expansion: int = 10, **own: Any
) -> list[Config]:
    """The authors' configuration; quick: digits, three seeds, and the first epoch's decay over fewer steps."""
    quick = mode == "quick"
    base = QUICK if quick else PAPER
    base = base.vary(dataset=dataset or base.dataset, epochs=epochs or base.epochs)
    if base.epochs != PAPER.epochs:
        base = base.vary(lr_drops=f"{base.epochs // 2},{base.epochs * 3 // 4}")
    decay = dict(weight_decay=9e-5, first_weight_decay=0.2 if quick else 0.03)
    of_rule = {rule: dict(options) | (decay if rule in DECAYED else {}) for rule, options in OPTIONS.items()}
    of_rule["pfa"]["expansion"] = expansion
    return of_rules(base, rules, seeds or (3 if quick else 5), of_rule)


EXPERIMENT = Experiment(
    "Accuracy and alignment on MNIST", "p3", "32_pfa_fig2_mnist", RULES, grid, own={"expansion": 10}
)
