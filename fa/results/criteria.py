"""The language of the claims: Python's expressions, of which only the forms below are read. Nothing is run as code.

.. code-block:: text

    truth     :=  number (< | <= | > | >=) number  |  number in [low, high]  |  number in around(middle, distance)
               |  truth and truth
               |  each(truth, AXIS=VALUES, ...)     once for every value of the axes, one by one
               |  at(truth, AXIS=VALUES, ...)       with these axes set in every statistic within
               |  falls | rises (METRIC, over=AXIS, AXIS=VALUES, ...)         from each value of an axis to the next
               |  order(METRIC, [RULE, ...], AXIS=VALUES, ...)                each rule is below the next
               |  same(METRIC, minus_AXIS=VALUE, t=number, AXIS=VALUES, ...)  as two draws of seeds are (two-sample t)
    number    :=  0.1 | inf | target | tolerance | AXIS (a number within each) | -number | number (+ - * /) number
               |  sqrt(number) | hypot(number, number) | STATISTIC
    STATISTIC :=  mean | min | max | best | sd (METRIC, AXIS=VALUES, ...)              from the record
               |  paired(METRIC, minus=RULE or minus_AXIS=VALUE, AXIS=VALUES, ...)      a difference, seed by seed
               |  ref(METRIC, AXIS=VALUES, ...)                                         from the published values
    VALUES    :=  word | number | "text" | [several of these] | all | last (of epoch) | every (of each, falls, rises)

**Axes** are the columns of the tables. A column of text takes words (``"layer1.*"``: all that match), any other numbers:
whole ones agree exactly, others to half a percent, as published ones are rounded.

**Statistics.** First every seed gives one number: the mean, smallest or largest of the rows selected (mostly one row);
``best`` is ``max`` over all epochs. The statistic is the mean of these over seeds, with their sd (ddof 1) and n;
``sd(...)`` is that sd, and has none of its own. An axis with several values must be named (``layer=all`` averages the
layers); a seed that lacks a row is left out. ``last`` is the last planned epoch. The metric ``mismatch`` is made here:
the norm of W - B_eff, from weight_norm, norm_ratio and angle_deg. In sums, products and quotients the sds add in
quadrature, as if independent: say ``paired`` where seeds are shared.

**Steps.** ``falls``, ``rises`` and ``order`` compare means; with ``by=seed`` the differences are paired, with
``margin=number`` every step is larger than it. ``every`` means all the values recorded or, without a record, published.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise, product

import numpy as np
import pandas as pd

VERDICTS = ("holds", "partly", "fails", "not tested")
STATISTICS = {"mean": "mean", "sd": "mean", "min": "min", "max": "max", "best": "max"}
FUNCTIONS = (*STATISTICS, "paired", "ref", "sqrt", "hypot")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
NOT_AXES = {"run", "depth", "metric", "value", "paper", "figure", "sd", "n", "source"}  # all other columns are axes
EDGE = 1e-9  # a value on the bound counts as inside, whatever the last bits of the bound's own sum


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
        a, b = (
            self.sd and self.sd * other.mean,
            other.sd and other.sd * self.mean,
        )  # a constant has none, even times inf
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


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: for which value of ``each``, what was measured, and why it does not hold."""

    label: str
    value: Value
    why: str = ""


Verdict = tuple[str, list[Part]]


def show(x: float, digits: int = 4) -> str:
    """A number as the tables print it."""
    return f"{x:.{digits}g}"


def parse(text: str) -> ast.expr:
    """The tree of an expression. Raises ``Malformed`` where Python cannot read it."""
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed(f"{text[:80]!r} cannot be read ({error})") from None


# ------------------------------------------------------------------------------------------------------ selecting rows


