"""p3, Table 1: what each rule needs and what it reaches, a number for every tick.

Two kinds of run. *Training*: Figure 2's recipe on MNIST. The runs of rules whose feedback has W's shape are Figure 2's
own; the others also measure every feedback matrix of the trained network against W (``measure="symmetry"``).
*Interventions*: the same recipe in its quick form (digits), briefly, and then interventions on the rules' own code
(:mod:`fa.probes`). A property of the code does not hang on the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fa import plot, tables
from fa.experiments import Experiment, p3_fig2
from fa.experiments._ticks import NUMBERS, PROPERTIES, cells
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "dfa", "usf", "kp", "wm", "pfa", "pfa_o")

WM = dict(init=0.001, amp=0.01, decay=0.005, input="normal")
"""Ours, as the paper ran no weight mirror: noise drives it, B goes to amp / (2 decay) W = W, and it starts small, so
that what the mirror has learned soon outweighs the draw."""

SHARED = ("bp", "fa", "usf", "kp")  # Figure 2's runs: feedback of W's shape, of which the angle to W says all

PROBE = Config("bp", 0, dataset="digits", hidden="64,64", epochs=10, lr=0.05, lr_drops="", measure="interventions")


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, **own: Any) -> list[Config]:
    """Figure 2's recipe, five seeds of its own runs and three of the others; and as many networks to intervene on."""
    quick, runs = mode == "quick", []
    for config in p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs, dataset):
        if config.rule == "wm":
            config = config.vary(**WM)
        if seeds or config.seed < (1 if quick else 3):
            runs.append(PROBE.vary(rule=config.rule, seed=config.seed, options=config.options).vary(implicit=None))
        if config.rule in SHARED:
            runs.append(config)
        elif seeds or config.seed < 3:
            runs.append(config.vary(measure="symmetry"))
    return runs


