"""What p2's framework says of a rule, asked of the rule's code: its gradient, what a synapse must read, where the
feedback ends and how fast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fa.experiments._estimation import apply, coefficients, end, loss
from fa.layers.convert import feedback_parameters, param_groups
from fa.metrics import angle, feedback_weight

READS = {
    "own": "$B_{ij}$",
    "pre": "$x_j$",
    "post": "$y_i$",
    "back": r"$(B^{\mathsf{T}}y)_j$",
    "error": "$dy_i$",
    "up": "$(Bx)_i$",
    "weight": "$W_{ij}$",
}
"""What the update of the feedback synapse B_ij may depend on; the last two are no activity at its two ends that the
network makes."""

NON_LOCAL = ("up", "weight")
KP_DECAY = 0.1  # KP's weight decay, of W and B alike


def coloured(n: int, size: int, gen: torch.Generator) -> Tensor:
    """n normal inputs whose principal directions are random, with variances from 0.5 to 2, evenly in the logarithm."""
    Q = torch.linalg.qr(torch.randn(size, size, generator=gen, dtype=torch.float64))[0]  # (in, in)
    sd = torch.logspace(math.log10(0.5), math.log10(2), size, dtype=torch.float64).sqrt()  # (in,)
    return torch.randn(n, size, generator=gen, dtype=torch.float64) * sd @ Q.T  # (n, in) (in, in) -> (n, in)


def gradient_check(layer: nn.Module, x: Tensor, gen: torch.Generator) -> dict[str, float]:
    """The rule's gradient of B against autograd's; nothing for feedback that does not learn."""
    if not layer.feedback.rule.learned:
        return {}
    W, B = layer.weight.detach(), layer.feedback.B
    y = layer(x)
    dy = torch.randn(y.shape, generator=gen, dtype=y.dtype)
    layer.zero_grad()
    y.backward(dy)
    if layer.feedback.rule.name == "kp":  # takes the gradient of the task by W
        return {"gradient_error": apart(B.grad, torch.autograd.grad(layer(x), layer.weight, dy)[0])}
    free = B.detach().clone().requires_grad_()
    value = loss(layer, x, W, free)
    found = {"gradient_error": apart(B.grad, torch.autograd.grad(value, free)[0]), "objective": value.item()}
    if layer.feedback.rule.name == "ia":  # whose gradient is 2 d times the autoencoder's
        grad = torch.autograd.grad(autoencoder(layer, x, W, free), free)[0]
        found["autoencoder_error"] = apart(B.grad, 2 * layer.feedback.rule.decay * grad)
    return found


def autoencoder(layer: nn.Module, x: Tensor, W: Tensor, B: Tensor) -> Tensor:
    """Regularised linear autoencoder of encoder W and decoder B^T: 1/2 <|x - B^T W x|^2> + 1/2 |B|^2."""
    y = apply(layer, x, W)  # (n, out)
    _, back = torch.func.vjp(lambda below: apply(layer, below, B), x)
    return ((x - back(y)[0]).square().sum() / (y.numel() // W.shape[0]) + B.square().sum()) / 2


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest entry of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()


def reads(layer: nn.Module, gen: torch.Generator) -> dict[str, float]:
    """What the update of one feedback synapse depends on, as relative changes of that update; by intervention.

    One sample; i = j = 0. Every intervention changes one quantity of :data:`READS` and holds the others: ``weight``
    changes W_ij, and another weight of neuron i makes up for it, so that y_i stays; ``pre`` changes x_j, and other
    weights make up for it; ``post`` changes y_i through another weight; ``back`` and ``up`` change another feedback
    weight onto neuron j, or from neuron i. The update is one step of SGD at learning rate 1, with KP's decay.
    """
    x = torch.randn(1, layer.in_features, generator=gen, dtype=torch.float64)
    dy = torch.randn(1, layer.out_features, generator=gen, dtype=torch.float64)
    W = layer.weight.detach().clone()
    B = feedback_weight(layer).clone()

    def update(x: Tensor = x, dy: Tensor = dy, W: Tensor = W, B: Tensor = B) -> float:
        if not layer.feedback.rule.learned:
            return 0.0
        with torch.no_grad():
            layer.weight.copy_(W)
            layer.feedback.B.copy_(B)
        layer.zero_grad()
        layer(x).backward(dy)
        torch.optim.SGD(param_groups(layer, lr=1.0, weight_decay=KP_DECAY)).step()
        return (layer.feedback.B[0, 0] - B[0, 0]).item()

    def moved(M: Tensor, *changes: tuple[Any, Any, Any]) -> Tensor:
        M = M.clone()
        for i, j, by in changes:
            M[i, j] += by
        return M

    every, by, before = slice(None), 0.5, update()
    after = {
        "own": update(B=moved(B, (0, 0, by))),
        "pre": update(x=moved(x, (0, 0, by)), W=moved(W, (every, 1, -W[:, 0] * by / x[0, 1]))),
        "post": update(W=moved(W, (0, 1, by))),
        "back": update(B=moved(B, (1, 0, by))),
        "error": update(dy=moved(dy, (0, 0, by))),
        "up": update(B=moved(B, (0, 1, by))),
        "weight": update(W=moved(W, (0, 0, by), (0, 1, -by * x[0, 0] / x[0, 1]))),
    }
    with torch.no_grad():
        layer.weight.copy_(W)
        if layer.feedback.rule.learned:
            layer.feedback.B.copy_(B)
    return {name: abs(value - before) / abs(before) if before else 0.0 for name, value in after.items()}


def settle(layer: nn.Module, x: Tensor, gen: torch.Generator) -> dict[str, float]:
    """Where descent of the feedback alone ends and how fast, as the rule's code does it and as theory has it."""
    rule = layer.feedback.rule
    if not rule.learned:
        return {"angle_deg": angle(layer.weight, layer.feedback.B)}
    if rule.name == "kp":
        return follow(layer, x, gen)
    W = layer.weight.detach()
    goal = end(coefficients(rule), W, x.T @ x / len(x))
    slow, fast = (divmod(int(i), W.shape[1]) for i in (goal.rates.argmin(), goal.rates.argmax()))
    lr = (0.5 / goal.rates.max()).item()
    opt = torch.optim.SGD(feedback_parameters(layer), lr)
    early = 10  # steps after which rates are read: the fastest mode is far from rounding

    def modes() -> Tensor:
        return goal.left.T @ (layer.feedback.B.detach() - goal.B) @ goal.right  # (out, in)

    begin = modes()
    for step in range(1, early + int(30 / (lr * goal.rates.min())) + 1):
        opt.zero_grad()
        layer(x).sum().backward()
        opt.step()
        if step == early:
            rates = (1 - (modes() / begin) ** (1 / early)) / lr  # (out, in)
    B = layer.feedback.B.detach()
    size = torch.linalg.vector_norm
    return {
        "angle_deg": angle(W, B), "norm_ratio": (size(B) / size(W)).item(),
        "angle_deg_theory": angle(W, goal.B), "norm_ratio_theory": (size(goal.B) / size(W)).item(),
        "distance": (size(B - goal.B) / size(goal.B)).item(),
        "rate_slow": rates[slow].item(), "rate_fast": rates[fast].item(),
        "rate_slow_theory": goal.rates[slow].item(), "rate_fast_theory": goal.rates[fast].item(),
    }  # fmt: skip


