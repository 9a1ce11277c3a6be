"""Citing a figure: every form of every figure, LaTeX that compiles, and figures drawn anew in another width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend

import fa
from fa import plot
from fa.__main__ import main
from fa.results import cite, layout

FIGURES = sorted(p.stem for p in (fa.ROOT / "figures").glob("*.json"))


def caption(name: str) -> str:
    return json.loads((fa.ROOT / "figures" / f"{name}.json").read_text(encoding="utf-8"))["caption"]


@pytest.mark.parametrize("name", FIGURES)
def test_the_latex_of_a_figure_has_no_letter_that_latex_would_stop_at(name: str) -> None:
    text = fa.cite(name, "latex")
    assert rf"\includegraphics[width=\linewidth]{{figures/{name}.pdf}}" in text and rf"\label{{fig:{name}}}" in text
    prose = re.search(r"\\caption\{(.*)\}$", text, re.M)[1].rpartition("From~")[0]
    prose = re.sub(r"\\ensuremath\{[^{}]*\}|\$\w+\^\\mathsf\{T\}\$", "", prose)
    assert not re.search(r"(?<!\\)[&%$#_^~<>|]|\+/-", prose), prose
    assert prose.isascii(), "a letter that needs a name in SYMBOLS"
    assert prose.count("{") == prose.count("}")


def test_what_latex_would_read_as_a_command_is_escaped() -> None:
    assert cite.tex("a_b & 5 % of B^T B, 3 +/- 1 at λ = 10°") == (
        r"a\_b \& 5 \% of $B^\mathsf{T}$ B, 3 \ensuremath{\pm} 1 at \ensuremath{\lambda} = 10\ensuremath{^\circ}"
    )


@pytest.mark.parametrize("name", FIGURES)
def test_the_entries_are_those_that_the_figure_cites(name: str) -> None:
    cited = re.search(r"\\cite\{(.+?)\}", fa.cite(name, "latex"))[1].split(",")
    entries = re.findall(r"^@(\w+)\{(\w+),$", fa.cite(name, "bibtex"), re.M)
    assert [key for _, key in entries] == cited and entries[0] == ("software", "fa")
    paper = {"p1": "moskovitz2018", "p2": "kunin2020", "p3": "li2024"}.get(name[:2])
    assert cited[1:] == ([paper] if paper else [])


def test_the_repository_is_cited_by_version_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA_COMMIT", "abc123")
    text = fa.cite("p3_fig2", "bibtex")
    assert f"version = {{{fa.__version__}}}," in text and "commit abc123}," in text
    assert "author = {Li, Ji-An and Benna, Marcus K.}," in text and "eprint = {2405.20594}," in text
    assert f"(version {fa.__version__}, commit abc123)" in fa.cite("p3_fig2")


def test_plain_text_and_markdown_have_caption_and_source() -> None:
    text, page = fa.cite("p3_fig2"), fa.cite("p3_fig2", "markdown")
    assert caption("p3_fig2") in text and "data/records/p3_fig2.csv" in text
    assert "some files of fa/ differed from it" in text, "what the + of a commit means"
    assert page.startswith("![p3_fig2](figures/p3_fig2.png)\n") and "mean ± 1 sd" in page and r"p3\_fig2;" in page


def test_unknown_figures_and_formats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(fa.UserError, match="unknown format 'latx'; did you mean 'latex'. known: text"):
        fa.cite("p3_fig2", "latx")
    with pytest.raises(fa.UserError, match="unknown figure 'p3_figg2'.*did you mean 'p3_fig2'"):
        fa.cite("p3_figg2")
    assert main(["figure", "p3_fig2", "--format", "gif"]) == 2
    assert "unknown format 'gif'; known: pdf, svg, png" in capsys.readouterr().err
    assert main(["figure", "p3_fig2", "--width", "-1"]) == 2
    assert "width=-1 must be 1 to 40 inches" in capsys.readouterr().err
    assert main(["figure", "p3_table1", "--width", "3.5"]) == 2  # a table of one panel
    told = re.search(
        r"does not fit into 3.5 inches: .* (meets|is cut).*least width is about ([\d.]+)", capsys.readouterr().err
    )
    assert told and 3.5 < float(told[2]) < 7.2


def test_a_figure_in_another_width_and_as_svg(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Twice the same bytes; text stays text; the committed files are not touched."""
    from PIL import Image

    monkeypatch.setenv("FA_BUILD", str(tmp_path))
    before = (fa.ROOT / "figures" / "p1_signs.pdf").read_bytes()
    assert main(["figure", "p1_signs", "--width", "5.2", "--format", "svg,png"]) == 0
    svg = (tmp_path / "figures" / "p1_signs.svg").read_bytes()
    assert b"<text" in svg and b'width="374.4pt"' in svg
    assert Image.open(tmp_path / "figures" / "p1_signs.png").width == 1560
    (again,) = cite.draw("p1_signs", 5.2, ["svg"], tmp_path / "again")
    assert again.read_bytes() == svg
    assert (fa.ROOT / "figures" / "p1_signs.pdf").read_bytes() == before


