"""Learning curves and alignment by layer while a page trains: one figure in the notebook, updated in place; and how a
notebook gets a picture with its alternative text."""

from __future__ import annotations

import sys
import time
from base64 import b64encode
from collections.abc import Iterable
from html import escape
from io import BytesIO
from typing import Any

from fa import plot
from fa.results.store import RunFolder
from fa.train.loop import progress_lines

PERIOD = 0.5  # seconds between two updates, at least
SHARE = 0.1  # of the time, at most, is spent on drawing, for a single run is trained in the same process


def watched() -> bool:
    """Whether somebody looks at the notebook. A cell that papermill, nbval or nbconvert runs cannot ask for input."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


class Picture:
    """A PNG for a notebook, with an alternative text for whoever cannot see it.

    JupyterLab drops the alternative text of a picture and keeps HTML's. Where somebody looks, the notebook gets both
    forms. A notebook that papermill or nbconvert runs gets the picture alone, which every tool reads.

    Args:
        png: the file's content.
        width: of the picture, in pixels of the page.
        alt: the alternative text.
    """

    def __init__(self, png: bytes, width: int, alt: str) -> None:
        self.png, self.width, self.alt = png, width, alt

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        data = {"image/png": b64encode(self.png).decode()}
        if watched():
            source = f"data:image/png;base64,{data['image/png']}"
            data["text/html"] = f'<img width="{self.width}" alt="{escape(self.alt)}" src="{source}">'
        return data, {"image/png": {"width": self.width, "alt": self.alt}}


class Live:
    """The figure: test accuracy by epoch, and the angle between W and its feedback by layer; a line a run.

    Args:
        folders: of the runs that are trained. The figure reads their ``progress.csv``.
    """

    def __init__(self, folders: Iterable[RunFolder]) -> None:
        from IPython.display import display

        self.folders, self.drawn, self.next = list(folders), 0, 0.0
        self.handle = display(self._picture([]), display_id=True)

    def update(self, last: bool = False) -> None:
        """Draw the runs anew if they have moved and the last drawing is long enough ago.

        Args:
            last: whatever the time; so that the final state stays (default False).
        """
        begin = time.monotonic()
        if begin < self.next and not last:
            return
        runs = [(folder.config.rule, progress_lines(folder.path)) for folder in self.folders]
        if (lines := sum(len(run) for _, run in runs)) == self.drawn:
            return
        self.handle.update(self._picture(runs))
        now = time.monotonic()
        self.drawn, self.next = lines, now + max(PERIOD, (now - begin) / SHARE)

    def _picture(self, runs: list[tuple[str, list[dict[str, Any]]]]) -> Picture:
        """The figure as PNG; ``runs`` are (rule, lines of its ``progress.csv``)."""
        from matplotlib.figure import Figure  # without pyplot, whose state belongs to the thread of the cell

        figure = Figure(figsize=(7.2, 2.2), dpi=200, layout="constrained")
        curves, layers = figure.subplots(1, 2)
        curves.set(xlabel="epoch", ylabel="test accuracy (%)")
        layers.set(xlabel="layer, from the input", ylabel="angle to W (degrees)", ylim=(-3, 100), yticks=(0, 45, 90))
        known = {}
        for rule, lines in sorted(runs, key=lambda run: plot.in_order([r for r, _ in runs]).index(run[0])):
            look = plot.look(rule)
            at = [line["epoch"] for line in lines if line["test_accuracy"]]
            test = [float(line["test_accuracy"]) for line in lines if line["test_accuracy"]]
            dot = "." if len(at) == 1 else ""  # a line needs two points
            (known[look.label],) = curves.plot(at, test, color=look.color, lw=1, marker=dot)
            angles = next((line["angles"].split() for line in reversed(lines) if line["angles"]), [])
            layers.plot(range(1, len(angles) + 1), list(map(float, angles)), color=look.color, lw=1, marker=".")
        for ax in (curves, layers):  # epochs and layers are whole, be there one of them or none yet
            low, high = ax.get_xlim()
            ax.set_xlim(min(low, 0.5), max(high, 1.5))
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.legend(known.values(), known.keys(), loc="outside right center", frameon=False)
        figure.savefig(png := BytesIO(), format="png")
        return Picture(png.getvalue(), 720, "While training: test accuracy by epoch, angle to W by layer")
