"""Across the papers: does bfloat16 change a result? p3's MNIST recipe under seven rules, in both precisions."""

from __future__ import annotations

from fa.experiments import Experiment, p3_fig2
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")
PRECISIONS = ("float32", "bfloat16")


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 2's recipe in both precisions; the runs in float32 are its own. Quick: two seeds, 10 epochs.

    Only the arithmetic of forward and backward pass differs: weights, feedback, momenta, weight decay and every measurement are in
    float32 (angles in float64), and one seed has the same initial weights, feedback and batches in both.
    """
    quick = mode == "quick"
    plain = p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (10 if quick else 0), dataset)
    return [c.vary(precision=p) for c in plain for p in PRECISIONS]


def precision_of(config: Config) -> dict[str, str]:
    """The swept column."""
    return {"precision": config.precision}


EXPERIMENT = Experiment(
    "Learning curves in bfloat16 and float32", "x", "40_precision_bf16", RULES, grid, swept=precision_of
)
