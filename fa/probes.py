"""What a rule reads and what its feedback learns from: asked of its code by intervention.

Whether a rule reads the forward weights is not taken from its description. A layer is held at one state, its forward
weight is changed behind the rule's back, and what the rule's own code then sends down, or teaches its feedback, is
compared with before:

* *sent* - the error that leaves the layer for the same error at its output; a change means that the error's way down
  reads W;
* *taught* - the gradient of the feedback for the same activities; a change means that its learning reads W's value.

Signs and magnitudes are scrambled separately: "sign" gives every entry of W a random sign, "magnitude" permutes the
sizes and leaves the signs. This is our reading of the first two rows of p3's Table 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers.dfa import DirectFeedback
from fa.layers.feedback import Feedback, generator
from fa.layers.hooks import converted
from fa.rules.base import float64
from fa.symmetry import matrices

WHAT = ("sign", "magnitude")
"""What of a weight can be scrambled."""


def scramble(W: Tensor, what: str, gen: torch.Generator) -> Tensor:
    """``W`` with random signs and its own magnitudes ("sign"), or with its own signs and permuted magnitudes
    ("magnitude")."""
    if what not in WHAT:
        raise UserError(f"unknown part {what!r} of a weight; known: {', '.join(WHAT)}")
    if what == "sign":
        return W * (2 * torch.randint(2, W.shape, generator=gen) - 1).to(W)
    order = torch.randperm(W.numel(), generator=gen).to(W.device)
    return W.sign() * W.abs().flatten()[order].view_as(W)


@contextmanager
def weight(layer: nn.Module, W: Tensor) -> Iterator[None]:
    """Within the block the layer's weight has the values of ``W``; its feedback stays as it is."""
    before = layer.weight.detach().clone()
    try:
        with torch.no_grad():
            layer.weight.copy_(W)
        yield
    finally:
        with torch.no_grad():
            layer.weight.copy_(before)


@contextmanager
def same_noise(net: nn.Module) -> Iterator[None]:
    """Within the block the layers draw noise for their mirrors; after it they will draw the same again."""
    maps = [m.feedback.op for m in converted(net).values() if isinstance(m.feedback, Feedback)]
    generators = [op.gen for op in maps if op.gen]
    states = [g.get_state() for g in generators]
    try:
        yield
    finally:
        for g, state in zip(generators, states):
            g.set_state(state)


