"""Paper 2's rules against the published regularisers and their fixed points; the sign rules, frozen feedback and dense
feedback.

The regularisers are written out here as p2 states them (products of W x, B x and B^T W x, summed over units and
positions, averaged over the batch, no factor 1/2), with stock operations only, and differentiated by autograd.
"""

import copy
import io
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa
import oracles
from fa.layers.hooks import converted
from oracles import apart, grads, randn

# ------------------------------------------------------------------------------------------ the published regularisers

COEFFICIENTS = {
    "decay": ("primitives", {"decay": 0.3}),
    "amp": ("primitives", {"amp": 0.3}),
    "null": ("primitives", {"null": 0.3}),
    "sparse": ("primitives", {"sparse": 0.3}),
    "self": ("primitives", {"self_": 0.3}),
    "amp and null": ("primitives", {"amp": 0.7, "null": 0.2}),
    "amp and sparse": ("primitives", {"amp": 0.7, "sparse": 0.2}),
    "null and sparse": ("primitives", {"null": 0.7, "sparse": 0.2}),
    "all": ("primitives", {"decay": 0.1, "amp": 0.3, "null": 0.2, "sparse": 0.4, "self_": 0.5}),
    "wm": ("wm", {}),
    "ia": ("ia", {}),
    "sa": ("sa", {}),
    "aa": ("aa", {}),
}
DEFAULTS = {  # p2's code: decay, amp, null, sparse, self
    "wm": (1e-3, 1e-3, 0, 0, 0),
    "ia": (1e-3, 2e-3, 1e-3, 0, 0),
    "sa": (1e-3, 0, 0, 0, 2e-3),
    "aa": (0, 2e-3, 0, 1e-3, 0),
}

SHAPES = {  # layer, its arguments, input
    "linear": (nn.Linear, dict(in_features=5, out_features=4), (7, 5)),
    "tokens": (nn.Linear, dict(in_features=5, out_features=6, bias=False), (3, 4, 5)),
    "conv": (nn.Conv2d, dict(in_channels=2, out_channels=3, kernel_size=3, padding=1), (2, 2, 5, 4)),
    "stride": (nn.Conv2d, dict(in_channels=2, out_channels=3, kernel_size=3, stride=2, padding=1, bias=False), (2, 2, 6, 7)),
    "dilation": (nn.Conv2d, dict(in_channels=2, out_channels=3, kernel_size=(2, 3), stride=(1, 2), dilation=(2, 1)), (2, 2, 6, 6)),
    "groups": (nn.Conv2d, dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=(0, 1), groups=2), (3, 4, 6, 5)),
    "depthwise": (nn.Conv2d, dict(in_channels=3, out_channels=3, kernel_size=3, padding=1, groups=3), (2, 3, 4, 4)),
    "one image": (nn.Conv2d, dict(in_channels=2, out_channels=3, kernel_size=3, padding=1), (2, 5, 4)),
    "circular": (nn.Conv2d, dict(in_channels=2, out_channels=3, kernel_size=3, padding=1, padding_mode="circular"), (2, 2, 5, 4)),
    "same, even": (nn.Conv2d, dict(in_channels=2, out_channels=3, kernel_size=(2, 4), padding="same"), (2, 2, 5, 4)),
}  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES)
coefficients = pytest.mark.parametrize("rule", COEFFICIENTS)


def make(shape):
    cls, arguments, size = SHAPES[shape]
    return oracles.fixed_weights(cls(**arguments).double()), randn(*size, seed=3)


