"""Sliders over p2's coefficients, and a picture of where the feedback then ends, for notebook 21."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fa import plot
from fa.experiments._estimation import coefficients, end
from fa.experiments._framework import coloured
from fa.layers.feedback import generator
from fa.metrics import angle
from fa.rules import rule as make_rule


def explore(seed: int = 0) -> Any:
    """Sliders over the five coefficients, and where the feedback of a layer then ends: a widget for a notebook.

    The picture is of theory (:func:`fa.experiments._estimation.end`), which the page holds against the rules' code.
    Without a live kernel the picture stays as it is.
    """
    import ipywidgets as widgets

    gen = generator(seed, "explore")
    W = torch.randn(8, 12, generator=gen, dtype=torch.float64) / 12**0.5
    x = coloured(4096, 12, gen)
    redraw = Picture(W, x.T @ x / len(x))
    sliders = {
        name: widgets.FloatSlider(value=0, min=0, max=2, step=0.05, description=name, readout_format=".2f")
        for name in coefficients(make_rule("ia"))
    }
    known = {"WM": "wm", "IA": "ia", "SA": "sa", "AA": "aa"}
    choice = widgets.ToggleButtons(options=list(known), description="start from")
    image = widgets.HTML()  # of which the picture has an alternative text; that of an Image widget has none
    alt = "Entries of the feedback where it ends, against those of W; relaxation rates of its modes, slowest first"

    def show(*_: Any) -> None:
        png = b64encode(redraw({name: slider.value for name, slider in sliders.items()})).decode()
        image.value = f'<img width="540" alt="{alt}" src="data:image/png;base64,{png}">'

    def preset(*_: Any) -> None:
        for name, value in coefficients(make_rule(known[choice.value])).items():
            sliders[name].value = 1000 * value

    for slider in sliders.values():
        slider.observe(show, "value")
    choice.observe(preset, "value")
    preset()
    return widgets.VBox([choice, widgets.HBox([widgets.VBox(list(sliders.values())), image])])


class Picture:
    """Where the feedback of one layer ends for given coefficients.

    The axes are drawn once; a redraw restores them and adds the points, which takes a few milliseconds.

    Args:
        W: forward weight (out, in).
        S: second moment of the input (in, in).
    """

    @plot.style()
    def __init__(self, W: Tensor, S: Tensor) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.W, self.S = W, S
        figure = Figure(figsize=(4.2, 2.1), dpi=130, layout="constrained")
        self.canvas = FigureCanvasAgg(figure)
        self.ends, self.speeds = figure.subplots(1, 2)
        reach, color = 1.3 * W.abs().max().item(), plot.look("primitives").color
        self.ends.plot((-reach, reach), (-reach, reach), color="0.8", lw=0.8, zorder=0)
        self.ends.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="entries of W", ylabel="of B at its end")
        self.speeds.set(xlabel="modes, slowest first", ylabel="relaxation rate", xlim=(0, W.numel()), ylim=(0, 14))
        (self.points,) = self.ends.plot([], [], ".", color=color, ms=3, animated=True)
        (self.rates,) = self.speeds.plot([], [], color=color, animated=True)
        self.words = self.ends.set_title(" ", animated=True)
        self.canvas.draw()
        self.empty = self.canvas.copy_from_bbox(figure.bbox)

    @plot.style()
    def __call__(self, c: dict[str, float]) -> bytes:
        """PNG of the picture for these coefficients."""
        from PIL import Image

        goal = end(c, self.W, self.S)
        B, rates = goal.B, goal.rates.flatten().sort().values  # (out, in), (out * in,)
        words = "B has no end: nothing holds some of its modes"
        if rates[0] > 1e-9:
            ratio = (torch.linalg.vector_norm(B) / torch.linalg.vector_norm(self.W)).item()
            words = f"{angle(self.W, B):.0f}° to W, norm ratio {ratio:.2f}" if ratio else "B goes to 0"
        self.points.set_data(self.W.flatten(), B.flatten())
        self.rates.set_data(range(len(rates)), rates)
        self.words.set_text(words)
        self.canvas.restore_region(self.empty)
        for ax, artist in ((self.ends, self.points), (self.speeds, self.rates), (self.ends, self.words)):
            ax.draw_artist(artist)
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).save(png := BytesIO(), "png", compress_level=1)
        return png.getvalue()
