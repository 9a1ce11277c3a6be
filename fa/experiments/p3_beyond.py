"""Beyond p3, on MNIST: gradient angles, the decay of the first epoch, and how small the expansion may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fa import plot, tables, theory
from fa.experiments import Experiment, p3_fig2
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page


RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")

DECAYS = (0.0, 0.003, 0.01, 0.1)  # of the first epoch; Figure 2 has 0.03. 0: the later epochs' decay
EXPANSIONS = (0.25, 0.5, 1.0, 2.0, 5.0)  # Figure 2 has 10
QUICK_DECAYS = (0.0, 0.02, 0.06)  # digits have 22 steps an epoch, not 937; Figure 2's quick mode has 0.2


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 2's runs, and short ones with another decay in the first epoch, or another expansion.

    Figure 2's schedule changes nothing in epochs 1 to 20, so that the first epochs of its runs belong to both series.
    """
    quick = mode == "quick"
    whole = p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (20 if quick else 0), dataset)
    runs = list(whole)
    for config in whole:
        if not seeds and config.seed >= 3:
            continue
        own = config.vary(measure="mismatch")
        if config.rule in p3_fig2.DECAYED:
            # R as a matrix where that is cheap, so that the mismatch that is left is measured on it
            implicit = None if config.rule == "pfa_o" else config.rule_options.get("implicit")
            short = own.vary(implicit=implicit, epochs=min(4, config.epochs))
            runs += [short.vary(first_weight_decay=decay) for decay in (DECAYS if not quick else QUICK_DECAYS)]
        if config.rule == "pfa":
            short = own.vary(epochs=min(10, config.epochs))
            runs += [short.vary(expansion=λ) for λ in EXPANSIONS]
    return runs


def expansion_of(config: Config) -> float:
    """Expansion of a run's population; nan where its rule has none."""
    return float(config.rule_options.get("expansion", {"pfa_o": 1.0}.get(config.rule, float("nan"))))


