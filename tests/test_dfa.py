"""Direct feedback alignment against gradients derived by hand: every layer's input gets the error at the output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa
import oracles
from fa.layers.hooks import converted
from oracles import apart, cosine, grads, randn


def softmax_error(logits, y):
    """dloss/dlogits of the mean cross-entropy."""
    return (logits.softmax(-1) - F.one_hot(y, logits.shape[-1])) / logits.shape[:-1].numel()


def sent(layer, e, shape):
    """What a convolution's input gets: e at every output position, sent down through the layer's geometry and B."""
    B = layer.feedback.B
    full = F.conv2d(torch.zeros(shape, dtype=B.dtype), B, None, layer.stride, layer.padding, layer.dilation)
    tiled = e[:, :, None, None].expand(-1, -1, *full.shape[2:]).contiguous()
    return torch.nn.grad.conv2d_input(shape, B, tiled, layer.stride, layer.padding, layer.dilation)


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
@pytest.mark.parametrize("options", [{}, {"init": "xavier"}, {"init": 0.2, "density": 0.5}])
def test_mlp_by_hand(activation, options):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 4)

        def forward(self, x):
            return self.out(activation(self.two(activation(self.one(x)))))

    net = fa.convert(oracles.fixed_weights(Net().double()), "dfa", **options)
    x, y = randn(6, 5, seed=1).requires_grad_(), torch.arange(6) % 4
    F.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        z1 = x @ net.one.weight.T + net.one.bias
        h1 = activation(z1)
        z2 = h1 @ net.two.weight.T + net.two.bias
        h2 = activation(z2)
        e = softmax_error(h2 @ net.out.weight.T + net.out.bias, y)
        slope = (lambda z: 1 - torch.tanh(z) ** 2) if activation is torch.tanh else (lambda z: (z > 0).double())
        B1, B2, B3 = (m.feedback.B for m in (net.one, net.two, net.out))
        delta1, delta2 = slope(z1) * (e @ B2), slope(z2) * (e @ B3)
    assert [tuple(B.shape) for B in (B1, B2, B3)] == [(4, 5), (4, 8), (4, 7)]
    assert apart(x.grad, e @ B1) < 1e-13
    for layer, delta, below in ((net.one, delta1, x.detach()), (net.two, delta2, h1), (net.out, e, h2)):
        assert apart(layer.weight.grad, delta.T @ below) < 1e-13
        assert apart(layer.bias.grad, delta.sum(0)) < 1e-13


GEOMETRY = [
    dict(kernel_size=3),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 0)),
    dict(kernel_size=2, stride=3),
    dict(kernel_size=3, dilation=2, padding=2),
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=1, stride=2, bias=False),
]


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("size", [(7, 6), (8, 8)])
def test_conv_net_by_hand(geometry, size):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, **geometry), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )
    x, y = randn(2, 2, *size, seed=1).requires_grad_(), torch.arange(2)
    net.double()(x)
    fa.convert(oracles.fixed_weights(net), "dfa")
    F.cross_entropy(net(x), y).backward()
    one, two, out = net[0], net[2], net[5]
    with torch.no_grad():
        h1 = torch.tanh(F.conv2d(x, one.weight, one.bias, padding=1))
        z2 = F.conv2d(h1, two.weight, two.bias, two.stride, two.padding, two.dilation, two.groups)
        h2 = torch.tanh(z2)
        e = softmax_error(F.linear(h2.flatten(1), out.weight, out.bias), y)
        delta2 = (1 - h2**2) * (e @ out.feedback.B).view_as(h2)
        delta1 = (1 - h1**2) * sent(two, e, h1.shape)
    assert apart(x.grad, sent(one, e, x.shape)) < 1e-13
    assert apart(out.weight.grad, e.T @ h2.flatten(1)) < 1e-13
    want = torch.nn.grad.conv2d_weight(h1, two.weight.shape, delta2, two.stride, two.padding, two.dilation, two.groups)
    assert apart(two.weight.grad, want) < 1e-13
    assert apart(one.weight.grad, torch.nn.grad.conv2d_weight(x.detach(), one.weight.shape, delta1, padding=1)) < 1e-13
    assert apart(one.bias.grad, delta1.sum((0, 2, 3))) < 1e-13


def test_same_padding_is_the_padding_that_it_stands_for():
    grads_of = []
    for padding in ("same", 2):
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 3, 5, padding=padding),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        fa.convert(oracles.fixed_weights(net.double()), "dfa")
        grads_of.append(grads(net, randn(2, 2, 6, 6, seed=1), torch.arange(2)))
    assert all(apart(grads_of[0][k], g) < 1e-14 for k, g in grads_of[1].items())


def test_the_input_may_change_its_size():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    fa.convert(oracles.fixed_weights(net.double()), "dfa")
    fresh = copy.deepcopy(net)
    for size in (8, 5, 8):
        x, y = randn(2, 2, size, size, seed=1), torch.arange(2)
        got = grads(net, x, y)
    want = grads(fresh, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_skip_adds_its_own_error():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.out = (
                nn.Conv2d(2, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Linear(4, 3),
            )

        def forward(self, x):
            h = torch.tanh(self.stem(x))
            return self.out(torch.tanh(h + self.inner(h)).mean((2, 3)))

    net = fa.convert(oracles.fixed_weights(Net().double()), "dfa")
    x, y = randn(2, 2, 5, 5, seed=1), torch.arange(2)
    got = grads(net, x, y)
    with torch.no_grad():
        h = torch.tanh(F.conv2d(x, net.stem.weight, net.stem.bias, padding=1))
        top = torch.tanh(h + F.conv2d(h, net.inner.weight, net.inner.bias, padding=1))
        e = softmax_error(F.linear(top.mean((2, 3)), net.out.weight, net.out.bias), y)
        above = (1 - top**2) * (e @ net.out.feedback.B)[:, :, None, None] / 25  # below the mean, exact
        below = (1 - h**2) * (sent(net.inner, e, h.shape) + above)  # by B of the convolution, and by the skip
    assert apart(got["inner.weight"], torch.nn.grad.conv2d_weight(h, net.inner.weight.shape, above, padding=1)) < 1e-13
    assert apart(got["stem.weight"], torch.nn.grad.conv2d_weight(x, net.stem.weight.shape, below, padding=1)) < 1e-13


def test_a_block_that_is_cut_adds_no_error_of_its_skip():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, h):
            return h + self.inner(h)

    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), Block(), nn.Flatten(), nn.Linear(100, 3))
    fa.convert(oracles.fixed_weights(net.double()), "dfa", tap="block", blocks="Block")
    x, y = randn(2, 2, 5, 5, seed=1), torch.arange(2)
    got = grads(net, x, y)
    with torch.no_grad():
        h = torch.tanh(net[0](x))
        e = softmax_error(net(x), y)
        below = (1 - h**2) * sent(net[2].inner, e, h.shape)  # by B of the convolution alone
        above = (e @ net[4].feedback.B).view(h.shape)
    assert apart(got["2.inner.weight"], torch.nn.grad.conv2d_weight(h, (4, 4, 3, 3), above, padding=1)) < 1e-13
    assert apart(got["0.weight"], torch.nn.grad.conv2d_weight(x, (4, 2, 3, 3), below, padding=1)) < 1e-13


def test_a_residual_network_with_batch_norm_equals_the_cut_graph():
    """The same network with every layer's input detached by hand, each given its own error from above."""
    net, x, y = oracles.resnet()
    fa.convert(net, "dfa", init="xavier")
    got = grads(net, x, y)
    layers = {m: (m.feedback.B, n) for n, m in converted(net).items()}
    stock, taps = copy.deepcopy(net), []
    fa.convert(stock, "bp")
    stock.load_state_dict(copy.deepcopy(stock.state_dict()))
    names = {n: B for B, n in layers.values()}

    def cut(module, args, name):
        taps.append((args[0], names[name], module))
        return (args[0].detach(),)

    for name, m in stock.named_modules():
        if name in names:
            m.register_forward_pre_hook(lambda m, args, name=name: cut(m, args, name))
    logits = stock(x)
    e = softmax_error(logits.detach(), y)
    stock.zero_grad()
    roots, errors = [logits], [e]
    for below, B, m in taps:
        if below.requires_grad:
            m.feedback = type("", (), {"B": B})()
            roots.append(below)
            errors.append(e @ B if isinstance(m, nn.Linear) else sent(m, e, below.shape))
    torch.autograd.backward(roots, errors)
    want = {n: p.grad for n, p in stock.named_parameters()}
    assert want.keys() == got.keys()
    assert all(apart(got[n], g) < 1e-12 for n, g in want.items())


