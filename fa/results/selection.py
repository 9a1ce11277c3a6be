"""Numbers of a record: rows selected by their axes, one number a seed, and the statistics of the seeds.

**Axes** are the columns of a table. A column of text takes words (``"layer1.*"``: all that match), any other numbers:
whole ones agree exactly, others to half a percent, as published ones are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd

STATISTICS = {"mean": "mean", "sd": "mean", "min": "min", "max": "max", "best": "max"}
NOT_AXES = {"run", "depth", "metric", "value", "paper", "figure", "sd", "n", "source"}  # all other columns are axes


class Malformed(Exception):
    """What is wrong with an expression."""


class Untested(Exception):
    """Why a claim cannot be tested."""


class Diverged(Exception):
    """Which run diverged."""


@dataclass(frozen=True)
class Value:
    """A number with the sd (ddof 1) and count of the seeds behind it; the defaults are those of a constant."""

    mean: float
    sd: float = 0.0
    n: float = math.inf

    def __add__(self, other: Value) -> Value:
        return Value(self.mean + other.mean, math.hypot(self.sd, other.sd), min(self.n, other.n))

    def __neg__(self) -> Value:
        return Value(-self.mean, self.sd, self.n)

    def __sub__(self, other: Value) -> Value:
        return self + -other

    def __mul__(self, other: Value) -> Value:
        # a constant has no sd, even times inf
        a, b = self.sd and self.sd * other.mean, other.sd and other.sd * self.mean
        return Value(self.mean * other.mean, math.hypot(a, b), min(self.n, other.n))

    def __truediv__(self, other: Value) -> Value:
        if other.mean == 0:
            raise Untested("division by zero")
        return self * Value(1 / other.mean, other.sd / other.mean**2, other.n)

    def sqrt(self) -> Value:
        """Square root; sd / (2 sqrt)."""
        if self.mean < 0:
            raise Untested(f"square root of {show(self.mean)}")
        root = math.sqrt(self.mean)
        return Value(root, self.sd and self.sd / (2 * root), self.n)

    def shown(self) -> str:
        """The mean as the tables print it: to the second digit of its sd, but with at most four digits."""
        if not self.n:  # no seed is behind it: one diverged
            return DIVERGED
        if not (0 < self.sd < math.inf and self.mean):
            return show(self.mean)
        size, spread = (math.floor(math.log10(abs(x))) for x in (self.mean, self.sd))
        return show(self.mean, min(max(size - spread + 2, size + 1, 1), 4))


DIVERGED = "diverged"
"""What the tables print in place of a mean."""


def show(x: float, digits: int = 4) -> str:
    """A number as the tables print it."""
    return f"{x:.{digits}g}"


def _words(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column)


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Blank words as "", values as numbers (what is not one becomes nan: published as unknown)."""
    words = {c: frame[c].astype(object).where(frame[c].notna(), "") for c in frame if _words(frame[c])}
    return frame.assign(**words | {"value": pd.to_numeric(frame.value, errors="coerce")})


def _matches(word: object, patterns: list) -> bool:
    return any(fnmatchcase(str(word), str(p)) for p in patterns)


class _Axis:
    """A column as its distinct values, and for each row the number of its value."""

    def __init__(self, column: pd.Series) -> None:
        self.words = _words(column)
        self.codes, values = pd.factorize(column, use_na_sentinel=False)
        self.values = np.asarray(values, object if self.words else float)
        self.known = ~pd.isna(self.values)

    def present(self, rows: Any = slice(None)) -> np.ndarray:
        """Which of the distinct values the rows have."""
        return np.bincount(self.codes[rows], minlength=len(self.values)) > 0

    def where(self, wanted: list, rows: Any = slice(None)) -> np.ndarray:
        """Which of the rows take a wanted value."""
        if self.words:
            hit = np.array([_matches(v, wanted) for v in self.values], bool)
        else:
            whole = (self.values[self.present(rows) & self.known] % 1 == 0).all()
            near = np.isclose(self.values[:, None], np.array(wanted, float), rtol=0 if whole else 5e-3)
            hit = near.any(axis=1)
        return hit[self.codes[rows]]