def seen(layer, x):
    """The input of the layer's linear map: samples, features, and for a convolution padded as the layer pads it."""
    if isinstance(layer, nn.Linear):
        return x
    x = x if x.dim() == 4 else x.unsqueeze(0)
    if layer.padding_mode == "circular":
        return F.pad(x, (layer.padding[1],) * 2 + (layer.padding[0],) * 2, "circular")
    if layer.padding == "same":  # torch's rule: the smaller half before, the larger after
        sides = [s for k in reversed(layer.kernel_size) for s in ((k - 1) // 2, k - 1 - (k - 1) // 2)]
        return F.pad(x, sides)
    return x


def project(layer, x, K):
    """K x; a convolution whose input is padded already pads no more."""
    if isinstance(layer, nn.Linear):
        return x @ K.T
    padded = layer.padding_mode != "zeros" or layer.padding == "same"
    return F.conv2d(x, K, None, layer.stride, 0 if padded else layer.padding, layer.dilation, layer.groups)


def reconstruct(layer, y, K, like):
    """K^T y, a transposed convolution whose output padding makes up for what the stride left over."""
    if isinstance(layer, nn.Linear):
        return y @ K
    padded = layer.padding_mode != "zeros" or layer.padding == "same"
    padding = (0, 0) if padded else layer.padding
    least = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(y.shape[2:], layer.stride, padding, layer.dilation, layer.kernel_size)
    ]
    rest = [n - m for n, m in zip(like.shape[2:], least)]
    return F.conv_transpose2d(y, K, None, layer.stride, padding, rest, layer.groups, layer.dilation)


def regulariser_gradient(layer, x):
    """Gradient by B of p2's R, with W and x as given; ``positions="mean"`` divides what sees data by their number."""
    rule, W = layer.feedback.rule, layer.weight.detach()
    B = layer.feedback.B.detach().clone().requires_grad_()
    Wx, Bx = project(layer, x, W), project(layer, x, B)
    Wx = Wx.relu() if rule.activation else Wx
    BWx = reconstruct(layer, Wx, B, x)
    samples = Wx[..., 0].numel() if isinstance(layer, nn.Linear) else Wx.shape[0]  # every token is a sample
    positions = 1 if isinstance(layer, nn.Linear) or rule.positions == "sum" else Wx[0, 0].numel()
    mean = 1 / (samples * positions)
    R = (
        rule.decay * (W.square().sum() + B.square().sum())
        - rule.amp * mean * (Wx * Bx).sum()
        + rule.null * mean * BWx.square().sum()
        + rule.sparse * mean * (Wx.square().sum() + Bx.square().sum())
        - rule.self_ * (W * B).sum()
    )
    return torch.autograd.grad(R, B)[0]


def learned_gradient(layer, x):
    layer.zero_grad()
    y = layer(x)
    y.backward(randn(*y.shape, seed=11))
    return layer.feedback.B.grad


@shapes
@coefficients
@pytest.mark.parametrize("positions", ["mean", "sum"])
def test_feedback_descends_the_published_regulariser(rule, shape, positions):
    name, options = COEFFICIENTS[rule]
    layer, x = make(shape)
    fa.convert(layer, name, seed=1, positions=positions, **options)
    assert apart(learned_gradient(layer, x), regulariser_gradient(layer, seen(layer, x))) <= oracles.RTOL


@pytest.mark.parametrize("rule", ["null and sparse", "all", "aa"])
def test_positions_matter_for_convolutions_only(rule):
    name, options = COEFFICIENTS[rule]
    for shape, same in (("linear", True), ("tokens", True), ("conv", False)):
        layer, x = make(shape)
        mean, total = (
            learned_gradient(fa.convert(copy.deepcopy(layer), name, positions=p, **options), x) for p in ("mean", "sum")
        )
        assert (apart(mean, total) == 0) is same


@shapes
@pytest.mark.parametrize("rule", ["amp", "null", "all", "ia", "aa"])
def test_rectified_projection(rule, shape):
    name, options = COEFFICIENTS[rule]
    layer, x = make(shape)
    fa.convert(layer, name, seed=1, activation=True, **options)
    got = learned_gradient(layer, x)
    assert apart(got, regulariser_gradient(layer, seen(layer, x))) <= oracles.RTOL
    linear = fa.convert(copy.deepcopy(layer), name, seed=1, **options)
    assert apart(got, regulariser_gradient(linear, seen(layer, x))) > 1e-3


def centred(x, normalize):
    """Every sample minus the mean of its features, and then of length 1 if asked for; a loop over samples, tokens
    are such."""
    samples = x.reshape(-1, x.shape[-1]) if x.dim() == 3 else x
    out = torch.stack([s - s.sum() / s.numel() for s in samples])
    return (torch.stack([s / s.square().sum().sqrt() for s in out]) if normalize else out).view_as(x)


@shapes
@pytest.mark.parametrize(
    "options", [{"center": True}, {"normalize": True}, {"center": True, "normalize": True}], ids=str
)
def test_centred_and_normalised_input(shape, options):
    name, coefficients = COEFFICIENTS["all"]
    layer, x = make(shape)
    x = x + 0.7  # so that there is a mean
    fa.convert(layer, name, seed=1, **options, **coefficients)
    want = regulariser_gradient(layer, centred(seen(layer, x), options.get("normalize", False)))
    assert apart(learned_gradient(layer, x), want) <= oracles.RTOL


@shapes
@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("options", [{}, {"normalize": True, "activation": True}], ids=["", "normalised and rectified"])
def test_noise_in_place_of_the_input(shape, kind, options):
    name, coefficients = COEFFICIENTS["all"]
    layer, x = make(shape)
    fa.convert(layer, name, seed=1, input=kind, input_std=0.4, **options, **coefficients)
    noise = copy.deepcopy(layer.feedback.op).noise(seen(layer, x), kind, 0.4)  # what the copy draws, the layer will
    noise = centred(noise, True) if options else noise
    first = learned_gradient(layer, x).clone()
    assert apart(first, regulariser_gradient(layer, noise)) <= oracles.RTOL
    assert apart(learned_gradient(layer, x), first) > 1e-3  # fresh noise in every pass


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_noise_is_distributed_as_it_is_said_to_be(kind, dtype):
    layer = fa.convert(nn.Linear(3, 2).to(dtype), "wm", input=kind, input_std=2.0)
    noise = layer.feedback.rule.mirror(layer.feedback.op, torch.zeros(40_000, 3, dtype=dtype)).double() / 2
    assert noise.mean().abs() < 0.015 and noise.std().item() == pytest.approx(1, rel=0.01)
    assert noise.pow(4).mean().item() == pytest.approx({"normal": 3, "uniform": 1.8}[kind], rel=0.03)
    below = (
        torch.special.ndtr(noise) if kind == "normal" else noise / math.sqrt(12) + 0.5
    )  # uniform in (0, 1) if the law is right
    steps = torch.arange(1, noise.numel() + 1, dtype=torch.float64) / noise.numel()
    assert (below.flatten().sort().values - steps).abs().max() < 1.95 / math.sqrt(noise.numel()) + (
        dtype == torch.bfloat16
    ) * 2e-3
    flat = noise.flatten()
    for lag in (1, 2, 3, 4, 5):  # numbers that one draw of the generator makes do not know of each other
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 4.5 / math.sqrt(flat.numel())
        assert abs((flat[lag:].square() * flat[:-lag].square()).mean().item() - 1) < 4.5 * 3 / math.sqrt(flat.numel())


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 5, 5)])
def test_noise_of_any_size_and_layout(shape):
    like = torch.zeros(shape)
    like = like.to(memory_format=torch.channels_last) if len(shape) == 4 else like.t()
    noise = fa.convert(nn.Linear(3, 2), "wm", input="uniform").feedback.op.noise(like, "uniform")
    assert noise.shape == like.shape and noise.stride() == like.stride()
    assert noise.unique().numel() >= noise.numel() - 1 and noise.abs().max() <= 3**0.5  # every entry drawn, by itself


