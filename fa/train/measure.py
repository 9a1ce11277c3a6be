"""Further measurements that a run's recipe may ask for by name (``Config.measure``), for the figures about what a rule knows of W."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.layers.feedback import generator
from fa.layers.hooks import converted
from fa.metrics import linear_layers
from fa.probes import noise_passes, reads, reciprocal, symmetry
from fa.train.config import Config
from fa.train.data import Data
from fa.train.network import build_network

Rows = list[list[Any]]
"""Rows (epoch, layer, depth, metric, value)."""


def mismatch(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of ``mismatch_left``: the share of R - B^T W that implicit feedback holds to be left."""
    layers = enumerate(converted(net).items(), 1)
    return [
        [epoch, name, depth, "mismatch_left", layer.feedback.c.item()]
        for depth, (name, layer) in layers
        if "c" in layer.feedback.names
    ]


def symmetries(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of :func:`fa.probes.symmetry` before and after training: ``B_match``, ``R_mixed``, ..., and ``B_excess`` = match - mixed."""
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

    R = B^T W + c (R_0 - B^T W_0), with B, R_0 and W_0 drawn anew from the run's seed (:class:`fa.rules.PFA`).
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


def interventions(config: Config, net: nn.Module, epoch: int, sets: Data) -> Rows:
    """Rows of :func:`intervene` after the last epoch, at the first 64 training images."""
    if epoch != config.epochs:
        return []
    return [[epoch, *row] for row in intervene(net, *sets.train.first(64), config.seed)]


def intervene(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[tuple[str, int | None, str, float]]:
    """(layer, depth, metric, value) of every intervention on a network, at one batch and the true errors of its cross-entropy.

    ``send_*`` and ``learn_*`` are those of :func:`fa.probes.reads`, ``B_reciprocal``, ... those of
    :func:`fa.probes.reciprocal` (``W_`` where the feedback is made of W), ``noise_passes`` that of
    :func:`fa.probes.noise_passes`.
    """
    layers, kept, handles = linear_layers(net), {}, []
    for name, layer in layers.items():

        def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
            kept[name] = args[0].detach(), out

        handles.append(layer.register_forward_hook(keep))
    try:
        with torch.enable_grad():
            out = net(x)
            errors = torch.autograd.grad(F.cross_entropy(out, y), [out, *(o for _, o in kept.values())])
    finally:
        for handle in handles:
            handle.remove()
    e, delta = errors[0], dict(zip(kept, errors[1:]))
    found = []
    for depth, (name, layer) in enumerate(layers.items(), 1):
        error = e if hasattr(getattr(layer, "feedback", None), "tape") else delta[name]
        values = reads(layer, kept[name][0], error, generator(seed, name, "scramble"))
        found += [(name, depth, metric, value) for metric, value in values.items()]
    depths = {name: depth for depth, name in enumerate(layers, 1)}
    joined = reciprocal(net, generator(seed, "reciprocal"))
    found += [(layer, depths[layer], f"{matrix}_reciprocal", value) for (layer, matrix), value in joined.items()]
    return [*found, ("", None, "noise_passes", noise_passes(net, x, e))]


MEASURES: dict[str, Callable[[Config, nn.Module, int, Data], Rows]] = {
    "mismatch": mismatch,
    "symmetry": symmetries,
    "interventions": interventions,
}
"""Name -> (run, network, epoch, data) -> rows; called whenever the network is measured, at epoch 0 and after every epoch."""

ALONE = {"interventions"}
"""Measurements that a run is made for: its table holds nothing else."""
