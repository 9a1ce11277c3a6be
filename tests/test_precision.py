"""bfloat16 beside float32: the grid, runs taken from other figures' records, and what the claims make of a table."""

from __future__ import annotations

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from fa import ROOT, UserError, citations, experiments
from fa.experiments import x_precision, x_precision_cifar
from fa.results import batch, claims, records
from fa.results import runs as campaign
from fa.results.page import Page
from fa.results.store import RunFolder
from fa.train import data
from fa.train import loop as train
from fa.train import step as engine

PAPER = experiments.plan("x_precision", "paper")
PAIRED = "paired(test_accuracy, rule=bp, precision=bfloat16, minus_precision=float32, epoch=last)"
CLAIMS = [c for c in claims.load() if c.name == "x_precision"]
DEEP = experiments.plan("x_precision_cifar", "paper")


def test_the_float32_runs_are_figure_2s_own_and_the_others_differ_in_precision_alone() -> None:
    full, half = ([c for c in PAPER if c.precision == p] for p in x_precision.PRECISIONS)
    assert full == experiments.plan("p3_fig2", "paper", rules=",".join(x_precision.RULES))
    assert [replace(c, precision="float32") for c in half] == full
    assert len({c.run for c in PAPER}) == len(PAPER) == 70
    assert {c.run for c in full} <= set(records.holders())  # nothing of float32 is left to train
    assert [x_precision.EXPERIMENT.swept(c) for c in half[:1] + full[:1]] == [
        {"precision": "bfloat16"},
        {"precision": "float32"},
    ]


def test_a_campaign_that_is_cut_short_has_whole_seeds() -> None:
    for i in range(0, 70, 14):
        assert Counter(c.seed for c in PAPER[i : i + 14]) == {i // 14: 14}


def test_quick_mode_trains_every_rule_in_both_precisions_on_digits() -> None:
    runs = experiments.plan("x_precision", "quick")
    assert Counter((c.rule, c.precision) for c in runs) == {
        (r, p): 2 for r in x_precision.RULES for p in x_precision.PRECISIONS
    }
    assert {(c.dataset, c.hidden, c.epochs) for c in runs} == {("digits", "64,64", 10)}


def test_resnet_20_is_figure_4s_in_both_precisions() -> None:
    """One seed; every run is one of that figure, which takes it by its ``precision``, and a pair differs in nothing
    else."""
    full, half = ([c for c in DEEP if c.precision == p] for p in x_precision.PRECISIONS)
    of = dict(seeds=1, rules=",".join(x_precision_cifar.RULES))
    assert half == experiments.plan("p3_fig4", "paper", **of) and full == experiments.plan(
        "p3_fig4", "paper", precision="float32", **of
    )
    assert [replace(c, precision="float32") for c in half] == full and DEEP == [
        c for pair in zip(full, half) for c in pair
    ]
    assert {(c.dataset, c.model, c.epochs, c.seed) for c in DEEP} == {("cifar10", "resnet20", 250, 0)}
    assert len({c.run for c in DEEP}) == len(DEEP) == 8
    assert [x_precision_cifar.EXPERIMENT.swept(c)["precision"] for c in DEEP] == 4 * ["float32", "bfloat16"]
    quick = experiments.plan("x_precision_cifar", "quick")
    assert [(c.rule, c.precision) for c in quick] == [(r, p) for r in ("bp", "pfa") for p in x_precision.PRECISIONS]
    assert {(c.dataset, c.model, c.epochs) for c in quick} == {("digits", "resnet8", 2)}
    assert {c.rule for c in experiments.plan("x_precision_cifar", "quick", rules="kp")} == {"kp"}


@pytest.mark.parametrize("rule", x_precision.RULES)
def test_only_the_arithmetic_of_a_step_is_in_bfloat16(rule: str) -> None:
    """Weights, feedback, their gradients and the momenta stay in float32; the first losses are those of float32,
    rounded."""
    full, half = experiments.plan("x_precision", "quick", rules=rule)[:2]
    sets, losses = data.load("digits"), []
    with engine.numerics("cpu"):
        for config in (full, half):
            net = train.build_network(config, sets.shape, sets.classes)
            opt = train.make_optimizer(net, config)
            losses.append(engine.Stepper(net, opt, config, sets.train).epoch(0, 3).clone())
            kept = [*net.parameters(), *net.buffers(), *(s["momentum_buffer"] for s in opt.state.values())]
            assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}
    assert not torch.equal(*losses)
    assert torch.allclose(*losses, rtol=0.02)


