"""One run on many devices: ``torchrun --nproc-per-node N -m fa run EXPERIMENT`` trains each run on N ranks together.

Every rank draws the order, the crops and the noise of the whole batch, and takes its own part of them.
``DistributedDataParallel`` averages the gradients of weights, biases and learned feedback over the ranks. They are the
gradients of one process with the whole batch, up to the order of sums. Rank 0 alone has the run's folder and measures.

Batch norm takes the statistics of each rank's own images, as ``DistributedDataParallel`` has it. The recipe means those
of the whole batch, so that such a run says so in its status and stays out of ``data/records``. ``sync`` is the remedy.

Ranks compare their software, devices, options and data sets before they train. Where these differ, rank 0 says so.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from fa.provenance import environment, software
from fa.train import data, meeting

WAIT = timedelta(days=1)  # of the ranks for rank 0, which measures; a rank that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """The processes that train a run together, as one of them sees them; by default this process alone.

    Args:
        rank: number of this process, from 0.
        size: number of ranks.
        device: of this rank.
        sync: whether batch norm takes the statistics of the whole batch (default False: of this rank's images).
        machines: software and machines of all ranks, each once (default: none are known).
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    sync: bool = False
    machines: tuple[dict[str, str], ...] = ()

    def check(self, configs: Sequence[Any]) -> None:
        """Raise UserError unless every run has a batch that the ranks can share evenly."""
        for batch in sorted({c.batch for c in configs if hasattr(c, "batch") and c.batch % self.size}):
            raise UserError(
                f"{self.size} ranks cannot share a batch of {batch} images evenly; give torchrun a number that "
                f"divides {batch}"
            )

    def check_data(self, names: Sequence[str]) -> None:
        """Raise UserError on rank 0 unless every rank has these data sets, whole and with equal files.

        Rank 0 calls it, and the others with it in :func:`fa.train.loop.follow`, where they await the end of rank 0.
        """
        if not names or self.size == 1:
            return
        self.lead([*names])
        found, wrong = {}, ""
        for name in names:
            try:
                found[f"data set {name}, digest of its files"] = data.digest(name)
            except (UserError, OSError) as error:
                if self.rank == 0:
                    raise
                wrong = str(error)
        dist.all_gather_object(of := [{}] * self.size, {"host": socket.gethostname(), "wrong": wrong, **found})
        lacking = (f"on {o['host']} (rank {rank}): {o['wrong']}" for rank, o in enumerate(of) if o["wrong"])
        if (why := next(lacking, "") or meeting.apart(of)) and self.rank == 0:
            raise UserError(why)

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


def _join(rank: int, size: int, device: str, sync: bool) -> Ranks:
    """Make this process one of the ranks, which are found to be alike."""
    host, told = socket.gethostname(), os.environ
    again = "stop torchrun on every machine, and start it again on each"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=meeting.JOIN))
        store = dist.PrefixStore(f"fa {told.get('TORCHELASTIC_RUN_ID', '')}", store)
        options = {"--sync-batch-norm": sync, "--deterministic": torch.are_deterministic_algorithms_enabled()}
        alike = {"device": device.partition(":")[0], **software(), **{n: str(v) for n, v in options.items()}}
        own = {"host": host, "alike": alike, "machine": environment()}
        word, found = meeting.meet(store, rank, size, own)
    except (dist.DistError, TimeoutError) as error:
        where, late = f"{told['MASTER_ADDR']}:{told['MASTER_PORT']}", isinstance(error, TimeoutError)
        why = f"within {meeting.JOIN.seconds // 60} minutes" if late else f"({str(error).partition(chr(10))[0]})"
        raise UserError(f"the {size} ranks have not met at {where} {why}; {again}") from error
    if why := meeting.apart([{"host": of["host"], **of["alike"]} for of in found]):
        if rank:
            store.set(f"{word} {rank} knows", "")
            meeting.outwait()
            raise SystemExit(2)
        with suppress(dist.DistError):  # the store may end with this process
            store.wait([f"{word} {r} knows" for r in range(1, size)], timedelta(seconds=meeting.PATIENCE))
        raise UserError(why)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        store = dist.PrefixStore(word, store)
        dist.init_process_group(backend, timeout=meeting.JOIN, store=store, rank=rank, world_size=size)
    except RuntimeError as error:
        why = f"rank {rank} on {host} cannot reach the others ({str(error).partition(chr(10))[0]})"
        raise UserError(f"{why}; name a network that joins them in GLOO_SOCKET_IFNAME, {again}") from error
    store.set_timeout(WAIT)
    getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)(WAIT)  # public in torch 2.14
    machines = {json.dumps(of["machine"], sort_keys=True): of["machine"] for of in found}
    return Ranks(rank, size, device, sync, tuple(machines.values()))


@contextmanager
def joined(device: str, sync: bool, **options: Any) -> Iterator[Ranks]:
    """Within the block this process is one of the ranks that torchrun started, or :data:`ONE_PROCESS`.

    Args:
        device: "cpu", or "cuda", where each rank of a machine has a device of its own.
        sync: see :class:`Ranks`.
        options: of the command that do not go with ranks, name -> value, as far as they were given.

    Raises:
        UserError: such options, too few devices, or ranks that do not meet; on every rank, so that
            :func:`fa.train.meeting.hushed` is asked who says it. On rank 0 alone: ranks that differ in software, kind
            of device or options.
    """
    told = os.environ
    if not meeting.called():
        yield ONE_PROCESS
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not told.get(name, "0").isdecimal():
            raise UserError(f"{name}={told[name]!r} is no number, as torchrun would set it; call torchrun, or unset it")
    rank, size = int(told["RANK"]), int(told["WORLD_SIZE"])
    if rank >= size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}; call torchrun, which sets both, or unset them")
    local, here = int(told.get("LOCAL_RANK", rank)), int(told.get("LOCAL_WORLD_SIZE", size))
    options |= {"device": device} if ":" in device else {}
    if wrong := [f"--{name} {value}" for name, value in options.items()]:
        raise UserError(f"ranks train one run at a time, each on its own device; leave {wrong[0]} out, or torchrun")
    if device == "cuda" and here > (found := torch.cuda.device_count()):
        need = f"{here} ranks need {here} CUDA devices, and there are {found}"
        raise UserError(f"{need}; give torchrun --nproc-per-node {found}")
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    try:
        ranks = _join(rank, size, device, sync)
        yield ranks
        ranks.lead(None)
    except (RuntimeError, KeyboardInterrupt) as error:
        if rank and (lost(error) or isinstance(error, KeyboardInterrupt)):
            raise SystemExit(1) from None  # rank 0, or torchrun, says it
        if lost(error):
            raise UserError(f"a rank is gone ({str(error).partition(chr(10))[0]}); call again to go on") from error
        raise
    leave()
