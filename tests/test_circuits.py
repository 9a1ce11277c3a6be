"""Circuits: the interventions against what is known of each rule, and the drawing against the code that it claims to
show."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fa
from fa import plot, probes
from fa.experiments import p3_fig1
from fa.layers.feedback import generator
from fa.results import records


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(rule: str, **options) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    return fa.convert(net, rule, **options)


# ------------------------------------------------------------------------------------------------- interventions


def test_scrambling_keeps_one_half_of_a_weight_and_mixes_the_other():
    W, gen = randn(30, 20), generator(0, "test")
    signs, sizes = probes.scramble(W, "sign", gen), probes.scramble(W, "magnitude", gen)
    assert torch.equal(signs.abs(), W.abs()) and 0.4 < (signs.sign() == W.sign()).double().mean() < 0.6
    assert torch.equal(sizes.sign(), W.sign()) and torch.equal(
        sizes.abs().flatten().sort()[0], W.abs().flatten().sort()[0]
    )
    assert (sizes != W).double().mean() > 0.9
    with pytest.raises(fa.UserError, match="unknown part 'size' of a weight; known: sign, magnitude"):
        probes.scramble(W, "size", gen)


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "kp", "wm", "pfa", "pfa_o", "frsf"])
def test_the_error_sent_is_the_error_times_the_kernel(rule):
    layer, x, dy = mlp(rule)[0], randn(4, 7, seed=8), randn(4, 6, seed=9)
    K = layer.weight if rule == "bp" else fa.feedback_weight(layer)
    torch.testing.assert_close(probes.sent(layer, x, dy), dy @ K.detach())


def test_the_error_sent_under_dfa_is_the_networks():
    net, e = mlp("dfa"), randn(4, 5, seed=9)
    torch.testing.assert_close(probes.sent(net[0], randn(4, 7, seed=8), e), e @ net[0].feedback.B)
    out = net(randn(4, 7))  # and the network's own tape is as it was
    out.sum().backward()


@pytest.mark.parametrize("rule, options", [("kp", {}), ("pfa", {}), ("pfa_o", {}), ("sa", {}), ("aa", {}), ("ia", {}), ("wm", {}),
                                           ("wm", {"input": "normal"})])  # fmt: skip
def test_the_lesson_is_the_gradient_that_backward_gives(rule, options):
    layer, x, dy = mlp(rule, **options)[0], randn(4, 7, seed=8), randn(4, 6, seed=9)
    lesson = probes.taught(layer, x, dy)
    layer(x).backward(dy)
    assert set(lesson) == set(layer.feedback.rule.learned)
    for name, grad in lesson.items():
        torch.testing.assert_close(grad, getattr(layer.feedback, name).grad)


def test_no_lesson_where_nothing_is_learned_and_none_of_what_is_not_stored():
    assert probes.taught(mlp("fa")[0], randn(4, 7), randn(4, 6)) == {}
    assert probes.taught(mlp("bp")[0], randn(4, 7), randn(4, 6)) == {}
    with pytest.raises(fa.UserError, match="implicit=False"):
        probes.taught(mlp("pfa", implicit=True)[0], randn(4, 7), randn(4, 6))


READS = {  # by the rules' equations: what moves when W's signs, W's magnitudes, or the activity that W makes are changed
    ("bp", ""): {"send_sign", "send_magnitude"},
    ("usf", ""): {"send_sign"},
    ("frsf", ""): {"send_sign"},
    ("brsf", ""): {"send_sign"},
    ("fa", ""): set(),
    ("dfa", ""): set(),
    ("kp", ""): set(),
    ("pfa", ""): set(),
    ("pfa_o", ""): set(),
    ("wm", ""): {"learn_activity"},
    ("wm", "normal"): {"learn_activity"},
    ("aa", ""): {"learn_activity"},
    ("aa", "normal"): {"learn_activity"},
    ("ia", ""): {"learn_activity"},
    ("sa", ""): {"learn_sign", "learn_magnitude", "learn_activity"},  # it reads W's value
}


@pytest.mark.parametrize("rule, input", READS)
def test_what_a_rule_reads(rule, input):
    net = mlp(rule, **({"input": input} if input else {}))
    dy = randn(4, 5 if rule == "dfa" else 6, seed=9)
    before = copy.deepcopy(net.state_dict())
    found = probes.reads(net[0], randn(4, 7, seed=8), dy, generator(0, "test"))
    assert {name for name, moved in found.items() if moved > 0.05} == READS[rule, input]
    assert all(moved == 0 for name, moved in found.items() if name not in READS[rule, input])
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "weights, feedback and noise are as they were"


@pytest.mark.parametrize("rule", ["usf", "kp", "pfa", "sa"])
def test_what_a_rule_reads_in_a_convolution(rule):
    layer = fa.convert(nn.Conv2d(3, 4, 3, padding=1).double(), rule)
    found = probes.reads(layer, randn(2, 3, 5, 5), randn(2, 4, 5, 5, seed=1), generator(0, "test"))
    assert {name for name, moved in found.items() if moved > 0.05} == READS[rule, ""]


def test_passes_that_noise_drives():
    x, e = randn(4, 7), randn(4, 5, seed=1)
    for rule, options, share in [("bp", {}, 0), ("fa", {}, 0), ("dfa", {}, 0), ("kp", {}, 0), ("wm", {}, 0), ("aa", {}, 0),
                                 ("wm", {"input": "normal"}, 0.5), ("aa", {"input": "uniform"}, 0.5)]:  # fmt: skip
        net = mlp(rule, **options)
        before = copy.deepcopy(net.state_dict())
        assert probes.noise_passes(net, x, e) == share, rule
        assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
        assert all("forward" not in vars(m.feedback.op) for m in net if hasattr(getattr(m, "feedback", None), "op")), (
            "no counter is left"
        )


def test_reciprocal_synapses():
    def found(rule, **options):
        return probes.reciprocal(mlp(rule, **options), generator(0, "test"))

    for rule in ("fa", "kp", "wm"):
        assert found(rule) == {("0", "B"): 1, ("2", "B"): 1}
    assert found("kp", density=0.5) == {("0", "B"): 1, ("2", "B"): 1}, "synapses that do not exist are not tried"
    assert found("usf") == {("0", "K"): 1, ("2", "K"): 1} and found("bp") == {("0", "W"): 1, ("2", "W"): 1}
    assert found("dfa") == {("0", "B"): 0, ("2", "B"): 1}, (
        "the error comes from the last layer's own neurons only in the last layer"
    )
    for rule in ("pfa", "pfa_o"):
        assert set(found(rule).values()) == {0} and set(found(rule)) == {(n, m) for n in "02" for m in "BR"}
    net = mlp("kp")
    before = copy.deepcopy(net.state_dict())
    probes.reciprocal(net, generator(0, "test"))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


# ------------------------------------------------------------------------------------------------------- drawing


def page(*rules: str) -> SimpleNamespace:
    """What a figure without runs asks of its page."""
    return SimpleNamespace(rules=list(rules))


@pytest.mark.parametrize("name", [*p3_fig1.PANELS, "pfa_o", "sa", "aa", "frozen", "brsf"])
def test_a_circuit_is_what_the_rules_code_has(name):
    c = p3_fig1.circuit(name)
    layer = mlp(name)[0]
    stored = {n for n in ("B", "R") if hasattr(getattr(layer, "feedback", None), n)}
    assert set(c.feedback) == (stored or {"W"})
    learned = set(layer.feedback.rule.learned) if stored else set()
    assert {n for n, kind in c.feedback.items() if kind == "learned"} == learned
    assert (c.feedback == {"W": "copied"}) == bool(c.transported)
    if name == "dfa":
        assert c.direct and c.shapes == {"B": ("classes", "in")}
    elif name == "pfa":
        assert c.population and c.shapes == {"B": ("out", "pop"), "R": ("pop", "in")} and c.product == "B^T dy"
    elif stored and name != "pfa_o":
        assert c.shapes == {"B": ("out", "in")}
    assert c.reads_value == (name == "sa") and c.noise == (name == "wm") and (c.product == "dy") == (name == "kp")
    assert (name == "frozen") == (c.feedback == {"B": "copied"})


def test_the_circuits_agree_with_the_papers_first_two_rows():
    ticks = records.reference("p3_table1").set_index(["rule", "metric"]).value
    for name in p3_fig1.PANELS:
        for what in probes.WHAT:
            assert (what in p3_fig1.circuit(name).transported) == (ticks[name, f"no_{what}_transport"] == 0)


def test_equations_are_the_codes():
    assert p3_fig1.equation("kp") == r"$dx = B^{\mathsf{T}} dy$,  $dB = dW$"
    assert p3_fig1.equation("dfa") == r"$dx_l = B_l^{\mathsf{T}} e$", "words are left out"
    for name in fa.RULES:
        assert p3_fig1.equation(name).startswith("$dx"), name


def red(ax) -> list[str]:
    return [t.get_text() for t in ax.texts if t.get_color() == p3_fig1._RED]


def test_every_panel_shows_its_circuit():
    with plot.style():
        fig = p3_fig1.draw(page())
    assert fig.get_size_inches()[0] == plot.WIDTH["double"] and len(fig.axes) == len(p3_fig1.PANELS) + 1
    for ax, name in zip(fig.axes, p3_fig1.PANELS):
        c, texts = p3_fig1.circuit(name), [t.get_text() for t in ax.texts]
        assert plot.look(name).label in texts and p3_fig1.equation(name) in texts
        assert len(red(ax)) == bool(c.transported), "weight transport is drawn where the code reads W"
        styles = {
            line.get_linestyle()
            for line in ax.lines
            if line.get_color() == (plot.look(name).color if name != "bp" else "0.15")
        }
        assert ("--" in styles) == ("fixed" in c.feedback.values()), "dashed synapses are the fixed ones"
        assert (":" in styles) == ("copied" in c.feedback.values())
        assert (r"$\lambda\,n_\mathrm{out}$" in texts) == c.population
        assert ("noise" in texts) == c.noise
        if c.population:
            assert {"$B$", "$R$"} <= set(texts)


def test_the_drawing_is_legible_and_lies_on_its_page():
    with plot.style():
        fig = p3_fig1.draw(page())
        fig.canvas.draw()
        paper = fig.bbox
        for ax in fig.axes:
            for text in ax.texts:
                assert text.get_fontsize() >= 6.5, text.get_text()
                box = text.get_window_extent()
                assert paper.x0 <= box.x0 and box.x1 <= paper.x1 and paper.y0 <= box.y0 and box.y1 <= paper.y1, (
                    text.get_text()
                )


def test_a_readers_own_rule_is_drawn_as_its_code_behaves(monkeypatch):
    @dataclass(frozen=True)
    class Half(fa.Rule):
        """Half of W."""

        name, equation, source = "half", "dx = 0.5 W^T dy", "a test"

        def kernel(self, W):
            return 0.5 * W

    monkeypatch.setitem(fa.RULES, "half", Half)
    assert p3_fig1.circuit("half").transported == ("sign", "magnitude")
    with plot.style():
        fig = p3_fig1.draw(page("half", "sa"))
    assert red(fig.axes[0]) == ["sign and size"] and red(fig.axes[1]) == ["value"]


def test_a_rule_that_cheats_is_found_out(monkeypatch):
    """Positive control: feedback that claims to learn from local products and slips W in."""

    @dataclass(frozen=True)
    class Cheat(fa.rules.KP):
        name = "cheat"

        def feedback_grad(self, dW, W):
            return {"B": dW - 0.1 * W}

    monkeypatch.setitem(fa.RULES, "cheat", Cheat)
    c = p3_fig1.circuit("cheat")
    assert c.reads_value and c.product == ""
    assert "W" in p3_fig1.summary(page("cheat")).splitlines()[1].split()


def test_interventions_need_no_gradient_of_the_readers():
    """Within no_grad, on a network in eval mode, the answers are the same."""
    net, x, dy = mlp("usf").eval(), randn(4, 7, seed=8), randn(4, 6, seed=9)
    want = probes.reads(net[0], x, dy, generator(0, "test"))
    with torch.no_grad():
        assert probes.reads(net[0], x, dy, generator(0, "test")) == want
    assert not np.isnan(list(want.values())).any()
    F.cross_entropy(net(x), torch.arange(4)).backward()  # and it trains as before