def test_the_band_of_chance_is_the_pages() -> None:
    """3.58 sd for seven rules and five seeds: Student's t with 8 degrees of freedom at 5 % / 7."""
    shown = pd.DataFrame({"n": [5.0], "sd of seeds": [0.2]})
    assert x_precision.chance(shown, 7).item() == pytest.approx(3.58 * 0.2 * (2 / 5) ** 0.5, rel=2e-3)


def test_a_summary_is_of_pairs() -> None:
    """Seed 2 has one precision only and is left out; sds are sample sds."""
    values = {"float32": [98.0, 98.2, 99.0], "bfloat16": [98.1, 98.1]}
    rows = [("bp", s, "", 1, "test_accuracy", p, v) for p, vs in values.items() for s, v in enumerate(vs)]
    pairs = x_precision.tidy(pd.DataFrame(rows, columns="rule seed layer epoch metric precision value".split()))
    row = x_precision.summary(pairs, ["rule"]).loc["bp"]
    assert row.n == 2 and row.float32 == pytest.approx(98.1) and row.difference == pytest.approx(0)
    assert row["sd"] == pytest.approx(0.2 / 2**0.5) and row["sd of seeds"] == pytest.approx(0.1)


# ------------------------------------------------------------------------------------------- runs that figures share


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose records are Figure 2's and the sparse ones, and an empty run store."""
    folder = tmp_path / "data" / "records"
    folder.mkdir(parents=True)
    for name in ("p3_fig2", "p3_sparse"):
        for path in (ROOT / "data" / "records").glob(f"{name}.*"):
            shutil.copy(path, folder)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    return folder


def test_shared_runs_stay_in_the_record_that_holds_them_and_are_in_the_figures_table(elsewhere: Path) -> None:
    runs = experiments.plan("x_precision", "paper", seeds=1, rules="bp,kp")  # kp is in no record but the sparse one
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    with pytest.raises(UserError, match="35 of 70 runs of x_precision are finished"):
        records.collect("x_precision", "paper", runs)
    assert records.collect("x_precision", "paper", runs, partial=True)[1] == 0  # nothing new, and nothing written
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    table, about = records.union("x_precision", "paper", runs)
    assert [c for c in table if c not in records.COLUMNS] == ["precision"] and set(table.precision) == {"float32"}
    full = {c.run for c in runs if c.precision == "float32"}
    assert set(table.run) == set(about["status"]) == set(about["configs"]) == full
    assert about["partial"] and about["records"] == ["p3_fig2", "p3_sparse"]
    for rule, holder in (("bp", "p3_fig2"), ("kp", "p3_sparse")):
        rows, theirs = table[table.rule == rule], records.read(holder)
        theirs = theirs[theirs.run == rows.run.iloc[0]]
        pd.testing.assert_frame_equal(
            rows[records.COLUMNS].reset_index(drop=True), theirs[records.COLUMNS].reset_index(drop=True)
        )


def test_a_new_run_goes_into_the_figures_own_record_and_the_shared_ones_do_not(elsewhere: Path) -> None:
    runs = experiments.plan("x_precision", "paper", seeds=1, rules="bp")
    (half,) = [c for c in runs if c.precision == "bfloat16"]
    rows = pd.DataFrame([[1, "", None, "test_accuracy", 98.0]], columns=["epoch", "layer", "depth", "metric", "value"])
    RunFolder(half).finish(rows, {"state": "finished", "seconds": 1.0})
    path, new = records.collect("x_precision", "paper", runs, partial=True)
    assert new == 1 and set(records.read("x_precision").run) == {half.run}
    again = path.read_bytes()
    assert records.collect("x_precision", "paper", runs, partial=True) == (path, 0) and path.read_bytes() == again
    assert set(records.union("x_precision", "paper", runs)[0].run) == {c.run for c in runs}


def test_add_trains_no_run_that_any_record_holds(elsewhere: Path) -> None:
    held = records.holders()
    left = campaign.missing([c for c in PAPER if c.run not in held])
    assert {c.precision for c in left} == {"bfloat16"} and len(left) == 35
    assert len(campaign.missing(PAPER)) == 70


class Asked(Exception):
    """Raised in place of training, with the runs that were asked for."""


