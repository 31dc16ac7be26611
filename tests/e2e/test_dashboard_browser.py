"""The dashboard in a real headless browser, watching a real run in which a worker is killed.

Needs the extra `loscar[browser]` and a Chromium: Debian's package `chromium`, or another one on the path.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import DEADLINE_S, Processes, Server, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install 'loscar[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'loscar[browser]'")

SUPPORT = Path(__file__).parents[1] / "support"
TOKEN = "open-sesame"
RUN = ["--local-steps", "3", "--density", "0.5", "--seed", "5", "--token", TOKEN, "--dashboard", "127.0.0.1:0"]
WORKER = ["worker", "--task", "tiny_task:Tiny", "--step-time", "2ms", "--parting", "0s", "--token", TOKEN]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ALONE = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
"""A test may run as root, and the browser has nothing to fetch from anywhere."""
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}
SHOWN = "#headline dd"

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


@dataclass
class Watched:
    """A run with two workers, and where its page is."""

    server: Server
    url: str
    processes: Processes

    def join(self, name: str) -> Any:
        return self.processes.loscar(*WORKER, "--server", self.server.address, "--name", name, cwd=SUPPORT)


@dataclass
class Seen:
    """What a page has said and asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def serve(processes: Processes, *flags: str) -> tuple[Server, str]:
    server = processes.server(*RUN, *flags)
    url: str = json.loads(server.out)["dashboard"]
    return server, url


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    processes = Processes(tmp_path_factory.mktemp("watched"))
    try:
        watched = Watched(*serve(processes, "--workers", "2"), processes)
        for name in ("w0", "w1"):
            watched.join(name)
        yield watched
    finally:
        processes.kill_all()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no Chromium on the path: none of {', '.join(PROGRAMS)}")
    playwright.expect.set_options(timeout=DEADLINE_S * 1000)
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=ALONE)
        try:
            yield started
        finally:
            started.close()


