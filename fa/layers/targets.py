"""Which layers of a network a rule goes on, and which layers are refused by name: never half a network in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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
# Names of tensors that are added to activity; and, if their shape repeats them over samples, of tokens and of scales.
_ADDED = re.compile(r"(^|_)(pos(_|$|emb|ition)|bias)")
_TOKEN, _SCALE = re.compile("token|emb"), re.compile("norm|scale|gamma|alpha|beta|temperature")
Found = tuple[dict[str, nn.Module], list[tuple[nn.Module, str, Tensor]]]  # list: (module, qualified name, matrix)


def _own(m: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, and tensors that were set as plain attributes, by name."""
    return {key: t for key, t in [*vars(m).items(), *m._parameters.items()] if isinstance(t, Tensor)}


def _may_multiply(m: nn.Module, key: str, p: Tensor) -> bool:
    """Whether a module's own tensor is trained and may be a matrix through which errors pass.

    The code of a module cannot be seen, so that kind, name and shape decide. No such matrix is an embedding, a norm, a
    position embedding or a bias; nor a token, whose first axis is 1; nor a scale, with one axis above 1.
    """
    if not (p.requires_grad and p.is_leaf) or is_lazy(p):
        return is_lazy(p)
    if p.dim() < 2 or isinstance(m, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)) or _ADDED.search(key):
        return False
    token = p.shape[0] == 1 and p.dim() > 2 and _TOKEN.search(key)
    scale = sum(n > 1 for n in p.shape) < 2 and _SCALE.search(f"{type(m).__name__}.{key}".lower())
    return not (token or scale)


def targets(net: nn.Module, skip: str | Iterable[str], as_base: type | Iterable[type]) -> Found:
    """Qualified name -> layer to convert, in order from the input; and the matrices that nothing should multiply by.

    Raises:
        UserError: names every layer that cannot be converted, and every trained matrix that no layer here holds.
    """
    skip = {skip} if isinstance(skip, str) else set(skip)
    as_base = {as_base} if isinstance(as_base, type) else set(as_base)
    own = {name: {f"{name}.{key}" if name else key: t for key, t in _own(m).items()} for name, m in net.named_modules()}
    if unknown := skip - own.keys() - {key for tensors in own.values() for key in tensors}:
        raise UserError(f"skip names no module and no parameter: {', '.join(sorted(unknown))}")
    if wrong := [c for c in as_base if not (isinstance(c, type) and issubclass(c, (nn.Linear, nn.Conv2d)))]:
        raise UserError(f"treat_as_base takes subclasses of nn.Linear and nn.Conv2d, not {wrong[0]!r}")
    holders: dict[int, list[str]] = {}
    for name, module in net.named_modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)

    def skipped(name: str) -> bool:
        return any(name == s or name.startswith(s + ".") for s in skip)

    def matrices(name: str, m: nn.Module, but: str = "") -> None:
        for key, t in own[name].items():
            local = key.rpartition(".")[2]
            if local == but or skipped(key):
                continue
            if _may_multiply(m, local, t):
                loose.setdefault(type(m).__name__, []).append(key)
            elif t.is_leaf and (t.requires_grad or isinstance(t, nn.Parameter)) and sum(n > 1 for n in t.shape) > 1:
                others.append((m, key, t))

    found, problems, others = {}, [], []
    loose: dict[str, list[str]] = {}  # class of a module -> names of its matrices that no layer here holds
    feedback = {m.feedback for m in net.modules() if isinstance(m, Converted)}
    for name, m in net.named_modules():
        layer = isinstance(m, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
        if layer and any(map(skipped, own[name])):
            skip.add(name)
        if skipped(name) or m in feedback:
            continue
        if isinstance(m, nn.MultiheadAttention):
            if why := attention.refusal(m):
                problems.append(f"{name or 'the root'} ({type(m).__name__}: {why})")
            prefix = f"{name}." if name else ""
            found |= {prefix + key: row for key, row in attention.rows(m).items()}
            if not skipped(prefix + "out_proj"):
                found[prefix + "out_proj"] = m.out_proj
            continue
        if not layer:
            if isinstance(m, _REFUSED) or type(m).__name__ in _REFUSED_NAMES:
                problems.append(f"{name or 'the root'} ({type(m).__name__}: no feedback for this kind of layer)")
            else:
                matrices(name, m)
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
        elif m.weight.is_meta:
            raise UserError(f"the weight of {name or 'the root'} is on the meta device; load the weights, then convert")
        else:
            found[name] = m
            matrices(name, m, but="weight")
    problems += [
        f"{', '.join(keys)} ({cls}: trained, of two or more axes, and in no nn.Linear or nn.Conv2d)"
        for cls, keys in loose.items()
    ]
    if problems:
        raise UserError(f"cannot convert {'; '.join(problems)}; leave them to backprop with skip=[...]")
    if not found:
        raise UserError("nothing to convert: the network has no nn.Linear and no nn.Conv2d")
    return found, others
