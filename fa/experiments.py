"""For every figure, its grid of runs in each mode.

An experiment's name is also that of its figure, its record and the prefix of its claims. ``plan`` turns a mode and the few parameters of
a notebook into runs; :mod:`fa.campaign` trains those that are missing.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from . import data
from .errors import UserError
from .feedback import generator
from .metrics import angle
from .rules import RULES, PFAo, bernoulli, uniform
from .train import Config, identity, one_thread, train


@dataclass(frozen=True)
class Experiment:
    """A figure's grid.

    Args:
        name: of figure, record, claims.
        title: one line.
        paper: "p1", "p2" or "p3".
        notebook: stem of the file in notebooks/.
        rules: the figure's rules, in the order of its legend.
        grid: (mode, rules, seeds, epochs, dataset, own parameters) -> runs; 0 and "" stand for the mode's own.
        own: parameters of the notebook beside the common ones, with their defaults.
        run: what makes one run's table.
    """

    name: str
    title: str
    paper: str
    notebook: str
    rules: tuple[str, ...]
    grid: Callable[..., list[Any]]
    own: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., pd.DataFrame | None] = train


# ------------------------------------------------------------------------------------ p3, Figure 2

P3_RULES = ("bp", "fa", "dfa", "usf", "pfa", "pfa_o")

P3_OPTIONS = {  # authors' configurations: Xavier everywhere; SF is uniform with the Xavier standard deviation; lambda = 10
    "fa": "init=xavier",
    "dfa": "init=xavier",
    "usf": "scale=xavier",
    "kp": "init=xavier",
    "pfa": "init=xavier expansion=10 implicit=true",
    "pfa_o": "init=xavier implicit=true",
}

P3_DECAYED = ("kp", "pfa", "pfa_o")  # strong decay in the first epoch, so that the feedback aligns; kp so by our choice


def _p3_fig2(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, expansion: int = 10, **own: Any
) -> list[Config]:
    """MNIST, 784-512-512-10, the set-up of p3 section 5; quick: digits, three seeds, and the first epoch's decay over fewer steps."""
    quick = mode == "quick"
    epochs = epochs or (40 if not quick else 30)
    runs = []
    for seed in range(seeds or (3 if quick else 5)):  # seeds outermost: a campaign that is cut short has whole seeds
        for rule in rules:
            options = P3_OPTIONS.get(rule, "").replace("expansion=10", f"expansion={expansion}")
            decayed = rule in P3_DECAYED
            runs.append(Config(
                "p3_fig2", rule, seed, options, dataset or ("digits" if quick else "mnist"),
                hidden="512,512" if not quick else "64,64", epochs=epochs,
                lr=0.01 if not quick else 0.05,
                lr_drops="20,30" if epochs == 40 else f"{epochs // 2},{epochs * 3 // 4}",
                weight_decay=9e-5 if decayed else 1e-4,
                first_weight_decay=(0.03 if not quick else 0.2) if decayed else 0.0,
            ))  # fmt: skip
    return runs


# ------------------------------------------------------------------------------------ p3, Figure 3


RATIOS = tuple(10 ** (i / 5) for i in range(11))  # logspace(0, 2, 11)


@dataclass(frozen=True)
class Expansion:
    """Random matrices in place of training: how near B R comes to W once it has converged, R = B^T W.

    Args:
        experiment: "p3_fig3".
        rule: "pfa" at the eleven expansions of the authors, or "pfa_o" (B orthogonal, expansion 1).
        density: fraction of entries of B and of R that exist.
        repeats: independent draws, numbered in the record's ``seed``.
        n_out: outputs of the layer (default the authors').
        n_in: inputs of the layer (default the authors').
        revision: of the recipe.

    Source: p3, authors' ``alignment_vs_expand_ratio.py``.
    """

    experiment: str
    rule: str
    density: float
    repeats: int
    n_out: int = 100
    n_in: int = 256
    revision: int = 1

    run = property(identity)

    @property
    def swept(self) -> dict[str, float]:
        """Columns of the record beside the standard ones, and beside ``expansion``, which every row has."""
        return {"density": self.density}


