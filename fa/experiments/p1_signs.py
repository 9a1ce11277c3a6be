"""p1, sign-concordant feedback before any training: its angle to W, by the distribution of W and by the share of
concordant signs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fa import tables
from fa.errors import UserError
from fa.experiments import Experiment
from fa.layers.convert import convert
from fa.layers.feedback import generator
from fa.metrics import angle, feedback_weight
from fa.theory import concordant_angle
from fa.train.config import identity

WEIGHTS = ("uniform", "truncated", "normal")  # PyTorch's and Xavier's default; TensorFlow's, cut at two sd; He's
MAGNITUDES = {
    "constant": "usf",
    "uniform": "frsf",
    "truncated": "",
    "normal": "",
}  # of the feedback; "": no rule here draws it
SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class StartAngle:
    """Random weights of one convolution and sign-concordant feedback for them; nothing is trained.

    Args:
        rule: "usf" (one magnitude for the layer) or "frsf" (a random magnitude for each weight).
        weights: distribution of W, a word of :data:`WEIGHTS`.
        magnitudes: distribution of the feedback's magnitudes, a word of :data:`MAGNITUDES`.
        repeats: independent draws, numbered in the record's ``seed``.
        channels: inputs and outputs of the convolution (default 64: the second one of p1's Architecture 1).
        kernel: width of its kernel (default 5: Architecture 1's).
        revision: of the recipe.

    Source: rules of p1; Liao et al. 2016. The sizes are Architecture 1's (Lance & Kieu 2026).
    """

    rule: str
    weights: str
    magnitudes: str
    repeats: int
    channels: int = 64
    kernel: int = 5
    revision: int = 1

    run = property(identity)

    def table(self) -> pd.DataFrame:
        """``seed`` (the repeat), ``share`` of concordant signs, ``epoch`` (0), ``layer``, ``depth``, ``metric``,
        ``value``.

        ``angle_deg``: angle of W to the feedback; ``sign_concordance``: share of equal signs as drawn; ``law_deg``: the
        angle that follows from the share and the draw's own angle at share 1, cos = (2 share - 1) cos(angle at 1).
        """
        rows = []
        for repeat in range(self.repeats):
            gen = generator(repeat, "start angle", self.weights, self.magnitudes)
            shape = (self.channels, self.channels, self.kernel, self.kernel)
            layer = nn.Conv2d(self.channels, self.channels, self.kernel, bias=False).double()
            with torch.no_grad():
                layer.weight.copy_(sample(self.weights, shape, gen))
            W = layer.weight.detach()
            B = self.feedback(layer, repeat, gen)
            whole = angle(W, B)
            flipped = torch.rand(shape, generator=gen, dtype=torch.float64)
            for share in SHARES:
                K = torch.where(flipped < share, B, -B)  # (out, in, k, k)
                law = math.degrees(math.acos((2 * share - 1) * math.cos(math.radians(whole))))
                equal = (K.sign() == W.sign()).double().mean().item()
                values = {"angle_deg": angle(W, K), "sign_concordance": equal, "law_deg": law}
                rows += [[repeat, share, 0, "", None, metric, value] for metric, value in values.items()]
        return pd.DataFrame(rows, columns=["seed", "share", "epoch", "layer", "depth", "metric", "value"])

    def feedback(self, layer: nn.Module, seed: int, gen: torch.Generator) -> Tensor:
        """Feedback with all signs concordant, of W's shape: the rule's own where a rule here draws such magnitudes."""
        if rule := MAGNITUDES[self.magnitudes]:
            return feedback_weight(convert(layer, rule, seed=seed)).detach()
        W = layer.weight.detach()
        return sample(self.magnitudes, tuple(W.shape), gen).abs() * W.sign()


def sample(distribution: str, shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Independent float64 numbers of mean 0 from one of :data:`WEIGHTS`; their size does not matter here."""
    if distribution == "uniform":
        return 2 * torch.rand(shape, generator=gen, dtype=torch.float64) - 1
    if distribution == "normal":
        return torch.randn(shape, generator=gen, dtype=torch.float64)
    low, high = (1 + math.erf(-(2**0.5))) / 2, (1 + math.erf(2**0.5)) / 2  # normal probabilities below -2 and below 2
    u = low + (high - low) * torch.rand(shape, generator=gen, dtype=torch.float64)
    return torch.special.ndtri(u)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[StartAngle]:
    """Every distribution of W with every distribution of magnitudes, ten draws; quick: three draws."""
    if epochs or dataset:
        raise UserError("p1_signs draws random weights and trains nothing; leave epochs and dataset out")
    if unknown := set(rules) - {"usf", "frsf"}:
        raise UserError(f"p1_signs is about usf and frsf, not {', '.join(sorted(unknown))}")
    repeats = seeds or (3 if mode == "quick" else 10)
    pairs = itertools.product(WEIGHTS, MAGNITUDES)
    runs = [StartAngle("usf" if m == "constant" else "frsf", w, m, repeats) for w, m in pairs]
    return [c for c in runs if c.rule in rules]


EXPERIMENT = Experiment(
    "Angle of sign-concordant feedback before training", "p1", "15_fa_signs", ("usf", "frsf"), grid,
    swept=lambda config: {"weights": config.weights, "magnitudes": config.magnitudes},
)  # fmt: skip

CAPTION = """Sign-concordant feedback before any training: the angle between a convolution's weights W (64 to 64
channels, 5x5) and its feedback. a: all signs concordant, by the distributions of W and of the feedback's magnitudes
(constant: uSF; random: brSF and frSF; truncated: normal, cut at two standard deviations). b: uniform W, against the
share of concordant signs. Markers: mean +/- 1 sd of independent draws (most sd are smaller than the marker); lines:
theory. Rings: Lance & Kieu (2026), local error angles, read off their Figure 3."""

COLORS = {"constant": "#009E73", "uniform": "#999933", "truncated": "#56B4E9", "normal": "#882255"}
MARKERS = {"constant": "^", "uniform": ">", "truncated": "s", "normal": "o"}


def draw(page: Any) -> Any:
    """The figure; ``page`` is what ``fa.notebook`` returns."""
    from fa import plot

    table = page.table()
    angles = table[table.metric == "angle_deg"]
    with plot.style():
        fig, axes = plot.figure("ab", height=2.5)
        whole = angles[angles.share == 1].groupby(["weights", "magnitudes"]).value.agg(["mean", "std"])
        words = [w for w in WEIGHTS if w in whole.index.get_level_values(0)]
        kinds = [m for m in MAGNITUDES if m in whole.index.get_level_values(1)]
        for j, m in enumerate(kinds):
            for i, w in enumerate(words):
                x = i + 0.17 * (j - (len(kinds) - 1) / 2)
                axes["a"].hlines(concordant_angle(w, m), x - 0.075, x + 0.075, color=COLORS[m], lw=1)
                mean, sd = whole.loc[(w, m)]
                label = f"{m} magnitude" + ("" if m == "constant" else "s") if i == 0 else None
                axes["a"].errorbar(x, mean, sd, fmt=MARKERS[m], color=COLORS[m], ms=3.8, elinewidth=0.8, label=label)
        axes["a"].set(xticks=range(len(words)), ylabel="Angle to W (°)", ylim=(25, 56), xlim=(-0.5, len(words) - 0.5))
        axes["a"].set_xticklabels([f"{w} W" for w in words])
        axes["a"].legend(loc="upper left", ncols=2)
        axes["a"].tick_params(axis="x", length=0)
        p = np.linspace(0.5, 1, 101)
        for m in kinds:
            rows = (
                angles[(angles.weights == words[0]) & (angles.magnitudes == m)]
                .groupby("share")
                .value.agg(["mean", "std"])
            )
            law = np.degrees(np.arccos((2 * p - 1) * math.cos(math.radians(concordant_angle(words[0], m)))))
            axes["b"].plot(p, law, color=COLORS[m], lw=0.9)
            axes["b"].errorbar(
                rows.index, rows["mean"], rows["std"], fmt=MARKERS[m], color=COLORS[m], ms=3.5, elinewidth=0.8
            )
        axes["b"].set(
            xlabel="Share of concordant signs", ylabel="Angle to W (°)", ylim=(25, 95), yticks=(30, 45, 60, 75, 90)
        )
        axes["b"].axhline(90, color="0.75", lw=0.6, ls=":", zorder=0)
        published = page.reference()
        published = published[published.source.str.startswith("Lance")] if len(published) else published
        for row in published.itertuples():
            plot.published(axes["b"], 1.0, row.value, COLORS[row.magnitudes], size=7, fillstyle="none")
        plot.note(axes["b"], f"{words[0]} W, n = {angles.seed.nunique()} draws")
        plot.letters(axes.values())
    return fig


def listing(table: pd.DataFrame) -> str:
    """Table: measured mean and sd, n, and the formula's angle, for every pair of distributions at share 1."""
    rows = table[(table.metric == "angle_deg") & (table.share == 1)]
    if rows.empty:
        return tables.several("no draw yet")
    found = rows.groupby(["weights", "magnitudes"], sort=False).value.agg(["mean", "std", "count"]).reset_index()
    found["theory"] = [concordant_angle(w, m) for w, m in zip(found.weights, found.magnitudes)]
    return tables.shown(found, index=False, float_format="{:.2f}".format, na_rep="-")
