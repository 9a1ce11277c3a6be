"""p2's framework: five primitives and the rules made of them, asked of the rules' code: gradients, what a synapse must
read, where the feedback ends and how fast. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import nn

from fa import plot, tables
from fa.errors import UserError
from fa.experiments import Experiment
from fa.experiments._framework import NON_LOCAL, READS, coloured, gradient_check, reads, settle
from fa.layers.convert import convert
from fa.layers.feedback import generator
from fa.rules import rule as make_rule
from fa.train.config import identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

PRIMITIVES = ("decay", "amp", "null", "sparse", "self")

RULES = ("fa", "wm", "ia", "sa", "aa", "kp", "primitives")


@dataclass(frozen=True)
class Framework:
    """One rule, or one primitive alone, on random layers; nothing is trained.

    Args:
        rule: "fa", "wm", "ia", "sa", "aa", "kp" or "primitives".
        primitive: the one primitive of rule "primitives", with coefficient 1; "" elsewhere, with p2's default
            coefficients.
        repeats: independent draws of weights, input and feedback, numbered in the record's ``seed``.
        n_in: inputs of the linear layer (default 12).
        n_out: its outputs (default 8).
        revision: of the recipe.
    """

    rule: str
    primitive: str
    repeats: int
    n_in: int = 12
    n_out: int = 8
    revision: int = 1

    run = property(identity)

    def table(self) -> pd.DataFrame:
        """``seed`` (the repeat), ``epoch`` (0), ``layer``, ``depth``, ``metric``, ``value``.

        ``layer`` "dense" and "conv": ``gradient_error``, the largest difference of the rule's gradient from autograd's
        of the objective, over the largest entry; and ``objective``, its value. "dense": ``read_NAME``, see
        :func:`reads`; of the rules also ``angle_deg`` and ``norm_ratio`` of the feedback to W after descent with W at
        rest, ``rate_slow`` and ``rate_fast``, measured (per step and unit of learning rate), and these as theory has
        them, ``..._theory``; ``distance``, the relative distance from the fixed point of theory; and of IA
        ``autoencoder_error``, the difference of its gradient from the linear autoencoder's.
        """
        rows = []
        for repeat in range(self.repeats):
            gen = generator(repeat, "framework")
            dense, conv = self.layer(nn.Linear(self.n_in, self.n_out, bias=False), gen), None
            x = coloured(64, self.n_in, gen)  # (64, in)
            found = {("dense", k): v for k, v in gradient_check(dense, x, gen).items()}
            if self.rule != "fa":
                conv = self.layer(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), gen)
                maps = torch.randn(5, 3, 6, 6, generator=gen, dtype=torch.float64)
                found |= {("conv", k): v for k, v in gradient_check(conv, maps, gen).items()}
            found |= {("dense", f"read_{k}"): v for k, v in reads(dense, gen).items()}
            if not self.primitive:
                found |= {("dense", k): v for k, v in settle(dense, x, gen).items()}
            rows += [[repeat, 0, layer, None, metric, value] for (layer, metric), value in found.items()]
        return pd.DataFrame(rows, columns=["seed", "epoch", "layer", "depth", "metric", "value"])

    def layer(self, layer: nn.Module, gen: torch.Generator) -> nn.Module:
        """The layer in float64 with normal weights of variance 1 / fan_in, under the rule."""
        layer = layer.double()
        with torch.no_grad():
            layer.weight.normal_(0, layer.weight[0].numel() ** -0.5, generator=gen)
        own = {"self_" if self.primitive == "self" else self.primitive: 1.0} if self.primitive else {}
        return convert(layer, make_rule(self.rule, **own), seed=int(torch.randint(2**31, (), generator=gen)))


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Framework]:
    """Every rule with its default coefficients and every primitive alone, five draws; quick: two."""
    if epochs or dataset:
        raise UserError("p2_framework draws random layers and trains nothing; leave epochs and dataset out")
    if unknown := set(rules) - set(RULES):
        raise UserError(f"p2_framework is about {', '.join(RULES)}, not {', '.join(sorted(unknown))}")
    repeats = seeds or (2 if mode == "quick" else 5)
    runs = [Framework("primitives", name, repeats) for name in PRIMITIVES if "primitives" in rules]
    return runs + [Framework(name, "", repeats) for name in rules if name != "primitives"]


EXPERIMENT = Experiment(
    "Five primitives and the rules made of them", "p2", "21_estimation_framework", RULES, grid,
    swept=lambda config: {"primitive": config.primitive},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """The framework of Kunin et al. (2020), asked of the rules' code. a: what the update of the feedback
synapse from neuron i to neuron j reads: its own value, the two activities, the activity sent back by B, the error;
and, not local, the activity sent up through B and the value of the forward synapse. Filled: the update changes when
that quantity alone is changed (means of 5 draws; relative change). b: angle between feedback and W after descent with
coloured input and W at rest (under KP random errors move it), and the ratio of their norms; marker: mean +/- 1 sd of
5 draws, bar: theory. c: relaxation rate of the slowest and of the fastest mode, in units of learning rate and step,
against theory, in the colours of a (WM's lies under SA's). FA has no theory in b and c."""

READ = 1e-9  # relative change above which an update counts as reading a quantity: far above rounding


def label(rule: str, primitive: str) -> str:
    """The rule's abbreviation, or the name of a primitive that stands alone."""
    return primitive or plot.look(rule).label


