# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`examples/demo.py` as a visitor uses it, in a real browser, and what it says to adapters that it cannot show."""

from __future__ import annotations

import json
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
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessorPil

from tests.support.adapted import config_of, trained
from tests.support.models import build
from tests.support.paths import EXAMPLES


TREES = ["ash", "beech", "cedar", "dogwood", "elm"]
BIRDS = ["auk", "bittern", "crane", "dove", "eider"]

pytest.importorskip("gradio", reason="needs the extra `demo`")
import demo  # noqa: E402


webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra `demo`")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402


needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs a browser: apt-get install chromium chromium-driver",
)


def save_adapter(base: Path, folder: Path, labels: list[str], **settings: Any) -> Path:
    names = dict(enumerate(labels))
    model = ViTForImageClassification.from_pretrained(
        base, id2label=names, label2id={name: index for index, name in names.items()}, ignore_mismatched_sizes=True
    )
    trained(get_peft_model(model, config_of(**settings))).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("vit")[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base) -> list[Path]:
    return [
        save_adapter(base, base / "trees", TREES),
        save_adapter(base, base / "birds", BIRDS, num_visual_prompts=4, seed=1),
    ]


@pytest.fixture
def address(adapters, tmp_path) -> Iterator[str]:
    """The page with both adapters, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, EXAMPLES / "demo.py", *adapters, "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(url).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"The page did not start: {(tmp_path / 'log').read_text()}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def requested_addresses(browser: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.mark.browser
@needs_browser
def test_visitor_drops_a_image_and_changes_the_adapter(address, browser, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "image.png")

    def see(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def read(selector: str) -> str:
        return " ".join(element.text for element in see(selector))

    def image() -> str | None:
        return next((image.get_attribute("src") for image in see("#maps img")), None)

    wait = WebDriverWait(browser, 60)
    browser.get(address)
    wait.until(lambda _: see("input[type=file]"))
    assert image() is None

    see("input[type=file]")[0].send_keys(str(tmp_path / "image.png"))
    wait.until(lambda _: all(label in read("#answer") for label in TREES))
    wait.until(lambda _: image() is not None and see("#shares img"))
    of_trees = image()

    next(label for label in see("#adapter label") if label.text == "birds").click()
    wait.until(lambda _: all(label in read("#answer") for label in BIRDS))
    assert not any(label in read("#answer") for label in TREES)
    wait.until(lambda _: image() not in (None, of_trees))

    elsewhere = [url for url in requested_addresses(browser) if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "There is no adapter at .* To make one: python examples/finetune.py"),
        (TREES[:3], "All adapters need the same number of classes, found {'trees': 5, 'few': 3}"),
    ],
    ids=["no adapter", "other number of classes"],
)
def test_adapters_that_cannot_be_shown_are_refused(base, adapters, tmp_path, labels, message):
    if labels is not None:
        save_adapter(base, tmp_path, labels)
    with pytest.raises(ValueError, match=message):
        demo.load_adapters({"trees": adapters[0], "few": tmp_path})


def test_without_adapters_the_page_says_which_command_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo.py"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "python examples/finetune.py --prune" in capsys.readouterr().err


def test_only_adapters_of_e2vpt_are_found_in_a_run(base, adapters):
    LoraConfig().save_pretrained(base / "lora")
    assert demo.find_adapters(base) == sorted(adapters)


def test_adapters_are_named_by_what_differs_in_their_paths(tmp_path):
    folders = [tmp_path / "run-0.5" / "e2vpt", tmp_path / "run-1" / "e2vpt"]
    assert list(demo.name_adapters(folders)) == ["run-0_5/e2vpt", "run-1/e2vpt"]
    assert list(demo.name_adapters(folders[:1])) == ["e2vpt"]


def test_a_backbone_whose_attention_cannot_be_drawn_answers_all_the_same():
    model = get_peft_model(build("swin")[0], config_of()).eval()
    model.peft_config["default"].labels = TREES
    served = demo.Served(model, {"default": ViTImageProcessorPil(size={"height": 32, "width": 32})})
    image = Image.linear_gradient("L").convert("RGB")
    assert sum(demo.classify(served, image, "default").values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="Windows and pyramids have no map"):
        demo.attend(served, image, "default")
