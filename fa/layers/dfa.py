"""Direct feedback alignment: the error at the network's output goes to every layer at once, through random matrices.

This is the one rule here that is not layer-wise. The graph is cut at the input of every layer, and every cut gets its
error from the network's output (:mod:`fa.layers.tape`). No error travels down layer by layer: the backward pass
computes no dx and is cheaper than backprop's. A scaled loss scales every gradient; a skip path adds its own error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers.feedback import generator
from fa.layers.hooks import Converted
from fa.layers.maps import flat, geometry, nested
from fa.layers.passes import NO_FUNCTORCH, misfit, note_trace, saved_elsewhere, traced_effect
from fa.layers.tape import Spread, Tape, patterns
from fa.rules import RULES, Rule, random_mask, rms, uniform


@dataclass(frozen=True)
class DFA(Rule):
    """Direct feedback alignment with the error e = dloss/dlogits.

    .. math:: dx_l = B_l^T e

    The error at the *input* of every convolution and linear layer, the output layer included, is replaced;
    normalisation, activation and pooling below a cut are exact.

    Args:
        tap: ``"input"`` (default; p3's figures and BioTorch's): the layer's input is cut, so that a skip path beside
            the layer adds its own error. ``"block"``: the input of every block is cut as well, its skip path included,
            so that B_l e alone arrives there (ours).
        form: ``"kernel"`` (default; p3's figures): a convolution's B_l is (classes, in, kh, kw); e is spread over the
            output map and sent through the transposed convolution with the layer's own geometry. ``"dense"``
            (Nokland's): B_l is (classes, in, h, w), one column for each unit; needs ``convert(..., sample=x)``. A
            linear layer's B_l is (classes, in) in both. ``"shared"`` (Launay et al.'s): as dense, but all B_l are cut
            from one random matrix (classes, largest input): a layer's is the first columns of it, times its own scale.
        blocks: class names of the modules that ``tap="block"`` cuts (default: the ResNets' here and in torchvision).
        classes: length of the output error (default 0: the outputs of the last linear or convolutional layer).
        init: scale of B_l. ``"match"`` (default): the RMS of the layer's own W at conversion; ``"xavier"``: Xavier on
            B_l's shape (p3's); ``"kaiming"``; or a number: the standard deviation.
        density: fraction of entries of B_l (of the shared matrix) that exist, without rescaling (default 1).

    Samples are the first axis of every layer's input, and of the output. The output (n, classes), or (n,) for one
    class, has one error a sample, which all tokens of the sample share; (n, tokens, classes) has one error a token, and
    then every layer's input has as many tokens. A dense prediction (n, classes, h, w) is refused.
    ``feedback_weight`` raises and ``alignment`` leaves its layers out: no kernel of W's shape exists.
    Source: Nokland 2016 (arXiv 1609.01596); the default form: authors' code of p3 (a fork of BioTorch); shared: after
    Launay et al. 2019 (arXiv 1906.04554) and their TinyDFA; which columns a layer takes and their scale is our reading.
    """

    name = "dfa"
    equation = "dx_l = B_l^T e, e the error at the network's output"
    source = "Nokland 2016; Li & Benna 2024 (this form)"
    choices = Rule.choices | {"tap": ("input", "block"), "form": ("kernel", "dense", "shared")}

    tap: str = "input"
    form: str = "kernel"
    blocks: str = "BasicBlock,Bottleneck"
    classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "fixed" or self.clamp_forward:
            raise UserError("dfa has no kernel of W's shape, so norm and clamp_forward do not apply")

    def draw_feedback(
        self, net: nn.Module, layers: dict[str, nn.Module], sizes: dict[str, Any], seed: int
    ) -> dict[str, DirectFeedback]:
        """Qualified name -> the feedback of each of the ``layers``, in order from the input; nothing is changed.

        ``sizes``, of one sample's input and output by name, may be empty for ``form="kernel"``.

        Raises:
            UserError: sizes are needed and not known; no block to cut; a weight of zeros whose size B_l should have.
        """
        classes = self.classes or next(reversed(layers.values())).weight.shape[0]
        if self.form != "kernel" and set(layers) - set(sizes):
            raise UserError(f"dfa: form={self.form!r} needs the sizes of the maps; pass inputs, convert(..., sample=x)")
        named = {block.strip() for block in self.blocks.split(",")} if self.tap == "block" else set()
        blocks = [m for m in net.modules() if type(m).__name__ in named]
        if named and not blocks:
            raise UserError(f"dfa: tap='block' found no block of class {self.blocks}; name yours with blocks='...'")

        def draw(shape: tuple[int, ...], std: float, like: Tensor, *labels: str) -> Tensor:
            gen = generator(seed, *labels)
            B = uniform(shape, std, like, gen)
            return B if self.density == 1 else B * random_mask(shape, self.density, like, gen)

        shapes = {}
        for name, layer in layers.items():
            W = layer.weight  # (out, in / groups, *kernel)
            kernel = (classes, W.shape[1] * getattr(layer, "groups", 1), *W.shape[2:])
            shapes[name] = kernel if self.form == "kernel" or W.dim() == 2 else (classes, *sizes[name][0])
        if self.form == "shared":
            columns = max(math.prod(shape[1:]) for shape in shapes.values())
            shared = draw((classes, columns), 1.0, torch.empty(0, dtype=torch.float64, device="cpu"), "dfa", "shared")
        tape, feedback = Tape(net, blocks), {}
        for name, layer in layers.items():
            W, shape = layer.weight.detach(), shapes[name]
            own = torch.empty(shape, device="meta")  # of B's own shape
            std = self.gain * (self.nonzero(rms(W), "init", name) if self.init == "match" else self.std(own))
            if self.form == "shared":
                B = (std * shared[:, : math.prod(shape[1:])]).view(shape).to(W)
            else:
                B = draw(shape, std, W, name)
            feedback[name] = DirectFeedback(self, name, B, tape)
        return feedback


class DirectFeedback(nn.Module):
    """What a layer under DFA keeps: ``layer.feedback``.

    B is a fixed random matrix (classes, in), kernel (classes, in, kh, kw), or column a unit (classes, in, h, w).
    """

    acts = False  # after optimizer steps

    def __init__(self, rule: DFA, name: str, B: Tensor, tape: Tape) -> None:
        super().__init__()
        self.rule, self.layer_name, self.tape = rule, name, tape
        self.register_buffer("B", B)
        self.use_backprop = False
        self.traced = False  # whether a forward pass of the layer ran
        self.exact = False  # whether the last pass with a graph was one of exact backprop
        self._spread: dict[tuple[Any, ...], Spread] = {}

    def tap(self, x: Tensor, layer: nn.Module | None = None) -> Tensor:
        """``x`` cut from the graph below it, which will get B_l^T e when the output error is known.

        Args:
            x: the layer's input (..., in) or (n, in, h, w).
            layer: the layer, for the geometry of a convolution (default: none is needed).

        Raises:
            RuntimeError: the layer was called by itself, or by a reentrant gradient checkpoint.
            UserError: the layer has another shape than at the conversion.
        """
        # The layer's own forward ran, so that its weight's hook (:mod:`fa.layers.hooks`) has nothing to find.
        if torch.compiler.is_compiling():
            note_trace(self)
            return traced_effect(self._tap, x, layer)
        if layer and not getattr(layer._parameters.get("weight"), "_backward_hooks", None):
            layer.rewatch()
        vars(self)["traced"] = True  # a module's own setattr takes ten times as long
        return self._tap(x, layer)

    def _tap(self, x: Tensor, layer: nn.Module | None) -> Tensor:
        if self.bypassed(x):
            self.exact |= torch.is_grad_enabled()
            return x
        if x.is_nested:
            return nested(self._tap(flat(x), layer), x)
        if self.tape.taps is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1 and saved_elsewhere():
                return x if self.exact else x.detach()  # the first pass has tapped x; another guess fails loudly
            raise RuntimeError(
                f"layer {self.layer_name!r} is under dfa: call the whole network that was converted, not a part of it; "
                "gradient checkpointing works with use_reentrant=False, a traced graph if it is converted itself"
            )
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            raise RuntimeError(NO_FUNCTORCH)
        vars(self)["exact"] = False
        if x.requires_grad:
            kernel, made = isinstance(layer, nn.Conv2d) and self.rule.form == "kernel", self.B.shape[1:]
            now = (x.shape[-3], *layer.weight.shape[2:]) if kernel else x.shape[-len(made) :]
            if now != made:
                raise misfit(self.layer_name, made, now)
            self.tape.add(x, self.spread(layer, x) if kernel else (self.B, None, None), self)
        return x.detach()

    def bypassed(self, x: Any) -> bool:
        """Whether the forward pass at hand is the stock layer's."""
        return self.use_backprop or not (torch.is_grad_enabled() and isinstance(x, Tensor))

    def own_gradient(self, grad: Tensor) -> bool:
        """As :meth:`fa.layers.feedback.Feedback.own_gradient`; the stock operations of this layer leave no mark."""
        return self.use_backprop or self.exact

    def forward(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """A linear layer whose weight another module owns (:mod:`fa.layers.attention`); x (..., in) -> (..., out)."""
        return F.linear(self.tap(x), W, b)

    def spread(self, layer: nn.Conv2d, x: Tensor) -> Spread:
        """Where the error of each class goes on the input map; made once for each input size and memory format.

        An error that is the same all over the output map reaches a position through all entries of B that cover it.
        """
        last = torch.compiler.is_compiling() or not x.is_contiguous()
        key = (*x.shape[-2:], last, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
        if key not in self._spread:
            now = geometry(layer)
            left, right, top, bottom = now["pad"] or [n for n in reversed(now["padding"]) for _ in range(2)]
            axes = zip(x.shape[-2:], ((top, bottom), (left, right)), self.B.shape[2:], now["stride"], now["dilation"])
            covered, indices = zip(*(patterns(*axis, layer.padding_mode) for axis in axes))
            like = {"dtype": self.B.dtype, "device": x.device}
            tables = (torch.tensor(c, **like) for c in covered)  # (rows, kh), (columns, kw)
            S = torch.einsum("cihw,rh,qw->cirq", self.B, *tables)  # (classes, in, rows, columns)
            S = S.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            self._spread[key] = S, *(torch.tensor(index, device=x.device) for index in indices)  # (h,), (w,)
        return self._spread[key]

    def _apply(self, fn: Any, recurse: bool = True) -> DirectFeedback:
        self._spread = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._spread = {}
        super()._load_from_state_dict(*args, **kwargs)


class Direct(Converted):
    """A layer under DFA: the stock layer on an input that is cut."""

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: input (..., in) -> (..., out), or (n, in, h, w) -> (n, out, h', w')."""
        return super().forward(self.feedback.tap(input, self))


class DirectLinear(Direct, nn.Linear):
    """``nn.Linear`` under DFA; made by ``convert``, never constructed."""


class DirectConv2d(Direct, nn.Conv2d):
    """``nn.Conv2d`` under DFA; made by ``convert``, never constructed."""


DirectFeedback.classes = {nn.Linear: DirectLinear, nn.Conv2d: DirectConv2d}
RULES["dfa"] = DFA
