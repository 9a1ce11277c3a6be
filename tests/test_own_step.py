"""What a layer knows of its own step, and of who reads its weight: with every optimizer, wrapper and parametrization."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as P
from torch import nn
from torch.nn.utils import prune

import fa
import oracles
from fa import provenance
from fa.layers import reads
from fa.layers.hooks import converted
from oracles import apart, randn

X, Y = randn(4, 6, seed=1), torch.tensor([0, 1, 2, 1])


def mlp(dtype=torch.float64):
    return oracles.mlp(6, 8, 5, 3, dtype=dtype)[0]


def step(net, opt, x=X):
    opt.zero_grad()
    F.cross_entropy(net(x.to(next(net.parameters()))), Y).backward()
    opt.step()


def sgd(net, lr=0.1, **options):
    return torch.optim.SGD(net.parameters(), lr=lr, **options)


# ------------------------------------------------------------------------------------------ A01: the scale of the loss


def scaled_path(rule, scaled, clip=0.0, parts=1, overflow=-1, **options):
    """The feedback after each of five steps, with or without a gradient scaler."""
    net = fa.convert(mlp(torch.float32), rule)
    opt = torch.optim.SGD(fa.param_groups(net, lr=0.1), momentum=0.9, **options)
    scaler, path = torch.amp.GradScaler("cpu", enabled=scaled, growth_interval=2), []
    for i in range(5):
        opt.zero_grad()
        for _ in range(parts):
            loss = F.cross_entropy(net(X.float()), Y) / parts * (float("inf") if i == overflow else 1)
            scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaled or i != overflow:
            scaler.step(opt)
        scaler.update()
        path.append(net[2].feedback.B.detach().clone())
    return path


@pytest.mark.parametrize("rule", ["kp", "wm", "ia", "sa", "aa"])
@pytest.mark.parametrize(
    "how", [{}, {"clip": 0.05}, {"parts": 3}, {"overflow": 1}, {"fused": True}, {"fused": True, "overflow": 1}], ids=str
)
def test_A01_feedback_moves_alike_with_and_without_a_loss_scale(rule, how):
    plain, scaled = scaled_path(rule, False, **how), scaled_path(rule, True, **how)
    assert all(apart(b, a) < 1e-6 for a, b in zip(plain, scaled))
    start, end = scaled[0], scaled[-1]
    moved, wanted = (end - start).norm().item(), (plain[-1] - plain[0]).norm().item()
    assert wanted > 0 and moved == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("rule", ["wm", "sa", "aa"])
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "plain"])
def test_A01_gradients_are_clipped_alike_with_and_without_a_loss_scale(rule, clip, explicit):
    """A clip comes between ``unscale_`` and the step, and counts the feedback's gradient among the others."""
    ends = []
    for scaled in (False, True):
        net = fa.convert(mlp(), rule, decay=0.5)  # feedback's gradients as large as the weights'
        opt = torch.optim.SGD(fa.param_groups(net, lr=0.1), fused=not explicit)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(F.cross_entropy(net(X), Y)).backward()
            scaler.unscale_(opt)
            clip(net.parameters(), 0.01)
            scaler.step(opt), scaler.update()
        ends.append({n: p.detach().clone() for n, p in net.named_parameters()})
    assert all(apart(ends[1][n], p) < 1e-6 for n, p in ends[0].items())


def test_A01_feedback_with_an_optimizer_of_its_own_outside_the_scaler_is_left_alone():
    nets = []
    for scaled in (False, True):
        net = fa.convert(mlp(torch.float32), "sa")
        weights, own = (
            torch.optim.SGD(ps, lr=0.1)
            for ps in (oracles.forward_parameters(net).values(), fa.feedback_parameters(net))
        )
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            net.zero_grad()
            scaler.scale(F.cross_entropy(net(X.float()), Y)).backward()
            scaler.step(weights), own.step(), scaler.update()
        nets.append(net)
    assert apart(nets[1][2].feedback.B.detach(), nets[0][2].feedback.B.detach()) < 1e-6


# ------------------------------------------------------------------------- A02, A03, A20, A14: who reads the weight


class Heads(nn.Module):
    """One head a task."""

    def __init__(self):
        super().__init__()
        self.body, self.h = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x, t):
        return self.h[t](torch.relu(self.body(x)))


PENALTIES = {
    "square": lambda net: sum(p.square().sum() for p in net.parameters()),
    "L1 of weights": lambda net: sum(m.weight.abs().sum() for m in net.modules() if isinstance(m, nn.Linear)),
    "elastic": lambda net: sum((2.0 * (p - 0.5)).square().mean() for p in net.parameters()),
    "orthogonal": lambda net: sum((h.weight @ h.weight.t() - torch.eye(3)).square().sum() for h in net.h),
    "spectral": lambda net: sum(torch.dot(torch.ones(3), h.weight @ torch.ones(8)) for h in net.h),
    "all in one": lambda net: torch.cat([p.flatten() for p in net.parameters()]).norm(),
}


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("alone", [False, True], ids=["in the loss", "backward of its own"])
def test_A02_an_idle_head_gets_its_penalty(rule, penalty, alone):
    net, x = fa.convert(Heads(), rule), X.float()
    for t in (0, 1, 0):
        net.zero_grad()
        parts = [F.cross_entropy(net(x, t), Y), PENALTIES[penalty](net)]
        for loss in parts if alone else [sum(parts)]:
            loss.backward()
        idle = net.h[1 - t].weight
        want = torch.autograd.grad(PENALTIES[penalty](net), idle)[0]
        assert apart(idle.grad, want) < 1e-6