def _words(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column)


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Blank words as "", values as numbers (what is not one becomes nan: published as unknown)."""
    words = {c: frame[c].astype(object).where(frame[c].notna(), "") for c in frame if _words(frame[c])}
    return frame.assign(**words | {"value": pd.to_numeric(frame.value, errors="coerce")})


def _matches(word: object, patterns: list) -> bool:
    return any(fnmatchcase(str(word), str(p)) for p in patterns)


def _where(column: pd.Series, wanted: list) -> np.ndarray:
    """Rows that take a wanted value."""
    if _words(column):
        return column.isin([v for v in column.unique() if _matches(v, wanted)]).to_numpy()
    whole = (column.dropna() % 1 == 0).all()
    there = column.to_numpy(float)[:, None]
    return np.isclose(there, np.array(wanted, float)[None, :], rtol=0 if whole else 5e-3).any(axis=1)


def _select(frame: pd.DataFrame, metric: str, chosen: dict, last: Callable, what: str) -> pd.DataFrame:
    """Rows of one metric at the chosen axes. Raises where one with several values is not chosen."""
    frame = _tidy(frame[frame.metric == metric])
    if frame.empty:
        raise Untested(f"{what} has no {metric}")
    for axis, wanted in sorted(chosen.items(), key=lambda item: item[0] == "epoch"):  # ``last`` depends on the runs
        if wanted == ["all"]:
            continue
        if wanted == ["last"] and axis == "epoch":
            wanted = [last(frame)]
        if axis in frame and any(isinstance(w, str) != _words(frame[axis]) for w in wanted):
            kind = "words or all" if _words(frame[axis]) else "numbers, all" + " or last" * (axis == "epoch")
            raise Malformed(f"{axis} takes {kind}, not {wanted[0]}")
        if missing := [w for w in wanted if axis not in frame or not _where(frame[axis], [w]).any()]:
            where = ", ".join(f"{a}={v[0]}" for a, v in chosen.items() if len(v) == 1 and a != axis)
            raise Untested(f"{what} has no {metric} at {axis}={missing[0]}" + f" ({where})" * bool(where))
        frame = frame[_where(frame[axis], wanted)]
    if several := [a for a in frame if a not in {*NOT_AXES, *chosen, "seed"} and frame[a].nunique() > 1]:
        raise Malformed(f"{metric} has several values of {several[0]}; name one, a list, or all")
    return frame


def mismatch(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``mismatch``, norm of W - B_eff: weight_norm sqrt(1 + r^2 - 2 r cos a); r = norm_ratio, a = angle_deg."""
    names = ["weight_norm", "norm_ratio", "angle_deg"]
    rows = _tidy(table[table.metric.isin(names)])
    keys = [c for c in rows if c not in ("metric", "value")]
    wide = rows.set_index([*keys, "metric"]).value.unstack("metric").reindex(columns=names).dropna().reset_index()
    r, cosine = wide.norm_ratio, np.cos(np.deg2rad(wide.angle_deg))
    square = (1 + r**2 - 2 * r * cosine).clip(lower=0)
    return wide[keys].assign(metric="mismatch", value=wide.weight_norm * np.sqrt(square))


# ---------------------------------------------------------------------------------------------------- words and calls