def test_sums_in_float16_stay_in_range():
    """A sum of x y over as many positions would overflow; scaled before it is summed it does not."""
    layer, x = nn.Conv2d(2, 2, 3, padding=1), 4 + randn(4, 2, 64, 64, seed=3, dtype=torch.float32)
    fa.convert(layer, "wm", decay=0.0, amp=1e-3)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    want = learned_gradient(layer, x).clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    assert (4 * 64 * 64) * 4 * y.detach().mean() > torch.finfo(torch.float16).max
    y.backward(torch.ones_like(y))
    assert apart(layer.feedback.B.grad, want) < 0.01


@pytest.mark.parametrize("rule", DEFAULTS)
def test_a_named_rule_is_its_row_of_coefficients(rule):
    row = fa.RULES[rule]()
    assert (row.decay, row.amp, row.null, row.sparse, row.self_) == DEFAULTS[rule]
    layer, x = make("conv")
    options = dict(zip(("decay", "amp", "null", "sparse", "self_"), DEFAULTS[rule]))
    named, spelled = fa.convert(copy.deepcopy(layer), rule), fa.convert(layer, "primitives", **options)
    assert torch.equal(learned_gradient(named, x), learned_gradient(spelled, x))


# ------------------------------------------------------------------------------------------ what hears of the objective


def two_layers():
    net = oracles.fixed_weights(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 9, 4)).double()
    )
    return net, randn(4, 2, 5, 5, seed=3), torch.arange(4)


def all_gradients(net, x, y, scale=1.0):
    x = x.clone().requires_grad_()
    net.zero_grad()
    (scale * F.cross_entropy(net(x), y)).backward()
    return {"x": x.grad} | {n: p.grad.clone() for n, p in net.named_parameters()}


def test_a_local_objective_reaches_its_own_feedback_alone():
    net, x, y = two_layers()
    silent = fa.convert(copy.deepcopy(net), "primitives", seed=1)
    strong = fa.convert(net, "primitives", seed=1, decay=10.0, amp=30.0, null=20.0, sparse=40.0, self_=50.0)
    without, with_it = all_gradients(silent, x, y), all_gradients(strong, x, y)
    assert without.keys() == with_it.keys()
    for name, g in with_it.items():
        if name.endswith("feedback.B"):
            assert torch.count_nonzero(without[name]) == 0 and torch.count_nonzero(g) == g.numel()
        else:
            assert apart(g, without[name]) <= 1e-14


def test_a_local_objective_does_not_hear_of_another_layer():
    net, x, y = two_layers()
    name, options = COEFFICIENTS["all"]
    fa.convert(net, name, seed=1, **options)
    before = all_gradients(net, x, y)
    with torch.no_grad():
        net[3].weight.mul_(-3)
        net[3].feedback.B.mul_(7)
    after = all_gradients(net, x, y)
    assert torch.equal(before["0.feedback.B"], after["0.feedback.B"])
    assert (
        apart(after["3.feedback.B"], before["3.feedback.B"]) > 0.1
        and apart(after["0.weight"], before["0.weight"]) > 0.1
    )


def test_a_local_objective_does_not_hear_of_the_loss():
    net, x, y = two_layers()
    fa.convert(net, "primitives", seed=1, **COEFFICIENTS["all"][1])
    one, none = all_gradients(net, x, y), all_gradients(net, x, y, scale=0.0)
    for name, g in none.items():
        assert torch.equal(g, one[name]) if name.endswith("feedback.B") else torch.count_nonzero(g) == 0


# ------------------------------------------------------------------------------------------ fixed points and rates, p2 6.1


def colored(n=60, inputs=5, spread=True):
    """A full batch whose second moment is the identity, or has eigenvalues 2, 1.5, ..., off the axes."""
    x = randn(n, inputs, seed=2)
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    scale = torch.linspace(2, 0.4, inputs, dtype=torch.float64) if spread else torch.ones(inputs, dtype=torch.float64)
    return math.sqrt(n) * (U * scale.sqrt()) @ Vh


def descent(layer, x, lr, steps):
    """Gradient descent of the feedback with W frozen; B at every step, the first one included."""
    layer.weight.requires_grad_(False)
    opt = torch.optim.SGD(layer.feedback.parameters(), lr=lr)
    path = [layer.feedback.B.detach().clone()]
    for _ in range(steps):
        opt.zero_grad()
        layer(x).sum().backward()
        opt.step()
        path.append(layer.feedback.B.detach().clone())
    return path


