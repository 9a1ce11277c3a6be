r"""What a learning rule is: the contract of a rule, and the tools that the rules share.

A rule leaves a layer's forward pass alone. It says which weight carries the error down, and how that weight learns:

.. math:: y = W x + b, \qquad dx = K^T dy, \qquad dW = dy\,x^T, \qquad db = \sum dy,

where :math:`K` is the rule's *kernel*, the effective feedback weight, of ``W``'s shape (backprop is :math:`K = W`). A
rule is a frozen dataclass whose fields are its options. Its class may have the following, and needs only ``kernel``.

=================================== ===================================================================================
``name, equation, source`` ("")     the key in ``RULES``, the rule in one line, and the paper
``learned`` (())                    names of the tensors that learn: they become parameters, all others buffers
``masked`` ("")                     the tensor that ``density`` < 1 makes sparse; "": the kernel. A fixed tensor is
                                    masked once, else ``mask`` is kept; it acts on the kernel, or on each M of its terms
``own_decay`` (False)               the feedback gradient holds a decay, so that the optimizer must add none; it does
                                    not scale with the loss, and a ``GradScaler`` does not scale it either
``needs_sgd`` (False)               exact only under ``torch.optim.SGD``, with W and the feedback in one group
``needs_y`` (True)                  False: ``feedback_grad`` gets None for ``y``, and the forward pass keeps no ``y``
``choices`` ({"norm": ...})         the values that an option takes, by option: another value raises
``draws_noise`` (False)             ``feedback_grad`` calls ``op.noise``: the layer has a generator, and is not compiled
``at(index)``                       the rule of the network's layer number ``index`` (from 0); default: the rule itself
``init_state(op, W, gen)``          the tensors that the layer keeps, by name, drawn from the generator ``gen``
``kernel(...)``                     K; or terms [(A, M), (A', M', c'), ...], which stand for K = A M + c' A' M' + ...
``feedback_grad(...)``              the gradients of the ``learned`` tensors, by name; a pair (B, dW) stands for B^T dW
``send_error(...)``                 dx, where the error does not go through a kernel; None: it does
``after_step(...)``                 new values of tensors, by name, once per optimizer step
``draw_feedback``                   of a rule that is not layer-wise (``dfa``): feedback from (net, layers, sizes, seed)
=================================== ===================================================================================

The methods with dots receive what they name as parameters: ``W`` and any tensor of ``init_state``; ``feedback_grad``
and ``send_error`` also ``x`` (the layer's input), ``dy`` (the error at its output) and ``op`` (its linear map,
:mod:`fa.layers.maps`); ``feedback_grad`` also ``y`` (= W x, without bias) and ``dW``; ``after_step`` also ``step``
(from 1) and ``gen`` (a function that makes a generator for this layer and step). All tensors arrive detached. ``A`` is
a matrix between channels (out, mid), or None for the identity: a layer with few samples sends the error through A and M
in turn, which is cheaper than the product A M. A rule of one's own::

    @dataclass(frozen=True)
    class Mine(fa.Rule):
        name, equation, source = "mine", "dx = 2 W^T dy", "our reading"
        def kernel(self, W): return 2 * W

    fa.RULES["mine"] = Mine

A rule never sees the loss, another layer, or the optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fa.errors import UserError
from fa.provenance import memory

Terms = list[tuple[Any, ...]]
# Type of an option -> how the value of such an option is called, and a method that it has.
_KINDS = {"float": ("a finite number", "__float__"), "int": ("a whole number", "__index__")}
_KINDS |= {"bool": ("True or False", "__bool__"), "str": ("text", "isidentifier")}


def _fits(value: Any, kind: str) -> bool:
    """Whether an option of that type takes a value: numbers of any library, if they are finite."""
    return hasattr(value, _KINDS[kind][1]) and (kind != "float" or math.isfinite(value))


def fans(W: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight ``(out, in / groups, *kernel)``, as ``torch.nn.init`` counts them."""
    receptive = math.prod(W.shape[2:])
    return W.shape[1] * receptive, W.shape[0] * receptive


def float64(x: Tensor) -> Tensor:
    """``x`` in float64, detached: on its device, or on the CPU where its device has no float64, as Apple's MPS."""
    x = x.detach()
    try:
        return x.double()
    except (TypeError, RuntimeError):
        return torch.empty(x.shape, dtype=torch.float64, device="cpu").copy_(x.cpu())


