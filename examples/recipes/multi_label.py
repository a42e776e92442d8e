# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Multi-label classification: which kinds of emoji does an image show? Several answers, or one, are right.

```bash
python examples/recipes/multi_label.py --prune
python examples/recipes/multi_label.py --model_name_or_path google/vit-base-patch16-224-in21k --image_size 224
```

`problem_type="multi_label_classification"` gives any `AutoModelForImageClassification` a yes-or-no question per class;
labels are floats, `(B, num_labels)`. The metric is the mean average precision of the classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import Recipe, backbone_name, load_processor, parse, run, sizes
from scenes import CLASSES, make_scene
from torch import nn
from transformers import AutoModelForImageClassification, EvalPrediction


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """Mean average precision of the classes that occur, and F1 of all answers above one half."""
    from sklearn.metrics import average_precision_score, f1_score

    logits, truth = outputs.predictions, outputs.label_ids.astype(int)
    occurring = np.flatnonzero(truth.any(axis=0))
    return {
        "mean_ap": float(average_precision_score(truth[:, occurring], logits[:, occurring])),
        "f1": float(f1_score(truth, logits > 0, average="micro", zero_division=0)),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse("multi_label", image_size=70, arguments=arguments)
    pixels = load_processor(args)

    def build_model() -> nn.Module:
        return AutoModelForImageClassification.from_pretrained(
            backbone_name(args),
            problem_type="multi_label_classification",
            id2label=dict(enumerate(CLASSES)),
            label2id={name: index for index, name in enumerate(CLASSES)},
            ignore_mismatched_sizes=True,
        )

    splits = {}
    for part, count in sizes(args, train=400, validation=120, test=400).items():
        scenes = [make_scene(part, number, args.image_size) for number in range(count)]
        targets = torch.zeros(count, len(CLASSES))
        for target, scene in zip(targets, scenes, strict=True):
            target[scene.labels] = 1
        images = pixels([scene.image for scene in scenes])
        splits[part] = [{"pixel_values": image, "labels": t} for image, t in zip(images, targets, strict=True)]
    recipe = Recipe(build_model, splits, compute_metrics, ("mean_ap", "f1"), start_head=True)
    return run("multi_label", recipe, args)


if __name__ == "__main__":
    main()
