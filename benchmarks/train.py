"""What training costs: images a second, seconds a run, and how much of the device that uses; for one run and for several at once.

    python benchmarks/train.py                                   # on a GPU p3's Figure 4 (CIFAR-10, ResNet-20), else its Figure 2 (MNIST)
    python benchmarks/train.py --rules bp,pfa --together 1,5,30 --precision float32,bfloat16 --compile no,yes
    python benchmarks/train.py --experiment p3_fig4 --device cpu --steps 4

The runs are those of an experiment's paper mode, trained on random images of the data set's size: time does not depend on what they show.
On CUDA runs at once share a process, each on a stream of its own; on the CPU each has a process and one thread. Beside them, in the same
rounds, a plain PyTorch loop trains the same network by backprop: DataLoader, eager, float32, no feedback.

Utilisation is of ceilings measured here: the fastest large matrix product, and the fastest copy of a large tensor. *FLOPs* are those of
backprop's forward and backward pass, whatever the rule. *Traffic* is every byte that the operations of a plain step would read and write
if none were fused and nothing stayed in a cache; it may therefore exceed the ceiling. *A run* is all epochs of the recipe; its
measurements (accuracies every epoch, angles at some) are timed apart and added in the last column.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fa import campaign, data, engine, experiments, train
from fa.records import environment
from fa.train import Config

SIZES = {"mnist": (60_000, (1, 28, 28), 10_000), "cifar10": (45_000, (3, 32, 32), 15_000), "digits": (1_437, (1, 8, 8), 360)}
"""Data set -> training images, their shape, images evaluated after every epoch."""


# -------------------------------------------------------------------------------------------------------------- one pack of runs


@lru_cache(maxsize=2)
def images(dataset: str, device: str) -> data.Split:
    """Random images of the data set's number and shape."""
    n, shape, _ = SIZES[dataset]
    gen = torch.Generator().manual_seed(0)
    return data.Split(torch.randn(n, *shape, generator=gen).to(device), torch.randint(10, (n,), generator=gen).to(device))


