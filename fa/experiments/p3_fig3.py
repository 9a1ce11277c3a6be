"""p3, Figure 3: how near the path B R comes to W, by the expansion and the density of the feedback; nothing is trained."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from fa.errors import UserError
from fa.experiments.experiment import Experiment
from fa.layers.feedback import generator
from fa.metrics import angle
from fa.rules import PFAo, random_mask, uniform
from fa.train.config import identity
from fa.train.step import numerics

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


@numerics("cpu")
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
            B = uniform(
                (n_out, mid), math.sqrt((1 + 1 / ratio) / density / (n_out + mid)), like, gen
            )  # Xavier, authors' gain
        if density < 1:
            B = B * random_mask(tuple(B.shape), density, like, gen)
        R = B.T @ W
        if density < 1:
            R = R * random_mask(tuple(R.shape), density, like, gen)
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


def grid(
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


EXPERIMENT = Experiment(
    "p3_fig3", "Alignment against the expansion ratio", "p3", "33_pfa_fig3_expansion", ("pfa", "pfa_o"), grid,
    {"n_out": 100, "n_in": 256}, expand, swept=lambda config: {"density": config.density},
)  # fmt: skip
