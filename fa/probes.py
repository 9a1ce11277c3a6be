"""The circuit of a rule: asked of its code by intervention, and drawn.

Whether a rule reads the forward weights is not taken from its description. A layer is held at one state, its forward
weight is changed behind the rule's back, and what the rule's own code then sends down, or teaches its feedback, is
compared with before:

* *sent* - the error that leaves the layer for the same error at its output; a change means that the error's way down
  reads W;
* *taught* - the gradient of the feedback for the same activities; a change means that its learning reads W's value.

Signs and magnitudes are scrambled separately: "sign" gives every entry of W a random sign, "magnitude" permutes the
sizes and leaves the signs. This is our reading of the first two rows of p3's Table 1.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers.convert import convert
from fa.layers.dfa import DirectFeedback
from fa.layers.feedback import Feedback, generator
from fa.layers.hooks import converted
from fa.metrics import matrices
from fa.rules import RULES, rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHAT = ("sign", "magnitude")
"""What of a weight can be scrambled."""

# ------------------------------------------------------------------------------------------------- interventions


def scramble(W: Tensor, what: str, gen: torch.Generator) -> Tensor:
    """``W`` with random signs and its own magnitudes ("sign"), or with its own signs and permuted magnitudes
    ("magnitude")."""
    if what not in WHAT:
        raise UserError(f"unknown part {what!r} of a weight; known: {', '.join(WHAT)}")
    if what == "sign":
        return W * (2 * torch.randint(2, W.shape, generator=gen) - 1).to(W)
    order = torch.randperm(W.numel(), generator=gen).to(W.device)
    return W.sign() * W.abs().flatten()[order].view_as(W)


@contextmanager
def weight(layer: nn.Module, W: Tensor) -> Iterator[None]:
    """Within the block the layer's weight has the values of ``W``; its feedback stays as it is."""
    before = layer.weight.detach().clone()
    try:
        with torch.no_grad():
            layer.weight.copy_(W)
        yield
    finally:
        with torch.no_grad():
            layer.weight.copy_(before)


@contextmanager
def same_noise(net: nn.Module) -> Iterator[None]:
    """Within the block the layers draw noise for their mirrors; after it they will draw the same again."""
    maps = [m.feedback.op for m in converted(net).values() if isinstance(m.feedback, Feedback)]
    generators = [op.gen for op in maps if op.gen]
    states = [g.get_state() for g in generators]
    try:
        yield
    finally:
        for g, state in zip(generators, states):
            g.set_state(state)


def sent(layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """The error that a layer sends down, by its own backward pass; of the shape of ``x``.

    Args:
        layer: converted or not.
        x: its input (n, ...).
        dy: the error at its output; under dfa that at the network's output, (n, classes).
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), same_noise(layer):
        if not isinstance(getattr(layer, "feedback", None), DirectFeedback):
            return torch.autograd.grad(layer(x), x, dy)[0]
        tape = layer.feedback.tape
        tape.open()
        layer(x)
        return torch.autograd.grad(tape.close(dy.detach().requires_grad_()), x, dy)[0]


class _Recorded:
    """A layer's linear map that keeps the activity it makes, or, given what another kept, makes that once more."""

    def __init__(self, op: Any, kept: list[Tensor] | None = None) -> None:
        self.op, self.kept, self.again = op, [] if kept is None else list(kept), kept is not None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.op, name)

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.again:
            return self.kept.pop(0).clone()
        self.kept.append(self.op.forward(x, K, bias))
        return self.kept[-1].clone()


def taught(
    layer: nn.Module, x: Tensor, dy: Tensor, W: Tensor | None = None, activity: bool = False
) -> dict[str, Tensor]:
    """The gradients of a layer's learned feedback, by its rule's own ``feedback_grad``; empty where nothing is learned.

    Args:
        layer: a converted layer.
        x: its input (n, ...).
        dy: the error at its output.
        W: what the rule takes for the layer's weight (default: that weight).
        activity: whether the activity that the layer makes, from its input or from a mirror's noise, follows ``W``
            too. Default ``False``: every neuron is as active as under the layer's own weight, and only the value of
            the synapse is another.
    """
    fb = getattr(layer, "feedback", None)
    if not isinstance(fb, Feedback) or not fb.rule.learned:
        return {}
    if fb.rule.needs_sgd:
        raise UserError("implicit feedback stores no R and cannot say what teaches it; convert with implicit=False")
    true = layer.weight.detach()

    def lesson(W: Tensor, op: Any) -> dict[str, Tensor]:
        with same_noise(layer):
            return fb.feedback_gradient(x, dy, W, op)

    if W is None or activity:
        return lesson(true if W is None else W, fb.op)
    recorded = _Recorded(fb.op)
    lesson(true, recorded)
    return lesson(W, _Recorded(fb.op, recorded.kept))


