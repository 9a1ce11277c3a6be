"""One look for every figure: the style, a colour and a marker per rule, the panels that figures share, and the saver.

Nothing here changes matplotlib when it is imported: draw inside ``with fa.plot.style():``. Colours are Okabe and Ito's
(Wong, Nature Methods 2011, doi 10.1038/nmeth.1618) for the rules of the main figures and Tol's "muted" for the others; both
are safe for colour-blind readers, and the markers tell the rules apart in black and white.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from fa.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = {"single": 3.5, "double": 7.2}
"""Printed widths in inches: one column and two columns of a journal page."""


class Look(NamedTuple):
    """How one rule is drawn: the paper's abbreviation, a colour and a marker."""

    label: str
    color: str
    marker: str


RULE_STYLE: dict[str, Look] = {
    "bp": Look("BP", "#000000", "o"),
    "fa": Look("FA", "#E69F00", "s"),
    "dfa": Look("DFA", "#CC79A7", "D"),
    "usf": Look("SF", "#009E73", "^"),
    "brsf": Look("brSF", "#117733", "<"),
    "frsf": Look("frSF", "#999933", ">"),
    "wm": Look("WM", "#882255", "p"),
    "ia": Look("IA", "#332288", "h"),
    "sa": Look("SA", "#44AA99", "H"),
    "aa": Look("AA", "#AA4499", "*"),
    "kp": Look("KP", "#56B4E9", "X"),
    "pfa": Look("PFA", "#D55E00", "v"),
    "pfa_o": Look("PFA-o", "#0072B2", "P"),
    "frozen": Look("frozen", "#888888", "d"),
    "primitives": Look("primitives", "#661100", "8"),
}
"""Rule name to its look, in the order in which legends list the rules."""

LABELS = {
    "test_accuracy": "Test accuracy (%)",
    "val_accuracy": "Validation accuracy (%)",
    "train_accuracy": "Training accuracy (%)",
    "train_loss": "Training loss",
    "angle_deg": "Angle (°)",
    "norm_ratio": "Norm ratio",
    "sign_concordance": "Sign concordance",
    "weight_norm": "Weight norm",
    "delta_angle_local_deg": "Local error angle (°)",
    "delta_angle_global_deg": "Global error angle (°)",
    "grad_angle_global_deg": "Gradient angle (°)",
    "expansion": "Expansion ratio λ",
    "density": "Feedback density d",
    "decay": "Weight decay of the first epoch",
    "precision": "Precision",
    "epoch": "Epoch",
}
"""Axis label of every metric and swept parameter."""

_SPARE_COLORS = ("#6699CC", "#CC6677", "#DDCC77", "#AA4466", "#999999", "#004488")
_SPARE_MARKERS = ("1", "2", "3", "4", "|", "_")
_RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that every machine draws the same letters
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "axes.labelpad": 2,
    "axes.titlepad": 4,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.labelspacing": 0.25,
    "legend.columnspacing": 1.0,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "mathtext.fontset": "dejavusans",
    "figure.dpi": 150,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # letters stay letters: searchable, and editable in a drawing program
    "axes.unicode_minus": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for every figure here, for the length of a ``with`` block; nothing is left changed."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    plt.draw_if_interactive()  # draws nothing: it sets the backend up, which in a notebook must outlast the block
    kept = {name: mpl.rcParams[name] for name in ("backend", "interactive")}  # interactive: a cell shows its figures
    with plt.rc_context({**mpl.rcParamsDefault, **kept, **_RC}):
        yield


