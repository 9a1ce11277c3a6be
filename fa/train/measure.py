"""The measurements of a run: accuracies, layers, and further ones that its recipe asks for by name
(``Config.measure``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from fa.layers.hooks import converted
from fa.metrics import alignment, feedback_weight, gradient_angles, linear_layers
from fa.probes import probed
from fa.symmetry import symmetry
from fa.train import data
from fa.train.config import Config
from fa.train.data import Data
from fa.train.network import build_network

Rows = list[list[Any]]
"""Rows (epoch, layer, depth, metric, value)."""


@torch.no_grad()
def accuracies(net: nn.Module, split: data.Split | data.DiskSplit, runs: int = 1, batch: int = 1000) -> list[float]:
    """Percent of the split's images that each of ``runs`` runs of a network classifies right, in eval mode and the
    weights' own precision.
    """
    training, device = net.training, next(net.parameters(), torch.empty(0)).device
    batch = batch if device.type == "cpu" or runs > 1 else 5 * batch  # fewer, larger kernels
    right = torch.zeros(runs, dtype=torch.int64, device=device)
    net.eval()
    for x, y in split.batches(batch):
        out = net(x if runs == 1 else x.repeat(1, runs, 1, 1))  # (n, c, h, w) -> (n, runs * classes)
        right += (out.unflatten(1, (runs, -1)).argmax(2) == y[:, None]).sum(0)
    net.train(training)
    return [100 * n / len(split) for n in right.tolist()]


def layer_epochs(epochs: int) -> set[int]:
    """When layers are measured: epochs 0 to 10, every fifth, and the last."""
    return {e for e in range(epochs + 1) if e <= 10 or e % 5 == 0 or e == epochs}


def splits_to_measure(sets: Data, config: Config, epoch: int) -> dict[str, data.Split]:
    """Metric -> the images on which accuracy is measured after so many epochs.

    In a run of more than 100 epochs that has validation images, these at every epoch, test and training images at
    every 25th; in other runs validation and test images at every epoch, training images, which take a third of an
    epoch, at every tenth; all at the end. Photographs on disk are decoded for training alone.
    """
    long = config.epochs > 100 and sets.val is not None
    now = epoch % (25 if long else 10) == 0 or epoch == config.epochs
    splits = {"val_accuracy": sets.val, "test_accuracy": sets.test if now or not long else None}
    splits["train_accuracy"] = sets.train if now and isinstance(sets.train, data.Split) else None
    return {metric: split for metric, split in splits.items() if split is not None}


def chosen_rows(rows: Rows, last: int) -> Rows:
    """Rows of ``chosen_epoch``, the first epoch of the best validation accuracy, and of ``chosen_test_accuracy``, the
    test accuracy after that epoch; none where either accuracy was not measured then. They stand at the last epoch.
    """
    val, test = ({row[0]: row[4] for row in rows if row[3] == metric} for metric in ("val_accuracy", "test_accuracy"))
    best = max(val, key=val.get, default=None)  # of equals the first
    if best not in test:
        return []
    return [[last, "", None, "chosen_epoch", float(best)], [last, "", None, "chosen_test_accuracy", test[best]]]


def layer_rows(net: nn.Module, sets: Data, epoch: float) -> list[list[Any]]:
    """Rows (epoch, layer, depth, metric, value) of every layer: weight norm and, where a rule is on, alignment and
    gradient angles.
    """
    layers = linear_layers(net)
    norms = torch.stack([torch.linalg.vector_norm(m.weight.double()) for m in layers.values()]).tolist()
    tables = [pd.DataFrame({"layer": list(layers), "depth": range(1, len(norms) + 1), "weight_norm": norms})]
    if converted(net):
        tables.append(alignment(net).drop(columns="weight_norm"))
        angles = gradient_angles(net, *sets.train.first(512), F.cross_entropy)
        tables.append(angles.drop(columns="delta_norm_ratio"))
    long = pd.concat([table.melt(["layer", "depth"], var_name="metric").dropna() for table in tables])
    return [[epoch, r.layer, r.depth, r.metric, float(r.value)] for r in long.itertuples()]


# ------------------------------------------------------------------------------------------- what a recipe may ask for


def mismatch(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of ``mismatch_left``: the share of R - B^T W that implicit feedback holds to be left."""
    layers = enumerate(converted(net).items(), 1)
    return [
        [epoch, name, depth, "mismatch_left", layer.feedback.c.item()]
        for depth, (name, layer) in layers
        if "c" in layer.feedback.names
    ]


def symmetries(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of :func:`fa.symmetry.symmetry` before and after training: ``B_match``, ``R_mixed``, ..., and ``B_excess``
    = match - mixed.
    """
    if epoch not in (0, config.epochs) or not converted(net):
        return []
    rows = []
    for row in symmetry(explicit(config, net)).to_dict("records"):
        row["excess"] = row["match"] - row["mixed"]
        names = ("correlation", "angle_deg", "match", "mixed", "chance", "excess")
        known = [n for n in names if not math.isnan(row[n])]
        rows += [[epoch, row["layer"], row["depth"], f"{row['matrix']}_{n}", row[n]] for n in known]
    return rows


def explicit(config: Config, net: nn.Module) -> nn.Module:
    """The network itself, or its twin in float64 that stores the R which implicit product feedback leaves out.

    R = B^T W + c (R_0 - B^T W_0), with B, R_0 and W_0 drawn anew from the run's seed (:class:`fa.rules.product.PFA`).
    """
    if not config.rule_options.get("implicit"):
        return net
    layers = linear_layers(net)
    shape, classes = (next(iter(layers.values())).in_features,), list(layers.values())[-1].out_features
    twin = build_network(config.vary(implicit=None), shape, classes).double()
    with torch.no_grad():
        for name, layer in linear_layers(twin).items():
            fb, W = layer.feedback, layers[name].weight.double().cpu()
            fb.R.copy_(fb.B.T @ W + layers[name].feedback.c.double().cpu() * (fb.R - fb.B.T @ layer.weight))
            layer.weight.copy_(W)
    return twin


def norms(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of ``delta_norm_ratio`` (see :func:`fa.gradient_angles`) before and after training, where a rule is on."""
    if epoch not in (0, config.epochs) or not converted(net):
        return []
    found = gradient_angles(net, *sets.train.first(512), F.cross_entropy)
    return [[epoch, r.layer, r.depth, "delta_norm_ratio", r.delta_norm_ratio] for r in found.itertuples()]


def estimates(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of ``estimate_rms``: the root mean square of the entries of B_eff - W, by layer."""
    layers = enumerate(converted(net).items(), 1)
    errors = [(n, d, feedback_weight(m).double() - m.weight.detach().double()) for d, (n, m) in layers]
    return [[epoch, name, depth, "estimate_rms", e.square().mean().sqrt().item()] for name, depth, e in errors]


def interventions(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of :func:`fa.probes.probed` after the last epoch, at the first 64 training images."""
    if epoch != config.epochs:
        return []
    return [[epoch, *row] for row in probed(net, *sets.train.first(64), config.seed)]


MEASURES: dict[str, Callable[[Config, nn.Module, int, Data], Rows]] = {
    "mismatch": mismatch,
    "symmetry": symmetries,
    "interventions": interventions,
    "norms": norms,
    "estimates": estimates,
}
"""Name -> (run, network, epoch, data) -> rows; called whenever the network is measured, at epoch 0 and after every
epoch.
"""

ALONE = {"interventions"}
"""Measurements that a run is made for: its table holds nothing else."""