def change(after: Tensor, before: Tensor) -> float:
    """Relative change, norm of the difference over the norm before, in float64; 0 where nothing is sent before or
    after."""
    after, before = after.detach().double(), before.detach().double()
    moved = torch.linalg.vector_norm(after - before).item()
    return moved / torch.linalg.vector_norm(before).item() if moved else 0.0


def reads(layer: nn.Module, x: Tensor, dy: Tensor, gen: torch.Generator) -> dict[str, float]:
    """What of W a layer's rule reads, as relative changes under scrambling; changes nothing in the end.

    Args:
        layer: converted or not; x, dy: as in :func:`sent`.
        gen: of the scrambling.

    Returns:
        ``send_sign`` and ``send_magnitude``, of the error sent down; and where feedback is learned, of its gradient,
        ``learn_sign`` and ``learn_magnitude`` (all activities held) and ``learn_activity`` (signs scrambled, and the
        layer's activity follows).
    """
    W = layer.weight.detach().clone()
    before, lesson = sent(layer, x, dy), taught(layer, x, dy)
    found = {}
    for what in WHAT:
        other = scramble(W, what, gen)
        with weight(layer, other):
            found[f"send_{what}"] = change(sent(layer, x, dy), before)
        for name, grad in lesson.items():
            found[f"learn_{what}"] = change(taught(layer, x, dy, other)[name], grad)
            if what == "sign":
                found["learn_activity"] = change(taught(layer, x, dy, other, activity=True)[name], grad)
    return found


def noise_passes(net: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Fraction of the passes through the layers' weights in one training step that noise drives and not the data.

    Counted while the network takes the step: every product W x of the forward pass, and every one that the learning
    of the feedback makes.

    Args:
        net: converted or not; its gradients and the state of its noise are left as they are.
        x: inputs (n, ...).
        dy: the error at the network's output.
    """
    count = {"data": 0, "noise": 0}
    layers = [m for m in converted(net).values() if isinstance(m.feedback, Feedback)]

    def watch(op: Any) -> None:
        forward, noise, heard = op.forward, op.noise, []

        def counted(*args: Any) -> Tensor:
            count["noise" if heard else "data"] += 1
            return forward(*args)

        def drawn(*args: Any) -> Tensor:
            heard.append(True)
            return noise(*args)

        op.forward, op.noise = counted, drawn

    for m in layers:
        watch(m.feedback.op)
    try:
        wanted = [p for p in net.parameters() if p.requires_grad]
        with torch.enable_grad(), same_noise(net):
            torch.autograd.grad(net(x), wanted, dy, allow_unused=True)
    finally:
        for m in layers:
            del m.feedback.op.forward, m.feedback.op.noise
    return count["noise"] / max(sum(count.values()), 1)


def reciprocal(net: nn.Module, gen: torch.Generator, entries: int = 20) -> dict[tuple[str, str], float]:
    """How much of every feedback matrix joins a pair of neurons that a forward synapse joins too, the other way round.

    A synapse of the feedback is reciprocal if it carries error from one output neuron of the layer to one of its
    inputs, that is, if changing it changes one entry of the effective kernel. A synapse into or out of a population
    in between changes a row or a column. Where the feedback is no matrix of its own but made of W, it is W's mirror
    image. Under dfa the error comes from the network's output neurons, which are the layer's own only in the last
    layer.

    Args:
        net: converted or not.
        gen: of the entries that are tried.
        entries: how many of each matrix (default 20).

    Returns:
        (layer, matrix) -> fraction of the entries tried.
    """
    layers = converted(net) or {n: m for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    found = {}
    for name, layer in layers.items():
        fb = getattr(layer, "feedback", None)
        if isinstance(fb, DirectFeedback):
            found[name, "B"] = float(name == list(layers)[-1])
            continue
        stored = matrices(layer)
        for key in stored or ("W",):
            if key not in stored or not hasattr(fb, key):  # made of W
                found[name, key] = 1.0
                continue
            M, single = getattr(fb, key).detach(), 0
            alive = torch.nonzero(stored[key])
            with torch.no_grad():
                before = fb.kernel(layer.weight).clone()
                for at in alive[torch.randint(len(alive), (entries,), generator=gen)]:
                    at = tuple(at.tolist())
                    value = M[at].clone()
                    M[at] += 1
                    single += int((fb.kernel(layer.weight) != before).sum()) == 1
                    M[at] = value
            found[name, key] = single / entries
    return found


# ------------------------------------------------------------------------------------------------------- circuits

PANELS = ("bp", "fa", "dfa", "usf", "kp", "wm", "pfa")
"""The rules of the drawing."""

SHOWN = {"wm": {"input": "normal"}}
"""Options under which a rule is drawn, where its defaults do not show what it is known for: a weight mirror driven by
noise."""


@dataclass(frozen=True)
class Circuit:
    """What connects to what under a rule, as its code does it.

    Args:
        rule: its name.
        feedback: matrices on the error's way down, in its order: name -> "learned", "fixed" or "copied" (made of W,
            at every use or, under the name of a matrix of its own, now and then).
        shapes: name -> shape in symbols, (out, in) of the layer, "pop" for a population in between, "classes" for the
            network's output.
        transported: what of W the error's way down reads: "sign", "magnitude", both or nothing.
        reads_value: whether learning reads W's value, all activity held.
        sees_activity: whether learning depends on W through the layer's activity.
        product: what meets x in the learned feedback's gradient, where that is the product of two activities, as "dy"
            for dy x^T, which is W's own update, or "B^T dy"; "" elsewhere.
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
        """Whether the error passes a population of its own."""
        return len(self.feedback) > 1


