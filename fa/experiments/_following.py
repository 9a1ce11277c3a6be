"""Feedback that follows a moving W: measured on the rules' code, and its theory."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa import models
from fa.experiments._estimation import coefficients, end
from fa.layers.convert import convert, param_groups
from fa.layers.hooks import converted
from fa.metrics import angle, feedback_weight
from fa.rules import rule as make_rule
from fa.train import data
from fa.train.network import initial_

if TYPE_CHECKING:
    from fa.experiments.p2_estimation import Following

OPTIONS: dict[str, dict[str, Any]] = {
    "sa": dict(decay=0.05, self_=0.1),
    "aa": dict(amp=0.1, sparse=0.05),
    "kp": {},
    "wm": dict(amp=0.1, decay=0.05),
    "ia": dict(amp=0.1, null=0.05, decay=0.05),
}
"""Coefficients: ours. At input power 1 and learning rate 1, SA, AA and WM go to W at the rate 0.1 a step."""

KP_DECAY = {"driven": 0.1, "run": 0.02}  # KP's weight decay, of W and B alike; driven: the same rate
MOMENTUM = 0.9  # of SGD in a run


# --------------------------------------------------------------------------------------------------- one layer, driven


def input_of(S: Tensor, gen: torch.Generator, n: int = 64) -> Tensor:
    """Inputs (n, in) whose second moment is exactly S."""
    z = torch.randn(n, len(S), generator=gen, dtype=torch.float64)
    white = torch.linalg.qr(z)[0] * math.sqrt(n)  # (n, in), second moment 1
    return white @ torch.linalg.cholesky(S).T  # (n, in) (in, in) -> (n, in)


def drive(layer: nn.Module, S: Tensor, x: Tensor, path: list[Tensor]) -> None:
    """Move the layer's weight along a path by SGD at learning rate 1; the rule's own code moves the feedback.

    The error at the output is made such that the gradient of W, and weight decay with it, is the next step of the path.
    """
    decay = KP_DECAY["driven"] if layer.feedback.rule.name == "kp" else 0.0
    opt = torch.optim.SGD(param_groups(layer, lr=1.0, weight_decay=decay))
    for W, following in zip(path, path[1:]):
        dW = W - following - decay * W  # (out, in)
        dy = x @ torch.linalg.solve(S, dW.T) / len(x)  # (n, in) (in, out) -> (n, out): dy^T x = dW
        opt.zero_grad()
        layer(x).backward(dy)
        opt.step()


def converted_layer(config: Following, W: Tensor, gen: torch.Generator) -> nn.Module:
    """A linear layer of weight W under the rule."""
    layer = nn.Linear(config.n_in, config.n_out, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(W)
    seed = int(torch.randint(2**31, (), generator=gen))
    return convert(layer, make_rule(config.rule, **OPTIONS[config.rule]), seed=seed)


def rotation(config: Following, gen: torch.Generator) -> dict[str, dict[str, float]]:
    """W turns: every right singular vector in a plane of its own, all at one speed, so that W S W^T stays."""
    n_in, n_out, omega = config.n_in, config.n_out, math.radians(config.speed)
    U, Q = (torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=torch.float64))[0] for n in (n_out, n_in))
    w = 0.5 + torch.rand(n_out, generator=gen, dtype=torch.float64)  # singular values, (out,)
    first, second = ((U * w) @ Q[:, i : i + n_out].T for i in (0, n_out))  # (out, out) (out, in) -> (out, in)

    def at(t: float) -> Tensor:
        return math.cos(omega * t) * first + math.sin(omega * t) * second

    steps, S = 250, torch.eye(n_in, dtype=torch.float64)
    layer = converted_layer(config, at(0), gen)
    drive(layer, S, input_of(S, gen), [at(t) for t in range(steps + 1)])
    W, B = layer.weight.detach(), feedback_weight(layer)
    ahead = at(steps + math.pi / 2 / omega)  # W, a quarter turn later
    behind = math.atan2(-(B * ahead).sum().item(), (B * W).sum().item())
    size = torch.linalg.vector_norm
    measured = {"angle_deg": angle(W, B), "norm_ratio": (size(B) / size(W)).item(), "lag": behind / omega}
    return {"": measured | {f"{name}_theory": v for name, v in rotation_theory(config.rule, w, omega).items()}}


def rotation_theory(rule: str, w: Tensor, omega: float) -> dict[str, float]:
    r"""Angle, norm ratio and lag behind a W that turns by ``omega`` radians a step; white input, learning rate 1.

    .. math:: H_i = \frac{a + s}{e^{i\omega} - 1 + r_i}, \qquad r_i = 2(d + n w_i^2 + p)

    is the response of the mode with singular value w_i; its argument is the phase by which the feedback is behind,
    about arctan(ω / r_i) for slow modes. KP is not behind. Source: our derivation.
    """
    if rule == "kp":
        return {"angle_deg": 0.0, "norm_ratio": 1.0, "lag": 0.0}
    c, z = coefficients(make_rule(rule, **OPTIONS[rule])), complex(math.cos(omega), math.sin(omega))
    rates = 2 * (c["decay"] + c["null"] * w**2 + c["sparse"])  # (out,)
    H = (c["amp"] + c["self"]) / (z - 1 + rates)  # (out,), complex
    power = w**2 / (w**2).sum()
    total, size = (power * H).sum(), (power * H.abs() ** 2).sum().sqrt()
    return {
        "angle_deg": math.degrees(math.acos(min(1.0, (total.real / size).item()))),
        "norm_ratio": size.item(), "lag": -math.atan2(total.imag.item(), total.real.item()) / omega,
    }  # fmt: skip


def ramp(config: Following, gen: torch.Generator) -> dict[str, dict[str, float]]:
    """W moves along a line, the input is coloured: the lag of each mode of the input."""
    shape, dtype = (config.n_out, config.n_in), torch.float64
    start, speed = (torch.randn(shape, generator=gen, dtype=dtype) for _ in range(2))
    V = torch.linalg.qr(torch.randn(config.n_in, config.n_in, generator=gen, dtype=dtype))[0]  # (in, in)
    powers = torch.logspace(math.log10(0.25), math.log10(4), config.n_in, dtype=dtype)
    S = (V * powers) @ V.T  # (in, in)
    path = [start + 0.01 * t * speed for t in range(401)]
    layer = converted_layer(config, start, gen)
    drive(layer, S, input_of(S, gen), path)
    if config.rule == "kp":
        goals, rates = path[-2:], None  # it follows W itself, however fast
    else:
        ends = [end(coefficients(layer.feedback.rule), W, S) for W in path[-2:]]
        goals, rates = [e.B for e in ends], ends[1].rates[0]  # (in,), of the modes by rising power
    lags = modes_behind(goals[1] - feedback_weight(layer), goals[1] - goals[0], V)
    found = {}
    for i, j in enumerate(reversed(range(config.n_in)), 1):
        theory = 0.0 if rates is None else 1 / rates[j].item()
        found[f"mode{i}"] = {"lag": lags[j].item(), "lag_theory": theory, "power": powers[j].item()}
    return found


def modes_behind(distance: Tensor, step: Tensor, V: Tensor) -> Tensor:
    """Distance (out, in) in steps (out, in), for each mode, a column of V (in, in); -> (in,)."""
    distance, step = distance @ V, step @ V  # (out, in) (in, in) -> (out, in)
    return (distance * step).sum(0) / step.square().sum(0)


# --------------------------------------------------------------------------------------------------------- a real run


@lru_cache(maxsize=1)
def images(dataset: str) -> data.Data:
    """The data set, read once for all runs of a process."""
    return data.load(dataset)


def real_run(config: Following, gen: torch.Generator, horizon: int = 30) -> dict[str, dict[str, float]]:
    """A network that learns: the lag of each layer's feedback, in steps, over the second half of the run.

    The lag is the shift at which the angle between the feedback and an earlier W is smallest, and between whole steps
    where a parabola through the three smallest has its lowest point. The mirrors' input is normal noise; SGD with
    momentum.
    """
    sets = images(config.dataset)
    net = initial_(models.build(config.model, sets.shape, sets.classes, (64, 64)), "xavier", gen)
    convert(net, make_rule(config.rule, **run_options(config.rule)), seed=int(torch.randint(2**31, (), generator=gen)))
    decay = KP_DECAY["run"] if config.rule == "kp" else 0.0
    opt = torch.optim.SGD(param_groups(net, lr=config.lr, weight_decay=decay), momentum=MOMENTUM)
    layers, train = converted(net), sets.train
    past: dict[str, list[Tensor]] = {name: [] for name in layers}
    lags: dict[str, list[float]] = {name: [] for name in layers}
    for step in range(config.steps):
        batch = torch.randint(len(train), (64,), generator=gen)
        opt.zero_grad()
        F.cross_entropy(net(train.x[batch]), train.y[batch]).backward()
        opt.step()
        for name, layer in layers.items():
            past[name] = [layer.weight.detach().flatten().clone(), *past[name][:horizon]]  # the newest first
            if step >= config.steps // 2 and step % 5 == 0:
                lags[name].append(behind(feedback_weight(layer).flatten(), torch.stack(past[name])))
    found = {
        name: {"lag": float(np.mean(lags[name])), "angle_deg": angle(layer.weight, feedback_weight(layer))}
        for name, layer in layers.items()
    }
    for about in found.values():
        if (rate := run_rate(config.rule)) is not None:
            about["lag_theory"] = (1 - MOMENTUM) / (config.lr * rate) if rate else 0.0
    return found


def run_options(rule: str) -> dict[str, Any]:
    """Options of the rule in a network: four times the coefficients, and noise as the mirrors' input."""
    noise = {"input": "normal"} if rule in ("aa", "wm", "ia") else {}
    return {name: 4 * value for name, value in OPTIONS[rule].items()} | noise


def run_rate(rule: str) -> float | None:
    """Relaxation rate under noise of power 1; 0: none is needed (KP); None: it depends on W (IA)."""
    if rule == "kp":
        return 0.0
    c = coefficients(make_rule(rule, **run_options(rule)))
    return None if c["null"] else 2 * (c["decay"] + c["sparse"])


def behind(B: Tensor, past: Tensor) -> float:
    """The lag of B (k,) behind the past W (steps, k), the newest first, in steps; see :func:`real_run`."""
    cosines = (past @ B) / torch.linalg.vector_norm(past, dim=1)  # (steps,)
    best = int(cosines.argmax())
    if not 0 < best < len(cosines) - 1:
        return float(best)
    before, at, after = cosines[best - 1 : best + 2].double().tolist()
    return best + 0.5 * (before - after) / (before - 2 * at + after)