def rms(W: Tensor) -> float:
    """Root mean square of the entries of ``W``; 1 of none."""
    return float64(W).square().mean().sqrt().item() if W.numel() else 1.0


def uniform(shape: tuple[int, ...], std: float, like: Tensor, gen: torch.Generator) -> Tensor:
    """Uniform draw with mean 0 and standard deviation ``std``, in the dtype and place of ``like``.

    Drawn on the CPU in float64, so that a float32 and a float64 network share their feedback.
    """
    check_memory(shape)
    bound = math.sqrt(3.0) * std
    draw = torch.rand(shape, generator=gen, dtype=torch.float64, device="cpu")  # -> shape, in (0, 1)
    return (draw * (2 * bound) - bound).to(like)


def check_memory(shape: tuple[int, ...]) -> None:
    """Raise UserError for a random matrix whose draw, about four times in float64, does not fit into memory."""
    need, have = 4 * 8 * math.prod(shape), memory()
    if need > have:
        raise UserError(
            f"drawing feedback of {' x '.join(map(str, shape))} entries takes {need / 1e9:.0f} GB of memory, and there "
            f"are {have / 1e9:.0f} GB; leave the layer out with skip=[...], or ask for less feedback (pfa: expansion)"
        )


def random_mask(shape: tuple[int, ...], density: float, like: Tensor, gen: torch.Generator) -> Tensor:
    """Mask of ones (with probability ``density``) and zeros."""
    return (torch.rand(shape, generator=gen, dtype=torch.float64, device="cpu") < density).to(like)


def channel_product(A: Tensor, M: Tensor) -> Tensor:
    """A M over channels, by group: A (..., out/g, mid/g), M ``(mid, in, *kernel)`` -> ``(out, in, *kernel)``.

    With one group ``A`` is an ordinary (out, mid) matrix and this is ``A @ M`` over the first axis of ``M``.
    """
    flat = M.reshape(*A.shape[:-2], A.shape[-1], math.prod(M.shape[1:]))  # -> (..., mid/g, in * kernel)
    return (A @ flat).reshape(math.prod(A.shape[:-1]), *M.shape[1:])  # (..., out/g, in * kernel) -> (out, in, *kernel)


def terms_of(kernel: Tensor | Terms, mask: Tensor | None) -> Terms:
    """What a rule's ``kernel`` returned as terms, on the entries that exist: the mask acts on every M."""
    terms = [(None, kernel)] if isinstance(kernel, Tensor) else kernel
    return terms if mask is None else [(A, M * mask, *c) for A, M, *c in terms]


def multiply(terms: Terms) -> Tensor:
    """The kernel K, ``(out, in, *kernel)``, that the terms stand for."""
    (A, K), *more = terms
    K = K if A is None else channel_product(A, K)  # (out, mid) (mid, in) -> (out, in)
    for A, M, c in more:
        K = torch.addcmul(K, c, M if A is None else channel_product(A, M))  # (out, in) + (1, 1) (out, in)
    return K


