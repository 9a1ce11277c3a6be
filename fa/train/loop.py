"""One flat training loop: ``train(config) -> table``, with checkpoint and resume; its steps are :mod:`fa.train.step`'s.

A run is a frozen dataclass of scalars. Everything random in it has a generator of its own, made of the seed and a word: the initial
weights, the order of the batches in each epoch, the feedback. The same seed therefore gives the same initial weights and the same
batches under every rule, and a run that is stopped and resumed equals one that was not, bit for bit on the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fa import models
from fa.layers.convert import convert, param_groups
from fa.layers.feedback import generator
from fa.layers.hooks import converted
from fa.metrics import alignment, gradient_angles, linear_layers
from fa.provenance import environment
from fa.rules import rule as make_rule
from fa.train import data, stack
from fa.train.config import Config, integers
from fa.train.step import Stepper, drain, on, stream


def seed_network(config: Config, shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The untrained network of a run, with its rule on, on the CPU."""
    net = models.build(config.model, shape, classes, integers(config.hidden)).to(dtype)
    models.xavier_(net, generator(config.seed, "weights"))
    return convert(net, make_rule(config.rule, **config.rule_options), seed=config.seed)


@torch.no_grad()
def accuracy(net: nn.Module, split: data.Split, batch: int = 1000) -> float:
    """Percent of the split's images classified right, in eval mode and the weights' own precision."""
    training, device = net.training, next(net.parameters(), torch.empty(0)).device
    batch = batch if device.type == "cpu" else 5 * batch  # fewer, larger kernels
    net.eval()
    right = sum((net(x).argmax(1) == y).sum() for x, y in split.batches(batch))
    net.train(training)
    return 100 * right.item() / len(split)


def layer_epochs(epochs: int) -> set[int]:
    """When layers are measured: epochs 0 to 10, every fifth, and the last."""
    return {e for e in range(epochs + 1) if e <= 10 or e % 5 == 0 or e == epochs}


def watched(sets: data.Data, config: Config, epoch: int) -> dict[str, data.Split]:
    """Metric -> the images on which accuracy is measured after so many epochs.

    In a run of more than 100 epochs that has validation images, these at every epoch, test and training images at every 25th; in other
    runs validation and test images at every epoch, training images, which take a third of an epoch, at every tenth; all at the end.
    Photographs on disk are decoded for training alone.
    """
    long = config.epochs > 100 and sets.val is not None
    now = epoch % (25 if long else 10) == 0 or epoch == config.epochs
    splits = {"val_accuracy": sets.val, "test_accuracy": sets.test if now or not long else None}
    splits["train_accuracy"] = sets.train if now and isinstance(sets.train, data.Split) else None
    return {metric: split for metric, split in splits.items() if split is not None}


def measure(
    net: nn.Module,
    config: Config,
    sets: data.Data,
    epoch: int,
    extra: Extra | None = None,
    found: dict[str, float] | None = None,
) -> list[list[Any]]:
    """Rows (epoch, layer, depth, metric, value) of the network after ``epoch`` epochs; ``found``: accuracies, if already measured."""
    if found is None:
        found = {metric: accuracy(net, split) for metric, split in watched(sets, config, epoch).items()}
    rows: list[list[Any]] = [[epoch, "", None, metric, value] for metric, value in found.items()]
    if epoch in layer_epochs(config.epochs):
        layers = linear_layers(net)
        norms = torch.stack([torch.linalg.vector_norm(m.weight.double()) for m in layers.values()]).tolist()
        tables = [pd.DataFrame({"layer": list(layers), "depth": range(1, len(norms) + 1), "weight_norm": norms})]
        if converted(net):
            tables.append(alignment(net).drop(columns="weight_norm"))
            tables.append(gradient_angles(net, *sets.train.first(512), F.cross_entropy))
        for table in tables:
            long = table.melt(["layer", "depth"], var_name="metric").dropna()
            rows += [[epoch, r.layer, r.depth, r.metric, float(r.value)] for r in long.itertuples()]
    return rows + (extra(net, epoch) if extra else [])


def sgd(net: nn.Module, config: Config) -> torch.optim.SGD:
    """The optimizer of every run here: SGD with momentum on all parameters, learned feedback included."""
    return torch.optim.SGD(param_groups(net, config.lr, config.weight_decay), momentum=config.momentum, fused=True)


Extra = Callable[[nn.Module, int], list[list[Any]]]
"""What an experiment measures beside: (network, epoch) -> rows (epoch, layer, depth, metric, value)."""


