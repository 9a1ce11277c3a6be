"""p3, Table 1: what each rule needs and what it reaches, a number for every tick.

Two kinds of run. *Training*: Figure 2's recipe on MNIST. The runs of rules whose feedback has W's shape are Figure
2's own; the others are trained here, so that every feedback matrix of the trained network can be compared with W.
*Probes*: the same recipe in its quick form (digits), briefly, and then interventions on the rules' own code
(:mod:`fa.probes`). A property of the code does not hang on the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.experiments import p3_fig2
from fa.experiments.experiment import Experiment
from fa.layers.feedback import generator
from fa.layers.hooks import converted
from fa.metrics import symmetry
from fa.probes import noise_passes, reads, reciprocal
from fa.train import data
from fa.train.config import Config, identity
from fa.train.loop import Run, build_network, train_runs, weighted

RULES = ("bp", "fa", "dfa", "usf", "kp", "wm", "pfa", "pfa_o")

OPTIONS = {"wm": "init=0.001 amp=0.01 decay=0.005 input=normal"}
"""Ours, as the paper ran no weight mirror: noise drives it, B goes to amp / (2 decay) W = W, and it starts small, so
that what the mirror has learned soon outweighs the draw."""

SHARED = ("bp", "fa", "usf", "kp")  # Figure 2's runs: feedback of W's shape, of which the angle to W says all


@dataclass(frozen=True)
class Probe:
    """One network, trained briefly and then intervened on.

    Args:
        experiment: "p3_table1".
        rule: a name of ``fa.RULES``.
        seed: as in :class:`fa.train.config.Config`, and of the scrambling.
        options: of the rule; product feedback stores R here.
        measure: "circuit"; tells a probe's identity from that of an ordinary run.
        dataset: digits, whatever the mode.
        hidden: widths of the hidden layers.
        epochs: of training before (default 10, ours).
        lr: learning rate.
        revision: of the recipe.
    """

    experiment: str
    rule: str
    seed: int
    options: str
    measure: str
    dataset: str = "digits"
    hidden: str = "64,64"
    epochs: int = 10
    lr: float = 0.05
    revision: int = 1

    run = property(identity)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, **own: Any) -> list[Any]:
    """Figure 2's recipe, five seeds of its own runs and three of the others; and as many probes."""
    quick, runs = mode == "quick", []
    for config in p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs, dataset):
        options = config.options or OPTIONS.get(config.rule, "")
        if seeds or config.seed < (1 if quick else 3):
            runs.append(Probe("p3_table1", config.rule, config.seed, options.replace(" implicit=true", ""), "circuit"))
        if config.rule in SHARED:
            runs.append(config)
        elif seeds or config.seed < 3:
            runs.append(replace(config, experiment="p3_table1", options=options))
    return runs


# ----------------------------------------------------------------------------------------------------------- measuring


def mirrored(config: Config, net: nn.Module, epoch: int) -> list[list[Any]]:
    """Rows of :func:`fa.metrics.symmetry` before and after training: ``B_match``, ``R_mixed``, ..., and ``B_excess``
    = match - mixed."""
    if epoch not in (0, config.epochs) or not converted(net):
        return []
    rows = []
    for row in symmetry(explicit(config, net)).to_dict("records"):
        row["excess"] = row["match"] - row["mixed"]
        names = ("correlation", "angle_deg", "match", "mixed", "chance", "excess")
        told = [n for n in names if not math.isnan(row[n])]
        rows += [[epoch, row["layer"], row["depth"], f"{row['matrix']}_{n}", row[n]] for n in told]
    return rows


