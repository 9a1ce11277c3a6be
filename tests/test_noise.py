"""Noisy updates: their size, what they touch, and the variance that they leave in an estimate of W."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import Clock, same

import fa
from fa import UserError
from fa.experiments import p2_noise, plan
from fa.layers.hooks import converted
from fa.results.store import RunFolder
from fa.train import data, stack
from fa.train import loop as train
from fa.train.config import Config
from fa.train.network import build_network
from fa.train.step import Stepper, make_optimizer

TINY = Config("sa", 0, dataset="digits", hidden="32", epochs=2, batch=64, lr=0.1, lr_drops="", momentum=0.0,
              weight_decay=0.0, update_noise=0.01, noisy="feedback")  # fmt: skip


def stepper(config):
    sets = data.load("digits", dtype=torch.float64)
    net = build_network(config, sets.shape, sets.classes, torch.float64)
    return net, Stepper(net, make_optimizer(net, config), config, sets.train)


@pytest.mark.parametrize("rule, noisy, options", [
    ("sa", "feedback", ""), ("kp", "feedback", ""), ("pfa", "feedback", "expansion=2"), ("frozen", "feedback", "every=1"),
    ("bp", "weights", ""), ("fa", "weights", ""), ("sa", "weights", ""),
])  # fmt: skip
def test_noise_moves_what_it_should_by_the_rate_times_its_root_variance(rule, noisy, options):
    config = replace(TINY, rule=rule, options=options, noisy=noisy, feedback_lr=0.3 * (rule == "sa"))
    (still, quiet), (net, loud) = (stepper(replace(config, update_noise=v)) for v in (0.0, 0.01))
    for s in (quiet, loud):
        s.begin(0)
        s.step()
    before, after = dict(still.named_parameters()), dict(net.named_parameters())
    if rule == "frozen":
        before |= {f"{n}.feedback.B": m.feedback.B for n, m in converted(still).items()}
        after |= {f"{n}.feedback.B": m.feedback.B for n, m in converted(net).items()}
    for name, tensor in after.items():
        moved = (tensor - before[name]).detach()
        if (".feedback." in name) != (noisy == "feedback"):
            assert not moved.any(), name
            continue
        rate = 0.3 if rule == "sa" and noisy == "feedback" else 0.1
        if moved.numel() > 300:
            assert moved.std().item() == pytest.approx(rate * 0.1, rel=0.1), name
            assert abs(moved.mean().item()) < 4 * rate * 0.1 / moved.numel() ** 0.5
        assert moved.any()


def test_noise_rests_with_the_part_that_rests():
    config = replace(TINY, rule="wm", noisy="feedback", alternate=1)
    net, s = stepper(config)
    s.begin(0)
    for phase in ("mirror", "task", "mirror", "task"):
        held = {n: p.clone() for n, p in net.named_parameters()}
        s.step()
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, held[n])}
        assert s.phase == phase and {".feedback." in n for n in moved} == {phase == "mirror"}


def test_noise_is_new_in_every_epoch():
    net, s = stepper(replace(TINY, options="decay=0 self_=0"))
    layer, moved = next(iter(converted(net).values())), []
    for epoch in (0, 1, 1):
        held = layer.feedback.B.detach().clone()
        s.begin(epoch)
        s.step()
        moved.append(layer.feedback.B.detach() - held)
    assert torch.allclose(moved[1], moved[2]) and not torch.allclose(moved[0], moved[1])


def test_the_variance_of_an_estimate_is_the_formulas():
    """Without a task: W rests, so that nothing but the noise keeps B from it."""
    config = replace(TINY, options="decay=0.5 self_=1", lr=0.05)
    net, s = stepper(config)
    s.begin(0)
    layer = next(iter(converted(net).values()))
    held, seen = {n: p.detach().clone() for n, p in net.named_parameters() if "feedback" not in n}, []
    for _ in range(60):
        for number in range(s.per_epoch):
            s.step()
            with torch.no_grad():
                for n, p in net.named_parameters():
                    p.copy_(held.get(n, p))
        s.begin(len(seen))
        seen.append((layer.feedback.B - layer.weight).detach().square().mean().item())
    r = 1 - 2 * 0.05 * 0.5
    assert np.mean(seen[20:]) == pytest.approx(0.05**2 * 0.01 / (1 - r**2), rel=0.02)


def test_a_noisy_run_that_is_stopped_and_resumed_is_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    whole = train.train(TINY)
    assert whole.equals(train.train(TINY)) and not whole.equals(train.train(replace(TINY, update_noise=0.0)))
    folder = RunFolder(TINY)
    monkeypatch.setattr(train, "time", Clock(1.0))
    assert train.train(TINY, folder=folder, until=4.5) is None and folder.checkpoint()["epoch"] == 1
    monkeypatch.undo()
    same(train.train(TINY, folder=folder), whole)


def test_slips_are_told():
    with pytest.raises(UserError, match="no feedback of fa moves, and so none is noisy"):
        replace(TINY, rule="fa")
    for v in (-1, float("inf"), float("nan")):
        with pytest.raises(UserError, match="update_noise=.* is out of range"):
            replace(TINY, update_noise=v)
    with pytest.raises(UserError, match="unknown noisy 'W'"):
        replace(TINY, noisy="W")
    resnet = Config("fa", 0, model="resnet8", dataset="digits")
    assert stack.key(resnet) and not stack.key(replace(resnet, update_noise=0.1))


def test_the_figures_formula_is_that_of_its_recipe():
    for config in plan("p2_noise", "paper", rules="sa,kp,frozen,bp", seeds=1):
        noisy = config.update_noise > 0
        assert (
            config.momentum == 0
            and config.lr_drops == ""
            and config.noisy == ("feedback" if noisy and config.rule != "bp" else "weights")
        )
        if config.rule == "sa":
            d, r = config.rule_options["decay"], 1 - 2 * config.feedback_lr * config.rule_options["decay"]
            assert config.rule_options["self_"] == 2 * d  # B settles at W
            wanted = config.feedback_lr * (config.update_noise / (1 - r**2)) ** 0.5
            assert p2_noise.stationary(np.array(config.update_noise)) == pytest.approx(wanted)
        if config.rule == "kp":
            assert config.lr * config.first_weight_decay == pytest.approx(p2_noise.KP_SHRINK)
    assert fa.RULES["frozen"](every=1).part == 1  # a reading of W, new at every step
