"""The object that a notebook works with: ``cfg = fa.notebook(globals(), EXPERIMENT)``.

A notebook has one cell of parameters (papermill's), and the next cell hands them over. From there every number comes
from a table that was read back from disk, whatever the mode:

======  ===================================================  ================  =====================
mode    what happens                                         table             figures
======  ===================================================  ================  =====================
record  nothing is trained (the default)                     data/records/     build/record/figures/
quick   trains in seconds, on digits unless told another     build/quick/      build/quick/figures/
small   trains what is missing, at a scale of two CPU cores  data/records/     figures/
paper   trains what is missing, at the paper's scale         data/records/     figures/
======  ===================================================  ================  =====================

Record mode shows the paper's scale where its record is complete, else the small scale where the figure has one;
``scale`` asks for one by name. In small and paper mode, parameters other than the figure's own keep table and figures
in build/MODE/, and with $FA_ADD (``fa reproduce --add``) runs that data/records/ holds are not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import citations, experiments, plot, provenance
from fa.paths import ROOT, relative
from fa.results import claims, records
from fa.results.parameters import STANDARD, check, given
from fa.results.table import FigureTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def notebook(namespace: Mapping[str, Any], experiment: str = "") -> Page:
    """Check a notebook's parameters and return its :class:`Page`.

    Args:
        namespace: the notebook's ``globals()``.
        experiment: name in ``fa.experiments.EXPERIMENTS``; empty: parameters are checked, and there is no table.

    Raises:
        UserError: a parameter that is unknown, of the wrong type or without meaning, so that papermill fails on it.

    Example:
        >>> cfg = fa.notebook(globals(), "p3_fig2")  # doctest: +SKIP
    """
    about = experiments.find(experiment) if experiment else None
    types = {**STANDARD, **{n: type(v) for n, v in about.own.items()}} if about else dict(STANDARD)
    if about and about.small:
        types["scale"] = str
    values = given(namespace, list(types))
    check(values, types)
    common = {n: values[n] for n in (*STANDARD, "scale") if n in values} | {"rules": experiments.split(values["rules"])}
    return Page(experiment, **common, own={n: values[n] for n in (about.own if about else {})})


class Page(FigureTable):
    """A :class:`fa.results.table.FigureTable` with the texts of a notebook, and the place where its figure goes."""

    def part(self, experiment: str) -> Page:
        """Another figure on the same page, in the same mode and at the same scale; its other parameters are its own
        defaults."""
        return Page(experiment, self.mode, device=self.device, scale=self.trained if self.mode == "record" else "")

    def banner(self) -> str:
        """A sentence or two: what this page shows, and whether anything was trained for it."""
        if not self.runs:
            return "Nothing is trained for this page: its figure is drawn from the code of the rules."
        rows, where, part = self.table(), relative(self.path), self.partial()
        if rows.empty:
            return (
                f"Nothing was trained, and there is no {where} yet: published values only. mode quick or paper trains."
            )
        repeats = f"{rows.seed.nunique()} {'seeds' if self.datasets else 'repeats'}"
        rules = ", ".join(plot.look(r).label for r in plot.in_order(rows.rule))
        what = f"{rows.run.nunique()} runs ({rules}; {repeats})" + (f"; PARTIAL: {part}" if part else "")
        if self.mode == "record":
            made = provenance.told(self._made[1]["environments"], "torch", "cuda", "gpu", "cpu")
            return f"Nothing was trained: this page redraws {where}, {what}" + (f", made with {made}." if made else ".")
        return f"Made here, mode {self.mode!r}: {', '.join([what, *self.datasets])}; read back from {where}."

    def compare(self, metric: str, by: Sequence[str] = ("rule",), epoch: int | None = None, digits: int = 2) -> str:
        """Text table of `metric` at `epoch` (default: the last): our mean, sd (ddof 1) and n, and the published ones.

        Args:
            metric: a metric of the table.
            by: columns that make a row, such as ``("rule", "layer")``.
            epoch: epoch in our count.
            digits: decimals.
        """
        by, parts = list(by), []
        for frame in (self.table(), self.reference()):
            frame = frame[frame.metric == metric]
            parts.append(frame[frame.epoch == (frame.epoch.max() if epoch is None else epoch)].groupby(by, sort=False))
        ours = parts[0].value.agg(["mean", "std", "count"]).set_axis(["ours", "sd", "n"], axis=1)
        theirs = parts[1][["value", "sd", "n"]].first().set_axis(["paper", "sd ", "n "], axis=1)
        both = ours.join(theirs, how="outer", sort=False).reset_index()
        if both.empty:
            return f"no {metric} yet"
        depth = list(dict.fromkeys([*self.table().sort_values("depth").layer, *self.reference().layer]))
        rank = {"rule": plot.in_order(both.rule).index, "layer": depth.index}
        both = both.sort_values(by, key=lambda column: column.map(rank.get(column.name, lambda v: v)))
        whole = {n: lambda v: "-" if pd.isna(v) else f"{v:.0f}" for n in ("n", "n ")}
        return both.to_string(index=False, float_format=f"{{:.{digits}f}}".format, na_rep="-", formatters=whole)

    def judged(self) -> str:
        """Text table of this figure's claims: target, measured, n and verdict, then how many hold."""
        table = self.verdicts()
        short = table[["id", "target", "measured", "n", "verdict"]].astype(str).map(cut)
        short["id"] = short.id.str.removeprefix(f"{self.name}_")
        return short.to_string(index=False) + "\n\n" + claims.counted(table.verdict)

    def provenance(self) -> str:
        """Text table: where the numbers come from, by file, hash, commit and machine."""
        return "\n".join(f"{k:12s} {v}" for k, v in {"mode": self.mode, **self.trail()}.items() if v)

    def trail(self) -> dict[str, Any]:
        """What leads from a figure back to its data, code and machine; nothing in it depends on the clock."""
        about, there, made = self.about, self.path.exists(), self._made[1] if self.runs else {}
        code = ROOT / "fa" / "experiments" / f"{self.experiment}.py"
        path = self.path if self.runs else code
        return {
            "paper": citations.papers().get(about.paper, ""),
            "notebook": f"notebooks/{about.notebook}.ipynb",
            "mode": self.trained if self.runs else "",
            "table" if self.runs else "code": relative(path) if there or not self.runs else "",
            "sha256": plot.sha256(path) if there or not self.runs else "",
            "shared": ", ".join(n for n in made.get("records", []) if n != self.name),
            "runs": int(self.table().run.nunique()) if self.runs else 0,
            "partial": self.partial(),
            "dataset": ", ".join(self.datasets),
            "commit": provenance.told(made.get("environments", []), "commit"),
            "machine": provenance.told(made.get("environments", []), "torch", "cuda", "gpu", "cpu"),
            "cite": citations.figure(self.name, about.paper),
        }

    def draw(self) -> None:
        """Draw the figure by the ``draw`` of its file in fa/experiments, save it under that file's caption, and say
        where it is."""
        module = import_module(f"fa.experiments.{self.experiment}")
        path = self.save(module.draw(self), module.SMALL_CAPTION if self.trained == "small" else module.CAPTION)
        print(f"{relative(path)}, .png and .json")

    def save(self, fig: Figure, caption: str) -> Path:
        """Stamp and write a figure (see `fa.plot.save`): to figures/ in small and paper mode, else to
        build/MODE/figures/.

        Returns:
            path of the PDF.
        """
        published = self.mode in ("small", "paper") and not self.chosen
        folder = ROOT / "figures" if published else records.build(self.mode) / "figures"
        words = []
        if self.mode == "quick":
            words = [", ".join(["quick mode", *self.datasets]) + ": not the paper's scale"]
            seeds = [f"{self.table().seed.nunique()} seeds"] if self.runs else []
            caption = f"Quick mode ({', '.join([*self.datasets, *seeds])}), not the paper's scale. {caption}"
        if part := self.partial():
            words.append("no run yet: published values only" if self.table().empty else f"partial: {part}")
        if words:
            plot.stamp(fig, " · ".join(words))
        return plot.save(fig, self.name, caption, folder, **self.trail())


def cut(text: str, width: int = 48) -> str:
    """A text, cut to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"
