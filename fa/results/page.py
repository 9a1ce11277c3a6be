"""What a notebook calls first, ``fa.notebook(globals(), EXPERIMENT)``, and what runs notebooks in batch, `reproduce`.

A notebook has one cell of parameters (papermill's), and the next cell hands them over. From there every number comes from a
table that was read back from disk, whatever the mode:

======  ================================================  ================  =====================
mode    what happens                                      table             figures
======  ================================================  ================  =====================
record  nothing is trained (the default)                  data/records/     build/record/figures/
quick   trains in seconds, on digits unless told another  build/quick/      build/quick/figures/
paper   trains what is missing, at the paper's scale      data/records/     figures/
======  ================================================  ================  =====================

In paper mode, parameters other than the figure's own keep table and figures in build/paper/, and with $FA_ADD (``fa reproduce --add``)
runs that data/records/ holds are not trained again.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa.errors import UserError
from fa.paths import ROOT
from fa.results.records import build

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("record", "quick", "paper")
STANDARD: dict[str, type] = {"mode": str, "seeds": int, "epochs": int, "rules": str, "dataset": str, "device": str}
"""The parameters that every notebook has, and their types."""

PAPERS = {
    "p1": "Moskovitz, Litwin-Kumar & Abbott (2018). Feedback alignment in deep convolutional networks. arXiv:1812.06488",
    "p2": "Kunin, Nayebi, Sagastuy-Brena, Ganguli, Bloom & Yamins (2020). Two routes to scalable credit assignment without "
          "weight symmetry. arXiv:2003.01513",
    "p3": "Li & Benna (2024). Deep learning without weight symmetry. arXiv:2405.20594",
}  # fmt: skip
"""The papers that are replicated, as one cites them. A page of paper "x" goes across them and is after none."""

DRAWN = {"p3_fig1": ("31_pfa_fig1_circuits", "fa/experiments/p3_fig1.py")}
"""Figures without runs and table: name to notebook, and to the code that they are drawn from."""


# ------------------------------------------------------------------------------------------------------- parameters


def check(values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Refuse parameters that are unknown, missing, of the wrong type, or have a value that nothing here knows.

    Raises:
        UserError: names the parameter and what is known.
    """
    from fa.rules import RULES
    from fa.train.data import SETS

    for name in values:
        if name not in types:
            raise UserError(f"unknown parameter {name!r}; known: {', '.join(types)}")
    for name, kind in types.items():
        if name not in values:
            raise UserError(f"parameter {name!r} is missing from the cell tagged 'parameters'")
        if type(values[name]) is not kind and not (kind is float and type(values[name]) is int):
            raise UserError(f"parameter {name!r} must be of type {kind.__name__}, not {values[name]!r}")
    if values["mode"] not in MODES:
        raise UserError(f"unknown mode {values['mode']!r}; known: {', '.join(MODES)}")
    for name in ("seeds", "epochs"):
        if values[name] < 0:
            raise UserError(f"parameter {name!r} must be 0 (the mode's own) or more, not {values[name]}")
    for rule in split(values["rules"]):
        if rule not in RULES:
            raise UserError(f"unknown rule {rule!r}; known: {', '.join(sorted(RULES))}")
    if values["dataset"] and values["dataset"] not in SETS:
        raise UserError(f"unknown dataset {values['dataset']!r}; known: {', '.join(SETS)}")


def split(rules: str) -> list[str]:
    """Rule names of a comma-separated list."""
    return [r.strip() for r in rules.split(",") if r.strip()]