def ordered(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(rule, primitive) in the order of the table: primitives first."""
    there = set(zip(table.rule, table.primitive))
    rules = [(rule, "") for rule in plot.in_order(table.rule)]
    return [pair for pair in [*(("primitives", name) for name in PRIMITIVES), *rules] if pair in there]


def found(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and sd over draws of every metric of the dense layer: columns (metric), rows (rule, primitive)."""
    dense = table[table.layer == "dense"]
    return dense.groupby(["rule", "primitive", "metric"]).value.agg(["mean", "std"]).unstack("metric")


def listing(table: pd.DataFrame) -> str:
    """Table: what each primitive and rule reads ("x": yes), and whether all of it is local."""
    if table.empty:
        return tables.several("no draw yet")
    means, rows = found(table)["mean"], []
    for pair in ordered(table):
        read = {name: means.loc[pair, f"read_{name}"] > READ for name in READS}
        marks = {name: "x" if yes else "." for name, yes in read.items()}
        rows.append({"": label(*pair), **marks, "local": "no" if any(read[n] for n in NON_LOCAL) else "yes"})
    return tables.shown(pd.DataFrame(rows), index=False)


def ends(table: pd.DataFrame) -> str:
    """Table: angle, norm ratio and rates of every rule, measured and as theory has them."""
    if table.empty:
        return tables.several("no draw yet")
    means, rows = found(table)["mean"], []
    for rule, primitive in ordered(table):
        if not primitive and f"{rule}" != "fa":
            row = means.loc[rule, ""]
            told = {"": label(rule, "")}
            for name in ("angle_deg", "norm_ratio", "rate_slow", "rate_fast"):
                told[name], told[f"{name} "] = f"{row[name] + 0:.4f}", f"{row[f'{name}_theory'] + 0:.4f}"
            rows.append(told)
    names = {name: "theory" for name in rows[0] if name.endswith(" ")} if rows else {}
    return tables.shown(pd.DataFrame(rows).rename(columns=names), index=False)


@plot.style()
def draw(page: Page) -> Figure:
    """The figure; ``page`` is what ``fa.notebook`` returns."""
    table = page.table()
    fig, axes = plot.figure([["a", "b"], ["a", "c"]], height=3.6, width_ratios=(1.75, 1))
    means, sds = found(table)["mean"], found(table)["std"]
    draw_reads(axes["a"], means, ordered(table))
    rules = [rule for rule, primitive in ordered(table) if not primitive]
    b, c = axes["b"], axes["c"]
    for i, rule in enumerate(rules):
        own, at = plot.look(rule), (rule, "")
        b.errorbar(i, means.loc[at, "angle_deg"], sds.loc[at, "angle_deg"], fmt=own.marker, color=own.color, ms=4)
        if rule == "fa":  # drawn at W's size, and it stays as it is
            continue
        place = (i, means.loc[at, "angle_deg"])
        b.annotate(f"{means.loc[at, 'norm_ratio']:.2f}", place, (0, 7), textcoords="offset points", ha="center", size=6)
        b.hlines(means.loc[at, "angle_deg_theory"], i - 0.3, i + 0.3, color=own.color, lw=0.9)
        for speed, fill in (("slow", "white"), ("fast", own.color)):
            x, y = (means.loc[at, f"rate_{speed}{theory}"] for theory in ("_theory", ""))
            c.plot(x, y, own.marker, color=own.color, mfc=fill, ms=4.5, mew=0.8)
    b.set(xticks=range(len(rules)), ylabel="Angle to W (°)", ylim=(-8, 112), yticks=(0, 30, 60, 90))
    b.set_xticklabels([plot.look(r).label for r in rules])
    plot.note(b, "numbers: norm ratio")
    span = (4e-4, 0.2)
    c.plot(span, span, color="0.7", lw=0.7, zorder=0)
    c.set(xscale="log", yscale="log", xlim=span, ylim=span, xlabel="Rate, theory", ylabel="Rate, measured")
    plot.note(c, "hollow: slowest mode; filled: fastest, or both")
    plot.letters(axes.values())
    axes["a"].set_title("a", loc="left", fontweight="bold", fontsize=8.5, x=0.01)
    return fig


def draw_reads(ax: Axes, means: pd.DataFrame, pairs: list[tuple[str, str]]) -> None:
    """Panel a: a row a primitive or rule, a column a quantity."""
    from matplotlib.patches import Rectangle

    for y, (rule, primitive) in enumerate(pairs):
        color = plot.look(rule).color
        ax.text(-0.6, y, label(rule, primitive), ha="right", va="center", color=color, fontweight="bold", fontsize=7.5)
        for x, name in enumerate(READS):
            change = means.loc[(rule, primitive), f"read_{name}"]
            bad = name in NON_LOCAL and change > READ
            face = "#B5460F" if bad else color if change > READ else "white"
            ax.add_patch(Rectangle((x - 0.42, y - 0.38), 0.84, 0.76, fc=face, ec="0.75", lw=0.5))
            if change > READ:
                ax.text(x, y, f"{change:.1f}", ha="center", va="center", color="white", fontsize=6.5)
    rules = sum(primitive != "" for _, primitive in pairs) - 0.5
    ax.axhline(rules, color="0.5", lw=0.6)
    split = len(READS) - len(NON_LOCAL) - 0.5
    ax.plot((split, split), (-1.6, len(pairs) - 0.5), color="0.5", lw=0.6, clip_on=False)
    ax.set(xlim=(-1.9, len(READS) - 0.5), ylim=(len(pairs) - 0.5, -0.6))
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(READS)), READS.values(), fontsize=8)
    ax.tick_params(length=0)
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    for at, text in ((split / 2 - 0.25, "at the synapse's two ends: local"), (split + 1, "elsewhere: not local")):
        ax.text(at, len(pairs) - 0.3, text, ha="center", va="top", fontsize=7)
