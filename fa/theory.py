"""What theory says of feedback, in closed form: the angle and the mismatch that several figures are held against.

Symbols: W the forward weight (n_out outputs), B R the path of product feedback through a population of λ n_out units
(λ: the expansion), B the copy of W under Kolen and Pollack's rule, d the density of the feedback.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from fa.errors import UserError
from fa.layers.hooks import converted


def path_angle(expansion: ArrayLike, density: ArrayLike = 1.0, n_out: float = math.inf) -> np.ndarray:
    r"""Angle in degrees between W and the path B R of product feedback at its fixed point R = m ∘ B^T W.

    .. math:: \tan^2\theta = \frac{1 - 1/n_{out}}{\lambda d} + \frac{9/5 - d^2}{\lambda\, n_{out}\, d^2}

    For a W that is independent of B, uniform entries of B (kurtosis 9/5), and masks of B and of R that are independent.
    Dense feedback of a wide layer: cos θ = 1 / sqrt(1 + 1/λ). Source: our derivation.

    Args:
        expansion: λ, units of the population per output; any shape.
        density: d, fraction of the entries of B and of R that exist (default 1); broadcasts with `expansion`.
        n_out: outputs of the layer (default: the limit of many).
    """
    λ, d = np.asarray(expansion, dtype=float), np.asarray(density, dtype=float)
    return np.degrees(np.arctan(np.sqrt((1 - 1 / n_out) / (λ * d) + (9 / 5 - d**2) / (λ * n_out * d**2))))


def mismatch_left(schedule: Iterable[tuple[float, float]], momentum: float, steps: int) -> np.ndarray:
    r"""Share of the initial mismatch D that SGD leaves: 1 before training, then the share after each epoch.

    .. math:: v \leftarrow \mu v + \gamma D, \qquad D \leftarrow D - \eta v

    D is R - B^T W under product feedback and B - W under Kolen and Pollack's rule: weight decay moves it, no gradient
    does, so that the share is one number for all layers, networks and data. Source: p3's argument; momentum: ours.

    Args:
        schedule: (learning rate η, weight decay γ) of each epoch.
        momentum: μ.
        steps: optimizer steps in an epoch.
    """
    D, v, shares = 1.0, 0.0, [1.0]
    for lr, decay in schedule:
        for _ in range(steps):
            v = momentum * v + decay * D
            D -= lr * v
        shares.append(D)
    return np.array(shares)


def decay_for(net: nn.Module, steps: int, lr: float, momentum: float, leave: float = 0.05) -> float:
    r"""Weight decay of the first epoch that aligns the feedback of kp, pfa and pfa_o, for your steps and learning rate.

    .. math:: D \leftarrow \left(1 - \frac{\eta\gamma}{1 - \mu}\right) D \quad \text{a step, for small } \eta\gamma

    The mismatch D of :func:`fa.theory.mismatch_left` only decays. The decay γ returned is the smallest that leaves the
    share ``leave`` of D after ``steps`` steps of ``torch.optim.SGD``, once their momentum has died away (our
    derivation, from the recursion itself). p3's decays are set by hand: they leave 0.055 on MNIST, 0.16 on CIFAR-10.

    Args:
        net: a converted network, whose W and feedback share γ, as in the groups of :func:`fa.param_groups`.
        steps: optimizer steps under this decay, usually ``len(loader)``; after them set the ordinary decay.
        lr: η.
        momentum: μ, in [0, 1).
        leave: share in (0, 1) of the initial mismatch (default 0.05, ours).

    Raises:
        UserError: no feedback of the network aligns by weight decay; a number outside its range.
    """
    rules = {m.feedback.rule for m in converted(net).values()}
    if not any(r.learned and not r.own_decay for r in rules):
        under = ", ".join(sorted({r.name for r in rules})) or "no rule"
        raise UserError(f"the network is under {under}; decay_for is for kp, pfa and pfa_o, which align by decay")
    if not (steps >= 1 and lr > 0 and 0 <= momentum < 1 and 0 < leave < 1):
        given = f"steps={steps}, lr={lr}, momentum={momentum}, leave={leave}"
        raise UserError(f"{given}: steps and lr must be positive, momentum in [0, 1) and leave in (0, 1)")

    def left(decay: float) -> float:
        step = np.array([[1 - lr * decay, -lr * momentum], [decay, momentum]])  # (D, v) -> (D, v)
        D, v = np.linalg.matrix_power(step, steps)[:, 0]
        return D - lr * momentum / (1 - momentum) * v

    low, high = 0.0, 0.1 * (1 - momentum) / (lr * steps)
    while left(high) > leave:
        low, high = high, 1.1 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > leave else (low, middle)
    return high


def concordant_angle(weights: str, magnitudes: str) -> float:
    r"""Angle in degrees between W and sign-concordant feedback of independent magnitudes, in a large layer.

    .. math:: \cos\theta = \frac{E|w|}{\sqrt{E w^2}} \cdot \frac{E|b|}{\sqrt{E b^2}}

    Args:
        weights: distribution of W around 0: "uniform", "normal", or "truncated" (normal, cut at two sd).
        magnitudes: distribution whose absolute values are the feedback's magnitudes, or "constant".

    Source: our derivation.
    """
    cut, inside = 2.0, math.erf(2**0.5)  # a normal number lies within two standard deviations with this probability
    edge = 2 * math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi) / inside
    ratio = {
        "constant": 1.0,
        "uniform": math.sqrt(3) / 2,
        "normal": math.sqrt(2 / math.pi),
        "truncated": math.sqrt(2 / math.pi) * (1 - math.exp(-(cut**2) / 2)) / inside / math.sqrt(1 - cut * edge),
    }
    return math.degrees(math.acos(ratio[weights] * ratio[magnitudes]))
