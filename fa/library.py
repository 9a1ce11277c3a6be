"""The library's public names, behind :mod:`fa`, which imports them when the first of them is asked for."""

# ruff: noqa: F401
from fa.check import check_rule
from fa.layers.convert import add_feedback, convert, feedback_parameters, param_groups
from fa.layers.hooks import after_step
from fa.metrics import alignment, exact_backprop, feedback_weight, gradient_angles
from fa.rules import RULES, Rule
from fa.theory import decay_for
