"""The searches of :mod:`fa.experiments.p2_tuning`, by Optuna's TPE: a storage that processes share and that outlives a
kill."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from fa.errors import UserError
from fa.paths import user_folder

if TYPE_CHECKING:
    from fa.experiments.p2_tuning import Trial

RANGES = {"amp": (0.01, 1.0), "null": (0.01, 1.0), "decay": (0.01, 1.0), "feedback_lr": (0.01, 1.0),
          "init": (0.01, 1.0), "input_std": (0.3, 3.0)}  # fmt: skip
SWITCHES = ("noise", "center", "normalize")
SEARCHED = {"wm": [n for n in (*RANGES, *SWITCHES) if n != "null"], "ia": [*RANGES, *SWITCHES]}
"""Rule -> metaparameters of its search: those of :data:`RANGES` in logarithm, those of :data:`SWITCHES` 0 or 1 (p2 has
all of them; the ranges are ours)."""

NEAR = 2.0  # points


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


def study_of(trial: Trial, attempts: int = 5) -> Any:
    """The study of a trial's search, made where it is not there yet.

    It lies in ``$FA_STORAGE``, any URL that Optuna knows, or else in a journal in the run store. Several processes
    share it: a process that is killed leaves what it was told and asked.

    Args:
        trial: of the search.
        attempts: how often to try where another process makes the tables of an empty database at the same moment.

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
        if type(error).__name__ in ("IntegrityError", "ProgrammingError") and attempts > 1:
            time.sleep(0.5)  # another process is making the tables of an empty database; they are there in a moment
            return study_of(trial, attempts - 1)
        raise UserError(
            f"the storage of the search cannot be used ({type(error).__name__}); set FA_STORAGE to a URL that Optuna "
            "knows, e.g. sqlite:////shared/search.db or, with the extra cluster and a database in UTF8, "
            "postgresql+psycopg://USER@HOST/DATABASE, or leave it empty for a file in the run store"
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


def importances(rule: str, trials: pd.DataFrame) -> dict[str, float]:
    """Metaparameter -> its share in the variance of the scores, by Optuna's fANOVA, the largest first.

    Args:
        trials: one row a trial, ``score`` and ``set_NAME`` for each metaparameter.
    """
    o, distributions = optuna(), space(rule)
    study = o.create_study(direction="maximize")
    for _, row in trials.iterrows():
        params = {n: int(row[f"set_{n}"]) if n in SWITCHES else row[f"set_{n}"] for n in distributions}
        study.add_trial(o.trial.create_trial(params=params, distributions=distributions, value=row.score))
    return o.importance.get_param_importances(study, evaluator=o.importance.FanovaImportanceEvaluator(seed=0))


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
    shares = importances(trial.rule, wide.loc[parts["search"]])
    return found | {f"importance_{name}": share for name, share in shares.items()}
