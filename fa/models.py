"""The papers' networks, as plain PyTorch: no rule is mentioned here, ``fa.convert`` puts one on.

Parameter counts, asserted by the tests: ``mlp(784)`` 669,706 (p3's MNIST network, authors' ``ffn2``); ``resnet(20)`` 269,722,
``resnet(32)`` 464,154, ``resnet(56)`` 853,018, ``resnet(110)`` 1,727,962 for ten classes (He et al. 2016, section 4.2);
``build("resnet18", ...)``, torchvision's, 11,689,512 for a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.errors import UserError
from fa.rules import fans, uniform


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


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A): every second pixel, zeros for the new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, runs: int = 1) -> None:
        super().__init__()
        self.lacking = lacking(inputs, outputs, runs)
        self.conv1 = nn.Conv2d(
            (inputs + self.lacking) * runs, outputs * runs, 3, stride, padding=1, groups=runs, bias=False
        )
        self.bn1 = nn.BatchNorm2d(outputs * runs)
        self.conv2 = nn.Conv2d(outputs * runs, outputs * runs, 3, padding=1, groups=runs, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs * runs)
        self.stride, self.new, self.runs = stride, outputs - inputs, runs

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, inputs, h, w) -> (n, outputs, h / stride, w / stride), each times ``runs`` channels."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(widen(x, 0, self.lacking, self.runs))))))
        if self.new:
            x = widen(x[:, :, :: self.stride, :: self.stride], self.new // 2, self.new - self.new // 2, self.runs)
        return torch.relu(x + y)


def widen(x: Tensor, before: int, after: int, runs: int) -> Tensor:
    """Each run's part of the channels with so many channels of zeros before and after it."""
    if not before and not after:
        return x
    parts = [F.pad(part, (0, 0, 0, 0, before, after)) for part in x.chunk(runs, 1)]
    return parts[0] if runs == 1 else torch.cat(parts, 1)


def lacking(inputs: int, outputs: int, runs: int) -> int:
    """Inputs that each of several runs' convolutions gets, so that it has as many as outputs, for cuDNN is slow at other groups. They are
    zeros, so that their weights, which start as zeros, stay zeros."""
    return 0 if runs == 1 else max(outputs - inputs, 0)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6 n + 2 layers with option-A shortcuts; p3's network for CIFAR-10 is ``resnet(20)``.

    Args:
        runs: so many networks side by side, in groups of channels that do not meet (default 1); see :mod:`fa.train.stack`.

    Source: He et al. 2016, section 4.2; p3 (authors' code).
    """

    def __init__(self, depth: int, classes: int, inputs: int = 3, runs: int = 1) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"resnet{depth}: a CIFAR ResNet has 6 n + 2 layers: 20, 32, 44, 56, 110, ...")
        self.lacking, self.runs = lacking(inputs, 16, runs), runs
        self.conv1 = nn.Conv2d((inputs + self.lacking) * runs, 16 * runs, 3, padding=1, groups=runs, bias=False)
        self.bn1 = nn.BatchNorm2d(16 * runs)
        widths, blocks = (16, 16, 32, 64), (depth - 2) // 6
        for stage in (1, 2, 3):
            self.add_module(f"layer{stage}", nn.Sequential(*(
                BasicBlock(widths[stage - (i == 0)], widths[stage], 1 if i or stage == 1 else 2, runs) for i in range(blocks)
            )))  # fmt: skip
        self.fc = nn.Linear(64, classes) if runs == 1 else nn.Conv2d(64 * runs, classes * runs, 1, groups=runs)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, inputs, h, w) -> logits (n, classes), each times ``runs`` channels."""
        x = torch.relu(self.bn1(self.conv1(widen(x, 0, self.lacking, self.runs))))
        x = self.layer3(self.layer2(self.layer1(x))).mean((2, 3), keepdim=isinstance(self.fc, nn.Conv2d))
        return self.fc(x).flatten(1)


def resnet(depth: int = 20, classes: int = 10, inputs: int = 3, runs: int = 1) -> ResNet:
    """The CIFAR ResNet of that depth: 20, 32, 44, 56, 110."""
    return ResNet(depth, classes, inputs, runs)


def is_cifar_resnet(name: str) -> bool:
    """Whether a name of :func:`build` is that of a CIFAR ResNet."""
    return name.startswith("resnet") and name[6:].isdigit() and name != "resnet18"


def resnet18(classes: int = 1000) -> nn.Module:
    """torchvision's ResNet-18, p3's network for ImageNet: 7x7 convolution of stride 2, 8 blocks, 1x1 convolutions where a shortcut widens.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        from torchvision.models import resnet18 as theirs
    except ImportError as error:
        raise UserError("resnet18 is torchvision's, which is not installed: pip install torchvision") from error
    return theirs(num_classes=classes)


def build(
    name: str, shape: Sequence[int], classes: int, hidden: Sequence[int] = (512, 512), runs: int = 1
) -> nn.Module:
    """The network of that name for images of ``shape`` (channels, height, width); ``runs`` of them side by side, if a CIFAR ResNet.

    Raises:
        UserError: unknown name, or resnet18 for images that are not RGB.
    """
    if name == "resnet18":
        if shape[0] != 3:
            raise UserError(f"resnet18 takes RGB images, not images of {shape[0]} channels; resnet20 takes any")
        return resnet18(classes)
    if name == "mlp":
        return mlp(torch.Size(shape).numel(), hidden, classes)
    if is_cifar_resnet(name):
        return resnet(int(name[6:]), classes, shape[0], runs)
    raise UserError(f"unknown model {name!r}; known models: mlp, resnet20, resnet32, resnet56, resnet110, resnet18")


@torch.no_grad()
def xavier_(net: nn.Module, gen: torch.Generator) -> nn.Module:
    """Xavier-uniform weights and zero biases for every linear and convolutional layer, in place, drawn from ``gen``.

    Source: p3 (authors' option ``init: xavier``, used for every rule). Entries are drawn in float64, so that networks of
    any dtype start alike.
    """
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            m.weight.copy_(uniform(tuple(m.weight.shape), (2 / sum(fans(m.weight))) ** 0.5, m.weight, gen))
            if m.bias is not None:
                m.bias.zero_()
    return net
