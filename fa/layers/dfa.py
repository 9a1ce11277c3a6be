"""Direct feedback alignment: the error at the network's output is sent to every layer at once, through fixed random matrices.

This is the one rule here that is not layer-wise. At each tap the graph is cut; when the output error e arrives, every tap is sent
B_l e. No error travels down layer by layer, so the backward pass computes no dx at all and is cheaper
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

from fa.errors import UserError
from fa.layers.convert import put_on
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

    Samples are the first axis of every layer's input, and of the output. Several errors a sample (one a token) go to inputs that have as many.
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

    def attach(
        self, net: nn.Module, layers: dict[str, nn.Module], sizes: dict[str, Any], seed: int
    ) -> Callable[[], None]:
        """Draw B_l for every layer; the function returned puts them in place."""
        classes = self.classes or next(reversed(layers.values())).weight.shape[0]
        tape = Tape(net)
        if self.form != "kernel" and set(layers) - set(sizes):
            raise UserError(
                f"dfa: form={self.form!r} needs the sizes of the maps; pass a batch of inputs, convert(..., sample=x)"
            )
        size = {name: None if self.form == "kernel" else sizes[name][0] for name in layers}
        shared = None
        if self.form == "shared":
            gen, exact = generator(seed, "dfa", "shared"), torch.empty(0, dtype=torch.float64)
            columns = max(size[name].numel() if m.weight.dim() > 2 else m.weight.shape[1] for name, m in layers.items())
            shared = uniform((classes, columns), 1.0, exact, gen)
            shared = shared if self.density == 1 else shared * random_mask(shared.shape, self.density, exact, gen)
        feedback = {
            name: DirectFeedback(self, m, name, seed, classes, tape, size[name], shared) for name, m in layers.items()
        }
        blocks = []
        if self.tap == "block":
            named = {b.strip() for b in self.blocks.split(",")}
            blocks = [m for m in net.modules() if type(m).__name__ in named]
            if not blocks:
                raise UserError(
                    f"dfa: tap='block' found no block of class {self.blocks}; name the network's with blocks='...'"
                )

        def attach() -> None:
            for name, layer in layers.items():
                put_on(
                    layer,
                    feedback[name],
                    next((new for old, new in _DIRECT.items() if isinstance(layer, old)), type(layer)),
                )
            tape.put_on()
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
        fb = getattr(self.layer, "feedback", None)
        return (
            (fb.tap(args[0], self.layer), *args[1:]) if isinstance(fb, DirectFeedback) else args
        )  # else it has another rule by now


class Tape:
    """What one forward pass of a network tapped, and the pass itself: it takes the place of the network's ``forward``.

    (Hooks at its two ends would be compiled one by one, each a graph that hands all errors to the next.)

    Every tap hands the output a scalar of no value. Its gradient, which the output error brings, says that the error is known; each
    tap then makes its own B_l e when the backward pass comes to it, so that one at a time is held. In a compiled pass, which
    can read nothing but tensors, the output holds the taps themselves and hands out all errors at once; the compiler orders them.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net, self.own = net, None
        self.handles: list[Any] = []
        self.open(recording=False)

    def put_on(self) -> None:
        """Stand between the network and its ``forward``."""
        self.own = vars(self.net).get("forward")  # one that somebody set on this network alone
        self.net.forward = self.forward

    def remove(self) -> None:
        """Step aside, unless somebody has set another ``forward`` since, which calls this one."""
        if getattr(vars(self.net).get("forward"), "__self__", None) is self:
            del self.net.forward
            if self.own:
                self.net.forward = self.own
        for handle in self.handles:
            handle.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass."""
        self.recording = True
        try:
            return self.close(
                self.own(*args, **kwargs) if self.own else type(self.net).forward(self.net, *args, **kwargs)
            )
        finally:  # also of a pass that failed, or that a checkpoint ran again only as far as it had to
            self.open(recording=False)

    def open(self, recording: bool = True) -> None:
        """Start a pass, or forget what the last one left."""
        self.recording = recording
        self.error = Error()
        self.classes = 0
        self.calls: list[Tensor] = []  # of taps in eager code
        self.taps: list[Tensor] = []  # in compiled code, beside what spreads the error over each
        self.spreads: list[Spread] = []

    def add(self, x: Tensor, spread: Spread) -> None:
        """Tap ``x``: its gradient will be the output error, spread."""
        self.classes = spread[0].shape[0]
        if torch.compiler.is_compiling():
            self.taps.append(_Mark.apply(x))
            self.spreads.append(spread)
        else:
            self.calls.append(_Tap.apply(x, spread, self.error))

    def close(self, out: Any) -> Any:
        """End a pass: the output error will go to every tap."""
        calls, taps, spreads = self.calls, self.taps, self.spreads
        if not (calls or taps):
            return out
        if not isinstance(out, Tensor):
            raise UserError(f"dfa needs a network whose output is one tensor, not {type(out).__name__}")
        if out.shape[-1] != self.classes:
            raise UserError(f"dfa: the output's last axis has {out.shape[-1]} entries, its feedback {self.classes}; "
                            f"convert(..., classes={out.shape[-1]})")  # fmt: skip
        if taps:
            out = _Broadcast.apply(out, len(taps), *taps, *(part for spread in spreads for part in spread))
        return _Announce.apply(out, self.error, *calls) if calls else out


class Error:
    """The output error e of one backward pass, for the taps of the forward pass before."""

    e: Tensor | None = None


Spread = tuple[Tensor, Tensor | None, Tensor | None]
"""What sends an error to a tap: S (classes, ...), and, where S holds each pattern of a map's rows and columns once, which pattern
the rows and the columns have. Inside a map all positions are alike, so that S is hardly larger than B."""


def send(e: Tensor, spread: Spread, shape: torch.Size) -> Tensor:
    """e S for a tap of that shape, in the memory format of S; tokens share the error of their sample."""
    S, rows, columns = spread
    if rows is None:
        d = e @ S.flatten(1).to(e.dtype)
        if S.dim() == 2 and d.dim() == len(shape) and d.shape != shape:
            raise RuntimeError(
                f"dfa: an output of shape {tuple(e.shape)} has no error for each row of an input of shape {tuple(shape)}"
            )
        if S.dim() == 2 and d.dim() < len(shape):
            d = d.reshape(shape[0], *[1] * (len(shape) - 2), shape[-1]).expand(shape)
        return d.reshape(shape)
    last = not S.is_contiguous()
    S = S.permute(0, 2, 3, 1) if last else S
    d = (e @ S.flatten(1).to(e.dtype)).view(*e.shape[:-1], *S.shape[1:])
    if last:
        return d.index_select(-2, columns).index_select(-3, rows).movedim(-1, -3)
    return d.index_select(-1, columns).index_select(-2, rows)


class _Tap(torch.autograd.Function):
    """A scalar made of a tap; backward sends the tap its error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Spread, error: Error) -> Tensor:
        ctx.shape, ctx.spread, ctx.error = (
            x.shape,
            spread,
            error,
        )  # nothing saved: a checkpoint that runs this again finds nothing amiss
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return send(ctx.error.e, ctx.spread, ctx.shape), None, None


