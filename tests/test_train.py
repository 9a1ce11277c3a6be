"""Training: what makes a run the same run, stopped or killed, here or there; and what its numbers are a function of."""

import hashlib
import os
import signal
import subprocess
import sys
import types
from dataclasses import fields, replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import fa
from fa.layers.feedback import generator
from fa.metrics import linear_layers
from fa.paths import read_csv, write_bytes
from fa.results import records
from fa.results.store import RunFolder
from fa.train import data
from fa.train import loop as train
from fa.train import step as engine
from fa.train.config import Config, parse_options

TINY = Config("pfa", 0, "init=xavier implicit=true", "digits", hidden="16,16", epochs=5, batch=64, lr=0.05, lr_drops="2,4",
              weight_decay=1e-3, first_weight_decay=0.1)  # fmt: skip


class Clock:
    """A clock that jumps at every look, in place of waiting."""

    def __init__(self, jump):
        self.now, self.jump = 0.0, jump

    def monotonic(self):
        self.now += self.jump
        return self.now


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("FA_RUNS", str(tmp_path))


@pytest.fixture(scope="module")
def undisturbed():
    """Tables of runs that nobody stopped, by rule."""
    made = {}

    def get(rule):
        if rule not in made:
            made[rule] = train.train(replace(TINY, rule=rule, options=OPTIONS[rule]))
        return made[rule]

    return get


OPTIONS = {"bp": "", "pfa": TINY.options, "kp": "init=xavier", "brsf": "", "dfa": "init=xavier", "fa": ""}


def steps(net, opt, config, split, epoch, limit=None):
    """The losses of an epoch, or of its first batches."""
    return engine.Stepper(net, opt, config, split).epoch(epoch, limit)[:, 0].clone()


def same(a, b):
    pd.testing.assert_frame_equal(a, b, check_exact=True)


# ------------------------------------------------------------------------------------------ stopping and going on


@pytest.mark.parametrize("rule", ["bp", "pfa", "kp", "brsf", "adam"])
def test_a_run_that_is_stopped_several_times_equals_one_that_is_not(rule, undisturbed, monkeypatch):
    config = replace(TINY, rule="kp" if rule == "adam" else rule, options=OPTIONS.get(rule, ""))
    if rule == "adam":
        config = replace(config, optimizer="adam", first_steps="1,3", keep=True)
    want = train.train(config) if rule == "adam" else undisturbed(rule)
    folder, stops = RunFolder(config), 0
    while True:
        torch.manual_seed(stops)  # the state of the global generator is none of a run's business
        clock = Clock(1.0)
        monkeypatch.setattr(train, "time", clock)
        table = train.train(config, folder=folder, until=6.5)  # an epoch or two
        monkeypatch.undo()
        if table is not None:
            break
        stops += 1
        assert stops < 10 and folder.checkpoint()["epoch"] >= 1 and not folder.finished
    assert stops >= 2
    same(table, want)
    assert table.attrs["status"]["state"] == "finished"


KILLED = """
import os, signal, sys, types
from dataclasses import replace
from fa.results import runs as campaign
from fa.train import step as engine
from fa.train import loop as train
sys.path.insert(0, {tests!r})
from test_train import TINY, Clock
kill, begin = {kill}, engine.Stepper.begin
def deadly(self, epoch):
    if epoch == kill:
        os.kill(os.getpid(), {signal})
    return begin(self, epoch)
if kill:
    engine.Stepper.begin = deadly
train.time = Clock(31.0)  # a checkpoint after every epoch
summary = campaign.run([TINY], workers=1, device="cpu", progress=False)
print(summary.done, summary.left)
"""


def test_a_process_that_is_killed_and_started_again_ends_with_the_same_numbers(undisturbed, tmp_path):
    folder = RunFolder(TINY)
    for kill, epochs in ((3, 3), (0, None)):
        code = KILLED.format(tests=os.path.dirname(__file__), kill=kill, signal=int(signal.SIGKILL))
        done = subprocess.run([sys.executable, "-c", code], cwd=fa.ROOT, capture_output=True, text=True, timeout=300)
        if kill:
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert folder.checkpoint()["epoch"] == epochs and not folder.finished
        else:
            assert done.returncode == 0, done.stderr
            assert done.stdout.split() == ["1", "0"]
    assert folder.finished and folder.status["state"] == "finished"
    assert not (folder.path / "checkpoint.pt").exists()
    table, want = folder.table(), undisturbed("pfa")
    assert set(table.columns) == set(records.COLUMNS)
    want = want.assign(depth=want.depth.astype("Int64"))
    same(table[want.columns], want)
    assert [p.name for p in folder.path.glob(".*")] == []  # nothing half-written is left behind


