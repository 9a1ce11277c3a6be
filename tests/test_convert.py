"""What ``convert`` promises about other people's networks: what stays, what is refused, what is checked."""

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa
import oracles
from fa.layers.hooks import converted
from oracles import apart, grads, randn

FIXED = ["fa", "usf", "brsf", "frsf", "frozen", "dfa"]
LEARNED = ["kp", "pfa", "pfa_o"]
every_rule = pytest.mark.parametrize("rule", FIXED + LEARNED)
fixed = pytest.mark.parametrize("rule", FIXED)
learned = pytest.mark.parametrize("rule", LEARNED)


def small():
    """Two linear layers and their batch."""
    return oracles.mlp(6, 9, 3)


def train(net, opt, steps=3):
    for k in range(steps):
        opt.zero_grad()
        F.cross_entropy(net(randn(8, 6, seed=k).to(next(net.parameters()))), torch.arange(8) % 3).backward()
        opt.step()


# ------------------------------------------------------------------------------------------ what stays


@every_rule
def test_parameters_names_hooks_and_modes_stay(rule):
    net, x, y = oracles.resnet(torch.float32)
    net.block1.eval()
    net.block2.conv1.eval()
    net.stem.weight.requires_grad_(False)
    net.fc.bias.requires_grad_(False)
    called = []
    net.block1.conv1.register_forward_hook(lambda m, args, out: called.append("forward"))
    net.block1.conv1.register_full_backward_hook(lambda m, below, above: called.append("backward"))
    net.fc.register_forward_pre_hook(lambda m, args: called.append("pre"))
    parameters = dict(net.named_parameters())
    wanted = {n: p.requires_grad for n, p in parameters.items()}
    values = {n: p.detach().clone() for n, p in parameters.items()}
    modes = {n: m.training for n, m in net.named_modules()}
    keys = list(net.state_dict())
    out = oracles.twin(net)(x)
    called.clear()

    assert fa.convert(net, rule) is net
    after = oracles.forward_parameters(net)
    assert list(after) == list(parameters) and all(after[n] is p for n, p in parameters.items())
    assert {n: p.requires_grad for n, p in after.items()} == wanted
    assert all(torch.equal(after[n], v) for n, v in values.items())
    assert {n: m.training for n, m in net.named_modules() if "feedback" not in n} == modes
    assert [k for k in net.state_dict() if ".feedback." not in k] == keys
    assert all(isinstance(m, (nn.Linear, nn.Conv2d)) for m in converted(net).values()) and len(converted(net)) == 7
    assert torch.equal(net(x), out)  # the forward pass is untouched
    grads(net, x, y)
    assert called.count("pre") == 2 and called.count("forward") == 2 and called.count("backward") == 1
    assert net.stem.weight.grad is None and net.fc.bias.grad is None


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_feedback_has_the_dtype_of_the_net_and_moves_with_it(rule, dtype):
    net, x, y = small()
    fa.convert(net.to(dtype), rule)
    state = lambda: {t.dtype for k, t in net.state_dict().items() if not k.endswith("step")}  # noqa: E731
    assert state() == {dtype}
    grads(net, x.to(dtype), y)
    net.float()
    assert state() == {torch.float32}
    grads(net, x.float(), y)


@every_rule
def test_same_seed_same_feedback_whatever_else_is_random(rule):
    def feedback(seed, dtype=torch.float64):
        net = oracles.resnet(dtype)[0]
        fa.convert(net, rule, seed=seed)
        return {k: v for k, v in net.state_dict().items() if ".feedback." in k and v.is_floating_point()}

    torch.manual_seed(1)
    a = feedback(5)
    torch.manual_seed(2)
    b = feedback(5)
    net = oracles.resnet()[0]
    before = torch.get_rng_state()
    fa.convert(net, rule)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    narrow = feedback(5, torch.float32)
    assert all(
        apart(narrow[k].double(), a[k]) < 1e-6 for k in a
    )  # a network's feedback does not depend on its precision
    other = feedback(6)
    drawn = [k for k in a if a[k].numel() > 1 and rule not in ("usf", "frozen")]
    assert all(not torch.equal(a[k], other[k]) for k in drawn)
    if drawn:
        assert not torch.equal(
            *(a[k].flatten()[:20] / a[k].abs().max() for k in drawn[:2])
        )  # no two layers share a stream


