"""The claims language and its verdicts, against hand computations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fa.errors import UserError
from fa.results import claims, criteria, records, selection

BP, FA = [98.0, 98.2, 98.4], [97.5, 98.1, 97.8]  # by seed; means 98.2 and 97.8, sds 0.2 and 0.3
ANGLES = {"fc1": 20.0, "fc": 30.0}


def table() -> pd.DataFrame:
    """Three seeds, two rules, epochs 0 to 2: accuracy at epochs 1 and 2, two layers' angles at every one."""
    rows = []
    for rule, values in (("bp", BP), ("fa", FA)):
        for seed, value in enumerate(values):
            key = {"run": f"{rule}{seed}", "rule": rule, "seed": seed}
            for epoch, drop in ((1, 1.0), (2, 0.0)):
                whole = {"epoch": epoch, "layer": "", "depth": math.nan, "metric": "test_accuracy"}
                rows.append(key | whole | {"value": value - drop})
            for epoch in range(3):
                for depth, (layer, angle) in enumerate(ANGLES.items(), 1):
                    at = key | {"epoch": epoch, "layer": layer, "depth": depth}
                    rows += [
                        at | {"metric": m, "value": v}
                        for m, v in (("angle_deg", angle - epoch + seed), ("norm_ratio", 0.5), ("weight_norm", 2.0))
                    ]
    return pd.DataFrame(rows)


def sidecar(**changes: object) -> dict:
    configs = {
        f"{rule}{seed}": {"dataset": "mnist", "rule": rule, "seed": seed, "epochs": 2}
        for rule in ("bp", "fa")
        for seed in range(3)
    }
    return {
        "partial": False,
        "planned": 6,
        "finished": 6,
        "configs": configs,
        "status": {run: {"state": "finished"} for run in configs},
    } | changes


REFERENCE = pd.DataFrame([
    {"rule": "bp", "seed": math.nan, "epoch": 2, "layer": "", "metric": "test_accuracy", "value": 98.3},
    {"rule": "fa", "seed": 0, "epoch": 2, "layer": "fc1", "metric": "angle_deg", "value": 19.5},
    {"rule": "fa", "seed": 0, "epoch": 2, "layer": "fc", "metric": "angle_deg", "value": 25.0},
    {"rule": "bp", "seed": 0, "epoch": math.nan, "layer": "", "metric": "best", "value": 98.0},
    {"rule": "bp", "seed": 1, "epoch": math.nan, "layer": "", "metric": "best", "value": 99.0},
    {"rule": "kp", "seed": math.nan, "epoch": 2, "layer": "", "metric": "test_accuracy", "value": math.nan},
])  # fmt: skip


def claim(criterion: str, target: str = "none", tolerance: str = "none", n_min: str = "3") -> claims.Claim:
    told = {"id": "c1", "criterion": criterion, "target": target, "tolerance": tolerance, "n_min": n_min}
    return claims.compiled("p3_fig2", dict.fromkeys(claims.COLUMNS, "x") | told)


def judge(
    criterion: str,
    target: str = "none",
    tolerance: str = "none",
    n_min: str = "3",
    data: pd.DataFrame | None = None,
    beside: dict | None = None,
    planned: pd.DataFrame | None = None,
) -> dict:
    data = table() if data is None else data
    return claims.judge(claim(criterion, target, tolerance, n_min), data, REFERENCE, beside or sidecar(), planned)


def measured(number: str) -> selection.Value:
    """The value of a number of the language over the table above."""
    return criteria.Scope(selection.Record(table(), REFERENCE, sidecar())).number(criteria.parse(number))


