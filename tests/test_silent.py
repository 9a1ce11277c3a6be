"""What would train past its rule in silence is right, is refused, or is told: uses of a network that nobody foresees."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as P
from torch import nn
from torch.nn.utils import prune

import fa
import oracles
from oracles import apart, randn

X, Y = randn(4, 6, seed=1), torch.tensor([0, 1, 2, 1])


def mlp(activation=nn.Tanh):
    """A small network of this activation, in float64."""
    net = nn.Sequential(nn.Linear(6, 8), activation(), nn.Linear(8, 5), activation(), nn.Linear(5, 3))
    return oracles.fixed_weights(net).double()


# ------------------------------------------------------------------------------------------ A06: the forward pass stays


GEOMETRIES = [  # as networks for dense predictions make a stride a dilation; in words; in numbers; uneven
    {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2)},
    {"stride": (1, 1), "padding": "same"},
    {"padding": "valid"},
    {"stride": 2, "padding": 0, "dilation": 2},
    {"stride": (1, 1), "padding": "same", "dilation": (1, 3), "kernel_size": (4, 3)},
]


def with_geometry(layer, geometry):
    for name, value in geometry.items():
        setattr(layer, name, value)
    return layer


def convolution(geometry):
    made = {k: v for k, v in geometry.items() if k == "kernel_size"}
    return nn.Conv2d(3, 4, made.get("kernel_size", 3), stride=2, padding=1).double()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("when", ["before", "after", "between passes"])
def test_A06_the_geometry_of_a_convolution_may_be_set_at_any_time(geometry, when):
    layer, x = convolution(geometry), randn(2, 3, 9, 10)
    stock = with_geometry(copy.deepcopy(layer), geometry)
    if when == "before":
        with_geometry(layer, geometry)
    fa.convert(layer, "fa")
    if when == "between passes":
        layer(x).sum().backward()
        layer.zero_grad()
    with_geometry(layer, geometry)
    want, x = stock(x), x.requires_grad_()
    out = layer(x)
    assert torch.equal(out, want)
    dy = randn(*out.shape, seed=3)
    out.backward(dy)
    assert apart(layer.weight.grad, torch.autograd.grad(want, stock.weight, dy)[0]) < 1e-12
    with torch.no_grad():
        stock.weight.copy_(layer.feedback.B)
    assert apart(x.grad, torch.autograd.grad(stock(x), x, dy)[0]) < 1e-12


def test_A06_a_compiled_convolution_has_the_geometry_of_the_moment():
    torch.compiler.reset()
    layer, x = fa.convert(convolution({}), "fa"), randn(2, 3, 9, 10)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    for geometry in GEOMETRIES[:2]:
        with_geometry(layer, geometry)
        with torch.no_grad():
            want = layer(x)
        assert apart(compiled(x).detach(), want) < 1e-12


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g["padding"] != "valid"], ids=str)
@pytest.mark.parametrize("when", ["before", "between passes"])
def test_A06_direct_feedback_has_the_geometry_of_the_moment(geometry, when):
    """The error of a class is the same at every output: the transposed convolution of a constant map."""
    net, x = (
        nn.Sequential(nn.Conv2d(3, 3, 1), convolution(geometry), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double(),
        randn(2, 3, 9, 10),
    )
    if when == "before":
        with_geometry(net[1], geometry)
    fa.convert(net, "dfa")
    if when == "between passes":
        net(x).sum().backward()
        net.zero_grad()
    with_geometry(net[1], geometry)
    net(x).sum().backward()
    with torch.no_grad():
        h = net[0](x)
        stock = with_geometry(convolution(geometry), geometry)
        stock.weight.copy_(net[1].feedback.B)
    h.requires_grad_()
    (dh,) = torch.autograd.grad(stock(h).sum(), h)
    assert apart(net[0].weight.grad, torch.einsum("nohw,nihw->oi", dh, x)[..., None, None]) < 1e-12


# ------------------------------------------------------------------------------------------ A29: second derivatives


def penalised(net, x):
    """A loss and a penalty on the gradient of the output, whose error is a constant."""
    (dx,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return net(x).mean() + (dx.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("rule", ["fa", "kp", "usf", "pfa", "wm", "dfa"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_A29_a_penalty_on_a_gradient_is_refused_and_never_without_effect(rule, activation):
    net, x = fa.convert(mlp(activation), rule), X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="fa.exact_backprop"):
        penalised(net, x).backward()
    net.zero_grad()
    with fa.exact_backprop(net):
        penalised(net, x).backward()
    stock = oracles.twin(net)
    stock.zero_grad()
    penalised(stock, x).backward()
    assert apart(net[0].weight.grad, stock[0].weight.grad) < 1e-12


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_A29_a_hessian_is_refused(rule):
    net = fa.convert(mlp(nn.ReLU), rule)
    with pytest.raises(RuntimeError, match="fa.exact_backprop"):
        torch.autograd.functional.hessian(lambda x: net(x).square().sum(), X[:1])


@pytest.mark.parametrize("rule", ["fa", "kp", "ia", "pfa", "dfa"])
def test_A29_a_graph_of_the_backward_pass_that_nobody_differentiates_is_fine(rule):
    net = fa.convert(mlp(), rule)
    want = oracles.grads(net, X, Y)
    names = list(want)
    got = torch.autograd.grad(F.cross_entropy(net(X), Y), [net.get_parameter(n) for n in names], create_graph=True)
    assert all(torch.equal(g, want[n]) for n, g in zip(names, got))


# ------------------------------------------------------------------------------------------ A27: where the block begins


@pytest.mark.parametrize("rule", ["fa", "kp", "usf", "pfa", "wm", "ia"])
def test_A27_exact_backprop_around_the_backward_pass_alone(rule):
    net = fa.convert(mlp(), rule)
    want = oracles.grads(oracles.twin(net), X, Y)
    net.zero_grad()
    loss = F.cross_entropy(net(X), Y)
    with fa.exact_backprop(net):
        loss.backward()
    assert all(apart(net.get_parameter(n).grad, g) < 1e-12 for n, g in want.items())
    assert all(p.grad is None for p in fa.feedback_parameters(net))


def test_A27_exact_backprop_around_the_backward_pass_alone_is_refused_where_the_graph_is_cut():
    net = fa.convert(mlp(), "dfa")
    loss = F.cross_entropy(net(X), Y)
    with fa.exact_backprop(net), pytest.raises(RuntimeError, match="forward pass within fa.exact_backprop"):
        loss.backward()


# ------------------------------------------------------------------------------------------ A12: who calls the network


class Recurrent(nn.Module):
    """A network that calls itself."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x, depth=1):
        x = torch.tanh(self.a(x))
        return self(x, depth - 1) if depth else x


