"""The papers' networks: sizes, names, and the shortcut without parameters."""

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fa import UserError, models
from fa.train.network import initial_
from oracles import randn, rng


def size(net):
    return sum(p.numel() for p in net.parameters())


def counts_in_the_docstring():
    """Every "``builder(argument)`` number" of the module's head."""
    return [
        (name, int(n), int(count.replace(",", "")))
        for name, n, count in re.findall(r"``(\w+)\((\d+)\)`` ([\d,]+\d)", models.__doc__)
    ]


@pytest.mark.parametrize("name, argument, count", counts_in_the_docstring(), ids=str)
def test_parameter_counts_are_those_of_the_docstring(name, argument, count):
    assert size(getattr(models, name)(argument)) == count


def test_the_docstring_counts_all_networks():
    assert {(name, n) for name, n, _ in counts_in_the_docstring()} == {("MLP", 784)} | {
        ("ResNet", n) for n in (20, 32, 56, 110)
    } | {("PreAct", n) for n in (50, 101, 152)}


@pytest.mark.parametrize("depth", [8, 20, 32])
def test_parameter_count_from_the_layer_table(depth):
    """He et al. 4.2: 3 -> 16 channels, then 2 n convolutions of each of 16, 32, 64 channels, and a read-out; no
    shortcut has any."""
    n = (depth - 2) // 6
    channels = [3, 16] + [w for w in (16, 32, 64) for _ in range(2 * n)]
    convs = sum(9 * a * b + 2 * b for a, b in zip(channels, channels[1:]))  # a kernel, and batch norm's two
    assert size(models.ResNet(depth)) == convs + 64 * 10 + 10
    assert sum(isinstance(m, nn.Conv2d) for m in models.ResNet(depth).modules()) == depth - 1


def shortcut(x, stride, outputs):
    """Option A, pixel by pixel: every ``stride``-th pixel, channels in the middle of the new ones."""
    n, inputs, h, w = x.shape
    out = torch.zeros(n, outputs, -(-h // stride), -(-w // stride), dtype=x.dtype)
    first = (outputs - inputs) // 2
    for c in range(inputs):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                out[:, first + c, i, j] = x[:, c, i * stride, j * stride]
    return out


@pytest.mark.parametrize("inputs, outputs, stride", [(4, 4, 1), (4, 8, 2), (3, 8, 2), (2, 5, 1)])
@pytest.mark.parametrize("height, width", [(6, 8), (7, 5)])
def test_shortcut_of_a_block(inputs, outputs, stride, height, width):
    block = models.BasicBlock(inputs, outputs, stride).double()
    x = randn(2, inputs, height, width, seed=1)
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
    assert torch.equal(block(x), shortcut(x, stride, outputs).relu())  # nothing but the shortcut is left
    with torch.no_grad():
        block.bn2.weight.fill_(1.3)
    y = F.batch_norm(F.conv2d(x, block.conv1.weight, None, stride, 1), None, None, training=True).relu()
    y = 1.3 * F.batch_norm(F.conv2d(y, block.conv2.weight, None, 1, 1), None, None, training=True)
    assert (block(x) - (y + shortcut(x, stride, outputs)).relu()).abs().max() < 1e-12


def test_layer_names_and_shapes():
    net = models.ResNet(20)
    layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert layers == ["conv1"] + [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)] + [
        "fc"
    ]
    widths = [net.get_submodule(n).weight.shape[0] for n in layers]
    assert widths == [16] * 7 + [32] * 6 + [64] * 6 + [10]
    strides = {n: m.stride[0] for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)}
    assert strides == {"layer2.0.conv1": 2, "layer3.0.conv1": 2}
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    seen = {}
    for stage in (1, 2, 3):
        net.get_submodule(f"layer{stage}").register_forward_hook(
            lambda m, i, o, s=stage: seen.update({s: tuple(o.shape[1:])})
        )
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert seen == {1: (16, 32, 32), 2: (32, 16, 16), 3: (64, 8, 8)}
    assert models.ResNet(8, classes=7, inputs=1)(torch.zeros(3, 1, 8, 8)).shape == (3, 7)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 6, 5)])