def rates_and_target(rule, W, x):
    """Closed forms of p2 6.1, in W's shape: the fixed point, a basis of modes (U B V) and the rate of each."""
    d, a, n, p, s = rule.decay, rule.amp, rule.null, rule.sparse, rule.self_
    Sigma = x.T @ x / x.shape[0]
    Sy = W @ Sigma @ W.T
    one_out, one_in = torch.eye(W.shape[0]).to(W), torch.eye(W.shape[1]).to(W)
    match rule.name:
        case "wm":
            return a / (2 * d) * W @ Sigma, one_out, one_in, torch.full_like(W, 2 * d)
        case "ia":
            w, U = torch.linalg.eigh(Sy)
            rates = 2 * (n * w + d)
            return (
                a * torch.linalg.solve(2 * n * Sy + 2 * d * one_out, W @ Sigma),
                U.T,
                one_in,
                rates[:, None].expand_as(W),
            )
        case "sa":
            return s / (2 * d) * W, one_out, one_in, torch.full_like(W, 2 * d)
        case "aa":
            w, V = torch.linalg.eigh(Sigma)
            return a / (2 * p) * W, one_out, V, (2 * p * w).expand_as(W)
    raise AssertionError(rule.name)


FLOWS = {
    "wm": {"decay": 0.05, "amp": 0.2},
    "ia": {"decay": 0.05, "amp": 0.3, "null": 0.1},
    "sa": {"decay": 0.05, "self_": 0.2},
    "aa": {"amp": 0.3, "sparse": 0.1},
}


@pytest.mark.parametrize("rule", FLOWS)
@pytest.mark.parametrize("spread", [False, True], ids=["white", "coloured"])
def test_fixed_points_and_relaxation_rates(rule, spread):
    layer, x = make("linear")[0], colored(spread=spread)
    fa.convert(layer, rule, seed=3, **FLOWS[rule])
    W = layer.weight.detach()
    target, U, V, rates = rates_and_target(layer.feedback.rule, W, x)
    lr = 1 / rates.max().item()
    assert rates.min() > 0.01 * rates.max()
    path = descent(layer, x, lr, 40)
    away = [U @ (B - target) @ V for B in path]
    assert away[0].abs().min() > 1e-4
    for t, D in enumerate(away):  # every mode shrinks by its own factor in every step
        assert ((D - (1 - lr * rates) ** t * away[0]).abs().max() / away[0].abs().max()).item() <= 1e-12
    end = descent(layer, x, lr, math.ceil(40 / (lr * rates.min().item())))[-1]
    assert apart(end, target) <= 1e-12


def test_where_the_fixed_points_point():
    """White input: wm, sa and aa end at W, ia does not. Coloured input: sa and aa still do, wm no longer."""
    angles = {}
    for spread in (False, True):
        for rule, options in FLOWS.items():
            layer, x = make("linear")[0], colored(spread=spread)
            fa.convert(layer, rule, seed=3, **options)
            rates = rates_and_target(layer.feedback.rule, layer.weight.detach(), x)[3]
            descent(layer, x, 1 / rates.max().item(), math.ceil(40 * (rates.max() / rates.min()).item()))
            angles[rule, spread] = fa.alignment(layer).angle_deg.item()
    assert max(angles[k] for k in (("wm", False), ("sa", False), ("sa", True), ("aa", False), ("aa", True))) < 1e-5
    assert angles["wm", True] > 5 and angles["ia", False] > 5 and angles["ia", True] > 5


@pytest.mark.parametrize("rule", FLOWS)
def test_rates_set_the_largest_step(rule):
    """Gradient descent converges below lr * rate = 2 and diverges above."""
    layer, x = make("linear")[0], colored()
    fa.convert(layer, rule, seed=3, **FLOWS[rule])
    target, U, V, rates = rates_and_target(layer.feedback.rule, layer.weight.detach(), x)
    start = (layer.feedback.B.detach() - target).norm()
    for factor, shrinks in ((1.98, True), (2.02, False)):
        path = descent(copy.deepcopy(layer), x, factor / rates.max().item(), 600)
        assert ((path[-1] - target).norm() < start).item() is shrinks


@pytest.mark.parametrize("positions", ["mean", "sum"])
@pytest.mark.parametrize("rule", ["wm", "aa", "sa"])
def test_fixed_points_of_a_convolution(rule, positions):
    """As in a linear layer on patches, with C = <sum over positions of patch patch^T> in place of Sigma (p2 1.5)."""
    layer = oracles.fixed_weights(nn.Conv2d(2, 3, 2, stride=2).double())
    x = randn(30, 2, 6, 4, seed=4)
    fa.convert(layer, rule, seed=3, positions=positions, **FLOWS[rule])
    r, W = layer.feedback.rule, layer.weight.detach().flatten(1)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # (n, positions, patch)
    C = torch.einsum("npi,npj->ij", patches, patches) / x.shape[0]
    C = C / patches.shape[1] if positions == "mean" else C
    target = {
        "wm": r.amp / (2 * r.decay or 1) * W @ C,
        "aa": r.amp / (2 * r.sparse or 1) * W,
        "sa": r.self_ / (2 * r.decay or 1) * W,
    }[rule]
    fastest = 2 * r.sparse * torch.linalg.eigvalsh(C) if rule == "aa" else torch.tensor([2 * r.decay])
    B = descent(layer, x, 1 / fastest.max().item(), math.ceil(40 * (fastest.max() / fastest.min()).item()))[-1]
    assert apart(B.flatten(1), target) <= 1e-11


