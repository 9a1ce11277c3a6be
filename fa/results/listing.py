"""What ``fa list`` prints, without an import of torch: the plans of all figures are kept in the build folder, with a
digest of the code that made them."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fa.errors import UserError
from fa.paths import ROOT, read_json, runs_root, user_folder, write_bytes

PACKAGE = Path(__file__).parents[1]


def lines() -> list[tuple[str, ...]]:
    """A head, and a line a figure: name, notebook, and how many of its runs are in the record and in the run store.

    Raises:
        UserError: the sidecar of a record is damaged.
    """
    sidecars = sorted((ROOT / "data" / "records").glob("*.json"))
    held = {run for path in sidecars for run in read_json(path, configs=dict)["configs"]}
    found: list[tuple[str, ...]] = [("figure", "notebook", "record", "run store", "title")]
    store = runs_root()
    for name, figure in plans().items():
        in_record, in_store = [], []
        for mode, runs in figure["runs"].items():
            if mode != "quick":
                in_record.append(f"{mode} {sum(run in held for run in runs)}/{len(runs)}")
            in_store.append(f"{mode} {sum((store / run / 'status.json').exists() for run in runs)}/{len(runs)}")
        found.append((name, figure["notebook"], ", ".join(in_record), ", ".join(in_store), figure["title"]))
    return found


def plans() -> dict[str, dict[str, Any]]:
    """Figure -> ``title``, ``notebook`` and ``runs``, mode -> names of runs; in the order of the notebooks. Made anew
    where the code is another than that of the plans that were kept."""
    kept, code = user_folder("FA_BUILD", "build") / "plans.json", _digest()
    with suppress(UserError):  # there are none yet, or they are damaged
        if (found := read_json(kept, code=str, figures=dict))["code"] == code:
            return found["figures"]
    from fa import experiments

    figures = {}
    for name, e in experiments.EXPERIMENTS.items():
        modes = ("paper", "small", "quick") if e.small else ("paper", "quick")
        runs = {mode: [c.run for c in experiments.plan(name, mode)] for mode in modes}
        figures[name] = {"title": e.title, "notebook": e.notebook, "runs": {m: r for m, r in runs.items() if r}}
    with suppress(UserError):  # a folder that cannot be written only makes the next call slower
        write_bytes(kept, json.dumps({"code": code, "figures": figures}).encode())
    return figures


def _digest() -> str:
    """Of the package's code: its files' names and contents."""
    files = sorted(PACKAGE.rglob("*.py"))
    return hashlib.sha256(b"".join(str(p.relative_to(PACKAGE)).encode() + p.read_bytes() for p in files)).hexdigest()
