"""p1's rules on Architecture 1: how feedback, local errors and gradients align with backprop's, from the first steps
on; the runs are p1_accuracy's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fa import plot
from fa.experiments import Experiment
from fa.experiments.p1_accuracy import (
    BARS,
    BFLOAT16,
    LABELS,
    RULES,
    SCALED,
    SET_UP,
    by_layer,
    curves,
    grid,
    key,
    swept,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

EXPERIMENT = Experiment(
    "Alignment of feedback and gradients in a convolutional network", "p1", "12_fa_angles", RULES, grid, small=True,
    swept=swept, labels=LABELS,
)  # fmt: skip

START = {"usf": 30.0, "frsf": float(np.degrees(np.arccos(0.75))), "fa": 90.0}
"""Angle between W and feedback before training, degrees: both uniform, or the feedback of one magnitude."""

TEXT = """ a: angle between the error that a layer sends down and the one that W would send, given the same error above
(mean over 512 images); grey: the start angles that follow from uniform weights. b: angle between a layer's gradient dW
and exact backprop's. Both by epoch, and at steps of the first; the axis is linear up to the first of these. c: share of
equal signs of W and its feedback under FA by kernel, a line a layer. d, e: angle between W and its feedback, and norm
of the feedback over W's, after training; dense feedback has neither in a convolution. f: norm of W after training over
its initial norm."""
CAPTION = f"{SET_UP}{BFLOAT16}{TEXT} {BARS}"
SMALL_CAPTION = f"{SET_UP}{SCALED}{TEXT} {BARS}"


@plot.style()
def draw(page: Page) -> Figure:
    """a: local angle by layer; b: global angle of the gradient by layer; c to f: signs, weights and norms."""
    table = page.table()
    names = list(table[table.layer != ""].sort_values("depth").layer.unique()) or ["conv1", "conv2", "fc1", "fc2", "fc"]
    local, whole = names[1:], names[:-1]
    rows = [[f"a {n}" for n in local], [f"b {n}" for n in whole], list("cdef")]
    fig, ax = plot.figure(rows, height=5.6)
    for n in local:
        by_epoch(ax[f"a {n}"], table, "delta_angle_local_deg", n)
        for angle in START.values():
            ax[f"a {n}"].axhline(angle, color="0.75", lw=0.6, ls=":", zorder=0)
    for n in whole:
        by_epoch(ax[f"b {n}"], table, "grad_angle_global_deg", n, top=120)
    for panel, n, metric in ((f"a {local[0]}", local[0], "local"), (f"b {whole[0]}", whole[0], "gradient")):
        ax[panel].set_ylabel({"local": "Local error angle (°)", "gradient": "Gradient angle (°)"}[metric])
    concordance = table[(table.variant == "fa") & (table.metric == "sign_concordance")]
    colors = plot.depth_colors(range(1, len(names) + 1))
    plot.curves(ax["c"], concordance, "epoch", "layer", dict(zip(names, colors.values())), hue_order=names)
    logarithmic(ax["c"], table)
    ax["c"].set(ylabel="Share of equal signs, FA")
    ax["c"].margins(y=0.75)  # room for the key
    ax["c"].axhline(0.5, color="0.75", lw=0.6, ls=":", zorder=0)
    ax["c"].legend(handles=plot.key(dict(zip(names, colors.values()))), loc="upper left", ncols=2)
    end = table[table.epoch == table.epoch.max()]
    for panel, metric in (("d", "angle_deg"), ("e", "norm_ratio")):
        by_layer(ax[panel], end[end.metric == metric], names)
        ax[panel].set_ylabel({"d": "Weight angle (°)"}.get(panel, plot.LABELS[metric]))
    by_layer(ax["f"], growth(table), names)
    ax["f"].set_ylabel("Weight norm over initial")
    for panel in "ef":
        ax[panel].axhline(1, color="0.75", lw=0.6, ls=":", zorder=0)
    ax["d"].set(ylim=(20, 100), yticks=(30, 60, 90))
    fig.legend(handles=key(table.variant), loc="outside lower center", ncols=5)
    for panel in (f"a {local[0]}", f"b {whole[0]}", *"cdef"):
        plot.letters([ax[panel]], panel[0])
    return fig


def by_epoch(ax: Axes, table: pd.DataFrame, metric: str, layer: str, top: float = 100) -> None:
    """A metric of one layer by epoch, a line a variant, up to ``top`` degrees; the title names the layer."""
    curves(ax, table[(table.metric == metric) & (table.layer == layer)], "epoch")
    logarithmic(ax, table)
    ax.set(ylim=(0, top), yticks=range(0, int(top) + 1, 30))
    ax.set_title(layer, loc="center", fontsize=7)


def logarithmic(ax: Axes, table: pd.DataFrame) -> None:
    """An axis of epochs that shows the first steps: linear up to the first measured one, logarithmic from there."""
    epochs = table.epoch[table.epoch > 0]
    first, last = (epochs.min(), epochs.max()) if len(epochs) else (0.01, 50)
    ax.set_xscale("symlog", linthresh=first)
    ticks = [0, *(t for t in (0.01, 0.1, 1, 10) if first <= t <= last / 3), last]
    ax.set(xlim=(0, last), xticks=ticks, xlabel="Epoch")
    ax.set_xticklabels([f"{t:g}" for t in ticks])
    ax.minorticks_off()


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """Norm of W at the last epoch over the initial one, as rows with a ``value``."""
    rows = table[table.metric == "weight_norm"]
    first = rows[rows.epoch == 0].set_index(["run", "layer"]).value
    end = rows[rows.epoch == table.epoch.max()]
    before = pd.Series([first[run, layer] for run, layer in zip(end.run, end.layer)], index=end.index, dtype=float)
    return end.assign(value=end.value / before)
