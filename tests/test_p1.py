"""p1's figures on Architecture 1: their rules are what they say and not backprop, their grid, and the runs that need
the weights of others."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import fa
from fa import experiments
from fa.experiments import p1_accuracy, p1_angles, p1_concordance, p1_normalization, p1_representations
from fa.metrics import gradient_angles, linear_layers
from fa.results import runs as campaign
from fa.results.page import Page
from fa.results.store import RunFolder
from fa.train import data
from fa.train import loop as train
from fa.train.config import Config, canonical
from fa.train.network import build_network
from fa.train.similarity import Similarity, activities
from fa.train.step import make_optimizer
from oracles import randn

VARIANTS = list(p1_accuracy.VARIANTS)
RULED = VARIANTS[1:]  # all but backprop
FIXED = ["fa", "fa_dense", "dfa"]
LAYERS = ["conv1", "conv2", "fc1", "fc2", "fc"]


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))


def network(variant: str, seed: int = 0, shape: tuple[int, ...] = (3, 16, 16), **changes) -> torch.nn.Module:
    """Architecture 1 as the figure's paper mode starts it, on smaller images, in float64."""
    config = p1_accuracy.recipe(p1_accuracy.PAPER, variant, seed).vary(**changes)
    return build_network(config, shape, 10, torch.float64)


def batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(n, 3, 16, 16, seed=5), torch.arange(n) % 10


