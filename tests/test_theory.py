"""Theory against calculations that share no line with it: drawn matrices, and torch's own SGD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fa
from fa import theory
from fa.experiments import p3_sparse


@pytest.mark.parametrize(
    "expansion, density, n_out", [(1, 1, 100), (10, 1, 60), (10, 0.1, 100), (4, 0.3, 80), (2, 0.5, 10)]
)
def test_the_path_angle_is_that_of_drawn_matrices(expansion: float, density: float, n_out: int) -> None:
    """Uniform B, R = m ∘ B^T W: mean angle of 40 draws."""
    rng, angles = np.random.default_rng(0), []
    for _ in range(40):
        W, B = rng.normal(size=(n_out, 200)), rng.uniform(-1, 1, size=(n_out, expansion * n_out))
        B = B * (rng.random(B.shape) < density)
        R = B.T @ W
        path = B @ (R * (rng.random(R.shape) < density))
        angles.append(math.degrees(math.acos((path * W).sum() / np.linalg.norm(path) / np.linalg.norm(W))))
    assert theory.path_angle(expansion, density, n_out) == pytest.approx(np.mean(angles), abs=0.6)


def test_the_path_angle_of_a_wide_dense_layer() -> None:
    assert theory.path_angle([1, 10, 100]) == pytest.approx(
        [45, math.degrees(math.acos(1 / math.sqrt(1.1))), 5.71], abs=5e-3
    )
    assert theory.path_angle(10, n_out=1e9) == pytest.approx(theory.path_angle(10), abs=1e-6)


def test_the_angle_of_a_masked_copy() -> None:
    rng = np.random.default_rng(0)
    W = rng.normal(size=200_000)
    for density in (0.05, 0.3, 1.0):
        copy = W * (rng.random(W.shape) < density)
        cosine = min((copy * W).sum() / np.linalg.norm(copy) / np.linalg.norm(W), 1)
        assert p3_sparse.masked_angle(density) == pytest.approx(math.degrees(math.acos(cosine)), abs=0.2)


def test_what_is_left_of_the_mismatch_is_what_sgd_leaves_of_a_weight_without_gradient() -> None:
    """Three epochs of 50 steps; the decay changes after the first, the learning rate after the second."""
    schedule, D = [(0.05, 0.3), (0.05, 0.01), (0.005, 0.01)], torch.ones(1, dtype=torch.float64, requires_grad=True)
    opt, left = torch.optim.SGD([D], lr=1, momentum=0.9), [1.0]
    for lr, decay in schedule:
        opt.param_groups[0].update(lr=lr, weight_decay=decay)
        for _ in range(50):
            D.grad = torch.zeros_like(D)
            opt.step()
        left.append(D.item())
    assert theory.mismatch_left(schedule, 0.9, 50) == pytest.approx(left, rel=1e-12)
    assert theory.mismatch_left([(0.1, 0.0)], 0.9, 10).tolist() == [1.0, 1.0]


def simulated(decay: float, steps: int, lr: float, momentum: float) -> float:
    """What torch's own SGD leaves of a weight without gradient: ``steps`` under the decay, then none until it rests."""
    D = torch.ones(1, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD([D], lr=lr, momentum=momentum, weight_decay=decay)
    for step in range(steps + 400):
        if step == steps:
            opt.param_groups[0]["weight_decay"] = 0.0
        D.grad = torch.zeros_like(D)
        opt.step()
    return D.item()


@pytest.mark.parametrize(
    "steps, lr, momentum, leave",
    [(937, 0.01, 0.9, 0.05), (22, 0.1, 0.9, 0.05), (5, 0.1, 0.9, 0.2), (1, 0.1, 0.5, 0.3), (40, 0.05, 0.0, 0.1)],
)
def test_the_decay_leaves_the_share_that_was_asked_for(steps: int, lr: float, momentum: float, leave: float) -> None:
    net = fa.convert(torch.nn.Linear(3, 2), "pfa")
    decay = fa.decay_for(net, steps, lr, momentum, leave)
    assert simulated(decay, steps, lr, momentum) == pytest.approx(leave, rel=1e-8)
    assert all(simulated(f * decay, steps, lr, momentum) > leave for f in (0.25, 0.5, 0.75, 0.95)), "the smallest"


def test_the_decay_of_many_steps_is_that_of_the_slow_formula() -> None:
    net = fa.convert(torch.nn.Linear(3, 2), "kp")
    steps, lr, momentum = 100_000, 0.01, 0.9
    slow = (1 - momentum) / lr * (1 - 0.05 ** (1 / steps))
    assert fa.decay_for(net, steps, lr, momentum) == pytest.approx(slow, rel=1e-3)


def test_the_paper_s_decays_leave_what_the_docstring_says() -> None:
    """MNIST: 0.03 for 937 steps at 0.01; CIFAR-10: 0.005 for 351 steps at 0.1."""
    net = fa.convert(torch.nn.Linear(3, 2), "pfa_o")
    assert fa.decay_for(net, 937, 0.01, 0.9, leave=0.0553) == pytest.approx(0.03, rel=1e-3)
    assert fa.decay_for(net, 351, 0.1, 0.9, leave=0.158) == pytest.approx(0.005, rel=1e-3)


def test_a_decay_is_for_rules_that_align_by_it() -> None:
    for rule in ("fa", "wm"):
        with pytest.raises(fa.UserError, match=f"the network is under {rule}; decay_for is for kp, pfa and pfa_o"):
            fa.decay_for(fa.convert(torch.nn.Linear(3, 2), rule), 10, 0.1, 0.9)
    with pytest.raises(fa.UserError, match="under no rule"):
        fa.decay_for(torch.nn.Linear(3, 2), 10, 0.1, 0.9)
    for wrong in [(0, 0.1, 0.9, 0.05), (10, -0.1, 0.9, 0.05), (10, 0.1, 1.0, 0.05), (10, 0.1, 0.9, 0.0)]:
        with pytest.raises(fa.UserError, match="must be positive, momentum in"):
            fa.decay_for(fa.convert(torch.nn.Linear(3, 2), "kp"), *wrong)