@pytest.mark.parametrize(
    "number, mean, sd, n",
    [
        ("mean(test_accuracy, rule=bp, epoch=last)", 98.2, 0.2, 3),
        ("mean(test_accuracy, rule=fa, epoch=last)", 97.8, 0.3, 3),
        ("mean(test_accuracy, rule=bp, epoch=1)", 97.2, 0.2, 3),
        ("mean(test_accuracy, rule=bp, epoch=[1, 2])", 97.7, 0.2, 3),
        ("mean(test_accuracy, rule=bp, epoch=last, seed=[0, 1])", 98.1, math.sqrt(0.02), 2),
        ("best(test_accuracy, rule=bp)", 98.2, 0.2, 3),
        ("max(test_accuracy, rule=bp, epoch=1)", 97.2, 0.2, 3),
        ("min(angle_deg, rule=fa, layer=fc1, epoch=all)", 19.0, 1.0, 3),
        ("mean(angle_deg, rule=fa, layer=all, epoch=0)", 26.0, 1.0, 3),
        ('mean(angle_deg, rule="fa", layer="fc", epoch=0)', 31.0, 1.0, 3),
        ("paired(test_accuracy, rule=fa, minus=bp, epoch=last)", -0.4, math.sqrt(0.07), 3),  # -0.5, -0.1, -0.6
        ("paired(test_accuracy, rule=fa, minus=bp, epoch=last, minus_epoch=1)", 0.6, math.sqrt(0.07), 3),
        (
            "mean(test_accuracy, rule=fa, epoch=2) - mean(test_accuracy, rule=bp, epoch=2)",
            -0.4,
            math.hypot(0.2, 0.3),
            3,
        ),
        ("-2 * mean(test_accuracy, rule=bp, epoch=last) / 4 + 1", -48.1, 0.1, 3),
        ("ref(test_accuracy, rule=bp, epoch=last)", 98.3, 0, math.inf),
        ("hypot(ref(best, rule=bp), 0)", 98.5, 0, math.inf),
        ("sqrt(4) + 1e-3", 2.001, 0, math.inf),
        (
            "hypot(mean(test_accuracy, rule=bp, epoch=last), mean(test_accuracy, rule=fa, epoch=last))",
            math.hypot(98.2, 97.8),
            math.hypot(0.2 * 98.2, 0.3 * 97.8) / math.sqrt(2) / math.hypot(98.2, 97.8),
            3,
        ),
        ('mean(angle_deg, rule=fa, layer="fc*", epoch=0)', 26.0, 1.0, 3),
        ('mean(angle_deg, rule=fa, layer="*1", epoch=0)', 21.0, 1.0, 3),
    ],
)
def test_statistics_by_hand(number: str, mean: float, sd: float, n: float) -> None:
    value = measured(number)
    assert (value.mean, value.sd, value.n) == (pytest.approx(mean), pytest.approx(sd), n)


def test_sd_has_ddof_one_and_none_of_its_own() -> None:
    value = measured("sd(test_accuracy, rule=fa, epoch=last)")
    assert value.mean == pytest.approx(0.3) and math.isnan(value.sd)  # with ddof 0 it would be 0.245
    assert measured("mean(test_accuracy, rule=fa, epoch=last)").sd == pytest.approx(0.3)


def test_a_seed_with_fewer_rows_than_the_fullest_is_left_out() -> None:
    whole = table()
    gone = (whole.run == "fa2") & (whole.layer == "fc") & (whole.epoch == 2)
    angle = "mean(angle_deg, rule=fa, layer=all, epoch=last) < 90"
    assert judge(angle, data=whole)["measured"] == "24"
    row = judge(angle, n_min="2", data=whole[~gone])
    assert (row["measured"], row["n"], row["verdict"]) == ("23.5", 2, "holds")  # with all rows 23.67
    assert judge(angle, data=whole[~gone])["why"] == "2 of 3 seeds"


def test_whole_numbers_agree_exactly_and_others_to_half_a_percent() -> None:
    whole, row = table(), "mean(test_accuracy, rule=bp, epoch=last, lag={}) < 99"
    assert judge(row.format(250), data=whole.assign(lag=250))["verdict"] == "holds"
    assert "no test_accuracy at lag=250" in judge(row.format(250), data=whole.assign(lag=251))["why"]
    assert judge(row.format(0.316), data=whole.assign(lag=10**-0.5))["verdict"] == "holds"
    assert judge(row.format(0.32), data=whole.assign(lag=10**-0.5))["verdict"] == "not tested"


def test_mismatch_is_the_norm_of_the_difference() -> None:
    value = measured("mean(mismatch, rule=bp, layer=fc1, epoch=0, seed=0)")  # |W| = 2, |B| = 1, 20 degrees between them
    assert value.mean == pytest.approx(math.hypot(2 - math.cos(math.radians(20)), math.sin(math.radians(20))))


BP_END = "mean(test_accuracy, rule=bp, epoch=last)"


