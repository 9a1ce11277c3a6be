"""What theory says of feedback, in closed form: the angle and the mismatch that several figures are held against.

Symbols: W the forward weight (n_out outputs), B R the path of product feedback through a population of λ n_out units
(λ: the expansion), B the copy of W under Kolen and Pollack's rule, d the density of the feedback.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike


def path_angle(expansion: ArrayLike, density: ArrayLike = 1.0, n_out: float = math.inf) -> np.ndarray:
    r"""Angle in degrees between W and the path B R of product feedback at its fixed point R = m ∘ B^T W.

    .. math:: \tan^2\theta = \frac{1 - 1/n_{out}}{\lambda d} + \frac{9/5 - d^2}{\lambda\, n_{out}\, d^2}

    For a W that is independent of B, uniform entries of B (kurtosis 9/5), and masks of B and of R that are independent.
    Dense feedback of a wide layer: cos θ = 1 / sqrt(1 + 1/λ). Source: our derivation.

    Args:
        expansion: λ, units of the population per output; any shape.
        density: d, fraction of the entries of B and of R that exist (default 1); a shape that broadcasts with
            `expansion`.
        n_out: outputs of the layer (default: the limit of many).
    """
    λ, d = np.asarray(expansion, dtype=float), np.asarray(density, dtype=float)
    return np.degrees(np.arctan(np.sqrt((1 - 1 / n_out) / (λ * d) + (9 / 5 - d**2) / (λ * n_out * d**2))))


def masked_angle(density: ArrayLike) -> np.ndarray:
    r"""Angle in degrees between W and m ∘ W, for a mask m of density d that is independent of W: arccos(sqrt(d)).

    It is the angle at which Kolen and Pollack's rule ends under sparse feedback. Source: our derivation.
    """
    return np.degrees(np.arccos(np.sqrt(np.asarray(density, dtype=float))))


def mismatch_left(schedule: Iterable[tuple[float, float]], momentum: float, steps: int) -> np.ndarray:
    r"""Share of the initial mismatch D that SGD leaves: 1 before training, then the share after each epoch.

    .. math:: v \leftarrow \mu v + \gamma D, \qquad D \leftarrow D - \eta v

    D is R - B^T W under product feedback and B - W under Kolen and Pollack's rule: no gradient reaches it, and only the
    weight decay moves it, so that the share is one number for all layers, networks and data. Source: p3's argument; the
    momentum is ours.

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


def concordant_angle(weights: str, magnitudes: str) -> float:
    r"""Angle in degrees between W and sign-concordant feedback of independent magnitudes, in a large layer.

    .. math:: \cos\theta = \frac{E|w|}{\sqrt{E w^2}} \cdot \frac{E|b|}{\sqrt{E b^2}}

    Args:
        weights: distribution of W around 0: "uniform", "normal", or "truncated" (normal, cut at two standard
            deviations).
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
