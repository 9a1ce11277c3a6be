"""Beyond p3, on CIFAR-10: how small the expansion may be before accuracy falls. Its paper mode wants a GPU."""

from __future__ import annotations

from dataclasses import replace

from ..train import Config
from . import p3_beyond, p3_fig2, p3_fig4
from .experiment import Experiment

EXPANSIONS = (1, 2, 3, 5, 10, 20, 50)
QUICK = (0.25, 1, 10)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 4's recipe in 100 epochs in place of 250, drops to scale; quick: Figure 2's on digits."""
    quick, runs = mode == "quick", []
    if quick:
        plain = p3_fig2.grid(mode, rules, seeds or 2, epochs or 12, dataset)
    else:
        plain = p3_fig4.grid(mode, rules, seeds or 3, epochs or 100, dataset)
    for config in plain:
        sizes = (EXPANSIONS if not quick else QUICK) if config.rule == "pfa" else (10,)
        options = [config.options.replace("=10", f"={λ:g}") for λ in sizes]
        runs += [replace(config, experiment="p3_beyond_cifar", options=o) for o in options]
    return runs


EXPERIMENT = Experiment(
    "p3_beyond_cifar", "Expansion and accuracy on CIFAR-10", "p3", "38_pfa_beyond_cifar10", ("bp", "pfa", "pfa_o"),
    grid, swept=lambda config: {"expansion": p3_beyond.swept(config)["expansion"]},
)  # fmt: skip
