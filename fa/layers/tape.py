"""How direct feedback alignment cuts a network's graph, and how the output error reaches every cut.

Each cut leaves a :class:`Tap`, an expanded zero of the output error's shape, and the network's output passes through
:class:`Close`, which hands the output error e to every tap; a tap sends e S to the input that was cut. Autograd itself
delivers e, in eager and in compiled code. A tap stands in the graph where its input stands, so that the backward pass
comes to it there, and one sent error lives at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers.hooks import Converted
from fa.layers.maps import flat, nested
from fa.layers.passes import once_differentiable

Spread = tuple[Tensor, Tensor | None, Tensor | None]
"""What sends an error to a tap: S (classes, in, ...) and, for a map, two index vectors. Positions inside a map are
alike: S holds each distinct row and column once; the vectors, (h,) and (w,), say which of them a position has."""


def send(e: Tensor, spread: Spread, shape: torch.Size) -> Tensor:
    """e S: the error that a tap gets, in the memory format of S.

    Args:
        e: output error: (..., classes), one for each row of the input, or (n, classes), shared by a sample's tokens.
        spread: see :data:`Spread`.
        shape: shape of the tapped input, and of the result.
    """
    S, rows, columns = spread
    if rows is None:
        d = e @ S.flatten(1).to(e.dtype)  # (..., classes) -> (..., in)
        if S.dim() == 2 and d.dim() < len(shape):
            d = d.view(shape[0], *[1] * (len(shape) - 2), shape[-1]).expand(shape)  # (n, in) -> (n, tokens, in)
        return d.reshape(shape)
    last = not S.is_contiguous()
    S = S.permute(0, 2, 3, 1) if last else S  # (classes, rows, columns, in) in channels_last
    d = (e @ S.flatten(1).to(e.dtype)).view(*e.shape[:-1], *S.shape[1:])  # (n, in, rows, columns), or in last
    if last:
        return d.index_select(-2, columns).index_select(-3, rows).movedim(-1, -3)  # (n, h, w, in) -> (n, in, h, w)
    return d.index_select(-1, columns).index_select(-2, rows)  # (n, in, h, w)


_SHOWN: dict[str, Callable[[int, int], int]] = {
    "zeros": lambda i, n: i,
    "circular": lambda i, n: i % n,
    "reflect": lambda i, n: n - 1 - abs(n - 1 - abs(i)),
    "replicate": lambda i, n: min(max(i, 0), n - 1),
}
"""Mode of padding -> which of n positions the position i shows that may lie outside of them; outside again: none."""


def patterns(n: int, padding: tuple[int, int], kernel: int, stride: int, dilation: int, mode: str) -> tuple[list, list]:
    """How often a kernel's entries cover each of ``n`` input positions along one axis, its places in padding included.

    Returns:
        The distinct rows of the table of coverage (positions, kernel), and for each position the index of its row.
    """
    before, after = padding
    outputs = (n + before + after - dilation * (kernel - 1) - 1) // stride + 1
    shown = [_SHOWN[mode](i - before, n) for i in range(before + n + after)]
    hits = [[i - dilation * k in range(0, stride * outputs, stride) for k in range(kernel)] for i in range(len(shown))]
    covered = [tuple(sum(hit[k] for hit, j in zip(hits, shown) if j == i) for k in range(kernel)) for i in range(n)]
    known = list(dict.fromkeys(covered))
    return [list(row) for row in known], [known.index(row) for row in covered]


class Tap(torch.autograd.Function):
    """Zeros of the output error's shape, which take no memory. Their gradient is e, and the gradient of ``x`` is e S.

    Nothing is saved for the backward pass: a gradient checkpoint's second pass, which taps nothing, saves the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leading: int, spread: Spread, feedback: Any) -> Tensor:
        ctx.shape, ctx.spread, ctx.feedback = x.shape, spread, feedback
        return x.new_zeros(()).expand(*x.shape[:leading], spread[0].shape[0])  # (n, classes), (n, tokens, classes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.feedback.use_backprop:
            raise RuntimeError("dfa cut the graph before this block: run the forward pass within fa.exact_backprop too")
        return send(e, ctx.spread, ctx.shape), None, None, None  # e (..., classes) -> shape of x


