"""p1's rules on Architecture 1: linear CKA of every layer with backprop's network; the networks are p1_accuracy's."""

from __future__ import annotations

import json
from typing import Any

from fa.experiments import Experiment, p1_accuracy
from fa.train.config import Config, canonical
from fa.train.similarity import Similarity


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Similarity]:
    """Every network of p1_accuracy with backprop's of the same seed, which shares its initial weights, and with one of
    another seed: 1 for seed 0, and the seed before for any other."""
    runs = p1_accuracy.grid(mode, rules, seeds, epochs, dataset)

    def backprop(run: Config, seed: int) -> str:
        return canonical(p1_accuracy.recipe(run.vary(options=""), "bp", seed))

    others = [(run, backprop(run, run.seed), backprop(run, run.seed - 1 if run.seed else 1)) for run in runs]
    return [Similarity(run.rule, run.seed, canonical(run), same, other) for run, same, other in others]


def swept(similarity: Similarity) -> dict[str, Any]:
    """The columns that name a network's place: ``variant``."""
    return p1_accuracy.swept(Config(**json.loads(similarity.network)))


EXPERIMENT = Experiment(
    "Representations of feedback alignment and of backprop", "p1", "17_fa_representations", p1_accuracy.RULES, grid,
    small=True, swept=swept,
)  # fmt: skip