EXPERIMENT = Experiment(
    "Gradients, decay and expansion on MNIST", "p3", "37_pfa_beyond", RULES, grid,
    swept=lambda config: {"expansion": expansion_of(config), "decay": config.first_weight_decay or config.weight_decay},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

CAPTION = """Beyond Li & Benna (2024). A 784-512-512-10 ReLU network learns MNIST; means over seeds +/- 1 sd. a: angle
between W and its feedback in the second layer. b: angle between the gradient of the first layer's weight and exact
backprop's, on 512 training images. c: after the last epoch, four angles that share a name: of the second layer's weight
to its feedback; between the errors that the two send down (local); between the first layer's error and exact backprop's
(global); and between its gradient and exact backprop's. KP's lines lie under PFA-o's in a, b, e and f. d: share of the
first mismatch between R and B^T W (KP: B and W) that is left, for five weight decays of the first epoch; lines:
recurrence, markers: measured, shifted sideways. e: angle between W and its feedback after one epoch, mean of both
hidden layers; dotted: 17.5 degrees, PFA's in theory. f: test accuracy after one epoch (hollow) and four (filled). g:
path angle of PFA after ten epochs by expansion; dotted: arccos(1/sqrt(1 + 1/expansion)). h: its gradient angle. i: its
test accuracy after ten epochs, with BP's and FA's."""

UPPER = {"fc1": "fc2", "fc2": "fc"}
"""Layer -> the layer above, whose feedback brings it its error."""

ANGLES = {  # name -> metric, whether it is measured at the upper layer, marker
    "weight": ("angle_deg", True, "s"),
    "local": ("delta_angle_local_deg", True, "o"),
    "global": ("delta_angle_global_deg", False, "D"),
    "gradient": ("grad_angle_global_deg", False, "*"),
}
"""The four angles that share a name, in the order of one step of the error's way down."""


@dataclass(frozen=True)
class Tidy:
    """The page's rows by question.

    Args:
        whole: Figure 2's runs.
        last: their last epoch.
        decayed: four epochs by the weight decay of the first, under kp, pfa_o and pfa with Figure 2's expansion.
        ten: pfa after ten epochs, by its expansion.
        beside: test accuracies of every rule at that epoch, for the same seeds.
    """

    whole: pd.DataFrame
    last: pd.DataFrame
    decayed: pd.DataFrame
    ten: pd.DataFrame
    beside: pd.DataFrame

    @property
    def rules(self) -> list[str]:
        """The rules whose gradients were measured."""
        return plot.in_order(self.whole[self.whole.metric == "grad_angle_global_deg"].rule)

    @property
    def decays(self) -> list[float]:
        """The weight decays of the first epoch."""
        return sorted(self.decayed.decay.unique())


def tidy(page: Page) -> Tidy:
    """The page's table by question; a run that is Figure 2's belongs to all three."""
    from fa.experiments import plan

    table, mode = page.table(), "quick" if page.mode == "quick" else "paper"
    figure2 = plan("p3_fig2", mode, rules=",".join(dict.fromkeys(c.rule for c in page.runs)))
    recipes = [(c.rule, c.options, c.first_weight_decay) for c in figure2]
    theirs = {c.run: (c.rule, c.options, c.first_weight_decay) in recipes for c in page.runs}
    whole = table[table.run.map(theirs).fillna(False).astype(bool)]
    paired = table[table.seed.isin({c.seed for c in page.runs if not theirs[c.run]})]  # the seeds of the short runs
    decayed = paired[paired.rule.isin(["kp", "pfa_o"]) | (paired.rule == "pfa") & (paired.expansion == 10)]
    sized = paired[(paired.rule == "pfa") & (paired.decay == whole.decay.max()) & (paired.epoch <= 10)]
    beside = paired[(paired.metric == "test_accuracy") & (paired.epoch == sized.epoch.max())]
    last, ten = (rows[rows.epoch == rows.epoch.max()] for rows in (whole, sized))
    return Tidy(whole, last, decayed[decayed.epoch <= 4], ten, beside)


def expected(page: Page, decay: float, epochs: int = 4) -> np.ndarray:
    """Share of the mismatch that theory expects before training and after each epoch (`theory.mismatch_left`).

    Args:
        decay: weight decay of the first epoch; later epochs have the recipe's own.
    """
    config = next(c for c in page.runs if c.rule in p3_fig2.DECAYED)
    steps = {"digits": 1437, "mnist": 60000, "cifar10": 45000}[config.dataset] // config.batch
    schedule = [(config.lr, decay if epoch == 0 else config.weight_decay) for epoch in range(epochs)]
    return np.abs(theory.mismatch_left(schedule, config.momentum, steps))


def shares(decayed: pd.DataFrame) -> pd.DataFrame:
    """Share of the mismatch that is left, measured: columns rule, decay, run, layer, epoch, left.

    kp and pfa_o: |W - K| from norm and angle of the feedback weight K; pfa: what implicit feedback keeps of it.
    """
    wide = decayed.pivot_table(index=["rule", "decay", "run", "layer", "epoch"], columns="metric", values="value")
    r, cosine = wide.norm_ratio, np.cos(np.deg2rad(wide.angle_deg))
    D = wide.weight_norm * np.sqrt((1 + r**2 - 2 * r * cosine).clip(lower=0))
    share = D / D.groupby(["run", "layer"]).transform("first")
    own = wide.mismatch_left.abs() if "mismatch_left" in wide else np.nan
    return share.where(share.index.get_level_values("rule") != "pfa", own).dropna().rename("left").reset_index()


@plot.style()
def draw(page: Page) -> Figure:
    """a to c: angles of weights, errors and gradients; d to f: the decay of the first epoch; g to i: the expansion."""
    of = tidy(page)
    fig, ax = plot.figure("abc;def;ghi", height=6.2)
    _draw_angles(ax, of)
    _draw_decay(ax, of, page)
    _draw_expansion(ax, of)
    for panel, frame in (("a", of.whole), ("f", of.decayed), ("i", of.ten)):
        plot.note(ax[panel], plot.repeats(frame))
    plot.letters(list(ax.values()))
    return fig


def _draw_angles(ax: dict[str, Axes], of: Tidy) -> None:
    """Panels a to c."""
    palette = {r: plot.look(r).color for r in of.rules}
    for panel, layer, metric in (("a", "fc2", "angle_deg"), ("b", "fc1", "grad_angle_global_deg")):
        rows = of.whole[(of.whole.layer == layer) & (of.whole.metric == metric)]
        plot.curves(ax[panel], rows, "epoch", "rule", palette, hue_order=[r for r in of.rules if r in set(rows.rule)])
        ax[panel].set(ylim=(-3, 125), yticks=(0, 30, 60, 90), xlabel=plot.LABELS["epoch"])
    ax["a"].set_ylabel("Angle to W, fc2 (°)")
    ax["b"].set_ylabel("Gradient angle, fc1 (°)")
    ax["a"].legend(handles=plot.key({plot.look(r).label: c for r, c in palette.items()}), ncols=3, loc="upper right")
    for j, (kind, (metric, above, marker)) in enumerate(ANGLES.items()):
        layer, word = "fc2" if above else "fc1", " error" if kind in ("local", "global") else ""
        rows = of.last[(of.last.layer == layer) & (of.last.metric == metric)]
        ends = rows.groupby("rule").value.agg(["mean", "std"]).reindex(of.rules)
        line = {"color": plot.depth_colors(range(4))[j], "ms": 4, "capsize": 1.2, "elinewidth": 0.7}
        x = np.arange(len(of.rules)) + 0.13 * (j - 1.5)
        ax["c"].errorbar(x, ends["mean"], ends["std"], fmt=marker, label=f"{kind}{word}, {layer}", **line)
    ax["c"].set(ylim=(-3, 125), yticks=(0, 30, 60, 90), ylabel="Angle at the end (°)")
    ax["c"].set(xticks=range(len(of.rules)), xticklabels=[plot.look(r).label for r in of.rules])
    ax["c"].legend(ncols=2, loc="upper right", handletextpad=0.2)


def _draw_decay(ax: dict[str, Axes], of: Tidy, page: Page) -> None:
    """Panels d to f."""
    colors, rules = plot.depth_colors(range(max(len(of.decays), 1))), plot.in_order(of.decayed.rule)
    measured = shares(of.decayed) if len(of.decayed) else None
    for i, decay in enumerate(of.decays):
        ax["d"].plot(range(5), expected(page, decay), color=colors[i], lw=0.9, label=f"{decay:g}")
        for j, rule in enumerate(("kp", "pfa_o", "pfa")):
            left = measured[(measured.decay == decay) & (measured.rule == rule)].groupby("epoch").left.mean()
            ax["d"].plot(left.index + 0.12 * (j - 1), left, plot.look(rule).marker, color=colors[i], ms=3.2, mew=0)
    ax["d"].set(yscale="log", xlabel="Epoch", xticks=range(5), ylabel="Share of the mismatch left")
    if of.decays:
        ax["d"].legend(title="decay, epoch 1", title_fontsize=6.5, loc="lower right", bbox_to_anchor=(1, 0.1))
    plot.note(ax["d"], "markers: × KP, + PFA-o, ▾ PFA")
    for rule in rules:
        rows = of.decayed[of.decayed.rule == rule]
        aligned = rows[(rows.metric == "angle_deg") & (rows.epoch == 1) & rows.layer.isin(UPPER)]
        plot.means(ax["e"], aligned, "decay", rule, label=plot.look(rule).label)
        for epoch, face in ((1, "white"), (4, None)):
            accuracy = rows[(rows.metric == "test_accuracy") & (rows.epoch == epoch)]
            plot.means(ax["f"], accuracy, "decay", rule, mfc=face)
    ax["e"].axhline(theory.path_angle(10), color="0.2", ls=":", lw=0.8)
    ax["e"].set(ylim=(-3, 100), yticks=(0, 30, 60, 90), ylabel="Angle to W after 1 epoch (°)")
    handles = plot.key({plot.look(r).label: plot.look(r).color for r in rules})
    ax["e"].legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 0.22))
    ax["f"].set(ylabel="Test accuracy (%)")
    for panel in "ef":
        ax[panel].set(xscale="log", xlabel=plot.LABELS["decay"])
        if of.decays:
            ax[panel].set(xticks=of.decays, xticklabels=[f"{d:g}".replace("e-0", "e-") for d in of.decays])
            ax[panel].minorticks_off()


