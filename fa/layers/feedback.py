"""One layer's feedback: its linear map, the one autograd function, and the module that holds the rule's tensors.

In the backward pass the kernel takes the weight's place in a single ``convolution_backward`` call, which returns dx through the
kernel together with the exact dW and db, at the price of plain backprop.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import weakref
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fa.errors import UserError
from fa.rules import Rule

# ------------------------------------------------------------------------------------ a layer's linear map


@dataclass
class _Map:
    """What both kinds of linear map have: sizes of a sample's input and output where known, and noise of their own."""

    sizes: tuple[torch.Size, torch.Size] | None = field(default=None, kw_only=True)
    pad: tuple[int, ...] = field(default=(), kw_only=True)  # what was added to x before this map
    gen: torch.Generator | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.key = next(_keys)  # what a compiled graph, which cannot hold a generator, knows this map by
        _maps[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a copy draws for itself

    def noise(self, like: Tensor, dy: Tensor, kind: str, std: float = 1.0) -> Tensor:
        """Noise, "normal" or "uniform", of mean 0 and standard deviation ``std``, of a tensor's shape, dtype and place.

        A compiled graph draws the same. ``dy``, the error at hand, is not read: it holds the draw in the backward pass, whereas what
        hangs on the forward pass alone may be computed there, or in both. On a CPU, where the generator is what noise costs, uniform
        noise has 2^16 equally likely, equally spaced values: four numbers a draw.
        """
        return _noise(like, dy, self.key, kind, std) if torch.compiler.is_compiling() else self.draw(like, kind, std)

    def draw(self, like: Tensor, kind: str, std: float) -> Tensor:
        """What :meth:`noise` returns, whether it is called or stands in a compiled graph."""
        bound = 3**0.5 * std
        if self.gen is None or self.gen.device != like.device:
            self.gen = torch.Generator(like.device).manual_seed(0 if self.gen is None else self.gen.initial_seed())
        # half precision is rounded to: torch's own normal numbers in bfloat16 lack their tails
        out = torch.empty_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        if kind == "normal":
            return out.normal_(0, std, generator=self.gen).to(like.dtype)
        if out.device.type != "cpu":
            return out.uniform_(-bound, bound, generator=self.gen).to(like.dtype)
        n = out.numel()
        words = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None, generator=self.gen)
        out.as_strided((n,), (1,)).copy_(words.view(torch.int16)[:n])  # in the order of memory, which is dense
        return out.add_(0.5).mul_(bound / 2**15).to(like.dtype)


_maps: weakref.WeakValueDictionary[int, _Map] = weakref.WeakValueDictionary()  # key -> map
_keys = itertools.count()


@torch.library.custom_op(
    "fa::noise",
    mutates_args=(),
    schema="(Tensor like, Tensor dy, int key, str kind, float std) -> Tensor",
    tags=(
        torch.Tag.nondeterministic_seeded,
        torch.Tag.cudagraph_unsafe,
    ),  # inductor's own graphs do not know the generator
)
def _noise(like: Tensor, dy: Tensor, key: int, kind: str, std: float) -> Tensor:
    """What a compiled graph calls, unseen by the compiler."""
    return _maps[key].draw(like, kind, std)


@_noise.register_fake
def _(like: Tensor, dy: Tensor, key: int, kind: str, std: float) -> Tensor:
    return torch.empty_like(like)


