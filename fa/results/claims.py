"""Claims and their verdicts: ``data/claims.csv`` held against the records.

A criterion is fixed before the run; :mod:`fa.results.criteria` has its grammar.

**Targets.** ``target`` and ``tolerance`` are the claim's own columns. A target is a number, an expression of ``ref``,
``sqrt`` and numbers, or words, which a criterion cannot use.

**Verdicts.** The left side of a comparison is what is measured.

* *holds*: inside the interval (to 1e-9).
* *partly*: outside it by less than one sd of (measured - bound); under ``each``: some hold and not all, or none fails.
* *fails*: outside by one sd or more, or a run that it needs diverged. ``and`` takes the worse of its sides.
* *not tested*: no record, or one of another data set or recipe than the paper-scale plan, or a partial one that lacks a run
  which the criterion asks for; a rule, layer or epoch that it does not hold; fewer than ``n_min`` seeds; no published value.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import pandas as pd

from fa import experiments
from fa.errors import UserError
from fa.paths import ROOT
from fa.results import records
from fa.results.criteria import SWEPT, WORDS, Compiler, Number, Scope, Truth, Untested, Value, finite, show
from fa.train.config import Config

COLUMNS = (
    "id",
    "paper",
    "figure",
    "claim",
    "target",
    "tolerance",
    "source of target",
    "criterion",
    "n_min",
    "experiment",
)
FREE = ("experiment", "seed", "repeats", "measure")  # a table may differ from the paper-scale plan in these fields


@dataclass(frozen=True)
class Claim:
    """A row of data/claims.csv, with its criterion compiled."""

    id: str
    paper: str
    figure: str
    claim: str
    target: str
    tolerance: str
    source: str
    criterion: str
    n_min: int
    experiment: str
    test: Truth
    published: Number | None
    bindings: Callable[[Scope], list[tuple[tuple[str, object], ...]]]


def _compile(row: dict[str, str]) -> Claim:
    """A row of the table as a ``Claim``."""
    name, target, tolerance = row["id"], row["target"], row["tolerance"]
    if not row["n_min"].isdigit() or int(row["n_min"]) < 1:
        raise UserError(f"claim {name}: n_min is {row['n_min']!r}; give a whole number from 1 up")
    compiler = Compiler(name, "criterion")
    tree = compiler.parse(row["criterion"])
    published = None
    if finite(target) or re.search(r"\b(ref|sqrt|mean|min|max|best|sd|paired)\(", target):  # the rest is words
        axes = tuple(k.arg or "" for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords)
        source = Compiler(name, "target", measures=False)
        published = source.number(source.parse(target), axes)
        compiler.names["target"] = published
    if finite(tolerance):
        compiler.names["tolerance"] = lambda scope: Value(float(tolerance))
    test = compiler.truth(tree)
    return Claim(
        **{c: row[c] for c in COLUMNS if c not in ("source of target", "n_min")},
        n_min=int(row["n_min"]),
        source=row["source of target"],
        test=test,
        published=published,
        bindings=compiler.each[0] if compiler.each else lambda scope: [()],
    )


def load(path: Path | None = None) -> list[Claim]:
    """The claims table, every criterion checked.

    Args:
        path: the table; default data/claims.csv.
    Raises:
        UserError: a missing column or value, a repeated id, or an expression outside the grammar, with its position.
    """
    path = path or ROOT / "data" / "claims.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(rows.columns) != COLUMNS:
        raise UserError(f"{path.name} has the columns {', '.join(rows.columns)}; give {', '.join(COLUMNS)}")
    if (empty := rows.eq("").any(axis=1)).any():
        raise UserError(f"claim {rows.id[empty].iloc[0]}: a column is empty; write 'unknown' or 'none'")
    if (twice := rows.id.duplicated()).any():
        raise UserError(f"claim {rows.id[twice].iloc[0]} is in {path.name} twice; give each claim an id of its own")
    return [_compile(row) for row in rows.to_dict("records")]


# ---------------------------------------------------------------------------------------------------------- verdicts


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Blank words as "", everything else as numbers (what is not one becomes nan: published as unknown)."""
    words = {c: frame[c].astype(object).where(frame[c].notna(), "") for c in WORDS if c in frame}
    numbers = {c: pd.to_numeric(frame[c], errors="coerce") for c in ("seed", "epoch", "value", *SWEPT) if c in frame}
    return frame.assign(**words, **numbers)


