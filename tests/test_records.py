"""The committed records: whole, unaltered, and made by recipes that are still the present ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

from fa import ROOT, UserError, experiments
from fa.results import claims, records, registered
from fa.train.config import Config
from fa.train.loop import fingerprint

RECORDS = sorted(p.stem for p in (ROOT / "data" / "records").glob("*.json"))


@pytest.mark.parametrize("experiment", RECORDS)
def test_the_table_is_what_was_collected(experiment: str) -> None:
    path, about = records.record_path(experiment), records.sidecar(experiment)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"], (
        f"{path.name} was altered after it was collected"
    )
    assert path.stat().st_size < 2_000_000
    table = records.read(experiment)
    assert set(records.COLUMNS) <= set(table.columns)
    assert set(table.run) == set(about["configs"]) == set(about["status"])
    swept = [c for c in table.columns if c not in records.COLUMNS]
    assert not table.duplicated(["run", "seed", "epoch", "layer", "metric", *swept]).any()


@pytest.mark.parametrize("experiment", RECORDS)
def test_a_run_is_named_by_its_settings(experiment: str) -> None:
    planned = {c.run for c in experiments.plan(*records.figure_of(experiment))}
    about, held = records.sidecar(experiment), records.holders()
    assert set(about["configs"]) <= planned, (
        f"{experiment} holds runs that are not planned any more; train and collect it again"
    )
    assert about["partial"] == (not planned <= set(held))


def kind(c: Config) -> tuple[str, ...]:
    """Recipes of one kind run the same code in their fingerprints, for which most networks are ResNet-8."""
    itself = c.model.startswith(("mlp", "lenet", "arch1", "plain"))
    more = c.weights, c.noisy, c.update_noise > 0, c.alternate > 0, c.delay_epochs > 0
    return c.rule, c.model if itself else "resnet8", c.optimizer, *map(str, more), *sorted(c.rule_options)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kinds", "all"])
@pytest.mark.parametrize("experiment", RECORDS)
def test_no_record_is_outgrown(experiment: str, whole: bool) -> None:
    """The first three losses of one recipe of each kind that no record before this one has: rule and names of its
    options, network, optimizer, noise and phases. The slow form compares all losses of all recipes."""
    about, moved, seen = records.sidecar(experiment), [], set()
    recipes = {run: Config(**about["configs"][run]) for run in about["fingerprints"]}
    for name in RECORDS[: RECORDS.index(experiment)]:
        earlier = records.sidecar(name)
        seen |= {kind(Config(**earlier["configs"][run])) for run in earlier["fingerprints"]}
    kinds = {kind(c): run for run, c in reversed(recipes.items())}
    for run in recipes if whole else (run for of, run in kinds.items() if of not in seen):
        told = about["fingerprints"][run][: 20 if whole else 3]
        if fingerprint(recipes[run], 20 if whole else 6)[: len(told)] != told:
            moved.append(recipes[run].rule)
    assert not moved, (
        f"{experiment}: the recipe of {', '.join(moved)} changed since it was trained; raise its revision and train again"
    )


@pytest.mark.parametrize("name", RECORDS)
def test_claims_are_those_of_before_the_runs(name: str) -> None:
    """The sidecar has the digests that the claims had when the runs began; of records that were made before sidecars
    had them, those of the claims as they were committed then."""
    before, now = records.sidecar(name)["claims"], registered.digests(name)
    assert not (changed := sorted(c for c in before.keys() & now if before[c] != now[c])), (
        f"{changed}: a target, tolerance, criterion or n_min was changed after data/records/{name}.csv was made"
    )
    assert not (gone := sorted(before.keys() - now)), f"{gone}: taken away after data/records/{name}.csv was made"
    late = {claim.id: claim.claim for claim in claims.load() if claim.id in now.keys() - before}
    assert all("exploratory" in text for text in late.values()), (
        f"{sorted(late)}: written after data/records/{name}.csv was made; a claim that is written then says 'exploratory'"
    )


def test_a_claim_that_is_changed_after_its_runs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its target, tolerance, criterion and n_min count; its words do not."""
    monkeypatch.setattr(registered, "ROOT", tmp_path)
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "data" / "claims" / "p3_fig2.csv"
    path.parent.mkdir(parents=True)
    row = dict.fromkeys(claims.COLUMNS, "x") | {"id": "a", "target": "98", "n_min": "5"}

    def write(**changed: str) -> dict[str, str]:
        pd.DataFrame([row | changed]).to_csv(path, index=False)
        return registered.digests("p3_fig2")

    first = write()
    assert write(claim="other words") == first and set(first) == {"a"}
    assert all(write(**{column: "97"}) != first for column in ("target", "tolerance", "criterion", "n_min"))
    write()
    registered.note("p3_fig2")
    write(target="97")
    registered.note("p3_fig2")  # a later call of fa run
    assert registered.noted("p3_fig2") == first != registered.digests("p3_fig2")
    assert registered.noted("p3_fig3") == {}


