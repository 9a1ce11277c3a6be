"""The site: its reference is complete, and, where Sphinx is installed, it builds without a warning and its links hold."""

from __future__ import annotations

import ast
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import fa


def test_the_reference_has_every_public_name_and_every_module() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in (fa.ROOT / "docs" / "api").glob("*.rst"))
    named = set(re.findall(r"^\.\. (?:auto)?(?:function|class|exception|data):: (\w+)$", text, re.MULTILINE))
    assert named == set(fa.__all__)
    modules = {
        ".".join(p.relative_to(fa.ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in (fa.ROOT / "fa").rglob("*.py")
        if p.parent.name != "experiments" or p.stem == "__init__"
    }
    # heads alone, or told on the page of public names
    without = {"fa", "fa.library", "fa.__main__", "fa.results", "fa.results.cite"}
    assert set(re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)) == modules - without


def test_an_attribute_of_a_docstring_is_one_name() -> None:
    """Two names before one colon have no module; Sphinx ends there, with a message that names neither."""
    for path in (fa.ROOT / "fa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) or "" if isinstance(node, ast.ClassDef | ast.Module) else ""
            for name in re.findall(r"^    (\S[^:]*):", text.partition("Attributes:\n")[2], re.MULTILINE):
                assert name.isidentifier(), f"{path.name}: {name}"


class Links(HTMLParser):
    """Of a page: the anchors, what it links to, what it loads, and the alternative texts of its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.leads: list[str] = []
        self.loads: list[str] = []
        self.alts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {k: v or "" for k, v in attrs}
        self.anchors |= {has["id"]} if "id" in has else set()
        self.alts += [has.get("alt", "")] * (tag == "img")
        if "src" in has or (tag == "link" and "href" in has):
            self.loads.append(has.get("src") or has["href"])
        elif "href" in has:
            self.leads.append(has["href"])


@pytest.mark.slow
def test_the_site_is_whole_and_alone(site: Path) -> None:
    """No link that leads nowhere, nothing loaded from another server, no picture without words."""
    pages = {p: Links(p) for p in site.rglob("*.html")}
    assert {p.stem for p in (fa.ROOT / "notebooks").glob("*.ipynb")} < {p.stem for p in pages}
    for page, links in pages.items():
        assert not [url for url in links.loads if re.match(r"(https?:)?//", url)], page.name
        assert not [alt for alt in links.alts if not alt or alt.endswith(".png")], page.name
        for url in links.loads + links.leads:
            if re.match(r"[a-z]+:", url):
                continue
            path, _, anchor = unquote(url).partition("#")
            path = (page.parent / path.partition("?")[0]).resolve() if path else page
            assert path.exists(), f"{page.name}: {url}"
            assert not anchor or path not in pages or anchor in pages[path].anchors, f"{page.name}: {url}"
    styles = "".join(p.read_text(encoding="utf-8") for p in (site / "_static").rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//", styles) and "@import" not in styles
