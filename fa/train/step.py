"""Training steps that keep a device busy: the data lie on it, nothing waits for it within an epoch, and runs can share it.

On the CPU a step is a step. On a CUDA device the first few are taken as they come, then one is captured as a graph, from the
gathering of the batch to the optimizer, and replayed; a change of the schedule captures anew, and every phase has a graph of its own.
Several runs, or stacks of them (:mod:`fa.train.stack`), take their steps in turn, each on a stream of its own: the kernels of one small network
leave gaps that those of another fill, and every run computes what it would alone.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.layers.feedback import generator
from fa.layers.hooks import acts_between_steps, converted
from fa.train import data

if TYPE_CHECKING:
    from fa.train.config import Config

WARM = 3  # eager steps before a capture: they choose convolution algorithms, make the momenta, and compile


class Stepper:
    """Takes the training steps of one run, an epoch at a time.

    Args:
        net: the network, on its device.
        opt: SGD on its parameters, in groups made by ``fa.param_groups``.
        config: the run.
        train: the training split, on the same device, or one that feeds batches from disk.
        compiled: forward and backward through ``torch.compile`` (default False).
        capture: replay steps as a CUDA graph (default: on CUDA, unless a rule acts between steps, the data come from disk, or
            ``$FA_CAPTURE`` is 0).
        seeds: of the runs that the network holds side by side (:mod:`fa.train.stack`), each with an order of batches and a loss of its own
            (default: ``config``'s alone).
    """

    def __init__(
        self,
        net: nn.Module,
        opt: torch.optim.Optimizer,
        config: Config,
        train: data.Split,
        compiled: bool = False,
        capture: bool | None = None,
        seeds: Sequence[int] = (),
    ) -> None:
        self.net, self.opt, self.config, self.train = net, opt, config, train
        self.seeds = tuple(seeds) or (config.seed,)
        self.device = next(net.parameters()).device
        self.forward = compile_(net, self.device) if compiled else net
        resident = isinstance(train, data.Split)  # photographs come from disk, and are cropped there
        if capture is None:
            wanted = os.environ.get("FA_CAPTURE", "1") != "0"
            capture = self.device.type == "cuda" and wanted and resident and not acts_between_steps(net)
        self.captures = capture
        self.per_epoch = len(train) // config.batch
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)  # number of the step within the epoch
        rows = len(self.seeds) * config.batch
        self.index = torch.zeros(self.per_epoch, rows, dtype=torch.int64, device=self.device)
        self.draws = self.border = None
        if config.augment and resident:
            self.draws = torch.zeros(self.per_epoch, 3, rows, dtype=torch.int64, device=self.device)
            self.pad = data.pad_of(train.x.shape)
            self.border = torch.tensor(data.SETS[config.dataset].black, device=self.device)
        self.losses = torch.zeros(self.per_epoch, len(self.seeds), dtype=torch.float64, device=self.device)
        self.feed: Iterator[tuple[Tensor, Tensor]] | None = None
        self.phases: Iterator[str] = iter(())
        self.phase = "joint"  # of the step at hand
        self.replays: dict[str, Callable[[], None]] = {}  # phase -> its captured step
        self.taken: Counter[str] = Counter()  # steps by phase: each must be warm before it is captured
        self.now: dict[str, float] = {}

    def begin(self, epoch: int) -> int:
        """Set the schedule, the order and the augmentation of an epoch (from 0); the number of its steps.

        All three are functions of (seed, epoch), drawn on the CPU, so that a resumed run and another device draw the same.
        """
        config = self.config
        now = config.schedule(epoch)
        if now != self.now:
            self.now, self.replays = now, {}
        self.phases = (
            config.phase(epoch, step) for step in count(epoch * self.per_epoch)
        )  # of the run: a resumed one agrees
        for group in self.opt.param_groups:
            group["lr"] = (
                config.feedback_lr * now["lr"] / config.lr if group["own_decay"] and config.feedback_lr else now["lr"]
            )
            if not group[
                "own_decay"
            ]:  # feedback whose gradient holds its decay gets none from the optimizer, in no epoch
                group["weight_decay"] = now["weight_decay"]
        n = self.per_epoch * config.batch
        orders = [torch.randperm(len(self.train), generator=generator(seed, "order", epoch))[:n] for seed in self.seeds]
        index = torch.cat([order.view(-1, config.batch) for order in orders], 1)
        if isinstance(self.train, data.Split):
            self.index.copy_(index)
        else:
            self.feed = self.train.feed(index, config.seed, epoch, config.augment)
        if self.draws is not None:
            draws = [
                data.draw_crops(n, generator(seed, "augment", epoch), self.pad).view(3, -1, config.batch)
                for seed in self.seeds
            ]
            self.draws.copy_(torch.cat(draws, 2).transpose(0, 1))
        self.at.zero_()
        return self.per_epoch

    def epoch(self, epoch: int, limit: int | None = None) -> Generator[None, None, Tensor]:
        """Train one epoch, or its first ``limit`` batches; yields after every step.

        Returns:
            The losses, float64, on the device: (steps,), or (steps, runs) of several.
        """
        steps = min(self.begin(epoch), self.per_epoch if limit is None else limit)
        for _ in range(steps):
            self.step()
            yield
        return self.losses[:steps] if len(self.seeds) > 1 else self.losses[:steps, 0]

    def step(self) -> None:
        """One batch: forward, loss, backward, optimizer. Nothing is read back from the device."""
        self.phase = phase = next(self.phases)
        if self.feed is not None:
            self._learn(*next(self.feed))
            return
        if self.captures and phase not in self.replays and self.taken[phase] >= WARM:
            self.replays[phase] = self._capture()
        self.replays.get(phase, self._take)()
        self.taken[phase] += 1

    def _take(self) -> None:
        rows = self.index.index_select(0, self.at)[0]
        x, y = (
            self.train.x.index_select(0, rows),
            self.train.y.index_select(0, rows),
        )  # on a CPU twice as fast as x[rows]
        if self.draws is not None:
            x = data.crop(x, self.draws.index_select(0, self.at)[0], self.border, self.pad)
        self._learn(x, y)

    def _learn(self, x: Tensor, y: Tensor) -> None:
        runs = len(self.seeds)
        if runs > 1:  # images of different runs as channels of one
            x = x.unflatten(0, (runs, -1)).transpose(0, 1).flatten(1, 2)
        if self.device.type == "cuda" and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, self.config.precision == "bfloat16", cache_enabled=False):
            out = self.forward(x)
            if runs == 1:
                loss = total = F.cross_entropy(out, y)
            else:
                out = out.unflatten(1, (runs, -1)).transpose(0, 1).flatten(0, 1)
                loss = F.cross_entropy(out, y, reduction="none").view(runs, -1).mean(1)
                total = loss.sum()
        total.backward()
        for group in self.opt.param_groups:
            if self.phase == ("task" if group["own_decay"] else "mirror"):
                for p in group[
                    "params"
                ]:  # at rest: without a gradient the optimizer leaves it alone, its momentum and decay too
                    p.grad = None
        self.opt.step()
        self.opt.zero_grad()
        self.losses.index_copy_(0, self.at, loss.detach().double().view(1, runs))
        self.at += 1

    def _capture(self) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        for layer in converted(self.net).values():
            if (gen := getattr(getattr(layer.feedback, "op", None), "gen", None)) is not None:
                graph.register_generator_state(gen)
        # Other threads may call CUDA meanwhile; a capture that fails for their sake would spoil the process.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._take()
        return graph.replay


@contextmanager
def on(device: str | torch.device) -> Iterator[None]:
    """Settings for training on a device: one thread on the CPU, so that sums are made in one order; on CUDA the fastest convolutions.

    Convolutions in float32 are there made in TF32, as PyTorch does by default; linear layers are not.
    """
    if torch.device(device).type != "cpu":
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def stream(device: str | torch.device) -> AbstractContextManager[Any]:
    """A stream of its own on CUDA, entered with ``with`` as often as wanted; on the CPU nothing."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if torch.device(device).type == "cuda" else nullcontext()


def together(runs: Iterable[Generator[None, None, Any]], device: str | torch.device) -> Iterator[tuple[int, Any]]:
    """Take the steps of several runs in turn.

    Args:
        runs: generators that yield after every step they have asked of the device, as :func:`fa.train.loop.running`.
        device: theirs.

    Yields:
        (number of the run, what it returned or the exception that ended it), as each ends.
    """
    streams = [(i, run, stream(device)) for i, run in enumerate(runs)]
    with ExitStack() as stack:
        stack.enter_context(on(device))
        while streams:
            for member in list(streams):
                i, run, own = member
                try:
                    with own:
                        next(run)
                except StopIteration as end:
                    streams.remove(member)
                    yield i, end.value
                except Exception as error:  # one run's failure is not the others'
                    streams.remove(member)
                    yield i, error


def drain(run: Generator[None, None, Any]) -> Any:
    """Take all steps of one run; what it returns."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def compile_(net: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` of a whole network; a network whose rule draws noise as it is, since a graph cannot hold a generator.

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
    """Whether ``torch.compile`` has what it needs for this device: a C compiler, and on CUDA triton."""
    return bool(shutil.which("cc") or shutil.which("gcc")) and (
        torch.device(device).type == "cpu" or find_spec("triton") is not None
    )
