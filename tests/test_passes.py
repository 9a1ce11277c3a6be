"""Which matrices a network has, what a backward pass may be, and where: a rule's own gradient, or one sentence.

Ids in names are those of reported cases.
"""

import copy
import inspect
import re
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fa
import oracles
from fa.layers.hooks import converted
from oracles import apart, grads, randn

RULES = ["fa", "kp", "pfa", "wm", "dfa"]
every_rule = pytest.mark.parametrize("rule", RULES)


class Gpt(nn.Module):
    """What GPT-2 has in place of ``nn.Linear``: y = x W + b."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    """One matrix an expert, in one tensor."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 6, 8))
        self.bias = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x):
        return (torch.einsum("ni,eio->neo", x, self.gate_up) + self.bias).mean(1)


class Raw(nn.Module):
    """A tensor that is no ``nn.Parameter``, but trained all the same."""

    def __init__(self):
        super().__init__()
        self.W = torch.randn(6, 8, requires_grad=True)

    def forward(self, x):
        return x @ self.W


class Adapter(nn.Linear):
    """A subclass with matrices beside its weight."""

    def __init__(self):
        super().__init__(6, 8)
        self.down, self.up = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(2, 8))

    def forward(self, x):
        return super().forward(x) + x @ self.down @ self.up


LOOSE = {  # a module (6 -> 8), names of its matrices, and its class
    "Conv1D": (partial(Gpt, 6, 8), ["0.weight"], "Gpt"),
    "experts": (Experts, ["0.gate_up"], "Experts"),
    "raw tensor": (Raw, ["0.W"], "Raw"),
    "list": (lambda: nn.ParameterList([nn.Parameter(torch.randn(6, 8))]), ["0.0"], "ParameterList"),
    "beside a weight": (Adapter, ["0.down", "0.up"], "Adapter"),
    "one unit": (partial(Gpt, 6, 1), ["0.weight"], "Gpt"),
}


@pytest.mark.parametrize("case", LOOSE)
@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_A07_a_trained_matrix_of_an_unknown_class_is_refused_by_name(case, rule):
    make, names, cls = LOOSE[case]
    net = nn.Sequential(make(), nn.Tanh(), nn.Linear(8, 3))
    base = {"treat_as_base": Adapter} if case == "beside a weight" else {}
    with pytest.raises(
        fa.UserError, match=rf"{', '.join(names)} \({cls}: trained, of two or more axes.*skip="
    ) as error:
        fa.convert(net, rule, **base)
    assert not converted(net) and "\n" not in str(error.value)
    fa.convert(net, rule, skip=names, **base)  # by the name of the matrix
    assert "2" in converted(net)
    fa.convert(net, rule, skip="0", **base)  # or of its module
    assert list(converted(net)) == ["2"]


def test_A07_a_fixed_matrix_needs_no_feedback():
    net = nn.Sequential(Gpt(6, 8).requires_grad_(False), nn.Linear(8, 3))
    assert list(converted(fa.convert(net, "fa"))) == ["1"]


class Words(nn.Module):
    """Reads its table of words again at the output, by hand."""

    def __init__(self):
        super().__init__()
        self.words, self.fc = nn.Embedding(3, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.fc(self.words(x))) @ self.words.weight.t()


class Mixed(nn.Module):
    """A matrix between two layers, under a name of one's choice."""

    def __init__(self, name):
        super().__init__()
        self.first, self.last, self.name = nn.Linear(6, 8), nn.Linear(8, 3), name
        self.register_parameter(name, nn.Parameter(torch.randn(8, 8)))

    def forward(self, x):
        return self.last(torch.tanh(torch.tanh(self.first(x)) @ getattr(self, self.name)))


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
@pytest.mark.parametrize("case", ["words.weight", "pos_mix", "thawed"])
def test_A07_a_matrix_that_could_not_be_told_is_refused_where_activity_meets_it(rule, case):
    net, x, y = (Words(), torch.tensor([0, 2, 1]), 3) if "words" in case else (Mixed(case), torch.randn(3, 6), 3)
    options = {"classes": y} if rule == "dfa" else {}
    fixed = nn.ParameterList(p for n, p in net.named_parameters() if n == "thawed").requires_grad_(False)
    fa.convert(net, rule, **options)
    fixed.requires_grad_(True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"activity is multiplied by '{case}'.*skip=\['{case}'\]"):
            net(x).square().sum().backward()
    fa.convert(net, rule, skip=[case], **options)
    net(x).square().sum().backward()
    assert not net.get_parameter(case)._backward_hooks


def headed(net):
    net[4] = nn.Linear(8, 3)


def longer(net):
    net.append(nn.Linear(3, 3))


def nested(net):
    net[3] = nn.Sequential()
    net[3].append(nn.Linear(8, 8))


