"""Checks of converted layers that need no call in the user's loop: a hook on each weight, two on optimizer steps.

The weight's hook raises when another module reads the weight directly, because the layer would then train by backprop.
The pair of global optimizer hooks, registered by the first layer that needs it, raises when no optimizer holds learned
feedback, and runs a rule's ``after_step`` once per step.
"""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fa.layers.feedback import Feedback

_watches: weakref.WeakKeyDictionary[nn.Module, Any] = (
    weakref.WeakKeyDictionary()
)  # layer -> handle of its weight's hook
_unheld: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose learned feedback no optimizer has stepped yet
_stepping: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose rule acts after every step
_hooks: list[Any] = []


class Converted:
    """What the converted classes share: a hook on the weight, also after a deepcopy, and the rule in ``print(net)``."""

    feedback: Feedback

    rows = slice(None)
    """The rows of ``held`` that are the layer's weight."""

    @property
    def held(self) -> nn.Parameter:
        """The parameter that an optimizer holds."""
        return self.weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What torch.jit.trace calls in place of ``forward``.

        Raises:
            RuntimeError: gradients are on; a trace keeps no rule, so that its network would train by backprop.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"torch.jit.trace keeps no learning rule, and layer {self.feedback.layer_name!r} has one: trace under "
                "torch.no_grad() to look at the network or to export it, and train the network itself"
            )
        return super()._slow_forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """The stock layer's line, then the rule with the options that are not at their defaults."""
        rule = getattr(self.feedback.rule, "explicit", self.feedback.rule)
        options = [f"{f.name}={getattr(rule, f.name)!r}" for f in fields(rule) if getattr(rule, f.name) != f.default]
        options += ["implicit=True"] * (rule is not self.feedback.rule)
        given = f"({', '.join(options)})" if options else ""
        return ", ".join(filter(None, [super().extra_repr(), f"rule={rule.name}{given}"]))


def converted(net: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> converted layer, in the order of the network's modules."""
    return {name: m for name, m in net.named_modules() if isinstance(m, Converted)}


def watch(layer: nn.Module) -> None:
    """Make the layer raise when its weight gets a gradient that the layer's own backward did not make.

    Another module, such as the layer's parent, then reads ``layer.weight`` and bypasses the layer's forward, so that
    the weight would train by backprop, unnoticed. The layer also joins the checks and calls at optimizer steps that its
    rule needs.

    Raises:
        RuntimeError: in the backward pass, as said.
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
        if fb is None or fb.use_backprop:
            return
        if not (fb.backward_ran or fb.traced):
            raise RuntimeError(
                f"the weight of layer {fb.layer_name!r} got a gradient, but the layer's own backward did not run: "
                f"another module reads it directly, so that it would train by backprop; leave it out with convert(..., "
                f"skip=[{fb.layer_name!r}])"
            )
        vars(fb)["backward_ran"] = False

    _watches[layer] = layer.held.register_post_accumulate_grad_hook(check)


def unwatch(layer: nn.Module) -> None:
    """Remove the hooks of a layer that is about to lose its feedback."""
    if handle := _watches.pop(layer, None):
        handle.remove()
    _unheld.discard(layer)
    _stepping.discard(layer)


def _register_hooks() -> None:
    """Register the pair of global optimizer hooks, once, for the first layer that needs it; never at import."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise if no optimizer holds learned feedback, or if one would move implicit feedback in another way than W."""
    if not _unheld:
        return
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    without = 0  # layers whose weight steps for the second time without its feedback
    for layer in list(_unheld):
        fb, W = layer.feedback, id(layer.held)
        learned = [id(p) for p in fb.parameters() if p.requires_grad]  # feedback may be frozen on purpose
        if all(p in group_of for p in learned):
            if fb.rule.needs_sgd and not (
                type(optimizer) is torch.optim.SGD and {group_of[p] for p in learned} == {group_of.get(W)}
            ):
                raise RuntimeError(
                    f"implicit feedback of layer {fb.layer_name!r} is exact only for torch.optim.SGD with the weight "
                    f"and its feedback in one parameter group, not {type(optimizer).__name__}; "
                    "convert with implicit=False"
                )
            _unheld.discard(layer)
        elif W in group_of:
            without += fb.steps_alone > 0
            fb.steps_alone += 1
    if without:
        raise RuntimeError(
            f"no optimizer holds the feedback of {without} layers; convert first, or "
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


def acts_between_steps(net: nn.Module) -> bool:
    """Whether a rule of this network acts after every optimizer step; a captured CUDA graph would leave that out."""
    return any(layer in _stepping for layer in converted(net).values())


def after_step(net: nn.Module) -> None:
    """Run once what the rules do after an optimizer step, for loops without ``torch.optim`` or with a captured graph.

    An ordinary ``torch.optim`` optimizer needs no such call: its steps run the same function through a hook.
    """
    for layer in converted(net).values():
        if layer in _stepping:
            _step(layer)