def test_tokens_share_the_error_of_their_sample():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 4)

        def forward(self, x):
            return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))).mean(1))

    net = fa.convert(oracles.fixed_weights(Net().double()), "dfa")
    x, y = randn(3, 6, 5, seed=1), torch.arange(3)
    got = grads(net, x, y)
    with torch.no_grad():
        h1 = torch.tanh(F.linear(x, net.one.weight, net.one.bias))
        h2 = torch.tanh(F.linear(h1, net.two.weight, net.two.bias))
        e = softmax_error(F.linear(h2.mean(1), net.out.weight, net.out.bias), y)
        delta1 = (1 - h1**2) * (e @ net.two.feedback.B)[:, None]
        delta2 = (1 - h2**2) * (e @ net.out.feedback.B)[:, None] / 6
    assert apart(got["one.weight"], torch.einsum("nto,nti->oi", delta1, x)) < 1e-13
    assert apart(got["two.weight"], torch.einsum("nto,nti->oi", delta2, h1)) < 1e-13


def test_an_error_for_every_token():
    net = fa.convert(oracles.fixed_weights(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()), "dfa")
    x, y = randn(3, 6, 5, seed=1), torch.arange(18) % 4
    got = grads(net, x, y, lambda out, y: F.cross_entropy(out.flatten(0, 1), y))
    with torch.no_grad():
        h = torch.tanh(F.linear(x, net[0].weight, net[0].bias))
        e = softmax_error(F.linear(h, net[2].weight, net[2].bias).flatten(0, 1), y).view(3, 6, 4)
        delta = (1 - h**2) * (e @ net[2].feedback.B)
    assert apart(got["0.weight"], torch.einsum("nto,nti->oi", delta, x)) < 1e-13


