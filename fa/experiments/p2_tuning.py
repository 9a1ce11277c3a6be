"""p2's claim about tuning, measured: searches for metaparameters by Optuna's TPE, and how much of a grid trains well."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fa import plot, tables
from fa.errors import UserError
from fa.experiments import Experiment
from fa.layers.hooks import converted
from fa.metrics import alignment
from fa.paths import user_folder
from fa.train import data
from fa.train.config import Config, identity
from fa.train.loop import all_finite
from fa.train.measure import accuracies
from fa.train.network import build_network
from fa.train.step import Stepper, make_optimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "wm", "ia", "sa", "aa", "kp")

RANGES = {"amp": (0.01, 1.0), "null": (0.01, 1.0), "decay": (0.01, 1.0), "feedback_lr": (0.01, 1.0),
          "init": (0.01, 1.0), "input_std": (0.3, 3.0)}  # fmt: skip
SWITCHES = ("noise", "center", "normalize")
SEARCHED = {"wm": [n for n in (*RANGES, *SWITCHES) if n != "null"], "ia": [*RANGES, *SWITCHES]}
"""Rule -> metaparameters of its search: those of :data:`RANGES` in logarithm, those of :data:`SWITCHES` 0 or 1 (p2 has
all of them; the ranges are ours)."""

CENTERS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "bp": ({}, (), ()),
    "fa": ({}, (), ()),
    "wm": ({"amp": 0.2, "decay": 0.1, "input": "normal"}, ("amp",), ("decay",)),
    "ia": ({"amp": 0.2, "null": 0.1, "decay": 0.1, "input": "normal"}, ("amp",), ("null", "decay")),
    "sa": ({"self_": 0.2, "decay": 0.1}, ("self_",), ("decay",)),
    "aa": ({"amp": 0.2, "sparse": 0.1}, ("amp",), ("sparse",)),
    "kp": ({"lr": 0.1, "weight_decay": 0.005}, ("lr",), ("weight_decay",)),
}
"""Rule -> (middle of its grid, what the horizontal axis multiplies, what the vertical axis multiplies): the coefficients
that drive the feedback to W, and those that hold it back. KP has the learning rate and weight decay, which W shares.
BP and FA have one point."""

CHANCE = 10.0  # percent: what a trial counts that diverged
NEAR = 2.0  # points


@dataclass(frozen=True)
class Trial:
    """One trial of a search, one point of a grid, or the summary of a rule's trials and points.

    Args:
        rule: a name of ``fa.RULES``.
        seed: of weights, batches and feedback, the same for all; and of the search.
        part: "search": Optuna draws the metaparameters; "grid": ``number`` says them; "summary": no training.
        number: of the trial, or of the point (rows of the grid one after another), from 0.
        trials: of the rule's search (0: it has none).
        side: points along each axis of the rule's grid, each three times the one before.
        model, hidden, dataset, epochs, batch, augment: as in :class:`fa.train.config.Config`.
        revision: of the recipe.
    """

    rule: str
    seed: int
    part: str
    number: int = 0
    trials: int = 0
    side: int = 1
    model: str = "resnet8"
    hidden: str = ""
    dataset: str = "cifar10-16"
    epochs: int = 3
    batch: int = 128
    augment: bool = False
    revision: int = 1

    run = property(identity)

    @property
    def needs(self) -> list[Trial]:
        """Of a summary the runs that it sums up."""
        if self.part != "summary":
            return []
        sizes = {"search": self.trials, "grid": self.side**2}
        return [replace(self, part=part, number=n) for part, size in sizes.items() for n in range(size)]

    @property
    def factors(self) -> tuple[float, float]:
        """What a point multiplies the two axes by, (horizontal, vertical)."""
        row, column = divmod(self.number, self.side)
        middle = (self.side - 1) / 2
        return 3.0 ** (column - middle), 3.0 ** (row - middle)

    def metaparameters(self) -> dict[str, Any]:
        """Name -> value; of a trial they are drawn when it is asked for first, and kept in the storage of the search.

        Raises:
            UserError: Optuna is not installed, or its storage cannot be reached.
        """
        if self.part == "grid":
            middle, driving, holding = CENTERS[self.rule]
            drive, hold = self.factors
            scale = dict.fromkeys(driving, drive) | dict.fromkeys(holding, hold)
            return middle | {name: float(f"{middle[name] * factor:.3g}") for name, factor in scale.items()}
        return {name: float(f"{value:.3g}") for name, value in ask(self).params.items()}

    def recipe(self, chosen: dict[str, Any]) -> Config:
        """The ordinary run that trains with these metaparameters, in the last epoch at a tenth of the rates."""
        base = Config(
            self.rule, self.seed, dataset=self.dataset, model=self.model, hidden=self.hidden, epochs=self.epochs,
            batch=self.batch, lr=0.1, lr_drops=str(self.epochs - 1), lr_factor=0.1, augment=self.augment,
        )  # fmt: skip
        if self.part == "grid":
            return base.vary(**chosen)
        chosen = {name: bool(value) if name in SWITCHES else value for name, value in chosen.items()}
        noise, std = chosen.pop("noise"), chosen.pop("input_std")
        return base.vary(**chosen | ({"input": "normal", "input_std": std} if noise else {}))

    def table(self, *needed: pd.DataFrame) -> pd.DataFrame:
        """``epoch`` (the last), ``layer``, ``depth``, ``metric``, ``value``.

        A trial and a point have ``score``, the accuracy on the validation images (on digits, which have none, on the
        test images; :data:`CHANCE` where training diverged), ``diverged`` (0 or 1), ``set_NAME`` for each metaparameter
        that is a number, and each layer's angle and norm ratio. A summary has those of :func:`summed`.
        """
        if self.part == "summary":
            found, rows, status = summed(self, pd.concat(needed)), pd.DataFrame(), {}
        else:
            chosen = self.metaparameters()
            score, rows, status = trained(self.recipe(chosen))
            numbers = {f"set_{name}": value for name, value in chosen.items() if not isinstance(value, str)}
            found = {"score": score, "diverged": float(status["state"] == "diverged"), **numbers}
            if self.part == "search":
                tell(self, score)
        own = pd.DataFrame({"epoch": self.epochs, "layer": "", "metric": list(found), "value": list(found.values())})
        table = pd.concat([own, rows]).reindex(columns=["epoch", "layer", "depth", "metric", "value"])
        table.attrs["status"] = status
        return table


def trained(config: Config) -> tuple[float, pd.DataFrame, dict[str, Any]]:
    """Train a run as :func:`fa.train.loop.train` does, and measure it once, at its end.

    Returns:
        The score, the rows of each layer's feedback (none where training diverged), and the run's status.
    """
    sets = data.load(config.dataset)
    net = build_network(config, sets.shape, sets.classes)
    stepper = Stepper(net, make_optimizer(net, config), config, sets.train)
    for epoch in range(config.epochs):
        if not all_finite([stepper.epoch(epoch), *net.parameters()]):
            return CHANCE, pd.DataFrame(), {"state": "diverged", "epoch": epoch + 1}
    [score] = accuracies(net, sets.val or sets.test)
    rows = alignment(net).melt(["layer", "depth"], ["angle_deg", "norm_ratio"], "metric") if converted(net) else None
    return score, pd.DataFrame(rows).assign(epoch=config.epochs), {"state": "finished"}


# ----------------------------------------------------------------------------------------------------------- the search


def optuna() -> Any:
    """The module Optuna, silent.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("the search of p2_tuning needs Optuna: pip install -e '.[tuning]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def space(rule: str) -> dict[str, Any]:
    """Name -> Optuna's distribution, of a rule's search."""
    d = optuna().distributions
    one = {name: d.FloatDistribution(*RANGES[name], log=True) for name in RANGES}
    one |= {name: d.CategoricalDistribution([0, 1]) for name in SWITCHES}
    return {name: one[name] for name in SEARCHED[rule]}


def study_of(trial: Trial) -> Any:
    """The study of a trial's search, made where it is not there yet.

    It lies in ``$FA_STORAGE``, any URL that Optuna knows, or else in a journal in the run store. Several processes
    share it: a process that is killed leaves what it was told and asked.

    Raises:
        UserError: the storage cannot be reached.
    """
    o, name = optuna(), f"p2_tuning {trial.rule} {replace(trial, number=0).run}"
    try:
        if not (storage := os.environ.get("FA_STORAGE", "")):
            folder = user_folder("FA_RUNS", "data/runs") / "studies"
            folder.mkdir(parents=True, exist_ok=True)
            journal = o.storages.journal.JournalFileBackend(str(folder / "p2_tuning.journal"))
            storage = o.storages.JournalStorage(journal)
        return o.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    except Exception as error:  # of a driver that is missing, an address that nobody answers, a disk
        raise UserError(
            f"the storage of the search cannot be used ({type(error).__name__}); set FA_STORAGE to a URL that Optuna "
            "knows, e.g. sqlite:///search.db, or leave it empty for a file in the run store"
        ) from error


def asked(study: Any) -> dict[int, Any]:
    """Number of a trial of ours -> Optuna's trial."""
    return {t.user_attrs["number"]: t for t in study.get_trials(deepcopy=False)}


def ask(trial: Trial) -> Any:
    """Optuna's trial of that number. It is drawn once, from the finished trials of then, by a TPE whose seed is the
    number's, and is in the storage whole or not at all."""
    o, study = optuna(), study_of(trial)
    if trial.number not in (before := asked(study)):
        sampler = o.samplers.TPESampler(seed=int(trial.run[:8], 16))
        draft = o.create_study(direction="maximize", sampler=sampler)
        draft.add_trials([t for t in before.values() if t.state.is_finished()])
        drawn, told = draft.ask(space(trial.rule)), {"number": trial.number}
        state = o.trial.TrialState.RUNNING
        study.add_trial(
            o.trial.create_trial(state=state, params=drawn.params, distributions=space(trial.rule), user_attrs=told)
        )
    return asked(study)[trial.number]


def tell(trial: Trial, score: float) -> None:
    """Report a trial's score to its search; a second report, of a trial that was told and then killed, is ignored."""
    study_of(trial).tell(ask(trial).number, score, skip_if_finished=True)


def summed(trial: Trial, runs: pd.DataFrame) -> dict[str, float]:
    """Metric -> value of a rule's summary.

    ``grid_best``, ``grid_share`` (percent of the grid's points within :data:`NEAR` points of its best), and
    ``grid_diverged`` (percent); of a rule with a search ``search_best``, ``search_median``, ``search_diverged``
    (percent), and ``importance_NAME``, the share of metaparameter NAME in the variance of the scores (Optuna's fANOVA).
    """
    wide, found = runs.pivot_table(index="run", columns="metric", values="value"), {}
    parts = {part: [c.run for c in trial.needs if c.part == part] for part in ("grid", "search")}
    for part, names in parts.items():
        if names:
            score, bad = wide.score[names], wide.diverged[names]
            found |= {f"{part}_best": score.max(), f"{part}_diverged": 100 * bad.mean()}
            near = {"grid_share": 100 * (score >= score.max() - NEAR).mean()}
            found |= near if part == "grid" else {"search_median": score.median()}
    if not parts["search"]:
        return found
    o, distributions = optuna(), space(trial.rule)
    study = o.create_study(direction="maximize")
    for _, row in wide.loc[parts["search"]].iterrows():
        params = {n: int(row[f"set_{n}"]) if n in SWITCHES else row[f"set_{n}"] for n in distributions}
        study.add_trial(o.trial.create_trial(params=params, distributions=distributions, value=row.score))
    evaluator = o.importance.FanovaImportanceEvaluator(seed=0)
    shares = o.importance.get_param_importances(study, evaluator=evaluator)
    return found | {f"importance_{name}": share for name, share in shares.items()}


# ----------------------------------------------------------------------------------------------------------------- plan

PAPER = Trial("bp", 0, "grid", trials=60, side=7, augment=True)
SMALL = replace(PAPER, trials=20, side=4, dataset="digits", batch=32, augment=False)
QUICK = replace(SMALL, trials=0, side=3, model="mlp", hidden="32,32", epochs=2)


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, trials: int = 0, storage: str = ""
) -> list[Trial]:
    """Paper: 60 trials each for WM and IA and 7 x 7 points for every rule, three epochs of ResNet-8 on ``cifar10-16``.

    Small: 20 trials and 4 x 4 points, on digits, whose images the score is measured on are the test images. Quick: a
    multilayer perceptron on digits, 3 x 3 points, and no search unless ``trials`` asks for one.

    Args:
        trials: of a search (0: the mode's own).
        storage: of the searches, a URL that Optuna knows ("": a file in the run store). It is no part of a recipe.
    """
    if storage:
        os.environ["FA_STORAGE"] = storage  # for the processes that train, which inherit it
    base = {"paper": PAPER, "small": SMALL, "quick": QUICK}[mode]
    base = replace(base, epochs=epochs or base.epochs, dataset=dataset or base.dataset, trials=trials or base.trials)
    if unknown := set(rules) - set(RULES):
        raise UserError(f"p2_tuning is about {', '.join(RULES)}, not {', '.join(sorted(unknown))}")
    runs = []
    for seed in range(seeds or 1):
        for rule in rules:
            searched, side = base.trials if rule in SEARCHED else 0, base.side if CENTERS[rule][0] else 1
            summary = replace(base, rule=rule, seed=seed, part="summary", trials=searched, side=side)
            runs += [*summary.needs, summary]
    return runs


def swept(config: Trial) -> dict[str, Any]:
    """The columns that name a run's place: ``part``, ``number``, and of a point what it multiplies the axes by."""
    drive, hold = config.factors if config.part == "grid" else (math.nan, math.nan)
    return {"part": config.part, "number": config.number, "drive": drive, "hold": hold}


EXPERIMENT = Experiment(
    "Tuning of weight mirror and information alignment", "p2", "23_estimation_tuning", RULES, grid,
    own={"trials": 0, "storage": ""}, small=True, swept=swept,
)  # fmt: skip
