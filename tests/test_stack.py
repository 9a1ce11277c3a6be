"""Stacks: runs trained as groups of one network, against the same runs trained alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fa
from fa import UserError, experiments, models
from fa.results import runs as campaign
from fa.results.store import RunFolder
from fa.train import data, stack
from fa.train import loop as train
from fa.train import step as engine
from fa.train.config import Config
from fa.train.loop import Run
from fa.train.step import Stepper

BASE = Config("bp", 0, dataset="digits", model="resnet8", hidden="", epochs=2, batch=128, lr=0.1, lr_drops="2",
              first_weight_decay=0.01, augment=True)  # fmt: skip
RULES = [
    ("bp", ""), ("fa", ""), ("fa", "density=0.5"), ("usf", ""), ("usf", "concordance=0.7"), ("frsf", ""), ("kp", ""), ("kp", "density=0.5"), ("pfa", ""),
    ("pfa", "implicit=true"), ("pfa", "density=0.3 expansion=4"), ("pfa_o", ""), ("pfa_o", "implicit=true"),
]  # fmt: skip


def runs(rules, seeds):
    return [replace(BASE, rule=rule, options=options, seed=seed) for rule, options in rules for seed in seeds]


@pytest.fixture(autouse=True)
def one_thread():
    with engine.numerics("cpu"):
        yield


def trained_alone(configs, sets, epochs=(0, 1)):
    """(losses, network, optimizer) of every run."""
    made = []
    for config in configs:
        net = train.build_network(config, sets.shape, 10, torch.float64)
        opt = train.make_optimizer(net, config)
        stepper = Stepper(net, opt, config, sets.train)
        made.append((torch.cat([stepper.epoch(e, 3)[:, 0].clone() for e in epochs]), net, opt))
    return made


def started(config, sets):
    """A run whose network, of float64, and optimizer are made."""
    run = Run(config)
    run.net = train.build_network(config, sets.shape, 10, torch.float64)
    run.opt = train.make_optimizer(run.net, config)
    return run


def stacked(configs, sets, compiled=False):
    """A stack, its steps, and the runs' networks and optimizers."""
    members = [started(c, sets) for c in configs]
    whole, opt = stack.join(members, sets.shape, 10)
    stepper = Stepper(whole, opt, configs[0], sets.train, compiled, seeds=[c.seed for c in configs])
    return whole, stepper, [r.net for r in members], [r.opt for r in members]


def agree(configs, sets, compiled=False):
    alone = trained_alone(configs, sets)
    whole, stepper, nets, opts = stacked(configs, sets, compiled)
    losses = torch.cat([stepper.epoch(e, 3).clone() for e in (0, 1)])
    assert torch.allclose(losses, torch.stack([a[0] for a in alone], 1), rtol=1e-10, atol=0)
    for (_, net, opt), mine, own in zip(alone, nets, opts):
        for (name, want), got in zip(net.state_dict().items(), mine.state_dict().values()):
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-11), name
        for want, got in zip(opt.state_dict()["state"].values(), own.state_dict()["state"].values()):
            assert torch.allclose(got["momentum_buffer"], want["momentum_buffer"], rtol=1e-9, atol=1e-11)
    want = [train.accuracies(net, sets.test)[0] for _, net, _ in alone]
    got = train.accuracies(whole, sets.test, len(configs), 100)
    assert got == want == [train.accuracies(net, sets.test)[0] for net in nets]


# one rule of each kind of feedback here: fixed, of the weight's signs, learned
FEW = [RULES[i] for i in (1, 4, 8)]


@pytest.mark.parametrize("rule", [
    pytest.param(r, id=" ".join(r), marks=() if r in FEW else pytest.mark.slow) for r in RULES
])  # fmt: skip
def test_runs_in_a_stack_are_those_trained_alone(rule):
    agree(runs([rule], (0, 1, 2)), data.load("digits", dtype=torch.float64))


@pytest.mark.slow
def test_rules_side_by_side():
    mixed = runs([RULES[i] for i in (0, 3, 6)], (0, 3)) + runs([RULES[11]], (1,))
    agree(mixed, data.load("digits", dtype=torch.float64))


@pytest.mark.slow
def test_a_compiled_stack():
    torch.compiler.reset()
    agree(runs([RULES[i] for i in (0, 1, 3, 5, 8)], (0, 1)), data.load("digits", dtype=torch.float64), compiled=True)


