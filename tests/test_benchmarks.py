"""The benchmarks: what counts as a step's peak memory, what is printed, and the results that are committed."""

import argparse
import gc
import importlib
import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from fa import ROOT, experiments

_spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks" / "step.py")
step = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(step)

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("step_*.json"))
MB = 1e6


def settings(**changes):
    """What the command line hands on."""
    return argparse.Namespace(
        **({"net": "resnet20", "size": 0, "batch": 16, "device": "cpu", "compile": False, "bf16": False} | changes)
    )


# ------------------------------------------------------------------------------------------ peak memory


def test_the_peak_is_the_most_that_lived_at_a_time():
    def work():
        a = torch.ones(1_000_000)  # 4 MB
        b = a + 1  # 8 MB
        del a
        c = b[:500_000] * 2  # 6 MB
        return b.sum() + c.sum()

    assert step.peak_of(work) == pytest.approx(8 * MB, rel=1e-3)


def test_what_is_held_counts_every_storage_once():
    gc.collect()
    before = step.held()
    a = torch.ones(1_000_000)
    views = [a[3:], a.view(1000, 1000), torch.nn.Parameter(a)]
    assert step.held() - before == 4_000_000
    del a, views
    assert step.held() == before


def test_a_step_leaves_nothing_behind():
    take = step.stepper(settings(batch=4), "kp")
    for _ in range(2):
        take()
    before = step.held()
    take()
    assert step.held() == before


def test_peak_memory_of_a_linear_step_by_hand():
    """One linear layer, 100 -> 50, on 20,000 rows: logits, their log-softmax and its gradient, two or three of them
    at a time."""
    rows, inputs, out = 20_000, 100, 50
    x, y = torch.randn(rows, inputs), torch.zeros(rows, dtype=torch.long)
    layer = torch.nn.Linear(inputs, out)

    def work():
        torch.nn.functional.cross_entropy(layer(x), y).backward()

    work()
    layer.zero_grad()
    maps = step.peak_of(work) / (4 * rows * out)
    assert 2 <= maps < 3.1  # not the input, which lived before


@pytest.fixture(scope="module")
def peaks():
    """Peak memory of a step of ResNet-20, in MB."""
    return {
        rule: step.peak(settings(), rule)
        for rule in ("bp", "bp_again", "fa", "usf", "frsf", "brsf", "dfa", "dfa:tap=block", "kp", "pfa_o")
    }


@pytest.mark.slow
def test_peak_memory_is_exact(peaks):
    assert peaks["bp"] == peaks["bp_again"]


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "brsf", "dfa", "dfa:tap=block"])
@pytest.mark.slow
def test_fixed_feedback_needs_at_most_5_percent_more_memory_than_backprop(peaks, rule):
    assert peaks[rule] / peaks["bp"] < 1.05


@pytest.mark.parametrize("rule", ["kp", "pfa_o"])
@pytest.mark.slow
def test_learned_feedback_needs_its_tensors_their_gradients_and_momenta_and_little_more(peaks, rule):
    """B, its gradient and its momentum, each of the weights' size (270896 in ResNet-20's layers), and for pfa_o the
    fixed matrices."""
    weights = sum(
        m.weight.numel() for m in step.network("resnet20")[0].modules() if hasattr(m, "weight") and m.weight.dim() > 1
    )
    more = peaks[rule] - peaks["bp"]
    assert 2 * 4 * weights / MB < more < 4.5 * 4 * weights / MB


# ------------------------------------------------------------------------------------------ what is printed

RECORDED = {
    "where": {"net": "mlp", "size": 0, "batch": 8, "compile": False, "bf16": True, "rounds": 3, "torch": "2.11.0", "gpu": "", "cpu": "C", "threads": 2},
    "results": {
        "bp": {"cpu": [1.0, 1.0, 1.0], "wall": [1.0, 1.0, 1.0], "ms": 10.0, "peak_mb": 20.0},
        "dfa:tap=block": {"cpu": [0.7, 0.75, 0.8], "wall": [0.6, 0.65, 0.7], "ms": 7.25, "peak_mb": 21.0},
        "wm": {"cpu": [1.3, 1.4, 1.5], "wall": [1.3, 1.4, 1.5], "ms": 14.0, "peak_mb": None},
    },
}  # fmt: skip


