"""Across the papers: does bfloat16 change a result? p3's MNIST recipe under seven rules, its CIFAR-10 recipe under four, in both."""

from __future__ import annotations

from dataclasses import replace

from fa.experiments import p3_fig2, p3_fig4
from fa.experiments.experiment import Experiment
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")

CIFAR_RULES = ("bp", "usf", "pfa", "pfa_o")

PRECISIONS = ("float32", "bfloat16")


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 2's recipe in both precisions; the runs in float32 are its own. Quick: two seeds, 10 epochs.

    Only the arithmetic of forward and backward pass differs: weights, feedback, momenta, weight decay and every measurement are in
    float32 (angles in float64), and one seed has the same initial weights, feedback and batches in both.
    """
    quick = mode == "quick"
    plain = p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (10 if quick else 0), dataset)
    whole = [replace(c, experiment="x_precision" if quick else "p3_fig2") for c in plain]
    return [
        replace(c, experiment=c.experiment if p == "float32" else "x_precision", precision=p)
        for c in whole
        for p in PRECISIONS
    ]


def cifar(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 4's recipe in both precisions, one seed; all runs are that figure's own. Quick: two epochs, and of these four rules BP and PFA."""
    quick = mode == "quick"
    rules = ("bp", "pfa") if quick and rules == CIFAR_RULES else rules
    plain = [p3_fig4.grid(mode, rules, seeds or 1, epochs or (2 if quick else 0), dataset, p) for p in PRECISIONS]
    return [c for pair in zip(*plain) for c in pair]


EXPERIMENT = Experiment(
    "x_precision", "Learning curves in bfloat16 and float32", "x", "40_precision_bf16", RULES, grid,
    swept=lambda config: {"precision": config.precision},
)  # fmt: skip
CIFAR = Experiment(
    "x_precision_cifar",
    "ResNet-20 in bfloat16 and float32",
    "x",
    "40_precision_bf16",
    CIFAR_RULES,
    cifar,
    swept=EXPERIMENT.swept,
)
