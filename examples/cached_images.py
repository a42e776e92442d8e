"""What `finetune.py` computes once instead of in every epoch: images read and resized, and frozen layers on them.

Both are exact. Images that would take more than 2 GiB of memory are read when they are asked for, as before, and
hidden states lie in `OUTPUT_DIR/hidden_states` while the program runs, for all methods that train the same layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from transformers.utils import logging


if TYPE_CHECKING:
    from datasets import Dataset as Images
    from torch import nn
    from transformers import TrainingArguments


logger = logging.get_logger(__name__)

MOST_IN_MEMORY = 2 * 2**30
FOLDER = "hidden_states"


class ReadOnce(Dataset):
    """Images as the model takes them, each read the first time that it is asked for."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.read: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self.read:
            self.read[index] = self.images[index]
        return dict(self.read[index])


class Mirrored(Dataset):
    """The same images, left to right."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {**image, "pixel_values": image["pixel_values"].flip(-1)}


class BothWays(Dataset):
    """Hidden states of images, and under `mirrored` those of the images left to right."""

    def __init__(self, images: Any, mirrored: Any) -> None:
        self.images, self.mirrored = images, mirrored

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.images[index], "mirrored": self.mirrored[index]["pixel_values"]}


def read_once(splits: dict[str, Images]) -> dict[str, Any]:
    """The splits, read once if they fit into memory, with images as the model takes them."""
    size = sum(len(images) * images[0]["pixel_values"].nbytes for images in splits.values())
    if size > MOST_IN_MEMORY:
        logger.info(f"The images would take {size / 2**30:.1f} GiB of memory, so they are read anew in every epoch.")
        return dict(splits)
    return {name: ReadOnce(images) for name, images in splits.items()}


class HiddenStates:
    """Hidden states of the frozen layers of a run, in a folder that is there while it runs.

    Args:
        args: of the run.
        collate: makes a batch.
    """

    def __init__(self, args: TrainingArguments, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.args, self.collate = args, collate
        self.folder = Path(args.output_dir) / FOLDER
        self.clear()

    def clear(self) -> None:
        """Deletes them; what a run that was killed has left may be of other images."""
        if self.args.process_index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def of(self, model: nn.Module, splits: dict[str, Any], kept: list[str], group: str) -> dict[str, Any]:
        """The splits with hidden states in place of images where the model has frozen layers to skip.

        Args:
            model: what is going to be trained.
            splits: its images.
            kept: the splits that are read more than once; `train` among them is kept both ways.
            group: of methods that have the same frozen layers.
        """
        from peft_e2vpt import cache_frozen_prefix, uncache_frozen_prefix

        def cache(name: str, images: Any) -> Any:
            with self.args.main_process_first():
                folder = self.folder / group / name
                return cache_frozen_prefix(model, images, data_collator=self.collate, folder=folder)

        half = torch.bfloat16 if self.args.bf16 else torch.float16
        versions = {name: splits[name] for name in kept} | {"mirrored": Mirrored(splits["train"])}
        try:
            with torch.autocast(self.args.device.type, half, enabled=self.args.bf16 or self.args.fp16):
                few = [splits["train"][index] for index in range(min(2, len(splits["train"])))]
                one = cache_frozen_prefix(model, few, data_collator=self.collate).hidden_states[0]
                size = sum(map(len, versions.values())) * one.nbytes
                self.folder.mkdir(parents=True, exist_ok=True)
                if size > shutil.disk_usage(self.folder).free / 2:
                    raise ValueError(f"Hidden states would take {size / 2**30:.1f} GiB of the disk.")
                found = {name: cache(name, images) for name, images in versions.items()}
        except ValueError as error:  # it says why images are better
            uncache_frozen_prefix(model)
            logger.info(f"All layers run in every epoch. {error}")
            return splits
        return {**splits, **found, "train": BothWays(found["train"], found.pop("mirrored"))}