def test_the_table():
    text = step.table(**RECORDED).splitlines()
    assert text[0].startswith("mlp, batch 8, eager, bf16, 3 rounds; torch 2.11.0, C, 2 threads")
    assert text[3].split() == "dfa:tap=block 0.75 0.70 to 0.80 0.65 0.60 to 0.70 7.2 1.050".split()
    assert text[4].split()[-1] == "nan"  # not measured
    head, blank, names, rule, *rows = step.table(**RECORDED, markdown=True).splitlines()
    assert not blank and {line.count("|") for line in (names, rule, *rows)} == {8}
    assert rows[1] == "| `dfa:tap=block` | 0.75 | 0.70 to 0.80 | 0.65 | 0.60 to 0.70 | 7.2 | 1.050 |"


def test_results_are_printed_again_from_their_file(tmp_path, capsys, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RECORDED))
    monkeypatch.setattr("sys.argv", ["step.py", "--read", str(path), "--markdown"])
    step.main()
    assert capsys.readouterr().out.rstrip("\n") == step.table(**RECORDED, markdown=True)


def test_a_measurement_from_end_to_end(tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "r.json"
    arguments = [
        "--net",
        "mlp",
        "--batch",
        "8",
        "--rounds",
        "3",
        "--threads",
        "1",
        "--rules",
        "bp_again,fa,pfa:implicit=true+expansion=2",
        "--json",
        str(path),
    ]
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["step.py", *arguments])
    monkeypatch.setattr(step, "keep_pages", lambda: None)  # of the process that measures
    try:
        step.main()
    finally:
        torch.set_num_threads(threads)
    data = json.loads(path.read_text())
    assert (
        list(data["results"]) == ["bp", "bp_again", "fa", "pfa:implicit=true+expansion=2"]
        and data["where"]["torch"] == torch.__version__
    )
    assert data["results"]["bp"]["cpu"] == [1, 1, 1] and all(
        r["ms"] > 0 and r["peak_mb"] > 0 for r in data["results"].values()
    )
    assert capsys.readouterr().out == step.table(**data) + "\n"


# ------------------------------------------------------------------------------------------ whole trainings


