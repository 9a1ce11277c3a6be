r"""Product feedback without a stored R: ``rule("pfa", implicit=True)``, or ``implicit="first"``: in the first layer.

The mismatch D = R - B^T W receives no gradient, because dR = B^T dW. Under SGD with one learning rate, momentum and
decay for W and R it is therefore rescaled by the same factor whatever the data, so that

.. math:: R = B^T W + c D_0, \qquad D_0 = R_0 - B^T W_0,

with one number c, which starts at 1 (our derivation). c is a parameter whose gradient is zero: the optimizer moves c as
it would have moved R. Exact for momentum, Nesterov, dampening, schedules and decay of ``torch.optim.SGD``; every other
optimizer raises. Where the gradient's norm is clipped, leave the feedback out of it: c has gradient 0, R would not.

Dense feedback keeps no tensor of the population's size, and its kernel is B R = (B B^T) W + c (B D_0). Sparse feedback
needs B and D_0, since the mask acts on R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fa.rules.base import Rule, channel_product


@dataclass(frozen=True)
class Implicit(Rule):
    """Product feedback of one layer without R. ``explicit`` is the rule with R, whose B and R_0 are drawn."""

    learned = ("c",)
    needs_sgd = True

    explicit: Any = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the rule with R."""
        return self.explicit.name

    def state(self, op, W, gen):
        kept, W = self.explicit.state(op, W, gen), W.detach()
        B, R, c = kept["B"], kept.pop("R"), W.new_ones((1,) * W.dim())  # (out, mid), (mid, in), (1, 1)
        with torch.autocast(W.device.type, enabled=False):  # what is kept has W's precision
            if self.density < 1:
                D = (R - channel_product(B.mT, W)) * kept["mask"]  # (mid, in) - (mid, out) (out, in)
                return kept | {"D": D, "c": c}
            BBt = self.explicit.square(B)  # (out, out)
            BD = channel_product(B, R) - (W if BBt is None else channel_product(BBt, W))  # (out, in)
        return {"BD": BD, "c": c} if BBt is None else {"BD": BD, "c": c, "BBt": BBt}

    def kernel(self, W, c, BD=None, BBt=None, B=None, D=None):
        if BD is None:
            return [(B, channel_product(B.mT, W) + c * D)]  # (out, mid) [(mid, out) (out, in) + (1, 1) (mid, in)]
        return [(BBt, W), (None, BD, c)]  # (out, out) (out, in) + (1, 1) (out, in)

    def feedback_grad(self, dW, c):
        return {"c": torch.zeros_like(c)}  # dW is named so that c rests while W is frozen, as R does
