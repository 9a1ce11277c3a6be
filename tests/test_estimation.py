"""p2's pages: their theory against calculations that share no line with it, and their measurements against rules whose
answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fa
from fa import experiments
from fa.experiments import _dynamics as dynamics
from fa.experiments import _estimation as estimation
from fa.experiments import _following as following
from fa.experiments import _framework as framework
from fa.experiments._explore import explore
from fa.experiments.p2_estimation import Following
from fa.rules import rule as make_rule
from oracles import apart, randn

ALL = dict(decay=0.1, amp=0.3, null=0.2, sparse=0.4, self_=0.5)


def moment(size: int, seed: int = 0) -> torch.Tensor:
    """A second moment of full rank, far from the identity."""
    x = randn(3 * size, size, seed=seed) * torch.linspace(0.3, 2, size, dtype=torch.float64)
    return x.T @ x / len(x)


# ------------------------------------------------------------------------------------------------------- fixed points


def test_the_end_solves_the_linear_system_and_its_rates_are_the_systems():
    """As one system for all entries of B, row by row: 2d + 2n (W S W^T ⊗ I) + 2p (I ⊗ S)."""
    W, S = randn(3, 4, seed=1), moment(4)
    c = estimation.coefficients(make_rule("primitives", **ALL))
    A = 2 * c["decay"] * np.eye(12) + 2 * c["null"] * np.kron((W @ S @ W.T).numpy(), np.eye(4))
    A = A + 2 * c["sparse"] * np.kron(np.eye(3), S.numpy())
    want = np.linalg.solve(A, (c["amp"] * W @ S + c["self"] * W).numpy().ravel()).reshape(3, 4)
    goal = estimation.end(c, W, S)
    assert apart(goal.B, torch.from_numpy(want)) < 1e-12
    assert np.allclose(np.sort(goal.rates.numpy().ravel()), np.linalg.eigvalsh(A), rtol=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3, bias=False), nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)])
@pytest.mark.parametrize("rule", ["wm", "ia"])
def test_both_sides_descend_the_objective_under_white_input(layer, rule):
    """p2's ``update_forward``: gradients by autograd of the objective, by W and by B."""
    layer = fa.convert(layer.double(), make_rule(rule))
    shape = torch.Size((4,) if isinstance(layer, nn.Linear) else (2, 5, 5))
    x, W, B = dynamics.white(shape, 1.7), *randn(2, *layer.weight.shape, seed=2).requires_grad_()
    want = torch.autograd.grad(estimation.loss(layer, x, W, B), (W, B))
    got = estimation.flow(layer, x, W.detach(), B.detach(), forward=True)
    assert all(apart(-g, w) < 1e-12 for g, w in zip(got, want))
    rests = estimation.flow(layer, x, W.detach(), B.detach(), forward=False)
    assert torch.count_nonzero(rests[0]) == 0 and torch.equal(rests[1], got[1])