class Adapted(nn.Module):
    """A layer with two small ones beside it, as adapters of low rank have."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def adapted(net):
    net[2] = Adapted(net[2])


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa", "frozen"])
@pytest.mark.parametrize("change, name", [(headed, "4"), (longer, "5"), (nested, "3.0"), (adapted, "2.up")])
@pytest.mark.parametrize("copied", [False, True])
def test_A07_a_layer_that_came_after_the_conversion_is_refused_by_name(rule, change, name, copied):
    """A new head, for fine-tuning: ``convert`` has not seen it."""
    net, x = fa.convert(oracles.mlp(6, 8, 8, 3, dtype=torch.float32)[0], rule), torch.randn(5, 6)
    net = copy.deepcopy(net) if copied else net
    net(x).square().sum().backward()
    change(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"'{name}.weight', which has no rule.*call fa.convert after it is put"):
            net(x).square().sum().backward()
    fa.convert(net, rule)(x).square().sum().backward()
    assert name in converted(net)
    fa.convert(net, rule, skip=[name.partition(".")[0]], **({"classes": 3} if rule == "dfa" else {}))
    if change is not longer:
        change(net)  # what comes to a place that was left out is left out
    net(x).square().sum().backward()


def test_A07_a_matrix_that_came_after_the_conversion_is_refused_by_name():
    net, x = fa.convert(Mixed("bias_mix"), "fa"), torch.randn(3, 6)
    net.get_parameter("bias_mix").requires_grad_(False)  # thawed below by its replacement
    net.bias_mix = nn.Parameter(torch.randn(8, 8))
    with pytest.raises(RuntimeError, match="'bias_mix', which has no rule"):
        net(x).square().sum().backward()


class Late(nn.Module):
    """A module that comes after the conversion, called as its kind is called."""

    def __init__(self, late=None):
        super().__init__()
        self.first, self.late = nn.Linear(6, 8), late

    def forward(self, x):
        h = torch.tanh(self.first(x))
        out = self.late(h, h) if isinstance(self.late, nn.Bilinear) else self.late(h)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.LSTMCell, partial(nn.Bilinear, 8)])
def test_A07_a_recurrent_or_bilinear_layer_that_came_after_the_conversion_is_refused(make, dtype):
    """In float32 an LSTM is one operation, which is no product of matrices by name."""
    net = fa.convert(Late(nn.Identity()).to(dtype), "fa")
    net.late = make(8, 3).to(dtype)
    with pytest.raises(RuntimeError, match="'late.weight.*', which has no rule"):
        net(randn(5, 6, dtype=dtype)).square().sum().backward()


class Memory(nn.Module):
    """Attention of ``heads`` to slots that an embedding holds."""

    def __init__(self, heads):
        super().__init__()
        self.first, self.slots, self.last, self.heads = nn.Linear(6, 8), nn.Embedding(5, 8), nn.Linear(8, 3), heads

    def forward(self, x):
        q, k = (t.unflatten(-1, (self.heads, -1)).movedim(-2, -3) for t in (self.first(x), self.slots.weight))
        k = k.expand(len(x), -1, -1, -1)
        return self.last(F.scaled_dot_product_attention(q, k, k).movedim(-3, -2).flatten(-2))


@pytest.mark.parametrize("rule", ["fa", "dfa"])
@pytest.mark.parametrize("heads", [1, 2])
def test_A07_attention_to_an_embedding_is_a_product_with_a_matrix(rule, heads):
    net = fa.convert(Memory(heads), rule)
    with pytest.raises(RuntimeError, match="'slots.weight', which has no rule"):
        net(torch.randn(2, 4, 6)).square().sum().backward()


def test_what_is_converted_and_what_never_learns_may_come_later():
    net, x = fa.convert(oracles.mlp(6, 8, 8, 3, dtype=torch.float32)[0], "fa"), torch.randn(5, 6)
    net[2] = fa.convert(nn.Linear(8, 8), "kp")
    net.append(nn.Linear(3, 3).requires_grad_(False))
    net[1] = nn.PReLU(8)
    net(x).square().sum().backward()
    later = nn.Sequential(net, nn.Linear(3, 3))  # around the network, which is left as it is
    later(x).square().sum().backward()
    fa.convert(net, "bp")
    net[4] = nn.Linear(8, 3)
    net(x).square().sum().backward()


def matrix():
    return nn.Parameter(randn(8, 8))


def layer():
    return nn.Linear(8, 8).double()


class Hides(nn.Module):
    """Keeps a matrix, or a layer, where PyTorch does not find it."""

    def __init__(self, keep, find):
        super().__init__()
        self.first, self.last, self.kept, self.find = nn.Linear(6, 8), nn.Linear(8, 3), keep(), find

    def forward(self, x):
        h, A = torch.tanh(self.first(x)), self.find(self.kept)
        return self.last(torch.tanh(A(h) if isinstance(A, nn.Module) else h @ A))


HIDDEN = {
    "kept[0]": (lambda: [matrix()], lambda kept: kept[0]),
    "kept['mix']": (lambda: {"mix": matrix()}, lambda kept: kept["mix"]),
    "kept['a'][1]": (lambda: {"a": (0, matrix())}, lambda kept: kept["a"][1]),
    "kept[0].weight": (lambda: [layer()], lambda kept: kept[0]),
    "kept['a'][0].weight": (lambda: {"a": [layer()]}, lambda kept: kept["a"][0]),
}


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
@pytest.mark.parametrize("name", HIDDEN)
def test_A07_a_matrix_in_a_plain_list_or_dict_is_refused_by_name(rule, name):
    x = randn(3, 6)
    with pytest.raises(fa.UserError, match=rf"{re.escape(name)} \(Hides: trained.*skip="):
        fa.convert(Hides(*HIDDEN[name]).double(), rule)
    for skip in (name, "kept"):
        net = fa.convert(Hides(*HIDDEN[name]).double(), rule, skip=[skip])
        net(x).square().sum().backward()
    with pytest.raises(fa.UserError, match="skip names no module and no parameter: kep$"):
        fa.convert(Hides(*HIDDEN[name]).double(), rule, skip=["kep"])


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_what_else_lies_in_plain_lists_is_no_matrix(rule):
    """A frozen teacher, data, the network's own layers and parameters once more, and a module around the network."""
    net = Hides(lambda: [], lambda kept: torch.eye(8).double()).double()
    teacher = nn.Linear(6, 3).double().requires_grad_(False)
    around = nn.Sequential(net, nn.Linear(3, 3).double())
    net.kept += [teacher, randn(5, 6), {"layers": [net.first, net.last]}, (around,), list(net.parameters())]
    x = randn(4, 6)
    fa.convert(net, rule)
    for whole in (net, around):
        (whole(x) - teacher(x)).square().sum().backward()
    assert all(p.grad is not None for p in (net.first.weight, net.last.weight))