def test_weight_decay_of_the_optimizer_shifts_the_fixed_point_and_param_groups_add_none():
    layer, x = make("linear")
    fa.convert(layer, "sa", seed=3, decay=0.1, self_=0.2)
    layer.weight.requires_grad_(False)
    ends = []
    for groups in (
        fa.param_groups(layer, 1.0, weight_decay=0.2),
        [{"params": [layer.feedback.B], "weight_decay": 0.2}],
    ):
        opt = torch.optim.SGD(groups, lr=1.0)
        for _ in range(200):
            opt.zero_grad()
            layer(x).sum().backward()
            opt.step()
        ends.append(layer.feedback.B.detach().clone())
    assert apart(ends[0], layer.weight) < 1e-12
    assert apart(ends[1], layer.weight / 2) < 1e-12  # 2 d B + 0.2 B = 0.2 W


# ------------------------------------------------------------------------------------------ param_groups and optimizers

OWN_DECAY = {"wm": {}, "ia": {}, "sa": {}, "aa": {}, "primitives": {"amp": 1e-3, "decay": 1e-3}}
own_decay = pytest.mark.parametrize("rule", OWN_DECAY)


@own_decay
def test_own_decay_feedback_has_a_group_of_its_own(rule):
    net, x, y = two_layers()
    fa.convert(net, rule, **OWN_DECAY[rule])
    groups = fa.param_groups(net, 0.1, weight_decay=1e-2, feedback_lr=0.03)
    feedback = {id(p) for p in fa.feedback_parameters(net)}
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 1e-2), (0.03, 0.0)]
    assert {id(p) for p in groups[1]["params"]} == feedback
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in net.parameters()} - feedback
    assert fa.param_groups(net, 0.1)[1]["lr"] == 0.1
    before, g = {n: p.detach().clone() for n, p in net.named_parameters()}, all_gradients(net, x, y)
    torch.optim.SGD(groups).step()
    for n, p in net.named_parameters():
        moved = 0.03 * g[n] if n.endswith("feedback.B") else 0.1 * (g[n] + 1e-2 * before[n])
        assert apart(before[n] - p.detach(), moved) < 1e-9


@pytest.mark.parametrize("rule", ["kp", "pfa"])
def test_feedback_that_follows_the_weight_shares_its_group(rule):
    net = fa.convert(two_layers()[0], rule)
    (group,) = fa.param_groups(net, 0.1, weight_decay=1e-2, feedback_lr=0.03)
    assert (group["lr"], group["weight_decay"]) == (0.1, 1e-2) and len(group["params"]) == len(list(net.parameters()))


@own_decay
def test_an_optimizer_without_the_feedback_raises_at_its_second_step(rule):
    net, x, y = two_layers()
    opt = torch.optim.SGD(net.parameters(), lr=0.01)
    fa.convert(net, rule, **OWN_DECAY[rule])
    F.cross_entropy(net(x), y).backward()
    opt.step()
    with pytest.raises(RuntimeError, match="no optimizer holds the feedback of 2 layers"):
        opt.step()
    opt.add_param_group({"params": fa.feedback_parameters(net)})
    opt.step()


# ------------------------------------------------------------------------------------------ noise of its own


def noisy(seed=1, **options):
    layer = oracles.fixed_weights(nn.Linear(5, 4).double())
    return fa.convert(layer, "wm", seed=seed, input="normal", **options)


def draws(layer, n):
    return [learned_gradient(layer, randn(6, 5, seed=9)).clone() for _ in range(n)]


def test_noise_depends_on_the_seed_and_on_nothing_else():
    layer, before = noisy(), torch.get_rng_state()
    a = draws(layer, 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(17)
    b = draws(noisy(), 3)
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    other = noisy(seed=2)
    other.load_state_dict({k: v for k, v in noisy().state_dict().items() if "extra" not in k}, strict=False)  # B alike
    assert all(apart(p, q) > 1e-3 for p, q in zip(a, draws(other, 3)))
    net = fa.convert(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), "wm", input="normal")
    first, second = (layer.feedback.op.noise(torch.zeros(3, 5), "normal") for layer in net)
    assert not torch.equal(first, second)  # and on the layer


def test_noise_goes_on_where_a_saved_network_stopped():
    layer, file = noisy(), io.BytesIO()
    draws(layer, 2)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = noisy(seed=5)
    draws(other, 7)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(draws(layer, 3), draws(other, 3)))


def test_a_copy_has_noise_of_its_own():
    layer = noisy()
    draws(layer, 2)
    copied = copy.deepcopy(layer)
    a = draws(layer, 3)
    assert all(torch.equal(p, q) for p, q in zip(a, draws(copied, 3)))  # drawing from one did not move the other


def test_evaluation_draws_no_noise():
    layer = noisy()
    state = layer.feedback.get_extra_state().clone()
    with torch.no_grad():
        layer(randn(6, 5, seed=9))
    layer(randn(6, 5, seed=9))  # nor does a forward pass
    assert torch.equal(state, layer.feedback.get_extra_state())
    draws(layer, 1)
    assert not torch.equal(state, layer.feedback.get_extra_state())


