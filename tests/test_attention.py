"""``nn.MultiheadAttention`` under a rule: PyTorch's values, PyTorch's parameters, and no error around the layers."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa
from fa.layers.hooks import converted
from oracles import apart, cosine, fixed_weights, grads, randn

E, HEADS, N, T, S = 8, 2, 3, 4, 5  # embedding, heads, samples, queries, keys

ALL = {name: {} for name in fa.RULES if name != "bp"} | {
    "pfa": {"expansion": 2}, "primitives": {"amp": 1e-3, "null": 1e-3, "sparse": 1e-3, "decay": 1e-3, "self_": 1e-3},
}  # fmt: skip


def attention(batch_first=True, **options):
    return fixed_weights(nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **options).double())


def causal(n, m):
    return torch.ones(n, m, dtype=torch.bool).triu(1)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
MASKS = {
    "none": {},
    "bool": {"attn_mask": causal(T, S)},
    "float": {"attn_mask": randn(T, S, seed=8)},
    "3-D bool": {"attn_mask": randn(N * HEADS, T, S, seed=8) > 1},
    "3-D float": {"attn_mask": randn(N * HEADS, T, S, seed=8)},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": randn(N, S, seed=9)},
    "padding and bool": {"key_padding_mask": PADDING, "attn_mask": causal(T, S)},
    "padding and 3-D float": {"key_padding_mask": randn(N, S, seed=9), "attn_mask": randn(N * HEADS, T, S, seed=8)},
}
WEIGHTS = {
    "weights": {"need_weights": True},
    "weights of heads": {"need_weights": True, "average_attn_weights": False},
    "no weights": {"need_weights": False},
}


def inputs(batch_first, kdim=E, vdim=E):
    tensors = randn(N, T, E, seed=1), randn(N, S, kdim, seed=2), randn(N, S, vdim, seed=3)
    return tensors if batch_first else tuple(t.transpose(0, 1).contiguous() for t in tensors)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or apart(a, b) <= 1e-12


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_values_are_those_of_torch(mask, weights, batch_first):
    theirs, arguments = attention(batch_first), MASKS[mask] | WEIGHTS[weights]
    ours = fa.convert(copy.deepcopy(theirs), "fa")
    assert type(ours) is not nn.MultiheadAttention and list(converted(ours)) == ["q", "k", "v", "out_proj"]
    qkv = inputs(batch_first)
    want = theirs(*qkv, **arguments)
    assert_same(ours(*qkv, **arguments), want)
    with torch.no_grad():
        assert_same(ours(*qkv, **arguments), want)
        assert_same(ours.eval()(*qkv, **arguments), want)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "3-D", "padding"])
def test_values_without_a_batch(mask, weights):
    theirs = attention()
    ours = fa.convert(copy.deepcopy(theirs), "fa")
    masks = MASKS | {"3-D": {"attn_mask": randn(HEADS, T, S, seed=8)}, "padding": {"key_padding_mask": PADDING[1]}}
    qkv = tuple(t[0] for t in inputs(True))
    assert_same(ours(*qkv, **masks[mask], **WEIGHTS[weights]), theirs(*qkv, **masks[mask], **WEIGHTS[weights]))


@pytest.mark.parametrize(
    "options", [{"kdim": 6, "vdim": 10}, {"kdim": 6}, {"bias": False}, {"kdim": 6, "vdim": 8, "bias": False}], ids=str
)
def test_values_and_gradients_of_every_kind(options):
    theirs, qkv = attention(**options), inputs(True, options.get("kdim", E), options.get("vdim", E))
    ours = matched(fa.convert(copy.deepcopy(theirs), "fa"))
    assert_same(ours(*qkv), theirs(*qkv))
    for m in (theirs, ours):
        m(*qkv)[0].backward(randn(N, T, E, seed=4))
    for name, p in theirs.named_parameters():
        assert apart(ours.get_parameter(name).grad, p.grad) <= 1e-12


@pytest.mark.parametrize("weights", WEIGHTS)
def test_dropout(weights):
    theirs = attention(dropout=0.5)
    ours = fa.convert(copy.deepcopy(theirs), "fa")
    qkv = inputs(True)
    want = theirs.eval()(*qkv, **WEIGHTS[weights])
    assert_same(ours.eval()(*qkv, **WEIGHTS[weights]), want)
    ours.train()
    assert apart(ours(*qkv, **WEIGHTS[weights])[0], want[0]) > 0.01
    if weights == "weights of heads":  # dropped or doubled
        kept = ours(*qkv, **WEIGHTS[weights])[1] / want[1]
        assert set(kept.round(decimals=9).unique().tolist()) == {0.0, 2.0}


def test_a_causal_hint_with_its_mask():
    theirs, x = attention(), randn(N, T, E, seed=1)
    ours = fa.convert(copy.deepcopy(theirs), "fa")
    for need in (True, False):
        arguments = dict(attn_mask=causal(T, T), is_causal=True, need_weights=need)
        assert_same(ours(x, x, x, **arguments), theirs(x, x, x, **arguments))


def test_a_causal_hint_without_its_mask_raises_as_torch_does():
    theirs, x = attention(), randn(N, T, E, seed=1)
    for m in (theirs, fa.convert(copy.deepcopy(theirs), "fa")):
        with pytest.raises(RuntimeError, match="attn_mask"):
            m(x, x, x, is_causal=True)


def test_an_integer_mask_raises_as_torch_does():
    theirs, x = attention(), randn(N, S, E, seed=1)
    for m in (theirs, fa.convert(copy.deepcopy(theirs), "fa")):
        with pytest.raises((AssertionError, ValueError, TypeError, RuntimeError), match="mask"):
            m(x, x, x, key_padding_mask=PADDING.long())


# ------------------------------------------------------------------------------------------ gradients


def matched(net):
    with torch.no_grad():
        for layer in converted(net).values():
            layer.feedback.B.copy_(layer.weight)
    return net


class Classifier(nn.Module):
    """Two transformer layers and a read-out of the mean token."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, HEADS, 12, dropout=0.0, **{"batch_first": True} | options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(E, 3)
        self.tokens = 1 if options.get("batch_first", True) else 0

    def forward(self, x, **masks):
        return self.fc(self.encoder(x, **masks).mean(self.tokens))


