"""Direct feedback alignment: the error at the network's output is sent to every layer at once, through fixed random matrices.

This is the one rule here that is not layer-wise. At each tap the graph is cut; when the output error arrives, one autograd function
hands every tap its own copy, B_l e. No error travels down layer by layer, so the backward pass computes no dx at all and is cheaper
than backprop's. Nothing is replaced by hooks: a scaled loss scales every gradient, and a skip path adds its own error by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import UserError
from .feedback import ConvMap, generator
from .layers import put_on
from .rules import RULES, Rule, bernoulli, rms, uniform
from .steps import Converted


@dataclass(frozen=True)
class DFA(Rule):
    """Direct feedback alignment with the error e = dloss/dlogits.

    .. math:: dx_l = B_l^T e

    The error at the *input* of every convolution and linear layer, the output layer included, is replaced; normalisation,
    activation and pooling below a tap are exact.

    Args:
        tap: ``"input"`` (default; p3's figures and BioTorch's): the layer's input alone, so that a skip beside it adds its own
            error. ``"block"``: the activation that enters a block is cut as well, skip and all, so that what arrives is B_l e and
            no more (ours).
        form: ``"kernel"`` (default; p3's figures): a convolution's B_l is (classes, in, kh, kw); e is spread over the output map and
            sent through the transposed convolution with the layer's own geometry. ``"dense"`` (Nokland's): B_l is (classes, in,
            h, w), one column for each unit; needs ``convert(..., sample=x)``. A linear layer's is (classes, in) in both.
            ``"shared"`` (Launay et al.'s): as dense, but all are cut from one random matrix (classes, largest input): a layer takes
            the first columns that it needs, times its own scale.
        blocks: class names of the modules that ``tap="block"`` cuts (default: those of the ResNets here and in torchvision).
        classes: length of the output error (default 0: that of the network's last linear or convolutional layer).
        init: scale of B_l. ``"match"``: the RMS of the layer's own W at conversion; ``"xavier"``: Xavier on B_l's shape (p3's).
        density: fraction of entries of B_l (of the shared matrix) that exist, without rescaling.

    ``feedback_weight`` raises and ``alignment`` leaves its layers out: no kernel of W's shape exists.
    Source: Nokland 2016 (arXiv 1609.01596); the default form: authors' code of p3 (a fork of BioTorch); shared: after
    Launay et al. 2019 (arXiv 1906.04554) and their TinyDFA; which columns a layer takes and how they are scaled is our reading.
    """

    name = "dfa"
    equation = "dx_l = B_l^T e, e the error at the network's output"
    source = "Nokland 2016; Li & Benna 2024 (this form)"

    tap: str = "input"
    form: str = "kernel"
    blocks: str = "BasicBlock,Bottleneck"
    classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tap not in ("input", "block"):
            raise UserError(f"dfa: tap={self.tap!r} is not one of input, block")
        if self.form not in ("kernel", "dense", "shared"):
            raise UserError(f"dfa: form={self.form!r} is not one of kernel, dense, shared")
        if self.norm != "fixed" or self.clamp_forward:
            raise UserError("dfa has no kernel of W's shape, so norm and clamp_forward do not apply")

    def attach(self, net: nn.Module, layers: dict[str, nn.Module], sizes: dict[str, Any], seed: int) -> Callable[[], None]:
        """Draw B_l for every layer; the function returned puts them in place and hooks the network's two ends."""
        classes = self.classes or next(reversed(layers.values())).weight.shape[0]
        tape = Tape()
        if self.form != "kernel" and set(layers) - set(sizes):
            raise UserError(f"dfa: form={self.form!r} needs the sizes of the maps; pass a batch of inputs, convert(..., sample=x)")
        size = {name: None if self.form == "kernel" else sizes[name][0] for name in layers}
        shared = None
        if self.form == "shared":
            gen, exact = generator(seed, "dfa", "shared"), torch.empty(0, dtype=torch.float64)
            columns = max(size[name].numel() if m.weight.dim() > 2 else m.weight.shape[1] for name, m in layers.items())
            shared = uniform((classes, columns), 1.0, exact, gen)
            shared = shared if self.density == 1 else shared * bernoulli(shared.shape, self.density, exact, gen)
        feedback = {name: DirectFeedback(self, m, name, seed, classes, tape, size[name], shared) for name, m in layers.items()}
        blocks = []
        if self.tap == "block":
            named = {b.strip() for b in self.blocks.split(",")}
            blocks = [m for m in net.modules() if type(m).__name__ in named]
            if not blocks:
                raise UserError(f"dfa: tap='block' found no block of class {self.blocks}; name the network's with blocks='...'")

        def attach() -> None:
            for name, layer in layers.items():
                put_on(layer, feedback[name], next((new for old, new in _DIRECT.items() if isinstance(layer, old)), type(layer)))
            tape.put_on(net)
            for block in blocks:
                first = next(m for m in block.modules() if isinstance(m, Converted))
                tape.handles.append(block.register_forward_pre_hook(BlockTap(first)))

        return attach


class BlockTap:
    """Cut the graph at a block's input, its skip path included, with the B of the block's first layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, block: nn.Module, args: tuple) -> tuple:
        """A forward pre-hook."""
        return (self.layer.feedback.tap(args[0], self.layer), *args[1:])


class Tape:
    """What one forward pass tapped: pairs of (tapped input, spread matrix), between the network's two ends."""

    def __init__(self) -> None:
        self.taps: list[tuple[Tensor, Tensor]] = []
        self.recording = False
        self.handles: list[Any] = []

    def put_on(self, net: nn.Module) -> None:
        """Hook the network's entry and exit."""
        self.handles = [net.register_forward_pre_hook(self.open), net.register_forward_hook(self.close)]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def open(self, net: nn.Module, args: Any) -> None:
        """Start a pass."""
        self.taps, self.recording = [], True

    def close(self, net: nn.Module, args: Any, out: Any) -> Any:
        """End a pass: the output error will go to every tap."""
        taps, self.taps, self.recording = self.taps, [], False
        if not taps:
            return out
        if not isinstance(out, Tensor):
            raise UserError(f"dfa needs a network whose output is one tensor, not {type(out).__name__}")
        if out.shape[-1] != taps[0][1].shape[0]:
            raise UserError(f"dfa: the output's last axis has {out.shape[-1]} entries, its feedback {taps[0][1].shape[0]}; "
                            f"convert(..., classes={out.shape[-1]})")  # fmt: skip
        return _Broadcast.apply(out, len(taps), *(x for x, _ in taps), *(S for _, S in taps))


class _Broadcast(torch.autograd.Function):
    """Identity on the logits; backward also sends e S_l to every tap."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, n: int, *taps: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in taps[:n]]
        ctx.save_for_backward(*taps[n:])
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        sent = []
        for shape, S in zip(ctx.shapes, ctx.saved_tensors):
            d = e @ S.flatten(1).to(e.dtype)
            if S.dim() == 2 and d.dim() < len(shape):  # tokens share the error of their sample
                d = d.reshape(shape[0], *[1] * (len(shape) - 2), shape[-1]).expand(shape)
            sent.append(d.reshape(shape))
        return e, None, *sent, *(None for _ in sent)


class DirectFeedback(nn.Module):
    """What a layer under DFA keeps beside its own parameters: its B and the network's tape."""

    def __init__(
        self, rule: DFA, layer: nn.Module, name: str, seed: int, classes: int, tape: Tape,
        size: torch.Size | None = None, shared: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rule, self.layer_name, self.tape = rule, name, tape
        W = layer.weight.detach()
        inputs = W.shape[1] * getattr(layer, "groups", 1)
        receptive = W[0, 0].numel()
        shape = (classes, inputs, *W.shape[2:]) if size is None else (classes, *size) if W.dim() > 2 else (classes, inputs)
        match rule.init:
            case "match":
                std = rms(W)
            case "xavier":
                std = math.sqrt(2 / ((classes + inputs) * receptive))
            case "kaiming":
                std = math.sqrt(1 / (3 * inputs * receptive))
            case number:
                std = float(number)
        if shared is not None:
            B = (std * shared[:, : math.prod(shape[1:])]).view(shape).to(W)
        else:
            gen = generator(seed, name)
            B = uniform(shape, std, W, gen)
            B = B if rule.density == 1 else B * bernoulli(shape, rule.density, W, gen)
        self.register_buffer("B", B)
        self.exact = False
        self.backward_ran = self.traced = False
        self._spread: dict[Any, Tensor] = {}

    def tap(self, x: Tensor, layer: nn.Module | None = None) -> Tensor:
        """Cut the graph at the layer's input, to be handed B e when the output error is known."""
        self.traced = True  # seen by its own forward
        if self.plain():
            return x
        if not self.tape.recording:
            raise RuntimeError(
                f"layer {self.layer_name!r} is under dfa: call the whole network that was converted, not a part of it, and "
                "leave gradient checkpointing off, which runs parts again"
            )
        if x.requires_grad:
            spread = isinstance(layer, nn.Conv2d) and self.rule.form == "kernel"
            # a view, so that two layers which read one tensor have a gradient each under torch.compile as well
            self.tape.taps.append((x.view_as(x), self.spread(layer, x) if spread else self.B))
        return x.detach()

    def plain(self) -> bool:
        """Whether the forward pass at hand is the stock layer's."""
        return self.exact or not torch.is_grad_enabled()

    def forward(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """A tapped linear layer whose weight another module owns (see fa.attention)."""
        return F.linear(self.tap(x), W, b)

    def spread(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """(classes, in, h, w): where a unit error of each class goes, made once for each input size."""
        size = tuple(x.shape[-2:])
        if size not in self._spread:
            left, right, top, bottom = layer._reversed_padding_repeated_twice
            classes, inputs, *kernel = self.B.shape
            h, w = size[0] + top + bottom, size[1] + left + right
            grown = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip((h, w), layer.dilation, kernel, layer.stride)]
            ones = self.B.new_ones(1, classes, *grown)
            like = self.B.new_empty(1, classes * inputs, h, w)
            op = ConvMap(layer.stride, (0, 0), layer.dilation, classes)  # a group a class
            S = op.transpose(ones, self.B, like).view(classes, inputs, h, w)
            self._spread[size] = S[..., top : h - bottom, left : w - right].contiguous()
        return self._spread[size]

    def _apply(self, fn: Any, recurse: bool = True) -> DirectFeedback:
        self._spread = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._spread = {}
        super()._load_from_state_dict(*args, **kwargs)


class DirectLinear(Converted, nn.Linear):
    """``nn.Linear`` under DFA; made by ``convert``, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in) -> (..., out)."""
        return super().forward(self.feedback.tap(x, self))


class DirectConv2d(Converted, nn.Conv2d):
    """``nn.Conv2d`` under DFA; made by ``convert``, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, in, h, w), as ``nn.Conv2d``."""
        return super().forward(self.feedback.tap(x, self))


_DIRECT = {nn.Linear: DirectLinear, nn.Conv2d: DirectConv2d}
RULES["dfa"] = DFA
