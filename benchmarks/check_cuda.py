"""Whether captured training steps are what they should be on this GPU; the first thing to run on a new machine. Needs no data.

    python benchmarks/check_cuda.py                        # every rule of p3's Figure 4, ResNet-20
    python benchmarks/check_cuda.py --rules pfa --precision bfloat16 --compile
    python benchmarks/check_cuda.py --rules wm --alternate 1    # mirror and task phases, a graph for each

For every rule the same steps are taken twice, captured as a graph and eagerly, over a change of the schedule and with measurements between:
the losses must agree to the rounding of TF32, no step may wait for the device, and a measurement may alter nothing. Printed: the
largest relative gap of the losses, milliseconds of a step, seconds of a measurement, memory reserved.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from train import images, network, wait

from fa import data, engine, experiments, train
from fa.train import Config


def losses(config: Config, device: str, captured: bool, compiled: bool) -> tuple[torch.Tensor, float, float]:
    """Losses of two epochs of eight steps, seconds of a step after them, and of a measurement."""
    whole = images(config.dataset, device)
    split = data.Split(whole.x[: 20 * config.batch], whole.y[: 20 * config.batch])
    sets = data.Data(config.dataset, 10, split, split, split)
    wait(device)
    with engine.on(device), engine.stream(device):
        net, opt = network(config, device)
        stepper, made = engine.Stepper(net, opt, config, split, compiled, captured and device == "cuda"), []
        for epoch in (0, 1):
            run = stepper.epoch(epoch)
            for i in range(8):
                if device == "cuda" and not captured and epoch and i:
                    torch.cuda.set_sync_debug_mode("error")  # a step that waits raises
                next(run)
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            made.append(stepper.losses[:8].clone())
            before, begin = [p.detach().clone() for p in net.parameters()], time.perf_counter()
            train.measure(net, config, sets, 5)
            measuring = time.perf_counter() - begin
            assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters()))
        wait(device)
        begin = time.perf_counter()
        for _ in range(10):
            next(run)
        wait(device)
        return torch.cat(made).cpu(), (time.perf_counter() - begin) / 10, measuring


def main() -> None:
    """Check every rule; ends with an error where losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="", help="comma separated (default: those of the experiment)")
    parser.add_argument("--experiment", default="p3_fig4")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--alternate", type=int, default=0, help="task-only steps after each mirror-only one (default 0: no phases)")
    parser.add_argument("--compile", action="store_true", help="compare compiled and captured steps with eager ones")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="largest relative gap of a loss (default 1e-2)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = []
    for config in experiments.plan(args.experiment, "paper", seeds=1, rules=args.rules):
        config = replace(config, precision=args.precision, alternate=args.alternate)
        got, captured, measuring = losses(config, device, True, args.compile)
        want, eager, _ = losses(config, device, False, False)
        gap = ((got - want).abs() / want.abs()).max().item()
        wrong += [config.rule] if not gap < args.tolerance else []
        reserved = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else float("nan")
        print(f"{config.rule:8} gap {gap:.1e}  step {1e3 * captured:.2f} ms captured, {1e3 * eager:.2f} ms eager  "
              f"measuring {measuring:.2f} s  {reserved:.1f} GiB", flush=True)  # fmt: skip
    if wrong:
        raise SystemExit(f"captured and eager losses differ under {', '.join(wrong)}; set FA_CAPTURE=0 to train without capture")


if __name__ == "__main__":
    main()