@pytest.fixture
def benchmark(monkeypatch):
    """Runs a benchmark with arguments, on the CPU, and returns its module. Processes that it starts import it by its
    name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(name, arguments=""):
        module = importlib.import_module(name)
        if arguments:
            monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments.split()])
            module.main()
        return module

    return run


@pytest.mark.slow
def test_trainings_of_two_rules_from_end_to_end(benchmark, tmp_path, capsys):
    path = tmp_path / "r.json"
    where = "--experiment p3_fig4 --mode quick --device cpu"
    benchmark("train", f"{where} --rules bp+fa --together 1,2 --steps 2 --rounds 1 --json {path}")
    (row,) = json.loads(path.read_text())["results"]
    assert (row["rule"], row["together"]) == ("bp+fa", 2)  # one run cannot be of two rules
    assert row["images_per_s"] > 0 and row["seconds_per_run_measured"] > row["seconds_per_run"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_pack_is_spread_over_its_rules_and_grouped_as_a_campaign_does(benchmark):
    train = benchmark("train")
    recipes = {c.rule: c for c in experiments.plan("p3_fig4", "quick", seeds=1)}
    runs = train.pack([recipes["bp"], recipes["dfa"], recipes["fa"]], 5)
    assert [c.rule for c in runs] == ["bp", "bp", "dfa", "dfa", "fa"] and len({c.seed for c in runs}) == 5
    assert train.groups(runs, "cpu") == [(c,) for c in runs]
    assert train.groups(runs, "cuda") == [(runs[0], runs[1], runs[4]), (runs[2],), (runs[3],)]


def test_a_stack_is_stepped_and_measured_as_one(benchmark, monkeypatch):
    """What only a GPU does, here on the CPU."""
    train = benchmark("train")
    recipes = experiments.plan("p3_fig4", "quick", rules="bp,fa")
    runs, groups, seen = train.pack(recipes, 4), train.groups, []
    step, accuracies = train.engine.Stepper.step, train.train.accuracies
    monkeypatch.setattr(train, "groups", lambda configs, device: groups(configs, "cuda"))
    monkeypatch.setattr(train.engine.Stepper, "step", lambda self: seen.append(self.seeds) or step(self))
    monkeypatch.setattr(
        train.train, "accuracies", lambda net, split, n: seen.append((n, len(split))) or accuracies(net, split, n)
    )
    train.stepping(runs, "cpu", False)(2)
    assert seen == [(0, 1, 2, 3)] * 2
    monkeypatch.setattr(train, "seconds", lambda work: work() and 7.0)
    # 5 epochs: after each and before them 360 test images, at epochs 0 and 5 1437 training images; layers at all 6
    assert train.measuring(tuple(runs), "cpu") == pytest.approx(7 / 4 * (6 + 2 * 1437 / 360) + 6 * 7)
    assert seen[2:] == [(4, 360)] * 2


def test_long_trainings_are_mostly_validated(benchmark, monkeypatch):
    train = benchmark("train")
    config = replace(experiments.plan("p3_fig4", "quick")[0], epochs=150)
    monkeypatch.setitem(train.SIZES, "digits", (1_000, 100, 200, (1, 8, 8)))
    monkeypatch.setattr(train.train, "accuracies", lambda *args: None)
    monkeypatch.setattr(train.train, "layer_rows", lambda *args: None)
    monkeypatch.setattr(train, "seconds", lambda work: work() or 2.0)
    train.sets.cache_clear()  # of another number
    # validation at 151 epochs, all images at 7, layers at 39: 0 to 10, then every fifth
    assert train.measuring((config,), "cpu") == pytest.approx(2 / 200 * (151 * 100 + 7 * 1_200) + 39 * 2)
    train.sets.cache_clear()


def test_the_check_of_a_gpu_runs_on_a_cpu(benchmark, capsys):
    benchmark("check_cuda", "--mode quick --rules dfa,pfa --stack 2")
    dfa, not_stacked, pfa, stacked = capsys.readouterr().out.splitlines()
    assert all("gap 0.0e+00" in line for line in (dfa, pfa)) and not_stacked.split() == "dfa cannot be stacked".split()
    assert "2 runs stacked" in stacked and float(stacked.split()[2]) < 1e-4


def test_the_check_of_a_gpu_finds_a_difference(benchmark, capsys, monkeypatch):
    check = benchmark("check_cuda")
    monkeypatch.setattr(
        check, "losses", lambda configs, device, captured, compiled: torch.ones(16, len(configs)) + 0.02 * captured
    )
    monkeypatch.setattr(check, "times", lambda *args: (0.0, 0.0, 0.0))
    with pytest.raises(SystemExit, match="(?s)bp, kp: captured and eager .*bp, kp: stacked and single"):
        benchmark("check_cuda", "--mode quick --rules bp,kp --stack 2")
    benchmark("check_cuda", "--mode quick --rules bp,kp --stack 2 --tolerance 0.1")


# ------------------------------------------------------------------------------------------ what is committed


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_results(path):
    data = json.loads(path.read_text())
    where, results = data["where"], data["results"]
    assert all(where[k] for k in ("torch", "python", "cpu", "system", "commit", "threads", "rounds", "batch", "device"))
    assert (
        path.stem
        == f"step_{where['net']}_{'compiled' if where['compile'] else 'eager'}_{'gpu' if where['gpu'] else 'cpu'}"
    )
    assert results["bp"]["cpu"] == [1, 1, 1] and "bp_again" in results
    for rule, r in results.items():
        for low, middle, high in (r["cpu"], r["wall"]):
            assert 0 < low <= middle <= high, rule
        assert r["ms"] > 0 and (r["peak_mb"] is None or r["peak_mb"] > 0)
    low, _, high = results["bp_again"]["cpu"]
    assert low <= 1.05 and high >= 0.95, "backprop against itself is not 1: the machine was too busy to measure"
    step.table(**data)


@pytest.mark.parametrize("path", [p for p in RESULTS if "resnet20_eager" in p.stem], ids=lambda p: p.stem)
def test_committed_memory_of_fixed_feedback(path):
    results = json.loads(path.read_text())["results"]
    for rule in ("fa", "usf", "frsf", "brsf", "dfa", "dfa:tap=block"):
        assert results[rule]["peak_mb"] / results["bp"]["peak_mb"] < 1.05
