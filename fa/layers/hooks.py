"""Converted layers, and what they check without a call in the user's loop.

A hook on its weight raises when another module reads the weight, because errors would then pass W. What a layer checks
and does at optimizer steps is in :mod:`fa.layers.steps`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry
from torch.utils.hooks import unserializable_hook

from fa.layers.feedback import Feedback
from fa.layers.maps import geometry
from fa.layers.passes import NO_TRACE
from fa.layers.reads import evidence
from fa.layers.steps import act, join, leave

_watches = weakref.WeakKeyDictionary[Any, list[tuple[Tensor, Any]]]()  # module -> hooks on its weights
_arrivals: list[Any] = []  # hooks on whatever any module gets


class Watched:
    """A module that holds the weights of converted layers: ``rewatch`` keeps hooks on them, whatever becomes of one."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``'s; a new weight is watched as the old one was."""
        super().register_parameter(name, param)
        self.rewatch()

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self.rewatch()  # some devices have new parameters
        return self


class Converted(Watched):
    """What the converted classes share: a hook on the weight, and the rule in ``print(net)``."""

    feedback: Feedback

    rows: Any = ...  # of ``held``: the layer's weight

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module that holds the weight, and its name there."""
        return self, "weight"

    @property
    def held(self) -> nn.Parameter:
        """The parameter that an optimizer holds."""
        return getattr(*self.place)

    @property
    def computed(self) -> bool:
        """Whether the weight is computed from other parameters, since the layer was converted."""
        return self.place[1] not in self.place[0]._parameters

    @property
    def sources(self) -> list[nn.Parameter]:
        """The parameters that the weight is, or is computed from (``torch.nn.utils``: parametrizations, pruning).

        The first one sets the weight's size in weight norm, and is the weight before its mask in pruning.
        """
        module, name = self.place
        if (W := module._parameters.get(name)) is not None:
            return [W]
        if nn.utils.parametrize.is_parametrized(module, name):
            return list(module.parametrizations[name].parameters())
        return [p for key, p in module._parameters.items() if key.startswith(name)]

    def watch(self) -> None:
        """Raise, in the backward pass, when another module reads the weight (:mod:`fa.layers.reads`), and join the
        checks and calls at optimizer steps that the rule needs."""
        join(self)
        self.rewatch()

    def rewatch(self) -> None:
        """Put the hook on the leaf tensors that the weight is made of now (``functional_call`` may have put others)."""
        kept, sources = _watches.get(self, []), [p for p in self.sources if p.is_leaf]
        if not sources or torch._C._are_functorch_transforms_active():
            return  # computed from the layer's own weight, whose hook stays; or no weight of its own
        if [id(p) for p, _ in kept] == [id(p) for p in sources]:
            for p in sources:
                p._backward_hooks = p._backward_hooks  # torch.utils.swap_tensors leaves them behind
            return
        for _, handle in kept:
            handle.remove()
        _watches[self] = [(p, _hook(p, self)) for p in sources]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watch()

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script calls before it reads the class."""
        raise RuntimeError(NO_TRACE.format("torch.jit.script", self.feedback.layer_name))

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What torch.jit.trace calls in place of ``forward``."""
        if torch.is_grad_enabled():
            raise RuntimeError(NO_TRACE.format("torch.jit.trace", self.feedback.layer_name))
        return super()._slow_forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """The stock layer's line, then the rule with the options that are not at their defaults."""
        rule = getattr(self.feedback.rule, "explicit", self.feedback.rule)
        options = [f"{f.name}={getattr(rule, f.name)!r}" for f in fields(rule) if getattr(rule, f.name) != f.default]
        options += ["implicit=True"] * (rule is not self.feedback.rule)
        given = f"({', '.join(options)})" if options else ""
        return ", ".join(filter(None, [super().extra_repr(), f"rule={rule.name}{given}"]))


