"""Learned feedback that follows W's own update: Kolen-Pollack, and product feedback alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fa.errors import UserError
from fa.rules.base import Estimate, Rule, check_memory, fans, random_mask, uniform
from fa.rules.implicit import Implicit


@dataclass(frozen=True)
class KP(Estimate):
    r"""Kolen-Pollack: the feedback receives W's own update and decays as W does.

    .. math:: dx = B^T dy, \qquad dB = dW

    Under equal learning rate, momentum and decay, W - B receives no gradient and only decays, whatever the data.
    Source: Kolen & Pollack 1994; Akrout et al. 2019 (arXiv 1904.05391); p2 (authors' code, custom_optimizers.py).
    """

    name = "kp"
    equation = "dx = B^T dy, dB = dW"
    source = "Kolen & Pollack 1994; Akrout et al. 2019; Kunin et al. 2020"

    def feedback_grad(self, dW):
        return {"B": dW}


@dataclass(frozen=True)
class PFA(Rule):
    r"""Product feedback alignment: the error passes a population of ``expansion * out`` units, B fixed, R learned.

    .. math:: dx = (B R)^T dy, \qquad dR = B^T dW

    By linearity the path error -> population -> layer below is one pass with the product kernel, and the Hebbian
    gradient of R (population activity times presynaptic activity) is B^T dW. ``B`` is (out, expansion * out), uniform
    with E[B B^T] = I; ``R`` is ``(expansion * out, in, *kernel)``. In a grouped convolution B mixes within each
    group (ours; the authors' code mixes all channels).

    Args:
        expansion: size of the population relative to the layer's outputs (default 10, the paper's everywhere);
            ``expansion * out`` is rounded down.
        density: as in :class:`Rule`, of B and R independently; B is rescaled by 1 / sqrt(density), R not (their code).
        implicit: keep one number in place of R, which is exact under SGD: see :mod:`fa.rules.implicit`. Default
            ``False``. ``"first"``: in the first layer only, whose error nobody needs; useful with sparse feedback. An
            optimizer under which it is not exact raises.
        init: of R; B always has the scale above. ``"match"``: the RMS of W, so that the path's gain is 1.

    Source: Li & Benna 2024 (arXiv 2405.20594); authors' code layers/tfa_constructor, autograd/tfa.
    """

    name = "pfa"
    equation = "dx = (B R)^T dy, dR = B^T dW"
    source = "Li & Benna 2024"
    learned = ("R",)
    masked = "R"
    choices = Rule.choices | {"implicit": (True, False, "first")}

    expansion: float = 10
    implicit: bool | str = False

    def __post_init__(self):
        super().__post_init__()
        if not self.expansion > 0:
            raise UserError(f"{self.name}: expansion={self.expansion!r} must be positive")
        if self.implicit and self.clamp_forward:
            raise UserError(f"{self.name}: implicit={self.implicit} holds without clamp_forward only; leave it out")

    def at(self, index):
        explicit = replace(self, implicit=False)
        if self.implicit is True or (self.implicit == "first" and index == 0):
            return Implicit(density=self.density, gain=self.gain, norm=self.norm, explicit=explicit)
        return explicit

    def fixed(self, out: int, groups: int, like: Tensor, gen: torch.Generator) -> Tensor:
        """The fixed matrix B, (out, mid), or (groups, out / groups, mid / groups)."""
        mid = int(self.expansion * out / groups + 1e-9)
        if mid < 1:
            why = f"gives fewer than one unit per group for a layer of {out // groups} outputs per group"
            raise UserError(f"{self.name}: expansion={self.expansion} {why}")
        shape = (out, mid) if groups == 1 else (groups, out // groups, mid)
        B = uniform(shape, 1 / math.sqrt(mid * self.density), like, gen)
        return B if self.density == 1 else B * random_mask(shape, self.density, like, gen)

    def init_state(self, op, W, gen):
        B = self.fixed(W.shape[0], op.groups, W, gen)
        mid = B.shape[-1] * op.groups
        fan_in, fan_out = fans(W)
        std = math.sqrt(2 / (fan_in + fan_out * mid / W.shape[0])) if self.init == "xavier" else self.std(W)
        return {"B": B, "R": uniform((mid, *W.shape[1:]), std, W, gen)}  # (out, mid), (mid, in)

    def kernel(self, B, R):
        return [(B, R)]  # (out, mid) (mid, in) -> (out, in)

    def feedback_grad(self, dW, B):
        return {"R": (B, dW)}  # B^T dW: (mid, out) (out, in) -> (mid, in)

    def square(self, B: Tensor) -> Tensor | None:
        """B B^T, or None where it is the identity."""
        return B @ B.mT  # (out, mid) (mid, out) -> (out, out)


@dataclass(frozen=True)
class PFAo(PFA):
    r"""Product feedback alignment with an orthogonal B and no expansion.

    .. math:: dx = (B R)^T dy, \qquad dR = B^T dW, \qquad B B^T = I

    The path B R obeys the Kolen-Pollack update exactly, though neither matrix ever resembles W. Sparse feedback
    (``density`` < 1) is masked and rescaled as PFA's is, and B is then not orthogonal (ours; the paper has none).
    Source: Li & Benna 2024; authors' configuration ``expand_ratio: ortho``.
    """

    name = "pfa_o"
    equation = "dx = (B R)^T dy, dR = B^T dW, B orthogonal"

    expansion: float = 1

    def __post_init__(self):
        super().__post_init__()
        if self.expansion != 1:
            raise UserError(f"pfa_o: expansion={self.expansion!r}; an orthogonal B has expansion 1, use pfa for others")

    def fixed(self, out, groups, like, gen):
        n = out // groups
        shape = (n, n) if groups == 1 else (groups, n, n)
        check_memory(shape)
        Q, T = torch.linalg.qr(torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu"))
        signs = T.diagonal(dim1=-2, dim2=-1).sign()  # (..., n); they make Q uniform over the orthogonal group
        B = (Q * signs.unsqueeze(-2)).to(like).contiguous()  # -> shape; LAPACK's Q is stored by columns
        return B if self.density == 1 else B * random_mask(B.shape, self.density, like, gen) / math.sqrt(self.density)

    def square(self, B):
        return None  # asked for dense B only