def gradient_of(grad: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """A gradient as ``feedback_grad`` gave it: a tensor, or a pair (B, dW) for B^T dW, ``(mid, in, *kernel)``."""
    return grad if isinstance(grad, Tensor) else channel_product(grad[0].mT, grad[1])  # -> (mid, in)


@dataclass(frozen=True)
class Rule:
    """A layer-wise learning rule; the module's head has the contract.

    Args:
        init: scale of drawn feedback. ``"match"`` (default, ours): uniform with the RMS of ``W`` at conversion, so that
            the gain is 1; ``"xavier"``: standard deviation sqrt(2 / (fan_in + fan_out)) (p3's figures); ``"kaiming"``:
            sqrt(1 / (3 fan_in)), torch's default for layers; or a positive number, the standard deviation.
        density: fraction in (0, 1] of feedback entries that exist (default 1). Masks are drawn once, entry by entry,
            and the remaining entries are not rescaled (p3's sparse baselines).
        gain: factor on the kernel at every use, after ``norm`` (default 1); of DFA's B_l when it is drawn.
        norm: ``"fixed"`` (default) leaves the kernel's size alone, ``"track"`` rescales the kernel to the norm of ``W``
            at every use (one reading of p1's strict normalisation).
        clamp_forward: hold ``W`` itself at the norm it had at conversion, after every optimizer step (the other reading
            of p1's strict normalisation, BioTorch's ``constrain_weights``). Default ``False``. A weight of zeros is
            refused at conversion, and a parametrization that sets the norm (spectral norm) at the first step.
    """

    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    learned: ClassVar[tuple[str, ...]] = ()
    masked: ClassVar[str] = ""
    own_decay: ClassVar[bool] = False
    needs_sgd: ClassVar[bool] = False
    needs_y: ClassVar[bool] = True
    draws_noise: ClassVar[bool] = False
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"norm": ("fixed", "track")}
    inits: ClassVar[tuple[str, ...]] = ("match", "xavier", "kaiming")  # words that ``init`` may be

    init: str | float = "match"
    density: float = 1.0
    gain: float = 1.0
    norm: str = "fixed"
    clamp_forward: bool = False

    def __post_init__(self) -> None:
        if not (self.init in self.inits if isinstance(self.init, str) else _fits(self.init, "float") and self.init > 0):
            raise UserError(f"{self.name}: init={self.init!r} must be {', '.join(self.inits)} or a positive number")
        for field in fields(self):
            option, value, choices = field.name, getattr(self, field.name), self.choices
            kinds = getattr(field.type, "__name__", str(field.type)).split(" | ")  # another type takes any value
            if option in choices and value not in choices[option]:
                raise UserError(f"{self.name}: {option}={value!r} is not one of {', '.join(map(str, choices[option]))}")
            if option not in choices and _KINDS.keys() >= set(kinds) and not any(_fits(value, k) for k in kinds):
                raise UserError(f"{self.name}: {option}={value!r} must be {' or '.join(_KINDS[k][0] for k in kinds)}")
        if not 0 < self.density <= 1:
            raise UserError(f"{self.name}: density={self.density!r} must lie in (0, 1]")
        if not 0 < self.gain < math.inf:
            raise UserError(f"{self.name}: gain={self.gain!r} must be a positive number")

    def std(self, W: Tensor) -> float:
        """Standard deviation that option ``init`` asks for, for feedback of ``W``'s shape."""
        if self.init == "match":
            return size if (size := rms(W)) < math.inf and self.learned else self.nonzero(size, "init")
        fan_in, fan_out = fans(W)
        variance: dict[Any, float] = {"xavier": 2 / max(fan_in + fan_out, 1), "kaiming": 1 / max(3 * fan_in, 1)}
        return math.sqrt(variance[self.init]) if self.init in variance else float(self.init)

    def nonzero(self, size: float, option: str = "", layer: str = "") -> float:
        """``size``, the RMS of a weight, for feedback that will keep it; 0, NaN or infinity raises UserError, which
        names the rule's ``option`` that can ask for another size, and the ``layer``, where they are given."""
        if not 0 < size < math.inf:
            state, remedy = "is not finite" if size else "is all zeros", option and f", or set {option}='xavier'"
            raise UserError(
                f"{self.name}: the weight{layer and f' of layer {layer!r}'} {state}, and feedback of its size "
                f"would never send an error; initialise it before converting{remedy}"
            )
        return size

    def at(self, index: int) -> Rule:
        """The rule as the network's layer number ``index`` (from 0, in the order of its modules) has it."""
        return self

    def init_state(self, op: Any, W: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """Tensors to keep, by name. ``W`` ``(out, in / groups, *kernel)``, the weight at conversion, is not changed."""
        return {}

    def state(self, op: Any, W: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        """The tensors of :meth:`init_state`, made sparse as ``density`` asks; the mask is drawn last."""
        state = self.init_state(op, W, gen)
        if self.density < 1:
            mask = random_mask(state.get(self.masked, W).shape, self.density, W, gen)
            once = self.masked in state and self.masked not in self.learned
            state |= {self.masked: state[self.masked] * mask} if once else {"mask": mask}
        return state

    def kernel(self, W: Tensor) -> Tensor | Terms:
        """The effective feedback weight, which carries the error in place of ``W``; of W's shape, or as terms."""
        raise NotImplementedError


@dataclass(frozen=True)
class Estimate(Rule):
    """Learned feedback B of W's shape, which sends the error in W's place.

    Args:
        init: as in :class:`Rule`, or ``"copy"``: B starts as a copy of W (ours, to tell the start from what follows).
    """

    learned = ("B",)
    inits = (*Rule.inits, "copy")

    def init_state(self, op: Any, W: Tensor, gen: torch.Generator) -> dict[str, Tensor]:
        if self.init == "copy":
            return {"B": W.detach().clone(memory_format=torch.contiguous_format)}  # (out, in)
        return {"B": uniform(W.shape, self.std(W), W, gen)}  # (out, in)

    def kernel(self, B: Tensor) -> Tensor:
        return B
