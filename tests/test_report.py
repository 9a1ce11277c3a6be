"""The report and the README's generated blocks: not stale, and made of what the tables say."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from fa.errors import UserError
from fa.results import claims, records, report


def test_nothing_generated_is_stale() -> None:
    """Fails, too, while README.md or REPORT.md is missing."""
    for path, text in report.render().items():
        assert path.exists(), f"{path.name} is missing; run python -m fa report"
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale; run python -m fa report"


def test_rendering_depends_on_nothing_but_the_files(monkeypatch) -> None:
    first = report.render()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert report.render() == first


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Path:
    """A repository with a README, one figure, and no record."""

    def none(experiment: str, mode: str = "record") -> dict:
        raise UserError("no record")

    (tmp_path / "figures").mkdir()
    trail = {"caption": "What | one sees.", "notebook": "32_x.ipynb"}
    (tmp_path / "figures" / "p3_fig2.json").write_text(json.dumps(trail))
    (tmp_path / "README.md").write_text(
        "# Title\n<!-- claims:begin -->outdated<!-- claims:end -->\n"
        "kept\n<!-- gallery:begin -->\n<!-- gallery:end -->\n"
    )
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(records, "read", none)
    monkeypatch.setattr(records, "sidecar", none)
    return tmp_path


def test_without_records_every_claim_is_not_tested(site: Path) -> None:
    report.write()
    text, readme = (site / "REPORT.md").read_text(encoding="utf-8"), (site / "README.md").read_text(encoding="utf-8")
    n = len(claims.load())
    assert text.count("not tested: no record") == n
    per_figure = pd.Series([c.experiment for c in claims.load()]).value_counts()
    assert (
        all(f"| {k} | 0 | 0 | 0 | {k} (no record" in readme for k in per_figure) and "No claim is tested yet." in readme
    )
    assert f"Of {n} claims, 0 hold, 0 hold partly, 0 fail and {n} are not tested.\n" in text
    assert all(f"`{c.id}`: `{c.criterion}`" in text for c in claims.load())
    assert readme.startswith("# Title\n") and "\nkept\n" in readme and "outdated" not in readme
    assert "[![p3_fig2](figures/p3_fig2.png)](figures/p3_fig2.pdf)" in readme and "(notebooks/32_x.ipynb)" in readme
    assert report.render() == {site / "REPORT.md": text, site / "README.md": readme}  # fills again


def test_the_order_is_that_of_rescience_c(site: Path) -> None:
    text = report.render()[site / "REPORT.md"]
    heads = [
        "## Reproducibility summary",
        "## 1 Introduction",
        "## 2 Scope",
        "## 3 Methodology",
        "### 3.1 Model",
        "### 3.2 Datasets",
        "### 3.3 Hyperparameters",
        "### 3.4 Experimental setup",
        "### 3.5 Computational",
        "## 4 Results",
        "## 5 Discussion",
        "### 5.1 What was easy",
        "### 5.2 What was difficult",
        "### 5.4 Communication",
        "## References",
    ]
    places = [text.index(f"\n{head}") for head in heads]
    assert places == sorted(places)


def test_verdicts_measurements_and_machine_are_told(site: Path, monkeypatch) -> None:
    blank = {
        "target": "5",
        "tolerance": "1",
        "measured": "",
        "sd": "",
        "n": "",
        "verdict": "not tested",
        "why": "no record",
    }
    rows = [blank | {"id": c.id, "claim": c.claim, "criterion": c.criterion} for c in claims.load()]
    rows[0] |= {"measured": "98.38", "sd": "0.03", "n": 5, "verdict": "holds", "why": ""}
    rows[1] |= {"measured": "fc1 1; fc 2", "sd": "0.1; nan", "n": 5, "verdict": "fails", "why": "fc 2 is off"}
    beside = {
        "finished": 30,
        "planned": 30,
        "wall_seconds": 61.2,
        "environments": [{"torch": "2.11.0", "cuda": "", "commit": "abc1234"}],
        "configs": {
            f"{r}{s}": {"experiment": "e", "rule": r, "seed": s, "lr": 0.01, "weight_decay": d}
            for r, d in (("bp", 1e-4), ("pfa", 9e-5))
            for s in range(5)
        },
    }
    monkeypatch.setattr(claims, "verdicts", lambda: pd.DataFrame(rows))
    monkeypatch.setattr(records, "sidecar", lambda experiment: beside)
    text = report.render()[site / "REPORT.md"]
    assert "| 98.38 ± 0.03 | 5 | holds |" in text and "| fc1 1 ± 0.1; fc 2 | 5 | fails |" in text
    assert (
        "1 hold," in text
        and "1 are from the papers and 0 are predictions or derivations of ours; 0 rest on one run" in text
    )
    assert f"* fails: {rows[1]['claim']} — fc 2 is off." in text
    assert "30 of 30 runs, 61 s in all (commit abc1234, torch 2.11.0)." in text
    assert "5 seeds): lr 0.01." in text and "| pfa | 9e-05 |" in text


def test_a_partial_record_is_shown_and_not_judged(site: Path, monkeypatch) -> None:
    class Page:
        def __init__(self, experiment: str) -> None:
            self.experiment = experiment

        def table(self) -> pd.DataFrame:
            return pd.DataFrame({"metric": ["train_loss", "val_accuracy"]})

        def compare(self, metric: str) -> str:
            return f"{metric} of {self.experiment}"

        def partial(self) -> str:
            return "1 of 5 seeds"

    assert report._so_far("p3_fig4") == ""  # here it has no record
    monkeypatch.setattr(report, "Notebook", Page)
    monkeypatch.setattr(report, "_sidecar", lambda experiment: {"partial": experiment == "p3_fig4"})
    assert report._so_far("p3_fig2") == ""
    text = report._so_far("p3_fig4")
    assert "(1 of 5 seeds)" in text and "val_accuracy of p3_fig4" in text and "test_accuracy" not in text


@pytest.mark.parametrize(
    "readme",
    [None, "no markers", "<!-- claims:end --><!-- claims:begin -->", "<!-- claims:begin --><!-- claims:end -->" * 2],
)
def test_a_readme_without_its_markers_is_refused(site: Path, readme: str | None) -> None:
    (site / "README.md").unlink() if readme is None else (site / "README.md").write_text(readme)
    with pytest.raises(UserError, match="README.md"):
        report.render()


def test_table_cells_cannot_break_the_table() -> None:
    assert report._markdown(pd.DataFrame({"a": ["x|y\nz"]}), {"a": "A"}) == "| A |\n| --- |\n| x\\|y z |"
