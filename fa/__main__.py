"""The command line, ``python -m fa``. ``python -m fa COMMAND --help`` explains each command."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fa.commands import PROG, launched, parsed
from fa.errors import UserError
from fa.paths import need_repository, runs_root
from fa.tables import plural

if TYPE_CHECKING:
    from fa.train.ddp import Ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where something failed on the way or another process holds a run,
    2 for bad input (one sentence on stderr)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    main_thread = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)} if main_thread else {}
    if main_thread:
        signal.signal(signal.SIGTERM, _terminated)
    _open_streams()
    try:
        args = parsed(arguments)
        need_repository()
        status = globals()[f"_{args.command}"](args)
        sys.stdout.flush()
        return status
    except UserError as e:
        if not _hushed():
            sys.stderr.write(f"fa: {e}\n")
        return 2
    except KeyboardInterrupt as e:
        if main_thread:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends already
        again = f"{launched()[0]} {shlex.join(arguments)}"
        sys.stderr.write(f"fa: stopped; what is finished and checkpointed is kept, go on with: {again}\n")
        return 143 if e.args == ("terminated",) else 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:  # a disk that is full, a device that is gone
        if not e.filename:  # the output itself, which would fail at the end again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = f"{e.filename or 'the output'} cannot be used ({e.strerror or e})"
        sys.stderr.write(f"fa: {what}; make room or give access, and call again\n")
        return 2
    finally:
        for number, answer in before.items():
            signal.signal(number, answer)


def _hushed() -> bool:
    if "RANK" not in os.environ:  # as without torchrun, where nothing is imported for it
        return False
    from fa.train import meeting

    return meeting.hushed()


def _open_streams() -> None:
    """Let a letter that the terminal's encoding lacks be escaped; what goes to a stream that is closed is lost."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _terminated(*_: object) -> None:
    """SIGTERM ends a command as Ctrl-C does."""
    raise KeyboardInterrupt("terminated")


def _planned(args: argparse.Namespace) -> dict[str, list]:
    from fa import experiments

    common = dict(seeds=args.seeds, epochs=args.epochs, rules=args.rules, dataset=args.dataset)
    planned = {name: experiments.plan(name, args.mode, **common) for name in args.experiments}
    for name in planned:
        if (e := experiments.find(name)).grid is None:
            draw = f"{PROG} reproduce {e.notebook.partition('_')[0]}"
            raise UserError(f"{name} is drawn from code: nothing is trained. Draw it with: {draw}")
    if empty := [name for name, whole in planned.items() if not whole]:
        raise UserError(f"{empty[0]} has no such runs, so that nothing is to be trained or collected; see {PROG} list")
    return planned


def _given(args: argparse.Namespace, *more: str) -> str:
    """The options of a grid that a caller set, and ``more``, to be repeated in the next command."""
    text = ""
    for name in ("mode", "seeds", "epochs", "rules", "dataset", *more):
        if (value := getattr(args, name)) != args.parser.get_default(name):
            text += f" --{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
    return text


def _list(args: argparse.Namespace) -> int:
    from fa.results import listing

    lines = listing.lines()
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    return 0


def _run(args: argparse.Namespace) -> int:
    begin = time.time()  # a budget holds for the imports too
    from fa.results import cluster, executors
    from fa.train import ddp, loop

    if args.storage:
        os.environ["FA_STORAGE"] = args.storage  # workers inherit it
    cluster.check(args.executor, args.device)
    device = executors.pick_device(args.device, args.executor == "local")  # a slip is found before all else
    executors.pick_workers(args.workers, device)
    if args.deterministic:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it; workers inherit it
        torch.use_deterministic_algorithms(True)
    executors.keep_pages()  # this process trains, or waits
    asked = {n: v for n in ("workers", "together", "executor") if (v := getattr(args, n)) != args.parser.get_default(n)}
    with ddp.joined(device, args.sync_batch_norm, **asked) as ranks:
        if ranks.rank == 0:
            return _lead(args, ranks, begin)
        loop.follow(ranks)
    return 0


