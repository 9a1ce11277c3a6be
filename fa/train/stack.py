"""Several runs as one network: the same layers, side by side in groups of channels that never meet.

The kernels of a small network leave a GPU waiting; a stack of fifteen takes a few times as long as one, in as many kernels. Its runs share
a recipe; seed and rule are each run's own. Every run keeps a network of its own, whose tensors are slices of the stack's, so that
whatever looks at one run (measurements, checkpoints) sees nothing of the others.
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

if TYPE_CHECKING:
    from fa.train.config import Config

RULES = (BP, FA, USF, FRSF, KP, PFA, PFAo)
"""Rules that do to every group of a grouped convolution what they do to a layer; the others meet a layer, or a network, as a whole."""


def key(config: Config) -> Config | None:
    """What runs that can be stacked have in common, all but seed and rule; None where a run cannot be stacked.

    It must be of a CIFAR ResNet, on images that lie on the device, under one of :data:`RULES`, and take no norm or mean over a layer, as
    ``norm="track"`` does. In float32 the output layer, here a convolution, is made in TF32.
    """
    options, rule = config.rule_options, make_rule(config.rule, **config.rule_options)
    by_layer = rule.norm != "fixed" or rule.clamp_forward or options.get("scale", "init") not in ("init", "xavier")
    between = (
        options.get("form") == "dense"
        or options.get("implicit") == "first"
        or options.get("implicit")
        and rule.density < 1
    )
    resident = not isinstance(data.SETS.get(config.dataset), data.Album)
    if not models.is_cifar_resnet(config.model) or not resident or type(rule) not in RULES or by_layer or between:
        return None
    return replace(config, rule="bp", options="", seed=0)


def groups(configs: Sequence[Config], come: Sequence[int]) -> list[list[int]]:
    """Numbers of the runs that train as one: those with one :func:`key` that have come equally far, those of a rule side by side.

    Args:
        configs: runs.
        come: epochs that each has behind it.
    """
    found: dict[Any, list[int]] = {}
    for i, config in enumerate(configs):
        alike = key(config)
        found.setdefault(i if alike is None else (alike, come[i]), []).append(i)
    return [sorted(group, key=lambda i: configs[i].rule) for group in found.values()]


@dataclass(frozen=True)
class Stacked(Rule):
    """The rules of a stack's runs, on a grouped layer.

    Args:
        parts: (rule, number of its runs), in the order of the groups. What rule number j keeps as ``B`` is here ``j_B``.
    """

    name = "stacked"
    equation = "dx = K^T dy, K of each run its own rule's"
    source = "ours"
    needs_y = False

    parts: tuple[tuple[Rule, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in ("kernel", "feedback_grad"):  # looked up once, for compiled steps cannot
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
        """Those of a tensor of the layer's weight's shape, one a rule."""
        rows = len(t) // sum(n for _, n in self.parts)
        return iter(t.split([n * rows for _, n in self.parts]))

    def init_state(self, op: Any, W: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Tensors to be filled by :func:`join`."""
        state = {}
        for j, ((rule, n), part) in enumerate(zip(self.parts, self.slices(W))):
            state |= {f"{j}_{name}": t for name, t in rule.state(replace(op, groups=n), part, gen).items()}
        return state

    def _known(
        self, method: str, each: dict[str, Iterator[Tensor]], state: dict[str, Any], **alike: Any
    ) -> Iterator[Any]:
        """(number, rule, its method's arguments), one a rule."""
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
    whole = models.build(configs[0].model, shape, classes, runs=len(configs)).to(like)
    if any(rule.name != "bp" for rule, _ in parts):
        convert(whole, Stacked(parts=tuple(parts)))
    return whole.to(memory_format=torch.channels_last) if like.is_cuda else whole


@torch.no_grad()
def join(whole: nn.Module, opt: torch.optim.SGD, nets: Sequence[nn.Module], opts: Sequence[torch.optim.SGD]) -> None:
    """Fill a stack with the networks of its runs, and its optimizer with theirs; both then share their memory.

    Args:
        whole: from :func:`build`.
        opt: SGD on it.
        nets: the runs' networks, on the same device. Parameters and running statistics become slices of the stack's; fixed feedback stays.
        opts: their optimizers; momenta become slices likewise. Only ``opt`` may step from now on.
    """
    momenta = []  # (of the stack, its runs' optimizers and parameters)
    for name, layer in whole.named_modules():
        feedback = name.endswith(".feedback")
        W = whole.get_submodule(name.removesuffix(".feedback")).weight if feedback else None
        for key, value in [*layer._parameters.items(), *layer._buffers.items()]:
            if value is None:
                continue
            of, own = range(len(nets)), key
            if feedback:
                j, own = key.split("_", 1)
                before = sum(n for _, n in layer.rule.parts[: int(j)])
                of = of[before : before + layer.rule.parts[int(j)][1]]
            modules = [nets[i].get_submodule(name) for i in of]
            theirs = [getattr(module, own) for module in modules]
            if value.dim() == 0 and not feedback:  # a number of batches, the same for all
                value.copy_(theirs[0])
                for module in modules:
                    module._buffers[own] = value
                continue
            size = value.shape if not feedback else W.shape
            between_channels = feedback and value.dim() in (2, 3)  # all else has a weight's four dimensions, or none
            joined = _join(theirs, size, 0 if W is None else len(W) // len(nets), between_channels)
            if isinstance(value, nn.Parameter):
                value.data = joined
                momenta.append((value, [opts[i] for i in of], theirs))
            else:
                layer._buffers[key] = joined
            if isinstance(value, nn.Parameter) or not feedback:
                for mine, part in zip(theirs, _parts(joined, theirs)):
                    mine.data = part
    for p, theirs_opts, theirs in momenta:
        kept = [o.state[q].get("momentum_buffer") for o, q in zip(theirs_opts, theirs)]
        kept = [
            torch.zeros_like(q) if m is None else m for q, m in zip(theirs, kept)
        ]  # from 0 a first step leaves the gradient, as it must
        joined = _join(kept, p.shape, len(p) // len(kept), False)
        opt.state[p]["momentum_buffer"] = joined
        for o, q, part in zip(theirs_opts, theirs, _parts(joined, theirs)):
            o.state[q]["momentum_buffer"] = part


def _join(parts: Sequence[Tensor], size: Sequence[int], rows: int, between_channels: bool) -> Tensor:
    """One tensor from one a run: matrices between channels in a stack; what is one number for a whole layer as ``rows`` numbers;
    all else along the first axis, with zeros for the second's new channels, if ``size`` has more."""
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
    """The slices of a joined tensor, in the shape of each run's own."""
    found = []
    for part, own in zip(joined.chunk(len(like)), like):
        part = part[:1] if own.numel() == 1 else part
        found.append((part[:, : own.shape[1]] if own.dim() > 1 else part).view(own.shape))
    return found


@torch.no_grad()
def accuracies(whole: nn.Module, runs: int, split: data.Split, batch: int = 1000) -> list[float]:
    """Percent of the split's images that each run classifies right, in eval mode and the weights' own precision."""
    training, right = whole.training, torch.zeros(runs, dtype=torch.int64, device=split.y.device)
    whole.eval()
    for x, y in split.batches(batch):
        right += (whole(x.repeat(1, runs, 1, 1)).unflatten(1, (runs, -1)).argmax(2) == y[:, None]).sum(0)
    whole.train(training)
    return [100 * n / len(split) for n in right.tolist()]
