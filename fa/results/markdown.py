"""Markdown tables, and the claims of a figure as one: claims of one kind share a row, long lists are shortened."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa.plot import RULE_STYLE
from fa.results.selection import DIVERGED

if TYPE_CHECKING:
    from fa.experiments import Experiment

LABELS = {name: style.label for name, style in RULE_STYLE.items()}
_NAMES = "|".join(sorted(map(re.escape, LABELS.values()), key=len, reverse=True))
WORD = re.compile(rf"(?<![\w.-])({_NAMES}|\d+(?:\.\d+)?)(?![\w-])")
"""A rule's label or a number in a claim: claims that differ in one of them share a row."""

USUAL = re.compile(r"\((test|validation) accuracy( after the last epoch)?, paired by seed\)")
"""What the report says once, and of a claim with the two words "test, paired" or "validation, paired"."""

WITH_SD, LISTED = 3, 4
"""Up to so many values a row gives each with its sd; up to so many the means; from there on their range."""


def markdown(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    head = list(head)
    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])


def claims_table(rows: pd.DataFrame, start: str = "") -> str:
    """The table ``claim | target | ours | verdict`` of a figure.

    Args:
        rows: columns claim, target, ours, verdict, why; a row a claim.
        start: the beginning of all claims, which the head of the first column says ("": they have none in common).
    """
    lines = []
    for group in _alike(rows):
        names, row = zip(*group)
        of = [f"{name}: " if len(group) > 1 else "" for name in names]
        claim = USUAL.sub(r"(\1, paired)", row[0].claim if len(group) == 1 else _put(row[0].claim, names))
        targets = list(dict.fromkeys(r.target for r in row))
        target = targets[0] if len(targets) == 1 else "; ".join(f"{n}{r.target}" for n, r in zip(of, row))
        ours = "; ".join(f"{n}{_short(r.ours)}" for n, r in zip(of, row) if r.ours)
        lines.append([claim, target, ours, _verdict(of, row)])
    return markdown([f"{start}:" if start else "claim", "target", "ours", "verdict"], lines)


def labelled(text: str, about: Experiment) -> str:
    """A measurement with the figure's own labels in place of the names that its rules and variants have in the code."""
    names = {rule: about.named(rule) for rule in LABELS} | about.labels
    return re.sub(r"(?<![\w=])[a-z]\w*(?= )", lambda m: names.get(m[0], m[0]), text)


def common_start(texts: list[str]) -> tuple[str, list[str]]:
    """What every text begins with, up to a comma or colon ("MNIST"; "" if nothing), and the texts without it; of a
    single text what is before its last colon. What stands in parentheses is no beginning."""
    start = os.path.commonprefix(texts).partition("(")[0]
    if len(texts) == 1:
        start = start[: max(start.rfind(":"), 0)]
    elif not all(t[len(start) : len(start) + 1] in (",", ":") for t in texts):
        start = start[: max(start.rfind(","), start.rfind(":"), 0)]
    return start, [t[len(start) :].lstrip(",: ") for t in texts]


def _alike(rows: pd.DataFrame) -> list[list[tuple[str, Any]]]:
    """Claims in groups, as (what differs, row): claims whose texts are equal but for one rule, or one number."""

    def keys(claim: str) -> dict[tuple[str, str, bool], str]:
        """(text before, text after, is a number) of each rule or number in the claim, and that rule or number."""
        return {(claim[: m.start()], claim[m.end() :], m[0][0].isdigit()): m[0] for m in WORD.finditer(claim)}

    found = [keys(claim) for claim in rows.claim]
    often = Counter(key for each in found for key in each)
    groups: dict[object, list[tuple[str, Any]]] = {}
    for row, each in zip(rows.itertuples(), found):
        key = max(each, key=lambda k: often[k], default=None)
        shared = key is not None and often[key] > 1
        groups.setdefault(key if shared else row.Index, []).append((each.get(key, ""), row))
    return list(groups.values())


def _put(claim: str, names: Iterable[str]) -> str:
    """The claim about the first of several rules or numbers, as a claim about all of them."""
    first, *_ = names
    place = next(m for m in WORD.finditer(claim) if m[0] == first)
    return claim[: place.start()] + " / ".join(names) + claim[place.end() :]


def _verdict(of: list[str], rows: Iterable[Any]) -> str:
    """The verdict of a row; where its claims differ, or one is missed, each claim's with its reason."""
    told = []
    for name, r in zip(of, rows):
        first, *more = r.why.split("; ")
        if len(r.ours.split("; ")) <= LISTED:  # the value is in the row already
            first = re.sub(r"(^| )\S+( ± \S+)?, wanted", ", wanted", first, count=1).removeprefix(", ")
        why = f" ({first}{f', and {len(more)} more' if more else ''})" if first else ""
        told.append((name, f"{r.verdict}{why}"))
    verdicts = list(dict.fromkeys(text for _, text in told))
    return verdicts[0] if len(verdicts) == 1 else "; ".join(f"{name}{text}" for name, text in told)


def _short(measured: str) -> str:
    """A measurement: every value with its sd, or the means, or the range of the means."""
    parts = measured.split("; ")
    means = [part.partition(" ± ")[0] for part in parts]
    if len(parts) <= LISTED:
        return measured if len(parts) <= WITH_SD else "; ".join(means)
    values = sorted((mean.split()[-1] for mean in means), key=lambda v: math.inf if v == DIVERGED else float(v))
    return f"{len(parts)} values, {f'{values[0]} to {values[-1]}' if values[0] != values[-1] else f'all {values[0]}'}"