def network(config: Config, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The untrained network of a run, and its optimizer."""
    net = train.seed_network(config, SIZES[config.dataset][1], 10).to(device)
    if device == "cuda":
        net = net.to(memory_format=torch.channels_last)
    return net, train.sgd(net, config)


def stepping(configs: list[Config], device: str, compiled: bool) -> Callable[[int], None]:
    """A function that takes so many steps of every run, in turn, and waits for the device."""
    split, crew = images(configs[0].dataset, device), []
    for config in configs:
        own = engine.stream(device)
        with own:
            net, opt = network(config, device)
            crew.append((own, endless(partial(engine.Stepper(net, opt, config, split, compiled).epoch, 1))))
    wait(device)

    def steps(n: int) -> None:
        for _ in range(n):
            for own, run in crew:
                with own:
                    next(run)
        wait(device)

    return steps


def plain(config: Config, device: str, workers: int) -> Callable[[int], None]:
    """The loop that most people would write, for backprop."""
    split = images(config.dataset, "cpu")

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(split)

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            x = split.x[i]
            if config.augment:
                x = F.pad(x, (4, 4, 4, 4))
                down, right, mirrored = torch.randint(9, ()), torch.randint(9, ()), torch.rand(()) < 0.5
                x = x[:, down : down + 32, right : right + 32]
                x = x.flip(-1) if mirrored else x
            return x, split.y[i]

    loader = torch.utils.data.DataLoader(Images(), config.batch, shuffle=True, drop_last=True, num_workers=workers,
                                         pin_memory=device == "cuda", persistent_workers=workers > 0)  # fmt: skip
    net = train.seed_network(replace(config, rule="bp", options=""), SIZES[config.dataset][1], 10).to(device)
    opt = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    batches = endless(lambda: loader)

    def steps(n: int) -> None:
        for _ in range(n):
            x, y = (t.to(device) for t in next(batches))
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
        wait(device)

    return steps


def endless(epoch: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from epoch()


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], None]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# --------------------------------------------------------------------------------------------------- several processes on a CPU


def _member(config: Config, compiled: bool, steps: int, rounds: int, barrier: Any, times: Any) -> None:
    campaign.keep_pages()
    with engine.on("cpu"):
        go = stepping([config], "cpu", compiled)
        go(engine.WARM)
        for _ in range(rounds):
            barrier.wait()
            times.put(seconds(lambda: go(steps)))


@contextmanager
def crew(configs: list[Config], compiled: bool, steps: int, rounds: int) -> Iterator[Callable[[], float]]:
    """Processes that wait; the function yielded lets each take its steps and says how long the slowest took."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(len(configs) + 1), context.Queue()
    members = [context.Process(target=_member, args=(c, compiled, steps, rounds, barrier, times), daemon=True) for c in configs]
    for member in members:
        member.start()

    def go() -> float:
        barrier.wait()
        return max(times.get() for _ in members)

    try:
        yield go
    finally:
        for member in members:
            member.terminate()
            member.join()


# ------------------------------------------------------------------------------------------------------------------- ceilings


def ceilings(device: str, precision: str) -> tuple[float, float]:
    """FLOP/s of the fastest large matrix product in that precision (one thread on a CPU), and bytes/s of a copy, read and written."""
    n = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c, d = (torch.empty(2**28 if device == "cuda" else 2**25, device=device) for _ in range(2))

    def best(work: Callable[[], Any]) -> float:
        def once() -> None:
            work()
            wait(device)

        once()
        return min(seconds(once) for _ in range(10))

    with torch.no_grad():
        return 2 * n**3 / best(lambda: a @ b), 2 * c.numel() * 4 / best(lambda: d.copy_(c))


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(t.numel() * t.element_size() for t in leaves if isinstance(t, Tensor))
        return out


def work_of(config: Config) -> tuple[float, float]:
    """FLOPs and bytes an image of a backprop step, counted on the CPU."""
    bp = replace(config, rule="bp", options="", precision="float32")
    net, opt = network(bp, "cpu")
    x, y = torch.randn(config.batch, *SIZES[config.dataset][1]), torch.zeros(config.batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        F.cross_entropy(net(x), y).backward()
        opt.step()
    element = 2 if config.precision == "bfloat16" else 4
    return flops.get_total_flops() / config.batch, traffic.bytes * element / 4 / config.batch


def measuring(config: Config, device: str) -> float:
    """Seconds that the measurements of a whole run take."""
    net, _ = network(config, device)
    n = SIZES[config.dataset][2]
    split = images(config.dataset, device)
    test = data.Split(split.x[:n], split.y[:n])
    sets = data.Data(config.dataset, 10, test, None, test)

    def timed(work: Callable[[], Any]) -> float:
        work()
        return seconds(work)

    with engine.on(device):
        evaluation = timed(lambda: train.accuracy(net, test))
        layers = timed(lambda: train.measure(net, config, sets, 0)) - 2 * evaluation
    fifth = sum(e % 5 == 0 or e == config.epochs for e in range(config.epochs + 1))
    training = fifth * len(split) / len(test)  # the training images are evaluated every fifth epoch
    return (config.epochs + 1 + training) * evaluation + len(train.layer_epochs(config.epochs)) * max(layers, 0.0)


# ------------------------------------------------------------------------------------------------------------------------ main


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [w.strip() for w in text.split(",") if w.strip()]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="", help="whose paper-scale runs (default: p3_fig4 on a GPU, p3_fig2 on a CPU)")
    parser.add_argument("--rules", default="", help="comma separated (default: the experiment's)")
    parser.add_argument("--together", default="", help="runs at once, comma separated (default: 1,5,30 on a GPU, 1 and the cores on a CPU)")
    parser.add_argument("--precision", default="float32", help="float32, bfloat16, or both (default float32)")
    parser.add_argument("--compile", default="no", help="no, yes, or both (default no)")
    parser.add_argument("--steps", type=int, default=0, help="steps of every run in a round (default: 200 on a GPU, 40 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    device = campaign.pick_device(args.device)
    name = args.experiment or ("p3_fig4" if device == "cuda" else "p3_fig2")
    steps, cores = args.steps or (200 if device == "cuda" else 40), campaign.pick_workers("auto")
    numbers = [int(n) for n in words(args.together)] or ([1, 5, 30] if device == "cuda" else sorted({1, cores}))
    runs = experiments.plan(name, "paper", rules=args.rules)
    rules = list(dict.fromkeys(c.rule for c in runs))
    first = {rule: next(c for c in runs if c.rule == rule) for rule in rules}
    results: list[dict[str, Any]] = []
    where = {**environment(), "device": device, "experiment": name, "steps": steps, "rounds": args.rounds, "cores": cores}
    print(f"{name}: {first[rules[0]].model} on {first[rules[0]].dataset}, batch {first[rules[0]].batch}; torch {where['torch']}, "
          f"{where['gpu'] or where['cpu']}; medians of {args.rounds} rounds of {steps} steps")  # fmt: skip
    head = ("rule", "precision", "compiled", "at once", "images/s", "to plain", "FLOPs", "traffic", "s a run", "measured")
    print("{:8} {:9} {:8} {:>7} {:>10} {:>8} {:>6} {:>7} {:>8} {:>9}".format(*head))
    with engine.on(device):
        ordinary = plain(first[rules[0]], device, workers=min(8, cores) if device == "cuda" else 0)
        ordinary(2)
        for precision in words(args.precision):
            ceiling, copy = ceilings(device, precision)
            where[f"ceiling_{precision}"] = {"flops": ceiling, "bytes": copy}
            for compiled in (word == "yes" for word in words(args.compile)):
                flops, traffic = work_of(replace(first[rules[0]], precision=precision))
                for rule in rules:
                    config = replace(first[rule], precision=precision)
                    extra = measuring(config, device)
                    for n in numbers:
                        pack = [replace(config, seed=i) for i in range(n)]
                        speed, ratio = rates(pack, ordinary, device, compiled, steps, args.rounds)
                        busy = min(n, cores) if device == "cpu" else 1
                        alone = SIZES[config.dataset][0] // config.batch * config.batch * config.epochs / speed
                        row = {
                            "rule": rule, "precision": precision, "compiled": compiled, "together": n, "images_per_s": speed,
                            "to_plain": ratio, "flops": speed * flops / ceiling / busy, "traffic": speed * traffic / copy,
                            "seconds_per_run": alone, "seconds_per_run_measured": alone + extra / (1 if device == "cuda" else n),
                        }  # fmt: skip
                        results.append(row)
                        print(f"{rule:8} {precision:9} {'yes' if compiled else 'no':8} {n:7} {speed:10.0f} {ratio:8.2f} {row['flops']:6.1%} "
                              f"{row['traffic']:7.1%} {alone:8.1f} {row['seconds_per_run_measured']:9.1f}", flush=True)  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"where": where, "results": results}, indent=1) + "\n")


def rates(
    pack: list[Config], ordinary: Callable[[int], None], device: str, compiled: bool, steps: int, rounds: int
) -> tuple[float, float]:
    """Images a second of all runs of a pack, and relative to the plain loop in the same round: medians over rounds."""
    count, speeds, ratios = pack[0].batch * steps * len(pack), [], []

    def race(go: Callable[[], float]) -> None:
        for _ in range(rounds):
            own, other = go(), seconds(lambda: ordinary(max(steps // 4, 2)))
            speeds.append(count / own)
            ratios.append(speeds[-1] * other / (pack[0].batch * max(steps // 4, 2)))

    if device == "cpu":
        with crew(pack, compiled, steps, rounds) as go:
            race(go)
    else:
        take = stepping(pack, device, compiled)
        take(engine.WARM + 2)
        race(lambda: seconds(lambda: take(steps)))
    return statistics.median(speeds), statistics.median(ratios)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