@pytest.mark.parametrize("criterion, verdict", [
    (f"{BP_END} in [98.1, 98.3]", "holds"),
    (f"{BP_END} in [98.2, inf]", "holds"),            # on the bound
    (f"{BP_END} > 98.2", "partly"),                   # strictly it is not above, but within an sd
    (f"{BP_END} in [98.3, 99]", "partly"),            # outside by 0.1, the sd is 0.2
    (f"{BP_END} in [98.5, 99]", "fails"),             # outside by 0.3
    (f"{BP_END} <= 97.9", "fails"),
    (f"{BP_END} >= 98 and {BP_END} <= 98.1", "partly"),
    (f"{BP_END} >= 99 and {BP_END} <= 98.1", "fails"),
    ("sd(test_accuracy, rule=bp, epoch=last) < 0.1", "fails"),
    ("each(mean(test_accuracy, epoch=last) >= 97, rule=[bp, fa])", "holds"),
    ("each(mean(test_accuracy, epoch=last) >= 98.18, rule=[bp, fa])", "partly"),     # bp holds, fa fails
    ("each(mean(test_accuracy, epoch=last) >= 98.3, rule=[bp])", "partly"),          # none fails
    ("each(mean(test_accuracy, epoch=last) >= 98.3, rule=[bp, fa])", "fails"),       # bp only partly, fa not at all
    ("each(mean(angle_deg, rule=fa, epoch=0) <= 26, layer=every)", "partly"),
    ('each(mean(angle_deg, rule=fa, epoch=0) <= 26, layer="*1")', "holds"),
    ("each(mean(angle_deg, rule=fa) >= 21 - epoch, layer=fc1, epoch=[0, 2])", "holds"),
    ("paired(test_accuracy, rule=fa, minus=bp, epoch=last) < 0", "holds"),
    (f"{BP_END} in [target - tolerance, target + tolerance]", "holds"),
    (f"{BP_END} in around(target, tolerance)", "holds"),
    (f"{BP_END} in around(target + 1, tolerance)", "fails"),
    ("at(mean(test_accuracy) in around(target, tolerance), rule=bp, epoch=last)", "holds"),
    ("at(each(mean(test_accuracy) >= 97, rule=[bp, fa]) and mean(angle_deg, rule=fa, layer=fc) > 20, epoch=last)", "holds"),
])  # fmt: skip
def test_verdicts(criterion: str, verdict: str) -> None:
    row = judge(criterion, target="ref(test_accuracy, rule=bp, epoch=last)", tolerance="0.1")
    assert row["verdict"] == verdict and bool(row["why"]) == (verdict != "holds")


def test_each_reports_every_part_and_its_target() -> None:
    row = judge(
        "each(mean(angle_deg, rule=fa, epoch=last) in [target - 1, target + 1], layer=[fc1, fc])",
        target="ref(angle_deg, rule=fa, epoch=last)",
    )
    assert (row["target"], row["measured"], row["sd"], row["n"]) == ("19.5; 25", "fc1 19; fc 29", "1; 1", 3)
    assert row["verdict"] == "partly" and row["why"] == "fc 29 ± 1, wanted 24 to 26"


def test_one_number_of_the_record_flips_a_verdict() -> None:
    criterion, data = f"{BP_END} >= 98.15", table()
    assert judge(criterion, data=data)["verdict"] == "holds"
    row = data.index[(data.rule == "bp") & (data.seed == 2) & (data.epoch == 2) & (data.metric == "test_accuracy")]
    data.loc[row, "value"] = 90.0
    assert judge(criterion, data=data)["verdict"] == "partly"  # the outlier also widens the sd
    data.loc[data.metric == "test_accuracy", "value"] = 90.0
    assert judge(criterion, data=data)["verdict"] == "fails"


def short(rule: str, seed: int) -> pd.DataFrame:
    """The table without the last epoch of one run."""
    data = table()
    return data[~((data.rule == rule) & (data.seed == seed) & (data.epoch == 2))]


def plan(*more: tuple[str, int]) -> pd.DataFrame:
    """The planned runs: the table's and more."""
    runs = [*((rule, seed) for rule in ("bp", "fa") for seed in range(3)), *more]
    return pd.DataFrame([{"run": f"{rule}{seed}", "rule": rule, "seed": seed} for rule, seed in runs])


def lacking(*runs: str) -> dict:
    """A record of the planned runs but for some."""
    configs = {run: config for run, config in sidecar()["configs"].items() if run not in runs}
    keep = table()[lambda t: ~t.run.isin(runs)]
    return {"data": keep, "beside": sidecar(configs=configs), "planned": plan()}


@pytest.mark.parametrize(
    "case, why",
    [
        ({"n_min": "5"}, "3 of 5 seeds"),
        ({"data": short("bp", 1)}, "2 of 3 seeds"),
        ({"data": table().query("epoch < 2")}, "the record has no test_accuracy at epoch=2 (rule=bp)"),
        ({"data": table().query("rule == 'fa'")}, "the record has no test_accuracy at rule=bp (epoch=last)"),
        (lacking("bp1"), "partial record: 5 of 6 runs (2 of 3 at rule=bp)"),
        (
            lacking("fa0", "fa1") | {"criterion": "each(max(test_accuracy, epoch=last) > 0, rule=every)"},
            "partial record: 4 of 6 runs (1 of 3 at rule=fa)",
        ),
        (
            lacking("fa0") | {"criterion": "mean(test_accuracy, rule=all, epoch=last) > 0"},
            "partial record: 5 of 6 runs",
        ),
        (
            {"criterion": f"{BP_END} >= ref(test_accuracy, rule=dfa, epoch=2)"},
            "the reference table has no test_accuracy at rule=dfa (epoch=2)",
        ),
        ({"criterion": f"{BP_END} >= ref(test_accuracy, rule=kp, epoch=2)"}, "the published test_accuracy is unknown"),
        ({"criterion": "mean(val_accuracy, rule=bp, epoch=1) > 0"}, "the record has no val_accuracy"),
        (
            {"criterion": "mean(test_accuracy, rule=bp, epoch=[1, 7]) > 0"},
            "the record has no test_accuracy at epoch=7 (rule=bp)",
        ),
    ],
)
def test_not_tested_says_why(case: dict, why: str) -> None:
    row = judge(**{"criterion": f"{BP_END} > 0"} | case)
    assert (row["verdict"], row["why"], row["measured"]) == ("not tested", why, "")