def train(
    config: Config,
    device: str = "cpu",
    folder: Any = None,
    until: float = math.inf,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    extra: Extra | None = None,
    compiled: bool = False,
) -> pd.DataFrame | None:
    """Train one run, from its checkpoint if there is one.

    Args:
        config: the run.
        device: a torch device; on "cpu" one thread is used, so that the numbers do not depend on the number of cores.
        folder: a :class:`fa.results.records.Folder` to keep checkpoints in (default None: nothing is written).
        until: ``time.monotonic()`` at which to have stopped; a checkpoint is written and None returned if an epoch would not fit.
        on_epoch: called after every epoch with its number and the latest whole-network metrics.
        extra: called whenever the network is measured, epoch 0 and after every epoch; its rows join the table.
        compiled: train through ``torch.compile`` (default False).

    Returns:
        The run's table: ``epoch, layer, depth, metric, value``; epoch 0 is the untrained network. Its ``attrs["status"]``
        says ``state`` ("finished", or "diverged" with the epoch at which the loss was no longer finite), ``seconds``, ``share`` (of them, where others trained beside), and ``earlier``,
        the environments of machines that trained the run's first epochs, if there were any.
    """
    with on(device), stream(device):
        member = Member(config, folder, on_epoch, extra, folder.checkpoint() if folder else None)
        return drain(running([member], device, until, compiled))[0]


def combined(
    configs: Sequence[Config],
    nets: Sequence[nn.Module],
    opts: Sequence[torch.optim.SGD],
    shape: Sequence[int],
    classes: int,
) -> tuple[nn.Module, torch.optim.SGD]:
    """What is trained, and its optimizer: a run's own network, or the stack of several, which shares their memory (:func:`fa.train.stack.join`)."""
    if len(configs) == 1:
        return nets[0], opts[0]
    whole = stack.build(configs, shape, classes, next(nets[0].parameters()))
    opt = sgd(whole, configs[0])
    stack.join(whole, opt, nets, opts)
    return whole, opt


@dataclass(frozen=True)
class Member:
    """One of the runs that :func:`running` trains as one; arguments as of :func:`train`, and the checkpoint it goes on from, if any."""

    config: Config
    folder: Any = None
    on_epoch: Callable[[int, dict[str, float]], None] | None = None
    extra: Extra | None = None
    checkpoint: dict[str, Any] | None = None


class Apart(Exception):
    """A stack in which a loss or a weight is no longer finite, which a group beside it might feel: its runs are to be trained apart."""


