# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`peft-e2vpt card` makes a card anew and keeps what somebody has added."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

import peft_e2vpt
from peft_e2vpt_cli.content import inspect_adapter
from tests.support.command_line import fail, succeed


def test_card_prints_what_is_written_and_keeps_results(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    printed = succeed("card", tmp_path / "a")
    assert printed.strip() == card.read_text().strip()
    card.write_text(
        card.read_text().replace("## What", "## Results\n\n| metric | value |\n|---|---:|\n| f1 | 0.5 |\n\n## What")
    )
    card.write_text(card.read_text().replace("pipeline_tag:", "license: mit\npipeline_tag:", 1))
    assert "Wrote" in succeed("card", tmp_path / "a", "--write")
    assert "| f1 | 0.5 |" in card.read_text() and "license: mit" in card.read_text()


def test_results_are_read_back_from_the_metadata_of_a_card(in_place: Path, tmp_path: Path) -> None:
    succeed("prune", "adapter", "--data", "images", "--output", tmp_path / "p", "--tokens", 1)
    card = tmp_path / "p" / "README.md"
    (result,) = ModelCard.load(card).data.eval_results
    assert (result.task_type, result.dataset_name, result.metric_type) == (
        "image-classification",
        "Unknown",
        "accuracy",
    )
    row = f"| accuracy | {result.metric_value:.4g} |"
    card.write_text(card.read_text().replace(row, ""))
    assert "Wrote" in succeed("card", tmp_path / "p", "--write") and row in card.read_text()


def test_card_needs_the_config_of_the_base_model_only(in_place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((in_place / "base" / "config.json").read_bytes())
    printed = succeed("card", "adapter", "--base", tmp_path)
    assert f"**{inspect_adapter('adapter').num_tuned_values:,} parameters, " in printed


def test_a_card_with_broken_metadata_is_named(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text().replace("pipeline_tag:", "- x\npipeline_tag:", 1))
    assert "metadata" in fail("card", tmp_path / "a", "--write") and "- x" in card.read_text()


def test_a_card_that_somebody_has_edited_stays(in_place: Path, tmp_path: Path) -> None:
    peft_e2vpt.load("adapter").save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("# Mine\n")
    assert "Somebody has edited the card" in fail("card", tmp_path / "a", "--write")
    assert (tmp_path / "a" / "README.md").read_text() == "# Mine\n"
