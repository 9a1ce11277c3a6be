"""p1's central claim as a dial: uSF on Architecture 1 whose feedback has the signs of a share of W's entries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.errors import UserError
from fa.experiments import Experiment, p1_normalization
from fa.experiments.p1_accuracy import SET_UP, asked, measured
from fa.experiments.p1_normalization import BASES, SEEDS, TEN
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "usf")
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
START = 30.0  # angle of uniform W to its signs, degrees


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """uSF with each share of concordant signs, and BP and FA, whose runs are page 14's. Quick: digits, 2 epochs."""
    if unknown := set(rules) - set(RULES):
        raise UserError(f"p1_concordance is about bp, fa and usf, not {', '.join(sorted(unknown))}")
    base = asked(BASES[mode], epochs, dataset)
    return [c for seed in range(seeds or SEEDS[mode]) for r in rules for c in of_rule(base, r, seed)]


def of_rule(base: Config, rule: str, seed: int) -> list[Config]:
    """The runs of a rule and a seed: of uSF one a share, of any other page 14's with free norms."""
    plain = p1_normalization.of_rule(base, rule, seed)[0]
    return [plain.vary(concordance=p if p < 1 else None) for p in SHARES] if rule == "usf" else [plain]


def swept(config: Config) -> dict[str, Any]:
    """The column that names a run's place: ``share`` of concordant signs. Random feedback has half of them by
    chance."""
    shares = {"usf": config.rule_options.get("concordance", 1.0), "bp": 1.0}
    return {"share": shares.get(config.rule, 0.5)}


EXPERIMENT = Experiment("Accuracy against the share of concordant signs", "p1", "15_fa_signs", RULES, grid, swept=swept)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = f"""{SET_UP}{TEN} uSF whose feedback has the sign of W in a share of the entries, drawn once, and the
opposite sign in the others. a: test accuracy after the epoch of the best validation accuracy; dotted: BP, and FA, whose
signs agree by chance. b: angle between W and its feedback before training (open) and after (filled), by layer; line:
cos(angle) = (2 p - 1) cos 30 degrees, for uniform W and a share p. c: angle between a layer's gradient dW and exact
backprop's after training, in the colours of b. Dots: seeds; bars: +/- 1 sd over seeds."""


@plot.style()
def draw(page: Page) -> Figure:
    """a: accuracy; b: weight angle before and after; c: gradient angle; all against the share."""
    table = page.table()
    fig, ax = plot.figure("abc", height=2.6)
    metric = measured(table)
    end = table[table.epoch == table.groupby("run").epoch.transform("max")] if len(table) else table
    ends = end[end.metric == metric]
    own = ends[ends.rule == "usf"]
    ax["a"].plot(own.share + 0.012, own.value, ".", color=plot.look("usf").color, ms=2.5, alpha=0.45, mew=0)
    plot.means(ax["a"], own, "share", "usf", ms=3.8)
    for rule, at in (("bp", "bottom"), ("fa", "bottom")):
        level = ends[ends.rule == rule].value.mean()
        if not np.isnan(level):
            ax["a"].axhline(level, color=plot.look(rule).color, lw=0.8, ls=":", zorder=0)
            ax["a"].text(0.5 if rule == "bp" else 1, level, plot.look(rule).label, va=at, fontsize="small",
                         ha="left" if rule == "bp" else "right", color=plot.look(rule).color)  # fmt: skip
    ax["a"].set(ylabel=plot.LABELS[metric].replace(", best", ",\nbest"))
    plot.note(ax["a"], plot.repeats(own, ["share"]) + " (dots)")
    signs = table[table.rule == "usf"]
    names = list(signs[signs.metric == "angle_deg"].sort_values("depth").layer.unique())
    colors = dict(zip(names, plot.depth_colors(range(1, len(names) + 1)).values()))
    by_share(ax["b"], signs[signs.epoch == 0], "angle_deg", colors, filled=False)
    by_share(ax["b"], end[end.rule == "usf"], "angle_deg", colors)
    p = np.linspace(0.5, 1, 101)
    ax["b"].plot(p, law(p), color="0.5", lw=0.9, zorder=0)
    ax["b"].set(ylabel="Weight angle (°)", ylim=(20, 100), yticks=(30, 60, 90))
    ax["b"].legend(handles=plot.key(colors), loc="lower left")
    plot.note(ax["b"], "open: before training")
    by_share(ax["c"], end[(end.rule == "usf") & (end.depth < end.depth.max())], "grad_angle_global_deg", colors)
    ax["c"].set(ylabel=plot.LABELS["grad_angle_global_deg"], ylim=(0, None), yticks=(0, 30, 60, 90, 120, 150))
    ax["c"].axhline(90, color="0.75", lw=0.6, ls=":", zorder=0)
    for panel in "abc":
        ax[panel].set(xlabel="Share of concordant signs", xticks=(0.5, 0.6, 0.7, 0.8, 0.9, 1))
    plot.letters(ax.values())
    return fig


def law(share: Any) -> Any:
    """Angle in degrees between uniform W and its signs, of which a share is right."""
    return np.degrees(np.arccos((2 * np.asarray(share) - 1) * np.cos(np.radians(START))))


def by_share(ax: Axes, rows: pd.DataFrame, metric: str, colors: dict[str, Any], filled: bool = True) -> None:
    """A line a layer against the share, mean +/- 1 sd over seeds; ``colors``: layer -> colour."""
    rows = rows[rows.metric == metric]
    for name in [n for n in colors if n in set(rows.layer)]:
        line = {"color": colors[name], "marker": "o", "ms": 2.8, "lw": 0.9, "elinewidth": 0.7}
        line |= {} if filled else {"mfc": "none", "ms": 5, "lw": 0, "mew": 0.7}
        plot.means(ax, rows[rows.layer == name], "share", **line)


def accuracies(page: Page) -> str:
    """Table: rule, share of concordant signs, accuracy of panel a: mean, sd and n; and the formula's start angle."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    ends = table[(table.metric == measured(table)) & (table.epoch == table.groupby("run").epoch.transform("max"))]
    found = ends.groupby(["rule", "share"]).value.agg(["mean", "std", "count"]).reset_index()
    found = found.sort_values(["rule", "share"], key=lambda c: c.map(RULES.index) if c.name == "rule" else c)
    found["start angle"] = np.where(found.rule == "usf", law(found.share), np.nan)
    found["rule"] = [p1_normalization.name(r) for r in found.rule]
    columns = {"mean": "accuracy", "std": "sd", "count": "n"}
    return tables.shown(found.rename(columns=columns), index=False, float_format="{:.2f}".format, na_rep="-")
