"""A grid's points side by side: one table of all that they measured, and their last accuracies in print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from fa import plot
from fa.paths import read_csv, write_bytes


def over_grid(points: Iterable[tuple[Mapping[str, Any], Path]], folder: Path, since: float = 0) -> list[Path]:
    """Join the tables that the points of a grid wrote, a file a figure: NAME.csv in ``folder``.

    Args:
        points: (the grid's parameters and their values at a point, the folder of its tables). The parameters become
            the first columns, with ``grid_`` before their names.
        folder: where the joined tables go.
        since: tables last written before this time (seconds of the epoch) are not the grid's, and are left out.

    Returns:
        paths of the joined tables; none where no point wrote a table, as in record mode.
    """
    parts: dict[str, list[pd.DataFrame]] = {}
    for values, tables in points:
        for path in sorted(tables.glob("*.csv")):
            if path.stat().st_mtime >= since:
                axes = {f"grid_{name}": value for name, value in values.items()}
                table = read_csv(path)
                table = pd.concat([pd.DataFrame(axes, index=table.index), table], axis=1)
                parts.setdefault(path.stem.partition("__")[0], []).append(table)
    made = []
    for name, tables in parts.items():
        text = StringIO()
        pd.concat(tables, ignore_index=True).to_csv(text, index=False, lineterminator="\n")
        made.append(write_bytes(folder / f"{name}.csv", text.getvalue().encode()))
    return made


def last_accuracies(table: pd.DataFrame) -> str:
    """Accuracy (%) after the last epoch, mean over seeds: a row a point of the grid, a column a rule and, where a
    figure sweeps something, a row more for each value.

    Args:
        table: as :func:`over_grid` writes it. Of several accuracies the first in the order of ``fa.plot.LABELS``.
    """
    metric = next((m for m in plot.LABELS if "accuracy" in m and m in set(table.metric)), "")
    rows = table[table.metric == metric]
    if rows.empty:
        return ""
    rows = rows[rows.epoch == rows.groupby([*axes(table), "run"]).epoch.transform("max")]
    known = {"run", "rule", "seed", "epoch", "layer", "depth", "metric", "value"}
    places = [c for c in rows if c not in known and rows[c].nunique() > 1]
    wide = rows.groupby([*places, "rule"], dropna=False).value.mean().unstack("rule") if places else None
    if wide is None:
        return ""
    wide = wide[plot.in_order(wide.columns)].rename(columns=lambda r: plot.look(r).label)
    text = wide.rename_axis(columns=None).reset_index().to_string(index=False, float_format="{:.2f}".format, na_rep="-")
    return f"{plot.LABELS[metric]}, last epoch, mean over seeds\n{text}"


def axes(table: pd.DataFrame) -> list[str]:
    """The columns of a joined table that are parameters of the grid."""
    return [c for c in table if c.startswith("grid_")]
