"""p3, Figure 1 in our reading: the circuits of the rules, drawn from what each rule's code does. It has no runs."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn

from fa import plot, tables
from fa.experiments import Experiment
from fa.layers.convert import convert
from fa.layers.dfa import DirectFeedback
from fa.layers.feedback import generator
from fa.probes import WHAT, noise_passes, reads, taught
from fa.rules import RULES, rule
from fa.symmetry import matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

CAPTION = """Circuits of learning rules, one layer each; our drawing, as Figure 1 of Li & Benna (2024) is not known to
us. Left in each panel: the forward pass, y = W x. Right: the way of the error, from e at the network's output to dy at
the layer's output and dx at its input. Solid synapses learn, dashed ones are fixed and random, dotted ones copy W.
Dotted red arrow: weight transport. Double arrow: two synapses take the same local update. Dash-dotted: feedback learns
from the activity that W makes. Below: the equations in the code. Drawn from interventions on each rule's code."""

PANELS = ("bp", "fa", "dfa", "usf", "kp", "wm", "pfa")  # the rules of the drawing

EXPERIMENT = Experiment("Circuits of the rules", "p3", "31_pfa_fig1_circuits", PANELS)

SHOWN = {"wm": {"input": "normal"}}
"""Options of a rule that is not drawn with its defaults: noise drives the weight mirror, as published."""


@dataclass(frozen=True)
class Circuit:
    """What connects to what under a rule, as its code does it.

    Args:
        rule: its name.
        feedback: the feedback matrices in the order in which the error passes them, name -> "learned", "fixed" or
            "copied" (made of W at every use, named "W", or now and then, under a name of its own).
        shapes: name -> shape in symbols, (out, in) of the layer, "pop" for a population in between, "classes" for the
            network's output.
        transported: the parts of W that the error sent down depends on: "sign", "magnitude", both or neither.
        reads_value: whether learning reads W's value, all activities held.
        sees_activity: whether learning depends on W through the layer's activity.
        product: the factor of x where the feedback's gradient is a product of two activities: "dy" for dy x^T, W's own
            update, or "B^T dy"; "" elsewhere.
        noise: whether noise drives the learning.
        direct: whether the error comes straight from the network's output.
    """

    rule: str
    feedback: dict[str, str]
    shapes: dict[str, tuple[str, ...]]
    transported: tuple[str, ...]
    reads_value: bool
    sees_activity: bool
    product: str
    noise: bool
    direct: bool

    @property
    def population(self) -> bool:
        """Whether the error passes a population of neurons between dy and dx."""
        return len(self.feedback) > 1


def circuit(name: str) -> Circuit:
    """A rule's circuit, by interventions (`fa.probes`) on the hidden layer of a small network.

    Raises:
        UserError: an unknown rule.
    """
    sizes = {"in": 7, "out": 5, "classes": 3}
    weights = generator(0, "circuit")
    n_in, n_out, classes = sizes.values()
    net = nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(n_out, classes)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=weights)
    r = rule(name, **SHOWN.get(name, {}))
    convert(net, r)
    layer, direct = net[0], isinstance(getattr(net[0], "feedback", None), DirectFeedback)
    x = torch.randn(4, sizes["in"], generator=weights, dtype=torch.float64)
    dy = torch.randn(4, sizes["classes" if direct else "out"], generator=weights, dtype=torch.float64)
    e = torch.randn(4, sizes["classes"], generator=weights, dtype=torch.float64)
    found = reads(layer, x, dy, weights)
    lesson = taught(layer, x, dy)
    stored = {k: M for k, M in matrices(layer).items() if k != "K"}
    refreshed = "W" in (getattr(getattr(layer, "feedback", None), "after_args", None) or ())
    drawn = "copied" if refreshed else "fixed"
    product, signal, symbol = "", dy, "dy"
    for key, M in stored.items():  # down the error's way
        if key in lesson and torch.allclose(lesson[key], signal.T @ x):
            product = symbol
        signal, symbol = signal @ M, f"{key}^T {symbol}"
    symbols = {size: symbol for symbol, size in sizes.items()}
    return Circuit(
        rule=name,
        feedback={k: "learned" if k in r.learned else drawn for k in stored} or {"W": "copied"},
        shapes={k: tuple(symbols.get(n, "pop") for n in M.shape) for k, M in stored.items()} or {"W": ("out", "in")},
        transported=tuple(what for what in WHAT if found[f"send_{what}"] > 1e-9),
        reads_value=max(found.get("learn_sign", 0), found.get("learn_magnitude", 0)) > 1e-9,
        sees_activity=found.get("learn_activity", 0) > 1e-9,
        product=product,
        noise=noise_passes(net, x, e) > 0,
        direct=direct,
    )


