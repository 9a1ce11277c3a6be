"""Figures: what is drawn is what the table says, every rule has one look, and a file depends on data and code alone."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import fa
from fa import plot
from fa.experiments import p3_fig2, p3_fig3


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def table() -> pd.DataFrame:
    """Two rules, three seeds, four epochs; two layers under pfa."""
    draw = np.random.default_rng(0).normal
    when = list(itertools.product(range(3), range(5)))
    rows = [(f"{r}{s}", r, s, e, "", np.nan, "test_accuracy", 90 + e + draw()) for r in ("bp", "pfa") for s, e in when]
    for (layer, depth), metric in itertools.product((("first", 1), ("a_last", 2)), ("angle_deg", "norm_ratio")):
        rows += [(f"pfa{s}", "pfa", s, e, layer, depth, metric, 40 * depth + draw()) for s, e in when]
    return pd.DataFrame(rows, columns="run rule seed epoch layer depth metric value".split())


@pytest.fixture
def reference() -> pd.DataFrame:
    """Published: pfa's accuracy with sd, bp's without, one angle."""
    rows = [
        ("pfa", np.nan, 4, "", "test_accuracy", 93.0, 0.5, 5),
        ("bp", np.nan, 4, "", "test_accuracy", 94.0, np.nan, np.nan),
        ("pfa", 0, 4, "a_last", "angle_deg", 77.0, np.nan, 1),
    ]
    return pd.DataFrame(rows, columns="rule seed epoch layer metric value sd n".split())


# ------------------------------------------------------------------------------------------------------------- look


def test_every_rule_has_its_own_look():
    assert set(fa.RULES) <= set(plot.RULE_STYLE)
    for attribute in ("label", "color", "marker"):
        looks = [getattr(style, attribute) for style in plot.RULE_STYLE.values()]
        assert len(looks) == len(set(looks)), f"two rules share a {attribute}"


def test_a_rule_from_outside_gets_a_look_that_its_name_decides():
    mine, yours = plot.look("mine"), plot.look("yours")
    assert mine == plot.look("mine") and mine.label == "mine" and mine != yours
    assert plot.in_order(["zeta", "pfa", "bp", "mine", "pfa"]) == ["bp", "pfa", "mine", "zeta"]


SIGHT = {  # linear RGB under protanopia and deuteranopia: Machado, Oliveira & Fernandes 2009, severity 1
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


@pytest.mark.parametrize("sight", SIGHT)
def test_the_rules_of_one_figure_are_told_apart_by_colour_blind_readers(sight):
    def lab(color: str) -> np.ndarray:
        rgb = np.array(mpl.colors.to_rgb(color))
        linear = SIGHT[sight] @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        xyz = to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for a, b in itertools.combinations(("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o"), 2):
        distance = np.linalg.norm(lab(plot.look(a).color) - lab(plot.look(b).color))
        assert distance > 10, f"{a} and {b} look alike ({distance:.1f})"


def test_importing_and_drawing_leave_matplotlib_as_it_was(table):
    before = dict(mpl.rcParams)
    with plot.style():
        assert mpl.rcParams["pdf.fonttype"] == 42
        fig, ax = plot.figure("a", width="single", height=2)
        plot.accuracy(ax["a"], table)
    assert dict(mpl.rcParams) == before


def test_a_decorated_function_draws_in_the_style_each_time():
    before = dict(mpl.rcParams)

    @plot.style()
    def sizes() -> float:
        return mpl.rcParams["font.size"], mpl.rcParams["savefig.dpi"]

    assert sizes() == sizes() == (7, 300) and dict(mpl.rcParams) == before


def test_widths_are_those_of_a_page():
    assert plot.figure("a")[0].get_size_inches()[0] == 7.2
    assert plot.figure("a", width="single")[0].get_size_inches()[0] == 3.5
    with pytest.raises(fa.UserError, match="unknown width 'half'; known: single, double"):
        plot.figure("a", width="half")


# ----------------------------------------------------------------------------------------------------------- panels


def _band(ax) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of the first band, by x."""
    points = pd.DataFrame(ax.collections[0].get_paths()[0].vertices, columns=["x", "y"]).groupby("x").y
    return points.min().to_numpy(), points.max().to_numpy()


