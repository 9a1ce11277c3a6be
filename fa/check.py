"""Is a rule of one's own right? ``fa.check_rule`` holds it against a composition of autograd's own operations.

The composition is y = f(x.detach(), W, b) + [g(x, K) - g(x, K).detach()], f the layer, g its linear map and K the
kernel that the rule returns. Its value is the layer's output, autograd's gradients of W and b are the layer's own, and
the error goes down through K alone. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fa import rules
from fa.errors import UserError
from fa.layers.convert import convert
from fa.layers.feedback import Feedback, generator
from fa.metrics import angle
from fa.rules import Rule
from fa.rules.base import gradient_of

TOLERANCE = 1e-9  # of the largest entry
BACKPROP = "the kernel is W itself, which makes the rule backprop"

SETTINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a linear layer, few samples": (lambda: nn.Linear(24, 20), (6, 24)),
    "a linear layer, many samples": (lambda: nn.Linear(24, 16), (30, 24)),
    "a linear layer, leading dimensions (2, 3)": (lambda: nn.Linear(24, 16, bias=False), (2, 3, 24)),
    "a convolution": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 5, 5)),
    "a convolution of stride 2": (lambda: nn.Conv2d(8, 12, 3, stride=2), (2, 8, 7, 6)),
    "a convolution of dilation 2, padding 'same'": (
        lambda: nn.Conv2d(8, 12, 3, dilation=2, padding="same", bias=False),
        (2, 8, 5, 5),
    ),
    "a convolution of 2 groups": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 5, 5)),
    "a 1x1 convolution": (lambda: nn.Conv2d(16, 20, 1), (2, 16, 4, 4)),
}
"""Layer and shape of its input."""


def check_rule(rule: str | Rule | type[Rule], **options: Any) -> str:
    """Hold a rule against the stop-gradient composition, on linear and convolutional layers in float64.

    Per layer, after one step of W: the kernel has the shape of W and stays the same between two calls; the error, dW
    and db are those of the composition; the feedback gradient has the shape of the feedback, is finite and not zero;
    the rule overwrites nothing; ``after_step`` returns tensors that the layer holds; and K is not W, which would be
    backprop. What a feedback gradient ought to be is the rule's own affair and is not checked.

    Args:
        rule: a name of :data:`fa.RULES`, a rule object, or the rule's class.
        options: the rule's own, where ``rule`` is a name or a class.

    Returns:
        A sentence for a rule that is right, with the range of the angles between W and K in degrees.

    Raises:
        UserError: what is wrong with the rule, a sentence for each fault, and on which layers; an unknown name or
            option; a rule without a kernel, such as ``dfa``.

    Example:
        >>> fa.check_rule("fa")  # doctest: +ELLIPSIS
        'fa is right: on 8 layers the error goes down through K ...
    """
    if isinstance(rule, str):
        rule = rules.rule(rule, **options)
    elif isinstance(rule, type) and issubclass(rule, Rule):
        rule = rule(**options)
    if not isinstance(rule, Rule):
        raise UserError(f"check_rule takes a name of fa.RULES, a fa.Rule or its class, not {rule!r}")
    name = rule.name or type(rule).__name__
    if hasattr(rule, "draw_feedback"):
        raise UserError(f"{name} is not layer-wise: it has no kernel that could be checked")
    faults: dict[str, list[str]] = {}  # sentence -> the layers it is about
    angles = []
    for where, (make, shape) in SETTINGS.items():
        try:
            angles.append(_check(rule, make, shape))
        except _Fault as fault:
            faults.setdefault(str(fault), []).append(where)
    if faults:
        everywhere = len(SETTINGS)
        told = [f"{text} ({'every layer' if len(on) == everywhere else '; '.join(on)})" for text, on in faults.items()]
        raise UserError(f"{name} is wrong: " + ".\n".join(told))
    learns = ", its feedback gradient has the shape of the feedback" if rule.learned else ""
    return (
        f"{name} is right: on {len(SETTINGS)} layers the error goes down through K{learns}, and dW and db are exact. "
        f"Angle of W and K: {min(angles):.0f} to {max(angles):.0f} degrees."
    )


class _Fault(Exception):
    """What is wrong with a rule, in a sentence."""


def _check(rule: Rule, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> float:
    """Angle in degrees between W and the kernel on one layer; raises :class:`_Fault`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = make().double()
    map_of_layer, gen = _stock(layer), generator(0, "check_rule")
    x = torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()
    if rule.learned and not hasattr(rule, "feedback_grad"):
        raise _Fault(f"{', '.join(rule.learned)} is learned, but the rule has no feedback_grad")
    try:
        convert(layer, rule)
        if not hasattr(layer, "feedback"):  # convert(net, "bp") takes every rule off
            raise _Fault(BACKPROP)
        feedback: Feedback = layer.feedback
        if absent := [n for n in feedback.rule.learned if n not in feedback.names]:
            raise _Fault(f"learned names {absent[0]!r}, a tensor that init_state does not return")
        with torch.no_grad():  # as a step would: a copy of the first W is not W any more
            layer.weight += 0.1 * torch.randn(layer.weight.shape, generator=gen, dtype=torch.float64)
        K = _kernel(feedback, layer.weight.detach())
        held = {n: t.clone() for n, t in [("W", layer.weight.detach()), *feedback.named_parameters()]}
        held |= {n: t.clone() for n, t in feedback.named_buffers()}
        y = layer(x)
        dy = torch.randn(y.shape, generator=gen, dtype=torch.float64)
        _check_feedback_gradient(feedback, x.detach(), dy, layer)
        parameters = list(layer.parameters(recurse=False))  # W, and b if there is one
        ours = torch.autograd.grad(y, [x, *parameters, *feedback.parameters()], dy)
    except Exception as error:  # a rule of one's own may raise anything
        raise _Fault(str(error) if isinstance(error, _Fault | UserError) else _told(error)) from error
    now = {"W": layer.weight.detach(), **dict(feedback.named_parameters()), **dict(feedback.named_buffers())}
    if changed := [n for n in held if not torch.equal(held[n], now[n])]:
        raise _Fault(f"the backward pass changed {changed[0]}: a rule returns new tensors and writes into none")
    _compare(map_of_layer, x, K, parameters, dy, ours)
    _check_after_step(feedback, layer.weight)
    if _apart(K, held["W"]) < TOLERANCE:
        raise _Fault(BACKPROP)
    return angle(held["W"], K)


