"""What a page must be: read as a browser would, with nothing to load, and looked at in a real one."""

import os
import re
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

LIMIT = 5_000_000
HOSTILE = (
    "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> & \"it\" "
    "\x00\u202e"
)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
"""Arguments of a browser that runs as root, and asks nothing of anybody by itself."""


class Page(HTMLParser):
    """What a browser would make of the page: elements, their attributes, texts by id, tables by id."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.tables = [], [], {}, {}
        self._open, self._table, self._cell, self._style = [], [], False, False
        self.style = self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        self._style = tag == "style"
        name = dict(attrs).get("id")
        if tag == "table":
            self._table = self.tables.setdefault(name, [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = True
        elif name:
            self._open.append((tag, name))
            self.texts[name] = ""

    def handle_endtag(self, tag):
        self._style = False
        if tag in ("td", "th"):
            self._cell = False
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._style:
            self.style += data
            return
        self.text += data
        for _, name in self._open:
            self.texts[name] += data
        if self._cell:
            self._table[-1][-1] += data.strip()


def check_self_contained(page: Page) -> None:
    for _, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert value == "data:," or value.startswith("#"), value
    assert "url(" not in page.style and "@import" not in page.style
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    policy = next(v for t, k, v in page.attributes if t == "meta" and v.startswith("default-src"))
    assert policy.startswith("default-src 'none'") and "script" not in policy


@contextmanager
def open_browser():
    """Chromium, headless: the one on PATH, else playwright's own."""
    required = os.environ.get("REQUIRE_BROWSER")  # continuous integration: no browser is a failure
    refuse = pytest.fail if required else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        refuse("no playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, names)), None)
        found = found or playwright.chromium.executable_path
        if not Path(found).exists():
            refuse("no browser: apt install chromium, or playwright install chromium")
        opened = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield opened
        opened.close()


def check_in_browser(browser, page: Path) -> None:
    """Nothing is asked of the network, nothing fails, nothing is wider than the screen, all is legible."""
    for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        tab = context.new_page()
        asked, wrong = [], []
        tab.on("request", lambda r, asked=asked: asked.append(r.url))
        tab.on("requestfailed", lambda r, wrong=wrong: wrong.append(r.url))
        tab.on("console", lambda m, wrong=wrong: wrong.append(m.text))
        tab.on("pageerror", lambda e, wrong=wrong: wrong.append(str(e)))
        tab.on("dialog", lambda d, wrong=wrong: wrong.append(d.message))
        tab.goto(page.as_uri())
        assert asked == [page.as_uri()] and not wrong
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        # Charts have a size and lie within their card; text stands out from the paper.
        boxes = tab.evaluate(
            "[...document.querySelectorAll('svg')].map(s => { const b = s.getBoundingClientRect();"
            "const c = s.closest('.chart').getBoundingClientRect();"
            "return [b.width, b.height, b.left - c.left, c.right - b.right] })"
        )
        assert boxes and all(w >= 280 and h >= 50 and a >= 0 and b >= 0 for w, h, a, b in boxes)
        ink, paper = tab.evaluate(
            "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
        )
        assert contrast(ink, paper) > 7
        assert (luminance(paper) < 0.2) == (scheme == "dark")
        context.close()


def luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    """WCAG's contrast ratio."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