def test_a_partial_record_judges_the_claims_whose_runs_it_has() -> None:
    """The verdict is the one that the whole record will give; what a statistic of one seed asks for is that seed's
    run."""
    for criterion in (f"{BP_END} > 0", "mean(test_accuracy, rule=fa, epoch=last, seed=[1, 2]) > 0"):
        row = judge(criterion, n_min="2", **lacking("fa0"))
        assert row == judge(criterion, n_min="2") and row["verdict"] == "holds"


def test_runs_that_are_not_planned_judge_nothing() -> None:
    """So digits never judge a claim about MNIST: a run of another data set or recipe has another identity."""
    other = table().assign(run=lambda t: t.run.replace("bp1", "digits"))
    row = judge(f"{BP_END} > 0", data=other, planned=plan())
    assert (row["verdict"], row["measured"]) == ("not tested", "")
    assert row["why"] == "not the paper's table: 1 of its runs not planned, digits first"
    assert judge(f"{BP_END} > 0", planned=plan())["verdict"] == "holds"


@pytest.mark.parametrize(
    "data",
    [
        short("bp", 1),
        table().query("rule != 'bp'"),
        table().assign(value=lambda t: t.value.where((t.rule != "bp") | (t.seed != 1))),
    ],
)
def test_a_diverged_run_fails_the_claims_that_need_it(data: pd.DataFrame) -> None:
    beside = sidecar()
    beside["status"]["bp1"] = {"state": "diverged"}
    row = judge(f"{BP_END} > 0", data=data, beside=beside)
    assert (row["verdict"], row["why"], row["measured"]) == ("fails", "bp diverged with seed 1", "diverged")
    other = judge("mean(angle_deg, rule=fa, layer=fc, epoch=last) > 0", beside=beside)
    assert other["verdict"] == "holds"


def test_a_diverged_run_of_another_place_in_a_sweep_fails_nothing() -> None:
    """An axis that is no field of the recipe, as p2_transfer's networks, tells runs apart by their rows."""
    data = table().assign(network=lambda t: t.run.map({"bp1": "deep"}).fillna("flat"))
    beside = sidecar()
    beside["status"]["bp1"] = {"state": "diverged"}
    flat = judge("mean(test_accuracy, rule=bp, epoch=last, network=flat) > 0", data=data, beside=beside, n_min="1")
    assert flat["verdict"] == "holds"
    lost = data[(data.run != "bp1") | (data.epoch < data.epoch.max())]
    deep = judge("mean(test_accuracy, rule=bp, epoch=last, network=deep) > 0", data=lost, beside=beside, n_min="1")
    assert (deep["verdict"], deep["why"]) == ("fails", "bp diverged with seed 1")


def test_no_record_still_shows_the_target() -> None:
    subject = claim(f"{BP_END} > target", target="ref(test_accuracy, rule=bp, epoch=last)")
    row = claims.judge(subject, None, REFERENCE)
    assert (row["target"], row["verdict"], row["why"]) == ("98.3", "not tested", "no record")
    assert claims.judge(replace(subject, names={}), None, REFERENCE)["target"].startswith("ref(")
    assert claims.judge(subject, None, REFERENCE[:0])["target"] == "unknown"


