"""What a recipe costs on this machine: its steps timed, and every measurement that the trainer makes between them, so
that the forecast is about a whole run."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from fa.train import data, measure
from fa.train.config import Config, integers
from fa.train.loop import Run
from fa.train.step import WARM, Stepper, numerics

Spread = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""

LOOK = 8.0  # seconds that anything is timed for, and once at least
BLOCK = 0.2  # seconds of the steps that are timed as one: a busy machine stops a process for a part of that
BLOCKS = 25  # that are timed at most


@dataclass(frozen=True)
class Cost:
    """What runs of one kind cost on a device.

    Args:
        run: number of epochs -> seconds of a run (0 for a run that counts no epochs).
        step: seconds of a step; from records with a step's part in all that a run does besides (None: no steps).
        memory: bytes at the peak of a process, Python and torch included; on a GPU of the device (0: not known).
        source: where this is known from, in words.
    """

    run: dict[int, Spread]
    step: Spread | None
    memory: int
    source: str


def quartiles(values: Sequence[float]) -> Spread:
    """Lower quartile, median and upper quartile; of a single value that value three times."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def plus(*spreads: Spread) -> Spread:
    """Sums of the quartiles: as if all parts were slow together."""
    return tuple(map(sum, zip(*spreads))) if spreads else (0.0, 0.0, 0.0)


def times(n: float, spread: Spread) -> Spread:
    """``n`` times each."""
    return tuple(n * s for s in spread)


@dataclass(frozen=True)
class Part:
    """The first images of a split: so many batches of it."""

    split: data.Split | data.DiskSplit
    size: int
    n: int = 1

    def __len__(self) -> int:
        return min(self.n * self.size, len(self.split))

    def batches(self, size: int) -> Iterator[Any]:
        """The first batches, whatever ``size`` is asked for."""
        return islice(self.split.batches(self.size), self.n)


@dataclass
class Watch:
    """Seconds of what is done again and again, by name.

    Args:
        wait: called before and after, e.g. until a device is through.
    """

    wait: Callable[[], None]
    seen: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: float = 0.0

    def time(self, name: str, do: Callable[[], Any], n: int = 3, warm: int = 1, scale: float = 1.0) -> None:
        """Do it ``warm`` times, and ``n`` times more, each ``scale`` times as long as it took; at most for LOOK
        seconds, but once. What the first times take beyond the median of the others is counted once, as "first"."""
        until, first, took = time.monotonic() + LOOK, 0.0, []
        for i in range(warm + n):
            self.wait()
            begin = time.monotonic()
            do()
            self.wait()
            end = time.monotonic()
            if i >= warm or end > until:
                took.append(end - begin)
            else:
                first += end - begin
            if end > until:
                break
        self.seen[name] += [scale * t for t in took]
        if took and warm:
            self.first += max(first - warm * statistics.median(took), 0.0)

    def sum(self, counts: dict[str, int]) -> Spread:
        """Of so many of each."""
        return plus(*(times(n, quartiles(self.seen[name])) for name, n in counts.items() if n))


def parts(config: Config, sets: data.Data) -> Counter[str]:
    """How often a whole run does each of the parts that :func:`measured` times."""
    epochs = config.epochs
    counts = Counter(m for e in range(epochs + 1) for m in measure.splits_to_measure(sets, config, e))
    layers = len(measure.layer_epochs(epochs)) + len(integers(config.first_steps))
    counts.update({"start": 1, "first": 1, "epoch": epochs, "report": epochs, "layers": layers})
    counts.update({"step": epochs * (len(sets.train) // config.batch)})
    counts.update({"own first": 1, "own later": epochs - 1, "own last": 1} if config.measure else {})
    return counts


def measured(config: Config, lengths: Sequence[int], store: Path, device: str = "cpu", compiled: bool = False) -> Cost:
    """Time a recipe here, in this process: its steps, and all that :func:`fa.train.loop.train_runs` does besides, but
    for checkpoints, of which there are at most two a minute.

    Args:
        config: the recipe.
        lengths: numbers of epochs for which the cost of a run is wanted.
        store: a folder on the disk of the run store, where a file is written and removed.
        device: a torch device.
        compiled: through ``torch.compile`` (default False).

    Raises:
        UserError: the data set is not here.
    """
    begin, cuda = time.monotonic(), torch.device(device).type == "cuda"
    watch = Watch(torch.cuda.synchronize if cuda else lambda: None)
    with numerics(device):
        sets, run = data.load(config.dataset, device), Run(config)
        run.start(sets, device)
        watch.seen["start"].append(time.monotonic() - begin)
        stepper = Stepper(run.net, run.opt, config, sets.train, compiled, seeds=[config.seed])
        watch.time("epoch", lambda: stepper.begin(0), warm=0)
        at = 0

        def some(n: int) -> None:
            nonlocal at
            for _ in range(n):
                if at == stepper.per_epoch:
                    stepper.begin(at := 0)
                at, _ = at + 1, stepper.step()

        watch.time("one step", lambda: some(1), 5, warm=WARM + 1)  # on a GPU the last of the first ones is captured
        many = math.ceil(BLOCK / quartiles(watch.seen["one step"])[1])
        watch.time("step", lambda: some(many), BLOCKS, warm=0, scale=1 / many)
        for epoch in (0, config.epochs):
            for metric, split in measure.splits_to_measure(sets, config, epoch).items():
                part = Part(split, 5000 if cuda else 1000)
                whole = len(split) / len(part)
                if metric not in watch.seen:
                    watch.time(metric, lambda: measure.accuracies(run.net, part), scale=whole)
        watch.time("layers", lambda: measure.layer_rows(run.net, sets, 0))
        with TemporaryDirectory(prefix=".timing", dir=store) as place:  # the disk may be slow, and every epoch syncs
            run.rows, run.folder = measure.layer_rows(run.net, sets, 0), SimpleNamespace(path=Path(place))
            watch.time("report", run.report)
        for when, epoch in {"first": 0, "later": 1, "last": config.epochs}.items() if config.measure else ():
            own = measure.MEASURES[config.measure]
            watch.time(f"own {when}", lambda: own(config, run.net, epoch, sets), warm=0)

        watch.seen["first"] = [watch.first]
        found = {n: watch.sum(parts(replace(config, epochs=n), sets)) for n in lengths}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    memory = torch.cuda.max_memory_allocated() if cuda else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps_seen = many * len(watch.seen["step"])
    return Cost(found, quartiles(watch.seen["step"]), memory, f"{steps_seen} steps measured here")
