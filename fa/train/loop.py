"""The training loop: ``train(config) -> table``, with checkpoint and resume; its steps are :mod:`fa.train.step`'s.

A run is a frozen dataclass of scalars. Everything random in it has a generator of its own, made of the seed and a
word: the initial weights, the order of the batches in each epoch, the feedback. The same seed therefore gives the
same initial weights and the same batches under every rule, and a run that is stopped and resumed equals one that was
not, bit for bit on the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fa import models
from fa.layers.convert import convert
from fa.layers.feedback import generator
from fa.layers.hooks import converted
from fa.metrics import alignment, gradient_angles
from fa.provenance import environment
from fa.rules import rule as make_rule
from fa.train import data, stack
from fa.train.config import Config, integers
from fa.train.step import Stepper, numerics, sgd

PROGRESS = ("epoch", "seconds", "train_loss", "train_accuracy", "val_accuracy", "test_accuracy")
"""Columns of ``progress.csv`` in a run's folder: one line an epoch; a metric that was not measured is empty."""

CHECKPOINT_EVERY = 30.0  # seconds


class StackDiverged(Exception):
    """A run of a stack diverged, which may have touched the runs next to it; the caller retrains them one by one."""


def build_network(config: Config, shape: Sequence[int], classes: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The untrained network of a run, with its rule on, on the CPU; ``shape``: channels, height, width of an image."""
    net = models.build(config.model, shape, classes, integers(config.hidden)).to(dtype)
    models.xavier_(net, generator(config.seed, "weights"))
    return convert(net, make_rule(config.rule, **config.rule_options), seed=config.seed)


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


def weighted(net: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> every linear and convolutional layer, in order from the input."""
    return {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def layer_epochs(epochs: int) -> set[int]:
    """When layers are measured: epochs 0 to 10, every fifth, and the last."""
    return {e for e in range(epochs + 1) if e <= 10 or e % 5 == 0 or e == epochs}


def splits_to_measure(sets: data.Data, config: Config, epoch: int) -> dict[str, data.Split]:
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


def layer_rows(net: nn.Module, sets: data.Data, epoch: int) -> list[list[Any]]:
    """Rows (epoch, layer, depth, metric, value) of every layer: weight norm and, where a rule is on, alignment and
    gradient angles.
    """
    layers = weighted(net)
    norms = torch.stack([torch.linalg.vector_norm(m.weight.double()) for m in layers.values()]).tolist()
    tables = [pd.DataFrame({"layer": list(layers), "depth": range(1, len(norms) + 1), "weight_norm": norms})]
    if converted(net):
        tables.append(alignment(net).drop(columns="weight_norm"))
        tables.append(gradient_angles(net, *sets.train.first(512), F.cross_entropy))
    long = pd.concat([table.melt(["layer", "depth"], var_name="metric").dropna() for table in tables])
    return [[epoch, r.layer, r.depth, r.metric, float(r.value)] for r in long.itertuples()]


def extra_rows(config: Config, net: nn.Module, epoch: int) -> list[list[Any]]:
    """Rows (epoch, layer, depth, metric, value) of what the run's figure measures besides, at epoch 0 and after every
    epoch.
    """
    from fa import experiments  # ADAPTER: until Config.measure names an entry of fa.probes.MEASURES

    known = experiments.EXPERIMENTS.get(config.experiment)
    return known.extra(config, net, epoch) if known and known.extra else []


@dataclass
class Run:
    """One run while it is trained.

    Args:
        config: the run.
        folder: keeps its checkpoints and ``progress.csv``, a :class:`fa.results.records.Folder` (default None:
            nothing is written).
        epoch: epochs behind it.
        rows: what was measured: [epoch, layer, depth, metric, value].
        seconds: wall time of its training; of a stack its part, as the runs share the time evenly.
        environments: software and machines that trained it, the first one first.
    """

    config: Config
    folder: Any = None
    epoch: int = 0
    rows: list[list[Any]] = field(default_factory=list)
    seconds: float = 0.0
    environments: list[dict[str, str]] = field(default_factory=list)
    net: nn.Module = field(init=False, repr=False)
    opt: torch.optim.SGD = field(init=False, repr=False)

    def start(self, sets: data.Data, device: str) -> None:
        """Make the network and its optimizer on the device, as the checkpoint has them, if there is one."""
        layout = torch.channels_last if torch.device(device).type == "cuda" else torch.preserve_format
        self.net = build_network(self.config, sets.shape, sets.classes).to(device).to(memory_format=layout)
        self.opt = sgd(self.net, self.config)
        if checkpoint := self.folder and self.folder.checkpoint():
            for name in ("epoch", "rows", "seconds", "environments"):
                setattr(self, name, checkpoint.get(name, getattr(self, name)))
            self.net.load_state_dict(checkpoint["net"])
            self.opt.load_state_dict(checkpoint["optimizer"])
            for p, state in self.opt.state.items():  # in this device's memory layout, which may not be the checkpoint's
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])
        if environment() not in self.environments:
            self.environments.append(environment())
        if (
            self.folder and (path := self.folder.path / "progress.csv").exists()
        ):  # epochs after the checkpoint come again
            head, *lines = path.read_text().splitlines(keepends=True)
            path.write_text(head + "".join(line for line in lines if int(line.partition(",")[0]) <= self.epoch))

    def measure(self, sets: data.Data, epoch: int, whole: dict[str, float]) -> None:
        """Add the rows of an epoch: those of the whole network (metric -> value), and at some epochs those of its
        layers.
        """
        self.rows += [[epoch, "", None, metric, value] for metric, value in whole.items()]
        if epoch in layer_epochs(self.config.epochs):
            self.rows += layer_rows(self.net, sets, epoch)
        self.rows += extra_rows(self.config, self.net, epoch)
        self.epoch = epoch

    def report(self) -> None:
        """Append the latest epoch to ``progress.csv``, which bars and live plots read."""
        if self.folder:
            found = {metric: value for epoch, layer, _, metric, value in self.rows if epoch == self.epoch and not layer}
            line = {"epoch": self.epoch, "seconds": round(self.seconds, 1)} | found
            path = self.folder.path / "progress.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as f:
                f.write("" if f.tell() else ",".join(PROGRESS) + "\n")
                f.write(",".join(str(line.get(name, "")) for name in PROGRESS) + "\n")

    def save(self) -> None:
        """Write a checkpoint; of a stack the run's own slices, not the whole."""
        if self.folder:
            state = {name: getattr(self, name) for name in ("epoch", "rows", "seconds", "environments")}
            parts = {"net": self.net.state_dict(), "optimizer": self.opt.state_dict()}
            self.folder.save({**state, **tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, parts)})

    def table(self, **status: Any) -> pd.DataFrame:
        """The rows as a table, with the run's status in its ``attrs``; see :func:`train`."""
        table = pd.DataFrame(self.rows, columns=["epoch", "layer", "depth", "metric", "value"])
        table["depth"] = table["depth"].astype("Int64")
        status["seconds"] = round(self.seconds, 1)
        # the folder itself notes the machine that finishes a run
        if earlier := [e for e in self.environments if e != environment()]:
            status["earlier"] = earlier
        table.attrs["status"] = status
        return table


