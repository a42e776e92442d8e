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
from tests.support.command_line import fail, succeed


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


def test_prune_offers_the_bounds_that_its_errors_advise_to_lower(in_place: Path, tmp_path: Path) -> None:
    arguments = ("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--max-tuned-percentage")
    told = fail(*arguments, 0.1)
    assert (
        told.startswith("--max-tuned-percentage 0.1 is too small") and "lower --min-tokens or --min-segments" in told
    )
    least, lower = (float(text.split("Raise it to ")[1].split()[0]) for text in (told, fail(*arguments, 0.1, *LOW)))
    assert lower < least
    succeed(*arguments, lower, *LOW)
    assert peft_e2vpt.load(tmp_path / "p").prompt_summary().tuned_percentage <= lower


LOW = ("--min-segments", 1)


def test_bounds_hold_for_amounts(in_place: Path, tmp_path: Path) -> None:
    arguments = ("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--tokens", 3)
    assert "at least 2 must remain" in fail(*arguments, "--min-tokens", 2)
    succeed(*arguments)
