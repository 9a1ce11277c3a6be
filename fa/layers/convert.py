"""Put a learning rule on a network: ``convert``, and what becomes of its layers.

Conversion changes a layer's class in place and adds one submodule, ``layer.feedback``, that holds the rule and its tensors. The
parameters, their names, hooks, device, dtype and mode stay; an optimizer made before still holds the live weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa import rules
from fa.errors import UserError
from fa.layers import attention
from fa.layers.feedback import Feedback, NoisyFeedback
from fa.layers.hooks import Converted, converted, unwatch, watch
from fa.layers.maps import ConvMap, LinearMap
from fa.rules import Rule


class FeedbackLinear(Converted, nn.Linear):
    """``nn.Linear`` whose error goes down through ``self.feedback``; made by :func:`convert`, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in) -> (..., out), as ``nn.Linear``."""
        if self.feedback.bypassed():
            return super().forward(x)
        return self.feedback.forward(x, self.weight, self.bias)


class FeedbackConv2d(Converted, nn.Conv2d):
    """``nn.Conv2d`` whose error goes down through ``self.feedback``; made by :func:`convert`, never constructed."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Shapes: x (n, in, h, w) or (in, h, w), as ``nn.Conv2d``."""
        if self.feedback.bypassed():
            return super()._conv_forward(x, weight, bias)
        pad = _explicit_padding(self)
        if pad:  # an ordinary operation before the layer's linear map; autograd sends the error through it exactly
            x = F.pad(x, pad, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        if x.dim() == 3:
            return self.feedback.forward(x.unsqueeze(0), weight, bias).squeeze(0)
        return self.feedback.forward(x, weight, bias)


def _explicit_padding(layer: nn.Conv2d) -> list[int]:
    """Padding to apply before the convolution: that of a padding mode, or "same" where its two sides differ; else []."""
    sides = layer._reversed_padding_repeated_twice
    uneven = isinstance(layer.padding, str) and sides[0::2] != sides[1::2]
    return sides if layer.padding_mode != "zeros" or uneven else []


def _linear_map(layer: nn.Module, sizes: tuple[torch.Size, torch.Size] | None = None) -> LinearMap | ConvMap:
    if not isinstance(layer, nn.Conv2d):
        return LinearMap(sizes=sizes)
    if _explicit_padding(layer):
        padding = (0, 0)
    elif isinstance(layer.padding, str):  # even sides; the list runs from the last axis
        padding = (layer._reversed_padding_repeated_twice[2], layer._reversed_padding_repeated_twice[0])
    else:
        padding = layer.padding
    return ConvMap(
        layer.stride, padding, layer.dilation, layer.groups, sizes=sizes, pad=tuple(_explicit_padding(layer))
    )


_CONVERTED = {
    nn.Linear: FeedbackLinear,
    nn.Conv2d: FeedbackConv2d,
    attention.RowsLinear: attention.RowsLinear,
}

_REFUSED = (  # layers with a matrix that errors pass through, for which there is no feedback here
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.lazy.LazyModuleMixin,
)
_REFUSED_NAMES = (  # torchvision's: Swin reads its layers' weights itself, a deformable convolution is none of torch's
    "ShiftedWindowAttention", "ShiftedWindowAttentionV2", "DeformConv2d"
)  # fmt: skip


def _targets(net: nn.Module, skip: str | Iterable[str]) -> dict[str, nn.Module]:
    """The layers to convert; raises for what cannot be, all at once."""
    skip = {skip} if isinstance(skip, str) else set(skip)
    names = {name for name, _ in net.named_modules()}
    if unknown := skip - names:
        raise UserError(f"skip names no module: {', '.join(sorted(unknown))}")
    holders: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)

    def skipped(name: str) -> bool:
        return any(name == s or name.startswith(s + ".") for s in skip)

    found, problems = {}, []
    for name, m in net.named_modules():
        if skipped(name):
            continue
        if isinstance(m, nn.MultiheadAttention):
            if why := attention.refusal(m):
                problems.append(f"{name or 'the root'} ({type(m).__name__}: {why})")
            prefix = f"{name}." if name else ""
            found |= {prefix + key: row for key, row in attention.rows(m).items()}
            if not skipped(prefix + "out_proj"):
                found[prefix + "out_proj"] = m.out_proj
            continue
        if not isinstance(m, (nn.Linear, nn.Conv2d)):
            if isinstance(m, _REFUSED) or type(m).__name__ in _REFUSED_NAMES:
                problems.append(f"{name or 'the root'} ({type(m).__name__}: no feedback for this kind of layer)")
            continue
        if name in found:  # the output projection of an attention
            continue
        if isinstance(m, nn.modules.lazy.LazyModuleMixin):
            problems.append(f"{name} (lazy: run the network once first)")
        elif type(m) not in _CONVERTED and not isinstance(m, Converted):
            problems.append(f"{name} ({type(m).__name__}: a subclass with behaviour of its own)")
        elif not isinstance(m._parameters.get("weight"), nn.Parameter):
            problems.append(f"{name} (its weight is computed from other parameters)")
        elif m.weight.is_complex():
            problems.append(f"{name} (its weight is complex)")
        elif len(holders[id(m.weight)]) > 1:
            problems.append(f"{name} (its weight is tied: {', '.join(holders[id(m.weight)])})")
        else:
            found[name] = m
    if problems:
        raise UserError(f"cannot convert {'; '.join(problems)}; leave them to backprop with skip=[...]")
    if not found:
        raise UserError("nothing to convert: the network has no nn.Linear and no nn.Conv2d")
    return found