def _draw_expansion(ax: dict[str, Axes], of: Tidy) -> None:
    """Panels g to i."""
    depth = plot.depth_colors((1, 2, 3))
    panels = {"g": ("angle_deg", "Path angle (°)"), "h": ("grad_angle_global_deg", "Gradient angle (°)")}
    for panel, (metric, label) in panels.items():
        for i, layer in enumerate(("fc1", "fc2", "fc") if panel == "g" else ("fc1", "fc2"), 1):
            rows = of.ten[(of.ten.metric == metric) & (of.ten.layer == layer)]
            plot.means(ax[panel], rows, "expansion", color=depth[i], marker="o", ms=3, label=layer)
        ax[panel].set(ylim=(-3, 100), yticks=(0, 30, 60, 90), ylabel=label)
        ax[panel].legend(loc="upper right")
    λ = np.geomspace(0.25, 10, 60)
    ax["g"].plot(λ, theory.path_angle(λ), ":", color="0.2", lw=0.9)
    plot.means(ax["i"], of.ten[of.ten.metric == "test_accuracy"], "expansion", "pfa")
    levels(ax["i"], of.beside, ["bp", "fa"])
    for rule, rows in of.beside[of.beside.rule.isin(["bp", "fa"])].groupby("rule"):
        at = {"xy": (0.99, rows.value.mean()), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        ax["i"].annotate(plot.look(rule).label, **at, color=plot.look(rule).color)
    ax["i"].set(ylabel="Test accuracy (%)")
    ax["i"].margins(y=0.1)
    for panel in "ghi":
        ax[panel].set(xscale="log", xlabel=plot.LABELS["expansion"], xlim=(0.21, 12))
        ax[panel].set(xticks=(0.25, 0.5, 1, 2, 5, 10), xticklabels=("¼", "½", "1", "2", "5", "10"))
        ax[panel].minorticks_off()


def levels(ax: Axes, rows: pd.DataFrame, rules: Sequence[str]) -> None:
    """Rules without the panel's x: a line at the mean of a rule's rows, and a band of ± 1 sd."""
    for rule in rules:
        if len(value := rows[rows.rule == rule].value):
            middle, sd, color = value.mean(), value.std(), plot.look(rule).color
            ax.axhline(middle, color=color, lw=0.9)
            ax.axhspan(middle - sd, middle + sd, color=color, alpha=0.12, lw=0)


def angles_text(page: Page) -> str:
    """Table: the four angles after the last epoch, mean over seeds, one step of the error's way down after
    another."""
    of, steps = tidy(page), []
    for lower, upper in UPPER.items():
        for name, (metric, above, _) in ANGLES.items():
            rows = of.last[(of.last.layer == (upper if above else lower)) & (of.last.metric == metric)]
            steps.append(rows.groupby("rule").value.mean().rename((f"{upper} to {lower}", name)))
    shown = pd.concat(steps, axis=1).reindex(of.rules)
    shown[("n", "")] = of.last.groupby("rule").seed.nunique()
    if shown.empty:
        return tables.several("nothing yet")
    return tables.shown(shown, float_format="{:.1f}".format, na_rep="-")


def decay_text(page: Page) -> str:
    """Table: share of the mismatch after the first epoch, theory and measured; `worst`: farthest from theory
    ever."""
    of = tidy(page)
    if of.decayed.empty:
        return tables.several("nothing yet")
    measured, wanted = shares(of.decayed), {d: expected(page, d) for d in of.decays}
    shown = measured[measured.epoch == 1].pivot_table(index="decay", columns="rule", values="left")
    shown.insert(0, "theory", [wanted[d][1] for d in shown.index])
    off = [abs(s - wanted[d][int(e)]) for s, d, e in zip(measured.left, measured.decay, measured.epoch)]
    worst = measured.assign(off=off).groupby("decay").off.max().rename("worst")
    return tables.shown(shown.join(worst), float_format="{:.5f}".format, na_rep="-")


def cost_text(page: Page) -> str:
    """Table: test accuracy after one epoch and after four, by the first epoch's weight decay."""
    rows = tidy(page).decayed
    rows = rows[(rows.metric == "test_accuracy") & rows.epoch.isin([1, 4])]
    shown = rows.pivot_table(index="decay", columns=["rule", "epoch"], values="value")
    return tables.shown(shown, float_format="{:.2f}".format, na_rep="-") if len(rows) else tables.several("nothing yet")


def expansion_text(page: Page) -> str:
    """Tables of pfa after ten epochs: path angle, theory and gradient angle by layer; accuracy, sd, n; BP's and
    FA's."""
    of = tidy(page)
    if of.ten.empty:
        return tables.several("nothing yet")
    wide = of.ten.pivot_table(index="expansion", columns=["metric", "layer"], values="value", sort=False)
    angle = wide["angle_deg"].add_prefix("path ")
    angle.insert(0, "theory", theory.path_angle(angle.index))
    angle = angle.join(wide["grad_angle_global_deg"][list(UPPER)].add_prefix("gradient ")).sort_index()
    accuracy = of.ten[of.ten.metric == "test_accuracy"].groupby("expansion").value.agg(["mean", "std", "count"])
    accuracy = accuracy.set_axis(["accuracy", "sd", "n"], axis=1)
    others = of.beside[of.beside.rule.isin(["bp", "fa"])].groupby("rule").value.mean()
    means = ", ".join(f"{plot.look(r).label} {v:.2f}" for r, v in others.items())
    angles = tables.shown(angle, float_format="{:.1f}".format)
    return tables.several(angles, "", tables.shown(accuracy, float_format="{:.2f}".format), "", means)