def test_every_gradient_scales_with_the_loss():
    net, x, y = oracles.resnet(torch.float32)
    fa.convert(net.eval(), "dfa")
    one, many = grads(net, x, y), grads(net, x, y, lambda out, y: 1024 * F.cross_entropy(out, y))
    assert all(torch.equal(many[k], 1024 * g) for k, g in one.items())


@pytest.mark.parametrize("path", ["eager", "autocast", "channels_last", "shards"])
def test_dfa_is_not_backprop_in_disguise(path):
    net, x, y = oracles.resnet(torch.float32)
    theirs = copy.deepcopy(net.eval())
    fa.convert(net, "dfa")

    def run(net):
        if path == "autocast":
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            return {n: p.grad for n, p in net.named_parameters()}
        if path == "shards":
            a, b = grads(net, x[:4], y[:4]), grads(net, x[4:], y[4:])
            return {k: (a[k] + b[k]) / 2 for k in a}
        if path == "channels_last":
            return grads(net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), y)
        return grads(net, x, y)

    eager = grads(copy.deepcopy(net), x, y)
    got, exact = run(net), run(theirs)
    for name in ("stem.weight", "block1.conv1.weight", "block1.conv2.weight"):
        assert abs(cosine(got[name], exact[name])) < 0.5
    assert cosine(got["fc.weight"], exact["fc.weight"]) > 0.99
    assert all(cosine(got[n], g) > (0.98 if path == "autocast" else 0.999999) for n, g in eager.items())


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, x, y = oracles.resnet(torch.float32)
        fa.convert(net.eval(), "dfa")
        want = grads(net, x, y)
        net.zero_grad(set_to_none=True)
        F.cross_entropy(nn.parallel.DistributedDataParallel(net)(x), y).backward()
        assert all(apart(p.grad, want[n]) < 1e-6 for n, p in net.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------- one matrix for the whole network


def shared_net():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(6 * 3 * 4, 7), nn.Tanh(), nn.Linear(7, 3),
    )  # fmt: skip
    return oracles.fixed_weights(net.double()), randn(3, 2, 5, 7, seed=1).requires_grad_(), torch.arange(3)


