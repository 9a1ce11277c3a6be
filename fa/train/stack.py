"""Several runs as one network: the same layers side by side, as groups of channels that never meet.

The kernels of a small network leave a GPU waiting; a stack of fifteen takes a few times as long as one network, in as
many kernels. Its runs share a recipe; seed and rule are each run's own. Every run keeps a network of its own, whose
tensors are slices of the stack's, so that measurements and checkpoints of one run see nothing of the others. Only
this module knows how a stack is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa import models
from fa.layers.convert import convert
from fa.rules import BP, FA, FRSF, KP, PFA, USF, PFAo, Rule
from fa.rules import rule as make_rule
from fa.rules.base import gradient_of, multiply, terms_of
from fa.train import data
from fa.train.config import Config
from fa.train.step import make_optimizer

if TYPE_CHECKING:
    from fa.train.loop import Run

RULES = (BP, FA, USF, FRSF, KP, PFA, PFAo)
"""Rules that act on each group of a grouped convolution independently, so that their runs can be stacked."""


def key(config: Any) -> Config | None:
    """The settings that stacked runs have in common: all but seed and rule. None for a run that cannot be stacked.

    A run can be stacked if it trains a CIFAR ResNet by SGD on images that lie on the device, under one of
    :data:`RULES`, with options that take no norm or mean over a whole layer (as ``norm="track"`` does). In float32 the
    stack's output layer, a convolution, uses TF32.
    """
    if not isinstance(config, Config) or not models.is_cifar_resnet(config.model):
        return None
    options, rule = config.rule_options, make_rule(config.rule, **config.rule_options)
    by_layer = rule.norm != "fixed" or rule.clamp_forward or options.get("scale", "init") not in ("init", "xavier")
    own = rule.gain != 1 or config.update_noise > 0  # which the stack's rule and step do not know
    implicit = options.get("implicit")
    between = options.get("form") == "dense" or implicit == "first" or (implicit and rule.density < 1)
    on_disk = isinstance(data.SETS.get(config.dataset), data.ImageFolderSource)
    if on_disk or type(rule) not in RULES or own or by_layer or between or config.optimizer != "sgd":
        return None
    return replace(config, rule="bp", options="", seed=0)


def groups(configs: Sequence[Any], most: int) -> list[list[Any]]:
    """Runs that train as one: at most ``most`` with one :func:`key`, those of a rule side by side; a run that cannot
    be stacked is alone.

    The stacks come first, each where its first run stood.
    """
    alike: dict[Any, list[Any]] = {}
    for i, config in enumerate(configs):
        shared = key(config) if most > 1 else None
        alike.setdefault(i if shared is None else shared, []).append(config)
    parts = [some[i : i + most] for some in alike.values() for i in range(0, len(some), most)]
    return sorted((sorted(part, key=lambda c: c.rule) for part in parts), key=lambda part: len(part) == 1)


@dataclass(frozen=True)
class Stacked(Rule):
    """The rules of a stack's runs, on a grouped layer.

    Args:
        parts: (rule, number of its runs), in the order of the groups. The tensor that rule number j calls ``B`` is
            ``j_B`` here.
    """

    name = "stacked"
    equation = "dx = K^T dy, with each run's own K"
    source = "ours"
    needs_y = False

    parts: tuple[tuple[Rule, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in ("kernel", "feedback_grad"):  # looked up once: a compiled step cannot inspect signatures
            found = (
                inspect.signature(getattr(rule, method)).parameters if hasattr(rule, method) else ()
                for rule, _ in self.parts
            )
            object.__setattr__(self, f"_{method}", tuple(tuple(names) for names in found))

    @property
    def learned(self) -> tuple[str, ...]:
        return tuple(f"{j}_{name}" for j, (rule, _) in enumerate(self.parts) for name in rule.learned)

    @property
    def needs_sgd(self) -> bool:
        return any(rule.needs_sgd for rule, _ in self.parts)

    def slices(self, t: Tensor) -> Iterator[Tensor]:
        """The parts of a tensor of the weight's shape (runs * out, ...), one for each rule (its runs * out, ...)."""
        rows = len(t) // sum(n for _, n in self.parts)
        return iter(t.split([n * rows for _, n in self.parts]))

    def init_state(self, op: Any, W: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Tensors of the right shapes, which :func:`join` fills."""
        state = {}
        for j, ((rule, n), part) in enumerate(zip(self.parts, self.slices(W))):
            state |= {f"{j}_{name}": t for name, t in rule.state(replace(op, groups=n), part, gen).items()}
        return state

    def _known(
        self, method: str, each: dict[str, Iterator[Tensor]], state: dict[str, Any], **alike: Any
    ) -> Iterator[Any]:
        """(number, rule, arguments of its method), for each rule."""
        for j, ((rule, _), names) in enumerate(zip(self.parts, getattr(self, f"_{method}"))):
            known = {**alike, **{name: next(parts) for name, parts in each.items()}}
            own = {name: state[f"{j}_{name}"] for name in names if f"{j}_{name}" in state}
            yield j, rule, {name: known[name] for name in names if name in known} | own

    def kernel(self, W, **state):
        return torch.cat([
            multiply(terms_of(rule.kernel(**known), state.get(f"{j}_mask")))
            for j, rule, known in self._known("kernel", {"W": self.slices(W)}, state)
        ])  # fmt: skip

    def feedback_grad(self, op, W, dW, **state):
        grads = {}
        each, alike = {"W": self.slices(W), "dW": self.slices(dW)}, {"op": op}
        for j, rule, known in self._known("feedback_grad", each, state, **alike):
            if rule.learned:
                grads |= {f"{j}_{name}": gradient_of(g) for name, g in rule.feedback_grad(**known).items()}
        return grads


class EachRun(nn.Module):
    """A module without parameters, applied to the channels of each run."""

    def __init__(self, module: nn.Module, runs: int) -> None:
        super().__init__()
        self.module, self.runs = module, runs

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, runs * c, h, w) -> (n, runs * c', h', w')."""
        return torch.cat([self.module(part) for part in x.chunk(self.runs, 1)], 1)


class ZeroChannels(nn.Module):
    """``n`` channels of zeros after the channels that there are."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, c, h, w) -> (n, c + n, h, w)."""
        return F.pad(x, (0, 0, 0, 0, 0, self.n))


def grouped(net: nn.Module, runs: int) -> nn.Module:
    """The network with ``runs`` groups in every layer, by module surgery; it takes and returns ``runs`` times the
    channels.

    Every group of a convolution gets as many inputs as outputs, by channels of zeros whose weights start as zeros and
    stay zeros: cuDNN has
    no fast kernel otherwise. A linear layer becomes a 1x1 convolution. Names of modules stay.
    """
    for name, m in list(net.named_modules()):
        if isinstance(m, nn.Conv2d):
            n_out, n_in = m.weight.shape[:2]
            lacking = max(n_out - n_in, 0)
            new = nn.Conv2d((n_in + lacking) * runs, n_out * runs, m.kernel_size, m.stride, m.padding, m.dilation, runs,
                            m.bias is not None)  # fmt: skip
            if lacking:
                widen = EachRun(ZeroChannels(lacking), runs)
                new.register_forward_pre_hook(lambda _, args, widen=widen: widen(*args))
        elif isinstance(m, nn.Linear):
            new = nn.Conv2d(m.in_features * runs, m.out_features * runs, 1, groups=runs, bias=m.bias is not None)
            new.register_forward_pre_hook(lambda _, args: args[0][:, :, None, None])  # (n, runs * in) -> (.., 1, 1)
            new.register_forward_hook(lambda _, args, out: out.flatten(1))  # -> (n, runs * out)
        elif isinstance(m, nn.BatchNorm2d):
            new = nn.BatchNorm2d(m.num_features * runs, m.eps, m.momentum, m.affine, m.track_running_stats)
        elif isinstance(m, models.Shortcut):
            new = EachRun(m, runs)
        else:
            continue
        net.set_submodule(name, new)
    return net


def build(configs: Sequence[Config], shape: Sequence[int], classes: int, like: Tensor) -> nn.Module:
    """A stack for runs with one :func:`key`, those of a rule side by side; to be filled by :func:`join`.

    It takes images of ``len(configs)`` times their channels, and returns as many times ``classes`` logits.
    """
    parts: list[tuple[Rule, int]] = []
    for config in configs:
        rule = make_rule(config.rule, **config.rule_options).at(0)
        if parts and parts[-1][0] == rule:
            parts[-1] = (rule, parts[-1][1] + 1)
        else:
            parts.append((rule, 1))
    whole = grouped(models.build(configs[0].model, shape, classes), len(configs)).to(like)
    if any(rule.name != "bp" for rule, _ in parts):
        convert(whole, Stacked(parts=tuple(parts)))
    return whole.to(memory_format=torch.channels_last) if like.is_cuda else whole


@torch.no_grad()
def join(runs: Sequence[Run], shape: Sequence[int], classes: int) -> tuple[nn.Module, torch.optim.SGD]:
    """The stack of several runs and its optimizer, which share the memory of the runs' networks and optimizers.

    Args:
        runs: started runs with one :func:`key`. Parameters, running statistics and momenta of their networks and
            optimizers become slices of the stack's; fixed feedback is copied. Only the returned optimizer may step
            from now on.
        shape: channels, height and width of an image.
        classes: number of classes.
    """
    whole = build([run.config for run in runs], shape, classes, next(runs[0].net.parameters()))
    opt = make_optimizer(whole, runs[0].config)
    momenta = []  # (parameter of the stack, the runs that have a part of it, their parameters)
    for name, layer in whole.named_modules():
        feedback = name.endswith(".feedback")
        W = whole.get_submodule(name.removesuffix(".feedback")).weight if feedback else None
        for key, value in [*layer._parameters.items(), *layer._buffers.items()]:
            if value is None:
                continue
            of, own = runs, key
            if feedback:
                layer.seen = None  # weight and feedback are filled together
                j, own = key.split("_", 1)
                before = sum(n for _, n in layer.rule.parts[: int(j)])
                of = of[before : before + layer.rule.parts[int(j)][1]]
            modules = [run.net.get_submodule(name) for run in of]
            theirs = [getattr(module, own) for module in modules]
            if value.dim() == 0 and not feedback:  # batch norm's number of batches, the same for all runs
                value.copy_(theirs[0])
                for module in modules:
                    module._buffers[own] = value
                continue
            size = value.shape if not feedback else W.shape
            between_channels = feedback and value.dim() in (2, 3)  # all else has a weight's four dimensions, or none
            joined = _join(theirs, size, 0 if W is None else len(W) // len(runs), between_channels)
            if isinstance(value, nn.Parameter):
                value.data = joined
                momenta.append((value, of, theirs))
            else:
                layer._buffers[key] = joined
            if isinstance(value, nn.Parameter) or not feedback:
                for mine, part in zip(theirs, _parts(joined, theirs)):
                    mine.data = part
    for p, of, theirs in momenta:
        kept = [run.opt.state[q].get("momentum_buffer") for run, q in zip(of, theirs)]
        # A first step from a momentum of zeros leaves the gradient, as a first step without momentum does.
        kept = [torch.zeros_like(q) if m is None else m for q, m in zip(theirs, kept)]
        joined = _join(kept, p.shape, len(p) // len(kept), False)
        opt.state[p]["momentum_buffer"] = joined
        for run, q, part in zip(of, theirs, _parts(joined, theirs)):
            run.opt.state[q]["momentum_buffer"] = part
    return whole, opt


def _join(parts: Sequence[Tensor], size: Sequence[int], rows: int, between_channels: bool) -> Tensor:
    """One tensor of the stack from one tensor of each run.

    Matrices between channels (mid, out) become (runs, mid, out); a single number of a layer becomes ``rows`` numbers
    a run; all else is joined along the first axis, (out, in, ...) -> (runs * out, in + zeros, ...), as wide as
    ``size``.
    """
    if between_channels:
        return torch.stack([p.detach() for p in parts])
    ones = [1] * (len(size) - 1)
    if rows and parts[0].numel() == 1:
        return torch.cat([p.detach().reshape(1, *ones).expand(rows, *ones) for p in parts])
    joined = torch.cat([p.detach().reshape(*p.shape, *[1] * (len(size) - p.dim())) for p in parts])
    if joined.dim() == 4:
        joined = F.pad(joined, (0, 0, 0, 0, 0, size[1] - joined.shape[1]))
    return joined.contiguous(memory_format=torch.channels_last) if joined.dim() == 4 and joined.is_cuda else joined


def _parts(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The slices of a joined tensor, each in the shape of the run's own tensor."""
    found = []
    for part, own in zip(joined.chunk(len(like)), like):
        part = part[:1] if own.numel() == 1 else part
        found.append((part[:, : own.shape[1]] if own.dim() > 1 else part).view(own.shape))
    return found
