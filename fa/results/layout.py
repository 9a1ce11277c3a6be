"""A figure in another width: where its texts would meet, its panels stand in fewer columns. Fonts keep their size."""

from __future__ import annotations

import pickle
import textwrap
import warnings
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axis import Tick
    from matplotlib.figure import Figure
    from matplotlib.text import Text

HIGHEST = 9.5
"""Inches: the text of a page."""

LEAST, BROAD = 0.4, 1.6
"""A panel keeps this share of its own width and height; in columns of so many inches less of its width will do."""


class Panel(NamedTuple):
    """A panel as it is in the figure's own width."""

    ax: Any
    grid: Any
    box: Any  # its cell, in shares of the figure
    size: Any  # of its axes, inches
    covered: set[int]  # artists behind its legend


Block = list[Panel]
"""Panels that are laid out together, in reading order: those of one letter, or equal neighbours with a letter each."""


def fit(fig: Figure, width: float) -> tuple[Figure | None, set[str]]:
    """A copy of `fig` at `width` inches, in the most columns in which no text is worse off than in `fig`.

    Returns:
        the copy, or None, and in words what is worse in the figure's own columns.
    """
    before, kept = flaws(fig), pickle.dumps(fig)  # a layout changes texts and legends: each begins with a copy
    least = [np.minimum(LEAST * _size(ax), (BROAD - 0.5, HIGHEST)) for ax in fig.axes]  # 0.5: labels of the panel
    copy = _copied(kept)
    copy.set_size_inches(width, fig.get_figheight() * (width / fig.get_figwidth()) ** 0.5)
    worse = first = flaws(copy, least).keys() - before.keys()
    columns: list[int] = []
    while worse and all(ax.get_subplotspec() for ax in fig.axes):
        copy = _copied(kept)
        blocks = _blocks(copy)
        most = 2 * width / fig.get_figwidth()  # of the columns there are: in more, panels have half their width
        columns = columns or [max(1, min(k := _abreast(b), int(max(k * most, width / BROAD)))) for b in blocks]
        _arrange(copy, blocks, columns, width)
        found = flaws(copy, least)
        worse = found.keys() - before.keys()
        axes = {ax for words in worse for ax in found[words]}
        fewer = [k - (k > 1 and any(p.ax in axes for p in block)) for k, block in zip(columns, blocks)]
        if fewer == columns:
            break
        columns = [_shape(block, k)[1] for block, k in zip(blocks, fewer)]
    return (None if worse else copy), first


def flaws(fig: Figure, least: list | tuple = ()) -> dict[str, list[Any]]:
    """Which texts of a figure, as it is drawn, meet each other or are cut off, and which panels are below their `least`
    width and height: in words, and the panels of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the layout: panels without room are seen by their texts
        fig.draw_without_rendering()
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    axes = [(axis, axis.get_view_interval()) for axis in fig.findobj(Axis)]
    ticks = [(t, ends) for axis, ends in axes for t in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    unseen = {t.label1 for t, ends in ticks if not _within(t, *ends)}
    panels = {text: ax for ax in fig.axes for text in ax.findobj(Text)}
    texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in unseen]
    words = [repr(t.get_text().replace("\n", " ")) for t in texts]
    extents = [t.get_window_extent() for t in texts]  # with room above and below the letters, and a pixel at the sides
    boxes = [(panels.get(t), w, b.padded(-1, -0.1 * b.height)) for t, w, b in zip(texts, words, extents)]
    page = fig.bbox.padded(2)  # pixels
    small = {f"panel {_name(ax)!r} has no room": [ax] for ax, s in zip(fig.axes, least) if (_size(ax) < s).any()}
    cut = {f"{w} is cut off": [ax] for ax, w, b in boxes if not (page.contains(*b.min) and page.contains(*b.max))}
    pairs = ((p, q) for p, q in combinations(boxes, 2) if p[2].overlaps(q[2]))
    return small | cut | {f"{a} meets {b}": [p, q] for (p, a, _), (q, b, _) in pairs}


def _within(tick: Tick, low: float, high: float) -> bool:
    return min(low, high) <= tick.get_loc() <= max(low, high)


def _name(ax: Any) -> str:
    return ax.get_title("left") or ax.get_title() or ax.get_label()


def _size(ax: Any) -> Any:
    return np.array(ax.get_window_extent().size) / ax.get_figure().dpi


def _copied(kept: bytes) -> Figure:
    import matplotlib.pyplot as plt

    fig = pickle.loads(kept)
    plt.close(fig)  # it is no window of its own
    return fig


def _blocks(fig: Any) -> list[Block]:
    """The panels by letter, and in a row from the left; a panel without a letter belongs to the one before it."""
    fig.subplotpars.update(left=0, bottom=0, right=1, top=1, wspace=0, hspace=0)  # cells without the space between
    specs = [(ax, ax.get_subplotspec()) for ax in fig.axes]
    panels = [Panel(ax, s.get_gridspec(), s.get_position(fig), _size(ax), _covered(ax)) for ax, s in specs]
    groups: list[tuple[str, Block]] = []
    for p in sorted(panels, key=lambda p: (-round(p.box.y1, 3), p.box.x0)):
        letter, (last, group) = p.ax.get_title("left"), groups[-1] if groups else ("", [])
        if letter or not group or abs(p.box.y1 - group[-1].box.y1) > 1e-3:
            groups.append((letter or last, [p]))
        else:
            group.append(p)
    blocks: list[Block] = []
    for _, group in sorted(groups, key=lambda g: g[0]):
        p, before = group[0], blocks[-1] if blocks else []
        q = before[-1] if before else p
        alone = before and len(group) == 1 and all(r.ax.get_title("left") for r in [p, *before])
        if alone and p.grid is q.grid and (abs(p.box.y1 - q.box.y1) < 1e-3 or np.allclose(p.box.size, q.box.size)):
            before.append(p)
        else:
            blocks.append(list(group))
    return blocks


def _abreast(block: Block) -> int:
    """How many panels of a block stand in a row at most, in the figure's own width."""
    return max(np.unique([round(p.box.y1, 3) for p in block], return_counts=True)[1])


