# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""VTAB-1k as in the paper: 19 tasks; 800 images to train on and 200 to choose on, then all 1,000; last epoch.

```bash
python examples/vtab1k.py                                       # E2VPT on ViT-B/16: downloads images and weights
accelerate launch examples/vtab1k.py --backbone all --method all --bf16 --dataloader_num_workers 8
python examples/vtab1k.py --smoke                               # tiny stand-ins, seconds
```

`paper_protocol.py` says what is run, `presets/vtab1k.yaml` with which settings and where each comes from, and
`docs/paper_experiments.md` how long it takes and what differs from the released scripts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune import image_transform
from paper_protocol import Benchmark, ProtocolArguments, Splits, Transform, main, make_splits, unpacked


LISTS = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}


def read_list(file: Path) -> dict[str, int]:
    """
    Reads a list of images: a line has a path from the folder of the list and the number of a class.

    Raises:
        ValueError: A line is different.
    """
    entries = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        path, _, label = line.rpartition(" ")
        if not path or not label.isdigit():
            raise ValueError(f"Line {number} of {file} is not `PATH CLASS`: {line!r}.")
        entries[str(file.parent / path)] = int(label)
    return entries


def read_splits(data: dict[str, Any], task: dict[str, Any], args: ProtocolArguments) -> Splits:
    """Reads the three lists of a task."""
    folder = unpacked(data["repo"], data["archive"], data["folder"], args) / data["folder"] / task["name"]
    missing = [name for name in LISTS.values() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}.")
    return make_splits({split: read_list(folder / name) for split, name in LISTS.items()})


def transforms(processor: Any) -> tuple[Transform, Transform]:
    """No augmentation: images are resized to a square, in training too."""
    transform = image_transform(processor)
    return transform, transform


def make_data(folder: Path, tasks: dict[str, Any]) -> None:
    """Writes random images in the layout of the Hub's dataset: one archive with a folder for every task."""
    from stand_ins import write_image

    for task in tasks:
        place = folder / "vtab-1k" / task
        for split, count in {"train800": 12, "val200": 6, "test": 8}.items():
            lines = []
            for index in range(count):
                name = f"images/{split}/{index:06d}.png"
                write_image(place / name, index % 3, index)
                lines.append(f"{name} {index % 3}\n")
            (place / f"{split}.txt").write_text("".join(lines))
    shutil.make_archive(str(folder / "vtab-1k"), "zip", folder, "vtab-1k")
    shutil.rmtree(folder / "vtab-1k")


VTAB1K = Benchmark("vtab1k", read_splits, transforms, make_data, ["cifar", "eurosat", "dsprites_loc"])

if __name__ == "__main__":
    main(VTAB1K, __doc__)