def test_training_twice_gives_the_same_table(undisturbed):
    torch.manual_seed(17)
    torch.rand(3)
    same(train.train(TINY), undisturbed("pfa"))


def test_the_number_of_threads_does_not_matter_and_is_restored(undisturbed):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        same(train.train(TINY), undisturbed("pfa"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_damaged_checkpoint_raises():
    folder = RunFolder(TINY)
    assert folder.checkpoint() is None
    folder.save({"epoch": 1, "rows": [], "seconds": 0.0, "net": {}, "optimizer": {}})
    assert folder.checkpoint()["epoch"] == 1
    path = folder.path / "checkpoint.pt"
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], b"", whole[65:]):
        path.write_bytes(damaged)
        with pytest.raises(fa.UserError, match="checkpoint.pt.*checksum; delete .* from its beginning"):
            train.train(TINY, folder=folder)
    path.unlink()
    assert folder.checkpoint() is None


def test_a_run_that_diverges_is_recorded_as_such():
    config = replace(TINY, rule="bp", options="", lr=1e30)
    table = train.train(config)
    status = table.attrs["status"]
    losses = steps(*started(config), config, data.load("digits").train, 0)
    first = int((~torch.isfinite(losses)).nonzero()[0]) + 1
    assert (status["state"], status["epoch"], status["step"]) == ("diverged", 1, first) and first > 1
    assert len(losses) == first < 1437 // config.batch, "training ends at that step"
    assert set(table.epoch) == {0} and table.value.notna().all()
    folder = RunFolder(config)
    folder.finish(table, status)
    assert folder.finished and folder.status["state"] == "diverged"


def started(config):
    net = train.build_network(config, (1, 8, 8), 10)
    return net, train.make_optimizer(net, config)


def test_a_run_whose_last_step_spoils_a_weight_diverged(monkeypatch):
    """No loss has seen the weights after the last step of the last epoch."""
    config, real = replace(TINY, rule="bp", options="", epochs=2), engine.Stepper.epoch

    def spoilt(self, epoch, seen):
        losses = real(self, epoch, seen=seen)
        if epoch == 1:
            with torch.no_grad():
                next(self.net.parameters()).view(-1)[0] = torch.nan
        return losses

    monkeypatch.setattr(engine.Stepper, "epoch", spoilt)
    table = train.train(config)
    status, steps_an_epoch = table.attrs["status"], 1437 // config.batch
    assert (status["state"], status["epoch"], status["step"]) == ("diverged", 2, steps_an_epoch)
    assert table.epoch.max() == 1


def test_progress_is_written_after_every_epoch(monkeypatch):
    """A line an epoch, in the run's folder; epochs that a killed process trained after its last checkpoint are
    written once."""
    config = replace(TINY, epochs=3)
    folder = RunFolder(config)
    table = train.train(config, folder=folder)
    lines = read_csv(folder.path / "progress.csv", header=0)
    assert lines.columns.tolist() == list(train.PROGRESS) and lines.epoch.tolist() == [1, 2, 3]
    for metric in ("train_loss", "test_accuracy"):
        want = table[(table.layer == "") & (table.metric == metric) & (table.epoch > 0)]
        assert lines[metric].tolist() == want.value.tolist()
    assert lines.train_accuracy.isna().tolist() == [True, True, False] and (lines.seconds >= 0).all()
    angles = table[(table.metric == "angle_deg") & (table.epoch == 3)].value.round(2)
    assert list(map(float, lines.angles.iloc[-1].split())) == angles.tolist()
    monkeypatch.setattr(train, "time", Clock(1.0))
    assert train.train(config, folder=folder, until=4.0) is None  # no checkpoint: from the beginning
    assert pd.read_csv(folder.path / "progress.csv").epoch.tolist() == [1] and folder.checkpoint()["epoch"] == 1


# ------------------------------------------------------------------------------------------ what the numbers are a function of