def test_mlp_by_hand(hidden):
    net = models.MLP(12, hidden, 4).double()
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    assert names == [f"fc{i + 1}" for i in range(len(hidden))] + ["fc"]
    x = randn(5, 3, 2, 2, seed=1)
    y = x.reshape(5, 12)
    for name in names:
        layer = net.get_submodule(name)
        y = y @ layer.weight.T + layer.bias
        y = y.clamp_min(0) if name != "fc" else y
    assert (net(x) - y).abs().max() < 1e-14


def test_build():
    assert size(models.build("mlp", (1, 28, 28), 10)) == size(models.MLP(784))
    assert models.build("mlp", (1, 8, 8), 5, hidden=(3,))(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert models.build("resnet20", (1, 8, 8), 5)(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("padding, side", [("valid", 24), ("same", 8)])
def test_architecture_1_by_hand(padding, side):
    """ReLU before pooling, as the source writes it; after pooling, as here, it is the same function."""
    net = models.Arch1((3, side, side), 10, padding).double()
    x = randn(5, 3, side, side, seed=1)
    y = x
    for conv in (net.conv1, net.conv2):
        y = F.max_pool2d(F.conv2d(y, conv.weight, conv.bias, padding=2 * (padding == "same")).clamp_min(0), 2, 2)
    assert y.shape[2:] == ((3, 3) if padding == "valid" else (2, 2))
    y = y.reshape(5, -1)
    for name in ("fc1", "fc2", "fc"):
        layer = net.get_submodule(name)
        y = y @ layer.weight.T + layer.bias
        y = y.clamp_min(0) if name != "fc" else y
    assert (net(x) - y).abs().max() < 1e-13
    assert size(models.build("arch1", (3, 24, 24), 10)) == 404_746 and "404,746" in models.__doc__
    assert size(models.build("lenet", (1, 28, 28), 10)) == 61_706 and "61,706" in models.__doc__
    assert models.build("lenet", (3, 32, 32), 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert models.build("arch1-same", (1, 8, 8), 7)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(UserError, match="arch1 takes images of 16x16 and more, not 8x8; arch1-same takes 8x8"):
        models.build("arch1", (1, 8, 8), 10)


def test_pytorchs_initial_weights_are_those_of_its_layers():
    net, own = models.Arch1(), models.Arch1()
    initial_(net, "torch", torch.Generator().manual_seed(0))
    for (name, p), q in zip(net.named_parameters(), own.parameters()):
        bound = q.abs().max().item()
        assert p.abs().max().item() == pytest.approx(bound, rel=0.06 if p.numel() > 100 else 0.6), name
        assert abs(p.mean().item()) < 4 * bound / (3 * p.numel()) ** 0.5, name
    again = initial_(models.Arch1(), "torch", torch.Generator().manual_seed(0))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters()))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 8), (2, 7, 6)], ids=str)
def test_a_stack_without_weight_sharing_is_the_stack_where_all_places_have_one_kernel(shape):
    shared, local = (models.build(f"plain3{kind}", shape, 7).double() for kind in ("", "-local"))
    with torch.no_grad():
        for name in shared.names:
            conv, own = shared.get_submodule(name), local.get_submodule(name)
            own.weight.copy_(conv.weight.flatten(1).repeat(own.groups, 1)[..., None, None])
            own.bias.copy_(conv.bias.repeat(own.groups))
    local.fc.load_state_dict(shared.fc.state_dict())
    x = randn(5, *shape, seed=2)
    assert (local(x) - shared(x)).abs().max() < 1e-14
    for net in (shared, local):
        F.cross_entropy(net(x), torch.arange(5)).backward()
    own, conv = local.conv2.weight.grad, shared.conv2.weight.grad  # (places * 16, 9 * 16, 1, 1), (16, 16, 3, 3)
    assert (own.view(-1, *conv.flatten(1).shape).sum(0) - conv.flatten(1)).abs().max() < 1e-15
    assert own.view(-1, 16, 144).std(0).median() > 0  # every place has a gradient of its own


