"""Put a learning rule on a network, and its learned feedback into an optimizer.

Conversion changes a layer's class in place and adds one submodule, ``layer.feedback``, that holds the rule and its
tensors. Parameters, their names, hooks, device, dtype and mode stay; an optimizer made before holds the live weights.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fa import rules
from fa.errors import UserError
from fa.layers import dfa  # noqa: F401  (registers "dfa")
from fa.layers.feedback import Feedback, NoisyFeedback
from fa.layers.hooks import converted, know, unwatch, watch_other
from fa.layers.maps import ConvMap, LinearMap, geometry
from fa.layers.steps import groups_of, leader, learned
from fa.layers.targets import targets


@torch.inference_mode(False)  # whose tensors cannot be trained with
def convert(
    net: nn.Module,
    rule: str | rules.Rule,
    *,
    seed: int = 0,
    skip: str | Iterable[str] = (),
    treat_as_base: type | Iterable[type] = (),
    sample: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """Put a learning rule on every ``nn.Linear`` and ``nn.Conv2d`` of a network, in place; returns the network.

    An ordinary training loop then trains under the rule. The forward pass, the parameters and their names stay as they
    are. A network that already has a rule loses it first. ``convert(net, "bp")`` leaves plain backprop.

    Args:
        net: any module, also a single layer.
        rule: a name of :data:`fa.RULES`, or a rule object.
        seed: of the feedback's random draws (default 0). Every layer draws from a generator of its own, made of this
            seed and the layer's name; the global generator is not touched.
        skip: qualified names of modules or parameters (or one name) that stay plain backprop, with all modules inside
            them (default none). The name of a layer's parameter leaves out the layer.
        treat_as_base: subclasses of ``nn.Linear`` and ``nn.Conv2d`` (or one) that compute what their base class
            computes, and so are converted as it is, e.g. ``timm.layers.Linear`` (default none: each is refused).
        sample: a batch of inputs (n, ...), for rules that need the sizes of the maps (``form="dense"``): the network is
            run on it once, in eval mode (default None).
        options: the rule's own, e.g. ``expansion=10`` for ``pfa``; refused beside a rule object, which has its own.

    Raises:
        UserError: ``net`` is no module; unknown rule or option; a layer that cannot be converted, by name (tied or
            computed weights, subclasses, transposed, recurrent, complex and lazy layers); any other trained tensor of
            two or more axes, by name, unless kind, name or shape say that it is an embedding, a norm, a token, a scale
            or a bias (which raises in the backward pass where activity is multiplied by it as by a matrix); weights on
            the meta device; learned feedback within ``DistributedDataParallel``; a parametrization
            (``torch.nn.utils.parametrize``) that came after an earlier rule. Nothing is changed then.

    Example:
        >>> net = fa.convert(torch.nn.Linear(4, 2), "fa", seed=1)
        >>> fa.feedback_weight(net).shape
        torch.Size([2, 4])
    """
    if not isinstance(net, nn.Module):
        raise UserError(f"convert takes a torch.nn.Module, not a {type(net).__name__}")
    r = rules.rule(rule, **options) if isinstance(rule, str) else rule
    if not isinstance(r, rules.Rule):
        raise UserError(f"rule must be a name of fa.RULES or a fa.Rule, not {type(rule).__name__}")
    if options and r is rule:
        raise UserError(f"options go with the name of a rule; a rule object has its own: {', '.join(options)}")
    if r.name == "bp":
        return revert(net)
    if r.learned and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in net.modules()):
        raise UserError("DistributedDataParallel averages what it was given: convert the network first, then wrap it")
    layers, others, left = targets(net, skip, treat_as_base)
    sizes = {} if sample is None else _sizes(net, sample)
    # all feedback is drawn before anything is changed
    own = hasattr(r, "draw_feedback")
    feedback = r.draw_feedback(net, layers, sizes, seed) if own else _draw(r, layers, sizes, seed)
    revert(net)
    for name, layer in layers.items():
        put_on(layer, feedback[name])
    for other in others:
        watch_other(*other)
    know(net, left)
    for tape in _tapes(feedback.values()):
        tape.put_on()
    if "torch._dynamo" in sys.modules:  # a graph compiled before does not notice the rule
        torch.compiler.reset()
    return net


def _draw(rule: rules.Rule, layers: dict[str, nn.Module], sizes: dict[str, Any], seed: int) -> dict[str, Feedback]:
    """Layer name -> its feedback, under a layer-wise rule."""
    feedback = {}
    for i, (name, layer) in enumerate(layers.items()):
        own = rule.at(i)
        kind = NoisyFeedback if own.draws_noise else Feedback
        op = ConvMap(**geometry(layer)) if isinstance(layer, nn.Conv2d) else LinearMap()
        op.sizes = sizes.get(name)
        feedback[name] = kind(own, op, layer, name, seed)
    return feedback


def _tapes(feedback: Iterable[nn.Module]) -> set[Any]:
    """What stands between a network under direct feedback and its ``forward`` (see :mod:`fa.layers.dfa`)."""
    return {fb.tape for fb in feedback if hasattr(fb, "tape")}


@torch.no_grad()
def _sizes(net: nn.Module, sample: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Qualified name of a layer -> sizes of one sample's input and output, from one pass in eval mode."""
    sizes = {}
    with ExitStack() as after:  # removes the hooks, and puts the modes back
        for name, m in net.named_modules():
            after.callback(setattr, m, "training", m.training)
            if isinstance(m, (nn.Linear, nn.Conv2d)):

                def keep(m: nn.Module, args: tuple, kwargs: dict, out: Tensor, name: str = name) -> None:
                    sizes[name] = (*args, *kwargs.values())[0].shape[1:], out.shape[1:]

                after.enter_context(m.register_forward_hook(keep, with_kwargs=True))
        net.eval()(sample)
    return sizes


