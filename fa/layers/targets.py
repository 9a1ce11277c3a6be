"""Which layers of a network a rule goes on, and which layers are refused by name: never half a network in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy

from fa.errors import UserError
from fa.layers import attention
from fa.layers.hooks import Converted, within

# layers whose matrix carries errors, and for which there is no feedback here
_REFUSED = (nn.modules.conv._ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.modules.lazy.LazyModuleMixin)
# torchvision's: Swin's attention reads its layers' weights itself; a deformable convolution is not torch's nn.Conv2d
_REFUSED_NAMES = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2", "DeformConv2d")
# Names of tensors that are added to activity; and, if their shape repeats them over samples, of tokens and of scales.
_ADDED = re.compile(r"(^|_)(pos(_|$|emb|ition)|bias)")
_TOKEN, _SCALE = re.compile("token|emb"), re.compile("norm|scale|gamma|alpha|beta|temperature")
_COMPUTED = "its weight is computed from others: take parametrization, pruning off, and put on again after fa.convert"
_INTERNAL = vars(nn.Module()).keys()  # attributes that every module has
Found = tuple[dict[str, nn.Module], list[tuple[nn.Module, str, Tensor]], set[str]]


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


def _own(m: nn.Module, known: set[int]) -> dict[str, Tensor]:
    """A module's tensors by name: parameters, plain attributes, and what its lists and dicts hold unseen by PyTorch,
    also in modules; but no tensor there whose id is ``known``, and no module around ``m``."""
    found, own = {}, [*vars(m).items(), *m._parameters.items()]
    todo = [(name, value, 0) for name, value in own if name not in _INTERNAL]
    for name, value, depth in todo:
        if isinstance(value, (list, tuple, dict)) and depth < 4:  # one may hold itself
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{name}[{key!r}]", v, depth + 1) for key, v in inside if not isinstance(v, (int, str))]
        hidden = isinstance(value, nn.Module) and depth and m not in value.modules()
        for key, t in value.named_parameters(name) if hidden else [(name, value)]:
            if isinstance(t, Tensor) and not (depth and id(t) in known):
                found[key] = t
    return found


def _refusal(m: nn.Module, as_base: set[type], holders: dict[int, list[str]]) -> str:
    """Why a module can be neither converted nor left alone; "" if it can. ``holders``: id of a parameter -> modules."""
    cls = type(m)
    if isinstance(m, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) and nn.utils.parametrize.is_parametrized(m):
        return _COMPUTED
    if isinstance(m, nn.MultiheadAttention):
        if cls not in (nn.MultiheadAttention, attention.FeedbackAttention):
            return f"{cls.__name__}: a subclass with behaviour of its own"
        unsupported = m.bias_k is not None or m.add_zero_attn
        return f"{cls.__name__}: add_bias_kv and add_zero_attn are not supported" if unsupported else ""
    if not isinstance(m, (nn.Linear, nn.Conv2d)):
        refused = isinstance(m, _REFUSED) or cls.__name__ in _REFUSED_NAMES
        return f"{cls.__name__}: no feedback for this kind of layer" if refused else ""
    if isinstance(m, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run the network once first"
    base = nn.Conv2d if isinstance(m, nn.Conv2d) else nn.Linear
    if not isinstance(m._parameters.get("weight"), nn.Parameter):
        return _COMPUTED
    if cls not in {base} | as_base and not isinstance(m, Converted):
        return (
            f"{cls.__name__}: a subclass of nn.{base.__name__}; if it computes what its base class computes, convert "
            f"with treat_as_base={cls.__name__}"
        )
    if m.weight.is_complex():
        return "its weight is complex"
    tied = holders[id(m.weight)]
    return f"its weight is tied: {', '.join(tied)}" if len(tied) > 1 else ""


def targets(net: nn.Module, skip: str | Iterable[str], as_base: type | Iterable[type]) -> Found:
    """Qualified name -> layer to convert, in order from the input; the matrices that nothing should multiply by,
    (module, qualified name, matrix); and the names that are left out.

    Raises:
        UserError: names every layer that cannot be converted, and every trained matrix that no layer here holds.
    """
    skip = {skip} if isinstance(skip, str) else set(skip)
    as_base = {as_base} if isinstance(as_base, type) else set(as_base)
    own: dict[str, dict[str, Tensor]] = {}  # module -> its parameters, and tensors that were set as plain attributes
    holders: dict[int, list[str]] = {}  # id of a parameter -> modules
    known = set(map(id, net.parameters()))
    for name, m in net.named_modules():
        own[name] = {f"{name}.{key}" if name else key: t for key, t in _own(m, known).items()}
        for p in m.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    if unknown := {s for s in skip if not any(within(name, [s]) for name in {*own}.union(*own.values()))}:
        raise UserError(f"skip names no module and no parameter: {', '.join(sorted(unknown))}")
    if wrong := [c for c in as_base if not (isinstance(c, type) and issubclass(c, (nn.Linear, nn.Conv2d)))]:
        raise UserError(f"treat_as_base takes subclasses of nn.Linear and nn.Conv2d, not {wrong[0]!r}")
    found, problems, others = {}, [], []
    loose: dict[str, list[str]] = {}  # class of a module -> names of its matrices that no layer here holds
    feedback = {m.feedback for m in net.modules() if isinstance(m, Converted)}
    for name, m in net.named_modules():
        layer = isinstance(m, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
        if layer and any(within(key, skip) for key in own[name]):
            skip.add(name)
        if within(name, skip) or m in feedback or name in found:  # the last: the output projection of an attention
            continue
        if why := _refusal(m, as_base, holders):
            problems.append(f"{name or 'the root'} ({why})")
            skip.add(f"{name}.parametrizations".lstrip("."))  # which are no problem of their own
        if isinstance(m, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            found |= {prefix + key: attention.RowsLinear(m, key) for key in "qkv"}
            if not within(prefix + "out_proj", skip):
                found[prefix + "out_proj"] = m.out_proj
        if why or isinstance(m, nn.MultiheadAttention):
            continue
        if layer:
            empty = m.weight.is_meta or isinstance(m.weight, FakeTensor)  # which is on the meta device underneath
            if empty or m.weight.is_inference():
                why = "on the meta device; load the weights" if empty else "of inference mode; make it outside"
                raise UserError(f"the weight of {name or 'the root'} is {why}, then convert")
            found[name] = m
        for key, t in own[name].items():
            local = key.rpartition(".")[2]
            if (layer and local == "weight") or within(key, skip):
                continue
            if _may_multiply(m, local, t):
                loose.setdefault(type(m).__name__, []).append(key)
            else:
                others.append((m, key, t))
    for cls, keys in loose.items():
        problems.append(f"{', '.join(keys)} ({cls}: trained, of two or more axes, and in no nn.Linear or nn.Conv2d)")
    if problems:
        raise UserError(f"cannot convert {'; '.join(problems)}; leave them to backprop with skip=[...]")
    if not found:
        raise UserError("nothing to convert: the network has no nn.Linear and no nn.Conv2d")
    return found, others, skip
