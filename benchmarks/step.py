"""What a learning rule costs: time and peak memory of a whole training step relative to plain backprop's.

    python benchmarks/step.py                                  # ResNet-20, batch 128, eager, two CPU threads
    python benchmarks/step.py --compile --rules fa,kp,pfa
    python benchmarks/step.py --net resnet18 --batch 32 --device cuda

A step is forward, loss, backward, optimizer and zero_grad. All networks live in one process; in every round each takes its turn, in an
order drawn anew, and its time is divided by backprop's in the same round, so that a machine whose speed drifts favours nobody. A second
backprop, ``bp_again``, shows the noise. Reported: median and quartiles over rounds. Peak memory is measured in a process of its own for
each rule: the device's peak on a GPU, the resident set's on a CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fa
from fa import models
from fa.records import environment

RULES = "bp_again,fa,usf,frsf,brsf,kp,sa,pfa,pfa_o,dfa,ia,aa,wm"


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network, and the shape of one image."""
    torch.manual_seed(0)
    if name == "mlp":
        return models.mlp(784), (1, 28, 28)
    if name == "lenet":
        return nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
        ), (3, 32, 32)  # fmt: skip
    if name == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=1000), (3, 224, 224)
    return models.resnet(int(name.removeprefix("resnet"))), (3, 32, 32)


def biotorch(name: str, mode: str) -> nn.Module:
    """The same network under BioTorch (extra ``bench``): fa, usf, frsf or brsf."""
    from biotorch.module.biomodule import BioModule

    return BioModule(network(name)[0], mode=mode)


def stepper(args: argparse.Namespace, rule: str) -> Callable[[], None]:
    """A function that takes one training step under a rule."""
    net, shape = network(args.net)
    name, _, options = rule.partition(":")
    if name.startswith("biotorch_"):
        net = biotorch(args.net, name.removeprefix("biotorch_"))
    elif name not in ("bp", "bp_again"):
        net = fa.convert(net, name, **dict(pair.split("=") for pair in options.split("+") if pair))
    net = net.to(args.device)
    opt = torch.optim.SGD(fa.param_groups(net, lr=1e-3, weight_decay=1e-4), momentum=0.9, fused=True)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, *shape, generator=gen).to(args.device)
    y = torch.randint(10, (args.batch,), generator=gen).to(args.device)
    run = torch.compile(net, fullgraph=True) if args.compile else net
    after = (lambda: None) if args.device == "cpu" else torch.cuda.synchronize

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = F.cross_entropy(run(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        after()

    return step


def peak(args: argparse.Namespace) -> float:
    """Peak memory in MB of this process after a few steps of one rule."""
    step = stepper(args, args.peak)
    for _ in range(3):
        step()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    for line in Path("/proc/self/status").read_text().splitlines():  # getrusage's peak would include the parent's
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet20", help="mlp, lenet, resnet20, resnet56, resnet18 (default resnet20)")
    parser.add_argument("--rules", default=RULES, help="comma separated; options as dfa:form=dense+classes=10; biotorch_fa, ...")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True), inductor")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args))
        return
    rules = ["bp", *(r for r in args.rules.split(",") if r)]
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # several networks share one process, and with it their code objects
    steps = {rule: stepper(args, rule) for rule in rules}
    for step in steps.values():
        for _ in range(3):
            step()
    wall: dict[str, list[float]] = {rule: [] for rule in rules}
    cpu: dict[str, list[float]] = {rule: [] for rule in rules}
    order, shuffle = list(rules), random.Random(0).shuffle
    for _ in range(args.rounds):
        shuffle(order)
        for rule in order:
            w, c = time.perf_counter(), time.process_time()
            steps[rule]()
            wall[rule].append(time.perf_counter() - w)
            cpu[rule].append(time.process_time() - c)
    memory = {} if args.no_memory else {rule: _peak_of(rule) for rule in rules}
    where = {**environment(), "threads": args.threads, "net": args.net, "batch": args.batch, "compile": args.compile,
             "bf16": args.bf16, "rounds": args.rounds, "device": args.device}  # fmt: skip
    print(f"{args.net}, batch {args.batch}, {'compiled' if args.compile else 'eager'}{', bf16' if args.bf16 else ''}, {args.rounds} rounds; "
          f"torch {where['torch']}, {where['gpu'] or where['cpu']}, {args.threads} threads; ratios to bp in the same round")  # fmt: skip
    print(f"{'rule':14} {'CPU time':>8} {'quartiles':>14} {'wall':>8} {'quartiles':>14} {'ms a step':>10} {'memory':>7}")
    results = {}
    for rule in rules:
        ratios = {k: _quartiles([a / b for a, b in zip(t[rule], t["bp"])]) for k, t in (("cpu", cpu), ("wall", wall))}
        ms = 1e3 * statistics.median(wall[rule])
        share = memory[rule] / memory["bp"] if memory else float("nan")
        (c1, c2, c3), (w1, w2, w3) = ratios["cpu"], ratios["wall"]
        print(f"{rule:14} {c2:8.3f}  [{c1:.3f}, {c3:.3f}] {w2:8.3f}  [{w1:.3f}, {w3:.3f}] {ms:10.1f} {share:7.3f}")
        results[rule] = {**ratios, "ms": ms, "peak_mb": memory.get(rule)}
    if args.json:
        args.json.write_text(json.dumps({"where": where, "results": results}, indent=1) + "\n")


def _peak_of(rule: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", rule]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4)) if len(values) > 1 else (values[0],) * 3


if __name__ == "__main__":
    main()
