"""p3's sparse feedback (authors' ``exp_configs/mnist_ffn2_bsparse_sgd``): accuracy on MNIST by feedback density."""

from __future__ import annotations

from typing import Any

from fa.experiments import Experiment, p3_fig2
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "pfa_o", "kp", "pfa")  # pfa last: sparse, it has no form without its population

DENSITIES = (0.05, 0.1, 0.17, 0.3, 0.5, 1.0)  # authors' script
QUICK = (0.1, 0.3, 1.0)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, **own: Any) -> list[Config]:
    """Figure 2's recipe with masks on the feedback; runs at density 1, and bp, are its own. Quick: three densities."""
    quick = mode == "quick"
    runs = []
    for config in p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (20 if quick else 0), dataset):
        implicit = "first" if config.rule_options.get("implicit") else None
        for density in (DENSITIES if not quick else QUICK) if config.rule != "bp" else (1.0,):
            runs.append(config if density == 1 else config.vary(implicit=implicit, density=density))
    return runs


EXPERIMENT = Experiment(
    "Sparse feedback on MNIST", "p3", "36_pfa_sparse", RULES, grid,
    swept=lambda config: {"density": config.rule_options.get("density", 1.0)},
)  # fmt: skip
