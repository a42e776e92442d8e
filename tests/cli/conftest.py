# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A trained adapter with its base model and the images it was trained on, which all commands use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from peft_e2vpt.images import accuracy, load_images
from tests.support.adapted import config_of
from tests.support.models import build


COLOURS = ["red", "green", "blue"]


def draw_images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for channel, name in enumerate(COLOURS):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 160, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 60
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an adapter that knows colours, and images."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    base, _ = build("vit")
    base.classifier = torch.nn.Linear(32, 3)
    base.config.id2label = dict(enumerate(COLOURS))
    base.config.label2id = {name: index for index, name in enumerate(COLOURS)}
    base.save_pretrained(folder / "base")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "base")
    draw_images(folder / "images", 20)
    model = get_peft_model(
        ViTForImageClassification.from_pretrained(folder / "base"), config_of(num_visual_prompts=4, num_segments=8)
    )
    images = load_images(str(folder / "images"), COLOURS, processor)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        for batch in images.training:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert accuracy(model, images.validation) > 0.8
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place
