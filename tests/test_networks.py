"""Networks that others wrote: torchvision's classifiers, and two processes with ``DistributedDataParallel``.

A network under a rule whose feedback is set to the weight must be plain backprop. A network whose feedback is set to
zero must leave its last layers alone with a gradient, so that no error can have gone around the feedback.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

import fa
import oracles
from fa.layers.hooks import converted
from oracles import randn

CLASSES = 10
SMALL = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vit"]
FAMILIES = {  # constructor's arguments, side of the image
    "alexnet": ({}, 64),
    "convnext_tiny": ({}, 32),
    "densenet121": ({}, 32),
    "efficientnet_b0": ({}, 32),
    "googlenet": ({"init_weights": False}, 64),
    "inception_v3": ({"init_weights": False, "aux_logits": False}, 75),  # the auxiliary one needs 299 pixels
    "maxvit": ({}, 32),
    "mnasnet0_5": ({}, 32),
    "mobilenet_v2": ({}, 32),
    "mobilenet_v3_small": ({}, 32),
    "regnet_y_400mf": ({}, 32),
    "resnet18": ({}, 32),
    "resnext50_32x4d": ({}, 32),
    "shufflenet_v2_x0_5": ({}, 32),
    "squeezenet1_0": ({}, 32),
    "vgg11": ({}, 32),
    "vit": ({}, 32),
}
families = pytest.mark.parametrize(
    "family", [f if f in SMALL else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)


def build(family, dtype=torch.float64):
    """The network, from a fixed seed, and a batch of two for it; dropout off, batch statistics as in training."""
    arguments, side = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if family == "vit":
            net = models.VisionTransformer(side, 8, 2, 2, 16, 32, num_classes=CLASSES)
            nn.init.normal_(net.heads.head.weight, std=0.1)  # zero in torchvision, so that nothing would go down
        elif family == "maxvit":
            net = models.MaxVit((side, side), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=CLASSES)
        else:
            net = getattr(models, family)(num_classes=CLASSES, **arguments)
    for m in net.train().modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif type(m).__name__ == "StochasticDepth":
            m.p = 0.0
        elif type(m).__name__ == "MLPBlock" or isinstance(m, nn.MultiheadAttention):
            m.dropout = 0.0
    return net.to(dtype), randn(2, 3, side, side, seed=2, dtype=dtype), torch.tensor([3, 7])


def outputs(net, x):
    """Every output tensor: googlenet has auxiliary ones."""
    out = net(x)
    return [out] if isinstance(out, torch.Tensor) else [o for o in out if o is not None]


def gradients(net, x, y):
    net.zero_grad()
    sum(F.cross_entropy(o, y) for o in outputs(net, x)).backward()
    return {n: p.grad for n, p in net.named_parameters() if "feedback" not in n and p.grad is not None}


def weights(net):
    """Names of every weight of a linear or convolutional layer, attention's projections included."""
    names = []
    for name, m in net.named_modules():
        if isinstance(m, nn.MultiheadAttention):
            names.append(f"{name}.in_proj_weight")
        elif isinstance(m, (nn.Linear, nn.Conv2d)):
            names.append(f"{name}.weight")
    return names


READ_OUTS = {"googlenet": 3}  # with the auxiliary ones


@families
def test_family(family, monkeypatch):
    net, x, y = build(family)
    want, names = gradients(copy.deepcopy(net), x, y), weights(net)
    assert set(names) <= set(want)
    fa.convert(net, "fa", seed=1)

    ran = set()
    mark = fa.layers.passes.marked
    monkeypatch.setattr(fa.layers.passes, "marked", lambda fb, dW: (ran.add(fb.layer_name), mark(fb, dW))[1])
    random = {n: g.clone() for n, g in gradients(net, x, y).items()}
    assert ran == set(converted(net))
    held = {id(layer.held) for layer in converted(net).values()}
    assert all(id(net.get_parameter(n)) in held for n in names)

    with torch.no_grad():
        for layer in converted(net).values():
            layer.feedback.B.copy_(layer.weight)
    got = gradients(net, x, y)
    assert got.keys() == want.keys()
    for n, g in want.items():
        assert (got[n] - g).abs().max() <= 1e-10 * g.abs().max() + 1e-14 * max(v.abs().max() for v in want.values()), n
    changed = [n for n in names if (random[n] - want[n]).abs().max() > 1e-3 * want[n].abs().max()]
    assert len(changed) >= len(names) - READ_OUTS.get(family, 1) - 1  # squeezenet's read-out is followed by a rectifier

    for layer in converted(net).values():
        layer.feedback.B.zero_()
    cut = gradients(net, x, y)
    assert len([n for n in names if cut[n].any()]) == READ_OUTS.get(family, 1)


