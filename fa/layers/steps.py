"""A layer's own step: what happens before and after the step of the optimizer that holds its weight.

A pair of global optimizer hooks, registered by the first layer that needs it, raises when no optimizer holds learned
feedback or when implicit feedback does not fit, runs a rule's ``after_step`` once per step, and keeps the gradients of
local rules apart from the loss scale. It holds for optimizers within optimizers and for computed weights.
"""

from __future__ import annotations

import gc
import inspect
import sys
import warnings
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from functools import wraps
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fa.errors import UserError

_unheld: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose learned feedback no optimizer has stepped yet
_local: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose feedback's gradient does not scale with the loss
_implicit: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose feedback holds while SGD alone moves W
_stepping: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose rule acts after every step
_hooks: list[Any] = []


def join(layer: nn.Module) -> None:
    """Add a converted layer to the checks and calls at optimizer steps that its rule needs."""
    fb, rule = layer.feedback, layer.feedback.rule
    needs = rule.learned, rule.learned and not fb.follows_error, rule.needs_sgd, fb.acts
    for layers, needed in zip((_unheld, _local, _implicit, _stepping), needs):
        if needed:
            layers.add(layer)
            if not _hooks:  # once, for the first layer that needs them; never at import
                _hooks.append(register_optimizer_step_pre_hook(_before_step))
                _hooks.append(register_optimizer_step_post_hook(_after_step))
                _scale_apart(torch.amp.GradScaler)
                torch.amp.GradScaler.__init_subclass__ = classmethod(_scale_apart)
    if rule.needs_sgd and fb.seen is None:
        note_weight(layer)


def leave(layer: nn.Module) -> None:
    """Undo :func:`join`."""
    for layers in (_unheld, _local, _implicit, _stepping):
        layers.discard(layer)


def _enclosing(frame: Any) -> list[torch.optim.Optimizer]:
    """The optimizers from whose ``step`` an optimizer's own step is called.

    Wrappers (SAM, ZeroRedundancyOptimizer) step an inner optimizer, and a subclass's step calls its base class's:
    PyTorch runs the global hooks at each. A stack of calls survives an exception. PyTorch's ``frame`` called the hook.
    """
    return [f.f_locals["args"][0] for f, _ in walk_stack(frame.f_back) if f.f_code is frame.f_code]


def under_way() -> bool:
    """Whether an optimizer's step calls this code, as LBFGS calls its closure."""
    return any(f.f_code.co_filename == inspect.getfile(torch.optim.Optimizer) for f, _ in walk_stack(None))


def groups_of(optimizer: torch.optim.Optimizer, around: Iterable[torch.optim.Optimizer] = ()) -> dict[int, int]:
    """Id of a parameter -> number of its group; without what the optimizers ``around`` step anyway."""
    group_of = {id(p): i for i, group in enumerate(getattr(optimizer, "param_groups", ())) for p in group["params"]}
    for outer in around:
        for p in groups_of(outer):
            group_of.pop(p, None)
    return group_of


def leader(layer: nn.Module) -> nn.Parameter | None:
    """The parameter whose optimizer step is the layer's own step: the first trained one that its weight is made of."""
    sources = layer.sources
    return next((p for p in sources if p.requires_grad), sources[0] if sources else None)


