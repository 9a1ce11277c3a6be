"""Direct feedback alignment: the error at the network's output is sent to every layer at once, through fixed random matrices.

This is the one rule here that is not layer-wise. The graph is cut at every tapped input. Each cut leaves a :class:`Tap`, an expanded
zero of the output error's shape, and the network's output passes through :class:`Close`, which hands the output error e to every
tap; a tap sends B_l e to its layer's input. No error travels down layer by layer: the backward pass computes no dx at all and is
cheaper than backprop's. Autograd delivers e, so that a scaled loss scales every gradient and a skip path adds its own error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fa.errors import UserError
from fa.layers.feedback import generator
from fa.layers.hooks import Converted
from fa.rules import RULES, Rule, random_mask, rms, uniform


@dataclass(frozen=True)
class DFA(Rule):
    """Direct feedback alignment with the error e = dloss/dlogits.

    .. math:: dx_l = B_l^T e

    The error at the *input* of every convolution and linear layer, the output layer included, is replaced; normalisation,
    activation and pooling below a tap are exact.

    Args:
        tap: ``"input"`` (default; p3's figures and BioTorch's): the layer's input is cut, so that a skip path beside the layer adds
            its own error. ``"block"``: the input of every block is cut as well, its skip path included, so that B_l e alone
            arrives there (ours).
        form: ``"kernel"`` (default; p3's figures): a convolution's B_l is (classes, in, kh, kw); e is spread over the output map and
            sent through the transposed convolution with the layer's own geometry. ``"dense"`` (Nokland's): B_l is (classes, in,
            h, w), one column for each unit; needs ``convert(..., sample=x)``. A linear layer's B_l is (classes, in) in both.
            ``"shared"`` (Launay et al.'s): as dense, but all B_l are cut from one random matrix (classes, largest input): a layer
            takes the first columns that it needs, times its own scale.
        blocks: class names of the modules that ``tap="block"`` cuts (default: the blocks of the ResNets here and in torchvision).
        classes: length of the output error (default 0: the outputs of the network's last linear or convolutional layer).
        init: scale of B_l. ``"match"`` (default, ours): the RMS of the layer's own W at conversion; ``"xavier"``: Xavier on B_l's
            shape (p3's figures); ``"kaiming"``: torch's default for layers; or a positive number, the standard deviation.
        density: fraction of entries of B_l (of the shared matrix) that exist, without rescaling (default 1).

    Samples are the first axis of every layer's input, and of the output. A network's output may hold one error a sample, which all
    tokens of the sample share, or one error a token, for inputs that have as many tokens.
    ``feedback_weight`` raises and ``alignment`` leaves its layers out: no kernel of W's shape exists.

    Raises:
        UserError: an option that is not known or does not apply.

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

    def draw_feedback(
        self, net: nn.Module, layers: dict[str, nn.Module], sizes: dict[str, Any], seed: int
    ) -> dict[str, DirectFeedback]:
        """Layer name -> its feedback; the network is not changed.

        Args:
            net: the network, whose output error is sent.
            layers: qualified name -> layer, in order from the input.
            sizes: qualified name -> sizes of one sample's input and output; may be empty for ``form="kernel"``.
            seed: of the draws.

        Raises:
            UserError: sizes are needed and not known; ``tap="block"`` finds no block; a weight is all zeros under ``init="match"``.
        """
        classes = self.classes or next(reversed(layers.values())).weight.shape[0]
        if self.form != "kernel" and set(layers) - set(sizes):
            raise UserError(
                f"dfa: form={self.form!r} needs the sizes of the maps; pass a batch of inputs, convert(..., sample=x)"
            )
        named = {block.strip() for block in self.blocks.split(",")} if self.tap == "block" else set()
        blocks = [m for m in net.modules() if type(m).__name__ in named]
        if named and not blocks:
            raise UserError(
                f"dfa: tap='block' found no block of class {self.blocks}; name the network's with blocks='...'"
            )
        shapes = {}
        for name, layer in layers.items():
            W = layer.weight
            inputs = W.shape[1] * getattr(layer, "groups", 1)
            dense = self.form != "kernel" and W.dim() > 2
            shapes[name] = (classes, *sizes[name][0]) if dense else (classes, inputs, *W.shape[2:])
        shared = None
        if self.form == "shared":
            columns = max(math.prod(shape[1:]) for shape in shapes.values())
            shared = self._draw((classes, columns), 1.0, torch.empty(0, dtype=torch.float64), seed, "dfa", "shared")
        tape, feedback = Tape(net, blocks), {}
        for name, layer in layers.items():
            W, shape = layer.weight.detach(), shapes[name]
            std = self._std(layer, classes, name)
            if shared is None:
                B = self._draw(shape, std, W, seed, name)
            else:
                B = (std * shared[:, : math.prod(shape[1:])]).view(shape).to(W)
            feedback[name] = DirectFeedback(self, name, B, tape)
        return feedback

    def _draw(self, shape: tuple[int, ...], std: float, like: Tensor, seed: int, *labels: str) -> Tensor:
        gen = generator(seed, *labels)
        B = uniform(shape, std, like, gen)
        return B if self.density == 1 else B * random_mask(shape, self.density, like, gen)

    def _std(self, layer: nn.Module, classes: int, name: str) -> float:
        """Standard deviation of B_l that option ``init`` asks for."""
        W = layer.weight.detach()  # (out, in / groups, *kernel)
        inputs, receptive = W.shape[1] * getattr(layer, "groups", 1), W[0, 0].numel()
        match self.init:
            case "match":
                return self.nonzero(rms(W), "init", name)
            case "xavier":
                return math.sqrt(2 / ((classes + inputs) * receptive))
            case "kaiming":
                return math.sqrt(1 / (3 * inputs * receptive))
        return float(self.init)


# ------------------------------------------------------------------------------------------ the cut graph

Spread = tuple[Tensor, Tensor | None, Tensor | None]
"""What sends an error to a tap: S (classes, in, ...) and, for a map, two index vectors. Positions inside a map are alike, so that
S holds each distinct row and column of the map once; the vectors say which of S's rows (h,) and columns (w,) each of the map's is."""


def send(e: Tensor, spread: Spread, shape: torch.Size) -> Tensor:
    """e S: the error that a tap gets, in the memory format of S.

    Args:
        e: output error (..., classes): one a row of the input, or one a sample, (n, classes), which the sample's tokens share.
        spread: see :data:`Spread`.
        shape: shape of the tapped input, and of the result.
    """
    S, rows, columns = spread
    if rows is None:
        d = e @ S.flatten(1).to(e.dtype)  # (..., classes) (classes, in) -> (..., in)
        if S.dim() == 2 and d.dim() < len(shape):  # (n, in) -> (n, tokens, in)
            d = d.view(shape[0], *[1] * (len(shape) - 2), shape[-1]).expand(shape)
        return d.reshape(shape)
    last = not S.is_contiguous()
    S = S.permute(0, 2, 3, 1) if last else S  # (classes, rows, columns, in) in channels_last
    d = (e @ S.flatten(1).to(e.dtype)).view(*e.shape[:-1], *S.shape[1:])  # (n, in, rows, columns)
    if last:
        return d.index_select(-2, columns).index_select(-3, rows).movedim(-1, -3)  # (n, h, w, in) -> (n, in, h, w)
    return d.index_select(-1, columns).index_select(-2, rows)  # (n, in, h, w)


class Tap(torch.autograd.Function):
    """Zeros of the output error's shape, which take no memory. Their gradient is the error e, and the gradient of ``x`` is e S.

    Nothing is saved for the backward pass, so that the second pass of a gradient checkpoint, which taps nothing, saves the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leading: int, spread: Spread) -> Tensor:
        ctx.shape, ctx.spread = x.shape, spread
        return x.new_zeros(()).expand(*x.shape[:leading], spread[0].shape[0])  # (n, classes) or (n, tokens, classes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        return send(e, ctx.spread, ctx.shape), None, None  # e (..., classes) -> shape of x


class Close(torch.autograd.Function):
    """Identity on the network's output (..., classes); every tap, of the output's shape, gets the output's error too."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *taps: Tensor) -> Tensor:
        ctx.taps = len(taps)
        return out.detach()  # no view, so that the output may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, ...]:
        return e, *[e] * ctx.taps


class Tape:
    """The taps of one forward pass. Its :meth:`forward` takes the place of the network's ``forward``.

    Hooks at the network's two ends would be compiled one by one, each a graph of its own. A tap is made where its input is, so
    that the backward pass comes to it there and one B_l e lives at a time.

    Args:
        net: the network, whose output error is sent.
        blocks: modules whose input is cut as well, with B_l of the block's first layer (``tap="block"``).
    """

    def __init__(self, net: nn.Module, blocks: list[nn.Module]) -> None:
        self.net, self.blocks, self.own = net, blocks, None
        self.handles: list[Any] = []
        self.taps: list[list[Tensor]] | None = None  # None: no pass is under way

    def put_on(self) -> None:
        """Stand between the network, whose layers are converted by now, and its ``forward``."""
        self.own = vars(self.net).get("forward")  # one that somebody set on this network alone
        self.net.forward = self.forward
        for block in self.blocks:
            first = next(m for m in block.modules() if isinstance(m, Converted))
            self.handles.append(block.register_forward_pre_hook(BlockTap(first)))

    def remove(self) -> None:
        """Step aside, unless somebody has set another ``forward`` since, which calls this one."""
        if getattr(vars(self.net).get("forward"), "__self__", None) is self:
            del self.net.forward
            if self.own:
                self.net.forward = self.own
        for handle in self.handles:
            handle.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass.

        Raises:
            UserError: the output is not one tensor, or its last axis has not ``classes`` entries.
            RuntimeError: the output has neither one error a sample nor one error a row of a tapped input.
        """
        self.taps = []
        try:
            return self.close(
                self.own(*args, **kwargs) if self.own else type(self.net).forward(self.net, *args, **kwargs)
            )
        finally:  # a pass that failed, or that a checkpoint ran only in part, leaves nothing behind
            self.taps = None

    def add(self, x: Tensor, spread: Spread) -> None:
        """Tap ``x``: its gradient will be the output error, spread.

        Whether the output holds an error a row or an error a sample shows at the end of the pass; both are tapped where they differ.
        """
        rows = x.dim() - spread[0].dim() + 1  # leading axes: x (*rows, in) or (*rows, in, h, w)
        self.taps.append([Tap.apply(x, leading, spread) for leading in ((rows,) if rows < 2 else (rows, 1))])

    def close(self, out: Any) -> Any:
        """The network's output (..., classes), whose error will go to every tap."""
        if not self.taps:
            return out
        if not isinstance(out, Tensor):
            raise UserError(f"dfa needs a network whose output is one tensor, not {type(out).__name__}")
        classes, found = self.taps[0][0].shape[-1], out.shape[-1]
        if found != classes:
            raise UserError(
                f"dfa: the output's last axis has {found} entries, its feedback {classes}; convert(..., classes={found})"
            )
        chosen = []
        for tap in self.taps:
            fitting = [zeros for zeros in tap if zeros.shape == out.shape]
            if not fitting:
                raise RuntimeError(
                    f"dfa: an output of shape {tuple(out.shape)} has no error for each row of a layer's input, whose leading "
                    f"axes are {tuple(tap[0].shape[:-1])}"
                )
            chosen.append(fitting[0])
        return Close.apply(out, *chosen)


class BlockTap:
    """Cut the graph at a block's input, its skip path included, with the B of the block's first layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, block: nn.Module, args: tuple) -> tuple:
        """A forward pre-hook."""
        fb = getattr(self.layer, "feedback", None)
        if not isinstance(fb, DirectFeedback):  # the layer has another rule by now
            return args
        return fb.tap(args[0], self.layer), *args[1:]


def run_again() -> bool:
    """Whether a gradient checkpoint of the non-reentrant kind runs this part of a pass again.

    It does so under hooks for saved tensors, which a pass outside the converted network otherwise has not. The reentrant kind has
    no hooks, and is refused.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("dfa: hooks for saved tensors are in use"):
            return False
    except RuntimeError:
        return True


# ------------------------------------------------------------------------------------------ layers


class DirectFeedback(nn.Module):
    """What a layer under DFA keeps: ``layer.feedback``.

    Args:
        rule: the rule.
        name: qualified name of the layer.
        B: fixed random matrix (classes, in), kernel (classes, in, kh, kw), or one column for each unit (classes, in, h, w).
        tape: the network's.
    """

    def __init__(self, rule: DFA, name: str, B: Tensor, tape: Tape) -> None:
        super().__init__()
        self.rule, self.layer_name, self.tape = rule, name, tape
        self.register_buffer("B", B)
        self.use_backprop = False
        self.backward_ran = self.traced = False
        self._spread: dict[tuple[int, int, bool], Spread] = {}

    def tap(self, x: Tensor, layer: nn.Module | None = None) -> Tensor:
        """``x`` cut from the graph below it, which will get B_l e when the output error is known.

        Args:
            x: the layer's input (..., in) or (n, in, h, w).
            layer: the layer, for the geometry of a convolution.

        Raises:
            RuntimeError: the layer was called by itself, or by a reentrant gradient checkpoint.
        """
        self.traced = True  # the layer's own forward ran: the check of its weight (hooks.watch) has nothing to find
        if self.bypassed():
            return x
        if self.tape.taps is None:
            if run_again():
                return x.detach()  # the first pass has tapped x
            raise RuntimeError(
                f"layer {self.layer_name!r} is under dfa: call the whole network that was converted, not a part of it; gradient "
                "checkpointing works with use_reentrant=False"
            )
        if x.requires_grad:
            kernel = isinstance(layer, nn.Conv2d) and self.rule.form == "kernel"
            self.tape.add(x, self.spread(layer, x) if kernel else (self.B, None, None))
        return x.detach()

    def bypassed(self) -> bool:
        """Whether the forward pass at hand is the stock layer's."""
        return self.use_backprop or not torch.is_grad_enabled()

    def forward(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """A linear layer whose weight another module owns (:mod:`fa.layers.attention`); x (..., in) -> (..., out)."""
        return F.linear(self.tap(x), W, b)

    def spread(self, layer: nn.Conv2d, x: Tensor) -> Spread:
        """Where an error of each class goes, made once for each input size and memory format.

        An error that is the same everywhere on the output map reaches a position of the input through all entries of B that cover it.
        """
        key = (*x.shape[-2:], torch.compiler.is_compiling() or not x.is_contiguous())
        if key not in self._spread:
            left, right, top, bottom = layer._reversed_padding_repeated_twice
            axes = zip(x.shape[-2:], ((top, bottom), (left, right)), self.B.shape[2:], layer.stride, layer.dilation)
            covered, indices = zip(*(patterns(*axis) for axis in axes))
            by_row, by_column = (torch.tensor(c, dtype=self.B.dtype, device=x.device) for c in covered)  # (rows, kh), (columns, kw)
            S = torch.einsum("cihw,rh,qw->cirq", self.B, by_row, by_column)  # (classes, in, rows, columns)
            S = S.contiguous(memory_format=torch.channels_last if key[-1] else torch.contiguous_format)
            self._spread[key] = S, *(torch.tensor(index, device=x.device) for index in indices)  # (h,), (w,)
        return self._spread[key]

    def _apply(self, fn: Any, recurse: bool = True) -> DirectFeedback:
        self._spread = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._spread = {}
        super()._load_from_state_dict(*args, **kwargs)


def patterns(
    n: int, padding: tuple[int, int], kernel: int, stride: int, dilation: int
) -> tuple[list[list[bool]], list[int]]:
    """Along one axis of ``n`` positions: the different patterns, each which of the kernel's entries see a position, and whose is which."""
    before, after = padding
    outputs = (n + before + after - dilation * (kernel - 1) - 1) // stride + 1
    at = [[before + i - dilation * k for k in range(kernel)] for i in range(n)]
    seen = [tuple(p % stride == 0 and 0 <= p < stride * outputs for p in row) for row in at]
    known = list(dict.fromkeys(seen))
    return [list(p) for p in known], [known.index(p) for p in seen]


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


DirectFeedback.classes = {nn.Linear: DirectLinear, nn.Conv2d: DirectConv2d}
RULES["dfa"] = DFA