def circuit(name: str) -> Circuit:
    """A rule's circuit: the hidden layer of a small network is converted, and :func:`reads` and its like are asked;
    nothing is typed in.

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


def summary(names: Sequence[str] = PANELS) -> str:
    """Text table: what each panel of the drawing shows, as asked of the rules' code."""
    import pandas as pd

    from fa.plot import look

    rows = []
    for c in map(circuit, names):
        told = {n: f"{n} ({' x '.join(c.shapes[n])})" for n in c.feedback}
        kinds = {kind: [told[n] for n, k in c.feedback.items() if k == kind] for kind in ("copied", "fixed", "learned")}
        product = f"{c.product} x^T" if c.product else "-"
        rows.append({
            "rule": look(c.rule).label,
            "equation": RULES[c.rule].equation,
            **{kind: ", ".join(names) for kind, names in kinds.items()},
            "error reads W's": ", ".join(c.transported) or "-",
            "it learns from": "W" if c.reads_value else "W x" if c.sees_activity else product,
            "noise": "yes" if c.noise else "-",
        })  # fmt: skip
    return pd.DataFrame(rows).replace("", "-").to_string(index=False)


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

    from fa.plot import look

    color = look(c.rule).color if c.rule != "bp" else "0.15"
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


def draw(names: Sequence[str] = PANELS) -> Figure:
    """The circuits of the rules, four a row, and a key to the marks: p3's Figure 1 in our reading, for the paper's
    own is not known to us."""
    import matplotlib.pyplot as plt

    from fa.plot import WIDTH, look

    circuits = [circuit(n) for n in names]
    cell, tall, columns = WIDTH["double"] / 4, 2.5, 4
    rows = -(-(len(circuits) + 1) // columns)
    fig = plt.figure(figsize=(WIDTH["double"], rows * tall))
    spots = [divmod(i, columns) for i in range(len(circuits) + 1)]
    places = [fig.add_axes((j / columns, 1 - (i + 1) / rows, 1 / columns, 1 / rows)) for i, j in spots]
    for ax in places:
        ax.set(xlim=(0, cell), ylim=(-0.2, tall - 0.2))
        ax.axis("off")
    for i, (ax, c) in enumerate(zip(places, circuits)):
        ax.text(0.05, 2.18, chr(ord("a") + i), fontsize=8.5, fontweight="bold")
        ax.text(0.2, 2.18, look(c.rule).label, fontsize=8.5, fontweight="bold", color=look(c.rule).color)
        ax.text(0.05, 2.06, title(c.rule), fontsize=6.5, color="0.3")
        draw_panel(ax, c)
        ax.text(cell / 2, -0.06, equation(c.rule), fontsize=6.8, ha="center", va="center")
    _key(places[-1])
    return fig


def _key(ax: Axes) -> None:
    """What the marks mean."""
    from fa.plot import look

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
    _row(ax, 0.31, y, 4, 0.1, 0.036, facecolor=look("pfa").color, edgecolor="none")
    ax.text(0.56, y, "a population of its own", fontsize=6.5, va="center")
    y -= step
    ax.text(0.31, y, "⋮", fontsize=8, color="0.35", ha="center", va="center")
    ax.text(0.56, y, "layers above", fontsize=6.5, va="center")