class FeedbackLinear(Converted, nn.Linear):
    """``nn.Linear`` whose error goes down through ``self.feedback``; made by :func:`fa.convert`, never constructed."""

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: input (..., in) -> (..., out), as ``nn.Linear``."""
        if self.feedback.bypassed(input):
            return super().forward(input)
        W = self.weight
        if not (torch.compiler.is_compiling() or W._backward_hooks):  # computed, or put here past register_parameter
            self.rewatch()
        return self.feedback.forward(input, W, self.bias)


class FeedbackConv2d(Converted, nn.Conv2d):
    """``nn.Conv2d`` whose error goes down through ``self.feedback``; made by :func:`fa.convert`, never constructed."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shapes: input (n, in, h, w) or (in, h, w) -> (n, out, h', w') or (out, h', w'), as ``nn.Conv2d``."""
        if self.feedback.bypassed(input):
            return super()._conv_forward(input, weight, bias)
        if not (torch.compiler.is_compiling() or weight._backward_hooks):
            self.rewatch()
        op = self.feedback.op
        if op.told != (self.stride, self.padding, self.dilation):  # set since, as networks for dense predictions do
            op.__init__(**geometry(self), sizes=op.sizes, gen=op.gen)
        if op.pad:  # an ordinary operation before the linear map; autograd carries the error through it exactly
            input = F.pad(input, op.pad, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        if input.dim() == 3:
            return self.feedback.forward(input.unsqueeze(0), weight, bias).squeeze(0)
        return self.feedback.forward(input, weight, bias)


Feedback.classes = {nn.Linear: FeedbackLinear, nn.Conv2d: FeedbackConv2d}


def converted(net: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> converted layer, in the order of the network's modules."""
    return {name: m for name, m in net.named_modules() if isinstance(m, Converted)}


def watch_other(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Make a tensor without a rule, such as an embedding, raise when activity is multiplied by it; but not one that is
    never trained, or that has fewer than two axes above 1."""
    if tensor is not None and tensor.is_leaf and sum(n > 1 for n in tensor.shape) > 1:
        if tensor.requires_grad or isinstance(tensor, nn.Parameter):
            _watches.setdefault(module, []).append((tensor, _hook(tensor, module, name)))


def know(net: nn.Module, skip: set[str]) -> None:
    """Note in the modules of a converted network, and so in their copies, how they are called, so that what comes to
    them later is watched; but not what comes to a place in ``skip``."""
    if not _arrivals:
        _arrivals.append(registry.register_module_module_registration_hook(_arrived))
        _arrivals.append(registry.register_module_parameter_registration_hook(_arrived))
        for kind in (nn.Sequential, nn.ModuleList):  # whose insert tells no hook
            kind.insert = _telling(inspect.unwrap(kind.insert))
    for name, module in net.named_modules():
        vars(module)["_place"] = name, skip


def _arrived(parent: nn.Module, name: str, new: nn.Module | Tensor | None) -> None:
    """Watch what a module of a converted network gets: a layer, a module with layers, or a parameter."""
    prefix, skip = vars(parent).get("_place", ("", None))
    name = f"{prefix}.{name}".lstrip(".")
    if skip is None or isinstance(parent, Watched) or within(name, skip):
        return
    if not isinstance(new, nn.Module):
        return watch_other(parent, name, new)
    for inner, module in new.named_modules(prefix=name):
        vars(module)["_place"] = inner, skip
        for key, p in module._parameters.items() if not isinstance(module, Watched) else ():
            watch_other(module, f"{inner}.{key}", p)


def _telling(insert: Callable[..., Any]) -> Callable[..., Any]:
    """A container's ``insert``, which tells :func:`_arrived` as an assignment does."""

    @wraps(insert)
    def told(self: nn.Module, index: int, module: nn.Module) -> Any:
        out = insert(self, index, module)
        _arrived(self, next(name for name, child in self._modules.items() if child is module), module)
        return out

    return told


def within(name: str, places: Iterable[str]) -> bool:
    """Whether a qualified name is one of these, or lies in one of them; ``[`` follows the name of a list or dict."""
    return any(name == place or name.startswith((f"{place}.", f"{place}[")) for place in places)


def _hook(parameter: Tensor, layer: nn.Module, name: str = "") -> Any:
    ref, key, unmarked = weakref.ref(layer), id(parameter), 0  # a hook that holds its parameter keeps it in memory

    @unserializable_hook
    @torch._disable_dynamo  # a compiled loop would trace this, and guard on what other networks have
    def check(grad: Tensor | None) -> None:
        nonlocal unmarked
        layer = ref()
        fb = getattr(layer, "feedback", None)
        if layer is None or grad is None or (fb and fb.own_gradient(grad)):
            return
        unmarked += 1
        if unmarked & (unmarked - 1) and unmarked % 64:  # a look takes time: often at first, then less
            return
        owner = {id(p): layer for layer, handles in _watches.items() for p, _ in handles}
        why = evidence(key, lambda p: owner.get(id(p)))
        if why == "compiled":
            raise RuntimeError(
                f"the weight of layer {fb.layer_name!r} got a gradient from a compiled graph without the layer's rule: "
                "compile after fa.convert (torch.compiler.reset() forgets older graphs), add a penalty outside of it, "
                f"or, if a module reads the weight, leave the layer out with convert(..., skip=[{fb.layer_name!r}])"
            )
        unmarked *= not why  # the next one is looked at again
        if why and fb is None:
            raise RuntimeError(
                f"activity is multiplied by {name!r}, which has no rule, so that errors would pass it by backprop: "
                "make it an nn.Linear or nn.Conv2d, call fa.convert after it is put in, or leave it out with "
                f"convert(..., skip=[{name!r}])"
            )
        if why:
            raise RuntimeError(
                f"the weight of layer {fb.layer_name!r} got a gradient that the layer's own backward did not make: "
                f"{why}, so that it would train by backprop; leave it out with convert(..., skip=[{fb.layer_name!r}])"
            )

    trained = parameter.requires_grad
    parameter.requires_grad_(True)  # a frozen weight can be thawed, and PyTorch takes no hook while it is frozen
    handle = parameter.register_hook(check)
    parameter.requires_grad_(trained)
    return handle


def unwatch(layer: nn.Module) -> None:
    """Remove the hooks of a layer that is about to lose its feedback."""
    vars(layer).pop("_place", None)
    for _, handle in _watches.pop(layer, []):
        handle.remove()
    leave(layer)


def after_step(net: nn.Module) -> None:
    """Run once what the rules do after an optimizer step, for loops without ``torch.optim`` or with a captured graph.

    An ordinary ``torch.optim`` optimizer needs no such call: its steps run the same function through a hook.
    """
    for layer in converted(net).values():
        if layer.feedback.acts:
            act(layer)
