"""What a page shows: tables as text and as HTML, verdicts, figures with caption, and errors as one sentence."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt

import fa
from fa import plot, tables
from fa.errors import Interrupted
from fa.results import page as pages
from fa.results import table as figure_table


def test_a_table_is_text_where_it_is_printed_and_html_where_it_is_shown() -> None:
    frame = pd.DataFrame({"rule": ["bp", "a < b"], "angle": [0.0, np.nan], "long": ["x" * 80, "y"]})
    table = tables.shown(frame, index=False, float_format="{:.1f}".format, na_rep="-")
    assert str(table) == frame.to_string(index=False, float_format="{:.1f}".format, na_rep="-")
    rows = re.findall(r"<tr>\s*(<td.*)</tr>", table.html)
    assert [re.findall(r"<td>(.*?)</td>", row) for row in rows] == [
        ["bp", "0.0", "x" * 80],
        ["a &lt; b", "-", "y"],
    ], "a row a line, nothing is cut"
    assert InteractiveShell.instance().display_formatter.format(table)[0] == {
        "text/plain": str(table),
        "text/html": table.html,
    }


def test_a_table_of_texts_has_its_heads_above_them_and_breaks_no_number_from_its_sd() -> None:
    table = tables.shown(pd.DataFrame({"BP": ["95.8 ± 0.3"]}, index=["mlp"]))
    left = 'style="text-align: left"'
    assert f"<th {left}>BP</th>" in table.html and "<th>mlp</th>" in table.html
    assert f"<td {left}>95.8&nbsp;±&nbsp;0.3</td>" in table.html and "95.8 ± 0.3" in table
    assert "left" not in tables.shown(pd.DataFrame({"n": [3]})).html, "numbers are on the right, and so are their heads"


def test_texts_and_tables_make_one_output() -> None:
    table = tables.shown(pd.DataFrame({"a": [1]}))
    both = tables.several("x < y", table, "")
    assert both == f"x < y\n{table}\n" and both.html == f"<p>x &lt; y</p>\n{table.html}"


def judged() -> pd.DataFrame:
    """Verdicts of four kinds, as ``fa.results.claims.verdicts`` returns them."""
    columns = ["id", "claim", "target", "criterion", "measured", "sd", "n", "verdict", "why"]
    rows = [
        ("p3_fig2_a", "BP < 1", "98.4", "mean(x) > 1", "98.36", "0.07", 5, "holds", ""),
        ("p3_fig2_b", "not run", "1", "mean(y) > 1", "", "", "", "not tested", "no record"),
        ("p3_fig2_c", "below", "-0.1", "mean(z) < 1", "usf 0.2; fa -0.1", "nan; 0.1", 1, "fails", "usf 0.2 is above 0"),
        ("p3_fig2_d", "nearly", "5", "mean(v) < 1", "5.1", "0.2", 3, "partly", "5.1, wanted 5"),
    ]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(
    "verdict, words",
    [
        (None, "Partly reproduces: 1 of 4 claims hold (partly 1, fails 1, not tested 1). "),
        ("holds", "Reproduces: 4 of 4 claims hold. "),
        ("fails", "Does not reproduce: 0 of 4 claims hold (fails 4). "),
        ("not tested", "Not tested: no claim is tested. "),
    ],
)
def test_a_page_ends_with_one_line_of_what_it_shows(monkeypatch, verdict, words) -> None:
    table = judged() if verdict is None else judged().assign(verdict=verdict)
    monkeypatch.setattr(figure_table.claims, "verdicts", lambda *_, **__: table)
    cfg = pages.Page("p3_fig2")
    rows = cfg.table()
    bp = rows[(rows.rule == "bp") & (rows.metric == "test_accuracy") & (rows.epoch == 40)].value.mean()
    assert cfg.conclusion().startswith(
        f"{words}Test accuracy (%), last epoch, ours (published): BP {bp:.2f} (98.38); FA "
    )
    assert re.search(r"\. n = 5; its runs took \d+h\d\dm in sum on AMD EPYC\.$", cfg.conclusion())
    assert cfg.provenance().endswith(cfg.conclusion()) and pages.Page("p3_fig1").conclusion() == ""


def test_the_rendered_verdicts_have_the_claims_and_those_that_fail_first(monkeypatch) -> None:
    monkeypatch.setattr(figure_table.claims, "verdicts", lambda *_, **__: judged())
    shown = pages.Page("p3_fig2").judged()
    rows = re.findall(r"<tr>(<td.*)</tr>", shown.html)
    assert [re.search(r">(fails|partly|holds|not tested)</b>", row)[1] for row in rows] == list(pages.COLORS)
    assert "SF 0.2; FA -0.1 ± 0.1" in rows[0] and "SF 0.2 is above 0" in rows[0], "labels, and no sd of one seed"
    assert 'title="mean(x) &gt; 1"' in rows[2] and "BP &lt; 1" in rows[2] and "98.36 ± 0.07" in rows[2]
    assert str(shown).endswith("holds 1, partly 1, fails 1, not tested 1")
    part = pages.Page("p3_fig2", rules=["bp"]).judged()
    assert str(part).endswith("not tested 1; the verdicts are about the whole record")


def test_runs_with_other_parameters_have_files_of_their_own_and_no_verdicts(monkeypatch) -> None:
    monkeypatch.setattr(figure_table.claims, "verdicts", lambda *_, **__: judged())
    cfg = pages.Page("p3_fig2", "quick", rules=["bp", "pfa"], seeds=2, own={"expansion": 3})
    name = "p3_fig2__seeds=2__rules=bp,pfa__expansion=3"
    assert cfg.own_name == name and cfg.path.name == f"{name}.csv" and cfg.path.parent.name == "quick"
    assert set(cfg.verdicts().verdict) == {"not tested"}
    assert "another run: seeds=2, rules=bp,pfa, expansion=3" in cfg.judged().html
    assert pages.Page("p3_fig2", "quick").path.name == "p3_fig2.csv"
    assert pages.Page("p3_fig2", rules=["bp"]).path.name == "p3_fig2.csv", "record mode reads the record"
    assert pages.Page("p3_fig2", "quick", dataset="a/b c").own_name == "p3_fig2__dataset=a-b-c"


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A quick page of two rules whose runs are made up; returns what it writes."""
    monkeypatch.setenv("FA_BUILD", str(tmp_path))
    monkeypatch.setenv("FA_RUNS", str(tmp_path / "runs"))
    cfg = pages.Page("p3_fig2", "quick", rules=["bp"], seeds=2, epochs=3)
    rows = [(c.run, "bp", c.seed, e, "", pd.NA, "test_accuracy", 90.0 + e) for c in cfg.runs for e in range(4)]
    table = pd.DataFrame(rows, columns=["run", "rule", "seed", "epoch", "layer", "depth", "metric", "value"])
    cfg.__dict__["_made"] = table, {"environments": [], "records": []}
    return cfg


