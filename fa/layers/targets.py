"""Which layers of a network a rule goes on, and which layers are refused by name: never half a network in silence."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fa.errors import UserError
from fa.layers import attention
from fa.layers.hooks import Converted

_REFUSED = (  # layers whose matrix carries errors, and for which there is no feedback here
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.lazy.LazyModuleMixin,
)
# torchvision's: Swin's attention reads its layers' weights itself; a deformable convolution is not torch's nn.Conv2d
_REFUSED_NAMES = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2", "DeformConv2d")


def targets(net: nn.Module, skip: str | Iterable[str], as_base: type | Iterable[type]) -> dict[str, nn.Module]:
    """Qualified name -> layer to convert, in order from the input.

    Raises:
        UserError: names every layer that cannot be converted, and why.
    """
    skip = {skip} if isinstance(skip, str) else set(skip)
    as_base = {as_base} if isinstance(as_base, type) else set(as_base)
    if unknown := skip - {name for name, _ in net.named_modules()}:
        raise UserError(f"skip names no module: {', '.join(sorted(unknown))}")
    if wrong := [c for c in as_base if not (isinstance(c, type) and issubclass(c, (nn.Linear, nn.Conv2d)))]:
        raise UserError(f"treat_as_base takes subclasses of nn.Linear and nn.Conv2d, not {wrong[0]!r}")
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
        base = nn.Conv2d if isinstance(m, nn.Conv2d) else nn.Linear
        if isinstance(m, nn.modules.lazy.LazyModuleMixin):
            problems.append(f"{name} (lazy: run the network once first)")
        elif type(m) not in {base} | as_base and not isinstance(m, Converted):
            cls = type(m).__name__
            problems.append(
                f"{name} ({cls}: a subclass of nn.{base.__name__}; if it computes what its base class computes, "
                f"convert with treat_as_base={cls})"
            )
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