def put_on(layer: nn.Module, feedback: nn.Module) -> None:
    """Give the layer its feedback and change its class in place."""
    feedback.train(layer.training)
    feedback.original = type(layer)
    layer.feedback = feedback
    layer.__class__ = next((new for stock, new in feedback.classes.items() if isinstance(layer, stock)), type(layer))
    layer.__module__ = "torch.nn.modules.linear"  # torch.fx calls layers of torch.nn, and traces into all others
    if hasattr(layer, "install"):
        layer.install()
    layer.watch()


def revert(net: nn.Module) -> nn.Module:
    """Take every rule off the network, in place; returns the network. The same as ``convert(net, "bp")``.

    Raises:
        UserError: a layer was parametrized after its rule was put on.
    """
    layers = converted(net).values()
    if late := [m.feedback.layer_name for m in layers if nn.utils.parametrize.is_parametrized(m.place[0])]:
        raise UserError(f"layers {', '.join(late)} were parametrized after fa.convert; remove that first")
    tapes = _tapes([layer.feedback for layer in layers])
    for module in net.modules():
        unwatch(module)
    for layer in layers:
        if hasattr(layer, "remove"):
            layer.remove()
        layer.__class__ = layer.feedback.original
        vars(layer).pop("__module__", None)
        del layer.feedback
    for tape in tapes:
        if tape not in _tapes(layer.feedback for layer in converted(tape.net).values()):
            tape.remove()  # the tape stays while another part of its network is under direct feedback
    return net


def feedback_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The learned feedback of a converted network; :func:`fa.add_feedback` puts it into an optimizer made before."""
    return [p for layer in converted(net).values() for p in layer.feedback.parameters()]


def param_groups(
    net: nn.Module, lr: float, weight_decay: float = 0.0, feedback_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups with the weight decay that each rule needs.

    Feedback that follows W's own update (kp, pfa, pfa_o) shares W's learning rate and decay: the mismatch vanishes only
    if both decay alike. Feedback whose gradient holds a decay of its own (wm, ia, sa, aa) gets none from the optimizer,
    because a second decay would shift its fixed point, and is never maximized. Momentum makes it overshoot W (page 28).

    Args:
        net: a network, converted or not.
        lr: learning rate of all parameters, or of all but own-decay feedback if ``feedback_lr`` is given.
        weight_decay: weight decay of all parameters but own-decay feedback (default 0, ``torch.optim.SGD``'s).
        feedback_lr: learning rate of own-decay feedback (default: ``lr``).

    Returns:
        One group, or two if there is own-decay feedback; a group's key ``own_decay`` tells them apart, for schedules.
    """
    own = {id(p) for m in converted(net).values() if m.feedback.rule.own_decay for p in m.feedback.parameters()}
    shared = [p for p in net.parameters() if id(p) not in own]
    groups = [{"params": shared, "lr": lr, "weight_decay": weight_decay, "own_decay": False}]
    if own:
        rest = [p for p in net.parameters() if id(p) in own]
        feedback_lr = lr if feedback_lr is None else feedback_lr
        groups.append({"params": rest, "lr": feedback_lr, **_OWN})
    return groups


_OWN = {"weight_decay": 0.0, "maximize": False, "own_decay": True}  # options of feedback with an objective of its own
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
        UserError: the optimizer holds no weight of the network's learned feedback, or is Adagrad or LBFGS; a scheduler
            of another kind was made for it before, and would leave the new group out. Nothing is changed then.

    Example:
        >>> net = torch.nn.Linear(4, 2)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> opt = fa.add_feedback(opt, fa.convert(net, "kp"))
    """
    held, names = groups_of(optimizer), {id(p): name for name, p in net.named_parameters()}
    layers = [layer for layer in converted(net).values() if learned(layer)]
    mine = [layer for layer in layers if id(leader(layer)) in held]
    if layers and not mine:
        raise UserError("the optimizer holds no weight whose feedback learns; give fa.add_feedback the weights' own")
    new: dict[tuple[int, bool], list[nn.Parameter]] = {}  # (W's group, own decay) -> feedback
    for layer in mine:
        key = held[id(leader(layer))], layer.feedback.rule.own_decay
        new.setdefault(key, []).extend(p for p in learned(layer) if id(p) not in held)
    new = {key: list({id(p): p for p in feedback}.values()) for key, feedback in new.items() if feedback}
    if new and isinstance(optimizer, (torch.optim.Adagrad, torch.optim.LBFGS)):  # which count their parameters at once
        raise UserError(f"{type(optimizer).__name__} takes no parameters later; make the optimizer after fa.convert")
    schedulers = _schedulers(optimizer) if any(own for _, own in new) else []
    for (i, own), feedback in new.items():
        group = optimizer.param_groups[i]
        named = {"param_names": [names[id(p)] for p in feedback]} if "param_names" in group else {}
        if not own:
            group["params"] += feedback
            group.get("param_names", []).extend(named.get("param_names", []))
            continue
        n = len(optimizer.param_groups)
        optimizer.add_param_group({**group, **named, "params": feedback, **_OWN})
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
