r"""Theory of p2's estimation rules, apart from the rules' code; and the flow that the rules' code makes.

Symbols: W the forward weight, B its estimate, of W's shape (out, in); S the second moment <x x^T> of the layer's input;
a, n, d, p, s the coefficients of amp, null, decay, sparse and self. Source of the formulas: our derivation from p2's
objective; the objective is p2's (authors' code Alignments/primitives.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.rules import Primitives


def apply(layer: nn.Module, x: Tensor, K: Tensor) -> Tensor:
    """K x by PyTorch's own operations, for the geometry of a linear or convolutional layer; the bias is left out."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, K)
    return F.conv2d(x, K, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def objective(layer: nn.Module, x: Tensor, W: Tensor, B: Tensor) -> dict[str, Tensor]:
    """p2's five primitives at one batch, name -> value, for autograd.

    Averages are over samples and, in a convolution, over output positions.
    """
    y = apply(layer, x, W)  # (n, out), or (n, out, h', w')
    _, back = torch.func.vjp(lambda below: apply(layer, below, B), x)
    count = y.numel() // W.shape[0]  # samples times positions
    return {
        "decay": W.square().sum() + B.square().sum(),
        "amp": -(y * apply(layer, x, B)).sum() / count,
        "null": back(y)[0].square().sum() / count,  # <|B^T W x|^2>
        "sparse": (y.square().sum() + apply(layer, x, B).square().sum()) / count,
        "self": -(W * B).sum(),
    }


def coefficients(rule: Primitives) -> dict[str, float]:
    """A rule's coefficients by the names of the primitives."""
    return {
        "decay": rule.decay, "amp": rule.amp, "null": rule.null, "sparse": rule.sparse, "self": rule.self_
    }  # fmt: skip


def loss(layer: nn.Module, x: Tensor, W: Tensor, B: Tensor) -> Tensor:
    """The objective R of the layer's rule at one batch."""
    values = objective(layer, x, W, B)
    return sum(c * values[name] for name, c in coefficients(layer.feedback.rule).items())


class End(NamedTuple):
    """Where the feedback ends while W rests.

    Args:
        B: the fixed point (out, in).
        rates: relaxation rate of each mode (out, in), per unit of learning rate and step.
        left: the modes' directions among outputs, columns (out, out).
        right: the modes' directions among inputs, columns (in, in).
    """

    B: Tensor
    rates: Tensor
    left: Tensor
    right: Tensor


def end(c: dict[str, float], W: Tensor, S: Tensor) -> End:
    r"""Fixed point and relaxation rates of the feedback of a linear layer, for any sum of primitives.

    .. math:: 0 = 2dB + 2n\,(W S W^T) B + 2p\,B S - a\,W S - s\,W

    In the eigenvectors u_i of W S W^T (eigenvalues μ_i) and v_j of S (eigenvalues λ_j) every entry relaxes alone, with
    rate 2 (d + n μ_i + p λ_j). Where the rate is 0 and something drives the mode, the fixed point is not finite.

    Args:
        c: name of a primitive -> coefficient.
        W: forward weight (out, in).
        S: second moment of the input (in, in).
    """
    mu, U = torch.linalg.eigh(W @ S @ W.T)  # (out,), (out, out)
    lam, V = torch.linalg.eigh(S)  # (in,), (in, in)
    rates = 2 * (c["decay"] + c["null"] * mu[:, None] + c["sparse"] * lam)  # (out, 1) + (in,) -> (out, in)
    drive = U.T @ (c["amp"] * W @ S + c["self"] * W) @ V  # (out, in)
    return End(U @ (drive / rates) @ V.T, rates, U, V)


def flow(layer: nn.Module, x: Tensor, W: Tensor, B: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
    """(dW, dB), the descent of the local objective, by the rule's own gradient of B.

    Args:
        layer: a converted layer; its own weight and feedback are not read.
        x: the objective's input (n, ...).
        W, B: forward weight and feedback.
        forward: whether W descends the objective too (p2's ``update_forward``). W then takes the rule's gradient with
            the roles of W and B exchanged, which is the objective's own where null is 0 or the input is white. Else dW
            is 0.
    """
    rule, op = layer.feedback.rule, layer.feedback.op

    def down(W: Tensor, B: Tensor) -> Tensor:
        y = op.forward(x, W)  # (n, in) (out, in) -> (n, out)
        return -rule.feedback_grad(op, x, y, y, W, B)["B"]  # of dy = y only the shape is read

    with torch.no_grad():
        return down(B, W) if forward else torch.zeros_like(W), down(W, B)