def train(
    config: Config, device: str = "cpu", folder: Any = None, until: float = math.inf, compiled: bool = False
) -> pd.DataFrame | None:
    """Train one run, from its checkpoint if there is one.

    Args:
        config: the run.
        device: a torch device; on "cpu" one thread is used, so that the numbers do not depend on the number of cores.
        folder: a :class:`fa.results.records.Folder` to keep checkpoints in (default None: nothing is written).
        until: ``time.monotonic()`` at which to have stopped; a checkpoint is written and None returned if an epoch
            would not fit.
        compiled: train through ``torch.compile`` (default False).

    Returns:
        The run's table: ``epoch, layer, depth, metric, value``; epoch 0 is the untrained network. Its
        ``attrs["status"]`` says ``state`` ("finished", or "diverged" with the ``epoch`` at which the loss was no
        longer finite), ``seconds``, and ``earlier``, the environments of other machines that trained the run's first
        epochs, if there were any.
    """
    return train_runs([Run(config, folder)], device, until, compiled)[0]


def train_runs(
    runs: Sequence[Run],
    device: str = "cpu",
    until: float = math.inf,
    compiled: bool = False,
    sets: data.Data | None = None,
) -> list[pd.DataFrame | None]:
    """Train one run, or several that share a recipe as one stacked network (:mod:`fa.train.stack`).

    Args:
        runs: one run, or several with one :func:`fa.train.stack.key` and as many epochs behind them.
        device, until, compiled: as in :func:`train`.
        sets: the data, on the device (default: those of the recipe are loaded).

    Returns:
        What :func:`train` returns, for each run.

    Raises:
        StackDiverged: from a stack.
    """
    config, stacked = runs[0].config, len(runs) > 1  # what is asked of config below is the same for all
    since = saved = time.monotonic()
    with numerics(device):
        sets = sets or data.load(config.dataset, device)
        for run in runs:
            run.start(sets, device)
        net, opt = stack.join(runs, sets.shape, sets.classes) if stacked else (runs[0].net, runs[0].opt)
        step = Stepper(net, opt, config, sets.train, compiled, seeds=[run.config.seed for run in runs])
        if runs[0].epoch == 0:
            for run in runs:
                run.rows = []
            measure(runs, net, sets, 0, [{} for _ in runs])
        last = 0.0  # seconds of the latest epoch
        for epoch in range(runs[0].epoch, config.epochs):
            begin = time.monotonic()
            if begin + 1.1 * last > until:
                for run in runs:
                    run.save()
                return [None] * len(runs)
            losses = step.epoch(epoch).mean(0).tolist()  # (steps, runs) -> (runs,)
            finite = all(map(math.isfinite, losses))
            if stacked and not (finite and all_finite(net.parameters())):  # no loss has seen the last step's weights
                raise StackDiverged
            if not finite:
                runs[0].seconds += time.monotonic() - since
                return [runs[0].table(state="diverged", epoch=epoch + 1)]
            measure(runs, net, sets, epoch + 1, [{"train_loss": loss} for loss in losses])
            now = time.monotonic()
            for run in runs:
                run.seconds += (now - since) / len(runs)
                run.report()
            last, since = now - begin, now
            if now - saved > CHECKPOINT_EVERY and epoch + 1 < config.epochs:
                for run in runs:
                    run.save()
                saved = now
        return [run.table(state="finished") for run in runs]