CONSTANTS = {
    "projected": lambda W: (randn(3, 3, seed=2) @ W @ randn(8, 8, seed=3)).square().sum(),
    "quadratic": lambda W: ((randn(3, 3, seed=2) @ W @ randn(8, 8, seed=3)) * W).sum(),  # Kronecker-factored EWC
}


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
@pytest.mark.parametrize("penalty", CONSTANTS)
def test_A02_a_penalty_may_hold_matrices_of_constants(rule, penalty):
    net = fa.convert(Heads().double(), rule)
    heads = net.h[1:] if rule == "dfa" else net.h  # the idle one
    for _ in range(2):
        net.zero_grad()
        (F.cross_entropy(net(X, 0), Y) + sum(CONSTANTS[penalty](h.weight) for h in heads)).backward()
        want = torch.autograd.grad(CONSTANTS[penalty](net.h[1].weight), net.h[1].weight)[0]
        assert apart(net.h[1].weight.grad, want) < 1e-12


class Tied(nn.Module):
    """The decoder is the encoder's transpose, read in a way of one's choice."""

    def __init__(self, decode):
        super().__init__()
        self.first, self.enc, self.decode = nn.Linear(6, 6), nn.Linear(6, 4), decode

    def forward(self, x):
        return self.decode(torch.tanh(self.enc(torch.tanh(self.first(x)))), self.enc.weight)


READS = {
    "linear": lambda h, W: F.linear(h, W.t()),
    "matmul": lambda h, W: h @ W,
    "einsum": lambda h, W: torch.einsum("no,oi->ni", h, W),
    "scaled": lambda h, W: F.linear(h, (W / W.norm()).t()),
    "elementwise": lambda h, W: (h[:, :, None] * W).sum(1),
    "convolution": lambda h, W: F.conv1d(h[:, :, None], W.t()[:, :, None])[:, :, 0],
    "rows that are looked up": lambda h, W: F.embedding(Y, W) * h.sum(1, keepdim=True),
    "distances": lambda h, W: (h[:, :, None] - W).abs().sum(1),
    "distances, the other way round": lambda h, W: (W - h[:, :, None]).square().sum(1),
}


@pytest.mark.parametrize("rule", ["fa", "kp", "pfa", "dfa"])
@pytest.mark.parametrize("read", READS)
def test_A03_a_weight_read_beside_its_layer_is_refused(rule, read):
    net = fa.convert(Tied(READS[read]).double(), rule, **({"classes": 6} if rule == "dfa" else {}))
    with pytest.raises(RuntimeError, match="'enc'.*another module reads it.*skip"):
        (net(X) - X).square().mean().backward()
    fa.convert(net, "fa", skip=["enc"])
    (net(X) - X).square().mean().backward()


class Before(nn.Module):
    """Reads a layer's weight first, and uses the layer then: the layer's own gradient comes first in the backward pass,
    and the other one is added to it in place."""

    def __init__(self, read):
        super().__init__()
        self.first, self.enc, self.read = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), read

    def forward(self, x):
        return self.enc(torch.tanh(self.read(torch.tanh(self.first(x)), self.enc.weight)))


@pytest.mark.parametrize("rule", ["fa", "kp", "pfa", "dfa"])
@pytest.mark.parametrize("read", ["linear", "matmul", "elementwise", "scaled"])
@pytest.mark.parametrize("attack", [False, True])
def test_A03_a_weight_read_before_its_layer_runs_is_refused(rule, read, attack):
    net, x = fa.convert(Before(READS[read]).double(), rule), X.clone().requires_grad_()
    if attack:  # the input's gradient first, for which the layer makes its own as well
        torch.autograd.grad(net(x).square().sum(), x)
    with pytest.raises(RuntimeError, match="'enc'.*another module reads it.*skip"):
        net(x).square().sum().backward()


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_A03_norms_of_a_weight_may_be_taken_off_the_output_of_its_layer(rule):
    """No error passes the weight there."""
    net, lost = fa.convert(mlp(), rule), []
    for read in (lambda W: W.detach(), lambda W: W):
        norms = read(net[4].weight).square().sum(1)  # (classes,)
        lost.append(torch.autograd.grad(F.cross_entropy(net(X) - norms, Y), net[0].weight)[0])
    assert apart(*lost) < 1e-6


def test_A03_in_any_place_and_after_weight_norm():
    net = fa.convert(Tied(READS["linear"]).double(), "fa")
    h = torch.tanh(net.enc(torch.tanh(net.first(X))))  # no forward of the parent
    with pytest.raises(RuntimeError, match="'enc'"):
        F.linear(h, dict(net.named_parameters())["enc.weight"].t()).square().mean().backward()
    P.weight_norm(net.enc)
    with pytest.raises(RuntimeError, match="'enc'"):
        (net(X) - X).square().mean().backward()


@pytest.mark.parametrize("put", [lambda l: None, P.weight_norm, P.spectral_norm, P.orthogonal,
                                 lambda l: prune.l1_unstructured(l, "weight", 0.3)])  # fmt: skip
def test_A03_a_layer_that_is_used_as_it_should_be_is_not_refused(put):
    net = fa.convert(mlp(), "fa")
    put(net[2])
    for _ in range(3):
        (F.cross_entropy(net(X), Y) + F.cross_entropy(net(2 * X), Y) + net[2].weight.square().sum()).backward()


