"""Learning without weight transport: every rule, on any network, and the papers' figures rebuilt."""

from . import dfa  # noqa: F401  (registers "dfa")
from .errors import UserError
from .layers import convert, feedback_parameters, param_groups
from .metrics import alignment, exact_backprop, feedback_weight, gradient_angles
from .paths import ROOT
from .rules import RULES, Rule
from .steps import after_step

__all__ = [
    "ROOT", "RULES", "Rule", "UserError", "after_step", "alignment", "convert", "exact_backprop", "feedback_parameters",
    "feedback_weight", "gradient_angles", "notebook", "param_groups",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name == "notebook":  # on demand: `import fa` and `fa run` need no notebook library
        from .notebooks import notebook

        return notebook
    raise AttributeError(f"module 'fa' has no attribute {name!r}")