def test_what_a_module_keeps_beside_its_parameters_does_not_hinder_the_conversion():
    """A scripted module, a list that holds itself, a table of many numbers."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.scale

    net, x = nn.Sequential(nn.Linear(6, 8), torch.jit.script(Scale()), nn.Linear(8, 3)), torch.randn(2, 6)
    net.loop, net.numbers = [], dict.fromkeys(range(100_000), 0)
    net.loop += [net.loop, net]
    fa.convert(net, "fa")(x).square().sum().backward()
    assert set(converted(net)) == {"0", "2"} and net[1].scale.grad.any()


def test_A07_what_is_looked_up_or_added_and_then_multiplied_is_no_matrix():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.pos_embedding = nn.Embedding(5, 8), nn.Parameter(torch.randn(4, 8))
            self.query_token = nn.Parameter(torch.randn(1, 2, 8))
            self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.words(x) + self.pos_embedding
            x = x @ x.mT @ x + self.words.weight[:4]
            return self.out(torch.softmax(self.q(self.query_token) @ self.k(x).mT, -1) @ x).sum(1)

    for rule in ("fa", "kp"):
        net = fa.convert(Positions(), rule)
        for _ in range(2):
            (net(torch.arange(8).view(2, 4) % 5).square().sum() + net.words.weight.square().sum()).backward()


def test_A07_the_name_of_a_weight_leaves_its_layer_to_backprop():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.MultiheadAttention(4, 2))
    fa.convert(net, "fa", skip=["0.weight", "2.in_proj_weight"])
    assert list(converted(net)) == ["1"]
    with pytest.raises(fa.UserError, match="skip names no module and no parameter: 0.wieght"):
        fa.convert(net, "fa", skip="0.wieght")


def test_A07_embeddings_norms_tokens_and_scales_are_no_matrices():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm, self.fc = nn.Embedding(5, 4), nn.LayerNorm((3, 4)), nn.Linear(4, 3)
            self.class_token, self.pos_embedding = (
                nn.Parameter(torch.zeros(1, 1, 4)),
                nn.Parameter(torch.zeros(1, 7, 4)),
            )
            self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))

    net = Parts()
    assert list(converted(fa.convert(net, "kp"))) == ["fc"]
    assert list(converted(fa.convert(net, "pfa"))) == ["fc"]  # feedback that learns is no matrix of the network
    net.embed = nn.Parameter(torch.zeros(6, 4))  # a name alone excuses no matrix
    net.weight = nn.Parameter(torch.zeros(1, 6, 4))  # nor does a shape
    with pytest.raises(fa.UserError, match=r"embed, weight \(Parts"):
        fa.convert(net, "kp")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layer, x", [
    (nn.Linear(6, 3, bias=False), torch.ones(4, 6)), (nn.Linear(6, 3), torch.ones(4, 6)),
    (nn.Conv2d(1, 2, 3, bias=False), torch.ones(2, 1, 5, 5)),
])  # fmt: skip
def test_A06_an_input_of_another_dtype_is_refused_where_the_stock_layer_refuses_it(layer, x, dtype, autocast):
    ours, x = fa.convert(copy.deepcopy(layer), "fa"), x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        try:
            want = layer(x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                ours(x)
            assert dtype != torch.float16 or not autocast
        else:
            got = ours(x)
            assert torch.equal(got, want) and got.dtype == torch.bfloat16


def test_A06_float64_is_left_alone_by_autocast():
    layer, x = nn.Linear(6, 3).double(), randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fa.convert(copy.deepcopy(layer), "fa")(x), layer(x))


@every_rule
def test_A22_a_layer_may_be_called_by_keyword(rule):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.key = nn.Conv2d(1, 2, 3), nn.Linear(8, 3), True

        def forward(self, x):
            if not self.key:
                return self.fc(torch.tanh(self.conv(x)).flatten(1))
            return self.fc(input=torch.tanh(self.conv(input=x)).flatten(1))

    net = fa.convert(oracles.fixed_weights(Net().double()), rule)
    x, y = randn(4, 1, 4, 4, seed=1), torch.arange(4) % 3
    by_key, angles = grads(net, x, y), fa.gradient_angles(net, x, y, F.cross_entropy)
    net.key = False
    assert all(torch.equal(g, by_key[n]) for n, g in grads(net, x, y).items())
    assert angles.equals(fa.gradient_angles(net, x, y, F.cross_entropy))
    net.key = True
    fa.convert(net, "dfa", form="dense", sample=x)


@every_rule
@pytest.mark.parametrize("layer, x", [(nn.Linear(6, 3), randn(4, 6)), (nn.Conv2d(1, 2, 3), randn(4, 1, 4, 4))])
def test_A22_what_is_no_tensor_is_refused_as_by_the_stock_layer(layer, x, rule):
    net = fa.convert(nn.Sequential(copy.deepcopy(layer)), rule)
    for other in (x.numpy(), x.tolist(), None):
        with pytest.raises(TypeError, match="must be Tensor, not|invalid combination of arguments"):
            net(other)


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_A22_a_convolution_with_another_weight_may_be_called_by_keyword(rule):
    layer, x = fa.convert(nn.Conv2d(1, 2, 3), rule), torch.randn(4, 1, 4, 4)
    assert torch.equal(layer._conv_forward(input=x, weight=layer.weight, bias=layer.bias), layer(x))


def test_A22_direct_feedback_leaves_the_networks_signature():
    """Hugging Face's Trainer drops the columns of a data set that ``forward`` does not name."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, pixel_values, *, labels=None):
            return self.fc(pixel_values)

    net = Net()
    want = inspect.signature(net.forward)
    for other in (fa.convert(net, "dfa"), copy.deepcopy(net), fa.convert(net, "bp")):
        assert inspect.signature(other.forward) == want
    net.forward = torch.relu  # of which Python knows no signature
    fa.convert(net, "dfa")


