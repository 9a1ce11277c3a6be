"""Learning without weight transport: every rule, on any network, and the papers' figures rebuilt."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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
    if name in __all__:
        return globals().setdefault(name, getattr(import_module(apart.get(name, "fa.library")), name))
    if name.isidentifier() and name[0] != "_" and find_spec(f"fa.{name}"):  # a chapter, such as fa.rules
        return import_module(f"fa.{name}")
    known = "" if name.startswith("_") else did_you_mean(name, [*__all__, "__version__"])  # tools ask for private names
    raise AttributeError(f"module 'fa' has no attribute {name!r}{known}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
