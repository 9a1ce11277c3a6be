"""Angles, ratios and concordance against numpy; the two kinds of error angles; that measuring changes nothing."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fa
import oracles
from fa import metrics
from fa.train import similarity
from oracles import grads, randn


def degrees(a, b):
    """numpy's word on an angle."""
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return np.degrees(np.arccos(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1)))


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_angle_is_numpys(shape, seed, dtype):
    a, b = randn(*shape, seed=seed).to(dtype), randn(*shape, seed=seed + 1).to(dtype)
    assert metrics.angle(a, b) == pytest.approx(degrees(a.double(), b.double()), abs=1e-5)
    assert metrics.angle(a, b) == metrics.angle(b, a)
    assert metrics.angle(a, 3 * a.double()) == pytest.approx(0, abs=1e-4)
    assert metrics.angle(a, -a) == pytest.approx(180, abs=1e-4)


def test_angle_is_taken_in_float64_and_clipped():
    a = torch.full((10_000,), 0.1)
    assert metrics.angle(a, a) < 1e-4  # in float32 the cosine of so long a vector with itself misses 1 by far more
    tilted = a.double().clone()
    tilted[0] += 1e-3
    assert metrics.angle(a.double(), tilted) == pytest.approx(degrees(a.double(), tilted), rel=1e-4)
    assert 0 < metrics.angle(a.double(), tilted) < 0.1
    assert np.isnan(metrics.angle(a, torch.zeros_like(a)))
    huge, tiny = torch.tensor([1e38, 0.0]), torch.tensor([1e-38, 1e-38])  # their squares are beyond float32
    assert metrics.angle(huge, tiny) == pytest.approx(45, abs=1e-4)


def test_sample_angle_is_the_mean_over_samples():
    def sample_angle(a, b):
        return metrics._sample_angle(a, b).item()

    a, b = randn(7, 3, 4, seed=1), randn(7, 3, 4, seed=2)
    assert sample_angle(a, b) == pytest.approx(np.mean([degrees(x, y) for x, y in zip(a, b)]), abs=1e-10)
    a[2] = 0  # a sample without error says nothing
    rest = [degrees(x, y) for i, (x, y) in enumerate(zip(a, b)) if i != 2]
    assert sample_angle(a, b) == pytest.approx(np.mean(rest), abs=1e-10)
    assert sample_angle(a, -3 * a) == pytest.approx(180, abs=1e-4)


@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "pfa", "pfa_o", "frsf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alignment_is_numpys(rule, dtype):
    net, _, _ = oracles.resnet(dtype)
    fa.convert(net, rule, seed=2)
    with torch.no_grad():
        net.fc.weight[0, :4] = 0  # zeros have a sign too
    table = fa.alignment(net)
    names = ["stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.short", "fc"]
    assert table.layer.tolist() == names and table.depth.tolist() == list(range(1, 8))
    layers = dict(net.named_modules())
    for row in table.itertuples():
        W = layers[row.layer].weight.detach().numpy().astype(np.float64)
        K = fa.feedback_weight(layers[row.layer]).numpy().astype(np.float64)
        assert K.shape == W.shape
        assert row.angle_deg == pytest.approx(degrees(W, K), abs=1e-6)
        assert row.norm_ratio == pytest.approx(np.linalg.norm(K) / np.linalg.norm(W), rel=1e-12)
        assert row.sign_concordance == pytest.approx(np.mean(np.sign(W) == np.sign(K)), abs=1e-12)
        assert row.weight_norm == pytest.approx(np.linalg.norm(W), rel=1e-12)
    if rule == "usf":
        assert (table.sign_concordance == 1).all()


def test_a_network_without_a_rule_has_no_alignment():
    for net in (nn.Linear(3, 2), fa.convert(fa.convert(nn.Linear(3, 2), "fa"), "bp")):
        with pytest.raises(fa.UserError, match="no layer of this network has a rule"):
            fa.alignment(net)
    with pytest.raises(fa.UserError, match="no feedback"):
        fa.feedback_weight(nn.Linear(3, 2))


def test_feedback_weight_is_detached_and_leaves_no_graph():
    layer = fa.convert(nn.Linear(4, 3), "pfa")
    K = fa.feedback_weight(layer)
    assert not K.requires_grad
    K.zero_()
    assert fa.feedback_weight(layer).abs().sum() > 0


# ------------------------------------------------------------------------------------------ gradients


def test_exact_backprop_gives_backprops_gradients_for_a_while():
    net, x, y = oracles.resnet()
    theirs = copy.deepcopy(net.eval())
    want = grads(theirs, x, y)
    for rule in ("fa", "pfa", "kp", "usf", "dfa"):
        fa.convert(net, rule)
        under = grads(net, x, y)
        with fa.exact_backprop(net):
            got = grads(net, x, y)
        assert all(torch.equal(got[k], want[k]) for k in want)
        again = grads(net, x, y)
        assert all(torch.equal(again[k], under[k]) for k in under)
        assert not torch.equal(under["stem.weight"], want["stem.weight"])
        with pytest.raises(ZeroDivisionError), fa.exact_backprop(net):
            1 / 0
        again = grads(net, x, y)
        assert all(torch.equal(again[k], under[k]) for k in under)


