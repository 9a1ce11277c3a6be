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
``scale`` asks for one by name. Parameters other than the figure's own give table and figure a name of their own, such
as p3_fig2__seeds=2, in build/MODE/. With FA_ADD=1 (``fa reproduce --add``) runs that data/records/ holds are not
trained again in small and paper mode. Tables and texts are :class:`fa.tables.Shown`: print makes text of them, and at
the end of a cell they are rendered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import citations, experiments, plot, provenance, tables
from fa.errors import unknown
from fa.paths import ROOT, need_repository, relative
from fa.results import claims, records
from fa.results.live import Picture
from fa.results.markdown import labelled
from fa.results.parameters import STANDARD, check, given
from fa.results.progress import clock
from fa.results.table import FigureTable
from fa.tables import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OF_FEEDBACK = {"angle_deg": "angle", "norm_ratio": "norm ratio", "sign_concordance": "sign concordance"}

SHOWN_DPI = 136  # pixels of the page an inch of the figure is wide; the picture itself has 300, for sharp screens


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
    need_repository()
    about = experiments.find(experiment) if experiment else None
    types = {**STANDARD, **{n: type(v) for n, v in about.own.items()}} if about else dict(STANDARD)
    if about and about.small:
        types["scale"] = str
    values = given(namespace, list(types))
    check(values, types)
    return page_of(experiment, values)


def page_of(experiment: str, values: Mapping[str, Any]) -> Page:
    """The page of a figure with parameters that are checked; those that its mode cannot have are found when its
    ``runs`` are asked for."""
    own = experiments.find(experiment).own if experiment else {}
    common = {n: values[n] for n in (*STANDARD, "scale") if n in values} | {"rules": experiments.split(values["rules"])}
    return Page(experiment, **common, own={n: values[n] for n in own})


