# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt evaluate` measures adapters on images, and says how sure its numbers are."""

from __future__ import annotations

import json
import shutil
from math import sqrt
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import ViTImageProcessor

import peft_e2vpt
from peft_e2vpt.images import ClassResults, find_test_images, measure
from tests.cli.conftest import COLOURS, draw_images
from tests.support import zoo
from tests.support.adapted import config_of
from tests.support.command_line import fail, run, succeed
from tests.support.models import build


def rows_of(shown: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}


@pytest.fixture(scope="module")
def trained_run(place: Path) -> Path:
    """A run's folder with two adapters, a checkpoint, and an adapter of another method."""
    folder = place / "run"
    for name in ("e2vpt", "e2vpt/checkpoint-9", "e2vpt/checkpoint-10", "other"):
        for file in (place / "adapter").iterdir():
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / name)
    get_peft_model(build("vit")[0], LoraConfig(target_modules="all-linear")).save_pretrained(folder / "lora")
    return folder


def test_the_table_has_the_accuracy_of_all_images_and_of_each_class(in_place: Path) -> None:
    shown = succeed("evaluate", "adapter", "--data", "images")
    model, processor = peft_e2vpt.load("adapter"), ViTImageProcessor.from_pretrained("base")
    found = {}
    for name in COLOURS:
        pixels = [Image.open(path).convert("RGB") for path in sorted((in_place / "images" / name).iterdir())]
        with torch.no_grad():
            logits = model(**processor(pixels, return_tensors="pt")).logits
        found[name] = float((logits.argmax(-1) == COLOURS.index(name)).float().mean())
    accuracy = sum(found.values()) / 3
    rows = rows_of(shown)
    assert shown.startswith("60 images, images\n")
    assert rows["adapter"] != [] and f"{accuracy:.3f} ± {sqrt(accuracy * (1 - accuracy) / 60):.3f}" in shown
    assert {name: rows[name] for name in COLOURS} == {name: ["20", f"{found[name]:.3f}"] for name in COLOURS}


def test_errors_of_accuracies_are_those_of_shares() -> None:
    results = ClassResults(["a", "b", "c"], [9, 1, 0], [10, 2, 0])
    assert results.accuracy == pytest.approx(10 / 12) and results.balanced_accuracy == pytest.approx(0.7)
    assert results.accuracy_error == pytest.approx(sqrt(10 / 12 * 2 / 12 / 12))
    assert results.balanced_error == pytest.approx(sqrt(0.9 * 0.1 / 10 + 0.5 * 0.5 / 2) / 2)
    assert results.recalls == [0.9, 0.5, None]


def test_the_adapters_of_a_run_stand_in_one_table(in_place: Path, trained_run: Path) -> None:
    result = run("evaluate", "run", "--data", "images")
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    assert rows["run/e2vpt"] == rows["run/other"] and "checkpoint" not in result.stdout
    assert rows["class"] == ["images", "run/e2vpt", "run/other"]
    assert "adapters of other methods: run/lora (LORA)" in result.stderr


def test_json_holds_what_the_table_shows(in_place: Path) -> None:
    (told,) = json.loads(succeed("evaluate", "adapter", "--data", "images", "--json"))
    assert told["adapter"] == "adapter" and told["images"] == 60
    assert told["accuracy"] == sum(one["right"] for one in told["classes"].values()) / 60
    assert told["tuned_percentage"] == peft_e2vpt.load("adapter").prompt_summary().tuned_percentage


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (["train", "val", "test"], None, "the split test of"),
        (["train", "val"], None, "the split validation of"),
        (["train"], None, "the split train of"),
        (["train", "val", "test"], "val", "the split validation of"),
        (["train", "val", "test"], "train", "the split train of"),
        ([""], None, ""),
    ],
)
def test_the_split_is_test_then_validation_and_else_all(
    tmp_path: Path, folders: list[str], split: str | None, expected: str
) -> None:
    for number, name in enumerate(folders):
        draw_images(tmp_path / name, number + 1)
    images = find_test_images(str(tmp_path), split)
    assert images.origin.startswith(expected) and images.classes == sorted(COLOURS)
    wanted = {"the split test of": 3, "the split validation of": 2}.get(expected, 1)
    assert len(images.images) == 3 * wanted


def test_numbers_of_classes_are_those_of_the_adapter(in_place: Path, tmp_path: Path) -> None:
    draw_images(tmp_path, 2)
    shutil.rmtree(tmp_path / "green")
    images = find_test_images(str(tmp_path))
    processor = ViTImageProcessor.from_pretrained("base")
    results = measure(peft_e2vpt.load("adapter"), COLOURS, processor, images, batch_size=3)
    assert results.classes == ["blue", "red"] and results.counts == [2, 2] and results.accuracy > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "The images nowhere cannot be loaded: "),
        (["--data", "unknown"], "classes that the adapter does not know: teal; its classes are red, green, blue"),
        (["--data", "broken"], "broken/red/bad.png is empty (0 bytes)"),
        (["--data", "images", "--split", "test"], "The images images have no split test, and no others: leave"),
        (["--data", "none"], "none holds no images: put them into a folder per class, none/CLASS/IMAGE.jpg."),
        (["--data", "images", "--base", "away"], "The base model 'away' of the adapter adapter cannot be loaded"),
        ([], "Missing option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_one_sentence(in_place: Path, arguments: list[str], message: str) -> None:
    for name in ("unknown", "broken"):
        if not (in_place / name).exists():
            draw_images(in_place / name, 1)
    shutil.rmtree(in_place / "unknown" / "teal", ignore_errors=True)
    shutil.copytree(in_place / "unknown" / "red", in_place / "unknown" / "teal")
    (in_place / "broken" / "red" / "bad.png").touch()
    (in_place / "none").mkdir(exist_ok=True)
    assert message in fail("evaluate", "adapter", *arguments)


@pytest.mark.parametrize("command", ["evaluate", "prune"])
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_models_without_one_class_per_image_are_refused(
    place: Path, tmp_path: Path, command: str, problem: str
) -> None:
    base, _ = build("vit")
    base.config.problem_type = problem
    base.save_pretrained(tmp_path / "base")
    get_peft_model(type(base).from_pretrained(tmp_path / "base"), config_of()).save_pretrained(tmp_path / "a")
    output = ["--output", tmp_path / "p"] if command == "prune" else []
    assert f"problem_type={problem!r}" in fail(command, tmp_path / "a", "--data", place / "images", *output)


@pytest.mark.parametrize("command", ["evaluate", "prune"])
def test_models_of_dense_tasks_are_refused(place: Path, tmp_path: Path, command: str) -> None:
    model = zoo.build("dpt")[0]
    model.save_pretrained(tmp_path / "base")
    get_peft_model(type(model).from_pretrained(tmp_path / "base"), config_of()).save_pretrained(tmp_path / "a")
    output = ["--output", tmp_path / "p"] if command == "prune" else []
    told = fail(command, tmp_path / "a", "--data", place / "images", *output)
    assert "is one for image-segmentation" in told
