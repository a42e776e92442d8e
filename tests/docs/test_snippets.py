# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The Python blocks of README.md and of the pages in docs/ run as they stand, one after another on every page.

Names of the Hub are folders here: a tiny backbone, two adapters and a few images lie where the pages look for the
real ones. What the pages take as given (`train`, `args`, `pixels`, ...) is in `given`. A block that uploads something
is left out by the comment `<!-- skip: next -->` above it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from peft_e2vpt import E2VPTConfig, apply_gates, prune, score_prompts
from tests.support.models import VIT
from tests.support.paths import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BACKBONE = "google/vit-base-patch16-224-in21k"
NUM_CLASSES = 37

Sample = dict[str, Any]


def images(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % NUM_CLASSES
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return [{"pixel_values": pixels, "labels": label} for pixels, label in zip(noise, labels, strict=True)]


def stack(batch: list[Sample]) -> dict[str, Tensor]:
    return {name: torch.stack([image[name] for image in batch]) for name in batch[0]}


def save_adapter(name: str, classes: list[str]) -> None:
    """A pruned adapter of the tiny backbone, with an image processor and the report of a short run beside it."""
    base = ViTForImageClassification.from_pretrained(
        BACKBONE, id2label=dict(enumerate(classes)), label2id={label: i for i, label in enumerate(classes)}
    )
    model = get_peft_model(base, E2VPTConfig())
    apply_gates(model, prune(score_prompts(model, DataLoader(images(4), 2, collate_fn=stack)), 0.5, 0.25))
    model.save_pretrained(name)
    ViTImageProcessorPil.from_pretrained(BACKBONE).save_pretrained(name)


def save_photographs(name: str, classes: list[str]) -> None:
    """A dataset with the columns `image` and `label`, split into `train` and `test`."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    for split, count in (("train", 2 * NUM_CLASSES), ("test", 8)):
        photographs = [Image.new("RGB", (40, 36), (3 * i % 256, 90, 30)) for i in range(count)]
        labels = [i % NUM_CLASSES for i in range(count)]
        rows = datasets.Dataset.from_dict({"image": photographs, "label": labels}, features=features)
        rows.to_parquet(f"{name}/data/{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    classes = [f"class {i}" for i in range(NUM_CLASSES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ViTModel(ViTConfig(**VIT)).save_pretrained(BACKBONE)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(BACKBONE)
        for name in ("me/vit-e2vpt-pets", "me/vit-e2vpt-flowers"):
            save_adapter(name, classes)
        save_photographs("timm/oxford-iiit-pet", classes)
    return folder


def given() -> dict[str, Any]:
    """What every page may use without saying where it comes from."""
    train, validation = images(12), images(6)
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    return {
        "args": TrainingArguments("outputs", use_cpu=True, disable_tqdm=True, **arguments),
        "train": train,
        "validation": validation,
        "train_loader": DataLoader(train, 4, collate_fn=stack),
        "validation_loader": DataLoader(validation, 4, collate_fn=stack),
        "pixels": stack(images(4))["pixel_values"],
        "photograph": Image.new("RGB", (40, 36)),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.name)
def test_the_python_blocks_of_a_page_run(page: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "cache")
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    document.namespace.update(given())
    for block in document.examples():
        block.evaluate()