@pytest.mark.parametrize("bad", [
    "mean(test_accuracy, rule=bp",
    "mean(test_accuracy, rule=bp)",  # a number, not a comparison
    "1 < mean(test_accuracy, rule=bp)",  # measures nothing
    "mean(test_accuracy, rule=bp) == 1",
    "mean(test_accuracy, rule=bp) > 1 or mean(test_accuracy, rule=bp) < 0",
    "0 < mean(test_accuracy, rule=bp) < 1",
    "mean(test_accuracy, rule=bp) in (0, 1)",
    "mean(test_accuracy, rule=bp) > target",  # the target is words
    "mean(test_accuracy, rule=bp) > expansion",  # outside each()
    "mean(test_accuracy, ruel=bp) > 1",
    "mean(test_accuracy, rule=3) > 1",
    "mean(test_accuracy, epoch=first) > 1",
    "mean(test_accuracy, epoch=[last, 1]) > 1",
    "mean(test_accuracy, minus=bp) > 1",
    "paired(test_accuracy, rule=fa) > 1",
    "median(test_accuracy, rule=bp) > 1",
    "mean(test_accuracy, rule=[]) > 1",
    "each(mean(test_accuracy) > 1)",
    "each(each(mean(test_accuracy) > 1, rule=[bp]), layer=[fc])",
    "mean(test_accuracy, rule=bp) ** 2 > 1",
    "mean(test_accuracy, rule=bp) > True",
    "mean(test_accuracy, rule=bp) > 1j",
    "__import__('os').system('touch hacked') > 1",
    "__import__(os) > 1",
    "mean(test_accuracy, rule=__import__('os')) > 1",
    "mean.__class__(test_accuracy) > 1",
    "mean(test_accuracy, **{'rule': 'bp'}) > 1",
    "(lambda: 1)() > 1",
    "[x for x in (1,)] > 1",
    "f'{1}' > 1",
    "mean(test_accuracy := 1) > 1",
    "(" * 500 + "1" + ")" * 500,
    "mean(test_accuracy)\0 > 1",
    "mean(test_accuracy.__class__, rule=bp) > 1",
    "mean(test_accuracy, rule=bp).mean > 1",
    "mean(test_accuracy, rule=bp)[0] > 1",
    "mean(test_accuracy, rule=bp.upper) > 1",
    "mean(test_accuracy, rule=[bp][0]) > 1",
    "mean(test_accuracy, rule=[r for r in bp]) > 1",
    "mean((lambda: bp), rule=bp) > 1",
    "mean(test_accuracy, rule=lambda: bp) > 1",
    "mean(test_accuracy, rule={bp}) > 1",
    "mean(test_accuracy, rule=bp) > (1 if fa else 2)",
    "mean(test_accuracy, rule=bp) > __builtins__",
    "mean(test_accuracy, rule=bp) > eval('1')",
    "mean(test_accuracy, rule=bp) > max(1, 2)",
    "open(test_accuracy, rule=bp) > 1",
    "mean(*test_accuracy) > 1",
    "mean(test_accuracy, rule=bp) in around(1)",
    "mean(test_accuracy, rule=every, epoch=last) > 1",
    "each(mean(test_accuracy, epoch=last) > 1, rule=all)",
    "falls(test_accuracy, rule=bp)",
    "falls(test_accuracy, over=epoch, epoch=1, rule=bp)",
    "order(test_accuracy, epoch=last)",
    "order(test_accuracy, [bp, fa], epoch=last, by=layer)",
    "order(test_accuracy, [bp, fa], epoch=last, margin=target)",
    "same(test_accuracy, rule=fa, minus=bp, epoch=last)",
    "same(test_accuracy, rule=fa, epoch=last, t=2)",
])  # fmt: skip
def test_malformed_criteria_name_the_claim_and_run_nothing(bad: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="claim c1, criterion: ") as error:
        judge(bad, target="as BP")
    assert not list(tmp_path.iterdir()) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad", ["mean(test_accuracy, rule=bp) == 1", "mean(test_accuracy, rule=[]) > 1", f"{BP_END} > target"]
)
def test_what_needs_no_record_to_be_seen_wrong_is_refused_when_the_table_is_read(bad: str) -> None:
    with pytest.raises(UserError, match="claim c1, criterion: "):
        claim(bad, target="as BP")


@pytest.mark.parametrize("bad", ["mean(test_accuracy, rule=bp)", "ref(test_accuracy, rule=bp) + os", "sqrt(expansion)"])
def test_malformed_targets_name_the_column(bad: str) -> None:
    with pytest.raises(UserError, match="claim c1, target: "):
        claim(f"{BP_END} > target", target=bad)


@pytest.mark.parametrize(
    "criterion, axis",
    [
        ("mean(test_accuracy, epoch=last) > 0", "rule"),
        ("mean(test_accuracy, rule=bp) > 0", "epoch"),
        ("mean(angle_deg, rule=bp, epoch=last) > 0", "layer"),
        ("mean(test_accuracy, rule=bp, epoch=1) > ref(best, seed=0) + ref(angle_deg, epoch=2)", "layer"),
    ],
)
def test_an_open_axis_is_an_error(criterion: str, axis: str) -> None:
    with pytest.raises(UserError, match=f"claim c1, criterion: .*several values of {axis}"):
        judge(criterion)


