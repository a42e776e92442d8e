# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Batches of labelled images for an adapter, and how many of them it gets right."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from .._compat import device_and_dtype
from ..evaluation import batches, no_trace
from ..hub.companion import are_generic
from ..pruning.quality import accuracy as correct
from .reading import read_image
from .splits import load_splits, undecoded


class Images(NamedTuple):
    """Batches of two splits of a dataset.

    Attributes:
        training: of the split `train`.
        validation: of the split `validation`; where there is none, of a share of `train` that `training` lacks.
    """

    training: DataLoader[Any]
    validation: DataLoader[Any]


def load_images(
    name: str,
    labels: list[str] | None,
    processor: Any,
    *,
    batch_size: int = 32,
    max_samples: int | None = None,
    validation_share: float = 0.2,
    seed: int = 0,
) -> Images:
    """Loads labelled images as batches of `pixel_values` and `labels`, the labels numbered as an adapter has them.

    Args:
        name: a folder with a folder of images per class, or one of splits, or whatever else `datasets.load_dataset`
            takes.
        labels: names of the classes of the adapter; `None`, or names such as `LABEL_0`, take the order of the dataset.
        processor: an image processor.
        batch_size: images in a batch.
        max_samples: how many images of a split to use, drawn at random; by default all.
        validation_share: of `train`, where there is no validation set; equal shares of every class.
        seed: for what is drawn at random.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such dataset, it has no labelled images, or its classes are unknown to the adapter.
    """
    splits = load_splits(name, validation_share=validation_share, seed=seed).splits
    training, validation = splits["train"], splits["validation"]
    numbers = numbers_of_labels(training.features["label"].names, labels)

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [read_image(example["image"]) for example in examples]
        return {
            "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
            "labels": torch.tensor([numbers[example["label"]] for example in examples]),
        }

    def loader(dataset: Any) -> DataLoader[Any]:
        if max_samples is not None and max_samples < len(dataset):
            dataset = dataset.shuffle(seed=seed).select(range(max_samples))
        return DataLoader(undecoded(dataset), batch_size=batch_size, collate_fn=collate)

    return Images(loader(training), loader(validation))


def accuracy(model: nn.Module, dataloader: DataLoader[Any]) -> float:
    """The share of samples whose label a model in eval mode gets right; leaves no trace in the model."""
    device, _ = device_and_dtype(model)
    right, count = 0.0, 0
    with no_trace(model, dataloader), torch.no_grad():
        for batch in batches(dataloader, device, "Evaluating"):
            right += float(correct(model(**batch.inputs), batch.inputs).sum())
            count += batch.size
    return right / count


def numbers_of_labels(theirs: list[str], labels: list[str] | None) -> list[int]:
    """The adapter's number of each class of a dataset.

    Raises:
        ValueError: the adapter does not know a class.
    """
    if labels is None or (are_generic(labels) and len(labels) == len(theirs)):
        return list(range(len(theirs)))
    unknown = [name for name in theirs if name not in labels]
    if unknown:
        raise ValueError(
            f"The images have classes that the adapter does not know: {', '.join(unknown[:4])}; its classes are "
            f"{', '.join(labels[:4])}{', ...' if len(labels) > 4 else ''}."
        )
    return [labels.index(name) for name in theirs]
