"""Put a learning rule on a network: the one autograd function, ``convert``, and the once-per-step hook.

Conversion changes a layer's class in place and adds one submodule, ``layer.feedback``, that holds the rule and its tensors. The
parameters, their names, hooks, device, dtype and mode stay; an optimizer made before still holds the live weights. In the backward
pass the kernel takes the weight's place in a single ``convolution_backward`` call, which returns dx through the kernel together
with the exact dW and db, at the price of plain backprop.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import rules
from .errors import UserError
from .rules import Rule

# ------------------------------------------------------------------------------------ a layer's linear map


@dataclass
class _Map:
    """What both kinds of linear map have: sizes of a sample's input and output where known, and noise of their own."""

    sizes: tuple[torch.Size, torch.Size] | None = field(default=None, kw_only=True)
    pad: tuple[int, ...] = field(default=(), kw_only=True)  # what was added to x before this map
    gen: torch.Generator | None = field(default=None, kw_only=True)

    def noise(self, like: Tensor, kind: str) -> Tensor:
        """Standard noise, "normal" or "uniform", of a tensor's shape, dtype and place."""
        if torch.compiler.is_compiling():
            return torch.randn_like(like) if kind == "normal" else (torch.rand_like(like) - 0.5) * 12**0.5
        if self.gen is None or self.gen.device != like.device:
            self.gen = torch.Generator(like.device).manual_seed(0 if self.gen is None else self.gen.initial_seed())
        out = torch.empty_like(like)
        return out.normal_(generator=self.gen) if kind == "normal" else out.uniform_(-(3**0.5), 3**0.5, generator=self.gen)