def running(
    members: Sequence[Member],
    device: str = "cpu",
    until: float = math.inf,
    compiled: bool = False,
    sets: data.Data | None = None,
    at_once: int = 1,
) -> Generator[None, None, list[pd.DataFrame | None]]:
    """:func:`train` as a generator that yields after every step, for :func:`fa.train.step.together`.

    Args:
        members: one run, or several with one :func:`fa.train.stack.key` that have come equally far, which are trained as a stack.
        device: as of :func:`train`, like ``until`` and ``compiled``.
        sets: data that runs share (default: loaded here).
        at_once: runs that this process trains meanwhile, these included (default 1): ``share`` in a run's status is its part of the seconds.

    Returns:
        What :func:`train` returns, for each.

    Raises:
        Apart: from a stack.
    """
    begin, configs = time.monotonic(), [m.config for m in members]
    config = configs[0]  # what is asked of it below is the same for all
    sets = sets or data.load(config.dataset, device)
    nets = [seed_network(c, sets.shape, sets.classes).to(device) for c in configs]
    if torch.device(device).type == "cuda":
        nets = [net.to(memory_format=torch.channels_last) for net in nets]
    opts = [sgd(net, c) for net, c in zip(nets, configs)]
    here = environment()
    states: list[dict[str, Any]] = [
        {"epoch": 0, "rows": [], "seconds": 0.0, "share": 0.0, "environments": [here]} for _ in members
    ]
    for member, net, opt, state in zip(members, nets, opts, states):
        if checkpoint := member.checkpoint:
            state.update((k, checkpoint[k]) for k in list(state) if k in checkpoint)
            state["environments"] += [here] if here not in state["environments"] else []
            net.load_state_dict(checkpoint["net"])
            opt.load_state_dict(checkpoint["optimizer"])
            for (
                p,
                kept,
            ) in opt.state.items():  # in this device's memory layout, which need not be that of the checkpoint
                if kept.get("momentum_buffer") is not None:
                    kept["momentum_buffer"] = torch.empty_like(p).copy_(kept["momentum_buffer"])
    net, opt = combined(configs, nets, opts, sets.shape, sets.classes)
    stepper = Stepper(net, opt, config, sets.train, compiled, seeds=[c.seed for c in configs])
    before, saved, last = [(state["seconds"], state["share"]) for state in states], begin, 0.0

    def clock() -> None:
        """Bring each run's seconds up to date."""
        spent = time.monotonic() - begin
        for state, (seconds, share) in zip(states, before):
            state["seconds"], state["share"] = seconds + spent, share + spent / at_once

    def look(epoch: int) -> list[list[list[Any]]]:
        """Each run's measurements."""
        found: list[dict[str, float] | None] = [None] * len(members)
        if len(members) > 1:
            each = {
                metric: stack.accuracies(net, len(members), split)
                for metric, split in watched(sets, config, epoch).items()
            }
            found = [{metric: values[i] for metric, values in each.items()} for i in range(len(members))]
        return [measure(n, m.config, sets, epoch, m.extra, f) for n, m, f in zip(nets, members, found)]

    def save() -> None:
        clock()
        for member, net, opt, state in zip(members, nets, opts, states):
            if member.folder:
                parts = {"net": net.state_dict(), "optimizer": opt.state_dict()}
                member.folder.save(
                    {**state, **tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, parts)}
                )  # not the whole stack

    if states[0]["epoch"] == 0:
        for state, rows in zip(states, look(0)):
            state["rows"] = rows
    status: dict[str, Any] = {"state": "finished"}
    for epoch in range(states[0]["epoch"], config.epochs):
        now = time.monotonic()
        if now + 1.1 * last > until:
            save()
            return [None] * len(members)
        losses = (yield from stepper.epoch(epoch)).view(-1, len(members)).mean(0).tolist()
        finite = all(map(math.isfinite, losses))
        if len(members) > 1 and not (
            finite and all(torch.isfinite(torch.stack([p.sum() for p in net.parameters()])).tolist())
        ):
            raise Apart  # before a checkpoint is written; the last step's weights no loss has seen
        if not finite:
            status = {"state": "diverged", "epoch": epoch + 1}
            break
        for member, state, loss, rows in zip(members, states, losses, look(epoch + 1)):
            rows = [[epoch + 1, "", None, "train_loss", loss], *rows]
            state["rows"] += rows
            state["epoch"] = epoch + 1
            if member.on_epoch:
                member.on_epoch(epoch + 1, {metric: value for _, layer, _, metric, value in rows if not layer})
        last = time.monotonic() - now
        if time.monotonic() - saved > 30 and epoch + 1 < config.epochs:
            save()
            saved = time.monotonic()
    tables = []
    clock()
    for state in states:
        table = pd.DataFrame(state["rows"], columns=["epoch", "layer", "depth", "metric", "value"])
        table["depth"] = table["depth"].astype("Int64")
        spent = {"seconds": round(state["seconds"], 1)}
        if state["share"] != state["seconds"]:
            spent["share"] = round(state["share"], 1)
        earlier = [
            e for e in state["environments"] if e != here
        ]  # of the machine that finishes a run its folder takes note
        table.attrs["status"] = {**status, **spent} | ({"earlier": earlier} if earlier else {})
        tables.append(table)
    return tables


def fingerprint(config: Config, batches: int = 20) -> list[str]:
    """The first losses of the same recipe, narrowed: digits, float64, one CPU thread; 10 digits each.

    An mlp has 32 units a layer, every other network is the ResNet of 8 layers. A record whose fingerprint moved was made by a recipe
    that is no longer this one. The first half of the batches are trained with the first epoch's schedule, the second half with the
    last epoch's.
    """
    hidden = ",".join("32" for _ in integers(config.hidden))
    model = "mlp" if config.model == "mlp" else "resnet8"
    small = replace(config, dataset="digits", hidden=hidden, model=model, precision="float32")
    with on("cpu"):
        sets = data.load("digits", dtype=torch.float64)
        net = seed_network(small, sets.shape, sets.classes, torch.float64)
        stepper = Stepper(net, sgd(net, small), small, sets.train)
        half = batches // 2
        losses = [drain(stepper.epoch(e, half)).clone() for e in (0, config.epochs - 1)]
    return [f"{value:.10g}" for value in torch.cat(losses).tolist()]
