"""Learned feedback for an optimizer that was made before the network was converted."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from fa.errors import UserError
from fa.layers.hooks import converted
from fa.layers.steps import groups_of, leader, learned

# What PyTorch's schedulers keep for every group of their optimizer.
_BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def add_feedback(optimizer: torch.optim.Optimizer, net: nn.Module) -> torch.optim.Optimizer:
    """Put the learned feedback of a converted network into an optimizer that holds its weights.

    Feedback that follows W's own update (kp, pfa, pfa_o) joins W's parameter group, so that both share learning rate,
    decay and schedules from now on. Feedback whose gradient holds a decay (wm, ia, sa, aa) gets a group of its own with
    W's options as they are now and no weight decay; PyTorch's schedulers made before follow it as they follow W's
    group. Feedback that the optimizer holds already stays where it is, so that a second call changes nothing. An
    optimizer made after the conversion needs no such call: :func:`fa.param_groups`.

    Args:
        optimizer: one of ``torch.optim``, or of its kind; changed in place.
        net: the converted network, or a part of it.

    Returns:
        The optimizer.

    Raises:
        UserError: the optimizer holds no weight of the network's learned feedback; a scheduler of another kind was made
            for the optimizer before, and would leave the new group out. Nothing is changed then.

    Example:
        >>> net = torch.nn.Linear(4, 2)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> opt = fa.add_feedback(opt, fa.convert(net, "kp"))
    """
    held, names = groups_of(optimizer), {id(p): name for name, p in net.named_parameters()}
    layers = [layer for layer in converted(net).values() if learned(layer)]
    mine = [layer for layer in layers if id(leader(layer)) in held]
    if layers and not mine:
        raise UserError(
            "this optimizer holds no weight of the network whose feedback learns, so that there is no learning rate to "
            "take over; call fa.add_feedback with the optimizer of the weights"
        )
    new: dict[tuple[int, bool], list[nn.Parameter]] = {}  # (W's group, own decay) -> feedback
    for layer in mine:
        key = held[id(leader(layer))], layer.feedback.rule.own_decay
        new.setdefault(key, []).extend(p for p in learned(layer) if id(p) not in held)
    new = {key: list({id(p): p for p in feedback}.values()) for key, feedback in new.items() if feedback}
    schedulers = _schedulers(optimizer) if any(own for _, own in new) else []
    for (i, own), feedback in new.items():
        group = optimizer.param_groups[i]
        named = {"param_names": [names[id(p)] for p in feedback]} if "param_names" in group else {}
        if not own:
            group["params"] += feedback
            group.get("param_names", []).extend(named.get("param_names", []))
            continue
        n = len(optimizer.param_groups)
        optimizer.add_param_group({**group, **named, "params": feedback, "weight_decay": 0.0, "own_decay": True})
        for scheduler in schedulers:
            for key, value in vars(scheduler).items():
                if key in _BY_GROUP and isinstance(value, list) and len(value) == n:
                    value.append(value[i])
    return optimizer


def _schedulers(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The schedulers made for an optimizer, which knows none of them.

    Raises:
        UserError: a scheduler that is not PyTorch's.
    """
    kinds = {kind for kind in map(type, gc.get_objects()) if any("Scheduler" in base.__name__ for base in kind.__mro__)}
    found = [o for o in gc.get_objects() if type(o) in kinds and getattr(o, "optimizer", None) is optimizer]
    for o in found:
        if not type(o).__module__.startswith("torch.optim."):
            raise UserError(
                f"a {type(o).__name__} was made for this optimizer before its feedback was added, and would leave the "
                "feedback's group out; make the scheduler after fa.add_feedback"
            )
    return found
