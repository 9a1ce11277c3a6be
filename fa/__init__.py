"""Learning without weight transport: every rule, on any network, and the papers' figures rebuilt."""

from fa.check import check_rule
from fa.errors import UserError
from fa.layers import dfa  # noqa: F401  (registers "dfa")
from fa.layers.convert import add_feedback, convert, feedback_parameters, param_groups
from fa.layers.hooks import after_step
from fa.metrics import alignment, exact_backprop, feedback_weight, gradient_angles
from fa.paths import ROOT
from fa.rules import RULES, Rule
from fa.theory import decay_for

__all__ = [
    "ROOT", "RULES", "Rule", "UserError", "add_feedback", "after_step", "alignment", "check_rule", "cite", "convert",
    "decay_for", "exact_backprop", "feedback_parameters", "feedback_weight", "gradient_angles", "notebook",
    "param_groups",
]  # fmt: skip

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name == "notebook":  # on demand: `import fa` and `fa run` need no notebook library
        from fa.results.page import notebook

        return notebook
    if name == "cite":
        from fa.results.cite import cite

        return cite
    from fa.errors import did_you_mean

    raise AttributeError(f"module 'fa' has no attribute {name!r}{did_you_mean(name, [*__all__, '__version__'])}")