def summary(page: Page) -> str:
    """Table: what each panel of the drawing shows, as asked of the rules' code."""
    rows = []
    for c in map(circuit, page.rules or PANELS):
        told = {n: f"{n} ({' x '.join(c.shapes[n])})" for n in c.feedback}
        kinds = {kind: [told[n] for n, k in c.feedback.items() if k == kind] for kind in ("copied", "fixed", "learned")}
        product = f"{c.product} x^T" if c.product else "-"
        rows.append({
            "rule": plot.look(c.rule).label,
            "equation": RULES[c.rule].equation,
            **{kind: ", ".join(names) for kind, names in kinds.items()},
            "error reads W's": ", ".join(c.transported) or "-",
            "it learns from": "W" if c.reads_value else "W x" if c.sees_activity else product,
            "noise": "yes" if c.noise else "-",
        })  # fmt: skip
    return tables.shown(pd.DataFrame(rows).replace("", "-"), index=False)


# -------------------------------------------------------------------------------------------------------- drawing

_LINES = {"learned": "-", "fixed": "--", "copied": ":"}
_RED = "#C1121F"
_TRANSPORT = {"color": _RED, "ls": (0, (1, 1.3)), "lw": 1.4}
_SHARED = {"color": "0.35", "arrowstyle": "<|-|>"}
_ACTIVITY = {"color": "0.35", "ls": (0, (4, 1.5, 1, 1.5))}
_X, _DX = 0.46, 1.26  # the forward and the backward column, inches
_LOW, _POP, _HIGH, _TOP, _LOSS = 0.33, 0.74, 1.15, 1.55, 1.86  # levels


def equation(name: str) -> str:
    """A rule's equations as mathtext; the words beside them are left out."""

    def word(text: str) -> str:
        text = text.replace("^T", r"^{\mathsf{T}}").replace("<", r"\langle ").replace(">", r"\rangle ")
        return "$" + re.sub(r" sign\b", r"\\,\\mathrm{sign}", text).replace("d ", "d\\,") + "$"

    parts = [part.strip() for part in RULES[name].equation.split(", ")]
    return ",  ".join(word(part) for part in parts if " = " in part and not re.search(r"[a-z]{2,} [a-z]{2,}", part))


def title(name: str) -> str:
    """What a rule is called: the beginning of its docstring."""
    return textwrap.shorten(re.split(r"[:.(]| with ", (RULES[name].__doc__ or name).strip())[0], 34, placeholder=" …")


def _row(
    ax: Axes, x: float, y: float, n: int = 3, gap: float = 0.16, r: float = 0.05, **kwargs: Any
) -> list[tuple[float, float]]:
    """Neurons side by side; returns their places."""
    from matplotlib.patches import Circle

    places = [(x + (i - (n - 1) / 2) * gap, y) for i in range(n)]
    for place in places:
        ax.add_patch(Circle(place, r, **{"facecolor": "white", "edgecolor": "0.15", "lw": 0.8, "zorder": 4, **kwargs}))
    return places


def _synapses(ax: Axes, start: list, end: list, kind: str, color: str, r: float = 0.05) -> None:
    """Every neuron of one row onto every neuron of another, a dot where they end."""
    for x0, y0 in start:
        for x1, y1 in end:
            d = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
            ux, uy = (x1 - x0) / d, (y1 - y0) / d
            tip = (x1 - ux * (r + 0.02), y1 - uy * (r + 0.02))
            ax.plot((x0 + ux * r, tip[0]), (y0 + uy * r, tip[1]), ls=_LINES[kind], color=color, lw=0.75, zorder=2)
            ax.plot(*tip, "o", ms=1.5, mew=0, color=color, zorder=3)


def _arrow(ax: Axes, start: tuple, end: tuple, color: str = "0.45", **kwargs: Any) -> None:
    from matplotlib.patches import FancyArrowPatch

    look = {"arrowstyle": "-|>", "mutation_scale": 6, "lw": 0.8, "shrinkA": 0, "shrinkB": 0, "zorder": 3, **kwargs}
    ax.add_patch(FancyArrowPatch(start, end, color=color, **look))