def test_A22_a_block_is_cut_at_its_first_tensor_whatever_stands_before_it():
    class BasicBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, scale, x):
            return x + scale * torch.tanh(self.fc(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.block, self.out, self.key = nn.Linear(6, 8), BasicBlock(), nn.Linear(8, 3), True

        def forward(self, x):
            h = torch.tanh(self.one(x))
            return self.out(self.block(scale=2.0, x=h) if self.key else self.block(2.0, h))

    net, x, e = fa.convert(oracles.fixed_weights(Net().double()), "dfa", tap="block"), randn(4, 6, seed=1), randn(4, 3)
    for net.key in (True, False):
        net.zero_grad()
        net(x).backward(e)
        with torch.no_grad():
            delta = (1 - torch.tanh(net.one(x)) ** 2) * (e @ net.block.fc.feedback.B)
        assert apart(net.one.weight.grad, delta.T @ x) < 1e-13


def ragged(net, rows, lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return net(torch.nested.nested_tensor_from_jagged(rows, offsets)).values()


@every_rule
def test_A16_the_rows_of_a_jagged_nested_tensor_get_the_gradient_of_any_rows(rule):
    net, _, _ = oracles.mlp(6, 9, 3)
    fa.convert(net, rule)
    x, y = randn(5, 6, seed=1), torch.arange(5) % 3
    loss = F.cross_entropy(ragged(net, x, [2, 3]), y)
    net.zero_grad()
    loss.backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    assert all(torch.equal(p.grad, got[n]) for n, p in net.named_parameters()) and len(got) >= 4


def test_A16_a_nested_tensor_of_another_layout_is_refused_in_the_forward_pass():
    net = fa.convert(nn.Linear(6, 3), "fa")
    with pytest.raises(fa.UserError, match="layout=torch.jagged"):
        net(torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.strided))


@pytest.mark.parametrize("rule", ["fa", "wm", "dfa"])
def test_A16_a_nested_tensor_with_rows_of_no_sample_or_exchanged_axes_is_refused_as_by_the_stock_layer(rule):
    stock, rows = nn.Linear(6, 3).double(), randn(9, 6)
    holes = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 3, 6, 9]), torch.tensor([2, 2, 3]))
    exchanged = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 2, 5, 9])).transpose(1, 2)
    net = fa.convert(nn.Sequential(copy.deepcopy(stock)), rule)
    for x in (holes, exchanged):
        with pytest.raises(ValueError, match="NestedTensor"):
            stock(x)
        with pytest.raises(ValueError, match="must be .n, ragged, in., no holes|NestedTensor"):
            net(x)


