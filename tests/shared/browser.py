"""A page in a real browser, as it looks on a wide screen and on a telephone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
]
WIDTHS = (1280, 400)
FIGURES = """() => [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const drawn = [...svg.querySelectorAll("path, use")].filter(shape => {
        const area = shape.getBoundingClientRect();
        return area.width + area.height > 0;
    });
    const outside = [...svg.querySelectorAll("text")].filter(text => {
        const area = text.getBoundingClientRect();
        return area.left < box.left - 1 || area.right > box.right + 1;
    });
    return {width: box.width, height: box.height, drawn: drawn.length, outside: outside.map(t => t.textContent)};
})"""


@dataclass(frozen=True, kw_only=True)
class Looks:
    """What a browser shows of a page, by the width of its window in pixels where it depends on that."""

    messages: list[str]
    """Errors, and whatever the page writes to the console."""
    fetched: list[str]
    """The addresses that the page asks for beside its own."""
    is_harmed: bool
    """A script of the page's texts ran (it sets window.harmed), or one of their pictures is there."""
    overflow: dict[int, int]
    """The pixels by which the page is wider than the window."""
    figures: dict[int, list[dict[str, Any]]]
    """Width and height of each figure, how many shapes are drawn, and the labels that stick out of it."""


def look_at(page_file: Path, sync_api: Any) -> Looks:
    """Open a page in Chromium, with all that it can unfold."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
        messages: list[str] = []
        fetched: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(item => item.open = true)")
        overflow, figures = {}, {}
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            overflow[width] = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            figures[width] = page.evaluate(FIGURES)
        is_harmed = page.evaluate("window.harmed === true || document.images.length > 0")
        browser.close()
    return Looks(
        messages=messages,
        fetched=[address for address in fetched if not address.startswith("data:") and address != page_file.as_uri()],
        is_harmed=is_harmed,
        overflow=overflow,
        figures=figures,
    )
