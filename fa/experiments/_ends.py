"""Where runs end, those too that diverged: the accuracies of a sweep, and their cells in a table."""

from __future__ import annotations

import pandas as pd

CHANCE = 10.0
"""Percent of ten classes: the accuracy of a run that diverged."""


def ends(table: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy after the last epoch, a row a run; of a run that diverged :data:`CHANCE`, and ``diverged`` is
    true."""
    rows = table[table.metric == "test_accuracy"].sort_values("epoch").groupby("run", sort=False).tail(1)
    bad = rows.epoch < table.epoch.max()
    return rows.assign(value=rows.value.mask(bad, CHANCE), diverged=bad)


def told(of: pd.DataFrame) -> str:
    """Mean ± sd of some seeds, and how many of them diverged."""
    sd = "" if len(of) < 2 else f" ± {of.value.std():.1f}"
    return f"{of.value.mean():.1f}{sd}" + (f" ({of.diverged.sum()} diverged)" if of.diverged.any() else "")