WIDTHS = {"0": 2 * 5 * 7, "2": 4 * 5 * 7, "5": 6 * 3 * 4, "7": 7}  # entries of one sample's input to each layer


def test_one_matrix_is_sliced_for_every_layer():
    net, x, y = shared_net()
    stds = {n: m.weight.square().mean().sqrt().item() for n, m in net.named_modules() if hasattr(m, "weight")}
    fa.convert(net, "dfa", form="shared", sample=x, seed=1)
    B = {n: m.feedback.B for n, m in converted(net).items()}
    assert {n: tuple(b.shape) for n, b in B.items()} == {
        "0": (3, 2, 5, 7),
        "2": (3, 4, 5, 7),
        "5": (3, 72),
        "7": (3, 7),
    }
    widest = B["2"].flatten(1) / stds["2"]  # the whole matrix, of standard deviation 1
    for name, width in WIDTHS.items():
        assert apart(B[name].flatten(1) / stds[name], widest[:, :width]) < 1e-14
    assert widest.std().item() == pytest.approx(1, rel=0.05) and widest.abs().max() <= 3**0.5
    again, other = (fa.convert(shared_net()[0], "dfa", form="shared", sample=x, seed=s)[0].feedback.B for s in (1, 2))
    assert torch.equal(again, B["0"]) and not torch.equal(other, B["0"])


@pytest.mark.parametrize("options", [{}, {"init": "xavier"}, {"init": 0.2, "density": 0.5}])
@pytest.mark.parametrize("form", ["shared", "dense"])
def test_one_column_for_every_unit_by_hand(form, options):
    net, x, y = shared_net()
    fa.convert(net, "dfa", form=form, sample=x, **options)
    F.cross_entropy(net(x), y).backward()
    one, two, three, out = net[0], net[2], net[5], net[7]
    with torch.no_grad():
        h1 = torch.tanh(F.conv2d(x, one.weight, one.bias, padding=1))
        h2 = torch.tanh(F.conv2d(h1, two.weight, None, 2, 1, groups=2))
        h3 = torch.tanh(F.linear(h2.flatten(1), three.weight, three.bias))
        e = softmax_error(F.linear(h3, out.weight, out.bias), y)
        sent_to = {
            n: torch.einsum("nc,ck->nk", e, m.feedback.B.flatten(1)) for n, m in zip("1234", (one, two, three, out))
        }
        delta3 = (1 - h3**2) * sent_to["4"]
        delta2 = (1 - h2**2) * sent_to["3"].view_as(h2)
        delta1 = (1 - h1**2) * sent_to["2"].view_as(h1)
    assert apart(x.grad, sent_to["1"].view_as(x)) < 1e-13
    assert apart(out.weight.grad, e.T @ h3) < 1e-13
    assert apart(three.weight.grad, delta3.T @ h2.flatten(1)) < 1e-13
    assert apart(two.weight.grad, torch.nn.grad.conv2d_weight(h1, two.weight.shape, delta2, 2, 1, groups=2)) < 1e-13
    assert apart(one.weight.grad, torch.nn.grad.conv2d_weight(x.detach(), one.weight.shape, delta1, padding=1)) < 1e-13
    assert apart(one.bias.grad, delta1.sum((0, 2, 3))) < 1e-13


def test_a_shared_matrix_is_sparse_once():
    net, x, _ = shared_net()
    fa.convert(net, "dfa", form="shared", sample=x, density=0.4)
    alive = {n: (m.feedback.B.flatten(1) != 0) for n, m in converted(net).items()}
    assert alive["2"].double().mean().item() == pytest.approx(0.4, abs=0.06)
    assert all(torch.equal(alive[n], alive["2"][:, :w]) for n, w in WIDTHS.items())


@pytest.mark.parametrize("form", ["shared", "dense"])
def test_feedback_for_every_unit_needs_a_sample(form):
    net, x, _ = shared_net()
    with pytest.raises(fa.UserError, match=f"form='{form}'.*sample=x"):
        fa.convert(net, "dfa", form=form)
    assert type(net[0]) is nn.Conv2d
    with pytest.raises(fa.UserError, match="kernel, dense, shared"):
        fa.convert(net, "dfa", form="one")