def explicit(config: Config, net: nn.Module) -> nn.Module:
    """The network itself, or its twin in float64 that stores the R which implicit product feedback leaves out.

    R = B^T W + c (R_0 - B^T W_0), with B, R_0 and W_0 drawn anew from the run's seed (:class:`fa.rules.PFA`).
    """
    if not config.rule_options.get("implicit"):
        return net
    layers = weighted(net)
    shape, classes = (next(iter(layers.values())).in_features,), list(layers.values())[-1].out_features
    plain = " ".join(word for word in config.options.split() if not word.startswith("implicit="))
    twin = build_network(replace(config, options=plain), shape, classes).double()
    with torch.no_grad():
        for name, layer in weighted(twin).items():
            fb, W = layer.feedback, layers[name].weight.double().cpu()
            fb.R.copy_(fb.B.T @ W + layers[name].feedback.c.double().cpu() * (fb.R - fb.B.T @ layer.weight))
            layer.weight.copy_(W)
    return twin


def probe(config: Probe) -> pd.DataFrame:
    """Train briefly, then ask the rule's code what it reads (:mod:`fa.probes`); rows at the last epoch only."""
    begin = time.monotonic()
    shared = ("experiment", "rule", "seed", "options", "dataset", "hidden", "epochs", "lr", "revision")
    run = Run(Config(**{name: getattr(config, name) for name in shared}, lr_drops=""))
    train_runs([run])
    net, split = run.net, data.load(config.dataset, "cpu").train
    rows = [[config.epochs, *row] for row in probed(net, *split.first(64), config.seed)]
    table = pd.DataFrame(rows, columns=["epoch", "layer", "depth", "metric", "value"]).astype({"depth": "Int64"})
    table.attrs["status"] = {"state": "finished", "seconds": round(time.monotonic() - begin, 1)}
    return table


