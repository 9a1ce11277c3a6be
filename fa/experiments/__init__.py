"""One file a figure, found by its name: the grid of its runs in each mode, and its drawing.

The name of a file is the name of its experiment, figure, record and claims alike. :func:`plan` turns a mode and the few
parameters of a notebook into runs; :mod:`fa.results.runs` trains the missing ones. Adding a figure means adding a file
here; no list names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from fa import plot
from fa.errors import UserError, unknown
from fa.rules import RULES
from fa.rules import rule as make_rule
from fa.train import data
from fa.train.config import CHOICES, Config, parse_options

MODES = ("quick", "small", "paper")
"""Modes in which runs are trained; notebooks have ``record`` besides, which trains nothing."""

MOST = 10_000
"""Seeds or epochs that can be asked for: beyond it lies a slip of the finger, whose plan would fill the memory."""


@dataclass(frozen=True)
class Experiment:
    """A figure's page and its runs.

    Args:
        title: one line.
        paper: "p1", "p2" or "p3"; "x": the figure compares papers.
        notebook: stem of the file in notebooks/.
        rules: the figure's rules, in the order of its legend.
        grid: (mode, rules, seeds, epochs, dataset, own parameters) -> runs; 0 and "" stand for the mode's own. None:
            the figure is drawn from the code alone.
        own: parameters of the notebook besides the common ones, with their defaults.
        small: whether the figure has a mode ``small``, for two CPU cores.
        swept: run -> the columns of the figure's table that name a run's place in a sweep, alike for every run of the
            figure.
        labels: value of the column ``variant`` or ``network`` -> its name in texts, of a figure that has this column.
    """

    title: str
    paper: str
    notebook: str
    rules: tuple[str, ...]
    grid: Callable[..., list[Any]] | None = None
    own: dict[str, Any] = field(default_factory=dict)
    small: bool = False
    swept: Callable[[Any], dict[str, Any]] = lambda config: {}
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes in which the figure's runs are trained."""
        return tuple(mode for mode in MODES if mode != "small" or self.small)

    @property
    def remedy(self) -> str:
        """What a reader does who lacks runs: "set mode='quick', 'small' or 'paper'"."""
        *first, last = map(repr, self.modes)
        return f"set mode={', '.join(first)} or {last}"

    def named(self, rule: str) -> str:
        """A rule's name on this page: p1's uniform sign-concordant feedback, uSF, is p3's SF."""
        return "uSF" if (self.paper, rule) == ("p1", "usf") else plot.look(rule).label


def of_rules(base: Config, rules: Sequence[str], seeds: int, own: Mapping[str, Mapping[str, Any]]) -> list[Config]:
    """One run for every seed and rule, seeds outermost, so that a campaign that is cut short has whole seeds.

    Args:
        base: the recipe that the rules share.
        rules: names of rules.
        seeds: number of seeds, from 0 up.
        own: rule -> the fields and options that differ under it.
    """
    return [base.vary(rule=rule, seed=seed, **own.get(rule, {})) for seed in range(seeds) for rule in rules]


def plan(
    experiment: str, mode: str, seeds: int = 0, epochs: int = 0, rules: str = "", dataset: str = "", **own: Any
) -> list[Any]:
    """The runs of an experiment.

    Args:
        experiment: a name of :data:`EXPERIMENTS`.
        mode: "quick", "small" or "paper".
        seeds: number of seeds (0: the mode's own).
        epochs: number of epochs (0: the mode's own).
        rules: comma separated names of ``fa.RULES``, each counted once ("": the figure's).
        dataset: a name of ``fa.train.data.SETS`` ("": the mode's own).
        own: the experiment's own parameters.

    Raises:
        UserError: anything unknown, and the sentence names the known ones; a number out of range.
    """
    e = find(experiment)
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode not in e.modes:
        raise UserError(f"{experiment} has no mode {mode!r}; it has {' and '.join(e.modes)}")
    check(rules, dataset, seeds, epochs)
    names = tuple(split(rules)) or e.rules
    for name in own.keys() - e.own.keys():
        raise unknown("parameter", name, e.own, experiment)
    for name, value in own.items():
        if isinstance(value, int) and not 0 <= value <= MOST:
            raise UserError(f"{name}={value} must be a whole number from 0 to {MOST:,}")
        if value and value not in (known := CHOICES.get(name, (value,))):
            raise unknown(name, value, known, more=", or empty for the mode's own")
    runs = e.grid(mode, names, seeds, epochs, dataset, **own) if e.grid else []
    for rule, options in dict.fromkeys((c.rule, c.options) for c in runs if isinstance(c, Config)):
        make_rule(rule, **parse_options(options))  # refuses options out of range
    return runs


def split(rules: str) -> list[str]:
    """Rule names of a comma-separated list, each once."""
    return list(dict.fromkeys(r.strip() for r in rules.split(",") if r.strip()))


def check(rules: str, dataset: str, seeds: int, epochs: int) -> None:
    """Refuse values that no mode of any figure knows; the one place that looks at them.

    Raises:
        UserError: an unknown rule or data set, a number out of range; the sentence names the known ones.
    """
    if seeds < 0 or epochs < 0:
        raise UserError(f"seeds={seeds} and epochs={epochs} must not be negative; 0 stands for the mode's own")
    if max(seeds, epochs) > MOST:
        raise UserError(f"seeds={seeds} and epochs={epochs} must be at most {MOST:,}; 0 stands for the mode's own")
    if rules and not split(rules):
        raise UserError(f"rules={rules!r} names no rule; leave rules empty for the figure's own")
    for name in split(rules):
        if name not in RULES:
            raise unknown("rule", name, sorted(RULES))
    if dataset and dataset not in data.SETS:
        raise unknown("data set", dataset, data.SETS)


def find(experiment: str) -> Experiment:
    """The experiment of that name.

    Raises:
        UserError: there is none.
    """
    if experiment not in EXPERIMENTS:
        raise unknown("experiment", experiment, EXPERIMENTS)
    return EXPERIMENTS[experiment]


def _found() -> dict[str, Experiment]:
    names = [p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")]
    every = {name: import_module(f"{__name__}.{name}").EXPERIMENT for name in sorted(names)}
    return dict(sorted(every.items(), key=lambda item: item[1].notebook))


EXPERIMENTS: dict[str, Experiment] = _found()
"""Name -> experiment, in the order of the notebooks."""
