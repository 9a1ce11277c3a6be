"""Tables that a terminal prints as text and a notebook renders: a cell that ends in one shows it as HTML."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class Shown(str):
    """A text that has an HTML form, ``html``, for notebooks; in all else it is the text."""

    html: str

    def __new__(cls, text: str, html: str) -> Shown:
        shown = super().__new__(cls, text)
        shown.html = html
        return shown

    def _repr_html_(self) -> str:
        return self.html

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def shown(frame: pd.DataFrame, **form: Any) -> Shown:
    """A data frame as text and as an HTML table.

    Args:
        frame: the table.
        form: what ``DataFrame.to_string`` and ``DataFrame.to_html`` both take: ``index``, ``float_format``, ``na_rep``,
            ``formatters``.
    """
    import pandas as pd  # here, for who needs the words alone

    with pd.option_context("display.max_colwidth", None):  # else the HTML table cuts its texts
        html = frame.to_html(border=0, **form)
    html = re.sub(r"\n\s*(?=<t[dh]|</tr)", "", html)  # a row a line
    html = html.replace(" ± ", "&nbsp;±&nbsp;")  # a number and its sd stay on one line
    if not any(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes):
        left = 'style="text-align: left"'  # of heads, too: JupyterLab has a style for them, which a row's does not beat
        head, middle, body = html.replace("text-align: right", "text-align: left").rpartition("</thead>")
        html = head.replace("<th>", f"<th {left}>") + middle + body.replace("<td>", f"<td {left}>")
    return Shown(frame.to_string(**form), html)


def plural(n: int, noun: str) -> str:
    """``"1 run"``, ``"2 runs"``."""
    return f"{n} {noun}" + "s" * (n != 1)


def several(*parts: str) -> Shown:
    """Tables and lines of text one below the other, as one output."""
    html = [p.html if isinstance(p, Shown) else f"<p>{escape(p)}</p>" for p in parts if p]
    return Shown("\n".join(parts), "\n".join(html))