def probed(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[tuple[str, int | None, str, float]]:
    """(layer, depth, metric, value) of every intervention on a network, at one batch and the true errors of its
    cross-entropy.

    ``send_*`` and ``learn_*`` are those of :func:`fa.probes.reads`, ``B_reciprocal``, ... those of
    :func:`fa.probes.reciprocal` (``W_`` where the feedback is made of W), ``noise_passes`` that of
    :func:`fa.probes.noise_passes`.
    """
    layers, kept, handles = weighted(net), {}, []
    for name, layer in layers.items():

        def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
            kept[name] = args[0].detach(), out  # fmt: skip

        handles.append(layer.register_forward_hook(keep))
    try:
        with torch.enable_grad():
            out = net(x)
            errors = torch.autograd.grad(F.cross_entropy(out, y), [out, *(o for _, o in kept.values())])
    finally:
        for handle in handles:
            handle.remove()
    e, delta = errors[0], dict(zip(kept, errors[1:]))
    found = []
    for depth, (name, layer) in enumerate(layers.items(), 1):
        error = e if hasattr(getattr(layer, "feedback", None), "tape") else delta[name]
        values = reads(layer, kept[name][0], error, generator(seed, name, "scramble"))
        found += [(name, depth, metric, value) for metric, value in values.items()]
    depths = {name: depth for depth, name in enumerate(layers, 1)}
    joined = reciprocal(net, generator(seed, "reciprocal"))
    found += [(layer, depths[layer], f"{matrix}_reciprocal", value) for (layer, matrix), value in joined.items()]
    return [*found, ("", None, "noise_passes", noise_passes(net, x, e))]


# --------------------------------------------------------------------------------------------------------------- table

PROPERTIES = {
    "no_sign_transport": (
        "No need to transport weight sign",
        "change of the error sent down · of the\nfeedback's lesson, under random signs",
    ),
    "no_magnitude_transport": ("No need to transport weight magnitude", "the same, under permuted magnitudes"),
    "no_separate_phase": ("No separate feedback-learning phase", "passes that noise drives, not the data"),
    "no_explicit_symmetry": (
        "No explicit symmetry after training",
        "synapses that join a forward pair of\nneurons · highest correlation with W",
    ),
    "accurate_path": (
        "Accurate approximation to BP",
        "widest angle between path and W · be-\ntween the gradient and backprop's",
    ),
    "bp_level": ("BP-level task performance", "test accuracy minus BP's (points) · sd\nover seeds, which are paired"),
}
"""Rows of the table, named as in data/reference/p3_table1.csv: the paper's property, and the number that we put
behind it."""

LIMITS = {"change": 0.05, "correlation": 0.05, "excess": 0.05, "angle": 30.0, "gap": -0.1}
"""What counts as a tick, fixed before the runs, and the same in data/claims.csv: a relative change below ``change``;
no reciprocal synapses correlated with W by ``correlation`` and no matrix that matches forward neurons by ``excess``
more than mixtures of them do; every layer's angle below ``angle`` degrees; an accuracy of at least BP's plus ``gap``
points."""


def cells(table: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Table 1, a row a cell.

    Args:
        table: the record; may lack rules that the paper's table has, or be empty.
        reference: the paper's ticks (1 tick, 0 cross, 0.5 a footnote's letter); may be empty.

    Returns:
        ``property``, ``rule``, ``ours`` (one or two numbers as text, "" where nothing is measured), ``met`` (1, 0,
        nan), ``paper`` (1, 0.5, 0, nan), ``note`` (the footnote's letter), ``verdict`` ("agrees", "disagrees", "not
        comparable") and ``evidence`` (the metrics of the record).
    """
    rows = []
    for rule in dict.fromkeys([*table.rule, *reference.rule[reference.rule.isin(RULES)]]):
        last = _last(table, rule)
        for prop, (ours, met, evidence) in _measured(last, table, rule).items():
            theirs = reference[(reference.metric == prop) & (reference.rule == rule)]
            paper = theirs.value.iloc[0] if len(theirs) else math.nan
            note = theirs.source.iloc[0].partition("note ")[2][:1] if paper == 0.5 else ""
            comparable = paper in (0, 1) and not math.isnan(met)
            verdict = ("agrees" if paper == met else "disagrees") if comparable else "not comparable"
            rows.append([prop, rule, ours, met, paper, note, verdict, evidence])
    return pd.DataFrame(rows, columns=["property", "rule", "ours", "met", "paper", "note", "verdict", "evidence"])


def _last(table: pd.DataFrame, rule: str) -> pd.DataFrame:
    """A rule's rows at the last epoch of every metric, means over seeds: columns layer, metric, value."""
    rows = table[table.rule == rule]
    rows = rows[rows.epoch == rows.groupby("metric").epoch.transform("max")]
    return rows.groupby(["layer", "metric"], as_index=False).value.mean()


def _measured(last: pd.DataFrame, table: pd.DataFrame, rule: str) -> dict[str, tuple[str, float, str]]:
    """Property -> (numbers as text, met, evidence) of one rule."""
    found: dict[str, tuple[str, float, str]] = {}

    def extreme(metric: str, how: str = "max") -> float:
        return last[last.metric == metric].value.agg(how)

    def show(*values: float, form: str = "{:.2f}") -> str:
        return " · ".join(form.format(v + 0.0) for v in values if not math.isnan(v))

    for what, prop in (("sign", "no_sign_transport"), ("magnitude", "no_magnitude_transport")):
        values = [extreme(f"{verb}_{what}") for verb in ("send", "learn")]
        known = [v for v in values if not math.isnan(v)]
        met = float(max(known) < LIMITS["change"]) if known else math.nan
        found[prop] = show(*values), met, f"send_{what}, learn_{what} (probes); claims {what}_*"
    noise = extreme("noise_passes")
    met = math.nan if math.isnan(noise) else float(noise == 0)
    found["no_separate_phase"] = show(noise, form="{:.0%}"), met, "noise_passes (probes); claims phase_*"
    found["no_explicit_symmetry"] = _symmetry(last, rule, show)

    path, grad, error = (extreme(m) for m in ("angle_deg", "grad_angle_global_deg", "delta_angle_global_deg"))
    told = "angle_deg, grad_angle_global_deg"
    if rule == "bp" and len(last):
        path, grad, told = 0.0, 0.0, "by definition: W carries the error"
    elif math.isnan(path):  # no path to compare: the error itself, against backprop's
        path, told = error, "delta_angle_global_deg, grad_angle_global_deg"
    met = math.nan if math.isnan(path) else float(path < LIMITS["angle"])
    found["accurate_path"] = show(path, grad, form="{:.0f}°"), met, f"{told}; claims path*"

    final = table[table.metric == "test_accuracy"]
    final = final[final.epoch == final.epoch.max()].pivot_table(index="seed", columns="rule", values="value")
    gap = (final[rule] - final["bp"]).dropna() if {rule, "bp"} <= set(final) else pd.Series(dtype=float)
    ours, met = "", math.nan
    if len(gap):
        met = float(gap.mean() >= LIMITS["gap"])
        ours = "0" if rule == "bp" else f"{gap.mean():+.2f}" + (f" · {gap.std():.2f}" if len(gap) > 1 else "")
    found["bp_level"] = ours, met, f"test_accuracy, n = {len(gap)}; claims level, below"
    return found


def _symmetry(last: pd.DataFrame, rule: str, show: Callable[..., str]) -> tuple[str, float, str]:
    """Row "no explicit weight symmetry" of one rule."""
    wide = last.pivot(index="layer", columns="metric", values="value")
    joined = {m.removesuffix("_reciprocal"): wide[m] for m in wide if m.endswith("_reciprocal")}
    if not joined:
        return "", math.nan, ""
    same = {}
    for matrix in joined:
        if f"{matrix}_correlation" in wide:
            same[matrix] = wide[f"{matrix}_correlation"]
        elif matrix == "W":
            same[matrix] = joined[matrix].where(joined[matrix].isna(), 1.0)
        elif "angle_deg" in wide and len(joined) == 1:  # of W's shape: the cosine, as means are near 0
            same[matrix] = wide.angle_deg.map(lambda a: math.cos(math.radians(a)))
    met = math.nan
    fraction = pd.concat(joined.values()).mean()
    mirrored = [((joined[m] > 0) & (same[m].abs() >= LIMITS["correlation"])).any() for m in same]
    excess = [wide[m].max() for m in wide if m.endswith("_excess")]
    if mirrored or excess:
        met = float(not any(mirrored) and not any(e > LIMITS["excess"] for e in excess))
    told = "*_correlation, *_excess" if excess else "W itself" if rule == "bp" else "cos angle_deg"
    strongest = max((s.abs().max() for s in same.values()), default=math.nan)
    text = " · ".join(filter(None, [f"{fraction:.0%}", show(strongest)]))
    return text, met, f"*_reciprocal (probes), {told}; claims symmetry_*"


def listing(cells: pd.DataFrame) -> str:
    """Text table of :func:`cells`: our numbers, our tick / the paper's (y, n, a footnote's letter); "*" where the two
    disagree."""
    from fa.plot import in_order, look

    mark = {1.0: "y", 0.0: "n"}
    text = [f"{c.ours or '-'} {mark.get(c.met, '-')}/{c.note or mark.get(c.paper, '-')}" for c in cells.itertuples()]
    text = [t + "*" * (verdict == "disagrees") for t, verdict in zip(text, cells.verdict)]
    wide = cells.assign(text=text).pivot(index="rule", columns="property", values="text")
    wide = wide.loc[in_order(wide.index), list(PROPERTIES)]
    return wide.set_axis([look(r).label for r in wide.index]).rename_axis(index=None, columns=None).to_string()


def evidence(cells: pd.DataFrame) -> str:
    """Text table: the metrics of the record, and the claims, behind the cells of each property."""
    from fa.plot import in_order, look

    def named(rules: pd.Series) -> str:
        return " ".join(look(r).label for r in in_order(rules))

    if not cells.ours.any():
        return "no run yet"
    rows = cells[cells.ours != ""].groupby(["property", "evidence"], sort=False).rule.agg(named).reset_index()
    rows = rows.sort_values("property", key=lambda c: c.map(list(PROPERTIES).index), kind="stable")
    return rows.to_string(index=False)


def mirrors(table: pd.DataFrame) -> str:
    """Text table of the symmetry of every feedback matrix that a trained network's record holds, means over seeds
    after training."""
    from fa.plot import in_order, look

    names = ("correlation", "match", "mixed", "chance")
    rows = table[table.metric.str.fullmatch(f"[BRK]_({'|'.join(names)})")]
    if rows.empty:
        return "no run yet"
    rows = rows[rows.epoch == rows.groupby("run").epoch.transform("max")]
    rows = rows.assign(matrix=rows.metric.str[0], metric=rows.metric.str[2:])
    wide = rows.pivot_table(index=["rule", "depth", "layer", "matrix"], columns="metric", values="value")
    order = in_order(rows.rule)
    wide = wide.reindex(columns=names).reset_index().sort_values(
        ["rule", "depth", "matrix"], key=lambda c: c.map(order.index) if c.name == "rule" else c)  # fmt: skip
    wide["rule"] = [look(r).label for r in wide.rule]
    return wide.drop(columns="depth").to_string(index=False, float_format="{:.2f}".format, na_rep="-")


def draw(cells: pd.DataFrame) -> Any:
    """The table as a figure: in each cell our numbers, and at their right the paper's tick; shaded by whether the two
    agree."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    from fa.plot import WIDTH, in_order, look

    rules = in_order(cells.rule)
    label, row, head, foot = 2.1, 0.46, 0.4, 0.24  # inches
    page, height = WIDTH["double"], head + row * len(PROPERTIES) + foot
    width = (page - label) / len(rules)
    shade = {"agrees": "#D4E6F1", "disagrees": "#F8D3BE", "not comparable": "#F0F0F0"}
    frame = {"agrees": "none", "disagrees": "#B5460F", "not comparable": "none"}
    fig = plt.figure(figsize=(page, height))
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, page), ylim=(height, 0))
    ax.axis("off")
    middle = {"ha": "center", "va": "center"}
    for i, rule in enumerate(rules):
        name, color, _ = look(rule)
        ax.text(label + (i + 0.5) * width, head - 0.11, name, color=color, fontweight="bold", fontsize=8, **middle)
    for j, (prop, (title, number)) in enumerate(PROPERTIES.items()):
        top = head + j * row
        ax.axhline(top, color="0.6", lw=0.5)
        ax.text(0.03, top + 0.05, title, fontsize=6.6, fontweight="bold", va="top")
        ax.text(0.03, top + 0.18, number, fontsize=6.5, color="0.3", va="top", linespacing=1.1)
        for i, rule in enumerate(rules):
            (cell,) = cells[(cells.property == prop) & (cells.rule == rule)].itertuples()
            x, y = label + i * width, top + row / 2
            box = {"facecolor": shade[cell.verdict], "edgecolor": frame[cell.verdict], "lw": 0.8}
            ax.add_patch(Rectangle((x + 0.015, top + 0.02), width - 0.03, row - 0.04, **box))
            lines = (cell.ours or "–").replace("-", "−").split(" · ")
            if prop == "bp_level" and len(lines) > 1:
                lines[1] = f"± {lines[1]}"
            ax.text(x + 0.05, y, "\n".join(lines), fontsize=6.8, va="center", linespacing=1.15)
            tick = {1.0: "✓", 0.0: "✗"}.get(cell.paper, cell.note or "–")
            slope = "italic" if cell.note else "normal"
            ax.text(x + width - 0.05, y, tick, fontsize=8, color="0.25", ha="right", va="center", fontstyle=slope)
    ax.axhline(head + row * len(PROPERTIES), color="0.6", lw=0.5)
    told = {"agrees": "our number agrees with the paper's tick", "disagrees": "it disagrees",
            "not comparable": "not comparable: no tick, a footnote (a, b, c), or no number"}  # fmt: skip
    handles = [Patch(facecolor=shade[v], edgecolor=frame[v], label=text) for v, text in told.items()]
    ax.legend(handles=handles, loc="lower center", ncols=3, fontsize=6.5, borderaxespad=0.15, handlelength=1.4)
    return fig


EXPERIMENT = Experiment("p3_table1", "What each rule needs and reaches", "p3", "30_pfa_table1", RULES, grid, run=probe, extra=mirrored)  # fmt: skip