def weight_gradients(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    x, y = batch()
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return {name: layer.weight.grad.clone() for name, layer in linear_layers(net).items()}


# --------------------------------------------------------------------------------------------- guards: not backprop


@pytest.mark.parametrize("variant", [v for v in RULED if v != "usf_track"])
def test_twice_the_feedback_is_twice_the_error_at_every_layer_that_it_passes(variant):
    """So the feedback is what carries the error. Doubling is exact; under DFA the error passes one matrix."""
    net = network(variant)
    before = weight_gradients(net)
    with torch.no_grad():
        for layer in linear_layers(net).values():
            for tensor in layer.feedback.buffers():
                if tensor.is_floating_point():
                    tensor.mul_(2)
    after = weight_gradients(net)
    for above, name in enumerate(reversed(LAYERS)):
        factor = 2.0 ** (min(above, 1) if variant == "dfa" else above)
        assert torch.equal(after[name], factor * before[name]), name


def test_the_size_of_a_kernel_that_follows_w_is_w_s_whatever_it_was():
    net = network("usf_track")
    with torch.no_grad():
        for layer in linear_layers(net).values():
            layer.weight.mul_(3)
    found = fa.alignment(net)
    assert np.allclose(found.norm_ratio, 1, atol=1e-12) and (found.angle_deg > 25).all()


@pytest.mark.parametrize("variant", [v for v in RULED if v not in ("fa_dense", "dfa")])
def test_feedback_that_is_w_is_backprop_bit_for_bit(variant):
    """Where W has one magnitude, or the magnitudes of the feedback are W's, every kernel here is W itself."""
    net, plain = network(variant), network("bp")
    with torch.no_grad():
        for layer, own in zip(linear_layers(net).values(), linear_layers(plain).values()):
            feedback = layer.feedback
            if variant.startswith("usf"):
                layer.weight.copy_(feedback.s * layer.weight.sign())
            own.weight.copy_(layer.weight)
            own.bias.copy_(layer.bias)
            if variant == "fa":
                feedback.B.copy_(layer.weight)
            if variant in ("brsf", "frsf"):
                feedback.M.copy_(layer.weight)
    got, want = weight_gradients(net), weight_gradients(plain)
    for name in LAYERS:
        if variant == "usf_track":  # whose magnitude is computed, and so rounded
            assert (got[name] - want[name]).abs().max() < 1e-12 * want[name].abs().max()
        else:
            assert torch.equal(got[name], want[name]), name


def test_dense_feedback_that_is_the_convolution_s_own_matrix_is_backprop():
    net, plain = network("fa_dense"), network("bp")
    x, _ = batch(1)
    shapes = {"conv1": x.shape[1:], "conv2": (64, 6, 6)}
    with torch.no_grad():
        for name, layer in linear_layers(net).items():
            if name in shapes:
                units = torch.eye(math.prod(shapes[name]), dtype=torch.float64).view(-1, *shapes[name])
                layer.feedback.B.copy_(F.conv2d(units, layer.weight).flatten(1).T)  # (out h' w', in h w)
            else:
                layer.feedback.B.copy_(layer.weight)
    got, want = weight_gradients(net), weight_gradients(plain)
    assert all((got[n] - want[n]).abs().max() < 1e-12 * want[n].abs().max() for n in LAYERS)


@pytest.mark.parametrize("variant", RULED)
def test_before_training_random_feedback_is_at_chance_and_signs_are_not(variant):
    x, y = batch(40)
    found = gradient_angles(network(variant), x, y, F.cross_entropy).set_index("layer")
    below = found.loc[["conv1", "conv2", "fc1"]]  # whose error has passed two matrices or more, or one of DFA's
    if variant in FIXED:
        assert below.delta_angle_global_deg.between(80, 100).all()
        assert below.grad_angle_global_deg.between(60, 120).all()
    else:
        assert below.delta_angle_global_deg.between(20, 80).all()
    local = found.delta_angle_local_deg[["conv2", "fc1", "fc2"]]
    want = {"fa": 90, "fa_dense": 90, "usf": 30, "usf_track": 30, "usf_clamp": 30, "brsf": 41.4, "frsf": 41.4}
    assert local.isna().all() if variant == "dfa" else (local - want[variant]).abs().max() < 4
    assert found.grad_angle_global_deg["fc"] < 1e-5, "the output layer gets the exact gradient under every rule"


@pytest.mark.parametrize("variant", [v for v in RULED if v not in ("fa_dense", "dfa")])
def test_start_angles_are_the_table_s(variant):
    """Uniform weights (p1 facts, section 1.3), at the figure's own sizes, mean of three seeds, layer by layer."""
    angles = [
        fa.alignment(network(variant, seed, (3, 24, 24), rule=p1_accuracy.VARIANTS[variant].rule)).set_index("layer")
        for seed in range(3)
    ]
    found = pd.concat(a.angle_deg for a in angles).groupby(level=0).mean()
    want = 90 if variant == "fa" else 30 if variant.startswith("usf") else 41.41
    assert (found - want).abs().max() < (2 if variant == "fa" else 1)


def test_dfa_arrives_where_noklands_does():
    """B^T e at the pooled activation, from where derivatives of ReLU and pooling are exact; here all by autograd."""
    net, plain = network("dfa"), network("bp")  # the same weights
    x, y = batch()
    got = weight_gradients(net)
    h1 = F.max_pool2d(plain.conv1(x).relu(), 2)  # (n, 64, 6, 6)
    h2 = F.max_pool2d(plain.conv2(h1.detach()).relu(), 2).flatten(1)
    h4 = plain.fc2(plain.fc1(h2.detach()).relu().detach()).relu()  # (n, 192)
    e = (plain.fc(h4).softmax(1) - F.one_hot(y, 10)) / len(x)  # (n, classes)
    assert net.conv2.feedback.B.shape == (10, 64, 6, 6)
    delta = torch.einsum("nk,kchw->nchw", e.detach(), net.conv2.feedback.B)
    for h, layer, error in (
        (h1, "conv1", delta),
        (h2, "conv2", e.detach() @ net.fc1.feedback.B),
        (h4, "fc2", e.detach() @ net.fc.feedback.B),
    ):
        want = torch.autograd.grad(h, plain.get_submodule(layer).weight, error)[0]
        assert (got[layer] - want).abs().max() < 1e-13 * max(1, want.abs().max())


# ------------------------------------------------------------------------------------------------------------- grid


def test_the_grid_is_the_sources_set_up():
    runs = experiments.plan("p1_accuracy", "paper")
    assert [p1_accuracy.variant_of(c) for c in runs] == VARIANTS * 3
    for c in runs:
        assert (c.dataset, c.model, c.epochs, c.batch, c.augment) == ("cifar10-24", "arch1", 50, 128, True)
        assert (c.optimizer, c.lr, c.momentum, c.weights, c.keep) == ("adam", 1e-3, 0.9, "torch", True)
        assert {c.schedule(e)["lr"] for e in range(50)} == {1e-3}
        assert c.weight_decay == (1e-4 if c.rule == "bp" else 0)  # searched for backprop alone
    small = experiments.plan("p1_accuracy", "small")
    assert {c.precision for c in small} == {"float32"}
    assert [c.vary(epochs=50, first_steps=r.first_steps, precision="bfloat16") for c, r in zip(small, runs)] == runs
    nets = [network(v) for v in VARIANTS]
    for a, b in ((linear_layers(nets[0]), linear_layers(net)) for net in nets[1:]):
        assert all(torch.equal(a[n].weight, b[n].weight) and torch.equal(a[n].bias, b[n].bias) for n in LAYERS)
    other = experiments.plan("p1_accuracy", "quick", rules="kp,fa")
    assert [p1_accuracy.variant_of(c) for c in other] == ["fa", "fa_dense", "kp"]


def test_the_three_figures_share_their_runs():
    for mode in experiments.MODES:
        accuracy, angles, alike = (experiments.plan(f"p1_{n}", mode) for n in ("accuracy", "angles", "representations"))
        assert accuracy == angles
        networks = {c.run for c in accuracy}
        assert [s.needs[0] for s in alike] == accuracy
        for s in alike:
            network, same, other = s.needs
            assert {p1_accuracy.variant_of(c) for c in (same, other)} == {"bp"}
            assert same.seed == network.seed == s.seed and other.seed == {0: 1, 1: 0, 2: 1}[s.seed]
            assert same.run in networks and (other.run in networks or mode == "quick")


def tiny(n: int, seed: int) -> data.Split:
    return data.Split(randn(n, 3, 32, 32, seed=seed).float(), torch.arange(n) % 10, 4)


def test_a_run_of_paper_mode_end_to_end():
    """Two epochs on a few images: layers within the first epoch, the chosen epoch, kept weights."""
    sets = data.Data("cifar10-24", 10, tiny(32, 1), tiny(10, 2), tiny(10, 3))
    paper = p1_accuracy.PAPER.vary(epochs=2, batch=8, first_steps="1,2", precision="float32")
    config = p1_accuracy.recipe(paper, "usf_clamp", 1)
    run = train.Run(config, RunFolder(config))
    table = train.train_runs([run], sets=sets)[0]
    layers = table[table.metric == "grad_angle_global_deg"]
    assert sorted(set(layers.epoch)) == [0, 0.25, 0.5, 1, 2] and list(layers.layer[:5]) == LAYERS
    norms = table[table.metric == "weight_norm"].pivot(index="epoch", columns="layer", values="value")
    assert np.allclose(norms, norms.loc[0], rtol=1e-6), "the norm of W is held"
    chosen = table[table.metric == "chosen_epoch"].value.item()
    test = table[(table.metric == "test_accuracy") & (table.epoch == chosen)].value.item()
    assert table[table.metric == "chosen_test_accuracy"].value.item() == test
    assert torch.equal(RunFolder(config).weights()["conv1.weight"], run.net.conv1.weight)


# ---------------------------------------------------------------------------------------------------- representations


def runs_of(rules: str) -> list[Similarity]:
    quick = p1_accuracy.QUICK.vary(epochs=1, batch=400, first_steps="")
    networks = [p1_accuracy.recipe(quick, v, 0) for v in rules.split(",")]
    references = [canonical(p1_accuracy.recipe(quick, "bp", seed)) for seed in (0, 1)]
    return [Similarity(c.rule, 0, canonical(c), *references, images=200) for c in networks]


def test_a_network_that_another_process_trains_is_waited_for_and_counted():
    runs = runs_of("bp")
    with RunFolder(runs[0].needs[0]).lock():
        summary = campaign.run(runs, workers=1, device="cpu", progress=False)
    assert (summary.done, summary.left, summary.busy) == (0, 1, 1)


def test_similarity_trains_what_it_needs_and_compares_those_networks():
    runs = runs_of("bp,fa")
    summary = campaign.run(runs, workers=1, device="cpu", progress=False)
    assert (summary.done, summary.left, summary.failed) == (2, 0, [])
    assert all(RunFolder(c).finished for s in runs for c in s.needs)
    assert [c.rule for c in runs[1].needs] == ["fa", "bp", "bp"]  # CKA itself is symmetric
    own, fixed = (RunFolder(s).table() for s in runs)
    assert set(own[own.epoch == 1].metric) == {"cka_another"}, "a network is not compared with itself"
    sets = data.load("digits")
    x, y = sets.test.first(200)

    def features(config: Config) -> torch.Tensor:
        net = build_network(config.vary(rule="bp", options=""), sets.shape, 10)
        net.load_state_dict(RunFolder(config).weights())
        with torch.no_grad():
            return net.conv2(F.max_pool2d(net.conv1(x).relu(), 2)).flatten(1).double().numpy()

    network, same, _ = map(features, runs[1].needs)
    n = len(x)
    K, L = ((f - f.mean(0)) @ (f - f.mean(0)).T for f in (network, same))
    biased = (K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum())
    found = fixed[(fixed.metric == "cka") & (fixed.epoch == 1) & (fixed.layer == "conv2")].value.item()
    assert found == pytest.approx(biased, abs=10 / n) and found < 0.9999
    assert list(fixed[(fixed.metric == "cka") & (fixed.epoch == 0)].layer) == LAYERS
    grams, right = activities(runs[1].needs[1], sets, RunFolder(runs[1].needs[1]).weights(), x, y)
    assert 0 < right.double().mean() < 1 and grams["fc"].shape == (200, 200)


def test_a_campaign_without_time_for_what_is_needed_leaves_the_rest():
    runs = runs_of("fa")
    summary = campaign.run(runs, budget=1e-6, workers=1, device="cpu", progress=False)
    assert (summary.done, summary.left) == (0, 1) and not RunFolder(runs[0]).finished


def test_a_similarity_is_its_recipe():
    s = runs_of("fa")[0]
    assert Similarity(**json.loads(json.dumps(vars(s)))).run == s.run and s.dataset == "digits"
    assert s.needs[0].rule == "fa" and p1_representations.swept(s) == {"variant": "fa"}


# -------------------------------------------------------------------------------------------------------------- drawing


def test_growth_is_over_the_initial_norm_of_the_same_run():
    rows = [("a", 0, "fc", 2.0), ("a", 5, "fc", 3.0), ("b", 0, "fc", 4.0), ("b", 5, "fc", 2.0)]
    table = pd.DataFrame(rows, columns=["run", "epoch", "layer", "value"]).assign(metric="weight_norm")
    assert p1_angles.growth(table).value.tolist() == [1.5, 0.5]


# ------------------------------------------------------------------------------- strict normalisation, share of signs


def started(config: Config) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A page's network on smaller images, in float64, and its optimizer."""
    net = build_network(config, (3, 16, 16), 10, torch.float64)
    return net, make_optimizer(net, config)


def test_the_settings_of_strict_normalisation_are_both_readings():
    runs = experiments.plan("p1_normalization", "paper")
    assert len(runs) == len({c.run for c in runs}) == 51 and {(c.epochs, c.precision) for c in runs} == {
        (10, "bfloat16")
    }
    places = [(c.rule, *p1_normalization.swept(c).values()) for c in runs if c.seed == 0]
    settings = [("fixed", "free"), ("track", "free"), ("fixed", "held"), ("track", "held")]
    assert places == [("bp", "fixed", "free"), *((r, *s) for r in ("fa", "usf", "brsf", "frsf") for s in settings)]
    for rule in ("fa", "usf", "brsf", "frsf"):
        for config in p1_normalization.of_rule(runs[0], rule, 0):
            feedback, forward = p1_normalization.swept(config).values()
            net, opt = started(config)
            start = [torch.linalg.vector_norm(layer.weight).item() for layer in linear_layers(net).values()]
            with torch.no_grad():
                for layer in linear_layers(net).values():
                    layer.weight.mul_(3)
            x, y = batch()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            end = [torch.linalg.vector_norm(layer.weight).item() for layer in linear_layers(net).values()]
            assert np.allclose(end, start, rtol=1e-12) if forward == "held" else np.all(np.divide(end, start) > 2)
            ratio = fa.alignment(net).norm_ratio
            known = 1 if feedback == "track" or forward == "held" else np.divide(start, end)
            assert np.allclose(ratio, known, rtol=0.1 if rule == "brsf" else 0.05 if rule in ("fa", "frsf") else 1e-9)


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
def test_where_w_is_held_feedback_that_follows_is_feedback_that_stays(rule):
    """W's norm is the initial one, and so is the feedback's, but for the last bits and what a draw's norm is off."""
    base = experiments.plan("p1_normalization", "paper")[0].vary(precision="float32")
    *_, held, both = p1_normalization.of_rule(base, rule, 0)
    ends = []
    for config in (held, both):
        net, opt = started(config)
        if rule != "usf":  # the drawn feedback, which has W's norm on average, gets it exactly
            with torch.no_grad():
                for layer in linear_layers(net).values():
                    own = layer.feedback.B if rule == "fa" else layer.feedback.M
                    own.mul_(torch.linalg.vector_norm(layer.weight) / torch.linalg.vector_norm(own))
        for _ in range(3):
            x, y = batch()
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
        ends.append({name: layer.weight.detach().clone() for name, layer in linear_layers(net).items()})
    assert all((ends[0][n] - ends[1][n]).abs().max() < 1e-9 * ends[0][n].abs().max() for n in LAYERS)


def test_the_shares_of_concordant_signs():
    runs = experiments.plan("p1_concordance", "paper")
    shares = [p1_concordance.swept(c)["share"] for c in runs if c.rule == "usf" and c.seed == 0]
    assert shares == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0] and len(runs) == 24
    assert len({c.run for c in runs} & {c.run for c in experiments.plan("p1_normalization", "paper")}) == 9
    x, y = batch(40)
    angles = []
    for config in (c for c in runs if c.rule == "usf" and c.seed == 0):
        net, share = build_network(config, (3, 24, 24), 10, torch.float64), p1_concordance.swept(config)["share"]
        found = fa.alignment(net)
        assert (found.sign_concordance - share).abs().max() < 0.04
        assert (found.angle_deg - p1_concordance.law(share)).abs().max() < 4
        small = build_network(config, (3, 16, 16), 10, torch.float64)
        angles.append(gradient_angles(small, x, y, F.cross_entropy).grad_angle_global_deg.iloc[0])
        before = weight_gradients(small)
        with torch.no_grad():
            for layer in linear_layers(small).values():
                layer.feedback.s.mul_(2)
        after = weight_gradients(small)
        assert all(torch.equal(after[n], 2.0**i * before[n]) for i, n in enumerate(reversed(LAYERS)))
    assert angles[0] > 75 and angles[-1] < 65, "half of the signs is chance"
    with pytest.raises(fa.UserError, match="bp, fa and usf, not kp"):
        experiments.plan("p1_concordance", "quick", rules="kp,usf")


def test_the_gradient_angles_have_the_colours_of_the_key():
    """The output layer has no gradient angle to show; the other layers keep their colours without it."""
    from matplotlib import pyplot as plt

    fig = p1_concordance.draw(Page("p1_concordance"))
    *_, b, c = fig.axes
    known = {text.get_text(): line.get_color() for text, line in zip(b.get_legend().texts, b.get_legend().get_lines())}
    drawn = [container.lines[0].get_color() for container in c.containers]
    plt.close(fig)
    assert list(known) == LAYERS and drawn == [known[n] for n in LAYERS[:-1]]


def test_the_papers_name_of_a_rule():
    assert [experiments.find(n).named("usf") for n in ("p1_obstacles", "p3_fig2")] == ["uSF", "SF"]
    page = Page("p1_obstacles", scale="small")
    assert page.diverged().endswith("diverged: FA, uSF") and "(BP, FA, DFA, uSF; 3 seeds)" in str(page.banner())
