"""The parameters of a notebook: which there are, and which values they may have."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fa import experiments
from fa.errors import UserError, unknown
from fa.results.executors import pick_device

STANDARD: dict[str, type] = {"mode": str, "seeds": int, "epochs": int, "rules": str, "dataset": str, "device": str}
"""The parameters that every notebook has, and their types."""


def check(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Refuse parameters that are unknown, missing, of the wrong type, or have a value that nothing here knows.

    Raises:
        UserError: names the parameter and what is known.
    """
    for name in values:
        if name not in types:
            raise unknown("parameter", name, types)
    for name, kind in types.items():
        if name not in values:
            raise UserError(f"parameter {name!r} is missing from the cell tagged 'parameters'")
        if type(values[name]) is not kind and not (kind is float and type(values[name]) is int):
            raise UserError(f"parameter {name!r} must be of type {kind.__name__}, not {values[name]!r}")
    if values["mode"] not in (modes := ("record", *experiments.MODES)):
        raise unknown("mode", values["mode"], modes)
    if values.get("scale", "") not in ("", "small", "paper"):
        raise unknown("scale", values["scale"], ("small", "paper"), more=", or empty for the largest complete record")
    experiments.check(values["rules"], values["dataset"], values["seeds"], values["epochs"])
    pick_device(values["device"], needed=values["mode"] != "record")


def given(namespace: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The parameters in a notebook's globals.

    In a kernel these are the names that the latest parameters cell assigns, and papermill's own cell after it (it
    starts with "# Parameters"), as the kernel's input history tells. So a misspelled name is seen, and names of later
    cells do not matter when a reader runs the cell again. Where a session has a history without such a cell (a
    notebook that IPython's ``%run`` executes leaves none), only ``known`` names count; without any history every plain
    scalar does.
    """
    cells = [c for c in namespace.get("In", []) if isinstance(c, str)]
    cells = cells[max([i for i, c in enumerate(cells) if re.search(r"(?m)^%run\b.*\.ipynb\b", c)], default=0) :]
    injected = [c.startswith("# Parameters") for c in cells]
    own = [i for i, c in enumerate(cells) if not injected[i] and {"mode", "seeds"} <= set(_assigned(c))]
    if own:
        after = [i for i in range(own[-1], len(cells)) if injected[i]][-1:]
        names = [n for i in [own[-1], *after] for n in _assigned(cells[i])]
    elif cells:
        names = []
    else:
        names = [n for n, v in namespace.items() if type(v) in (int, float, bool, str) and not n.startswith("_")]
    return {n: namespace[n] for n in dict.fromkeys([*names, *known]) if n in namespace}


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns at its top level; none if it is not Python, lines for IPython or a shell aside."""
    source = re.sub(r"(?m)^(\w+ *=) *[%!].*$", r"\1 0", source)  # files = !ls
    try:
        body = ast.parse(re.sub(r"(?m)^[%!?].*$|^[\w.]+\?+$", "", source)).body
    except SyntaxError:
        return []
    targets = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
    targets += [s.target for s in body if isinstance(s, ast.AnnAssign)]
    flat = [t for target in targets for t in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])]
    return [t.id for t in flat if isinstance(t, ast.Name)]
