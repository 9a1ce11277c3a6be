"""Rules whose feedback does not learn: backprop, fixed random feedback, the sign rules and frozen copies of W."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fa.errors import UserError
from fa.rules.base import Rule, fans, random_mask, rms, uniform


@dataclass(frozen=True)
class BP(Rule):
    """Backpropagation: W itself carries the error. ``convert(net, "bp")`` takes every rule off again."""

    name = "bp"
    equation = "dx = W^T dy"
    source = "Rumelhart et al. 1986"

    def kernel(self, W):
        return W


@dataclass(frozen=True)
class FA(Rule):
    """Feedback alignment: a fixed random matrix carries the error.

    .. math:: dx = B^T dy

    Args:
        form: ``"kernel"`` (default): B has W's shape, so that a convolution sends errors down by a transposed
            convolution. ``"dense"``: a convolution's B is a dense matrix between the flattened maps, (out h' w', in h
            w), blind to space; needs ``convert(..., sample=x)``. With ``init="match"`` it has the Frobenius norm of the
            matrix that the convolution itself is, borders aside (ours), else the standard deviation asked for.

    Source: Lillicrap et al. 2016 (Nat. Commun. 7:13276); both forms for convolutions: p1.
    """

    name = "fa"
    equation = "dx = B^T dy, B fixed and random"
    source = "Lillicrap et al. 2016; Moskovitz et al. 2018 (convolutions)"
    masked = "B"
    choices = Rule.choices | {"form": ("kernel", "dense")}

    form: str = "kernel"

    def __post_init__(self):
        super().__post_init__()
        if self.form == "dense" and self.norm != "fixed":
            raise UserError("fa: norm='track' holds for form='kernel' only")

    def init_state(self, op, W, gen):
        shape, std = tuple(W.shape), self.std(W)
        if self.form == "dense" and W.dim() > 2:
            std *= self.gain  # such a B is no kernel
            if op.sizes is None:
                raise UserError("fa: form='dense' needs the sizes of the maps; pass inputs, convert(..., sample=x)")
            shape = tuple(math.prod(size) for size in reversed(op.sizes))
            if self.init == "match":
                std *= math.sqrt(W[0].numel() / shape[1])
        return {"B": uniform(shape, std, W, gen)}  # W's shape, or (out h' w', in h w)

    def kernel(self, W, B):
        if B.shape != W.shape:
            raise UserError("fa: form='dense' has no kernel of the weight's shape")
        return B

    def send_error(self, op, dy, W, B):
        """dx through a dense matrix between flattened maps; None where B is a kernel."""
        if B.shape == W.shape:
            return None
        if dy[0].numel() != B.shape[0]:
            raise UserError(f"fa: form='dense' was made for maps of sizes {op.sizes}; the input has another size")
        dx = dy.flatten(1) @ B.to(dy.dtype)  # (n, out h' w') (out h' w', in h w) -> (n, in h w)
        return F.pad(dx.view(-1, *op.sizes[0]), op.pad)  # -> (n, in, h, w), padded as the map's input is


@dataclass(frozen=True)
class USF(Rule):
    r"""Uniform sign-concordant feedback: the signs of W, one magnitude for the whole layer.

    .. math:: dx = s\,\mathrm{sign}(W)^T dy

    Args:
        scale: s. ``"init"`` (default): the RMS of ``W`` at conversion; ``"xavier"``: sqrt(2 / (fan_in + fan_out)) (p3's
            "SF" and BioTorch); ``"track"``: the RMS of ``W`` now (p1's strict normalisation); or a number.
        concordance: share in [0, 1] of the entries that have W's sign (default 1), the others have the opposite one;
            drawn once, and kept whatever W becomes.

    Source: Liao et al. 2016 (arXiv 1510.05067); p1; p3 (authors' code, ``usf``). ``concordance``: our reading.
    """

    name = "usf"
    equation = "dx = c sign(W)^T dy"
    source = "Liao et al. 2016; Moskovitz et al. 2018; Xiao et al. 2018"

    scale: str | float = "init"
    concordance: float = 1.0

    def __post_init__(self):
        if isinstance(self.scale, str) and self.scale not in ("init", "xavier", "track"):
            raise UserError(f"usf: scale={self.scale!r} is not one of init, xavier, track or a number")
        super().__post_init__()
        if not 0 <= self.concordance <= 1:
            raise UserError(f"usf: concordance={self.concordance!r} must lie in [0, 1]")

    def init_state(self, op, W, gen):
        named = {"init": rms(W), "track": rms(W), "xavier": math.sqrt(2 / sum(fans(W)))}
        s = float(named.get(self.scale, self.scale))
        s = W.new_tensor(self.nonzero(s, "scale") if self.scale == "init" else s)  # -> ()
        if self.concordance < 1:
            s = s * (2 * random_mask(W.shape, self.concordance, W, gen) - 1)  # -> (out, in), of both signs
        return {"s": s}

    def kernel(self, W, s):
        scale = s.sign() * W.square().mean().sqrt() if self.scale == "track" else s  # -> () or (out, in)
        return W.sign().mul_(scale)  # (out, in), () or (out, in) -> (out, in)


@dataclass(frozen=True)
class FRSF(Rule):
    r"""Fixed random-magnitude sign-concordant feedback: W's signs, random magnitudes drawn once.

    .. math:: dx = (|M| \circ \mathrm{sign}(W))^T dy

    Source: Liao et al. 2016; p1.
    """

    name = "frsf"
    equation = "dx = (|M| sign(W))^T dy, M fixed and random"
    source = "Liao et al. 2016; Moskovitz et al. 2018"
    masked = "M"

    def init_state(self, op, W, gen):
        return {"M": uniform(W.shape, self.std(W), W, gen)}  # (out, in)

    def kernel(self, W, M):
        return M.abs() * W.sign()  # (out, in) (out, in) -> (out, in)


@dataclass(frozen=True)
class BRSF(FRSF):
    r"""Batch-wise random-magnitude sign-concordant feedback: magnitudes redrawn after every optimizer step.

    .. math:: dx = (|M_t| \circ \mathrm{sign}(W))^T dy

    The draw is a function of (seed, layer, step) alone, so that a resumed run and all ranks of a parallel one agree. It
    happens where the layer lives: another kind of device draws other numbers.
    Source: Liao et al. 2016.
    """

    name = "brsf"
    equation = "dx = (|M_t| sign(W))^T dy, M_t redrawn every step"
    masked = ""  # not M, whose redrawn entries would all exist again

    def init_state(self, op, W, gen):
        return super().init_state(op, W, gen) | {"std": W.new_tensor(self.std(W))}

    def after_step(self, gen, M, std):
        return {"M": M.clone().uniform_(0, math.sqrt(3.0), generator=gen()) * std}  # (out, in) () -> (out, in)


@dataclass(frozen=True)
class Frozen(Rule):
    r"""Frozen backprop: a copy of W that is refreshed only now and then, whole or in part.

    .. math:: dx = B^T dy, \qquad B \leftarrow W \text{ every } k \text{ steps}

    Args:
        every: optimizer steps between refreshes (default 100, ours); 0: never.
        part: probability with which an entry takes part in a refresh (default 1).

    Source: a follow-up of p1; its text is not at hand, this is our reading.
    """

    name = "frozen"
    equation = "dx = B^T dy, B a copy of W, new every k steps"
    source = "ours"

    every: int = 100
    part: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.every < 0 or not 0 < self.part <= 1:
            raise UserError(f"frozen: every={self.every} must not be negative, part={self.part} must lie in (0, 1]")

    def init_state(self, op, W, gen):
        if self.every == 0:
            self.nonzero(rms(W))
        return {"B": W.detach().clone(memory_format=torch.contiguous_format)}  # (out, in)

    def kernel(self, B):
        return B

    def after_step(self, gen, W, B, step):
        if self.every == 0 or step % self.every:
            return {}
        if self.part == 1:
            return {"B": W}
        taken = torch.empty_like(B).uniform_(generator=gen()) < self.part  # (out, in)
        return {"B": torch.where(taken, W, B)}