def _given(namespace: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The parameters in a notebook's globals.

    In a kernel these are the names that the latest parameters cell assigns, and papermill's own cell after it (it starts with
    "# Parameters"), as the kernel's input history tells. So a misspelled name is seen, and names of later cells do not matter
    when a reader runs the cell again. Without a history, every plain scalar of the namespace counts.
    """
    cells = [c for c in namespace.get("In", []) if isinstance(c, str)]
    injected = [c.startswith("# Parameters") for c in cells]
    own = [i for i, c in enumerate(cells) if not injected[i] and {"mode", "seeds"} <= set(_assigned(c))]
    if own:
        after = [i for i in range(own[-1], len(cells)) if injected[i]][-1:]
        names = [n for i in [own[-1], *after] for n in _assigned(cells[i])]
    else:
        names = [n for n, v in namespace.items() if type(v) in (int, float, bool, str) and not n.startswith("_")]
    return {n: namespace[n] for n in dict.fromkeys([*names, *known]) if n in namespace}


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns at its top level; none if it is not plain Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    targets = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
    targets += [s.target for s in body if isinstance(s, ast.AnnAssign)]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def notebook(namespace: Mapping[str, Any], experiment: str = "") -> Notebook:
    """Check a notebook's parameters and return its `Notebook`.

    Args:
        namespace: the notebook's ``globals()``.
        experiment: name in ``fa.experiments.EXPERIMENTS``; empty: parameters are checked, and there is no table.
    Raises:
        UserError: a parameter that is unknown, of the wrong type or without meaning, so that papermill fails on it.
    Example:
        >>> cfg = fa.notebook(globals(), "p3_fig2")  # doctest: +SKIP
    """
    from fa.experiments import find as experiment_of

    own = experiment_of(experiment).own if experiment else {}
    types = {**STANDARD, **{n: type(v) for n, v in own.items()}}
    values = _given(namespace, list(types))
    check(values, types)
    standard = {n: values[n] for n in STANDARD} | {"rules": split(values["rules"])}
    return Notebook(experiment, **standard, own={n: values[n] for n in own})


# --------------------------------------------------------------------------------------------------------- notebook


@dataclass
class Notebook:
    """One figure in one mode: its table, the published values, its verdicts, and where its files go.

    Args:
        experiment: name of experiment, figure, record and claim prefix alike.
        mode: "record", "quick" or "paper".
        seeds: number of seeds; 0: the mode's own.
        epochs: number of epochs; 0: the mode's own.
        rules: names of rules; empty: the figure's.
        dataset: name of a data set; empty: the mode's own.
        device: "auto", "cpu" or "cuda".
        own: the experiment's own parameters; what is left out has its default.
    """

    experiment: str
    mode: str = "record"
    seeds: int = 0
    epochs: int = 0
    rules: list[str] = field(default_factory=list)
    dataset: str = ""
    device: str = "auto"
    own: dict[str, Any] = field(default_factory=dict)

    def part(self, experiment: str, **parameters: Any) -> Notebook:
        """Another experiment on the same page, its parameters checked as the page's are.

        Args:
            experiment: its name.
            parameters: by name. Defaults: mode and device are the page's; all others are the experiment's own, as the
                page's belong to its own experiment (a rule or a seed that one has, the other may lack).
        Raises:
            UserError: as `notebook` does.
        """
        from fa.experiments import find as experiment_of

        values = {name: kind() for name, kind in STANDARD.items()} | {"mode": self.mode, "device": self.device}
        return notebook(values | experiment_of(experiment).own | parameters, experiment)

    # ------------------------------------------------------------------------------------------------- runs and table

    @property
    def _changed(self) -> bool:
        """Whether this is another experiment than the paper's, and not only a part of it."""
        from fa.experiments import find as experiment_of

        default = experiment_of(self.experiment).own if self.experiment else {}
        return bool(self.epochs or self.dataset) or any(default[n] != v for n, v in self.own.items())

    @property
    def chosen(self) -> bool:
        """Whether the reader asked for anything but the figure as it is published."""
        return bool(self.seeds or self.rules) or self._changed

    @cached_property
    def runs(self) -> list[Any]:
        """The runs of this figure under these parameters."""
        from fa.experiments import plan

        mode, rules = "quick" if self.mode == "quick" else "paper", ",".join(self.rules)
        return plan(self.experiment, mode, self.seeds, self.epochs, rules, self.dataset, **self.own)

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets of these runs; none for an experiment without data."""
        return sorted({c.dataset for c in self.runs if hasattr(c, "dataset")})

    @property
    def path(self) -> Path:
        """The table on disk."""
        from fa.results import records

        if self.mode == "paper" and self.chosen:
            return build("paper") / f"{self.experiment}.csv"
        return records.record_path(self.experiment, self.mode)

    def table(self) -> pd.DataFrame:
        """The figure's table, read back from disk; `quick` and `paper` first train what is missing.

        In `record` mode a figure of which no run is there yet has an empty table, so that the notebook goes on and shows the
        published values alone.

        Raises:
            UserError: in `record` mode, a rule, seed, number of epochs or data set that the committed table does not hold.
        """
        return self._table

    @cached_property
    def _table(self) -> pd.DataFrame:
        from fa.results import records

        if self.mode != "record":
            return self._train()
        table = records.read(self.experiment) if self.path.exists() else self._nothing()
        if not self.chosen:
            return table
        rows, there = table[table.run.isin([c.run for c in self.runs])], set(table.run)
        planned = {c.run for c in Notebook(self.experiment).runs}
        for config in self.runs:  # one that is planned and not there yet makes the table partial; any other is refused
            if config.run not in there and (config.run not in planned or there and rows.empty):
                raise UserError(f"{_describe(config)} is not in {relative(self.path)}; set mode='quick' or 'paper'")
        return rows.reset_index(drop=True)

    def _nothing(self) -> pd.DataFrame:
        """A table of no rows, with the columns that the record will have."""
        from fa.experiments import find as experiment_of
        from fa.results import records

        beside = [*records.COLUMNS, *records.REFERENCE_COLUMNS]
        swept = [
            *records.reference(self.experiment).columns.difference(beside, sort=False),
            *experiment_of(self.experiment).swept(self.runs[0]),
        ]
        dtypes = dict.fromkeys([*records.COLUMNS, *swept], float) | dict.fromkeys(
            ("run", "rule", "layer", "metric"), str
        )
        return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in dtypes.items()})

    def _train(self) -> pd.DataFrame:
        """Train what is missing, write the table, and read it back."""
        from fa.experiments import find as experiment_of
        from fa.results import records
        from fa.results import runs as campaign
        from fa.rules import RULES

        own_rule = [c for c in self.runs if RULES[c.rule].__module__ == "__main__"]  # which no other process would know
        for config in (
            own_rule if self.mode == "quick" else ()
        ):  # its code is no part of a run's identity, and may have changed
            shutil.rmtree(records.Folder(self.mode, config).path, ignore_errors=True)
        add = os.environ.get("FA_ADD") and self.mode == "paper" and not self.chosen
        held = campaign.recorded(self.mode) if add else ()
        summary = campaign.run(self.runs, self.mode, workers=1 if own_rule else "auto", device=self.device, held=held)
        if summary.failed:
            raise RuntimeError(f"{len(summary.failed)} of {len(self.runs)} runs failed, the first: {summary.failed[0]}")
        if self.mode == "quick" or not self.chosen:
            campaign.collect(self.experiment, self.mode, self.runs, partial=True)
            return records.read(self.experiment, self.mode)
        swept = experiment_of(self.experiment).swept
        finished = [f.table(swept(f.config)) for f in (records.Folder(self.mode, c) for c in self.runs) if f.finished]
        records.write_bytes(self.path, pd.concat(finished).to_csv(index=False, lineterminator="\n").encode())
        empty = {"depth": [""], "value": [""]}
        return pd.read_csv(self.path, keep_default_na=False, na_values=empty, dtype={"run": str})

    def partial(self) -> str:
        """What the table lacks, in words ("without DFA, 2 of 5 seeds, 60 of 250 epochs"); empty when it is whole."""
        from fa.plot import in_order, look

        table, said = self.table(), []
        if table.empty:
            return "no run yet"
        planned, reached = {c.run: c for c in self.runs}, table.groupby("run").epoch.max()
        absent = {c.rule for c in self.runs} - set(table.rule)
        there = [c for c in self.runs if c.rule not in absent]
        if absent:
            said.append(f"without {', '.join(look(r).label for r in in_order(absent))}")
        if all(hasattr(c, "seed") for c in there):
            of = {rule: len({c.seed for c in there if c.rule == rule}) for rule in {c.rule for c in there}}
            have = {rule: table[table.rule == rule].seed.nunique() for rule in of}
            worst = min(of, key=lambda rule: have[rule] / of[rule])
            said += [f"{have[worst]} of {of[worst]} seeds"] if have[worst] < of[worst] else []
        if "seeds" not in "".join(said) and not {c.run for c in there} <= set(reached.index):  # e.g. points of a sweep
            said.append(f"{len(reached)} of {len(planned)} runs")
        if short := {
            c.run: reached[c.run] for c in there if c.run in reached and reached[c.run] < getattr(c, "epochs", 0)
        }:
            run = min(short, key=short.__getitem__)
            said.append(f"{short[run]:.0f} of {planned[run].epochs} epochs")
        return ", ".join(said)

    def reference(self) -> pd.DataFrame:
        """The published values, from data/reference/; none where these runs are of another kind than the paper's."""
        from fa.results import records

        table = records.reference(self.experiment)
        table = table[table.rule.isin(self.rules)] if self.rules else table
        comparable = not self._changed and not (self.mode == "quick" and self.datasets)
        return table.reset_index(drop=True) if comparable else table.iloc[:0]

    def verdicts(self) -> pd.DataFrame:
        """The claims of this figure and their verdicts, from the committed record (from the quick table in `quick` mode)."""
        from fa.results import claims

        return claims.verdicts(self.experiment, mode="quick" if self.mode == "quick" else "record")

    # -------------------------------------------------------------------------------------------------- for the reader

    def banner(self) -> str:
        """A sentence or two: what this page shows, and whether anything was trained for it."""
        from fa.plot import in_order, look
        from fa.results import records

        rows, where, part = self.table(), relative(self.path), self.partial()
        if rows.empty:
            return (
                f"Nothing was trained, and there is no {where} yet: published values only. mode quick or paper trains."
            )
        repeats = f"{rows.seed.nunique()} {'seeds' if self.datasets else 'repeats'}"
        what = f"{rows.run.nunique()} runs ({', '.join(look(r).label for r in in_order(rows.rule))}; {repeats})"
        what += f"; PARTIAL: {part}" if part else ""
        if self.mode == "record":
            made = _told(records.sidecar(self.experiment), "torch", "cuda", "gpu", "cpu")
            return f"Nothing was trained: this page redraws {where}, {what}" + (f", made with {made}." if made else ".")
        return f"Made here, mode {self.mode!r}: {', '.join([what, *self.datasets])}; read back from {where}."

    def compare(self, metric: str, by: Sequence[str] = ("rule",), epoch: int | None = None, digits: int = 2) -> str:
        """Text table of `metric` at `epoch` (default: the last): our mean, sd (ddof 1) and n beside the published ones.

        Args:
            metric: a metric of the table.
            by: columns that make a row, such as ``("rule", "layer")``.
            epoch: epoch in our count.
            digits: decimals.
        """
        from fa.plot import in_order

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
        rank = {"rule": in_order(both.rule).index, "layer": depth.index}
        both = both.sort_values(by, key=lambda column: column.map(rank.get(column.name, lambda v: v)))
        whole = {n: lambda v: "-" if pd.isna(v) else f"{v:.0f}" for n in ("n", "n ")}
        return both.to_string(index=False, float_format=f"{{:.{digits}f}}".format, na_rep="-", formatters=whole)

    def judged(self) -> str:
        """Text table of this figure's claims: target, measured, n and verdict, then how many hold."""
        table = self.verdicts()
        short = table[["id", "target", "measured", "n", "verdict"]].astype(str).map(cut)
        short["id"] = short.id.str.removeprefix(f"{self.experiment}_")
        return short.to_string(index=False) + "\n\n" + counted(table.verdict)

    def provenance(self, name: str = "") -> str:
        """Text table: where the numbers come from, by file, hash, commit and machine.

        Args:
            name: of the figure, in a notebook without experiment.
        """
        return "\n".join(f"{k:12s} {v}" for k, v in {"mode": self.mode, **self._trail(name)}.items() if v)

    def _trail(self, name: str) -> dict[str, Any]:
        """What leads from a figure back to its data, code and machine; nothing in it depends on the clock."""
        from fa.experiments import find as experiment_of
        from fa.plot import sha256
        from fa.results import records

        if not self.experiment:
            stem, code = DRAWN[name]
            paper = PAPERS[name.partition("_")[0]]
            trail = {"paper": paper, "notebook": f"notebooks/{stem}.ipynb", "code": code, "sha256": sha256(ROOT / code)}
            return trail | {"cite": _cited(name, paper)}
        about, table, there = experiment_of(self.experiment), self.table(), self.path.exists()
        collected = there and self.path == records.record_path(self.experiment, self.mode)
        side = records.sidecar(self.experiment, self.mode) if collected else {}
        return {
            "paper": PAPERS.get(about.paper, ""),
            "notebook": f"notebooks/{about.notebook}.ipynb",
            "table": relative(self.path) if there else "",
            "sha256": sha256(self.path) if there else "",
            "runs": int(table.run.nunique()),
            "partial": self.partial(),
            "dataset": ", ".join(self.datasets),
            "commit": _told(side, "commit"),
            "machine": _told(side, "torch", "cuda", "gpu", "cpu"),
            "cite": _cited(self.experiment, PAPERS.get(about.paper, "")),
        }

    def save(self, fig: Figure, name: str, caption: str) -> Path:
        """Stamp and write a figure (see `fa.plot.save`): to figures/ in paper mode, else to build/MODE/figures/.

        Returns:
            path of the PDF.
        """
        from fa import plot

        published = self.mode == "paper" and not self.chosen
        folder = ROOT / "figures" if published else build(self.mode) / "figures"
        if not self.experiment:
            return plot.save(fig, name, caption, folder, **self._trail(name))
        words = [", ".join(["quick mode", *self.datasets]) + ": not the paper's scale"] if self.mode == "quick" else []
        if part := self.partial():
            words.append("no run yet: published values only" if self.table().empty else f"partial: {part}")
        if words:
            plot.stamp(fig, " · ".join(words))
        return plot.save(fig, name, caption, folder, **self._trail(name))


