"""The linear map of a layer, without its bias: what a rule knows as ``op``.

A map's methods take the kernel as an argument: a rule sends errors or noise through any kernel of the weight's shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from fa.errors import UserError


@dataclass
class _Map:
    """What both kinds of linear map have: sizes of a sample's input and output where known, and noise of their own."""

    sizes: tuple[torch.Size, torch.Size] | None = field(default=None, kw_only=True)
    pad: tuple[int, ...] = field(default=(), kw_only=True)  # what was added to x before this map
    gen: torch.Generator | None = field(default=None, kw_only=True)

    def noise(self, like: Tensor, kind: str, std: float = 1.0) -> Tensor:
        """Noise, "normal" or "uniform", of mean 0 and standard deviation ``std``, shaped as ``like``."""
        if self.gen is None or self.gen.device != like.device:
            self.gen = torch.Generator(like.device).manual_seed(0 if self.gen is None else self.gen.initial_seed())
        # half precision is rounded to: torch's own normal numbers in bfloat16 lack their tails
        out = torch.empty_like(like, dtype=torch.promote_types(like.dtype, torch.float32))  # (n, in)
        bound = 3**0.5 * std
        out.normal_(0, std, generator=self.gen) if kind == "normal" else out.uniform_(-bound, bound, generator=self.gen)
        return out.to(like.dtype)


@dataclass
class LinearMap(_Map):
    """y = K x on the last axis. Shapes: x (..., in), y (..., out), K (out, in)."""

    groups = 1

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        """K x (+ bias)."""
        return F.linear(x, K, bias)  # (..., in) (out, in) -> (..., out)

    def grad_input(self, y: Tensor, K: Tensor, like: Tensor) -> Tensor:
        """K^T y, of the shape of ``like``."""
        return y @ K  # (..., out) (out, in) -> (..., in)

    def matmul_channels(self, y: Tensor, B: Tensor) -> Tensor:
        """B^T y on the last axis; B (out, mid)."""
        return y @ B  # (..., out) (out, mid) -> (..., mid)

    def grad_weight(self, x: Tensor, y: Tensor, like: Tensor | None = None) -> Tensor:
        """sum y x^T over all leading axes: the gradient of <y, K x> by K."""
        return rows(y).t() @ rows(x)  # (out, n) (n, in) -> (out, in)

    def backward(self, dy: Tensor, x: Tensor, K: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """(K^T dy, dW, db) where ``mask`` asks for them."""
        return (
            dy @ K if mask[0] else None,  # (..., out) (out, in) -> (..., in)
            self.grad_weight(x, dy) if mask[1] else None,  # -> (out, in)
            rows(dy).sum(0) if mask[2] else None,  # (n, out) -> (out,)
        )


def rows(x: Tensor) -> Tensor:
    """All leading axes as one: (..., n) -> (samples, n)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """The rows of all samples of a jagged nested tensor, one after the other: (n, ragged, in) -> (rows, in).

    Raises:
        UserError: a nested tensor of another layout, or with rows of no sample, or with its axes exchanged.
    """
    if x.layout is not torch.jagged or x.lengths() is not None or x._ragged_idx != 1:
        raise UserError("a nested tensor must be (n, ragged, in), no holes: nested_tensor(..., layout=torch.jagged)")
    return x.values()


def nested(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (rows, out) as a jagged nested tensor (n, ragged, out), with the samples of ``like``."""
    return torch.nested.nested_tensor_from_jagged(rows, like.offsets())


def geometry(layer: nn.Conv2d) -> dict[str, Any]:
    """Fields of a layer's :class:`ConvMap`, of its attributes as they are now: anybody may set them. Padding of another
    mode than zeros, or uneven, is ``pad`` (left, right, top, bottom)."""
    same = [d * (k - 1) for d, k in zip(_pair(layer.dilation), layer.kernel_size)]  # of both sides of each axis
    words = {"same": same, "valid": (0, 0)}
    whole = words[layer.padding] if isinstance(layer.padding, str) else [2 * n for n in _pair(layer.padding)]
    sides = [side for n in reversed(whole) for side in (n // 2, n - n // 2)]
    pad = tuple(sides if layer.padding_mode == "zeros" else layer._reversed_padding_repeated_twice)
    even = layer.padding_mode == "zeros" and pad[::2] == pad[1::2]
    now = {"padding": pad[2::-2] if even else (0, 0), "pad": () if even else pad, "groups": layer.groups}
    now |= {"stride": _pair(layer.stride), "dilation": _pair(layer.dilation)}
    return now | {"told": (layer.stride, layer.padding, layer.dilation)}


@dataclass
class ConvMap(_Map):
    """y = K * x, a 2-D cross-correlation. Shapes: x (n, in, h, w), y (n, out, h', w'), K (out, in / groups, kh, kw)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    told: tuple[Any, ...] = ()  # the layer's attributes that these are made of

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        """K * x (+ bias)."""
        return F.conv2d(x, K, bias, self.stride, self.padding, self.dilation, self.groups)  # -> (n, out, h', w')

    def grad_input(self, y: Tensor, K: Tensor, like: Tensor) -> Tensor:
        """Transposed convolution of y, of the shape of ``like``."""
        return self.backward(y, like, K, [True, False, False])[0]  # (n, out, h', w') -> (n, in, h, w)

    def matmul_channels(self, y: Tensor, B: Tensor) -> Tensor:
        """B^T y at every position; B (out, mid)."""
        return (B.mT @ y.flatten(2)).unflatten(2, y.shape[2:])  # (mid, out) (n, out, h' w') -> (n, mid, h', w')

    def grad_weight(self, x: Tensor, y: Tensor, like: Tensor) -> Tensor:
        """The gradient of <y, K * x> by K, of the shape of ``like``."""
        return self.backward(y, x, like, [False, True, False])[1]  # -> (out, in / groups, kh, kw)

    def backward(self, dy: Tensor, x: Tensor, K: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """(transposed convolution of dy by K, dW, db) where ``mask`` asks for them, in one call."""
        return torch.ops.aten.convolution_backward(
            dy, x, K, [K.shape[0]], self.stride, self.padding, self.dilation, False, (0, 0), self.groups, mask
        )