def learned(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's learned feedback, but what was frozen on purpose."""
    return [p for p in layer.feedback.parameters() if p.requires_grad]


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise if no optimizer holds learned feedback, or if implicit feedback does not fit; see to the loss scale."""
    if (scale := getattr(optimizer, "grad_scale", None)) is not None:  # a fused optimizer divides by it
        _rescale(optimizer, scale)
    if not (_unheld or _implicit):
        return
    group_of = groups_of(optimizer, _enclosing(sys._getframe(1)))
    for layer in list(_implicit):
        if any(id(p) in group_of for p in (leader(layer), *learned(layer))):
            _check_implicit(layer, optimizer, group_of)
    without = []  # layers whose weight steps for the second time without its feedback
    for layer in list(_unheld):
        fb, feedback = layer.feedback, learned(layer)
        if id(leader(layer)) in group_of:
            fb.waits = fb.acts
        if feedback and all(id(p) in group_of for p in feedback):
            _unheld.discard(layer)
            own = fb.rule.own_decay
            groups = [optimizer.param_groups[group_of[id(p)]] for p in (*feedback, leader(layer)) if id(p) in group_of]
            meant, option = ({}, "maximize") if own else (groups[-1], "lr")
            if any(g.get(k, 0) != meant.get(k, 0) for g in groups[: len(feedback)] for k in ("weight_decay", option)):
                why = "descends an objective, with a decay, of its own" if own else "needs W's own rate and decay"
                warnings.warn(f"{fb.rule.name}: feedback {why}; use fa.param_groups", stacklevel=3)
        elif feedback and id(leader(layer)) in group_of:
            without += [layer] * (fb.steps_alone > 0)
            fb.steps_alone += 1
    if without:  # an optimizer of the feedback alone may step more rarely
        held = {i for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer) for i in groups_of(o)}
        _unheld.difference_update([layer for layer in without if held.issuperset(map(id, learned(layer)))])
        without = [layer for layer in without if layer in _unheld]
    if without:
        raise RuntimeError(
            f"no optimizer holds the feedback of {len(without)} layers, so that it would not learn: "
            "call fa.add_feedback(optimizer, net), or make the optimizer after fa.convert"
        )


def _rescale(optimizer: torch.optim.Optimizer, scale: Tensor) -> None:
    """Multiply by the scale of the loss the gradients that will be divided by it and never were multiplied."""
    group_of = groups_of(optimizer)
    for p in [p for layer in _local for p in learned(layer)]:
        if p.grad is not None and id(p) in group_of:
            p.grad.mul_(scale.to(p.grad.device))


def _scale_apart(kind: type) -> None:
    """Have :func:`_rescale` precede ``unscale_`` and ``step`` of a kind of scaler, and of kinds made of it: FSDP's."""
    own = inspect.unwrap(kind._unscale_grads_)  # also where this module is loaded again
    if "_unscale_grads_" in vars(kind) and "_unscale_grads_" not in own.__code__.co_names:  # else it calls another one

        @wraps(own)
        def divide(scaler: Any, optimizer: torch.optim.Optimizer, inv_scale: Tensor, *args: Any) -> Any:
            _rescale(optimizer, 1 / inv_scale)
            return own(scaler, optimizer, inv_scale, *args)

        kind._unscale_grads_ = divide
    for made_of_it in kind.__subclasses__():
        _scale_apart(made_of_it)


def _check_implicit(layer: nn.Module, optimizer: torch.optim.Optimizer, group_of: dict[int, int]) -> None:
    """Raise unless SGD alone moves the weight, together with its feedback, and no parametrization computes it."""
    fb, feedback = layer.feedback, learned(layer)
    name, remedy = f"implicit feedback of layer {fb.layer_name!r}", "convert with implicit=False"
    if layer.computed:
        raise RuntimeError(f"{name} is exact only for a weight that is a parameter, and this one is computed; {remedy}")
    apart = {group_of[id(p)] for p in feedback if id(p) in group_of} - {group_of.get(id(leader(layer)))}
    if type(optimizer) is not torch.optim.SGD or apart:
        raise RuntimeError(
            f"{name} is exact only for torch.optim.SGD with the weight and its feedback in one parameter group, "
            f"not {type(optimizer).__name__}; {remedy}"
        )
    if fb.seen and _changed(layer):
        raise RuntimeError(
            f"{name} follows the steps of its optimizer alone, and something else changed the weight since the last "
            f"step (a clip, a mask, weights loaded without their feedback); {remedy}"
        )


def note_weight(layer: nn.Module) -> None:
    """Keep a number of each row of the weight, (out,), which moves with any entry of the row, for ``_changed``."""
    rows = layer.weight.detach().flatten(1)  # (out, in)
    layer.feedback.seen = layer.weight._version, rows @ torch.arange(rows.shape[1], device=rows.device).cos().to(rows)


def _changed(layer: nn.Module) -> bool:
    """Whether the weight has other values than when it was noted; on a GPU only where its version says so, because the
    host would wait. In-place operations raise it, but not those on ``weight.data``, and not fused optimizers."""
    version, kept = layer.feedback.seen
    if layer.weight.is_meta or (layer.weight.is_cuda and layer.weight._version == version):
        return False
    note_weight(layer)
    now = layer.feedback.seen[1]
    size = kept.abs().nan_to_num(0, 0, 0).max().item()  # which another device rounds in another way
    near = 64 * size * max(torch.finfo(t.dtype).eps for t in (now, kept))
    return not torch.allclose(now, kept.to(now), 0, near, equal_nan=True)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not (_stepping or _implicit):
        return
    skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer under a gradient scaler skips by itself
    if skipped is not None and skipped.item():
        return
    group_of = groups_of(optimizer, _enclosing(sys._getframe(1)))
    for layers, call in ((_stepping, act), (_implicit, note_weight)):
        for layer in list(layers):
            if id(leader(layer)) in group_of:
                call(layer)


@torch.no_grad()
def act(layer: nn.Module) -> None:
    """Do what the layer's rule does after an optimizer step."""
    fb, W = layer.feedback, weight_now(layer)
    if fb.rule.clamp_forward:
        size = torch.linalg.vector_norm(W)
        factor = torch.where(size > 0, fb.forward_norm / size, 1.0)  # a weight that a mask has emptied stays empty
        (layer.sources[0][layer.rows] if layer.computed else W).mul_(factor)
        if layer.computed:
            W = weight_now(layer)
            if size > 0 and not torch.isclose(torch.linalg.vector_norm(W), fb.forward_norm, rtol=1e-3):
                raise UserError(
                    f"clamp_forward cannot hold the norm of layer {fb.layer_name!r}, whose weight is computed from "
                    f"other parameters; remove the parametrization, or convert without clamp_forward"
                )
    if fb.after_args is not None and not W.is_meta:  # which has no values, nor has the count of steps
        fb.after_step(W)
    fb.stepped(W)


def weight_now(layer: nn.Module) -> Tensor:
    """The weight as the next forward pass will have it; a computed weight is computed, and nothing else changes."""
    if not layer.computed:
        return layer.weight
    module, name = layer.place
    with ExitStack() as after:  # puts back what was there
        for m in module.modules():  # with those of its parametrizations
            after.callback(setattr, m, "training", m.training)
            m.training = False  # spectral norm takes a step of its own whenever it is asked in training
        if name in vars(module):
            after.callback(setattr, module, name, vars(module)[name])
        for hook in module._forward_pre_hooks.values():  # the older functions of torch.nn.utils compute in such hooks
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(module, ())
        return layer.weight
