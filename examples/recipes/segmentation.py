# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Semantic segmentation: which pixel belongs to which kind of emoji? One linear layer on the patches of a backbone.

```bash
python examples/recipes/segmentation.py --prune
python examples/recipes/segmentation.py --model_name_or_path nvidia/segformer-b0-finetuned-ade-512-512 --image_size 512
```

Labels are `(B, H, W)` class numbers, as for every `AutoModelForSemanticSegmentation`; the loss is the cross-entropy of
pixels, the metric the mean intersection over union.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Recipe, backbone_name, load_processor, parse, run, sizes
from scenes import CLASSES, make_scene
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, Dinov2Backbone, EvalPrediction
from transformers.modeling_outputs import SemanticSegmenterOutput


LABELS = ["ground", *CLASSES]


class PatchSegmenter(nn.Module):
    """A backbone with a linear head on its last feature map."""

    def __init__(self, name: str, num_labels: int) -> None:
        super().__init__()
        self.backbone = Dinov2Backbone.from_pretrained(name, out_indices=[-1])
        width = self.backbone.channels[-1]
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, num_labels, 1))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SemanticSegmenterOutput:
        """Returns logits `(B, num_labels, h, w)`, a row and a column a patch."""
        logits = self.head(self.backbone(pixel_values).feature_maps[-1])
        loss = None if labels is None else nn.functional.cross_entropy(enlarge(logits, labels), labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits)


def enlarge(logits: Tensor, labels: Tensor) -> Tensor:
    """Scales logits to the size of the labels."""
    return nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)


def predict(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """The class of every pixel: what `compute_metrics` gets instead of logits, which are larger."""
    return enlarge(logits[0] if isinstance(logits, tuple) else logits, labels).argmax(1)


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """Mean intersection over union of the classes that occur, and the share of pixels that are right."""
    answers, truth = torch.as_tensor(outputs.predictions), torch.as_tensor(outputs.label_ids)
    unions = [((answers == label) | (truth == label)).sum() for label in range(len(LABELS))]
    shared = [((answers == label) & (truth == label)).sum() for label in range(len(LABELS))]
    of_class = [float(part / whole) for part, whole in zip(shared, unions, strict=True) if whole > 0]
    return {"mean_iou": sum(of_class) / len(of_class), "pixel_accuracy": float((answers == truth).float().mean())}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse("segmentation", image_size=98, arguments=arguments)
    pixels = load_processor(args)

    def build_model() -> nn.Module:
        if args.model_name_or_path is None:
            return PatchSegmenter(backbone_name(args), len(LABELS))
        return AutoModelForSemanticSegmentation.from_pretrained(
            args.model_name_or_path, num_labels=len(LABELS), ignore_mismatched_sizes=True
        )

    splits = {}
    for part, count in sizes(args, train=240, validation=60, test=200).items():
        scenes = [make_scene(part, number, args.image_size) for number in range(count)]
        splits[part] = [
            {"pixel_values": image, "labels": torch.from_numpy(scene.mask)}
            for scene, image in zip(scenes, pixels([scene.image for scene in scenes]), strict=True)
        ]
    recipe = Recipe(build_model, splits, compute_metrics, ("mean_iou", "pixel_accuracy"), preprocess_logits=predict)
    return run("segmentation", recipe, args)


if __name__ == "__main__":
    main()