def relative(path: Path) -> str:
    """A path as one says it: from the repository's root, where it is below it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def cut(text: str, width: int = 48) -> str:
    """A text, cut to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _describe(config: Any) -> str:
    """A run in words, for a message."""
    names = ("seed", "repeats", "epochs", "dataset", "options", "density", "precision", "n_out", "n_in")
    told = {n: getattr(config, n) for n in names if getattr(config, n, "") != ""}
    return f"rule {config.rule!r} with {', '.join(f'{n}={v}' for n, v in told.items())}"


def _told(side: Mapping[str, Any], *keys: str) -> str:
    """What the environments of a sidecar say under `keys`, each combination once."""
    versioned = ("torch", "cuda")
    environments = side.get("environments", [])
    lines = [", ".join(f"{k} {e[k]}" if k in versioned else e[k] for k in keys if e.get(k)) for e in environments]
    return "; ".join(dict.fromkeys(lines))


def _title() -> str:
    """The repository's title, from CITATION.cff."""
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip().strip('"') for line in lines if line.startswith("title:"))


def _cited(name: str, paper: str) -> str:
    """How to cite a figure, and the paper that it is after, if it is after one."""
    return f"{_title()}, figure {name}" + (f"; after {paper}" if paper else "")


def counted(verdicts: pd.Series) -> str:
    """ "holds 24, partly 1, not tested 2", in that order."""
    order = [v for v in ("holds", "partly", "fails", "not tested") if (verdicts == v).any()]
    return ", ".join(f"{v} {(verdicts == v).sum()}" for v in order)


