"""p1's rules on photographs: ResNet-18 and AlexNet on ImageNet, for whoever has ImageNet and a GPU; the small mode
trains ResNet-18 on 2,000 photographs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from fa import plot, tables
from fa.experiments import Experiment
from fa.experiments.p1_scale import column
from fa.experiments.p2_imagenet import accuracy_cells, base_of, chance_of, gap_to_bp
from fa.experiments.p3_fig5 import accuracy_of
from fa.train.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fa.results.page import Page

RULES = ("bp", "fa", "dfa", "usf", "brsf", "frsf")
NETWORKS = {"resnet18": "ResNet-18", "alexnet": "AlexNet", "resnet8": "ResNet-8"}
"""The column ``network`` -> label."""

OWN: dict[str, dict[str, Any]] = {"dfa": {"optimizer": "adam", "lr": 0.001, "nesterov": False}}
"""Rule -> what its recipe has of its own: BioTorch's optimizer and rate of DFA on ImageNet."""
ALEXNET = {"model": "alexnet", "lr": 0.01}  # a tenth of ResNet-18's rate, for it has no batch norm; ours, not tried
SEEDS = {"paper": 1, "small": 3, "quick": 1}


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """The networks and recipes of page 27, whose runs of BP and FA these are: what differs is the rule.

    Paper: ImageNet, ResNet-18, and torchvision's AlexNet at a tenth of the rate; p1's own networks for ImageNet are not
    known. Small: ResNet-18 on 2,000 photographs of 20 classes at 32x32, three seeds, 18 epochs. Quick: ResNet-8 on
    digits, three epochs. DFA has Adam's rate 0.001, as BioTorch gives it on ImageNet; the warm-up and the drops are
    those of the other rules.
    """
    recipe, base = base_of(mode, epochs, dataset)
    networks: list[dict[str, Any]] = [{}, ALEXNET] if recipe == "paper" else [{}]
    return [
        base.vary(seed=seed, rule=rule, **network | OWN.get(rule, {}))
        for seed in range(seeds or SEEDS[mode])
        for network in networks
        for rule in rules
    ]


EXPERIMENT = Experiment(
    "Sign-concordant feedback on photographs", "p1", "18_fa_imagenet", RULES, grid, small=True,
    swept=lambda config: {"network": config.model},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figure

TEXT = """ c, d, e: by layer of ResNet-18, after training, angles: between the weight W and the feedback; between the
errors that the feedback and W send down from one error (local); and between the gradient of W and exact backprop's; 90
degrees: no relation. DFA has no feedback of W's shape. Runs that diverged count as chance in b; in a their curves end
where they did, c, d and e leave them out. Bars and bands: +/- 1 sd over seeds."""
CAPTION = f"""Rules of Moskovitz, Litwin-Kumar & Abbott (2018) on ImageNet; their accuracies are not known to us. a:
top-1 accuracy of ResNet-18 on the 50,000 validation images, by epoch. b: accuracy after the last epoch; open: AlexNet;
hollow, right of a column: BioTorch's ResNet-18, of a number of runs that is not published.{TEXT}"""
SMALL_CAPTION = f"""In place of ImageNet: ResNet-18 learns 20 classes from 2,000 photographs of 32x32 pixels in 18
epochs, under the rules of Moskovitz, Litwin-Kumar & Abbott (2018). a: accuracy on 500 validation images, by epoch;
dotted: chance, 5 percent. b: accuracy after the last epoch; dots: seeds.{TEXT}"""
PANELS = {"c": "angle_deg", "d": "delta_angle_local_deg", "e": "grad_angle_global_deg"}


@plot.style()
def draw(page: Page) -> Figure:
    """a: accuracy by epoch; b: after the last; c, d, e: angles by layer."""
    table, metric, paper = page.table(), accuracy_of(page), page.reference()
    networks = [n for n in NETWORKS if n in set(table.network)] or ["resnet18"]
    shown = table[table.network == networks[0]]
    fig, ax = plot.figure([[[["a", "b"]]], [[["c", "d", "e"]]]], height=4.4)
    plot.accuracy(ax["a"], shown, metric=metric)
    ax["a"].set_ylim(bottom=0)
    ax["a"].xaxis.get_major_locator().set_params(integer=True)
    plot.rule_key(ax["a"], table.rule if len(table) else RULES, EXPERIMENT.named)
    ends = gap_to_bp(page)
    ends = ends.assign(value=ends.accuracy, variant=ends.network)
    places = {(r, n): i + 0.36 * j for i, r in enumerate(RULES) for j, n in enumerate(networks)}
    column(ax["b"], ends, paper.assign(variant=paper.network) if len(paper) else paper, places)
    ax["b"].set(xticks=range(len(RULES)), ylabel=plot.LABELS[metric], ylim=(0, None))
    ax["b"].set_xticklabels([EXPERIMENT.named(r) for r in RULES])
    for panel in "ab":
        ax[panel].axhline(chance_of(page), color="0.6", lw=0.7, ls=":", zorder=0)
    last = shown[shown.epoch == shown.epoch.max()]
    for panel, of in PANELS.items():
        rows = last[(last.metric == of) & (last.depth > 0)].dropna(subset="value")
        for rule in plot.in_order(rows.rule):
            plot.means(ax[panel], rows[rows.rule == rule], "depth", rule, ms=2.4)
        ax[panel].axhline(90, color="0.75", lw=0.6, ls=":", zorder=0)
        ax[panel].set(
            xlabel="Layer, from the input",
            ylabel=plot.LABELS[of].replace("Angle", "Weight angle"),
            ylim=(-3, 100),
            yticks=(0, 30, 60, 90),
        )
    plot.letters([ax[p] for p in "abcde"])
    if page.trained == "small":
        plot.stamp(fig, "stand-in: 2,000 photographs at 32x32, not ImageNet")
    return fig


def listing(page: Page) -> str:
    """Table: a row a network and rule: accuracy and gap to BP, and after training the three angles, means of the
    layers and seeds."""
    table = page.table()
    if table.empty:
        return tables.several("no run yet")
    parts, keys = accuracy_cells(page), ["network", "rule"]
    last = table[(table.epoch == table.epoch.max()) & (table.depth > 0)]
    for name, of in zip(("weight angle", "local error angle", "gradient angle"), PANELS.values()):
        parts[name] = last[last.metric == of].groupby(keys).value.mean()
    wide = pd.DataFrame(parts)
    wide = wide.loc[[(n, r) for n in NETWORKS for r in plot.in_order(table.rule) if (n, r) in wide.index]].reset_index()
    wide = wide.assign(network=wide.network.map(NETWORKS), rule=wide.rule.map(EXPERIMENT.named))
    wide["minus BP"] = wide["minus BP"].fillna("-")
    return tables.shown(wide, index=False, float_format="{:.1f}".format, na_rep="-")
