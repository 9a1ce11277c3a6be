"""Every layer-wise learning rule: the weight that carries the error down in place of ``W``, and how that weight learns.

:mod:`fa.rules.base` has the contract of a rule, for rules of one's own.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fa.errors import unknown
from fa.rules.base import Rule, fans, random_mask, rms, uniform
from fa.rules.estimation import AA, IA, SA, WM, Primitives
from fa.rules.fixed import BP, BRSF, FA, FRSF, USF, Frozen
from fa.rules.product import KP, PFA, PFAo

__all__ = [
    "AA", "BP", "BRSF", "FA", "FRSF", "IA", "KP", "PFA", "RULES", "SA", "USF", "WM", "Frozen", "PFAo", "Primitives",
    "Rule", "fans", "random_mask", "rms", "rule", "uniform",
]  # fmt: skip

RULES: dict[str, type] = {
    rule.name: rule for rule in (BP, FA, USF, BRSF, FRSF, Frozen, KP, PFA, PFAo, Primitives, WM, IA, SA, AA)
}
"""Name -> rule. Extend it with your own; :mod:`fa.layers` adds ``dfa``."""


def rule(name: str, **options: Any) -> Rule:
    """The rule of that name with these options.

    Raises:
        UserError: an unknown name or option, which names the known ones; a value that the option does not take.
    """
    if name not in RULES:
        raise unknown("rule", name, sorted(RULES))
    known = [f.name for f in fields(RULES[name])]
    for option in options:
        if option not in known:
            raise unknown("option", option, known, f"rule {name!r}")
    return RULES[name](**options)