EXPERIMENT = Experiment("What each rule needs and reaches", "p3", "30_pfa_table1", RULES, grid)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Li & Benna (2024), Table 1, measured. Numbers: ours; at their right the tick, cross or footnote of the
paper (a: unclear how the feedback could be learned plausibly; b: reduces explicit symmetry but does not remove it; c:
below BP on harder tasks). Rows 1 to 3: interventions on each rule's code, on networks trained briefly on digits,
largest value over layers, means of 3 seeds. Rows 4 to 6: MNIST, 784-512-512-10, 40 epochs, largest value over layers,
means over seeds (BP, FA, SF, KP: 5; others: 3), but for row 4's percentages, means over the layers of the networks on
digits; row 6: mean +/- 1 sd of the difference to BP with the same seed."""


def listing(page: Page) -> str:
    """Table: our numbers, our tick / the paper's (y, n, a footnote's letter); "*" where the two disagree."""
    table, mark = cells(page.table(), page.reference()), {1.0: "y", 0.0: "n"}
    text = [f"{c.ours or '-'} {mark.get(c.met, '-')}/{c.note or mark.get(c.paper, '-')}" for c in table.itertuples()]
    text = [t + "*" * (verdict == "disagrees") for t, verdict in zip(text, table.verdict)]
    wide = table.assign(text=text).pivot(index="rule", columns="property", values="text")
    wide = wide.loc[plot.in_order(wide.index), list(PROPERTIES)]
    wide = wide.set_axis([plot.look(r).label for r in wide.index]).rename_axis(index=None, columns=None)
    return tables.shown(wide)


def evidence(page: Page) -> str:
    """Table: the metrics of the record, and the claims, behind the cells of each property."""
    table = cells(page.table(), page.reference())
    rows = table[table.ours != ""]
    if rows.empty:
        return tables.several("no run yet")
    rows = rows.groupby(["property", "evidence"], sort=False).rule
    rows = rows.agg(lambda rules: " ".join(plot.look(r).label for r in plot.in_order(rules))).reset_index()
    rows = rows.sort_values("property", key=lambda c: c.map(list(PROPERTIES).index), kind="stable")
    return tables.shown(rows, index=False)


def mirrors(page: Page) -> str:
    """Table of the symmetry of every feedback matrix of the trained networks, means over seeds after training."""
    names, table = ("correlation", "match", "mixed", "chance"), page.table()
    rows = table[table.metric.str.fullmatch(f"[BRK]_({'|'.join(names)})")]
    if rows.empty:
        return tables.several("no run yet")
    rows = rows[rows.epoch == rows.groupby("run").epoch.transform("max")]
    rows = rows.assign(matrix=rows.metric.str[0], metric=rows.metric.str[2:])
    wide = rows.pivot_table(index=["rule", "depth", "layer", "matrix"], columns="metric", values="value")
    rank = {"rule": plot.in_order(rows.rule).index}
    wide = wide.reindex(columns=names).reset_index()
    wide = wide.sort_values(["rule", "depth", "matrix"], key=lambda c: c.map(rank.get(c.name, lambda v: v)))
    wide["rule"] = [plot.look(r).label for r in wide.rule]
    return tables.shown(wide.drop(columns="depth"), index=False, float_format="{:.2f}".format, na_rep="-")


@plot.style()
def draw(page: Page) -> Figure:
    """The table as a figure: in each cell our numbers and the paper's tick; shaded by whether the two agree."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    table = cells(page.table(), page.reference())
    rules = plot.in_order(table.rule)
    label, row, head, foot = 2.1, 0.46, 0.4, 0.24  # inches
    total, height = plot.WIDTH["double"], head + row * len(PROPERTIES) + foot
    width = (total - label) / len(rules)
    looks = {
        "agrees": ("#D4E6F1", "none", "our number agrees with the paper's tick"),
        "disagrees": ("#F8D3BE", "#B5460F", "it disagrees"),
        "not comparable": ("#F0F0F0", "none", "not comparable: no tick, a footnote (a, b, c), or no number"),
    }
    fig = plt.figure(figsize=(total, height))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, total), ylim=(height, 0))
    ax.axis("off")
    for i, rule in enumerate(rules):
        name, color, _ = plot.look(rule)
        place = {"x": label + (i + 0.5) * width, "y": head - 0.11, "ha": "center", "va": "center"}
        ax.text(**place, s=name, color=color, fontweight="bold", fontsize=8)
    for j, ((prop, title), number) in enumerate(zip(PROPERTIES.items(), NUMBERS)):
        top = head + j * row
        ax.axhline(top, color="0.6", lw=0.5)
        ax.text(0.03, top + 0.05, title, fontsize=6.6, fontweight="bold", va="top")
        ax.text(0.03, top + 0.18, number, fontsize=6.5, color="0.3", va="top", linespacing=1.1)
        for i, rule in enumerate(rules):
            (cell,) = table[(table.property == prop) & (table.rule == rule)].itertuples()
            x, y, (face, edge, _) = label + i * width, top + row / 2, looks[cell.verdict]
            box = {"facecolor": face, "edgecolor": edge, "lw": 0.8}
            ax.add_patch(Rectangle((x + 0.015, top + 0.02), width - 0.03, row - 0.04, **box))
            lines = (cell.ours or "–").replace("-", "−").split(" · ")
            if prop == "bp_level" and len(lines) > 1:
                lines[1] = f"± {lines[1]}"
            ax.text(x + 0.05, y, "\n".join(lines), fontsize=6.8, va="center", linespacing=1.15)
            tick = {1.0: "✓", 0.0: "✗"}.get(cell.paper, cell.note or "–")
            slope = "italic" if cell.note else "normal"
            ax.text(x + width - 0.05, y, tick, fontsize=8, color="0.25", ha="right", va="center", fontstyle=slope)
    ax.axhline(head + row * len(PROPERTIES), color="0.6", lw=0.5)
    handles = [Patch(facecolor=face, edgecolor=edge, label=text) for face, edge, text in looks.values()]
    ax.legend(handles=handles, loc="lower center", ncols=3, fontsize=6.5, borderaxespad=0.15, handlelength=1.4)
    return fig
