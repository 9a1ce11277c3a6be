"""The training step: compiled, captured, in reduced precision, augmented; all against the eager step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fa
from fa import UserError
from fa.layers.feedback import generator
from fa.train import data
from fa.train import loop as train
from fa.train import step as engine
from fa.train.config import Config
from fa.train.step import Stepper

MLP = Config("bp", 0, dataset="digits", hidden="32,32", epochs=3, lr=0.05, lr_drops="2", first_weight_decay=0.01)
CONV = replace(MLP, model="resnet8", hidden="", epochs=2, batch=128, lr=0.1, augment=True)
OPTIONS = {"pfa": "implicit=true", "pfa_o": "implicit=true"}


def of(base: Config, rule: str, seed: int = 0) -> Config:
    return replace(base, rule=rule, seed=seed, options=OPTIONS.get(rule, ""))


@pytest.fixture(autouse=True)
def one_thread():
    with engine.numerics("cpu"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o"])
def test_compiled_steps_agree_with_eager_ones(rule):
    sets, losses = data.load("digits", dtype=torch.float64), []
    for compiled in (False, True):
        torch.compiler.reset()
        with engine.numerics("cpu"):
            net = train.build_network(of(CONV, rule), sets.shape, 10, torch.float64)
            stepper = Stepper(net, train.make_optimizer(net, of(CONV, rule)), of(CONV, rule), sets.train, compiled)
            losses.append(torch.cat([stepper.epoch(e).clone() for e in (0, 1)]))
    assert len(losses[0]) == 22 and torch.allclose(*losses, rtol=1e-9)


@pytest.mark.parametrize("rule", ["bp", "pfa"])
def test_reduced_precision_learns_the_same_within_its_rounding(rule):
    config = replace(of(CONV, rule), epochs=3, lr=0.02, augment=False)
    full, half = (
        train.train(replace(config, precision=p)).query("metric == 'train_loss'").value.to_numpy()
        for p in ("float32", "bfloat16")
    )
    assert (full != half).all()  # it is another arithmetic
    assert half == pytest.approx(full, rel=0.05)
    assert half[-1] < 0.7 * half[0]  # and it learns


def test_a_precision_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="float32, bfloat16"):
        replace(MLP, precision="fp16")


def test_the_augmentation_of_an_epoch_is_the_one_that_draw_crops_drew():
    """What a step sees is the crop of the batch's images that ``fa.data.draw_crops`` drew for the whole epoch."""
    seen, split = [], data.load("digits").train

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(64, 10)

        def forward(self, x):
            seen.append(x.clone())
            return self.fc(x.flatten(1))

    net = Net()
    Stepper(net, train.make_optimizer(net, CONV), CONV, split).epoch(1)
    order = torch.randperm(len(split), generator=generator(0, "order", 1))[: 11 * 128]
    images, draws = split.x[order], data.draw_crops(11 * 128, generator(0, "augment", 1))
    black = data.SETS["digits"].black[0]
    got = torch.cat(seen)
    for i in (0, 1, 127, 128, 700, 11 * 128 - 1):
        padded = F.pad(images[i], (4, 4, 4, 4), value=black)
        down, right, mirrored = draws[:, i].tolist()
        want = padded[:, down : down + 8, right : right + 8]
        assert torch.equal(got[i], want.flip(-1) if mirrored else want)
    plain = replace(CONV, augment=False)
    seen.clear()
    Stepper(net, train.make_optimizer(net, plain), plain, split).epoch(1)
    assert torch.equal(torch.cat(seen), images)


@pytest.mark.parametrize("rule", ["sa", "kp"])
def test_the_feedbacks_own_learning_rate(rule):
    config = replace(of(MLP, rule), feedback_lr=0.2, lr=0.05)
    net = train.build_network(config, (1, 8, 8), 10)
    opt = train.make_optimizer(net, config)
    stepper, learned = (
        Stepper(net, opt, config, data.load("digits").train),
        {id(p) for p in fa.feedback_parameters(net)},
    )
    for epoch, drop in enumerate((1, 1, 0.5)):
        stepper.begin(epoch)
        for group in opt.param_groups:
            for p in group["params"]:
                own = rule == "sa" and id(p) in learned
                assert group["lr"] == pytest.approx((0.2 if own else 0.05) * drop)


class Recorder:
    """In place of a CUDA graph: counts captures, and replays by taking the step."""

    def __init__(self, stepper):
        self.stepper, self.captures, self.replays = stepper, 0, 0

    def capture(self):
        self.captures += 1

        def replay():
            self.replays += 1
            self.stepper._learn()

        return replay


def test_a_step_is_captured_once_it_is_warm_and_again_when_the_schedule_changes():
    split, config = data.load("digits").train, of(MLP, "pfa")
    nets = [train.build_network(config, (1, 8, 8), 10) for _ in range(2)]
    plain, captured = (
        Stepper(n, train.make_optimizer(n, config), config, split, capture=c) for n, c in zip(nets, (False, True))
    )
    recorder = Recorder(captured)
    captured._capture = recorder.capture
    for epoch, captures in ((0, 1), (1, 2), (1, 2), (2, 3)):  # the first epoch's decay, then none, then the rate drops
        want, got = plain.epoch(epoch), captured.epoch(epoch)
        assert torch.equal(got, want)
        assert recorder.captures == captures
    assert recorder.replays == 4 * 22 - engine.WARM
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values()))


def test_rules_that_act_between_steps_are_never_captured():
    for rule, acts in (("brsf", True), ("frozen", True), ("fa", False), ("pfa", False), ("bp", False)):
        net = train.build_network(of(MLP, rule), (1, 8, 8), 10)
        assert engine.acts_between_steps(net) is acts
    assert engine.acts_between_steps(fa.convert(train.build_network(MLP, (1, 8, 8), 10), "fa", clamp_forward=True))


def test_a_checkpoint_in_another_memory_layout_goes_on_the_same(tmp_path):
    """On CUDA weights are channels_last; fused SGD reads momenta as they lie in memory."""
    config = replace(CONV, epochs=2)
    sets = data.load("digits")
    nets = [train.build_network(config, sets.shape, 10) for _ in range(2)]
    opts = [train.make_optimizer(net, config) for net in nets]
    for net, opt in zip(nets, opts):
        Stepper(net, opt, config, sets.train).epoch(0)

    class Elsewhere:
        path = tmp_path

        def checkpoint(self):
            state = {
                "epoch": 1,
                "rows": [],
                "seconds": 0.0,
                "net": nets[0].state_dict(),
                "optimizer": opts[0].state_dict(),
            }
            for kept in state["optimizer"]["state"].values():
                m = kept["momentum_buffer"]
                kept["momentum_buffer"] = m.contiguous(memory_format=torch.channels_last) if m.dim() == 4 else m
            return state

        def save(self, state):
            raise AssertionError("nothing is saved in time")

    table = train.train(config, folder=Elsewhere())
    want = Stepper(nets[1], opts[1], config, sets.train).epoch(1).mean().item()
    assert table[table.metric == "train_loss"].value.tolist() == [want]


def test_noise_of_another_kind_of_device_starts_anew_on_this_one():
    net = train.build_network(replace(MLP, rule="wm", options="input=normal"), (1, 8, 8), 10)
    state = net.state_dict()
    elsewhere = {k: torch.zeros(16, dtype=torch.uint8) if k.endswith("_extra_state") else v for k, v in state.items()}
    net.load_state_dict(elsewhere)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
