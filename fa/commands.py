"""The words of the command line: its commands and their options."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fa import __version__
from fa.errors import UserError, did_you_mean, unknown

PROG = "python -m fa"
"""How the command is called."""


def launched() -> tuple[str, int]:
    """The words before a command's own, to call this process again, and on how many machines they are to be called:
    :data:`PROG`, or torchrun's with its numbers of machines and of ranks, which meet at the first machine's address."""
    told = {n: os.environ.get(n, "") for n in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    local, size = (int(text) if text.isdecimal() else 0 for text in (told["LOCAL_WORLD_SIZE"], told["WORLD_SIZE"]))
    if not (all(told.values()) and local and size):
        return PROG, 1
    nodes = max(size // local, 1)
    place = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint {told['MASTER_ADDR']}:29400"
    return f"torchrun {place if nodes > 1 else '--standalone'} --nproc-per-node {local} -m fa", nodes


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{'' if message.endswith('?') else ';'} see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        file = file or sys.stderr
        file.write(message)  # argparse's own drops the error of an output that is full
        file.flush()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = f"value of {action.option_strings[0]}" if action.option_strings else action.dest
            raise argparse.ArgumentError(None, str(unknown(what, value, action.choices)))


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; those that :func:`parser` says.

    Raises:
        UserError: an unknown command or option, or a value that an option does not take.
    """
    found, rest = parser().parse_known_args(arguments)
    if rest:
        options = [text for action in found.parser._actions for text in action.option_strings]
        hints = [did_you_mean(word.partition("=")[0], options) for word in rest if word.startswith("-")]
        found.parser.error(f"unrecognized arguments: {' '.join(rest)}{next(filter(None, hints), '')}")
    return found


def _count(text: str) -> int:
    """A whole number from 0 up."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it returns has the ``command``, its options and its own ``parser``."""
    whole = _Parser(
        prog=PROG, allow_abbrev=False, description="Learning without weight transport: train, draw, report."
    )
    whole.add_argument("--version", action="version", version=f"fa {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(parser=sub)
        return sub

    command("list", "experiments, their notebooks, and which runs are finished")

    run = command("run", "train the missing runs of experiments; stopped or killed, it goes on when called again")
    run.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="names of figures, as fa list prints them")
    _grid(run)
    run.add_argument(
        "--budget", default="", help="stop by itself after this time, e.g. 9m or 2h10m (default: no bound)"
    )
    run.add_argument("--workers", default="auto", help="processes (default: auto, one for each core)")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    _executor(run)
    run.add_argument("--add", action="store_true", help="train only what neither the run store nor data/records holds")
    run.add_argument(
        "--together",
        type=_count,
        default=0,
        help="on CUDA: runs that a process trains at once (default: 15; on the CPU always 1)",
    )
    run.add_argument(
        "--compile", choices=("auto", "yes", "no"), default="auto", help="torch.compile (auto: on CUDA, if it can)"
    )
    run.add_argument("--deterministic", action="store_true", help="on CUDA: slower, the same numbers each time")
    run.add_argument("--sync-batch-norm", action="store_true", help="under torchrun: statistics of the whole batch")
    run.add_argument("--storage", default="", help="of a search: a URL that Optuna knows (default: in the run store)")
    run.add_argument("--dry-run", action="store_true", help="say what would be trained and for how long, and stop")

    plan = command("plan", "say what runs would cost, from the committed records or from steps that are measured here")
    plan.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="names of figures, as fa list prints them")
    _grid(plan)
    plan.add_argument(
        "--device", default="here", help="here: measured on this machine; or a part of a name in the records, e.g. epyc"
    )
    plan.add_argument("--devices", type=_count, default=1, help="equal ones; on the CPU processes (default: 1)")
    plan.add_argument("--measure", action="store_true", help="measure here what the records do not know of --device")
    plan.add_argument("--all", action="store_true", help="of all runs, the finished ones too")
    plan.add_argument("--add", action="store_true", help="of those that neither the run store nor data/records holds")

    collect = command("collect", "merge finished runs into the record data/records/EXPERIMENT.csv")
    collect.add_argument(
        "experiments", nargs="+", metavar="EXPERIMENT", help="names of figures, as fa list prints them"
    )
    _grid(collect)
    collect.add_argument("--partial", action="store_true", help="although runs are missing; figures will say so")

    reproduce = command("reproduce", "run notebooks headless through papermill; outputs under build/")
    reproduce.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="name or its beginning, e.g. 32 (default: all)"
    )
    reproduce.add_argument("--mode", default="quick", help="quick, record, small or paper (default: quick)")
    reproduce.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="set a parameter"
    )
    reproduce.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="run once for each value; several: for each combination",
    )
    reproduce.add_argument("--add", action="store_true", help="in paper mode: train only what data/records lacks too")
    reproduce.add_argument("--jobs", type=_count, default=2, help="notebooks at a time (default: 2; elsewhere all)")
    _executor(reproduce)

    command("report", "judge every claim and write REPORT.md and the tables of README.md")

    data = command("data", "say which data sets are here, or download one")
    data.add_argument("download", nargs="*", metavar="NAME", help="data sets to download")

    cite = command("cite", "how to cite a figure: caption, references, data, code, machine")
    cite.add_argument("figure", metavar="FIGURE", help="a name in figures/, e.g. p3_fig2")
    cite.add_argument("--format", default="text", help="text, markdown, latex or bibtex (default: text)")

    figure = command("figure", "draw a figure again from its record, in another width or format")
    figure.add_argument("figure", metavar="FIGURE", help="a name in figures/, e.g. p3_fig2")
    figure.add_argument(
        "--width", type=float, default=0, help="inches; 3.5 is a column, 7.2 a page (default: the figure's own)"
    )
    figure.add_argument("--format", default="pdf,svg,png", help="of pdf, svg, png (default: all three)")
    return whole


def _executor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--executor", default="local", help="local, dask://HOST:PORT, or slurm:NAME=VALUE,... (default: local)"
    )


def _grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", default="paper", help="paper, small or quick (default: paper)")
    parser.add_argument("--seeds", type=_count, default=0, help="number of seeds (default: the mode's own)")
    parser.add_argument("--epochs", type=_count, default=0, help="number of epochs (default: the mode's own)")
    parser.add_argument("--rules", default="", help="comma separated (default: the figure's)")
    parser.add_argument("--dataset", default="", help="default: the mode's own")
