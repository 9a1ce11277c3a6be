"""Second formulations that the tests hold the package against: forward passes and autograd, no backward formula of
ours.

The oracle of a rule is the stop-gradient composition y = f(x.detach(), W, b) + [g(x, K) - g(x, K).detach()]: its value
is the layer's output, its gradients by W and b are the layer's own, and the error goes down through K alone. Slow and
plain.
"""

import copy
import math

import torch
from torch import nn

import fa

RTOL = 1e-12  # of the largest entry, in float64


def rng(seed=0):
    """A generator of the test's own."""
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    """Normal numbers that do not touch the global generator."""
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def apart(a, b):
    """Largest difference of two tensors relative to the largest entry of the second."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() if a.numel() else 0.0


def plain(layer):
    """The layer's linear map as stock PyTorch: (x, K) -> K x, bias left out, padding and its mode left to
    ``nn.Conv2d``."""
    if isinstance(layer, nn.Linear):
        return lambda x, K: nn.functional.linear(x, K)
    stock = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
        padding_mode=layer.padding_mode, bias=False,
    )  # fmt: skip
    return lambda x, K: stock._conv_forward(x, K, None)


def add_bias(layer, y):
    """y + b, b on the axis of the outputs."""
    if layer.bias is None:
        return y
    return y + (layer.bias if isinstance(layer, nn.Linear) else layer.bias[:, None, None])


def dense_B(layer):
    """PFA's fixed matrix as one (out, mid) matrix, block-diagonal where the convolution is grouped."""
    B = layer.feedback.B
    return B if B.dim() == 2 else torch.block_diag(*B)


def kernel(layer, W0):
    """The rule's kernel from its definition; ``W0`` is the weight at conversion."""
    fb, W = layer.feedback, layer.weight.detach()
    name, mask = fb.rule.name, getattr(fb, "mask", torch.ones(()).to(W))
    match name:
        case "fa" | "frozen":
            K = fb.B
        case "usf":
            out, inputs = W.shape[0] * W[0, 0].numel(), W[0].numel()
            s = {
                "init": math.sqrt(sum(w * w for w in W0.flatten().tolist()) / W0.numel()),
                "track": (torch.linalg.vector_norm(W) / math.sqrt(W.numel())).item(),
                "xavier": math.sqrt(2 / (out + inputs)),
            }.get(fb.rule.scale, fb.rule.scale)
            s = torch.tensor(s, dtype=torch.float64).to(W)
            K = torch.where(W > 0, s, torch.where(W < 0, -s, torch.zeros_like(W))) * mask
            if fb.rule.concordance < 1:
                K = torch.where(fb.s < 0, -K, K)  # the entries whose sign was drawn to be wrong
        case "frsf" | "brsf":
            K = torch.where(W > 0, fb.M.abs(), torch.where(W < 0, -fb.M.abs(), 0.0)) * mask
        case "pfa" | "pfa_o":
            K = torch.einsum("om,m...->o...", dense_B(layer), fb.R * mask)
        case _:
            K = fb.B * mask
    K = K.detach()
    return fb.rule.gain * (K * (W.square().sum() / K.square().sum()).sqrt() if fb.rule.norm == "track" else K)


def gradients(layer, x, dy, K):
    """dx, dW, db of the stop-gradient composition, by autograd through stock operations."""
    f, x, W = plain(layer), x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    b = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    y = f(x.detach(), W)
    if b is not None:
        y = y + (b if isinstance(layer, nn.Linear) else b[:, None, None])
    g = f(x, K)
    y = y + (g - g.detach())
    wanted = {"x": x, "W": W} | ({} if b is None else {"b": b})
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy)))


def drawn_path(layer, x, dy):
    """PFA as it is drawn: the error goes to a population through B, from there to the layer below through R.

    Two stock layers in the forward direction, R first and then B; autograd walks them backwards. Returns what arrives
    below, and the
    gradient of R: population activity times presynaptic activity. Entries of R that a mask removes carry no error, but
        learn.
    """
    fb, f = layer.feedback, plain(layer)
    x, mask = x.detach().clone().requires_grad_(), getattr(fb, "mask", torch.ones((), dtype=x.dtype))
    R = (fb.R.detach() * mask).requires_grad_()
    population = f(x, R)  # as many channels as R has rows
    B = dense_B(layer).detach()
    y = population @ B.T if isinstance(layer, nn.Linear) else torch.einsum("om,...mhw->...ohw", B, population)
    return torch.autograd.grad(y, (x, R), dy)


