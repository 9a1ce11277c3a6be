"""Paper 2's rules: feedback that learns to estimate W by descending a local objective, a sum of five primitives."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from torch import Tensor

from fa.rules.base import Estimate


@dataclass(frozen=True)
class Primitives(Estimate):
    r"""Learned feedback that descends a local objective, a sum of p2's five primitives.

    .. math::
        R = d\,(\|W\|^2 + \|B\|^2) - a \langle x^T B^T W x\rangle + n \langle\|B^T W x\|^2\rangle
            + p \langle\|W x\|^2 + \|B x\|^2\rangle - s\,\mathrm{tr}(B^T W)

    with B of W's shape (p2's transposed). Only B descends it: x and W count as given, and no other layer receives a
    gradient of it. A rule is a row of coefficients, a new one a call: ``fa.convert(net, "primitives", amp=2e-3)``.

    Args:
        decay: d, of local rules.
        amp: a, Hebbian: presynaptic times postsynaptic activity.
        null: n; the layer's own activity sent back through B.
        sparse: p; needs x sent up through B, not local.
        self: s; needs the value of W, not local.
        positions: ``"mean"`` (default, ours) or ``"sum"`` (p2's code) over a convolution's output positions, in the
            terms that see data. The sum makes AA and IA diverge on ResNet-20 at learning rate 0.1.
        input: ``"data"`` (default): the layer's own input; ``"normal"`` or ``"uniform"``: fresh noise of its shape in
            every backward pass, of mean 0 and standard deviation ``input_std``, drawn for each layer from a generator
            of its own whose state is in ``state_dict``. Layers that draw noise are not compiled.
        input_std: see ``input`` (default 1, p2's code).
        center: subtract each sample's mean over features from the input. Default ``False``.
        normalize: centre, and scale each sample to length 1. Default ``False``.
        activation: W x passes a rectifier before it is used. Default ``False``.

    ``< >`` is the mean over the batch; there is no factor 1/2 anywhere. Defaults of the named rules are p2's code's.
    The gradient holds its own decay: the optimizer must add none (``fa.param_groups``), and a loss scale leaves it.
    Source: p2 sections 1.5 and 2.1; authors' code Alignments/primitives.py.
    """

    name = "primitives"
    equation = "dx = B^T dy, dB = 2d*B - a <y x^T> + 2n <y (B^T y)^T> + 2p <(B x) x^T> - s W"
    source = "Kunin et al. 2020"
    own_decay = True
    choices = Estimate.choices | {"positions": ("mean", "sum"), "input": ("data", "normal", "uniform")}

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

    @property
    def draws_noise(self):
        """Whether noise takes the place of the layer's input."""
        return self.input != "data"

    @property
    def needs_y(self):
        """Whether the gradient uses W x as the forward pass made it. It does not where the objective has another
        input than the layer, nor where one pass through p B - a W makes both terms."""
        own = self.input == "data" and not (self.center or self.normalize)
        return own and bool(self.null or (self.amp and (self.activation or not self.sparse)))

    def mirror(self, op: Any, x: Tensor) -> Tensor:
        """What the local objective sees in place of the layer's input ``x``; of its shape."""
        if self.draws_noise:
            x = op.noise(x, self.input, self.input_std)
        if self.center or self.normalize:  # over a sample's features, as p2's code; a linear layer's tokens are samples
            flat = x.reshape(-1, x.shape[-1]) if x.dim() < 4 else x.flatten(1)  # (n, features)
            flat = flat - flat.mean(1, keepdim=True)  # (n, features) - (n, 1)
            x = (flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True) if self.normalize else flat).view_as(x)
        return x

    def feedback_grad(self, op, x, y, dy, W, B):
        a, n, p = self.amp, 2 * self.null, 2 * self.sparse
        if not (a or n or p):
            return {"B": 2 * self.decay * B - self.self_ * W}  # (out, in)
        x = self.mirror(op, x)  # (n, in)

        def up(kernel: Tensor) -> Tensor:
            return op.forward(x, kernel.to(x.dtype))  # (n, in) (out, in) -> (n, out)

        # Coefficients multiply kernels, which are small, and not maps. grad_weight: (n, in) (n, out) -> (out, in)
        if y is None and not (n or self.activation):
            data = op.grad_weight(x, up(p * B - a * W), W)  # both terms in one pass, by linearity
        else:
            y = up(W) if y is None else y
            y = torch.relu(y) if self.activation else y
            if n:
                dense = x.to_dense() if x.is_sparse or x.is_sparse_csr else x
                back = op.grad_input(y, (n * B).to(x.dtype), x).sub_(dense, alpha=a)  # (n, out) (out, in) -> (n, in)
                data = op.grad_weight(back, y, W)
                data = data + op.grad_weight(x, up(p * B), W) if p else data
            elif p:
                data = op.grad_weight(x, up(p * B).sub_(y, alpha=a), W)
            elif x.dtype == torch.float16:  # its range is too small for a sum over positions
                data = op.grad_weight(x, -a * y, W)
            else:
                data = op.grad_weight(x, y, W).mul_(-a)
        # samples (every token is one), or samples times output positions; 1 of an empty batch
        n_sum = dy.numel() // max(W.shape[0], 1) if self.positions == "mean" or W.dim() == 2 else dy.shape[0]
        data = data.to(B.dtype).div_(max(n_sum, 1))
        if self.decay:
            data.add_(B, alpha=2 * self.decay)
        return {"B": data.sub_(W, alpha=self.self_) if self.self_ else data}  # (out, in)


def _named(name: str, gradient: str, doc: str, **coefficients: float) -> type[Primitives]:
    """A named rule of p2: :class:`Primitives` with other default coefficients. The code: Alignments/primitives.py."""
    body = {"name": name, "equation": f"dx = B^T dy, {gradient}", "__doc__": doc, "__module__": __name__}
    body["source"] = "Akrout et al. 2019; Kunin et al. 2020" if name == "wm" else Primitives.source
    options = [(option, float, default) for option, default in coefficients.items()]
    return make_dataclass(name.upper(), options, bases=(Primitives,), namespace=body, frozen=True)


WM = _named("wm", "dB = 2d*B - a <y x^T>",
    "Weight mirror: a Hebbian term and decay; here with the layer's own input, in every step, together with the task. "
    "For mirror phases and a mirror before training see :class:`fa.train.config.Config`. Source: Akrout et al. 2019; "
    "p2's code.", decay=1e-3, amp=1e-3)  # fmt: skip
IA = _named("ia", "dB = 2d*B - a <y x^T> + 2n <y (B^T y)^T>",
    "Information alignment: the decoder of a regularised linear autoencoder. Source: p2's code.",
    decay=1e-3, amp=2e-3, null=1e-3)  # fmt: skip
SA = _named("sa", "dB = 2d*B - s W", "Symmetric alignment: a leaky estimate of W. Source: p2's code.",
    decay=1e-3, self_=2e-3)  # fmt: skip
AA = _named("aa", "dB = 2p <(B x) x^T> - a <y x^T>", "Activation alignment: B x is fitted to W x. Source: p2's code.",
    amp=2e-3, sparse=1e-3)  # fmt: skip