def test_swept_axes_match_rounded_values_and_name_numbers() -> None:
    data = pd.DataFrame(
        [
            {
                "run": "r",
                "rule": "pfa",
                "seed": s,
                "epoch": 0,
                "layer": "",
                "metric": "eig_sd",
                "value": x**-0.5 + 0.001 * s,
                "expansion": x,
            }
            for x in (10**0.2, 10.0)
            for s in range(3)
        ]
    )
    for high, verdict in ((0.002, "holds"), (0.0005, "partly"), (-0.001, "fails")):  # means 0.001 above, sd 0.001
        row = claims.judge(
            claim(
                f"each(mean(eig_sd, rule=pfa, epoch=0) <= target + {high}, expansion=[1.585, 10])",
                target="1 / sqrt(expansion)",
            ),
            data,
            REFERENCE,
        )
        assert row["verdict"] == verdict and row["target"] == "0.7943; 0.3162"
        assert row["measured"] == "expansion=1.585 0.7953; expansion=10 0.3172"


def test_the_table_loads_and_says_where_numbers_are_from() -> None:
    table = claims.load()
    assert {c.name for c in table} >= {"p3_fig2", "p3_fig3"}
    for c in table:
        assert c.id.startswith(c.name + "_") and c.name.startswith(c.paper)


def test_every_published_value_that_a_claim_uses_exists() -> None:
    for c in claims.load():
        row = claims.judge(c, None, records.reference(c.name))
        assert row["target"] != "unknown", f"{c.id}: {c.target} is not in data/reference/{c.name}.csv"


def test_a_broken_table_is_refused(tmp_path: Path) -> None:
    head, path = ",".join(claims.COLUMNS), tmp_path / "p3_fig2.csv"
    good = 'c1,Figure 2,it learns,0,none,ours,"mean(test_accuracy, rule=bp, epoch=last) > target",1'
    for text, message in (
        (head.replace("n_min", "n"), "has the columns"),
        (f"{head}\n{good}\n{good}", "c1 is in p3_fig2.csv twice"),
        (f"{head}\n{good.replace(',ours,', ',,')}", "c1: a column is empty"),
        (f"{head}\n{good[:-1]}0", "c1: n_min"),
        (f"{head}\n{good.replace('mean', 'median')}", "c1, criterion: 'median"),
    ):
        path.write_text(text + "\n")
        with pytest.raises(UserError, match=message):
            claims.load(tmp_path)
    path.write_text(f"{head}\n{good}\n")
    (found,) = claims.load(tmp_path)
    assert (found.n_min, found.paper, found.name) == (1, "p3", "p3_fig2")


def test_verdicts_read_the_table_of_the_mode(monkeypatch) -> None:
    asked = []

    def read(experiment: str, mode: str = "record") -> pd.DataFrame:
        asked.append((experiment, mode))
        raise UserError("no such table")

    monkeypatch.setattr(records, "read", read)
    rows = claims.verdicts("p3_fig2", mode="quick")
    assert asked == [("p3_fig2", "quick")] and set(rows.verdict) == {"not tested"} and set(rows.why) == {"no record"}
    assert list(rows) == ["id", "claim", "target", "tolerance", "criterion", "measured", "sd", "n", "verdict", "why"]
    with pytest.raises(UserError, match="no claim is about 'p9'"):
        claims.verdicts("p9")


def like_the_paper(experiment: str) -> pd.DataFrame:
    """A record of five seeds (Figure 3: a hundred) that equals the published numbers, and fills in what is unknown."""
    known = records.reference(experiment)
    if experiment == "p3_fig3":
        rows = known.assign(run="r", layer="", seed=0)
        sd = rows[rows.metric == "eig_mean"].query("rule == 'pfa_o'").assign(metric="eig_sd", value=0.0)
        return pd.concat([pd.concat([rows, sd]).assign(seed=s) for s in range(100)])
    rows = []
    for rule in ("bp", "fa", "dfa", "usf", "pfa", "pfa_o"):
        for metric, layer, epochs, default in (
            ("test_accuracy", "", (0, 1, 20, 40), 90.0),
            *(
                (m, layer, (0, 1, 40), d)
                for layer in ("fc1", "fc2", "fc")
                for m, d in (("angle_deg", 90.0), ("norm_ratio", 1.0), ("weight_norm", 1.0))
            ),
        ):
            if rule in ("bp", "dfa") and layer:
                continue
            for epoch in epochs:
                published = known[
                    (known.rule == rule)
                    & (known.metric == metric)
                    & (known.epoch == epoch)
                    & (known.layer.fillna("") == layer)
                ].value
                value = float(published.iloc[0]) if len(published) else default - epoch % 2 * (rule != "bp")
                rows.append(
                    {"run": rule, "rule": rule, "epoch": epoch, "layer": layer, "metric": metric, "value": value}
                )
    return pd.concat([pd.DataFrame(rows).assign(seed=s) for s in range(5)])


