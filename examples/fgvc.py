# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""FGVC as in the paper: birds (CUB, NABirds), flowers, dogs and cars.

```bash
python examples/fgvc.py                                         # E2VPT on ViT-B/16: downloads images and weights
accelerate launch examples/fgvc.py --task cub cars --method all --bf16 --dataloader_num_workers 8
python examples/fgvc.py --smoke                                 # tiny stand-ins, seconds
```

`paper_protocol.py` says what is run, `presets/fgvc.yaml` with which settings and where each comes from, and
`docs/paper_experiments.md` how long it takes and what differs from the released scripts.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from finetune import image_transform
from paper_protocol import Benchmark, ProtocolArguments, Splits, Transform, main, make_splits, unpacked


if TYPE_CHECKING:
    from PIL.Image import Image


def read_splits(data: dict[str, Any], task: dict[str, Any], args: ProtocolArguments) -> Splits:
    """
    Reads the three lists of a task; without one for validation, a share of the training images is cut off.

    Raises:
        FileNotFoundError: Not exactly one folder has the lists of the task.
    """
    images = unpacked(data["repo"], task["archive"], task["folder"], args) / task["images"]
    all_lists = unpacked(data["repo"], data["lists"], ".", args)
    found = sorted(
        file.parent
        for file in all_lists.rglob("train.json")
        if task["lists"] in str(file.parent.relative_to(all_lists)).lower()
    )
    if len(found) != 1:
        raise FileNotFoundError(
            f"{data['lists']} should have one folder with {task['lists']!r} in its path and train.json in it, found "
            f"{[str(folder.relative_to(all_lists)) for folder in found]}."
        )
    lists = {"train": read_list(found[0] / "train.json", images)}
    if (found[0] / "val.json").is_file():
        lists["validation"] = read_list(found[0] / "val.json", images)
    else:
        lists["train"], lists["validation"] = cut(lists["train"], data["validation_share"], data["validation_seed"])
    lists["test"] = read_list(found[0] / "test.json", images)
    return make_splits(lists)


def read_list(file: Path, images: Path) -> dict[str, Any]:
    """Reads `{image: class}`, paths from the folder of images."""
    return {str(images / name): label for name, label in json.loads(file.read_text()).items()}


def cut(entries: dict[str, Any], share: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cuts a random share off, the same for the same seed; both parts stay in the order of the whole."""
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed)).tolist()
    away = set(order[: round(share * len(entries))])
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for index, (name, label) in enumerate(entries.items()):
        parts[index in away][name] = label
    return parts


# -------------------------------------------------------------------------------------------------------- augmentation


def random_resized_crop(image: Image, side: int) -> Image:
    """
    A random rectangle of 8 to 100 % of the image, 3:4 to 4:3 wide, as a square ("Inception crop", Szegedy et al.,
    2015), mirrored in half of the cases.
    """
    from PIL.Image import Resampling, Transpose

    area = image.width * image.height
    for _ in range(10):
        share, log_ratio = torch.rand(2).tolist()
        ratio = math.exp((2 * log_ratio - 1) * math.log(4 / 3))
        width = round(math.sqrt(area * (0.08 + 0.92 * share) * ratio))
        height = round(math.sqrt(area * (0.08 + 0.92 * share) / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(torch.randint(image.width - width + 1, ()))
            top = int(torch.randint(image.height - height + 1, ()))
            box = (left, top, left + width, top + height)
            break
    else:
        box = middle(image, 1.0)
    cropped = image.resize((side, side), Resampling.BICUBIC, box)
    return cropped.transpose(Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else cropped


def centre_crop(image: Image, side: int) -> Image:
    """The middle 224 of 256 pixels of the shorter side."""
    from PIL.Image import Resampling

    return image.resize((side, side), Resampling.BICUBIC, middle(image, 224 / 256))


def middle(image: Image, share: float) -> tuple[float, float, float, float]:
    """A square in the middle, its side a share of the shorter side: left, top, right, bottom."""
    half = min(image.size) * share / 2
    x, y = image.width / 2, image.height / 2
    return x - half, y - half, x + half, y + half


def transforms(processor: Any) -> tuple[Transform, Transform]:
    """Random crops, mirrored, to train on, and the middle of the image to evaluate on."""
    to_pixels = image_transform(processor)
    side = processor.size["height"]

    def after(crop: Callable[[Image, int], Image]) -> Transform:
        def transform(batch: dict[str, list]) -> dict[str, list]:
            return to_pixels({**batch, "image": [crop(image.convert("RGB"), side) for image in batch["image"]]})

        return transform

    return after(random_resized_crop), after(centre_crop)


# ----------------------------------------------------------------------------------------------------------- stand-ins


PACKED = {"CUB_200_2011.tgz": "gztar", "nabirds.tar.gz": "gztar", "102flowers.tgz": "gztar", "car_ims.tgz": "gztar"}
INSIDE = {"flowers": "jpg/", "cars": "car_ims/"}  # where names in the lists begin with the folder of the archive


def make_data(folder: Path, tasks: dict[str, Any]) -> None:
    """Writes random images in the layout of the Hub's dataset: an archive for every task, and one of all lists."""
    from stand_ins import write_image

    for task, preset in tasks.items():
        content = folder / "content"
        for split, count in {"train": 12, "val": 6, "test": 8}.items():
            if split == "val" and task == "cars":
                continue  # is cut off
            names = {f"{INSIDE.get(task, f'{i % 3}/')}{split}{i:05d}.png": 1 + i % 3 for i in range(count)}
            for index, (name, label) in enumerate(names.items()):
                write_image(content / preset["images"] / name, label, index, side=40)
            lists = folder / "fgvc_split" / preset["lists"] / f"{split}.json"
            lists.parent.mkdir(parents=True, exist_ok=True)
            lists.write_text(json.dumps(names))
        packed = shutil.make_archive(str(folder / "packed"), PACKED.get(preset["archive"], "tar"), content)
        Path(packed).rename(folder / preset["archive"])
        shutil.rmtree(content)
    shutil.make_archive(str(folder / "fgvc_split"), "zip", folder, "fgvc_split")
    shutil.rmtree(folder / "fgvc_split")


FGVC = Benchmark("fgvc", read_splits, transforms, make_data, ["cub", "nabirds", "flowers", "dogs", "cars"])

if __name__ == "__main__":
    main(FGVC, __doc__)