def _label(ax: Axes, x: float, y: float, text: str, **kwargs: Any) -> None:
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
    ax.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 7.5, "zorder": 6, "bbox": box, **kwargs})


def draw_panel(ax: Axes, c: Circuit) -> None:
    """One circuit, in inches: forward at the left, the error's way down at the right."""
    from matplotlib.patches import FancyBboxPatch

    color = plot.look(c.rule).color if c.rule != "bp" else "0.15"
    box = {"boxstyle": "round,pad=0.02", "fc": "0.93", "ec": "0.5", "lw": 0.6}
    ax.add_patch(FancyBboxPatch((_X - 0.2, _LOSS - 0.06), _DX - _X + 0.4, 0.12, **box))
    ax.text((_X + _DX) / 2, _LOSS, "network's output, loss", fontsize=6.5, ha="center", va="center", color="0.2")
    x, y = _row(ax, _X, _LOW), _row(ax, _X, _HIGH)
    back = {"facecolor": "0.85"}
    dx, dy, e = _row(ax, _DX, _LOW, **back), _row(ax, _DX, _HIGH, **back), _row(ax, _DX, _TOP, **back)
    free = -1 if c.direct else 1  # the side of dy at which nothing passes
    for text, at, side in (("$x$", x, -1), ("$y$", y, -1), ("$dx$", dx, 1), ("$dy$", dy, free), ("$e$", e, 1)):
        px, py = at[0 if side < 0 else -1]
        ax.text(px + side * 0.08, py, text, ha="right" if side < 0 else "left", va="center", fontsize=7.5)
    _synapses(ax, x, y, "learned", "0.15")
    middle = (_LOW + _HIGH) / 2
    _label(ax, _X, middle, "$W$")
    _arrow(ax, (_X, _HIGH + 0.07), (_X, _LOSS - 0.09))
    _arrow(ax, (_DX, _LOSS - 0.09), (_DX, _TOP + 0.06))
    for column, level in ((_X, 1.47), (_DX, (_TOP + _HIGH) / 2)):  # the layers above
        if column == _X or not c.direct:
            _label(ax, column, level, "⋮", color="0.35", fontsize=8)

    if c.population:
        (first, second), pop = c.feedback, _row(ax, _DX, _POP, 6, 0.1, 0.036, facecolor=color, edgecolor="none")
        _synapses(ax, dy, pop, c.feedback[first], color, 0.045)
        _synapses(ax, pop, dx, c.feedback[second], color, 0.045)
        for name, level in ((first, (_HIGH + _POP) / 2), (second, (_POP + _LOW) / 2)):
            _label(ax, _DX, level, f"${name}$", color=color)
        ax.text(_DX - 0.34, _POP, r"$\lambda\,n_\mathrm{out}$", ha="right", va="center", fontsize=6.5, color=color)
    elif c.direct:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        for start, end in zip(e, dx):  # around dy, whose error comes by a matrix of its own
            tip = (end[0] + 0.03, end[1] + 0.07)
            bend = [start, (start[0] + 0.45, _HIGH + 0.1), (end[0] + 0.45, _HIGH - 0.35), tip]
            path = Path(bend, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
            ax.add_patch(PathPatch(path, fc="none", ec=color, ls=_LINES[c.feedback["B"]], lw=0.75, zorder=2))
            ax.plot(*tip, "o", ms=1.5, mew=0, color=color, zorder=3)
        _synapses(ax, e, dy, c.feedback["B"], color)
        _label(ax, _DX + 0.33, middle, "$B_l$", color=color)
    else:
        (name,) = c.feedback
        _synapses(ax, dy, dx, c.feedback[name], color)
        text = f"${name}$" if name != "W" else "$W$" if "magnitude" in c.transported else r"$\mathrm{sign}(W)$"
        _label(ax, _DX, middle, text, color=color)
    if not c.direct:
        _arrow(ax, (_DX, _TOP - 0.06), (_DX, _HIGH + 0.06), zorder=1)

    refreshed = "copied" in c.feedback.values() and "W" not in c.feedback
    if c.transported or c.reads_value or refreshed:
        seldom = "now and then" if refreshed else "value"
        told = (seldom, "".join(c.transported), "sign and size")[len(c.transported)]
        reach = 0.24 if c.transported == ("sign",) else 0.1
        _arrow(ax, (_X + 0.1, middle), (_DX - reach, middle), **_TRANSPORT, mutation_scale=7, zorder=7)
        _label(ax, (_X + _DX) / 2 - (reach - 0.1) / 2, middle + 0.1, told, color=_RED, fontsize=6.5)
    if c.product == "dy":
        _arrow(ax, (_X + 0.1, middle), (_DX - 0.1, middle), **_SHARED, zorder=7)
        _label(ax, (_X + _DX) / 2, middle + 0.1, "$dW$", color="0.25", fontsize=6.5)
    if c.sees_activity and not c.reads_value:
        for level, end in ((_LOW, middle - 0.04), (_HIGH, middle + 0.04)):
            _arrow(ax, (_X + 0.24, level), (_DX - 0.1, end), **_ACTIVITY, zorder=5)
    if c.noise:
        _arrow(ax, (_X, _LOW - 0.23), (_X, _LOW - 0.07), color)
        ax.text(_X + 0.06, _LOW - 0.19, "noise", fontsize=6.5, color=color, va="center")


@plot.style()
def draw(page: Page) -> Figure:
    """The circuits of the page's rules (default: `PANELS`), four a row, and a key to the marks."""
    import matplotlib.pyplot as plt

    circuits = [circuit(n) for n in page.rules or PANELS]
    cell, tall, columns = plot.WIDTH["double"] / 4, 2.5, 4
    rows = -(-(len(circuits) + 1) // columns)
    fig = plt.figure(figsize=(plot.WIDTH["double"], rows * tall))
    grid = fig.add_gridspec(rows, columns, left=0, bottom=0, right=1, top=1, wspace=0, hspace=0)
    places = [fig.add_subplot(grid[i]) for i in range(len(circuits) + 1)]
    for ax in places:
        ax.set(xlim=(0, cell), ylim=(-0.2, tall - 0.2))
        ax.axis("off")
    for i, (ax, c) in enumerate(zip(places, circuits)):
        ax.text(0.05, 2.18, chr(ord("a") + i), fontsize=8.5, fontweight="bold")
        ax.text(0.2, 2.18, plot.look(c.rule).label, fontsize=8.5, fontweight="bold", color=plot.look(c.rule).color)
        ax.text(0.05, 2.06, title(c.rule), fontsize=6.5, color="0.3")
        draw_panel(ax, c)
        ax.text(cell / 2, -0.06, equation(c.rule), fontsize=6.8, ha="center", va="center")
    _key(places[-1])
    return fig


def _key(ax: Axes) -> None:
    """What the marks mean."""
    lines = [("learned", "learned synapses"), ("fixed", "fixed, random synapses"), ("copied", "synapses that copy W")]
    ax.text(0.12, 2.05, "Marks", fontsize=7.5, fontweight="bold")
    step, y = 0.195, 1.87
    for kind, text in lines:
        ax.plot((0.14, 0.44), (y, y), ls=_LINES[kind], color="0.15", lw=1)
        ax.plot(0.46, y, "o", ms=2, mew=0, color="0.15")
        ax.text(0.56, y, text, fontsize=6.5, va="center")
        y -= step
    for style, text in (
        (_TRANSPORT, "weight transport: another\nsynapse's value is read"),
        (_SHARED, "the same local update"),
        (_ACTIVITY, "learns from the activity\nthat W makes"),
    ):
        _arrow(ax, (0.14, y), (0.48, y), **style)
        ax.text(0.56, y, text, fontsize=6.5, va="center", linespacing=1.05)
        y -= step
    for face, text in (("white", "neurons: activity"), ("0.85", "neurons: error")):
        _row(ax, 0.31, y, 2, 0.15, facecolor=face)
        ax.text(0.56, y, text, fontsize=6.5, va="center")
        y -= step
    _row(ax, 0.31, y, 4, 0.1, 0.036, facecolor=plot.look("pfa").color, edgecolor="none")
    ax.text(0.56, y, "a population of its own", fontsize=6.5, va="center")
    y -= step
    ax.text(0.31, y, "⋮", fontsize=8, color="0.35", ha="center", va="center")
    ax.text(0.56, y, "layers above", fontsize=6.5, va="center")