@every_rule
def test_training_does_not_touch_the_global_generator(rule):
    net, _, _ = small()
    fa.convert(net, rule)
    before = torch.get_rng_state()
    train(net, torch.optim.SGD(fa.param_groups(net, 0.1)))
    assert torch.equal(before, torch.get_rng_state())


@fixed
def test_an_optimizer_made_before_still_trains_the_network(rule):
    net, _, _ = small()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    fa.convert(net, rule)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    train(net, opt, 3)
    assert all(not torch.equal(p, before[n]) for n, p in net.named_parameters())
    early = net.state_dict()
    net, _, _ = small()
    train(fa.convert(net, rule), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), 3)
    assert all(torch.equal(v, early[k]) for k, v in net.state_dict().items())


def test_forward_without_gradient_and_in_eval_mode():
    net, x, _ = oracles.resnet(torch.float32)
    want = net(x)
    net.eval()
    quiet = net(x).detach()
    for rule in FIXED + LEARNED:
        fa.convert(net, rule)
        with torch.no_grad():
            assert torch.equal(net(x), quiet) and not net(x).requires_grad
        with torch.inference_mode():
            assert torch.equal(net(x), quiet)
    assert not torch.equal(want, quiet)


@pytest.mark.parametrize("rule", ["fa", "kp", "pfa"])
def test_a_layer_used_twice_is_one_layer(rule):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(4, 4)
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))

    net = fa.convert(oracles.fixed_weights(Twice().double()), rule)
    assert len(converted(net)) == 2 and net.a is net.b
    x, y = randn(5, 4, seed=1), torch.arange(5) % 3
    got = grads(net, x, y)
    W, b, K = net.a.weight, net.a.bias, fa.feedback_weight(net.a)
    Ko = fa.feedback_weight(net.out)

    def under(x, W, b, K):
        g = F.linear(x, K)
        return F.linear(x.detach(), W, b) + (g - g.detach())

    h = torch.tanh(under(torch.tanh(under(x, W, b, K)), W, b, K))
    want = torch.autograd.grad(F.cross_entropy(under(h, net.out.weight, net.out.bias, Ko), y), (W, b))
    assert apart(got["a.weight"], want[0]) < 1e-13 and apart(got["a.bias"], want[1]) < 1e-13


# ------------------------------------------------------------------------------------------ back, and again


@every_rule
def test_back_to_backprop_bit_for_bit(rule):
    net, x, y = oracles.resnet(torch.float32)
    untouched = copy.deepcopy(net)
    fa.convert(net, rule)
    grads(net, x, y)
    net.zero_grad(set_to_none=True)
    net.load_state_dict(untouched.state_dict(), strict=False)  # running statistics as they were
    assert fa.convert(net, "bp") is net
    assert {n: type(m) for n, m in net.named_modules()} == {n: type(m) for n, m in untouched.named_modules()}
    assert {n: vars(m).keys() for n, m in net.named_modules()} == {
        n: vars(m).keys() for n, m in untouched.named_modules()
    }
    assert list(net.state_dict()) == list(untouched.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    want, got = grads(untouched, x, y), grads(net, x, y)
    assert want.keys() == got.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert torch.autograd.grad(net.stem.weight.sum(), net.stem.weight)  # and its weights may be read by anyone
    net.stem.weight.sum().backward()


@every_rule
def test_a_second_rule_replaces_the_first(rule):
    net, x, y = oracles.resnet(torch.float32)
    fresh = fa.convert(copy.deepcopy(net), rule, seed=2)
    fa.convert(fa.convert(net, "pfa", seed=1), rule, seed=2)
    assert list(net.state_dict()) == list(fresh.state_dict())
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in net.state_dict().items())
    want, got = grads(fresh, x, y), grads(net, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)
    fa.convert(net, "fa", skip=["block1"])
    assert len(converted(net)) == 5


def test_a_second_conversion_that_fails_leaves_the_first():
    net, x, y = small()
    fa.convert(net, "fa")
    want = grads(net, x, y)
    net.append(nn.Conv1d(1, 1, 1))
    with pytest.raises(fa.UserError):
        fa.convert(net, "kp")
    del net[3]
    got = grads(net, x, y)
    assert len(converted(net)) == 2 and all(torch.equal(got[k], want[k]) for k in want)