def test_A03_the_graph_is_found_from_another_thread():
    """On a GPU the hooks run in a thread of the engine, while the call waits in the caller's."""
    found, loss = [], (torch.ones(3, requires_grad=True) * 2).sum()

    def look(grad):
        thread = threading.Thread(target=lambda: found.extend(reads.roots()))
        thread.start(), thread.join()

    loss.grad_fn.next_functions[0][0].register_prehook(lambda grads: look(grads[0]))
    loss.backward()
    assert loss.grad_fn in found


class Around(nn.Module):
    """Reads a layer's weight and goes around the layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(F.linear(x, self.a.weight))


def assigned(net):
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def thawed(net):
    fa.convert(net.requires_grad_(False), "fa").requires_grad_(True)


def replaced(net):
    net.a.weight = nn.Parameter(torch.randn(6, 6))


def swapped(net):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("change", [lambda net: None, assigned, thawed, replaced, nn.Module.double, swapped])
@pytest.mark.parametrize("copied", [False, True])
def test_A20_the_watch_survives_what_becomes_of_the_weight(change, copied):
    net = fa.convert(Around(), "fa")
    change(net)
    net = copy.deepcopy(net) if copied else net
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'a'"):
            net(X.to(net.b.weight)).sum().backward()


def test_A20_the_watch_survives_pruning():
    net = fa.convert(Around(), "fa")
    prune.l1_unstructured(net.a, "weight", 0.3)
    with pytest.raises(RuntimeError, match="'a'"):
        net(X.float()).sum().backward()


@pytest.mark.parametrize(
    "change", [lambda a: None, nn.Module.double, swapped, P.weight_norm, prune.random_unstructured]
)
def test_A20_the_watch_survives_what_becomes_of_the_weight_of_an_attention(change):
    net = fa.convert(nn.Sequential(nn.MultiheadAttention(6, 2), nn.Linear(6, 3)), "fa")
    attention, options = net[0], {"amount": 0.3} if change is prune.random_unstructured else {}
    if change in (P.weight_norm, prune.random_unstructured):
        change(attention, "in_proj_weight", **options)
    else:
        attention.in_proj_weight = nn.Parameter(torch.randn(18, 6))
        change(net)
    for _ in range(2):
        x = X.to(net[1].weight)
        attention(x, x, x)  # a computed weight is watched from its first use on
        with pytest.raises(RuntimeError, match=r"'0\.[qkv]'.*another module reads it"):
            net[1](F.linear(x, attention.in_proj_weight[:6])).sum().backward()


def put_past(layer):
    """As some libraries for pruning and for low-rank adapters do."""
    layer._parameters["weight"] = nn.Parameter(layer.weight.detach().clone())


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
@pytest.mark.parametrize("put", [put_past, P.weight_norm])
def test_a_weight_put_into_the_dict_of_parameters_is_watched(rule, put):
    net = fa.convert(Tied(READS["linear"]).double(), rule, **({"classes": 6} if rule == "dfa" else {}))
    put(net.enc)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'enc'.*another module reads it"):
            net(X).square().sum().backward()
    net = fa.convert(nn.Sequential(nn.MultiheadAttention(6, 2), nn.Linear(6, 3)).double(), "fa")
    attention, net = net
    attention._parameters["in_proj_weight"] = nn.Parameter(randn(18, 6))
    with pytest.raises(RuntimeError, match="'0.q'.*another module reads it"):
        net(F.linear(attention(X, X, X)[0], attention.in_proj_weight[:6])).sum().backward()


@pytest.mark.parametrize("rule", ["brsf", "kp"])
def test_a_weight_put_into_the_dict_of_parameters_has_its_steps(rule):
    net = fa.convert(mlp(), rule)
    for layer in converted(net).values():
        put_past(layer)
    opt = sgd(net)
    for _ in range(3):
        step(net, opt)
    assert rule == "kp" or [int(m.feedback.step) for m in converted(net).values()] == [3] * 3
    net = fa.convert(mlp(), "kp")
    put_past(net[2])
    opt = torch.optim.SGD([net[2].weight], lr=0.1)
    step(net, opt)
    with pytest.raises(RuntimeError, match="no optimizer holds the feedback of 1 layers"):
        step(net, opt)


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
@pytest.mark.parametrize(
    "make", [lambda p: p.detach().clone().requires_grad_(), lambda p: p * 1.1], ids=["leaf", "made"]
)
@pytest.mark.parametrize("alone", [False, True])
def test_other_weights_for_one_call_are_watched_and_the_layers_own_still_is(rule, make, alone):
    net = fa.convert(Tied(READS["linear"]).double(), rule, **({"classes": 6} if rule == "dfa" else {}))
    given = {n: make(p) for n, p in net.named_parameters()}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'enc'.*another module reads it"):
            if alone and rule != "dfa":  # around a single layer
                own = {"weight": given["enc.weight"]}
                h = torch.func.functional_call(net.enc, own, (torch.tanh(net.first(X)),))
                F.linear(torch.tanh(h), own["weight"].t()).square().sum().backward()
            else:
                torch.func.functional_call(net, given, (X,)).square().sum().backward()
        given = {n: make(p) for n, p in net.named_parameters()}
    with pytest.raises(RuntimeError, match="'enc'.*another module reads it"):
        net(X).square().sum().backward()


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
@pytest.mark.parametrize("make", ["linear", "convolution"])
def test_A20_tensors_that_take_the_place_of_all_parameters_train_under_the_rule(rule, make):
    """Biases that are no ``nn.Parameter`` are added, and are no activity that their layer's weight is multiplied by."""
    body = (
        nn.Linear(6, 6)
        if make == "linear"
        else nn.Sequential(nn.Unflatten(1, (1, 1, 6)), nn.Conv2d(1, 1, 1), nn.Flatten())
    )
    net = fa.convert(nn.Sequential(body, nn.ReLU(), nn.Linear(6, 3)).double(), rule)
    put = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    F.cross_entropy(torch.func.functional_call(net, put, (X,)), Y).backward()
    F.cross_entropy(net(X), Y).backward()
    assert all(torch.equal(put[name].grad, p.grad) for name, p in net.named_parameters())


