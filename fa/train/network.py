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
    models.xavier_(net, generator(config.seed, "weights"))
    return convert(net, make_rule(config.rule, **config.rule_options), seed=config.seed)
