"""Claims and code as they were when the runs were made.

Whoever changes a target or a criterion afterwards predicts nothing. ``fa run`` keeps the digests of a figure's claims
in the run store, ``fa collect`` puts them into the record's sidecar, together with a fingerprint of each recipe. Tests
compare both with what is there now.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fa.errors import UserError
from fa.paths import ROOT, read_json, runs_root, write_bytes
from fa.results.store import locked
from fa.train.config import Config
from fa.train.loop import fingerprint

FIXED = ("target", "tolerance", "criterion", "n_min")
"""Columns of a claim that are fixed before the run; its words may be mended."""


def digests(name: str) -> dict[str, str]:
    """Claim -> 12 hex digits of the sha256 of its fixed columns; empty where there are no claims of that name.

    Raises:
        UserError: the table of claims cannot be read.
    """
    path = ROOT / "data" / "claims" / f"{name}.csv"
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
        if [row for row in rows if None in (*row, *row.values())]:
            raise KeyError("a line has too few columns, or too many")
        fixed = {row["id"]: json.dumps([row[column] for column in FIXED]) for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise UserError(f"{path} cannot be read as a table of claims ({type(error).__name__}); restore it") from error
    return {claim: hashlib.sha256(text.encode()).hexdigest()[:12] for claim, text in fixed.items()}


def _noted(name: str) -> Path:
    return runs_root() / "claims" / f"{name}.json"


def note(name: str) -> None:
    """Keep the digests in the run store, unless they are there from an earlier call."""
    path = _noted(name)
    with locked(path.with_name("lock"), path.parent):
        if not path.exists():
            write_bytes(path, json.dumps(digests(name), indent=1).encode())


def noted(name: str) -> dict[str, str]:
    """The digests that :func:`note` kept, or those of the claims as they are."""
    path = _noted(name)
    return read_json(path) if path.exists() else digests(name)


def fingerprints(kept: Sequence[Any], new: Sequence[Any], known: dict[str, list[str]]) -> dict[str, list[str]]:
    """Run -> fingerprint, for one seed of every recipe: see :func:`fa.train.loop.fingerprint`.

    A recipe that the record holds already keeps its fingerprint, or its lack of one: made anew, it would hide that the
    code has changed since.
    """
    found = {c.run: known[c.run] for c in kept if c.run in known}
    recipes = {replace(c, seed=0) for c in kept if isinstance(c, Config)}
    for config in (c for c in new if isinstance(c, Config)):
        if (recipe := replace(config, seed=0)) not in recipes:
            recipes.add(recipe)
            found[config.run] = fingerprint(config)
    return found
