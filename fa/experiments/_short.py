"""Short trainings, of which an experiment has many: each is measured once, at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from torch import nn

from fa.experiments._ends import CHANCE
from fa.layers.hooks import converted
from fa.metrics import alignment
from fa.train import data
from fa.train.config import Config
from fa.train.loop import all_finite
from fa.train.measure import accuracies
from fa.train.network import build_network
from fa.train.step import Stepper, make_optimizer


def network(config: Config) -> nn.Module:
    """The untrained network of a run."""
    sets = data.load(config.dataset)
    return build_network(config, sets.shape, sets.classes)


def trained(
    config: Config, net: nn.Module, each: Callable[[int], None] = lambda step: None
) -> tuple[float, pd.DataFrame, dict[str, Any]]:
    """Train a run as :func:`fa.train.loop.train` does, and measure it once, at its end.

    Args:
        config: the run.
        net: its network.
        each: called after every step of an epoch with the number of steps taken (default: nothing is called).

    Returns:
        The score, the rows of each layer's feedback (none where training diverged), and the run's status.
    """
    sets = data.load(config.dataset)
    stepper = Stepper(net, make_optimizer(net, config), config, sets.train)
    for epoch in range(config.epochs):
        if not all_finite([stepper.epoch(epoch, seen=each), *net.parameters()]):
            return CHANCE, pd.DataFrame(), {"state": "diverged", "epoch": epoch + 1}
    [score] = accuracies(net, sets.val or sets.test)
    rows = alignment(net).melt(["layer", "depth"], ["angle_deg", "norm_ratio"], "metric") if converted(net) else None
    return score, pd.DataFrame(rows).assign(epoch=config.epochs), {"state": "finished"}


def measured(epoch: int, found: dict[str, float], rows: pd.DataFrame, status: dict[str, Any]) -> pd.DataFrame:
    """The table of a run that is measured once: ``epoch, layer, depth, metric, value``.

    Args:
        epoch: the last.
        found: of the whole network, metric -> value.
        rows: of its layers, as :func:`trained` returns them.
        status: of the run, for the table's ``attrs``.
    """
    own = pd.DataFrame({"epoch": epoch, "layer": "", "metric": list(found), "value": list(found.values())})
    table = pd.concat([own, rows]).reindex(columns=["epoch", "layer", "depth", "metric", "value"])
    table.attrs["status"] = status
    return table
