"""Feedback that follows W with a momentum of its own: the formulas of its lag and of its first steps, and the plan of
the page."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fa
from fa import UserError
from fa.experiments import p2_lag, p2_lag_rates, plan
from fa.metrics import angle
from fa.train import data
from fa.train.config import Config
from fa.train.network import build_network
from fa.train.step import Stepper, make_optimizer

SA = Config("sa", 0, dataset="digits", hidden="8", epochs=2, batch=64, lr=0.1, lr_drops="", feedback_lr=0.4)


def following(rule, lag, momentum, path):
    """Feedback (steps, out, in) that follows a W which moves along a path; SGD at the rate that the page gives it."""
    layer = nn.Linear(path.shape[2], path.shape[1], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(path[0])
    fa.convert(layer, rule, seed=3, **{name: v for name, v in p2_lag.OPTIONS[rule].items() if name != "input"})
    rate = (1 - momentum) / (p2_lag.RATE * lag)
    opt = torch.optim.SGD([layer.feedback.B], lr=rate, momentum=momentum)
    n = path.shape[2]
    x = (
        np.sqrt(n)
        * torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    )
    seen = [layer.feedback.B.detach().clone()]
    for W in path[1:]:
        opt.zero_grad()
        layer(x).sum().backward()  # white: x^T x = n; the error does not matter to these rules
        opt.step()
        with torch.no_grad():
            layer.weight.copy_(W)
        seen.append(layer.feedback.B.detach().clone())
    return torch.stack(seen)


@pytest.mark.parametrize("rule", ["sa", "aa", "wm"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lag", p2_lag.LAGS)
def test_the_lag_is_that_behind_a_weight_of_constant_speed(rule, momentum, lag):
    gen = torch.Generator().manual_seed(1)
    start, speed = (torch.randn(4, 6, dtype=torch.float64, generator=gen) for _ in range(2))
    steps = 200 + 12 * lag
    path = torch.stack([start + t * speed for t in range(steps + 1)])
    behind = (path[-1] - following(rule, lag, momentum, path)[-1]) / speed
    assert behind.numpy() == pytest.approx(np.full((4, 6), float(lag)), abs=0.01 * lag)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lag", p2_lag.LAGS)
def test_feedback_settles_on_a_weight_that_rests_as_the_formula_says(lag, momentum):
    W = torch.randn(30, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = following("sa", lag, momentum, W.expand(101, 30, 400))
    B, size = seen[0], torch.linalg.vector_norm
    assert angle(W, B) == pytest.approx(90, abs=1.5) and (size(B) / size(W)).item() == pytest.approx(1, abs=0.02)
    found = np.array([angle(W, B) for B in seen])
    assert np.abs(found - p2_lag.settling(lag, momentum, 100)).max() < 2


def test_momentum_bounds_how_fast_feedback_settles():
    """Whatever the rate, what is left from t steps on reaches a fixed share of m^(t/2) again."""
    t = np.arange(101)
    for lag in (0.1, 0.5, 1, 5, 25):
        left = np.tan(np.radians(p2_lag.settling(lag, 0.9, 100)))
        ceiling = np.maximum.accumulate(left[::-1])[::-1]  # the largest from here on
        assert (ceiling[20:80] > 0.3 * 0.9 ** (t[20:80] / 2)).all(), lag
    assert p2_lag.settling(1, 0.0, 3)[1:] == pytest.approx([0, 0, 0])


def test_feedback_momentum_is_that_of_own_decay_feedback_alone():
    net = build_network(config := replace(SA, feedback_momentum=0.3, nesterov=True), (1, 8, 8), 10)
    opt = make_optimizer(net, config)
    assert {g["own_decay"]: g["momentum"] for g in opt.param_groups} == {False: 0.9, True: 0.3}
    same = {g["own_decay"]: g["momentum"] for g in make_optimizer(net, SA).param_groups}
    assert same == {False: 0.9, True: 0.9}


@pytest.mark.parametrize("nesterov", [False, True])
def test_feedback_without_momentum_takes_its_gradient(nesterov):
    sets, config = data.load("digits"), replace(SA, feedback_momentum=0.0, nesterov=nesterov)
    net = build_network(config, sets.shape, sets.classes)
    stepper = Stepper(net, make_optimizer(net, config), config, sets.train)
    stepper.begin(0)
    for _ in range(3):
        W, B = net.fc1.weight.detach().clone(), net.fc1.feedback.B.detach().clone()
        stepper.step()
        assert torch.allclose(net.fc1.feedback.B, B - 0.4 * (2e-3 * B - 2e-3 * W), atol=1e-7)


@pytest.mark.parametrize("changes", [
    {"feedback_momentum": 1.0}, {"feedback_momentum": -0.5}, {"rule": "kp", "feedback_momentum": 0.0},
    {"rule": "bp", "feedback_momentum": 0.0}, {"optimizer": "adam", "feedback_momentum": 0.0},
])  # fmt: skip
def test_a_momentum_that_no_feedback_has_is_refused(changes):
    with pytest.raises(UserError, match=r"feedback_momentum=\S+ of \w+: it lies in \[0, 1\)"):
        replace(SA, **changes)


def test_plan():
    runs = plan("p2_lag", "paper")
    assert len(runs) == len({c.run for c in runs}) == 3 * (1 + 4 + 16 + 4 + 4)
    places = {(c.rule, c.seed, *p2_lag.swept(c).values()) for c in runs}
    assert len(places) == len(runs)  # no two runs of a seed at one place
    assert {p2_lag.swept(c)["lag"] for c in runs if c.rule in ("sa", "frozen")} == set(p2_lag.LAGS)
    assert {p2_lag.swept(c)["lag"] for c in runs if c.rule in ("aa", "wm")} == {p2_lag.MIDDLE}
    for c in runs:
        if c.rule in p2_lag.OPTIONS:
            momentum, lag = c.feedback_momentum, p2_lag.swept(c)["lag"]
            assert c.feedback_lr * p2_lag.RATE * lag == pytest.approx(1 - momentum)
    assert {c.options for c in plan("p2_lag", "quick", rules="kp")} == {""}  # another rule: as it is


def test_rates_plan():
    runs = plan("p2_lag_rates", "paper")
    assert len(runs) == len({c.run for c in runs}) == 3 * 4 * (1 + 4 + 8)
    for c in runs:
        config = c.recipe()
        assert (config.lr, config.momentum, config.epochs, config.dataset) == (c.lr, 0.9, 1, "mnist")
        if c.rule == "sa":
            assert config.feedback_momentum == c.momentum
            assert config.feedback_lr * p2_lag.RATE * c.lag == pytest.approx(1 - c.momentum)
        else:
            assert config.feedback_lr == 0 and c.momentum == 0
            assert config.options == ("" if c.rule == "bp" else f"every={2 * c.lag + 1}")


def test_a_short_run_that_diverges_counts_as_chance():
    run = p2_lag_rates.Short("sa", 0, 1e30, 5, 0.9, hidden="16", dataset="digits")
    table = run.table().set_index("metric").value
    assert (table["score"], table["diverged"]) == (10, 1)
    learned = p2_lag_rates.Short("sa", 0, 0.03, 1, hidden="16", dataset="digits", epochs=3).table()
    found = p2_lag_rates.scores(learned.assign(run="a", rule="sa", seed=0, lag=1, momentum=0.0, lr=0.03))
    assert found.value.item() > 70 and not found.diverged.item()
    assert set(learned[learned.layer != ""].metric) == {"angle_deg", "norm_ratio"}