@dataclass
class LinearMap(_Map):
    """y = K x on the last axis. Shapes: x (..., in), y (..., out), K (out, in)."""

    groups = 1

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        """K x (+ bias)."""
        return F.linear(x, K, bias)

    def grad_input(self, y: Tensor, K: Tensor, like: Tensor) -> Tensor:
        """K^T y, of the shape of ``like``."""
        return y @ K

    def matmul_channels(self, y: Tensor, B: Tensor) -> Tensor:
        """B^T y on the last axis; B (out, mid)."""
        return y @ B

    def grad_weight(self, x: Tensor, y: Tensor, like: Tensor | None = None) -> Tensor:
        """sum y x^T over all leading axes: the gradient of <y, K x> by K."""
        return rows(y).t() @ rows(x)

    def backward(self, dy: Tensor, x: Tensor, K: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """(K^T dy, dW, db) where ``mask`` asks for them."""
        return (
            dy @ K if mask[0] else None,
            self.grad_weight(x, dy) if mask[1] else None,
            rows(dy).sum(0) if mask[2] else None,
        )


def rows(x: Tensor) -> Tensor:
    """All leading axes as one; x (..., n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@dataclass
class ConvMap(_Map):
    """y = K * x, a 2-D cross-correlation. Shapes: x (n, in, h, w), y (n, out, h', w'), K (out, in / groups, kh, kw)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        """K * x (+ bias)."""
        return F.conv2d(x, K, bias, self.stride, self.padding, self.dilation, self.groups)

    def grad_input(self, y: Tensor, K: Tensor, like: Tensor) -> Tensor:
        """Transposed convolution of y, of the shape of ``like``."""
        return self.backward(y, like, K, [True, False, False])[0]

    def matmul_channels(self, y: Tensor, B: Tensor) -> Tensor:
        """B^T y at every position; B (out, mid)."""
        return (B.mT @ y.flatten(2)).unflatten(2, y.shape[2:])

    def grad_weight(self, x: Tensor, y: Tensor, like: Tensor) -> Tensor:
        """The gradient of <y, K * x> by K, of the shape of ``like``."""
        return self.backward(y, x, like, [False, True, False])[1]

    def backward(self, dy: Tensor, x: Tensor, K: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """(transposed convolution of dy by K, dW, db) where ``mask`` asks for them, in one call."""
        return torch.ops.aten.convolution_backward(
            dy, x, K, [K.shape[0]], self.stride, self.padding, self.dilation, False, (0, 0), self.groups, mask
        )


# ------------------------------------------------------------------------------------ the autograd function


def cast(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``; in small layers a call of ``to`` that changes nothing is a cost that shows."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


class _Local(torch.autograd.Function):
    """Forward y = W x + b; backward through the rule's kernel. State tensors come last and get the rule's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, feedback: Feedback, *state: Tensor) -> Tensor:
        out = feedback.op.forward(x, cast(W, x), b)
        ctx.feedback, saved = feedback, None
        if feedback.keeps_y and torch.compiler.is_compiling():
            saved = out
        elif feedback.keeps_y:  # not saved as autograd does: the next layer may work in place, and is then found out
            ctx.out = (out.detach(), out._version)
        ctx.save_for_backward(x, W, b if feedback.keeps_y else None, saved, *state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        fb = ctx.feedback
        x, W, b, out, *state = ctx.saved_tensors
        need_x, need_W, need_b, _, *need_state = ctx.needs_input_grad
        rule, op = fb.rule, fb.op
        learns = any(need_state) and (
            need_W or "dW" not in fb.grad_args
        )  # what follows W's own update rests while W is frozen
        known = dict(zip(fb.names, state), W=W, op=op, dy=dy, x=x, y=None, memo={})
        dx = None
        if need_x and fb.send_args:
            dx = rule.send_error(**{n: known[n] for n in fb.send_args})
        K = cast(fb.kernel_from(known) if need_x and dx is None else W, dy)
        mask = [need_x and dx is None, need_W, need_b]
        through, dW, db = op.backward(dy, x, K, mask)
        if dW is not None:
            known["dW"] = dW = cast(dW, W)
        grads: dict[str, Tensor] = {}
        if learns:
            if fb.keeps_y:
                if out is None and ctx.out[0]._version == ctx.out[1]:
                    out = ctx.out[0]
                elif out is None:
                    out = op.forward(x, W.to(x.dtype), b)
                known["y"] = out if b is None else out - b.view(-1, *[1] * (W.dim() - 2))
            grads = rule.feedback_grad(**{n: known[n] for n in fb.grad_args})
        fb.mark_backward()
        return (
            through if dx is None else dx,
            dW if need_W else None,
            db,
            None,
            *(grads[n] if learns and need else None for n, need in zip(fb.names, need_state)),
        )


@cache
def _arguments(method: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that a rule's method asks for, with ``**`` all; an argument that nothing can fill raises."""
    wanted = inspect.signature(method).parameters
    if any(p.kind is p.VAR_KEYWORD for p in wanted.values()):
        return names
    for name, p in list(wanted.items())[1:]:
        if name not in names and p.default is p.empty:
            raise UserError(f"{method.__qualname__} asks for {name!r}; it can have {', '.join(names)}")
    return tuple(n for n in wanted if n in names)


class Feedback(nn.Module):
    """What a converted layer keeps beside its own parameters: ``layer.feedback``.

    Buffers and parameters carry the names that the rule gave them (``layer.feedback.B``, ...).
    """

    def __init__(self, rule: Rule, op: LinearMap | ConvMap, layer: nn.Module, name: str, seed: int) -> None:
        super().__init__()
        self.rule, self.op, self.layer_name, self.seed = rule, op, name, seed
        if rule.needs_sgd and not layer.weight.requires_grad:
            raise UserError(
                f"implicit feedback moves with its weight, and that of layer {name!r} is frozen; leave implicit out"
            )
        W = layer.weight.detach()
        try:
            state = rule.init_state(op, W, generator(seed, name))
        except UserError as error:
            raise UserError(f"layer {name!r}: {error}" if name else str(error)) from None
        for key, value in state.items():
            if key in rule.learned:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)
        self.names = tuple(state)
        self.numbers = tuple(option for option, value in vars(rule).items() if type(value) is float)
        self.kernel_args = _arguments(type(rule).kernel, ("W", *state))
        local = ("W", "op", "x", "y", "dy", "dW", "memo", *state)
        self.grad_args = _arguments(type(rule).feedback_grad, local) if rule.learned else ()
        self.keeps_y = "y" in self.grad_args and rule.needs_y
        send = getattr(type(rule), "send_error", None)
        self.send_args = _arguments(send, ("W", "op", "x", "dy", "memo", *state)) if send else ()
        if rule.clamp_forward:
            self.register_buffer("forward_norm", torch.linalg.vector_norm(W))
        after = getattr(type(rule), "after_step", None)
        self.after_args = _arguments(after, ("W", "gen", "step", *state)) if after else None
        if after:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.steps: int | None = None  # the buffer's value, so that it is read, and the device waited for, once only
        self.use_backprop = False  # True: plain backprop for the moment (fa.exact_backprop)
        self.backward_ran = self.traced = False
        self.steps_alone = 0  # optimizer steps of the weight without its learned feedback

    def forward(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's output, y = W x + b; x, W, b as the layer holds them."""
        if torch.compiler.is_compiling():
            self.traced = True
            for option in (
                self.numbers
            ):  # seen here first: a second rule's number, met in the backward pass alone, fails to compile
                getattr(self.rule, option) * 1.0
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, b = x.to(dtype), b if b is None else b.to(dtype)
        return _Local.apply(x, W, b, self, *(getattr(self, n) for n in self.names))

    def kernel(self, W: Tensor) -> Tensor:
        """The effective kernel, of W's shape."""
        return self.kernel_from({"W": W, **{n: getattr(self, n) for n in self.names}})

    def kernel_from(self, known: dict[str, Any]) -> Tensor:
        """The effective kernel from tensors at hand."""
        K = self.rule.kernel(**{n: known[n] for n in self.kernel_args})
        if self.rule.norm == "track":
            size = torch.linalg.vector_norm(K)
            K = K * (
                torch.linalg.vector_norm(known["W"]) / size.clamp_min(torch.finfo(size.dtype).tiny)
            )  # a kernel of zeros stays one
        return K

    def after_step(self, W: Tensor) -> None:
        """What the rule does once per optimizer step."""
        self.steps = (int(self.step) if self.steps is None else self.steps) + 1
        self.step.fill_(self.steps)

        def gen() -> torch.Generator:
            return generator(self.seed, self.layer_name, "step", self.steps, device=W.device)

        known = {"W": W, "gen": gen, "step": self.steps, **{n: getattr(self, n) for n in self.names}}
        for name, value in self.rule.after_step(**{n: known[n] for n in self.after_args}).items():
            getattr(self, name).copy_(value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.steps = None
        super()._load_from_state_dict(*args, **kwargs)

    def bypassed(self) -> bool:
        """Whether the forward pass at hand is the stock layer's: none to differentiate, or exact backprop asked for."""
        if self.use_backprop:
            self.backward_ran = True  # the gradient to come is meant
        return self.use_backprop or not torch.is_grad_enabled()

    def mark_backward(self) -> None:
        """Note that the layer's own backward ran (the check of :func:`fa.layers.hooks.watch` reads it)."""
        if not torch.compiler.is_compiling():
            vars(self)["backward_ran"] = True  # a module's own setattr takes ten times as long


class NoisyFeedback(Feedback):
    """Feedback that learns from noise: the noise has a generator of its own, whose state is saved with the rest."""

    def __init__(self, rule: Rule, op: LinearMap | ConvMap, layer: nn.Module, name: str, seed: int) -> None:
        super().__init__(rule, op, layer, name, seed)
        op.gen = generator(seed, name, "noise", device=layer.weight.device)

    def get_extra_state(self) -> Tensor:
        """State of the generator, so that a resumed run goes on with its noise."""
        return self.op.gen.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """See :meth:`get_extra_state`. The state of another kind of device says nothing here: the noise then starts anew."""
        device = next(self.parameters()).device
        if self.op.gen.device.type != device.type:
            self.op.gen = torch.Generator(device).manual_seed(self.op.gen.initial_seed())
        if state.numel() == self.op.gen.get_state().numel():
            self.op.gen.set_state(state.cpu())


def generator(seed: int, *labels: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for (seed, labels), so that no draw depends on what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
