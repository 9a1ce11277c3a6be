"""Where runs end, those too that diverged: the accuracies of a sweep, and their cells in a table."""

from __future__ import annotations

import pandas as pd

CHANCE = 10.0
"""Percent of ten classes: the accuracy of a run that diverged."""


def ends(table: pd.DataFrame, metric: str = "test_accuracy", chance: float = CHANCE) -> pd.DataFrame:
    """An accuracy after the last epoch, a row a run; of a run that diverged it is ``chance``, and ``diverged`` is
    true.

    Args:
        table: runs of equally many epochs.
        metric: the accuracy (default: of the test images).
        chance: percent (default: of ten classes).
    """
    rows = table[table.metric == metric].sort_values("epoch").groupby("run", sort=False).tail(1)
    bad = rows.epoch < table.epoch.max()
    return rows.assign(value=rows.value.mask(bad, chance), diverged=bad)


def minus_bp(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One number a run, minus backprop's of the same ``keys``; a run without such a partner has none."""
    bp = rows.loc[rows.rule == "bp", [*keys, "value"]].rename(columns={"value": "bp"})
    theirs = rows[keys].merge(bp, how="left", on=keys, validate="m:1").bp.to_numpy()
    return rows.assign(value=rows.value - theirs)


def told(of: pd.DataFrame) -> str:
    """Mean ± sd of some seeds, and how many of them diverged."""
    sd = "" if len(of) < 2 else f" ± {of.value.std():.1f}"
    return f"{of.value.mean():.1f}{sd}" + (f" ({of.diverged.sum()} diverged)" if of.diverged.any() else "")