def find(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by file name, stem or beginning of it ("32"); all of them without names.

    Raises:
        UserError: a name that fits none; names those that are there.
    """
    there = sorted((ROOT / "notebooks").glob("*.ipynb"))
    found: list[Path] = []
    for name in names:
        fits = [p for p in there if p.stem == Path(name).stem] or [p for p in there if name and p.stem.startswith(name)]
        if not fits:
            raise UserError(f"unknown notebook {name!r}; known: {', '.join(p.stem for p in there)}")
        found += fits
    return list(dict.fromkeys(found)) if names else there


def index() -> str:
    """Markdown table of the notebooks: title, what the record holds, verdicts on the claims."""
    from fa.experiments import EXPERIMENTS
    from fa.results import claims

    lines = ["| notebook | shows | record | claims |", "|---|---|---|---|"]
    for path in find():
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0].lstrip("# ")
        shown = [Notebook(name) for name, e in EXPERIMENTS.items() if e.notebook == path.stem]
        held = [
            ", ".join(filter(None, [f"{len(set(cfg.table().run))} runs" if len(cfg.table()) else "", cfg.partial()]))
            for cfg in shown
        ]
        verdicts = [counted(claims.verdicts(cfg.experiment).verdict) for cfg in shown]
        lines.append(f"| [{path.stem}]({path.name}) | {title} | {'; '.join(held)} | {'; '.join(verdicts)} |")
    return "\n".join(lines)


def rules() -> str:
    """Markdown table of `fa.RULES`: name, equation, source."""
    from fa.plot import in_order
    from fa.rules import RULES

    lines = ["| name | rule | from |", "|---|---|---|"]
    for name in in_order(RULES):
        equation = RULES[name].equation.replace("|", r"\|")  # a bar ends a cell, in code too
        lines.append(f"| `{name}` | `{equation}` | {RULES[name].source} |")
    return "\n".join(lines)


def cite(name: str) -> str:
    """How to cite a committed figure: its file, caption, citation and trail.

    Raises:
        UserError: no such figure; names those that are there.
    """
    path = ROOT / "figures" / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none yet"
        raise UserError(f"unknown figure {name!r}; known: {known}")
    figure = json.loads(path.read_text(encoding="utf-8"))
    head = [f"figures/{name}.pdf", figure.pop("caption"), figure.pop("cite")]
    return "\n\n".join([*head, "\n".join(f"{k:12s} {v}" for k, v in figure.items() if v and k != "name")])
