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
from tests.support.paths import EXAMPLES, ROOT


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


SCREENSHOTS = ROOT / "build" / "screenshots"


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_legible_at_both_widths_and_says_what_is_wrong_with_a_file(address, browser, tmp_path, width):
    Image.linear_gradient("L").save(tmp_path / "image.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def see(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def keep(name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(SCREENSHOTS / f"demo-{name}-{width}.png"))

    wait = WebDriverWait(browser, 60)
    browser.get(address)
    wait.until(lambda _: see("input[type=file]"))
    see("input[type=file]")[0].send_keys(str(tmp_path / "image.png"))
    wait.until(lambda _: see("#maps img") and see("#shares img"))
    keep("answer")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    drawn = see("#maps img")[0]
    assert drawn.size["width"] >= 0.6 * int(drawn.get_attribute("naturalWidth"))  # a point of 10 is 8 pixels or more
    drawn.location_once_scrolled_into_view  # noqa: B018
    keep("maps")
    see("#message")[0].location_once_scrolled_into_view  # noqa: B018

    see("button[aria-label=Clear], button[aria-label='Remove Image']")[0].click()
    wait.until(lambda _: see("input[type=file]"))
    see("input[type=file]")[0].send_keys(str(tmp_path / "bad.png"))
    wait.until(lambda _: "Choose another image." in see("#message")[0].text)
    wait.until(lambda _: not see("#maps img"))
    keep("bad-file")


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


def test_adapters_of_e2vpt_are_found_in_a_run_and_others_are_named_by_their_method(base, adapters, tmp_path):
    LoraConfig().save_pretrained(tmp_path / "run" / "lora")
    with pytest.raises(ValueError, match=r"no E2VPT adapter in .*run, only adapters of other methods: lora \(LoRA\)"):
        demo.find_adapters([tmp_path / "run"])
    for name in ("trees", "trees/checkpoint-9"):
        shutil.copytree(adapters[0], tmp_path / "run" / name)
    found = demo.find_adapters([tmp_path / "run", adapters[1]])
    assert found.adapters == [tmp_path / "run" / "trees", adapters[1]]
    assert found.notes == ["Left out, as this page shows E2VPT adapters: lora (LoRA)."]


def test_the_last_checkpoint_of_an_unfinished_run_is_found(adapters, tmp_path):
    for name in ("checkpoint-9", "checkpoint-10"):
        shutil.copytree(adapters[0], tmp_path / name)
    assert demo.find_adapters([tmp_path]).adapters == [tmp_path / "checkpoint-10"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"a text", "bad.png"), (b"\x89PNG\r\n\x1a\n", "bad.png")],
    ids=["empty", "text", "cut off"],
)
def test_a_file_that_is_no_image_gets_one_sentence(tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    image, told = demo.open_image(str(tmp_path / "bad.png"))
    assert image is None and message in told and told.endswith(". Choose another image.")
    assert "\n" not in told and str(tmp_path) not in told


def test_an_image_is_read_as_a_viewer_shows_it(tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    image, told = demo.open_image(str(tmp_path / "turned.jpg"))
    assert image.size == (20, 40) and told == ""


def test_methods_are_named_and_not_types_of_peft(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is one of LoRA; this page"):
        demo.read_config(tmp_path)
    with pytest.raises(ValueError, match="which is a file"):
        demo.read_config(tmp_path / "adapter_config.json")


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