@pytest.mark.parametrize("kind, half", [("normal", True), pytest.param("uniform", False, marks=pytest.mark.slow)])
def test_compiled_steps_draw_the_same_noise(kind, half):
    """Layers that draw noise stay out of the compiled graphs; they draw from their own generators, and leave the
    global one alone."""
    torch.compiler.reset()

    def gradients(net):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, half):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        return [p.grad.clone() for p in net.parameters()]

    for seed in range(2):
        net, x, y = oracles.resnet(torch.float32)
        fa.convert(net, "ia", seed=seed, input=kind, input_std=0.5 + seed)
        twin, before = copy.deepcopy(net), torch.get_rng_state()
        compiled = torch.compile(twin, backend="aot_eager")
        for _ in range(2):
            want, got = gradients(net), gradients(compiled)
            assert all(apart(p, q) < 1e-5 for p, q in zip(got, want, strict=True))
        for a, b in zip(converted(net).values(), converted(twin).values(), strict=True):
            assert torch.equal(a.feedback.get_extra_state(), b.feedback.get_extra_state())
        assert torch.equal(before, torch.get_rng_state())


def test_a_graph_without_breaks_refuses_noise_in_a_clear_sentence():
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="draws noise .* is not compiled; leave fullgraph out"):
        torch.compile(noisy(), backend="aot_eager", fullgraph=True)(randn(6, 5, seed=9))


# ------------------------------------------------------------------------------------------ where the rule must be backprop


@pytest.mark.parametrize("rule", ["frsf", "brsf", "sa", "aa", "frozen", "ia", "wm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_matched_feedback_is_backprop_bit_for_bit(rule, dtype):
    net, x, y = oracles.resnet(dtype)
    plain = grads(copy.deepcopy(net), x, y)
    fa.convert(net, rule)
    random = grads(net, x, y)
    with torch.no_grad():
        for layer in converted(net).values():
            fb = layer.feedback
            (fb.M if rule.endswith("rsf") else fb.B).copy_(layer.weight.abs() if rule.endswith("rsf") else layer.weight)
    matched = grads(net, x, y)
    assert all(torch.equal(matched[n], g) for n, g in plain.items())
    assert rule == "frozen" or apart(random["stem.weight"], plain["stem.weight"]) > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_the_next_layer_may_work_in_place(bias):
    def run(inplace):
        net = oracles.fixed_weights(nn.Sequential(nn.Linear(5, 4, bias), nn.ReLU(inplace), nn.Linear(4, 3)).double())
        fa.convert(net, "wm", seed=1)
        F.cross_entropy(net(randn(6, 5, seed=3)), torch.arange(6) % 3).backward()
        return {n: p.grad for n, p in net.named_parameters()}

    want, got = run(False), run(True)
    assert all(torch.equal(got[n], g) for n, g in want.items())


def test_one_vector_is_a_batch_of_one():
    layer = oracles.fixed_weights(nn.Linear(5, 4).double())
    for options in ({}, {"center": True}):
        fa.convert(layer, "primitives", seed=1, **COEFFICIENTS["all"][1], **options)
        x = randn(5, seed=3)
        batch = learned_gradient(layer, x[None]).clone()
        assert apart(learned_gradient(layer, x), batch) <= oracles.RTOL


@dataclass(frozen=True)
class Gain(fa.Rule):
    """Somebody's own rule, with a number of its own in the kernel and in the feedback's gradient."""

    name, equation, source, learned = "gain", "dx = g W^T dy", "test", ("B",)
    gain: float = 2.0

    def init_state(self, op, W, gen):
        return {"B": W.clone()}

    def kernel(self, W):
        return self.gain * W

    def feedback_grad(self, dW, W, B):
        return {"B": dW + self.gain * (B - W)}


def test_networks_of_other_coefficients_are_compiled_in_one_process():
    """From the second on their numbers are inputs of the compiled graph, of which the backward pass is a part."""
    torch.compiler.reset()
    rules = [
        ("ia", {}),
        ("aa", {}),
        ("wm", {}),
        ("sa", {}),
        ("aa", {"amp": 0.3}),
        (Gain(), {}),
        (Gain(gain=3.0), {}),
        (Gain(gain=0.5), {}),
    ]
    x, y = randn(4, 2, 5, 5, seed=3), torch.arange(4)
    for rule, options in rules:
        net = fa.convert(two_layers()[0], rule, **options)
        want = all_gradients(net, x, y)
        got = all_gradients(torch.compile(net, backend="aot_eager", fullgraph=True), x, y)
        assert apart(got.pop("x"), want.pop("x")) <= oracles.RTOL
        assert all(apart(got["_orig_mod." + k], g) <= oracles.RTOL for k, g in want.items()), (rule, options)


# ------------------------------------------------------------------------------------------ sparse feedback


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa", "frsf", "brsf", "frozen"])
def test_sparse_feedback_carries_errors_on_the_entries_that_exist(rule):
    layer = oracles.fixed_weights(nn.Linear(60, 50).double())
    dense = fa.feedback_weight(fa.convert(copy.deepcopy(layer), rule, seed=1))
    fa.convert(layer, rule, seed=1, density=0.3)
    K = fa.feedback_weight(layer)
    alive = K != 0
    assert alive.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(K[alive], dense[alive])  # not rescaled
    dy = randn(7, 50, seed=2)
    got = oracles.under_rule(layer, randn(7, 60, seed=3), dy)
    assert apart(got["x"], dy @ torch.where(alive, dense, 0.0)) <= oracles.RTOL


@pytest.mark.parametrize("rule", ["wm", "brsf", "frozen"])
def test_sparse_feedback_stays_sparse_after_steps(rule):
    layer = fa.convert(nn.Linear(60, 50).double(), rule, density=0.3, **({"every": 1} if rule == "frozen" else {}))
    alive = fa.feedback_weight(layer) != 0
    opt = torch.optim.SGD(fa.param_groups(layer, 0.1))
    for k in range(3):
        layer(randn(7, 60, seed=k)).square().sum().backward()
        opt.step()
    assert torch.equal(fa.feedback_weight(layer) != 0, alive)


# ------------------------------------------------------------------------------------------ magnitudes redrawn every step


def signs(seed=1, **options):
    net, x, y = oracles.mlp(6, 9, 3)
    return fa.convert(net, "brsf", seed=seed, **options), x, y


def magnitudes(net):
    return torch.cat([m.feedback.M.abs().flatten() for m in converted(net).values()]).clone()


OPTIMIZERS = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_magnitudes_change_once_in_every_optimizer_step_and_only_then(optimizer):
    net, x, y = signs()
    opt, elsewhere = OPTIMIZERS[optimizer](net.parameters()), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    want = fa.convert(oracles.mlp(6, 9, 3)[0], "brsf", seed=1)
    for step in range(1, 4):
        M = magnitudes(net)
        net.eval()(x), net.train()(x)
        with torch.no_grad():
            net(x)
        for _ in range(2):  # accumulation
            F.cross_entropy(net(x), y).backward()
        opt.zero_grad()
        elsewhere.step()
        assert torch.equal(M, magnitudes(net))
        F.cross_entropy(net(x), y).backward()
        opt.step()
        fa.after_step(want)
        assert (magnitudes(net) != M).all()
        assert torch.equal(magnitudes(net), magnitudes(want))
        assert all(m.feedback.step.item() == step for m in converted(net).values())


def test_magnitudes_are_a_function_of_seed_layer_and_step():
    net, x, y = signs()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        F.cross_entropy(net(x), y).backward()
        opt.step()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    resumed, *_ = signs()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(net)
    for k in range(2):
        for n in (net, resumed, copied):
            with torch.no_grad():  # other weights than the first's: the draw does not see them
                n[0].weight.add_(0.01 * (n is copied))
            fa.after_step(n)
        assert torch.equal(magnitudes(net), magnitudes(resumed)) and torch.equal(magnitudes(net), magnitudes(copied))
    other, *_ = signs(seed=2)
    for _ in range(5):
        fa.after_step(other)
    assert (magnitudes(other) != magnitudes(net)).all()
    twins = fa.convert(oracles.fixed_weights(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))), "brsf")
    fa.after_step(twins)
    assert not torch.equal(twins[0].feedback.M, twins[1].feedback.M)


