"""How alike the layers of trained networks are: a run that trains nothing and reads the weights that others keep."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from fa.metrics import linear_layers
from fa.train import data
from fa.train.config import Config, identity
from fa.train.network import build_network

FEWEST = 50
"""Images that a part of them must have to be compared on; of fewer the estimator's noise is all one would see."""


@dataclass(frozen=True)
class Similarity:
    """Linear CKA of every layer of a network with that of reference networks; see :attr:`needs`.

    Args:
        rule: of the network.
        seed: of the network.
        network: its run, as :func:`fa.train.config.canonical` writes it.
        reference: the run of the reference network; the network's own run compares with ``another`` alone.
        another: the run of a reference network of another seed.
        images: so many of the first test images (default 1000).
        revision: of the recipe.
    """

    rule: str
    seed: int
    network: str
    reference: str
    another: str
    images: int = 1000
    revision: int = 1

    run = property(identity)

    @property
    def dataset(self) -> str:
        """Name of the data set that the networks know."""
        return self.needs[0].dataset

    @property
    def needs(self) -> tuple[Config, ...]:
        """The runs whose trained weights :meth:`table` takes: network, reference, another."""
        return tuple(Config(**json.loads(text)) for text in (self.network, self.reference, self.another))

    def table(self, *weights: dict[str, Tensor]) -> pd.DataFrame:
        """``epoch``, ``layer``, ``depth``, ``metric``, ``value``, at epoch 0 (the untrained network against the trained
        references) and at the last.

        ``cka``: with the reference; of the trained network also ``cka_both_right`` and ``cka_reference_right`` (on the
        images that both, or the reference alone, classify right). ``cka_another``: with the reference of another seed.

        Args:
            weights: of each run of :attr:`needs`, the state that it keeps.
        """
        needs, rows = self.needs, []
        sets = data.load(needs[0].dataset)
        split = sets.test if sets.test is not None else sets.val
        x, y = split.first(self.images)  # (n, c, h, w), (n,)
        (network, right), (reference, known), (another, _) = (
            activities(c, sets, w, x, y) for c, w in zip(needs, weights)
        )
        untrained, _ = activities(needs[0], sets, None, x, y)
        parts = {"cka_both_right": right & known, "cka_reference_right": known & ~right}

        def compare(epoch: int, metric: str, own: dict[str, Tensor], to: dict[str, Tensor], part: Tensor) -> None:
            i = part.nonzero()[:, 0]  # (k,)
            for depth, layer in enumerate(own if len(i) >= FEWEST else (), 1):
                K, L = (grams[layer][i][:, i] for grams in (own, to))  # (k, k)
                rows.append([epoch, layer, depth, metric, linear_cka(K, L)])

        for epoch, own in ((0, untrained), (needs[0].epochs, network)):
            compare(epoch, "cka_another", own, another, torch.ones_like(right))
            if epoch == 0 or self.network != self.reference:
                compare(epoch, "cka", own, reference, torch.ones_like(right))
        for metric, part in parts.items() if self.network != self.reference else ():
            compare(needs[0].epochs, metric, network, reference, part)
        return pd.DataFrame(rows, columns=["epoch", "layer", "depth", "metric", "value"]).astype({"depth": "Int64"})


@torch.no_grad()
def activities(
    config: Config, sets: data.Data, weights: dict[str, Tensor] | None, x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Layer -> Gram matrix (n, n) of its outputs, before the activation; and which images (n,) are classified right.

    Args:
        weights: the trained state (None: the network is the untrained one).
    """
    net = build_network(config.vary(rule="bp", options=""), sets.shape, sets.classes).eval()
    if weights is not None:
        net.load_state_dict(weights)
    kept: dict[str, list[Tensor]] = {}
    for name, layer in linear_layers(net).items():

        def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
            kept.setdefault(name, []).append(out)

        layer.register_forward_hook(keep)
    out = torch.cat([net(part) for part in x.split(250)])  # (n, classes)
    return {name: gram(torch.cat(parts)) for name, parts in kept.items()}, out.argmax(1) == y


def gram(x: Tensor) -> Tensor:
    """Inner products of samples: x (n, ...) -> (n, n), float64."""
    x = x.detach().flatten(1)  # (n, features)
    return (x @ x.T).double()


def linear_cka(K: Tensor, L: Tensor) -> float:
    r"""Linear centred kernel alignment of two layers' activities for the same samples, by the unbiased estimator.

    .. math:: \mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,\mathrm{HSIC}(L, L)}}

    1: equal but for a rotation and one scale; 0 is the expectation for independent activities, which may come out
    below 0. Unlike the biased estimator it does not rise with the number of units.
    Source: Kornblith et al. 2019 (arXiv 1905.00414); HSIC_1 of Song et al. 2012, as Lance & Kieu 2026 use it.

    Args:
        K, L: :func:`gram` of the activities, (n, n), for n > 3 samples.
    """
    K, L = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)

    def hsic(K: Tensor, L: Tensor) -> Tensor:
        n = len(K)
        between = 2 / (n - 2) * (K.sum(0) @ L.sum(1))  # (n,) (n,) -> ()
        return ((K * L.T).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - between) / (n * (n - 3))  # -> ()

    return (hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()).item()
