"""Measures of alignment: of weights, of the error one layer sends down, and of the whole network's gradients.

Three angles share a name in the literature and are kept apart here: between W and its feedback (*weight* or *path*
angle); between the errors that the two send down from the *same* error above (*local*); and between what a layer gets
under the rule and under exact backprop of the whole network (*global*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers.feedback import Feedback
from fa.layers.hooks import converted
from fa.rules.base import float64


def linear_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> every linear and convolutional layer, converted or not, in order from the input."""
    return {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def angle(a: Tensor, b: Tensor) -> float:
    """Angle in degrees between two tensors of one shape, flattened, in float64; nan where a tensor is zero."""
    return _angle(a, b).item()


def _angle(a: Tensor, b: Tensor) -> Tensor:
    a, b = float64(a).flatten(), float64(b).flatten()  # (entries,)
    cosine = a @ b / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return torch.rad2deg(torch.arccos(cosine.clip(-1, 1)))


def _sample_angle(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the first axis of the angles in degrees between samples; a sample with a zero vector is left out."""
    a, b = float64(a).flatten(1), float64(b).flatten(1)  # (n, entries)
    cosine = (a * b).sum(1) / (torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1))  # (n,)
    return torch.rad2deg(torch.arccos(cosine.clip(-1, 1))).nanmean()


def _table(rows: list[tuple[object, ...]], columns: list[str]) -> pd.DataFrame:
    """A table of rows; numbers that are tensors are read from their device all at once."""
    values = [v for row in rows for v in row if isinstance(v, Tensor)]
    numbers = iter(torch.stack(values).tolist() if values else [])
    told = [[next(numbers) if isinstance(v, Tensor) else v for v in row] for row in rows]
    return pd.DataFrame(told, columns=["layer", "depth", *columns])


def feedback_weight(layer: nn.Module) -> Tensor:
    """The effective kernel that carries the error through a converted layer: the shape of ``layer.weight``, detached.

    Raises:
        UserError: a layer that is not converted, or is under dfa, which has no kernel of W's shape.
    """
    feedback = getattr(layer, "feedback", None)
    if not isinstance(feedback, Feedback):
        why = "is under dfa, which has no kernel of W's shape" if feedback else "has no feedback; convert it first"
        raise UserError(f"{type(layer).__name__} {why}")
    with torch.no_grad():
        return feedback.kernel(layer.weight).detach()


def alignment(net: nn.Module) -> pd.DataFrame:
    """How the feedback of every layer resembles its weight.

    Returns:
        One row a converted layer, in order from the input: ``layer`` (qualified name), ``depth`` (1, 2, ...),
        ``angle_deg`` = angle(W, B_eff) in degrees, ``norm_ratio`` = ||B_eff|| / ||W||, ``sign_concordance`` = fraction
        of entries of equal sign, ``weight_norm`` = ||W|| (Frobenius); computed in float64. Layers without a kernel of
        W's shape (dfa, dense fa) are left out.

    Raises:
        UserError: no layer of the network has a rule.
    """
    layers, rows = converted(net), []
    if not layers:
        raise UserError("no layer of this network has a rule, and so none has feedback: call fa.convert first")
    for depth, (name, layer) in enumerate(layers.items(), 1):
        try:
            K, W = float64(feedback_weight(layer)), float64(layer.weight)
        except UserError:  # dfa, and dense feedback between maps, have no kernel of W's shape
            continue
        ratio = torch.linalg.vector_norm(K) / torch.linalg.vector_norm(W)
        concordance = float64(W.sign() == K.sign()).mean()
        rows.append((name, depth, _angle(W, K), ratio, concordance, torch.linalg.vector_norm(W)))
    return _table(rows, ["angle_deg", "norm_ratio", "sign_concordance", "weight_norm"])


@contextmanager
def exact_backprop(net: nn.Module) -> Iterator[nn.Module]:
    """Within the block the network's backward pass is plain backprop, whatever its rule; the feedback is unchanged."""
    with ExitStack() as after:
        for layer in converted(net).values():
            after.callback(setattr, layer.feedback, "use_backprop", layer.feedback.use_backprop)
            layer.feedback.use_backprop = True
        yield net


@torch.inference_mode(False)  # with gradients, wherever it is called
def gradient_angles(net: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> pd.DataFrame:
    """Angles between what every layer gets under the rule and under exact backprop, on one batch; changes nothing.

    Args:
        net: a converted network; its mode (train or eval) and buffers, e.g. running statistics, are kept.
        x: inputs (n, ...), on the network's device.
        y: targets, as ``loss`` takes them.
        loss: (output, target) -> scalar.

    Returns:
        One row for every converted layer that the loss depends on: ``layer``, ``depth``, and in degrees
        ``delta_angle_local_deg`` (the error at the layer's input through B_eff against the error through W, from one
        error at the layer's output; nan under dfa), ``delta_angle_global_deg`` (the error at the layer's output under
        the rule against exact backprop through the whole network), both means over samples, and
        ``grad_angle_global_deg`` (the batch's dW under the rule against exact backprop; nan for a frozen weight); and
        ``delta_norm_ratio``, the norm of the batch's errors at the layer's output over its norm under exact backprop.
    """
    layers = converted(net)
    buffers = {k: v.clone() for k, v in net.named_buffers()}

    def backward() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        inputs, edges = {}, {}
        with ExitStack() as stack:
            for name, layer in layers.items():

                def keep(m: nn.Module, args: tuple, kwargs: dict, out: Tensor, name: str = name) -> None:
                    inputs[name] = (*args, *kwargs.values())[0].detach()
                    if out.requires_grad:  # a place in the graph still means this output after an in-place operation
                        edges[name] = torch.autograd.graph.get_gradient_edge(out)

                stack.enter_context(layer.register_forward_hook(keep, with_kwargs=True))
            # the generator is put back, so that both passes draw the same dropout
            stack.enter_context(torch.random.fork_rng({p.device for p in net.parameters() if p.is_cuda}))
            stack.enter_context(nn.utils.parametrize.cached())  # a weight is computed once
            value = loss(net(x), y)
            names = list(edges)
            moving = [n for n in names if layers[n].held.requires_grad]
            wanted = [*edges.values(), *(layers[n].held for n in moving)]
            grads = torch.autograd.grad(value, wanted, allow_unused=True)
        of_weights = {n: g[layers[n].rows] for n, g in zip(moving, grads[len(names) :]) if g is not None}
        return inputs, {n: g for n, g in zip(names, grads) if g is not None}, of_weights

    try:
        inputs, delta, dW = backward()
        with exact_backprop(net):
            _, delta_bp, dW_bp = backward()
    finally:
        for k, v in net.named_buffers():
            v.data.copy_(buffers[k])  # its version stays: a pass may wait for its backward pass, which needs the buffer
    rows = []
    for depth, (name, layer) in enumerate(layers.items(), 1):
        if name not in delta:
            continue
        local = float("nan")
        if isinstance(layer.feedback, Feedback):
            probe = inputs[name].clone().requires_grad_()
            with exact_backprop(layer):
                out = layer(probe)
            through_W = torch.autograd.grad(out, probe, delta[name])[0]
            local = _sample_angle(torch.autograd.grad(layer(probe), probe, delta[name])[0], through_W)
        gradients = _angle(dW[name], dW_bp[name]) if name in dW else float("nan")
        ratio = torch.linalg.vector_norm(float64(delta[name])) / float64(delta_bp[name]).norm()
        rows.append((name, depth, local, _sample_angle(delta[name], delta_bp[name]), gradients, ratio))
    angles = ["delta_angle_local_deg", "delta_angle_global_deg", "grad_angle_global_deg"]
    return _table(rows, [*angles, "delta_norm_ratio"])
