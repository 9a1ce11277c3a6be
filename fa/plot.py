"""One look for every figure: the style, a colour and a marker per rule, the panels that figures share, and the saver.

Nothing here changes matplotlib when it is imported: draw inside ``with fa.plot.style():``, or in a function under
``@fa.plot.style()``; the settings are in ``fa.mplstyle``. Colours are Okabe and Ito's (Wong, Nature Methods 2011, doi
10.1038/nmeth.1618) for the rules of the main figures and Tol's "muted" for the others; both are safe for colour-blind
readers, and the markers tell the rules apart in black and white.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from fa.errors import UserError
from fa.paths import write_bytes

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
    "chosen_test_accuracy": "Test accuracy, best validation epoch (%)",
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
_SPARE_MARKERS = ("8", "d", "<", ">", "h", "*")  # of rules in few figures; one of strokes is thin, or not seen at all
_STYLE = Path(__file__).with_name("fa.mplstyle")


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for every figure here, within a ``with`` block or a decorated function; none stays
    changed."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    plt.draw_if_interactive()  # draws nothing: it sets the backend up, which in a notebook must outlast the block
    kept = {name: mpl.rcParams[name] for name in ("backend", "interactive")}  # interactive: a cell shows its figures
    own = mpl.rc_params_from_file(_STYLE, use_default_template=False)
    with plt.rc_context({**mpl.rcParamsDefault, **kept, **own}):
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
    """Mean line and a band of ± 1 sd (ddof 1) over the rows that share `x` and `hue`: seeds, repeats. No rows, no
    line."""
    import seaborn as sns

    if data.empty:
        return
    kwargs = {"errorbar": "sd", "legend": False, "err_kws": {"alpha": 0.2, "linewidth": 0}, **kwargs}
    sns.lineplot(data, x=x, y=value, hue=hue, palette=dict(palette), ax=ax, **kwargs)
    ax.set(xlabel=LABELS.get(x, x), ylabel="")


def published(ax: Axes, x, value, color, marker: str = "o", sd=None, size: float = 3.6, **kwargs) -> None:
    """The paper's values, always drawn alike: hollow markers on top, with ± 1 sd where the paper has it."""
    hollow = {"mfc": "white", "mec": color, "ecolor": color, "ms": size, "mew": 0.8, "zorder": 5}
    ax.errorbar(x, value, yerr=sd, fmt=marker, elinewidth=0.7, capsize=1.4, capthick=0.7, **hollow, **kwargs)


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
            sd = values.std() if len(values) > 1 else None
            line = {"fmt": own.marker, "color": own.color, "ms": 3.8, "elinewidth": 0.9, "capsize": 1.6}
            ax.errorbar(i - 0.1, values.mean(), yerr=sd, **line)
        theirs = ref[ref.rule == rule]
        if len(theirs):
            published(ax, i + 0.22, theirs.value, own.color, own.marker, sd=_sd(theirs))
    ax.locator_params(axis="y", nbins=6)
    ax.set(xticks=range(len(rules)), xlim=(-0.6, max(len(rules) - 0.4, 0.6)))
    ax.set_ylabel(LABELS[metric].replace(" (", ", last epoch ("))
    ax.set_xticklabels([look(r).label for r in rules])
    ax.tick_params(axis="x", length=0)
    ours = f"filled: {repeats(data)} (dots)" if len(data) else ""
    note(ax, "; ".join(filter(None, [ours, "hollow: paper" if len(ref) else ""])))


def note(ax: Axes, text: str) -> None:
    """Small grey print above a panel, at its right: what error bars and n are."""
    ax.set_title(text, loc="right", fontsize=5.5, color="0.35")


def repeats(table: pd.DataFrame, by: Sequence[str] = ("rule",)) -> str:
    """What an error bar is, for `note`: "mean ± 1 sd, n = 3–5 seeds"; fewest and most of the groups `by`, "" for
    none."""
    n = table.groupby(list(by)).seed.nunique()
    if n.empty or n.max() == 1:
        return "" if n.empty else "n = 1 seed"
    return f"mean ± 1 sd, n = {'–'.join(str(v) for v in sorted({n.min(), n.max()}))} seeds"


def means(ax: Axes, data: pd.DataFrame, x: str, rule: str = "", at: Callable = lambda x: x, **line) -> None:
    """Mean ± 1 sd over seeds of the rows that share `x`, a marker each and a line through them, in the look of `rule`.

    Args:
        at: the values of `x` -> where to draw them (default: there).
        line: for `Axes.errorbar`, before the look of the rule.
    """
    of = data.groupby([x, "seed"]).value.mean().groupby(x).agg(["mean", "std"])
    ax.errorbar(at(of.index), of["mean"], of["std"], **_line(rule) | line)


def ranges(ax: Axes, data: pd.DataFrame, x: str, rule: str, at: Callable = lambda x: x) -> None:
    """Mean over seeds and layers of the rows that share `x`, with bars from the lowest layer to the highest."""
    of = data.groupby([x, "layer"]).value.mean().groupby(x).agg(["mean", "min", "max"])
    ax.errorbar(at(of.index), of["mean"], (of["mean"] - of["min"], of["max"] - of["mean"]), **_line(rule))


def _line(rule: str) -> dict[str, object]:
    own = look(rule)
    return {"color": own.color, "marker": own.marker, "lw": 0.9, "elinewidth": 0.7, "capsize": 1.4}


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


def rule_key(ax: Axes, rules: Sequence[str], named: Callable[[str], str] | None = None, **kwargs) -> None:
    """Legend of the rules in one row (or `ncols=`) above the panel, in the order of every figure, under their names."""
    rules = in_order(rules)
    handles = key({named(r) if named else look(r).label: look(r).color for r in rules})
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.3, "borderpad": 0}
    tight = {"ncols": max(len(rules), 1), "handlelength": 0.9, "columnspacing": 0.8, "handletextpad": 0.3}
    ax.legend(handles=handles, **above | tight | kwargs)


def key(looks: Mapping[str, object], paper: bool = False, **line) -> list:
    """Legend handles: a line for each label and colour, and the hollow marker of the paper's values."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, label=label, **line) for label, c in looks.items()]
    hollow = Line2D([], [], ls="", marker="o", mfc="white", mec="0.35", mew=0.8, ms=3.6, label="paper")
    return [*handles, hollow] if paper else handles


@style()
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
    caption, pdf, png = " ".join(caption.split()), BytesIO(), BytesIO()
    with style():
        fig.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Title": name, "Subject": caption})
        about = {"Software": None, "Title": name, "Description": caption}
        fig.savefig(png, format="png", dpi=300, metadata=about)
    text = json.dumps({"name": name, "caption": caption, **trail}, indent=1, ensure_ascii=False) + "\n"
    for kind, content in (("png", png.getvalue()), ("json", text.encode()), ("pdf", pdf.getvalue())):
        path = write_bytes(folder / f"{name}.{kind}", content)
    return path
