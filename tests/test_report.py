"""The report and the README's generated blocks: not stale, and made of what the tables say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from fa import citations, experiments
from fa.errors import UserError
from fa.results import claims, markdown, records, report


@pytest.fixture(scope="module")
def rendered() -> dict[Path, str]:
    """What should be on disk."""
    return report.render()


def test_nothing_generated_is_stale(rendered: dict[Path, str]) -> None:
    """Fails, too, while one of the five generated texts is missing."""
    names = {path.relative_to(report.ROOT).as_posix() for path in rendered}
    assert names == {"REPORT.md", "REPORT_details.md", "README.md", "docs/costs.md", "figures/README.md"}
    for path, text in rendered.items():
        assert path.exists(), f"{path.name} is missing; run python -m fa report"
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale; run python -m fa report"
    assert len(rendered[report.ROOT / "REPORT.md"].encode()) <= 40_000
    by_hand = [line for line in rendered[report.ROOT / "README.md"].splitlines() if not line.startswith("| [")]
    assert len(by_hand) <= 113


@pytest.mark.slow
def test_rendering_depends_on_nothing_but_the_files(rendered: dict[Path, str], monkeypatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert report.render() == rendered


def test_every_claim_and_source_is_in_the_details_and_every_text_belongs_to_a_figure() -> None:
    details = (report.ROOT / "REPORT_details.md").read_text(encoding="utf-8")
    for c in claims.load():
        for text in (c.id, c.criterion, c.source):
            assert text.replace("|", "\\|") in details
    texts = {p.stem for p in (report.ROOT / "report").glob("*.md")} - {"REPORT.in", "REPORT_details.in"}
    assert texts <= {c.name for c in claims.load()} | {p.stem for p in (report.ROOT / "figures").glob("*.json")}


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Path:
    """A repository with templates, a README, one figure, and no record."""

    def none(*_: object) -> dict:
        raise UserError("no record")

    (tmp_path / "figures").mkdir()
    trail = {"caption": "What | one sees. More.", "notebook": "notebooks/32_x.ipynb"}
    (tmp_path / "figures" / "p3_fig2.json").write_text(json.dumps(trail))
    (tmp_path / "figures" / "p9_new.json").write_text(json.dumps(trail))
    (tmp_path / "README.md").write_text("# Title\n<!-- figures:begin -->outdated<!-- figures:end -->\nkept\n")
    shutil.copytree(report.ROOT / "report", tmp_path / "report")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(records, "union", none)
    return tmp_path


def test_without_records_every_claim_is_not_tested(site: Path) -> None:
    report.write()
    text, readme, details, gallery = (
        (site / name).read_text(encoding="utf-8")
        for name in ("REPORT.md", "README.md", "REPORT_details.md", "figures/README.md")
    )
    n = len(claims.load())
    assert details.count("| not tested | no record |") == n
    per_figure = pd.Series([c.name for c in claims.load()]).value_counts()
    names = {records.figure_of(name)[0] for name in per_figure.index}
    assert sum(line.startswith("| [") for line in readme.splitlines()) == len(names)
    for name in names:  # both scales share a row
        small = per_figure.get(f"{name}_small")
        of_small = f" (small scale: {small} not tested)" if small else ""
        assert f"| {per_figure[name]} not tested{of_small} |" in readme
    assert all(f"`{name}` ({count})" in text for name, count in per_figure.items())
    assert f"0 claims hold, 0 hold partly, 0 fail, {n} are not tested" in text
    assert all(
        f"| `{c.id}` |" in details and f"| `{c.criterion}` |".replace("|", "\\|")[2:-3] in details
        for c in claims.load()
    )
    assert readme.startswith("# Title\n") and "\nkept\n" in readme and "outdated" not in readme
    assert "[![p3_fig2](p3_fig2.png)](p3_fig2.pdf)" in gallery and "(../notebooks/32_x.ipynb)" in gallery
    assert "What | one sees. More." in gallery and "\nWhat | one sees ([PDF](p9_new.pdf)" in gallery
    assert all(path.read_text(encoding="utf-8") == again for path, again in report.render().items())


@pytest.mark.slow
def test_a_figure_without_a_text_of_its_own_has_its_title(site: Path) -> None:
    """A new figure needs no text and no Python."""
    (site / "report" / "p3_fig3.md").unlink()
    (site / "report" / "p3_fig2.md").write_text("The finding.\n\nA sentence, {{ n.claims }} claims.\n")
    assert "`p3_fig2` (27)" in report.render()[site / "REPORT.md"]
    for name in ("p3_fig2", "p3_fig3"):
        (site / "figures" / f"{name}.png").touch()
    rendered = report.render()
    text = rendered[site / "REPORT.md"]
    assert re.search(r"\n### 4\.\d+ Alignment against the expansion ratio\n", text)
    assert "The finding.\n" in text and f"A sentence, {len(claims.load())} claims." in text
    assert "| The finding. |" in rendered[site / "README.md"]


@pytest.mark.parametrize("text", [
    "{{ ours.p3_fig2_no_such_claim }}", *(pytest.param(t, marks=pytest.mark.slow) for t in ("{{ nobody }}", "{% if %}")),
])  # fmt: skip
def test_a_text_that_asks_for_what_is_not_there_is_refused(site: Path, text: str) -> None:
    (site / "report" / "p3_fig2.md").write_text(text)
    with pytest.raises(UserError, match="report/p3_fig2.md"):
        report.render()


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
    first, second = (row for row in rows if row["id"] in ("p3_fig2_accuracy_bp", "p3_fig2_accuracy_fa"))
    first |= {"measured": "98.38", "sd": "0.03", "n": 5, "verdict": "holds", "why": ""}
    second |= {"measured": "fc1 1; fc 2", "sd": "0.1; nan", "n": 5, "verdict": "fails", "why": "fc 2 is off"}
    beside = {
        "finished": 30,
        "planned": 30,
        "wall_seconds": 361.2,
        "environments": [{"torch": "2.11.0", "cuda": "", "gpu": "", "cpu": "EPYC", "commit": "abc1234"}],
        "configs": {
            f"{r}{s}": {"rule": r, "seed": s, "lr": 0.01, "weight_decay": d}
            for r, d in (("bp", 1e-4), ("pfa", 9e-5))
            for s in range(5)
        },
    }
    monkeypatch.setattr(claims, "verdicts", lambda: pd.DataFrame(rows))
    monkeypatch.setattr(records, "union", lambda *_: (None, beside))
    rendered = report.render()
    text, details = rendered[site / "REPORT.md"], rendered[site / "REPORT_details.md"]
    assert "| 98.38 ± 0.03 | 5 | holds |" in details and "| fc1 1 ± 0.1; fc 2 | 5 | fails | fc 2 is off |" in details
    assert "1 claims hold, 0 hold partly, 1 fail" in text and "rest on a single seed" in text
    assert "1 are the papers' and 0 are predictions or derivations of ours; 0 rest on a single seed" in text
    assert "FA: fc1 1 ± 0.1; fc 2 |" in text and "FA: fails (fc 2 is off)" in text
    assert "BP: 98.38" not in text, "a claim that holds is told in the details alone"
    assert (
        "| `p3_fig2` | 30 of 30 | 0.1 | EPYC |" in details and "* commit abc1234, cpu EPYC, torch 2.11.0\n" in details
    )
    assert "5 seeds: lr 0.01." in details and "| bp | 0.0001 |\n| pfa | 9e-05 |" in details


def test_a_partial_record_is_shown_and_not_judged(site: Path, monkeypatch) -> None:
    class Page:
        def __init__(self, experiment: str, scale: str) -> None:
            self.experiment = experiment

        def table(self) -> pd.DataFrame:
            return pd.DataFrame({"metric": ["train_loss", "val_accuracy"]})

        def compare(self, metric: str) -> str:
            return f"{metric} of {self.experiment}"

        def partial(self) -> str:
            return "1 of 5 seeds"

    assert "Recorded so far" not in report.render()[site / "REPORT_details.md"]  # here nothing has a record
    made = {"finished": 6, "planned": 35, "wall_seconds": 1.0, "environments": [], "configs": {}}
    monkeypatch.setattr(report, "Page", Page)
    monkeypatch.setattr(report, "_made", lambda name: made | {"partial": True} if name == "p3_fig4" else {})
    text = report.render()[site / "REPORT_details.md"]
    assert text.count("Recorded so far") == 1 and "(1 of 5 seeds)" in text
    assert "val_accuracy of p3_fig4" in text and "test_accuracy of p3_fig4" not in text
    assert ", `p3_fig4` (" in report.render()[site / "REPORT.md"]


@pytest.mark.parametrize(
    "readme",
    [
        None,
        "<!-- figures:end --><!-- figures:begin -->",
        pytest.param("no markers", marks=pytest.mark.slow),
        pytest.param("<!-- figures:begin --><!-- figures:end -->" * 2, marks=pytest.mark.slow),
    ],
)
def test_a_readme_without_its_markers_is_refused(site: Path, readme: str | None) -> None:
    (site / "README.md").unlink() if readme is None else (site / "README.md").write_text(readme)
    with pytest.raises(UserError, match="README.md"):
        report.render()


def test_table_cells_cannot_break_the_table() -> None:
    assert markdown.markdown(["A"], [["x|y\nz"]]) == "| A |\n| --- |\n| x\\|y z |"


def rows(*claimed: tuple[str, str, str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(claimed, columns=["claim", "target", "ours", "verdict", "why"])


def test_claims_that_differ_in_one_rule_or_number_share_a_row() -> None:
    table = markdown.claims_table(
        rows(
            ("SF: angle (degrees)", "31", "31.5 ± 0.1", "holds", ""),
            ("PFA-o ends below BP at density 0.5", "none", "-1", "holds", ""),
            ("PFA: angle (degrees)", "19", "17 ± 2", "partly", "17 is 1 below 18; fc 2 is off"),
            ("PFA-o ends below BP at density 0.17", "none", "-2", "holds", ""),
            ("PFA: ratio", "1.05", "1.06", "holds", ""),
        )
    )
    assert table.splitlines()[2:] == [
        "| SF / PFA: angle (degrees) | SF: 31; PFA: 19 | SF: 31.5 ± 0.1; PFA: 17 ± 2 | "
        "SF: holds; PFA: partly (17 is 1 below 18, and 1 more) |",
        "| PFA-o ends below BP at density 0.5 / 0.17 | none | 0.5: -1; 0.17: -2 | holds |",
        "| PFA: ratio | 1.05 | 1.06 | holds |",
    ]


def test_the_head_of_a_table_begins_its_claims() -> None:
    claim = rows(("SF is below BP (validation accuracy, paired by seed)", "0", "1", "fails", "wanted below 0"))
    head, _, row = markdown.claims_table(claim, "MNIST, 40 epochs").splitlines()
    assert head == "| MNIST, 40 epochs: | target | ours | verdict |"
    assert row == "| SF is below BP (validation, paired) | 0 | 1 | fails (wanted below 0) |"
    assert markdown.claims_table(claim).startswith("| claim | target |")


def test_long_measurements_are_shortened() -> None:
    parts = [f"density=0.{i} {value} ± 0.1" for i, value in enumerate([-3.5, 2, 1e-05, 4, 5, 6, 7, 8], 1)]
    assert markdown._short("; ".join(parts[:3])) == "; ".join(parts[:3])
    assert markdown._short("; ".join(parts[:4])) == "density=0.1 -3.5; density=0.2 2; density=0.3 1e-05; density=0.4 4"
    assert markdown._short("; ".join(parts[:5])) == "5 values, -3.5 to 5"
    assert markdown._short("; ".join(parts)) == "8 values, -3.5 to 8"
    assert markdown._short("; ".join(["fc 1 ± 0"] * 8)) == "8 values, all 1"
    assert markdown._short("; ".join(["kp diverged", *parts[:4]])) == "5 values, -3.5 to diverged"


def test_measurements_have_the_rules_labels() -> None:
    p3, p1 = experiments.find("p3_fig4"), experiments.find("p1_accuracy")
    assert markdown.labelled("usf fc1 -0.1; pfa_o density=0.05 2; 3", p3) == "SF fc1 -0.1; PFA-o density=0.05 2; 3"
    assert markdown.labelled("usf -0.1; usf_track 2", p1) == "uSF, constant -0.1; uSF, norm follows W 2"


@pytest.mark.parametrize("texts, start, rest", [
    (["MNIST: a", "MNIST, BP: b"], "MNIST", ["a", "BP: b"]),
    (["MNIST, BP: a", "MNIST, BP: b"], "MNIST, BP", ["a", "b"]),
    (["CIFAR-10, ResNet-8, SF: a", "CIFAR-10, ResNet-8: b"], "CIFAR-10, ResNet-8", ["SF: a", "b"]),
    (["PFA: a", "PFA-o: b"], "", ["PFA: a", "PFA-o: b"]),
    (["MNIST, BP: a"], "MNIST, BP", ["a"]),
    (["MNIST: SF, not PFA, ends below BP (test, paired)"], "MNIST", ["SF, not PFA, ends below BP (test, paired)"]),
    (["SF, not PFA, ends below BP"], "", ["SF, not PFA, ends below BP"]),
    (["MNIST: a (b, c) d", "MNIST: a (b, c) e"], "MNIST", ["a (b, c) d", "a (b, c) e"]),
])  # fmt: skip
def test_what_every_claim_begins_with_is_said_once(texts: list[str], start: str, rest: list[str]) -> None:
    assert markdown.common_start(texts) == (start, rest)


def test_papers_are_cited_from_one_file() -> None:
    papers = citations.papers()
    assert papers["p3"] == "Li & Benna (2024). Deep Learning without Weight Symmetry. arXiv:2405.20594"
    assert papers["p1"].startswith("Moskovitz, Litwin-Kumar & Abbott (2018). Feedback alignment")
    assert papers["KP"].startswith("Kolen & Pollack (1994). Backpropagation without weight transport. Proceedings")
    text = (report.ROOT / "REPORT.md").read_text(encoding="utf-8")
    assert all(citations.full(r) in text for r in citations.citation()["references"])
