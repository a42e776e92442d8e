# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Video classification: how does an emoji move over a photograph? An image backbone on frames, one head on them all.

```bash
python examples/recipes/video.py --prune
python examples/recipes/video.py --model_name_or_path MCG-NJU/videomae-base --image_size 224
```

Clips are `(B, frames, 3, side, side)`, as for every `AutoModelForVideoClassification`. One frame alone tells nothing
about the motion: left, right, up, down, nearer, farther.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Recipe, backbone_name, load_processor, parse, run, sizes
from scenes import MOTIONS, make_clip
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForVideoClassification, EvalPrediction
from transformers.modeling_outputs import ImageClassifierOutput


FRAMES = 4


class FrameClassifier(nn.Module):
    """A backbone that sees one frame at a time, with a linear head on the class tokens of all frames."""

    def __init__(self, name: str, num_labels: int) -> None:
        super().__init__()
        self.backbone = AutoModel.from_pretrained(name)
        features = FRAMES * self.backbone.config.hidden_size
        self.head = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, num_labels))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Returns logits `(B, num_labels)` of clips `(B, FRAMES, 3, side, side)`."""
        tokens = self.backbone(pixel_values.flatten(0, 1)).last_hidden_state[:, 0]
        logits = self.head(tokens.unflatten(0, pixel_values.shape[:2]).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """Accuracy; guessing is right once in six times."""
    return {"accuracy": float((outputs.predictions.argmax(-1) == outputs.label_ids).mean())}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse("video", image_size=56, arguments=arguments)
    pixels = load_processor(args)

    def build_model() -> nn.Module:
        if args.model_name_or_path is None:
            return FrameClassifier(backbone_name(args), len(MOTIONS))
        return AutoModelForVideoClassification.from_pretrained(
            args.model_name_or_path, num_labels=len(MOTIONS), num_frames=FRAMES, ignore_mismatched_sizes=True
        )

    splits = {}
    for part, count in sizes(args, train=240, validation=60, test=240).items():
        clips = [make_clip(part, number, args.image_size, FRAMES) for number in range(count)]
        splits[part] = [
            {"pixel_values": pixels(frames).reshape(FRAMES, 3, *[args.image_size] * 2), "labels": torch.tensor(label)}
            for frames, label in clips
        ]
    return run("video", Recipe(build_model, splits, compute_metrics, ("accuracy",)), args)


if __name__ == "__main__":
    main()
