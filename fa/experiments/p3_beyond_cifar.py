"""Beyond p3, on CIFAR-10: how small the expansion may be before accuracy falls; ResNet-20 for a GPU, and ResNet-8 for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fa.experiments import p3_beyond, p3_fig2, p3_fig4
from fa.experiments.experiment import Experiment
from fa.train.config import Config

EXPANSIONS = (1, 2, 3, 5, 10, 20, 50)
SMALL_EXPANSIONS = (0.25, 1, 2, 5, 10, 50)
QUICK = (0.25, 1, 10)


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 4's recipe in 100 epochs in place of 250, drops to scale; quick: Figure 2's on digits."""
    if mode == "quick":
        return _series("p3_beyond_cifar", p3_fig2.grid(mode, rules, seeds or 2, epochs or 12, dataset), QUICK)
    return _series("p3_beyond_cifar", p3_fig4.grid(mode, rules, seeds or 3, epochs or 100, dataset), EXPANSIONS)


def small(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 4's recipe with 8 layers in place of 20, in 10 epochs, drops to scale; quick: Figure 4's.

    The 351 steps of an epoch and the decay of the first are the paper's, so that as much of the mismatch is left after it as there.
    """
    quick = mode == "quick"
    plain = p3_fig4.grid(mode, rules, seeds or (1 if quick else 3), epochs or (5 if quick else 10), dataset)
    return _series(
        "p3_beyond_resnet8", [replace(c, model="resnet8") for c in plain], QUICK if quick else SMALL_EXPANSIONS
    )


def _series(name: str, plain: list[Config], sizes: Sequence[float]) -> list[Config]:
    """The runs, those of PFA with every expansion, those of the other rules once."""
    runs = []
    for config in plain:
        for λ in sizes if config.rule == "pfa" else (10,):
            runs.append(replace(config, experiment=name, options=config.options.replace("=10", f"={λ:g}")))
    return runs


def _swept(config: Config) -> dict[str, float]:
    return {"expansion": p3_beyond.swept(config)["expansion"]}


EXPERIMENT = Experiment(
    "p3_beyond_cifar",
    "Expansion and accuracy on CIFAR-10",
    "p3",
    "38_pfa_beyond_cifar10",
    ("bp", "pfa", "pfa_o"),
    grid,
    swept=_swept,
)
SMALL = Experiment(
    "p3_beyond_resnet8",
    "Expansion in ResNet-8 on CIFAR-10",
    "p3",
    "38_pfa_beyond_cifar10",
    ("bp", "fa", "pfa", "pfa_o"),
    small,
    swept=_swept,
)