def test_the_same_seed_gives_the_same_start_and_the_same_batches_under_every_rule():
    """With a learning rate of zero the loss of every batch tells its images and the initial weights."""
    digits = data.load("digits").train

    def losses(rule, seed):
        config = replace(TINY, rule=rule, seed=seed, options="", lr=0.0, weight_decay=0.0, first_weight_decay=0.0)
        net = train.build_network(config, (1, 8, 8), 10)
        W = [m.weight.detach().clone() for m in linear_layers(net).values()]
        with engine.numerics("cpu"):
            return W, torch.cat(
                [steps(net, train.make_optimizer(net, config), config, digits, epoch, 6) for epoch in (0, 1)]
            )

    W, want = losses("bp", 0)
    assert not torch.equal(want[:6], want[6:])  # every epoch has an order of its own
    for rule in ("fa", "dfa", "usf", "kp", "pfa", "pfa_o"):
        weights, got = losses(rule, 0)
        assert all(torch.equal(a, b) for a, b in zip(weights, W)) and len(weights) == 3
        assert torch.equal(got, want), rule
    weights, got = losses("bp", 1)
    assert not torch.equal(weights[0], W[0]) and not torch.equal(got, want)


def test_an_epoch_sees_every_image_once():
    seen = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(1, 2)

        def forward(self, x):
            seen.extend(x.flatten().tolist())
            return self.fc(x)

    split = data.Split(torch.arange(50.0).view(-1, 1), torch.zeros(50, dtype=torch.int64))
    net, config = Net(), replace(TINY, batch=8, lr=0.0)
    losses = steps(net, train.make_optimizer(net, config), config, split, 0)
    assert len(losses) == 6 and len(seen) == 48 == len(set(seen))  # the last, smaller batch is dropped
    assert seen != sorted(seen)


def test_first_steps_by_hand():
    """SGD with momentum and decay as torch documents it, on the network that ``build_network`` makes, without
    ``fa.train``'s loop."""
    config = replace(TINY, rule="bp", options="")
    digits = data.load("digits", dtype=torch.float64).train
    net = train.build_network(config, (1, 8, 8), 10, torch.float64)
    other = train.build_network(config, (1, 8, 8), 10, torch.float64)
    assert all(m.bias.abs().max() == 0 for m in linear_layers(net).values())
    std = [m.weight.std().item() * (sum(m.weight.shape) / 2) ** 0.5 for m in linear_layers(net).values()]
    assert std == pytest.approx([1, 1, 1], rel=0.12)  # Xavier
    losses = steps(net, train.make_optimizer(net, config), config, digits, 0, 3)
    order = torch.randperm(len(digits), generator=generator(0, "order", 0))
    speed = {n: torch.zeros_like(p) for n, p in other.named_parameters()}
    for i in range(3):
        index = order[64 * i : 64 * (i + 1)]
        other.zero_grad()
        loss = F.cross_entropy(other(digits.x[index]), digits.y[index])
        assert losses[i].item() == pytest.approx(loss.item(), rel=1e-12)
        loss.backward()
        with torch.no_grad():
            for n, p in other.named_parameters():
                speed[n] = 0.9 * speed[n] + p.grad + 0.1 * p  # the first epoch's decay
                p -= 0.05 * speed[n]
    assert all((p - q).abs().max() < 1e-13 for p, q in zip(net.parameters(), other.parameters()))