# ------------------------------------------------------------------------------------------ checkpoints


class Region(nn.Module):
    """Two layers under a gradient checkpoint, between two others."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(*s) for s in ((6, 8), (8, 8), (8, 8), (8, 3)))
        self.run = partial(checkpoint, use_reentrant=reentrant)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.d(self.run(lambda h: torch.tanh(self.c(torch.relu(self.b(h)))), h))


@pytest.mark.parametrize(
    "rule", ["fa", "usf", "frozen", "pfa"]
)  # PyTorch fails on a rule whose backward pass uses a number
def test_A13_a_network_with_gradient_checkpoints_compiles_for_any_shapes(rule):
    net = fa.convert(oracles.fixed_weights(Region().double()), rule)
    x, y = randn(5, 6, seed=1), torch.arange(5) % 3
    want = grads(net, x, y)
    torch.compiler.reset()
    net.zero_grad()
    F.cross_entropy(torch.compile(net, backend="aot_eager", dynamic=True)(x), y).backward()
    assert all(apart(net.get_parameter(n).grad, g) < 1e-12 for n, g in want.items())


@every_rule
def test_A13_a_network_with_gradient_checkpoints_compiles_in_one_graph(rule):
    net = fa.convert(oracles.fixed_weights(Region().double()), rule)
    x, y = randn(5, 6, seed=1), torch.arange(5) % 3
    eager = net(x)
    F.cross_entropy(eager, y).backward()
    want = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    torch.compiler.reset()
    F.cross_entropy(torch.compile(net, backend="aot_eager", fullgraph=True)(x), y).backward()
    assert all(apart(p.grad, want[n]) < 1e-12 for n, p in net.named_parameters() if n in want) and len(want) >= 8
    other = fa.convert(oracles.fixed_weights(Region().double()), rule)  # a second network may share the compiled code
    F.cross_entropy(torch.compile(other, backend="aot_eager", fullgraph=True)(x), y).backward()
    assert all(apart(p.grad, want[n]) < 1e-12 for n, p in other.named_parameters() if n in want)


@pytest.mark.parametrize("rule", ["fa", "kp", "wm", "dfa"])
def test_A27_exact_backprop_holds_for_a_pass_that_a_checkpoint_runs_again_later(rule):
    net = oracles.fixed_weights(Region().double())
    x, y = randn(5, 6, seed=1).requires_grad_(), torch.arange(5) % 3
    want = grads(net, x, y)
    fa.convert(net, rule)
    under_rule = grads(net, x, y)
    with fa.exact_backprop(net):
        loss = F.cross_entropy(net(x), y)
    net.zero_grad()
    loss.backward()
    assert all(apart(net.get_parameter(n).grad, g) < 1e-14 for n, g in want.items())
    got = grads(net, x, y)
    assert all(torch.equal(got[n], g) for n, g in under_rule.items())
    assert apart(got["a.weight"], want["a.weight"]) > 1e-3


@pytest.mark.parametrize("rule", ["fa", "kp", "wm", "usf"])
def test_A27_a_reentrant_checkpoint_that_began_under_exact_backprop_ends_under_it(rule):
    """Whatever passes under the rule come between, and whatever became of other exact passes before."""
    net = oracles.fixed_weights(Region(reentrant=True).double())
    x, y = randn(5, 6, seed=1).requires_grad_(), torch.arange(5) % 3
    want = grads(net, x, y)
    fa.convert(net, rule)
    under_rule = grads(net, x, y)
    with fa.exact_backprop(net):
        loss = F.cross_entropy(net(x), y)
        F.cross_entropy(net(x), y)  # and this pass is thrown away
        with torch.no_grad():
            net(x)
    assert all(torch.equal(g, under_rule[n]) for n, g in grads(net, x, y).items())
    net.zero_grad()
    loss.backward()
    assert all(apart(net.get_parameter(n).grad, g) < 1e-14 for n, g in want.items())
    with fa.exact_backprop(net):
        got = grads(net, x, y)
    assert all(torch.equal(got[n], g) for n, g in want.items())
    assert all(torch.equal(g, under_rule[n]) for n, g in grads(net, x, y).items())


def test_A27_a_reentrant_checkpoint_under_dfa_says_what_works():
    net = fa.convert(Region(reentrant=True).double(), "dfa")
    x, y = randn(5, 6, seed=1).requires_grad_(), torch.arange(5) % 3
    with fa.exact_backprop(net):
        loss = F.cross_entropy(net(x), y)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()


def test_A27_exact_backprop_with_saved_tensors_elsewhere_may_be_differentiated_twice():
    net, x, y = oracles.mlp(6, 9, 3)
    x = x.requires_grad_()

    def penalty():
        with torch.autograd.graph.save_on_cpu():
            (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), net[0].weight)[0]

    want = penalty()
    fa.convert(net, "fa")
    with fa.exact_backprop(net):
        assert apart(penalty(), want) < 1e-13


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("rule", ["kp", "wm", "ia"])
def test_A15_outputs_are_released_after_the_backward_pass_and_by_checkpoints(rule):
    body = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())])
    net, refs = fa.convert(nn.Sequential(body, nn.Linear(16, 3)), rule), []
    for m in body:
        m.register_forward_hook(lambda m, args, out: refs.append(StorageWeakRef(out.untyped_storage())))
    loss = net(torch.randn(8, 16)).sum()
    loss.backward()
    assert sum(not r.expired() for r in refs) == 0 and loss is not None
    refs.clear()
    out = checkpoint(body, torch.randn(8, 16, requires_grad=True), use_reentrant=False)
    assert sum(not r.expired() for r in refs) == 1 and out is not None


@pytest.mark.parametrize("rule", ["wm", "ia"])
@pytest.mark.parametrize("how", ["plain", "in place", "elsewhere", "checkpoint"])
def test_A15_feedback_learns_the_same_wherever_the_output_was_kept(rule, how):
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(how != "plain"), nn.Linear(9, 3))
    fa.convert(oracles.fixed_weights(net.double()), rule)
    x, layer = randn(5, 6, seed=1), net[0]
    want = oracles.objective(layer, x)
    if how == "elsewhere":
        with torch.autograd.graph.save_on_cpu():
            out = net(x)
    else:
        out = checkpoint(net, x, use_reentrant=False) if how == "checkpoint" else net(x)
    out.sum().backward()
    assert apart(layer.feedback.B.grad, want) < 1e-12


# ------------------------------------------------------------------------------------------ tools around a network


def test_A23_a_traced_graph_keeps_the_rule():
    net, x, y = oracles.resnet()
    fa.convert(net, "kp")
    want = grads(copy.deepcopy(net), x, y)
    got = grads(torch.fx.symbolic_trace(net), x, y)
    assert got.keys() == want.keys() and all(torch.equal(got[n], g) for n, g in want.items())
    assert all("__module__" not in vars(m) for m in fa.convert(net, "bp").modules())


def test_A23_an_attention_is_one_node_of_a_traced_graph():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    net, x = fa.convert(Net(), "fa"), torch.randn(2, 5, 8)
    torch.fx.symbolic_trace(net)(x).square().sum().backward()
    got, net.attention.in_proj_weight.grad = net.attention.in_proj_weight.grad, None
    net(x).square().sum().backward()
    assert torch.equal(got, net.attention.in_proj_weight.grad)


@pytest.mark.parametrize("rule", ["fa", "dfa"])
def test_A23_a_jit_trace_that_would_lose_the_rule_is_refused(rule):
    net, x, _ = oracles.mlp(6, 9, 3)
    fa.convert(net.eval(), rule)
    with pytest.raises(RuntimeError, match="torch.jit.trace keeps no learning rule.*no_grad"):
        torch.jit.trace(net, x)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(net, x)(x), net(x))


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_A23_an_export_that_would_lose_the_rule_is_refused(rule):
    net, x, _ = oracles.mlp(6, 8, 3)
    fa.convert(net, rule)
    with pytest.raises(RuntimeError, match="torch.export keeps no learning rule.*no_grad"):
        torch.export.export(net, (x,))
    with torch.no_grad():
        assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


@every_rule
def test_A29_torch_func_is_refused_in_a_sentence(rule):
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, rule)
    p = {n: q.detach() for n, q in net.named_parameters()}

    def loss(p):
        return F.cross_entropy(torch.func.functional_call(net, p, (x,)), y)

    assert torch.equal(loss(p), F.cross_entropy(net(x), y))
    with pytest.raises(RuntimeError, match="torch.func .*does not pass through a learning rule"):
        torch.func.grad(loss)(p)
    with torch.no_grad():
        assert apart(torch.vmap(net)(x), net(x)) < 1e-14


@pytest.mark.parametrize("rule", ["fa", "kp", "pfa", "wm"])
def test_A29_forward_mode_is_refused(rule):
    """By PyTorch: a ``jvp`` of ours, with a sentence, would keep the function out of ``torch.compile``."""
    net, x, _ = oracles.mlp(6, 9, 3)
    fa.convert(net, rule)
    for run in (
        lambda: torch.func.linearize(net, x),
        lambda: torch.autograd.functional.jacobian(net, x, vectorize=True, strategy="forward-mode"),
    ):
        with pytest.raises(RuntimeError, match="must implement the jvp function"):
            run()


@every_rule
def test_A29_an_ensemble_is_refused_in_a_sentence_and_evaluated(rule):
    nets, x = [fa.convert(oracles.mlp(6, 9, 3, seed=seed)[0], rule) for seed in (1, 2)], randn(4, 6)
    p, buffers = torch.func.stack_module_state(nets)

    def outputs(p, buffers):
        return torch.func.functional_call(nets[0], (p, buffers), (x,))

    for run in (lambda: torch.vmap(outputs)(p, buffers), lambda: torch.vmap(nets[0])(x)):
        with pytest.raises(RuntimeError, match="torch.func .*does not pass through a learning rule"):
            run()
    with torch.no_grad():
        assert all(apart(out, net(x)) < 1e-14 for out, net in zip(torch.vmap(outputs)(p, buffers), nets))
    nets[0](x).sum().backward()
    assert nets[0][0].weight.grad.any()


@pytest.mark.parametrize("rule", RULES)
def test_A29_a_compiled_functional_gradient_is_the_rules_own_or_refused(rule):
    net, x, y = oracles.mlp(6, 9, 3)
    fa.convert(net, rule)
    p, want = {n: q.detach() for n, q in net.named_parameters()}, grads(net, x, y)
    torch.compiler.reset()
    run = torch.compile(
        torch.func.grad(lambda p: F.cross_entropy(torch.func.functional_call(net, p, (x,)), y)), backend="aot_eager"
    )
    if rule == "dfa":
        assert all(apart(g, want[n]) < 1e-12 for n, g in run(p).items())
    else:  # the compiler would leave all layers but the first, and feedback that learns, without a gradient
        with pytest.raises(RuntimeError, match="torch.func .*does not pass through a learning rule"):
            run(p)


# ------------------------------------------------------------------------------------------ devices


class NoFloat64(TorchDispatchMode):
    """Stands in for a device without float64: no float32 tensor becomes float64 there."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f._schema.name == "aten::_to_copy" and kwargs.get("dtype") == torch.float64 != args[0].dtype:
            raise TypeError("no float64 on this device")
        return f(*args, **kwargs)


