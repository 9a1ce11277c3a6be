"""How a figure is cited: caption, references and the lines that include it, for LaTeX, BibTeX, Markdown or plain text;
and the same figure in another width or format, redrawn from its record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fa import citations, plot, provenance
from fa.errors import UserError, unknown
from fa.paths import ROOT, need_repository, read_json, write_bytes
from fa.results import layout, records
from fa.results.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("text", "markdown", "latex", "bibtex")
FILES = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
"""Format of a picture -> the metadata that would depend on the clock or the version, left out."""

WIDEST = 40
"""Inches."""

SYMBOLS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\ensuremath{<}", ">": r"\ensuremath{>}",
    "|": r"\ensuremath{|}", "±": r"\ensuremath{\pm}", "°": r"\ensuremath{^\circ}", "×": r"\ensuremath{\times}",
    "λ": r"\ensuremath{\lambda}", "θ": r"\ensuremath{\theta}", "μ": r"\ensuremath{\mu}", "γ": r"\ensuremath{\gamma}",
    "η": r"\ensuremath{\eta}", "≤": r"\ensuremath{\leq}", "≥": r"\ensuremath{\geq}", "−": r"\ensuremath{-}",
    "–": "--", "∘": r"\ensuremath{\circ}", "ø": r"{\o}",
}  # fmt: skip
"""What LaTeX does not take as it is."""


def cite(name: str, format: str = "text") -> str:
    """How to cite a committed figure.

    Args:
        name: of a file in figures/, such as "p3_fig2".
        format: "text" (default): file, caption, citation and trail. "markdown": the picture with its caption. "latex":
            a figure environment with the caption escaped. "bibtex": this repository, with version and commit, and the
            paper of the figure: the entries that the latex form cites.

    Raises:
        UserError: an unknown figure or format; the sentence names the known ones. The package is no part of a clone.

    Example:
        >>> print(cite("p3_fig2", "latex").splitlines()[0])
        \\begin{figure}[tb]
    """
    path = _sidecar(name)
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    forms = {"text": _text, "markdown": _markdown, "latex": _latex, "bibtex": _bibtex}
    return forms[format](read_json(path, name=str, caption=str, cite=str, paper=str))


def draw(name: str, width: float = 0, formats: Sequence[str] = tuple(FILES), folder: Path | None = None) -> list[Path]:
    """Draw a committed figure again from its record, in another width or format; nothing is trained.

    Args:
        name: of a file in figures/, such as "p3_fig2".
        width: inches (default 0: the figure's own). Fonts keep their size. Where texts would meet, panels stand in
            fewer columns, in the order of their letters, and the figure is higher, at most a page.
        formats: of "pdf", "svg" and "png", each counted once (default: all). Text stays text in pdf and svg.
        folder: where to (default: build/figures; the files in figures/ stay as they are).

    Returns:
        paths of the files.

    Raises:
        UserError: an unknown figure or format, a width that is not between 1 and :data:`WIDEST` inches or at which
            texts of the figure meet or are cut off in any columns, or the folder cannot be written.
    """
    _sidecar(name)
    for format in formats:
        if format not in FILES:
            raise unknown("format", format, FILES)
    if width and not 1 <= width <= WIDEST:
        raise UserError(f"width={width:g} must be 1 to {WIDEST} inches; a column has about 3.5, a page about 7.2")
    fig = _drawn(name)
    if width:
        fig = _resized(fig, name, width)
    folder = folder or records.build("figures")
    paths = []
    with plot.style():
        for ending in dict.fromkeys(formats):
            fig.savefig(picture := BytesIO(), format=ending, dpi=300, metadata=FILES[ending])
            paths.append(write_bytes(folder / f"{name}.{ending}", picture.getvalue()))
    return paths


def _drawn(name: str) -> Figure:
    experiment, mode = records.figure_of(name)
    return import_module(f"fa.experiments.{experiment}").draw(Page(experiment, scale=mode if mode == "small" else ""))


def _resized(fig: Figure, name: str, width: float) -> Figure:
    """The figure in another width, or a UserError with the least one in which no text is worse off than in its own."""
    own = float(fig.get_figwidth())
    with plot.style():
        fitted, found = layout.fit(fig, width)
        if fitted:
            return fitted
        low, high = round(10 * width), round(10 * own)  # tenths of an inch: too narrow, wide enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if layout.fit(fig, middle / 10)[0] else (middle, high)
    raise UserError(
        f"{name} does not fit into {width:g} inches: {min(found)}" + (f", and {len(found) - 1} more" * (len(found) > 1))
        + f"; its least width is about {high / 10:g} inches, its own {own:g} (a page can show the file smaller)"
    )  # fmt: skip


def tex(text: str) -> str:
    """A text as LaTeX: what LaTeX would read as a command is escaped, "+/-" and transposes are formulas."""
    text = "".join(SYMBOLS.get(letter, letter) for letter in text.replace("+/-", "±"))
    return re.sub(r"\b(\w+)\\textasciicircum\{\}T\b", r"$\1^\\mathsf{T}$", text)


def _sidecar(name: str) -> Path:
    need_repository()
    path, known = ROOT / "figures" / f"{name}.json", sorted(p.stem for p in (ROOT / "figures").glob("*.json"))
    if (small := f"{name}_small") in known and name not in known:
        raise UserError(f"{name} has no figure at the paper's scale; {small} has")
    if name not in known:
        raise unknown("figure", name, known)
    return path


def _version() -> str:
    """Version and commit of this repository, in words."""
    commit = provenance.commit()
    return f"version {citations.citation()['version']}" + (f", commit {commit}" if commit else "")


def _text(figure: dict[str, Any]) -> str:
    name = figure["name"]
    head = [f"figures/{name}.pdf", figure["caption"], f"{figure['cite']} ({_version()})"]
    trail = {k: v for k, v in figure.items() if v and k not in ("name", "caption", "cite")}
    if "+" in str(figure.get("commit", "")):
        trail["a commit with +"] = "some files of fa/ differed from it when the runs were trained"
    return "\n\n".join([*head, "\n".join(f"{k:12s} {v}" for k, v in trail.items())])


def _markdown(figure: dict[str, Any]) -> str:
    name, caption = figure["name"], figure["caption"].replace("+/-", "±")
    caption = re.sub(r"([\\`*_<])", r"\\\1", caption)
    source = f"{figure['cite']} ({_version()})".replace("_", r"\_")
    return f"![{name}](figures/{name}.png)\n\n**Figure.** {caption} *Source: {source}.*"


def _latex(figure: dict[str, Any]) -> str:
    name, keys = figure["name"], [key for key, _ in _entries(figure)]
    return "\n".join([
        r"\begin{figure}[tb]",
        r"  \centering",
        rf"  \includegraphics[width=\linewidth]{{figures/{name}.pdf}}",
        rf"  \caption{{{tex(figure['caption'])} From~\cite{{{','.join(keys)}}}.}}",
        rf"  \label{{fig:{name}}}",
        r"\end{figure}",
    ])  # fmt: skip


def _bibtex(figure: dict[str, Any]) -> str:
    return "\n\n".join(entry for _, entry in _entries(figure))


def _entries(figure: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, BibTeX entry) of this repository, and of the paper that the figure is after."""
    about = citations.citation()
    own = {
        "author": " and ".join(f"{{{a['name']}}}" for a in about["authors"]),
        "title": f"{{{tex(about['title'])}}}",
        "version": about["version"],
        "year": about["date-released"][:4],
        "date": about["date-released"],
        "url": about.get("repository-code", ""),
        "note": tex(f"Figure {figure['name']}, {_version()}"),
    }
    entries = [("fa", _entry("software", "fa", own))]
    for paper in about["references"]:
        if citations.short(paper) == figure["paper"]:
            kind = "article" if paper["type"] == "article" else "inproceedings"
            key = re.sub(r"\W", "", paper["authors"][0]["family-names"].lower()) + str(paper["year"])
            arxiv = [i["value"].removeprefix("arXiv:") for i in paper.get("identifiers", []) if "arXiv" in i["value"]]
            entries.append((key, _entry(kind, key, {
                "author": " and ".join(tex(f"{a['family-names']}, {a['given-names']}") for a in paper["authors"]),
                "title": f"{{{tex(paper['title'])}}}",
                "journal": paper.get("journal", f"arXiv:{arxiv[0]}" if kind == "article" and arxiv else ""),
                "booktitle": paper.get("collection-title", ""),
                "volume": paper.get("volume", ""),
                "pages": "--".join(str(paper[k]) for k in ("start", "end") if k in paper),
                "year": paper["year"],
                "doi": paper.get("doi", ""),
                "eprint": arxiv[0] if arxiv else "",
                "archiveprefix": "arXiv" if arxiv else "",
            })))  # fmt: skip
    return entries


def _entry(kind: str, key: str, fields: dict[str, Any]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])
