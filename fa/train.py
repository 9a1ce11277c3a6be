"""One flat training loop: ``train(config) -> table``, with checkpoint and resume; its steps are :mod:`fa.engine`'s.

A run is a frozen dataclass of scalars. Everything random in it has a generator of its own, made of the seed and a word: the initial
weights, the order of the batches in each epoch, the feedback. The same seed therefore gives the same initial weights and the same
batches under every rule, and a run that is stopped and resumed equals one that was not, bit for bit on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data, models
from .engine import Stepper, drain, on, stream
from .errors import UserError
from .feedback import generator
from .layers import convert, param_groups
from .metrics import alignment, gradient_angles
from .rules import rule as make_rule
from .steps import converted


def identity(config: Any) -> str:
    """A run's name: the first 12 hex digits of the sha256 of the canonical JSON of its fields.

    Fields at their default are left out of it, so that a field added later, with a default that keeps the recipe, keeps identities.
    """
    told = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Config:
    """One run. Its identity is a hash of all fields, see :attr:`run`.

    Args:
        experiment: the figure that it belongs to.
        rule: a name of ``fa.RULES``.
        seed: of initial weights, order of batches and feedback.
        options: of the rule, as ``"init=xavier expansion=10"``.
        dataset: a name of ``fa.data.SETS``.
        model: a name that ``fa.models.build`` knows.
        hidden: widths of an mlp's hidden layers, comma separated.
        epochs: passes over the training set.
        batch: images in a batch; the last, smaller batch of an epoch is dropped.
        lr: learning rate.
        lr_drops: epochs after which it is multiplied by ``lr_factor``, comma separated.
        lr_factor: see ``lr_drops``.
        momentum: of SGD.
        weight_decay: L2, of all parameters, learned feedback and biases included.
        first_weight_decay: that of the first epoch (0: the same).
        feedback_lr: learning rate of feedback that holds its own decay (wm, ia, sa, aa), dropped as ``lr`` is (0: ``lr``).
        alternate: k > 0: a mirror-only step, then k task-only ones, and so on (0: both at every step). See below.
        delay_epochs: so many epochs come first, all steps mirror-only; the schedule of both parts begins after them, as p2's drops do.
        augment: random crops (4 pixels of padding) and mirrored images.
        precision: "float32" (on CUDA convolutions are then made in TF32, PyTorch's default), or "bfloat16": forward and backward under autocast, weights and optimizer in float32.
        revision: of the recipe; raised by any fix that changes numbers.

    Defaults are p3's MNIST recipe (p3 section 5).

    Phases (p2 section 1.3; its ``alternate_step_freq`` and ``delay_epochs``) are for feedback that learns from activity or W, and not
    from the task: wm, ia, sa, aa, primitives. A mirror-only step moves that feedback and nothing else, a task-only step all but it. What
    rests does not move at all: no decay, and its momentum waits. That is our reading; p2's code multiplies one loss by 0 and steps both
    optimizers, so that momentum coasts through the other's phase. Running statistics of batch norm follow activity in every step (p2's
    too). Steps count over the whole run, the delay's included, and each takes a batch: ``epochs`` counts all of them, whichever part
    learns. p2's code multiplies the epochs of the drops by k + 1; here they are what they say.
    """

    experiment: str
    rule: str
    seed: int
    options: str = ""
    dataset: str = "mnist"
    model: str = "mlp"
    hidden: str = "512,512"
    epochs: int = 40
    batch: int = 64
    lr: float = 0.01
    lr_drops: str = "20,30"
    lr_factor: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    first_weight_decay: float = 0.0
    feedback_lr: float = 0.0
    alternate: int = 0
    delay_epochs: int = 0
    augment: bool = False
    precision: str = "float32"
    revision: int = 1

    def __post_init__(self) -> None:
        for f in fields(self):  # 1 and 1.0 are one setting, and so one run
            if f.type == "float":
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(f"unknown precision {self.precision!r}; known: float32, bfloat16")
        for name in ("alternate", "delay_epochs"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} is negative; it must be 0 (none) or a positive number")
        if self.delay_epochs and self.delay_epochs >= self.epochs:
            raise UserError(f"delay_epochs={self.delay_epochs} leaves none of {self.epochs} epochs to the task; make epochs larger")
        if self.alternate or self.delay_epochs:
            r = make_rule(self.rule, **self.rule_options)
            if not (r.own_decay and r.learned):
                raise UserError(
                    f"a mirror phase would teach {self.rule} nothing, for no feedback of it learns without the task; "
                    "leave alternate and delay_epochs at 0"
                )
            if r.clamp_forward:
                raise UserError("clamp_forward moves W after mirror-only steps too; leave it out, or alternate and delay_epochs at 0")

    @property
    def run(self) -> str:
        """Identity, see :func:`identity`."""
        return identity(self)

    @property
    def rule_options(self) -> dict[str, Any]:
        """``options`` as keyword arguments."""
        return parse_options(self.options)

    def schedule(self, epoch: int) -> dict[str, float]:
        """Learning rate and weight decay of epoch ``epoch``, counted from 0; those of the first hold in a delay before it."""
        epoch = max(0, epoch - self.delay_epochs)
        drops = sum(epoch >= e for e in integers(self.lr_drops))
        first = epoch == 0 and self.first_weight_decay > 0
        decay = self.first_weight_decay if first else self.weight_decay
        return {"lr": self.lr * self.lr_factor**drops, "weight_decay": decay}

    def phase(self, epoch: int, step: int) -> str:
        """What moves in a step: "mirror", "task" or "joint". ``step`` counts over the whole run; it and the epoch from 0."""
        if epoch < self.delay_epochs:
            return "mirror"
        if not self.alternate:
            return "joint"
        return "task" if step % (self.alternate + 1) else "mirror"


def parse_options(text: str) -> dict[str, Any]:
    """``"init=xavier expansion=10 implicit=true"`` as keyword arguments; numbers and true/false are read as such."""

    def value(word: str) -> Any:
        try:
            return json.loads(word)
        except json.JSONDecodeError:
            return word

    pairs = [item.partition("=") for item in text.split()]
    if bad := [name for name, sign, _ in pairs if not sign]:
        raise UserError(f"rule options are written NAME=VALUE, separated by spaces; {bad[0]!r} has no value")
    return {name: value(word) for name, _, word in pairs}


def integers(text: str) -> list[int]:
    """``"20,30"`` as a list of integers; ``""`` as an empty one."""
    return [int(word) for word in text.split(",") if word.strip()]


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


def weighted(net: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> every linear and convolutional layer, in order from the input."""
    return {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def layer_epochs(epochs: int) -> set[int]:
    """When layers are measured: epochs 0 to 10, every fifth, and the last."""
    return {e for e in range(epochs + 1) if e <= 10 or e % 5 == 0 or e == epochs}


def measure(net: nn.Module, config: Config, sets: data.Data, epoch: int, extra: Extra | None = None) -> list[list[Any]]:
    """Rows (epoch, layer, depth, metric, value) of the network after ``epoch`` epochs."""
    rows: list[list[Any]] = []
    splits = {"val_accuracy": sets.val, "test_accuracy": sets.test}
    resident = isinstance(sets.train, data.Split)  # decoding a million photographs once more would cost an epoch
    if resident and (epoch % 5 == 0 or epoch == config.epochs):
        splits["train_accuracy"] = sets.train
    rows += [[epoch, "", None, metric, accuracy(net, split)] for metric, split in splits.items() if split is not None]
    if epoch in layer_epochs(config.epochs):
        norms = {name: torch.linalg.vector_norm(m.weight.double()).item() for name, m in weighted(net).items()}
        tables = [pd.DataFrame({"layer": list(norms), "depth": range(1, len(norms) + 1), "weight_norm": list(norms.values())})]
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
        folder: a :class:`fa.records.Folder` to keep checkpoints in (default None: nothing is written).
        until: ``time.monotonic()`` at which to have stopped; a checkpoint is written and None returned if an epoch would not fit.
        on_epoch: called after every epoch with its number and the latest whole-network metrics.
        extra: called whenever the network is measured, epoch 0 and after every epoch; its rows join the table.
        compiled: train through ``torch.compile`` (default False).

    Returns:
        The run's table: ``epoch, layer, depth, metric, value``; epoch 0 is the untrained network. Its ``attrs["status"]``
        says ``state`` ("finished", or "diverged" with the epoch at which the loss was no longer finite) and ``seconds``.
    """
    with on(device), stream(device):
        return drain(running(config, device, folder, until, on_epoch, extra, compiled))


def running(
    config: Config,
    device: str = "cpu",
    folder: Any = None,
    until: float = math.inf,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    extra: Extra | None = None,
    compiled: bool = False,
    sets: data.Data | None = None,
) -> Generator[None, None, pd.DataFrame | None]:
    """:func:`train` as a generator that yields after every step, for :func:`fa.engine.together`; ``sets``: data that runs share."""
    begin = time.monotonic()
    sets = sets or data.load(config.dataset, device)
    net = seed_network(config, sets.shape, sets.classes).to(device)
    if torch.device(device).type == "cuda":
        net = net.to(memory_format=torch.channels_last)
    opt = sgd(net, config)
    state, saved = {"epoch": 0, "rows": [], "seconds": 0.0}, begin
    if checkpoint := folder and folder.checkpoint():
        state = {k: checkpoint[k] for k in state}
        net.load_state_dict(checkpoint["net"])
        opt.load_state_dict(checkpoint["optimizer"])
        for p, kept in opt.state.items():  # in this device's memory layout, which need not be that of the checkpoint
            if kept.get("momentum_buffer") is not None:
                kept["momentum_buffer"] = torch.empty_like(p).copy_(kept["momentum_buffer"])
    else:
        state["rows"] = measure(net, config, sets, 0, extra)
    before, status = state["seconds"], {"state": "finished"}
    stepper = Stepper(net, opt, config, sets.train, compiled)

    def save() -> None:
        state["seconds"] = before + time.monotonic() - begin
        if folder:
            folder.save({**state, "net": net.state_dict(), "optimizer": opt.state_dict()})

    last = 0.0  # seconds of the latest epoch
    for epoch in range(state["epoch"], config.epochs):
        now = time.monotonic()
        if now + 1.1 * last > until:
            save()
            return None
        losses = yield from stepper.epoch(epoch)
        loss = losses.mean().item()
        rows = [[epoch + 1, "", None, "train_loss", loss]]
        if not math.isfinite(loss):
            status = {"state": "diverged", "epoch": epoch + 1}
            break
        rows += measure(net, config, sets, epoch + 1, extra)
        state["rows"] += rows
        state["epoch"] = epoch + 1
        if on_epoch:
            on_epoch(epoch + 1, {metric: value for _, layer, _, metric, value in rows if not layer})
        last = time.monotonic() - now
        if time.monotonic() - saved > 30 and epoch + 1 < config.epochs:
            save()
            saved = time.monotonic()
    table = pd.DataFrame(state["rows"], columns=["epoch", "layer", "depth", "metric", "value"])
    table["depth"] = table["depth"].astype("Int64")
    table.attrs["status"] = {**status, "seconds": round(before + time.monotonic() - begin, 1)}
    return table


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