def each_of(tree: ast.expr) -> ast.Call | None:
    """The first ``each(...)`` of an expression."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    return next((n for n in calls if n.func.id == "each"), None)


def _worst(results: list[Verdict]) -> Verdict:
    return max((v for v, _ in results), key=VERDICTS.index), [part for _, parts in results for part in parts]


def _values(node: ast.expr) -> list:
    """The words and numbers of ``[several]`` or of one."""
    values = []
    for n in node.elts if isinstance(node, ast.List) else [node]:
        match n:
            case ast.Name(id=word):
                values.append(word)
            case ast.Constant(value=x) if type(x) in (int, float, str):
                values.append(x)
            case _:
                raise Malformed(f"{ast.unparse(n)!r} is no word, number or text in quotes")
    if not values:
        raise Malformed("an axis names no value")
    return values


def _axes(keywords: list[ast.keyword]) -> dict[str, list]:
    if any(k.arg is None for k in keywords):
        raise Malformed("an axis has no name")
    return {k.arg: _values(k.value) for k in keywords}


def _axis(keyword: str) -> str:
    """The axis that ``minus=`` or ``minus_AXIS=`` is about; any other keyword itself."""
    return "rule" if keyword == "minus" else keyword.removeprefix("minus_")


def _minus(axis: str) -> str:
    return "minus" if axis == "rule" else f"minus_{axis}"


def _call(function: str, metric: str, axes: dict[str, list]) -> str:
    return f"{function}({metric}, {', '.join(f'{a}={v!r}' for a, v in axes.items())})"


# ---------------------------------------------------------------------------------------------------------- evaluating


@dataclass(frozen=True)
class Scope:
    """What a criterion is evaluated over.

    Args:
        table: the record, long form; None where there is none.
        reference: the published values; None only checks the form of an expression: every statistic is then 1.
        sidecar: configs and statuses of the record's runs; by default all are finished.
        planned: of a partial record every planned run: its axes, and in ``there`` whether the record has it.
        n_min: number of seeds that a verdict needs.
        names: what ``target`` and ``tolerance`` stand for.
        bound: axes that ``each`` and ``at`` set, with their values.
    """

    table: pd.DataFrame | None = None
    reference: pd.DataFrame | None = None
    sidecar: dict = field(default_factory=dict)
    planned: pd.DataFrame | None = None
    n_min: int = 1
    names: dict[str, ast.expr] = field(default_factory=dict)
    bound: dict[str, list] = field(default_factory=dict)

    def within(self, axes: dict[str, list]) -> Scope:
        """The same with more axes set."""
        return replace(self, bound=self.bound | axes)

    # ------------------------------------------------------------------------------------------------ expressions

    def truth(self, node: ast.expr) -> Verdict:
        """Verdict and parts of a truth. Raises ``Malformed`` or ``Untested``."""
        match node:
            case ast.BoolOp(op=ast.And(), values=sides):
                return _worst([self.truth(side) for side in sides])
            case ast.Call(func=ast.Name(id="at"), args=[inner], keywords=[_, *_]):
                return self.within(_axes(node.keywords)).truth(inner)
            case ast.Call(func=ast.Name(id="each"), args=[inner], keywords=[_, *_]):
                return self.each(inner, self.points(node))
            case ast.Call(func=ast.Name(id="falls" | "rises" | "order")):
                return self.steps(node)
            case ast.Call(func=ast.Name(id="same")):
                return self.same(node)
            case ast.Compare(left=left, ops=[ast.In()], comparators=[ast.List(elts=[low, high])]):
                return self.held(left, low, high)
            case ast.Compare(
                left=left, ops=[ast.In()], comparators=[ast.Call(func=ast.Name(id="around"), args=[m, d])]
            ):
                return self.held(left, ast.BinOp(m, ast.Sub(), d), ast.BinOp(m, ast.Add(), d))
            case ast.Compare(left=left, ops=[ast.Lt() | ast.LtE() as op], comparators=[high]):
                return self.held(left, None, high, type(op) is ast.Lt)
            case ast.Compare(left=left, ops=[ast.Gt() | ast.GtE() as op], comparators=[low]):
                return self.held(left, low, None, type(op) is ast.Gt)
        raise Malformed(f"{ast.unparse(node)!r} is no comparison, each(), at(), falls(), rises(), order() or same()")

    def number(self, node: ast.expr) -> Value:
        """The value of a number. Raises ``Malformed``, ``Untested`` or ``Diverged``."""
        match node:
            case ast.Constant(value=x) if type(x) in (int, float):
                return Value(float(x))
            case ast.Name(id="inf"):
                return Value(math.inf)
            case ast.Name(id=name) if name in self.names:
                return self.number(self.names[name])
            case ast.Name(id=name) if type(self.bound.get(name, [""])[0]) in (int, float):
                return Value(float(self.bound[name][0]))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.number(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](self.number(left), self.number(right))
            case ast.Call(func=ast.Name(id="sqrt"), args=[operand], keywords=[]):
                return self.number(operand).sqrt()
            case ast.Call(func=ast.Name(id="hypot"), args=[x, y], keywords=[]):
                x, y = self.number(x), self.number(y)
                return (x * x + y * y).sqrt()
            case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=metric)]) if name in (*STATISTICS, "paired", "ref"):
                return self.statistic(name, metric, _axes(node.keywords))
        raise Malformed(
            f"{ast.unparse(node)!r} is not a number here, nor {', '.join(STATISTICS)}, paired, ref, sqrt or hypot"
        )

    def held(self, left: ast.expr, low: ast.expr | None, high: ast.expr | None, strict: bool = False) -> Verdict:
        """A comparison: whether a number lies in an interval."""
        try:
            value = self.number(left)
            low = Value(-math.inf) if low is None else self.number(low)
            high = Value(math.inf) if high is None else self.number(high)
        except Diverged as reason:
            return "fails", [Part("", Value(math.nan, math.nan, 0), str(reason))]
        if value.n == math.inf:
            raise Malformed(f"{ast.unparse(left)!r}, the left side of a comparison, takes nothing from the record")
        if (n := min(value.n, low.n, high.n)) < self.n_min:
            raise Untested(f"{n:.0f} of {self.n_min} seeds")
        excess = max(low - value, value - high, key=lambda x: x.mean)
        if excess.mean < -EDGE if strict else excess.mean <= EDGE:
            return "holds", [Part("", value)]
        spread = f" ± {show(value.sd, 2)}" if math.isfinite(value.sd) else ""
        one_sided = ("below {1}", "above {0}") if strict else ("at most {1}", "at least {0}")
        wanted = one_sided[high.mean == math.inf] if math.inf in (-low.mean, high.mean) else "{0} to {1}"
        why = f"{show(value.mean)}{spread}, wanted {wanted.format(show(low.mean), show(high.mean))}"
        return "partly" if excess.mean < excess.sd else "fails", [Part("", value, why)]  # an sd of nan is never near

    def each(self, inner: ast.expr, points: list[dict[str, object]]) -> Verdict:
        """A truth at every point of some axes."""
        if each_of(inner):
            raise Malformed("each() within each(); name both axes in one")
        results = []
        for point in points:
            verdict, parts = self.within({a: [v] for a, v in point.items()}).truth(inner)
            label = " ".join(v if isinstance(v, str) else f"{a}={show(v)}" for a, v in point.items())
            results.append((verdict, [replace(part, label=label) for part in parts]))
        found = {verdict for verdict, _ in results}
        verdict = "holds" if found == {"holds"} else "fails" if found & {"holds", "fails"} == {"fails"} else "partly"
        return verdict, [part for _, parts in results for part in parts]

    def points(self, node: ast.Call | None) -> list[dict[str, object]]:
        """Every combination of the values of an ``each``; without one a single, empty point."""
        axes = {a: self.spread(a, v) for a, v in _axes(node.keywords if node else []).items()}
        return [dict(zip(axes, values)) for values in product(*axes.values())]

    def steps(self, node: ast.Call) -> Verdict:
        """``falls``, ``rises``, ``order``: short for a comparison of each value with the next."""
        metric, axes, told = self.short(node, "over", "by", "margin")
        axis = told.get("over", "rule")
        if (node.func.id == "order") != (len(node.args) == 2 and "over" not in told) or told.get(
            "by", "seed"
        ) != "seed":
            raise Malformed(f"{ast.unparse(node)!r}: falls() and rises() need over=AXIS, order() a list; by is seed")
        values = _values(node.args[1]) if node.func.id == "order" else axes.pop(axis, ["every"])
        tests = []
        for before, after in pairwise(self.spread(axis, values)):
            a, b = ([before], [after]) if node.func.id == "order" else ([after], [before])
            difference = f"{_call('mean', metric, axes | {axis: a})} - {_call('mean', metric, axes | {axis: b})}"
            if "by" in told:
                difference = _call("paired", metric, axes | {axis: a, _minus(axis): b})
            bound = f"> {told.get('margin', 0)}" if node.func.id == "rises" else f"< 0 - ({told.get('margin', 0)})"
            tests.append(f"{difference} {bound}")
        return self.truth(parse(" and ".join(tests)))

    def same(self, node: ast.Call) -> Verdict:
        """Two-sample t test, ``n_min`` seeds each: short for a paired difference within t standard errors."""
        metric, axes, told = self.short(node, "t")
        other = {_axis(a): axes.pop(a) for a in list(axes) if a.startswith("minus")}
        noise = f"hypot({_call('sd', metric, axes)}, {_call('sd', metric, axes | other)}) / sqrt({self.n_min})"
        paired = _call("paired", metric, axes | {_minus(a): v for a, v in other.items()})
        return self.truth(parse(f"{paired} in around(0, ({told.get('t')}) * {noise})"))

    def short(self, node: ast.Call, *options: str) -> tuple[str, dict[str, list], dict[str, str]]:
        """Metric, axes and options of a call that is short for others."""
        if not node.args or not isinstance(node.args[0], ast.Name):
            raise Malformed(f"{ast.unparse(node)!r} names no metric")
        told = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in options}
        return node.args[0].id, _axes([k for k in node.keywords if k.arg not in options]), told

    # ------------------------------------------------------------------------------------------------- statistics

    def statistic(self, name: str, metric: str, axes: dict[str, list]) -> Value:
        """A statistic of one metric at some axes; those that ``each`` and ``at`` set hold where it names no others."""
        other = {_axis(a): v for a, v in axes.items() if name == "paired" and _minus(_axis(a)) == a != "minus_seed"}
        axes = self.bound | ({"epoch": ["all"]} if name == "best" else {}) | axes
        axes = {a: v for a, v in axes.items() if a not in map(_minus, other)}
        self.check(axes | other)
        if name == "paired" and [len(v) for v in other.values()] != [1]:
            raise Malformed("paired() needs minus=RULE, or one minus_AXIS=VALUE")
        if self.reference is None:
            return Value(1.0, 0.0, math.inf if name == "ref" else self.n_min)
        if name == "ref":
            return self.published(metric, axes)
        seeds = self.seeds(metric, axes, STATISTICS.get(name, "mean"))
        if name == "paired":
            seeds = (seeds - self.seeds(metric, axes | other, "mean")).dropna()
        mean, sd = float(seeds.mean()), float(seeds.std(ddof=1))
        return Value(sd, math.nan, len(seeds)) if name == "sd" else Value(mean, sd, len(seeds))

    def check(self, axes: dict[str, list]) -> None:
        """Raises where an axis is no column, as far as the tables are known, or is asked for ``every``."""
        known = {c for frame in (self.table, self.reference) if frame is not None for c in frame} - NOT_AXES
        for axis, values in axes.items():
            if axis.startswith("minus") or known and axis not in known:
                raise Malformed(f"unknown axis {axis}; known: {', '.join(sorted(known))}")
            if "every" in values:
                raise Malformed(f"{axis}=every is for each(), falls() and rises(); a statistic takes all")

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
            rows = _select(self.table, metric, axes, last, "the record")
        except Untested:
            self.survived(axes, pd.Index([]))
            raise
        rows = rows[np.isfinite(rows.value)]
        counts = rows.groupby("seed").size()
        rows = rows[rows.seed.isin(counts.index[counts == counts.max()])]
        seeds = rows.groupby("seed").value.agg(how)
        self.survived(axes, seeds.index)
        return seeds

    def survived(self, axes: dict[str, list], have: pd.Index) -> None:
        """Raises where a run at these axes diverged and its seed is not among those at hand."""
        diverged = [run for run, status in self.sidecar.get("status", {}).items() if status["state"] == "diverged"]
        for run in diverged:
            config = self.sidecar["configs"].get(run, {})
            shared = {a: v for a, v in axes.items() if a in config and a != "epoch" and v != ["all"]}
            asked = all(_where(pd.Series([config[a]]), v)[0] for a, v in shared.items())
            if asked and config.get("seed") not in have:
                raise Diverged(f"{config.get('rule', 'run')} diverged with seed {config.get('seed', run)}")

    def complete(self, axes: dict[str, list]) -> None:
        """Raises where a partial record lacks a run at these axes: of a whole one the statistic could be another."""
        if self.planned is None:
            return
        asked = {a: v for a, v in axes.items() if a in self.planned and v != ["all"]}
        due = self.planned[np.logical_and.reduce([_where(self.planned[a], v) for a, v in asked.items()] or [[True]])]
        if not due.there.all():
            whole = f"partial record: {self.planned.there.sum()} of {len(self.planned)} runs"
            where = ", ".join(f"{a}={v[0] if len(v) == 1 else v}" for a, v in asked.items())
            raise Untested(f"{whole} ({due.there.sum()} of {len(due)} at {where})" if where else whole)

    def published(self, metric: str, axes: dict[str, list]) -> Value:
        """The published value; of per-seed rows the mean, unless the mean itself was published."""
        rows = _select(self.reference, metric, axes, lambda frame: frame.epoch.max(), "the reference table")
        rows = rows[rows.seed.isna()] if rows.seed.isna().any() else rows
        if rows.seed.isna().any() and len(rows) > 1 or rows.seed.duplicated().any():
            raise Malformed(f"{metric} is published more than once at these axes")
        if rows.value.isna().any():
            raise Untested(f"the published {metric} is unknown")
        return Value(float(rows.value.mean()))