class _Rows:
    """The tidy rows of one metric, by their axes."""

    def __init__(self, table: pd.DataFrame, metric: str) -> None:
        self.frame, self.metric = _tidy(table[table.metric == metric]), metric
        self.axes: dict[str, _Axis] = {}

    def axis(self, name: str) -> _Axis:
        """A column, looked at once."""
        if name not in self.axes:
            self.axes[name] = _Axis(self.frame[name])
        return self.axes[name]

    def select(self, chosen: dict, last: Callable[[pd.DataFrame], float], what: str) -> np.ndarray:
        """Numbers of the rows at the chosen axes. Raises where an axis with several values is not chosen."""
        frame, rows = self.frame, np.arange(len(self.frame))
        if frame.empty:
            raise Untested(f"{what} has no {self.metric}")
        for name, wanted in sorted(chosen.items(), key=lambda item: item[0] == "epoch"):  # ``last`` depends on the runs
            if wanted == ["all"]:
                continue
            if wanted == ["last"] and name == "epoch":
                wanted = [last(frame.iloc[rows])]
            if name in frame and any(isinstance(w, str) != self.axis(name).words for w in wanted):
                kind = "words or all" if self.axis(name).words else "numbers, all" + " or last" * (name == "epoch")
                raise Malformed(f"{name} takes {kind}, not {wanted[0]}")
            if missing := [w for w in wanted if name not in frame or not self.axis(name).where([w], rows).any()]:
                where = ", ".join(f"{a}={v[0]}" for a, v in chosen.items() if len(v) == 1 and a != name)
                raise Untested(f"{what} has no {self.metric} at {name}={missing[0]}" + f" ({where})" * bool(where))
            rows = rows[self.axis(name).where(wanted, rows)]
        for name in frame:
            axis = None if name in NOT_AXES or name in chosen or name == "seed" else self.axis(name)
            if axis and (axis.present(rows) & axis.known).sum() > 1:
                raise Malformed(f"{self.metric} has several values of {name}; name one, a list, or all")
        return rows


