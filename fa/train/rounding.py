"""bfloat16 on a CPU that has no arithmetic for it.

There PyTorch's convolutions and matrix products of bfloat16 take five to twenty times as long as those of float32. The
same products are made here in float32 of the same operands, and each result is rounded once. A CPU that has the
arithmetic does so too: it multiplies such operands exactly and sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    op.default for op in (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
}


class Rounded(TorchDispatchMode):
    """Within it, products of bfloat16 are made in float32 and rounded once; all else stays as it is."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in args):
            return func(*args, **kwargs)
        out = func(*[a.float() if isinstance(a, Tensor) else a for a in args], **kwargs)
        return tuple(o if o is None else o.bfloat16() for o in out) if isinstance(out, tuple) else out.bfloat16()


def lacking() -> bool:
    """Whether PyTorch has no bfloat16 arithmetic for this CPU: on x86 it wants AVX-512."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def arithmetic(device: torch.device, precision: str, compiled: bool) -> AbstractContextManager[Any]:
    """What surrounds the passes of a step: :class:`Rounded` for eager steps in bfloat16 on a CPU that lacks it."""
    wanted = precision == "bfloat16" and device.type == "cpu" and not compiled
    return Rounded() if wanted and lacking() else nullcontext()
