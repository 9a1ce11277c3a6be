"""p3, Figure 2: accuracy and alignment on MNIST, and the recipe that p3's other MNIST figures share."""

from __future__ import annotations

from typing import Any

from fa.experiments.experiment import Experiment
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "pfa", "pfa_o")

OPTIONS = {  # authors' configurations: Xavier everywhere; SF is uniform with the Xavier standard deviation; lambda = 10
    "fa": "init=xavier",
    "dfa": "init=xavier",
    "usf": "scale=xavier",
    "kp": "init=xavier",
    "pfa": "init=xavier expansion=10 implicit=true",
    "pfa_o": "init=xavier implicit=true",
}

DECAYED = ("kp", "pfa", "pfa_o")  # strong decay in the first epoch, so that the feedback aligns; kp so by our choice


def grid(
    mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str, expansion: int = 10, **own: Any
) -> list[Config]:
    """MNIST, 784-512-512-10, the authors' configuration; quick: digits, three seeds, and the first epoch's decay over fewer steps."""
    quick = mode == "quick"
    epochs = epochs or (40 if not quick else 30)
    runs = []
    for seed in range(seeds or (3 if quick else 5)):  # seeds outermost: a campaign that is cut short has whole seeds
        for rule in rules:
            options = OPTIONS.get(rule, "").replace("expansion=10", f"expansion={expansion}")
            decayed = rule in DECAYED
            runs.append(Config(
                "p3_fig2", rule, seed, options, dataset or ("digits" if quick else "mnist"),
                hidden="512,512" if not quick else "64,64", epochs=epochs,
                lr=0.01 if not quick else 0.05,
                lr_drops="20,30" if epochs == 40 else f"{epochs // 2},{epochs * 3 // 4}",
                weight_decay=9e-5 if decayed else 1e-4,
                first_weight_decay=(0.03 if not quick else 0.2) if decayed else 0.0,
            ))  # fmt: skip
    return runs


EXPERIMENT = Experiment(
    "p3_fig2", "Accuracy and alignment on MNIST", "p3", "32_pfa_fig2_mnist", RULES, grid, {"expansion": 10}
)