def test_a_curve_is_the_mean_and_its_band_one_sample_sd(table):
    ax = plot.figure("a")[1]["a"]
    plot.accuracy(ax, table)
    mine = table[(table.rule == "bp") & (table.metric == "test_accuracy") & (table.epoch > 0)].groupby("epoch").value
    line = ax.lines[0]
    assert line.get_color() == plot.look("bp").color
    np.testing.assert_allclose(line.get_ydata(), mine.mean())
    low, high = _band(ax)
    np.testing.assert_allclose(low, mine.mean() - mine.std(ddof=1))
    np.testing.assert_allclose(high, mine.mean() + mine.std(ddof=1))


def test_the_last_epoch_shows_ours_filled_the_papers_hollow_and_n(table, reference):
    ax = plot.figure("a")[1]["a"]
    plot.finals(ax, table, reference)
    ours = table[(table.metric == "test_accuracy") & (table.epoch == 4)].groupby("rule").value
    marks = [line for line in ax.lines if line.get_marker() in ("o", "v")]
    hollow = [line.get_ydata()[0] for line in marks if line.get_markerfacecolor() == "white"]
    filled = [line.get_ydata()[0] for line in marks if line.get_markerfacecolor() != "white"]
    assert hollow == [94.0, 93.0]
    np.testing.assert_allclose(filled, ours.mean())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["BP", "PFA"]
    assert "n = 3 seeds" in ax.get_title(loc="right") and "1 sd" in ax.get_title(loc="right")


def test_an_error_bar_at_the_last_epoch_is_one_sample_sd(table, reference):
    """Ours by the seeds (ddof 1), the paper's as published; one seed has none."""
    ax = plot.figure("a")[1]["a"]
    plot.finals(ax, table, reference)
    half = [(b[0, :, 1][1] - b[0, :, 1][0]) / 2 for b in (np.array(c.get_segments()) for c in ax.collections)]
    ours = table[(table.metric == "test_accuracy") & (table.epoch == 4)].groupby("rule").value.std(ddof=1)
    np.testing.assert_allclose(half, [ours["bp"], ours["pfa"], 0.5])
    alone = plot.figure("a")[1]["a"]
    plot.finals(alone, table[table.seed == 0])
    assert not alone.collections


def test_layers_are_coloured_by_depth_and_not_by_name(table, reference):
    ax = plot.figure("a")[1]["a"]
    colors = plot.layers(ax, table, "pfa", "angle_deg", reference)
    assert list(colors) == ["first", "a_last"]
    assert colors == dict(zip(colors, plot.depth_colors([1, 2]).values()))
    means = table[(table.metric == "angle_deg")].groupby(["layer", "epoch"]).value.mean()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), means["first"])
    assert any(line.get_ydata()[0] == 77.0 and line.get_markerfacecolor() == "white" for line in ax.lines)


def test_pooled_spread_is_that_of_all_values():
    values = np.random.default_rng(1).normal(size=(4, 50)) + np.arange(4)[:, None]
    own = [{"m": draw.mean(), "s": draw.std()} for draw in values]
    rows = [("r", s, 1.0, metric, v) for s, both in enumerate(own) for metric, v in both.items()]
    ax = plot.figure("a")[1]["a"]
    p3_fig3.spread(
        ax, pd.DataFrame(rows, columns="run seed expansion metric value".split()), "expansion", "m", "s", "k"
    )
    low, high = _band(ax)
    np.testing.assert_allclose([low[0], high[0]], [values.mean() - values.std(), values.mean() + values.std()])


