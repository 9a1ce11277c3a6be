r"""Every layer-wise learning rule: what carries the error down in place of ``W``, and how that feedback learns.

A rule leaves the forward pass alone. In each converted layer

.. math:: y = W x + b, \qquad dx = K^T dy, \qquad dW = dy\,x^T, \qquad db = \\sum dy,

where :math:`K` is the rule's *kernel*, of ``W``'s shape (backprop is :math:`K = W`). A rule is a frozen dataclass whose fields
are its options. It says

* ``init_state(op, W, gen)`` - the tensors it keeps, as a dict; those named in ``learned`` become parameters, the others buffers;
* ``kernel(...)`` - :math:`K`;
* ``feedback_grad(...)`` - the gradients of what is learned, as a dict, or is left out;
* ``after_step(...)`` - what changes once per optimizer step, or is left out.

The last three name what they need as arguments: ``W``, any tensor from ``init_state``, and in ``feedback_grad`` also ``x`` (the layer's
input), ``y`` (= W x, without bias), ``dy``, ``dW`` and ``op`` (the layer's linear map: ``forward``, ``grad_input``, ``grad_weight``).
All of them arrive detached. A rule may also send the error itself (``send_error``, of the same arguments but ``y`` and ``dW``: dx, or
None for the way through the kernel) and leave in ``memo``, a dict that lives for one backward pass, what ``feedback_grad`` needs again. ``RULES`` maps names to rules and may be extended::

    @dataclass(frozen=True)
    class Mine(fa.Rule):
        name, equation, source = "mine", "dx = 2 W^T dy", "our reading"
        def kernel(self, W): return 2 * W

    fa.RULES["mine"] = Mine

What a rule is *not*: it never sees the loss, another layer, or the optimizer. Direct feedback alignment, which sends the
output error everywhere at once, is therefore not a layer-wise rule; it has a module of its own (:mod:`fa.layers.dfa`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fa.errors import UserError, did_you_mean

# --------------------------------------------------------------------------------------------------- drawing


def fans(W: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of shape (out, in / groups, *kernel), as ``torch.nn.init`` counts them."""
    receptive = W[0, 0].numel()
    return W.shape[1] * receptive, W.shape[0] * receptive


def rms(W: Tensor) -> float:
    """Root mean square of the entries of ``W``."""
    return W.detach().double().square().mean().sqrt().item()


def uniform(shape: tuple[int, ...], std: float, like: Tensor, gen: torch.Generator) -> Tensor:
    """Uniform draw with mean 0 and standard deviation ``std`` on the CPU in float64, then in the dtype and place of ``like``.

    Drawn in float64 so that a float32 and a float64 network share their feedback.
    """
    bound = math.sqrt(3.0) * std
    draw = torch.rand(shape, generator=gen, dtype=torch.float64, device="cpu")
    return (draw * (2 * bound) - bound).to(like)


def random_mask(shape: tuple[int, ...], density: float, like: Tensor, gen: torch.Generator) -> Tensor:
    """Mask of ones (with probability ``density``) and zeros."""
    return (torch.rand(shape, generator=gen, dtype=torch.float64, device="cpu") < density).to(like)


def channel_product(B: Tensor, K: Tensor) -> Tensor:
    """Channel product B K: ``B`` (..., out/g, mid/g) times ``K`` (mid, in, *kernel) -> (out, in, *kernel), group by group.

    With one group ``B`` is an ordinary (out, mid) matrix and this is ``B @ K`` over the first axis of ``K``.
    """
    flat = K.reshape(*B.shape[:-2], B.shape[-1], -1)
    return (B @ flat).reshape(-1, *K.shape[1:])


# --------------------------------------------------------------------------------------------------- base


