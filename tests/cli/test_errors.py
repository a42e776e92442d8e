# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What goes wrong is one sentence on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command_line import fail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["inspect", "nowhere"],
            "The adapter nowhere is neither in a folder here nor in the cache, and the Hub was not",
        ),
        (["inspect", "base"], "There is no adapter at base: no adapter_config.json was found."),
        (["inspect", "adapter", "--base", "somebody/away"], "The config of the base model 'somebody/away' cannot"),
        (["card", "base"], "There is no adapter at base"),
        (["card", "somebody/away", "--write"], "is no folder to write a card into"),
        (["convert", "none.pth", "--base", "base", "--output", "new"], "No such file or directory: 'none.pth'"),
        (["prune", "adapter", "--data", "base", "--output", "new"], "The dataset base has no Image column"),
        (
            ["prune", "adapter", "--data", "empty", "--output", "new"],
            "empty holds no images: put them into a folder per",
        ),
        (["prune", "adapter", "--data", "images", "--output", "adapter"], "There is an adapter in adapter already"),
        (["prune", "adapter", "--data", "images", "--output", "new", "--tokens", "9"], "Cannot prune 9 of 4 prompts"),
        (["prune", "adapter", "--data", "images", "--output", "new", "--tokens", "x"], "is neither a ratio"),
        (["prune", "adapter", "--data", "others", "--output", "new"], "classes that the adapter does not know: cat"),
        (
            ["prune", "adapter", "--data", "images", "--output", "new", "--max-tuned-percentage", "0.1"],
            "--max-tuned-percentage 0.1 is too small: head and key-value prompts alone take",
        ),
        (
            ["prune", "adapter", "--data", "p", "--output", "n", "--tokens", "1", "--max-tuned-percentage", "1"],
            "pass either --max-tuned-percentage or --tokens and --segments",
        ),
        (["prune", "adapter"], "Missing option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_one_sentence(in_place: Path, arguments: list[str], message: str) -> None:
    (in_place / "empty").mkdir(exist_ok=True)
    for name in ("cat", "dog"):
        if not (in_place / "others" / name).exists():
            (in_place / "others" / name).mkdir(parents=True)
            for index in range(5):
                Image.new("RGB", (32, 32)).save(in_place / "others" / name / f"{index}.png")
    assert message in fail(*arguments)
    assert not (in_place / "new").exists()


def test_data_need_the_package_datasets(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in fail("prune", "adapter", "--data", "images", "--output", "new")