@pytest.mark.parametrize("path", sorted((ROOT / "figures").glob("*.json")), ids=lambda p: p.stem)
def test_a_figure_is_drawn_from_the_present_table(path: Path) -> None:
    figure = json.loads(path.read_text())
    table = ROOT / (figure.get("table") or figure["code"])  # a drawing has no table
    assert hashlib.sha256(table.read_bytes()).hexdigest() == figure["sha256"], f"{path.stem} is older than {table.name}"
    for kind, text in (("pdf", b"%PDF-"), ("png", b"\x89PNG")):
        assert path.with_suffix(f".{kind}").read_bytes().startswith(text), f"{path.stem}.{kind} is no {kind}"


def test_a_missing_record_says_how_to_make_it() -> None:
    for read in (records.read, records.sidecar):  # p3_fig1 is drawn from code
        with pytest.raises(
            UserError, match="there is no data/records/p3_fig1.*; set mode='quick' or 'paper' to make it"
        ):
            read("p3_fig1")
        with pytest.raises(UserError, match="unknown experiment 'p3_figg2'; did you mean 'p3_fig2'. known: "):
            read("p3_figg2")


def test_a_table_comes_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA_BUILD", str(tmp_path))
    rows = {
        "run": "a",
        "rule": "fa",
        "seed": 0,
        "epoch": [1, 1],
        "layer": ["", "fc1"],
        "depth": [None, 1],
        "metric": "m",
    }
    table = pd.DataFrame({**rows, "value": [1 / 3, 2.0]})
    path = records.write("x", "quick", table, {"configs": {}, "status": {}, "environments": []})
    again = records.read("x", "quick")
    assert list(again.layer) == ["", "fc1"] and again.value.tolist() == pytest.approx([1 / 3, 2.0], rel=1e-7)
    assert records.sidecar("x", "quick")["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in sorted(tmp_path.glob("quick/*"))] == ["x.csv", "x.json"]  # nothing half written is left


def test_collecting_makes_no_fingerprint_of_a_run_that_a_record_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by the code as it is, it could never show that the code has changed since."""
    a, b, c = (Config("bp", 0, lr=lr) for lr in (0.1, 0.2, 0.3))
    monkeypatch.setattr(registered, "fingerprint", lambda config: [f"made now, lr {config.lr}"])
    kept = [a, a.vary(seed=1), b]
    found = registered.fingerprints(
        kept, [c, c.vary(seed=1), b.vary(seed=1)], {a.run: ["of then"], "gone": ["of then"]}
    )
    assert found == {a.run: ["of then"], c.run: ["made now, lr 0.3"]}


def test_a_table_that_was_edited_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads it, a report or a collection that would give it a new checksum."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    rows = [["r", "bp", 0, 1, "", None, "test_accuracy", 98.0]]
    path = records.write(
        "p3_fig2",
        "paper",
        pd.DataFrame(rows, columns=records.COLUMNS),
        {"configs": {}, "status": {}, "environments": []},
    )
    assert records.read("p3_fig2").value.tolist() == [98.0]
    path.write_text(path.read_text().replace("98", "99"))
    with pytest.raises(UserError, match="p3_fig2.csv was changed after"):
        records.read("p3_fig2")