@one_thread()
def expand(config: Expansion, *_: Any) -> pd.DataFrame:
    """Angle and norm ratio of B R against W, and the eigenvalues of B^T B that are not zero by shape, at every expansion.

    Returns:
        ``expansion``, ``seed`` (the repeat), ``epoch`` (0), ``layer``, ``depth``, ``metric``, ``value``; ``eig_sd`` is the
        population standard deviation of the eigenvalues within the repeat.
    """
    begin, rows = time.monotonic(), []
    n_out, n_in, density = config.n_out, config.n_in, config.density
    like = torch.empty(0, dtype=torch.float64)
    for ratio, repeat in itertools.product(RATIOS if config.rule == "pfa" else (1.0,), range(config.repeats)):
        gen = generator(repeat, config.rule, ratio, density)
        W = uniform((n_out, n_in), math.sqrt(2 / (n_out + n_in)), like, gen)
        if config.rule == "pfa_o":
            B = PFAo().fixed(n_out, 1, like, gen)
        else:
            mid = int(ratio * n_out)
            B = uniform((n_out, mid), math.sqrt((1 + 1 / ratio) / density / (n_out + mid)), like, gen)  # Xavier, authors' gain
        if density < 1:
            B = B * bernoulli(tuple(B.shape), density, like, gen)
        R = B.T @ W
        if density < 1:
            R = R * bernoulli(tuple(R.shape), density, like, gen)
        path, eigenvalues = B @ R, torch.linalg.eigvalsh(B @ B.T)
        values = {
            "angle_deg": angle(W, path),
            "norm_ratio": (torch.linalg.vector_norm(path) / torch.linalg.vector_norm(W)).item(),
            "eig_mean": eigenvalues.mean().item(),
            "eig_sd": eigenvalues.std(correction=0).item(),
        }
        rows += [[ratio, repeat, 0, "", None, metric, value] for metric, value in values.items()]
    table = pd.DataFrame(rows, columns=["expansion", "seed", "epoch", "layer", "depth", "metric", "value"])
    table.attrs["status"] = {"state": "finished", "seconds": round(time.monotonic() - begin, 1)}
    return table


def _p3_fig3(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, n_out: int = 100, n_in: int = 256
) -> list[Expansion]:
    """The authors' script at density 1, and at the other densities of their sparse figure; quick: four draws in place of 100."""
    if epochs or dataset:
        raise UserError("p3_fig3 draws random matrices and trains nothing; leave epochs and dataset out")
    if unknown := set(rules) - {"pfa", "pfa_o"}:
        raise UserError(f"p3_fig3 is about pfa and pfa_o, not {', '.join(sorted(unknown))}")
    repeats = seeds or (100 if mode == "paper" else 4)
    grid = [("pfa", density) for density in (1.0, 0.5, 0.3, 0.17, 0.1, 0.05)] + [("pfa_o", 1.0)]
    return [Expansion("p3_fig3", rule, density, repeats, n_out, n_in) for rule, density in grid if rule in rules]


EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        Experiment(
            "p3_fig2", "Accuracy and alignment on MNIST", "p3", "32_pfa_fig2_mnist", P3_RULES, _p3_fig2, {"expansion": 10}
        ),
        Experiment(
            "p3_fig3", "Alignment against the expansion ratio", "p3", "33_pfa_fig3_expansion", ("pfa", "pfa_o"), _p3_fig3,
            {"n_out": 100, "n_in": 256}, expand,
        ),
    )
}  # fmt: skip
"""Name -> experiment."""


MODES = ("record", "quick", "paper")


def plan(
    experiment: str, mode: str, seeds: int = 0, epochs: int = 0, rules: str = "", dataset: str = "", **own: Any
) -> list[Any]:
    """The runs of an experiment.

    Args:
        experiment: a name of :data:`EXPERIMENTS`.
        mode: "quick" or "paper".
        seeds: number of seeds (0: the mode's own).
        epochs: number of epochs (0: the mode's own).
        rules: comma separated names of ``fa.RULES`` ("": the figure's).
        dataset: a name of ``fa.data.SETS`` ("": the mode's own).
        own: the experiment's own parameters.

    Raises:
        UserError: anything unknown; the sentence names the known ones.
    """
    e = find(experiment)
    if mode not in MODES[1:]:
        raise UserError(f"unknown mode {mode!r} to train in; known modes: quick, paper")
    if seeds < 0 or epochs < 0:
        raise UserError(f"seeds={seeds} and epochs={epochs} must not be negative; 0 stands for the mode's own")
    names = tuple(r.strip() for r in rules.split(",") if r.strip()) or e.rules
    for name in names:
        if name not in RULES:
            raise UserError(f"unknown rule {name!r}; known rules: {', '.join(sorted(RULES))}")
    if dataset and dataset not in data.SETS:
        raise UserError(f"unknown data set {dataset!r}; known data sets: {', '.join(data.SETS)}")
    if unknown := set(own) - set(e.own):
        raise UserError(f"unknown parameter {unknown.pop()!r} of {experiment}; known: {', '.join(e.own) or 'none'}")
    return e.grid(mode, names, seeds, epochs, dataset, **own)


def find(experiment: str) -> Experiment:
    """The experiment of that name.

    Raises:
        UserError: there is none.
    """
    if experiment not in EXPERIMENTS:
        raise UserError(f"unknown experiment {experiment!r}; known experiments: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[experiment]
