"""Measures of alignment: of weights, of the error one layer sends down, and of the whole network's gradients.

Three angles share a name in the literature and are kept apart here: between W and its feedback (*weight* or *path* angle);
between the errors that the two send down from the *same* error above (*local*); and between what a layer gets under the rule
and under exact backprop of the whole network (*global*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from fa.errors import UserError
from fa.layers.feedback import Feedback, generator
from fa.layers.hooks import converted


def angle(a: Tensor, b: Tensor) -> float:
    """Angle in degrees between two tensors of one shape, flattened, in float64; nan where one is zero."""
    return _angle(a, b).item()


def _angle(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    cosine = a @ b / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return torch.rad2deg(torch.arccos(cosine.clip(-1, 1)))


def sample_angle(a: Tensor, b: Tensor) -> float:
    """Mean over the first axis of the angles in degrees between corresponding samples; samples with a zero vector are left out."""
    return _sample_angle(a, b).item()


def _sample_angle(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.detach().double().flatten(1), b.detach().double().flatten(1)
    cosine = (a * b).sum(1) / (torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1))
    return torch.rad2deg(torch.arccos(cosine.clip(-1, 1))).nanmean()


def _table(rows: list[dict[str, object]], columns: list[str]) -> pd.DataFrame:
    """A table of rows that hold numbers as tensors, which are read from their device all at once."""
    values = [v for row in rows for v in row.values() if isinstance(v, Tensor)]
    numbers = iter(torch.stack(values).tolist() if values else [])
    return pd.DataFrame(
        [{k: next(numbers) if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows], columns=columns
    )


def feedback_weight(layer: nn.Module) -> Tensor:
    """The effective kernel that carries the error through a converted layer, of the shape of ``layer.weight``; detached.

    Raises:
        UserError: a layer that is not converted, or is under dfa, which has no kernel of W's shape.
    """
    feedback = getattr(layer, "feedback", None)
    if not isinstance(feedback, Feedback):
        why = (
            "is under dfa, which has no kernel of its weight's shape"
            if feedback
            else "has no feedback; convert the network first"
        )
        raise UserError(f"{type(layer).__name__} {why}")
    with torch.no_grad():
        return feedback.kernel(layer.weight).detach()


def alignment(net: nn.Module) -> pd.DataFrame:
    """How the feedback of every layer resembles its weight.

    Returns:
        One row a converted layer, in order from the input: ``layer`` (qualified name), ``depth`` (1, 2, ...), ``angle_deg`` =
        angle(W, B_eff) in degrees, ``norm_ratio`` = ||B_eff|| / ||W||, ``sign_concordance`` = fraction of entries of equal sign,
        ``weight_norm`` = ||W|| (Frobenius); computed in float64. Layers without a kernel of W's shape (dfa, dense fa) are left out.
    """
    rows = []
    for depth, (name, layer) in enumerate(converted(net).items(), 1):
        if not isinstance(layer.feedback, Feedback):
            continue
        try:
            W, K = layer.weight.detach().double(), feedback_weight(layer).double()
        except UserError:  # dense feedback between maps has no kernel
            continue
        rows.append({
            "layer": name,
            "depth": depth,
            "angle_deg": _angle(W, K),
            "norm_ratio": torch.linalg.vector_norm(K) / torch.linalg.vector_norm(W),
            "sign_concordance": (W.sign() == K.sign()).double().mean(),
            "weight_norm": torch.linalg.vector_norm(W),
        })  # fmt: skip
    return _table(rows, ["layer", "depth", "angle_deg", "norm_ratio", "sign_concordance", "weight_norm"])


def matrices(layer: nn.Module) -> dict[str, Tensor]:
    """The feedback matrices of a layer by name, detached: ``B`` and ``R`` where the rule stores them (masked entries
    0), and else, as under the sign rules, the effective kernel, named ``K``. Empty for a layer that is not converted.

    Raises:
        UserError: implicit product feedback, which stores no R.
    """
    fb = getattr(layer, "feedback", None)
    if fb is None:
        return {}
    if fb.rule.needs_sgd:
        raise UserError("implicit feedback stores no R; convert with implicit=False")
    stored = {name: getattr(fb, name).detach() for name in ("B", "R") if hasattr(fb, name)}
    if not stored:
        return {"K": feedback_weight(layer)}
    mask, last = getattr(fb, "mask", None), list(stored)[-1]
    return stored if mask is None else stored | {last: stored[last] * mask}


def symmetry(net: nn.Module, seed: int = 0) -> pd.DataFrame:
    """How much every single feedback matrix of a network mirrors its layer's weight W.

    A matrix of W's shape is compared entry by entry. For any matrix, of whatever shape, each of its units is compared
    with the forward neuron that it resembles most: the rows of a matrix that shares W's input side (R of product
    feedback, B of direct feedback), or the columns of one that shares W's output side (B of product feedback). Two
    levels say what a match is worth. ``chance`` is that of a Gaussian matrix, which knows nothing of W. ``mixed`` is
    that of random Gaussian mixtures of W's own rows (or columns): units that hear of all forward neurons and mirror
    none. A matrix mirrors W where its match exceeds ``mixed``. Our definition: the paper has no such measure.

    Args:
        net: a converted network.
        seed: of the two random matrices (default 0).

    Returns:
        One row a feedback matrix (see :func:`matrices`): ``layer``, ``depth``, ``matrix``, ``correlation``
        (Pearson's, over entries) and ``angle_deg``, both nan where the shapes differ, and ``match``, ``mixed``,
        ``chance``: the mean over the matrix's units of the largest absolute cosine with any forward neuron; nan where
        neither side is shared. In float64.
    """
    rows = []
    for depth, (name, layer) in enumerate(converted(net).items(), 1):
        W = layer.weight.detach().double()
        for key, M in matrices(layer).items():
            M, found = M.double(), {"correlation": float("nan"), "angle_deg": float("nan")}
            if M.shape == W.shape:
                pair = torch.stack([M.flatten(), W.flatten()])
                found = {"correlation": torch.corrcoef(pair)[0, 1].item(), "angle_deg": angle(M, W)}
            units = neurons = None
            if M.shape[1:] == W.shape[1:]:
                units, neurons = M.flatten(1), W.flatten(1)
            elif M.dim() == 2 and len(M) == len(W):
                units, neurons = M.T, W.flatten(1).T
            if units is None:
                found |= dict.fromkeys(("match", "mixed", "chance"), float("nan"))
            else:
                gen = generator(seed, name, key, "symmetry")
                weights = torch.randn(len(units), len(neurons), generator=gen, dtype=torch.float64).to(W.device)
                random = torch.randn(units.shape, generator=gen, dtype=torch.float64).to(W.device)
                compared = {"match": units, "mixed": weights @ neurons, "chance": random}
                found |= {what: nearest(M, neurons) for what, M in compared.items()}
            rows.append({"layer": name, "depth": depth, "matrix": key, **found})
    columns = ["layer", "depth", "matrix", "correlation", "angle_deg", "match", "mixed", "chance"]
    return pd.DataFrame(rows, columns=columns)


def nearest(a: Tensor, b: Tensor) -> float:
    """Mean over the rows of ``a`` (m, d) of the largest absolute cosine with any row of ``b`` (n, d); zero rows are
    left out."""
    a, b = (t[torch.linalg.vector_norm(t, dim=1) > 0] for t in (a, b))
    cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    return cosines.abs().amax(1).mean().item() if cosines.numel() else float("nan")


@contextmanager
def exact_backprop(net: nn.Module) -> Iterator[nn.Module]:
    """Within the block the network's backward pass is plain backprop, whatever its rule; feedback is left as it is."""
    before = {layer.feedback: layer.feedback.use_backprop for layer in converted(net).values()}
    for feedback in before:
        feedback.use_backprop = True
    try:
        yield net
    finally:
        for feedback, exact in before.items():
            feedback.use_backprop = exact


def gradient_angles(net: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> pd.DataFrame:
    """Angles between what every layer gets under the rule and under exact backprop, on one batch; changes nothing.

    Args:
        net: a converted network; its mode (train or eval) is kept and its buffers, e.g. running statistics, are restored.
        x: inputs (n, ...), on the network's device.
        y: targets, as ``loss`` takes them.
        loss: (output, target) -> scalar.

    Returns:
        One row for every converted layer that the loss depends on: ``layer``, ``depth``, and in degrees ``delta_angle_local_deg``
        (the error at the layer's input through B_eff against that through W, from the same error at its output; nan under dfa),
        ``delta_angle_global_deg`` (the error at the layer's output under the rule against exact backprop through the whole network),
        both means over samples, and ``grad_angle_global_deg`` (the batch's dW under the rule against exact backprop; nan for a frozen weight).
    """
    layers = converted(net)
    buffers = {k: v.clone() for k, v in net.named_buffers()}

    def backward() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        inputs, edges, handles = {}, {}, []
        for name, layer in layers.items():

            def keep(m: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                inputs[name] = args[0].detach()
                if (
                    out.requires_grad
                ):  # its place in the graph, which stays the layer's own output where what follows works in place
                    edges[name] = torch.autograd.graph.get_gradient_edge(out)  # fmt: skip

            handles.append(layer.register_forward_hook(keep))
        try:
            with (
                torch.enable_grad(),
                torch.random.fork_rng([x.device] if x.is_cuda else []),
            ):  # both passes draw the same dropout
                value = loss(net(x), y)
                names = list(edges)
                moving = [n for n in names if layers[n].held.requires_grad]
                wanted = [*edges.values(), *(layers[n].held for n in moving)]
                grads = torch.autograd.grad(value, wanted, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        of_weights = {n: g[layers[n].rows] for n, g in zip(moving, grads[len(names) :]) if g is not None}
        return inputs, {n: g for n, g in zip(names, grads) if g is not None}, of_weights

    try:
        inputs, delta, dW = backward()
        with exact_backprop(net):
            _, delta_bp, dW_bp = backward()
    finally:
        with torch.no_grad():
            for k, v in net.named_buffers():
                v.copy_(buffers[k])
    rows = []
    for depth, (name, layer) in enumerate(layers.items(), 1):
        if name not in delta:
            continue
        local = float("nan")
        if isinstance(layer.feedback, Feedback):
            with exact_backprop(layer), torch.enable_grad():
                probe = inputs[name].clone().requires_grad_()
                out = layer(probe)
            through_W = torch.autograd.grad(out, probe, delta[name])[0]
            with torch.enable_grad():
                out = layer(probe)
            local = _sample_angle(torch.autograd.grad(out, probe, delta[name])[0], through_W)
        rows.append({
            "layer": name,
            "depth": depth,
            "delta_angle_local_deg": local,
            "delta_angle_global_deg": _sample_angle(delta[name], delta_bp[name]),
            "grad_angle_global_deg": _angle(dW[name], dW_bp[name]) if name in dW else float("nan"),
        })  # fmt: skip
    return _table(rows, ["layer", "depth", "delta_angle_local_deg", "delta_angle_global_deg", "grad_angle_global_deg"])
