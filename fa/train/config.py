"""A run as data: a frozen dataclass of scalars whose hash is its identity, with its schedule and its phases. A leaf of
the trainer."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from fa.errors import UserError
from fa.rules import rule as make_rule


def identity(config: Any) -> str:
    """A run's name: the first 12 hex digits of the sha256 of the canonical JSON of its fields.

    Fields at their default are left out of it, so that a field added later, with a default that keeps the recipe, keeps
    identities.
    """
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:12]


def canonical(config: Any) -> str:
    """The fields of a run that are not at their defaults, as JSON in alphabetical order."""
    told = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return json.dumps(told, sort_keys=True, separators=(",", ":"))


CHOICES = {
    "precision": ("float32", "bfloat16"),
    "optimizer": ("sgd", "adam"),
    "weights": ("xavier", "torch", "he"),
    "noisy": ("weights", "feedback"),
}
"""Field -> the words that it takes."""


@dataclass(frozen=True)
class Config:
    """One run: its recipe and nothing else. Equal recipes are one run, whichever figure asks for it (:attr:`run`).

    Args:
        rule: a name of ``fa.RULES``.
        seed: of initial weights, order of batches and feedback.
        options: of the rule, as ``"expansion=10 init=xavier"``; any order is read, names are kept in alphabetical
            order.
        dataset: a name of ``fa.data.SETS``.
        model: a name that ``fa.models.build`` knows.
        hidden: widths of an mlp's hidden layers, comma separated.
        epochs: passes over the training set.
        batch: images in a batch; the last, smaller batch of an epoch is dropped.
        lr: learning rate.
        lr_drops: epochs after which it is multiplied by ``lr_factor``, comma separated.
        lr_factor: see ``lr_drops``.
        warmup: so many epochs come in at a growing learning rate: ``lr`` times (e + 1/2) / warmup in epoch e from 0 (0:
            none). p2's code raises the rate at every step, from 0; ours is the mean of its rates over the epoch.
        optimizer: "sgd", with momentum, or "adam" (decay rates ``momentum`` and 0.999, eps 1e-8, PyTorch's). Learned
            feedback is in the same optimizer; Adam scales its gradient by a history of its own.
        momentum: of SGD; under Adam the decay rate of the mean gradient.
        nesterov: whether SGD's momentum is Nesterov's (p2's code).
        weight_decay: L2, of all parameters, learned feedback and biases included; under Adam, too, a part of the
            gradient.
        first_weight_decay: that of the first epoch (0: the same).
        feedback_lr: learning rate of feedback that holds its own decay (wm, ia, sa, aa), dropped as ``lr`` is (0:
            ``lr``).
        feedback_momentum: SGD's momentum of feedback that holds its own decay (-1: ``momentum``). Without momentum such
            feedback can follow W in a few steps; with momentum m no learning rate lets it settle faster than m^(t/2).
        alternate: k > 0: a mirror-only step, then k task-only ones, and so on (0: both at every step). See below.
        delay_epochs: so many epochs come first, all steps mirror-only; the schedule of both parts begins after them, as
            p2's drops do.
        update_noise: v > 0: after every step each entry of the ``noisy`` parameters moves by the learning rate of that
            step times a normal number of variance v (p2's noisy updates, ``noisy_global_opt_variance``; default 0).
        noisy: "weights": all but the feedback; "feedback": learned feedback, or frozen's copy of W, which with
            ``every=1`` is backprop that reads W through noise.
        augment: random crops (of the data set's ``pad`` pixels) and mirrored images.
        precision: "float32" (on CUDA convolutions are then made in TF32, PyTorch's default), or "bfloat16": forward and
            backward under autocast, weights and optimizer in float32 (on any CPU: :mod:`fa.train.rounding`).
        weights: initial weights, a ``kind`` of :func:`fa.train.network.initial_`.
        measure: a further measurement, by its name in ``fa.train.measure.MEASURES`` ("": none).
        first_steps: steps of the first epoch after which layers are measured as well, comma separated; their rows stand
            at epoch step / steps of an epoch.
        keep: whether the trained weights stay in the run's folder.
        revision: of the recipe; raised by any fix that changes numbers.

    Defaults are p3's MNIST recipe (the authors' configuration).

    Phases (``alternate_step_freq`` and ``delay_epochs`` of p2's code) are for feedback that learns from activity or W,
    and not from the task: wm, ia, sa, aa, primitives. A mirror-only step moves that feedback and nothing else, a
    task-only step all but it. What rests does not move at all: no decay, and its momentum waits. That is our reading;
    p2's code multiplies one loss by 0 and steps both optimizers, so that momentum coasts through the other's phase.
    Running statistics of batch norm follow activity in every step (p2's too). Steps count over the whole run, the
    delay's included, and each takes a batch: ``epochs`` counts all of them, whichever part learns. p2's code multiplies
    the epochs of the drops by k + 1; here they are what they say.
    """

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
    warmup: int = 0
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    first_weight_decay: float = 0.0
    feedback_lr: float = 0.0
    feedback_momentum: float = -1.0
    alternate: int = 0
    delay_epochs: int = 0
    update_noise: float = 0.0
    noisy: str = "weights"
    augment: bool = False
    precision: str = "float32"
    weights: str = "xavier"
    measure: str = ""
    first_steps: str = ""
    keep: bool = False
    revision: int = 1

    def __post_init__(self) -> None:
        for f in fields(self):  # 1 and 1.0 are one setting, and so one run
            if f.type == "float":
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        object.__setattr__(self, "options", format_options(parse_options(self.options)))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.optimizer != "sgd" and make_rule(self.rule, **self.rule_options).at(0).needs_sgd:
            raise UserError(
                f"implicit feedback of {self.rule} is exact only under SGD, not {self.optimizer}; leave implicit out"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum <= 0):
            raise UserError("nesterov is a form of SGD's momentum; set optimizer='sgd' and momentum above 0")
        if self.feedback_momentum != -1:
            own = self.optimizer == "sgd" and make_rule(self.rule, **self.rule_options).own_decay
            if not (own and 0 <= self.feedback_momentum < 1):
                raise UserError(
                    f"feedback_momentum={self.feedback_momentum:g} of {self.rule}: it lies in [0, 1) and is SGD's, for "
                    "the feedback of wm, ia, sa, aa and primitives; leave it at -1, the momentum of the weights"
                )
        if self.warmup and self.delay_epochs:
            raise UserError(
                "p2's feedback has its full rate in a delay and after it; leave warmup or delay_epochs at 0"
            )
        if self.warmup > self.epochs:
            raise UserError(f"warmup={self.warmup} is longer than {self.epochs} epochs; make it shorter")
        for name in ("alternate", "delay_epochs", "update_noise", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} is out of range; it is 0 (none) or a positive number")
        if self.update_noise:
            r = make_rule(self.rule, **self.rule_options)
            if r.at(0).needs_sgd:
                raise UserError(f"implicit feedback of {self.rule} follows SGD alone, not noise; leave implicit out")
            if self.noisy == "feedback" and not (r.learned or r.name == "frozen"):
                raise UserError(f"no feedback of {self.rule} moves, and so none is noisy; set noisy='weights'")
        if self.delay_epochs and self.delay_epochs >= self.epochs:
            raise UserError(
                f"delay_epochs={self.delay_epochs} leaves none of {self.epochs} epochs to the task; make epochs larger"
            )
        if self.alternate or self.delay_epochs:
            r = make_rule(self.rule, **self.rule_options)
            if not (r.own_decay and r.learned):
                raise UserError(
                    f"a mirror phase would teach {self.rule} nothing, for no feedback of it learns without the task; "
                    "leave alternate and delay_epochs at 0"
                )
            if r.clamp_forward:
                raise UserError(
                    "clamp_forward moves W after mirror-only steps too; leave it out, or leave alternate and "
                    "delay_epochs at 0"
                )

    @cached_property
    def run(self) -> str:
        """Identity, see :func:`identity`."""
        return identity(self)

    @property
    def rule_options(self) -> dict[str, Any]:
        """``options`` as keyword arguments."""
        return parse_options(self.options)

    def vary(self, **changes: Any) -> Config:
        """The same recipe but for some fields or options of its rule; an option that is None is left out.

        Args:
            changes: name -> value. A name that is no field of :class:`Config` is an option of the rule.

        Example:
            >>> Config("pfa", 0, "expansion=10 implicit=true").vary(expansion=5, implicit=None, epochs=4).options
            'expansion=5'
        """
        own = {f.name for f in fields(self)}
        options = self.rule_options | {name: value for name, value in changes.items() if name not in own}
        text = format_options({name: value for name, value in options.items() if value is not None})
        return replace(self, **{"options": text, **{name: value for name, value in changes.items() if name in own}})

    def schedule(self, epoch: int) -> dict[str, float]:
        """Learning rate and weight decay of epoch ``epoch``, counted from 0; those of the first hold in a delay
        before it."""
        epoch = max(0, epoch - self.delay_epochs)
        drops = sum(epoch >= e for e in integers(self.lr_drops))
        first = epoch == 0 and self.first_weight_decay > 0
        decay = self.first_weight_decay if first else self.weight_decay
        warm = (epoch + 0.5) / self.warmup if epoch < self.warmup else 1.0
        return {"lr": self.lr * self.lr_factor**drops * warm, "weight_decay": decay}

    def phase(self, epoch: int, step: int) -> str:
        """What moves in a step: "mirror", "task" or "joint". ``step`` counts over the whole run; it and the epoch
        from 0."""
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


def format_options(options: dict[str, Any]) -> str:
    """Keyword arguments as :func:`parse_options` reads them, in alphabetical order; a whole number has no decimal
    point."""

    def text(value: Any) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return value if isinstance(value, str) else json.dumps(value)

    return " ".join(f"{name}={text(options[name])}" for name in sorted(options))


def integers(text: str) -> list[int]:
    """``"20,30"`` as a list of integers; ``""`` as an empty one."""
    return [int(word) for word in text.split(",") if word.strip()]