def test_A12_a_network_that_calls_itself_is_refused_where_the_error_would_miss_the_first_call():
    net = fa.convert(Recurrent().double(), "dfa")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it calls itself"):
            net(X)
    net(X, depth=0).sum().backward()
    with torch.no_grad():
        net(X)


def test_A12_passes_of_direct_feedback_in_two_threads_are_right_or_refused():
    inside, done = threading.Event(), threading.Event()

    class Waits(nn.Tanh):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                done.wait(60)
            return super().forward(x)

    net, found = fa.convert(mlp(Waits), "dfa"), {}
    want = oracles.grads(net, X, Y)

    def other():
        loss = F.cross_entropy(net(X), Y)
        found.update({n: torch.autograd.grad(loss, net.get_parameter(n), retain_graph=True)[0] for n in want})

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    with pytest.raises(RuntimeError, match="another thread"):
        net(X)
    with torch.no_grad():
        net(X)  # nothing to mix
    done.set()
    thread.join(60)
    assert all(torch.equal(found[n], g) for n, g in want.items())
    assert all(torch.equal(g, want[n]) for n, g in oracles.grads(net, X, Y).items())


# ------------------------------------------------------------------------------------------ A08: a second decay


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa"])
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, weight_decay=5e-4), torch.optim.AdamW])
def test_A08_a_weight_decay_of_feedback_that_has_its_own_is_told(rule, make, recwarn):
    def step(groups):
        opt = make(groups)
        for _ in range(2):
            F.cross_entropy(net(X), Y).backward()
            opt.step()

    net = fa.convert(mlp(), rule)
    step(fa.param_groups(net, lr=0.1, weight_decay=5e-4))
    assert not recwarn.list
    net = fa.convert(mlp(), rule)
    with pytest.warns(UserWarning, match="fa.param_groups"):
        step(net.parameters())


@pytest.mark.parametrize("rule", ["kp", "pfa", "fa"])
def test_A08_a_weight_decay_of_feedback_that_follows_the_weight_is_meant(rule, recwarn):
    net = fa.convert(mlp(), rule)
    opt = torch.optim.SGD(net.parameters(), 0.1, weight_decay=5e-4)
    F.cross_entropy(net(X), Y).backward()
    opt.step()
    assert not recwarn.list


# ------------------------------------------------------------------------------------------ refused by name, with a remedy


@pytest.mark.parametrize(
    "how", [P.weight_norm, P.spectral_norm, P.orthogonal, lambda l: prune.random_unstructured(l, "weight", 0.5)]
)
def test_A04_a_weight_that_is_computed_before_the_conversion_is_told_the_order(how):
    net = mlp()
    how(net[2])
    with pytest.raises(fa.UserError, match=r"2 \(its weight is computed .* after fa.convert\)"):
        fa.convert(net, "fa")


