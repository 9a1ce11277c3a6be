"""The network that a run starts with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fa import models
from fa.layers.convert import convert
from fa.layers.feedback import generator
from fa.rules import rule as make_rule
from fa.train.config import Config, integers


def build_network(config: Config, shape: Sequence[int], classes: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The untrained network of a run, with its rule on, on the CPU; ``shape``: channels, height, width of an image."""
    net = models.build(config.model, shape, classes, integers(config.hidden)).to(dtype)
    draw = models.xavier_ if config.weights == "xavier" else models.default_
    draw(net, generator(config.seed, "weights"))
    rule, sample = make_rule(config.rule, **config.rule_options), torch.zeros(1, *shape, dtype=dtype)  # (1, c, h, w)
    dense = getattr(rule, "form", "kernel") != "kernel"  # such feedback needs the sizes of the maps
    return convert(net, rule, seed=config.seed, sample=sample if dense else None)