@pytest.mark.parametrize("rule", ["fa", "usf", "brsf", "kp", "pfa", "pfa_o", "wm", "dfa", "frozen"])
def test_A17_a_device_without_float64_gives_the_same_feedback_and_measurements(rule):
    def run(mode):
        net, x, y = oracles.mlp(6, 9, 3, dtype=torch.float32)
        with mode():
            fa.convert(net, rule)
            return net.state_dict(), fa.alignment(net), fa.gradient_angles(net, x, y, F.cross_entropy)

    (want, *tables), (got, *simulated) = run(torch.enable_grad), run(NoFloat64)
    assert all(torch.equal(got[k], v) for k, v in want.items())
    assert all(a.equals(b) for a, b in zip(tables, simulated))


def test_A33_a_converted_network_runs_on_the_meta_device():
    for rule in RULES:
        net = fa.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), rule).to("meta")
        out = net(torch.empty(4, 1, 4, 4, device="meta"))
        assert out.shape == (4, 3) and out.is_meta
        out.sum().backward()
        assert net[0].weight.grad.is_meta


@pytest.mark.parametrize("rule, options", [("usf", {}), ("brsf", {}), ("pfa_o", {}), ("wm", {}), ("dfa", {}),
                                           ("dfa", {"form": "shared", "sample": randn(2, 6)})])  # fmt: skip
