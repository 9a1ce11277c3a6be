"""The table of one figure in one mode: planned, trained where the mode says so, and read back from disk."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fa import experiments, plot, provenance
from fa.errors import Interrupted, UserError
from fa.experiments import Experiment, plan
from fa.paths import read_csv, relative, user_switch
from fa.results import claims, records, registered, runs
from fa.results.store import RunFolder
from fa.rules import RULES
from fa.tables import plural


@dataclass
class FigureTable:
    """One figure in one mode: its runs, its table, the published values and its verdicts.

    Args:
        experiment: name of the figure's file in fa/experiments.
        mode: "record", "quick", "small" or "paper".
        seeds: number of seeds; 0: the mode's own.
        epochs: number of epochs; 0: the mode's own.
        rules: names of rules; empty: the figure's.
        dataset: name of a data set; empty: the mode's own.
        device: "auto", "cpu" or "cuda".
        scale: of the record that record mode shows: "small", "paper"; empty: paper if it is complete, else small.
        own: the experiment's own parameters; one that is left out has its default.
    """

    experiment: str
    mode: str = "record"
    seeds: int = 0
    epochs: int = 0
    rules: list[str] = field(default_factory=list)
    dataset: str = ""
    device: str = "auto"
    scale: str = ""
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.experiment:
            self.own = self.about.own | self.own

    @property
    def about(self) -> Experiment:
        """The figure's entry in fa.experiments."""
        return experiments.find(self.experiment)

    @cached_property
    def trained(self) -> str:
        """The mode in which the runs of this page were, or are, trained: "quick", "small" or "paper"."""
        if self.mode != "record":
            return self.mode
        if self.scale or not self.about.small:
            return self.scale or "paper"
        held = records.holders()
        return "paper" if all(c.run in held for c in plan(self.experiment, "paper")) else "small"

    @property
    def name(self) -> str:
        """Name of the figure, its record and its claims: the experiment's, with ``_small`` at the small scale."""
        return records.name_of(self.experiment, self.trained)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters whose value is not the figure's own; the device and the storage of a search are none of them,
        for they change no recipe. Rules are in the figures' order, whatever the reader's was."""
        rules = ",".join(plot.in_order(self.rules))
        named = {"seeds": self.seeds, "epochs": self.epochs, "rules": rules, "dataset": self.dataset}
        own = {n: v for n, v in self.own.items() if v != self.about.own[n] and n != "storage"}
        return {n: v for n, v in named.items() if v} | own

    @property
    def own_name(self) -> str:
        """Name of these files: :attr:`name`, and the parameters that the reader chose ("p3_fig2__seeds=2")."""
        words = [re.sub(r"[^\w=,.+-]", "-", f"{n}={v}") for n, v in self.parameters.items()]
        return "__".join([self.name, *words])

    @property
    def _changed(self) -> bool:
        """Whether this is another experiment than the figure's, and not only a part of it."""
        return bool(self.parameters.keys() - {"seeds", "rules"})

    @property
    def chosen(self) -> bool:
        """Whether the reader asked for anything but the figure as it is published."""
        return bool(self.parameters)

    @cached_property
    def runs(self) -> list[Any]:
        """The runs of this figure under these parameters."""
        rules = ",".join(self.rules)
        return plan(self.experiment, self.trained, self.seeds, self.epochs, rules, self.dataset, **self.own)

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets of these runs; none for an experiment without data."""
        return sorted({c.dataset for c in self.runs if hasattr(c, "dataset")})

    @property
    def path(self) -> Path:
        """The figure's own table on disk; runs that it shares with other figures lie in theirs, and where all do, this
        is the first of them."""
        if self.mode != "record" and self.chosen:
            return records.build(self.mode) / f"{self.own_name}.csv"
        own = records.record_path(self.name, self.trained)
        if self.trained == "quick":
            return own
        held = records.holders()
        names = [held[c.run] for c in self.runs if c.run in held]
        return own if self.name in names or not names else records.record_path(names[0])

    def table(self) -> pd.DataFrame:
        """The figure's table, read back from disk; `quick`, `small` and `paper` first train what is missing.

        In `record` mode a figure of which no run is there yet has an empty table, so that the notebook goes on and
        shows the published values alone.

        Raises:
            UserError: in `record` mode, a rule, seed, number of epochs or data set that the committed table does not
                hold.
        """
        return self._made[0]

    @cached_property
    def _made(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The table, and what made it (see :func:`fa.results.records.union`)."""
        if not self.runs:
            return pd.DataFrame(columns=records.COLUMNS), {"environments": [], "records": []}
        if self.mode != "record":
            return self._train()
        held = records.holders()
        planned = {c.run for c in plan(self.experiment, self.trained)}
        begun = any(run in held for run in planned)
        none = begun and not any(c.run in held for c in self.runs)
        for config in self.runs:  # one that is planned and not there yet makes the table partial; any other is refused
            if config.run not in held and (config.run not in planned or none):
                raise UserError(f"{_describe(config)} is not in {relative(self.path)}; {self.about.remedy}")
        if not begun:
            return self._nothing(), {"environments": [], "records": []}
        return records.union(self.experiment, self.trained, self.runs)

    def _nothing(self) -> pd.DataFrame:
        """A table of no rows, with the columns that the record will have."""
        published = [*records.COLUMNS, *records.REFERENCE_COLUMNS]
        axes = records.reference(self.experiment).columns.difference(published, sort=False)
        columns = [*records.COLUMNS, *axes, *self.about.swept(self.runs[0])]
        dtypes = dict.fromkeys(columns, float) | dict.fromkeys(("run", "rule", "layer", "metric"), str)
        return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in dtypes.items()})

    def _train(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Train what is missing, write the table, and read it back."""
        own_rule = [c for c in self.runs if RULES[c.rule].__module__ == "__main__"]  # which no other process would know
        for config in (
            own_rule if self.mode == "quick" else ()
        ):  # its code is no part of a run's identity, and may have changed
            shutil.rmtree(RunFolder(config).path, ignore_errors=True)
        add = user_switch("FA_ADD") and self.mode != "quick" and not self.chosen
        held = set(records.holders()) if add else set()
        missing = [c for c in self.runs if c.run not in held]
        if self.mode != "quick" and not self.chosen:
            registered.note(self.name)
        try:
            workers = 1 if own_rule else "auto"
            # another notebook of a batch may be training runs that this one shares
            needed = [c for config in missing for c in getattr(config, "needs", ())]
            while (summary := runs.run(missing, workers=workers, device=self.device)).busy:
                for config in runs.missing([*needed, *missing]):
                    with RunFolder(config).lock(wait=True):
                        pass
        except KeyboardInterrupt:
            done = sum(RunFolder(c).finished for c in self.runs)
            told = f"{done} of {len(self.runs)} runs are finished; run the cell again and training goes on"
            raise Interrupted(told) from None
        if summary.failed:
            raise RuntimeError(f"{len(summary.failed)} of {len(self.runs)} runs failed, the first: {summary.failed[0]}")
        if not self.chosen:
            records.collect(self.experiment, self.mode, missing, partial=True)
            return records.union(self.experiment, self.mode, self.runs)
        records.apart(self.experiment, self.path, self.runs)
        made = {"environments": [provenance.environment()], "records": []}
        empty = {"depth": [""], "value": [""]}
        return read_csv(self.path, keep_default_na=False, na_values=empty, dtype={"run": str}), made

    def partial(self) -> str:
        """What the table lacks, in words ("without DFA, 2 of 5 seeds, 60 of 250 epochs"); empty when it is whole."""
        table, said = self.table(), []
        if not self.runs:
            return ""
        if table.empty:
            return "no run yet"
        planned, reached = {c.run: c for c in self.runs}, table.groupby("run").epoch.max().to_dict()
        ended = {run for run, status in self._made[1].get("status", {}).items() if status["state"] == "diverged"}
        absent = {c.rule for c in self.runs} - set(table.rule)
        there = [c for c in self.runs if c.rule not in absent]
        if absent:
            said.append(f"without {', '.join(map(self.about.named, plot.in_order(absent)))}")
        if all(hasattr(c, "seed") for c in there):
            of = {rule: len({c.seed for c in there if c.rule == rule}) for rule in {c.rule for c in there}}
            have = {rule: table[table.rule == rule].seed.nunique() for rule in of}
            worst = min(of, key=lambda rule: have[rule] / of[rule])
            said += [f"{have[worst]} of {plural(of[worst], 'seed')}"] if have[worst] < of[worst] else []
        if "seed" not in "".join(said) and not {c.run for c in there} <= reached.keys():  # e.g. points of a sweep
            said.append(f"{len(reached)} of {plural(len(planned), 'run')}")
        at = {c.run: reached[c.run] for c in there if c.run in reached and c.run not in ended}
        if short := {c.run: at[c.run] for c in there if c.run in at and at[c.run] < getattr(c, "epochs", 0)}:
            run = min(short, key=short.__getitem__)
            said.append(f"{short[run]:.0f} of {plural(planned[run].epochs, 'epoch')}")
        return ", ".join(said)

    def diverged(self) -> str:
        """Which runs diverged, in words ("2 of 30 runs diverged: FA"); empty when none did."""
        ended = [run for run, status in self._made[1].get("status", {}).items() if status["state"] == "diverged"]
        rules = plot.in_order({c.rule for c in self.runs if c.run in ended})
        labels = ", ".join(map(self.about.named, rules))
        trained = [c for c in self.runs if hasattr(c, "epochs")]  # a timing is none
        return f"{len(ended)} of {plural(len(trained), 'run')} diverged: {labels}" if ended else ""

    def reference(self) -> pd.DataFrame:
        """The published values, from data/reference/; none where these runs are of another kind than the paper's."""
        table = records.reference(self.name)
        table = table[table.rule.isin(self.rules)] if self.rules else table
        comparable = not self._changed and not (self.mode == "quick" and self.datasets)
        return table.reset_index(drop=True) if comparable else table.iloc[:0]

    def verdicts(self) -> pd.DataFrame:
        """The claims of this figure and their verdicts, from its record, which they are about as a whole; of a quick
        table, or of runs with other parameters, no claim is tested."""
        if self.chosen and self.mode != "record":
            given = ", ".join(f"{n}={v}" for n, v in self.parameters.items())
            untested = {"measured": "", "sd": "", "n": "", "verdict": "not tested", "why": f"another run: {given}"}
            return claims.verdicts(self.name).assign(**untested)
        return claims.verdicts(self.name, mode="quick" if self.mode == "quick" else "record")


def _describe(config: Any) -> str:
    """A run in words, for a message."""
    names = ("seed", "repeats", "epochs", "dataset", "options", "density", "precision", "n_out", "n_in")
    told = {n: getattr(config, n) for n in names if getattr(config, n, "") != ""}
    return f"rule {config.rule!r} with {', '.join(f'{n}={v}' for n, v in told.items())}"