def test_plain_stacks():
    net = models.build("plain10-bn", (3, 16, 16), 10)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 10 and sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 10
    assert size(models.build("plain2", (3, 16, 16), 10)) == 28 * 16 + 145 * 16 + 257 * 10
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    y = F.relu(F.conv2d(x, net.conv1.weight, net.conv1.bias, stride=2, padding=1))
    assert y.shape == (2, 16, 8, 8) and net(x).shape == (2, 10)
    for name in ("plain", "plain0", "plain-bn", "plain100", "plain4-BN", "plain4-local-bn"):
        with pytest.raises(UserError, match="unknown model"):
            models.build(name, (3, 16, 16), 10)


def test_he_start_keeps_the_size_of_activity():
    net = models.build("plain10", (3, 32, 32), 10)
    initial_(net, "he", rng(1))
    assert net.conv5.weight.std().item() == pytest.approx((2 / 144) ** 0.5, rel=0.05) and not net.conv5.bias.any()
    x, sizes = randn(64, 3, 32, 32, dtype=torch.float32), []
    for name in net.names:
        x = net.get_submodule(name)(x)
        sizes.append(x.std().item())
        x = x.relu()
    assert 0.4 < sizes[-1] / sizes[1] < 2.5


def test_resnet18_is_torchvision_s() -> None:
    """p3's network for ImageNet: 21 layers with its three widening shortcuts, and the published number of
    parameters."""
    pytest.importorskip("torchvision")
    net = models.build("resnet18", (3, 224, 224), 1000)
    assert size(net) == 11_689_512 and "11,689,512" in models.__doc__
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules()) == 21
    assert models.build("resnet18", (3, 32, 32), 20)(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    for name in ("resnet18", "resnet50"):
        with pytest.raises(UserError, match=f"{name} takes RGB images .*not .1, "):
            models.build(name, (1, 8, 8), 10)


def test_resnet18_needs_torchvision(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UserError, match="pip install torchvision"):
        models.build("resnet18", (3, 32, 32), 20)


BOTTLENECKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # blocks of each stage, He et al. 2016


def bottleneck_parameters(depth: int, preactivation: bool, classes: int = 1000) -> int:
    """A stem of 7x7; blocks of kernels 1x1 (a -> w), 3x3 (w -> w) and 1x1 (w -> 4 w), of which the first of a stage has
    a 1x1 shortcut (a -> 4 w); two parameters of batch norm a channel: after every convolution, shortcuts included, or
    before every one of a block (a, w, w) and once before the output; a read-out of 2,048 units with its bias."""
    convolutions, norms, a = 49 * 3 * 64, 0 if preactivation else 2 * 64, 64
    for w, blocks in zip((64, 128, 256, 512), BOTTLENECKS[depth]):
        for block in range(blocks):
            convolutions += a * w + 9 * w * w + 4 * w * w + (block == 0) * 4 * a * w
            norms += 2 * (a + w + w) if preactivation else 2 * (w + w + 4 * w + (block == 0) * 4 * w)
            a = 4 * w
    return convolutions + norms + 2 * a * preactivation + a * classes + classes


@pytest.mark.parametrize("name, count", [
    ("resnet50", 25_557_032), ("resnet50v2", 25_549_352), ("resnet101v2", 44_541_480), ("resnet152v2", 60_185_128),
])  # fmt: skip
def test_parameters_of_the_networks_for_photographs(name, count):
    """torchvision publishes 25,557,032 for ResNet-50, and for its 101 layers 44,549,160, which the formula gives too;
    the others are the formula's."""
    pytest.importorskip("torchvision")
    depth, preactivation = int(name[6:].removesuffix("v2")), name.endswith("v2")
    with torch.device("meta"):
        net = models.build(name, (3, 224, 224), 1000)
    assert size(net) == count == bottleneck_parameters(depth, preactivation)
    assert f"{count:,}" in models.__doc__ and bottleneck_parameters(101, False) == 44_549_160
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())
    assert layers == depth + 4  # and four shortcuts
    assert not models.is_cifar_resnet(name) and models.is_cifar_resnet("resnet56")