def test_a_quick_figure_says_what_it_is(quick, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # not in a notebook
    quick.draw()
    folder = tmp_path / "quick" / "figures"
    name = "p3_fig2__seeds=2__epochs=3__rules=bp"
    told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert told["caption"].startswith(
        "Quick mode (digits, 2 seeds, epochs=3, rules=bp), without the paper's values. At the paper's scale: Li"
    )
    assert (told["mode"], told["dataset"], told["seeds"]) == ("quick", "digits", 2)
    assert told["parameters"] == {"seeds": 2, "epochs": 3, "rules": "bp"}
    assert (folder / f"{name}.pdf").exists() and f"{name}.pdf, .png and .json" in capsys.readouterr().out


def test_a_figure_is_shown_once_with_caption_alternative_text_and_files(quick, monkeypatch) -> None:
    from IPython import display

    monkeypatch.setitem(sys.modules, "ipykernel", None)
    shown: list = []
    monkeypatch.setattr(display, "display", shown.append)
    before = plt.get_fignums()  # of other tests in this process
    quick.draw()
    picture, text = shown
    about = picture._repr_mimebundle_()[1]
    assert about["image/png"]["alt"].startswith("Quick mode") and about["image/png"]["width"] == 979
    assert "± 1 sd" in text.data and "Li &amp; Benna" in text.data and "<code>" in text.data
    assert plt.get_fignums() == before, "the inline backend would show it a second time"


def test_an_error_of_the_user_is_one_sentence_in_a_notebook(capsys) -> None:
    shell = InteractiveShell.instance()
    shell.run_cell("import fa; fa.convert(1, 'fa')")
    assert capsys.readouterr().out.strip() == "UserError: convert takes a torch.nn.Module, not a int"


def test_an_interrupt_says_what_is_finished_and_how_it_goes_on(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("FA_RUNS", str(tmp_path))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(figure_table.runs, "run", interrupted)
    with pytest.raises(Interrupted, match="0 of 18 runs are finished; run the cell again and training goes on") as told:
        pages.Page("p3_fig2", "quick").table()
    assert told.value._render_traceback_() == [f"Interrupted: {told.value}"]
    assert isinstance(told.value, KeyboardInterrupt)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rules": "sf"}, "did you mean 'usf'"),
        ({"rules": "PFA"}, "did you mean 'pfa'"),
        ({"dataset": "mnits"}, "did you mean 'mnist'"),
        ({"mode": "Quick"}, "did you mean 'quick'"),
        ({"expnsion": 3}, "did you mean 'expansion'"),
    ],
)
def test_a_misspelled_word_is_guessed(values, message) -> None:
    plain = {"mode": "record", "seeds": 0, "epochs": 0, "rules": "", "dataset": "", "device": "auto", "expansion": 10}
    with pytest.raises(fa.UserError, match=message):
        pages.notebook(plain | values, "p3_fig2")


def test_a_misspelled_figure_is_guessed() -> None:
    with pytest.raises(fa.UserError, match="did you mean 'p3_fig2'"):
        pages.notebook({}, "p3_fgi2")
    assert plot.look("usf").label == "SF"