Opened = Callable[..., Any]


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def opened(browser: Any, seen: Seen) -> Iterator[Opened]:
    """Opens a page in a browser session of its own."""
    contexts = []

    def open_page(url: str, size: str = "desktop", **options: Any) -> Any:
        context = browser.new_context(viewport=SIZES[size], **options)
        contexts.append(context)
        context.set_default_timeout(DEADLINE_S * 1000)
        page = context.new_page()
        page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: seen.errors.append(str(e)))
        page.on("request", lambda r: seen.requests.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def watching(opened: Opened, run: Watched, size: str = "desktop", **options: Any) -> Any:
    """The page of a run at work, with both workers' reports on it."""
    page = opened(f"{run.url}#token={TOKEN}", size, **options)
    for name in ("w0", "w1"):
        lane = page.locator(".lane", has=page.get_by_role("heading", name=name, exact=True))
        playwright.expect(lane).to_contain_text("computing")
    playwright.expect(page.locator("#loss polyline")).not_to_have_count(0)
    return page


def tile(page: Any, name: str) -> str:
    text: str = page.locator(".tiles div", has=page.get_by_text(name, exact=True)).locator("dd span").inner_text()
    return text


# --- the story ----------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed(run: Watched, opened: Opened, seen: Seen) -> None:
    """It joins and is killed while the page is open, which says so with the reason, by itself."""
    page = watching(opened, run)
    assert page.url == run.url, "the token does not stay in the address"
    assert page.title().startswith("running · round ")
    assert tile(page, "Phase") == "running"
    assert tile(page, "Epoch") == "1"
    victim = run.join("victim")
    lane = page.locator(".lane", has=page.get_by_role("heading", name="victim", exact=True))
    events = page.locator("#events li")
    playwright.expect(events.filter(has_text="victim joined at slot")).to_have_count(1)
    playwright.expect(lane).to_contain_text("computing")
    playwright.expect(page.locator("#links tbody tr", has_text="victim")).to_have_count(1)
    active = int(tile(page, "Active workers"))
    victim.signal(signal.SIGKILL)
    left = events.filter(has_text="victim left")
    playwright.expect(left).to_have_count(1)
    playwright.expect(left).to_contain_text("the connection broke, or the process died")
    playwright.expect(left).to_contain_text("stream-closed")
    playwright.expect(lane).to_contain_text("stream-closed")
    playwright.expect(page.locator("#links tbody tr", has_text="victim")).to_have_count(0)
    playwright.expect(page.locator("#loss li", has_text="victim")).to_contain_text("(left)")
    playwright.expect(page.locator("#announce")).to_contain_text("victim left")
    assert int(tile(page, "Active workers")) == active - 1
    before = int(tile(page, "Round").replace(",", ""))
    wait_until(lambda: int(tile(page, "Round").replace(",", "")) > before, "the run goes on, and the page with it")
    assert seen.errors == []
    assert {url.partition("?")[0] for url in seen.requests} == {
        run.url + name for name in ("", "page.js", "page.css", "state.json")
    }, "nothing from elsewhere, and no token in an address"


def test_a_server_that_is_gone_is_missed(processes: Processes, opened: Opened) -> None:
    server, url = serve(processes, "--workers", "2")
    page = opened(f"{url}#token={TOKEN}")
    playwright.expect(page.locator("#no-lanes")).to_be_visible()
    playwright.expect(page.locator("#connection")).to_have_text("live, every second")
    assert tile(page, "Phase") == "waiting"
    server.signal(signal.SIGKILL)
    playwright.expect(page.locator("#connection")).to_contain_text("No answer from the server. What is shown is of")
    playwright.expect(page.locator("#announce")).to_contain_text("No answer from the server")
    again = processes.server(*RUN, "--workers", "3", "--dashboard", url.split("/")[2])
    playwright.expect(page.locator("#connection")).to_have_text("live, every second")
    playwright.expect(page.locator("#run-id")).to_contain_text(again.run_id[:8])
    playwright.expect(page.locator("#headline")).to_contain_text("0 of 3 are there")


# --- the token ----------------------------------------------------------------------------------------------


def test_the_page_asks_for_the_token(run: Watched, opened: Opened) -> None:
    page = opened(run.url)
    field_ = page.get_by_label("Token")
    playwright.expect(field_).to_be_focused()
    assert page.locator("#page").is_hidden()
    assert run.server.run_id[:8] not in page.content()
    page.keyboard.type("guess")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("alert")).to_have_text("That is not this run's token.")
    playwright.expect(field_).to_be_focused()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    playwright.expect(page.locator(SHOWN).first).to_be_visible()
    playwright.expect(page.locator("#run-id")).to_contain_text(run.server.run_id[:8])
    assert page.locator("#ask").is_hidden()
    page.reload()
    playwright.expect(page.locator(SHOWN).first).to_be_visible()
    assert page.evaluate("localStorage.length") == 0, "it stays in this tab"
    assert page.context.cookies() == []


# --- for everybody ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_accessibility_rules(run: Watched, opened: Opened, size: str, scheme: str) -> None:
    """Those of axe-core, text contrast of 4.5 among them, with everything unfolded."""
    page = watching(opened, run, size, color_scheme=scheme)
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(15, 18, 22)") == (scheme == "dark")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    passed = {rule["id"] for rule in found.response["passes"]}
    assert {"color-contrast", "html-has-lang", "document-title", "svg-img-alt"} <= passed