def test_A33_a_network_made_in_inference_mode_is_refused_by_name():
    with torch.inference_mode():
        net = mlp()
    with pytest.raises(fa.UserError, match="weight of 0 is of inference mode; make it outside"):
        fa.convert(net, "fa")


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("rule", ["pfa", "pfa_o"])
def test_A01_feedback_drawn_within_autocast_has_the_precision_of_the_weight(rule, density):
    states = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            states.append(fa.convert(mlp().float(), rule, implicit=True, density=density).state_dict())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


# ------------------------------------------------------------------------------------------ layers and weights that come


class Stack(nn.Module):
    """Layers in a container that has a method ``insert``."""

    def __init__(self, kind):
        super().__init__()
        layers = (nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
        self.layers = nn.ModuleList(layers) if kind is nn.ModuleList else nn.Sequential(*layers)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_a_layer_that_a_container_inserts_is_refused_as_one_that_is_assigned(kind, rule):
    net, stock = fa.convert(Stack(kind), rule), kind()
    for one in (net, copy.deepcopy(net) if rule == "fa" else fa.convert(Stack(kind), rule)):
        one.layers.insert(1, nn.Linear(6, 6))
        with pytest.raises(RuntimeError, match="multiplied by 'layers.1.weight', which has no rule"):
            one(X.float()).square().sum().backward()
        fa.convert(one, rule)(X.float()).square().sum().backward()
    assert stock.insert(0, nn.Linear(6, 6)) is (stock if kind is nn.Sequential else None)  # as PyTorch's own
    stock(X.float()).sum().backward() if kind is nn.Sequential else None


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("geometry", [dict(kernel_size=3, padding=1), dict(kernel_size=(5, 3), padding=(3, 2), stride=2, dilation=(1, 2)),
                                      dict(kernel_size=4, padding="same")], ids=str)  # fmt: skip
@pytest.mark.parametrize("how", ["eager", "compiled", "channels_last"])
def test_direct_feedback_passes_any_padding(mode, geometry, how):
    """The error that falls on the padding belongs to the positions that the padding shows."""
    layer, x = nn.Conv2d(3, 4, padding_mode=mode, **geometry), randn(2, 3, 9, 10)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    stock = copy.deepcopy(layer)
    fa.convert(net, "dfa")
    if how == "channels_last":
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if how == "compiled" else net
    run(x).sum().backward()
    with torch.no_grad():
        h = net[0](x)
        stock.weight.copy_(net[1].feedback.B)
    h.requires_grad_()
    (dh,) = torch.autograd.grad(stock(h).sum(), h)
    assert apart(net[0].weight.grad, torch.einsum("nohw,nihw->oi", dh, x)[..., None, None]) < 1e-12


TAKEN_OFF = {
    "weight_norm": (P.weight_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.3), lambda m: prune.remove(m, "weight")),
}


@pytest.mark.parametrize("how", TAKEN_OFF)
def test_a_second_rule_after_a_parametrization_is_told_to_take_it_off(how):
    net = fa.convert(mlp(), "fa")
    put_on, take_off = TAKEN_OFF[how]
    put_on(net[2])
    with pytest.raises(
        fa.UserError, match="cannot convert 2 .*take parametrization, pruning off, and .* again"
    ) as told:
        fa.convert(net, "kp")
    assert "ParametrizationList" not in str(told.value)  # whose matrices are no problem of their own
    assert net[0].feedback.rule.name == "fa"  # nothing is changed
    take_off(net[2])
    put_on(fa.convert(net, "kp")[2])
    net(X).sum().backward()
    assert net[2].feedback.B.grad.norm() > 0


def test_a_parametrized_attention_keeps_its_rule():
    net = fa.convert(nn.MultiheadAttention(6, 2, batch_first=True).double(), "fa")
    P.weight_norm(net, "in_proj_weight")
    for rule, match in (("bp", "q, k, v were parametrized"), ("kp", "take parametrization, pruning off")):
        with pytest.raises(fa.UserError, match=match):
            fa.convert(net, rule)
    net(X[None], X[None], X[None])[0].sum().backward()


def images(n=9):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)
    ).double()


