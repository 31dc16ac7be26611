"""The documentation as a site: warnings are errors, every page is in the navigation, nothing is from the network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import ROOT

pytest.importorskip("mkdocs", reason="no site generator: pip install 'loscar[docs]'")

DOCS = ROOT / "docs"


class Assets(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "link" and not {"stylesheet", "icon", "preload", "preconnect"} & set((told.get("rel") or "").split()):
            return
        if tag != "a":
            self.found += [told[name] or "" for name in ("src", "srcset", "href", "data", "poster") if name in told]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = dict(os.environ, NO_MKDOCS_2_WARNING="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    from mkdocs.config import load_config

    def pages(entries: list[object]) -> list[str]:
        found = []
        for entry in entries:
            [value] = entry.values() if isinstance(entry, dict) else [entry]
            found += pages(value) if isinstance(value, list) else [str(value)]
        return found

    listed = pages(load_config(str(ROOT / "mkdocs.yml")).nav)
    assert len(set(listed)) == len(listed), "a page is in two places"
    assert set(listed) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    for page in listed:
        assert (site / page).with_suffix(".html").is_file(), page
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assets = Assets()
        assets.feed(page.read_text(encoding="utf-8"))
        assert len(assets.found) > 3, page
        for asset in assets.found:
            assert not re.match(r"(?:[a-z]+:)?//", asset), f"{page.name} loads {asset}"
            # The page for addresses that do not exist names its assets from the site's root.
            path = asset.partition("#")[0].partition("?")[0]
            below = site / path.removeprefix("/") if path.startswith("/") else page.parent / path
            assert path.startswith("data:") or below.exists(), f"{page.name}: {asset} is not there"
    for style in site.rglob("*.css"):
        for address in re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')]+)", style.read_text(encoding="utf-8")):
            assert not re.match(r"(?:https?:)?//", address), f"{style.name} loads {address}"


def test_links_that_leave_the_pages() -> None:
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", DOCS / "mkdocs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = "[An\nexample](../examples/gpt.py#top), [`proto/x`](../proto/x), [a page](plan.md)\n\n    [code](../c)\n"
    assert hooks.outward_links(text, "", None) == (
        "An\nexample (`examples/gpt.py`), `proto/x`, [a page](plan.md)\n\n    [code](../c)\n"
    )
    assert hooks.outward_links(text, "", "https://forge.example/loscar/") == (
        "[An\nexample](https://forge.example/loscar/blob/main/examples/gpt.py#top), "
        "[`proto/x`](https://forge.example/loscar/blob/main/proto/x), [a page](plan.md)\n\n    [code](../c)\n"
    )
    assert hooks.outward_links("[up](../plan.md)", "deeper", None) == "[up](../plan.md)"