def test_A33_feedback_is_where_the_weights_are_whatever_the_default_device(rule, options):
    nets = [oracles.mlp(6, 8, 3)[0] for _ in range(2)]
    with torch.device("meta"):
        fa.convert(nets[0], rule, **options)
    fa.convert(nets[1], rule, **options)
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule, options", [("brsf", {}), ("frozen", {"every": 1}), ("wm", {}), ("fa", {"clamp_forward": True}),
                                           ("pfa", {"implicit": True})])  # fmt: skip
def test_A33_a_step_on_the_meta_device_is_one(rule, options):
    net = fa.convert(oracles.mlp(6, 8, 3)[0], rule, **options).to("meta")
    opt = torch.optim.SGD(fa.param_groups(net, lr=0.1))
    for _ in range(3):
        opt.zero_grad()
        net(torch.empty(4, 6, dtype=torch.float64, device="meta")).sum().backward()
        opt.step()
    fa.after_step(net)


def test_A33_fake_weights_are_to_be_loaded_first():
    with FakeTensorMode(), pytest.raises(fa.UserError, match="weight of 0 is on the meta device; load the weights"):
        fa.convert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), "fa")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rule", ["fa", "usf", "brsf", "kp", "pfa_o", "wm", "ia", "sa", "aa", "frozen", "dfa"])
def test_a_layer_of_width_zero_is_one(rule):
    for a, b, c in ((0, 3, 3), (3, 0, 3)):
        net = fa.convert(nn.Sequential(nn.Linear(a, b), nn.Linear(b, c)), rule)
        net(torch.randn(4, a)).sum().backward()
        assert torch.equal(net[1].bias.grad, torch.full((c,), 4.0))


@pytest.mark.parametrize("rule", ["fa", "kp", "wm", "ia", "aa", "dfa"])
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_input_gets_the_gradient_of_a_dense_one(rule, sparse):
    net, x, y = oracles.mlp(6, 9, 3)
    want = grads(fa.convert(net, rule), x, y)
    assert all(apart(got, want[n]) < 1e-13 for n, got in grads(net, sparse(x), y).items())


