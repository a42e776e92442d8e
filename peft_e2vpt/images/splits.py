# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Labelled images in splits, from folders or the Hub, every one of them read before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .folders import SPLIT_OF, SPLITS, SUFFIXES, find_images
from .reading import content_of, name_of, read_image


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


MOST_NAMED = 20
DATA_FILES = ("parquet", "arrow", "tar", "zip", "csv", "json", "jsonl", "webdataset")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class LabelledImages(NamedTuple):
    """Images of a classification task.

    Attributes:
        splits: `train`, `validation` and, if there are such images, `test`, with the columns `image` and `label`.
        notes: sentences on what has been left out, and on what the reader of an accuracy should know.
    """

    splits: DatasetDict
    notes: list[str]


def load_splits(
    name: str,
    *,
    config_name: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    validation_share: float = 0.15,
    seed: int = 0,
) -> LabelledImages:
    """Loads labelled images, from folders or the Hub; nothing is decoded yet.

    Args:
        name: a folder as `find_images` takes it, or whatever else `datasets.load_dataset` takes.
        config_name: configuration of a dataset of the Hub.
        validation: folder of the validation images, a folder per class, where `name` is a folder.
        test: the same for test images.
        validation_share: of `train`, where there are no validation images; the same share of every class.
        seed: for what is drawn at random.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such dataset, it has no labelled images, or as `find_images`.
    """
    try:
        from datasets import DatasetDict, load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError("Images are read with datasets: pip install datasets pillow.") from error
    notes: list[str] = []
    if validation or test or is_folder_of_images(name):
        found = find_images(name, validation, test)
        notes = found.notes
        labels = list(found.splits["train"])
        splits = DatasetDict({split: _dataset(classes, labels) for split, classes in found.splits.items()})
    else:
        try:
            loaded = load_dataset(name, config_name)
        except (DatasetsError, OSError, ValueError) as error:
            if Path(name).is_dir():
                find_images(name)  # says what is wrong, where it is a folder of images
            raise ValueError(f"The images {name} cannot be loaded: {str(error).splitlines()[0]}") from error
        splits = DatasetDict({SPLIT_OF.get(split.lower(), split): dataset for split, dataset in loaded.items()})
        if "train" not in splits:
            raise ValueError(f"The images {name} have no split `train`, only {', '.join(splits)}.")
        splits = DatasetDict({split: name_columns(splits[split], name) for split in SPLITS if split in splits})
    return LabelledImages(with_validation(splits, validation_share, seed), notes)


def is_folder_of_images(name: str) -> bool:
    """Whether a name is that of a folder with files that are images, without tables that describe them."""
    folder = Path(name)
    if not folder.is_dir():
        return False
    if any(next(folder.rglob(table), None) for table in METADATA):
        return False
    return any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*")) or not any(
        next(folder.rglob(f"*.{kind}"), None) for kind in DATA_FILES
    )


def with_validation(splits: DatasetDict, share: float, seed: int) -> DatasetDict:
    """Sets a share of the training images aside for validation, where there are no validation images.

    Of every class the same share is drawn, at least one image, and at least one is left.

    Raises:
        ValueError: a class has one image alone, or the share is not between 0 and 1.
    """
    from datasets import DatasetDict

    if "validation" in splits:
        return splits
    if not 0 < share < 1:
        raise ValueError(f"The share of training images for validation lies between 0 and 1, got {share}.")
    train = splits["train"]
    labels = torch.tensor(train["label"])
    generator = torch.Generator().manual_seed(seed)
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for number, label in enumerate(train.features["label"].names):
        of_class = (labels == number).nonzero()[:, 0]
        if len(of_class) == 1:
            raise ValueError(
                f"The class {label} has one image alone, so none is left to validate with: add images of it, or give "
                "validation images of your own."
            )
        if len(of_class):
            count = min(max(round(share * len(of_class)), 1), len(of_class) - 1)
            aside[of_class[torch.randperm(len(of_class), generator=generator)[:count]]] = True
    parts = {"train": train.select((~aside).nonzero()[:, 0]), "validation": train.select(aside.nonzero()[:, 0])}
    return DatasetDict({**parts, **{name: part for name, part in splits.items() if name not in parts}})


def name_columns(dataset: Any, name: str) -> Any:
    """Names the column of images `image` and that of classes `label`, found by their types; drops all others.

    Args:
        dataset: a dataset of `datasets`.
        name: what an error calls it.

    Raises:
        ValueError: it has no such column.
    """
    from datasets import ClassLabel, Image

    found = {}
    for title, kind in (("image", Image), ("label", ClassLabel)):
        columns = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
        if not columns:
            raise ValueError(
                f"The dataset {name} has no {kind.__name__} column, only {', '.join(dataset.features)}: a folder of "
                "images needs one folder per class, FOLDER/CLASS/IMAGE.jpg, and two classes or more."
            )
        found[columns[0]] = title
    return dataset.select_columns(list(found)).rename_columns(found)


