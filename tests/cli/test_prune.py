# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt prune` prunes a saved adapter and tells what that costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTImageProcessor

import peft_e2vpt
from peft_e2vpt.images import accuracy, load_images
from tests.cli.conftest import COLOURS
from tests.support.command_line import succeed


def test_prune_searches_saves_and_tells_before_and_after(in_place: Path, tmp_path: Path) -> None:
    shown = succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p")
    model = peft_e2vpt.load(tmp_path / "p")
    before, after = peft_e2vpt.load("adapter").prompt_summary(), model.prompt_summary()
    row = next(line.split() for line in shown.splitlines() if line.startswith("trained parameters"))
    assert row[-2:] == [f"{before.num_tuned_values:,}", f"{after.num_tuned_values:,}"]
    assert "chosen" in shown and "not trained again" in shown and "PruneRewindCallback" in shown
    processor = ViTImageProcessor.from_pretrained(tmp_path / "p")
    found = accuracy(model, load_images("images", COLOURS, processor).validation)
    row = next(line.split() for line in shown.splitlines() if line.startswith("accuracy on 12 images"))
    assert float(row[-1]) == pytest.approx(found, abs=5e-4)
    assert f"| accuracy | {found:.4g} |" in (tmp_path / "p" / "README.md").read_text()


def test_prune_keeps_a_budget(in_place: Path, tmp_path: Path) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--max-tuned-percentage", 1.5)
    before, after = (peft_e2vpt.load(path).prompt_summary() for path in ("adapter", tmp_path / "p"))
    assert after.tuned_percentage <= 1.5 < before.tuned_percentage


def test_labels_are_matched_by_name(in_place: Path) -> None:
    processor = ViTImageProcessor.from_pretrained("base")
    batch = next(iter(load_images("images", ["green", "blue", "x", "red"], processor, max_samples=12).validation))
    own = next(iter(load_images("images", None, processor, max_samples=12).validation))
    # a folder's classes are in alphabetical order: blue, green, red
    assert torch.equal(batch["labels"], torch.tensor([1, 0, 3])[own["labels"]])
