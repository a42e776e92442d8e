# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How many images of each class a classifier gets right, and how sure that number is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .._compat import device_and_dtype
from ..evaluation import batches, no_trace
from ..pruning.quality import accuracy as correct
from .folders import SPLIT_OF, find_images
from .loading import numbers_of_labels
from .reading import read_image
from .splits import is_folder_of_images, load_splits, undecoded


@dataclass(frozen=True)
class TestImages:
    """Labelled images to measure classifiers on.

    Attributes:
        origin: what they are, such as `"the split test of cells"`.
        classes: names of their classes.
        images: what `read_image` takes, and the number of its class.
        notes: sentences on what has been left out.
    """

    __test__ = False  # for pytest, which takes the name for one of its own

    origin: str
    classes: list[str]
    images: list[tuple[Any, int]]
    notes: list[str]


@dataclass(frozen=True)
class ClassResults:
    """How many images of each class a classifier gets right.

    Attributes:
        classes: names of the classes.
        right: how many images of each it gets right.
        counts: how many images of each there are.
    """

    classes: list[str]
    right: list[int]
    counts: list[int]

    @property
    def num_images(self) -> int:
        """Images of all classes."""
        return sum(self.counts)

    @property
    def accuracy(self) -> float:
        """The share of images that it gets right."""
        return sum(self.right) / self.num_images

    @property
    def accuracy_error(self) -> float:
        """The standard error of `accuracy`: how far it would lie off with other images, drawn as these were."""
        return sqrt(self.accuracy * (1.0 - self.accuracy) / self.num_images)

    @property
    def recalls(self) -> list[float | None]:
        """The same share for each class, `None` where it has no images."""
        return [right / count if count else None for right, count in zip(self.right, self.counts, strict=True)]

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the shares of the classes that have images."""
        shares = [share for share in self.recalls if share is not None]
        return sum(shares) / len(shares)

    @property
    def balanced_error(self) -> float:
        """The standard error of `balanced_accuracy`."""
        found = [(share, count) for share, count in zip(self.recalls, self.counts, strict=True) if share is not None]
        return sqrt(sum(share * (1.0 - share) / count for share, count in found)) / len(found)


def find_test_images(
    name: str, split: str | None = None, *, max_samples: int | None = None, seed: int = 0
) -> TestImages:
    """Finds labelled images to measure classifiers on; nothing is decoded yet.

    Args:
        name: a folder as `find_images` takes it, or whatever else `datasets.load_dataset` takes.
        split: `train`, `validation` or `test`; by default `test`, else `validation`, and all images of a folder that
            is not divided into splits.
        max_samples: how many images to use, drawn at random; by default all.
        seed: for what is drawn at random.

    Raises:
        ImportError: the images are in no folder, and `datasets` is not installed.
        ValueError: there are no such images, or no such split.
    """
    notes: list[str] = []
    splits: dict[str, list[tuple[Any, str]]]
    if is_folder_of_images(name):
        found = find_images(name)
        notes = found.notes
        splits = {
            part: [(path, label) for label, paths in classes.items() for path in paths]
            for part, classes in found.splits.items()
        }
        first = next(iter(found.splits["train"].values()))[0]
        if first.parent.parent == Path(name):  # FOLDER/CLASS/IMAGE: no splits
            splits = {"": splits["train"]}
    else:
        loaded = load_splits(name, seed=seed).splits
        names = loaded["train"].features["label"].names
        splits = {
            part: [(image, names[label]) for image, label in zip(data["image"], data["label"], strict=True)]
            for part, data in ((part, undecoded(data)) for part, data in loaded.items())
        }
    chosen = _choose(name, split, list(splits))
    images = splits[chosen]
    if max_samples is not None and max_samples < len(images):
        images = random.Random(seed).sample(images, max_samples)
    classes = sorted({label for _, label in images})
    origin = f"the split {chosen} of {name}" if chosen else name
    return TestImages(origin, classes, [(image, classes.index(label)) for image, label in images], notes)


def _choose(name: str, split: str | None, splits: list[str]) -> str:
    if split is None:
        return next(part for part in ("test", "validation", "", "train") if part in splits)
    wanted = SPLIT_OF.get(split.lower(), split)
    if wanted not in splits:
        instead = f"only {', '.join(splits)}" if splits != [""] else "and no others: leave the split out"
        raise ValueError(f"The images {name} have no split {split}, {instead}.")
    return wanted


def measure(
    model: nn.Module, labels: list[str] | None, processor: Any, images: TestImages, *, batch_size: int = 32
) -> ClassResults:
    """Counts how many images of each class a model in eval mode gets right; leaves no trace in the model.

    Args:
        model: a classifier.
        labels: names of its classes in the order of its logits; `None`, or names such as `LABEL_0`, take the order of
            the images' classes.
        processor: its image processor.
        images: what it is measured on.
        batch_size: images in a forward pass.

    Raises:
        ValueError: an image cannot be read, or is of a class that the model does not know.
    """
    numbers = numbers_of_labels(images.classes, labels)

    def collate(examples: list[tuple[Any, int]]) -> dict[str, torch.Tensor]:
        pixels = processor(images=[read_image(image) for image, _ in examples], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([numbers[label] for _, label in examples])}

    loader: DataLoader[Any] = DataLoader(images.images, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]
    device, _ = device_and_dtype(model)
    right, counts = [torch.zeros(len(images.classes), dtype=torch.long) for _ in range(2)]
    place = torch.empty(max(numbers) + 1, dtype=torch.long)
    place[numbers] = torch.arange(len(numbers))
    with no_trace(model, loader), torch.no_grad():
        for batch in batches(loader, device, "Evaluating"):
            classes = place[batch.inputs["labels"].cpu()]
            hits = correct(model(**batch.inputs), batch.inputs).long().cpu()
            right.index_add_(0, classes, hits)
            counts.index_add_(0, classes, torch.ones_like(hits))
    return ClassResults(images.classes, right.tolist(), counts.tolist())
