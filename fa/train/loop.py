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
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fa.errors import UserError
from fa.paths import write_bytes
from fa.provenance import environment
from fa.train import data, stack
from fa.train.config import Config, integers
from fa.train.ddp import ONE_PROCESS, Ranks
from fa.train.measure import ALONE, MEASURES, accuracies, chosen_rows, layer_epochs, layer_rows, splits_to_measure
from fa.train.network import build_network
from fa.train.step import Stepper, make_optimizer, numerics

PROGRESS = ("epoch", "seconds", "train_loss", "train_accuracy", "val_accuracy", "test_accuracy", "angles")
"""Columns of ``progress.csv`` in a run's folder: one line an epoch; a metric that was not measured is empty. ``angles``
are those between W and its feedback, in degrees, layer by layer from the input, with a space between two."""

CHECKPOINT_EVERY = 30.0  # seconds

KEPT = ("epoch", "rows", "seconds", "environments", "ranks", "local_norm")
"""What a checkpoint holds of a :class:`Run`, besides its network and optimizer."""


def progress_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``progress.csv``; those that a crash or a disk has damaged are left out.

    Returns:
        A dictionary an epoch, of :data:`PROGRESS`: the epoch as a number, all else as it is written.
    """
    path, found = folder / "progress.csv", []
    for line in path.read_text(errors="replace").splitlines()[1:] if path.exists() else []:
        values = line.split(",")
        try:
            epoch, *_ = int(values[0]), *map(float, " ".join(values[1:]).split())
        except ValueError:
            continue
        if len(values) == len(PROGRESS):
            found.append(dict(zip(PROGRESS, values)) | {"epoch": epoch})
    return found


class StackDiverged(Exception):
    """A run of a stack diverged, which may have touched the runs next to it; the caller retrains them one by one."""


@dataclass
class Run:
    """One run while it is trained.

    Args:
        config: the run.
        folder: keeps its checkpoints and ``progress.csv``, a :class:`fa.results.store.RunFolder` (default None:
            nothing is written).
        epoch: epochs behind it.
        rows: what was measured: [epoch, layer, depth, metric, value].
        seconds: wall time of its training; of a stack its part, as the runs share the time evenly.
        environments: software and machines that trained it, the first one first.
        ranks: the largest number of ranks that trained it together (:mod:`fa.train.ddp`).
        local_norm: whether batch norm took the statistics of a rank's images alone.
        checkpoint: to go on from (default: the folder's, if there is one).
    """

    config: Config
    folder: Any = None
    epoch: int = 0
    rows: list[list[Any]] = field(default_factory=list)
    seconds: float = 0.0
    environments: list[dict[str, str]] = field(default_factory=list)
    ranks: int = 1
    local_norm: bool = False
    checkpoint: dict[str, Any] | None = field(default=None, repr=False)
    lines: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)  # of progress.csv
    net: nn.Module = field(init=False, repr=False)
    opt: torch.optim.Optimizer = field(init=False, repr=False)

    def start(self, sets: data.Data, device: str) -> None:
        """Make the network and its optimizer on the device, as the checkpoint has them, if there is one."""
        layout = torch.channels_last if torch.device(device).type == "cuda" else torch.preserve_format
        self.net = build_network(self.config, sets.shape, sets.classes).to(device).to(memory_format=layout)
        self.opt = make_optimizer(self.net, self.config)
        self.checkpoint = self.folder.checkpoint() if self.folder else self.checkpoint
        if self.checkpoint:
            try:
                self.load(self.checkpoint)
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(
                    f"the checkpoint in {self.folder.path} is of another run than its config.json "
                    f"({type(error).__name__}); delete that folder to train the run from its beginning"
                ) from error
        if environment() not in self.environments:
            self.environments.append(environment())
        if self.folder:  # epochs after the checkpoint come again
            self.lines = [line for line in progress_lines(self.folder.path) if line["epoch"] <= self.epoch]

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in KEPT:
            setattr(self, name, checkpoint.get(name, getattr(self, name)))
        self.net.load_state_dict(checkpoint["net"])
        self.opt.load_state_dict(checkpoint["optimizer"])
        for p, state in self.opt.state.items():  # in this device's memory layout, which may not be the checkpoint's
            for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if state.get(name) is not None:
                    state[name] = torch.empty_like(p).copy_(state[name])

    def measure(self, sets: data.Data, epoch: int, whole: dict[str, float]) -> None:
        """Add the rows of an epoch: those of the whole network (metric -> value), and at some epochs those of its
        layers.
        """
        self.rows += [[epoch, "", None, metric, value] for metric, value in whole.items()]
        if epoch in layer_epochs(self.config.epochs):
            self.rows += layer_rows(self.net, sets, epoch)
        if own := self.config.measure:
            self.rows = [] if own in ALONE else self.rows
            self.rows += MEASURES[own](self.config, self.net, epoch, sets)
        self.epoch = epoch

    def report(self) -> None:
        """Write ``progress.csv``, which bars and live plots read, with the latest epoch at its end."""
        if self.folder:
            found = {metric: value for epoch, layer, _, metric, value in self.rows if epoch == self.epoch and not layer}
            angles = [f"{row[4]:.2f}" for row in self.rows if row[0] == self.epoch and row[3] == "angle_deg"]
            found |= {"epoch": self.epoch, "seconds": round(self.seconds, 1), "angles": " ".join(angles)}
            self.lines.append(found)
            table = [",".join(str(line.get(name, "")) for name in PROGRESS) for line in self.lines]
            content = "\n".join([",".join(PROGRESS), *table, ""])
            write_bytes(self.folder.path / "progress.csv", content.encode())

    def save(self) -> None:
        """Write a checkpoint; of a stack the run's own slices, not the whole."""
        if self.folder:
            state = {name: getattr(self, name) for name in KEPT}
            parts = {"net": self.net.state_dict(), "optimizer": self.opt.state_dict()}
            self.folder.save({**state, **tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, parts)})

    def table(self, **status: Any) -> pd.DataFrame:
        """The rows as a table, with the run's status in its ``attrs``; see :func:`train`."""
        table = pd.DataFrame(self.rows, columns=["epoch", "layer", "depth", "metric", "value"])
        table["depth"] = table["depth"].astype("Int64")
        status["seconds"] = round(self.seconds, 1)
        if self.ranks > 1:
            status |= {"ranks": self.ranks, "batch_norm": "of a rank" if self.local_norm else "of the batch"}
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
        folder: a :class:`fa.results.store.RunFolder` to keep checkpoints in (default None: nothing is written).
        until: ``time.monotonic()`` at which to have stopped; a checkpoint is written and None returned if an epoch
            would not fit.
        compiled: train through ``torch.compile`` (default False).

    Returns:
        The run's table: ``epoch, layer, depth, metric, value``; epoch 0 is the untrained network. Its
        ``attrs["status"]`` says ``state``: "finished", or "diverged" with the ``epoch`` and its ``step``, both from 1,
        after which a loss or a weight was no longer finite; ``seconds``; and ``earlier``, the environments of other
        machines that trained the run's first epochs, or trained it together with this one, if there were any.
    """
    return train_runs([Run(config, folder)], device, until, compiled)[0]


def train_runs(
    runs: Sequence[Run],
    device: str = "cpu",
    until: float = math.inf,
    compiled: bool = False,
    sets: data.Data | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> list[pd.DataFrame | None]:
    """Train one run, or several that share a recipe as one stacked network (:mod:`fa.train.stack`).

    Args:
        runs: one run, or several with one :func:`fa.train.stack.key` and as many epochs behind them.
        device, until, compiled: as in :func:`train`.
        sets: the data, on the device (default: those of the recipe are loaded).
        ranks: the processes that train the run together; on every other one than rank 0 :func:`follow` makes this
            call, which writes and measures nothing there.

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
        ranks.lead((config, runs[0].checkpoint, compiled))
        net, opt = stack.join(runs, sets.shape, sets.classes) if stacked else (runs[0].net, runs[0].opt)
        step = Stepper(net, opt, config, sets.train, compiled, None, [run.config.seed for run in runs], ranks)
        for run in runs:
            run.ranks, run.local_norm = max(run.ranks, ranks.size), run.local_norm or ranks.local_norm(net)
            run.environments += [machine for machine in ranks.machines if machine not in run.environments]
            run.checkpoint, run.rows = None, run.rows if run.epoch else []
        if runs[0].epoch == 0:
            ranks.first(net, partial(measure, runs, net, sets, 0, [{} for _ in runs]))
        last = 0.0  # seconds of the latest epoch
        for epoch in range(runs[0].epoch, config.epochs):
            begin = time.monotonic()
            if ranks.share(begin + 1.1 * last > until):
                for run in runs:
                    run.save()
                return [None] * len(runs)
            early = integers(config.first_steps) if epoch == 0 else []

            def look(number: int) -> None:
                for run in runs:
                    run.rows += layer_rows(run.net, sets, number / step.per_epoch)

            def seen(number: int) -> None:
                if number in early:
                    ranks.first(net, partial(look, number))

            by_step = step.epoch(epoch, seen=seen)  # (steps, runs)
            losses = by_step.mean(0).tolist()  # (runs,)
            # no loss has seen the weights of the last step
            finite = all(map(math.isfinite, losses)) and all_finite(net.parameters())
            if stacked and not finite:
                raise StackDiverged
            if not finite:
                runs[0].seconds += time.monotonic() - since
                at = (~torch.isfinite(by_step)).any(1).nonzero().flatten().tolist() or [len(by_step) - 1]
                return [runs[0].table(state="diverged", epoch=epoch + 1, step=at[0] + 1)]
            ranks.first(net, partial(measure, runs, net, sets, epoch + 1, [{"train_loss": loss} for loss in losses]))
            now = time.monotonic()
            for run in runs:
                run.seconds += (now - since) / len(runs)
                run.report()
            last, since = now - begin, now
            if now - saved > CHECKPOINT_EVERY and epoch + 1 < config.epochs:
                for run in runs:
                    run.save()
                saved = now
        for run in runs:
            run.rows += chosen_rows(run.rows, config.epochs)
            if config.keep and run.folder:
                run.folder.keep({k: v for k, v in run.net.state_dict().items() if ".feedback." not in k})
        return [run.table(state="finished") for run in runs]