@pytest.mark.parametrize("experiment", ["p3_fig2", "p3_fig3"])
def test_a_record_like_the_paper_satisfies_every_claim(experiment: str) -> None:
    reference, table = records.reference(experiment), like_the_paper(experiment)
    for c in claims.load():
        if c.name == experiment and "mismatch" not in c.criterion:  # what norms of W the paper had is unknown
            row = claims.judge(c, table, reference)
            assert row["verdict"] == "holds", (row["id"], row["measured"], row["why"])


def test_the_mismatch_targets_follow_from_the_schedule() -> None:
    """SGD with momentum shrinks R - B^T W by decay alone: 937 steps an epoch, learning rate halved after 20 and 30."""
    left, velocity, after = 1.0, 0.0, {}
    for epoch in range(1, 41):
        rate, decay = 0.01 * 0.5 ** ((epoch > 20) + (epoch > 30)), 0.03 if epoch == 1 else 0.03 * 0.003
        for _ in range(937):
            velocity = 0.9 * velocity + decay * left
            left -= rate * velocity
        after[epoch] = left
    targets = {c.id: float(c.target) for c in claims.load() if c.id.startswith("p3_fig2_mismatch")}
    assert targets["p3_fig2_mismatch_epoch1"] == pytest.approx(after[1], abs=5e-6)
    assert targets["p3_fig2_mismatch_end"] == pytest.approx(after[40], abs=5e-6)


# ------------------------------------------------------------------------------------------- what is short for others


@pytest.mark.parametrize("short, whole", [
    ("falls(angle_deg, over=epoch, epoch=[0, 1, 2], rule=fa, layer=fc)",
     "mean(angle_deg, epoch=1, rule=fa, layer=fc) - mean(angle_deg, epoch=0, rule=fa, layer=fc) < 0 and "
     "mean(angle_deg, epoch=2, rule=fa, layer=fc) - mean(angle_deg, epoch=1, rule=fa, layer=fc) < 0"),
    ("falls(angle_deg, over=epoch, rule=fa, layer=fc)", "falls(angle_deg, over=epoch, epoch=[0, 1, 2], rule=fa, layer=fc)"),
    ("falls(angle_deg, over=epoch, rule=fa, layer=fc, margin=2)",
     "mean(angle_deg, epoch=1, rule=fa, layer=fc) - mean(angle_deg, epoch=0, rule=fa, layer=fc) < -2 and "
     "mean(angle_deg, epoch=2, rule=fa, layer=fc) - mean(angle_deg, epoch=1, rule=fa, layer=fc) < -2"),
    ("rises(test_accuracy, over=epoch, epoch=[1, 2], rule=fa, margin=0.5)",
     "mean(test_accuracy, epoch=2, rule=fa) - mean(test_accuracy, epoch=1, rule=fa) > 0.5"),
    ("rises(test_accuracy, over=epoch, epoch=[1, 2], rule=fa, by=seed)",
     "paired(test_accuracy, rule=fa, epoch=2, minus_epoch=1) > 0"),
    ("order(test_accuracy, [fa, bp], epoch=last)",
     "mean(test_accuracy, rule=fa, epoch=last) - mean(test_accuracy, rule=bp, epoch=last) < 0"),
    ("order(test_accuracy, [bp, fa], epoch=last)",
     "mean(test_accuracy, rule=bp, epoch=last) - mean(test_accuracy, rule=fa, epoch=last) < 0"),
    ("order(test_accuracy, [fa, bp], epoch=last, by=seed, margin=tolerance)",
     "paired(test_accuracy, rule=fa, minus=bp, epoch=last) < -tolerance"),
    ("each(order(angle_deg, [bp, fa], epoch=last), layer=every)",
     "each(mean(angle_deg, rule=bp, epoch=last) - mean(angle_deg, rule=fa, epoch=last) < 0, layer=[fc1, fc])"),
    ("same(test_accuracy, rule=fa, minus=bp, epoch=last, t=tolerance)",
     "paired(test_accuracy, rule=fa, minus=bp, epoch=last) in around(0, tolerance * hypot("
     "sd(test_accuracy, rule=fa, epoch=last), sd(test_accuracy, rule=bp, epoch=last)) / sqrt(3))"),
    ("at(same(test_accuracy, minus_epoch=1, t=tolerance), rule=fa, epoch=2)",
     "paired(test_accuracy, rule=fa, epoch=2, minus_epoch=1) in around(0, tolerance * hypot("
     "sd(test_accuracy, rule=fa, epoch=2), sd(test_accuracy, rule=fa, epoch=1)) / sqrt(3))"),
])  # fmt: skip
def test_short_forms_are_the_comparisons_that_they_stand_for(short: str, whole: str) -> None:
    a, b = (judge(text, tolerance="0.3") for text in (short, whole))
    assert {k: a[k] for k in a if k != "criterion"} == {k: b[k] for k in b if k != "criterion"}


