"""The network that a run starts with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fa import models
from fa.layers.convert import convert
from fa.layers.feedback import generator
from fa.rules import fans, uniform
from fa.rules import rule as make_rule
from fa.train.config import Config, integers


def build_network(config: Config, shape: Sequence[int], classes: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The untrained network of a run, with its rule on, on the CPU; ``shape``: channels, height, width of an image."""
    net = models.build(config.model, shape, classes, integers(config.hidden)).to(dtype)
    initial_(net, config.weights, generator(config.seed, "weights"))
    rule, sample = make_rule(config.rule, **config.rule_options), torch.zeros(1, *shape, dtype=dtype)  # (1, c, h, w)
    dense = getattr(rule, "form", "kernel") != "kernel"  # such feedback needs the sizes of the maps
    return convert(net, rule, seed=config.seed, sample=sample if dense else None)


@torch.no_grad()
def initial_(net: nn.Module, kind: str, gen: torch.Generator) -> nn.Module:
    """Initial weights and biases of every linear and convolutional layer, in place, uniform and drawn from ``gen``.

    Args:
        net: the network.
        kind: ``"xavier"``: standard deviation sqrt(2 / (fan_in + fan_out)), biases 0 (p3, authors' option ``init:
            xavier``, used for every rule); ``"torch"``: PyTorch's own, U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), biases
            too (Lance & Kieu 2026, authors' code); ``"he"``: sqrt(2 / fan_in), biases 0 (He et al. 2015).
        gen: a generator; entries are drawn in float64, so that networks of any dtype start alike.
    """
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            fan_in, fan_out = fans(m.weight)
            variance = {"xavier": 2 / (fan_in + fan_out), "torch": 1 / (3 * fan_in), "he": 2 / fan_in}[kind]
            for p in m.parameters(recurse=False):  # weight, bias
                drawn = p is m.weight or kind == "torch"
                p.copy_(uniform(tuple(p.shape), variance**0.5, p, gen) if drawn else torch.zeros_like(p))
    return net