def follow(ranks: Ranks) -> None:
    """Train this rank's part of every run that rank 0 takes up, until it has no more."""
    while job := ranks.share():
        if isinstance(job, list):
            ranks.check_data(job)
            continue
        config, checkpoint, compiled = job
        train_runs([Run(config, checkpoint=checkpoint)], ranks.device, compiled=compiled, ranks=ranks)


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

    An mlp has 32 units a layer, Architecture 1 pads its convolutions, LeNet and plain stacks are themselves, every
    other network is the ResNet of 8 layers. A record whose fingerprint moved was made by a recipe that is no longer
    this one. The first half of the batches are trained with the first epoch's schedule, the second half with the last
    epoch's.
    """
    hidden = ",".join("32" for _ in integers(config.hidden))
    itself = {name: name for name in ("mlp", "lenet", "arch1-same")}
    plain = config.model.startswith("plain")
    model = config.model if plain else (itself | {"arch1": "arch1-same"}).get(config.model, "resnet8")
    small = replace(config, dataset="digits", hidden=hidden, model=model, precision="float32")
    with numerics("cpu"):
        sets = data.load("digits", dtype=torch.float64)
        net = build_network(small, sets.shape, sets.classes, torch.float64)
        stepper = Stepper(net, make_optimizer(net, small), small, sets.train)
        half = batches // 2
        losses = [stepper.epoch(e, half).flatten().clone() for e in (0, config.epochs - 1)]
    return [f"{value:.10g}" for value in torch.cat(losses).tolist()]
