"""For every figure, its grid of runs in each mode.

An experiment's name is also that of its figure, its record and the prefix of its claims. ``plan`` turns a mode and the few parameters of
a notebook into runs; :mod:`fa.campaign` trains those that are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import hashlib
import json
import pandas as pd
import torch

from . import data, rules
from .errors import UserError
from .layers import generator
from .rules import RULES, bernoulli, mix, uniform
from .metrics import angle
from .train import Config, train


@dataclass(frozen=True)
class Experiment:
    """A figure's grid.

    Args:
        name: of figure, record, claims.
        title: one line.
        paper: "p1", "p2" or "p3".
        notebook: stem of the file in notebooks/.
        rules: the figure's rules, in the order of its legend.
        grid: (mode, rules, seeds, epochs, dataset, own parameters) -> runs; 0 and "" stand for the mode's own.
        own: parameters of the notebook beside the common ones, with their defaults.
        run: what makes one run's table.
    """

    name: str
    title: str
    paper: str
    notebook: str
    rules: tuple[str, ...]
    grid: Callable[..., list[Any]]
    own: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., pd.DataFrame | None] = train


# ------------------------------------------------------------------------------------ p3, Figure 2

P3_RULES = ("bp", "fa", "dfa", "usf", "pfa", "pfa_o")

P3_OPTIONS = {  # authors' configurations: Xavier everywhere; SF is uniform with the Xavier standard deviation; lambda = 10
    "fa": "init=xavier",
    "dfa": "init=xavier",
    "usf": "scale=xavier",
    "kp": "init=xavier",
    "pfa": "init=xavier expansion=10 implicit=true",
    "pfa_o": "init=xavier implicit=true",
}

P3_DECAYED = ("kp", "pfa", "pfa_o")  # strong decay in the first epoch, so that the feedback aligns; kp so by our choice


def _p3_fig2(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, expansion: int = 10, **own: Any
) -> list[Config]:
    """MNIST, 784-512-512-10, the set-up of p3 section 5; quick: digits, three seeds, and the first epoch's decay over fewer steps."""
    quick = mode == "quick"
    epochs = epochs or (40 if not quick else 30)
    runs = []
    for seed in range(seeds or (3 if quick else 5)):  # seeds outermost: a campaign that is cut short has whole seeds
        for rule in rules:
            options = P3_OPTIONS.get(rule, "").replace("expansion=10", f"expansion={expansion}")
            decayed = rule in P3_DECAYED
            runs.append(Config(
                "p3_fig2", rule, seed, options, dataset or ("digits" if quick else "mnist"),
                hidden="512,512" if not quick else "64,64", epochs=epochs,
                lr=0.01 if not quick else 0.05,
                lr_drops="20,30" if epochs == 40 else f"{epochs // 2},{epochs * 3 // 4}",
                weight_decay=9e-5 if decayed else 1e-4,
                first_weight_decay=(0.03 if not quick else 0.2) if decayed else 0.0,
            ))  # fmt: skip
    return runs


EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "p3_fig2", "Accuracy and alignment on MNIST", "p3", "32_pfa_fig2_mnist", P3_RULES, _p3_fig2, {"expansion": 10}
        ),
    )
}
"""Name -> experiment."""


MODES = ("record", "quick", "paper")


def plan(
    experiment: str, mode: str, seeds: int = 0, epochs: int = 0, rules: str = "", dataset: str = "", **own: Any
) -> list[Any]:
    """The runs of an experiment.

    Args:
        experiment: a name of :data:`EXPERIMENTS`.
        mode: "quick" or "paper".
        seeds: number of seeds (0: the mode's own).
        epochs: number of epochs (0: the mode's own).
        rules: comma separated names of ``fa.RULES`` ("": the figure's).
        dataset: a name of ``fa.data.SETS`` ("": the mode's own).
        own: the experiment's own parameters.

    Raises:
        UserError: anything unknown; the sentence names the known ones.
    """
    e = find(experiment)
    if mode not in MODES[1:]:
        raise UserError(f"unknown mode {mode!r} to train in; known modes: quick, paper")
    if seeds < 0 or epochs < 0:
        raise UserError(f"seeds={seeds} and epochs={epochs} must not be negative; 0 stands for the mode's own")
    names = tuple(r.strip() for r in rules.split(",") if r.strip()) or e.rules
    for name in names:
        if name not in RULES:
            raise UserError(f"unknown rule {name!r}; known rules: {', '.join(sorted(RULES))}")
    if dataset and dataset not in data.SETS:
        raise UserError(f"unknown data set {dataset!r}; known data sets: {', '.join(data.SETS)}")
    if unknown := set(own) - set(e.own):
        raise UserError(f"unknown parameter {unknown.pop()!r} of {experiment}; known: {', '.join(e.own) or 'none'}")
    return e.grid(mode, names, seeds, epochs, dataset, **own)


def find(experiment: str) -> Experiment:
    """The experiment of that name.

    Raises:
        UserError: there is none.
    """
    if experiment not in EXPERIMENTS:
        raise UserError(f"unknown experiment {experiment!r}; known experiments: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[experiment]
