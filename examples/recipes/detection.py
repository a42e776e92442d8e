# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Object detection: where are the emoji, and of which kind? Every patch of a backbone answers for the object it holds.

```bash
pip install pycocotools
python examples/recipes/detection.py --prune
python examples/recipes/detection.py --model_name_or_path hustvl/yolos-tiny --image_size 512
```

Labels are those of every `AutoModelForObjectDetection`: for each image a `dict` with `class_labels` and `boxes`
(centre, width and height as shares of the image). The metric is COCO's average precision.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from common import Recipe, backbone_name, load_processor, parse, run, sizes
from scenes import CLASSES, make_scene
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, Dinov2Backbone, EvalPrediction
from transformers.modeling_outputs import ModelOutput


class PatchDetector(nn.Module):
    """A backbone with a linear head: each patch says what object has its centre there, if any, and its box."""

    def __init__(self, name: str, num_labels: int) -> None:
        super().__init__()
        self.backbone = Dinov2Backbone.from_pretrained(name, out_indices=[-1])
        width = self.backbone.channels[-1]
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, num_labels + 1 + 4, 1))

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> ModelOutput:
        """Returns logits `(B, patches, num_labels + 1)`, the last for no object, and boxes `(B, patches, 4)`."""
        answers = self.head(self.backbone(pixel_values).feature_maps[-1])
        rows, columns = answers.shape[-2:]
        logits, raw = answers.flatten(2).transpose(1, 2).split([answers.shape[1] - 4, 4], dim=-1)
        x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
        corners = torch.stack([x.flatten(), y.flatten()], dim=-1).to(raw)
        centres = (corners + raw[..., :2].sigmoid()) / corners.new_tensor([columns, rows])
        boxes = torch.cat([centres, (raw[..., 2:] - 1).sigmoid()], dim=-1)
        loss = None if labels is None else detection_loss(logits, boxes, labels, rows, columns)
        return ModelOutput(loss=loss, logits=logits, pred_boxes=boxes)


def detection_loss(logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], rows: int, columns: int) -> Tensor:
    """Cross-entropy of every patch, and the L1 distance of the boxes of those that hold the centre of an object."""
    wanted = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)
    distances = []
    for index, objects in enumerate(labels):
        x, y = (objects["boxes"][:, :2] * objects["boxes"].new_tensor([columns, rows])).long().unbind(-1)
        patches = y * columns + x
        wanted[index, patches] = objects["class_labels"]
        distances.append((boxes[index, patches] - objects["boxes"]).abs().sum(-1))
    weight = logits.new_tensor([1.0] * (logits.shape[-1] - 1) + [0.2])  # most patches hold no object
    classes = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, weight=weight)
    return classes + 5 * torch.cat(distances).mean()


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the images; the labels stay a list, for images hold different numbers of objects."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"] for sample in samples],
    }


def keep_logits_and_boxes(outputs: Any, labels: Any) -> tuple[Tensor, ...]:
    """Of what a detector returns: models of transformers put a dict of losses in front, and features behind."""
    return tuple(output for output in outputs if isinstance(output, Tensor))[:2]


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """COCO's average precision: mean over overlaps of .5 to .95, and that at .5."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    batches = zip(outputs.predictions, outputs.label_ids, strict=True)
    images = [image for (logits, boxes), labels in batches for image in zip(logits, boxes, labels, strict=True)]
    truth, found = [], []
    for number, (logits, boxes, objects) in enumerate(images, start=1):
        for label, box in zip(objects["class_labels"], objects["boxes"], strict=True):
            row = {"id": len(truth) + 1, "image_id": number, "category_id": int(label), "iscrowd": 0}
            truth.append({**row, "bbox": corner_box(box), "area": float(1e6 * box[2] * box[3])})
        scores, labels = torch.as_tensor(logits).softmax(-1)[:, :-1].max(-1)
        for score, label, box in zip(scores.tolist(), labels.tolist(), boxes, strict=True):
            found.append({"image_id": number, "category_id": label, "score": score, "bbox": corner_box(box)})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco = COCO()
        coco.dataset = {
            "images": [{"id": number + 1} for number in range(len(images))],
            "categories": [{"id": label} for label in range(len(CLASSES))],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"ap": float(evaluation.stats[0]), "ap50": float(evaluation.stats[1])}


def corner_box(box: np.ndarray) -> list[float]:
    """The upper left corner, width and height, in thousandths of the image."""
    x, y, width, height = (1000 * float(value) for value in box)
    return [x - width / 2, y - height / 2, width, height]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse("detection", image_size=98, arguments=arguments)
    args.eval_do_concat_batches = False  # labels of several batches do not fit into one array
    pixels = load_processor(args)

    def build_model() -> nn.Module:
        if args.model_name_or_path is None:
            return PatchDetector(backbone_name(args), len(CLASSES))
        return AutoModelForObjectDetection.from_pretrained(
            args.model_name_or_path, num_labels=len(CLASSES), ignore_mismatched_sizes=True
        )

    splits = {}
    for part, count in sizes(args, train=240, validation=60, test=200).items():
        scenes = [make_scene(part, number, args.image_size) for number in range(count)]
        splits[part] = [
            {
                "pixel_values": image,
                "labels": {
                    "class_labels": torch.tensor(scene.labels),
                    "boxes": torch.tensor(scene.boxes, dtype=torch.float32),
                },
            }
            for scene, image in zip(scenes, pixels([scene.image for scene in scenes]), strict=True)
        ]
    recipe = Recipe(build_model, splits, compute_metrics, ("ap50", "ap"), collate, keep_logits_and_boxes)
    return run("detection", recipe, args)


if __name__ == "__main__":
    main()
