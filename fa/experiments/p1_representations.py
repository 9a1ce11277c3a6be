"""p1's rules on Architecture 1: linear CKA of every layer with backprop's network; the networks are p1_accuracy's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fa import plot
from fa.experiments import Experiment, p1_accuracy
from fa.experiments.p1_accuracy import BARS, BFLOAT16, SCALED, SET_UP
from fa.train.config import Config, canonical
from fa.train.similarity import Similarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Page


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Similarity]:
    """Every network of p1_accuracy with backprop's of the same seed, which shares its initial weights, and with one of
    another seed: 1 for seed 0, and the seed before for any other."""
    runs = p1_accuracy.grid(mode, rules, seeds, epochs, dataset)

    def backprop(run: Config, seed: int) -> str:
        return canonical(p1_accuracy.recipe(run.vary(options=""), "bp", seed))

    others = [(run, backprop(run, run.seed), backprop(run, run.seed - 1 if run.seed else 1)) for run in runs]
    return [Similarity(run.rule, run.seed, canonical(run), same, other) for run, same, other in others]


def swept(similarity: Similarity) -> dict[str, Any]:
    """The columns that name a network's place: ``variant``."""
    return p1_accuracy.swept(Config(**json.loads(similarity.network)))


EXPERIMENT = Experiment(
    "Representations of feedback alignment and of backprop", "p1", "17_fa_representations", p1_accuracy.RULES, grid,
    small=True, swept=swept, labels=p1_accuracy.LABELS,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- figure

TEXT = """ Linear CKA between the outputs of each layer and of the same layer in a backprop network, 1,000 test images,
after training. a: a backprop network of the same seed, and so of the same initial weights. b: one of another seed, for
which backprop itself is the ceiling. Dotted: the untrained network against the trained one. c: FA by kernel, and uSF
whose norm follows W, against the network of a, on the images that both networks classify right (full) and on the images
that backprop alone classifies right (pale)."""
CAPTION = f"{SET_UP}{BFLOAT16}{TEXT} Hollow: Lance & Kieu's, one seed. {BARS}"
SMALL_CAPTION = f"{SET_UP}{SCALED}{TEXT} {BARS}"


@plot.style()
def draw(page: Page) -> Figure:
    """a: CKA with backprop of the same seed; b: of another seed; c: on parts of the images."""
    table, published = page.table(), page.reference()
    names = list(table.sort_values("depth").layer.unique()) or ["conv1", "conv2", "fc1", "fc2", "fc"]
    fig, ax = plot.figure("abc", height=2.9, sharey=True)
    end = table[table.epoch == table.epoch.max()]
    for panel, metric in (("a", "cka"), ("b", "cka_another")):
        p1_accuracy.by_layer(ax[panel], end[end.metric == metric], names)
        start = table[(table.metric == metric) & (table.epoch == 0)].drop_duplicates(["seed", "layer"])
        of_layer = start.groupby("layer").value.mean().reindex(names)
        ax[panel].plot(range(len(names)), of_layer, color="0.5", lw=0.9, ls=":", label="untrained")
    for row in published.itertuples() if len(published) else ():
        own = p1_accuracy.look(row.variant)
        plot.published(ax["a"], names.index(row.layer), row.value, own["color"], own["marker"])
    for metric, shade in (("cka_both_right", 1.0), ("cka_reference_right", 0.45)):
        some = end[(end.metric == metric) & end.variant.isin(["fa", "usf_track"])]
        lines = len(ax["c"].lines)
        p1_accuracy.by_layer(ax["c"], some, names)
        for line in ax["c"].lines[lines:]:
            line.set_alpha(shade)
    ax["a"].set(ylabel="Linear CKA", ylim=(-0.05, 1.05))
    plot.note(ax["a"], "with BP, same seed")
    plot.note(ax["b"], "with BP, another seed")
    plot.note(ax["c"], "full: both right; pale: BP alone")
    fig.legend(handles=[*p1_accuracy.key(table.variant), *ax["a"].get_legend_handles_labels()[0]],
               loc="outside lower center", ncols=5)  # fmt: skip
    plot.letters(ax.values())
    return fig
