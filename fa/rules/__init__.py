"""Every layer-wise learning rule: the weight that carries the error down in place of ``W``, and how that weight learns.

:mod:`fa.rules.base` has the contract of a rule, for rules of one's own.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fa.errors import UserError, did_you_mean
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
        UserError: an unknown name or option, which names the known ones; text for an option that takes none.
    """
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}; known rules: {', '.join(sorted(RULES))}{did_you_mean(name, RULES)}")
    known = {f.name: str(f.type) for f in fields(RULES[name])}
    for option, value in options.items():
        if option not in known:
            known_options = f"{', '.join(known) or 'none'}{did_you_mean(option, known)}"
            raise UserError(f"unknown option {option!r} of rule {name!r}; known options: {known_options}")
        if isinstance(value, str) and "str" not in known[option]:
            raise UserError(f"{name}: {option}={value!r} is text; the option takes a value of type {known[option]}")
    return RULES[name](**options)