@every_rule
def test_a_root_that_is_itself_a_layer(rule):
    layer = nn.Linear(4, 3).double()
    fa.convert(layer, rule)
    layer(randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    if rule != "dfa":
        assert fa.feedback_weight(layer).shape == (3, 4)
        assert fa.alignment(layer).layer.tolist() == [""]
    assert type(fa.convert(layer, "bp")) is nn.Linear


def test_skip_leaves_layers_and_all_that_is_in_them():
    net, x, y = oracles.resnet()
    fa.convert(net, "fa", skip=["block1", "fc", "block2.conv1"])
    assert list(converted(net)) == ["stem", "block2.conv2", "block2.short"]
    grads(net, x, y)
    with pytest.raises(fa.UserError, match="block9"):
        fa.convert(net, "fa", skip=["block9"])
    assert list(converted(net)) == ["stem", "block2.conv2", "block2.short"]
    net.block11 = nn.Linear(2, 2)
    fa.convert(net, "fa", skip=["block1"])
    assert "block11" in converted(net)  # a name that begins alike is another module


# ------------------------------------------------------------------------------------------ what is refused


class Scaled(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def normed():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))))


def embedded():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 5))
    net[1].weight = net[0].weight
    return net


REFUSED = {
    "tied": (tied, "0"),
    "tied to an embedding": (embedded, "1"),
    "lazy": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), "1"),
    "lazy convolution": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyConv2d(3, 3)), "1"),
    "transposed": (lambda: nn.Sequential(nn.Linear(3, 3), nn.ConvTranspose2d(3, 3, 3)), "1"),
    "one-dimensional": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 3)), "1"),
    "subclass": (lambda: nn.Sequential(nn.Linear(3, 3), Scaled(3, 3)), "1"),
    "parametrized": (normed, "1.0"),
    "recurrent": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), "1"),
    "cell": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GRUCell(4, 4)), "1"),
    "bilinear": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4)), "1"),
}


