"""For every figure, its grid of runs in each mode: a module a figure, named as the figure is.

An experiment's name is also that of its figure, its record and the prefix of its claims. ``plan`` turns a mode and the few parameters of
a notebook into runs; :mod:`fa.results.runs` trains those that are missing.
"""

from __future__ import annotations

from typing import Any

from fa.errors import UserError
from fa.experiments import (
    p3_beyond,
    p3_beyond_cifar,
    p3_fig2,
    p3_fig3,
    p3_fig4,
    p3_fig5,
    p3_sparse,
    p3_table1,
    x_precision,
)
from fa.experiments.experiment import Experiment
from fa.rules import RULES
from fa.train import data

__all__ = ["EXPERIMENTS", "Experiment", "MODES", "find", "plan"]

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        p3_fig2.EXPERIMENT,
        p3_fig3.EXPERIMENT,
        p3_fig4.EXPERIMENT,
        p3_fig4.SMALL,
        p3_fig5.STAND_IN,
        p3_fig5.EXPERIMENT,
        p3_sparse.EXPERIMENT,
        p3_beyond.EXPERIMENT,
        p3_beyond_cifar.SMALL,
        p3_beyond_cifar.EXPERIMENT,
        p3_table1.EXPERIMENT,
        x_precision.EXPERIMENT,
        x_precision.CIFAR,
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
        rules: comma separated names of ``fa.RULES``, each counted once ("": the figure's).
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
    names = tuple(dict.fromkeys(r.strip() for r in rules.split(",") if r.strip())) or e.rules
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