def objective(layer, x):
    """p2's sum of primitives, as a function of B only: 'mean' over the batch and, where asked for, over positions."""
    fb, f, rule = layer.feedback, plain(layer), layer.feedback.rule
    W, B = layer.weight.detach(), fb.B.detach().clone().requires_grad_()
    y = f(x, W).detach()
    if isinstance(layer, nn.Linear):
        count = y.numel() // y.shape[-1]
    else:
        count = y.shape[0] * (y[0, 0].numel() if rule.positions == "mean" else 1)
    below = x.detach().clone().requires_grad_()
    back = torch.autograd.grad(f(below, B), below, y, create_graph=True)[0]  # B^T W x
    value = (
        rule.decay * (W.square().sum() + B.square().sum())
        - rule.amp * (x * back).sum() / count
        + rule.null * back.square().sum() / count
        + rule.sparse * (y.square().sum() + f(x, B).square().sum()) / count
        - rule.self_ * (B * W).sum()
    )
    return torch.autograd.grad(value, B)[0]


def under_rule(layer, x, dy):
    """What the converted layer itself gives: x, W, b and every learned feedback tensor."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    layer(x).backward(dy)
    fb = dict(layer.feedback.named_parameters())
    got = {"x": x.grad, "W": layer.weight.grad} | ({} if layer.bias is None else {"b": layer.bias.grad})
    return {k: v.clone() for k, v in got.items()} | {k: p.grad.clone() for k, p in fb.items()}


def check(layer, x, rule, options, seed=1):
    """Convert a layer and hold everything it computes against the oracle; returns the worst relative error."""
    W0 = layer.weight.detach().clone()
    fa.convert(layer, rule, seed=seed, **options)
    with torch.no_grad():
        layer.weight.add_(
            randn(*W0.shape, seed=7) * W0.abs().mean() / 2
        )  # a weight that is no longer what it was at conversion
    stock = add_bias(layer, plain(layer)(x, layer.weight)).detach()
    dy = randn(*stock.shape, seed=11)
    got = under_rule(layer, x, dy)
    K = kernel(layer, W0)
    want = gradients(layer, x, dy, K)
    name = layer.feedback.rule.name
    if name in ("pfa", "pfa_o"):
        below, want["R"] = drawn_path(layer, x, dy)
        if layer.feedback.rule.norm == "fixed":
            want["x"] = layer.feedback.rule.gain * below
    elif name == "kp":
        want["B"] = want["W"]
    elif layer.feedback.rule.learned:
        want["B"] = objective(layer, x)
    assert got.keys() == want.keys()
    errors = {k: apart(got[k], want[k]) for k in want}
    errors["y"] = apart(layer(x).detach(), stock)
    errors["kernel"] = apart(fa.feedback_weight(layer), K)
    return errors


def forward_parameters(net):
    """Parameters that are not feedback, by name."""
    return {n: p for n, p in net.named_parameters() if ".feedback." not in n and not n.startswith("feedback.")}


def grads(net, x, y, loss=nn.functional.cross_entropy):
    """Gradient of every forward parameter, by name."""
    net.zero_grad()
    loss(net(x), y).backward()
    return {n: p.grad.clone() for n, p in forward_parameters(net).items() if p.grad is not None}


def cosine(a, b):
    """Cosine of the angle between two tensors, in float64."""
    a, b = a.double().flatten(), b.double().flatten()
    return (a @ b / (a.norm() * b.norm())).item()


class Block(nn.Module):
    """A small pre-activation-free residual block with batch norm."""

    def __init__(self, inputs, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(inputs, out, 1, stride) if stride > 1 or inputs != out else nn.Identity()

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """Two blocks, 3 -> 8 -> 16 channels, and a linear read-out of 10."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1 = Block(8, 8, 1)
        self.block2 = Block(8, 16, 2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.block2(self.block1(torch.relu(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def fixed_weights(net, seed=0):
    """Weights that depend on nothing but the seed: a few times larger than torch's own, so that no layer is silent."""
    gen = rng(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() > 1:
                std = (2 / p[0].numel()) ** 0.5
                p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * std)
            elif "bn" not in name:
                p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.1)
    return net


def resnet(dtype=torch.float64, seed=0):
    """The residual network and a batch for it."""
    net = fixed_weights(ResNet(), seed).to(dtype)
    return net, randn(8, 3, 8, 8, seed=5, dtype=dtype), torch.arange(8) % 10


def mlp(*widths, dtype=torch.float64, seed=0):
    """A ReLU network of these widths and a batch of 16 for it."""
    parts = [m for i, o in zip(widths, widths[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
    net = fixed_weights(nn.Sequential(*parts[:-1]), seed).to(dtype)
    return net, randn(16, widths[0], seed=5, dtype=dtype), torch.arange(16) % widths[-1]


def twin(net):
    """A copy under plain backprop."""
    return fa.convert(copy.deepcopy(net), "bp")