def test_a_run_that_diverges_does_not_touch_those_beside_it_here():
    """On the CPU groups are computed apart; elsewhere that is not promised, see ``fa.train.loop.StackDiverged``."""
    sets = data.load("digits", dtype=torch.float64)
    configs = runs([("bp", "")], (0, 1))
    _, stepper, nets, _ = stacked(configs, sets)
    with torch.no_grad():
        nets[0].conv1.weight.mul_(float("nan"))
    losses = stepper.epoch(0, 3)
    want = trained_alone(configs[1:], sets, (0,))[0][0]
    assert losses[:, 0].isnan().all() and torch.allclose(losses[:, 1], want, rtol=1e-10)


def test_what_can_be_stacked():
    def alike(a, b):
        return stack.key(a) is not None and stack.key(a) == stack.key(b)

    assert alike(BASE, replace(BASE, rule="pfa", options="implicit=true", seed=3))
    assert not alike(BASE, replace(BASE, first_weight_decay=0.02))
    for change in (
        {"rule": "dfa"}, {"rule": "wm"}, {"rule": "brsf"}, {"model": "mlp", "hidden": "16"}, {"model": "resnet18"},
        {"rule": "fa", "options": "norm=track"}, {"rule": "fa", "options": "clamp_forward=true"}, {"rule": "fa", "options": "form=dense"},
        {"rule": "usf", "options": "scale=track"}, {"rule": "usf", "options": "scale=0.1"},
        {"rule": "pfa", "options": "implicit=true density=0.5"}, {"rule": "pfa", "options": "implicit=first"},
        {"dataset": "tiny-imagenet-20"},
    ):  # fmt: skip
        assert stack.key(replace(BASE, **change)) is None
    assert models.is_cifar_resnet("resnet20") and not models.is_cifar_resnet("resnet18")


def test_a_rule_of_the_users_own_is_not_stacked_for_its_name(monkeypatch):
    monkeypatch.setitem(fa.RULES, "fa", type("Mine", (fa.RULES["fa"],), {}))
    assert stack.key(replace(BASE, rule="fa")) is None


def close(got, want):
    """Two tables of one run: the same rows, and numbers that differ by float32's rounding."""
    columns = ["epoch", "layer", "metric"]
    assert got[columns].astype(str).values.tolist() == want[columns].astype(str).values.tolist()
    angles = want.metric.str.contains("angle")
    exact = want.metric.str.contains("accuracy")
    assert exact.any() and np.abs(got.value - want.value)[exact].max() < 0.6  # two of 360 images
    assert np.allclose(got.value[~angles & ~exact], want.value[~angles & ~exact], rtol=2e-3)
    assert not angles.any() or np.nanmax(np.abs(got.value - want.value)[angles]) < 0.5