def test_adam_by_hand():
    """Adam with its bias corrections and L2 decay as Kingma and Ba write it, on learned feedback too."""
    config = replace(TINY, rule="kp", options="", optimizer="adam", weights="torch", first_weight_decay=0.0)
    digits = data.load("digits", dtype=torch.float64).train
    net, other = (train.build_network(config, (1, 8, 8), 10, torch.float64) for _ in range(2))
    for m in linear_layers(net).values():  # PyTorch's own bounds, biases too
        bound = m.in_features**-0.5
        assert 0.9 * bound < max(m.weight.abs().max(), m.bias.abs().max()) <= bound and m.bias.abs().max() > 0.3 * bound
    steps(net, train.make_optimizer(net, config), config, digits, 0, 3)
    order = torch.randperm(len(digits), generator=generator(0, "order", 0))
    params = dict(other.named_parameters())
    m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for i in range(3):
        index = order[64 * i : 64 * (i + 1)]
        other.zero_grad()
        F.cross_entropy(other(digits.x[index]), digits.y[index]).backward()
        with torch.no_grad():
            for n, p in params.items():
                g = p.grad + 1e-3 * p
                m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g**2
                p -= 0.05 * (m[n] / (1 - 0.9 ** (i + 1))) / ((v[n] / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
    assert len(params) == 9 and all((p - params[n]).abs().max() < 1e-12 for n, p in net.named_parameters())


def test_what_is_exact_under_sgd_alone_is_refused_under_adam():
    with pytest.raises(fa.UserError, match="implicit feedback of pfa is exact only under SGD, not adam"):
        replace(TINY, optimizer="adam")
    with pytest.raises(fa.UserError, match="unknown optimizer 'rmsprop'; known: sgd, adam"):
        replace(TINY, optimizer="rmsprop")
    with pytest.raises(fa.UserError, match="unknown weights 'lecun'; known: xavier, torch, he"):
        replace(TINY, weights="lecun")
    with pytest.raises(fa.UserError, match="implicit feedback of pfa follows SGD alone, not noise"):
        replace(TINY, update_noise=0.1)


def test_layers_within_the_first_epoch_are_measured_and_nothing_else_changes(undisturbed):
    table = train.train(replace(TINY, rule="fa", options="", first_steps="2,11"))
    early = table[table.epoch % 1 != 0]
    assert sorted(set(early.epoch)) == [2 / 22, 11 / 22] and set(early.layer) == {"fc1", "fc2", "fc"}
    rest = table[table.epoch % 1 == 0].reset_index(drop=True)
    same(rest.astype({"epoch": int}), undisturbed("fa"))
    start, then = (table[(table.epoch == e) & (table.metric == "weight_norm")].value.to_numpy() for e in (0, 2 / 22))
    assert (abs(then - start) > 1e-4).all()


def test_the_chosen_epoch_is_the_first_of_the_best_validation_accuracy():
    def rows(metric, values):
        return [[e, "", None, metric, v] for e, v in enumerate(values)]

    val, test = rows("val_accuracy", [10.0, 40.0, 50.0, 50.0]), rows("test_accuracy", [9.0, 41.0, 48.0, 52.0])
    layers = [[3, "fc", 1, "val_accuracy_of_a_layer", 99.0]]
    want = [[3, "", None, "chosen_epoch", 2.0], [3, "", None, "chosen_test_accuracy", 48.0]]
    assert train.chosen_rows(val + test + layers, 3) == want
    assert train.chosen_rows(test, 3) == [] and train.chosen_rows(val + test[:2], 3) == []


def test_kept_weights_are_the_trained_ones():
    config = replace(TINY, rule="fa", options="", keep=True, epochs=1)
    run = train.Run(config, RunFolder(config))
    train.train_runs([run])
    kept = RunFolder(config).weights()
    assert set(kept) == {f"{layer}.{p}" for layer in ("fc1", "fc2", "fc") for p in ("weight", "bias")}
    assert all(torch.equal(kept[n], p) for n, p in run.net.named_parameters())
    with pytest.raises(fa.UserError, match="weights.pt is not there"):
        RunFolder(replace(config, keep=False)).weights()


def test_schedule():
    told = [TINY.schedule(e) for e in range(5)]
    assert [s["lr"] for s in told] == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.0125])
    assert [s["weight_decay"] for s in told] == [0.1, 1e-3, 1e-3, 1e-3, 1e-3]
    constant = replace(TINY, lr_drops="", first_weight_decay=0.0)
    assert all(constant.schedule(e) == {"lr": 0.05, "weight_decay": 1e-3} for e in range(5))
    paper = Config("pfa", 0, weight_decay=9e-5, first_weight_decay=0.03)  # the authors' configuration
    assert paper.schedule(0) == {"lr": 0.01, "weight_decay": 0.03}
    assert paper.schedule(1) == {"lr": 0.01, "weight_decay": 9e-5}
    assert paper.schedule(20) == {"lr": 0.005, "weight_decay": 9e-5}
    assert paper.schedule(39) == {"lr": 0.0025, "weight_decay": 9e-5}


