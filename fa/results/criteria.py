"""The language that claims are written in: an expression over a record, compiled without eval.

Python's own parser reads it, and every node is compiled from the grammar below; nothing is evaluated as code, and
anything else raises ``UserError`` with the claim's id and the position.

.. code-block:: text

    truth     :=  number (< | <= | > | >=) number  |  number in [number, number]
               |  truth and truth  |  each(truth, AXIS=VALUES, ...)
    number    :=  0.1 | inf | target | tolerance | AXIS | -number | number (+ - * /) number | sqrt(number) | STATISTIC
    STATISTIC :=  mean | min | max | best | sd (METRIC, AXIS=VALUES, ...)    from the record
               |  paired(METRIC, minus=RULE, AXIS=VALUES, ...)               rule minus RULE, seed by seed
               |  paired(METRIC, minus_AXIS=VALUE, AXIS=VALUES, ...)         the same for another axis: precision, epoch, ...
               |  ref(METRIC, AXIS=VALUES, ...)                              from the published values
    AXIS      :=  rule | layer | precision | epoch | seed | expansion | density | decay
    VALUES    :=  word | number | "text" | [several of these] | all | last (of epoch)

**Statistics.** First every seed gives one number: the mean, smallest or largest of the rows selected (mostly one row);
``best`` is ``max`` over all epochs. The statistic is the mean of these over seeds, with their sd (ddof 1) and n;
``sd(...)`` is that sd, and has none of its own. An axis with several values must be named (``layer=all`` averages the
layers); a seed that lacks a row is left out. ``last`` is the last planned epoch. The metric ``mismatch`` is made here:
the norm of W - B_eff, from weight_norm, norm_ratio and angle_deg. In sums, products and quotients the sds add in
quadrature, as if independent: say ``paired`` where seeds are shared.

**Each.** ``each(truth, layer=[fc1, fc2])`` asks once for every value; within, every statistic has that axis set, and an
axis of numbers is a name for its number. ``all`` means the published values or, if there are none, the recorded ones.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from fa.errors import UserError

VERDICTS = ("holds", "partly", "fails", "not tested")
SWEPT = ("expansion", "density", "decay")
WORDS = ("rule", "layer", "precision")  # axes whose values are words
AXES = (*WORDS, "epoch", "seed", *SWEPT)
MINUS = ("minus", *(f"minus_{axis}" for axis in AXES if axis not in ("rule", "seed")))
STATISTICS = {"mean": "mean", "sd": "mean", "min": "min", "max": "max", "best": "max"}
EDGE = 1e-9  # a value on the bound counts as inside, whatever the last bits of the bound's own sum


class Untested(Exception):
    """Why a claim cannot be tested."""


class Diverged(Exception):
    """Which run diverged."""


class Ambiguous(Exception):
    """Which axis a selection leaves open."""


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
        sd = math.hypot(
            self.sd * other.mean if self.sd else 0.0,  # a constant has none, even times inf
            other.sd * self.mean if other.sd else 0.0,
        )
        return Value(self.mean * other.mean, sd, min(self.n, other.n))

    def __truediv__(self, other: Value) -> Value:
        if other.mean == 0:
            raise Untested("division by zero")
        return self * Value(1 / other.mean, other.sd / other.mean**2, other.n)

    def sqrt(self) -> Value:
        """Square root; sd / (2 sqrt)."""
        if self.mean < 0:
            raise Untested(f"square root of {show(self.mean)}")
        root = math.sqrt(self.mean)
        return Value(root, self.sd / (2 * root) if self.sd else 0.0, self.n)


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: for which value of ``each``, what was measured, and the verdict."""

    label: str
    value: Value
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Scope:
    """What a criterion is evaluated over: our table, the published one, the sidecar, and the axes set by ``each``.

    ``due``: of a partial record every planned run, a row each with its axes, and in ``there`` whether the record has it.
    """

    table: pd.DataFrame
    reference: pd.DataFrame
    sidecar: dict
    n_min: int = 1
    bound: tuple[tuple[str, object], ...] = ()
    due: pd.DataFrame | None = None


Truth = Callable[[Scope], "tuple[str, list[Part]]"]
Number = Callable[[Scope], Value]


def show(x: float, digits: int = 4) -> str:
    """A number as the tables print it."""
    return f"{x:.{digits}g}"


def finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------- selecting rows


def _where(column: pd.Series, axis: str, wanted: list) -> np.ndarray:
    """Rows whose axis takes a wanted value; swept values agree to half a percent, as published ones are rounded."""
    if axis in WORDS:
        return column.isin(wanted).to_numpy()
    rtol = 5e-3 if axis in SWEPT else 0.0
    return np.isclose(column.to_numpy(float)[:, None], np.array(wanted, float)[None, :], rtol=rtol).any(axis=1)


