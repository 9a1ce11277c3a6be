"""p3, Figure 3: how near the path B R comes to W, by the expansion and the density of the feedback; nothing is
trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from fa import plot, tables, theory
from fa.errors import UserError
from fa.experiments import Experiment
from fa.layers.feedback import generator
from fa.metrics import angle
from fa.rules import PFAo, random_mask, uniform
from fa.train.config import identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page


RATIOS = tuple(10 ** (i / 5) for i in range(11))  # logspace(0, 2, 11)


@dataclass(frozen=True)
class Expansion:
    """Random matrices in place of training: how near B R comes to W once it has converged, R = B^T W.

    Args:
        rule: "pfa" at the eleven expansions of the authors, or "pfa_o" (B orthogonal, expansion 1).
        density: fraction of entries of B and of R that exist.
        repeats: independent draws, numbered in the record's ``seed``.
        n_out: outputs of the layer (default the authors').
        n_in: inputs of the layer (default the authors').
        revision: of the recipe.

    Source: p3, authors' ``alignment_vs_expand_ratio.py``.
    """

    rule: str
    density: float
    repeats: int
    n_out: int = 100
    n_in: int = 256
    revision: int = 1

    run = property(identity)

    def table(self) -> pd.DataFrame:
        """Angle and norm ratio of B R against W, and the eigenvalues of B^T B that are not zero by shape, at every
        expansion.

        Returns:
            ``expansion``, ``seed`` (the repeat), ``epoch`` (0), ``layer``, ``depth``, ``metric``, ``value``;
            ``eig_sd`` is the population standard deviation of the eigenvalues within the repeat.
        """
        rows = []
        n_out, n_in, density = self.n_out, self.n_in, self.density
        like = torch.empty(0, dtype=torch.float64)
        for ratio, repeat in itertools.product(RATIOS if self.rule == "pfa" else (1.0,), range(self.repeats)):
            gen = generator(repeat, self.rule, ratio, density)
            W = uniform((n_out, n_in), math.sqrt(2 / (n_out + n_in)), like, gen)
            if self.rule == "pfa_o":
                B = PFAo().fixed(n_out, 1, like, gen)
            else:
                mid = int(ratio * n_out)
                B = uniform(
                    (n_out, mid), math.sqrt((1 + 1 / ratio) / density / (n_out + mid)), like, gen
                )  # Xavier, authors' gain
            if density < 1:
                B = B * random_mask(tuple(B.shape), density, like, gen)
            R = B.T @ W
            if density < 1:
                R = R * random_mask(tuple(R.shape), density, like, gen)
            path, eigenvalues = B @ R, torch.linalg.eigvalsh(B @ B.T)
            values = {
                "angle_deg": angle(W, path),
                "norm_ratio": (torch.linalg.vector_norm(path) / torch.linalg.vector_norm(W)).item(),
                "eig_mean": eigenvalues.mean().item(),
                "eig_sd": eigenvalues.std(correction=0).item(),
            }
            rows += [[ratio, repeat, 0, "", None, metric, value] for metric, value in values.items()]
        return pd.DataFrame(rows, columns=["expansion", "seed", "epoch", "layer", "depth", "metric", "value"])


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, n_out: int = 100, n_in: int = 256
) -> list[Expansion]:
    """The authors' script at density 1, and at the other densities of their sparse figure; quick: four draws in
    place of 100."""
    if not (n_out and n_in):
        raise UserError(f"a layer of n_in={n_in} inputs and n_out={n_out} outputs has no weights; give both 1 or more")
    if epochs or dataset:
        raise UserError("p3_fig3 draws random matrices and trains nothing; leave epochs and dataset out")
    if unknown := set(rules) - {"pfa", "pfa_o"}:
        raise UserError(f"p3_fig3 is about pfa and pfa_o, not {', '.join(sorted(unknown))}")
    repeats = seeds or (100 if mode == "paper" else 4)
    grid = [("pfa", density) for density in (1.0, 0.5, 0.3, 0.17, 0.1, 0.05)] + [("pfa_o", 1.0)]
    return [Expansion(rule, density, repeats, n_out, n_in) for rule, density in grid if rule in rules]


EXPERIMENT = Experiment(
    "Alignment against the expansion ratio",
    "p3",
    "33_pfa_fig3_expansion",
    ("pfa", "pfa_o"),
    grid,
    own={"n_out": 100, "n_in": 256},
    swept=lambda config: {"density": config.density},
)


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Li & Benna (2024), Figure 3, replicated (100 x 256 weights, no training). a: eigenvalues of B^T B other
than 0, mean +/- 1 sd of all eigenvalues. b: angle between W and the path B R at the fixed point R = B^T W, mean +/- 1
sd over repeats. c: the same with sparse B and R of connection density d (not in the paper). Hollow: the authors'
recipe, recomputed independently. Dotted: theory. Dashed: PFA-o (orthogonal B, no expansion)."""


@plot.style()
def draw(page: Page) -> Figure:
    """a: eigenvalues of B^T B, b: path angle, c: path angle by the density of the feedback, against the expansion."""
    table, recipe = page.table(), page.reference()
    fig, ax = plot.figure("abc", height=2.4)
    pfa, λ = table[table.rule == "pfa"], np.logspace(0, 2, 100)
    spread(ax["a"], pfa[pfa.density == 1], "expansion", "eig_mean", "eig_sd", plot.look("pfa").color)
    hollow = recipe[(recipe.rule == "pfa") & (recipe.metric == "eig_sd")]
    for sign in (-1, 1):
        plot.published(ax["a"], hollow.expansion, 1 + sign * hollow.value, plot.look("pfa").color, size=3)
        ax["a"].plot(λ, 1 + sign / np.sqrt(λ), ":", color="0.2", lw=0.8)
    angles, hollow = _angles(table), _angles(recipe)
    colors = density_colors(angles.density)
    plot.curves(ax["b"], angles[angles.density == 1], "expansion", "density", colors)
    plot.curves(ax["c"], angles, "expansion", "density", colors)
    for d, color in colors.items():
        for panel in ("b", "c") if d == 1 else ("c",):
            plot.published(ax[panel], *hollow[hollow.density == d][["expansion", "value"]].T.values, color, size=3)
            ax[panel].plot(λ, theory.path_angle(λ, d, page.own["n_out"]), ":", color="0.2", lw=0.8)
    expansion_axes(ax, colors, recipe=len(recipe) > 0)
    plot.note(ax["b"], f"mean ± 1 sd, n = {pfa.seed.nunique()} repeats")
    return fig


def _angles(table: pd.DataFrame) -> pd.DataFrame:
    """The path angles of PFA."""
    return table[(table.rule == "pfa") & (table.metric == "angle_deg")]


def dense_angles(page: Page) -> str:
    """Table of the path angle of dense PFA by expansion: measured, the authors' recipe recomputed, and theory."""
    ours, recipe = (t[t.density == 1] for t in (_angles(page.table()), _angles(page.reference())))
    if ours.empty:
        return tables.several("no angles yet")
    shown = ours.groupby("expansion").value.agg(["mean", "std", "count"])
    theirs = recipe.set_index("expansion").value
    shown["recipe"] = theirs.reindex(shown.index, method="nearest", tolerance=1e-6)
    shown["theory"] = theory.path_angle(shown.index, n_out=page.own["n_out"])
    return tables.shown(shown.round(2))


def sparse_angles(page: Page) -> str:
    """Table of PFA's path angle, mean over repeats, by density (rows) and expansion (columns)."""
    rows = _angles(page.table()).assign(expansion=lambda t: t.expansion.round(1))
    if rows.empty:
        return tables.several("no angles yet")
    return tables.shown(rows.pivot_table(index="density", columns="expansion", values="value").round(1))


def spread(ax: Axes, table: pd.DataFrame, x: str, mean: str, sd: str, color) -> None:
    """Mean line and ± 1 sd band of values of which a repeat keeps only its own mean and sd (metrics `mean`, `sd`).

    The band is the sd of all values pooled: mean variance within the repeats plus variance of their means.
    """
    if len(table):
        wide = table.pivot_table(index=[x, "run", "seed"], columns="metric", values="value").groupby(level=x)
        center = wide[mean].mean()
        half = np.sqrt(wide[sd].agg(lambda v: (v**2).mean()) + wide[mean].var(ddof=0))
        ax.plot(center, color=color)
        ax.fill_between(center.index, center - half, center + half, color=color, alpha=0.2, linewidth=0)


def density_colors(densities: Sequence[float] | pd.Series) -> dict[float, object]:
    """Feedback density to colour, densest first: PFA's own colour when dense, then paler towards sparse."""
    import matplotlib as mpl

    ds = sorted({float(d) for d in densities} | {1.0}, reverse=True)
    fade = mpl.colors.LinearSegmentedColormap.from_list("fade", [plot.look("pfa").color, "#7A3F8C", "#8FA9D6"])
    return {d: fade(i / max(len(ds) - 1, 1)) for i, d in enumerate(ds)}


def expansion_axes(axes: Mapping[str, Axes], colors: Mapping[float, object], recipe: bool = True) -> None:
    """Axes, letters and legends of p3's Figure 3: a eigenvalues, b path angle, c the same by density.

    Args:
        axes: panels by letter.
        colors: density to colour, from `density_colors`.
        recipe: values of the authors' recipe are drawn, so that the legend needs them.
    """
    from matplotlib.lines import Line2D

    random, orthogonal = plot.look("pfa"), plot.look("pfa_o")
    eigenvalues = {"ylim": (-0.05, 2.1), "yticks": (0, 0.5, 1, 1.5, 2), "ylabel": r"Eigenvalues of $B^{\mathsf{T}}B$"}
    angles = {"ylim": (-2, 90), "yticks": (0, 30, 60, 90), "ylabel": "Path angle (°)"}
    for name, ax in axes.items():
        ax.axhline(1 if name == "a" else 0, color=orthogonal.color, ls=(0, (3, 3)), lw=1, zorder=3)
        ax.set(xscale="log", xlim=(0.93, 108), xlabel=plot.LABELS["expansion"])
        ax.set(xticks=(1, 10, 100), xticklabels=("1", "10", "100"), **(eigenvalues if name == "a" else angles))
    marks = [
        Line2D([], [], color=random.color, label=random.label),
        Line2D([], [], color=orthogonal.color, ls="--", label=orthogonal.label),
        Line2D([], [], color="0.2", ls=":", lw=0.8, label="theory"),
        Line2D([], [], ls="", marker="o", mfc="white", mec="0.35", mew=0.8, ms=3, label="authors' recipe"),
    ]
    axes["a"].legend(handles=marks if recipe else marks[:-1], loc="upper right")
    sparse = plot.key({f"{d:g}": c for d, c in reversed(colors.items())})
    axes["c"].legend(handles=sparse, title=r"density $d$", title_fontsize=6.5, loc="upper right")
    plot.letters(list(axes.values()))
