"""The notebooks of the repository: found by name, listed with their verdicts, saved clean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fa.errors import UserError, unknown
from fa.experiments import EXPERIMENTS
from fa.paths import ROOT, read_json
from fa.plot import in_order
from fa.results import claims
from fa.results.page import Page
from fa.rules import RULES
from fa.tables import plural

THUMBNAIL = 150  # pixels that a figure in the index is wide


def find(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by file name, stem or beginning of it ("32"); all of them without names.

    Raises:
        UserError: a name that fits none, or one letter that fits several; the message lists the notebooks.
    """
    there = sorted((ROOT / "notebooks").glob("*.ipynb"))
    found: list[Path] = []
    for name in names:
        fits = [p for p in there if p.stem == Path(name).stem] or [p for p in there if name and p.stem.startswith(name)]
        if not fits:
            raise unknown("notebook", name, [p.stem for p in there])
        if len(name) == 1 < len(fits):
            stems = ", ".join(p.stem for p in fits)
            raise UserError(f"{name!r} is the beginning of {len(fits)} notebooks, {stems}; give the numbers of some")
        found += fits
    return list(dict.fromkeys(found)) if names else there


def before_saving(model: dict[str, Any], **_: object) -> None:
    """Jupyter's hook before it saves: takes the Python version out of a notebook, so that opening a committed one
    leaves it as it is in git."""
    if model["type"] == "notebook":
        model["content"]["metadata"].get("language_info", {}).pop("version", None)


def index() -> str:
    """Markdown table of the notebooks: their figures in small, title, runs in the record, verdicts on the claims."""
    lines = ["| | notebook | shows | record | claims |", "|---|---|---|---|---|"]
    for path in find():
        title = "".join(read_json(path, cells=list)["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        held, verdicts, pictures = [], [], []
        for name, about in EXPERIMENTS.items():
            if about.notebook != path.stem:
                continue
            made = [n for n in (name, f"{name}_small") if (ROOT / "figures" / f"{n}.png").exists()]
            size = f'width="{THUMBNAIL}" style="min-width: {THUMBNAIL}px"'  # else a table makes it as small as it can
            pictures += [f'<img src="../figures/{n}.png" {size} alt="{n}">' for n in made[:1]]
            if not about.grid:
                continue
            for scale in ("small", "paper") if about.small else ("paper",):
                page = Page(name, scale=scale)
                runs = plural(page.table().run.nunique(), "run") if len(page.table()) else ""
                which = f"{scale}: " if about.small else ""
                part = page.partial()  # it may tell the number of runs, too
                held.append(which + ", ".join(filter(None, ["" if part.endswith("runs") else runs, part])))
                verdicts.append(which + claims.counted(page.verdicts().verdict))
        cells = [f"[{name}]({path.name})" for name in (*pictures[:1], path.stem)]
        cells = ["", *cells][-2:] + [title, "; ".join(held), "; ".join(verdicts)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rules() -> str:
    """Markdown table of `fa.RULES`: name, the name in full (what the docstring begins with), equation, source."""
    lines = ["| name | in full | rule | from |", "|---|---|---|---|"]
    for name in in_order(RULES):
        equation = RULES[name].equation.replace("|", r"\|")  # a bar ends a cell, in code too
        full = re.split(r"[:.(]", RULES[name].__doc__ or "", maxsplit=1)[0]
        lines.append(f"| `{name}` | {full} | `{equation}` | {RULES[name].source} |")
    return "\n".join(lines)