def test_a_notebook_trains_what_records_hold_unless_it_is_told_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(configs: list, **_: object) -> None:
        raise Asked({c.run for c in configs})

    monkeypatch.setattr(campaign, "run", run)
    held = PAPER[0].run
    monkeypatch.setattr(records, "holders", lambda: {held: "p3_fig2"})
    for told, mode, seeds, trained in (
        ("", "paper", 0, True),
        ("1", "paper", 0, False),
        ("1", "paper", 1, True),
    ):
        monkeypatch.setenv("FA_ADD", told)
        with pytest.raises(Asked) as asked:
            Page("x_precision", mode=mode, seeds=seeds).table()
        assert (held in asked.value.args[0]) == trained


def test_reproduce_hands_add_on(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    monkeypatch.setattr(batch, "_execute", lambda job, **_: jobs.append(job) or (1.0, ""))
    for add in (False, True):
        assert batch.reproduce(["40"], "paper", say=lambda line: None, add=add, pool=ThreadPoolExecutor(1)) == 0
    assert [job.add for job in jobs] == [False, True]


# ------------------------------------------------------------------------------------------------------------- claims


def doubled(shift: float = 0.0) -> tuple[pd.DataFrame, dict]:
    """A record in which bfloat16 is float32 again, BP's test accuracy shifted; and its sidecar."""
    full = {c.run: c for c in PAPER if c.precision == "float32"}
    table = records.union("x_precision", "paper", list(full.values()))[0][records.COLUMNS]
    twin = {run: replace(c, precision="bfloat16").run for run, c in full.items()}
    other = table.assign(run=table.run.map(twin), precision="bfloat16")
    other.loc[(other.rule == "bp") & (other.metric == "test_accuracy"), "value"] += shift
    configs = {c.run: asdict(c) for c in PAPER}
    beside = {"configs": configs, "status": {run: {"state": "finished"} for run in configs}}
    return pd.concat([table.assign(precision="float32"), other]), beside


def judged(table: pd.DataFrame, beside: dict) -> dict[str, dict]:
    planned = pd.DataFrame([{"run": c.run, "rule": c.rule, "seed": c.seed, "precision": c.precision} for c in PAPER])
    rows = (claims.judge(c, table, records.reference("x_precision"), beside, planned) for c in CLAIMS)
    return {row["id"].removeprefix("x_precision_"): row for row in rows}


def test_two_equal_precisions_satisfy_every_claim() -> None:
    rows = judged(*doubled())
    assert len(rows) == 8 and {name: row["verdict"] for name, row in rows.items()} == dict.fromkeys(rows, "holds")
    assert {row["n"] for row in rows.values()} == {5}


def test_a_shift_beyond_seed_noise_is_seen() -> None:
    rows = judged(*doubled(-0.3))
    for name in ("accuracy", "accuracy_noise", "curve_noise"):
        assert rows[name]["verdict"] == "partly" and "bp -0.3 ± " in rows[name]["why"]  # of seven rules one
    assert rows["angle"]["verdict"] == rows["loss"]["verdict"] == "holds"


def test_a_record_that_lacks_seeds_leaves_every_claim_untested() -> None:
    table, beside = doubled()
    rows = judged(table[(table.precision == "float32") | (table.seed < 4)], beside)
    assert {r["why"] for r in rows.values()} == {"4 of 5 seeds"}


def test_seeds_are_paired_along_any_axis() -> None:
    values = {"float32": [98.0, 98.2, 98.4], "bfloat16": [98.1, 98.1, 98.6]}
    rows = [{"run": f"{p}{s}", "rule": "bp", "seed": s, "epoch": e, "layer": "", "metric": "test_accuracy", "precision": p, "value": v + e}
            for p, vs in values.items() for s, v in enumerate(vs) for e in (0, 1)]  # fmt: skip

    def value(criterion: str) -> dict:
        told = {"id": "c", "criterion": criterion, "target": "none", "tolerance": "none", "n_min": "3"}
        claim = claims.compiled("x_precision", dict.fromkeys(claims.COLUMNS, "x") | told)
        return claims.judge(claim, pd.DataFrame(rows), records.reference("x_precision"))

    found = value(f"{PAIRED} < 1")
    assert (found["measured"], found["sd"], found["n"]) == ("0.07", "0.15", 3)
    assert value("paired(test_accuracy, rule=bp, precision=float32, epoch=last, minus_epoch=0) < 2")["measured"] == "1"
    with pytest.raises(UserError, match="several values of precision"):
        value("mean(test_accuracy, rule=bp, epoch=last) > 0")
    for wrong, message in (("paired(test_accuracy, rule=bp, epoch=1) > 0", "minus=RULE or minus_AXIS=VALUE"),
                           (PAIRED.replace("minus_precision=float32", "minus_precision=[float32, bfloat16]") + " > 0", "of one value"),
                           (PAIRED.replace("minus_precision", "minus_seed") + " > 0", "unknown axis minus_seed"),
                           ("mean(test_accuracy, minus_precision=float32) > 0", "unknown axis minus_precision"),
                           ("mean(test_accuracy, precision=16) > 0", "precision takes words or all")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            value(wrong)


def deep(run: str = "", metric: str = "", shift: float = 0.0) -> dict[str, dict]:
    """What the claims about ResNet-20 make of runs that all end alike, one metric of one run shifted (of one layer
    among 20)."""
    ends = [("val_accuracy", "", 90.0), *(("angle_deg", f"layer{i}", 20.0) for i in range(20))]
    rows = [{"run": c.run, "rule": c.rule, "seed": 0, "epoch": 250, "layer": layer, "metric": m, "precision": c.precision, "value": v}
            for c in DEEP for m, layer, v in ends if c.rule != "bp" or not layer]  # fmt: skip
    table = pd.DataFrame(rows)
    table.loc[(table.run == run) & (table.metric == metric) & table.layer.isin(["", "layer7"]), "value"] += shift
    configs = {c.run: asdict(c) for c in DEEP}
    beside = {"configs": configs, "status": {name: {"state": "finished"} for name in configs}}
    about = (c for c in claims.load() if c.name == "x_precision_cifar")
    planned = pd.DataFrame([{"run": c.run, "rule": c.rule, "seed": 0, "precision": c.precision} for c in DEEP])
    judged = (claims.judge(c, table, records.reference("x_precision_cifar"), beside, planned) for c in about)
    return {row["id"].removeprefix("x_precision_cifar_"): row for row in judged}


@pytest.mark.slow
def test_a_pair_of_resnets_is_held_against_the_papers_seeds() -> None:
    paper = records.reference("p3_fig4").query("metric == 'val_accuracy' and epoch == 250").set_index("rule")
    rows = deep()
    assert {row["verdict"] for row in rows.values()} == {"holds"} and {row["n"] for row in rows.values()} == {1}
    assert list(rows) == [*(f"accuracy_{r}" for r in x_precision_cifar.RULES), "angle", "angle_usf"]
    half = {c.rule: c.run for c in DEEP if c.precision == "bfloat16"}
    for rule in x_precision_cifar.RULES:
        band = 2 * 2**0.5 * paper.sd[rule]
        assert float(rows[f"accuracy_{rule}"]["tolerance"]) == pytest.approx(band, abs=0.005)
        for shift, verdict in ((band + 0.01, "fails"), (-band - 0.01, "fails"), (band - 0.01, "holds")):
            seen = {name: row["verdict"] for name, row in deep(half[rule], "val_accuracy", shift).items()}
            assert seen.pop(f"accuracy_{rule}") == verdict and set(seen.values()) == {"holds"}
    for rule, claim, bound, verdict in (
        ("usf", "angle_usf", 2, "fails"),
        ("pfa", "angle", 0.5, "partly"),
        ("pfa_o", "angle", 0.5, "partly"),
    ):
        assert deep(half[rule], "angle_deg", 20 * bound - 0.1)[claim]["verdict"] == "holds"  # the mean of 20 layers
        assert deep(half[rule], "angle_deg", 20 * bound + 0.1)[claim]["verdict"] == verdict


def test_a_page_across_the_papers_is_after_none() -> None:
    trail = Page("x_precision").trail()
    assert trail["cite"].endswith("figure x_precision") and trail["paper"] == ""
    assert "; after Li & Benna" in Page("p3_fig2").trail()["cite"] and "x" not in citations.papers()
    report = (ROOT / "REPORT.md").read_text(encoding="utf-8")
    assert "\n[`x_precision`](REPORT_details.md#x_precision) · [notebook 40]" in report
    assert "\n![Learning curves in bfloat16 and float32](figures/x_precision.png)\n" in report
