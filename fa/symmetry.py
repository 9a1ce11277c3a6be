"""How much a feedback matrix mirrors the forward weight: entry by entry, and unit by unit against the forward
neurons."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers.feedback import generator
from fa.layers.hooks import converted
from fa.metrics import angle, feedback_weight
from fa.rules.base import float64


def matrices(layer: nn.Module) -> dict[str, Tensor]:
    """The feedback matrices of a layer by name, detached: ``B`` and ``R`` where the rule stores them (masked entries
    0), and else, as under the sign rules, the effective kernel, named ``K``. Empty for a layer that is not converted.

    Raises:
        UserError: implicit product feedback, which stores no R.
    """
    fb = getattr(layer, "feedback", None)
    if fb is None:
        return {}
    if fb.rule.needs_sgd:
        raise UserError("implicit feedback stores no R; convert with implicit=False")
    stored = {name: getattr(fb, name).detach() for name in ("B", "R") if hasattr(fb, name)}
    if not stored:
        return {"K": feedback_weight(layer)}
    mask, last = getattr(fb, "mask", None), list(stored)[-1]
    return stored if mask is None else stored | {last: stored[last] * mask}


def symmetry(net: nn.Module, seed: int = 0) -> pd.DataFrame:
    """How much every single feedback matrix of a network mirrors its layer's weight W.

    A matrix of W's shape is compared entry by entry. In a matrix of any shape, each unit is compared with the forward
    neuron that it resembles most. The units are the rows of a matrix that shares W's input side (R of product
    feedback, B of direct feedback), or the columns of a matrix that shares W's output side (B of product feedback). Two
    levels say what a match is worth. ``chance`` is the match of a Gaussian matrix, which knows nothing of W. ``mixed``
    is the match of random Gaussian mixtures of W's own rows (or columns): each such unit resembles all forward neurons
    a little and none in particular. If ``match`` > ``mixed``, units of the matrix resemble single forward neurons.
    Our definition: the paper has no such measure.

    Args:
        net: a converted network.
        seed: of the two random matrices (default 0).

    Returns:
        One row a feedback matrix (see :func:`matrices`): ``layer``, ``depth``, ``matrix``, ``correlation``
        (Pearson's, over entries) and ``angle_deg``, both nan where the shapes differ, and ``match``, ``mixed``,
        ``chance``: the mean over the matrix's units of the largest absolute cosine with any forward neuron; nan where
        neither side is shared. In float64.
    """
    rows = []
    for depth, (name, layer) in enumerate(converted(net).items(), 1):
        W = float64(layer.weight)
        for key, M in matrices(layer).items():
            M, found = float64(M), {"correlation": float("nan"), "angle_deg": float("nan")}
            if M.shape == W.shape:
                pair = torch.stack([M.flatten(), W.flatten()])
                found = {"correlation": torch.corrcoef(pair)[0, 1].item(), "angle_deg": angle(M, W)}
            units = neurons = None
            if M.shape[1:] == W.shape[1:]:
                units, neurons = M.flatten(1), W.flatten(1)
            elif M.dim() == 2 and len(M) == len(W):
                units, neurons = M.T, W.flatten(1).T
            if units is None:
                found |= dict.fromkeys(("match", "mixed", "chance"), float("nan"))
            else:
                gen = generator(seed, name, key, "symmetry")
                weights = torch.randn(len(units), len(neurons), generator=gen, dtype=torch.float64).to(W.device)
                random = torch.randn(units.shape, generator=gen, dtype=torch.float64).to(W.device)
                compared = {"match": units, "mixed": weights @ neurons, "chance": random}
                found |= {what: nearest(M, neurons) for what, M in compared.items()}
            rows.append({"layer": name, "depth": depth, "matrix": key, **found})
    columns = ["layer", "depth", "matrix", "correlation", "angle_deg", "match", "mixed", "chance"]
    return pd.DataFrame(rows, columns=columns)


def nearest(a: Tensor, b: Tensor) -> float:
    """Mean over the rows of ``a`` (m, d) of the largest absolute cosine with any row of ``b`` (n, d); zero rows are
    left out."""
    a, b = (t[torch.linalg.vector_norm(t, dim=1) > 0] for t in (a, b))
    cosines = nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T
    return cosines.abs().amax(1).mean().item() if cosines.numel() else float("nan")