def test_angles_are_zero_where_the_feedback_is_the_weight():
    net, x, y = oracles.resnet()
    fa.convert(net, "frozen")
    table = fa.gradient_angles(net, x, y, F.cross_entropy)
    assert table.filter(like="_deg").max().max() < 1e-4 and len(table) == 7
    fa.convert(net, "usf", norm="track")
    table = fa.gradient_angles(net, x, y, F.cross_entropy)
    assert table.delta_angle_global_deg.iloc[-1] < 1e-4  # nothing lies between the loss and the last layer's output
    assert table.grad_angle_global_deg.iloc[-1] < 1e-4
    assert (table.delta_angle_global_deg.iloc[:-1] > 5).all()


@pytest.mark.parametrize("rule", ["fa", "pfa", "usf"])
def test_angles_by_hand(rule):
    net, x, y = oracles.mlp(6, 9, 7, 3)
    fa.convert(net, rule)
    table = fa.gradient_angles(net, x, y, F.cross_entropy).set_index("layer")
    with torch.no_grad():
        layers = [net[0], net[2], net[4]]
        W, K = [m.weight for m in layers], [fa.feedback_weight(m) for m in layers]
        z1 = F.linear(x, W[0], net[0].bias)
        z2 = F.linear(z1.relu(), W[1], net[2].bias)
        e = (F.linear(z2.relu(), W[2], net[4].bias).softmax(1) - F.one_hot(y, 3)) / len(y)

        def deltas(M):
            d2 = (e @ M[2]) * (z2 > 0)
            return [(d2 @ M[1]) * (z1 > 0), d2, e]

        under, exact = deltas(K), deltas(W)

        def mean(a, b):
            return np.nanmean([degrees(p, q) if p.any() and q.any() else np.nan for p, q in zip(a, b)])

        below = [x, z1.relu(), z2.relu()]
        for i, name in enumerate("024"):
            row = table.loc[name]
            assert row.depth == i + 1
            assert row.delta_angle_global_deg == pytest.approx(mean(under[i], exact[i]), abs=1e-5)
            assert row.delta_angle_local_deg == pytest.approx(mean(under[i] @ K[i], under[i] @ W[i]), abs=1e-5)
            assert row.grad_angle_global_deg == pytest.approx(
                degrees(under[i].T @ below[i], exact[i].T @ below[i]), abs=1e-5
            )
            assert row.delta_norm_ratio == pytest.approx((under[i].norm() / exact[i].norm()).item(), rel=1e-9)


def test_local_angle_of_a_convolution_by_hand():
    net, x, y = oracles.resnet()
    fa.convert(net.eval(), "fa")
    table = fa.gradient_angles(net, x, y, F.cross_entropy).set_index("layer")
    kept = {}
    conv = net.block2.conv1
    handle = conv.register_forward_hook(lambda m, args, out: kept.update(x=args[0], out=out))
    loss = F.cross_entropy(net(x), y)
    delta = torch.autograd.grad(loss, kept["out"])[0]
    handle.remove()
    K, W = (
        torch.nn.grad.conv2d_input(kept["x"].shape, k.detach(), delta, conv.stride, conv.padding)
        for k in (fa.feedback_weight(conv), conv.weight)
    )
    assert table.loc["block2.conv1"].delta_angle_local_deg == pytest.approx(
        np.mean([degrees(a, b) for a, b in zip(K, W)]), abs=1e-5
    )


@pytest.mark.parametrize("rule", ["fa", "pfa", "kp", "dfa", "brsf", "ia"])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(rule, training):
    net, x, y = oracles.resnet()
    fa.convert(net, rule)
    net.train(training)
    grads(net, x, y)
    opt = torch.optim.SGD(fa.param_groups(net, 0.1), momentum=0.9)
    opt.step()
    state = copy.deepcopy(net.state_dict())
    held = {n: p.grad.clone() for n, p in net.named_parameters()}
    rng = torch.get_rng_state()
    calls = []
    net.stem.register_forward_hook(lambda *a: calls.append(1))
    table = fa.gradient_angles(net, x, y, F.cross_entropy)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert table.equals(fa.gradient_angles(net, x, y, F.cross_entropy)) and len(table) == 7
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, held[n]) for n, p in net.named_parameters())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training == training for m in net.modules())
    assert len(net.stem._forward_hooks) == 1 and calls
    assert np.isnan(table.delta_angle_local_deg).all() == (rule == "dfa")
    grads(net, x, y)  # and the network's own check is not upset