def test_A20_the_watch_does_not_touch_frozen_weights_or_gradients():
    net = fa.convert(mlp().requires_grad_(False), "fa")
    assert not any(p.requires_grad for p in net.parameters())
    net = fa.convert(mlp(), "fa")
    assert all(len(p._backward_hooks) == 1 for n, p in net.named_parameters() if n.endswith("weight"))
    assigned(net)
    net.double()
    assert all(len(p._backward_hooks) == 1 for n, p in net.named_parameters() if n.endswith("weight"))
    fa.convert(net, "bp")
    assert not any(p._backward_hooks for p in net.parameters())
    torch.save(fa.convert(net, "fa"), "/dev/null")  # warnings would be errors here


@pytest.mark.parametrize("rule", ["fa", "kp", "wm", "dfa"])
def test_A14_a_network_compiled_before_it_is_converted(rule):
    torch.compiler.reset()
    net = mlp()
    compiled = torch.compile(net, backend="aot_eager")
    F.cross_entropy(compiled(X), Y).backward()
    net.zero_grad()
    fa.convert(net, rule)
    F.cross_entropy(compiled(X), Y).backward()
    got = net[0].weight.grad.clone()
    net.zero_grad()
    F.cross_entropy(net(X), Y).backward()
    assert apart(got, net[0].weight.grad) < 1e-12
    assert rule == "wm" or apart(oracles.grads(oracles.twin(net), X, Y)["0.weight"], got) > 1e-3


# ------------------------------------------------------------------------------------- A04, A05, A18: once in each step