def test_a_skipped_step_redraws_nothing():
    net, x, y = signs()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(net(x * math.inf), y)).backward()
    M = magnitudes(net)
    scaler.step(opt)  # gradients are not finite
    assert torch.equal(M, magnitudes(net))


# p1 1.3: the angle to W that a rule has by construction; cos = E|w| E|b| / sqrt(E w^2 E b^2)
ANGLES = {
    ("usf", "uniform"): 30.0,
    ("frsf", "uniform"): math.degrees(math.acos(3 / 4)),
    ("brsf", "uniform"): math.degrees(math.acos(3 / 4)),
    ("usf", "normal"): math.degrees(math.acos(math.sqrt(2 / math.pi))),
    ("frsf", "normal"): 46.3,
    ("brsf", "normal"): 46.3,
    ("fa", "uniform"): 90.0,
}


@pytest.mark.parametrize("rule, weights", ANGLES)
def test_angles_by_construction(rule, weights):
    layer = nn.Conv2d(100, 100, 5)
    gen = oracles.rng(3)
    with torch.no_grad():
        getattr(layer.weight, f"{weights}_")(generator=gen)
        if weights == "uniform":
            layer.weight.mul_(2).sub_(1)
    fa.convert(layer, rule, seed=1)
    for step in range(2):
        row = fa.alignment(layer).iloc[0]
        assert row.angle_deg == pytest.approx(ANGLES[rule, weights], abs=0.25)
        assert row.norm_ratio == pytest.approx(1, abs=0.01)  # init="match"
        assert row.sign_concordance == pytest.approx(0.5 if rule == "fa" else 1, abs=0.005)
        if rule == "brsf":
            fa.after_step(layer)


# ------------------------------------------------------------------------------------------ a copy refreshed now and then


def step_weights(net, opt, k):
    opt.zero_grad()
    F.cross_entropy(net(randn(16, 6, seed=k)), torch.arange(16) % 3).backward()
    opt.step()


@pytest.mark.parametrize("every", [0, 1, 2, 5])
def test_refresh_schedule(every):
    net = fa.convert(oracles.mlp(6, 9, 3)[0], "frozen", every=every)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    assert torch.equal(net[0].feedback.B, net[0].weight)
    held = net[0].weight.detach().clone()
    for step in range(1, 12):
        step_weights(net, opt, step)
        if every and step % every == 0:
            held = net[0].weight.detach().clone()
        assert torch.equal(net[0].feedback.B, held)
        assert not every or torch.equal(net[0].feedback.B, net[0].weight) == (step % every == 0)