def classifier(**options):
    net = fixed_weights(Classifier(**options).double())
    for m in net.modules():
        if isinstance(m, nn.LayerNorm):
            m.reset_parameters()
    return net, randn(6, T, E, seed=5), torch.arange(6) % 3


LAYERS = [
    f"encoder.layers.{i}.{n}"
    for i in (0, 1)
    for n in (*(f"self_attn.{p}" for p in ("q", "k", "v", "out_proj")), "linear1", "linear2")
]


@pytest.mark.parametrize("rule", ["fa", "kp", "sa"])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"batch_first": False}, {"activation": "gelu", "bias": False}], ids=str
)
def test_transformer_with_matched_feedback_is_backprop(rule, options):
    net, x, y = classifier(**options)
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    want = grads(copy.deepcopy(net), x, y)
    fa.convert(net, rule)
    assert list(converted(net)) == [*LAYERS, "fc"]
    got = grads(matched(net), x, y)
    assert got.keys() == want.keys()
    assert all((got[n] - g).abs().max() <= 1e-12 * max(v.abs().max() for v in want.values()) for n, g in want.items())


def test_masked_transformer_with_matched_feedback_is_backprop():
    net, x, y = classifier()
    ours = matched(fa.convert(copy.deepcopy(net), "fa"))
    masks = dict(mask=causal(T, T), src_key_padding_mask=torch.arange(T) >= torch.tensor([4, 3, 2, 4, 1, 4])[:, None])
    for m in (net, ours):
        F.cross_entropy(m(x, **masks), y).backward()
    assert all(
        apart(ours.get_parameter(n).grad, p.grad) <= 1e-11
        for n, p in net.named_parameters()
        if p.grad.abs().max() > 1e-9
    )
    net.eval(), ours.eval()
    with torch.no_grad():  # torch's fast path
        assert apart(ours(x, **masks), net(x, **masks)) <= 1e-12


def test_no_error_goes_around_the_feedback():
    """Random feedback gives other gradients; no feedback at all leaves the read-out alone with one."""
    net, x, y = classifier()
    want = grads(copy.deepcopy(net), x, y)
    fa.convert(net, "fa", seed=1)
    got = grads(net, x, y)
    for layer in ("encoder.layers.0.linear1", "encoder.layers.0.linear2", "encoder.layers.1.linear1"):
        assert abs(cosine(got[f"{layer}.weight"], want[f"{layer}.weight"])) < 0.9
    assert all(apart(got[n], want[n]) > 0.05 for n in want if not n.startswith("fc") and n.endswith("weight"))
    assert apart(got["fc.weight"], want["fc.weight"]) <= 1e-12
    for layer in converted(net).values():
        layer.feedback.B.zero_()
    assert {n for n, g in grads(net, x, y).items() if g.any()} == {"fc.weight", "fc.bias"}


def test_every_projection_has_feedback_of_its_own():
    m = fa.convert(attention(), "fa", seed=1)
    qkv = [t.requires_grad_() for t in inputs(True)]
    m(*qkv)[0].backward(randn(N, T, E, seed=4))
    whole = [t.grad.clone() for t in qkv]
    for i, name in enumerate("qkv"):
        changed = copy.deepcopy(m)
        changed.get_submodule(name).feedback.B.mul_(3)
        for t in qkv:
            t.grad = None
        changed(*qkv)[0].backward(randn(N, T, E, seed=4))
        for j, t in enumerate(qkv):
            assert apart(t.grad, (3 if i == j else 1) * whole[j]) <= 1e-12


def test_gradient_angles():
    net, x, y = classifier()
    fa.convert(net, "fa")
    rows = fa.gradient_angles(matched(net), x, y, F.cross_entropy)
    assert rows.layer.tolist() == [*LAYERS, "fc"]
    assert rows.filter(like="_deg").to_numpy().max() < 1e-3


