"""Learning without weight transport: every rule, on any network, and the papers' figures rebuilt."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fa.errors import UserError, did_you_mean
from fa.paths import ROOT

if TYPE_CHECKING:
    from fa.library import (
        RULES,
        Rule,
        add_feedback,
        after_step,
        alignment,
        check_rule,
        convert,
        decay_for,
        exact_backprop,
        feedback_parameters,
        feedback_weight,
        gradient_angles,
        param_groups,
    )  # fmt: skip
    from fa.results.cite import cite
    from fa.results.page import notebook

__all__ = [
    "ROOT", "RULES", "Rule", "UserError", "add_feedback", "after_step", "alignment", "check_rule", "cite", "convert",
    "decay_for", "exact_backprop", "feedback_parameters", "feedback_weight", "gradient_angles", "notebook",
    "param_groups",
]  # fmt: skip

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """A name on demand: ``fa --help`` and ``fa list`` need no torch, ``fa run`` no notebook library."""
    apart = {"notebook": "fa.results.page", "cite": "fa.results.cite"}
    if name.startswith("__"):  # asked for by tools that look at a module
        raise AttributeError(f"module 'fa' has no attribute {name!r}")
    module = import_module(apart.get(name, "fa.library"))
    if name in __all__ and hasattr(module, name):  # not so while the library itself is being imported
        return globals().setdefault(name, getattr(module, name))
    if name in globals():  # a chapter, such as fa.rules
        return globals()[name]
    raise AttributeError(f"module 'fa' has no attribute {name!r}{did_you_mean(name, [*__all__, '__version__'])}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
