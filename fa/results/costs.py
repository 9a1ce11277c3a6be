"""What runs cost on a device, from one of two sources. Where neither knows a run, that is said.

*Records*: the seconds of the runs in ``data/records``, by kind of run and name of the machine. A record that was made
on machines of several names is left out, for it does not say which run was trained where. *A measurement*
(:mod:`fa.train.timing`): steps of the recipe itself, in as many processes at once as will train.

Seconds of a recorded run are wall time from the loading of its data to its last measurement, compilation included, and
those before a stop. On the CPU a run had a process and one thread, beside as many others as there were workers, and
whatever else kept the machine busy. Runs of a stack share its wall time evenly, so that their seconds add up to those
of the device.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from fa.errors import UserError
from fa.paths import runs_root, writing
from fa.results import records
from fa.results.executors import processes
from fa.results.store import run_seconds
from fa.train import data
from fa.train.config import Config, parse_options
from fa.train.step import can_compile
from fa.train.timing import Cost, measured, quartiles, times

UNNAMED = ("seed", "number")  # which of several equal runs
COUNTED = ("rule", "dataset", "model", "hidden", "batch", "precision", "optimizer", "augment", "measure")
"""Fields of a recipe on which the time of a step depends."""


def steps(config: Any) -> int:
    """Steps of a run; 0 of a run that makes its table itself."""
    return config.epochs * (data.SETS[config.dataset].train // config.batch) if isinstance(config, Config) else 0


def kind(recipe: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings on which the time of a step depends, from a run's fields; those that it lacks are at their defaults.

    Numbers among the options of a rule do not count, but for PFA's expansion, nor do seeds, rates and epochs. Runs that
    make their tables themselves are of one kind if they differ in nothing but the seed or number.
    """
    if "precision" not in recipe:
        return tuple(sorted((n, v) for n, v in recipe.items() if n not in UNNAMED))
    told = {f.name: recipe.get(f.name, f.default) for f in fields(Config)}
    options = {
        n: v if isinstance(v, (bool, str)) or n == "expansion" else "a number"
        for n, v in parse_options(told["options"]).items()
        if n != "init"
    }
    phases = bool(told["alternate"] or told["delay_epochs"])
    long = told["epochs"] > 100  # then accuracies are measured more seldom
    return (
        *((n, told[n]) for n in COUNTED),
        ("options", tuple(sorted(options.items()))),
        ("phases", phases),
        ("long", long),
    )


class Recorded:
    """The costs that the committed records know on machines of a name.

    Args:
        name: a part of the GPU's name, or where there is none of the CPU's, in any case.
        known: record's name -> sidecar (default: those of data/records).

    Raises:
        UserError: no record was made on such machines alone.
    """

    def __init__(self, name: str, known: dict[str, dict[str, Any]] | None = None) -> None:
        self.runs: dict[Any, list[tuple[float, int, str]]] = defaultdict(list)  # kind -> (seconds, epochs, record)
        self.unclear: dict[Any, set[str]] = defaultdict(set)  # kind -> records of several machines
        if known is None:
            known = {n: records.sidecar(n) for n in sorted(set(records.holders().values()))}
        found, others, gpus = set(), set(), set()
        for record, about in known.items():
            machines = {e.get("gpu") or e.get("cpu", "") for e in about["environments"]}
            gpus |= {e["gpu"] for e in about["environments"] if e.get("gpu")}
            fits = {m for m in machines if name.lower() in m.lower()}
            (found if fits and len(machines) == 1 else others).update(machines)
            for run, recipe in about["configs"].items():
                status = about["status"][run]
                if fits and len(machines) > 1:
                    self.unclear[kind(recipe)].add(record)
                elif fits and status["state"] == "finished" and "ranks" not in status:
                    self.runs[kind(recipe)].append((run_seconds(status), recipe.get("epochs", 0), record))
        if not found and not self.unclear:
            told = ", ".join(sorted(others - {""}))
            raise UserError(
                f"no record was made on a device named {name!r}; records know {told}; "
                "--device here measures on this machine"
            )
        self.gpu = any(name.lower() in gpu.lower() for gpu in gpus)
        self.name, self.machines = name, ", ".join(sorted(found)) or f"a device named {name!r}"

    def cost(self, same: Sequence[Any]) -> Cost | str:
        """Of runs of one kind: their cost, or why it is not known."""
        of = kind(asdict(same[0]))
        if not (there := self.runs.get(of)):
            if unclear := self.unclear.get(of):
                told = ", ".join(sorted(unclear))
                return f"{told} has such runs, but is of several machines, and does not say which run is of which"
            return f"no record has such runs from {self.name}"
        told = Counter(record for _, _, record in there)
        source = ", ".join(f"{n} {'run' if n == 1 else 'runs'} of {record}" for record, n in told.items())
        if not isinstance(same[0], Config):
            return Cost({getattr(c, "epochs", 0): quartiles([s for s, _, _ in there]) for c in same}, None, 0, source)
        lengths = sorted({epochs for _, epochs, _ in there})
        if any(c.epochs not in lengths for c in same):
            source += f" (of {' or '.join(map(str, lengths))} epochs)"
        per_epoch = steps(same[0]) // same[0].epochs
        step = quartiles([seconds / (epochs * per_epoch) for seconds, epochs, _ in there])
        return Cost({c.epochs: times(steps(c), step) for c in same}, step, 0, source)


def measure_all(kinds: Sequence[Sequence[Config]], device: str = "cpu", together: int = 1) -> list[Cost | str]:
    """The cost of each kind of runs, or why it is not known, measured ``together`` at a time, each in a process of its
    own as the runs of a campaign are."""
    compiled, found, store = device != "cpu" and can_compile(device), [], runs_root()
    with writing(store):
        store.mkdir(parents=True, exist_ok=True)
    with processes() as new:
        for i in range(0, len(kinds), together):
            some = list(kinds[i : i + together])
            busy = [some[j % len(some)] for j in range(together)]  # beside a core that idles the others are faster
            sys.stderr.write(f"measuring {i + 1} to {i + len(some)} of {len(kinds)} kinds of runs ...\n")
            workers = [new() for _ in busy]
            for ready in [worker.submit(quartiles, [0.0]) for worker in workers]:
                ready.result()  # all have imported what they need
            jobs = [
                worker.submit(measured, same[0], sorted({c.epochs for c in same}), store, device, compiled)
                for worker, same in zip(workers, busy)
            ]
            for job in jobs:
                try:
                    found.append(job.result())
                except UserError as error:
                    found.append(str(error))
            for worker in workers:
                worker.shutdown()
            del found[i + len(some) :]
    return found
