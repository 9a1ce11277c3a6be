"""Whether captured and stacked training steps are what they should be on this GPU; the first thing to run on a new
machine. Needs no data.

    python benchmarks/check_cuda.py --stack 3              # every rule of p3's Figure 4, ResNet-20
    python benchmarks/check_cuda.py --rules pfa --precision bfloat16 --compile
    python benchmarks/check_cuda.py --rules wm --alternate 1    # mirror and task phases, a graph for each

For every rule the same steps are taken twice, captured as a graph and eagerly, over a change of the schedule where
there is one, and with measurements between: the losses must agree, no step may wait for the device, and a measurement
may alter nothing. With ``--stack`` so many seeds are also trained as one network, captured, and eagerly one by one,
and their losses must agree too. Printed: the largest relative gap of the losses; milliseconds of a step, seconds of a
measurement, and memory reserved, with the engine's own choice of convolutions.

All are held to the same deterministic convolutions, for left to themselves they choose different ones, and training
at the recipe's learning rate amplifies the rounding of TF32 (1e-3) to gaps of some percent within 16 steps. Then only
a mistake can part captured and eager steps: 1e-5 is allowed. Compiled and stacked steps round otherwise by their
nature, so these are compared at a hundredth of the learning rate, or 1e-4 if that is more (under dfa), where losses
differ by little more than the rounding of one forward pass: 1e-2 is allowed. (ResNet-20 by backprop there, batches of
32 on a CPU: bfloat16 is 2e-3 from float32, a learning rate lower by a tenth 1.4e-2, none 0.4.)
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor
from train import seconds, sets, started, stepping, wait

from fa import experiments
from fa.train import data, stack
from fa.train import loop as train
from fa.train import step as engine
from fa.train.config import Config

SAME, ROUNDED = 1e-5, 1e-2  # largest relative gaps of losses: by the same kernels; by others, at a low learning rate


def losses(configs: list[Config], device: str, captured: bool, compiled: bool) -> Tensor:
    """Losses (16, runs) of two epochs of eight steps, by deterministic convolutions; several runs are a stack."""
    config = configs[0]
    split, made = few(config, device), []
    images = data.Data(config.dataset, 10, split, split, split)
    wait(device)
    same = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
    with engine.numerics(device), same:
        net, opt, members = started(configs, device)
        captured = captured and device == "cuda"
        stepper = engine.Stepper(net, opt, config, split, compiled, captured, [c.seed for c in configs])
        kept = [*net.parameters(), *(p for run in members for p in run.net.parameters())]
        for epoch in (0, 1):
            stepper.begin(epoch)
            for i in range(8):
                if device == "cuda" and not captured and epoch and i:
                    torch.cuda.set_sync_debug_mode("error")  # a step that waits raises
                stepper.step()
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            made.append(stepper.losses[:8].clone())
            before = [p.detach().clone() for p in kept]
            train.measure(members, net, images, 5, [{} for _ in members])
            assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, kept)), (
                "a measurement altered the network"
            )
        return torch.cat(made).cpu()


def times(config: Config, device: str, compiled: bool) -> tuple[float, float, float]:
    """Seconds of a captured step, of an eager one, and of a measurement, by the engine's own choice of convolutions."""
    steps = []
    with engine.numerics(device):
        for captured in (True, False):
            take = stepping([config], device, compiled and captured, captured and device == "cuda")
            take((engine.WARM + 1) * (config.alternate + 1))  # every phase is captured by then
            steps.append(seconds(lambda: take(10)) / 10)
        split, (net, _, members) = few(config, device), started([config], device)
        images = data.Data(config.dataset, 10, split, split, split)
        measuring = [seconds(lambda: train.measure(members, net, images, 5, [{}])) for _ in range(2)]
        return *steps, measuring[1]


def few(config: Config, device: str) -> data.Split:
    """Twenty batches of random images."""
    return data.Split(*sets(config.dataset, device).train.first(20 * config.batch))


def main() -> None:
    """Check every rule; ends with an error where losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="", help="comma separated (default: those of the experiment)")
    parser.add_argument("--experiment", default="p3_fig4")
    parser.add_argument("--mode", default="paper", choices=("quick", "paper"), help="of the experiment (default paper)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--alternate", type=int, default=0, help="task-only steps after each mirror-only one (default 0: no phases)"
    )
    parser.add_argument("--compile", action="store_true", help="compare compiled and captured steps with eager ones")
    parser.add_argument(
        "--stack", type=int, default=0, help="compare a stack of so many seeds with each alone (default 0: do not)"
    )
    parser.add_argument(
        "--tolerance", type=float, help=f"largest gap of a loss (default {SAME:g}; compiled or stacked {ROUNDED:g})"
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong: dict[str, list[str]] = {}

    def gap(rule: str, remedy: str, got: Tensor, want: Tensor, allowed: float) -> str:
        most = ((got - want).abs() / want.abs()).max().item()
        if not most < (allowed if args.tolerance is None else args.tolerance):  # nan neither
            wrong.setdefault(remedy, []).append(rule)
        return f"{rule:8} gap {most:.1e}"

    for config in experiments.plan(args.experiment, args.mode, seeds=1, rules=args.rules):
        config = replace(config, precision=args.precision, alternate=args.alternate)
        scale = max(0.01, 1e-4 / config.lr)
        slow = replace(config, lr=config.lr * scale, feedback_lr=config.feedback_lr * scale)
        run, allowed = ([slow], ROUNDED) if args.compile else ([config], SAME)
        pair = losses(run, device, True, args.compile), losses(run, device, False, False)
        text = gap(
            config.rule, "captured and eager losses differ; set FA_CAPTURE=0 to train without capture", *pair, allowed
        )
        captured, eager, measuring = times(config, device, args.compile)
        reserved = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else float("nan")
        print(f"{text}  step {1e3 * captured:.2f} ms captured, {1e3 * eager:.2f} ms eager  "
              f"measuring {measuring:.2f} s  {reserved:.1f} GiB", flush=True)  # fmt: skip
        if args.stack and stack.key(config) is None:
            print(f"{config.rule:8} cannot be stacked", flush=True)
        elif args.stack:
            runs = [replace(slow, seed=seed) for seed in range(args.stack)]
            alone = torch.cat([losses([one], device, False, False) for one in runs], 1)
            stacked = losses(runs, device, True, args.compile)
            text = gap(
                config.rule,
                "stacked and single losses differ; set --together 1 to train without stacks",
                stacked,
                alone,
                ROUNDED,
            )
            print(f"{text}  {args.stack} runs stacked, against each alone", flush=True)
    if wrong:
        raise SystemExit("\n".join(f"{', '.join(rules)}: {remedy}" for remedy, rules in wrong.items()))


if __name__ == "__main__":
    main()