def test_means_and_ranges_are_over_seeds_and_over_layers():
    """By x: mean ± 1 sample sd of the seeds' means; mean, lowest and highest of the layers' means."""
    values = np.random.default_rng(2).normal(size=(3, 4, 2))  # x, seed, layer
    rows = [(x, s, f"l{j}", values[x, s, j]) for x, s, j in np.ndindex(values.shape)]
    data = pd.DataFrame(rows, columns="expansion seed layer value".split())
    ax = plot.figure("ab")[1]
    plot.means(ax["a"], data, "expansion", "pfa", lambda x: 10 * x, ms=5)
    plot.ranges(ax["b"], data, "expansion", "pfa")
    by_seed, by_layer = values.mean(axis=2), values.mean(axis=1)
    middle, half = by_seed.mean(axis=1), by_seed.std(axis=1, ddof=1)
    expected = {"a": (middle, middle - half, middle + half), "b": (middle, by_layer.min(axis=1), by_layer.max(axis=1))}
    for panel, (center, low, high) in expected.items():
        np.testing.assert_allclose(ax[panel].lines[0].get_ydata().astype(float), center)
        bars = np.array(ax[panel].collections[0].get_segments())[:, :, 1].astype(float)
        np.testing.assert_allclose(bars, np.stack([low, high], axis=1))
    line = ax["a"].lines[0]
    assert line.get_xdata().tolist() == [0, 10, 20] and line.get_color() == plot.look("pfa").color
    assert line.get_markersize() == 5


def test_error_bars_say_of_how_many_seeds_they_are(table):
    assert plot.repeats(table) == "mean ± 1 sd, n = 3 seeds"
    fewer = table[(table.rule == "bp") | (table.seed == 0)]
    assert plot.repeats(fewer) == "mean ± 1 sd, n = 1–3 seeds" and plot.repeats(table.iloc[:0]) == ""
    assert plot.repeats(table[table.seed == table.seed.min()]) == "n = 1 seed", "one run has no sd"


def test_nothing_trained_draws_the_published_values_alone(table, reference):
    empty, (fig, ax) = table.iloc[:0], plot.figure([["a", "angle_deg pfa"], ["b", "norm_ratio pfa"]])
    plot.accuracy(ax["a"], empty, reference)
    plot.finals(ax["b"], empty, reference)
    p3_fig2.layer_grid(ax, empty, ["pfa"], reference)
    fig.canvas.draw()
    marks = [line for line in ax["a"].lines if line.get_marker() not in ("_", "|")]
    assert marks and all(line.get_markerfacecolor() == "white" for line in marks)
    assert {line.get_ydata()[0] for line in ax["b"].lines if line.get_markerfacecolor() == "white"} == {93.0, 94.0}


# ------------------------------------------------------------------------------------------------------------ files

DRAW = """
import sys; from pathlib import Path; import matplotlib; matplotlib.use("Agg")
from fa import plot
with plot.style():
    fig, ax = plot.figure("ab", height=2)
    ax["a"].plot([1, 2, 3], [1, 4, 9], label="λ ± 1"); ax["a"].legend(); ax["b"].set_ylabel(r"$B^\\top B$")
    plot.letters(list(ax.values())); plot.stamp(fig, "quick")
    plot.save(fig, "x", "A caption, ± 1 sd.", Path(sys.argv[1]), table="t.csv", runs=3)
"""


def test_saving_twice_gives_the_same_bytes(tmp_path):
    moods = {"PYTHONHASHSEED": "1", "TZ": "UTC"}, {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    for i, mood in enumerate(moods):
        command = [sys.executable, "-c", DRAW, str(tmp_path / str(i))]
        subprocess.run(command, check=True, cwd=fa.ROOT, env={**os.environ, **mood})
    for name in ("x.pdf", "x.png", "x.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


def test_what_a_saved_figure_holds(tmp_path):
    exec(DRAW.replace("sys.argv[1]", repr(str(tmp_path))), {})
    pdf = (tmp_path / "x.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf, "letters must stay text"
    assert b"CreationDate" not in pdf
    png = plt.imread(tmp_path / "x.png")
    assert png.shape[1] == 7.2 * 300
    about = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert about == {"name": "x", "caption": "A caption, ± 1 sd.", "table": "t.csv", "runs": 3}


@pytest.mark.parametrize("rule", ["mine", *map(str, range(50))])
def test_a_rule_of_ones_own_has_a_filled_marker(rule):
    """Strokes are thin, and where a figure draws markers without an edge they are not there at all."""
    from matplotlib.lines import Line2D

    assert plot.look(rule).marker in Line2D.filled_markers and plot.look(rule).label == rule
