"""The repository and the papers as one cites them, from ``CITATION.cff``, the only place that has them. A leaf."""

from __future__ import annotations

from functools import cache
from typing import Any

from fa.errors import UserError
from fa.paths import ROOT


@cache
def citation() -> dict[str, Any]:
    """``CITATION.cff`` as a dictionary.

    Raises:
        UserError: it cannot be read, or lacks what a citation needs.
    """
    import yaml

    path, needed = ROOT / "CITATION.cff", {"title", "version", "date-released", "authors", "references"}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); restore it") from error
    if not isinstance(found, dict) or (missing := needed - found.keys()):
        raise UserError(f"{path} lacks {min(missing) if isinstance(found, dict) else 'every entry'}; restore it")
    return found


def papers() -> dict[str, str]:
    """Abbreviation to short citation: "p1", "p2", "p3" for the replicated papers, else the label of a rule."""
    return {r["abbreviation"]: short(r) for r in citation()["references"]}


def figure(name: str, paper: str) -> str:
    """How to cite a figure, and the paper that it is after ("p1", "p2", "p3"), if it is after one."""
    known = papers()
    return f"{citation()['title']}, figure {name}" + (f"; after {known[paper]}" if paper in known else "")


def short(reference: dict[str, Any]) -> str:
    """A reference in a line, e.g. "Li & Benna (2024). Deep Learning without Weight Symmetry. arXiv:2405.20594"."""
    *first, last = [author["family-names"] for author in reference["authors"]]
    names = f"{', '.join(first)} & {last}" if first else last
    where = [i["value"] for i in reference.get("identifiers", [])] or [_venue(reference)]
    end = "" if reference["title"].endswith("?") else "."
    return f"{names} ({reference['year']}). {reference['title']}{end} {where[0]}"


def full(reference: dict[str, Any]) -> str:
    """A reference with the authors' given names, venue, identifier and notes, for a list of references."""
    names = "; ".join(f"{a['family-names']}, {a['given-names']}" for a in reference["authors"])
    end = "" if reference["title"].endswith("?") else "."
    where = [_venue(reference), *(i["value"] for i in reference.get("identifiers", [])), reference.get("notes", "")]
    return f"{names} ({reference['year']}). {reference['title']}{end} " + " ".join(
        f"{w.rstrip('.')}." for w in where if w
    )


def _venue(reference: dict[str, Any]) -> str:
    """Journal and volume, or proceedings; "" for a preprint."""
    name = reference.get("journal") or reference.get("collection-title", "")
    pages = "-".join(str(reference[k]) for k in ("start", "end") if k in reference)
    return ", ".join(str(part) for part in (name, reference.get("volume"), pages) if part)
