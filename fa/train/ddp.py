"""One run on many devices: ``torchrun --nproc-per-node N -m fa run EXPERIMENT`` trains each run on N ranks together.

Every rank draws the order, the crops and the noise of the whole batch, and takes its own part of them.
``DistributedDataParallel`` averages the gradients of weights, biases and learned feedback over the ranks. They are the
gradients of one process with the whole batch, up to the order of sums. Rank 0 alone has the run's folder and measures.

Batch norm takes the statistics of each rank's own images, as ``DistributedDataParallel`` has it. The recipe means those
of the whole batch, so that such a run says so in its status and stays out of ``data/records``. ``sync`` is the remedy.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fa.errors import UserError
from fa.layers.hooks import converted

WAIT = timedelta(days=1)  # of the ranks for rank 0, which measures; a rank that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """The processes that train a run together, as one of them sees them; by default this process alone.

    Args:
        rank: number of this process, from 0.
        size: number of ranks.
        device: of this rank.
        sync: whether batch norm takes the statistics of the whole batch (default False: of this rank's images).
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    sync: bool = False

    def check(self, configs: Sequence[Any]) -> None:
        """Raise UserError unless every run has a batch that the ranks can share evenly."""
        for batch in sorted({c.batch for c in configs if hasattr(c, "batch") and c.batch % self.size}):
            raise UserError(
                f"{self.size} ranks cannot share a batch of {batch} images evenly; give torchrun a number that "
                f"divides {batch}"
            )

    def share(self, value: Any = None) -> Any:
        """The ``value`` of rank 0, on every rank."""
        if self.size > 1:
            dist.broadcast_object_list(told := [value], device=torch.device("cpu"))
            return told[0]
        return value

    def lead(self, job: Any) -> None:
        """From rank 0: what the others, which wait in :func:`fa.train.loop.follow`, shall train; None: no more."""
        if self.rank == 0:
            self.share(job)

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of a tensor whose last axis is the batch; (..., batch) -> (..., batch / size)."""
        return x.chunk(self.size, -1)[self.rank]

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def first(self, net: nn.Module, measure: Callable[[], Any]) -> None:
        """Let rank 0 measure a network; the others wait for it, and go on with its noise."""
        if self.rank == 0:
            measure()
        if self.size > 1:
            noisy = [layer.feedback for layer in converted(net).values() if layer.feedback.rule.draws_noise]
            for feedback, state in zip(noisy, self.share([f.get_extra_state() for f in noisy])):
                feedback.set_extra_state(state)

    def local_norm(self, net: nn.Module) -> bool:
        """Whether batch norm takes the statistics of a rank's images alone."""
        return self.size > 1 and not self.sync and any(isinstance(m, _BatchNorm) for m in net.modules())

    def wrap(self, net: nn.Module, forward: nn.Module) -> nn.Module:
        """The forward pass of ``net``, or of its compiled ``forward``, with gradients that are means over the ranks."""
        if self.size == 1:
            return forward
        if self.local_norm(net) and self.rank == 0:
            _say_once(
                f"batch norm sees 1/{self.size} of the batch, which is another recipe, so that such runs stay out of "
                "data/records; --sync-batch-norm makes it see the whole batch"
            )
        for layer in converted(net).values():
            if layer.feedback.rule.draws_noise:
                layer.feedback.op.noise = partial(self._noise, layer.feedback.op.noise)
        # Feedback is equal on all ranks: a function of seed, step and W. Of running statistics rank 0's are used.
        wrapped = _Parallel(forward, broadcast_buffers=False)
        for m in net.modules() if self.sync else ():  # after the wrapper, which refuses SyncBatchNorm on a CPU
            if isinstance(m, _BatchNorm):
                m.__class__, m.process_group = WholeBatchNorm, None
        return wrapped

    def _noise(self, draw: Callable[..., Tensor], like: Tensor, *args: Any) -> Tensor:
        return draw(torch.cat([like] * self.size), *args).chunk(self.size)[self.rank]  # of the whole batch, its part


ONE_PROCESS = Ranks()
"""This process trains by itself."""


class WholeBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` within training steps; on the CPU, where PyTorch has none, in plain operations."""

    training_step = False

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (n, channels, ...), as ``nn.BatchNorm2d``."""
        if not (WholeBatchNorm.training_step and self.training):  # rank 0 measures alone
            return _BatchNorm.forward(self, x)
        if x.is_cuda:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce  # sums gradients over the ranks, too

        axes, column = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum(axes)) / n  # (channels,)
        centred = x - mean.view(column)  # (n, channels, ...)
        var = all_reduce(centred.square().sum(axes)) / n  # (channels,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()  # (channels,)
        return centred * scale.view(column) + self.bias.view(column)


class _Parallel(DistributedDataParallel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        WholeBatchNorm.training_step = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            WholeBatchNorm.training_step = False


@cache
def _say_once(sentence: str) -> None:
    sys.stderr.write(f"fa: {sentence}\n")


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def leave() -> None:
    """End the group of processes, after what still holds it: its threads must not outlive the interpreter."""
    gc.collect()  # DistributedDataParallel lies in cycles
    dist.destroy_process_group()


@contextmanager
def joined(device: str, sync: bool, **options: Any) -> Iterator[Ranks]:
    """Within the block this process is one of the ranks that torchrun started, or :data:`ONE_PROCESS`.

    Args:
        device: "cpu", or "cuda", where each rank of a machine has a device of its own.
        sync: see :class:`Ranks`.
        options: of the command that do not go with ranks, name -> value, as far as they were given.

    Raises:
        UserError: such options, or too few devices; the first rank of a machine says so, the others end in silence.
    """
    told, numbers = os.environ, ("RANK", "WORLD_SIZE", "MASTER_PORT")
    called = {*numbers, "MASTER_ADDR"} <= told.keys()
    for name in (*numbers, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if called else ():
        if not told.get(name, "0").isdecimal():
            raise UserError(f"{name}={told[name]!r} is no number, as torchrun would set it; call torchrun, or unset it")
    size = int(told["WORLD_SIZE"]) if called else 1
    if size == 1:
        yield ONE_PROCESS
        return
    if (rank := int(told["RANK"])) >= size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}; call torchrun, which sets both, or unset them")
    local, here = int(told.get("LOCAL_RANK", rank)), int(told.get("LOCAL_WORLD_SIZE", size))
    options |= {"device": device} if ":" in device else {}
    wrong = [f"--{name} {value}" for name, value in options.items()]
    why = f"ranks train one run at a time, each on its own device; leave {wrong[0]} out, or torchrun" if wrong else ""
    if not wrong and device == "cuda" and here > (found := torch.cuda.device_count()):
        why = f"{here} ranks need {here} CUDA devices, and there are {found}; give torchrun --nproc-per-node {found}"
    if why:
        raise SystemExit(2) if local else UserError(why)
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    # torchrun keeps its store when it starts the ranks again, and with it the addresses of ranks that are gone
    store, *_ = next(dist.rendezvous("env://", timeout=WAIT))
    store = dist.PrefixStore(f"attempt {told.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=WAIT, store=store, rank=rank, world_size=size)
    ranks = Ranks(rank, size, device, sync)
    try:
        yield ranks
        ranks.lead(None)
    except (RuntimeError, KeyboardInterrupt) as error:
        if rank and (lost(error) or isinstance(error, KeyboardInterrupt)):
            raise SystemExit(1) from None  # rank 0, or torchrun, says it
        raise
    leave()