def convert(
    net: nn.Module,
    rule: str | Rule,
    *,
    seed: int = 0,
    skip: str | Iterable[str] = (),
    sample: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """Put a learning rule on every ``nn.Linear`` and ``nn.Conv2d`` of a network, in place; returns the network.

    An ordinary training loop then trains under the rule. The forward pass, the parameters and their names stay as they are.
    A network that already has a rule loses it first. ``convert(net, "bp")`` leaves plain backprop.

    Args:
        net: any module, also a single layer.
        rule: a name of :data:`fa.RULES`, or a rule object.
        seed: of the feedback's random draws (default 0). Every layer draws from a generator of its own, made of this seed and
            the layer's name; the global generator is not touched.
        skip: qualified names of modules (or one name) that stay plain backprop, with all that is inside them.
        sample: a batch of inputs (n, ...), for rules that need the sizes of the maps (``form="dense"``): the network is run on it
            once, in eval mode. Default None.
        options: the rule's own, e.g. ``expansion=10`` for ``pfa``.

    Raises:
        UserError: unknown rule or option; a layer that cannot be converted, by name (tied or computed weights, subclasses,
            transposed, recurrent, complex and lazy layers); learned feedback within ``DistributedDataParallel``; a parametrization
            (``torch.nn.utils.parametrize``) that came after an earlier rule. Nothing is changed then.

    Example:
        >>> net = fa.convert(torch.nn.Linear(4, 2), "fa", seed=1)
        >>> fa.feedback_weight(net).shape
        torch.Size([2, 4])
    """
    r = rules.rule(rule, **options) if isinstance(rule, str) else rule
    if not isinstance(r, Rule):
        raise UserError(f"rule must be a name of fa.RULES or a fa.Rule, not {type(rule).__name__}")
    if r.name == "bp":
        return revert(net)
    if r.learned and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in net.modules()):
        raise UserError(
            "DistributedDataParallel averages the parameters it was given: convert the network first, then wrap it"
        )
    layers = _targets(net, skip)
    sizes = {} if sample is None else _sizes(net, sample)
    attach = r.attach if hasattr(r, "attach") else partial(_attach, r)
    put = attach(net, layers, sizes, seed)  # draws all feedback and changes nothing
    revert(net)
    put()
    return net


