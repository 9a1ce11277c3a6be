"""The cells of p3's Table 1 as numbers: what each rule's record says of a property, and whether that earns the tick."""

from __future__ import annotations

import math

import pandas as pd

from fa.rules import RULES

PROPERTIES = {
    "no_sign_transport": "No need to transport weight sign",
    "no_magnitude_transport": "No need to transport weight magnitude",
    "no_separate_phase": "No separate feedback-learning phase",
    "no_explicit_symmetry": "No explicit symmetry after training",
    "accurate_path": "Accurate approximation to BP",
    "bp_level": "BP-level task performance",
}
"""Rows of the table, named as in data/reference/p3_table1.csv: the paper's properties."""

NUMBERS = [
    "change of the error sent down · of the\nfeedback's gradient, under random signs",
    "the same, under permuted magnitudes",
    "passes that noise drives, not the data",
    "synapses that join a forward pair of\nneurons · highest correlation with W",
    "widest angle between path and W · be-\ntween the gradient and backprop's",
    "test accuracy minus BP's (points) · sd\nover seeds, which are paired",
]
"""The number behind each property, in the same order."""

LIMITS = {"change": 0.05, "correlation": 0.05, "excess": 0.05, "angle": 30.0, "gap": -0.1}
"""What counts as a tick, fixed before the runs, as in the claims: a relative change below ``change``; no reciprocal
synapses correlated with W by ``correlation`` and no matrix that matches forward neurons by ``excess`` more than
mixtures of them do; every layer's angle below ``angle`` degrees; an accuracy of at least BP's plus ``gap`` points."""


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
        for prop, (ours, met, evidence) in _measured(table, rule).items():
            theirs = reference[(reference.metric == prop) & (reference.rule == rule)]
            paper = theirs.value.iloc[0] if len(theirs) else math.nan
            note = theirs.source.iloc[0].partition("note ")[2][:1] if paper == 0.5 else ""
            verdict = "agrees" if paper == met else "disagrees"
            verdict = verdict if paper in (0, 1) and not math.isnan(met) else "not comparable"
            rows.append([prop, rule, ours, met, paper, note, verdict, evidence])
    return pd.DataFrame(rows, columns=["property", "rule", "ours", "met", "paper", "note", "verdict", "evidence"])


def _show(*values: float, form: str = "{:.2f}") -> str:
    return " · ".join(form.format(v + 0.0) for v in values if not math.isnan(v))


def _met(tick: bool, *values: float) -> float:
    """1 or 0, and nan where none of the values is measured."""
    return math.nan if all(math.isnan(v) for v in values) else float(tick)


def _measured(table: pd.DataFrame, rule: str) -> dict[str, tuple[str, float, str]]:
    """Property -> (numbers as text, met, evidence) of one rule, from the last epoch of every metric, means over
    seeds."""
    last = table[table.rule == rule]
    last = last[last.epoch == last.groupby("metric").epoch.transform("max")]
    last = last.groupby(["layer", "metric"], as_index=False).value.mean()
    largest, found = last.groupby("metric").value.max(), {}
    for what in ("sign", "magnitude"):
        values = [largest.get(f"{verb}_{what}", math.nan) for verb in ("send", "learn")]
        tick = not any(v >= LIMITS["change"] for v in values)
        evidence = f"send_{what}, learn_{what} (probes); claims {what}_*"
        found[f"no_{what}_transport"] = _show(*values), _met(tick, *values), evidence
    noise = largest.get("noise_passes", math.nan)
    evidence = "noise_passes (probes); claims phase_*"
    found["no_separate_phase"] = _show(noise, form="{:.0%}"), _met(noise == 0, noise), evidence
    found["no_explicit_symmetry"] = _symmetry(last, rule)

    told = "angle_deg, grad_angle_global_deg"
    path, grad = (largest.get(m, math.nan) for m in told.split(", "))
    if rule == "bp" and len(last):
        path, grad, told = 0.0, 0.0, "by definition: W carries the error"
    elif math.isnan(path):  # no path to compare: the error itself, against backprop's
        told = "delta_angle_global_deg, grad_angle_global_deg"
        path = largest.get("delta_angle_global_deg", math.nan)
    numbers = _show(path, grad, form="{:.0f}°")
    found["accurate_path"] = numbers, _met(path < LIMITS["angle"], path), f"{told}; claims path*"

    final = table[table.metric == "test_accuracy"]
    final = final[final.epoch == final.epoch.max()].pivot_table(index="seed", columns="rule", values="value")
    gap = (final[rule] - final["bp"]).dropna() if {rule, "bp"} <= set(final) else pd.Series(dtype=float)
    ours = f"{gap.mean():+.2f}" + (f" · {gap.std():.2f}" if len(gap) > 1 else "") if len(gap) else ""
    met = _met(gap.mean() >= LIMITS["gap"], gap.mean())
    found["bp_level"] = (
        ours if rule != "bp" else ours and "0",
        met,
        f"test_accuracy, n = {len(gap)}; claims level, below",
    )
    return found


def _symmetry(last: pd.DataFrame, rule: str) -> tuple[str, float, str]:
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
    mirrored = [((joined[m] > 0) & (same[m].abs() >= LIMITS["correlation"])).any() for m in same]
    excess = [wide[m].max() for m in wide if m.endswith("_excess")]
    met = float(not any(mirrored) and not any(e > LIMITS["excess"] for e in excess)) if mirrored or excess else math.nan
    told = "*_correlation, *_excess" if excess else "W itself" if rule == "bp" else "cos angle_deg"
    strongest = max((s.abs().max() for s in same.values()), default=math.nan)
    text = " · ".join(filter(None, [f"{pd.concat(joined.values()).mean():.0%}", _show(strongest)]))
    return text, met, f"*_reciprocal (probes), {told}; claims symmetry_*"