def _stock(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer's linear map as stock PyTorch computes it: (x, K) -> K x, without the bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear
    map_of = {n: getattr(layer, n) for n in ("stride", "padding", "dilation", "groups")}
    return lambda x, K: nn.functional.conv2d(x, K, None, **map_of)


def _kernel(feedback: Feedback, W: Tensor) -> Tensor:
    """The rule's kernel; one of another shape than W, or another one at the second call, is a fault."""
    with torch.no_grad():
        terms = feedback.terms(feedback.tensors(W))
        if len(terms) == 1 and terms[0][0] is None and terms[0][1].shape != W.shape:
            raise _Fault(
                f"kernel returns shape {tuple(terms[0][1].shape)} for W of shape {tuple(W.shape)}; the kernel takes "
                "the place of W and has its shape (out, in / groups, *kernel)"
            )
        K, again = feedback.product(terms, W), feedback.kernel(W)
    if K.shape != W.shape:
        raise _Fault(f"the kernel's terms multiply to shape {tuple(K.shape)} where W has {tuple(W.shape)}")
    if not torch.equal(K, again):
        raise _Fault("kernel returns another K at every call; what is drawn belongs into init_state or after_step")
    if not torch.isfinite(K).all():
        raise _Fault("the kernel has entries that are not finite")
    if not K.any():
        raise _Fault("the kernel is all zeros, and the layer below gets no error")
    return K


def _check_feedback_gradient(feedback: Feedback, x: Tensor, dy: Tensor, layer: nn.Module) -> None:
    """A gradient for every learned tensor and no other, of its shape, finite and not zero."""
    learned = dict(feedback.named_parameters())
    if not learned:
        return
    W = layer.weight.detach()
    with torch.no_grad():
        y = feedback.op.forward(x, W) if feedback.keeps_y else None
        known = feedback.tensors(W) | dict(op=feedback.op, x=x, y=y, dy=dy, dW=feedback.op.grad_weight(x, dy, W))
        grads = feedback.rule.feedback_grad(**{n: known[n] for n in feedback.grad_args})
    if not isinstance(grads, dict) or set(grads) != set(learned):
        got = f"for {', '.join(map(repr, grads)) or 'nothing'}" if isinstance(grads, dict) else f"as {type(grads)}"
        raise _Fault(f"feedback_grad returns gradients {got}; learned asks for {', '.join(map(repr, learned))}")
    for name, grad in grads.items():
        value = gradient_of(grad)
        if value.shape != learned[name].shape:
            raise _Fault(
                f"feedback_grad returns a gradient of shape {tuple(value.shape)} for {name!r} of shape "
                f"{tuple(learned[name].shape)}"
            )
        if not torch.isfinite(value).all():
            raise _Fault(f"the gradient of {name!r} has entries that are not finite")
        if not value.any() and not feedback.rule.needs_sgd:
            raise _Fault(f"the gradient of {name!r} is zero, so that it never learns; without learned it stays fixed")


def _compare(f: Callable, x: Tensor, K: Tensor, parameters: list[Tensor], dy: Tensor, ours: tuple[Tensor, ...]) -> None:
    """Our gradients of x, W and b against autograd's through the composition."""
    W, *b = parameters
    sent = f(x, K)
    y = f(x.detach(), W) + sent - sent.detach()
    if b:
        y = y + (b[0] if W.dim() == 2 else b[0][:, None, None])
    dx, *theirs = torch.autograd.grad(y, [x, *parameters], dy)
    if (apart := _apart(ours[0], dx)) > TOLERANCE:
        raise _Fault(
            f"the error does not go down through the kernel: dx is {apart:.0%} off K^T dy, K as kernel returns it; "
            "send_error, where the rule has one, must agree with kernel"
        )
    for name, own, exact in zip(("dW", "db"), ours[1:], theirs):
        if _apart(own, exact) > TOLERANCE:
            raise _Fault(f"{name} is not the local product: feedback_grad writes into a tensor that it is given")


def _check_after_step(feedback: Feedback, W: Tensor) -> None:
    """What the rule does once per optimizer step fits the tensors that the layer holds."""
    if feedback.after_args is None:
        return
    try:
        with torch.no_grad():
            feedback.after_step(W)
    except Exception as error:
        raise _Fault(f"after_step returns what the layer does not hold: {_told(error)}") from error


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors relative to the largest entry of the second."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)).item()


def _told(error: Exception) -> str:
    """Another exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
