"""What training costs: images a second, seconds a run, and how much of the device that uses; for one run and for
several at once.

    python benchmarks/train.py        # on a GPU p3's Figure 4 (CIFAR-10, ResNet-20), else its Figure 2 (MNIST)
    python benchmarks/train.py --rules bp,bp+fa+usf --together 1,5,15 --precision float32,bfloat16 --compile no,yes
    python benchmarks/train.py --experiment p3_fig4 --device cpu --steps 4

The runs are those of an experiment's paper mode, trained on random images of the data set's size: time does not
depend on what they show. On CUDA runs at once are one network, as in a campaign (:mod:`fa.train.stack`); runs that
cannot be stacked take their steps one after another. On the CPU each run has a process and one thread. Rules joined
by "+" share the runs of a row evenly; FLOPs, traffic and measurements are counted for the first rule. In the same
rounds a plain PyTorch loop trains the same network by backprop: DataLoader, eager, float32, no feedback.

Utilisation is of ceilings measured here: the fastest large matrix product, and the fastest copy of a large tensor.
*FLOPs* are those of backprop's forward and backward pass, whatever the rule. *Traffic* is every byte that the
operations of a plain step would read and write if none were fused and nothing stayed in a cache; it may therefore
exceed the ceiling. *A run* is all epochs of the recipe, where several are trained at once its share of the time; its
measurements (accuracies, and at some epochs angles, as :func:`fa.train.loop.splits_to_measure` and
:func:`fa.train.loop.layer_epochs` say) are timed apart and added in the last column.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from itertools import chain, product, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fa import experiments
from fa.provenance import environment
from fa.results import executors
from fa.train import data, stack
from fa.train import loop as train
from fa.train import step as engine
from fa.train.config import Config

SIZES = {
    "mnist": (60_000, 0, 10_000, (1, 28, 28)),
    "cifar10": (45_000, 5_000, 10_000, (3, 32, 32)),
    "digits": (1_437, 0, 360, (1, 8, 8)),
}
"""Data set -> images to train, to validate and to test with, and the shape of one."""


# -------------------------------------------------------------------------------- one pack of runs


@lru_cache(maxsize=2)
def sets(dataset: str, device: str) -> data.Data:
    """Random images of the data set's numbers and shape; validation and test images are the first training images."""
    n, n_val, n_test, shape = SIZES[dataset]
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, *shape, generator=gen).to(device), torch.randint(10, (n,), generator=gen).to(device)
    val, test = (data.Split(x[:k], y[:k]) if k else None for k in (n_val, n_test))
    return data.Data(dataset, 10, data.Split(x, y), val, test)


def started(configs: Sequence[Config], device: str) -> tuple[nn.Module, torch.optim.SGD, list[train.Run]]:
    """The untrained network of a run, or the stack of several; its optimizer; and the runs."""
    runs, images = [train.Run(config) for config in configs], sets(configs[0].dataset, device)
    for run in runs:
        run.start(images, device)
    if len(runs) > 1:
        return *stack.join(runs, images.shape, images.classes), runs
    return runs[0].net, runs[0].opt, runs