def _shape(block: Block, columns: int) -> tuple[int, int]:
    """Rows and columns of a block, at most `columns`, the rows as equally long as they can be."""
    rows = -(-len(block) // columns)
    return rows, -(-len(block) // rows)


def _arrange(fig: Any, blocks: list[Block], columns: list[int], width: float) -> None:
    """Put the panels of each block into so many columns; heights are such that panels keep about their own aspect."""
    own, tall = fig.get_size_inches()
    shapes = [_shape(block, k) for block, k in zip(blocks, columns)]
    heights = [rows * max(p.box.height for p in block) * tall for block, (rows, _) in zip(blocks, shapes)]
    outer, places, grids = fig.add_gridspec(len(blocks), 1), [], []
    for i, (block, (rows, k)) in enumerate(zip(blocks, shapes)):
        ratios = [p.box.width for p in block] if rows == 1 else None
        grids.append(outer[i].subgridspec(rows, k, width_ratios=ratios))
        for j, p in enumerate(block):
            row, column = divmod(j, k)
            alone = j == len(block) - 1 and column == 0 and p.ax.get_title("left")
            p.ax.set_subplotspec(grids[-1][row, column:] if alone else grids[-1][row, column])
            _show(p, block, [q for b in blocks for q in b if q.grid is p.grid], column == 0)
            places.append((p, i, row))
    for again in range(3):
        outer.set_height_ratios(heights)
        fig.set_size_inches(width, min(sum(heights), HIGHEST))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fig.draw_without_rendering()
        if again == 0:
            for legend in fig.legends:
                _narrow(legend, fig.bbox.width)
            for p, i, _ in places:
                _wrap(p.ax)
                _place_legend(p)
                if shapes[i][1] <= 2:
                    _stagger(p.ax)
        sizes = {p.ax: _size(p.ax) for p, *_ in places}
        for i, (rows, _) in enumerate(shapes):
            wanted, missing = [1.0] * rows, [-np.inf] * rows
            for p, _, row in (place for place in places if place[1] == i):
                height = p.size[1] * min(1, (sizes[p.ax][0] / p.size[0]) ** 0.5)
                wanted[row] = max(wanted[row], height)
                missing[row] = max(missing[row], height - sizes[p.ax][1])
            grids[i].set_height_ratios(wanted)
            heights[i] += sum(missing)


def _show(p: Panel, block: Block, mates: list[Panel], first: bool) -> None:
    """Show what `p` shared with its `mates`, the panels of its own grid: the labels of the row, for the `first` panel
    of a new one; labels and title of the column."""
    few = not all(q.ax.get_title("left") for q in block)  # panels of one letter
    left = [q for q in mates if abs(q.box.y1 - p.box.y1) < 1e-3 and q.box.x0 < p.box.x0 - 1e-3]
    column = [q for q in mates if abs(q.box.x0 - p.box.x0) < 1e-3 and q is not p]
    if first and left:
        p.ax.tick_params(labelleft=True)
        like = block[:1] if few else [q for q in left if q.ax.get_ylabel() and q.ax.get_ylim() == p.ax.get_ylim()]
        if like and not p.ax.get_ylabel():
            p.ax.set_ylabel(like[0].ax.get_ylabel())
    if not p.ax.xaxis.get_tick_params().get("labelbottom", True):
        p.ax.tick_params(labelbottom=True)
        p.ax.set_xlabel(next((q.ax.get_xlabel() for q in column if q.ax.get_xlabel()), ""))
    if few and not p.ax.get_title():
        for title in (q.ax.title for q in column if q.ax.get_title()):
            p.ax.set_title(title.get_text(), color=title.get_color(), fontweight=title.get_fontweight())


def _wrap(ax: Any) -> None:
    """Break labels and notes that are longer than their axes."""
    box, letter = ax.get_window_extent(), ax._left_title.get_window_extent()
    _break(ax.yaxis.label, ax.yaxis.label.get_window_extent().height, 1.1 * box.height)
    _break(ax.xaxis.label, ax.xaxis.label.get_window_extent().width, 1.1 * box.width)
    _break(ax._right_title, ax._right_title.get_window_extent().width, box.width - 1.5 * letter.width)


def _break(text: Text, length: float, room: float) -> None:
    """Put a text that is longer than its `room` into lines of about the same length."""
    words = " ".join(text.get_text().split())
    if length > room and "$" not in words:
        lines, most = int(np.ceil(length / room)), max(8, int(len(words) * room / length))
        broken = [textwrap.fill(words, letters) for letters in range(-(-len(words) // lines), most)]
        text.set_text(next((b for b in broken if b.count("\n") < lines), textwrap.fill(words, most)))


def _narrow(legend: Any, room: float) -> None:
    """Lay a legend out in the most columns that fit into `room` pixels, in its own order."""
    from matplotlib.offsetbox import VPacker

    columns = legend.get_children()[0].get_children()[1].get_children()  # set_ncols changes no legend that is there
    items, like = [item for column in columns for item in column.get_children()], columns[0]
    for n in range(len(items), 0, -1):
        parts = [list(part) for part in np.array_split(np.array(items, dtype=object), n)]
        columns[:] = [VPacker(pad=0, sep=like.sep, align=like.align, children=part) for part in parts]
        legend.set_figure(legend.get_figure())
        if legend.get_window_extent().width <= room:
            break


def _place_legend(p: Panel) -> None:
    """Keep a legend above its panel as long as it is broad at most; put one that hides more than it did below."""
    from matplotlib.transforms import ScaledTranslation

    if not (legend := p.ax.get_legend()):
        return
    fig, axes, box = p.ax.get_figure(), p.ax.get_window_extent(), legend.get_window_extent()
    if box.y0 >= axes.y1 - 1:
        if box.width > (room := axes.width - 1.5 * p.ax._left_title.get_window_extent().width):
            _narrow(legend, room)
    elif box.width > axes.width or box.height > axes.height or _covered(p.ax) - p.covered:
        _narrow(legend, axes.width)
        depth = (axes.y0 - min(axes.y0, p.ax.xaxis.get_tightbbox().y0)) / fig.dpi
        below = p.ax.transAxes + ScaledTranslation(0, -depth, fig.dpi_scale_trans)
        legend.set_loc("upper center")
        legend.set_bbox_to_anchor((0.5, 0), transform=below)


def _covered(ax: Any) -> set[int]:
    """Which lines, areas and markers of a panel lie behind its legend, by their number."""
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.path import Path

    found: set[int] = set()
    if not (legend := ax.get_legend()):
        return found
    box = legend.get_window_extent()
    artists: list[Any] = [*ax.lines, *ax.collections, *ax.patches]
    path: Any
    for i, artist in enumerate(artists):
        line, transform = isinstance(artist, Line2D), artist.get_transform()
        dots = line and artist.get_linestyle() == "None"
        paths = artist.get_paths() if isinstance(artist, Collection) else [artist.get_path()]
        if isinstance(artist, Collection) and len(np.asarray(artist.get_offsets())) > 1:  # a scatter
            dots, transform, paths = True, artist.get_offset_transform(), [Path(artist.get_offsets())]
        for path in (path.cleaned(transform, remove_nans=True) for path in paths):
            inside = box.count_contains(path.vertices[:-1]) > 0  # the last one is the end of the code, not a point
            if inside or (not dots and path.intersects_bbox(box, filled=not line)):
                found.add(i)
    return found


def _stagger(ax: Any) -> None:
    """Tick labels of x that meet stand in two lines by turns."""
    from matplotlib.transforms import ScaledTranslation

    fig = ax.get_figure()
    ticks = [t for t in ax.xaxis.get_major_ticks() if _within(t, *ax.get_xlim()) and t.label1.get_text()]
    boxes = [t.label1.get_window_extent() for t in ticks]
    if any(a.shrunk(0.95, 0.8).overlaps(b) for a, b in zip(boxes, boxes[1:])) and not ticks[0].label1.get_rotation():
        for tick, box in list(zip(ticks, boxes))[1::2]:
            lower = ScaledTranslation(0, -1.1 * box.height / fig.dpi, fig.dpi_scale_trans)
            tick.label1.set_transform(tick.label1.get_transform() + lower)
