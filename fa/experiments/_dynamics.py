r"""How W and B move under p2's local rules: rates measured on the rules' code, and their theory by eigenvalues.

Two settings. *Pairs*: one synapse w and its feedback b, many pairs at once. *Layers*:
those of a trained network, whose eigenvalues are those of the Hessian of p2's objective, by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.experiments._estimation import flow, loss
from fa.layers.convert import convert, param_groups
from fa.rules import Primitives
from fa.rules import rule as make_rule
from fa.train.data import Split

# -------------------------------------------------------------------------------------------------------------- pairs


def pair_point(rule: Primitives, power: float) -> float:
    r"""m, where w = b = m is the point at which a pair that learns both ways may rest; 0: only the origin is.

    .. math:: m^2 = \frac{a\sigma^2 - 2d}{2n\sigma^2}

    Args:
        rule: WM or IA with coefficients a (amp), n (null), d (decay).
        power: σ^2, mean square of the input.
    """
    excess = rule.amp * power - 2 * rule.decay
    return math.sqrt(excess / (2 * rule.null * power)) if rule.null and excess > 0 else 0.0


def pair_rates(rule: Primitives, power: float) -> tuple[float, float]:
    """Growth rates of w + b and of w - b at :func:`pair_point`, per unit of learning rate and step; negative: they
    decay."""
    excess = rule.amp * power - 2 * rule.decay
    if pair_point(rule, power):
        return -2 * excess, -4 * rule.decay
    return excess, -(rule.amp * power + 2 * rule.decay)


def pairs(rule: Primitives, power: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(w, b) -> (dw, db) of many independent pairs, each with its own input power (pairs,); both sides learn."""
    layer = convert(nn.Linear(1, 1, bias=False).double(), rule)
    x = power.double().sqrt().view(-1, 1, 1)  # one sample of one input: (pairs, 1, 1)
    every = torch.vmap(lambda x, W, B: flow(layer, x, W, B, forward=True))

    def moves(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        dw, db = every(x, w.view(-1, 1, 1), b.view(-1, 1, 1))
        return dw.flatten(), db.flatten()  # (pairs,)

    return moves


def walk(rule: Primitives, power: Tensor, lr: Tensor, w: Tensor, b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(w, b) after so many steps; a pair that reaches 1e6 is held there."""
    moves = pairs(rule, power)
    for _ in range(steps):
        dw, db = moves(w, b)
        w, b = (w + lr * dw).clamp(-1e6, 1e6), (b + lr * db).clamp(-1e6, 1e6)
    return w, b


def settles(rule: Primitives, power: Tensor, lr: Tensor, steps: int = 200) -> Tensor:
    """Whether each pair comes back to :func:`pair_point` from nearby, by the rule's code; (pairs,), bool."""
    m = torch.tensor([pair_point(rule, p) for p in power.tolist()], dtype=torch.float64)
    w, b = walk(rule, power, lr, m + 2e-3, m + 1e-3, steps)
    halfway = torch.hypot(w - m, b - m)
    w, b = walk(rule, power, lr, w, b, steps)
    after = torch.hypot(w - m, b - m)
    # nearer than halfway, and both times nearer than at the start, 2.2e-3
    return (after < halfway) & (halfway < 2.2e-3) | (after < 1e-9)


def should_settle(rule: Primitives, power: float, lr: float) -> bool:
    """Theory of :func:`settles`: no rate is positive, and no step is longer than twice the way."""
    return all(rate < 0 and lr * -rate < 2 for rate in pair_rates(rule, power))


def measured_pair(rule: Primitives, power: float, lr: float = 0.01, steps: int = 50) -> dict[str, float]:
    """Growth rates of w + b and of w - b near :func:`pair_point`, and where a pair ends that starts far from it."""
    m, eps = pair_point(rule, power), 1e-6
    point = torch.tensor([power], dtype=torch.float64)
    found = {}
    for name, sign, theory in zip(("sum", "difference"), (1, -1), pair_rates(rule, power)):
        start = torch.tensor([m + eps, m + sign * eps], dtype=torch.float64)
        w, b = walk(rule, point, torch.tensor(lr), start[:1], start[1:], steps)
        left = ((w - m) + sign * (b - m)).item() / (2 * eps)
        found |= {f"rate_{name}": (left ** (1 / steps) - 1) / lr, f"rate_{name}_theory": theory}
    if all(rate < 0 for rate in pair_rates(rule, power)):
        far = torch.tensor([0.9], dtype=torch.float64)
        w, b = walk(rule, point, torch.tensor(0.2), far, far / 3, 500)
        found |= {"end": w.item(), "end_theory": m, "gap": abs(w - b).item()}
    return found


# ------------------------------------------------------------------------------------------------------------- layers


def trained(kind: str, rule: Primitives, digits: Split, gen: torch.Generator, steps: int = 200) -> nn.Sequential:
    """A two-layer ReLU network of linear ("dense") or convolutional ("conv") layers, trained on digits under the rule.

    SGD, learning rate 0.05, momentum 0.9, batches of 64; the rule's input is noise.
    """
    if kind == "dense":
        layers = [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10)]
    else:
        first, second = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 10, 3, stride=2, padding=1)
        layers = [first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, p[0].numel() ** -0.5 if p.dim() > 1 else 0.0, generator=gen)
    convert(net, rule, seed=int(torch.randint(2**31, (), generator=gen)))
    opt = torch.optim.SGD(param_groups(net, lr=0.05), momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(digits), (64,), generator=gen)
        opt.zero_grad()
        F.cross_entropy(net(digits.x[batch]), digits.y[batch]).backward()
        opt.step()
    return net


