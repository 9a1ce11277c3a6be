"""What a learning rule costs: time and peak memory of a whole training step relative to plain backprop's.

    python benchmarks/step.py                                  # ResNet-20, batch 128, eager, two CPU threads
    python benchmarks/step.py --compile --rules bp_again,fa,kp,pfa
    python benchmarks/step.py --net resnet18 --batch 32 --device cuda
    python benchmarks/step.py --read benchmarks/results/step_resnet20_eager_cpu.json --markdown

A step is forward, loss, backward, optimizer and zero_grad. All networks live in one process; in every round each takes
its turn, in an order drawn anew, and its time is divided by backprop's in the same round, so that a machine whose speed
drifts favours nobody. A second backprop, ``bp_again``, shows the noise. Reported: median and quartiles over rounds.
Idle threads sleep (``OMP_WAIT_POLICY``, unless it is set), so that CPU time is work and not waiting, and freed memory
is kept, as ``fa run`` does: page faults took from nothing to a sixth of a step, by chance.

Peak memory is that of the tensors, parameters, feedback, optimizer state and batch included, and of what kernels take
for themselves: on a GPU the allocator's own peak; on a CPU every allocation and release of one step, as the profiler
reports them, on top of what lived before it. Both are exact, and the same in every run; the resident set, which holds
the interpreter and the allocator's leftovers, is not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch reads it

import torch
import torch.nn.functional as F
from torch import nn

import fa
from fa import models
from fa.provenance import environment
from fa.results.executors import keep_pages
from fa.train.config import parse_options

RULES = "bp_again,fa,usf,frsf,brsf,kp,sa,pfa,pfa_o,dfa,dfa:tap=block,ia,aa,wm,wm:input=uniform"
NO_BLOCKS = ("mlp", "lenet")  # networks on which tap=block has nothing to cut


def network(name: str, size: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """A network, and the shape of one image; ``size`` is the side of resnet18's (default 224)."""
    torch.manual_seed(0)
    if name == "mlp":
        return models.MLP(784), (1, 28, 28)
    if name == "lenet":
        return nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
        ), (3, 32, 32)  # fmt: skip
    if name == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=1000), (3, size or 224, size or 224)
    return models.ResNet(int(name.removeprefix("resnet"))), (3, 32, 32)


def biotorch(name: str, mode: str) -> nn.Module:
    """The same network under BioTorch (extra ``bench``): fa, usf, frsf or brsf."""
    from biotorch.module.biomodule import BioModule

    return BioModule(network(name)[0], mode=mode)


def stepper(args: argparse.Namespace, rule: str) -> Callable[[], None]:
    """A function that takes one training step under a rule."""
    net, shape = network(args.net, args.size)
    name, _, options = rule.partition(":")
    if name.startswith("biotorch_"):
        net = biotorch(args.net, name.removeprefix("biotorch_"))
    elif name not in ("bp", "bp_again"):
        net = fa.convert(net, name, **parse_options(options.replace("+", " ")))
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


def held() -> int:
    """Bytes of all tensors that live on the CPU, every storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
    sizes = {}
    for storage in (t.untyped_storage() for t in tensors):
        with suppress(RuntimeError):  # a tensor that a compiler left behind has no memory
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_of(step: Callable[[], object]) -> int:
    """Most bytes that one call holds beyond what lived before it, on the CPU: allocations and releases in their
    order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        live += change
        most = max(most, live)
    return most


def peak(args: argparse.Namespace, rule: str) -> float:
    """Peak memory in MB of one training step under a rule, after two others."""
    gc.collect()  # a network that was measured before and is held by a cycle would be released while this one is
    if args.device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    else:
        before = held()
    step = stepper(args, rule)
    for _ in range(2):
        step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return (held() - before + peak_of(step)) / 1e6


def table(where: dict, results: dict, markdown: bool = False) -> str:
    """The results as text, or as a table in markdown. Ratios to backprop; CPU time and wall time with their
    quartiles."""
    head = (f"{where['net']}, batch {where['batch']}{' of ' + str(where['size']) + ' px' if where['size'] else ''}, "
            f"{'compiled' if where['compile'] else 'eager'}{', bf16' if where['bf16'] else ''}, {where['rounds']} rounds; "
            f"torch {where['torch']}, {where['gpu'] or where['cpu']}, {where['threads']} threads; ratios to bp in the same round")  # fmt: skip
    rows = [("rule", "CPU time", "quartiles", "wall", "quartiles", "ms a step", "memory")]
    for rule, r in results.items():
        (c1, c2, c3), (w1, w2, w3) = r["cpu"], r["wall"]
        memory = r["peak_mb"] / results["bp"]["peak_mb"] if r["peak_mb"] else float("nan")
        rows.append(
            (
                rule,
                f"{c2:.2f}",
                f"{c1:.2f} to {c3:.2f}",
                f"{w2:.2f}",
                f"{w1:.2f} to {w3:.2f}",
                f"{r['ms']:.1f}",
                f"{memory:.3f}",
            )
        )
    if markdown:
        rows = [[f"`{row[0]}`" if i else row[0], *row[1:]] for i, row in enumerate(rows)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([head, "", lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])
    return "\n".join(
        [head, *(f"{r[0]:18} {r[1]:>8} {r[2]:>14} {r[3]:>8} {r[4]:>14} {r[5]:>10} {r[6]:>7}" for r in rows)]
    )


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet20", help="mlp, lenet, resnet20, resnet56, resnet18 (default resnet20)")
    parser.add_argument(
        "--rules", help=f"comma separated; options as dfa:form=dense+classes=10; biotorch_fa, ... (default {RULES})"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=0, help="side of resnet18's images (default 224)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True), inductor")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--read", type=Path, help="print the results of an earlier --json; nothing is measured")
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown")
    args = parser.parse_args()
    if args.read:
        print(table(**json.loads(args.read.read_text()), markdown=args.markdown))
        return
    if args.size and args.net != "resnet18":
        parser.error("--size is for resnet18; the other networks have images of their own")
    names = (args.rules or RULES).split(",")
    rules = ["bp", *(r for r in names if r and not (r == "dfa:tap=block" and args.net in NO_BLOCKS and not args.rules))]
    keep_pages()
    torch.set_num_threads(args.threads)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # several networks share one process, and with it their code objects
    if args.device == "cuda" and not args.no_memory:
        for (
            rule
        ) in rules:  # what libraries take at their first call and keep, as cuBLAS its workspace, is no rule's own
            stepper(args, rule)()
    memory = {} if args.no_memory else {rule: peak(args, rule) for rule in rules}
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
    where = {**environment(), "threads": args.threads, "wait_policy": os.environ["OMP_WAIT_POLICY"], "net": args.net, "size": args.size,
             "batch": args.batch, "compile": args.compile, "bf16": args.bf16, "rounds": args.rounds, "device": args.device,
             "torchvision": _version("torchvision"), "biotorch": _version("biotorch"),
             "load": round(os.getloadavg()[1], 1)}  # fmt: skip
    results = {
        rule: {
            "cpu": _quartiles([a / b for a, b in zip(cpu[rule], cpu["bp"])]),
            "wall": _quartiles([a / b for a, b in zip(wall[rule], wall["bp"])]),
            "ms": 1e3 * statistics.median(wall[rule]),
            "peak_mb": memory.get(rule),
        }
        for rule in rules
    }
    print(table(where, results, args.markdown))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"where": where, "results": results}, indent=1) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4)) if len(values) > 1 else (values[0],) * 3


if __name__ == "__main__":
    main()
