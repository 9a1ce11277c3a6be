"""The papers' networks, as plain PyTorch: no rule is mentioned here, ``fa.convert`` puts one on.

Parameter counts, asserted by the tests: ``MLP(784)`` 669,706 (p3's MNIST network, authors' ``ffn2``);
``ResNet(20)`` 269,722, ``ResNet(32)`` 464,154, ``ResNet(56)`` 853,018, ``ResNet(110)`` 1,727,962 for ten classes (He et
al. 2016, section 4.2); ``Arch1()`` 404,746 (p1's Architecture 1); ``LeNet()`` 61,706; for a thousand classes
torchvision's ``build("resnet18", ...)`` 11,689,512 and resnet50 25,557,032, and p2's ``PreAct(50)`` 25,549,352,
``PreAct(101)`` 44,541,480 and ``PreAct(152)`` 60,185,128.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.errors import UserError, unknown


class MLP(nn.Module):
    """Fully connected ReLU network with biases; layers ``fc1``, ``fc2``, ..., and ``fc`` at the output, as p3 names
    them; p3's MNIST network for ``inputs = 784`` (default widths: the paper's)."""

    def __init__(self, inputs: int, hidden: Sequence[int] = (512, 512), classes: int = 10) -> None:
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


class Shortcut(nn.Module):
    """Option A, without parameters: every ``stride``-th pixel, and ``new`` channels of zeros, half of them in front."""

    def __init__(self, stride: int, new: int) -> None:
        super().__init__()
        self.stride, self.new = stride, new

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, inputs, h, w) -> (n, inputs + new, h / stride, w / stride)."""
        front = self.new // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.new - front))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters, the identity where the number of channels stays."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = Shortcut(stride, outputs - inputs) if outputs > inputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + y)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6 n + 2 layers with option-A shortcuts; p3's network for CIFAR-10 is ``ResNet(20)``.

    Source: He et al. 2016, section 4.2; p3 (authors' code).
    """

    def __init__(self, depth: int = 20, classes: int = 10, inputs: int = 3) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"resnet{depth}: a CIFAR ResNet has 6 n + 2 layers: 20, 32, 44, 56, 110, ...")
        self.conv1, self.bn1 = nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths, blocks = (16, 16, 32, 64), (depth - 2) // 6
        for stage in (1, 2, 3):
            self.add_module(f"layer{stage}", nn.Sequential(*(
                BasicBlock(widths[stage - (i == 0)], widths[stage], 1 if i or stage == 1 else 2) for i in range(blocks)
            )))  # fmt: skip
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, inputs, h, w) -> logits (n, classes)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class PreActBlock(nn.Module):
    """Batch normalisation and ReLU before each of three convolutions, 1x1, 3x3 and 1x1, and a shortcut around them: the
    identity, or where the number of channels changes a 1x1 convolution of the first ReLU's output."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = _bn(inputs), nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2, self.conv2 = _bn(width), nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3, self.conv3 = _bn(width), nn.Conv2d(width, 4 * width, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False) if inputs != 4 * width else None

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, inputs, h, w) -> (n, 4 * width, h / stride, w / stride)."""
        y = torch.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        return skip + self.conv3(torch.relu(self.bn3(self.conv2(torch.relu(self.bn2(self.conv1(y)))))))


def _bn(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=0.003)  # p2's code keeps .997 of the running statistics


class PreAct(nn.Module):
    """The pre-activation ResNet of bottleneck blocks for photographs; p2's ``resnet50v2``, ``101v2`` and ``152v2``.

    Source: He et al. 2016b (arXiv 1603.05027), with the widths of ImageNet; p2 (authors' code, resnet_model_v2).
    """

    def __init__(self, depth: int = 50, classes: int = 1000, inputs: int = 3) -> None:
        super().__init__()
        blocks = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
        self.conv1, self.pool = nn.Conv2d(inputs, 64, 7, 2, padding=3, bias=False), nn.MaxPool2d(3, 2, padding=1)
        count = width = 64
        for stage, n in enumerate(blocks, 1):
            self.add_module(f"layer{stage}", nn.Sequential(*(
                PreActBlock(c, width, 1 if i else min(stage, 2)) for i, c in enumerate([count] + [4 * width] * (n - 1))
            )))  # fmt: skip
            count, width = 4 * width, 2 * width
        self.bn, self.fc = _bn(count), nn.Linear(count, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, inputs, h, w) -> logits (n, classes)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.pool(self.conv1(x))))))
        return self.fc(torch.relu(self.bn(x)).mean((2, 3)))


class Arch1(nn.Module):
    """p1's Architecture 1: two 5x5 convolutions of 64 channels, each with max-pooling by 2 and ReLU, and layers of 384,
    192 and ``classes`` units; no normalisation. Weights and maps are channels-last, a fifth faster on a CPU.

    Args:
        shape: channels, height, width of an image (default: the 24x24 crops of CIFAR-10).
        classes: number of classes.
        padding: of the convolutions, ``"valid"`` (default; Lance & Kieu's) or ``"same"`` (which takes images of 8x8).

    Source: Lance & Kieu 2026 (arXiv 2605.08564), who adopt it from p1. p1's padding, pooling and initialisation are not
    known; the TensorFlow tutorial with these widths pads.
    """

    def __init__(self, shape: Sequence[int] = (3, 24, 24), classes: int = 10, padding: str = "valid") -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(c, 64, 5, padding=padding) for c in (shape[0], 64))
        lost = 4 if padding == "valid" else 0  # pixels that a convolution takes off each axis
        height, width = (((n - lost) // 2 - lost) // 2 for n in shape[1:])
        if min(height, width) < 1:
            raise UserError(f"arch1 takes images of 16x16 and more, not {shape[1]}x{shape[2]}; arch1-same takes 8x8")
        self.fc1, self.fc2, self.fc = nn.Linear(64 * height * width, 384), nn.Linear(384, 192), nn.Linear(192, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, channels, height, width) -> logits (n, classes)."""
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in (self.conv1, self.conv2):
            x = torch.relu(F.max_pool2d(conv(x), 2))  # as pooling after ReLU, on a quarter of the units
        return self.fc(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


class LeNet(nn.Module):
    """LeNet-5 with ReLU: 5x5 convolutions of 6, 16 and 120 channels, max-pooling by 2 after the first two, then layers
    of 84 and ``classes`` units. Zeros around an image of ``shape`` (channels, height, width) make it 32x32.

    Source: BioTorch (arXiv 2108.13446), authors' file ``models/le_net.py``; the border of zeros is our reading.
    """

    def __init__(self, shape: Sequence[int] = (1, 28, 28), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 6, 5, padding=((32 - shape[1]) // 2, (32 - shape[2]) // 2))
        self.conv2, self.conv3 = nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)
        self.fc1, self.fc = nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, channels, height, width) -> logits (n, classes)."""
        for conv in (self.conv1, self.conv2):
            x = torch.relu(F.max_pool2d(conv(x), 2))
        return self.fc(torch.relu(self.fc1(torch.relu(self.conv3(x)).flatten(1))))


class Plain(nn.Module):
    """3x3 convolutions of 16 channels with ReLU, the first of stride 2; average-pooling by 2; ``classes`` linear units.

    Args:
        convolutions: how many, ``conv1``, ``conv2``, ...
        shape: channels, height, width of an image.
        classes: number of classes.
        kind: "bn": batch normalisation before every ReLU. "local": every place of a map has a kernel of its own. The
            patch around it is then a group of a 1x1 convolution, an ordinary layer to a rule. "": neither.
    """

    def __init__(self, convolutions: int, shape: Sequence[int], classes: int = 10, kind: str = "") -> None:
        super().__init__()
        self.names, self.local = [f"conv{i}" for i in range(1, convolutions + 1)], kind == "local"
        inputs, (height, width) = shape[0], ((side + 1) // 2 for side in shape[1:])
        for name in self.names:
            places, stride = height * width, 2 if name == "conv1" else 1
            own = nn.Conv2d(places * 9 * inputs, places * 16, 1, groups=places) if self.local else None
            self.add_module(name, own or nn.Conv2d(inputs, 16, 3, stride, padding=1))
            self.add_module(f"norm_{name}", nn.BatchNorm2d(16) if kind == "bn" else nn.Identity())
            inputs = 16
        self.fc = nn.Linear(16 * (height // 2) * (width // 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, channels, height, width) -> logits (n, classes)."""
        for name in self.names:
            conv, stride = getattr(self, name), 2 if name == "conv1" else 1
            if self.local:
                size = [(side + stride - 1) // stride for side in x.shape[2:]]
                patches = F.unfold(x, 3, padding=1, stride=stride).mT.flatten(1)  # -> (n, places * 9 inputs)
                x = conv(patches[..., None, None]).unflatten(1, (-1, 16)).squeeze((3, 4))  # -> (n, places, 16)
                x = x.mT.unflatten(2, size)  # -> (n, 16, h, w)
            else:
                x = conv(x)  # (n, inputs, h, w) -> (n, 16, h', w')
            x = torch.relu(getattr(self, f"norm_{name}")(x))
        return self.fc(F.avg_pool2d(x, 2).flatten(1))


def is_cifar_resnet(name: str) -> bool:
    """Whether :func:`build` makes a CIFAR ResNet of that name."""
    return name.startswith("resnet") and name[6:].isdigit() and name not in TORCHVISION


TORCHVISION = ("resnet18", "resnet50", "alexnet")
"""Networks for photographs; another ``resnet`` with a number is for CIFAR-10."""


def build(name: str, shape: Sequence[int], classes: int, hidden: Sequence[int] = (512, 512)) -> nn.Module:
    """The network of that name for images of ``shape`` (channels, height, width).

    Raises:
        UserError: unknown name; a network of torchvision without torchvision, or for images too small or not RGB.
    """
    if name in TORCHVISION:
        if shape[0] != 3 or min(shape[1:]) < 63 * (name == "alexnet"):
            raise UserError(f"{name} takes RGB images (alexnet: of 63x63), not {tuple(shape)}; resnet20 takes any")
        try:
            import torchvision.models as zoo
        except ImportError as error:
            raise UserError(f"{name} is torchvision's, which is not installed: pip install torchvision") from error
        return getattr(zoo, name)(num_classes=classes)  # 7x7 of stride 2, 8 or 16 blocks, 1x1 where they widen
    if name in ("resnet50v2", "resnet101v2", "resnet152v2"):
        return PreAct(int(name[6:-2]), classes, shape[0])
    if name == "mlp":
        return MLP(torch.Size(shape).numel(), hidden, classes)
    if name in ("arch1", "arch1-same"):
        return Arch1(shape, classes, "same" if name == "arch1-same" else "valid")
    if name == "lenet":
        return LeNet(shape, classes)
    if is_cifar_resnet(name):
        return ResNet(int(name[6:]), classes, shape[0])
    if plain := re.fullmatch(r"plain([1-9]\d?)(?:-(bn|local))?", name, re.ASCII):
        return Plain(int(plain[1]), shape, classes, plain[2] or "")
    known = "mlp lenet arch1 arch1-same resnet20 resnet32 resnet56 resnet110 resnet18 resnet50 resnet50v2 resnet101v2 "
    raise unknown("model", name, (known + "resnet152v2 alexnet plain4 plain4-bn").split(), more=", ...")
