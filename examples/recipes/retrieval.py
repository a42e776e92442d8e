# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Embedding and retrieval: find an emoji among hundreds as another vendor draws it, on another ground.

```bash
python examples/recipes/retrieval.py --prune
python examples/recipes/retrieval.py --model_name_or_path facebook/dinov2-base --image_size 224
```

The loss is contrastive, as in CLIP: in a batch of pairs every image has to point to its partner, both ways. Emoji to
test on are others than those of the training. Metrics: how often the partner comes first (recall at 1), and how often
the five nearest images of the other vendor agree on the right kind (kNN accuracy).
"""

from __future__ import annotations

from typing import Any

import torch
from common import Recipe, backbone_name, load_processor, parse, run, sizes
from scenes import make_pair, read_part
from torch import Tensor, nn
from transformers import AutoModel, EvalPrediction
from transformers.modeling_outputs import ModelOutput


TEMPERATURE = 0.07  # as in CLIP at the start


class ImageEmbedder(nn.Module):
    """A backbone with a linear projection to unit vectors."""

    def __init__(self, name: str, width: int = 128) -> None:
        super().__init__()
        self.backbone = AutoModel.from_pretrained(name)
        features = 2 * self.backbone.config.hidden_size
        self.head = nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, width, bias=False))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and mean of the others, projected: `(B, width)`, of length 1."""
        hidden = self.backbone(pixel_values).last_hidden_state
        features = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=-1)
        return nn.functional.normalize(self.head(features), dim=-1)

    def forward(self, pixel_values: Tensor, partners: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """Embeds images and their partners, both `(B, 3, side, side)`. `labels` are only passed on to metrics."""
        embeds, partner_embeds = self.embed(torch.cat([pixel_values, partners])).chunk(2)
        similarity = embeds @ partner_embeds.T / TEMPERATURE
        own = torch.arange(len(similarity), device=similarity.device)
        loss = (nn.functional.cross_entropy(similarity, own) + nn.functional.cross_entropy(similarity.T, own)) / 2
        return ModelOutput(loss=loss, embeds=embeds, partner_embeds=partner_embeds)


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """Recall at 1, and how often most of the five nearest images, the partner left out, are of the right kind."""
    embeds, partners = map(torch.as_tensor, outputs.predictions)
    labels = torch.as_tensor(outputs.label_ids)
    similarity = embeds @ partners.T
    own = torch.arange(len(similarity))
    others = similarity.clone().fill_diagonal_(-2)
    neighbours = labels[others.topk(min(5, len(others) - 1)).indices]
    return {
        "recall_at_1": float((similarity.argmax(-1) == own).float().mean()),
        "knn_accuracy": float((neighbours.mode(-1).values == labels).float().mean()),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse("retrieval", image_size=56, arguments=arguments)
    pixels = load_processor(args)
    splits = {}
    for part, count in sizes(args, train=300, validation=70, test=210).items():
        pairs = [make_pair(part, number, args.image_size) for number in range(min(count, len(read_part(part)[0])))]
        images, partners = (pixels([pair[side] for pair in pairs]) for side in (0, 1))
        splits[part] = [
            {"pixel_values": image, "partners": partner, "labels": torch.tensor(pair[2])}
            for image, partner, pair in zip(images, partners, pairs, strict=True)
        ]
    recipe = Recipe(
        lambda: ImageEmbedder(backbone_name(args)), splits, compute_metrics, ("recall_at_1", "knn_accuracy")
    )
    return run("retrieval", recipe, args)


if __name__ == "__main__":
    main()
