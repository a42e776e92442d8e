# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Regression: how probable is it that a solar cell is defective? Experts said 0, 1/3, 2/3 or 1 of each photograph.

```bash
python examples/recipes/regression.py --prune
python examples/recipes/regression.py --model_name_or_path facebook/dinov2-base --image_size 224
```

`problem_type="regression"` and `num_labels=1` make any `AutoModelForImageClassification` a regression model: its loss
is the squared error. The metric is the share of the variance that is explained (R2); the mean error beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import Recipe, backbone_name, load_processor, parse, run, sizes
from PIL import Image
from solar_cells import find_data_folder
from torch import nn
from transformers import AutoModelForImageClassification, EvalPrediction


def read_cells() -> tuple[list[str], list[float]]:
    """The files of all photographs, shuffled, and how probable a defect is."""
    folder = find_data_folder()
    lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    order = np.random.RandomState(0).permutation(len(lines))
    return [str(folder / lines[index][0]) for index in order], [float(lines[index][1]) for index in order]


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """R2, 0 for whoever always answers with the mean, and the mean absolute error."""
    answers, truth = outputs.predictions.reshape(-1), outputs.label_ids.reshape(-1)
    unexplained = np.square(answers - truth).sum() / np.square(truth - truth.mean()).sum()
    return {"r2": float(1 - unexplained), "mean_error": float(np.abs(answers - truth).mean())}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse("regression", image_size=70, arguments=arguments)
    pixels = load_processor(args)

    def build_model() -> nn.Module:
        return AutoModelForImageClassification.from_pretrained(
            backbone_name(args), num_labels=1, problem_type="regression", ignore_mismatched_sizes=True
        )

    files, probabilities = read_cells()
    splits, start = {}, 0
    for part, count in sizes(args, train=400, validation=120, test=600).items():
        images = pixels([Image.open(file).convert("RGB") for file in files[start : start + count]])
        targets = torch.tensor(probabilities[start : start + count])
        splits[part] = [{"pixel_values": image, "labels": t} for image, t in zip(images, targets, strict=True)]
        start += count
    recipe = Recipe(build_model, splits, compute_metrics, ("r2", "mean_error"), start_head=True)
    return run("regression", recipe, args)


if __name__ == "__main__":
    main()