@torch.no_grad()
def _sizes(net: nn.Module, sample: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Layer -> sizes of one sample's input and output, from one pass in eval mode."""
    sizes, handles, modes = {}, [], {m: m.training for m in net.modules()}
    for name, m in net.named_modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):

            def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                sizes[name] = args[0].shape[1:], out.shape[1:]  # fmt: skip

            handles.append(m.register_forward_hook(keep))
    try:
        net.eval()(sample)
    finally:
        for handle in handles:
            handle.remove()
        for m, training in modes.items():
            m.training = training
    return sizes


def _attach(
    rule: Rule, net: nn.Module, layers: dict[str, nn.Module], sizes: dict[str, tuple[torch.Size, torch.Size]], seed: int
) -> Callable[[], None]:
    """Draw the feedback of every layer; the function returned puts it in place."""
    feedback = {}
    for i, (name, layer) in enumerate(layers.items()):
        own = rule.at(i)
        kind = NoisyFeedback if own.draws_noise else Feedback
        feedback[name] = kind(own, _linear_map(layer, sizes.get(name)), layer, name, seed)

    def attach() -> None:
        for name, layer in layers.items():
            put_on(layer, feedback[name], next(new for old, new in _CONVERTED.items() if isinstance(layer, old)))

    return attach


def put_on(layer: nn.Module, feedback: nn.Module, cls: type) -> None:
    """Change the layer's class in place and give it its feedback."""
    feedback.train(layer.training)
    feedback.original = type(layer)
    layer.feedback = feedback
    layer.__class__ = cls
    if hasattr(layer, "install"):
        layer.install()
    watch(layer)


def revert(net: nn.Module) -> nn.Module:
    """Take every rule off the network, in place; returns it. The same as ``convert(net, "bp")``."""
    layers = converted(net).values()
    if late := [layer.feedback.layer_name for layer in layers if hasattr(layer, "parametrizations")]:
        raise UserError(
            f"parametrized after their rule was put on: {', '.join(late)}; remove the parametrizations first "
            f"(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    tapes = {layer.feedback.tape for layer in layers if hasattr(layer.feedback, "tape")}
    for layer in layers:
        unwatch(layer)
        if hasattr(layer, "remove"):
            layer.remove()
        layer.__class__ = layer.feedback.original
        del layer.feedback
    for tape in tapes:
        if not any(getattr(layer.feedback, "tape", None) is tape for layer in converted(tape.net).values()):
            tape.remove()  # else the rest of a network of which ``net`` is a part stays under its rule
    return net


def feedback_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The learned feedback of a converted network, for an optimizer made before the conversion."""
    return [p for layer in converted(net).values() for p in layer.feedback.parameters()]


def param_groups(
    net: nn.Module, lr: float, weight_decay: float = 0.0, feedback_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups with each rule's right defaults.

    Feedback that follows W's own update (kp, pfa, pfa_o) shares its learning rate and decay: the mismatch vanishes only if both
    decay alike. Rules whose gradient holds a decay of its own (wm, ia, sa, aa) get none from the optimizer, which would shift
    their fixed point.

    Args:
        net: a network, converted or not.
        lr: learning rate of everything, or of all but own-decay feedback if ``feedback_lr`` is given.
        weight_decay: of everything but own-decay feedback (default 0, as ``torch.optim.SGD``).
        feedback_lr: learning rate of own-decay feedback (default: ``lr``).

    Returns:
        One group, or two where there is own-decay feedback; ``own_decay`` in a group says which it is, for schedules of the decay.
    """
    own = {id(p) for m in converted(net).values() if m.feedback.rule.own_decay for p in m.feedback.parameters()}
    shared = [p for p in net.parameters() if id(p) not in own]
    groups = [{"params": shared, "lr": lr, "weight_decay": weight_decay, "own_decay": False}]
    if own:
        rest = [p for p in net.parameters() if id(p) in own]
        feedback_lr = lr if feedback_lr is None else feedback_lr
        groups.append({"params": rest, "lr": feedback_lr, "weight_decay": 0.0, "own_decay": True})
    return groups