def _lead(args: argparse.Namespace, ranks: Ranks, begin: float) -> int:
    from fa.results import cluster, progress, records, registered, runs
    from fa.train import data

    budget, here = progress.seconds(args.budget) if args.budget else None, args.executor == "local"
    planned = _planned(args)
    configs = list({c.run: c for whole in planned.values() for c in whole}.values())
    if args.add:
        held = records.holders()
        configs = [c for c in configs if c.run not in held]
    if args.dry_run:
        left = runs.missing(configs)
        print(f"{plural(len(configs), 'run')} planned, {len(configs) - len(left)} finished, {len(left)} to train")
        for c in left:
            print(f"  {c.run}  {progress.in_words(c)}" + (f", {c.epochs} epochs" if hasattr(c, "epochs") else ""))
        print(progress.forecast(left, budget, args.workers, args.device))
        return 0
    datasets = sorted({c.dataset for c in runs.missing(configs) if hasattr(c, "dataset")})
    for name in datasets if here else ():
        data.load(name)  # a data set that is missing or damaged is found before any process starts
    ranks.check_data(datasets)
    for name in planned if args.mode != "quick" else ():
        registered.note(records.name_of(name, args.mode))
    compiled = {"auto": None}.get(args.compile, args.compile == "yes")
    until = begin + budget if budget else math.inf
    with cluster.opened(args.executor, runs_root(), datasets, until) as executor:
        device = args.device
        if executor and device == "auto":
            device = executor.device
            sys.stderr.write(f"fa: the runs are trained on {device} ({executor.why})\n")
        if budget:
            budget = max(until - time.time(), 1e-6)
        how = dict(together=args.together, compiled=compiled, executor=executor, ranks=ranks)
        summary = runs.run(configs, budget, args.workers, device, **how)
    print(summary)
    for failure in summary.failed:
        sys.stderr.write(f"fa: failed: {failure}\n")
    names = " ".join(args.experiments)
    if summary.left:
        options = "budget workers device executor add together compile deterministic sync_batch_norm storage".split()
        own = _given(args, *options)
        again, machines = launched()
        where = f", on each of {machines} machines" if machines > 1 else ""
        print(f"next{where}: {again} run {names}{own}")
    else:
        part = any(records.lacking(name, args.mode, whole) for name, whole in planned.items())
        print(f"next: {PROG} collect {names}{_given(args)}{' --partial' if part else ''}")
    return 1 if summary.failed or summary.busy else 0


def _plan(args: argparse.Namespace) -> int:
    from fa.results import plan, records, runs

    planned, held = _planned(args), records.holders() if args.add else {}
    todo = {}
    for name, configs in planned.items():
        once = list({c.run: c for c in configs if c.run not in held}.values())
        todo[name] = once if args.all else runs.missing(once)
    print(plan.report(args.mode, planned, todo, args.device, args.devices, args.measure))
    return 0


def _collect(args: argparse.Namespace) -> int:
    from fa import experiments
    from fa.paths import told
    from fa.results import records
    from fa.results.table import FigureTable

    rules = experiments.split(args.rules)
    for name, configs in _planned(args).items():
        own = FigureTable(name, args.mode, args.seeds, args.epochs, rules, args.dataset).own_name
        held = len(records.holders())
        path, new = records.collect(name, args.mode, configs, args.partial, _given(args), own)
        anew = held + new - len(records.holders()) if path.parent == records.folder_of("paper") else 0
        place = f", {anew} of them in place of others of the same recipes" if anew else ""
        said = f"{told(path)}: {plural(new, 'new run')}{place}"
        print(said if new else f"nothing new: {told(path)} is unchanged")
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    from fa.results import batch, cluster, records

    def pairs(items: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, is_, value in (item.partition("=") for item in items):
            if not is_:
                raise UserError(f"a parameter is written NAME=VALUE, not {name!r}")
            if name in found:
                raise UserError(f"parameter {name!r} is given twice, as {found[name]!r} and {value!r}; give it once")
            found[name] = value
        return found

    grid = {name: values.split(",") for name, values in pairs(args.grid).items()}
    for name, values in grid.items():
        if twice := [v for v in values if values.count(v) > 1]:
            raise UserError(f"the grid of {name!r} has the value {twice[0]!r} twice; give it once")
    with cluster.opened(args.executor, records.build(args.mode) / "notebooks") as found:
        pool = cluster.Sharing(found.pool, found.terms) if found else None
        jobs = sys.maxsize if found and args.jobs == args.parser.get_default("jobs") else args.jobs
        return batch.reproduce(args.notebooks, args.mode, pairs(args.parameters), grid, jobs, add=args.add, pool=pool)


def _report(args: argparse.Namespace) -> int:
    from fa.paths import told
    from fa.results import report

    for path in report.write():
        print(told(path))
    return 0


def _data(args: argparse.Namespace) -> int:
    from fa.train import data

    for name in args.download:
        data.download(name)
    print(data.describe().to_string(index=False))
    return 0


def _cite(args: argparse.Namespace) -> int:
    from fa.results.cite import cite

    print(cite(args.figure, args.format))
    return 0


def _figure(args: argparse.Namespace) -> int:
    from fa.paths import told
    from fa.results.cite import draw

    for path in draw(args.figure, args.width, args.format.split(",")):
        print(told(path))
    return 0


if __name__ == "__main__":
    ended = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C has nothing left to stop
    sys.exit(ended)
