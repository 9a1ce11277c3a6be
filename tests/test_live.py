"""The figure that a page draws while it trains: in place, not too often, to the end, and only where somebody looks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fa.results import live, progress
from fa.results.store import RunFolder
from fa.train import loop
from fa.train.config import Config


class Screen:
    """In the place of a notebook: what was displayed, and the updates of it."""

    def __init__(self) -> None:
        self.displayed: list[object] = []
        self.updates: list[object] = []

    def display(self, picture: object, display_id: bool) -> SimpleNamespace:
        assert display_id
        self.displayed.append(picture)
        return SimpleNamespace(update=self.updates.append)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr("IPython.display.display", screen.display)
    return screen


def folder(path: Path, rule: str, epochs: int) -> SimpleNamespace:
    """A run's folder with the progress of so many epochs."""
    lines = [f"{e},1.0,0.5,,,{80 + e},{90 - e}.00 45.00" for e in range(epochs)]
    path.mkdir(exist_ok=True)
    (path / "progress.csv").write_text("\n".join([",".join(loop.PROGRESS), *lines, ""]))
    return SimpleNamespace(path=path, config=SimpleNamespace(rule=rule))


def test_one_figure_is_updated_in_place_at_most_twice_a_second_and_ends_with_the_last_state(
    tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock.now)
    figure = live.Live([folder(tmp_path / "a", "pfa", 0), folder(tmp_path / "b", "bp", 0)])
    for epochs in range(1, 21):  # a step of the clock is 0.1 seconds
        folder(tmp_path / "a", "pfa", epochs)
        figure.update()
        clock.now += 0.1
    assert len(screen.displayed) == 1 and len(screen.updates) == 4
    clock.now += 1
    figure.update()
    assert len(screen.updates) == 5, "what was not drawn before"
    clock.now += 1
    figure.update()
    assert len(screen.updates) == 5, "nothing has moved"
    for path, epochs in ((tmp_path / "a", 21), (tmp_path / "a", 22)):
        folder(path, "pfa", epochs)
        figure.update(last=epochs == 22)
    drawn, figure.drawn = screen.updates[-1].png, 0
    figure.update(last=True)
    assert len(screen.displayed) == 1 and screen.updates[-1].png == drawn, "the last state is the one that stays"


def test_a_run_tells_its_angles_and_the_figure_shows_them(tmp_path: Path, screen: Screen) -> None:
    from matplotlib.figure import Figure

    drawn = []
    keep = lambda figure, *_, **__: drawn.append(figure)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        live.Live([folder(tmp_path / "a", "pfa", 3)]).update()
    curves, layers = drawn[-1].axes
    assert curves.lines[0].get_xydata().tolist() == [[0, 80], [1, 81], [2, 82]]
    assert layers.lines[0].get_xydata().tolist() == [[1, 88], [2, 45]], "the latest angles, layer by layer"


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_the_first_epochs_are_seen_and_whole(tmp_path: Path, epochs: int) -> None:
    run = folder(tmp_path / "a", "pfa", epochs + 1)
    lines = loop.progress_lines(run.path)[1:]  # the first is the untrained network's
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
        live.Live.__new__(live.Live)._picture([("pfa", lines)])
    for ax in figures[0].axes:
        low, high = ax.get_xlim()
        assert all(tick % 1 == 0 for tick in ax.get_xticks() if low <= tick <= high) and high - low >= 1
    assert (figures[0].axes[0].lines[0].get_marker() == ".") is (epochs == 1), "a line of one point shows nothing"


@pytest.mark.parametrize("asks, seen", [(True, True), (False, False), (None, False)])
def test_it_is_silent_where_nobody_looks(asks: bool | None, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: a terminal, which has no kernel."""
    kernel = {} if asks is None else {"kernel": SimpleNamespace(_allow_stdin=asks)}
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(**kernel)))
    assert live.watched() is seen


def test_a_notebook_that_nobody_looks_at_keeps_no_bar(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The file that papermill writes would hold it as it was at first, at 0 %."""
    kernel = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=False))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setattr(RunFolder, "finished", True)
    with progress.Progress([RunFolder(Config("bp", 0, epochs=3))], 1, ""):
        pass
    first, last = capsys.readouterr().err.splitlines()
    assert first == "1 of 1 runs to train" and last.startswith("1/1 runs, 3/3 epochs")


def test_a_picture_has_its_alternative_text_wherever_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """In HTML where somebody looks, for JupyterLab reads it nowhere else; in the metadata, which nbconvert reads."""
    monkeypatch.setattr(live, "watched", lambda: True)
    data, about = live.Picture(b"png", 720, 'W & "B"')._repr_mimebundle_()
    assert data["image/png"] == "cG5n" and about == {"image/png": {"width": 720, "alt": 'W & "B"'}}
    assert data["text/html"] == '<img width="720" alt="W &amp; &quot;B&quot;" src="data:image/png;base64,cG5n">'
    monkeypatch.setattr(live, "watched", lambda: False)
    assert list(live.Picture(b"png", 720, "W")._repr_mimebundle_()[0]) == ["image/png"]