def test_what_is_measured_when():
    assert train.layer_epochs(40) == {*range(11), 15, 20, 25, 30, 35, 40}
    assert train.layer_epochs(12) == {*range(11), 12}
    assert train.layer_epochs(3) == {0, 1, 2, 3}
    mnist, sets = Config("bp", 0), data.load("digits")  # 40 epochs, no validation images
    looked = {e: set(train.splits_to_measure(sets, mnist, e)) for e in range(41)}
    assert all("test_accuracy" in found for found in looked.values())
    assert [e for e, found in looked.items() if "train_accuracy" in found] == [0, 10, 20, 30, 40]
    table = train.train(replace(TINY, epochs=2))
    whole = table[table.layer == ""]
    assert set(whole[whole.metric == "train_loss"].epoch) == {1, 2}
    assert set(whole[whole.metric == "test_accuracy"].epoch) == {0, 1, 2}
    assert set(whole[whole.metric == "train_accuracy"].epoch) == {0, 2}
    assert whole.depth.isna().all()
    layers = table[table.layer != ""]
    assert layers.groupby("layer").depth.unique().map(list).to_dict() == {"fc1": [1], "fc2": [2], "fc": [3]}
    assert set(layers.metric) == {
        "angle_deg", "norm_ratio", "sign_concordance", "weight_norm", "delta_angle_local_deg", "delta_angle_global_deg",
        "grad_angle_global_deg",
    }  # fmt: skip
    final = whole[(whole.metric == "test_accuracy") & (whole.epoch == 2)].value.item()
    assert 20 < final <= 100  # percent; guessing has 10


def test_accuracy_by_hand():
    class Net(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return F.one_hot(x[:, 0].long(), 4).float()

    net = Net().train()
    split = data.Split(torch.tensor([[0.0], [1.0], [2.0], [3.0], [0.0]]), torch.tensor([0, 1, 3, 3, 1]))
    assert train.accuracies(net, split, batch=2) == [60.0]
    assert net.training


# ------------------------------------------------------------------------------------------ identity and fingerprint


def test_identity_is_the_hash_of_the_canonical_json():
    digest = hashlib.sha256(b'{"lr":0.5,"rule":"bp","seed":3}').hexdigest()
    assert Config("bp", 3, lr=0.5).run == digest[:12]


def test_identity_does_not_know_how_a_default_was_said():
    plain = Config("bp", 0)
    said = Config("bp", 0, **{f.name: f.default for f in fields(Config) if f.name not in ("rule", "seed")})
    assert said.run == plain.run
    assert Config(seed=0, rule="bp").run == plain.run


CHANGED = dict(
    rule="kp", seed=1, options="init=match implicit=true", batch=32, lr=0.04, lr_drops="1", lr_factor=0.3, momentum=0.8,
    weight_decay=2e-3, first_weight_decay=0.2, epochs=6, augment=True, weights="torch",
)  # fmt: skip
PHASES, MIRROR = (
    dict(alternate=2, delay_epochs=3, feedback_momentum=0.0),
    replace(TINY, rule="wm", options=""),
)  # phases need feedback that learns by itself


def test_identity_knows_every_field():
    names = {f.name for f in fields(Config)}
    other = CHANGED | dict(
        measure="symmetry",
        first_steps="1,2",
        keep=True,
        dataset="mnist",
        model="cnn",
        hidden="16,17",
        revision=2,
        feedback_lr=0.1,
        precision="bfloat16",
        noisy="feedback",
        nesterov=True,
        warmup=2,
    )
    apart = {"optimizer": "adam", "update_noise": 0.1}  # not of implicit feedback
    assert {*other, *PHASES, *apart} == names  # a new field must be listed here, and thought about
    plain = replace(TINY, options="")
    assert len({plain.run, *(replace(plain, **{name: value}).run for name, value in apart.items())}) == 3
    runs = {replace(TINY, **{name: value}).run for name, value in other.items()} | {TINY.run}
    runs |= {replace(MIRROR, **{name: value}).run for name, value in PHASES.items()} | {MIRROR.run}
    assert len(runs) == len(names)


def test_fingerprint_is_stable_and_knows_every_field_of_the_recipe():
    first = train.fingerprint(TINY)
    assert train.fingerprint(TINY) == first and len(first) == 20
    assert train.fingerprint(replace(TINY, hidden="512,512", dataset="mnist")) == first  # it is narrowed
    for name, value in CHANGED.items():
        changed = {name: value} | ({"options": ""} if name == "rule" else {})
        assert train.fingerprint(replace(TINY, **changed)) != first, name
    adam = dict(optimizer="adam")
    noise = ({"update_noise": 0.01}, {"update_noise": 0.01, "noisy": "feedback"})
    changes = ({}, adam, *noise, *({n: v} for n, v in PHASES.items()))
    assert len({tuple(train.fingerprint(replace(MIRROR, **f))) for f in changes}) == len(changes)
    names = ("arch1", "resnet20", "lenet", "plain2", "plain4", "plain4-bn", "plain4-local")
    models = [train.fingerprint(replace(MIRROR, rule="fa", model=m, hidden=""), 2) for m in names]
    assert len(set(map(tuple, models))) == len(names) and models[0] == train.fingerprint(
        replace(MIRROR, rule="fa", model="arch1-same", hidden=""), 2
    )


def test_fingerprint_does_not_know_the_threads():
    before = torch.get_num_threads()
    first = train.fingerprint(TINY)
    torch.set_num_threads(2)
    try:
        assert train.fingerprint(TINY) == first
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "text, options",
    [
        ("", {}),
        ("init=xavier", {"init": "xavier"}),
        (
            "init=0.25  expansion=10 implicit=true clamp_forward=false",
            dict(init=0.25, expansion=10, implicit=True, clamp_forward=False),
        ),
    ],
)
def test_options_are_parsed(text, options):
    assert parse_options(text) == options