def test_partial_refresh():
    def run(seed):
        net = oracles.fixed_weights(nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3)).double())
        fa.convert(net, "frozen", every=2, part=0.3, seed=seed)
        opt, taken = torch.optim.SGD(net.parameters(), lr=0.1), []
        for step in range(1, 5):
            before = net[0].feedback.B.clone()
            step_weights(net, opt, step)
            now = net[0].feedback.B
            changed = now != before
            assert torch.equal(now, torch.where(changed, net[0].weight, before))
            assert changed.any().item() == (step % 2 == 0)
            taken += [changed] if step % 2 == 0 else []
        return taken

    first = run(1)
    assert all(t.double().mean().item() == pytest.approx(0.3, abs=0.04) for t in first)
    assert not torch.equal(*first)  # another part each time
    assert all(torch.equal(a, b) for a, b in zip(first, run(1)))
    assert not any(torch.equal(a, b) for a, b in zip(first, run(2)))


# ------------------------------------------------------------------------------------------ dense feedback between maps

DENSE = {
    "stride and padding": (dict(in_channels=2, out_channels=3, kernel_size=3, stride=2, padding=1), (2, 2, 6, 5)),
    "groups": (dict(in_channels=4, out_channels=6, kernel_size=3, padding=(1, 0), groups=2, bias=False), (3, 4, 5, 4)),
    "dilation": (dict(in_channels=2, out_channels=3, kernel_size=2, dilation=(2, 1), padding="same"), (2, 2, 5, 4)),
    "1x1": (dict(in_channels=3, out_channels=2, kernel_size=1, stride=2), (2, 3, 5, 5)),
    "circular": (dict(in_channels=2, out_channels=3, kernel_size=3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
}
dense = pytest.mark.parametrize("case", list(DENSE))


@dense
def test_dense_feedback_is_a_matrix_between_flattened_maps(case):
    arguments, shape = DENSE[case]
    layer, x = oracles.fixed_weights(nn.Conv2d(**arguments).double()), randn(*shape, seed=3)
    out = layer(x).detach()
    dy = randn(*out.shape, seed=4)
    stock = copy.deepcopy(layer)
    below = x.clone().requires_grad_()
    stock(below).backward(dy)
    fa.convert(layer, "fa", form="dense", sample=x, seed=1)
    B = layer.feedback.B
    assert B.shape == (out[0].numel(), x[0].numel())
    got = oracles.under_rule(layer, x, dy)
    B_map = B.view(*out.shape[1:], *x.shape[1:])  # (out, h', w', in, h, w)
    assert apart(got["x"], torch.einsum("nopq,opqihw->nihw", dy, B_map)) <= oracles.RTOL
    assert torch.equal(got["W"], stock.weight.grad) and ("b" not in got or torch.equal(got["b"], stock.bias.grad))
    assert torch.equal(layer(x), out)
    # with the matrix that the convolution itself is, it is backprop
    J = torch.autograd.functional.jacobian(
        lambda v: stock._conv_forward(v[None], stock.weight.detach(), None)[0].flatten(), x[0]
    )
    B.copy_(J.reshape(B.shape))
    assert apart(oracles.under_rule(layer, x, dy)["x"], below.grad) <= oracles.RTOL


def test_dense_feedback_in_a_network():
    net = oracles.fixed_weights(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5)).double())
    x = randn(3, 2, 5, 5, seed=3)
    fa.convert(net, "fa", form="dense", sample=x, seed=1)
    assert net[0].feedback.B.shape == (36, 50) and net[3].feedback.B.shape == (5, 36)
    assert fa.alignment(net).layer.tolist() == ["3"]
    with pytest.raises(fa.UserError, match="dense"):
        fa.feedback_weight(net[0])
    opt = torch.optim.SGD(fa.param_groups(net, 0.1))
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), torch.arange(3))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_dense_feedback_scale():
    """init="match": the Frobenius norm of the matrix that the convolution is, borders aside; else what is asked for."""
    layer, x = nn.Conv2d(3, 8, 3, padding=1, padding_mode="zeros").double(), randn(1, 3, 30, 30, seed=1)
    B = fa.convert(copy.deepcopy(layer), "fa", form="dense", sample=x).feedback.B
    own = layer.weight.norm() * math.sqrt(30 * 30)  # every output position has one copy of the kernel
    assert (B.norm() / own).item() == pytest.approx(1, rel=0.01)
    B = fa.convert(copy.deepcopy(layer), "fa", form="dense", sample=x, init=0.2, density=0.25).feedback.B
    assert (B != 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert B[B != 0].std().item() == pytest.approx(0.2, rel=0.01)


def test_dense_feedback_needs_a_sample_and_says_so():
    layer = nn.Conv2d(2, 3, 3)
    with pytest.raises(fa.UserError, match="sample=x"):
        fa.convert(layer, "fa", form="dense")
    assert type(layer) is nn.Conv2d
    with pytest.raises(fa.UserError, match="form"):
        fa.convert(layer, "fa", form="matrix")
    with pytest.raises(fa.UserError, match="track"):
        fa.convert(layer, "fa", form="dense", norm="track", sample=torch.zeros(1, 2, 5, 5))