def pack(recipes: Sequence[Config], n: int) -> list[Config]:
    """So many runs, spread evenly over the recipes, those of one side by side."""
    return [replace(recipes[i * len(recipes) // n], seed=i) for i in range(n)]


def groups(configs: Sequence[Config], device: str) -> list[tuple[Config, ...]]:
    """The runs that take their steps as one network: stacks on CUDA, and else every run."""
    return [tuple(group) for group in stack.groups(configs, 1 if device == "cpu" else len(configs))]


def stepping(
    configs: Sequence[Config], device: str, compiled: bool, capture: bool | None = None
) -> Callable[[int], None]:
    """A function that takes so many steps of every run, one group after another, and waits for the device."""
    split, steppers = sets(configs[0].dataset, device).train, []
    for group in groups(configs, device):
        net, opt, runs = started(group, device)
        seeds = [run.config.seed for run in runs]
        steppers.append(engine.Stepper(net, opt, group[0], split, compiled, capture, seeds))

    def steps(n: int) -> None:
        for stepper in steppers:
            left = n
            while left:
                left -= len(stepper.epoch(1, left))
        wait(device)

    return steps


def plain(config: Config, device: str, workers: int) -> Callable[[int], None]:
    """The loop that most people would write, for backprop."""
    split = sets(config.dataset, "cpu").train

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
    net = train.build_network(replace(config, rule="bp", options=""), SIZES[config.dataset][3], 10).to(device)
    opt = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    batches = chain.from_iterable(repeat(loader))

    def steps(n: int) -> None:
        for _ in range(n):
            x, y = (t.to(device) for t in next(batches))
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
        wait(device)

    return steps


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], None]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# -------------------------------------------------------------------------------- several processes on a CPU


def prepare(config: Config, compiled: bool) -> None:
    """In a worker process: make what :func:`timed` steps."""
    torch.set_num_threads(1)
    timed.go = stepping([config], "cpu", compiled)
    timed.go(engine.WARM)


def timed(steps: int) -> float:
    """In a worker process: seconds of so many steps."""
    return seconds(lambda: timed.go(steps))


@contextmanager
def crew(configs: list[Config], compiled: bool, steps: int) -> Iterator[Callable[[], float]]:
    """Processes that wait; the function yielded lets each take its steps and says how long the slowest took."""
    with executors.processes() as new:
        workers = [new() for _ in configs]
        for made in [worker.submit(prepare, config, compiled) for worker, config in zip(workers, configs)]:
            made.result()
        yield lambda: max(took.result() for took in [worker.submit(timed, steps) for worker in workers])


# -------------------------------------------------------------------------------- ceilings


def ceilings(device: str, precision: str) -> tuple[float, float]:
    """FLOP/s of the fastest large matrix product in that precision (one thread on a CPU), and bytes/s of a copy, read
    and written.
    """
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
    net, opt, _ = started([bp], "cpu")
    x, y = torch.randn(config.batch, *SIZES[config.dataset][3]), torch.zeros(config.batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        F.cross_entropy(net(x), y).backward()
        opt.step()
    element = 2 if config.precision == "bfloat16" else 4
    return flops.get_total_flops() / config.batch, traffic.bytes * element / 4 / config.batch


@cache
def measuring(group: tuple[Config, ...], device: str) -> float:
    """Seconds that the measurements of a whole run take, the first of a group of :func:`groups`."""
    config, images = group[0], sets(group[0].dataset, device)
    net, _, runs = started(group, device)

    def warm(work: Callable[[], Any]) -> float:
        work()
        return seconds(work)

    with engine.numerics(device):
        evaluation = warm(lambda: train.accuracies(net, images.test, len(runs))) / len(runs)
        layers = warm(lambda: train.layer_rows(runs[0].net, images, 0))
    epochs = (train.splits_to_measure(images, config, e) for e in range(config.epochs + 1))
    seen = sum(len(split) for splits in epochs for split in splits.values())
    return seen * evaluation / len(images.test) + len(train.layer_epochs(config.epochs)) * layers


# -------------------------------------------------------------------------------- main


HEAD = ("rule", "precision", "compiled", "at once", "images/s", "to plain", "FLOPs", "traffic", "s a run", "measured")


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [w.strip() for w in text.split(",") if w.strip()]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--experiment", default="", help="whose runs (default: p3_fig4 on a GPU, p3_fig2 on a CPU)")
    add("--mode", default="paper", choices=("quick", "paper"), help="of the experiment (default paper)")
    add("--rules", default="", help="comma separated; bp+fa: such runs side by side (default: the experiment's)")
    add(
        "--together",
        default="",
        help="runs at once, comma separated (default: 1,5,15 on a GPU, 1 and the cores on a CPU)",
    )
    add("--precision", default="", help="float32, bfloat16, or both (default: the experiment's)")
    add("--compile", default="no", help="no, yes, or both (default no)")
    add("--steps", type=int, default=0, help="of every run in a round (default: 200 on a GPU, 40 on a CPU)")
    add("--rounds", type=int, default=5)
    add("--device", default="auto")
    add("--json", type=Path, help="write the results here")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write JSON."""
    args, cores = parsed(), executors.pick_workers("auto")
    device = executors.pick_device(args.device)
    name = args.experiment or ("p3_fig4" if device == "cuda" else "p3_fig2")
    steps = args.steps or (200 if device == "cuda" else 40)
    numbers = [int(n) for n in words(args.together)] or ([1, 5, 15] if device == "cuda" else sorted({1, cores}))
    entries = [[rule.strip() for rule in entry.split("+")] for entry in words(args.rules)]
    rules = ",".join(dict.fromkeys(rule for entry in entries for rule in entry))
    first: dict[str, Config] = {}
    for config in experiments.plan(name, args.mode, rules=rules):
        first.setdefault(config.rule, config)
    entries = entries or [[rule] for rule in first]
    base, width = next(iter(first.values())), max(8, *(len("+".join(entry)) for entry in entries))
    about = {
        "device": device,
        "experiment": name,
        "mode": args.mode,
        "steps": steps,
        "rounds": args.rounds,
        "cores": cores,
    }
    where, results = {**environment(), **about}, []
    machine = f"torch {where['torch']}, {where['gpu'] or where['cpu']}"
    print(f"{name}: {base.model} on {base.dataset}, batch {base.batch}; {machine}; "
          f"medians of {args.rounds} rounds of {steps} steps")  # fmt: skip
    print(f"{{:{width}}} {{:9}} {{:8}} {{:>7}} {{:>10}} {{:>8}} {{:>6}} {{:>7}} {{:>8}} {{:>9}}".format(*HEAD))
    with engine.numerics(device):
        ordinary = plain(base, device, workers=min(8, cores) if device == "cuda" else 0)
        ordinary(2)
        for precision in words(args.precision) or [base.precision]:
            ceiling, copy = ceilings(device, precision)
            where[f"ceiling_{precision}"] = {"flops": ceiling, "bytes": copy}
            flops, traffic = work_of(replace(base, precision=precision))
            for compiled, entry, n in product((w == "yes" for w in words(args.compile)), entries, numbers):
                if n < len(entry):  # one run cannot be of two rules
                    continue
                runs = pack([replace(first[rule], precision=precision) for rule in entry], n)
                extra = measuring(groups(runs, device)[0], device) / (1 if device == "cuda" else n)
                speed, ratio = rates(runs, ordinary, device, compiled, steps, args.rounds)
                busy = min(n, cores) if device == "cpu" else 1
                alone = len(sets(base.dataset, device).train) // base.batch * base.batch * base.epochs / speed
                row = {
                    "rule": "+".join(entry), "precision": precision, "compiled": compiled, "together": n,
                    "images_per_s": speed, "to_plain": ratio, "flops": speed * flops / ceiling / busy,
                    "traffic": speed * traffic / copy, "seconds_per_run": alone,
                    "seconds_per_run_measured": alone + extra,
                }  # fmt: skip
                results.append(row)
                print(f"{row['rule']:{width}} {precision:9} {'yes' if compiled else 'no':8} {n:7} {speed:10.0f} "
                      f"{ratio:8.2f} {row['flops']:6.1%} {row['traffic']:7.1%} {alone:8.1f} {alone + extra:9.1f}",
                      flush=True)  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"where": where, "results": results}, indent=1) + "\n")


def rates(
    runs: list[Config], ordinary: Callable[[int], None], device: str, compiled: bool, steps: int, rounds: int
) -> tuple[float, float]:
    """Images a second of all runs of a pack, and relative to the plain loop in the same round: medians over rounds."""
    count, speeds, ratios = runs[0].batch * steps * len(runs), [], []

    def race(go: Callable[[], float]) -> None:
        for _ in range(rounds):
            own, other = go(), seconds(lambda: ordinary(max(steps // 4, 2)))
            speeds.append(count / own)
            ratios.append(speeds[-1] * other / (runs[0].batch * max(steps // 4, 2)))

    if device == "cpu":
        with crew(runs, compiled, steps) as go:
            race(go)
    else:
        take = stepping(runs, device, compiled)
        take(engine.WARM + 2)
        race(lambda: seconds(lambda: take(steps)))
    return statistics.median(speeds), statistics.median(ratios)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