@dataclass(frozen=True)
class Rule:
    """A layer-wise learning rule; see the module's head for the contract.

    Args:
        init: scale of drawn feedback. ``"match"`` (default, ours): uniform with the RMS of ``W`` at conversion, so that the
            gain is 1; ``"xavier"``: standard deviation sqrt(2 / (fan_in + fan_out)) (p3's figures); ``"kaiming"``:
            sqrt(1 / (3 fan_in)), torch's default for layers; or a positive number, the standard deviation.
        density: fraction in (0, 1] of feedback entries that exist (default 1). Masks are drawn once, entry by entry, and the
            survivors are not rescaled (p3's sparse baselines).
        norm: ``"fixed"`` (default) leaves the kernel's size alone, ``"track"`` rescales it to the norm of ``W`` at every use
            (one reading of p1's strict normalisation).
        clamp_forward: hold ``W`` itself at the norm it had at conversion, after every optimizer step (the other reading of
            p1's strict normalisation, BioTorch's ``constrain_weights``). Default ``False``.
    """

    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    learned: ClassVar[tuple[str, ...]] = ()
    own_decay: ClassVar[bool] = False  # True: the feedback gradient holds its decay, so the optimizer must add none
    needs_sgd: ClassVar[bool] = False
    channels: ClassVar[
        tuple[str, ...]
    ] = ()  # tensors of ``init_state`` that are matrices between channels, whatever the layer
    needs_y: ClassVar[bool] = True  # False: ``feedback_grad`` gets None for y, and the forward pass keeps none

    init_scale: ClassVar[tuple[str, ...]] = ("match", "xavier", "kaiming")

    init: str | float = "match"
    density: float = 1.0
    norm: str = "fixed"
    clamp_forward: bool = False

    def __post_init__(self) -> None:
        if (
            isinstance(self.init, str)
            and self.init not in self.init_scale
            or not isinstance(self.init, str)
            and self.init <= 0
        ):
            raise UserError(
                f"{self.name}: init={self.init!r} is not one of {', '.join(self.init_scale)} or a positive number"
            )
        if not 0 < self.density <= 1:
            raise UserError(f"{self.name}: density={self.density!r} must lie in (0, 1]")
        if self.norm not in ("fixed", "track"):
            raise UserError(f"{self.name}: norm={self.norm!r} is not one of fixed, track")

    def std(self, W: Tensor) -> float:
        """Standard deviation that option ``init`` asks for, for feedback of ``W``'s shape."""
        fan_in, fan_out = fans(W)
        match self.init:
            case "match":
                return rms(W) if self.learned else self.nonzero(rms(W), "init")
            case "xavier":
                return math.sqrt(2 / (fan_in + fan_out))
            case "kaiming":
                return math.sqrt(1 / (3 * fan_in))
        return float(self.init)

    def nonzero(self, size: float, option: str, layer: str = "") -> float:
        """The size of a weight, for feedback that will keep it.

        Args:
            size: RMS of the weight at conversion.
            option: the rule's option that can ask for another size, for the message.
            layer: name of the layer, for the message (default: not told).

        Raises:
            UserError: it is 0.
        """
        if not size:
            raise UserError(
                f"{self.name}: the weight{layer and f' of layer {layer!r}'} is all zeros, and feedback of its size would never send an error; "
                f"initialise it before converting, or set {option}='xavier'"
            )
        return size

    def at(self, index: int) -> Rule:
        """The rule as the network's layer number ``index`` (from 0, in the order of its modules) has it."""
        return self

    def init_state(self, op: Any, W: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Tensors to keep, by name. ``W`` (out, in / groups, *kernel) is the weight at conversion; it is not changed."""
        return {}

    def kernel(self, W: Tensor) -> Tensor:
        """What carries the error in place of ``W``, of its shape."""
        raise NotImplementedError


def masked(K: Tensor, mask: Tensor | None) -> Tensor:
    """``K`` on the entries that exist (all of them where there is no mask)."""
    return K if mask is None else K * mask


@dataclass(frozen=True)
class FA(Rule):
    """Feedback alignment: a fixed random matrix carries the error.

    .. math:: dx = B^T dy

    Args:
        form: ``"kernel"`` (default): B has W's shape, so that a convolution sends errors down by a transposed convolution.
            ``"dense"``: a convolution's B is a dense matrix between the flattened maps, (out h' w', in h w), which knows nothing
            of space; needs ``convert(..., sample=x)``. With ``init="match"`` it has the Frobenius norm of the matrix that
            the convolution itself is, borders aside (ours), else the standard deviation asked for.

    Source: Lillicrap et al. 2016 (Nat. Commun. 7:13276); both forms for convolutions: p1.
    """

    name = "fa"
    equation = "dx = B^T dy, B fixed and random"
    source = "Lillicrap et al. 2016; Moskovitz et al. 2018 (convolutions)"

    form: str = "kernel"

    def __post_init__(self):
        super().__post_init__()
        if self.form not in ("kernel", "dense"):
            raise UserError(f"fa: form={self.form!r} is not one of kernel, dense")
        if self.form == "dense" and self.norm != "fixed":
            raise UserError("fa: norm='track' holds for form='kernel' only")

    def init_state(self, op, W, gen):
        shape, std = tuple(W.shape), self.std(W)
        if self.form == "dense" and W.dim() > 2:
            if op.sizes is None:
                raise UserError(
                    "fa: form='dense' needs the sizes of the maps; pass a batch of inputs, convert(..., sample=x)"
                )
            shape = tuple(math.prod(size) for size in reversed(op.sizes))
            if self.init == "match":
                std *= math.sqrt(W[0].numel() / shape[1])
        B = uniform(shape, std, W, gen)
        return {"B": B if self.density == 1 else B * random_mask(shape, self.density, W, gen)}

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
        return F.pad((dy.flatten(1) @ B.to(dy.dtype)).view(-1, *op.sizes[0]), op.pad)


@dataclass(frozen=True)
class USF(Rule):
    r"""Uniform sign-concordant feedback: the signs of W, one magnitude for the whole layer.

    .. math:: dx = s\,\mathrm{sign}(W)^T dy

    Args:
        scale: the magnitude s. ``"init"`` (default): the RMS of ``W`` at conversion; ``"xavier"``: sqrt(2 / (fan_in +
            fan_out)) (p3's "SF" and BioTorch); ``"track"``: the RMS of ``W`` now (p1's strict normalisation); or a number.

    Source: Liao et al. 2016 (arXiv 1510.05067); p1; p3 (authors' code, ``usf``).
    """

    name = "usf"
    equation = "dx = s sign(W)^T dy"
    source = "Liao et al. 2016; Moskovitz et al. 2018; Xiao et al. 2018"

    scale: str | float = "init"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.scale, str) and self.scale not in ("init", "xavier", "track"):
            raise UserError(f"usf: scale={self.scale!r} is not one of init, xavier, track or a number")

    def init_state(self, op, W, gen):
        match self.scale:
            case "init":
                s = self.nonzero(rms(W), "scale")
            case "track":
                s = rms(W)
            case "xavier":
                s = math.sqrt(2 / sum(fans(W)))
            case number:
                s = float(number)
        state = {"s": torch.tensor(s, dtype=torch.float64).to(W)}
        return state if self.density == 1 else state | {"mask": random_mask(W.shape, self.density, W, gen)}

    def kernel(self, W, s, mask=None):
        scale = W.square().mean().sqrt() if self.scale == "track" else s
        return masked(W.sign().mul_(scale), mask)


@dataclass(frozen=True)
class KP(Rule):
    r"""Kolen-Pollack: the feedback receives W's own update and decays as W does.

    .. math:: dx = B^T dy, \qquad dB = dW

    Under equal learning rate, momentum and decay, W - B receives no gradient and only decays, whatever the data.
    Source: Kolen & Pollack 1994; Akrout et al. 2019 (arXiv 1904.05391); p2 (authors' code, custom_optimizers.py).
    """

    name = "kp"
    equation = "dx = B^T dy, dB = dW"
    source = "Kolen & Pollack 1994; Akrout et al. 2019; Kunin et al. 2020"
    learned = ("B",)

    def init_state(self, op, W, gen):
        B = uniform(W.shape, self.std(W), W, gen)
        return {"B": B} if self.density == 1 else {"B": B, "mask": random_mask(W.shape, self.density, W, gen)}

    def kernel(self, B, mask=None):
        return masked(B, mask)

    def feedback_grad(self, dW):
        return {"B": dW}


@dataclass(frozen=True)
class PFA(Rule):
    r"""Product feedback alignment: the error passes a population of ``expansion * out`` units, B fixed, R learned.

    .. math:: dx = (B R)^T dy, \qquad dR = B^T dW

    By linearity the drawn path, error -> population -> layer below, is one pass with the product kernel, and the Hebbian
    gradient of R (population activity times presynaptic activity) is B^T dW. ``B`` is (out, expansion * out), uniform with
    E[B B^T] = I; ``R`` is (expansion * out, in, *kernel). In a grouped convolution B mixes within each group (ours; the
    authors' code mixes all channels).

    Args:
        expansion: size of the population relative to the layer's outputs (default 10, the paper's everywhere); ``expansion *
            out`` is rounded down.
        density: as in :class:`Rule`, for B and R independently; B is rescaled by 1 / sqrt(density), R is not (authors' code).
        implicit: keep ``c`` in place of R, where R = B^T W + c D_0 (with a mask on its entries, if sparse) and D_0 = R_0 - B^T W_0.
            Exact for SGD whose learning rate, momentum and decay are the same for W and R (our derivation): the mismatch D receives no
            gradient, so that one number, moved by the optimizer exactly as it moves R, says what is left of it. No R in memory, and no
            weight-sized product in a layer of few samples or positions, unless it is sparse. Clipping the gradient's norm must leave the feedback out of
            the norm, for c's gradient is 0 where R's is not. Default ``False``; ``"first"``: in the first layer converted alone, whose R
            mostly sends no error, which pays where feedback is sparse. An optimizer that it does not fit raises.
        init: of R; B always has the scale above. ``"match"``: the RMS of W, so that the path's gain is 1.

    Source: Li & Benna 2024 (arXiv 2405.20594); authors' code layers/tfa_constructor, autograd/tfa.
    """

    name = "pfa"
    channels = ("B", "BBt")
    equation = "dx = (B R)^T dy, dR = B^T dW"
    source = "Li & Benna 2024"

    expansion: float = 10
    implicit: bool | str = False

    def __post_init__(self):
        super().__post_init__()
        if not self.expansion > 0:
            raise UserError(f"{self.name}: expansion={self.expansion!r} must be positive")
        if self.implicit not in (True, False, "first"):
            raise UserError(f"{self.name}: implicit={self.implicit!r} is not one of True, False, first")
        if self.implicit and self.clamp_forward:
            raise UserError(f"{self.name}: implicit={self.implicit} holds without clamp_forward only; leave it out")

    def at(self, index):
        return self if self.implicit != "first" else replace(self, implicit=index == 0)

    @property
    def learned(self):
        return ("c",) if self.implicit is True else ("R",)

    @property
    def needs_sgd(self):
        return bool(self.implicit)

    def fixed(self, out: int, groups: int, like: Tensor, gen: torch.Generator) -> Tensor:
        """The fixed matrix B, (out, mid), or (groups, out / groups, mid / groups)."""
        mid = int(self.expansion * out / groups + 1e-9)
        if mid < 1:
            raise UserError(
                f"{self.name}: expansion={self.expansion} leaves a layer of {out // groups} outputs a group no population"
            )
        shape = (out, mid) if groups == 1 else (groups, out // groups, mid)
        B = uniform(shape, 1 / math.sqrt(mid * self.density), like, gen)
        return B if self.density == 1 else B * random_mask(shape, self.density, like, gen)

    def init_state(self, op, W, gen):
        B = self.fixed(W.shape[0], op.groups, W, gen)
        mid = B.shape[-1] * op.groups
        shape = (mid, *W.shape[1:])
        fan_in, fan_out = fans(W)
        std = math.sqrt(2 / (fan_in + fan_out * mid / W.shape[0])) if self.init == "xavier" else self.std(W)
        R = uniform(shape, std, W, gen)
        state = {"B": B} if self.density == 1 else {"B": B, "mask": random_mask(shape, self.density, W, gen)}
        if not self.implicit:
            return state | {"R": R}
        c, Wt = W.new_ones((1,) * W.dim()), W.detach()
        if self.density < 1:
            return state | {"D": masked(R - channel_product(B.mT, Wt), state["mask"]), "c": c}
        BBt = self.square(B)
        state = {"BD": channel_product(B, R) - (Wt if BBt is None else channel_product(BBt, Wt)), "c": c}
        return state if BBt is None else state | {"BBt": BBt}

    def square(self, B: Tensor) -> Tensor | None:
        """B B^T, or None where it is the identity."""
        return B @ B.mT

    def population(
        self, W: Tensor, B: Tensor, R: Tensor | None, mask: Tensor | None, D: Tensor | None, c: Tensor | None
    ) -> Tensor:
        """R on the entries that exist, stored or not."""
        return masked(R, mask) if R is not None else masked(channel_product(B.mT, W), mask) + c * D

    def kernel(self, W, B=None, R=None, mask=None, D=None, BBt=None, BD=None, c=None):
        if B is None:
            return torch.addcmul(W if BBt is None else channel_product(BBt, W), c, BD)
        return channel_product(B, self.population(W, B, R, mask, D, c))

    def send_error(self, op, x, dy, W, memo, B=None, R=None, mask=None, D=None, BBt=None, BD=None, c=None):
        """dx along the drawn path, where there are so few samples, or positions of a map, that the product does not pay; else None."""
        if self.norm != "fixed" or not self.drawn(op, dy, W):
            return None
        t = dy.dtype  # that of autocast, where it is on
        if B is not None:
            memo["activity"] = op.matmul_channels(dy, B.to(t))
            return op.grad_input(memo["activity"], self.population(W, B, R, mask, D, c).to(t), x)
        if BBt is None:
            return None
        rest = (dy * c.flatten()).to(t)  # c BD would be a product of weight size
        return op.grad_input(op.matmul_channels(dy, BBt.to(t)), W.to(t), x) + op.grad_input(rest, BD.to(t), x)

    def drawn(self, op: Any, dy: Tensor, W: Tensor) -> bool:
        """Whether the drawn path costs less than products of weights."""
        return op.groups == 1 and dy.numel() // W.shape[0] < W.shape[0]

    def feedback_grad(self, op, x, dy, dW, W, memo, B=None, R=None, c=None):
        if c is not None:
            return {"c": torch.zeros_like(c)}
        if self.drawn(op, dy, W):
            activity = memo["activity"] if "activity" in memo else op.matmul_channels(dy, B.to(dy.dtype))
            return {"R": op.grad_weight(x, activity, R).to(B.dtype)}
        return {"R": channel_product(B.mT, dW)}


@dataclass(frozen=True)
class PFAo(PFA):
    r"""Product feedback alignment with an orthogonal B and no expansion.

    .. math:: dx = (B R)^T dy, \qquad dR = B^T dW, \qquad B B^T = I

    The path B R obeys the Kolen-Pollack update exactly, though neither matrix ever resembles W. Sparse (``density`` < 1) it
    is masked and rescaled as PFA is, and then no longer orthogonal (ours; the paper's sparse feedback leaves PFA-o out).
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
        draw = torch.randn((groups, n, n), generator=gen, dtype=torch.float64, device="cpu")
        Q, T = torch.linalg.qr(draw)
        B = (Q * T.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(
            like
        )  # signs of T: uniform over the orthogonal group
        B = B[0] if groups == 1 else B
        return B if self.density == 1 else B * random_mask(B.shape, self.density, like, gen) / math.sqrt(self.density)

    def square(self, B):
        return None  # asked for dense B alone


@dataclass(frozen=True)
class FRSF(Rule):
    r"""Fixed random-magnitude sign-concordant feedback: W's signs, random magnitudes drawn once.

    .. math:: dx = (|M| \circ \mathrm{sign}(W))^T dy

    Source: Liao et al. 2016; p1.
    """

    name = "frsf"
    equation = "dx = (|M| sign(W))^T dy, M fixed and random"
    source = "Liao et al. 2016; Moskovitz et al. 2018"

    def init_state(self, op, W, gen):
        M = uniform(W.shape, self.std(W), W, gen)
        return {"M": M if self.density == 1 else M * random_mask(W.shape, self.density, W, gen)}

    def kernel(self, W, M):
        return M.abs() * W.sign()


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

    def init_state(self, op, W, gen):
        std = self.std(W)
        state = {"M": uniform(W.shape, std, W, gen), "std": torch.tensor(std, dtype=torch.float64).to(W)}
        return state if self.density == 1 else state | {"mask": random_mask(W.shape, self.density, W, gen)}

    def kernel(self, W, M, mask=None):
        return masked(M.abs() * W.sign(), mask)

    def after_step(self, gen, M, std):
        return {"M": M.clone().uniform_(0, math.sqrt(3.0), generator=gen()) * std}


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
    equation = "dx = B^T dy, B = W as of up to k steps ago"
    source = "our reading"

    every: int = 100
    part: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.every < 0 or not 0 < self.part <= 1:
            raise UserError(f"frozen: every={self.every} must not be negative, part={self.part} must lie in (0, 1]")

    def init_state(self, op, W, gen):
        state = {"B": W.detach().clone()}
        return state if self.density == 1 else state | {"mask": random_mask(W.shape, self.density, W, gen)}

    def kernel(self, B, mask=None):
        return masked(B, mask)

    def after_step(self, gen, W, B, step):
        if self.every == 0 or step % self.every:
            return {}
        return {
            "B": W if self.part == 1 else torch.where(torch.empty_like(B).uniform_(generator=gen()) < self.part, W, B)
        }


# --------------------------------------------------------------------------------------- rules of paper 2


@dataclass(frozen=True)
class Primitives(Rule):
    r"""Learned feedback that descends a local objective, a sum of p2's five primitives.

    .. math::
        R = d\,(\|W\|^2 + \|B\|^2) - a \langle x^T B^T W x\rangle + n \langle\|B^T W x\|^2\rangle
            + p \langle\|W x\|^2 + \|B x\|^2\rangle - s\,\mathrm{tr}(B^T W)

    with B of W's shape (p2's transposed). Only B descends it: x and W count as given, and no other layer hears of it. A rule is a row of
    coefficients, so that a new combination is one call: ``fa.convert(net, "primitives", amp=2e-3, sparse=1e-3)``.

    Args:
        decay: d, of local rules.
        amp: a, Hebbian: presynaptic times postsynaptic activity.
        null: n; the layer's own activity sent back through B.
        sparse: p; needs x sent up through B, not local.
        self: s; needs the value of W, not local.
        positions: ``"mean"`` (default, ours) or ``"sum"`` (p2's code) over a convolution's output positions, in the terms that see
            data. The sum makes AA and IA diverge on ResNet-20 at learning rate 0.1.
        input: ``"data"`` (default): the layer's own input; ``"normal"`` or ``"uniform"``: fresh noise of its shape in every
            backward pass, of mean 0 and standard deviation ``input_std``, drawn for each layer from a generator of its own whose
            state is in ``state_dict``. On a CPU normal noise costs twice as much.
        input_std: see ``input`` (default 1, p2's code).
        center: subtract each sample's mean over features from the input. Default ``False``.
        normalize: centre, and scale each sample to length 1. Default ``False``.
        activation: W x passes a rectifier before it is used. Default ``False``.

    ``< >`` is the mean over the batch; there is no factor 1/2 anywhere. Defaults of the named rules are p2's code's. The
    gradient holds its own decay, so the optimizer must add none (``fa.param_groups`` sees to it). A scaled loss does not
    scale it.
    Source: p2 sections 1.5 and 2.1; authors' code Alignments/primitives.py.
    """

    name = "primitives"
    equation = "dx = B^T dy, dB = 2d B - a <y x^T> + 2n <y (B^T y)^T> + 2p <(B x) x^T> - s W"
    source = "Kunin et al. 2020"
    learned = ("B",)
    own_decay = True

    decay: float = 0.0
    amp: float = 0.0
    null: float = 0.0
    sparse: float = 0.0
    self_: float = 0.0
    positions: str = "mean"
    input: str = "data"
    input_std: float = 1.0
    center: bool = False
    normalize: bool = False
    activation: bool = False

    def __post_init__(self):
        super().__post_init__()
        for option, known in {"positions": ("mean", "sum"), "input": ("data", "normal", "uniform")}.items():
            if getattr(self, option) not in known:
                raise UserError(f"{self.name}: {option}={getattr(self, option)!r} is not one of {', '.join(known)}")

    def mirror(self, op: Any, x: Tensor, dy: Tensor) -> Tensor:
        """What the local objective sees in place of the layer's input."""
        if self.input != "data":
            x = op.noise(x, dy, self.input, self.input_std)
        if self.center or self.normalize:  # over a sample's features, as p2's code; a linear layer's tokens are samples
            flat = x.reshape(-1, x.shape[-1]) if x.dim() < 4 else x.flatten(1)
            flat = flat - flat.mean(1, keepdim=True)
            x = (flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True) if self.normalize else flat).view_as(x)
        return x

    def init_state(self, op, W, gen):
        B = uniform(W.shape, self.std(W), W, gen)
        return {"B": B} if self.density == 1 else {"B": B, "mask": random_mask(W.shape, self.density, W, gen)}

    def kernel(self, B, mask=None):
        return masked(B, mask)

    @property
    def needs_y(self):
        """Whether W x is used as the forward pass made it: not where a mirror has another input, nor where one pass makes B x - W x."""
        own = self.input == "data" and not (self.center or self.normalize)
        return own and bool(self.null or (self.amp and (self.activation or not self.sparse)))

    def feedback_grad(self, op, x, y, dy, W, B):
        a, n, p = self.amp, 2 * self.null, 2 * self.sparse
        if not (a or n or p):
            return {"B": 2 * self.decay * B - self.self_ * W}
        x = self.mirror(op, x, dy)

        def up(kernel: Tensor) -> Tensor:
            return op.forward(x, kernel.to(x.dtype))

        # Coefficients multiply kernels, which are small, and not maps.
        if y is None and not (n or self.activation):
            data = op.grad_weight(x, up(p * B - a * W), W)  # both terms in one pass, by linearity
        else:
            y = up(W) if y is None else y
            y = torch.relu(y) if self.activation else y
            if n:
                data = op.grad_weight(op.grad_input(y, (n * B).to(x.dtype), x).sub_(x, alpha=a), y, W)
                data = data + op.grad_weight(x, up(p * B), W) if p else data
            elif p:
                data = op.grad_weight(x, up(p * B).sub_(y, alpha=a), W)
            elif x.dtype == torch.float16:  # its range is too small for a sum over positions
                data = op.grad_weight(x, -a * y, W)
            else:
                data = op.grad_weight(x, y, W).mul_(-a)
        every = (
            self.positions == "mean" or W.dim() == 2
        )  # samples (every token is one), or samples times output positions
        data = data.to(B.dtype).div_(max(dy.numel() // W.shape[0] if every else dy.shape[0], 1))  # 1: an empty batch
        if self.decay:
            data.add_(B, alpha=2 * self.decay)
        return {"B": data.sub_(W, alpha=self.self_) if self.self_ else data}


@dataclass(frozen=True)
class WM(Primitives):
    """Weight mirror: a Hebbian term and decay. dB = 2d B - a <y x^T>; here with the layer's own input.

    It learns in every step, beside the task; for mirror phases and a mirror before training see :class:`fa.train.config.Config`.
    Source: Akrout et al. 2019; p2 (authors' code, Alignments/primitives.py).
    """

    name = "wm"
    equation = "dx = B^T dy, dB = 2d B - a <y x^T>"
    source = "Akrout et al. 2019; Kunin et al. 2020"
    decay: float = 1e-3
    amp: float = 1e-3


@dataclass(frozen=True)
class IA(Primitives):
    """Information alignment: the decoder of a regularised linear autoencoder. dB = 2d B - a <y x^T> + 2n <y (B^T y)^T>.

    Source: p2 (authors' code, Alignments/primitives.py).
    """

    name = "ia"
    equation = "dx = B^T dy, dB = 2d B - a <y x^T> + 2n <y (B^T y)^T>"
    decay: float = 1e-3
    amp: float = 2e-3
    null: float = 1e-3


@dataclass(frozen=True)
class SA(Primitives):
    """Symmetric alignment: a leaky estimate of W. dB = 2d B - s W.

    Source: p2 (authors' code, Alignments/primitives.py).
    """

    name = "sa"
    equation = "dx = B^T dy, dB = 2d B - s W"
    decay: float = 1e-3
    self_: float = 2e-3


@dataclass(frozen=True)
class AA(Primitives):
    """Activation alignment: B x is fitted to W x. dB = 2p <(B x) x^T> - a <y x^T>.

    Source: p2 (authors' code, Alignments/primitives.py).
    """

    name = "aa"
    equation = "dx = B^T dy, dB = 2p <(B x) x^T> - a <y x^T>"
    amp: float = 2e-3
    sparse: float = 1e-3


@dataclass(frozen=True)
class BP(Rule):
    """Backpropagation: W itself carries the error. ``convert(net, "bp")`` takes every rule off again."""

    name = "bp"
    equation = "dx = W^T dy"
    source = "Rumelhart et al. 1986"

    def kernel(self, W):
        return W


RULES: dict[str, type] = {
    rule.name: rule for rule in (BP, FA, USF, BRSF, FRSF, Frozen, KP, PFA, PFAo, Primitives, WM, IA, SA, AA)
}
"""Name -> rule. Extend it with your own; :mod:`fa.layers.dfa` adds ``dfa``."""


def rule(name: str, **options: Any) -> Rule:
    """The rule of that name with these options.

    Raises:
        UserError: an unknown name or option, which names the known ones; text for an option that takes none.
    """
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}; known rules: {', '.join(sorted(RULES))}{did_you_mean(name, RULES)}")
    known = {f.name: str(f.type) for f in fields(RULES[name])}
    for option, value in options.items():
        if option not in known:
            known_options = f"{', '.join(known) or 'none'}{did_you_mean(option, known)}"
            raise UserError(f"unknown option {option!r} of rule {name!r}; known options: {known_options}")
        if isinstance(value, str) and "str" not in known[option]:
            raise UserError(f"{name}: {option}={value!r} is text; the option takes a value of type {known[option]}")
    return RULES[name](**options)
