"""A plan before anything is spent: steps, hours on one device and on several, and memory of runs, each with its spread
(:mod:`fa.results.costs` says where it is known from)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fa.errors import UserError
from fa.provenance import environment
from fa.results import runs
from fa.results.costs import Recorded, kind, measure_all, steps
from fa.results.executors import pick_device, pick_workers
from fa.results.progress import clock
from fa.tables import plural
from fa.train import stack
from fa.train.config import Config, parse_options
from fa.train.timing import Cost, Spread, plus, quartiles, times

NAMING = ("dataset", "model", "hidden", "batch", "precision", "optimizer", "measure", "part")
"""Fields that tell kinds of runs apart in a table."""


@dataclass
class Forecast:
    """What some runs cost on several equal devices.

    Args:
        todo: the runs, in the order in which they are begun.
        costs: kind of run -> cost, or why it is not known.
        devices: number of devices; on the CPU of processes.
        stacked: whether runs of one recipe are trained as one, as on a GPU.
    """

    todo: Sequence[Any]
    costs: dict[Any, Cost | str]
    devices: int = 1
    stacked: bool = False

    def cost(self, config: Any) -> Cost | str:
        """Of a run."""
        return self.costs[kind(asdict(config))]

    def seconds(self, config: Any) -> Spread | None:
        """Of a run, or None where it is not known."""
        cost = self.cost(config)
        return None if isinstance(cost, str) else cost.run[getattr(config, "epochs", 0)]

    @property
    def known(self) -> list[Any]:
        """The runs whose cost is known."""
        return [c for c in self.todo if self.seconds(c)]

    @property
    def device_seconds(self) -> Spread:
        """Of all known runs together."""
        return plus(*map(self.seconds, self.known))

    @property
    def jobs(self) -> list[Spread]:
        """Seconds of what is trained as one: a run, or on a GPU a stack."""
        groups = stack.groups(self.known, runs.STACK if self.stacked else 1)
        return [plus(*map(self.seconds, group)) for group in groups]

    @property
    def wall(self) -> Spread:
        """Seconds until the last device is through, each of which begins the next job when it is free."""
        ends, jobs = [], self.jobs
        for column in zip(*jobs):
            free = [0.0] * min(self.devices, len(jobs))
            for job in column:
                free[free.index(min(free))] += job
            ends.append(max(free))
        return tuple(ends) if ends else (0.0, 0.0, 0.0)

    @property
    def memory(self) -> int:
        """Bytes of the largest process (0: not known)."""
        return max((cost.memory for cost in map(self.cost, self.known)), default=0)


def forecasts(
    planned: dict[str, list[Any]], device: str = "here", devices: int = 1, measuring: bool = False
) -> tuple[dict[str, Forecast], str]:
    """The forecast of several experiments.

    Args:
        planned: experiment -> its runs to train; those whose weights or tables they need, and that are missing, are
            added.
        device: "here": this machine, measured; else a part of a device's name in the records.
        devices: number of equal devices; on the CPU of processes.
        measuring: measure here what the records do not know, if this machine has that name (default False).

    Returns:
        Experiment -> forecast, and what the device is, in words.

    Raises:
        UserError: no device of that name is known; or it is to be measured here, and this machine is another.
    """
    if devices < 1:
        raise UserError(f"devices={devices} is not a positive number")
    if not device:
        raise UserError("device is empty; give 'here', or a part of a name in the records, e.g. epyc")
    planned = {name: [*_needed(todo), *todo] for name, todo in planned.items()}
    alike: dict[Any, list[Any]] = defaultdict(list)
    for config in (c for todo in planned.values() for c in todo):
        alike[kind(asdict(config))].append(config)
    mine = environment()["gpu"] or environment()["cpu"]
    if measuring and device != "here" and device.lower() not in mine.lower():
        raise UserError(f"this machine is no {device!r} but {mine}; leave --measure out, or take --device here")
    here, torch_device = device == "here", pick_device("auto")
    try:
        recorded: Recorded | None = Recorded(mine if here else device)
    except UserError:
        if not (here or measuring):
            raise
        recorded = None
    costs: dict[Any, Cost | str] = {}
    for of, same in alike.items():
        if here and isinstance(same[0], Config):
            continue
        costs[of] = recorded.cost(same) if recorded else f"no record has such runs from {mine}"
    open_ = [of for of in alike if isinstance(alike[of][0], Config) and isinstance(costs.get(of, ""), str)]
    if open_ and (here or measuring):
        cores = 1 if torch_device != "cpu" else pick_workers("auto")
        costs |= zip(open_, measure_all([alike[of] for of in open_], torch_device, min(devices, cores)))
    gpu = bool(environment()["gpu"]) if here or measuring else recorded.gpu
    told = mine if here or measuring else recorded.machines
    return {name: Forecast(todo, costs, devices, gpu) for name, todo in planned.items()}, told


def _needed(todo: Sequence[Any]) -> list[Any]:
    own = {c.run for c in todo}
    needed = {c.run: c for config in todo for c in getattr(config, "needs", ()) if c.run not in own}
    return runs.missing(list(needed.values()))


# ------------------------------------------------------------------------------------------------------------- in words


def table(forecast: Forecast) -> str:
    """A forecast in lines: a line for every kind of runs, what all of them take, and what is not known."""
    alike: dict[Any, list[Any]] = defaultdict(list)
    for config in forecast.known:  # of those that make their tables themselves hardly two are alike
        alike[kind(asdict(config)) if steps(config) else config.rule, getattr(config, "epochs", 0)].append(config)
    names = _names([kind(asdict(same[0])) for same in alike.values() if steps(same[0])])
    lines = []
    for same in alike.values():
        cost, took = forecast.cost(same[0]), quartiles([forecast.seconds(c)[1] for c in same])
        if steps(same[0]):
            took = forecast.seconds(same[0])
            step = f"{steps(same[0]):,} steps of {spread(times(1000, cost.step), _short)} ms"
        name, step = (next(names), step) if steps(same[0]) else (same[0].rule, "no steps")
        memory = f"{cost.memory / 1e9:.2f} GB" if cost.memory else ""
        lines.append((name, plural(len(same), "run"), step, f"{spread(took, _time)} a run", memory, cost.source))
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths) if w).rstrip() for line in lines]
    return "\n".join([*text, *totals(forecast), *unknown(forecast)])


def totals(forecast: Forecast) -> list[str]:
    """What all runs take of which that is known, in two lines; none where there is no such run."""
    if not (known := forecast.known):
        return []
    hours, wall = in_words(forecast)
    longest = max(forecast.jobs, key=lambda job: job[1])
    what = "longest stack" if forecast.stacked else "longest run"
    devices = "1 device" if forecast.devices == 1 else f"{forecast.devices} devices"
    return [
        f"  {plural(len(known), 'run')}: {hours} device-hours; the {what} {spread(longest, _time)}",
        f"  on {devices}: {wall}" + _memory(forecast),
    ]


def in_words(forecast: Forecast) -> tuple[str, str]:
    """Device-hours of the known runs, and the time until the last device is through."""
    return spread(times(1 / 3600, forecast.device_seconds), _short), spread(forecast.wall, _time)


def unknown(forecast: Forecast) -> list[str]:
    """The runs whose cost is not known, a line for every reason."""
    why: dict[str, dict[Any, int]] = defaultdict(Counter)
    for config in forecast.todo:
        if isinstance(cost := forecast.cost(config), str):
            why[cost][kind(asdict(config))] += 1
    found = []
    for reason, kinds in why.items():
        names = list(dict.fromkeys(_names(list(kinds))))
        more = f" and {len(names) - 6} more kinds" if len(names) > 6 else ""
        found.append(f"  not known: {plural(sum(kinds.values()), 'run')} ({', '.join(names[:6])}{more}), for {reason}")
    return found


def _memory(forecast: Forecast) -> str:
    if not forecast.memory:
        return "; memory is not known from records"
    whole = f", {forecast.devices * forecast.memory / 1e9:.1f} GB for all" if forecast.devices > 1 else ""
    return f"; {forecast.memory / 1e9:.2f} GB of memory at the peak of the largest{whole}, each measured once"


def _names(kinds: Sequence[Any]) -> Iterator[str]:
    """Each kind in words: its rule, and what not all kinds have in common."""
    seen: dict[str, set[Any]] = defaultdict(set)
    for of in kinds:
        for name, value in of:
            seen[name].add(value)
    for of in map(dict, kinds):
        words = [str(of["rule"])]
        for name, value in of.items():
            if name == "options":  # of a run that makes its table itself, as its recipe writes them
                told = value if isinstance(value, tuple) else parse_options(value).items()
                words += [f"{n}={str(v).lower()}" for n, v in told if v != "a number"]
            elif name in NAMING and len(seen[name]) > 1 and value not in ("", None, False):
                words.append(f"{name}={value}" if isinstance(value, (bool, int)) else str(value))
        yield " ".join(words)


def spread(values: Spread, text: Callable[[float], str]) -> str:
    """ "2.44 [2.1, 3.02]"; a single value has no brackets."""
    low, middle, high = map(text, values)
    return middle if values[0] == values[2] else f"{middle} [{low}, {high}]"


def _time(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else clock(seconds)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def report(
    mode: str,
    planned: dict[str, list[Any]],
    todo: dict[str, list[Any]],
    device: str = "here",
    devices: int = 1,
    measuring: bool = False,
) -> str:
    """What ``fa plan`` prints.

    Args:
        mode: of the plans, in words.
        planned: experiment -> its runs.
        todo: experiment -> those that are to be trained.
        device, devices, measuring: see :func:`forecasts`.
    """
    found, told = forecasts(todo, device, devices, measuring)
    gpu = any(forecast.stacked for forecast in found.values())
    unit = "" if gpu else ", a device is a process with one thread"
    lines = [f"on {told}{unit}; median [quartiles]"]
    for name, forecast in found.items():
        n, total = len(forecast.todo), sum(map(steps, forecast.todo))
        extra = n - len(todo[name])
        needs = f", with {extra} that they need" if extra else ""
        of = len({c.run for c in planned[name]})
        lines.append(f"{name}, mode {mode}: {n} runs to train of {of}{needs}; {total:,} steps")
        lines += [table(forecast)] if forecast.todo else []
    every = {c.run: c for forecast in found.values() for c in forecast.todo}
    if len(found) > 1 and every:
        costs = next(iter(found.values())).costs
        whole = Forecast(list(every.values()), costs, devices, gpu)
        lines += [
            f"all: {plural(len(every), 'run')}, {plural(len(whole.known), 'run')} of which are known",
            *totals(whole),
        ]
    return "\n".join(lines)