def test_bad_options_raise():
    with pytest.raises(fa.UserError, match="NAME=VALUE"):
        parse_options("init xavier")
    with pytest.raises(fa.UserError, match="unknown option .* known: "):
        train.build_network(replace(TINY, options="initt=xavier"), (1, 8, 8), 10)
    with pytest.raises(fa.UserError, match="unknown model .* known: mlp"):
        train.build_network(replace(TINY, model="cnn"), (1, 8, 8), 10)


# ------------------------------------------------------------------------------------------ files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "table.csv"
    write_bytes(path, b"old")

    def no_disk(*a, **k):
        raise OSError("no space left on device")

    for operation in ("fsync", "replace"):
        monkeypatch.setattr(os, operation, no_disk)
        with pytest.raises(fa.UserError, match="table.csv cannot be written .no space left on device.; make room"):
            write_bytes(path, b"new, longer", keep="before.csv")
        assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["table.csv"]
        monkeypatch.undo()
    write_bytes(path, b"new", keep="before.csv")
    assert path.read_bytes() == b"new" and path.with_name("before.csv").read_bytes() == b"old"


def test_numbers_survive_the_store_to_the_last_bit():
    folder = RunFolder(TINY)
    table = train.train(replace(TINY, epochs=1))
    folder.finish(table, table.attrs["status"])
    back = folder.table()
    assert (back.value.to_numpy() == table.value.to_numpy()).all()
    assert back.layer.tolist() == table.layer.tolist()
    assert set(back.run) == {TINY.run} and set(back.rule) == {"pfa"} and set(back.seed) == {0}
    assert {"torch", "cuda", "gpu", "cpu", "python", "system", "commit"} == folder.status["environment"].keys()


def test_modules_under_test_are_the_real_ones():
    assert isinstance(train.time, types.ModuleType)  # a test that replaced the clock put it back


def test_equal_configs_are_one_run():
    a, b = Config("bp", 0, lr=1), Config("bp", 0, lr=1.0)
    assert a == b and a.run == b.run


@pytest.mark.parametrize("rule", ["sa", "kp"])
def test_the_schedule_of_the_decay_leaves_feedback_with_its_own_alone(rule):
    config = Config(rule, 0, dataset="digits", hidden="8,8", weight_decay=0.01, first_weight_decay=0.5)
    digits = data.load("digits").train
    net = train.build_network(config, (1, 8, 8), 10)
    opt = train.make_optimizer(net, config)
    learned = {id(p) for p in fa.feedback_parameters(net)}
    for epoch, decay in enumerate((0.5, 0.01)):
        steps(net, opt, config, digits, epoch, limit=1)
        for group in opt.param_groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0 if rule == "sa" and id(p) in learned else decay)
