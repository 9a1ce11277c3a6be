"""What a figure's module hands over: its name, its page, its rules and its grid of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import nn

from fa.train.loop import train


@dataclass(frozen=True)
class Experiment:
    """A figure's grid.

    Args:
        name: of figure, record, claims.
        title: one line.
        paper: "p1", "p2" or "p3"; "x" across the papers.
        notebook: stem of the file in notebooks/.
        rules: the figure's rules, in the order of its legend.
        grid: (mode, rules, seeds, epochs, dataset, own parameters) -> runs; 0 and "" stand for the mode's own. A run that another
            figure has as well keeps that figure's name in its ``experiment``, and so is trained once.
        own: parameters of the notebook beside the common ones, with their defaults.
        run: what makes one run's table.
        extra: what is measured beside whenever the network is: (run, network, epoch) -> rows (epoch, layer, depth, metric, value).
        swept: run -> the columns that its rows have in the record beside the standard ones, alike for every run of the figure.
    """

    name: str
    title: str
    paper: str
    notebook: str
    rules: tuple[str, ...]
    grid: Callable[..., list[Any]]
    own: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., pd.DataFrame | None] = train
    extra: Callable[[Any, nn.Module, int], list[list[Any]]] | None = None
    swept: Callable[[Any], dict[str, Any]] = lambda config: {}
