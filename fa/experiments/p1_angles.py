"""p1's rules on Architecture 1: how feedback, local errors and gradients align with backprop's, from the first steps on;
the runs are p1_accuracy's."""

from __future__ import annotations

from fa.experiments import Experiment
from fa.experiments.p1_accuracy import RULES, grid, swept

EXPERIMENT = Experiment(
    "Alignment of feedback and gradients in a convolutional network", "p1", "12_fa_angles", RULES, grid, small=True,
    swept=swept,
)  # fmt: skip