def _unfit(sidecar: dict, planned: list[dict]) -> str:
    """Why a table cannot speak about the paper's experiment; empty if it can."""
    later = {
        f.name: f.default for f in fields(Config) if f.default is not MISSING
    }  # a field newer than the record had its default
    for config in (later | config for config in sidecar.get("configs", {}).values()):
        plans = [plan for plan in planned if plan.get("rule") == config.get("rule")]
        others = ([f for f in plan if f not in FREE and config.get(f) != plan[f]] for plan in plans)
        differ = min(others, key=len, default=[])  # from the nearest planned run
        for field in [f for f in ("dataset", "epochs", *differ) if f in differ][:1]:
            wanted = " or ".join(dict.fromkeys(str(plan[field]) for plan in plans if field in plan))
            had = "was trained on" if field == "dataset" else f"has {field}"
            return f"this table {had} {config.get(field)}, the claim is about {wanted}"
    return ""


def judge(
    claim: Claim,
    table: pd.DataFrame | None,
    reference: pd.DataFrame,
    sidecar: dict | None = None,
    planned: list[dict] | None = None,
    due: pd.DataFrame | None = None,
) -> dict[str, object]:
    """One claim held against one table: a row of ``verdicts``.

    Args:
        claim: from ``load``.
        table: the record, long form; None where there is none.
        reference: the published values of the same experiment.
        sidecar: what stands beside the record; default empty (a whole table of unknown origin).
        planned: configurations of the paper-scale plan, which its own must be among. Default: not compared.
        due: of a partial record the planned runs, see :class:`fa.results.criteria.Scope`.
    Raises:
        UserError: a selection that is ambiguous in this table, naming claim and position.
    """
    scope = Scope(
        _tidy(pd.DataFrame() if table is None else table), _tidy(reference), sidecar or {}, claim.n_min, due=due
    )
    row = {
        "id": claim.id,
        "claim": claim.claim,
        "target": _target(claim, scope),
        "tolerance": claim.tolerance,
        "criterion": claim.criterion,
        "measured": "",
        "sd": "",
        "n": "",
        "verdict": "not tested",
        "why": "",
    }
    if why := "no record" if table is None else _unfit(scope.sidecar, planned or []):
        return row | {"why": why}
    try:
        verdict, parts = claim.test(scope)
    except Untested as reason:
        return row | {"why": str(reason)}
    return row | {
        "measured": _join((p.label, show(p.value.mean)) for p in parts),
        "sd": _join(("", show(p.value.sd, 2)) for p in parts),
        "n": int(min(p.value.n for p in parts)),
        "verdict": verdict,
        "why": _join((p.label, p.why) for p in parts if p.why),
    }


def _join(parts: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{label} {text}".strip() for label, text in parts)


def _target(claim: Claim, scope: Scope) -> str:
    """The target with its value: one number, one for each value of ``each``, the words, or ``unknown``."""
    if claim.published is None:
        return claim.target
    try:
        found = [show(claim.published(replace(scope, bound=bound)).mean) for bound in claim.bindings(scope)]
    except Untested:
        return "unknown"
    return found[0] if len(set(found)) == 1 else "; ".join(found)


def verdicts(experiment: str | None = None, mode: str = "record") -> pd.DataFrame:
    """The verdict on every claim, computed from the table read back from disk.

    Args:
        experiment: only its claims; default every experiment's.
        mode: whose table: "record" (default) and "paper" the committed one, "quick" the one in build/.
    Returns:
        Columns id, claim, target, tolerance, criterion, measured, sd, n, verdict, why. ``measured`` and ``sd`` are
        text, a number for each value of ``each``; sd is over seeds (ddof 1), n the smallest number of seeds behind one.
    Raises:
        UserError: a malformed criterion, naming claim and position; an experiment that has no claim.
    """
    claims = [c for c in load() if experiment in (None, c.experiment)]
    if not claims:
        raise UserError(
            f"no claim is about {experiment!r}; known: " + ", ".join(dict.fromkeys(c.experiment for c in load()))
        )
    sources = {name: _sources(name, mode) for name in dict.fromkeys(c.experiment for c in claims)}
    return pd.DataFrame([judge(c, *sources[c.experiment]) for c in claims])


def _sources(
    experiment: str, mode: str
) -> tuple[pd.DataFrame | None, pd.DataFrame, dict, list[dict], pd.DataFrame | None]:
    """Table (None if there is none), published values, sidecar, paper-scale plan, and what is due of a partial record."""
    reference = records.reference(experiment)
    try:
        table, sidecar = records.read(experiment, mode), records.sidecar(experiment, mode)
    except UserError:
        return None, reference, {}, [], None
    plan = experiments.plan(experiment, "paper")
    planned = plan if mode != "quick" else experiments.plan(experiment, mode)
    swept, there, due = experiments.find(experiment).swept, sidecar["configs"], None
    if sidecar["partial"] or mode != "quick" and len(there) < len(plan):  # e.g. collected with fewer seeds
        due = pd.DataFrame(
            [{"rule": c.rule, "seed": getattr(c, "seed", None), **swept(c), "there": c.run in there} for c in planned]
        )
    return table, reference, sidecar, [asdict(config) for config in plan], due
