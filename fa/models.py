"""The papers' networks, as plain PyTorch: no rule is mentioned here, ``fa.convert`` puts one on.

Parameter counts are asserted by the tests: ``mlp(784, (512, 512), 10)`` has 669,706 (p3's MNIST network, authors' ``ffn2``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import UserError
from .rules import fans, uniform


class MLP(nn.Module):
    """Fully connected ReLU network with biases; layers ``fc1``, ``fc2``, ..., and ``fc`` at the output, as p3 names them."""

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        widths = (inputs, *hidden)
        self.hidden = [f"fc{i}" for i in range(1, len(widths))]
        for name, fan_in, fan_out in zip(self.hidden, widths, widths[1:]):
            self.add_module(name, nn.Linear(fan_in, fan_out))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, ...) with ``inputs`` entries a sample -> logits (n, classes)."""
        x = x.flatten(1)
        for name in self.hidden:
            x = torch.relu(getattr(self, name)(x))
        return self.fc(x)


def mlp(inputs: int, hidden: Sequence[int] = (512, 512), classes: int = 10) -> MLP:
    """p3's MNIST network for ``inputs = 784`` (default widths: the paper's)."""
    return MLP(inputs, hidden, classes)


def build(name: str, shape: Sequence[int], classes: int, hidden: Sequence[int] = (512, 512)) -> nn.Module:
    """The network of that name for images of ``shape`` (channels, height, width).

    Raises:
        UserError: unknown name.
    """
    if name != "mlp":
        raise UserError(f"unknown model {name!r}; known models: mlp")
    return mlp(torch.Size(shape).numel(), hidden, classes)


@torch.no_grad()
def xavier_(net: nn.Module, gen: torch.Generator) -> nn.Module:
    """Xavier-uniform weights and zero biases for every linear and convolutional layer, in place, drawn from ``gen``.

    Source: p3 section 1.3 (authors' option ``init: xavier``, used for every rule). Entries are drawn in float64, so that networks of
    any dtype start alike.
    """
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            m.weight.copy_(uniform(tuple(m.weight.shape), (2 / sum(fans(m.weight))) ** 0.5, m.weight, gen))
            if m.bias is not None:
                m.bias.zero_()
    return net