def _mismatch(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``mismatch``, norm of W - B_eff: weight_norm sqrt(1 + r^2 - 2 r cos a); r = norm_ratio, a = angle_deg."""
    names = ["weight_norm", "norm_ratio", "angle_deg"]
    rows = _tidy(table[table.metric.isin(names)])
    keys = [c for c in rows if c not in ("metric", "value")]
    wide = rows.set_index([*keys, "metric"]).value.unstack("metric").reindex(columns=names).dropna().reset_index()
    r, cosine = wide.norm_ratio, np.cos(np.deg2rad(wide.angle_deg))
    square = (1 + r**2 - 2 * r * cosine).clip(lower=0)
    return wide[keys].assign(metric="mismatch", value=wide.weight_norm * np.sqrt(square))


@dataclass(frozen=True)
class Record:
    """A table and what is published and known about it.

    Args:
        table: the record, long form; None where there is none.
        reference: the published values; None only checks the form of an expression: every statistic is then 1.
        sidecar: configs and statuses of the record's runs; by default all are finished.
        planned: of a partial record every planned run: its axes, and in ``there`` whether the record has it.
        kept: what was read from the table before, for all claims that are judged by this record.
    """

    table: pd.DataFrame | None = None
    reference: pd.DataFrame | None = None
    sidecar: dict = field(default_factory=dict)
    planned: pd.DataFrame | None = None
    kept: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, what: str, of: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made the first time."""
        if (what, of) not in self.kept:
            self.kept[what, of] = make()
        return self.kept[what, of]

    def statistic(self, name: str, metric: str, axes: dict[str, list], minus: dict[str, list]) -> Value:
        """A statistic of one metric at some axes; of ``paired`` ``minus`` has the axes that differ on the other
        side."""
        known = {c for frame in (self.table, self.reference) if frame is not None for c in frame} - NOT_AXES
        if unknown := [a for a in axes | minus if known and a not in known or a.startswith("minus")]:
            raise Malformed(f"unknown axis {unknown[0]}; known: {', '.join(sorted(known))}")
        if every := [a for a, v in axes.items() if "every" in v]:
            raise Malformed(f"{every[0]}=every is for each(), falls() and rises(); a statistic takes all")
        if (name == "paired") != bool(minus) or any(len(v) != 1 for v in minus.values()):
            raise Malformed("paired() needs minus=RULE or minus_AXIS=VALUE, of one value each")
        if self.reference is None:
            return Value(1.0, 0.0, math.inf if name == "ref" else 1e9)
        if name == "ref":
            return self.published(metric, axes)
        seeds = self.seeds(metric, axes, STATISTICS.get(name, "mean"))
        if minus:
            seeds = (seeds - self.seeds(metric, axes | minus, "mean")).dropna()
        mean, sd = float(seeds.mean()), float(seeds.std(ddof=1))
        return Value(sd, math.nan, len(seeds)) if name == "sd" else Value(mean, sd, len(seeds))

    def spread(self, axis: str, wanted: list) -> list:
        """The values of an axis one by one: those named; for ``every`` and patterns the recorded ones, in order."""
        if wanted == ["all"]:
            raise Malformed(f"{axis}=all is for statistics; say every")
        if wanted != ["every"] and not any("*" in str(w) for w in wanted):
            return wanted
        if self.reference is None:
            return [1.0, 2.0]
        order = "depth" if axis == "layer" else axis
        record = self.planned if self.planned is not None and axis in self.planned else self.table
        for frame in (record, self.reference):
            if frame is not None and axis in frame:
                rows = frame.sort_values(order, kind="stable") if order in frame else frame
                found = [v for v in rows[axis].dropna().unique().tolist() if v != ""]
                if found := [v for v in found if wanted == ["every"] or _matches(v, wanted)]:
                    return found
        raise Untested(f"no values of {axis} are known")

    def seeds(self, metric: str, axes: dict[str, list], how: str) -> pd.Series:
        """One number per seed. A seed with fewer rows than the fullest is left out; one lost to divergence raises."""
        self.complete(axes)
        configs = self.sidecar.get("configs", {})

        def last(frame: pd.DataFrame) -> float:
            planned = [configs[run]["epochs"] for run in frame.run.unique() if "epochs" in configs.get(run, {})]
            return max(planned, default=frame.epoch.max())

        try:
            of = self.once("rows", metric, lambda: self.rows(metric))
            rows = of.select(axes, last, "the record")
        except Untested:
            self.survived(axes, pd.Index([]))
            raise
        value, seed = of.frame.value.to_numpy()[rows], of.frame.seed.to_numpy()[rows]
        value, seed = value[np.isfinite(value)], seed[np.isfinite(value)]
        _, which, count = np.unique(seed, return_inverse=True, return_counts=True)
        full = count[which] == count.max(initial=0)
        seeds = pd.Series(value[full]).groupby(seed[full]).agg(how)
        self.survived(axes, seeds.index)
        return seeds

    def rows(self, metric: str) -> _Rows:
        """The rows of one metric."""
        return _Rows(_mismatch(self.table) if metric == "mismatch" else self.table, metric)

    def survived(self, axes: dict[str, list], have: pd.Index) -> None:
        """Raises where a run at these axes diverged and its seed is not among those at hand."""
        for run in (r for r, status in self.sidecar.get("status", {}).items() if status["state"] == "diverged"):
            config = self.sidecar.get("configs", {}).get(run, {})
            if config.get("seed") in have:
                continue
            config = config | self.once("place", run, lambda run=run: self.place(run))
            shared = {a: v for a, v in axes.items() if a in config and a != "epoch" and v != ["all"]}
            asked = all(_Axis(pd.Series([config[a]])).where(v)[0] for a, v in shared.items())
            if asked:
                raise Diverged(f"{config.get('rule', 'run')} diverged with seed {config.get('seed', run)}")

    def place(self, run: str) -> dict[str, object]:
        """The axes that have one value in all rows of a run, as those of a sweep have; not what was measured when."""
        rows = self.table[self.table.run == run] if self.table is not None and "run" in self.table else pd.DataFrame()
        return {a: rows[a].iloc[0] for a in rows if a not in {*NOT_AXES, "epoch", "layer"} and rows[a].nunique() == 1}

    def complete(self, axes: dict[str, list]) -> None:
        """Raises where a partial record lacks a run at these axes: of a whole one the statistic could be another."""
        if self.planned is None:
            return
        asked = {a: v for a, v in axes.items() if a in self.planned and v != ["all"]}
        due = self.planned
        for axis, wanted in asked.items():
            due = due[_Axis(due[axis]).where(wanted)]
        if not due.there.all():
            whole = f"partial record: {self.planned.there.sum()} of {len(self.planned)} runs"
            where = ", ".join(f"{a}={v[0] if len(v) == 1 else v}" for a, v in asked.items())
            raise Untested(f"{whole} ({due.there.sum()} of {len(due)} at {where})" if where else whole)

    def published(self, metric: str, axes: dict[str, list]) -> Value:
        """The published value; of per-seed rows the mean, unless the mean itself was published."""
        table = self.once("published", metric, lambda: _Rows(self.reference, metric))
        rows = table.frame.iloc[table.select(axes, lambda frame: frame.epoch.max(), "the reference table")]
        rows = rows[rows.seed.isna()] if rows.seed.isna().any() else rows
        if rows.seed.isna().any() and len(rows) > 1 or rows.seed.duplicated().any():
            raise Malformed(f"{metric} is published more than once at these axes")
        if rows.value.isna().any():
            raise Untested(f"the published {metric} is unknown")
        return Value(float(rows.value.mean()))