class Close(torch.autograd.Function):
    """Identity on the network's output (..., classes); the error of the output goes to every tap as well."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *taps: Tensor) -> Tensor:
        ctx.taps = len(taps)
        return out.detach()  # no view, so that the output may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, ...]:
        return e, *[e] * ctx.taps


_ON = ("Squeeze", "Unsqueeze", "View", "Select", "ToCopy", "LogBackward", "Clamp", "Add", "Sub", "Mul", "Div")


class Tape:
    """The taps of one forward pass of a network. Its :meth:`forward` takes the place of the network's ``forward``.

    (Hooks at the network's two ends would be compiled one by one, each a graph of its own.)

    Args:
        net: the network, whose output error is sent.
        blocks: modules whose input is cut, skip path included, with the feedback of their first converted layer.
    """

    def __init__(self, net: nn.Module, blocks: list[nn.Module]) -> None:
        self.net, self.blocks, self.own, self.wrapper = net, blocks, None, None
        self.handles: list[Any] = []
        self.taps: list[tuple[str, list[Tensor]]] | None = None  # of each layer; None: no pass is under way

    def put_on(self) -> None:
        """Stand between the network, whose layers are converted, and its ``forward``."""
        self.own = vars(self.net).get("forward")  # one that somebody set on this network alone
        # no bound method, whose function others, as Accelerate, take and bind to the network
        self.net.forward = self.wrapper = partial(Tape.forward, self)
        stock = self.own or partial(type(self.net).forward, self.net)
        with suppress(ValueError):  # a function of C has none
            vars(self.wrapper)["__signature__"] = inspect.signature(stock)
        for block in self.blocks:
            first = next(m for m in block.modules() if isinstance(m, Converted))
            self.handles.append(block.register_forward_pre_hook(partial(_cut, first), with_kwargs=True))

    def remove(self) -> None:
        """Step aside, unless somebody has set another ``forward`` since, which calls this one."""
        if vars(self.net).get("forward") is self.wrapper:
            del self.net.forward
            if self.own:
                self.net.forward = self.own
        for handle in self.handles:
            handle.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass; see :meth:`close` for what it raises."""
        own = self.own or partial(type(self.net).forward, self.net)
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)  # nothing is tapped
        if self.taps is not None:
            raise RuntimeError("dfa: a pass of this network is under way; it calls itself, or another thread runs it")
        self.taps = []
        try:
            return self.close(own(*args, **kwargs))
        finally:  # a pass that failed, or that a checkpoint ran only in part, leaves nothing behind
            self.taps = None

    def add(self, x: Tensor, spread: Spread, feedback: Any) -> None:
        """Tap ``x``, ``(*rows, in)`` or ``(*rows, in, h, w)``: its gradient will be the output error, spread.

        The end of the pass shows whether the output has an error for each row or for each sample; both are prepared.
        """
        rows = x.dim() - spread[0].dim() + 1  # number of leading axes
        taps = [Tap.apply(x, leading, spread, feedback) for leading in ((rows,) if rows < 2 else (rows, 1))]
        # within a gradient checkpoint the compiler hands out what operations make, and not what a Function makes
        taps = [tap.view(tap.shape) for tap in taps] if torch.compiler.is_compiling() else taps
        self.taps.append((feedback.layer_name, taps))

    def close(self, out: Any) -> Any:
        """The network's output, whose error will go to every tap: (n, classes), (n, tokens, classes), or (n,).

        No axis is guessed: the output has the axes of a layer's rows, or the samples alone, and then that of the
        classes, axes of one entry aside.

        Raises:
            UserError: the output is not one tensor, its last axis does not have ``classes`` entries, it is a map, or it
                holds probabilities (log_softmax, softmax, sigmoid; not seen in a compiled pass).
            RuntimeError: the output has an error neither for each row of a tapped input nor for each sample.
        """
        if not self.taps:
            return out
        if not isinstance(out, Tensor):
            raise UserError(f"dfa needs a network whose output is one tensor, not {type(out).__name__}")
        if out.is_nested:
            return nested(self.close(flat(out)), out)
        end = None if torch.compiler.is_compiling() else out.grad_fn
        while end and len(below := [n for n, _ in end.next_functions if n]) == 1 and end.name().startswith(_ON):
            end = below[0]
        kind = end.name().partition("Backward")[0] if end else ""
        if kind == "Sub" and below[-1].name().startswith("Logsumexp"):
            kind = "LogSoftmax"
        if kind in ("LogSoftmax", "Softmax", "LogSigmoid", "Sigmoid"):
            raise UserError(f"dfa sends the error of logits: let the network return them, and leave {kind} to the loss")
        strides, chosen = [stride for stride, n in zip(out.stride(), out.shape) if n != 1], []
        # axes that lie in memory in another order than a layer makes them have been exchanged; two unlike sizes tell
        exchanged = len(strides) > len({*out.shape[-2:]}) and strides != sorted(strides, reverse=True)
        for name, taps in self.taps:
            fitting = [tap for tap in taps if tap.shape == out.shape]
            fitting = fitting or [tap.view(out.shape) for tap in taps if tap.squeeze().shape == out.squeeze().shape]
            if exchanged or not fitting:
                raise _misfit(out, name, taps)
            chosen.append(fitting[0])
        return Close.apply(out, *chosen)


def _misfit(out: Tensor, layer: str, taps: list[Tensor]) -> Exception:
    """Why the error of an output cannot go to a layer that has these taps."""
    *leading, classes = taps[0].shape
    got = f"dfa: the network's output has shape {tuple(out.shape)}"
    for tap in taps:
        if out.shape[:-1] == tap.shape[:-1] and out.shape[-1] != classes:
            return UserError(f"{got}, and its feedback {classes} classes; convert(..., classes={out.shape[-1]})")
        if out.shape == tap.shape[:-1]:
            return UserError(f"{got}, one error a sample, and its feedback {classes} classes; convert(..., classes=1)")
    takes = "dfa takes (n, classes), (n,) or, with as many tokens in every layer, (n, tokens, classes)"
    if out.dim() > 2 and len(leading) < 2:
        why = f"one error for each of {leading} samples: {takes}; a dense prediction needs another rule, such as 'fa'"
        return UserError(f"{got}, and layer {layer!r} {why}")
    where = f"each row of the input of layer {layer!r}, with leading axes {tuple(leading)}"
    return RuntimeError(f"{got}, which has no error for {where}: {takes}, samples first, no axes exchanged")


def _cut(layer: nn.Module, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook of a block: cut the graph at the first input that has one, with the B_l of ``layer``."""
    feedback, given = getattr(layer, "feedback", None), dict(enumerate(args)) | kwargs
    first = next((key for key, x in given.items() if isinstance(x, Tensor) and x.requires_grad), None)
    if hasattr(feedback, "tape") and first is not None:  # or another rule by now
        given[first] = feedback.tap(given[first], layer)
    return tuple(given.pop(i) for i in range(len(args))), given