@pytest.mark.parametrize("stride, first", [(1, False), (1, True), (2, True)])
def test_a_pre_activation_block_by_hand(stride, first):
    """Normalise and rectify, then convolve, three times; the shortcut sees the rectified input, or is the identity."""
    a, w = (6, 3) if first else (12, 3)
    block = models.PreActBlock(a, w, stride).double()
    x = randn(4, a, 6, 6, seed=1)
    y, skip, weights = x, x, [(block.conv1, 1, 0), (block.conv2, stride, 1), (block.conv3, 1, 0)]
    for i, (conv, step, padding) in enumerate(weights):
        y = (
            (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        ).relu()
        skip = F.conv2d(y, block.shortcut.weight, None, stride) if first and i == 0 else skip
        y = F.conv2d(y, conv.weight, None, step, padding)
    assert (block(x) - (skip + y)).abs().max() < 1e-12
    assert {m.momentum for m in block.modules() if isinstance(m, nn.BatchNorm2d)} == {0.003}  # keeps .997


def test_the_pre_activation_network_ends_in_norm_and_relu():
    net = models.PreAct(50, classes=7).eval()
    seen = {}
    net.bn.register_forward_hook(lambda m, i, o: seen.update(end=o))
    net.layer1.register_forward_hook(lambda m, i, o: seen.update(stage=tuple(o.shape)))
    out = net(torch.zeros(2, 3, 64, 64))
    assert out.shape == (2, 7) and seen["stage"] == (2, 256, 16, 16) and seen["end"].shape == (2, 2048, 2, 2)
    assert torch.allclose(out, net.fc(seen["end"].relu().mean((2, 3))))


@pytest.mark.parametrize("depth", [2, 18, 21, 0, -4])
def test_a_depth_that_no_cifar_resnet_has_is_refused(depth):
    with pytest.raises(UserError, match=f"resnet{depth}.*6 n"):
        models.ResNet(depth)


@pytest.mark.parametrize("name", ["lenet5x", "resnet", "resnet-20", "MLP", ""])
def test_an_unknown_name_names_the_known(name):
    with pytest.raises(UserError, match="mlp, lenet, arch1, arch1-same, resnet20"):
        models.build(name, (3, 8, 8), 10)


def test_xavier_start():
    net = nn.Sequential(
        nn.Conv2d(30, 50, 3), nn.Conv2d(40, 60, 3, groups=2), nn.Linear(300, 200, bias=False), nn.BatchNorm2d(4)
    )
    initial_(net, "xavier", rng(1))
    for layer, (fan_in, fan_out) in zip(net, ((270, 450), (180, 540), (300, 200))):
        std = (2 / (fan_in + fan_out)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert layer.weight.abs().max().item() == pytest.approx(std * 3**0.5, rel=1e-2)  # uniform
        assert layer.bias is None or not layer.bias.any()
    again = initial_(nn.Sequential(nn.Conv2d(30, 50, 3).double()), "xavier", rng(1))
    assert torch.equal(again[0].weight.float(), net[0].weight)  # of any dtype
    assert not torch.equal(initial_(nn.Conv2d(30, 50, 3), "xavier", rng(2)).weight, net[0].weight)


def test_images_of_another_number_of_channels_are_refused():
    for channels in (1, 2, 4, 16):
        with pytest.raises(RuntimeError, match="channels"):
            models.ResNet(8)(torch.randn(2, channels, 16, 16))
