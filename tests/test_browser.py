"""JupyterLab and the site in a real browser: ``make test-browser``.

Left out without playwright and a Chromium. JupyterLab serves copies of the notebooks, so that the repository's own stay
as they are; runs and figures go to a folder of the test.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fa

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of this machine; playwright drives it and brings none of its own."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[str]:
    """Address of a JupyterLab with the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "figures"):
        shutil.copytree(fa.ROOT / name, folder / name)
    for name, settings in (
        ("apputils-extension/notification", '{"fetchNews": "false", "checkForUpdates": false}'),
        ("notebook-extension/tracker", '{"windowingMode": "none"}'),  # cells out of sight are in the page, too
    ):
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(settings)
    own = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "FA_BUILD": "build"}
    own |= {"JUPYTER_CONFIG_DIR": "config", "IPYTHONDIR": "ipython", "FA_RUNS": "runs"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}"]
    env = os.environ | {name: str(folder / path) for name, path in own.items()} | {"PYTHONPATH": str(fa.ROOT)}
    with (folder / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api").close()
                    break
                except OSError:
                    assert server.poll() is None, (folder / "log").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/lab/tree/notebooks"
        finally:
            server.terminate()


@pytest.fixture
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A window. With $FA_SHOTS its last state is kept there as a picture."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, device_scale_factor=2)
    page = context.new_page()
    page.set_default_timeout(90_000)
    yield page
    if shots := os.environ.get("FA_SHOTS"):
        page.screenshot(path=Path(shots) / f"{request.node.name}.png")
    context.close()


def opened(page: Any, lab: str, notebook: str) -> Any:
    """The notebook, with a kernel that is ready; returns its cells."""
    page.goto(f"{lab}/{notebook}.ipynb?reset")
    page.locator(".jp-Notebook .jp-MarkdownOutput h1").first.wait_for()
    page.locator(".jp-NotebookPanel-toolbar .jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
    return page.locator(".jp-Notebook .jp-Cell")


def write(page: Any, cell: Any, text: str) -> None:
    """Put a text into a code cell in place of its own."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)
    page.keyboard.press("Escape")


def run_all(page: Any) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def rest(page: Any) -> None:
    """Wait until the kernel has nothing to do."""
    page.wait_for_timeout(1500)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=600_000)


def without_words(within: Any) -> list[str]:
    """Pictures of a part of the page that have no alternative text, or that are not there."""
    pictures = within.locator("img")
    told = "images => images.map(i => i.naturalWidth ? i.alt || i.title : '')"
    return [pictures.nth(i).get_attribute("src")[:99] for i, t in enumerate(pictures.evaluate_all(told)) if not t]


def complaints(page: Any) -> list[str]:
    """Errors, warnings and dialogs on the screen."""
    found = page.locator('[data-mime-type$="stderr"], [data-mime-type$="error"], .jp-Dialog, .Toastify__toast')
    return [text for text in found.all_inner_texts() if text.strip()]


def test_the_index_opens_and_leads_to_a_notebook(page: Any, lab: str) -> None:
    opened(page, lab, "00_index")
    page.wait_for_load_state("networkidle")
    assert not complaints(page) and not without_words(page.locator(".jp-Notebook"))
    page.get_by_role("link", name="32_pfa_fig2_mnist").first.click()
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) h1", has_text="Product feedback alignment on MNIST").wait_for()


def test_a_notebook_trains_is_interrupted_and_goes_on(page: Any, lab: str) -> None:
    """Notebook 32 with parameters changed: bar and live figure, then the figure; no error, no warning."""
    cells = opened(page, lab, "32_pfa_fig2_mnist")
    (parameters,) = [c for c in cells.all() if 'mode: str = "record"' in c.inner_text()]
    source = "\n".join(line.split("  #")[0] for line in parameters.locator(".cm-line").all_inner_texts())
    assert "expansion: int = 10" in source
    changed = source.replace('"record"', '"quick"').replace("seeds: int = 0", "seeds: int = 1")
    changed = changed.replace('rules: str = ""', 'rules: str = "bp,pfa"')
    write(page, parameters, changed.replace("epochs: int = 0", "epochs: int = 80"))
    trains, draws = (page.locator(".jp-CodeCell", has_text=f"cfg.{call}()") for call in ("banner", "draw"))
    run_all(page)
    trains.locator(".widget-hprogress").wait_for()
    live = trains.locator("img")
    live.wait_for()
    before, seen = live.get_attribute("src"), 0
    while live.get_attribute("src") == before:
        page.wait_for_timeout(200)
        assert (seen := seen + 1) < 450, "the figure does not move"
    assert live.count() == 1, "updated in place"
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Interrupt Kernel").click()
    rest(page)
    (told,) = complaints(page)
    assert "run the cell again and training goes on" in told and "Traceback" not in told
    run_all(page)
    rest(page)
    assert not complaints(page) and not without_words(page.locator(".jp-Notebook"))
    assert trains.locator("img").count() == draws.locator("img").count() == 1
    assert page.get_by_text("p3_fig2__seeds=1__epochs=80__rules=bp,pfa.pdf").count() == 1


def test_a_slider_moves_the_picture(page: Any, lab: str) -> None:
    cells = opened(page, lab, "21_estimation_framework")
    (sliders,) = [c for c in cells.all() if "explore()" in c.inner_text()]
    sliders.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    picture = sliders.locator(".widget-html img")
    picture.wait_for()
    before, slider = picture.get_attribute("src"), sliders.locator(".noUi-base").nth(1)
    box = slider.bounding_box()
    handle = sliders.locator(".noUi-handle").nth(1).bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], handle["y"] + handle["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_function("([a, b]) => document.querySelector(a).src != b", arg=[".widget-html img", before])
    rest(page)
    assert not complaints(page) and not without_words(sliders)


def test_every_page_of_the_site_fits_a_phone_and_says_nothing_in_the_console(page: Any, site: Path) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.set_viewport_size({"width": 360, "height": 740})
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path.name
        assert not said, f"{path.name}: {said}"
    page.goto(f"{(site / 'search.html').as_uri()}?q=decay_for")
    page.locator("#search-results li").first.wait_for()
