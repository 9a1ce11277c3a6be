"""Beyond p3, on CIFAR-10: how small the expansion may be before accuracy falls. Its paper mode wants a GPU."""

from __future__ import annotations

from dataclasses import replace

from ..train import Config
from . import p3_fig2
from .experiment import Experiment

EXPANSIONS = (1, 2, 3, 5, 10, 20, 50)
QUICK = (0.25, 1, 10)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """p3's CIFAR-10 recipe (p3 section 5) in 100 epochs in place of 250, drops to scale; quick: Figure 2's on digits."""
    quick, runs = mode == "quick", []
    if quick:
        plain = p3_fig2.grid(mode, rules, seeds or 2, epochs or 12, dataset)
        plain = [replace(c, experiment="p3_beyond_cifar") for c in plain]
    else:
        n = epochs or 100
        recipe = Config(
            "p3_beyond_cifar", "bp", 0, dataset=dataset or "cifar10", model="resnet20", hidden="", epochs=n, batch=128, lr=0.1,
            lr_drops=",".join(str(n * e // 250) for e in (100, 150, 200)), lr_factor=0.1, augment=True,
        )  # fmt: skip
        decay = {rule: 0.005 if rule in p3_fig2.DECAYED else 0.0 for rule in rules}
        plain = [
            replace(recipe, rule=rule, seed=seed, options=p3_fig2.OPTIONS.get(rule, ""), first_weight_decay=decay[rule])
            for seed in range(seeds or 3) for rule in rules
        ]  # fmt: skip
    for config in plain:
        every = EXPANSIONS if not quick else QUICK
        sizes = [f"={λ:g}" for λ in every] if config.rule == "pfa" else ["=10"]
        runs += [replace(config, options=config.options.replace("=10", size)) for size in sizes]
    return runs


def swept(config: Config) -> dict[str, float]:
    """Expansion; 1 for pfa_o, nan where the rule has none."""
    expansion = {"pfa_o": 1.0}.get(config.rule, float("nan"))
    return {"expansion": float(config.rule_options.get("expansion", expansion))}


EXPERIMENT = Experiment(
    "p3_beyond_cifar", "Expansion and accuracy on CIFAR-10", "p3", "38_pfa_beyond_cifar10", ("bp", "pfa", "pfa_o"), grid, swept=swept
)