def test_white_inputs_are_white():
    x = dynamics.white(torch.Size((2, 3)), 1.7).flatten(1)
    assert torch.allclose(x.T @ x / len(x), 1.7 * torch.eye(6, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("rule, options, expected", [
    ("primitives", {"decay": 1.0}, "own"),
    ("primitives", {"amp": 1.0}, "pre post"),
    ("primitives", {"null": 1.0}, "own post back"),
    ("primitives", {"sparse": 1.0}, "own pre up"),
    ("primitives", {"self_": 1.0}, "weight"),
    ("kp", {}, "own pre error"),
    ("fa", {}, ""),
])  # fmt: skip
def test_an_intervention_moves_one_quantity_and_no_other(rule, options, expected):
    """From the formulas of the gradients: what stands in the formula is read, and nothing else."""
    layer = fa.convert(nn.Linear(5, 4, bias=False).double(), rule, **options)
    before = layer.weight.detach().clone()
    found = framework.reads(layer, torch.Generator().manual_seed(3))
    assert {name for name, change in found.items() if change > 1e-9} == set(expected.split())
    assert torch.equal(layer.weight.detach(), before)


def test_only_at_its_own_ratio_is_ia_the_autoencoders_decoder():
    for options, equal in (({}, True), ({"amp": 3e-3}, False), ({"null": 2e-3}, False)):
        layer = fa.convert(nn.Linear(5, 4, bias=False).double(), "ia", **options)
        found = framework.gradient_check(layer, randn(9, 5, seed=4), torch.Generator().manual_seed(0))
        assert found["gradient_error"] < 1e-12 and (found["autoencoder_error"] < 1e-12) is equal


def test_the_sliders_move_the_picture():
    widget = explore()
    choice, body = widget.children
    sliders, image = body.children
    at_wm = image.value
    assert "relaxation rates" in at_wm.partition("alt=")[2] and "base64,iVBORw0KGgo" in at_wm, "with words, and a PNG"
    choice.value = "SA"
    assert {s.description: s.value for s in sliders.children} == dict(decay=1, amp=0, null=0, sparse=0, self=2)
    assert image.value != at_wm


# ----------------------------------------------------------------------------------------------------------- dynamics


@pytest.mark.parametrize("power", [0.1, 0.4, 0.7, 3.0])
@pytest.mark.parametrize("options", [{"amp": 1.0, "decay": 0.25}, {"amp": 1.0, "null": 0.7, "decay": 0.25}])
def test_rates_of_a_pair_are_the_jacobians(options, power):
    """The two scalar equations, written out, and their Jacobian by finite differences at the resting point."""
    a, n, d = options["amp"], options.get("null", 0.0), options["decay"]

    def field(w, b):
        both = a * power - 2 * n * power * w * b
        return np.array([both * b - 2 * d * w, both * w - 2 * d * b])

    rule = make_rule("primitives", **options)
    m, e = dynamics.pair_point(rule, power), 1e-6
    assert np.allclose(field(m, m), 0, atol=1e-12) and (m > 0) == (n > 0 and a * power > 2 * d)
    J = np.stack([field(m + e, m) - field(m - e, m), field(m, m + e) - field(m, m - e)], 1) / (2 * e)
    for vector, rate in zip(([1, 1], [1, -1]), dynamics.pair_rates(rule, power)):
        assert np.allclose(J @ vector, rate * np.array(vector), atol=1e-8)
    w, b = (torch.tensor([v], dtype=torch.float64) for v in (0.3, -0.8))
    moved = torch.cat(dynamics.pairs(rule, torch.tensor([power], dtype=torch.float64))(w, b)).numpy()
    assert np.allclose(moved, field(0.3, -0.8), rtol=1e-12)


def test_a_pair_settles_where_its_steps_are_short_enough():
    """WM below its line: at 0, for steps up to 2 over the larger rate; above it never. IA above it: at m."""
    wm, ia = make_rule("wm", amp=1.0, decay=0.25), make_rule("ia", amp=1.0, null=1.0, decay=0.25)
    lr = torch.tensor([0.1, 1.9, 2.1, 2.9]).double()
    for rule, power, expected in (
        (wm, 0.2, [True, True, True, False]), (wm, 1.0, [False] * 4), (ia, 1.0, [True, True, False, False])
    ):  # fmt: skip
        assert [dynamics.should_settle(rule, power, v) for v in lr.tolist()] == expected
        assert dynamics.settles(rule, torch.full_like(lr, power), lr).tolist() == expected


@pytest.mark.parametrize("rule, options", [
    ("wm", {"amp": 0.1, "decay": 0.02}),
    ("ia", {"amp": 0.1, "null": 0.05, "decay": 0.02}),
])  # fmt: skip
def test_eigenvalues_of_a_layer_under_white_input_are_the_pairs(rule, options):
    """Input power 1.5. Around 0: a power - 2 d and -(a power + 2 d); IA at its point, the polar factor of W times m."""
    layer = fa.convert(nn.Linear(4, 3, bias=False).double(), rule, **options)
    x, start = dynamics.white(torch.Size((4,)), 1.5), randn(2, 3, 4, seed=5)
    origin = torch.zeros_like(start)
    grow, shrink = dynamics.modes(dynamics.curvature(layer, x, origin, True)[1], origin, start)
    assert grow.rate == pytest.approx(0.15 - 0.04) and shrink.rate == pytest.approx(-0.15 - 0.04)
    total = (start[0] + start[1]) / torch.linalg.vector_norm(start[0] + start[1]) / math.sqrt(2)
    assert apart(grow.direction, torch.stack([total, total])) < 1e-9, "along what the two deviate by"
    if rule == "ia":
        m = math.sqrt((0.15 - 0.04) / (2 * 0.05 * 1.5))
        U, _, V = torch.linalg.svd(start[0], full_matrices=False)
        point = m * torch.stack([U @ V] * 2)
        g, H = dynamics.curvature(layer, x, point, True)
        assert g.abs().max() < 1e-12
        rates = torch.linalg.eigvalsh(H)  # with a pair's two, 2 (a power - 2 d) and 4 d, a third that a pair has not
        assert rates[-1].item() == pytest.approx(2 * 0.15)
        assert all((rates - rate).abs().min() < 1e-9 for rate in (2 * (0.15 - 0.04), 4 * 0.02))
        near = dynamics.rest(layer, x, point + 0.05 * start)
        assert apart(near[0], near[1]) < 1e-3
        assert torch.linalg.svdvals(near[0]).numpy() == pytest.approx([m] * 3, rel=1e-3)


def test_a_measured_rate_is_that_of_the_batches():
    """WM with W at rest: every mode decays at 2 d, whatever the batches are."""
    layer = fa.convert(nn.Linear(4, 3, bias=False).double(), "wm", amp=0.1, decay=0.02)
    start, gen = randn(2, 3, 4, seed=6), torch.Generator().manual_seed(0)
    found = dynamics.measured_layer(layer, start, randn(50, 4, seed=7), forward=False, gen=gen)
    assert [found[k] for k in ("relax_slow", "relax_fast", "relax_slow_theory")] == pytest.approx([-0.04] * 3)


# ---------------------------------------------------------------------------------------------------------- following


@pytest.mark.parametrize("rule", ["sa", "aa", "wm", "ia"])
def test_the_response_to_a_turning_weight_is_that_of_the_recursion(rule):
    """The descent with white input, as a recursion of matrices, until it has forgotten its start."""
    c = estimation.coefficients(make_rule(rule, **following.OPTIONS[rule]))
    w, omega, Q = np.array([0.6, 1.4]), 0.11, np.linalg.qr(randn(4, 4, seed=8).numpy())[0]

    def at(t):
        right = math.cos(omega * t) * Q[:, :2] + math.sin(omega * t) * Q[:, 2:]
        return w[:, None] * right.T

    B = np.zeros((2, 4))
    for t in range(600):
        W = at(t)
        B = B + (c["amp"] + c["self"]) * W - 2 * (c["decay"] + c["sparse"]) * B - 2 * c["null"] * W @ W.T @ B
    W, ahead = at(600), at(600 + math.pi / 2 / omega)
    cosine = (W * B).sum() / np.linalg.norm(W) / np.linalg.norm(B)
    want = [math.degrees(math.acos(cosine)), np.linalg.norm(B) / np.linalg.norm(W)]
    want.append(math.atan2(-(B * ahead).sum(), (B * W).sum()) / omega)
    theory = following.rotation_theory(rule, torch.from_numpy(w), omega)
    assert [theory[k] for k in ("angle_deg", "norm_ratio", "lag")] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("rule", ["sa", "kp"])
def test_the_weight_takes_the_path_it_is_told(rule):
    path, S = [randn(3, 4, seed=s) for s in range(5)], moment(4)
    layer = following.converted_layer(Following(rule, "ramp", 1, n_in=4, n_out=3), path[0], torch.Generator())
    x = following.input_of(S, torch.Generator().manual_seed(1))
    assert torch.allclose(x.T @ x / len(x), S)
    following.drive(layer, S, x, path)
    assert apart(layer.weight.detach(), path[-1]) < 1e-10


def test_a_copy_of_an_earlier_weight_is_behind_by_its_age():
    t = 0.1 * torch.arange(20, 0, -1, dtype=torch.float64)
    past = torch.stack((t.cos(), t.sin()), 1)
    assert following.behind(past[7], past) == pytest.approx(7, abs=1e-9)
    assert following.behind(past[7] + past[8], past) == pytest.approx(7.5, abs=1e-3)
    assert following.behind(past[0], past) == 0


def test_distance_in_steps_mode_by_mode():
    V, step, age = torch.linalg.qr(randn(4, 4, seed=9))[0], randn(3, 4, seed=10), torch.tensor([1.0, 2, 3, 4]).double()
    assert torch.allclose(following.modes_behind((step @ V * age) @ V.T, step, V), age)


# ---------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("name", ["p2_framework", "p2_dynamics", "p2_estimation"])
def test_what_a_page_does_not_have_is_refused(name):
    for wrong in ({"epochs": 3}, {"dataset": "mnist"}, {"rules": "pfa"}):
        with pytest.raises(fa.UserError, match=name):
            experiments.plan(name, "quick", **wrong)
