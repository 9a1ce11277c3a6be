"""Beyond p3, on MNIST: gradient angles, the decay of the first epoch, and how small the expansion may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fa.experiments import p3_fig2
from fa.experiments.experiment import Experiment
from fa.layers.hooks import converted
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")

DECAYS = (0.0, 0.003, 0.01, 0.1)  # of the first epoch, beside Figure 2's 0.03; 0: the later epochs'
EXPANSIONS = (0.25, 0.5, 1.0, 2.0, 5.0)  # beside Figure 2's 10
QUICK_DECAYS = (0.0, 0.02, 0.06)  # digits have 22 steps an epoch, not 937; beside the 0.2 of Figure 2's quick mode


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 2's runs, and short ones with another decay in the first epoch, or another expansion.

    Figure 2's schedule changes nothing in epochs 1 to 20, so that the first epochs of its runs belong to both series.
    """
    quick = mode == "quick"
    whole = p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (20 if quick else 0), dataset)
    runs = list(whole)
    for config in whole:
        if not seeds and config.seed >= 3:
            continue
        own = replace(config, experiment="p3_beyond")
        if config.rule in p3_fig2.DECAYED:
            # R as a matrix where that is cheap, so that what is left of the mismatch is measured on it
            options = config.options.replace(" implicit=true", "") if config.rule == "pfa_o" else config.options
            short = replace(own, options=options, epochs=min(4, config.epochs))
            runs += [replace(short, first_weight_decay=decay) for decay in (DECAYS if not quick else QUICK_DECAYS)]
        if config.rule == "pfa":
            short = replace(own, epochs=min(10, config.epochs))
            runs += [replace(short, options=config.options.replace("=10", f"={λ:g}")) for λ in EXPANSIONS]
    return runs


def left(config: Config, net: nn.Module, epoch: int) -> list[list[Any]]:
    """Rows of ``mismatch_left``: the share of R - B^T W that implicit feedback says is left."""
    layers = enumerate(converted(net).items(), 1)
    return [
        [epoch, name, depth, "mismatch_left", layer.feedback.c.item()]
        for depth, (name, layer) in layers
        if "c" in layer.feedback.names
    ]


def swept(config: Config) -> dict[str, float]:
    """Expansion (nan where the rule has none) and the first epoch's weight decay."""
    expansion = {"pfa_o": 1.0}.get(config.rule, float("nan"))
    decay = config.first_weight_decay or config.weight_decay
    return {"expansion": float(config.rule_options.get("expansion", expansion)), "decay": decay}


EXPERIMENT = Experiment(
    "p3_beyond", "Gradients, decay and expansion on MNIST", "p3", "37_pfa_beyond", RULES, grid, extra=left, swept=swept
)