def measure(
    runs: Sequence[Run], net: nn.Module, sets: data.Data, epoch: int, whole: Sequence[dict[str, float]]
) -> None:
    """Measure every run after ``epoch`` epochs; ``whole``: what is known already, metric -> value, of each run."""
    found = {
        m: accuracies(net, split, len(runs)) for m, split in splits_to_measure(sets, runs[0].config, epoch).items()
    }
    for i, run in enumerate(runs):
        run.measure(sets, epoch, whole[i] | {metric: values[i] for metric, values in found.items()})


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is infinite or nan, asked of the device once."""
    return bool(torch.isfinite(torch.stack([t.sum() for t in tensors])).all())


def fingerprint(config: Config, batches: int = 20) -> list[str]:
    """The first losses of the same recipe, narrowed: digits, float64, one CPU thread; 10 digits each.

    An mlp has 32 units a layer, every other network is the ResNet of 8 layers. A record whose fingerprint moved was
    made by a recipe that is no longer this one. The first half of the batches are trained with the first epoch's
    schedule, the second half with the last epoch's.
    """
    hidden = ",".join("32" for _ in integers(config.hidden))
    model = "mlp" if config.model == "mlp" else "resnet8"
    small = replace(config, dataset="digits", hidden=hidden, model=model, precision="float32")
    with numerics("cpu"):
        sets = data.load("digits", dtype=torch.float64)
        net = build_network(small, sets.shape, sets.classes, torch.float64)
        stepper = Stepper(net, sgd(net, small), small, sets.train)
        half = batches // 2
        losses = [stepper.epoch(e, half).flatten().clone() for e in (0, config.epochs - 1)]
    return [f"{value:.10g}" for value in torch.cat(losses).tolist()]