def test_the_form_too(run: Watched, opened: Opened) -> None:
    page = opened(run.url)
    playwright.expect(page.locator("#ask")).to_be_visible()
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_drawn_stands_out(run: Watched, opened: Opened, scheme: str) -> None:
    """Lanes and curves against what is behind them: 3, as for graphics."""
    page = opened(run.url, color_scheme=scheme)
    named = "name => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
    colour = {name: page.evaluate(named, name) for name in ("off", "card", "merge", "compute", "ink")}
    for name in ("compute", "wait", "awaited", "arriving", "whole", "aside", "silent", "bad"):
        assert contrast(page.evaluate(named, name), colour["off"]) >= 3, name
    for i in range(6):
        assert contrast(page.evaluate(named, f"c{i}"), colour["card"]) >= 3, i
    assert contrast(colour["merge"], colour["compute"]) >= 3
    assert contrast(colour["merge"], colour["card"]) >= 3


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_screen(run: Watched, opened: Opened, size: str) -> None:
    page = watching(opened, run, size)
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= screen == SIZES[size]["width"]
    assert page.locator("#pause").bounding_box()["height"] >= 44
    for canvas in page.locator(".lane canvas").all():
        assert canvas.bounding_box()["width"] > 200
    drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert page.locator(".lane canvas").first.evaluate(drawn) > 5, "something is drawn"
    if size == "phone":
        cell = page.locator("#links tbody td").first
        label = cell.evaluate("e => getComputedStyle(e, '::before').content")
        assert label == '"state"', "a figure without its heading"


def test_the_keyboard_reaches_everything(run: Watched, opened: Opened) -> None:
    page = watching(opened, run)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => {
              const e = document.activeElement;
              const style = getComputedStyle(e);
              const where = e.id || e.closest("section")?.getAttribute("aria-labelledby") || "";
              return [where, e.tagName.toLowerCase(),
                      style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
            }"""
        )
        if here[1] == "body":
            break
        assert here[2], f"{here[:2]}: the focus cannot be seen"
        reached.append(tuple(here[:2]))
    assert reached[:6] == [
        ("pause", "button"),
        ("h-lanes", "summary"),
        ("h-loss", "svg"),
        ("h-traffic", "svg"),
        ("h-links", "div"),
        ("h-links", "summary"),
    ]
    page.locator("#loss > svg").focus()
    read = page.locator("#loss .read")
    assert "arrow keys" in read.inner_text()
    page.keyboard.press("Home")
    first = read.inner_text()
    assert re.match(r".+: .*w0 [\d.]+, w1 [\d.]+", first)
    assert read.get_attribute("aria-live") == "polite"
    page.keyboard.press("End")
    playwright.expect(read).not_to_have_text(first)
    page.keyboard.press("Tab")
    playwright.expect(read).to_contain_text("arrow keys")
    page.locator("#pause").focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#connection")).to_contain_text("paused at")
    assert page.locator("#pause").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#connection")).to_have_text("live, every second")


def test_paused_is_paused(run: Watched, opened: Opened, seen: Seen) -> None:
    page = watching(opened, run)
    page.locator("#pause").click()
    playwright.expect(page.locator("#connection")).to_contain_text("paused at")
    page.wait_for_load_state("networkidle")
    asked, round_ = len(seen.requests), tile(page, "Round")
    other = watching(opened, run)  # takes several looks, of which this page must see nothing
    later = tile(other, "Round")
    wait_until(lambda: tile(other, "Round") != later, "the run goes on")
    assert tile(page, "Round") == round_
    assert sum("state.json" in url for url in seen.requests[:asked]) > 0
    page.locator("#pause").click()
    playwright.expect(page.locator(".tiles div", has_text="Round").first).not_to_contain_text(f" {round_} ")
    wait_until(lambda: tile(page, "Round") != round_, "it goes on where the run is")


def test_less_motion_for_who_wants_less(run: Watched, opened: Opened) -> None:
    page = watching(opened, run, reduced_motion="reduce")
    playwright.expect(page.locator("#connection")).to_have_text("live, every 5 s")
    moving = "[...document.querySelectorAll('*')].filter(e => e.getAnimations().length).length"
    assert page.evaluate(moving) == 0


def test_one_region_speaks_and_only_of_news(run: Watched, opened: Opened) -> None:
    page = watching(opened, run)
    live = page.locator("[aria-live=polite], [aria-live=assertive], [role=status], [role=log]")
    assert [e.get_attribute("id") for e in live.all()] == ["announce"]
    before = tile(page, "Round")
    wait_until(lambda: tile(page, "Round") != before, "an update")
    assert page.locator("#announce").inner_text() == "", "neither the past nor a new round is news"
