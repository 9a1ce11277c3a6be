"""Mirror phases and delay epochs: what moves in which step, against two optimizers and autograd; stopped and
captured."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from fa import UserError
from fa.layers.feedback import generator
from fa.metrics import linear_layers
from fa.results.store import RunFolder
from fa.train import data
from fa.train import loop as train
from fa.train import step as engine
from fa.train.config import Config, parse_options
from fa.train.measure import MEASURES
from fa.train.step import Stepper

RATES = {"wm": "amp=0.3 decay=0.2", "ia": "amp=0.3 null=0.05 decay=0.2"}
BASE = Config("wm", 0, RATES["wm"], dataset="digits", hidden="16,12", epochs=3, batch=400, lr=0.05, lr_drops="1", weight_decay=1e-2,
              first_weight_decay=0.1, feedback_lr=0.08)  # fmt: skip
NOISY = replace(BASE, options="amp=0.5 decay=0.25 input=uniform", batch=64, epochs=4, alternate=2, delay_epochs=1)
# three steps an epoch; m: mirror-only, t: task-only, j: joint
PATTERNS = {
    (0, 0): "jjjjjjjjj",
    (1, 0): "mtmtmtmtm",
    (3, 0): "mtttmtttm",
    (0, 1): "mmmjjjjjj",
    (1, 1): "mmmtmtmtm",
    (3, 2): "mmmmmmttm",
}


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    with engine.numerics("cpu"):
        yield


def made(config: Config, dtype: torch.dtype = torch.float32, **stepping) -> Stepper:
    sets = data.load("digits", dtype=dtype)
    net = train.build_network(config, sets.shape, sets.classes, dtype)
    return Stepper(net, train.make_optimizer(net, config), config, sets.train, **stepping)


def epochs(stepper: Stepper, which: range) -> torch.Tensor:
    return torch.cat([stepper.epoch(e)[:, 0].clone() for e in which])


def same(a: Stepper, b: Stepper) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.net.state_dict().values(), b.net.state_dict().values()))


def by_hand(config: Config, pattern: str) -> tuple[list[torch.Tensor], list[float]]:
    """W, b and B of every layer, and the losses: stock operations, and an optimizer for each of the two parts."""
    start = train.build_network(config, (1, 8, 8), 10, torch.float64)
    own = parse_options(config.options)
    W, b, B = (
        [p.detach().clone().requires_grad_() for p in of]
        for of in zip(*[(m.weight, m.bias, m.feedback.B) for m in linear_layers(start).values()])
    )
    task, mirror = (torch.optim.SGD(of, config.lr, momentum=config.momentum) for of in ([*W, *b], B))
    split, losses = data.load("digits", dtype=torch.float64).train, []
    for step, letter in enumerate(pattern):
        epoch, i = divmod(step, 3)
        rate = 0.5 if epoch > config.delay_epochs else 1.0  # the drop after the first epoch that is not delay
        task.param_groups[0].update(lr=config.lr * rate, weight_decay=0.1 if epoch <= config.delay_epochs else 1e-2)
        mirror.param_groups[0].update(lr=config.feedback_lr * rate)
        rows = torch.randperm(len(split), generator=generator(0, "order", epoch))[400 * i : 400 * (i + 1)]
        x, objective = split.x[rows].flatten(1), torch.zeros((), dtype=torch.float64)
        for layer in range(3):
            below, V = x.detach(), W[layer].detach()
            Wx, Bx = F.linear(below, V), F.linear(below, B[layer])
            objective = objective + own["decay"] * B[layer].square().sum() - own["amp"] * (Wx * Bx).sum(1).mean()
            objective = objective + own.get("null", 0) * (Wx @ B[layer]).square().sum(1).mean()
            carried = F.linear(x, B[layer].detach())
            x = F.linear(below, W[layer], b[layer]) + carried - carried.detach()
            x = x.relu() if layer < 2 else x
        loss = F.cross_entropy(x, split.y[rows])
        losses.append(loss.item())
        for optimizer, total, letters in ((task, loss, "tj"), (mirror, objective, "mj")):
            if letter in letters:
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
    return [*W, *b, *B], losses


@pytest.mark.parametrize("rule", ["wm", "ia"])
@pytest.mark.parametrize("alternate, delay", PATTERNS)
def test_phases_are_two_optimizers_that_take_turns(rule, alternate, delay):
    config = replace(BASE, rule=rule, options=RATES[rule], alternate=alternate, delay_epochs=delay)
    stepper = made(config, torch.float64)
    losses = epochs(stepper, range(3))
    want, told = by_hand(config, PATTERNS[alternate, delay])
    layers = linear_layers(stepper.net).values()
    got = [m.weight for m in layers] + [m.bias for m in layers] + [m.feedback.B for m in layers]
    assert losses.tolist() == pytest.approx(told, rel=1e-11)
    assert all((p - q).abs().max() <= 1e-11 * q.abs().max() for p, q in zip(got, want, strict=True))


@pytest.mark.parametrize("alternate, delay", PATTERNS)
def test_what_rests_does_not_move_at_all(alternate, delay):
    """Weights, affine parameters of batch norm, feedback and every momentum; statistics of activity are followed
    throughout."""
    config = replace(BASE, options="", model="resnet8", hidden="", alternate=alternate, delay_epochs=delay)
    stepper, pattern = made(config), iter(PATTERNS[alternate, delay])

    def now():
        momenta = {n: stepper.opt.state[p].get("momentum_buffer") for n, p in stepper.net.named_parameters()}
        held = {n: v.clone() for n, v in stepper.net.state_dict().items() if v.dim()}
        return held | {f"{n} momentum": m.clone() for n, m in momenta.items() if m is not None}

    before = now()
    for epoch in range(3):
        stepper.begin(epoch)
        for _ in range(stepper.per_epoch):
            stepper.step()
            letter, after = next(pattern), now()
            for name, value in after.items():
                part = "mtj" if "running" in name else "mj" if ".feedback." in name else "tj"
                assert (name in before and torch.equal(value, before[name])) is (letter not in part), (letter, name)
            before = after
    assert len(before) > 60 and next(pattern, None) is None


def test_feedback_aligns_in_a_delay_during_which_the_network_does_not_change(monkeypatch):
    weights = []

    def keep(config, net, epoch, sets):
        weights.append([m.weight.detach().clone() for m in linear_layers(net).values()])
        return []

    monkeypatch.setitem(MEASURES, "weights", keep)
    table = train.train(replace(NOISY, alternate=0, epochs=3, measure="weights"))
    angles = table[table.metric == "angle_deg"].pivot(index="epoch", columns="layer", values="value")
    assert (angles.loc[0] > 75).all() and (angles.loc[1] < 30).all()
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1]))
    assert not any(torch.equal(a, b) for a, b in zip(weights[1], weights[2]))
    accuracy = table[table.metric == "test_accuracy"].value.tolist()
    assert accuracy[1] == accuracy[0] and accuracy[3] > accuracy[1] + 30


def test_a_run_with_phases_that_is_stopped_equals_one_that_is_not(monkeypatch):
    want, folder, reached = train.train(NOISY), RunFolder(NOISY), []
    while True:
        clock = iter(range(10**6))
        with monkeypatch.context() as patch:
            patch.setattr(train, "time", type("Clock", (), {"monotonic": staticmethod(lambda: float(next(clock)))}))
            table = train.train(NOISY, folder=folder, until=4.0)
        if table is not None:
            break
        reached.append(folder.checkpoint()["epoch"])
    assert reached == [1, 2, 3]  # after 22 steps of delay, 44 and 66: also within a cycle of three
    pd.testing.assert_frame_equal(table, want, check_exact=True)


def test_every_phase_has_a_captured_step_of_its_own():
    """In place of a CUDA graph: what was captured in a phase replays that phase, whatever the step at hand."""
    config = replace(NOISY, lr_drops="2", first_weight_decay=0.0)
    plain, stepper = made(config, capture=False), made(config, capture=True)
    captured, replayed = [], []

    def capture():
        phase = stepper.phase
        captured.append(phase)

        def replay():
            replayed.append(phase)
            stepper.phase = phase
            stepper._learn()

        return replay

    stepper._capture = capture
    # 22 steps an epoch: the delay; then task and mirror, 2 to 1; the same; and again after the drop
    for epoch, phases in enumerate((["mirror"], ["task"], [], ["mirror", "task"])):
        captured.clear()
        assert torch.equal(epochs(stepper, range(epoch, epoch + 1)), epochs(plain, range(epoch, epoch + 1)))
        assert sorted(captured) == phases
    assert len(replayed) == 4 * 22 - 2 * engine.WARM  # the first steps of each phase are eager: they make its momenta
    assert same(plain, stepper)


def test_batches_from_disk_have_phases_too():
    plain, fed = made(NOISY), made(NOISY)

    class Disk:
        def __init__(self, split):
            self.split = split

        def __len__(self):
            return len(self.split)

        def feed(self, index, seed, epoch, augment):
            return ((self.split.x[rows], self.split.y[rows]) for rows in index)

    fed = Stepper(fed.net, fed.opt, NOISY, Disk(plain.train))
    assert torch.equal(epochs(fed, range(3)), epochs(plain, range(3))) and same(plain, fed)


@pytest.mark.slow
def test_compiled_steps_have_phases_too():
    torch.compiler.reset()
    plain, compiled = made(NOISY, torch.float64), made(NOISY, torch.float64, compiled=True)
    assert torch.allclose(epochs(compiled, range(3)), epochs(plain, range(3)), rtol=1e-9)


def test_the_schedule_begins_after_the_delay():
    config = replace(BASE, lr_drops="1,2", epochs=6, delay_epochs=2)
    assert [config.schedule(e)["lr"] / config.lr for e in range(6)] == [1, 1, 1, 0.5, 0.25, 0.25]
    assert [config.schedule(e)["weight_decay"] for e in range(6)] == [0.1, 0.1, 0.1, 0.01, 0.01, 0.01]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"alternate": -1}, "alternate=-1 is out of range"),
        ({"delay_epochs": -2}, "delay_epochs=-2 is out of range"),
        ({"delay_epochs": 3, "epochs": 3}, "leaves none of 3 epochs to the task"),
        *(
            ({"rule": rule, "options": "", "alternate": 1}, f"teach {rule} nothing")
            for rule in ("bp", "fa", "dfa", "kp", "pfa", "frozen")
        ),
        ({"rule": "pfa", "options": "implicit=true", "delay_epochs": 1}, "teach pfa nothing"),
        ({"options": "clamp_forward=true", "alternate": 1}, "clamp_forward moves W"),
    ],
)
def test_phases_that_cannot_be_are_refused_at_once(fields, words, tmp_path):
    with pytest.raises(UserError, match=words):
        replace(BASE, **fields)
    assert not list(tmp_path.iterdir())
    for rule in ("ia", "sa", "aa", "primitives"):
        replace(BASE, rule=rule, options="", alternate=1, delay_epochs=1)