def look(rule: str) -> Look:
    """Look of `rule`; a rule that is not in `RULE_STYLE` (a user's own) gets one that depends on its name alone."""
    h = zlib.crc32(rule.encode())
    spare = Look(rule, _SPARE_COLORS[h % len(_SPARE_COLORS)], _SPARE_MARKERS[h // 7 % len(_SPARE_MARKERS)])
    return RULE_STYLE.get(rule, spare)


def in_order(rules: Sequence[str] | pd.Series) -> list[str]:
    """The distinct `rules` in the order of `RULE_STYLE`, unknown ones after them by name."""
    known = list(RULE_STYLE)
    return sorted(set(rules), key=lambda r: (known.index(r) if r in RULE_STYLE else len(known), r))


def depth_colors(depths: Sequence[int]) -> dict[int, tuple[float, float, float, float]]:
    """Depth to viridis colour: dark at the input, light at the output, short of the yellow that paper swallows."""
    import matplotlib as mpl

    depths = sorted({int(d) for d in depths})
    return {d: mpl.colormaps["viridis"](0.85 * i / max(len(depths) - 1, 1)) for i, d in enumerate(depths)}


def figure(mosaic: str | list, width: str = "double", height: float = 3, **kwargs) -> tuple[Figure, dict[str, Axes]]:
    """A figure of fixed width with constrained layout and its panels by name.

    Args:
        mosaic: the panels, as `Figure.subplot_mosaic` takes them.
        width: "single" (3.5 in) or "double" (7.2 in).
        height: inches.
        kwargs: for `Figure.subplot_mosaic` (`width_ratios`, `sharex`, ...).
    """
    import matplotlib.pyplot as plt

    if width not in WIDTH:
        raise UserError(f"unknown width {width!r}; known: {', '.join(WIDTH)}")
    fig = plt.figure(figsize=(WIDTH[width], height), layout="constrained")
    return fig, fig.subplot_mosaic(mosaic, **kwargs)


def letters(axes: Sequence[Axes], first: str = "a") -> None:
    """Bold panel letters at the top left of `axes`, from `first` on."""
    for i, ax in enumerate(axes):
        ax.set_title(chr(ord(first) + i), loc="left", fontweight="bold", fontsize=8.5, x=-0.02)


def curves(ax: Axes, data: pd.DataFrame, x: str, hue: str, palette: Mapping, value: str = "value", **kwargs) -> None:
    """Mean line and a band of ± 1 sd (ddof 1) over the rows that share `x` and `hue`: seeds, repeats. No rows, no line."""
    import seaborn as sns

    if data.empty:
        return
    kwargs = {"errorbar": "sd", "legend": False, "err_kws": {"alpha": 0.2, "linewidth": 0}, **kwargs}
    sns.lineplot(data, x=x, y=value, hue=hue, palette=dict(palette), ax=ax, **kwargs)
    ax.set(xlabel=LABELS.get(x, x), ylabel="")


def published(ax: Axes, x, value, color, marker: str = "o", sd=None, size: float = 3.6, **kwargs) -> None:
    """The paper's values, always drawn alike: hollow markers on top, with ± 1 sd where the paper has it."""
    ax.errorbar(
        x,
        value,
        yerr=sd,
        fmt=marker,
        mfc="white",
        mec=color,
        ecolor=color,
        ms=size,
        mew=0.8,
        elinewidth=0.7,
        capsize=1.4,
        capthick=0.7,
        zorder=5,
        **kwargs,
    )


def accuracy(
    ax: Axes, table: pd.DataFrame, reference: pd.DataFrame | None = None, metric: str = "test_accuracy"
) -> None:
    """Accuracy (percent) by epoch, a curve a rule, mean ± 1 sd over seeds; the paper's as hollow markers."""
    data = table[(table.metric == metric) & (table.epoch > 0)]
    rules = in_order(data.rule)
    curves(ax, data, "epoch", "rule", {r: look(r).color for r in rules}, hue_order=rules)
    if reference is not None:
        ref = reference[(reference.metric == metric) & reference.rule.isin(rules or list(reference.rule))]
        theirs, step = in_order(ref.rule), max(data.epoch.max() if len(data) else ref.epoch.max(), 1) / 150
        for i, rule in enumerate(theirs):
            rows = ref[ref.rule == rule].sort_values("epoch")
            shift = step * (i - (len(theirs) - 1) / 2)  # so that markers at one epoch do not hide each other
            published(ax, rows.epoch + shift, rows.value, *look(rule)[1:], sd=_sd(rows), size=2.6)
    ax.set(xlabel=LABELS["epoch"], ylabel=LABELS[metric])


def zoom(
    ax: Axes,
    table: pd.DataFrame,
    reference: pd.DataFrame | None = None,
    metric: str = "test_accuracy",
    bounds: Sequence[float] = (0.37, 0.1, 0.61, 0.48),
) -> Axes:
    """Inset of `accuracy`: the second half of training, at the height where rules differ; `bounds` in axes units."""
    inset = ax.inset_axes(bounds)
    accuracy(inset, table, reference, metric)
    end = table[table.metric == metric]
    end = end[end.epoch >= end.epoch.max() / 2]
    if len(end):
        by_rule = end.groupby(["rule", "epoch"]).value.mean()
        low, high = by_rule.min(), by_rule.max()
        room = high - low
        inset.set(xlim=(end.epoch.min() - 0.5, 1.025 * end.epoch.max()), ylim=(low - 0.15 * room, high + 0.25 * room))
    inset.set(xlabel="", ylabel="")
    inset.xaxis.get_major_locator().set_params(integer=True)
    inset.tick_params(labelsize=5.5)
    return inset


def _sd(rows: pd.DataFrame) -> pd.Series | None:
    return rows.sd if rows.sd.notna().all() else None


def finals(ax: Axes, table: pd.DataFrame, reference: pd.DataFrame | None = None, metric: str = "test_accuracy") -> None:
    """Values at the last epoch, a column a rule: seeds as dots, ours filled (mean ± 1 sd), the paper's hollow."""
    data = table[table.metric == metric]
    data = data[data.epoch == data.epoch.max()]
    ref = reference[reference.metric == metric] if reference is not None else pd.DataFrame({"rule": [], "epoch": []})
    ref = ref[ref.epoch == (data.epoch.max() if len(data) else ref.epoch.max())]
    rules = in_order(data.rule if len(data) else ref.rule)
    for i, rule in enumerate(rules):
        own, values = look(rule), data[data.rule == rule].value
        if len(values):
            ax.plot(np.full(len(values), i - 0.32), values, ".", color=own.color, ms=2.5, alpha=0.45, mew=0)
            ax.errorbar(
                i - 0.1,
                values.mean(),
                yerr=values.std() if len(values) > 1 else None,
                fmt=own.marker,
                color=own.color,
                ms=3.8,
                elinewidth=0.9,
                capsize=1.6,
            )
        theirs = ref[ref.rule == rule]
        if len(theirs):
            published(ax, i + 0.22, theirs.value, own.color, own.marker, sd=_sd(theirs))
    ax.locator_params(axis="y", nbins=6)
    ax.set(xticks=range(len(rules)), xlim=(-0.6, max(len(rules) - 0.4, 0.6)))
    ax.set_ylabel(LABELS[metric].replace(" (", ", last epoch ("))
    ax.set_xticklabels([look(r).label for r in rules])
    ax.tick_params(axis="x", length=0)
    n = data.groupby("rule").seed.nunique()
    count = "–".join(str(v) for v in sorted({n.min(), n.max()}))
    ours = f"filled: mean ± 1 sd, n = {count} seeds (dots)" if len(n) else ""
    note(ax, "; ".join(filter(None, [ours, "hollow: paper" if len(ref) else ""])))


def note(ax: Axes, text: str) -> None:
    """Small grey print above a panel, at its right: what error bars and n are."""
    ax.set_title(text, loc="right", fontsize=5.5, color="0.35")


def layers(
    ax: Axes, table: pd.DataFrame, rule: str, metric: str, reference: pd.DataFrame | None = None
) -> dict[str, tuple]:
    """A layer metric of one rule by epoch, a curve a layer (colour: depth), mean over seeds; hollow: paper.

    Up to 12 layers have a band of ± 1 sd.

    Returns:
        layer to colour, for the legend.
    """
    named = table[(table.layer != "") & table.depth.notna()].drop_duplicates("layer").sort_values("depth")
    if named.empty and reference is not None:  # nothing trained yet: the paper's layers, in the order of its table
        names = [n for n in reference.layer.drop_duplicates() if n]
        named = pd.DataFrame({"layer": names, "depth": range(1, len(names) + 1)})
    by_depth = depth_colors(named.depth)
    colors = {n: by_depth[int(d)] for n, d in zip(named.layer, named.depth)}
    data = table[(table.rule == rule) & (table.metric == metric) & (table.layer != "")]
    many = {"errorbar": None, "linewidth": 0.7} if len(colors) > 12 else {}  # as many bands would hide each other
    curves(ax, data, "epoch", "layer", colors, hue_order=list(colors), **many)
    if reference is not None:
        ref = reference[(reference.rule == rule) & (reference.metric == metric) & reference.layer.isin(list(colors))]
        for row in ref.itertuples():
            published(ax, row.epoch, row.value, colors[row.layer], size=3.2, clip_on=False)
    return colors


def layer_grid(
    axes: Mapping[str, Axes], table: pd.DataFrame, rules: Sequence[str], reference: pd.DataFrame | None = None
) -> None:
    """`layers` for every rule, on p3's axes: panels "angle_deg RULE" hold the angles, "norm_ratio RULE" the ratios."""
    last = max((f.epoch.max() for f in (table, reference) if f is not None and len(f)), default=1)
    rows = {
        "angle_deg": ("Angle to W (°)", (-5, 100), (0, 50, 100), 90),  # 90: as random vectors
        "norm_ratio": ("Norm ratio to W", (0, 3), (0, 1, 2, 3), 1),
    }  # 1: as long as W
    for metric, (label, limits, ticks, even) in rows.items():
        for rule in rules:
            ax, first, bottom = axes[f"{metric} {rule}"], rule == rules[0], metric == "norm_ratio"
            ax.axhline(even, color="0.75", lw=0.6, ls=":", zorder=0)
            colors = layers(ax, table, rule, metric, reference)
            ax.set(xlim=(-0.03 * last, 1.03 * last), xticks=(0, last // 2, last), ylim=limits, yticks=ticks)
            ax.set(xlabel=LABELS["epoch"] if bottom else "", ylabel=label if first else "")
            ax.tick_params(labelleft=first, labelbottom=bottom)
            if not bottom:
                ax.set_title(look(rule).label, color=look(rule).color, fontweight="bold")
    if rules:
        shown = dict(list(colors.items())[:: max(len(colors) // 4, 1)]) if len(colors) > 6 else colors
        paper = reference is not None and len(reference) > 0
        axes[f"norm_ratio {rules[-1]}"].legend(handles=key(shown, paper), loc="upper right")


def over_layers(table: pd.DataFrame, metric: str, reference: pd.DataFrame | None = None) -> pd.DataFrame:
    """Mean, smallest and largest value that a rule's layers have at the last epoch; ours is the mean over seeds.

    Args:
        table: a record; may be empty.
        metric: of layers, such as "angle_deg".
        reference: published values, which have them as the metrics mean_, min_ and max_METRIC.

    Returns:
        index `rule`, columns `mean`, `min`, `max` (ours), `paper`, `from`, `to`; nan where there is none.
    """
    data = table[(table.metric == metric) & (table.layer != "")]
    by_seed = data[data.epoch == data.epoch.max()].groupby(["rule", "seed"]).value.agg(["mean", "min", "max"])
    ours, names = (
        by_seed.groupby("rule").mean(),
        {f"{k}_{metric}": v for k, v in zip(("mean", "min", "max"), ("paper", "from", "to"))},
    )
    theirs = (
        reference[reference.metric.isin(list(names))]
        if reference is not None
        else pd.DataFrame({"rule": [], "epoch": [], "metric": [], "value": []})
    )
    theirs = theirs[theirs.epoch == theirs.groupby("rule").epoch.transform("max")]
    theirs = (
        theirs.pivot(index="rule", columns="metric", values="value")
        .rename(columns=names)
        .reindex(columns=list(names.values()))
    )
    both = ours.join(theirs, how="outer").rename_axis("rule")
    return both.loc[in_order(both.index)].astype(float)


def by_depth(
    ax: Axes, table: pd.DataFrame, metric: str, names: Sequence[str], reference: pd.DataFrame | None = None
) -> None:
    """A layer metric at the last epoch against depth, a line a rule, mean ± 1 sd over seeds; at the right, the mean of the layers and
    their range (`over_layers`). Hollow: paper.

    Args:
        names: the layers, in order from the input, where the table has none.
    """
    data = table[(table.metric == metric) & (table.layer != "")]
    data = data[data.epoch == data.epoch.max()]
    names = list(data.sort_values("depth").layer.unique()) or list(names)
    place = {name: i for i, name in enumerate(names, 1)}
    summary, step = over_layers(table, metric, reference), len(names) / 20  # one twentieth of the layers' width
    for i, (rule, row) in enumerate(summary.iterrows()):
        own, at = look(rule), len(names) + (2.2 + 1.8 * i) * step
        of = data[data.rule == rule].groupby("layer").value.agg(["mean", "std"])
        if len(of):
            of = of.loc[[n for n in names if n in of.index]]
            ax.errorbar(
                [place[n] for n in of.index],
                of["mean"],
                of["std"],
                color=own.color,
                marker=own.marker,
                ms=2.2,
                lw=0.8,
                elinewidth=0.6,
            )
            ax.errorbar(
                at,
                row["mean"],
                [[row["mean"] - row["min"]], [row["max"] - row["mean"]]],
                fmt=own.marker,
                color=own.color,
                ms=3.4,
                elinewidth=0.8,
                capsize=1.4,
            )
        if reference is not None:
            known = reference[(reference.rule == rule) & (reference.metric == metric) & reference.layer.isin(names)]
            published(ax, known.layer.map(place), known.value, own.color, own.marker, size=3.2)
            if np.isfinite(row["paper"]):
                bars = [[row["paper"] - row["from"]], [row["to"] - row["paper"]]] if np.isfinite(row["from"]) else None
                published(ax, at + 0.75 * step, row["paper"], own.color, own.marker, sd=bars, size=3.2)
    end = len(names) + (2.2 + 1.8 * max(len(summary), 1)) * step
    ax.axvline(len(names) + 1.1 * step, color="0.8", lw=0.6)
    ticks = [1, *range(5, len(names) + 1, 5)] if len(names) > 8 else list(place.values())
    middle = (len(names) + 1.1 * step + end) / 2
    ax.set(xlim=(1 - step, end), xticks=[*ticks, middle], xlabel="Layer, from the input", ylabel=LABELS[metric])
    ax.set_xticklabels([*map(str, ticks), "mean, range"])
    ax.xaxis.get_major_ticks()[-1].tick1line.set_visible(False)


def rule_key(ax: Axes, rules: Sequence[str], **kwargs) -> None:
    """Legend of the rules in one row (or `ncols=`) above the panel, in the order of every figure."""
    rules = in_order(rules)
    handles = key({look(r).label: look(r).color for r in rules})
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.3, "borderpad": 0}
    ax.legend(
        handles=handles,
        **{
            **above,
            "ncols": max(len(rules), 1),
            "handlelength": 0.9,
            "columnspacing": 0.8,
            "handletextpad": 0.3,
            **kwargs,
        },
    )


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
    fade = mpl.colors.LinearSegmentedColormap.from_list("fade", [look("pfa").color, "#7A3F8C", "#8FA9D6"])
    return {d: fade(i / max(len(ds) - 1, 1)) for i, d in enumerate(ds)}


def expansion_axes(axes: Mapping[str, Axes], colors: Mapping[float, object], recipe: bool = True) -> None:
    """Axes, letters and legends of p3's Figure 3: a eigenvalues, b path angle, c the same by density.

    Args:
        axes: panels by letter.
        colors: density to colour, from `density_colors`.
        recipe: values of the authors' recipe are drawn, so that the legend needs them.
    """
    from matplotlib.lines import Line2D

    random, orthogonal = look("pfa"), look("pfa_o")
    eigenvalues = {"ylim": (-0.05, 2.1), "yticks": (0, 0.5, 1, 1.5, 2), "ylabel": r"Eigenvalues of $B^{\mathsf{T}}B$"}
    angles = {"ylim": (-2, 90), "yticks": (0, 30, 60, 90), "ylabel": "Path angle (°)"}
    for name, ax in axes.items():
        ax.axhline(1 if name == "a" else 0, color=orthogonal.color, ls=(0, (3, 3)), lw=1, zorder=3)
        ax.set(xscale="log", xlim=(0.93, 108), xlabel=LABELS["expansion"])
        ax.set(xticks=(1, 10, 100), xticklabels=("1", "10", "100"), **(eigenvalues if name == "a" else angles))
    marks = [
        Line2D([], [], color=random.color, label=random.label),
        Line2D([], [], color=orthogonal.color, ls="--", label=orthogonal.label),
        Line2D([], [], color="0.2", ls=":", lw=0.8, label="theory"),
        Line2D([], [], ls="", marker="o", mfc="white", mec="0.35", mew=0.8, ms=3, label="authors' recipe"),
    ]
    axes["a"].legend(handles=marks if recipe else marks[:-1], loc="upper right")
    sparse = key({f"{d:g}": c for d, c in reversed(colors.items())})
    axes["c"].legend(handles=sparse, title=r"density $d$", title_fontsize=6.5, loc="upper right")
    letters(list(axes.values()))


def key(looks: Mapping[str, object], paper: bool = False, **line) -> list:
    """Legend handles: a line for each label and colour, and the hollow marker of the paper's values."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, label=label, **line) for label, c in looks.items()]
    hollow = Line2D([], [], ls="", marker="o", mfc="white", mec="0.35", mew=0.8, ms=3.6, label="paper")
    return [*handles, hollow] if paper else handles


def stamp(fig: Figure, text: str) -> None:
    """Say on the figure itself what it is not: quick mode and its data set, or a partial table."""
    fig.suptitle(text, fontsize=7, color="#B00020", fontweight="bold", x=0.995, ha="right")


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(fig: Figure, name: str, caption: str, folder: Path, **trail) -> Path:
    """Write NAME.pdf, NAME.png (300 dpi) and NAME.json (caption, trail); the bytes depend on data and code alone.

    Args:
        name: stable name of the figure.
        caption: what one reads below it; says what the error bars are and n.
        folder: made if missing.
        trail: whatever leads back to code, data and machine; goes into NAME.json as it is.
    Returns:
        path of the PDF.
    """
    folder.mkdir(parents=True, exist_ok=True)
    caption = " ".join(caption.split())
    with style():
        fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Title": name, "Subject": caption})
        fig.savefig(folder / f"{name}.png", dpi=300, metadata={"Software": None, "Title": name, "Description": caption})
    text = json.dumps({"name": name, "caption": caption, **trail}, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return folder / f"{name}.pdf"
