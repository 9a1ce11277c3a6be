"""Forecasts: what the records know and what they do not, whole runs counted part by part as the trainer makes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest

from fa import __main__ as command
from fa import experiments
from fa.errors import UserError
from fa.results import costs, plan, records
from fa.results.costs import Recorded, kind
from fa.results.store import run_seconds
from fa.train import data, loop, measure, timing
from fa.train.config import Config
from fa.train.step import Stepper
from fa.train.timing import Cost

BP = Config("bp", 0, epochs=10)  # 937 steps an epoch
EPYC, H100 = {"cpu": "AMD EPYC", "gpu": ""}, {"cpu": "Intel Xeon", "gpu": "NVIDIA H100 80GB HBM3"}


def record(seconds: dict[Config, dict[str, Any]], *machines: dict[str, str]) -> dict[str, Any]:
    """A sidecar: run -> its status."""
    status = {c.run: {"state": "finished"} | s for c, s in seconds.items()}
    return {"environments": list(machines), "configs": {c.run: asdict(c) for c in seconds}, "status": status}


def seeds(config: Config, *seconds: float) -> dict[Config, dict[str, Any]]:
    return {replace(config, seed=i): {"seconds": s} for i, s in enumerate(seconds)}


def test_quartiles_of_a_few_values():
    assert timing.quartiles([3.0]) == (3, 3, 3) and timing.quartiles([4, 1, 2, 3, 5]) == (2, 3, 4)


def test_a_step_costs_what_the_runs_of_its_kind_took():
    known = {"a": record(seeds(BP, 937.0, 1874.0), EPYC), "b": record(seeds(BP.vary(epochs=20, lr=0.3), 4685.0), EPYC)}
    found = Recorded("epyc", known).cost([BP, replace(BP, epochs=30)])
    assert found.step == pytest.approx((0.15, 0.2, 0.225))
    assert found.run[10] == pytest.approx((1405.5, 1874, 2108.25)) and found.run[30][1] == pytest.approx(5622)
    assert found.source == "2 runs of a, 1 run of b (of 10 or 20 epochs)" and found.memory == 0


def test_runs_that_shared_a_device_count_with_their_share():
    status = {BP: {"seconds": 800.0, "together": 8}, replace(BP, seed=1): {"seconds": 900.0, "share": 100.0}}
    found = Recorded("H100", {"a": record(status, H100)})
    assert found.gpu and found.cost([BP]).run[10] == (100, 100, 100)


def test_a_record_of_several_machines_is_named_and_not_used():
    found = Recorded("h100", {"mixed": record(seeds(BP, 1.0), EPYC, H100), "clear": record(seeds(BP, 9.0), EPYC)})
    assert found.cost([BP]) == "mixed has such runs, but is of several machines, and does not say which run is of which"
    assert found.cost([BP.vary(rule="fa")]).startswith("no record has such runs")
    assert Recorded("epyc", {"mixed": record(seeds(BP, 1.0), EPYC, H100)}).runs == {}


def test_two_commits_on_machines_of_one_name_are_one_machine():
    known = {"a": record(seeds(BP, 5.0), EPYC | {"commit": "1"}, EPYC | {"commit": "2"})}
    assert Recorded("AMD", known).cost([BP]).run[10] == (5, 5, 5)


def test_a_device_that_nobody_knows_is_a_sentence():
    with pytest.raises(UserError, match="device named 'tpu'; records know AMD EPYC, NVIDIA H100"):
        Recorded("tpu", {"a": record(seeds(BP, 1.0), EPYC), "b": record(seeds(BP, 1.0), H100)})


def test_runs_that_diverged_say_nothing():
    known = {"a": record({BP: {"seconds": 1.0, "state": "diverged"}}, EPYC)}
    assert isinstance(Recorded("epyc", known).cost([BP]), str)


@pytest.mark.parametrize(
    "change, same",
    [
        ({"lr": 0.5, "seed": 3, "weight_decay": 1.0, "epochs": 4}, True),
        ({"density": 0.2}, True), ({"density": None}, False), ({"expansion": 3}, False), ({"implicit": True}, False),
        ({"init": "xavier"}, True), ({"batch": 32}, False), ({"precision": "bfloat16"}, False),
        ({"measure": "symmetry"}, False), ({"epochs": 101}, False), ({"hidden": "512"}, False),
    ],
)  # fmt: skip
def test_what_a_step_depends_on(change, same):
    config = Config("pfa", 0, "expansion=10 density=0.1", epochs=100)
    assert (kind(asdict(config)) == kind(asdict(config.vary(**change)))) is same


def test_a_record_from_before_a_field_has_its_default():
    told = asdict(BP)
    del told["optimizer"], told["augment"]
    assert kind(told) == kind(asdict(BP)) != kind(told | {"optimizer": "adam"})


def test_the_number_of_training_images_is_known_without_them():
    for name, source in data.SETS.items():
        try:
            assert len(data.load(name).train) == source.train, name
        except UserError:
            assert name != "digits", "the digits are always there"


def known(*seconds: float, stacked: bool = False, devices: int = 2) -> plan.Forecast:
    """Runs of two rules that differ in nothing else, with these seconds, at the quartiles a half and twice of that."""
    base = Config("bp", 0, dataset="cifar10", model="resnet20", epochs=1)
    todo = [base.vary(rule=rule) for rule in ("bp", "fa", "usf", "kp")[: len(seconds)]]
    cost = {kind(asdict(c)): Cost({1: (s / 2, s, 2 * s)}, (1.0, 1.0, 1.0), 7, "") for c, s in zip(todo, seconds)}
    return plan.Forecast(todo, cost, devices, stacked)


def test_a_free_device_begins_the_next_run():
    forecast = known(10, 20, 30, 40)
    assert forecast.device_seconds == (50, 100, 200) and forecast.wall == (30, 60, 120)  # 10 + 30 | 20 + 40
    assert forecast.memory == 7


def test_the_longest_run_bounds_the_wall_time():
    assert known(10, 20, 100, devices=50).wall == (50, 100, 200)


def test_a_stack_is_one_job():
    assert known(10, 20, 30, 40, stacked=True).jobs == [(50, 100, 200)]
    assert known(10, 20, 30, 40, stacked=True).wall == (50, 100, 200)


def test_what_is_not_known_is_no_part_of_a_sum():
    forecast = known(10, 20)
    forecast.costs[kind(asdict(forecast.todo[1]))] = "nobody trained it"
    assert forecast.device_seconds == (5, 10, 20)
    assert "  not known: 1 run (fa), for nobody trained it" in plan.table(forecast).splitlines()


def test_the_plan_of_a_committed_record_is_what_its_runs_took(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    runs = experiments.plan("p3_fig2", "paper")
    forecast = plan.forecasts({"p3_fig2": runs}, "epyc", 2)[0]["p3_fig2"]
    about = records.sidecar("p3_fig2")
    took = [run_seconds(about["status"][c.run]) for c in runs if c.rule == "dfa"]
    assert forecast.seconds(next(c for c in runs if c.rule == "dfa"))[1] == pytest.approx(sorted(took)[2])
    assert command.main(["plan", "p3_fig2", "x_precision", "--device", "epyc", "--devices", "4"]) == 0
    out = capsys.readouterr().out
    assert (
        "p3_fig2, mode paper: 30 runs to train of 30; 1,124,400 steps" in out
        and "all: 70 runs, 65 runs of which are known" in out
    )
    assert "on 4 devices: " in out and "memory is not known from records" in out
    assert command.main(["plan", "p3_fig2", "--device", "epyc", "--add"]) == 0
    assert "0 runs to train of 30; 0 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        ("--devices 0", "devices=0 is not a positive number"),
        ("--device tpu", "no record was made on a device named 'tpu'"),
        ("--device tpu --measure", "this machine is no 'tpu'"),
        ("--device", "--device: expected one argument; see python -m fa plan --help"),
    ],
)
def test_a_slip_is_a_sentence(options, said, capsys, monkeypatch):
    monkeypatch.setattr(plan, "measure_all", lambda *a: pytest.fail("nothing is to be measured"))
    assert command.main(["plan", "p3_fig2", *options.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_here_every_recipe_is_measured_and_nothing_else(tmp_path, monkeypatch):
    """A run that makes its table itself has no steps; the runs that others need are planned too, once."""
    monkeypatch.setenv("FA_RUNS", str(tmp_path))
    monkeypatch.setattr(plan, "pick_workers", lambda workers: 3)
    asked = []

    def measured(kinds, device, together):
        asked.append((len(kinds), together))
        return [Cost({c.epochs: (1, 1, 1) for c in same}, (1, 1, 1), 1, "") for same in kinds]

    monkeypatch.setattr(plan, "measure_all", measured)
    todo = experiments.plan("p1_representations", "quick")
    forecast = plan.forecasts({"p1_representations": todo}, "here", 8)[0]["p1_representations"]
    needed = {c.run for c in todo for c in c.needs}
    assert len(forecast.todo) == len(todo) + len(needed) and len(forecast.known) >= len(needed)
    assert asked == [(len({kind(asdict(c)) for c in forecast.todo if isinstance(c, Config)}), 3)]
    assert plan.table(forecast).count("not known") <= 1


@pytest.mark.parametrize("measure_, epochs", [("", 12), ("symmetry", 2), ("mismatch", 1)])
def test_a_whole_run_is_counted_as_the_trainer_makes_it(measure_, epochs, monkeypatch):
    config = Config(
        "pfa", 0, dataset="digits", hidden="8", epochs=epochs, batch=64, measure=measure_, first_steps="2,5"
    )
    sets, done = data.load("digits"), Counter()
    names = {id(sets.train): "train_accuracy", id(sets.test): "test_accuracy"}

    def counted(where: Any, name: str, told: Any) -> None:
        real = getattr(where, name)

        def call(*args, **kwargs):
            done[told(*args) if callable(told) else told] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, call)

    counted(loop, "accuracies", lambda net, split, runs: names[id(split)])
    counted(loop, "layer_rows", "layers")
    counted(Stepper, "begin", "epoch")
    counted(Stepper, "step", "step")
    counted(loop.Run, "start", "start")
    counted(loop.Run, "report", "report")
    if measure_:
        own = measure.MEASURES[measure_]

        def seen(config, net, epoch, sets):
            done["own " + ("first" if epoch == 0 else "last" if epoch == config.epochs else "later")] += 1
            return own(config, net, epoch, sets)

        monkeypatch.setitem(measure.MEASURES, measure_, seen)
    loop.train_runs([loop.Run(config)], sets=sets)
    done["first"] = 1  # what the first times take longer
    assert done == timing.parts(config, sets)


def test_a_recipe_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 1e-9)  # a step
    config = Config("fa", 0, dataset="digits", hidden="8", epochs=3, batch=512, measure="symmetry")
    found = timing.measured(config, [3, 30], tmp_path)
    low, middle, high = found.step
    assert 0 < low <= middle <= high and found.source == f"{timing.BLOCKS} steps measured here"
    assert found.run[30][1] - found.run[3][1] > 27 * 2 * middle, "27 epochs of two steps, and their measurements"
    assert found.memory > 50e6, "the process's, in bytes"
    assert not list(tmp_path.iterdir()), "what was written is removed"


def test_a_watch_looks_once_where_that_is_long(monkeypatch):
    now = iter(range(0, 1000, 100))
    monkeypatch.setattr(timing.time, "monotonic", lambda: float(next(now)))
    watch = timing.Watch(lambda: None)
    watch.time("a", lambda: None, n=5, scale=0.5)
    assert watch.seen["a"] == [50] and watch.sum({"a": 3}) == (150, 150, 150)


@pytest.mark.slow
def test_kinds_are_measured_side_by_side_and_data_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA_DATA", str(tmp_path))
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    there = Config("bp", 0, dataset="digits", hidden="8", epochs=1)
    known, unknown, again = costs.measure_all([[there], [replace(there, dataset="mnist")], [there]], "cpu", 2)
    assert known.run[1][1] > 0 and again.run[1][1] > 0 and "data set mnist" in unknown
    assert "measuring 1 to 2 of 3 kinds of runs" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["runs"], "nothing stays"