def _select(
    frame: pd.DataFrame, metric: str, chosen: dict[str, list], last: Callable[[pd.DataFrame], float], what: str
) -> pd.DataFrame:
    """Rows of one metric at the chosen axes. Raises where one with several values is not chosen."""
    frame = frame[frame.metric == metric]
    if frame.empty:
        raise Untested(f"{what} has no {metric}")
    for axis in sorted(AXES, key="epoch".__eq__):  # epoch comes last: which one is ``last`` depends on the runs
        wanted = chosen.get(axis)
        if wanted is None and axis != "seed" and axis in frame and frame[axis].nunique() > 1:
            raise Ambiguous(f"{metric} has several values of {axis}; name one, a list, or all")
        if wanted is None or wanted == ["all"]:
            continue
        if wanted == ["last"]:
            wanted = [last(frame)]
        if missing := [w for w in wanted if axis not in frame or not _where(frame[axis], axis, [w]).any()]:
            where = ", ".join(f"{a}={v[0]}" for a, v in chosen.items() if len(v) == 1 and a not in (*MINUS, axis))
            raise Untested(f"{what} has no {metric} at {axis}={missing[0]}" + f" ({where})" * bool(where))
        frame = frame[_where(frame[axis], axis, wanted)]
    return frame


def _mismatch(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``mismatch``, norm of W - B_eff: weight_norm sqrt(1 + r^2 - 2 r cos a); r = norm_ratio, a = angle_deg."""
    names = ["weight_norm", "norm_ratio", "angle_deg"]
    rows = table[table.metric.isin(names)]
    keys = [c for c in rows if c not in ("metric", "value")]
    wide = rows.set_index([*keys, "metric"]).value.unstack("metric").reindex(columns=names).dropna().reset_index()
    r, cosine = wide.norm_ratio, np.cos(np.deg2rad(wide.angle_deg))
    square = (1 + r**2 - 2 * r * cosine).clip(lower=0)
    return wide[keys].assign(metric="mismatch", value=wide.weight_norm * np.sqrt(square))


def _per_seed(scope: Scope, metric: str, chosen: dict[str, list], how: str) -> pd.Series:
    """One number per seed. A seed with fewer rows than the fullest is left out; one lost to divergence raises."""
    _complete(scope, chosen)
    table = _mismatch(scope.table) if metric == "mismatch" else scope.table
    configs = scope.sidecar.get("configs", {})

    def last(frame: pd.DataFrame) -> float:
        planned = [configs[run]["epochs"] for run in frame.run.unique() if "epochs" in configs.get(run, {})]
        return max(planned, default=frame.epoch.max())

    def diverged(have: pd.Index) -> None:
        for run, status in scope.sidecar.get("status", {}).items():
            if status["state"] != "diverged":
                continue
            config = configs.get(run, {})
            asked = all(
                _where(pd.Series([config[a]]), a, v)[0]
                for a, v in chosen.items()
                if a in config and a != "epoch" and v != ["all"]
            )
            if asked and config.get("seed") not in have:
                raise Diverged(f"{config.get('rule', 'run')} diverged with seed {config.get('seed', run)}")

    try:
        rows = _select(table, metric, chosen, last, "the record")
    except Untested:
        diverged(pd.Index([]))
        raise
    rows = rows[np.isfinite(rows.value)]
    counts = rows.groupby("seed").size()
    rows = rows[rows.seed.isin(counts.index[counts == counts.max()])]
    seeds = rows.groupby("seed").value.agg(how)
    diverged(seeds.index)
    return seeds


def _complete(scope: Scope, chosen: dict[str, list]) -> None:
    """Raises where a partial record lacks a run at the chosen axes: of a whole one the statistic could be another."""
    if scope.due is None:
        return
    asked = {a: v for a, v in chosen.items() if a in scope.due and v != ["all"]}
    due = scope.due
    for axis, wanted in asked.items():
        due = due[_where(due[axis], axis, wanted)]
    if not due.there.all():
        whole = f"partial record: {scope.due.there.sum()} of {len(scope.due)} runs"
        where = ", ".join(f"{a}={v[0] if len(v) == 1 else v}" for a, v in asked.items())
        raise Untested(f"{whole} ({due.there.sum()} of {len(due)} at {where})" if where else whole)


def _published(scope: Scope, metric: str, chosen: dict[str, list]) -> Value:
    """The published value; of per-seed rows the mean, unless the mean itself was published."""
    rows = _select(scope.reference, metric, chosen, lambda frame: frame.epoch.max(), "the reference table")
    rows = rows[rows.seed.isna()] if rows.seed.isna().any() else rows
    if rows.seed.isna().any() and len(rows) > 1 or rows.seed.duplicated().any():
        raise Ambiguous(f"{metric} is published more than once at these axes")
    if rows.value.isna().any():
        raise Untested(f"the published {metric} is unknown")
    return Value(float(rows.value.mean()))


def _statistic(seeds: pd.Series) -> Value:
    return Value(float(seeds.mean()), float(seeds.std(ddof=1)), len(seeds))


# --------------------------------------------------------------------------------------------------------- compiling


class Compiler:
    """Turns one expression of a claim into closures over a ``Scope``; refuses every node that the grammar lacks."""

    OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def __init__(self, claim: str, column: str, names: dict[str, Number] | None = None, measures: bool = True) -> None:
        self.claim, self.column, self.names, self.measures = claim, column, names or {}, measures
        self.each: list[Callable] = []  # bindings of the each() in this expression
        self.measured = False  # whether the number just compiled takes something from the record

    def fail(self, node: ast.AST | None, message: str, at: int = 0) -> UserError:
        where = node.col_offset + 1 if node is not None else at
        return UserError(f"claim {self.claim}, {self.column}, position {where}: {message}")

    def parse(self, text: str) -> ast.expr:
        try:
            return ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise self.fail(None, f"cannot be read ({error.msg})", error.offset or 1) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise self.fail(None, f"cannot be read ({error})", 1) from None

    def truth(self, node: ast.expr, axes: tuple[str, ...] = ()) -> Truth:
        match node:
            case ast.BoolOp(op=ast.And(), values=nodes):
                sides = [self.truth(n, axes) for n in nodes]

                def both(scope: Scope) -> tuple[str, list[Part]]:
                    results = [side(scope) for side in sides]
                    return max((v for v, _ in results), key=VERDICTS.index), [p for _, parts in results for p in parts]

                return both
            case ast.Call(func=ast.Name(id="each"), args=[inner], keywords=[_, *_] as keywords):
                if axes:
                    raise self.fail(node, "each() within each(); name both axes in one")
                values = {k.arg: self.values(k, "each") for k in keywords}
                test = self.truth(inner, tuple(values))

                def bindings(scope: Scope) -> list[tuple[tuple[str, object], ...]]:
                    return list(product(*([(a, v) for v in _spread(scope, a, some)] for a, some in values.items())))

                def each(scope: Scope) -> tuple[str, list[Part]]:
                    results = []
                    for bound in bindings(scope):
                        verdict, parts = test(replace(scope, bound=bound))
                        label = " ".join(v if isinstance(v, str) else f"{a}={show(v)}" for a, v in bound)
                        results.append((verdict, [replace(p, label=label) for p in parts]))
                    found = {v for v, _ in results}
                    none_holds = "fails" in found and "holds" not in found
                    verdict = "holds" if found == {"holds"} else "fails" if none_holds else "partly"
                    return verdict, [p for _, parts in results for p in parts]

                self.each.append(bindings)
                return each
            case ast.Compare(left=left, ops=[ast.In()], comparators=[ast.List(elts=[low, high])]):
                return self.compare(left, low, high, False, axes)
            case ast.Compare(left=left, ops=[ast.LtE() | ast.Lt() as op], comparators=[high]):
                return self.compare(left, None, high, isinstance(op, ast.Lt), axes)
            case ast.Compare(left=left, ops=[ast.GtE() | ast.Gt() as op], comparators=[low]):
                return self.compare(left, low, None, isinstance(op, ast.Gt), axes)
        raise self.fail(node, "expected a comparison (< <= > >=, in [a, b]), 'and', or each(comparison, axis=values)")

    def compare(
        self, left: ast.expr, low: ast.expr | None, high: ast.expr | None, strict: bool, axes: tuple[str, ...]
    ) -> Truth:
        self.measured = False
        value_of = self.number(left, axes)
        if not self.measured:
            raise self.fail(left, "the left side of a comparison takes nothing from the record")
        low_of = self.number(low, axes) if low is not None else lambda scope: Value(-math.inf)
        high_of = self.number(high, axes) if high is not None else lambda scope: Value(math.inf)

        def test(scope: Scope) -> tuple[str, list[Part]]:
            try:
                value, low, high = value_of(scope), low_of(scope), high_of(scope)
            except Diverged as reason:
                return "fails", [Part("", Value(math.nan, math.nan, 0), "fails", str(reason))]
            if (n := min(value.n, low.n, high.n)) < scope.n_min:
                raise Untested(f"{n:.0f} of {scope.n_min} seeds")
            below, above = low - value, value - high
            excess, side, bound = (above, "above", high) if above.mean > below.mean else (below, "below", low)
            if excess.mean < -EDGE if strict else excess.mean <= EDGE:
                return "holds", [Part("", value, "holds")]
            verdict = "partly" if excess.mean < excess.sd else "fails"  # an sd of nan (one seed) is never near
            spread = f" (sd {show(excess.sd, 2)})" if math.isfinite(excess.sd) else ""
            why = f"{show(value.mean)} is {show(excess.mean, 2)} {side} {show(bound.mean)}{spread}"
            return verdict, [Part("", value, verdict, why)]

        return test

    def number(self, node: ast.expr, axes: tuple[str, ...] = ()) -> Number:
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                return lambda scope: Value(float(value))
            case ast.Name(id="inf"):
                return lambda scope: Value(math.inf)
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Name(id=name) if name in axes and name not in WORDS:

                def bound(scope: Scope) -> Value:
                    if name not in (axes := dict(scope.bound)):
                        raise self.fail(node, f"{name} is a number only within each({name}=...)")
                    return Value(float(axes[name]))

                return bound
            case ast.Name(id="target" | "tolerance" as name):
                raise self.fail(node, f"the {name} of this claim is not a number")
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = self.number(operand, axes)
                return lambda scope: -inner(scope)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in self.OPERATORS:
                a, b, do = self.number(left, axes), self.number(right, axes), self.OPERATORS[type(op)]
                return lambda scope: do(a(scope), b(scope))
            case ast.Call(func=ast.Name(id="sqrt"), args=[operand], keywords=[]):
                root = self.number(operand, axes)
                return lambda scope: root(scope).sqrt()
            case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=metric)], keywords=keywords):
                return self.statistic(node, name, metric, keywords)
        raise self.fail(
            node,
            "expected a number, inf, target, tolerance, or a function of a metric: "
            + ", ".join((*STATISTICS, "paired", "ref")),
        )

    def statistic(self, node: ast.expr, name: str, metric: str, keywords: list[ast.keyword]) -> Number:
        if name not in (*STATISTICS, "paired", "ref"):
            raise self.fail(node, f"unknown function {name}; known: {', '.join(STATISTICS)}, paired, ref, sqrt, each")
        if name != "ref" and not self.measures:
            raise self.fail(node, f"a {self.column} is made of published values, not of {name}()")
        chosen = {k.arg: self.values(k, name) for k in keywords}
        other = {k.removeprefix("minus").lstrip("_") or "rule": v for k, v in chosen.items() if k in MINUS}
        if name == "paired" and [len(v) for v in other.values()] != [1]:
            raise self.fail(node, "paired() needs minus=RULE, or one minus_AXIS=VALUE")
        if name == "best":
            chosen.setdefault("epoch", ["all"])
        self.measured = self.measured or name != "ref"

        def compute(scope: Scope) -> Value:
            axes = {a: [v] for a, v in scope.bound} | chosen
            try:
                if name == "ref":
                    return _published(scope, metric, axes)
                seeds = _per_seed(scope, metric, axes, STATISTICS.get(name, "mean"))
                if name == "paired":
                    seeds = (seeds - _per_seed(scope, metric, axes | other, "mean")).dropna()
            except Ambiguous as error:
                raise self.fail(node, str(error)) from None
            value = _statistic(seeds)
            return Value(value.sd, math.nan, value.n) if name == "sd" else value

        return compute

    def values(self, keyword: ast.keyword, function: str) -> list:
        axis, node = keyword.arg, keyword.value
        if axis not in (*AXES, *(MINUS if function == "paired" else [])):
            raise self.fail(keyword, f"unknown axis {axis}; known: {', '.join(AXES)}")
        found = [self.value(n) for n in (node.elts if isinstance(node, ast.List) else [node])]
        words = axis in ("minus", *WORDS) or axis.removeprefix("minus_") in WORDS
        special = {"all"} if axis not in MINUS else set()
        if axis == "epoch" and function != "each":
            special.add("last")
        if not (len(found) == 1 and found[0] in special) and any(isinstance(v, str) != words for v in found):
            kind = "words" if words else "numbers"
            raise self.fail(node, f"{axis} takes {' or '.join([kind, *sorted(special)])}")
        if not found:
            raise self.fail(node, f"{axis} names no value")
        return found

    def value(self, node: ast.expr) -> object:
        match node:
            case ast.Name(id=word):
                return word
            case ast.Constant(value=value) if type(value) in (int, float, str):
                return value
        raise self.fail(node, "expected a word, a number or a text in quotes")


def _spread(scope: Scope, axis: str, wanted: list) -> list:
    """The values of ``each(axis=...)``: those named; for ``all`` the published or else the recorded ones, in order."""
    if wanted != ["all"]:
        return wanted
    order = "depth" if axis == "layer" else axis
    for frame in (scope.reference, scope.table if scope.due is None or axis not in scope.due else scope.due):
        rows = frame.sort_values(order, kind="stable") if order in frame else frame
        if axis in frame and (found := [v for v in rows[axis].dropna().unique().tolist() if v != ""]):
            return found
    raise Untested(f"no values of {axis} are known")
