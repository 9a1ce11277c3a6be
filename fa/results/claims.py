"""Claims and their verdicts: the tables ``data/claims/NAME.csv`` held against the records, NAME as in
:mod:`fa.results.records`.

A criterion is fixed before the run; :mod:`fa.results.criteria` has its grammar. ``target`` and ``tolerance`` are the
claim's own columns: a number, for the target also an expression of ``ref``, or words, which a criterion cannot use.

**Verdicts.** The left side of a comparison is what is measured.

* *holds*: inside the interval (to 1e-9).
* *partly*: outside it by less than one sd of (measured - bound); under ``each``: some hold and not all, or none fails.
* *fails*: outside by one sd or more, or a run that it needs diverged. ``and`` takes the worse of its sides.
* *not tested*: no record, or one with a run that the paper-scale plan has not, or a partial one that lacks a run which
  the criterion asks for; a rule, layer or epoch that it does not hold; fewer than ``n_min`` seeds; no published value.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from fa import experiments
from fa.errors import UserError
from fa.paths import ROOT, read_csv
from fa.results import records
from fa.results.criteria import VERDICTS, Scope, each_of, parse
from fa.results.selection import Malformed, Record, Untested, show

COLUMNS = ("id", "figure", "claim", "target", "tolerance", "source of target", "criterion", "n_min")
NUMBER = re.compile(
    r"^-?[\d.]+(e-?\d+)?$|\b(ref|sqrt|hypot|mean|min|max|best|sd|paired)\("
)  # an expression; the rest is words


@dataclass(frozen=True)
class Claim:
    """A row of a table of claims; ``names``: the target and the tolerance where they are numbers."""

    id: str
    name: str
    figure: str
    claim: str
    target: str
    tolerance: str
    source: str
    criterion: str
    n_min: int
    test: ast.expr
    names: dict[str, ast.expr]

    @property
    def paper(self) -> str:
        """ "p1", "p2" or "p3"; "x" across the papers."""
        return self.name.partition("_")[0]


@contextmanager
def _naming(claim: str, column: str) -> Iterator[None]:
    try:
        yield
    except Malformed as error:
        raise UserError(f"claim {claim}, {column}: {error}") from None


def compiled(table: str, row: dict[str, str]) -> Claim:
    """A row of a table as a ``Claim``, its expressions checked as far as they can be without a record."""
    name, names = row["id"], {}
    if not re.fullmatch(r"[1-9]\d*", row["n_min"], re.ASCII):
        raise UserError(f"claim {name}: n_min is {row['n_min']!r}; give a whole number from 1 up")
    for column in ("target", "tolerance"):
        if NUMBER.search(row[column]):  # the rest is words
            with _naming(name, column):
                names[column] = parse(row[column])
    with _naming(name, "criterion"):
        test = parse(row["criterion"])
    told = {"source" if c == "source of target" else c: row[c] for c in COLUMNS}
    claim = Claim(**told | {"n_min": int(row["n_min"])}, name=table, test=test, names=names)
    judge(claim, pd.DataFrame(), None)
    return claim


def load(folder: Path = ROOT / "data" / "claims", name: str | None = None) -> list[Claim]:
    """The claims of every table in a folder, or of the one of this name, checked; figures in the order of
    ``EXPERIMENTS``.

    Raises:
        UserError: a missing column or value, a repeated id, or an expression outside the grammar, naming the claim.
    """
    claims, order = [], list(experiments.EXPERIMENTS)

    def place(path: Path) -> tuple[int, str]:
        figure = path.stem.removesuffix("_small")
        return order.index(figure) if figure in order else len(order), path.stem

    for path in sorted((p for p in folder.glob("*.csv") if name in (None, p.stem)), key=place):
        rows = read_csv(path, dtype=str, keep_default_na=False)
        if tuple(rows.columns) != COLUMNS:
            raise UserError(f"{path.name} has the columns {', '.join(rows.columns)}; give {', '.join(COLUMNS)}")
        if (empty := rows.eq("").any(axis=1)).any():
            raise UserError(f"claim {rows.id[empty].iloc[0]}: a column is empty; write 'unknown' or 'none'")
        if (twice := rows.id.duplicated()).any():
            raise UserError(f"claim {rows.id[twice].iloc[0]} is in {path.name} twice; give each claim an id of its own")
        claims += [compiled(path.stem, row) for row in rows.to_dict("records")]
    return claims


def judge(
    claim: Claim,
    table: pd.DataFrame | None,
    reference: pd.DataFrame | None,
    sidecar: dict | None = None,
    planned: pd.DataFrame | None = None,
) -> dict[str, object]:
    """One claim held against one table: a row of ``verdicts``.

    Args:
        claim: from ``load``.
        table: the record, long form; None where there is none.
        reference: the published values of the same experiment; None only checks the form of the claim.
        sidecar: configs and statuses of the record's runs; default: all are finished.
        planned: the runs of the paper-scale plan, ``run`` and their axes. Default: the table is whole and the paper's.
    Raises:
        UserError: a selection that is ambiguous in this table, naming the claim.
    """
    return _judged(claim, Record(table, reference, sidecar or {}), planned)


def _judged(claim: Claim, record: Record, planned: pd.DataFrame | None) -> dict[str, object]:
    """``judge``, by a record that other claims are judged by, too."""
    table, scope = record.table, Scope(record, claim.n_min, claim.names)
    row = {c: getattr(claim, c) for c in ("id", "claim", "target", "tolerance", "criterion")}
    row |= {"target": _target(claim, scope), "measured": "", "sd": "", "n": "", "verdict": "not tested", "why": ""}
    if table is None:
        return row | {"why": "no record"}
    if planned is not None:
        if others := sorted({*table.run.unique()} - {*planned.run}):
            return row | {"why": f"not the paper's table: {len(others)} of its runs not planned, {others[0]} first"}
        there = planned.run.isin(list(record.sidecar["configs"]))
        due = None if there.all() else planned.assign(there=there)
        scope = replace(scope, record=replace(record, planned=due))
    try:
        with _naming(claim.id, "criterion"):
            verdict, parts = scope.truth(claim.test)
    except Untested as reason:
        return row | {"why": str(reason)}
    return row | {
        "measured": _join((p.label, p.value.shown()) for p in parts),
        "sd": _join(("", show(p.value.sd, 2)) for p in parts),
        "n": int(min(p.value.n for p in parts)),
        "verdict": verdict,
        "why": _join((p.label, p.why) for p in parts if p.why),
    }


def _join(parts: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{label} {text.removeprefix(f'{label} ')}".strip() for label, text in parts)


def _target(claim: Claim, scope: Scope) -> str:
    """The target with its value: one number, one for each value of ``each``, the words, or ``unknown``."""
    if "target" not in claim.names:
        return claim.target
    with _naming(claim.id, "target"):
        tree, scope = claim.names["target"], replace(scope, names={})
        try:
            each, calls = each_of(claim.test), [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.keywords]
            if each and calls:  # an axis that the target sets itself, wherever it asks, has one value here
                own = set.intersection(*({k.arg for k in call.keywords} for call in calls))
                each = ast.Call(each.func, each.args, [k for k in each.keywords if k.arg not in own])
            points = [{}] if isinstance(tree, ast.Constant) else scope.points(each)
            found = [scope.within({a: [v] for a, v in point.items()}).number(tree) for point in points]
        except Untested:
            return "unknown"
        if any(value.n < math.inf for value in found):
            raise Malformed("a target is made of published values, not of the record")
    texts = [show(value.mean) for value in found]
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def verdicts(name: str | None = None, mode: str = "record") -> pd.DataFrame:
    """The verdict on every claim, computed from the table read back from disk.

    Args:
        name: of one table of claims; default: all of them.
        mode: whose table: "record" (default) and "paper" the committed one, "quick" the one in build/.
    Returns:
        Columns id, claim, target, tolerance, criterion, measured, sd, n, verdict, why. ``measured`` and ``sd`` are
        text, a number for each value of ``each``; sd is over seeds (ddof 1), n the smallest number of seeds behind one.
    Raises:
        UserError: a malformed criterion, naming the claim; an experiment that has no claim.
    """
    claims = load(name=name)
    if not claims:
        raise UserError(f"no claim is about {name!r}; known: {', '.join(dict.fromkeys(c.name for c in load()))}")
    sources = {table: _sources(table, mode) for table in dict.fromkeys(c.name for c in claims)}
    return pd.DataFrame([_judged(c, *sources[c.name]) for c in claims])


def counted(verdicts: pd.Series) -> str:
    """ "holds 24, partly 1, not tested 2", in that order."""
    return ", ".join(f"{v} {(verdicts == v).sum()}" for v in VERDICTS if (verdicts == v).any())


def _sources(name: str, mode: str) -> tuple[Record, pd.DataFrame]:
    """The record (its table None if there is none) and the figure's plan with the axes of its runs."""
    experiment, scale = records.figure_of(name)
    swept, runs = experiments.find(experiment).swept, experiments.plan(experiment, scale)
    plan = [{"run": c.run, "rule": c.rule, "seed": getattr(c, "seed", None), **swept(c)} for c in runs]
    try:
        if mode == "quick":
            table, made = records.read(experiment, mode), records.sidecar(experiment, mode)
        else:
            table, made = records.union(experiment, scale, runs)
    except UserError:
        table, made = None, {}
    return Record(table, records.reference(name), made), pd.DataFrame(plan)
