# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Labelled images for training and for adapters, from folders or the Hub, read as a viewer shows them.

| module | what it does |
|---|---|
| `reading` | one file as RGB |
| `folders` | which split and class each file belongs to |
| `splits` | datasets of them, every image read once before training |
| `loading` | batches for an adapter, and how many of them it gets right |
| `results` | how many images of each class it gets right |
"""

from .folders import FolderImages, find_images
from .loading import Images, accuracy, load_images
from .reading import as_rgb, read_image
from .results import ClassResults, TestImages, find_test_images, measure
from .splits import Checked, LabelledImages, check_images, load_splits, name_columns, with_validation


__all__ = [
    "Checked",
    "ClassResults",
    "FolderImages",
    "Images",
    "LabelledImages",
    "TestImages",
    "accuracy",
    "as_rgb",
    "check_images",
    "find_images",
    "find_test_images",
    "load_images",
    "load_splits",
    "measure",
    "name_columns",
    "read_image",
    "with_validation",
]
