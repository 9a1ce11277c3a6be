"""bfloat16 on a CPU: a step with products that are made in float32 and rounded, with PyTorch's own, and in float32.

    python benchmarks/rounding.py
    python benchmarks/rounding.py --rules bp,fa,pfa,dfa,wm --rounds 5

ResNet-8 on CIFAR-10 at 16x16 pixels, batch 128, one thread. In each round the three take turns, one step each, so that
a busy machine slows all of them; printed are medians and their ratio to float32. ``fa.train.rounding`` takes the first
way on a CPU that lacks the arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

from fa.provenance import environment
from fa.train import data, rounding
from fa.train.config import Config
from fa.train.network import build_network
from fa.train.step import Stepper, make_optimizer, numerics

WAYS = {"float32": ("float32", False), "rounded": ("bfloat16", True), "PyTorch's": ("bfloat16", False)}
"""Name -> precision of the run, and whether the CPU is taken to lack bfloat16."""


def stepper(rule: str, precision: str, lacks: bool) -> Stepper:
    """The steps of one run."""
    config = Config(
        rule, 0, dataset="cifar10-16", model="resnet8", hidden="", lr=0.05, lr_drops="", batch=128, augment=True,
        precision=precision,
    )  # fmt: skip
    sets = data.load("cifar10-16")
    net = build_network(config, sets.shape, 10)
    with mock.patch.object(rounding, "lacking", lambda: lacks):
        return Stepper(net, make_optimizer(net, config), config, sets.train)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="bp,fa", help="comma separated (default bp,fa)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    where = environment()
    print(f"torch {where['torch']}, {where['cpu']}; lacks bfloat16: {rounding.lacking()}; ms a step (over float32)")
    with numerics("cpu"):
        for rule in args.rules.split(","):
            runs = {name: stepper(rule, *way) for name, way in WAYS.items()}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for i in range(args.rounds + 1):
                for name, run in runs.items():
                    begin = time.process_time()
                    run.epoch(0, limit=1)
                    if i:  # the first round warms up
                        times[name].append(time.process_time() - begin)
            ms = {name: 1000 * statistics.median(t) for name, t in times.items()}
            print(f"{rule:8}", *[f"{name} {t:.0f} ({t / ms['float32']:.2f})" for name, t in ms.items()], sep="  ")


if __name__ == "__main__":
    main()