@dataclass
class LinearMap(_Map):
    """y = K x on the last axis. Shapes: x (..., in), y (..., out), K (out, in)."""

    groups = 1

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        """K x (+ bias)."""
        return F.linear(x, K, bias)

    def transpose(self, y: Tensor, K: Tensor, like: Tensor) -> Tensor:
        """K^T y, of the shape of ``like``."""
        return y @ K

    def correlate(self, x: Tensor, y: Tensor, like: Tensor | None = None) -> Tensor:
        """sum y x^T over all leading axes: the gradient of <y, K x> by K."""
        return y.reshape(-1, y.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def backward(self, dy: Tensor, x: Tensor, K: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """(K^T dy, dW, db) where ``mask`` asks for them."""
        return (
            dy @ K if mask[0] else None,
            self.correlate(x, dy) if mask[1] else None,
            dy.reshape(-1, dy.shape[-1]).sum(0) if mask[2] else None,
        )


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

    def transpose(self, y: Tensor, K: Tensor, like: Tensor) -> Tensor:
        """Transposed convolution of y, of the shape of ``like``."""
        return self.backward(y, like, K, [True, False, False])[0]

    def correlate(self, x: Tensor, y: Tensor, like: Tensor) -> Tensor:
        """The gradient of <y, K * x> by K, of the shape of ``like``."""
        return self.backward(y, x, like, [False, True, False])[1]

    def backward(self, dy: Tensor, x: Tensor, K: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """(transposed convolution of dy by K, dW, db) where ``mask`` asks for them, in one call."""
        return torch.ops.aten.convolution_backward(
            dy, x, K, [K.shape[0]], self.stride, self.padding, self.dilation, False, (0, 0), self.groups, mask
        )


# ------------------------------------------------------------------------------------ the autograd function


class _Local(torch.autograd.Function):
    """Forward y = W x + b; backward through the rule's kernel. State tensors come last and get the rule's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, feedback: Feedback, *state: Tensor) -> Tensor:
        out = feedback.op.forward(x, W.to(x.dtype), b)
        ctx.feedback, ctx.out, saved = feedback, None, None
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
        rule, op, learns = fb.rule, fb.op, any(need_state)
        known = dict(zip(fb.names, state), W=W, op=op, dy=dy, x=x, y=None)
        dx = None
        if need_x and fb.transport_args:
            dx = rule.transport(**{n: known[n] for n in fb.transport_args})
        K = fb.kernel_from(known).to(dy.dtype) if need_x and dx is None else W.to(dy.dtype)
        mask = [need_x and dx is None, need_W or (learns and "dW" in fb.grad_args), need_b]
        through, dW, db = op.backward(dy, x, K, mask)
        if dW is not None:
            known["dW"] = dW = dW.to(W.dtype)
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
            *(grads[n] if need else None for n, need in zip(fb.names, need_state)),
        )


@lru_cache(maxsize=None)
def _arguments(method: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``names`` that a rule's method asks for; an argument that nothing can fill raises."""
    wanted = inspect.signature(method).parameters
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
        if rule.sgd_only and not layer.weight.requires_grad:
            raise UserError(f"implicit feedback moves with its weight, and that of layer {name!r} is frozen; leave implicit out")
        W = layer.weight.detach()
        state = rule.draw(op, W, generator(seed, name))
        for key, value in state.items():
            if key in rule.learned:
                self.register_parameter(key, nn.Parameter(value))
            else:
                self.register_buffer(key, value)
        self.names = tuple(state)
        self.kernel_args = _arguments(type(rule).kernel, ("W", *state))
        local = ("W", "op", "x", "y", "dy", "dW", *state)
        self.grad_args = _arguments(type(rule).feedback_grad, local) if rule.learned else ()
        self.keeps_y = "y" in self.grad_args and rule.needs_y
        transport = getattr(type(rule), "transport", None)
        self.transport_args = _arguments(transport, ("W", "op", "x", "dy", *state)) if transport else ()
        if rule.clamp_forward:
            self.register_buffer("forward_norm", torch.linalg.vector_norm(W))
        after = getattr(type(rule), "after_step", None)
        self.after_args = _arguments(after, ("W", "gen", "step", *state)) if after else None
        if after:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.steps: int | None = None  # the buffer's value, so that it is read, and the device waited for, once only
        self.exact = False  # True: plain backprop for the moment (fa.exact_backprop)
        self.backward_ran = self.traced = False
        self.steps_alone = 0  # optimizer steps of the weight without its learned feedback

    def forward(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's output, y = W x + b; x, W, b as the layer holds them."""
        if torch.compiler.is_compiling():
            self.traced = True
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
            K = K * (torch.linalg.vector_norm(known["W"]) / torch.linalg.vector_norm(K))
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

    def plain(self) -> bool:
        """Whether the forward pass at hand is the stock layer's: none to differentiate, or exact backprop asked for."""
        if self.exact:
            self.backward_ran = True  # the gradient to come is meant
        return self.exact or not torch.is_grad_enabled()

    def mark_backward(self) -> None:
        """Note that the layer's own backward ran (the check of :func:`_watch` reads it)."""
        if not torch.compiler.is_compiling():
            self.backward_ran = True


class NoisyFeedback(Feedback):
    """Feedback that learns from noise: the noise has a generator of its own, whose state is saved with the rest."""

    def __init__(self, rule: Rule, op: LinearMap | ConvMap, layer: nn.Module, name: str, seed: int) -> None:
        super().__init__(rule, op, layer, name, seed)
        op.gen = generator(seed, name, "noise", device=layer.weight.device)

    def get_extra_state(self) -> Tensor:
        """State of the generator, so that a resumed run goes on with its noise."""
        return self.op.gen.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """See :meth:`get_extra_state`."""
        self.op.gen.set_state(state.cpu())


def generator(seed: int, *labels: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for (seed, labels), so that no draw depends on what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ------------------------------------------------------------------------------------ converted layers


class _Converted:
    """What the converted classes share: they watch their weight, also after a deepcopy."""

    feedback: Feedback

    rows = slice(None)
    """Which rows of ``held`` are the layer's weight."""

    @property
    def held(self) -> nn.Parameter:
        """The parameter that an optimizer holds."""
        return self.weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _watch(self)


class FeedbackLinear(_Converted, nn.Linear):
    """``nn.Linear`` whose error goes down through ``self.feedback``; made by :func:`convert`, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in) -> (..., out), as ``nn.Linear``."""
        if self.feedback.plain():
            return super().forward(x)
        return self.feedback.forward(x, self.weight, self.bias)


class FeedbackConv2d(_Converted, nn.Conv2d):
    """``nn.Conv2d`` whose error goes down through ``self.feedback``; made by :func:`convert`, never constructed."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shapes: x (n, in, h, w) or (in, h, w), as ``nn.Conv2d``."""
        if self.feedback.plain():
            return super()._conv_forward(x, weight, bias)
        pad = _explicit_padding(self)
        if pad:  # an ordinary operation before the layer's linear map; autograd sends the error through it exactly
            x = F.pad(x, pad, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        if x.dim() == 3:
            return self.feedback.forward(x.unsqueeze(0), weight, bias).squeeze(0)
        return self.feedback.forward(x, weight, bias)


def _explicit_padding(layer: nn.Conv2d) -> list[int]:
    """Padding to apply before the convolution: that of a padding mode, or "same" where its two sides differ; else []."""
    sides = layer._reversed_padding_repeated_twice
    uneven = isinstance(layer.padding, str) and sides[0::2] != sides[1::2]
    return sides if layer.padding_mode != "zeros" or uneven else []


def _linear_map(layer: nn.Module, sizes: tuple[torch.Size, torch.Size] | None = None) -> LinearMap | ConvMap:
    if not isinstance(layer, nn.Conv2d):
        return LinearMap(sizes=sizes)
    if _explicit_padding(layer):
        padding = (0, 0)
    elif isinstance(layer.padding, str):  # even sides; the list runs from the last axis
        padding = (layer._reversed_padding_repeated_twice[2], layer._reversed_padding_repeated_twice[0])
    else:
        padding = layer.padding
    return ConvMap(
        layer.stride, padding, layer.dilation, layer.groups, sizes=sizes, pad=tuple(_explicit_padding(layer))
    )


def _watch(layer: nn.Module) -> None:
    """Raise when the weight gets a gradient that the layer's own backward did not make.

    Such a layer's parent reads ``layer.weight`` and goes around its forward: it would train by backprop, unnoticed.
    """
    fb = layer.feedback
    if fb.rule.learned:
        _unheld.add(layer)
        _register_hooks()
    if fb.rule.clamp_forward or hasattr(fb.rule, "after_step"):
        _stepping.add(layer)
        _register_hooks()
    if not layer.held.requires_grad:
        return
    ref = weakref.ref(layer)

    def check(weight: Tensor) -> None:
        layer = ref()
        fb = getattr(layer, "feedback", None)
        if fb is None or fb.exact:
            return
        if not (fb.backward_ran or fb.traced):
            raise RuntimeError(
                f"the weight of layer {fb.layer_name!r} got a gradient, but the layer's own backward did not run: another module "
                f"reads it directly, so that it would train by backprop; leave it out with convert(..., skip=[{fb.layer_name!r}])"
            )
        fb.backward_ran = False

    _watches[layer] = layer.held.register_post_accumulate_grad_hook(check)


# ------------------------------------------------------------------------------------ once per optimizer step

_watches: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # layer -> handle of its check
_unheld: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose learned feedback no optimizer has stepped yet
_stepping: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers with something to do after every step
_hooks: list[Any] = []


def _register_hooks() -> None:
    """One pair of global optimizer hooks, made by the first layer that needs it; never at import."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Learned feedback must be in an optimizer, and implicit feedback in one that moves it as it moves W."""
    if not _unheld:
        return
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    lacking = 0
    for layer in list(_unheld):
        fb, W = layer.feedback, id(layer.held)
        learned = [id(p) for p in fb.parameters()]
        if all(p in group_of for p in learned):
            if fb.rule.sgd_only and not (type(optimizer) is torch.optim.SGD and {group_of[p] for p in learned} == {group_of.get(W)}):
                raise RuntimeError(
                    f"implicit feedback of layer {fb.layer_name!r} is exact only for torch.optim.SGD with the weight and its "
                    f"feedback in one parameter group, not {type(optimizer).__name__}; convert with implicit=False"
                )
            _unheld.discard(layer)
        elif W in group_of:
            lacking += fb.steps_alone > 0
            fb.steps_alone += 1
    if lacking:
        raise RuntimeError(
            f"no optimizer holds the feedback of {lacking} layers; convert first, or "
            f"optimizer.add_param_group({{'params': fa.feedback_parameters(net)}})"
        )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _stepping:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in list(_stepping):
            if id(layer.held) in held:
                _step(layer)


@torch.no_grad()
def _step(layer: nn.Module) -> None:
    fb, W = layer.feedback, layer.weight
    if fb.rule.clamp_forward:
        W.mul_(fb.forward_norm / torch.linalg.vector_norm(W))
    if fb.after_args is not None:
        fb.after_step(W)


def after_step(net: nn.Module) -> None:
    """Do once what follows an optimizer step, for loops without a ``torch.optim`` optimizer or with a captured graph.

    Ordinary optimizers need no such call: converted layers hear of their steps by themselves.
    """
    for layer in converted(net).values():
        if layer in _stepping:
            _step(layer)


# ------------------------------------------------------------------------------------ conversion

_CONVERTED = {nn.Linear: FeedbackLinear, nn.Conv2d: FeedbackConv2d}  # fa.attention adds the projections of an attention

_REFUSED = (  # layers with a matrix that errors pass through, for which there is no feedback here
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.lazy.LazyModuleMixin,
)
_REFUSED_NAMES = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")  # torchvision's Swin reads its layers' weights itself


def converted(net: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> converted layer, in the order of the network's modules."""
    return {name: m for name, m in net.named_modules() if isinstance(m, _Converted)}


def _targets(net: nn.Module, skip: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers to convert; raises for what cannot be, all at once."""
    from . import attention

    skip = {skip} if isinstance(skip, str) else set(skip)
    names = {name for name, _ in net.named_modules()}
    if unknown := skip - names:
        raise UserError(f"skip names no module: {', '.join(sorted(unknown))}")
    holders: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    found, problems = {}, []
    for name, m in net.named_modules():
        if any(name == s or name.startswith(s + ".") for s in skip):
            continue
        if isinstance(m, nn.MultiheadAttention):
            if why := attention.refusal(m):
                problems.append(f"{name or 'the root'} ({type(m).__name__}: {why})")
            prefix = f"{name}." if name else ""
            found |= {prefix + key: row for key, row in attention.rows(m).items()} | {prefix + "out_proj": m.out_proj}
            continue
        if not isinstance(m, (nn.Linear, nn.Conv2d)):
            if isinstance(m, _REFUSED) or type(m).__name__ in _REFUSED_NAMES:
                problems.append(f"{name or 'the root'} ({type(m).__name__}: no feedback for this kind of layer)")
            continue
        if name in found:  # the output projection of an attention
            continue
        if isinstance(m, nn.modules.lazy.LazyModuleMixin):
            problems.append(f"{name} (lazy: run the network once first)")
        elif type(m) not in _CONVERTED and not isinstance(m, _Converted):
            problems.append(f"{name} ({type(m).__name__}: a subclass with behaviour of its own)")
        elif not isinstance(m._parameters.get("weight"), nn.Parameter):
            problems.append(f"{name} (its weight is computed from other parameters)")
        elif len(holders[id(m.weight)]) > 1:
            problems.append(f"{name} (its weight is tied: {', '.join(holders[id(m.weight)])})")
        else:
            found[name] = m
    if problems:
        raise UserError(f"cannot convert {'; '.join(problems)}; leave them to backprop with skip=[...]")
    if not found:
        raise UserError("nothing to convert: the network has no nn.Linear and no nn.Conv2d")
    return found


def convert(
    net: nn.Module,
    rule: str | Rule,
    *,
    seed: int = 0,
    skip: str | Iterable[str] = (),
    sample: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """Put a learning rule on every ``nn.Linear`` and ``nn.Conv2d`` of a network, in place; returns the network.

    An ordinary training loop then trains under the rule. The forward pass, the parameters and their names stay as they are.
    A network that already has a rule loses it first. ``convert(net, "bp")`` leaves plain backprop.

    Args:
        net: any module, also a single layer.
        rule: a name of :data:`fa.RULES`, or a rule object.
        seed: of the feedback's random draws (default 0). Every layer draws from a generator of its own, made of this seed and
            the layer's name; the global generator is not touched.
        skip: qualified names of modules (or one name) that stay plain backprop, with all that is inside them.
        sample: a batch of inputs (n, ...), for rules that need the sizes of the maps (``form="dense"``): the network is run on it
            once, in eval mode. Default None.
        options: the rule's own, e.g. ``expansion=10`` for ``pfa``.

    Raises:
        UserError: unknown rule or option; a layer that cannot be converted, by name (tied or computed weights, subclasses,
            transposed, recurrent and lazy layers). Nothing is changed then.

    Example:
        >>> net = fa.convert(torch.nn.Linear(4, 2), "fa", seed=1)
        >>> fa.feedback_weight(net).shape
        torch.Size([2, 4])
    """
    r = rules.rule(rule, **options) if isinstance(rule, str) else rule
    if not isinstance(r, Rule):
        raise UserError(f"rule must be a name of fa.RULES or a fa.Rule, not {type(rule).__name__}")
    if r.name == "bp":
        return revert(net)
    layers = _targets(net, skip)
    sizes = {} if sample is None else _sizes(net, sample)
    attach = r.attach if hasattr(r, "attach") else partial(_attach, r)
    put = attach(net, layers, sizes, seed)  # draws all feedback and changes nothing
    revert(net)
    put()
    return net


@torch.no_grad()
def _sizes(net: nn.Module, sample: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Layer -> sizes of one sample's input and output, from one pass in eval mode."""
    sizes, handles, modes = {}, [], {m: m.training for m in net.modules()}
    for name, m in net.named_modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                sizes[name] = args[0].shape[1:], out.shape[1:]  # fmt: skip
            handles.append(m.register_forward_hook(keep))
    try:
        net.eval()(sample)
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes.items():
            m.training = training
    return sizes


def _attach(
    rule: Rule, net: nn.Module, layers: dict[str, nn.Module], sizes: dict[str, tuple[torch.Size, torch.Size]], seed: int
) -> Callable[[], None]:
    """Draw the feedback of every layer; the function returned puts it in place."""
    kind = NoisyFeedback if getattr(rule, "input", "data") != "data" else Feedback
    feedback = {name: kind(rule, _linear_map(m, sizes.get(name)), m, name, seed) for name, m in layers.items()}

    def attach() -> None:
        for name, layer in layers.items():
            put_on(layer, feedback[name], next(new for old, new in _CONVERTED.items() if isinstance(layer, old)))

    return attach


def put_on(layer: nn.Module, feedback: nn.Module, cls: type) -> None:
    """Change the layer's class in place and give it its feedback."""
    feedback.train(layer.training)
    feedback.original = type(layer)
    layer.feedback = feedback
    layer.__class__ = cls
    if hasattr(layer, "install"):
        layer.install()
    _watch(layer)


def revert(net: nn.Module) -> nn.Module:
    """Take every rule off the network, in place; returns it. The same as ``convert(net, "bp")``."""
    for layer in converted(net).values():
        if handle := _watches.pop(layer, None):
            handle.remove()
        _unheld.discard(layer)
        _stepping.discard(layer)
        if hasattr(layer.feedback, "tape"):
            layer.feedback.tape.remove()
        if hasattr(layer, "remove"):
            layer.remove()
        layer.__class__ = layer.feedback.original
        del layer.feedback
    return net


def feedback_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The learned feedback of a converted network, for an optimizer made before the conversion."""
    return [p for layer in converted(net).values() for p in layer.feedback.parameters()]


def param_groups(net: nn.Module, lr: float, weight_decay: float = 0.0, feedback_lr: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups with each rule's right defaults.

    Feedback that follows W's own update (kp, pfa, pfa_o) shares its learning rate and decay: the mismatch vanishes only if both
    decay alike. Rules whose gradient holds a decay of its own (wm, ia, sa, aa) get none from the optimizer, which would shift
    their fixed point.

    Args:
        net: a network, converted or not.
        lr: learning rate of everything, or of all but own-decay feedback if ``feedback_lr`` is given.
        weight_decay: of everything but own-decay feedback (default 0, as ``torch.optim.SGD``).
        feedback_lr: learning rate of own-decay feedback (default: ``lr``).

    Returns:
        One group, or two where there is own-decay feedback.
    """
    own = {id(p) for m in converted(net).values() if m.feedback.rule.own_decay for p in m.feedback.parameters()}
    groups = [{"params": [p for p in net.parameters() if id(p) not in own], "lr": lr, "weight_decay": weight_decay}]
    if own:
        rest = [p for p in net.parameters() if id(p) in own]
        groups.append({"params": rest, "lr": lr if feedback_lr is None else feedback_lr, "weight_decay": 0.0})
    return groups