def test_swin_is_refused_by_name_and_converts_without_its_attention():
    net = models.SwinTransformer(
        [2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=CLASSES, stochastic_depth_prob=0.0
    ).double()
    with pytest.raises(fa.UserError, match=r"features\.1\.0\.attn \(ShiftedWindowAttention") as e:
        fa.convert(net, "fa")
    attention = [n for n, m in net.named_modules() if type(m).__name__ == "ShiftedWindowAttention"]
    assert len(attention) == 2 and all(n in str(e.value) for n in attention) and not converted(net)
    x, y = randn(2, 3, 16, 16, seed=2), torch.tensor([3, 7])
    want = gradients(copy.deepcopy(net), x, y)
    fa.convert(net, "fa", skip=attention)
    assert not any(n.startswith(a) for n in converted(net) for a in attention) and "features.0.0" in converted(net)
    with torch.no_grad():
        for layer in converted(net).values():
            layer.feedback.B.copy_(layer.weight)
    got = gradients(net, x, y)
    assert all((got[n] - g).abs().max() <= 1e-10 * g.abs().max() + 1e-14 for n, g in want.items())


@pytest.mark.slow
def test_swin_t_is_refused_by_name():
    net = models.swin_t(num_classes=CLASSES)
    attention = [n for n, m in net.named_modules() if type(m).__name__ == "ShiftedWindowAttention"]
    with pytest.raises(fa.UserError) as e:
        fa.convert(net, "fa")
    assert all(f"{n} (ShiftedWindowAttention" in str(e.value) for n in attention)
    fa.convert(net, "fa", skip=attention)
    F.cross_entropy(net(torch.randn(2, 3, 32, 32)), torch.tensor([3, 7])).backward()
    assert all(p.grad is not None for p in net.parameters())


# ---------------------------------------------------------------------------------- a training step under every rule

STEPS = {name: {} for name in fa.RULES if name != "bp"} | {
    "pfa": {"expansion": 2}, "primitives": {"amp": 1e-4, "null": 1e-4, "sparse": 1e-4, "decay": 1e-4, "self_": 1e-4},
}  # fmt: skip
QUICK = ("pfa", "dfa", "ia", "brsf")  # with the small networks of the default run


@pytest.mark.parametrize("family, rule", [
    pytest.param(f, r, marks=() if r in QUICK and f in ("shufflenet_v2_x0_5", "vit") else pytest.mark.slow)
    for f in SMALL for r in STEPS
])  # fmt: skip
def test_a_training_step(family, rule):
    net, x, y = build(family, torch.float32)
    fa.convert(net, rule, seed=1, **STEPS[rule])
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = torch.optim.SGD(fa.param_groups(net, 1e-3, feedback_lr=1e-3), momentum=0.9)
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    after = dict(net.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    names = weights(net) + [n for n in before if "feedback" in n]
    assert all(not torch.equal(after[n], before[n]) for n in names)


# ------------------------------------------------------------------------------------------ two processes

RULES = {"fa": {}, "kp": {}, "sa": {}, "pfa": {"expansion": 2}}


def tiny(rule):
    net, x, y = oracles.mlp(6, 9, 3)
    return fa.convert(net, rule, seed=1, **RULES[rule]), x, y


def work(rank, folder):
    """One of two processes: half of the batch each; two steps of SGD under every rule."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        seen = {}
        for rule in RULES:
            net, x, y = tiny(rule)
            seen[rule] = trained(net, DistributedDataParallel(net), x[rank::2], y[rank::2])
        torch.save(seen, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def trained(net, called, x, y):
    """Gradients of two steps, and the parameters after them."""
    opt, seen = torch.optim.SGD(fa.param_groups(net, 0.1, weight_decay=1e-2), momentum=0.9), []
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(called(x), y).backward()
        seen.append({n: p.grad.clone() for n, p in net.named_parameters()})
        opt.step()
    return [*seen, {n: p.detach().clone() for n, p in net.named_parameters()}]


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    for rule in RULES:
        net, x, y = tiny(rule)
        for want, *got in zip(trained(net, net, x, y), *(seen[rule] for seen in ranks), strict=True):
            for g in got:
                assert g.keys() == want.keys()
                assert all((g[n] - v).abs().max() <= 1e-12 for n, v in want.items()), rule
            assert all(torch.equal(got[0][n], got[1][n]) for n in want)
