"""One training step: forward, loss, backward, optimizer, with nothing read back from the device within an epoch.

On the CPU a step is a step. On CUDA the first steps of a run are eager; then one step is captured as a graph, from
the gathering of the batch to the optimizer, and replayed. A change of the schedule captures anew, and every phase has
a graph of its own.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.layers.convert import param_groups
from fa.layers.feedback import generator
from fa.layers.hooks import converted
from fa.train import data
from fa.train.config import Config
from fa.train.ddp import ONE_PROCESS, Ranks
from fa.train.rounding import arithmetic

WARM = 3  # eager steps before a capture: they choose convolution algorithms, make the momenta, and compile


class Stepper:
    """Takes the training steps of one network, an epoch at a time.

    Args:
        net: the network of a run, or the stack of several (:mod:`fa.train.stack`), on its device.
        opt: the optimizer of its parameters, in groups made by ``fa.param_groups``.
        config: the run; of a stack any of its runs, for they share all that is read here.
        train: the training split, on the same device, or one that feeds batches from disk.
        compiled: forward and backward through ``torch.compile`` (default False; never where ranks share batch norm).
        capture: replay steps as a CUDA graph (default: on CUDA, unless a rule acts between steps, the data come from
            disk, updates are noisy, there are several ranks, or ``$FA_CAPTURE`` is 0).
        seeds: one seed for each run of a stack; each run has its own order of batches and its own loss (default:
            ``config.seed``).
        ranks: the processes that share the run; each has its part of every batch (default: this process alone).
    """

    def __init__(
        self,
        net: nn.Module,
        opt: torch.optim.Optimizer,
        config: Config,
        train: data.Split | data.DiskSplit,
        compiled: bool = False,
        capture: bool | None = None,
        seeds: Sequence[int] = (),
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self.net, self.opt, self.config, self.train = net, opt, config, train
        self.seeds, self.ranks = tuple(seeds) or (config.seed,), ranks
        self.device = next(net.parameters()).device
        compiled = compiled and not ranks.sync
        self.forward = ranks.wrap(net, compile_(net, self.device) if compiled else net)
        self.arithmetic = arithmetic(self.device, config.precision, compiled)
        resident = isinstance(train, data.Split)  # photographs come from disk, and are cropped there
        if capture is None:
            wanted = os.environ.get("FA_CAPTURE", "1") != "0"
            wanted = wanted and resident and ranks.size == 1
            capture = self.device.type == "cuda" and wanted and not (acts_between_steps(net) or config.update_noise)
        self.captures = capture
        self.per_epoch = len(train) // config.batch
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)  # (1,): number of the step within the epoch
        rows = len(self.seeds) * config.batch // ranks.size
        self.index = torch.zeros(self.per_epoch, rows, dtype=torch.int64, device=self.device)  # (steps, runs * batch)
        self.draws = self.border = None
        if config.augment and resident:
            self.draws = torch.zeros(self.per_epoch, 3, rows, dtype=torch.int64, device=self.device)
            self.pad = data.SETS[config.dataset].pad
            self.border = torch.tensor(data.SETS[config.dataset].black, device=self.device)  # (channels,)
        self.losses = torch.zeros(self.per_epoch, len(self.seeds), dtype=torch.float64, device=self.device)
        self.feed: Iterator[tuple[Tensor, Tensor]] | None = None
        self.phases: Iterator[str] = iter(())
        self.phase = "joint"  # of the step at hand
        self.replays: dict[str, Callable[[], None]] = {}  # phase -> its captured step
        self.taken: Counter[str] = Counter()  # steps by phase: each must be warm before it is captured
        self.now: dict[str, float] = {}
        self.noisy = noisy_tensors(net, opt, config) if config.update_noise else []

    def begin(self, epoch: int) -> None:
        """Set the schedule, the order of the batches and the augmentation of an epoch (from 0).

        All three are functions of (seed, epoch), drawn on the CPU, so that a resumed run and another device draw the
        same.
        """
        config, now = self.config, self.config.schedule(epoch)
        if now != self.now:
            self.now, self.replays = now, {}
        # Steps count over the whole run, so that a resumed run goes on with the same phase.
        self.phases = (config.phase(epoch, step) for step in count(epoch * self.per_epoch))
        for group in self.opt.param_groups:
            own = group["own_decay"]  # feedback whose gradient holds its own decay: the optimizer adds none
            group["lr"] = config.feedback_lr * now["lr"] / config.lr if own and config.feedback_lr else now["lr"]
            if not own:
                group["weight_decay"] = now["weight_decay"]
        n = self.per_epoch * config.batch
        orders = [torch.randperm(len(self.train), generator=generator(seed, "order", epoch))[:n] for seed in self.seeds]
        index = torch.cat([order.view(-1, config.batch) for order in orders], 1)  # runs x (n,) -> (steps, runs * batch)
        index = self.ranks.part(index)
        if isinstance(self.train, data.Split):
            self.index.copy_(index)
        else:
            self.feed = self.train.feed(index, config.seed, epoch, config.augment)
        if self.draws is not None:
            drawn = [data.draw_crops(n, generator(seed, "augment", epoch), self.pad) for seed in self.seeds]  # (3, n)
            draws = torch.cat([d.view(3, -1, config.batch) for d in drawn], 2)  # (3, steps, runs * batch)
            self.draws.copy_(self.ranks.part(draws).transpose(0, 1))
        self.noise = generator(config.seed, "update noise", epoch)
        self.at.zero_()

    def epoch(self, epoch: int, limit: int | None = None, seen: Callable[[int], None] = lambda step: None) -> Tensor:
        """Train one epoch, or its first ``limit`` batches; it ends early when no run has a finite loss.

        On a CPU it ends at that step. A GPU is asked every hundredth step, for it answers when it has done all before.

        Args:
            epoch: its number, from 0.
            limit: of batches (default None: the whole epoch).
            seen: called after every step with the number of steps taken (default: nothing is called).

        Returns:
            The losses, float64, on the device: (steps, runs), means over the whole batch. The next epoch overwrites
            them.
        """
        self.begin(epoch)
        steps = self.per_epoch if limit is None else min(limit, self.per_epoch)
        asked = 1 if self.device.type == "cpu" else 100
        for number in range(1, steps + 1):
            self.step()
            seen(number)
            if number % asked == 0 or number == steps:
                fresh = self.ranks.mean(self.losses[(number - 1) // asked * asked : number])  # all ranks decide alike
                if not torch.isfinite(fresh).all(0).any():
                    return self.losses[:number]
        return self.losses[:steps]

    def step(self) -> None:
        """One batch: forward, loss, backward, optimizer. Nothing is read back from the device."""
        self.phase = phase = next(self.phases)
        if self.captures and phase not in self.replays and self.taken[phase] >= WARM:
            self.replays[phase] = self._capture()
        self.replays.get(phase, self._learn)()
        self.taken[phase] += 1

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The images (runs * batch, c, h, w) and labels (runs * batch,) of the step at hand."""
        if self.feed is not None:
            return next(self.feed)
        rows = self.index.index_select(0, self.at)[0]  # (steps, runs * batch) -> (runs * batch,)
        # On a CPU index_select is twice as fast as x[rows].
        x, y = self.train.x.index_select(0, rows), self.train.y.index_select(0, rows)  # (runs * batch, c, h, w)
        if self.draws is not None:
            x = data.crop(x, self.draws.index_select(0, self.at)[0], self.border, self.pad, self.train.margin)
        else:
            x = self.train.middle(x)
        return x, y

    def _learn(self) -> None:
        (x, y), runs = self._batch(), len(self.seeds)
        if runs > 1:  # the images of all runs become channels of one batch
            x = (
                x.unflatten(0, (runs, -1)).transpose(0, 1).flatten(1, 2)
            )  # (runs * batch, c, ..) -> (batch, runs * c, ..)
        if self.device.type == "cuda" and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        half = self.config.precision == "bfloat16"
        with self.arithmetic:
            with torch.autocast(self.device.type, torch.bfloat16, half, cache_enabled=False):
                out = self.forward(x)  # (batch, runs * classes)
                if runs == 1:
                    loss = total = F.cross_entropy(out, y)  # ()
                else:
                    out = out.unflatten(1, (runs, -1)).transpose(0, 1).flatten(0, 1)  # -> (runs * batch, classes)
                    loss = F.cross_entropy(out, y, reduction="none").view(runs, -1).mean(1)  # (runs,)
                    total = loss.sum()
            total.backward()
        resting = {"joint": None, "task": True, "mirror": False}[self.phase]
        for group in self.opt.param_groups:
            if group["own_decay"] is resting:
                for p in group["params"]:  # without a gradient the optimizer leaves p, its momentum and its decay alone
                    p.grad = None
        self.opt.step()
        self.opt.zero_grad()
        with torch.no_grad():
            for tensor, group in self.noisy:
                if group["own_decay"] is not resting:
                    xi = torch.randn(tensor.shape, generator=self.noise, device="cpu")
                    tensor.add_(xi.to(tensor), alpha=group["lr"] * self.config.update_noise**0.5)
        self.losses.index_copy_(0, self.at, loss.detach().double().view(1, runs))
        self.at += 1

    def _capture(self) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        for layer in converted(self.net).values():
            if (gen := getattr(getattr(layer.feedback, "op", None), "gen", None)) is not None:
                graph.register_generator_state(gen)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._learn()
        return graph.replay


