"""A layer's passes: the one autograd function, and what may surround a pass.

In the backward pass the kernel takes the weight's place in a single ``convolution_backward`` call, which returns dx
through the kernel together with the exact dW and db, at the price of plain backprop. Around a pass there may be
autocast, hooks for saved tensors, a compiler or a transformation of ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, wraps
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor

from fa.errors import UserError


def cast(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``; in small layers a call of ``to`` that changes nothing is a cost that shows."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The lower precision of autocast where that is on for a kind of device; None elsewhere."""
    try:
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    except RuntimeError:  # a kind of device without autocast, such as "meta"
        return None


def lowered(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` as autocast to ``dtype`` hands it to a layer: integers and float64 stay as they are."""
    return x.to(dtype) if dtype and x.is_floating_point() and x.dtype != torch.float64 else x


def saved_elsewhere() -> bool:
    """Whether hooks for saved tensors are in use, as in a gradient checkpoint of the non-reentrant kind."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def running() -> Any:
    """The context of the autograd function that is running, e.g. of a reentrant gradient checkpoint; None outside."""
    contexts = (frame.f_locals.get("ctx") for frame, _ in walk_stack(None))
    return next((ctx for ctx in contexts if isinstance(ctx, torch.autograd.function.FunctionCtx)), None)


def traced_effect(call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)`` in code that a compiler traces, where a gradient checkpoint forbids its effects on modules."""
    return torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(call, *args)


NO_FUNCTORCH = (
    "torch.func (grad, vmap, jvp) does not pass through a learning rule: call loss.backward() or torch.autograd.grad, "
    "or differentiate plain backprop, within fa.exact_backprop(net)"
)

NO_SECOND = b"a rule's gradient has no derivative (penalty, Hessian): run both its passes within fa.exact_backprop(net)"

NO_TRACE = (
    "{} keeps no learning rule, and layer {!r} has one: trace under torch.no_grad() to look at the network or to "
    "export it, and train the network itself"
)


def note_trace(feedback: Any) -> None:
    """Note that a traced pass of a layer ran; a ``torch.export`` with gradients (Dynamo claims to be one) raises."""
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
        raise RuntimeError(NO_TRACE.format("torch.export", feedback.layer_name))
    traced_effect(setattr, feedback, "traced", True)


def misfit(layer: str, made: Iterable[int], now: Iterable[int]) -> UserError:
    """The error of feedback that was ``made`` for another shape than a layer has ``now``."""
    return UserError(
        f"the feedback of layer {layer!r} was made for the shape {tuple(made)}, and the layer now has {tuple(now)}: "
        "call fa.convert again after a weight or a map has got another shape"
    )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward pass whose results raise where they are differentiated; PyTorch's own decorator has them
    pass for constants where the error at the output is a constant, and a gradient penalty is without effect."""

    @wraps(backward)
    def once(ctx: Any, *errors: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *errors)
        if not torch.is_grad_enabled():
            return found
        # with the errors, so that a derivative by anything that they depend on arrives here
        raises = torch._C._functions.DelayedError(NO_SECOND, len(found) + len(errors))
        return raises(*(t if t is None else t.detach().requires_grad_() for t in found), *errors)[: len(found)]

    return once


def marked(feedback: Any, dW: Tensor) -> Tensor:
    """A gradient of the weight, with a mark that :meth:`fa.layers.feedback.Feedback.own_gradient` reads."""
    if not torch.compiler.is_compiling():
        (last, made), task = feedback.made, torch._C._current_graph_task_id()
        vars(feedback)["made"] = task, made * (task == last) + 1  # a module's own setattr takes ten times as long
        dW.own = dW._version
    return dW


@cache
def _empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)  # -> (0,)


class LocalBackward(torch.autograd.Function):
    """Forward y = W x + b; backward through the rule's kernel. State tensors come last and get the rule's gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, feedback: Any, *state: Tensor) -> Tensor:
        # without autocast the stock operation refuses an x of another dtype
        K = W if W.dtype == x.dtype else lowered(W, autocast_dtype(W.device))
        out = feedback.op.forward(x, K, b)  # (..., out), or (n, out, h', w')
        ctx.feedback, saved = feedback, None
        if feedback.keeps_y and torch.compiler.is_compiling():
            saved, ctx.version = out, None
        elif feedback.keeps_y:
            # The next layer may overwrite the output in place, as nn.ReLU(inplace=True) does, and autograd would refuse
            # to hand out the saved output. So its data are saved, which have a version of their own; an empty tensor
            # shares the output's version, which every in-place operation raises.
            kept = out.detach()
            saved, ctx.version = kept.data, (kept, kept._version)
            kept.data = _empty(out.dtype, out.device)
        ctx.save_for_backward(x, W, b if feedback.keeps_y else None, saved, *state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        fb, op = ctx.feedback, ctx.feedback.op
        x, W, b, out, *state = ctx.saved_tensors
        need_x, need_W, need_b, _, *need_state = ctx.needs_input_grad
        known = dict(zip(fb.names, state), W=W, op=op, x=x, y=None, dy=dy)
        sent, K = fb.send(known) if need_x and not fb.use_backprop else (None, W)  # this pass alone is in the block
        dx, dW, db = op.backward(dy, x, cast(K, dy), [need_x and sent is None, need_W, need_b])
        if dW is not None:
            known["dW"] = dW = marked(fb, cast(dW, W))
        # Feedback that follows W's own update rests while W is frozen.
        learns = any(need_state) and not fb.use_backprop and (need_W or "dW" not in fb.grad_args)
        if learns and fb.keeps_y:
            if ctx.version and ctx.version[0]._version != ctx.version[1]:  # overwritten: W x is made again
                out = op.forward(x, W.to(x.dtype), b)
            known["y"] = out if b is None else out - b.view(-1, *[1] * (W.dim() - 2))
        grads = fb.gradient_from(known) if learns else {}
        mine = (grads[name] if learns and need else None for name, need in zip(fb.names, need_state))
        return dx if sent is None else sent, dW, db, None, *mine


class ExactBackward(LocalBackward):
    """Plain backprop with the saved tensors of :class:`LocalBackward`, so that a gradient checkpoint that began under
    exact backprop may run again under the rule; may be differentiated twice, as the stock layer."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        fb, (x, W, *_) = ctx.feedback, ctx.saved_tensors
        dx, dW, db = fb.op.backward(dy, x, cast(W, dy), list(ctx.needs_input_grad[:3]))
        return dx, dW if dW is None else marked(fb, cast(dW, W)), db, None, *[None] * len(fb.names)