# ---------------------------------------------------------------------------------- what raises, and what does not


def test_a_part_of_the_network_called_by_itself_raises():
    net, x, _ = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")
    with pytest.raises(RuntimeError, match="'0'.*whole network"):
        net[0](x)
    with torch.no_grad():
        assert net[0](x).shape == (16, 9)  # to look at activations is fine
    net(x)
    with pytest.raises(RuntimeError, match="whole network"):
        net[2](net[0](x))


def test_a_step_with_saved_tensors_elsewhere_is_the_same():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")
    want = grads(net, x, y)
    with torch.autograd.graph.save_on_cpu():
        got = grads(net, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_failed_pass_does_not_spoil_the_next():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")
    want = grads(net, x, y)
    with pytest.raises(RuntimeError):
        net(x[:, :4])
    got = grads(net, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_wrong_number_of_classes_raises_and_names_the_remedy():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa", classes=4)
    with pytest.raises(fa.UserError, match="classes=3"):
        net(x)
    fa.convert(net, "dfa", classes=3)
    grads(net, x, y)
    pooled = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.MaxPool1d(2))
    fa.convert(pooled.double(), "dfa")
    with pytest.raises(fa.UserError, match="classes=4"):
        pooled(x)
    fa.convert(pooled, "dfa", classes=4)
    grads(pooled, x, y)
    assert pooled[2].feedback.B.shape == (4, 10)


@pytest.mark.parametrize("end", [nn.LogSoftmax(-1), nn.Softmax(-1), nn.Sigmoid(), nn.LogSigmoid()])
@pytest.mark.parametrize("n_out", [3, 1])
def test_A11_a_network_that_ends_in_probabilities_is_refused_for_their_error_is_none_of_logits(end, n_out):
    """Under log_softmax and nll_loss the error would be that of the labels, whatever the network says."""
    net, x, y = oracles.mlp(6, 9, n_out)
    net = fa.convert(nn.Sequential(net, end, nn.Flatten(0) if n_out == 1 else nn.Identity()), "dfa")
    with pytest.raises(fa.UserError, match=f"return them, and leave {type(end).__name__} to the loss"):
        net(x)
    with torch.no_grad():
        assert len(net(x)) == len(x)
    with fa.exact_backprop(net):
        net(x).square().sum().backward()
    net[1] = nn.Tanh()  # no loss takes it for probabilities
    net(x).square().sum().backward()


@pytest.mark.parametrize(
    "end",
    [
        lambda o: o.softmax(1).log(), lambda o: o - o.logsumexp(1, True), lambda o: o.softmax(1) + 1e-8,
        lambda o: 2 * torch.sigmoid(o), lambda o: o.softmax(1).clamp(1e-8).log().unsqueeze(0)[0],
    ],
)  # fmt: skip
def test_A11_probabilities_by_another_name_are_refused_too(end):
    class Net(nn.Sequential):
        def forward(self, x):
            return end(super().forward(x))

    net, x, _ = oracles.mlp(6, 9, 3)
    with pytest.raises(fa.UserError, match="to the loss"):
        fa.convert(Net(*net), "dfa")(x)


@pytest.mark.parametrize("end", [lambda o: o * 2 + 1, lambda o: o * torch.sigmoid(o), lambda o: o - o.mean(1, True)])
def test_logits_that_are_scaled_gated_or_centred_are_no_probabilities(end):
    class Net(nn.Sequential):
        def forward(self, x):
            return end(super().forward(x))

    net, x, y = oracles.mlp(6, 9, 3)
    F.cross_entropy(fa.convert(Net(*net), "dfa")(x), y).backward()


def test_an_output_that_is_no_tensor_raises():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.one(x)
            return self.out(h), h

    net = fa.convert(Two(), "dfa")
    with pytest.raises(fa.UserError, match="one tensor, not tuple"):
        net(torch.randn(2, 6))


def test_no_kernel_is_claimed():
    net, _, _ = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")
    with pytest.raises(fa.UserError, match="dfa"):
        fa.feedback_weight(net[0])
    assert fa.alignment(net).empty
    for options in ({"norm": "track"}, {"clamp_forward": True}):
        with pytest.raises(fa.UserError, match="do not apply"):
            fa.convert(net, "dfa", **options)


def test_dense_feedback_can_have_noklands_scale():
    """U(-1 / sqrt(n), 1 / sqrt(n)), n the units that receive it: a convolution's are all places of its input map."""
    net = oracles.fixed_weights(nn.Sequential(nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(7 * 64, 9)).double())
    fa.convert(net, "dfa", form="dense", init="kaiming", sample=randn(1, 5, 10, 10))
    for layer, n in ((net[0], 500), (net[2], 448)):
        B = layer.feedback.B
        assert B.numel() == 9 * n and 0.99 * n**-0.5 < B.abs().max() <= n**-0.5
        assert B.std().item() == pytest.approx((3 * n) ** -0.5, rel=0.03)


@pytest.mark.parametrize("init", ["match", "xavier", "kaiming", 0.3])
def test_scale_of_the_feedback(init):
    net = oracles.fixed_weights(nn.Sequential(nn.Conv2d(20, 40, 3), nn.Flatten(), nn.Linear(400, 50)).double())
    fa.convert(net, "dfa", init=init)
    conv, linear = net[0], net[2]
    want = {
        "match": (conv.weight.square().mean().sqrt().item(), linear.weight.square().mean().sqrt().item()),
        "xavier": ((2 / (9 * (50 + 20))) ** 0.5, (2 / (50 + 400)) ** 0.5),  # of B's own shape, as torch.nn.init counts
        "kaiming": ((3 * 180) ** -0.5, (3 * 400) ** -0.5),
        0.3: (0.3, 0.3),
    }[init]
    assert (conv.feedback.B.std().item(), linear.feedback.B.std().item()) == pytest.approx(want, rel=0.03)


def test_a_copy_has_a_tape_of_its_own():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")
    copied = copy.deepcopy(net)
    want = grads(net, x, y)
    losses = [F.cross_entropy(n(x), y) for n in (net, copied)]  # passes interleaved
    for n, loss in zip((net, copied), losses):
        n.zero_grad()
        loss.backward()
    assert all(torch.equal(p.grad, want[n]) for n, p in copied.named_parameters())
    fa.convert(copied, "bp")
    assert "forward" not in vars(copied) and "forward" in vars(net)
    got = grads(net, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_forward_of_the_networks_own_is_kept_and_given_back():
    net, x, y = oracles.mlp(6, 9, 3)
    net.forward = lambda x: type(net).forward(net, x / 2)
    halved = net.forward
    fa.convert(net, "dfa")
    got = grads(net, x, y)
    fa.convert(net[0], "bp")  # a part first, then the whole
    fa.convert(net, "bp")
    assert net.forward is halved
    del net.forward
    want = grads(fa.convert(net, "dfa"), x / 2, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_passes_whose_graphs_live_together_have_an_error_each():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")
    want = [grads(net, x, y), grads(net, -x, y)]
    losses = [F.cross_entropy(net(s * x), y) for s in (1, -1)]
    for i in (1, 0, 1):
        net.zero_grad()
        losses[i].backward(retain_graph=True)
        assert all(torch.equal(p.grad, want[i][n]) for n, p in net.named_parameters())


class Blocks(nn.Module):
    """Two convolutional blocks, the second with a skip; each may be run under a gradient checkpoint."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)) for c in (2, 4)
        )
        self.fc, self.checkpoint = nn.Linear(4, 3), lambda block, h: block(h)

    def forward(self, x):
        h = torch.tanh(self.checkpoint(self.one, x))
        h = h + self.checkpoint(self.two, h)
        return self.fc(h.mean((2, 3)))


def test_gradient_checkpointing_changes_nothing():
    net = fa.convert(oracles.fixed_weights(Blocks().double()), "dfa", seed=1)
    x, y = randn(4, 2, 6, 6, seed=2), torch.arange(4) % 3
    want, ran = grads(net, x, y), []
    net.two.register_forward_pre_hook(lambda *_: ran.append(1))
    net.checkpoint = lambda block, h: torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False)
    got = grads(net, x, y)
    assert len(ran) == 2, "the block was run again"
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_pass_that_is_compiled_in_parts_sends_every_tap_its_error():
    net = fa.convert(oracles.fixed_weights(Blocks().double()), "dfa", seed=1)
    x, y = randn(4, 2, 6, 6, seed=2), torch.arange(4) % 3
    want = grads(net, x, y)
    net.checkpoint = torch.compiler.disable(lambda block, h: block(h))
    torch.compiler.reset()
    got = grads(torch.compile(net, backend="aot_eager"), x, y)
    assert all(apart(got["_orig_mod." + k], want[k]) < 1e-12 for k in want)


def test_passes_between_a_checkpointed_one_and_its_backward_do_not_matter():
    net = fa.convert(oracles.fixed_weights(Blocks().double()), "dfa", seed=1)
    x, y = randn(4, 2, 6, 6, seed=2), torch.arange(4) % 3
    want, plain = grads(net, x, y), net.checkpoint
    net.checkpoint = lambda block, h: torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False)
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    net.checkpoint = plain
    with torch.no_grad():
        net(x)
    net(x)
    loss.backward()
    assert all(torch.equal(p.grad, want[n]) for n, p in net.named_parameters())
    copy.deepcopy(net)  # nothing of the pass is left in it


@pytest.mark.parametrize("between", [False, True])
def test_a_reentrant_checkpoint_is_refused(between):
    """It runs the forward pass first without a graph, so that nothing is tapped, and lower layers would not learn."""
    net = fa.convert(Blocks().double(), "dfa")
    plain, x, y = net.checkpoint, randn(4, 2, 6, 6, seed=2).requires_grad_(), torch.arange(4) % 3
    net.checkpoint = lambda block, h: torch.utils.checkpoint.checkpoint(block, h, use_reentrant=True)
    loss, net.checkpoint = F.cross_entropy(net(x), y), plain
    if between:
        net(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()


@pytest.mark.parametrize("kind", ["checkpoint", "compiled checkpoint", "save_on_cpu"])
def test_A13_layers_called_one_by_one_are_refused_where_saved_tensors_have_hooks(kind):
    """Such hooks also mark the forward pass that a checkpoint runs again; that one alone may go without a tape."""
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")

    def layers(x):
        for layer in net:
            x = layer(x) if kind == "save_on_cpu" else torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x

    torch.compiler.reset()
    run = torch.compile(layers, backend="aot_eager") if kind == "compiled checkpoint" else layers
    with pytest.raises(RuntimeError, match="call the whole network"), torch.autograd.graph.save_on_cpu():
        F.cross_entropy(run(x), y).backward()


def test_a_pass_that_failed_leaves_nothing_behind():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")

    def fail(*_):
        raise KeyError

    handle = list(net)[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        net(x)
    handle.remove()
    with pytest.raises(RuntimeError, match="call the whole network"):
        net[:2](x)
    copy.deepcopy(net)


def test_the_output_may_be_changed_in_place():
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, "dfa")
    want = grads(net, x, y, lambda out, y: F.cross_entropy(out / 2, y))
    got = grads(net, x, y, lambda out, y: F.cross_entropy(out.div_(2), y))
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_a_part_of_a_network_may_have_another_rule():
    net, x, y = oracles.mlp(6, 9, 8, 3)
    fa.convert(net, "dfa", seed=1)
    want = grads(net, x, y)
    last = [m for m in net if isinstance(m, nn.Linear)][-1]
    fa.convert(last, "fa")
    got = grads(net, x, y)
    assert converted(net)["0"].feedback.rule.name == "dfa" and last.feedback.rule.name == "fa"
    assert torch.equal(got["0.weight"], want["0.weight"]), (
        "the error of a layer below another tap comes from the output"
    )
    fa.convert(net, "bp")
    assert "forward" not in vars(net)


def test_an_output_that_lacks_errors_for_a_layers_rows_is_refused():
    """Tokens first in one layer, samples first in the output: e has another order than that layer's rows."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)).transpose(0, 1)).transpose(0, 1)

    net = fa.convert(Turned().double(), "dfa")
    with pytest.raises(RuntimeError, match="has no error for each row"):
        net(randn(2, 5, 6, seed=1)).sum().backward()


def test_a_network_may_give_an_error_to_each_sample_or_to_each_token():
    """The same layers under the same B: one network averages over tokens, the other does not."""

    class Net(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.one, self.two, self.mean = nn.Linear(6, 5), nn.Linear(5, 3), mean

        def forward(self, x):
            out = self.two(torch.tanh(self.one(x)))
            return out.mean(1) if self.mean else out

    x, e, got = randn(2, 4, 6, seed=1), randn(2, 3, seed=2), {}
    for mean in (True, False):
        net = fa.convert(oracles.fixed_weights(Net(mean).double()), "dfa")
        net(x).backward(e if mean else e[:, None].expand(2, 4, 3))
        got[mean] = net.one.weight.grad
    assert apart(got[True], got[False]) < 1e-14


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tap_takes_no_memory(compiled):
    """What the taps hand the network's output is one zero each, seen as a tensor of the output's shape."""
    net, seen = fa.convert(oracles.fixed_weights(Blocks().double()), "dfa"), []
    close = net.one[0].feedback.tape.close

    def spy(out):
        seen.extend(tap for _, taps in net.one[0].feedback.tape.taps for tap in taps)
        return close(out)

    net.one[0].feedback.tape.close = spy
    run = torch.compile(net, backend="aot_eager") if compiled else net
    run(randn(4, 2, 6, 6, seed=2))
    assert len(seen) == 4 and all(tap.shape == (4, 3) and tap.untyped_storage().nbytes() == 8 for tap in seen)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_convolutions_equal_eager_ones_in_one_graph(layout):
    """A fresh network: no eager pass was before. The frozen layer taps a map that is then changed in place."""

    class Net(Blocks):
        def forward(self, x):
            h = torch.tanh(self.one(x)) * 2
            frozen = self.two[0](h)
            h = h.mul_(2).relu_()
            return self.fc((frozen + self.two(h)).mean((2, 3)))

    def fresh():
        net = fa.convert(oracles.fixed_weights(Net().double()), "dfa", seed=1).to(memory_format=layout)
        net.two[0].requires_grad_(False)
        return net

    x, y = randn(4, 2, 6, 6, seed=2).to(memory_format=layout), torch.arange(4) % 3
    want = grads(fresh(), x, y)
    torch.compiler.reset()
    got = grads(torch.compile(fresh(), backend="aot_eager", fullgraph=True), x, y)
    assert all(apart(got["_orig_mod." + k], want[k]) < 1e-12 for k in want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_error_arrives_in_the_memory_format_of_the_map(layout):
    net = fa.convert(oracles.fixed_weights(Blocks().double()), "dfa").to(memory_format=layout)
    x, arrived = randn(4, 2, 6, 6, seed=2).to(memory_format=layout), []
    net.one[1].register_forward_hook(lambda module, args, out: out.register_hook(arrived.append) and None)
    F.cross_entropy(net(x), torch.arange(4) % 3).backward()
    assert arrived[0].is_contiguous(memory_format=layout) and not arrived[0].is_contiguous() == (
        layout is torch.channels_last
    )


def test_it_learns():
    net, x, y = oracles.mlp(6, 32, 32, 3)
    fa.convert(net, "dfa")
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    first = F.cross_entropy(net(x), y).item()
    for _ in range(60):
        grads(net, x, y)
        opt.step()
    assert F.cross_entropy(net(x), y).item() < first / 20


def test_a_compiled_pass_sends_every_tap_its_error_also_where_two_layers_read_one_tensor():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.a, self.b, self.out = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.one(x))
            return self.out(torch.tanh(self.a(h) + self.b(h)))

    net = fa.convert(oracles.fixed_weights(Fork().double()), "dfa")
    x, y = randn(4, 6, seed=1), torch.arange(4) % 3
    want = grads(net, x, y)
    torch.compiler.reset()
    got = grads(torch.compile(net, backend="aot_eager", fullgraph=True), x, y)
    assert all(apart(got["_orig_mod." + k], g) < 1e-12 for k, g in want.items())