def test_A33_weights_on_the_meta_device_are_to_be_loaded_first():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(fa.UserError, match="weight of 0 is on the meta device; load the weights"):
        fa.convert(net, "fa")
    fa.convert(net.to_empty(device="cpu"), "kp")


# ------------------------------------------------------------------------------------------ dfa


class Head(nn.Module):
    """A network of one output unit, whose axis may be gone."""

    def __init__(self, end):
        super().__init__()
        self.one, self.two, self.end = nn.Linear(6, 8), nn.Linear(8, 1), end

    def forward(self, x):
        return self.end(self.two(torch.tanh(self.one(x))))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("end", [
    lambda z: z, lambda z: z.squeeze(-1), lambda z: z.view(-1), torch.squeeze, lambda z: z[:, :, None, None],
])  # fmt: skip
def test_A10_an_output_without_an_axis_of_classes_has_one_error_a_sample(end, n):
    net = fa.convert(oracles.fixed_weights(Head(end).double()), "dfa")
    x, y = randn(n, 6, seed=1), torch.ones(n, dtype=torch.float64)
    F.binary_cross_entropy_with_logits(net(x).view(-1), y).backward()
    with torch.no_grad():
        h = torch.tanh(F.linear(x, net.one.weight, net.one.bias))
        e = (F.linear(h, net.two.weight, net.two.bias).sigmoid() - 1) / n  # (n, 1)
        delta = (1 - h**2) * (e @ net.two.feedback.B)
    assert apart(net.one.weight.grad, delta.T @ x) < 1e-13


def test_A10_more_classes_than_the_output_has_are_told_as_such():
    net = fa.convert(Head(lambda z: z.squeeze(-1)), "dfa", classes=4)
    with pytest.raises(fa.UserError, match=r"\(4,\), one error a sample, .*classes=1"):
        net(torch.randn(4, 6))


class Dense(nn.Module):
    """A prediction for every pixel."""

    def __init__(self, classes=4):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, classes, 1),
        )  # fmt: skip

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("n, size, options", [
    (2, 6, {}), (2, 6, {"classes": 6}), (6, 6, {"classes": 6}), (4, 4, {}), (1, 4, {}), (1, 1, {"classes": 1}),
])  # fmt: skip
def test_A11_a_dense_prediction_is_refused_whatever_its_sizes(n, size, options):
    net = fa.convert(Dense(), "dfa", **options)
    with pytest.raises(fa.UserError, match=rf"\({n}, 4, {size}, {size}\), and layer 'b' .*needs another rule"):
        net(torch.randn(n, 3, size, size))


@pytest.mark.parametrize("tokens", [4, 5])
def test_A11_classes_before_tokens_are_refused_also_where_there_are_as_many(tokens):
    class Turned(nn.Sequential):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)  # (n, classes, tokens), as the loss takes it

    net = fa.convert(Turned(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), "dfa")
    with pytest.raises(RuntimeError, match=r"no error for each row.*no axes exchanged"):
        net(torch.randn(2, tokens, 6))


@pytest.mark.parametrize("n", [3, 4])
def test_A11_classes_before_samples_are_refused_also_where_there_are_as_many(n):
    class Turned(nn.Sequential):
        def forward(self, x):
            return super().forward(x).t()  # (classes, n)

    net = fa.convert(Turned(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), "dfa")
    with pytest.raises((RuntimeError, fa.UserError), match="the network's output has shape"):
        net(torch.randn(n, 6))
    net.__class__ = nn.Sequential
    fa.convert(net, "dfa")(torch.randn(n, 6)).sum().backward()


@pytest.mark.parametrize("first", ["samples", "tokens"])
def test_A11_an_attention_has_the_axes_of_the_layers_around_it(first):
    """As many tokens as samples: the error of a token goes to that token."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=first == "samples")

        def forward(self, x):
            h = torch.tanh(self.one(x))
            return self.out(h + self.attention(h, h, h, need_weights=False)[0])

    net = fa.convert(oracles.fixed_weights(Net().double()), "dfa", classes=3)
    x, e = randn(3, 3, 6, seed=1), randn(3, 3, 3, seed=2)
    net(x).backward(e)
    with torch.no_grad():
        h = torch.tanh(net.one(x))
        B = net.attention
        sent = e @ (B.q.feedback.B + B.k.feedback.B + B.v.feedback.B + net.out.feedback.B)
    assert apart(net.one.weight.grad, torch.einsum("abo,abi->oi", (1 - h**2) * sent, x)) < 1e-12


def test_A12_a_forward_that_is_taken_and_bound_again_still_sends_the_error():
    """As Hugging Face's Accelerate does under mixed precision with every forward that is a method."""
    net, x, y = oracles.mlp(6, 9, 3)
    want = grads(fa.convert(net, "dfa"), x, y)
    if hasattr(net.forward, "__func__"):
        net.forward = types.MethodType(net.forward.__func__, net)
    else:
        net.forward = partial(net.forward)
    got = grads(net, x, y)
    assert all(torch.equal(got[n], g) for n, g in want.items())