# ------------------------------------------------------------------------------------------------ every image is read
class Checked(NamedTuple):
    """Images that can all be read.

    Attributes:
        splits: as they came, without bad images.
        notes: sentences on bad images that are left out, and on images that are in two splits.
        fingerprint: of the contents of the files and their labels: equal for equal images.
    """

    splits: DatasetDict
    notes: list[str]
    fingerprint: str


def check_images(splits: DatasetDict, *, skip_bad_images: bool = False) -> Checked:
    """Reads every image once, with a progress bar, so that no training ends at one that is damaged.

    Args:
        splits: with the columns `image` and `label`.
        skip_bad_images: whether to leave out what cannot be read.

    Raises:
        ValueError: images cannot be read and are not to be skipped (it names them and says why), or none of a class
            are left to train on.
    """
    from datasets import DatasetDict

    bad: list[str] = []
    good: dict[str, Dataset] = {}
    contents: dict[str, set[bytes]] = {}
    fingerprint = blake2b(digest_size=8)
    total = sum(len(dataset) for dataset in splits.values())
    with _progress_bar(total) as bar:
        for split, dataset in splits.items():
            results = _read_all(split, dataset, bar)
            bad += [result for result in results if isinstance(result, str)]
            kept = [index for index, result in enumerate(results) if isinstance(result, bytes)]
            digests = [result for result in results if isinstance(result, bytes)]
            good[split] = dataset if len(kept) == len(dataset) else dataset.select(kept)
            contents[split] = set(digests)
            names, labels = dataset.features["label"].names, good[split]["label"]
            for digest, label in sorted(zip(digests, labels, strict=True)):
                fingerprint.update(f"{split}/{names[label] if label >= 0 else label}/".encode() + digest)
    notes = []
    if bad:
        shown = "".join(f"\n  {line}" for line in bad[:MOST_NAMED])
        more = f"\n  and {len(bad) - MOST_NAMED:,} more" if len(bad) > MOST_NAMED else ""
        if not skip_bad_images:
            raise ValueError(
                f"{len(bad):,} of {total:,} images cannot be read: replace or remove them, or leave them out with "
                f"skip_bad_images.{shown}{more}"
            )
        notes.append(f"{len(bad):,} of {total:,} images cannot be read and are left out:{shown}{more}")
        _check_what_is_left(good, splits)
    for split in good.keys() - {"train"}:
        shared = len(contents[split] & contents["train"])
        if shared:
            notes.append(
                f"{shared:,} of the {len(good[split]):,} {split} images are also training images: an accuracy on them "
                "says little of new images."
            )
    return Checked(DatasetDict(good), notes, fingerprint.hexdigest())


def undecoded(dataset: Dataset) -> Dataset:
    """The dataset with its images as path and bytes, for `read_image`, whose errors name them."""
    from datasets import Image

    return dataset.cast_column("image", Image(decode=False))


def _read_all(split: str, dataset: Dataset, bar: Any) -> list[bytes | str]:
    """Of every image a digest of its file, or why it cannot be read."""
    files = undecoded(dataset)

    def read(index: int) -> bytes | str:
        source = files[index]["image"]
        known = isinstance(source, dict) and source.get("path")
        name = name_of(source) if known else f"Image {index} of {split}"
        try:
            content = content_of(source, name)
            read_image(content, name)
        except ValueError as error:
            return str(error)
        finally:
            bar.update()
        return blake2b(content, digest_size=16).digest()

    with ThreadPoolExecutor(max_workers=torch.get_num_threads() + 1) as pool:  # decoders let other threads run
        return list(pool.map(read, range(len(dataset))))


def _progress_bar(total: int) -> Any:
    from transformers.utils import logging

    return logging.tqdm(total=total, desc="Reading every image once", leave=False, unit=" images", disable=None)


def _check_what_is_left(good: dict[str, Dataset], before: DatasetDict) -> None:
    for split, dataset in good.items():
        if not len(dataset):
            raise ValueError(f"Without the bad images no {split} image is left.")
    names = before["train"].features["label"].names
    lost = sorted(set(before["train"]["label"]) - set(good["train"]["label"]))
    if lost:
        raise ValueError(f"Without the bad images no training image of the class {names[lost[0]]} is left.")


def _dataset(classes: dict[str, list[Path]], labels: Sequence[str]) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image

    files = [(str(path.absolute()), labels.index(name)) for name, paths in classes.items() for path in paths]
    return Dataset.from_dict(
        {"image": [path for path, _ in files], "label": [label for _, label in files]},
        features=Features({"image": Image(), "label": ClassLabel(names=list(labels))}),
    )
