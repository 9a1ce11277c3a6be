"""How far a campaign is, read from the run folders, and how long the rest will take."""

from __future__ import annotations

import math
import re
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fa.errors import UserError
from fa.paths import read_json, runs_root
from fa.results import live
from fa.results.executors import pick_device, pick_workers
from fa.results.store import RunFolder, run_seconds
from fa.tables import plural
from fa.train.loop import progress_lines


def clock(seconds: float) -> str:
    """ "1h02m", "3m05s", "7s"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


def seconds(text: str) -> float:
    """``"90"``, ``"90s"``, ``"9m"``, ``"1.5h"``, ``"2h10m"`` as seconds.

    Raises:
        UserError: anything else.
    """
    number = r"(\d+(?:\.\d+)?)"
    parts = re.fullmatch(rf"(?:{number}d)?(?:{number}h)?(?:{number}m)?(?:{number}s?)?", text, re.ASCII)
    value = sum(float(n or 0) * unit for n, unit in zip(parts.groups(), (86400, 3600, 60, 1))) if parts else 0.0
    if not 0 < value < math.inf:
        raise UserError(f"a time is written 2h10m, 90s, 9m or 1.5h, not {text!r}")
    return value


def in_words(config: Any) -> str:
    """A run in words: "pfa seed 0"."""
    return f"{config.rule} seed {config.seed}" if hasattr(config, "seed") else config.rule


class Progress(threading.Thread):
    """Shows how far a campaign is, from the run folders: a bar in a terminal or in a notebook that somebody looks at,
    there with a figure (:class:`fa.results.live.Live`), else a line every half minute and at the end. The file of a
    notebook that papermill runs would keep the bar as it was at 0 %.

    Args:
        folders: of the runs to train.
        planned: number of runs of the campaign, those that were finished before included.
        started: what to say at once besides.
    """

    def __init__(self, folders: Sequence[RunFolder], planned: int, started: str) -> None:
        super().__init__(daemon=True)
        self.over, self.begin, self.bar, self.latest = threading.Event(), time.monotonic(), None, ""
        self.epochs = {f: 0 for f in folders}  # of each run, those behind it
        self.total = sum(getattr(f.config, "epochs", 1) for f in folders)
        self.read()
        self.before, text = sum(self.epochs.values()), f"{len(folders)} of {planned} runs to train"
        if sys.stderr.isatty() or live.watched():
            try:
                from tqdm.auto import tqdm

                self.bar = tqdm(total=self.total, initial=self.before, desc=text, unit="epoch", dynamic_ncols=True)
                self.bar.set_postfix_str(started)
            except ImportError:
                pass
        trains = any(hasattr(f.config, "epochs") for f in folders)
        self.live = live.Live(self.epochs) if self.bar and trains and live.watched() else None
        if not self.bar:
            sys.stderr.write(", ".join(filter(None, (text, started))) + "\n")

    def read(self) -> None:
        """Bring the numbers of epochs up to date, and the latest line of those runs that moved."""
        for folder, epoch in self.epochs.items():
            total = getattr(folder.config, "epochs", 1)
            if epoch == total:
                continue
            finished = folder.finished
            for line in progress_lines(folder.path)[-1:]:
                if line["epoch"] > epoch:
                    self.epochs[folder] = line["epoch"]
                    test = f": {float(line['test_accuracy']):.2f} %" if line["test_accuracy"] else ""
                    self.latest = f"{in_words(folder.config)} epoch {line['epoch']}{test}"
            if finished:  # also a run that diverged, which has no further epochs
                self.epochs[folder] = total

    def run(self) -> None:
        """Look every second; write when there is something to show."""
        written = self.begin
        while not self.over.wait(1):
            self.read()
            if self.bar:
                self.write()
            elif time.monotonic() - written > 30:
                self.write()
                written = time.monotonic()

    def write(self) -> None:
        """Show the state."""
        epochs, spent = sum(self.epochs.values()), time.monotonic() - self.begin
        runs = sum(folder.finished for folder in self.epochs)
        if self.bar:
            self.bar.update(epochs - self.bar.n)
            if self.latest:
                self.bar.set_postfix_str(f"{runs}/{len(self.epochs)} runs, {self.latest}")
            if self.live:
                self.live.update(last=self.over.is_set())
            return
        fresh = epochs - self.before
        left = f", {clock(spent * (self.total - epochs) / fresh)} left" if fresh and epochs < self.total else ""
        sys.stderr.write(
            f"{runs}/{len(self.epochs)} runs, {epochs}/{self.total} epochs, {clock(spent)}{left}  {self.latest}\n"
        )

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()
        self.read()
        self.write()
        if self.bar:
            self.bar.close()


def forecast(todo: list[Any], budget: float | None = None, workers: str | int = "auto", device: str = "auto") -> str:
    """How long the missing runs will take, as those of the run store did on such a device, and in how many calls of
    ``budget`` seconds.

    An epoch counts as long as the median epoch of finished runs of its kind: same rule, network, data and precision.
    """
    device = pick_device(device)
    spent: dict[Any, list[float]] = defaultdict(list)
    for path in runs_root().glob("*/status.json"):
        status = read_json(path, state=str, seconds=(int, float), environment=dict)
        config = read_json(path.parent / "config.json", rule=str)
        same = bool(status["environment"].get("gpu")) == (device != "cpu") and "ranks" not in status
        if same and status["state"] == "finished":
            spent[_kind(config)].append(run_seconds(status) / config.get("epochs", 1))
    known = [c for c in todo if _kind(asdict(c)) in spent]
    total = sum(getattr(c, "epochs", 1) * statistics.median(spent[_kind(asdict(c))]) for c in known)
    total /= min(pick_workers(workers, device), max(len(todo), 1))
    if not todo:
        return "nothing is left to train"
    if not known:
        return "nothing like them has been trained here yet"
    text = f"about {clock(total)} by the finished runs of their kind"
    if len(known) < len(todo):
        return f"{text}, and {plural(len(todo) - len(known), 'run')} of a kind that has not been trained here yet"
    return f"{text}; {math.ceil(total / budget)} calls of {clock(budget)}" if budget else text


def _kind(config: dict[str, Any]) -> tuple[Any, ...]:
    """The settings on which the time of an epoch depends, roughly; sparse feedback costs more than dense."""
    options = config.get("options", "")
    names = ("rule", "model", "dataset", "hidden", "precision")
    return *(config.get(name) for name in names), "density" in options, "implicit" in options