@pytest.mark.parametrize("rule", ["fa", "pfa", "dfa"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name_and_nothing_changes(case, rule):
    make, name = REFUSED[case]
    net = make()
    types, keys = [type(m) for m in net.modules()], list(net.state_dict())
    with pytest.raises(fa.UserError, match="skip") as e:
        fa.convert(net, rule)
    assert f"{name} (" in str(e.value) and "\n" not in str(e.value)
    assert [type(m) for m in net.modules()] == types and list(net.state_dict()) == keys
    if case == "tied":
        net.append(nn.Linear(4, 4))
    fa.convert(net, rule, skip=["0", "2"] if case == "tied" else [name])
    assert converted(net) and name not in converted(net)


def test_every_problem_is_named_at_once():
    net = nn.ModuleDict({"one": Scaled(2, 2), "two": nn.ConvTranspose2d(2, 2, 1), "fine": nn.Linear(2, 2)})
    with pytest.raises(fa.UserError, match=r"one \(.*two \("):
        fa.convert(net, "fa")


def test_unknown_names_name_the_known():
    net, _, _ = small()
    with pytest.raises(fa.UserError, match="'pfaa'.*pfa_o"):
        fa.convert(net, "pfaa")
    with pytest.raises(fa.UserError, match="'expand'.*expansion"):
        fa.convert(net, "pfa", expand=3)
    with pytest.raises(fa.UserError, match="Rule"):
        fa.convert(net, 3)
    with pytest.raises(fa.UserError, match="a rule object has its own: expansion"):
        fa.convert(net, fa.RULES["pfa"](), expansion=3)
    with pytest.raises(fa.UserError, match="nothing to convert"):
        fa.convert(nn.Sequential(nn.ReLU()), "fa")
    assert not converted(net)
    fa.convert(nn.Sequential(nn.ReLU()), "bp")  # nothing to take off is no error


# ------------------------------------------------------------------------------------------ checks of its own


class GoesAround(nn.Module):
    """Reads its layer's weight, as torchvision's Swin does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.around = True

    def forward(self, x):
        return self.out(torch.relu(F.linear(x, self.inner.weight, self.inner.bias) if self.around else self.inner(x)))


@pytest.mark.parametrize("rule", ["fa", "usf", "kp", "pfa", "dfa"])
@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
def test_a_weight_read_by_another_module_raises(rule, copied):
    net = fa.convert(GoesAround(), rule)
    if copied:
        original, net = net, copy.deepcopy(net)
        del original
        if rule == "fa":
            gc.collect()  # slow, so once only
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    with pytest.raises(RuntimeError, match="'inner'.*skip"):
        F.cross_entropy(net(x), y).backward()
    net.around = False
    F.cross_entropy(net(x), y).backward()  # a proper pass is fine
    if rule != "dfa":
        net.around = True
        with pytest.raises(RuntimeError, match="'inner'"):  # also after one
            F.cross_entropy(net(x), y).backward()
    net.around = True
    fa.convert(net, rule, skip=["inner"])
    F.cross_entropy(net(x), y).backward()


def test_a_penalty_on_the_weights_is_no_going_around():
    net, x, y = small()
    fa.convert(net, "fa")
    want = grads(net, x, y)
    net.zero_grad()
    (F.cross_entropy(net(x), y) + sum(p.square().sum() for p in net.parameters()) / 2).backward()
    assert all(apart(p.grad, want[n] + p.detach()) < 1e-13 for n, p in net.named_parameters())


@learned
def test_feedback_that_no_optimizer_holds_raises_at_the_second_step(rule):
    net, _, _ = small()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    fa.convert(net, rule)
    train(net, opt, 1)
    with pytest.raises(RuntimeError, match="no optimizer holds the feedback of 2 layers.*fa.add_feedback"):
        train(net, opt, 1)
    opt.add_param_group({"params": fa.feedback_parameters(net)})
    train(net, opt, 3)


@learned
@pytest.mark.parametrize("how", ["before", "groups", "two optimizers", "added"])
def test_feedback_that_an_optimizer_holds_is_fine(rule, how):
    net, _, _ = small()
    weights = list(net.parameters())
    early = torch.optim.SGD(weights, lr=0.1)
    fa.convert(net, rule)
    before = [p.detach().clone() for p in fa.feedback_parameters(net)]
    if how == "two optimizers":
        other = torch.optim.SGD(fa.feedback_parameters(net), lr=0.1)
        for k in range(3):
            train(net, early, 1)
            other.step()
    else:
        if how == "added":
            early.add_param_group({"params": fa.feedback_parameters(net)})
        opt = {"before": torch.optim.SGD(net.parameters(), lr=0.1), "added": early}.get(how) or torch.optim.SGD(
            fa.param_groups(net, 0.1)
        )
        train(net, opt, 3)
    assert all(not torch.equal(a, b) for a, b in zip(before, fa.feedback_parameters(net)))


def test_an_optimizer_of_another_network_is_none_of_its_business():
    net, _, _ = small()
    fa.convert(net, "pfa")
    other, _, _ = small()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), 3)


def test_a_copy_checks_its_own_optimizer():
    net, _, _ = small()
    fa.convert(net, "pfa")
    train(net, torch.optim.SGD(net.parameters(), lr=0.1))
    copied = copy.deepcopy(net)
    weights = [p for n, p in copied.named_parameters() if "feedback" not in n]
    opt = torch.optim.SGD(weights, lr=0.1)
    with pytest.raises(RuntimeError, match="no optimizer holds the feedback"):
        train(copied, opt, 2)


@pytest.mark.parametrize("rule", ["pfa", "pfa_o"])
def test_implicit_feedback_refuses_optimizers_that_it_does_not_fit(rule):
    def fresh():
        return fa.convert(small()[0], rule, implicit=True)

    for make in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        net = fresh()
        with pytest.raises(RuntimeError, match=f"implicit.*{make.__name__}.*implicit=False"):
            train(net, make(net.parameters(), lr=0.01), 1)
    net = fresh()
    opt = torch.optim.SGD(list(oracles.forward_parameters(net).values()), lr=0.1)
    opt.add_param_group({"params": fa.feedback_parameters(net), "weight_decay": 0.1})
    with pytest.raises(RuntimeError, match="group"):
        train(net, opt, 1)
    net = fresh()
    train(net, torch.optim.SGD(fa.param_groups(net, 0.1, 0.01), momentum=0.9), 3)
    assert not torch.equal(net[0].feedback.c, torch.ones_like(net[0].feedback.c))


# ------------------------------------------------------------------------------------------ copies and files


@every_rule
def test_a_deepcopy_is_a_network_of_its_own(rule):
    net, x, y = oracles.resnet()
    fa.convert(net, rule)
    copied = copy.deepcopy(net)
    assert all(torch.equal(v, copied.state_dict()[k]) for k, v in net.state_dict().items())
    ours = {v.data_ptr() for v in net.state_dict().values() if v.numel()}
    assert not ours & {v.data_ptr() for v in copied.state_dict().values() if v.numel()}
    want, got = grads(net, x, y), grads(copied, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)
    with torch.no_grad():
        for k, v in copied.state_dict().items():
            if ".feedback." in k and v.is_floating_point():
                v.zero_()
    fa.convert(copied, "bp")
    net.eval(), copied.eval()
    first, again = grads(net, x, y), grads(copied, x, y)
    same = torch.equal(first["stem.weight"], again["stem.weight"])
    assert same == (rule == "frozen")  # the original still has its rule; frozen's is backprop before its first step


@every_rule
def test_a_state_dict_loads_with_weights_only(rule):
    net, x, y = oracles.resnet()
    fa.convert(net, rule, seed=1)
    if rule in LEARNED:
        with torch.no_grad():
            [p.mul_(1.5) for p in fa.feedback_parameters(net)]
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = fa.convert(oracles.resnet(seed=3)[0], rule, seed=2)
    other(x)  # whatever it made for its own feedback must go
    other.load_state_dict(torch.load(file, weights_only=True))
    want, got = grads(net, x, y), grads(other, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("rule", ["fa", "pfa", "brsf", "dfa"])
def test_a_whole_network_survives_pickling(rule):
    net = fa.convert(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double(), rule)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x, y = randn(6, 4, seed=1), torch.arange(6) % 3
    want, got = grads(net, x, y), grads(other, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)


# ------------------------------------------------------------------------------------------ ordinary loops


@every_rule
def test_frozen_layers(rule):
    net, x, y = oracles.resnet()
    fa.convert(net, rule)
    net.eval()
    free = grads(net, x, y)
    for p in (net.block1.conv2.weight, net.block2.conv1.weight, net.block2.bn1.weight):
        p.requires_grad_(False)
        p.grad = None
    held = grads(net, x, y)
    assert set(free) - set(held) == {"block1.conv2.weight", "block2.conv1.weight", "block2.bn1.weight"}
    assert all(apart(held[k], free[k]) < 1e-13 for k in held)  # the error goes down through them all the same


@every_rule
def test_accumulated_gradients_equal_those_of_one_large_batch(rule):
    net, x, y = oracles.resnet()
    fa.convert(net, rule)
    net.eval()
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    want = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    for i in range(4):
        (F.cross_entropy(net(x[2 * i : 2 * i + 2]), y[2 * i : 2 * i + 2]) / 4).backward()
    assert all(apart(p.grad, want[n]) < 1e-12 for n, p in net.named_parameters())
    net.zero_grad()
    losses = [F.cross_entropy(net(part), label) / 4 for part, label in zip(x.split(2), y.split(2))]
    sum(losses).backward()  # several passes through one network before a backward pass
    assert all(apart(p.grad, want[n]) < 1e-12 for n, p in net.named_parameters())


@every_rule
def test_a_scaled_loss_scales_every_gradient(rule):
    net, x, y = oracles.resnet(torch.float32)
    fa.convert(net, rule)
    net.eval()
    gradients = []
    for scale in (1, 1024):
        net.zero_grad()
        (F.cross_entropy(net(x), y) * scale).backward()
        gradients.append({n: p.grad.clone() for n, p in net.named_parameters()})
    assert gradients[0].keys() == dict(net.named_parameters()).keys()
    assert all(torch.equal(gradients[1][n], 1024 * g) for n, g in gradients[0].items())


@every_rule
def test_input_gradient_goes_through_the_feedback(rule):
    net, x, y = small()
    fa.convert(net, rule)
    x.requires_grad_()
    F.cross_entropy(net(x), y).backward()
    theirs = x.detach().clone().requires_grad_()
    F.cross_entropy(oracles.twin(net)(theirs), y).backward()
    assert x.grad is not None and apart(x.grad, theirs.grad) > (1e-3 if rule != "frozen" else -1)


@pytest.mark.parametrize("kind", ["foreach", "fused", "plain"])
@every_rule
def test_every_implementation_of_sgd_does_the_same(rule, kind):
    nets = []
    for how in ({}, {kind: True} if kind != "plain" else {"foreach": False}):
        net = fa.convert(small()[0], rule, **({} if rule == "dfa" else {"clamp_forward": True}))
        train(net, torch.optim.SGD(fa.param_groups(net, 0.1, 0.01), momentum=0.9, **how), 4)
        nets.append(net.state_dict())
    assert all(apart(nets[0][k].double(), nets[1][k].double()) < 1e-12 for k in nets[0])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # a generator, in what follows a step
@pytest.mark.parametrize("rule, options", [
    ("fa", {"clamp_forward": True}), ("kp", {}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("brsf", {}), ("frozen", {"every": 2}), ("pfa", {"implicit": True}), ("wm", {}),
    )),
])  # fmt: skip
def test_a_compiled_optimizer_step_does_the_same(rule, options):
    nets = []
    for compiled in (False, True):
        net = fa.convert(small()[0], rule, **options)
        opt = torch.optim.SGD(fa.param_groups(net, 0.1, 0.01), momentum=0.9)
        if compiled:
            torch.compiler.reset()
            opt.step = torch.compile(opt.step, backend="aot_eager")
        train(net, opt, 4)
        nets.append(net.state_dict())
    assert all(apart(nets[0][k].double(), nets[1][k].double()) < 1e-12 for k in nets[0])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("rule", ["fa", "kp", "usf", "brsf"])
def test_clamp_forward_holds_the_norm_after_every_step(rule, make):
    net, _, _ = small()
    norms = [m.weight.norm().item() for m in (net[0], net[2])]
    fa.convert(net, rule, clamp_forward=True)
    opt = make(fa.param_groups(net, 0.05))
    for _ in range(3):
        before = net[0].weight.detach().clone()
        train(net, opt, 1)
        assert [m.weight.norm().item() for m in (net[0], net[2])] == pytest.approx(norms, rel=1e-12)
        assert not torch.equal(before, net[0].weight)  # clamped, not stopped
    fa.convert(net, "bp")
    train(net, opt, 1)
    assert net[0].weight.norm().item() != pytest.approx(norms[0], rel=1e-9)


def test_after_step_is_the_same_for_loops_without_an_optimizer():
    a, b = (fa.convert(small()[0], "brsf", clamp_forward=True) for _ in range(2))
    train(a, torch.optim.SGD(a.parameters(), lr=0.1), 2)
    for k in range(2):
        b.zero_grad()
        F.cross_entropy(b(randn(8, 6, seed=k)), torch.arange(8) % 3).backward()
        with torch.no_grad():
            for p in b.parameters():
                p -= 0.1 * p.grad
        fa.after_step(b)
    assert all(apart(v.double(), b.state_dict()[k].double()) < 1e-14 for k, v in a.state_dict().items())


@every_rule
def test_param_groups_hold_every_parameter_once(rule):
    net, _, _ = oracles.resnet()
    fa.convert(net, rule)
    groups = fa.param_groups(net, lr=0.3, weight_decay=0.01)
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, net.parameters())) and len(held) == len(set(held))
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.3, 0.01)]


@pytest.mark.parametrize("rule", ["wm", "ia", "sa", "aa"])
def test_param_groups_add_no_decay_to_feedback_that_has_its_own(rule):
    net, _, _ = small()
    fa.convert(net, rule)
    rest, own = fa.param_groups(net, lr=0.3, weight_decay=0.01, feedback_lr=0.2)
    assert {id(p) for p in own["params"]} == {id(p) for p in fa.feedback_parameters(net)}
    assert (own["lr"], own["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.2, 0.0, 0.3, 0.01)
    assert fa.param_groups(net, lr=0.3)[1]["lr"] == 0.3


def test_feedback_is_drawn_for_the_weights_that_are_there():
    """``init="match"`` follows a checkpoint loaded before the conversion, and W itself is never changed."""
    net = nn.Linear(30, 20)
    with torch.no_grad():
        net.weight.mul_(50)
    W = net.weight.detach().clone()
    fa.convert(net, "fa")
    assert torch.equal(net.weight, W)
    assert fa.alignment(net).norm_ratio.item() == pytest.approx(1, rel=0.05)


def test_importing_and_fixed_feedback_register_no_global_hook():
    import subprocess
    import sys

    code = (
        "import fa, torch, torch.optim.optimizer as o;"
        "n = lambda: len(o._global_optimizer_pre_hooks) + len(o._global_optimizer_post_hooks);"
        "a = n(); fa.convert(torch.nn.Linear(2, 2), 'fa'); b = n();"
        "fa.convert(torch.nn.Linear(2, 2), 'pfa'); c = n(); "
        "fa.convert(torch.nn.Linear(2, 2), 'kp'); print(a, b, c, n())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=fa.ROOT).stdout
    assert out.split() == ["0", "0", "2", "2"]


def test_implicit_feedback_cannot_be_had_with_a_clamped_forward_norm():
    with pytest.raises(fa.UserError, match="clamp_forward"):
        fa.convert(nn.Linear(3, 2), "pfa", implicit=True, clamp_forward=True)


def test_skip_may_be_one_name():
    net = fa.convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "fa", skip=["0"])
    net.stem = nn.Linear(3, 3)
    fa.convert(net, "fa", skip="stem")
    assert "stem" not in converted(net)


class Scripted(nn.Linear):
    """A subclass that computes what ``nn.Linear`` computes, as timm's does."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("rule", ["fa", "pfa", "dfa"])
def test_a_subclass_may_be_treated_as_its_base(rule):
    def network():
        return oracles.fixed_weights(nn.Sequential(Scripted(6, 9), nn.ReLU(), nn.Linear(9, 3)).double())

    net, (_, x, y) = network(), small()
    with pytest.raises(fa.UserError, match="0 .Scripted: a subclass of nn.Linear;.*treat_as_base=Scripted.*skip="):
        fa.convert(net, rule)
    assert fa.convert(net, rule, treat_as_base=Scripted) is net and set(converted(net)) == {"0", "2"}
    stock = fa.convert(oracles.fixed_weights(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()), rule)
    got, want = grads(net, x, y), grads(stock, x, y)
    assert all(torch.equal(got[k], want[k]) for k in want)
    fa.convert(net, "bp")
    assert type(net[0]) is Scripted
    fa.convert(network(), rule, treat_as_base=[Scripted])
    for wrong in (nn.Conv1d, "Scripted"):
        with pytest.raises(fa.UserError, match="treat_as_base takes subclasses of nn.Linear and nn.Conv2d"):
            fa.convert(network(), rule, treat_as_base=[wrong])


def test_mistakes_are_told_in_one_sentence():
    for rule, options, sentence in [
        ("sf", {}, "unknown rule 'sf'.*did you mean 'usf'"),
        ("PFA", {}, "unknown rule 'PFA'.*did you mean 'pfa'"),
        ("pfaa", {}, "did you mean 'pfa'"),
        ("pfa", {"expnsion": 2}, "unknown option 'expnsion' of rule 'pfa'.*did you mean 'expansion'"),
        ("pfa", {"expansion": "10"}, "pfa: expansion='10' must be a finite number"),
    ]:
        with pytest.raises(fa.UserError, match=sentence):
            fa.convert(nn.Linear(3, 2), rule, **options)
    with pytest.raises(fa.UserError, match="unknown rule .* known: .*usf, wm$"):
        fa.convert(nn.Linear(3, 2), "quite another")
    with pytest.raises(fa.UserError, match="takes a torch.nn.Module, not a list"):
        fa.convert([1], "pfa")


def test_a_printed_network_shows_rule_and_options():
    net = nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(2, 2), nn.MultiheadAttention(2, 1))
    fa.convert(net, "pfa", expansion=3, init="xavier")
    fa.convert(net[2], "dfa")
    text = str(net)
    assert "in_features=3, out_features=2, bias=True, rule=pfa(init='xavier', expansion=3)\n" in text
    assert "in_features=2, out_features=2, bias=True, rule=dfa\n" in text
    assert text.count("rule=pfa(") == 5, "the three projections of the attention too"


def test_implicit_feedback_needs_a_weight_that_moves():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    with pytest.raises(fa.UserError, match="frozen"):
        fa.convert(layer, "pfa", implicit=True)


def test_a_loss_made_under_exact_backprop_may_be_differentiated_later():
    net, x, y = oracles.mlp(6, 9, 3)
    plain = oracles.grads(copy.deepcopy(net), x, y)
    fa.convert(net, "fa")
    with fa.exact_backprop(net):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    assert all(torch.equal(p.grad, plain[n]) for n, p in net.named_parameters() if n in plain)


# ------------------------------------------------------------------------- what a loop of one's own may do to a network


@pytest.mark.parametrize(
    "rule, option", [("fa", "init"), ("usf", "scale"), ("frsf", "init"), ("brsf", "init"), ("dfa", "init")]
)
def test_feedback_of_the_size_of_a_weight_of_zeros_is_refused_by_name(rule, option):
    """A head that starts at zero, as torchvision's ViT has it, would never send an error down."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.zeros_(net[2].weight)
    with pytest.raises(fa.UserError, match=f"'2'.*all zeros.*{option}='xavier'"):
        fa.convert(net, rule)
    fa.convert(net, rule, **{option: "xavier"})


@pytest.mark.parametrize("rule", ["kp", "pfa", "wm", "sa", "frozen"])
def test_feedback_that_learns_may_start_at_a_weight_of_zeros(rule):
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    nn.init.zeros_(net[2].weight)
    fa.convert(net, rule, norm="track")
    net(torch.randn(6, 4).double()).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("rule, learns", [("kp", False), ("pfa", False), ("pfa_o", False), ("wm", True), ("sa", True)])
def test_feedback_that_follows_the_weights_update_rests_while_the_weight_is_frozen(rule, learns):
    net = fa.convert(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), rule)
    net[2].weight.requires_grad_(False)
    net(torch.randn(6, 4)).square().sum().backward()
    assert all((p.grad is not None) == learns for p in net[2].feedback.parameters())
    assert all(p.grad is not None for p in net[0].parameters())


def test_learned_feedback_within_a_distributed_network_is_refused():
    """It would be left out of the average over processes; fixed feedback has no gradient to be averaged."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
        with pytest.raises(fa.UserError, match="convert the network first"):
            fa.convert(wrapped, "kp")
        fa.convert(wrapped, "fa")
    finally:
        torch.distributed.destroy_process_group()


def test_a_parametrization_that_came_after_the_rule_is_named_and_nothing_changes():
    net = fa.convert(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "fa")
    nn.utils.parametrizations.weight_norm(net[1])
    for rule, skip in (("bp", ()), ("kp", "1")):
        with pytest.raises(fa.UserError, match="layers 1 were parametrized after.*; remove"):
            fa.convert(net, rule, skip=skip)
    assert net(torch.randn(2, 4)).shape == (2, 3)
    nn.utils.parametrize.remove_parametrizations(net[1], "weight")
    assert type(fa.convert(net, "bp")[1]) is nn.Linear


def test_complex_and_deformable_layers_are_refused_by_name():
    import torchvision

    with pytest.raises(fa.UserError, match="its weight is complex"):
        fa.convert(nn.Linear(4, 3, dtype=torch.complex64), "fa")
    with pytest.raises(fa.UserError, match="DeformConv2d: no feedback"):
        fa.convert(nn.Sequential(nn.Linear(4, 3), torchvision.ops.DeformConv2d(3, 3, 3)), "fa")


@pytest.mark.parametrize("rule", ["wm", "ia", "aa", "kp"])
def test_an_empty_batch_leaves_learned_feedback_finite(rule):
    net = fa.convert(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2)), rule)
    net(torch.empty(0, 1, 4, 4)).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_feedback_frozen_on_purpose_needs_no_optimizer():
    net = fa.convert(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "kp")
    for p in fa.feedback_parameters(net):
        p.requires_grad_(False)
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        net(torch.randn(2, 4)).sum().backward()
        opt.step()


@pytest.mark.parametrize("rule", ["fa", "kp", "brsf", "dfa"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_network_converted_without_gradients_trains(rule, mode):
    net, x, y = oracles.mlp(6, 8, 3)
    want = grads(fa.convert(copy.deepcopy(net), rule), x, y)
    with mode():
        fa.convert(net, rule)
    got = grads(net, x, y)
    assert all(torch.equal(got[n], want[n]) for n in want)