PARAMETRIZED = {
    "none": lambda layer: None,
    "weight_norm": P.weight_norm,
    "spectral_norm": P.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("how", PARAMETRIZED)
@pytest.mark.parametrize("rule", ["brsf", "frozen"])
def test_A04_what_happens_once_a_step_goes_on_under_a_parametrization(rule, how):
    net = fa.convert(mlp(), rule, **({"every": 1} if rule == "frozen" else {}))
    PARAMETRIZED[how](net[2])
    plain = fa.convert(mlp(), "brsf")
    opts = sgd(net), sgd(plain)
    for n in range(1, 4):
        step(net, opts[0]), step(plain, opts[1])
        assert [int(m.feedback.step) for m in converted(net).values()] == [n] * 3
        if rule == "brsf":
            assert torch.equal(net[2].feedback.M, plain[2].feedback.M)  # a function of seed, layer and step
        else:
            net.eval()(X)  # older parametrizations compute in the forward pass
            assert apart(net[2].feedback.B, net[2].weight.detach()) < 1e-12
            net.train()


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_A04_clamp_forward_holds_the_norm_or_says_that_it_cannot(how):
    net = fa.convert(mlp(), "fa", clamp_forward=True)
    wanted = net[2].weight.norm().item()
    PARAMETRIZED[how](net[2])
    opt = sgd(net, lr=1.0)
    if "spectral" in how:
        with pytest.raises(fa.UserError, match="clamp_forward cannot hold the norm of layer '2'"):
            step(net, opt)
        return
    for _ in range(3):
        step(net, opt)
        net(X)
        assert net[2].weight.norm().item() == pytest.approx(wanted, rel=1e-12)


class Attention(nn.Module):
    """Self-attention and a read-out."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.MultiheadAttention(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.a(x, x, x, need_weights=False)[0])


IN_PROJECTION = {
    "weight_norm": lambda a: P.weight_norm(a, "in_proj_weight"),
    "old weight_norm": lambda a: nn.utils.weight_norm(a, "in_proj_weight"),
    "prune": lambda a: prune.l1_unstructured(a, "in_proj_weight", 0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("how", IN_PROJECTION)
def test_A04_an_attention_whose_weight_is_computed_keeps_what_happens_once_a_step(how):
    net = fa.convert(Attention().double(), "brsf", clamp_forward=True)
    wanted, M = net.a.k.weight.norm().item(), net.a.k.feedback.M.clone()
    IN_PROJECTION[how](net.a)
    opt = sgd(net, lr=1.0)
    for n in range(1, 4):
        step(net, opt)
        assert [int(m.feedback.step) for m in converted(net).values()] == [n] * 5
        net(X)
        assert net.a.k.weight.norm().item() == pytest.approx(wanted, rel=1e-9)
    assert not torch.equal(net.a.k.feedback.M, M)
    net = fa.convert(Attention().double(), "kp")
    IN_PROJECTION[how](net.a)
    opt = torch.optim.SGD([p for n, p in net.named_parameters() if "feedback" not in n], lr=0.1)
    step(net, opt)
    with pytest.raises(RuntimeError, match="feedback of 5 layers"):
        step(net, opt)
    fa.add_feedback(opt, net)
    step(net, opt)


@pytest.mark.parametrize("how", ["weight_norm", "prune"])
def test_A04_the_gradient_of_a_computed_weight_is_measured(how):
    net, plain = fa.convert(mlp(), "fa"), fa.convert(mlp(), "fa")
    PARAMETRIZED[how](net[2])
    net(X)
    with torch.no_grad():
        plain[2].weight.copy_(net[2].weight)
    got, want = (fa.gradient_angles(n, X, Y, F.cross_entropy).grad_angle_global_deg for n in (net, plain))
    assert list(got) == pytest.approx(list(want), abs=1e-6) and want[1] > 1


@pytest.mark.parametrize("rule", ["kp", "wm"])
def test_A08_an_optimizer_of_the_feedback_may_step_more_rarely(rule):
    net = fa.convert(mlp(), rule)
    weights, own = (
        sgd(nn.ParameterList(ps)) for ps in (oracles.forward_parameters(net).values(), fa.feedback_parameters(net))
    )
    for i in range(1, 7):
        F.cross_entropy(net(X), Y).backward()
        for opt in [weights, own] if i % 3 == 0 else [weights]:
            opt.step(), opt.zero_grad()
    del own
    net = fa.convert(mlp(), rule)
    weights = sgd(nn.ParameterList(oracles.forward_parameters(net).values()))
    step(net, weights)
    with pytest.raises(RuntimeError, match="no optimizer holds the feedback of 3 layers"):
        step(net, weights)


@pytest.mark.parametrize("how", ["weight_norm", "prune"])
def test_A04_feedback_that_nobody_optimizes_is_told_under_a_parametrization(how):
    net = fa.convert(mlp(), "kp")
    PARAMETRIZED[how](net[2])
    opt = torch.optim.SGD(oracles.forward_parameters(net).values(), lr=0.1)
    step(net, opt)
    with pytest.raises(RuntimeError, match="feedback of 3 layers"):
        step(net, opt)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around SGD: an optimizer whose step calls another's."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))
        self.inner = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.inner.param_groups

    def step(self, closure):
        params = self.param_groups[0]["params"]
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            [p.add_(p.grad, alpha=0.05) for p in params]
        self.zero_grad()
        closure()
        with torch.no_grad():
            [p.copy_(k) for p, k in zip(params, kept)]
        self.inner.step()


class Louder(torch.optim.SGD):
    """A subclass whose step calls its base class's."""

    def step(self, closure=None):
        return super().step(closure)


class Several(torch.optim.Optimizer):
    """An optimizer with no parameters of its own that matter, and one for each parameter."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__([torch.zeros(1, requires_grad=True)], dict(lr=lr))
        self.each = [torch.optim.SGD([p], lr=lr) for p in params]

    def step(self, closure=None):
        [opt.step() for opt in self.each]


@pytest.mark.parametrize("make", [SAM, Louder, Several])
@pytest.mark.parametrize("rule", ["frozen", "brsf"])
def test_A05_a_step_within_a_step_counts_once(make, rule):
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # PyTorch hooks a class's step with its first object
    net = fa.convert(mlp(), rule)
    opt = make(net.parameters(), 0.1)

    def closure():
        F.cross_entropy(net(X), Y).backward()

    for n in range(1, 4):
        net.zero_grad()
        closure()
        opt.step(closure)
        assert [int(m.feedback.step) for m in converted(net).values()] == [n] * 3


def test_A05_a_wrapper_around_the_weights_leaves_time_for_the_optimizer_of_the_feedback():
    net = fa.convert(mlp(), "kp")
    weights = SAM(oracles.forward_parameters(net).values(), 0.1)
    own = torch.optim.SGD(fa.feedback_parameters(net), lr=0.1)
    F.cross_entropy(net(X), Y).backward()
    weights.step(lambda: F.cross_entropy(net(X), Y).backward())
    own.step()


def test_A05_a_step_that_failed_does_not_count_and_the_next_one_does():
    net = fa.convert(mlp(), "brsf")
    opt = SAM(net.parameters(), 0.1)
    F.cross_entropy(net(X), Y).backward()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    F.cross_entropy(net(X), Y).backward()
    opt.step(lambda: F.cross_entropy(net(X), Y).backward())
    assert int(net[2].feedback.step) == 1


def test_A05_a_step_that_a_scaler_skips_within_a_fused_optimizer_does_not_count():
    net = fa.convert(mlp(torch.float32), "brsf")
    opt, scaler = sgd(net, fused=True), torch.amp.GradScaler("cpu")
    for loss_scale in (1.0, float("inf"), 1.0):
        opt.zero_grad()
        scaler.scale(F.cross_entropy(net(X.float()), Y) * loss_scale).backward()
        scaler.step(opt)
        scaler.update()
    assert int(net[2].feedback.step) == 2


def test_A05_a_weight_that_moves_without_an_optimizer_is_told_once():
    net = fa.convert(mlp(), "brsf")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(6):
            net.zero_grad()
            F.cross_entropy(net(X), Y).backward()
            with torch.no_grad():
                [p.sub_(p.grad, alpha=0.1) for p in net.parameters() if p.grad is not None]
    assert len(told) == 3 and all("fa.after_step(net)" in str(w.message) for w in told)  # once for each layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = sgd(fa.convert(net, "brsf"))
        [step(net, opt) for _ in range(5)]


def in_place(p, new):
    p.data.copy_(new)


def other_data(p, new):
    p.data = new


def by_vector(p, new):
    nn.utils.vector_to_parameters(new.flatten(), [p])


def by_hand(net, change, parameters, steps=20, lr=0.1):
    """Steps without an optimizer; the warnings that they give."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            net.zero_grad()
            F.cross_entropy(net(X), Y).backward()
            [change(p, p.detach() - lr * p.grad) for p in parameters]
    return [str(w.message) for w in told]


@pytest.mark.parametrize("rule, options", [("brsf", {}), ("frozen", {"every": 2}), ("fa", {"clamp_forward": True})])
@pytest.mark.parametrize("change", [in_place, other_data, by_vector])
def test_a_step_through_data_that_no_optimizer_makes_is_told_once(rule, options, change):
    net = fa.convert(mlp(), rule, **options)
    told = by_hand(net, change, list(net.parameters()))
    assert len(told) == 3 and all("call fa.after_step(net)" in text for text in told)
    net = fa.convert(mlp(), rule, **options)
    assert not by_hand(net, change, list(net.parameters()), lr=0.0)  # passes without a step, as in accumulation


@pytest.mark.parametrize("rule", ["kp", "pfa", "wm"])
@pytest.mark.parametrize("change", [in_place, other_data, lambda p, new: p.detach().copy_(new)])
def test_a_step_by_hand_that_leaves_learned_feedback_out_is_told_once(rule, change):
    net = fa.convert(mlp(), rule)
    told = by_hand(net, change, list(oracles.forward_parameters(net).values()))
    assert len(told) == 3 and all("step fa.feedback_parameters(net) as well" in text for text in told)
    net = fa.convert(mlp(), rule)
    assert not by_hand(net, change, list(net.parameters()))
    net = fa.convert(mlp(), rule)
    opt = sgd(net)
    step(net, opt)
    own = [m.feedback.waits for m in converted(net).values()]
    assert own == [False] * 3  # held by an optimizer: nothing more to look for


@pytest.mark.parametrize("rule", ["brsf", "frozen", "kp"])
@pytest.mark.parametrize("frozen", [False, True])
def test_A05_a_target_network_that_follows_another_one_is_not_taken_for_trained(rule, frozen):
    """Polyak averaging, a mean teacher: passes with gradients on, whose outputs are detached."""
    net = fa.convert(mlp(), rule)
    opt = sgd(net)
    step(net, opt)
    target = copy.deepcopy(net).requires_grad_(not frozen)
    followed = list(zip(oracles.forward_parameters(target).values(), oracles.forward_parameters(net).values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            opt.zero_grad()
            F.mse_loss(net(X), target(X).detach() + 1).backward()
            opt.step()
            with torch.no_grad():
                [p.lerp_(q, 0.1) for p, q in followed]


@pytest.mark.parametrize("rule", ["brsf", "kp"])
def test_values_that_an_optimizer_tries_within_its_step_are_no_steps(rule):
    """LBFGS calls its closure many times."""
    net = fa.convert(mlp(), rule)
    opt = torch.optim.LBFGS(net.parameters(), lr=0.1)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [opt.step(closure) for _ in range(3)]
    assert rule == "kp" or int(net[0].feedback.step) == 3


def test_A05_the_count_of_steps_follows_the_buffer():
    """A state restored by hand, tensor by tensor."""
    net = fa.convert(mlp(), "brsf")
    opt, kept = sgd(net), copy.deepcopy(net.state_dict())
    step(net, opt)
    want = net[0].feedback.M.clone()
    with torch.no_grad():
        [t.copy_(kept[k]) for k, t in net.state_dict().items()]
    step(net, opt)
    assert int(net[0].feedback.step) == 1 and torch.equal(net[0].feedback.M, want)


def test_A18_the_count_of_steps_is_on_the_layers_device():
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()  # a second kind of device
    for rule in ("brsf", "frozen", "kp"):
        net = fa.convert(mlp(torch.float32).to("lazy"), rule)
        assert {t.device.type for t in net.state_dict().values()} == {"lazy"}


# ----------------------------------------------------------------------------- A08: feedback for an optimizer made before


@pytest.mark.parametrize("rule", ["kp", "pfa", "wm", "ia", "sa", "aa"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_A08_added_feedback_has_the_rate_and_decay_of_its_weight_or_no_decay(rule, make):
    net = mlp()
    opt = make([{"params": net[0].parameters()}, {"params": [*net[2].parameters(), *net[4].parameters()]}], lr=0.1,
               weight_decay=0.01)  # fmt: skip
    opt.param_groups[0]["lr"] = 0.001
    fa.convert(net, rule)
    assert fa.add_feedback(opt, net) is opt
    own = rule in ("wm", "ia", "sa", "aa")
    for layer, lr in ((net[0], 0.001), (net[2], 0.1), (net[4], 0.1)):
        for p in layer.feedback.parameters():
            (group,) = (g for g in opt.param_groups if any(q is p for q in g["params"]))
            assert (group["lr"], group["weight_decay"]) == (lr, 0.0 if own else 0.01)
    before = [len(g["params"]) for g in opt.param_groups]
    fa.add_feedback(opt, net)
    assert [len(g["params"]) for g in opt.param_groups] == before
    for _ in range(3):
        step(net, opt)


@pytest.mark.parametrize("rule", ["kp", "pfa_o", "sa"])
@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.LBFGS])
def test_A08_an_optimizer_that_takes_no_parameters_later_is_refused_before_anything_changes(rule, make):
    net = mlp()
    opt = make(net.parameters(), lr=0.1)
    fa.convert(net, rule)
    before = [len(g["params"]) for g in opt.param_groups]
    with pytest.raises(fa.UserError, match=f"{make.__name__} takes no parameters later; make the optimizer after"):
        fa.add_feedback(opt, net)
    assert [len(g["params"]) for g in opt.param_groups] == before
    opt = fa.add_feedback(make(net.parameters(), lr=0.1), net)  # it holds the feedback already
    opt.step(lambda: F.cross_entropy(net(X), Y))


@pytest.mark.parametrize("rule", ["wm", "sa", "kp", "pfa"])
@pytest.mark.parametrize("made", ["param_groups", "added"])
def test_A08_feedback_moves_alike_where_a_loss_is_minimized_and_where_its_negative_is_maximized(rule, made):
    ends = []
    for maximize in (False, True):
        net = mlp()
        if made == "added":
            opt = torch.optim.SGD(net.parameters(), lr=0.5, maximize=maximize)
            opt = fa.add_feedback(opt, fa.convert(net, rule))
        else:
            opt = torch.optim.SGD(fa.param_groups(fa.convert(net, rule), 0.5), maximize=maximize)
        for _ in range(10):
            opt.zero_grad()
            (F.cross_entropy(net(X), Y) * (-1) ** maximize).backward()
            opt.step()
        ends.append(net.state_dict())
    assert all(apart(ends[1][k], t) < 1e-12 for k, t in ends[0].items())


@pytest.mark.parametrize(
    "rule, own, options",
    [("sa", {}, {"maximize": True}), ("kp", {"lr": 0.01}, {}), ("pfa", {"weight_decay": 0.0}, {"weight_decay": 0.1})],
)
def test_A08_feedback_that_gets_another_step_than_its_rule_asks_for_is_told(rule, own, options, recwarn):
    net = fa.convert(mlp(), rule)
    step(net, torch.optim.SGD(fa.param_groups(net, 0.1, options.get("weight_decay", 0.0)), **options))
    assert not recwarn.list
    net = fa.convert(mlp(), rule)
    groups = [{"params": oracles.forward_parameters(net).values()}, {"params": fa.feedback_parameters(net), **own}]
    with pytest.warns(UserWarning, match=f"{rule}: feedback .*; use fa.param_groups"):
        step(net, torch.optim.SGD(groups, lr=0.1, **options))


def test_A08_the_fixed_point_is_that_of_param_groups():
    sizes = []
    for late in (False, True):
        net = oracles.fixed_weights(nn.Sequential(nn.Linear(6, 3)).double())
        opt = torch.optim.SGD(net.parameters(), lr=5.0, weight_decay=5e-4)
        fa.convert(net, "sa")
        opt = fa.add_feedback(opt, net) if late else torch.optim.SGD(fa.param_groups(net, 5.0, 5e-4))
        net[0].weight.requires_grad_(False)
        for _ in range(1500):
            step(net, opt)
        sizes.append((net[0].feedback.B.norm() / net[0].weight.norm()).item())
    assert sizes == pytest.approx([1.0, 1.0], rel=1e-6)


SCHEDULERS = {
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=9),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("rule", ["kp", "sa"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_A08_a_scheduler_made_before_includes_the_feedback(rule, kind):
    net = mlp()
    opt = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    scheduler = SCHEDULERS[kind](opt)
    step(net, opt), scheduler.step()
    fa.add_feedback(opt, fa.convert(net, rule))
    rates = set()
    for _ in range(5):
        step(net, opt), scheduler.step()
        assert len({g["lr"] for g in opt.param_groups}) == 1
        rates.add(opt.param_groups[-1]["lr"])
    assert len(rates) > 2


def test_A08_a_foreign_scheduler_and_a_foreign_optimizer_are_refused():
    class MyScheduler:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    net = mlp()
    opt = sgd(net)
    scheduler = MyScheduler(opt)
    fa.convert(net, "sa")
    with pytest.raises(fa.UserError, match="MyScheduler.*after fa.add_feedback"):
        fa.add_feedback(opt, net)
    assert len(opt.param_groups) == 1
    del scheduler
    with pytest.raises(fa.UserError, match="holds no weight"):
        fa.add_feedback(sgd(mlp()), net)


# ------------------------------------------------------------------------------------ A19, A21: sizes, and implicit feedback


@pytest.mark.parametrize("rule", ["kp", "pfa", "sa", "frozen"])
def test_A19_a_weight_of_zeros_cannot_be_held_at_its_norm(rule):
    net = mlp()
    nn.init.zeros_(net[4].weight)
    with pytest.raises(fa.UserError, match="layer '4'.*all zeros.*clamp_forward"):
        fa.convert(net, rule, clamp_forward=True)
    assert not converted(net)
    fa.convert(net, rule, clamp_forward=True, skip=["4"])


def test_A19_a_copy_of_zeros_that_is_never_refreshed_would_send_no_error():
    net = mlp()
    nn.init.zeros_(net[4].weight)
    with pytest.raises(fa.UserError, match="layer '4'.*frozen.*all zeros.*initialise it before converting$"):
        fa.convert(net, "frozen", every=0)
    assert not converted(net)


def test_A19_a_weight_that_is_emptied_later_stays_finite():
    net = fa.convert(mlp(), "fa", clamp_forward=True)
    opt = sgd(net)
    with torch.no_grad():
        net[4].weight.zero_()
    net[4].weight.requires_grad_(False)
    step(net, opt)
    assert not net[4].weight.any()


CHANGES = {
    "pruned": lambda net: prune.l1_unstructured(net[2], "weight", 0.5),
    "weight norm": lambda net: P.weight_norm(net[2]),
    "clipped": lambda net: net[2].weight.detach().clamp_(-0.1, 0.1),
    "clipped data": lambda net: net[2].weight.data.clamp_(-0.1, 0.1),
    "one entry": lambda net: net[2].weight.detach()[0, 3].zero_(),
    "entries of the first input": lambda net: net[2].weight.detach()[:, 0].zero_(),
    "one entry of data": lambda net: net[2].weight.data[4, 1].mul_(2),
    "other data": lambda net: setattr(net[2].weight, "data", net[2].weight.data.flip(0)),
    "other weights": lambda net: net.load_state_dict({"2.weight": torch.randn(5, 8)}, strict=False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [0, 3])
def test_A21_a_weight_changed_by_anything_but_its_optimizer_ends_implicit_feedback(change, steps):
    net = fa.convert(mlp(), "pfa", expansion=2, implicit=True)
    opt = sgd(net, momentum=0.9)
    for _ in range(steps):
        step(net, opt)
    CHANGES[change](net)
    with pytest.raises(RuntimeError, match="implicit feedback of layer '2'.*implicit=False"):
        step(net, opt)


def test_A21_a_layer_of_one_input_is_watched_too():
    net = fa.convert(oracles.mlp(6, 1, 3)[0], "pfa", expansion=2, implicit=True)
    opt = sgd(net)
    net[2].weight.detach().clamp_(-0.01, 0.01)
    with pytest.raises(RuntimeError, match="implicit feedback of layer '2'"):
        F.cross_entropy(net(X), Y).backward()
        opt.step()


def test_A21_a_run_that_diverges_is_not_taken_for_a_change():
    net = fa.convert(mlp(), "pfa", expansion=2, implicit=True)
    opt = sgd(net, lr=float("inf"))
    for _ in range(3):
        step(net, opt)
    assert net[2].weight.isnan().any()


def test_A21_a_change_of_optimizer_is_told_at_any_time():
    net = fa.convert(mlp(), "pfa", expansion=2, implicit=True)
    step(net, sgd(net))
    with pytest.raises(RuntimeError, match="not Adam"):
        step(net, torch.optim.Adam(net.parameters()))


def test_A21_what_leaves_the_weight_alone_is_fine():
    net = fa.convert(mlp(torch.float32), "pfa", expansion=2, implicit=True)
    opt = sgd(net, fused=True)
    step(net, opt)
    kept = copy.deepcopy(net.state_dict())
    step(net, opt)
    net.load_state_dict(kept)  # weights and feedback together
    step(net, opt)
    net.double()
    other = copy.deepcopy(net)
    step(net, opt), step(other, sgd(other))
    assert apart(fa.feedback_weight(other[2]), fa.feedback_weight(net[2])) < 1e-12


# ------------------------------------------------------------------------------------ A24, A30: layout and size of feedback


@pytest.mark.parametrize("rule", ["pfa_o", "pfa", "kp", "frsf", "dfa"])
def test_A24_feedback_is_contiguous(rule):
    net = fa.convert(oracles.resnet()[0], rule)
    assert all(t.is_contiguous() for n, t in net.state_dict().items() if "feedback" in n)


@pytest.mark.parametrize("rule, options", [("frozen", {}), ("kp", {"init": "copy"}), ("sa", {"init": "copy"})])
def test_A24_a_copy_of_a_channels_last_weight_is_contiguous(rule, options):
    net = fa.convert(oracles.resnet()[0].to(memory_format=torch.channels_last), rule, **options)
    assert all(t.is_contiguous() for n, t in net.state_dict().items() if "feedback" in n)
    assert all(torch.equal(m.feedback.B, m.weight) for m in converted(net).values())


@pytest.mark.parametrize("rule, options", [("pfa_o", {}), ("pfa", {}), ("fa", {"form": "dense"})])
def test_A30_feedback_that_does_not_fit_into_memory_is_refused_by_name_before_it_is_drawn(rule, options, monkeypatch):
    from fa.rules import base

    monkeypatch.setattr(base, "memory", lambda: 1e6)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 200))
    sample = torch.zeros(1, 1, 32, 32)
    with pytest.raises(fa.UserError, match=r"layer '[02]': drawing feedback of \d+ x \d+ entries.*skip.*expansion"):
        fa.convert(net, rule, sample=sample, **options)
    assert not converted(net) and base.memory() == 1e6


@pytest.mark.parametrize("line, files, limits", [
    ("0::/job/step", {"memory.max": "max", "job/memory.max": "4096", "job/step/memory.max": "max"}, [4096]),
    ("4:cpu,memory:/job", {"memory/memory.limit_in_bytes": "9000", "memory/job/memory.limit_in_bytes": "512"}, [512, 9000]),
    ("0::/", {"memory.max": "1024"}, [1024]),
    ("0::/../../other", {}, []), ("3:cpu:/job", {"job/memory.max": "7"}, []), ("nothing", {}, []),
])  # fmt: skip
def test_A30_a_containers_or_jobs_memory_is_the_limit(line, files, limits, tmp_path, monkeypatch):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(line + "\n")
    for name, text in files.items():
        (path := tmp_path / "sys" / "fs" / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert provenance.control_groups(tmp_path) == limits
    monkeypatch.setattr(provenance, "control_groups", lambda: limits)
    assert provenance.memory() == min(limits) if limits else provenance.memory() > 1e8


def test_A30_memory_is_known_here():
    from fa.rules import base

    assert 1e8 < base.memory() < 1e15


def test_A14_a_compiled_loop_does_not_trace_the_watch():
    """A traced hook would be guarded by what other networks have, and fail when they are gone."""
    torch.compiler.reset()
    net, traced = fa.convert(mlp(), "fa"), torch._dynamo.eval_frame._debug_get_cache_entry_list

    def control(grad):
        return 2 * grad

    net[2].weight.register_hook(control)

    def loop():
        F.cross_entropy(net(X), Y).backward()

    compiled = torch.compile(loop, backend="aot_eager")
    compiled(), compiled()
    watch, _ = net[2].weight._backward_hooks.values()
    assert traced(control.__code__) and not traced(inspect.unwrap(watch).__code__)