def test_alignment_and_exact_backprop():
    net, x, y = classifier()
    want = grads(copy.deepcopy(net), x, y)
    fa.convert(net, "fa", seed=1)
    rows = fa.alignment(net)
    assert rows.layer.tolist() == [*LAYERS, "fc"]
    q, W = converted(net)[LAYERS[0]], net.encoder.layers[0].self_attn.in_proj_weight[:E]
    assert torch.equal(q.weight, W) and torch.equal(fa.feedback_weight(q), q.feedback.B)
    assert rows.weight_norm[0] == pytest.approx(W.norm().item(), rel=1e-12)
    with fa.exact_backprop(net):
        exact = grads(net, x, y)
    assert all((exact[n] - g).abs().max() <= 1e-13 for n, g in want.items())


# ------------------------------------------------------------------------------------------ what stays


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}], ids=str)
@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_parameters_stay_and_come_back(rule, options):
    if rule == "dfa" and options:
        pytest.skip("one tensor goes in")
    m = attention(**options).eval()
    before, state = dict(m.named_parameters()), copy.deepcopy(m.state_dict())
    handle = m.register_forward_hook(lambda *_: None)
    fa.convert(m, rule)
    now = {n: p for n, p in m.named_parameters() if "feedback" not in n}
    assert set(now) == set(before) and all(now[n] is p for n, p in before.items())
    assert isinstance(m, nn.MultiheadAttention) and not any(c.training for c in m.modules())
    assert all(torch.equal(m.state_dict()[n], v) for n, v in state.items())
    m.load_state_dict(state, strict=False)
    fa.convert(m, "bp")
    assert type(m) is nn.MultiheadAttention and list(m.state_dict()) == list(state) and handle.id in m._forward_hooks
    assert [n for n, _ in m.named_children()] == ["out_proj"]
    assert type(m.out_proj) is type(attention().out_proj)


@pytest.mark.parametrize("rule", ["fa", "kp", "dfa"])
def test_a_copy_is_independent_and_a_state_dict_is_whole(rule):
    net, x, y = classifier()
    fa.convert(net, rule, seed=1)
    want = grads(net, x, y)
    copied = copy.deepcopy(net)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in net.parameters()}
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            t.mul_(2)
    got = grads(copied, x, y)
    assert all(torch.equal(got[n], g) for n, g in want.items())
    file = io.BytesIO()
    torch.save(copied.state_dict(), file)
    file.seek(0)
    net.load_state_dict(torch.load(file, weights_only=True))
    got = grads(net, x, y)
    assert all(torch.equal(got[n], g) for n, g in want.items())


def test_skip_and_refusals():
    net, x, y = classifier()
    want = grads(copy.deepcopy(net), x, y)
    fa.convert(net, "fa", skip=["encoder.layers.0.self_attn"])
    assert (
        list(converted(net)) == [*LAYERS[4:], "fc"] and type(net.encoder.layers[0].self_attn) is nn.MultiheadAttention
    )
    got = grads(matched(net), x, y)
    assert all((got[n] - g).abs().max() <= 1e-12 for n, g in want.items())
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        m = nn.Sequential(nn.MultiheadAttention(E, HEADS, **options))
        with pytest.raises(fa.UserError, match="^cannot convert 0 .*add_bias_kv and add_zero_attn"):
            fa.convert(m, "fa")
        assert type(m[0]) is nn.MultiheadAttention

    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(fa.UserError, match="Own"):
        fa.convert(Own(E, HEADS), "fa")


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("rule", ALL)
def test_every_rule_trains_a_transformer(rule):
    net, x, y = classifier()
    fa.convert(net, rule, seed=1, **ALL[rule])
    assert set(converted(net)) == {*LAYERS, "fc"}
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = torch.optim.SGD(fa.param_groups(net, 0.1))
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("rule", ["kp", "pfa", "sa"])
def test_an_optimizer_without_the_feedback_raises(rule):
    net, x, y = classifier()
    opt = torch.optim.SGD(net.parameters(), lr=0.01)
    fa.convert(net, rule, **ALL[rule])
    F.cross_entropy(net(x), y).backward()
    opt.step()
    with pytest.raises(RuntimeError, match="no optimizer holds the feedback of 13 layers"):
        opt.step()


@pytest.mark.parametrize("rule", ["pfa", *(pytest.param(r, marks=pytest.mark.slow) for r in ("fa", "kp", "usf"))])
def test_compiled_equals_eager(rule):
    net, x, y = classifier()
    fa.convert(net, rule, seed=1, **ALL[rule])
    want = {n: g for n, g in all_grads(net, net, x, y).items()}
    torch._dynamo.reset()
    got = all_grads(net, torch.compile(net, backend="aot_eager", fullgraph=True), x, y)
    assert got.keys() == want.keys()
    assert all((got[n] - g).abs().max() <= 1e-12 * g.abs().max() + 1e-15 for n, g in want.items())


def all_grads(net, called, x, y):
    net.zero_grad()
    F.cross_entropy(called(x), y).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters()}


def test_the_output_projection_may_be_skipped_alone():
    attention = nn.MultiheadAttention(8, 2)
    fa.convert(attention, "fa", skip="out_proj")
    assert list(converted(attention)) == ["q", "k", "v"]
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    attention(x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None for p in attention.parameters())