@pytest.mark.parametrize("rule", ["fa", "frsf", "brsf", "frozen", "kp", "pfa", "pfa_o", "wm", "sa", "usf", "dfa"])
@pytest.mark.parametrize("change", ["outputs", "inputs", "kernel", "data", "one output"])
def test_a_weight_of_another_shape_is_told_in_one_sentence(rule, change):
    """A resized head, pruned channels: no feedback of the old shape, spread over the new one, trains in silence."""
    net = mlp()
    if change == "one output":  # feedback (1, 8) would be taken for one of each row
        net[2], net[4] = nn.Linear(8, 1).double(), nn.Linear(1, 3).double()
    net, x = (fa.convert(images(), rule), randn(2, 2, 9, 9)) if change == "kernel" else (fa.convert(net, rule), X)
    if change == "kernel":
        net[2].weight, net[2].padding = nn.Parameter(randn(4, 3, 5, 5)), (1, 1)
    elif change == "inputs":
        net[0] = nn.Linear(6, 7).double()
        net[2].weight = nn.Parameter(randn(5, 7))
        fa.convert(net[0], "fa")
    elif change == "data":
        net[2].weight.data, net[2].bias.data, net[4].weight.data = randn(7, 8), randn(7), randn(3, 7)
    else:
        net[2].weight, net[2].bias, net[4].weight = (nn.Parameter(randn(*s)) for s in ((7, 8), (7,), (3, 7)))
    if rule == "usf":  # which keeps one number
        return net(x).square().sum().backward()
    with pytest.raises(fa.UserError, match="layer '[0-9]' was made for the shape .* call fa.convert again"):
        net(x).square().sum().backward()
    if change != "inputs":
        fa.convert(net, rule)(x).square().sum().backward()


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_a_scripted_network_is_refused_in_one_sentence(rule):
    net = fa.convert(mlp(), rule)
    with pytest.raises(RuntimeError, match="torch.jit.script keeps no learning rule, and layer '0' has one"):
        torch.jit.script(net)
    net(X).sum().backward()
    torch.jit.script(fa.convert(net, "bp"))(X)


@pytest.mark.parametrize("rule, options, may", [
    ("pfa", {"expansion": None}, "a finite number"), ("pfa", {"expansion": float("inf")}, "a finite number"),
    ("fa", {"density": "0.5"}, "a finite number"), ("fa", {"gain": None}, "a finite number"),
    ("fa", {"gain": [1.0]}, "a finite number"), ("fa", {"gain": float("nan")}, "a finite number"),
    ("fa", {"init": None}, "match, xavier, kaiming or a positive number"),
    ("kp", {"init": float("nan")}, "match, xavier, kaiming, copy or a positive number"),
    ("fa", {"init": (1,)}, "match, xavier, kaiming or a positive number"),
    ("wm", {"decay": None}, "a finite number"), ("sa", {"self_": "2"}, "a finite number"),
    ("usf", {"scale": None}, "text or a finite number"), ("usf", {"concordance": None}, "a finite number"),
    ("frozen", {"every": 2.5}, "a whole number"), ("frozen", {"part": None}, "a finite number"),
    ("fa", {"clamp_forward": "no"}, "True or False"), ("dfa", {"blocks": None}, "text"),
    ("dfa", {"classes": None}, "a whole number"), ("primitives", {"center": "yes"}, "True or False"),
])  # fmt: skip
def test_an_option_of_a_wrong_type_is_told_in_one_sentence(rule, options, may):
    ((name, value),) = options.items()
    with pytest.raises(fa.UserError) as told:
        fa.rules.rule(rule, **options)
    assert str(told.value) == f"{rule}: {name}={value!r} must be {may}"


def test_numbers_of_any_library_are_numbers():
    np = pytest.importorskip("numpy")
    assert fa.rules.rule("pfa", expansion=np.float32(2), density=np.float64(0.5)).expansion == 2
    assert fa.rules.rule("frozen", every=np.int64(3), gain=torch.tensor(2.0)).every == 3


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa", "kp"])
def test_fsdps_gradient_scaler_leaves_an_objective_of_its_own_alone(rule):
    """Also where its class is made, or imported, after the conversion."""
    net = fa.convert(mlp(), rule)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        F.cross_entropy(net(X), Y).backward()
        want = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        group = torch.distributed.group.WORLD
        opt = torch.optim.SGD(fa.param_groups(net, lr=0.1))
        for kind in (ShardedGradScaler, type("Own", (ShardedGradScaler,), {})):
            scaler = kind(device="cpu", init_scale=8.0, process_group=group)
            scaler.scale(F.cross_entropy(net(X), Y)).backward()
            scaler.unscale_(opt)
            assert max(apart(p.grad, g) for p, g in zip(net.parameters(), want)) < 1e-6
            net.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------ A15, A19: memory, and numbers


@pytest.mark.parametrize("rule", ["fa", "kp", "wm", "pfa"])
def test_A15_the_weights_of_a_network_that_is_gone_are_gone(rule):
    net = fa.convert(oracles.mlp(6, 8, 3)[0], rule)
    weight = weakref.ref(net[2].weight)
    gc.collect()
    gc.disable()
    try:
        del net
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("rule", ["fa", "kp", "usf", "pfa", "dfa"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_A19_a_weight_that_is_not_finite_is_refused(rule, value):
    net = oracles.mlp(6, 8, 3)[0]
    with torch.no_grad():
        net[2].weight[0, 0] = value
    with pytest.raises(fa.UserError, match="not finite.*initialise it before"):
        fa.convert(net, rule)