def follow(layer: nn.Module, x: Tensor, gen: torch.Generator) -> dict[str, float]:
    """KP: W moves by random errors, and B follows; the mismatch W - B shrinks at the rate of the weight decay."""
    lr, early = 0.5, 10
    opt = torch.optim.SGD(param_groups(layer, lr=lr, weight_decay=KP_DECAY))

    def mismatch() -> float:
        return torch.linalg.vector_norm(layer.weight.detach() - layer.feedback.B.detach()).item()

    begin = mismatch()
    for step in range(1, 601):
        opt.zero_grad()
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=gen, dtype=y.dtype) / len(x))
        opt.step()
        if step == early:
            rate = (1 - (mismatch() / begin) ** (1 / early)) / lr
    W, B = layer.weight.detach(), layer.feedback.B.detach()
    ratio = (torch.linalg.vector_norm(B) / torch.linalg.vector_norm(W)).item()
    return {
        "angle_deg": angle(W, B), "norm_ratio": ratio, "angle_deg_theory": 0.0, "norm_ratio_theory": 1.0,
        "distance": mismatch() / torch.linalg.vector_norm(W).item(), "rate_slow": rate, "rate_fast": rate,
        "rate_slow_theory": KP_DECAY, "rate_fast_theory": KP_DECAY,
    }  # fmt: skip