def test_runs_are_grouped_by_what_they_share():
    bp, dfa, pfa, other = (
        runs([(rule, options)], range(2)) for rule, options in (*RULES[:1], ("dfa", ""), RULES[8], RULES[0])
    )
    other = [replace(c, lr=0.2) for c in other]
    mixed = [pfa[0], dfa[0], bp[0], other[0], pfa[1], bp[1], dfa[1], other[1]]
    assert stack.groups(mixed, 15) == [[*bp, *pfa], other, dfa[:1], dfa[1:]]
    assert stack.groups(mixed, 3) == [[bp[0], *pfa], other, bp[1:], dfa[:1], dfa[1:]]
    assert stack.groups(mixed, 1) == [[c] for c in mixed]  # in their order
    drawn = experiments.plan("p3_fig3", "quick")[:1]
    assert stack.groups([*drawn, *bp], 15) == [bp, drawn]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Only a GPU stacks, so this CPU is told to; yields the sizes of what is trained as one."""
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    sizes, real = [], campaign.train_runs

    def counted(members, device, *args):
        sizes.append(len(members))
        return real(members, "cpu", *args)

    monkeypatch.setattr(campaign, "train_runs", counted)
    monkeypatch.setattr(campaign, "pick_device", lambda device, needed=True: "meta")
    return sizes


def test_a_campaign_that_stacks_gives_the_tables_of_one_that_does_not(here, monkeypatch):
    """With a stop and a resumption."""
    configs = [
        replace(c, epochs=1, lr=0.005) for c in runs([("bp", ""), ("dfa", ""), ("pfa", "implicit=true")], (0, 1))
    ]
    want = [train.train(c) for c in configs]
    plain = {"workers": 1, "progress": False, "compiled": False}
    stacks = campaign.train_runs
    with monkeypatch.context() as patch:  # time is up as soon as they have begun
        patch.setattr(campaign, "train_runs", lambda runs, device, until, *more: stacks(runs, device, 0.0, *more))
        stopped = campaign.run(configs, **plain)
    assert stopped.left == len(configs) and here == [4, 1, 1]
    assert campaign.run(configs, **plain).left == 0
    assert here[3:] == [4, 1, 1]
    for config, table in zip(configs, want):
        folder = RunFolder(config)
        close(folder.table(), table)
        assert folder.status["state"] == "finished"


def test_a_stack_with_a_loss_that_is_not_finite_is_taken_apart(monkeypatch):
    members = [Run(c) for c in runs([("bp", "")], (0, 1))]
    monkeypatch.setattr(
        Stepper, "epoch", lambda self, epoch, seen: torch.full((3, 2), float("nan"), dtype=torch.float64)
    )
    with pytest.raises(train.StackDiverged):
        train.train_runs(members)


def test_a_stack_whose_last_step_spoilt_a_weight_is_taken_apart_before_it_is_saved(monkeypatch, tmp_path):
    saved = []
    folder = SimpleNamespace(save=saved.append, checkpoint=lambda: None, path=tmp_path)
    members = [Run(c, folder) for c in runs([("bp", "")], (0, 1))]

    def epoch(self, epoch, seen):
        with torch.no_grad():
            self.net.conv1.weight[0] = float("nan")
        return torch.ones(3, 2, dtype=torch.float64)

    monkeypatch.setattr(Stepper, "epoch", epoch)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=itertools.count(0, 100).__next__))
    # a checkpoint is due after every epoch
    with pytest.raises(train.StackDiverged):
        train.train_runs(members)
    assert not saved


@pytest.mark.parametrize("error", [RuntimeError("out of memory, say"), train.StackDiverged()])
def test_what_fails_as_a_stack_is_tried_apart_and_a_broken_checkpoint_is_its_runs_own(error, here, monkeypatch, capsys):
    configs = [replace(c, epochs=1) for c in runs([("bp", "")], (0, 1, 2))]
    folders = [RunFolder(c) for c in configs]
    broken = folders[2].path / "checkpoint.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"nothing")
    trained = campaign.train_runs

    def failing(members, device, *args):
        if len(members) > 1:
            here.append(len(members))
            raise error
        return trained(members, device, *args)

    monkeypatch.setattr(campaign, "train_runs", failing)
    with pytest.raises(UserError, match="delete .* from its beginning"):
        campaign.run_one(configs, "meta")
    assert here == [2, 1, 1] and [f.finished for f in folders] == [True, True, False]
    assert ("out of memory, say" in capsys.readouterr().err) is isinstance(error, RuntimeError)


@pytest.mark.slow
def test_a_stack_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    """Bit for bit as a stack; its runs alone but for float32's rounding. Their seconds add up."""
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    configs = [replace(c, lr=0.001) for c in runs([("bp", ""), ("kp", ""), ("pfa_o", "implicit=true")], (0, 1))]
    folders = [RunFolder(c) for c in configs]
    want = train.train_runs([Run(c) for c in configs])
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    real = Stepper.epoch

    def later(self, epoch, seen):
        now[0] = 12.0
        return real(self, epoch, seen=seen)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "epoch", later)
        first = train.train_runs([Run(c, f) for c, f in zip(configs, folders)], until=12.0)
    assert first == [None] * 6  # an epoch of 12 seconds would not fit a second time
    begun = [f.checkpoint() for f in folders]
    assert {(s["epoch"], s["seconds"]) for s in begun} == {(1, 2.0)}
    assert all(any(m["momentum_buffer"].any() for m in s["optimizer"]["state"].values()) for s in begun)
    for got, whole in zip(train.train_runs([Run(c, f) for c, f in zip(configs, folders)]), want):
        assert got.equals(whole) and got.attrs["status"]["seconds"] == 2.0
    for config, folder, whole in zip(configs, folders, want):
        close(train.train(config, folder=folder), whole)
