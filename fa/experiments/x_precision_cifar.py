"""Across the papers: does bfloat16 change p3's result on CIFAR-10? Four rules, one seed, in both precisions."""

from __future__ import annotations

from fa.experiments import Experiment, p3_fig4
from fa.experiments.x_precision import PRECISIONS, precision_of
from fa.train.config import Config

RULES = ("bp", "usf", "pfa", "pfa_o")


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 4's recipe in both precisions, one seed; the runs in bfloat16 are its own. Quick: two epochs, and of the four rules BP and PFA."""
    quick = mode == "quick"
    rules = ("bp", "pfa") if quick and rules == RULES else rules
    plain = p3_fig4.grid(mode, rules, seeds or 1, epochs or (2 if quick else 0), dataset)
    return [c.vary(precision=p) for c in plain for p in PRECISIONS]


EXPERIMENT = Experiment("ResNet-20 in bfloat16 and float32", "x", "40_precision_bf16", RULES, grid, swept=precision_of)
