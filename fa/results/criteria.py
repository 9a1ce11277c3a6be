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
               |  paired(METRIC, minus=RULE, minus_AXIS=VALUE, ..., AXIS=VALUES, ...)   a difference, seed by seed
               |  ref(METRIC, AXIS=VALUES, ...)                                         from the published values
    VALUES    :=  word | number | "text" | [several of these] | all | last (of epoch) | every (of each, falls, rises)

**Axes** are the columns of the tables. A column of text takes words (``"layer1.*"``: all that match), any other
numbers: whole ones agree exactly, others to half a percent, as published ones are rounded.

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
from dataclasses import dataclass, field, replace
from itertools import pairwise, product

from fa.results.selection import STATISTICS, Diverged, Malformed, Record, Untested, Value, show

VERDICTS = ("holds", "partly", "fails", "not tested")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
FUNCTIONS = (*STATISTICS, "paired", "ref", "sqrt", "hypot")
EDGE = 1e-9  # a value on the bound counts as inside, whatever the last bits of the bound's own sum


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: for which value of ``each``, what was measured, and why it does not hold."""

    label: str
    value: Value
    why: str = ""


Verdict = tuple[str, list[Part]]


def parse(text: str) -> ast.expr:
    """The tree of an expression. Raises ``Malformed`` where Python cannot read it."""
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed(f"{text[:80]!r} cannot be read ({error})") from None


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


@dataclass(frozen=True)
class Scope:
    """What a criterion is evaluated over.

    Args:
        record: where its statistics are from.
        n_min: number of seeds that a verdict needs.
        names: what ``target`` and ``tolerance`` stand for.
        bound: axes that ``each`` and ``at`` set, with their values.
    """

    record: Record = Record()
    n_min: int = 1
    names: dict[str, ast.expr] = field(default_factory=dict)
    bound: dict[str, list] = field(default_factory=dict)

    def within(self, axes: dict[str, list]) -> Scope:
        """The same with more axes set."""
        return replace(self, bound=self.bound | axes)

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
            case ast.Compare(left, [ast.In()], [ast.List(elts=[low, high])]):
                return self.held(left, low, high)
            case ast.Compare(left, [ast.In()], [ast.Call(func=ast.Name(id="around"), args=[middle, by], keywords=[])]):
                return self.held(left, ast.BinOp(middle, ast.Sub(), by), ast.BinOp(middle, ast.Add(), by))
            case ast.Compare(left, [ast.Lt() | ast.LtE() as op], [high]):
                return self.held(left, None, high, type(op) is ast.Lt)
            case ast.Compare(left, [ast.Gt() | ast.GtE() as op], [low]):
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
            case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=metric)]) if name in FUNCTIONS:
                return self.statistic(name, metric, _axes(node.keywords))
        raise Malformed(f"{ast.unparse(node)!r} is not a number here; functions: {', '.join(FUNCTIONS)}")

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
        why = f"{value.shown()}{spread}, wanted {wanted.format(show(low.mean), show(high.mean))}"
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
        axes = {a: self.record.spread(a, v) for a, v in _axes(node.keywords if node else []).items()}
        return [dict(zip(axes, values)) for values in product(*axes.values())]

    def steps(self, node: ast.Call) -> Verdict:
        """``falls``, ``rises``, ``order``: short for a comparison of each value with the next."""
        metric, axes, told = self.short(node, "over", "by", "margin")
        ordered, axis, margin = node.func.id == "order", told.get("over", "rule"), told.get("margin", 0)
        if ordered == ("over" in told) or len(node.args) != 1 + ordered or told.get("by", "seed") != "seed":
            raise Malformed(f"{ast.unparse(node)!r}: falls() and rises() need over=AXIS, order() a list; by is seed")
        values = _values(node.args[1]) if ordered else axes.pop(axis, ["every"])
        tests = []
        for before, after in pairwise(self.record.spread(axis, values)):
            a, b = ([before], [after]) if ordered else ([after], [before])
            difference = f"{_call('mean', metric, axes | {axis: a})} - {_call('mean', metric, axes | {axis: b})}"
            if "by" in told:
                difference = _call("paired", metric, axes | {axis: a, _minus(axis): b})
            tests.append(difference + (f"> {margin}" if node.func.id == "rises" else f"< 0 - ({margin})"))
        if not tests:
            raise Malformed(f"{ast.unparse(node)!r} has no two values")
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

    def statistic(self, name: str, metric: str, axes: dict[str, list]) -> Value:
        """A statistic; the axes that ``each`` and ``at`` set hold where it names no others."""
        other = {_axis(a): v for a, v in axes.items() if name == "paired" and _minus(_axis(a)) == a != "minus_seed"}
        own = {a: v for a, v in axes.items() if _axis(a) == a or _axis(a) not in other}
        default = {"epoch": ["all"]} if name == "best" else {}
        return self.record.statistic(name, metric, self.bound | default | own, other)