class Page(FigureTable):
    """A :class:`fa.results.table.FigureTable` with the texts of a notebook, and the place where its figure goes."""

    def part(self, experiment: str) -> Page:
        """Another figure on the same page, in the same mode and at the same scale; its other parameters are its own
        defaults."""
        return Page(experiment, self.mode, device=self.device, scale=self.trained if self.mode == "record" else "")

    def banner(self) -> Shown:
        """A sentence or two: what this page shows, and whether anything was trained for it."""
        return tables.several(self._banner())

    def _banner(self) -> str:
        if not self.runs:
            return "Nothing is trained for this page: its figure is drawn from the code of the rules."
        rows, where, part = self.table(), relative(self.path), self.partial()
        if rows.empty:
            shown = ": published values only" if len(self.reference()) else ""
            return f"Nothing was trained, and there is no {where} yet{shown}. To train: {self.about.remedy}."
        repeats = tables.plural(rows.seed.nunique(), "seed" if self.datasets else "repeat")
        rules = ", ".join(map(self.about.named, plot.in_order(rows.rule)))
        what = f"{tables.plural(rows.run.nunique(), 'run')} ({rules}; {repeats})"
        what += f"; PARTIAL: {part}" if part else ""
        what += f"; {ended}" if (ended := self.diverged()) else ""
        if self.mode == "record":
            made = provenance.told(self._made[1]["environments"], "torch", "cuda", "gpu", "cpu")
            *others, last = (relative(records.record_path(name)) for name in self._made[1]["records"])
            where = f"{', '.join(others)} and {last}" if others else last
            return f"Nothing was trained: this page redraws {where}, {what}" + (f", made with {made}." if made else ".")
        return f"Made here, mode {self.mode!r}: {', '.join([what, *self.datasets])}; read back from {where}."

    def compare(self, metric: str, by: Sequence[str] = ("rule",), epoch: int | None = None, digits: int = 2) -> str:
        """Table of `metric` at `epoch` (default: the last): our mean, sd (ddof 1) and n, and the published ones.

        Args:
            metric: a metric of the table.
            by: columns that make a row, such as ``("rule", "layer")``.
            epoch: epoch in our count.
            digits: decimals.

        Raises:
            UserError: neither table has such a metric or column; the sentence names the known ones.
        """
        by, parts, columns = list(by), [], list(dict.fromkeys([*self.table(), *self.reference()]))
        for column in by:
            if column not in columns:
                raise unknown("column", column, columns)
        for frame in (self.table(), self.reference()):
            frame = frame[frame.metric == metric]
            frame = frame.reindex(columns=list(dict.fromkeys([*frame, *by])))  # no published value has a swept column
            parts.append(frame[frame.epoch == (frame.epoch.max() if epoch is None else epoch)].groupby(by, sort=False))
        ours = parts[0].value.agg(["mean", "std", "count"]).set_axis(["ours", "sd", "n"], axis=1)
        theirs = parts[1][["value", "sd", "n"]].first().set_axis(["paper", "sd ", "n "], axis=1)
        both = ours.join(theirs, how="outer", sort=False).reset_index()
        if both.empty:
            return tables.several(self._no(metric, epoch))
        if "variant" in both:
            both["variant"] = [self.about.labels.get(v, v) for v in both.variant]
        depth = list(dict.fromkeys([*self.table().sort_values("depth").layer, *self.reference().layer]))
        rank = {"layer": depth.index} | ({"rule": plot.in_order(both.rule).index} if "rule" in by else {})
        both = both.sort_values(by, key=lambda column: column.map(rank.get(column.name, lambda v: v)))
        whole = {n: lambda v: "-" if pd.isna(v) else f"{v:.0f}" for n in ("n", "n ")}
        form = f"{{:.{digits}f}}".format
        return tables.shown(both, index=False, float_format=form, na_rep="-", formatters=whole)

    def _no(self, metric: str, epoch: int | None) -> str:
        """Why neither table has this metric there."""
        known = sorted({*self.table().metric, *self.reference().metric})
        if metric in known:
            return f"no {metric}" + ("" if epoch is None else f" at epoch {epoch}")
        if metric in _OF_FEEDBACK and {c.rule for c in self.runs} == {"bp"}:
            return f"BP has no feedback, so no {_OF_FEEDBACK[metric]}"
        if known and metric not in plot.LABELS:
            raise unknown("metric", metric, known)
        return f"no {metric} {'in these runs' if len(self.table()) else 'yet'}"

    def judged(self) -> Shown:
        """Table of this figure's claims: target, measured, n and verdict, then how many hold.

        Rendered it has each claim's sentence, the reason of a verdict, and those that fail first; the criterion shows
        when the pointer rests on the claim.
        """
        table = self.verdicts()
        short = table[["id", "target", "measured", "n", "verdict"]].astype(str).map(cut)
        short["id"] = short.id.str.removeprefix(f"{self.name}_")
        counted = claims.counted(table.verdict)
        if self.mode == "record" and self.chosen:
            counted += "; the verdicts are about the whole record"
        html = f"<p>{counted}</p>\n{_verdicts(table, self.about)}"
        return tables.Shown(f"{short.to_string(index=False)}\n\n{counted}", html)

    def provenance(self) -> Shown:
        """Table: where the numbers come from, by file, hash, commit and machine; then :meth:`conclusion`."""
        told = {k: str(v) for k, v in {"mode": self.mode, **self.trail()}.items() if v}
        if self.parameters:
            told["parameters"] = ", ".join(f"{n}={v}" for n, v in self.parameters.items())
        html = tables.shown(pd.Series(told, dtype=str).to_frame(), header=False).html
        return tables.several(tables.Shown("\n".join(f"{k:12s} {v}" for k, v in told.items()), html), self.conclusion())

    def conclusion(self) -> str:
        """The page in one line: whether its claims hold, our values and the published ones, n, time and machine."""
        if not self.runs:
            return ""
        verdicts, made, table = self.verdicts().verdict, self._made[1], self.table()
        tested, other = verdicts[verdicts != "not tested"], verdicts[verdicts != "holds"]
        if tested.empty:
            said = [f"Not {'attempted' if table.empty else 'tested'}: no claim is tested"]
        else:
            part = "Does not reproduce" if tested.eq("fails").all() else "Partly reproduces"
            words = "Reproduces" if tested.eq("holds").all() else part
            said = [f"{words}: {len(verdicts) - len(other)} of {len(verdicts)} claims hold"]
            said[0] += f" ({claims.counted(other)})" if len(other) else ""
        said += [text] if (text := self._beside()) else []
        if "wall_seconds" in made and not table.empty:
            machine = provenance.told(made["environments"], "gpu", "cpu")
            made_in = "its runs took" if self.datasets else "computed in"
            said.append(f"n = {table.seed.nunique()}; {made_in} {clock(made['wall_seconds'])} in sum on {machine}")
        return ". ".join(said) + "."

    def _beside(self) -> str:
        """Our last accuracies, mean over seeds, and the published ones in brackets; "" of a sweep over numbers."""
        table, reference, swept = self.table(), self.reference(), self.about.swept(self.runs[0])
        known = [m for m in plot.LABELS if "accuracy" in m and m in set(table.metric)]
        metric = next((m for m in known if len(reference) and m in set(reference.metric)), next(iter(known), ""))
        by = "variant" if "variant" in swept else "rule"
        if not metric or set(swept) - {by}:
            return ""

        def last(frame: pd.DataFrame) -> pd.Series:
            rows = frame[frame.metric == metric]
            return rows[rows.epoch == rows.groupby(by).epoch.transform("max")].groupby(by).value.mean()

        ours, theirs = last(table), last(reference) if len(reference) else pd.Series(dtype=float)
        names = plot.in_order(ours.index) if by == "rule" else ours.sort_values(ascending=False).index
        labels = {n: plot.look(n).label for n in names} | self.about.labels
        values = [f"{labels[n]} {ours[n]:.2f}" + (f" ({theirs[n]:.2f})" if n in theirs else "") for n in names]
        published = ", ours (published)" if len(theirs) else ""
        name = plot.LABELS[metric] + ("" if metric.startswith("chosen") else ", last epoch")
        return f"{name}{published}: {'; '.join(values)}"

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
            **({"parameters": self.parameters} if self.parameters else {}),
            **({"seeds": int(self.table().seed.nunique())} if self.runs and self.mode == "quick" else {}),
        }

    def draw(self) -> None:
        """Draw the figure by the ``draw`` of its file in fa/experiments, save it under that file's caption, and show
        picture, caption and where the files are."""
        module = import_module(f"fa.experiments.{self.experiment}")
        fig = module.draw(self)
        _show(self.save(fig, module.SMALL_CAPTION if self.trained == "small" else module.CAPTION), fig)

    def save(self, fig: Figure, caption: str) -> Path:
        """Stamp and write a figure (see `fa.plot.save`): to figures/ in small and paper mode, else to
        build/MODE/figures/.

        Returns:
            path of the PDF.
        """
        published = self.mode in ("small", "paper") and not self.chosen
        folder = ROOT / "figures" if published else records.build(self.mode) / "figures"
        words = []
        given = [f"{n}={v}" for n, v in self.parameters.items() if n not in ("seeds", "dataset")]
        if self.mode == "quick":
            words = [", ".join(["quick mode", *self.datasets]) + ": not the paper's scale"]
            n = self.table().seed.nunique() if self.runs else 0
            told = [*self.datasets, *[tables.plural(n, "seed")] * bool(n), *given]
            caption = f"Quick mode ({', '.join(told)}), without the paper's values. At the paper's scale: {caption}"
        elif self.parameters:
            caption = f"With {', '.join(f'{n}={v}' for n, v in self.parameters.items())}. {caption}"
        if part := self.partial():
            only = "no run yet" + (": published values only" if len(self.reference()) else "")
            words.append(only if self.table().empty else f"partial: {part}")
        if self.runs and (ended := self.diverged()):
            words.append(ended)
        if words:
            plot.stamp(fig, " · ".join(words))
        return plot.save(fig, self.own_name, caption, folder, **self.trail())


