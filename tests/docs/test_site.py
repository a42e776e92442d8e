# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The site of documents as a reader has it, in a real browser, on a desk and on a phone.

Screenshots of every page are kept in `build/screenshots`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.support.paths import DOCS, ROOT


for package in ("furo", "latex2mathml", "myst_parser", "sphinx_copybutton"):
    pytest.importorskip(package, reason="needs the extra `docs`")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `demo`")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402


pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        shutil.which("chromium") is None or shutil.which("chromedriver") is None,
        reason="needs a browser: apt-get install chromium chromium-driver",
    ),
]
SCREENSHOTS = ROOT / "build" / "screenshots"
PAGES = sorted([*(page.stem for page in DOCS.glob("*.md")), "figures/README"])
WIDTHS = {"desk": 1280, "phone": 400}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(DOCS), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser: Any, address: str, width: int, dark: bool = False) -> None:
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)


def keep(browser: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(SCREENSHOTS / f"{name.replace('/', '-')}.png"))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_its_window_and_needs_nothing_from_elsewhere(page: str, site: str, browser: Any) -> None:
    for kind, width in WIDTHS.items():
        show(browser, f"{site}/{page}.html", width)
        keep(browser, f"{page}-{kind}")
        needed, given = browser.execute_script(
            "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
        )
        assert needed <= given, f"{page} scrolls sideways on a {kind}"
        fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert fetched and all(name.startswith((site, "data:")) for name in fetched)
        broken = browser.execute_script(
            "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert not broken


def test_the_navigation_has_every_page_in_one_of_four_groups(site: str, browser: Any) -> None:
    show(browser, f"{site}/index.html", WIDTHS["desk"])
    captions = [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, ".sidebar-tree .caption")]
    assert [caption.capitalize() for caption in captions] == ["Start", "Guides", "Reference", "Background"]
    links = browser.find_elements(By.CSS_SELECTOR, ".sidebar-tree li.toctree-l1 > a")
    listed = [link.get_attribute("href").removeprefix(f"{site}/").removesuffix(".html") for link in links]
    assert sorted(listed) == sorted(set(PAGES) - {"index"})


def test_formulas_are_drawn_without_a_script(site: str, browser: Any) -> None:
    show(browser, f"{site}/method.html", WIDTHS["phone"])
    formulas = browser.find_elements(By.CSS_SELECTOR, "math")
    assert len(formulas) > 20
    assert all(formula.rect["width"] > 3 and formula.rect["height"] > 3 for formula in formulas)
    assert not re.search(r"<script[^>]*(mathjax|katex)", browser.page_source, re.IGNORECASE)


def test_a_block_of_code_has_a_button_that_copies_it(site: str, browser: Any) -> None:
    show(browser, f"{site}/quickstart.html", WIDTHS["desk"])
    WebDriverWait(browser, 10).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "button.copybtn"))
    blocks = browser.find_elements(By.CSS_SELECTOR, "div.highlight pre")
    assert len(browser.find_elements(By.CSS_SELECTOR, "button.copybtn")) == len(blocks)


def test_names_of_the_api_in_the_text_lead_to_their_description(site: str, browser: Any) -> None:
    show(browser, f"{site}/pruning_guide.html", WIDTHS["desk"])
    links = browser.find_elements(By.CSS_SELECTOR, "article a.reference.internal")
    targets = {link.text: link.get_attribute("href") for link in links}
    assert targets["PruneRewindCallback"] == f"{site}/api.html#peft_e2vpt.PruneRewindCallback"
    assert targets["apply_gates"] == f"{site}/api.html#peft_e2vpt.apply_gates"


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("pruning", "pruning_guide"),
        ("settings", "settings"),
        ("task", "tasks"),
        ("serve", "serving"),
        ("install", "install"),
        ("results", "results"),
        ("method", "method"),
        ("share", "sharing"),
        ("gpus", "multi_gpu"),
    ],
)
def test_a_search_shows_the_page_of_that_title_first(words: str, page: str, site: str, browser: Any) -> None:
    show(browser, f"{site}/search.html?q={words}", WIDTHS["desk"])

    def found(_: Any) -> list[str]:
        links = browser.find_elements(By.CSS_SELECTOR, "#search-results li a")
        return [link.get_attribute("href").split("?")[0].split("#")[0] for link in links]

    links = WebDriverWait(browser, 20).until(found)
    assert links[0] == f"{site}/{page}.html", links[:5]


def test_a_dark_page_has_dark_figures(site: str, browser: Any) -> None:
    for dark, variant in ((False, "run.png"), (True, "run-dark.png")):
        show(browser, f"{site}/figures/README.html", WIDTHS["desk"], dark)
        images = browser.find_elements(By.CSS_SELECTOR, "article img")
        shown = [Path(image.get_attribute("src")).name for image in images if image.is_displayed()]
        assert f"e2vpt-pruned-{variant}" in shown
        assert sum(name.endswith("-dark.png") for name in shown) == (8 if dark else 0)
        keep(browser, f"figures-{'dark' if dark else 'light'}")
