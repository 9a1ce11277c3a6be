"""Beyond p3, on MNIST: gradient angles, the decay of the first epoch, and how small the expansion may be."""

from __future__ import annotations

from fa.experiments import Experiment, p3_fig2
from fa.train.config import Config

RULES = ("bp", "fa", "dfa", "usf", "kp", "pfa", "pfa_o")

DECAYS = (0.0, 0.003, 0.01, 0.1)  # of the first epoch; Figure 2 has 0.03. 0: the later epochs' decay
EXPANSIONS = (0.25, 0.5, 1.0, 2.0, 5.0)  # Figure 2 has 10
QUICK_DECAYS = (0.0, 0.02, 0.06)  # digits have 22 steps an epoch, not 937; Figure 2's quick mode has 0.2


def grid(mode: str, rules: tuple[str, ...], seeds: int, epochs: int, dataset: str) -> list[Config]:
    """Figure 2's runs, and short ones with another decay in the first epoch, or another expansion.

    Figure 2's schedule changes nothing in epochs 1 to 20, so that the first epochs of its runs belong to both series.
    """
    quick = mode == "quick"
    whole = p3_fig2.grid(mode, rules, seeds or (2 if quick else 5), epochs or (20 if quick else 0), dataset)
    runs = list(whole)
    for config in whole:
        if not seeds and config.seed >= 3:
            continue
        own = config.vary(measure="mismatch")
        if config.rule in p3_fig2.DECAYED:
            # R as a matrix where that is cheap, so that the mismatch that is left is measured on it
            implicit = None if config.rule == "pfa_o" else config.rule_options.get("implicit")
            short = own.vary(implicit=implicit, epochs=min(4, config.epochs))
            runs += [short.vary(first_weight_decay=decay) for decay in (DECAYS if not quick else QUICK_DECAYS)]
        if config.rule == "pfa":
            short = own.vary(epochs=min(10, config.epochs))
            runs += [short.vary(expansion=λ) for λ in EXPANSIONS]
    return runs


def expansion_of(config: Config) -> float:
    """Expansion of a run's population; nan where its rule has none."""
    return float(config.rule_options.get("expansion", {"pfa_o": 1.0}.get(config.rule, float("nan"))))


EXPERIMENT = Experiment(
    "Gradients, decay and expansion on MNIST", "p3", "37_pfa_beyond", RULES, grid,
    swept=lambda config: {"expansion": expansion_of(config), "decay": config.first_weight_decay or config.weight_decay},
)  # fmt: skip