@pytest.mark.parametrize("criterion, verdict", [
    ("falls(angle_deg, over=epoch, rule=fa, layer=fc, by=seed)", "holds"),               # one degree an epoch
    ("falls(angle_deg, over=epoch, rule=fa, layer=fc, by=seed, margin=1)", "fails"),     # not by more than one
    ("rises(angle_deg, over=epoch, rule=fa, layer=fc, by=seed)", "fails"),
    ("rises(test_accuracy, over=epoch, epoch=[1, 2], rule=bp)", "holds"),
    ("order(test_accuracy, [fa, bp], epoch=last)", "holds"),
    ("order(test_accuracy, [bp, fa], epoch=last)", "fails"),
])  # fmt: skip
def test_steps_by_hand(criterion: str, verdict: str) -> None:
    row = judge(criterion)
    assert row["verdict"] == verdict and bool(row["why"]) == (verdict != "holds")


def test_every_is_what_the_record_has_and_without_one_what_is_published() -> None:
    row = judge("each(mean(angle_deg, rule=fa, epoch=0) > 0, layer=every)", data=table().query("layer != 'fc1'"))
    assert row["measured"] == "fc 31"
    subject = claim(
        "each(mean(angle_deg, rule=fa, epoch=2) > target, layer=every)", target="ref(angle_deg, rule=fa, epoch=2)"
    )
    assert claims.judge(subject, None, REFERENCE)["target"] == "19.5; 25"


def test_axes_are_the_columns_of_the_table() -> None:
    """A column that nobody announced: of text one takes words, of numbers one is a number within each()."""
    data = pd.concat(
        [
            table().assign(norm=norm, gain=gain, value=lambda t: t.value + gain)
            for norm, gain in (("batch", 0.5), ("none", 2.0))
        ]
    )
    end = "mean(test_accuracy, rule=bp, epoch=last"
    assert judge(f"each({end}) >= 98.2 + gain, gain=[0.5, 2])", data=data)["measured"] == "gain=0.5 98.7; gain=2 100.2"
    assert judge(f"{end}, norm=none) > 100", data=data)["verdict"] == "holds"
    for wrong, message in (
        (f"{end}) > 0", "several values of (norm|gain)"),
        (f"{end}, norm=2) > 0", "norm takes words"),
        (f"{end}, gain=batch) > 0", "gain takes numbers"),
        (f"{end}, depht=2) > 0", "unknown axis depht; known: epoch, gain, layer, norm, rule, seed"),
    ):
        with pytest.raises(UserError, match=message):
            judge(wrong, data=data)


@pytest.mark.parametrize("criterion, why", [
    (f"{BP_END} in [98.5, 99]", "98.2 ± 0.2, wanted 98.5 to 99"),
    (f"{BP_END} < 98", "98.2 ± 0.2, wanted below 98"),
    (f"{BP_END} <= 98", "98.2 ± 0.2, wanted at most 98"),
    (f"{BP_END} > 99", "98.2 ± 0.2, wanted above 99"),
    (f"{BP_END} in [99, inf]", "98.2 ± 0.2, wanted at least 99"),
    ("sd(test_accuracy, rule=bp, epoch=last) < 0.1", "0.2, wanted below 0.1"),
    (f"{BP_END} in [98, 99]", ""),
])  # fmt: skip
def test_a_reason_gives_the_interval(criterion: str, why: str) -> None:
    assert judge(criterion)["why"] == why


def test_criteria_are_short() -> None:
    long = {c.id for c in claims.load() if len(c.criterion) > 250}
    assert long == {"p1_normalization_angle", "p1_concordance_most"}, "fixed before their runs, not to be shortened now"


@pytest.mark.parametrize("mean, sd, shown", [
    (-7.867, 1.2, "-7.9"), (0.4033, 0.7, "0.4"), (56.3, 12, "56"), (1234.5, 500, "1234"), (0.03, 1, "0.03"),
    (13.7012, 0.018, "13.7"), (0.99871, 0.00042, "0.9987"), (98.04, 0, "98.04"), (5.0, math.nan, "5"), (0, 1, "0"),
])  # fmt: skip
def test_a_measured_number_is_shown_to_the_second_digit_of_its_sd(mean: float, sd: float, shown: str) -> None:
    assert selection.Value(mean, sd, 3).shown() == shown
