"""bfloat16 on a CPU without its arithmetic: products in float32 of bfloat16 operands, rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fa
from fa.train import data, rounding
from fa.train.config import Config
from fa.train.network import build_network
from fa.train.rounding import Rounded
from fa.train.step import Stepper, make_optimizer

CONV = Config(
    "bp", 0, dataset="digits", model="resnet8", hidden="", batch=32, lr=0.05, lr_drops="", precision="bfloat16"
)


def ulp(exact: torch.Tensor) -> torch.Tensor:
    """Distance of neighbouring bfloat16 numbers at each entry: 8 significant bits."""
    return 2.0 ** (exact.abs().clamp_min(1e-30).log2().floor() - 7)


def test_a_convolution_and_its_gradients_are_exact_products_rounded_once():
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*shape, generator=g).bfloat16() for shape in ((4, 3, 7, 7), (5, 3, 3, 3), (4, 5, 7, 7)))
    found, exact = [], []
    for leaves, error, to in (((x, w), dy, found), ((x.double(), w.double()), dy.double(), exact)):
        a, k = (t.detach().requires_grad_() for t in leaves)
        with Rounded():
            y = torch.conv2d(a, k, padding=1)
            y.backward(error)
        to += [y.detach(), a.grad, k.grad]
    for got, want in zip(found, exact):
        assert got.dtype == torch.bfloat16
        # to the nearest, but where the sum in float32 falls on the other side of a tie
        assert ((got.double() - want).abs() <= 0.5001 * ulp(want)).all()


@pytest.mark.parametrize("shape", [(6, 20), (3, 4, 20)])
def test_linear_layers_are_exact_products_rounded_once(shape):
    g = torch.Generator().manual_seed(0)
    x, layer = torch.randn(*shape, generator=g), nn.Linear(20, 9)
    with Rounded(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    W, b = (p.detach().bfloat16().double() for p in layer.parameters())
    exact = x.bfloat16().double() @ W.T + b
    assert y.dtype == torch.bfloat16 and ((y.double() - exact).abs() <= 0.5001 * ulp(exact)).all()


def test_other_precisions_and_other_operations_are_left_alone():
    x, layer = (
        torch.randn(8, 3, 6, 6),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)),
    )
    for dtype in (torch.float32, torch.float64):
        net = layer.to(dtype)
        plain = net(x.to(dtype))
        with Rounded():
            assert torch.equal(net(x.to(dtype)), plain)


@pytest.mark.parametrize("rule", sorted(fa.RULES))
def test_under_every_rule_a_step_is_that_of_bfloat16(rule, monkeypatch):
    """The losses of two steps: those of PyTorch's own products of bfloat16, by much more than bfloat16's own error."""
    config, sets = replace(CONV, rule=rule), data.load("digits")
    losses = {}
    for name, lacks in {"own": False, "rounded": True}.items():
        monkeypatch.setattr(rounding, "lacking", lambda lacks=lacks: lacks)
        net = build_network(config, sets.shape, 10)
        stepper = Stepper(net, make_optimizer(net, config), config, sets.train)
        assert isinstance(stepper.arithmetic, Rounded) == lacks
        losses[name] = stepper.epoch(0, limit=3)[:, 0].clone()
    assert torch.isfinite(losses["own"]).all()
    assert (losses["own"] - losses["rounded"]).abs().max() < 0.01 * losses["own"].max()


def test_only_bfloat16_on_a_cpu_that_lacks_it_is_rounded(monkeypatch):
    monkeypatch.setattr(rounding, "lacking", lambda: True)
    cpu = torch.device("cpu")
    assert isinstance(rounding.arithmetic(cpu, "bfloat16", False), Rounded)
    for other in ((cpu, "float32", False), (torch.device("cuda"), "bfloat16", False), (cpu, "bfloat16", True)):
        assert not isinstance(rounding.arithmetic(*other), Rounded)
    monkeypatch.setattr(rounding, "lacking", lambda: False)
    assert not isinstance(rounding.arithmetic(cpu, "bfloat16", False), Rounded)