def acts_between_steps(net: nn.Module) -> bool:
    """Whether a rule of this network acts after every optimizer step; a captured CUDA graph would leave that out."""
    return any(layer.feedback.acts for layer in converted(net).values())


@contextmanager
def numerics(device: str | torch.device) -> Iterator[None]:
    """Settings for training on a device.

    On the CPU one thread, so that sums are made in one order. On CUDA cuDNN's fastest convolutions, or under
    ``torch.use_deterministic_algorithms(True)`` those that always sum in one order; in float32 through TF32 as PyTorch
    does by default (linear layers are not); and a stream of its own, for steps cannot be captured on the default
    stream.
    """
    if torch.device(device).type != "cpu":
        caller, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        own.wait_stream(caller)  # data may still be on their way to the device
        strict = torch.are_deterministic_algorithms_enabled()
        with torch.backends.cudnn.flags(enabled=True, benchmark=not strict, deterministic=strict, allow_tf32=True):
            with torch.cuda.stream(own):
                yield
        caller.wait_stream(own)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of a run, on all parameters, learned feedback included: SGD with momentum, or Adam."""
    groups = param_groups(net, config.lr, config.weight_decay)
    if config.feedback_momentum != -1:
        groups[-1]["momentum"] = config.feedback_momentum  # the group of own-decay feedback comes last
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    on_cuda = next(net.parameters()).is_cuda  # where a step may be captured
    return torch.optim.Adam(groups, betas=(config.momentum, 0.999), fused=True, capturable=on_cuda)


def noisy_tensors(net: nn.Module, opt: torch.optim.Optimizer, config: Config) -> list[tuple[Tensor, dict[str, Any]]]:
    """What ``config.noisy`` names, each tensor with the parameter group whose learning rate scales its noise."""
    groups = opt.param_groups
    layers = converted(net).values()
    if config.rule == "frozen" and config.noisy == "feedback":
        return [(layer.feedback.B, groups[0]) for layer in layers]
    feedback = {id(p) for layer in layers for p in layer.feedback.parameters()}
    wanted = config.noisy == "feedback"
    return [(p, group) for group in groups for p in group["params"] if (id(p) in feedback) == wanted]


def compile_(net: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` of a whole network; a network whose rule draws noise stays as it is, for a graph holds no
    generator.

    The networks of a process share their code, and with it the number of its versions.
    """
    import torch._dynamo

    if any(layer.feedback.rule.draws_noise for layer in converted(net).values()):
        return net
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # left to itself, inductor turns grouped convolutions out of channels_last
    options = {"force_layout_optimization": True} if device.type == "cuda" else None
    return torch.compile(net, fullgraph=True, options=options)


def can_compile(device: str | torch.device) -> bool:
    """Whether ``torch.compile`` has what it needs for this device: on the CPU a C++ compiler ($CXX, if that is set), on
    CUDA a C compiler and triton."""
    if torch.device(device).type == "cpu":
        return any(map(shutil.which, [told] if (told := os.environ.get("CXX")) else ["g++", "clang++", "c++"]))
    return bool(shutil.which("cc") or shutil.which("gcc")) and find_spec("triton") is not None