def rows_of(fig: Figure) -> list[tuple[float, float, str]]:
    """Top (from the top of the figure, inches), left and letter of each panel, as one reads them."""
    places = [(ax.get_subplotspec().get_position(fig), ax.get_title("left")) for ax in fig.axes]
    return sorted((round(-box.y1 * fig.get_figheight(), 1), round(box.x0, 2), letter) for box, letter in places)


@pytest.mark.parametrize(
    "name",
    [
        "p1_signs",
        "p3_sparse",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("p1_concordance", "p1_representations_small", "p2_lag_rates", "x_precision_cifar")
        ),
    ],
)
def test_a_figure_fits_into_one_column(name: str) -> None:
    own = cite._drawn(name)
    with plot.style():
        fig, _ = layout.fit(own, 3.5)
        assert fig and fig.get_figwidth() == 3.5 and fig.get_figheight() <= layout.HIGHEST
        assert layout.flaws(fig).keys() <= layout.flaws(own).keys(), "no text meets another"
    assert own.get_figwidth() == 7.2, "the own one stays"
    panels = rows_of(fig)
    assert len(panels) == len(own.axes) and len({place[0] for place in panels}) > 1
    letters = [letter for *_, letter in panels if letter]
    assert letters == sorted(letters) == sorted(ax.get_title("left") for ax in own.axes if ax.get_title("left"))
    shown = [[t.get_text() for t in legend.texts] for legend in fig.findobj(Legend)]
    assert shown == [[t.get_text() for t in legend.texts] for legend in own.findobj(Legend)]
    for ax in fig.axes:
        assert ax.get_ylabel() or rows_of(fig)[0][1] < ax.get_subplotspec().get_position(fig).x0, "labels at the edge"


@pytest.mark.slow
def test_what_panels_shared_is_shown_again_and_a_legend_hides_nothing() -> None:
    """Two rows of four panels, the columns named above and the axes labelled outside alone."""
    names = ["one", "two", "three", "four"]
    with plot.style():
        own, ax = plot.figure([["first", *[f"{m} {n}" for n in names]] for m in "ab"], height=3)
        ax.pop("first").set(ylabel="Another value", title="")
        for (m, n), a in {tuple(k.split()): a for k, a in ax.items()}.items():
            a.plot([16, 40], [0.93, 0.93], label="a line")
            a.set(xlim=(0, 40), xticks=range(0, 41, 10), xlabel="Epoch" * (m == "b"), ylim=(0, 1))
            a.set(title=n if m == "a" else "", ylabel=f"The value that row {m} has" if n == "one" else "")
            a.tick_params(labelbottom=m == "b", labelleft=n == "one")
        ax["b four"].legend(loc="upper left", handlelength=0.1)
        plot.letters([own.axes[0], ax["a one"], ax["b one"]])
        fig, worse = layout.fit(own, 2.6)
        assert fig and worse, "it does not fit as it is"
    panels = {a.get_label(): a for a in fig.axes}
    assert [letter for *_, letter in rows_of(fig)] == ["a", "b", "", "", "", "c", "", "", ""]
    assert [panels[f"b {n}"].get_title() for n in names] == names, "the column is far"
    assert {panels[f"a {n}"].get_xlabel() for n in names} == {"Epoch"}
    for n in ("one", "three"):
        assert " ".join(panels[f"a {n}"].get_ylabel().split()) == "The value that row a has"
        assert panels[f"a {n}"].yaxis.get_tick_params()["labelleft"]
    four = panels["b four"]
    assert not layout._covered(four) and four.get_legend().get_window_extent().y1 < four.get_window_extent().y0


def test_the_template_is_a_report_of_every_form(tmp_path) -> None:
    """LaTeX is run where there is one."""
    template = fa.ROOT / "report" / "template"
    text = (template / "report.tex").read_text(encoding="utf-8")
    used = re.findall(r"\\input\{(\w+)\.tex\}", text)
    assert used and set(used) <= set(FIGURES)
    page = (template / "report.md").read_text(encoding="utf-8")
    for name in used:
        assert rf"\ref{{fig:{name}}}" in text and f"figures/{name}.png" in page
        (tmp_path / f"{name}.tex").write_text(fa.cite(name, "latex") + "\n", encoding="utf-8")
    entries = {e.partition("\n")[0]: e for name in used for e in fa.cite(name, "bibtex").split("\n\n")}
    (tmp_path / "references.bib").write_text("\n\n".join(entries.values()) + "\n", encoding="utf-8")
    shutil.copy(template / "report.tex", tmp_path)
    shutil.copytree(fa.ROOT / "figures", tmp_path / "figures")
    latex = shutil.which("tectonic") or shutil.which("pdflatex")
    if not latex:
        pytest.skip("neither tectonic nor pdflatex is here")
    if latex.endswith("tectonic"):
        steps = [[latex, "report.tex"]]
    else:
        once = [latex, "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
        steps = [once, ["bibtex", "report"], once, once]
    for step in steps:
        done = subprocess.run(step, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "report.log").read_text(errors="replace") if (tmp_path / "report.log").exists() else ""
    assert (tmp_path / "report.pdf").stat().st_size > 50_000 and "undefined" not in log