class _Mark(torch.autograd.Function):
    """Identity: what a compiled pass taps, a gradient for each layer that reads a tensor, whatever becomes of the tensor in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d


class _Announce(torch.autograd.Function):
    """Identity on the output; backward keeps the error where the taps find it, and calls them."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, error: Error, *taps: Tensor) -> Tensor:
        ctx.error = error
        ctx.calls = [t.new_zeros(()) for t in taps]
        return out.detach()  # no view, so that it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        ctx.error.e = e
        return e, None, *ctx.calls


class _Broadcast(torch.autograd.Function):
    """Identity on the output; backward also sends every tap its error."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, n: int, *taps: Tensor | None) -> Tensor:
        ctx.shapes = [x.shape for x in taps[:n]]
        ctx.save_for_backward(*taps[n:])
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        parts = iter(ctx.saved_tensors)
        sent = [send(e, spread, shape) for shape, spread in zip(ctx.shapes, zip(parts, parts, parts))]
        return e, None, *sent, *(None for _ in ctx.saved_tensors)


def rerun() -> bool:
    """Whether a gradient checkpoint runs this part of a pass again. One of the reentrant kind cannot be told, and is refused."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "_recomputation_hook" in hooks[0].__qualname__


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
        shape = (
            (classes, inputs, *W.shape[2:]) if size is None else (classes, *size) if W.dim() > 2 else (classes, inputs)
        )
        match rule.init:
            case "match":
                std = rule.nonzero(rms(W), "init", name)
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
            B = B if rule.density == 1 else B * random_mask(shape, rule.density, W, gen)
        self.register_buffer("B", B)
        self.use_backprop = False
        self.backward_ran = self.traced = False
        self._spread: dict[tuple[int, int, bool], Spread] = {}

    def tap(self, x: Tensor, layer: nn.Module | None = None) -> Tensor:
        """Cut the graph at the layer's input, to be handed B e when the output error is known."""
        self.traced = True  # seen by its own forward
        if self.bypassed():
            return x
        if not self.tape.recording:
            if rerun():
                return x.detach()  # for what a checkpoint did not keep; its taps are in the graph already
            raise RuntimeError(
                f"layer {self.layer_name!r} is under dfa: call the whole network that was converted, not a part of it; gradient "
                "checkpointing works with use_reentrant=False"
            )
        if x.requires_grad:
            spread = isinstance(layer, nn.Conv2d) and self.rule.form == "kernel"
            self.tape.add(x, self.spread(layer, x) if spread else (self.B, None, None))
        return x.detach()

    def bypassed(self) -> bool:
        """Whether the forward pass at hand is the stock layer's."""
        return self.use_backprop or not torch.is_grad_enabled()

    def forward(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """A tapped linear layer whose weight another module owns (see fa.attention)."""
        return F.linear(self.tap(x), W, b)

    def spread(self, layer: nn.Conv2d, x: Tensor) -> Spread:
        """Where a unit error of each class goes, S (classes, in, rows, columns), made once for each input size and memory format.

        An error that is the same everywhere on the output map arrives at a position through all entries of B that see it.
        """
        key = (*x.shape[-2:], torch.compiler.is_compiling() or not x.is_contiguous())
        if key not in self._spread:
            left, right, top, bottom = layer._reversed_padding_repeated_twice
            axes = zip(x.shape[-2:], ((top, bottom), (left, right)), self.B.shape[2:], layer.stride, layer.dilation)
            seen, which = zip(*(patterns(*axis) for axis in axes))
            through = (torch.tensor(entries, dtype=self.B.dtype, device=x.device) for entries in seen)
            S = torch.einsum("cihw,rh,qw->cirq", self.B, *through)
            S = S.contiguous(memory_format=torch.channels_last if key[-1] else torch.contiguous_format)
            self._spread[key] = S, *(torch.tensor(indices, device=x.device) for indices in which)
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


_DIRECT = {nn.Linear: DirectLinear, nn.Conv2d: DirectConv2d}
RULES["dfa"] = DFA