def _show(path: Path, fig: Figure) -> None:
    """Close a figure that was saved, and show its file in a notebook, sharp on every screen, with caption, alternative
    text and the names of its files. Elsewhere the names are printed."""
    import matplotlib.pyplot as plt

    plt.close(fig)
    files = f"{relative(path)}, .png and .json"
    if "ipykernel" not in sys.modules:
        print(files)
        return
    from IPython.display import HTML, display

    caption = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["caption"]
    width = round(fig.get_figwidth() * SHOWN_DPI)
    display(Picture(path.with_suffix(".png").read_bytes(), width, caption))
    display(HTML(f"<p>{escape(caption).replace('+/-', '±')}</p>\n<p><code>{escape(files)}</code></p>"))


COLORS = {"fails": "#d0342c", "partly": "#c77700", "holds": "#2e8b57", "not tested": "#808080"}
"""Of verdicts, in the order of the rendered table."""


def _verdicts(table: pd.DataFrame, about: experiments.Experiment) -> str:
    """The verdicts as an HTML table, those that fail first."""
    left = 'style="text-align: left"'
    rows = ["<tr>" + "".join(f"<th {left}>{c}</th>" for c in ("claim", "target", "ours", "n", "verdict")) + "</tr>"]
    for row in table.sort_values("verdict", key=lambda v: v.map(list(COLORS).index), kind="stable").itertuples():
        pairs = zip(row.measured.split("; "), row.sd.split("; "))
        ours = "; ".join(m if sd in ("", "nan") else f"{m} ± {sd}" for m, sd in pairs)
        verdict = f'<b style="color:{COLORS[row.verdict]}">{row.verdict}</b>'
        why = f"<br><small>{escape(labelled(row.why, about))}</small>" if row.why else ""
        claim = f'<span title="{escape(row.criterion)}">{escape(row.claim)}</span>'
        cells = [claim, escape(row.target), escape(labelled(ours, about)), row.n, verdict + why]
        rows.append("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def cut(text: str, width: int = 48) -> str:
    """A text, cut to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"