@pytest.mark.parametrize("rule", ["fa", "pfa", "wm", "dfa"])
@pytest.mark.parametrize("training", [True, False])
def test_A27_a_pass_may_wait_for_its_backward_pass_while_gradients_are_measured(rule, training):
    net, x, y = oracles.resnet()
    fa.convert(net, rule).train(training)
    waiting = copy.deepcopy(net)
    want = grads(net, x, y)
    loss = F.cross_entropy(waiting(x), y)
    fa.gradient_angles(waiting, x, y, F.cross_entropy)
    loss.backward()
    assert all(torch.equal(waiting.get_parameter(n).grad, g) for n, g in want.items())


def test_gradient_angles_take_whatever_the_network_takes():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, batch):
            return {"logits": self.b(torch.tanh(self.a(batch["x"])))}

    net, y = fa.convert(Named(), "fa"), torch.arange(4) % 3
    table = fa.gradient_angles(net, {"x": torch.randn(4, 6)}, y, lambda out, y: F.cross_entropy(out["logits"], y))
    assert table.layer.tolist() == ["a", "b"]


def test_a_loss_that_fails_leaves_nothing_behind():
    net, x, y = oracles.resnet()
    fa.convert(net, "fa")
    state = copy.deepcopy(net.state_dict())
    hooks = {n: len(m._forward_hooks) for n, m in net.named_modules()}
    with pytest.raises(ZeroDivisionError):
        fa.gradient_angles(net, x, y, lambda out, y: 1 / 0)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert {n: len(m._forward_hooks) for n, m in net.named_modules()} == hooks


def test_gradient_angles_with_a_frozen_layer():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "fa")
    net[0].weight.requires_grad_(False)
    table = fa.gradient_angles(net, x, y, F.cross_entropy)
    assert table.layer.tolist()[-1] == "2"


def test_gradient_angles_see_a_layers_own_output_where_the_next_works_in_place():
    def net(inplace):
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(1, 4, 3),
            nn.ReLU(inplace),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(inplace),
            nn.Flatten(),
            nn.Linear(96, 3),
        )
        return fa.convert(nn.Sequential(*layers).double(), "fa", seed=1)

    x, y = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.arange(16) % 3
    plain, inplace = (fa.gradient_angles(net(i), x, y, F.cross_entropy) for i in (False, True))
    pd.testing.assert_frame_equal(plain, inplace)


def test_gradient_angles_give_both_passes_the_same_dropout_and_draw_nothing():
    net = nn.Sequential(
        nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)
    ).double()
    fa.convert(net, "frozen")  # B = W
    x, y, before = torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 3, torch.get_rng_state()
    angles = fa.gradient_angles(net, x, y, F.cross_entropy)
    assert angles.filter(like="_deg").to_numpy() == pytest.approx(0, abs=1e-5)
    assert angles.delta_norm_ratio.to_numpy() == pytest.approx(1, abs=1e-9)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_angles_leave_out_a_layer_that_the_loss_does_not_use():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x):
            self.seen = self.aux(self.body(x))
            return self.head(self.body(x))

    angles = fa.gradient_angles(fa.convert(Two(), "fa"), torch.randn(6, 4), torch.arange(6) % 3, F.cross_entropy)
    assert list(angles.layer) == ["body", "head"]


def test_exact_backprop_may_be_nested():
    net = fa.convert(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "fa")
    with fa.exact_backprop(net):
        with fa.exact_backprop(net[0]):
            pass
        assert net[0].feedback.use_backprop and net[1].feedback.use_backprop
    assert not net[0].feedback.use_backprop and not net[1].feedback.use_backprop


# ------------------------------------------------------------------------------------------ likeness of representations


def test_cka_is_the_u_statistic_over_four_samples():
    """HSIC as the mean over all ordered quadruples of different samples, without a trace or a matrix product."""
    x, y = randn(6, 3, 2, seed=1), randn(6, 4, seed=2) + randn(6, 1, seed=3)
    y[:, :3] += 2 * x[:, :, 0]
    K, L = similarity.gram(x).numpy(), similarity.gram(y).numpy()
    assert np.allclose(K, np.einsum("iab,jab->ij", x.numpy(), x.numpy()))

    def hsic(K, L):
        four = itertools.permutations(range(6), 4)
        return np.mean([K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in four])

    want = hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))
    assert (
        similarity.linear_cka(similarity.gram(x), similarity.gram(y)) == pytest.approx(want, rel=1e-12)
        and 0.2 < want < 0.95
    )


def test_cka_knows_neither_rotation_nor_scale_nor_mean_and_is_zero_for_the_independent():
    x, other = randn(200, 50, seed=1), randn(200, 2000, seed=2)
    turned = 3 * x @ torch.linalg.qr(randn(50, 50, seed=3))[0] + 7
    assert similarity.linear_cka(similarity.gram(x), similarity.gram(turned)) == pytest.approx(1, abs=1e-9)
    assert (
        abs(similarity.linear_cka(similarity.gram(x), similarity.gram(other))) < 0.05
    )  # the biased estimator has 0.4 here
