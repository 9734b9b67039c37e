"""The page of `spairkit app`, in a headless Chromium: open, filter, correct, save, reload."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spairkit.images import write_png

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.slow,
]

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZE = 96
DISCS = [(14, 14), (48, 16), (80, 18), (18, 50), (52, 52), (82, 50), (16, 82), (50, 84), (80, 80)]
FREE = (33, 33)  # the middle of a place without a disc


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of discs of 12 px, each dimmer than the one before."""
    folder = tmp_path / "discs"
    folder.mkdir()
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for name, number in (("a.png", 9), ("b.png", 6)):
        image = np.full((SIZE, SIZE), 0.05, np.float32)
        for k, (cx, cy) in enumerate(DISCS[:number]):
            image[(x - cx) ** 2 + (y - cy) ** 2 < 36] = 1 - 0.08 * k
        write_png(folder / name, torch.from_numpy(image).expand(3, -1, -1))
    return folder


@contextmanager
def app(*words: str, cwd: Path) -> Iterator[str]:
    """Runs the command; gives the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "spairkit", "app", *words, "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    try:
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == [
        "open this address in a browser on this machine; Ctrl-C ends the page",
        "spairkit: stopped by SIGINT",
    ]


class Page:
    """The page in a window, which may ask nobody but the app and has no errors."""

    def __init__(self, browser: Any, address: str, width: int = 1280, height: int = 800) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.tab = self.context.new_page()
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.origin = address.partition("/?")[0]
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.goto(address)
        self.expect("#total").to_have_text("15", timeout=60_000)
        self.expect("#save-csv").to_be_enabled(timeout=60_000)

    def expect(self, selector: str) -> Any:
        return playwright.expect(self.tab.locator(selector))

    def click_file(self, x: float, y: float) -> None:
        """Clicks a point of the file, in an image that is shown whole."""
        box = self.tab.locator("#canvas").bounding_box()
        scale = (min(box["width"], box["height"]) - 16) / SIZE
        self.tab.mouse.click(
            box["x"] + box["width"] / 2 + (x - SIZE / 2) * scale,
            box["y"] + box["height"] / 2 + (y - SIZE / 2) * scale,
        )

    def slide(self, selector: str, value: float) -> None:
        self.tab.locator(selector).evaluate(
            "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }",
            value,
        )

    def saved(self, selector: str) -> bytes:
        with self.tab.expect_download() as download:
            self.tab.click(selector)
        return Path(download.value.path()).read_bytes()

    def close(self) -> None:
        assert self.wrong == []
        assert self.asked
        own = (f"{self.origin}/", f"blob:{self.origin}/", "data:")
        assert [url for url in self.asked if not url.startswith(own)] == []
        self.context.close()


def test_corrections_outlive_a_reload_and_a_restart(browser: Any, folder: Path) -> None:
    with app("discs", cwd=folder.parent) as address:
        page = Page(browser, address)
        assert page.tab.url == f"{page.origin}/", "the token leaves the address"
        page.expect("#count").to_have_text("9")

        # the slider acts at once, and the server counts the same
        page.slide("#threshold", 0.8)
        dimmer = int(page.tab.inner_text("#count"))
        assert 0 < dimmer < 9
        page.expect("#list li:first-child .n").to_have_text(str(dimmer))
        rows = list(csv.DictReader(io.StringIO(page.saved("#save-csv").decode())))
        assert sum(row["image"] == "a.png" for row in rows) == dimmer
        page.slide("#threshold", 0.5)
        page.slide("#largest", 5)
        page.expect("#count").to_have_text("0")
        page.slide("#largest", 1000)
        page.expect("#count").to_have_text("9")

        # remove one by click and key, add one by click, take the last step back
        page.click_file(*DISCS[4])
        page.expect("#selection").to_contain_text("Confidence")
        page.tab.keyboard.press("Delete")
        page.expect("#count").to_have_text("8")
        page.tab.click("#add")
        page.click_file(*FREE)
        page.expect("#count").to_have_text("9")
        page.expect("#saved").to_have_text(
            "1 removed, 1 added; saved in discs/spairkit-corrections.json"
        )
        page.tab.keyboard.press("Control+z")
        page.expect("#count").to_have_text("8")
        page.expect("#total").to_have_text("14")
        page.tab.keyboard.press("Escape")

        page.tab.reload()
        page.expect("#count").to_have_text("8")
        page.expect("#saved").to_contain_text("1 removed")
        page.tab.check("#show-removed")
        page.click_file(*DISCS[4])
        page.expect("#selection").to_contain_text("Removed")
        page.tab.click("#remove")
        page.expect("#count").to_have_text("9")
        page.tab.click("#undo")
        page.expect("#count").to_have_text("8")
        page.close()

    with app("discs", cwd=folder.parent) as address:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(address)
        playwright.expect(tab.locator("#total")).to_have_text("14", timeout=60_000)
        playwright.expect(tab.locator("#count")).to_have_text("8")
        tab.click("#reset")
        playwright.expect(tab.locator("#count")).to_have_text("9")
        context.close()


def test_page_fits_a_phone_and_can_be_used_by_keys(browser: Any, folder: Path) -> None:
    with app("discs", "--out", "fixes.json", cwd=folder.parent) as address:
        page = Page(browser, address, 360, 740)
        width = page.tab.evaluate("document.documentElement.scrollWidth")
        assert width == 360
        for selector in ("#save-coco", "#save-csv", "#model", "#canvas", "#add", "#threshold"):
            box = page.tab.locator(selector).bounding_box()
            assert 0 <= box["x"] < box["x"] + box["width"] <= 360, selector
        page.tab.focus("#canvas")
        page.tab.keyboard.press("ArrowRight")
        page.expect("#selection").to_contain_text("Confidence")
        page.tab.keyboard.press("Delete")
        page.expect("#count").to_have_text("8")
        page.tab.keyboard.press("ArrowDown")
        page.expect("#count").to_have_text("6")
        page.tab.keyboard.press("a")
        page.tab.keyboard.press("Enter")
        page.expect("#count").to_have_text("7")
        page.expect("#total").to_have_text("15")
        page.close()
    assert (folder.parent / "fixes.json").is_file()
    assert not (folder / "spairkit-corrections.json").exists()


def test_page_without_a_folder_says_what_to_do(browser: Any, tmp_path: Path) -> None:
    with app(cwd=tmp_path) as address:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(address)
        playwright.expect(tab.locator("#empty")).to_contain_text("spairkit app FOLDER")
        playwright.expect(tab.locator("#main")).to_be_hidden()
        context.close()