def white(shape: torch.Size, power: float) -> Tensor:
    """Inputs (n, *shape) whose second moment is exactly that of white noise: every feature alone, n = features."""
    n = shape.numel()
    return math.sqrt(n * power) * torch.eye(n, dtype=torch.float64).view(n, *shape)


class Mode(NamedTuple):
    """A direction of (W, B) space around a point, and the rate at which theory has deviations along it grow.

    Args:
        point: (2, *shape), W and B.
        direction: (2, *shape), of length 1.
        rate: per unit of learning rate and step; an eigenvalue of the Hessian with the other sign.
    """

    point: Tensor
    direction: Tensor
    rate: float


def curvature(layer: nn.Module, x: Tensor, point: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the layer's objective at (W, B) (2, *shape), in B alone or, with ``forward``, in both."""
    free = point[0 if forward else 1 :].clone().requires_grad_()  # (2 or 1, *shape)
    W, B = free if forward else (point[0], free[0])
    (g,) = torch.autograd.grad(loss(layer, x, W, B), free, create_graph=True)
    every = torch.eye(g.numel(), dtype=g.dtype).view(-1, *g.shape)  # (k, 2 or 1, *shape)
    (rows,) = torch.autograd.grad(g, free, every, is_grads_batched=True)
    return g.detach().flatten(), rows.flatten(1)  # (k,), (k, k)


def rest(layer: nn.Module, x: Tensor, point: Tensor) -> Tensor:
    """The fixed point (2, *shape) that descent of the objective in both W and B reaches from ``point``."""
    free = point.clone().requires_grad_()
    for _ in range(250):
        (g,) = torch.autograd.grad(loss(layer, x, *free), free)
        free = (free - 1.5 * g).detach().requires_grad_()
    return free.detach()


def modes(H: Tensor, point: Tensor, start: Tensor) -> tuple[Mode, Mode]:
    """The modes that grow fastest and decay fastest around a fixed point.

    Of modes with one rate the direction is the one along which ``start`` deviates from the point.

    Args:
        H: Hessian in W and B, or in B alone.
        point, start: W and B (2, *shape).
    """
    eigenvalues, vectors = torch.linalg.eigh(H)
    forward = len(H) == point.numel()
    deviation = (start - point)[0 if forward else 1 :].flatten()
    found = []
    for extreme in (eigenvalues[0], eigenvalues[-1]):
        same = vectors[:, (eigenvalues - extreme).abs() < 1e-6 * eigenvalues.abs().max()]  # (k, multiplicity)
        v = same @ (same.T @ deviation)
        direction = (v / torch.linalg.vector_norm(v)).view(-1, *point.shape[1:])
        if not forward:
            direction = torch.cat([torch.zeros_like(direction), direction])
        found.append(Mode(point, direction, -extreme.item()))
    return found[0], found[1]


def measured_rate(layer: nn.Module, mode: Mode, draw: Callable[[], Tensor], forward: bool, lr: float) -> float:
    """Growth rate of deviations along a mode, by steps of the rule's code on the batches that ``draw`` makes.

    Two copies start on either side of the point and see the same batches, so that what the batches' noise adds to both
    cancels. Steps: 40, or as many as change the deviation by a factor e^0.5 or more.
    """
    size = 1e-3 * max(torch.linalg.vector_norm(mode.point).item(), 1.0)
    sides = [mode.point + sign * size * mode.direction for sign in (1, -1)]
    steps = max(40, math.ceil(0.5 / (lr * abs(mode.rate))))
    for _ in range(steps):
        x = draw()
        sides = [side + lr * torch.stack(flow(layer, x, *side, forward)) for side in sides]
    left = ((sides[0] - sides[1]) * mode.direction).sum().item() / (2 * size)
    return (left ** (1 / steps) - 1) / lr


def measured_layer(
    layer: nn.Module, start: Tensor, inputs: Tensor, forward: bool, gen: torch.Generator
) -> dict[str, float]:
    """Rates of one layer of a trained network, measured and as theory has them.

    Args:
        layer: converted; gives geometry and rule.
        start: its W and B after training (2, *shape).
        inputs: its inputs for all training images (n, ...).
        forward: whether W learns too. The input is then white noise of power 1 and of the inputs' shape, else batches
            of ``inputs``.
        gen: of noise and batches.
    """

    def draw() -> Tensor:
        if forward:
            return torch.randn(512, *inputs.shape[1:], generator=gen, dtype=torch.float64)
        return inputs[torch.randint(len(inputs), (256,), generator=gen)]

    if not forward:  # the objective is quadratic in B
        g, H = curvature(layer, inputs, start, forward)
        point = torch.stack([start[0], start[1] - torch.linalg.solve(H, g).view_as(start[1])])
        slow, fast = modes(H, point, start)
        asked = {"relax_slow": slow, "relax_fast": fast}
    else:
        x, origin = white(inputs.shape[1:], 1.0), torch.zeros_like(start)
        grow, shrink = modes(curvature(layer, x, origin, forward)[1], origin, start)
        asked = {"grow": grow, "shrink": shrink}
        if layer.feedback.rule.null:  # there is a second fixed point, and it is stable
            point = rest(layer, x, start)
            asked = {"grow": grow, "settle": modes(curvature(layer, x, point, forward)[1], point, start)[1]}
    found = {}
    for name, mode in asked.items():
        fastest = max(abs(other.rate) for other in asked.values())
        lr = (0.1 if abs(mode.rate) == fastest else 0.3) / fastest  # slow modes in fewer steps, fast ones in small ones
        found |= {name: measured_rate(layer, mode, draw, forward, lr), f"{name}_theory": mode.rate}
    return found


def measured_network(
    kind: str, coefficients: dict[str, float], name: str, forward: bool, digits: Split, gen: torch.Generator
) -> dict[str, dict[str, float]]:
    """Layer ("fc1", "fc2" or "conv1", "conv2") -> rates, of a network trained on digits under rule ``name``."""
    net = trained(kind, make_rule(name, input="normal", **coefficients), digits, gen)
    found, x = {}, digits.x
    with torch.no_grad():
        accuracy = 100 * (net(x).argmax(1) == digits.y).double().mean().item()
    word = "fc" if kind == "dense" else "conv"
    for m in net:
        inputs = x
        with torch.no_grad():
            x = m(x)
        if not hasattr(m, "feedback"):
            continue
        start = torch.stack([m.weight.detach(), m.feedback.B.detach()])  # (2, *shape)
        convert(m, make_rule(name, **coefficients))  # the input is given below
        found[f"{word}{len(found) + 1}"] = measured_layer(m, start, inputs, forward, gen) | {"accuracy": accuracy}
    return found