def sent(layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """The error that a layer sends down, by its own backward pass; of the shape of ``x``.

    Args:
        layer: converted or not.
        x: its input (n, ...).
        dy: the error at its output; under dfa that at the network's output, (n, classes).
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), same_noise(layer):
        if not isinstance(getattr(layer, "feedback", None), DirectFeedback):
            return torch.autograd.grad(layer(x), x, dy)[0]
        tape, layer.feedback.tape.taps = layer.feedback.tape, []
        layer(x)
        out = tape.close(dy.detach().requires_grad_())
        tape.taps = None
        return torch.autograd.grad(out, x, dy)[0]


class _Recorded:
    """A layer's linear map that keeps the activity it makes, or, given what another kept, makes that once more."""

    def __init__(self, op: Any, kept: list[Tensor] | None = None) -> None:
        self.op, self.kept, self.again = op, [] if kept is None else list(kept), kept is not None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.op, name)

    def forward(self, x: Tensor, K: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.again:
            return self.kept.pop(0).clone()
        self.kept.append(self.op.forward(x, K, bias))
        return self.kept[-1].clone()


def taught(
    layer: nn.Module, x: Tensor, dy: Tensor, W: Tensor | None = None, activity: bool = False
) -> dict[str, Tensor]:
    """The gradients of a layer's learned feedback, by its rule's own ``feedback_grad``; empty where nothing is learned.

    Args:
        layer: a converted layer.
        x: its input (n, ...).
        dy: the error at its output.
        W: what the rule takes for the layer's weight (default: that weight).
        activity: whether the activity that the layer makes, from its input or from a mirror's noise, follows ``W``
            too. Default ``False``: every neuron is as active as under the layer's own weight, and only the value of
            the synapse is another.
    """
    fb = getattr(layer, "feedback", None)
    if not isinstance(fb, Feedback) or not fb.rule.learned:
        return {}
    if fb.rule.needs_sgd:
        raise UserError("implicit feedback stores no R and cannot say what teaches it; convert with implicit=False")
    true = layer.weight.detach()

    def lesson(W: Tensor, op: Any) -> dict[str, Tensor]:
        with same_noise(layer), torch.no_grad():
            y = op.forward(x, W) if fb.keeps_y else None
            return fb.gradient_from(fb.tensors(W) | dict(op=op, x=x, y=y, dy=dy, dW=op.grad_weight(x, dy, W)))

    if W is None or activity:
        return lesson(true if W is None else W, fb.op)
    recorded = _Recorded(fb.op)
    lesson(true, recorded)
    return lesson(W, _Recorded(fb.op, recorded.kept))


def change(after: Tensor, before: Tensor) -> float:
    """Relative change, norm of the difference over the norm before, in float64; 0 where nothing is sent before or
    after."""
    after, before = float64(after), float64(before)
    moved = torch.linalg.vector_norm(after - before).item()
    return moved / torch.linalg.vector_norm(before).item() if moved else 0.0


def reads(layer: nn.Module, x: Tensor, dy: Tensor, gen: torch.Generator) -> dict[str, float]:
    """What of W a layer's rule reads, as relative changes under scrambling; changes nothing in the end.

    Args:
        layer: converted or not; x, dy: as in :func:`sent`.
        gen: of the scrambling.

    Returns:
        ``send_sign`` and ``send_magnitude``, of the error sent down; and where feedback is learned, of its gradient,
        ``learn_sign`` and ``learn_magnitude`` (all activities held) and ``learn_activity`` (signs scrambled, and the
        layer's activity follows).
    """
    W = layer.weight.detach().clone()
    before, lesson = sent(layer, x, dy), taught(layer, x, dy)
    found = {}
    for what in WHAT:
        other = scramble(W, what, gen)
        with weight(layer, other):
            found[f"send_{what}"] = change(sent(layer, x, dy), before)
        for name, grad in lesson.items():
            found[f"learn_{what}"] = change(taught(layer, x, dy, other)[name], grad)
            if what == "sign":
                found["learn_activity"] = change(taught(layer, x, dy, other, activity=True)[name], grad)
    return found


def noise_passes(net: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Fraction of the passes through the layers' weights in one training step that noise drives and not the data.

    Counted while the network takes the step: every product W x of the forward pass, and every one that the learning
    of the feedback makes.

    Args:
        net: converted or not; its gradients and the state of its noise are left as they are.
        x: inputs (n, ...).
        dy: the error at the network's output.
    """
    count = {"data": 0, "noise": 0}
    layers = [m for m in converted(net).values() if isinstance(m.feedback, Feedback)]

    def watch(op: Any) -> None:
        forward, noise, heard = op.forward, op.noise, []

        def counted(*args: Any) -> Tensor:
            count["noise" if heard else "data"] += 1
            return forward(*args)

        def drawn(*args: Any) -> Tensor:
            heard.append(True)
            return noise(*args)

        op.forward, op.noise = counted, drawn

    for m in layers:
        watch(m.feedback.op)
    try:
        wanted = [p for p in net.parameters() if p.requires_grad]
        with torch.enable_grad(), same_noise(net):
            torch.autograd.grad(net(x), wanted, dy, allow_unused=True)
    finally:
        for m in layers:
            del m.feedback.op.forward, m.feedback.op.noise
    return count["noise"] / max(sum(count.values()), 1)


def reciprocal(net: nn.Module, gen: torch.Generator, entries: int = 20) -> dict[tuple[str, str], float]:
    """How much of every feedback matrix joins a pair of neurons that a forward synapse joins too, the other way round.

    A synapse of the feedback is reciprocal if it carries error from one output neuron of the layer to one of its
    inputs, that is, if changing it changes one entry of the effective kernel. A synapse into or out of a population
    in between changes a row or a column. Where the feedback is no matrix of its own but made of W, it is W's mirror
    image. Under dfa the error comes from the network's output neurons, which are the layer's own only in the last
    layer.

    Args:
        net: converted or not.
        gen: of the entries that are tried.
        entries: how many of each matrix (default 20).

    Returns:
        (layer, matrix) -> fraction of the entries tried.
    """
    layers = converted(net) or {n: m for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    found = {}
    for name, layer in layers.items():
        fb = getattr(layer, "feedback", None)
        if isinstance(fb, DirectFeedback):
            found[name, "B"] = float(name == list(layers)[-1])
            continue
        stored = matrices(layer)
        for key in stored or ("W",):
            if key not in stored or not hasattr(fb, key):  # made of W
                found[name, key] = 1.0
                continue
            M, single = getattr(fb, key).detach(), 0
            alive = torch.nonzero(stored[key])
            with torch.no_grad():
                before = fb.kernel(layer.weight).clone()
                for at in alive[torch.randint(len(alive), (entries,), generator=gen)]:
                    at = tuple(at.tolist())
                    value = M[at].clone()
                    M[at] += 1
                    single += int((fb.kernel(layer.weight) != before).sum()) == 1
                    M[at] = value
            found[name, key] = single / entries
    return found


def probed(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[tuple[str, int | None, str, float]]:
    """Every intervention on a network, at one batch and the true errors of its cross-entropy.

    Args:
        net: converted or not; x: inputs (n, ...); y: classes (n,).
        seed: of the scrambling and of the entries that are tried.

    Returns:
        (layer, depth, metric, value): ``send_*`` and ``learn_*`` by :func:`reads`, ``B_reciprocal``, ... by
        :func:`reciprocal` (``W_`` where the feedback is made of W), ``noise_passes`` by :func:`noise_passes`.
    """
    layers = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    kept, handles = {}, []
    for name, layer in layers.items():

        def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
            kept[name] = args[0].detach(), out

        handles.append(layer.register_forward_hook(keep))
    try:
        with torch.enable_grad():
            out = net(x)
            errors = torch.autograd.grad(F.cross_entropy(out, y), [out, *(o for _, o in kept.values())])
    finally:
        for handle in handles:
            handle.remove()
    e, delta = errors[0], dict(zip(kept, errors[1:]))
    found = []
    for depth, (name, layer) in enumerate(layers.items(), 1):
        error = e if hasattr(getattr(layer, "feedback", None), "tape") else delta[name]
        values = reads(layer, kept[name][0], error, generator(seed, name, "scramble"))
        found += [(name, depth, metric, value) for metric, value in values.items()]
    depths = {name: depth for depth, name in enumerate(layers, 1)}
    joined = reciprocal(net, generator(seed, "reciprocal"))
    found += [(layer, depths[layer], f"{matrix}_reciprocal", value) for (layer, matrix), value in joined.items()]
    return [*found, ("", None, "noise_passes", noise_passes(net, x, e))]
