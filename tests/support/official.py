# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Tasks with tiny models and noise, put together as the example scripts of transformers put them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import EvalPrediction

from tests.support.models import SWIN, TEXT, VIT


SIDE = 32
NAMES = ("cat", "dog", "bird")
Sample = dict[str, Any]
STACKED = ("pixel_values", "pixel_mask", "input_ids", "attention_mask")


@dataclass
class Script:
    """What one example script does before it hands everything to a `Trainer` or to its own loop.

    Attributes:
        auto_class: name of the class whose `from_pretrained` the script calls.
        config: builds the tiny checkpoint, which has two classes where the script asks for three.
        for_model: what the script passes to `from_pretrained`.
        sample: makes one sample, from a generator.
        collate: as the Trainer takes it.
        compute_metrics: as the Trainer takes it.
        arguments: settings of `TrainingArguments` that the script needs.
    """

    auto_class: str
    config: Callable[[], transformers.PretrainedConfig]
    for_model: dict[str, Any]
    sample: Callable[[torch.Generator], Sample]
    collate: Callable[[list[Sample]], dict[str, Any]]
    compute_metrics: Callable[..., dict[str, float]] | None
    arguments: dict[str, Any] = field(default_factory=dict)

    def write_checkpoint(self, folder: Path) -> str:
        """Saves a checkpoint with other classes, as a script meets it on the Hub."""
        torch.manual_seed(0)
        getattr(transformers, self.auto_class).from_config(self.config()).save_pretrained(folder)
        return str(folder)

    def load_model(self, checkpoint: str) -> Any:
        """The model of the script: backbone from the checkpoint, head for its own classes."""
        load = getattr(transformers, self.auto_class).from_pretrained
        return load(checkpoint, **self.for_model, ignore_mismatched_sizes=True)

    def dataset(self, count: int, seed: int) -> list[Sample]:
        """Samples, the same for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        return [self.sample(generator) for _ in range(count)]


def stack(samples: list[Sample]) -> dict[str, Any]:
    """Stacks what has the same shape in every sample; labels of dense tasks stay lists."""
    return {
        name: torch.stack([sample[name] for sample in samples])
        if name in STACKED
        else [sample[name] for sample in samples]
        for name in samples[0]
    }


def pixels(generator: torch.Generator) -> Tensor:
    return torch.randn(3, SIDE, SIDE, generator=generator)


# ------------------------------------------------------------------------------------- image classification


def labelled_image(generator: torch.Generator) -> Sample:
    return {"pixel_values": pixels(generator), "label": int(torch.randint(3, (), generator=generator))}


def collate_classes(samples: list[Sample]) -> dict[str, Tensor]:
    labels = torch.tensor([sample["label"] for sample in samples])
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}


def accuracy(outputs: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(outputs.predictions, axis=1) == outputs.label_ids).mean())}


# the script stores the numbers of classes as strings, on both sides
STRING_KEYS = {
    "id2label": {str(index): name for index, name in enumerate(NAMES)},
    "label2id": {name: str(index) for index, name in enumerate(NAMES)},
}
INTEGER_KEYS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}


# ------------------------------------------------------------------------------------- semantic segmentation


def segmented_image(generator: torch.Generator) -> Sample:
    labels = torch.randint(3, (SIDE, SIDE), generator=generator)
    labels[:2] = 255  # pixels that do not count
    return {"pixel_values": pixels(generator), "labels": labels}


def collate_maps(samples: list[Sample]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels")}


@torch.no_grad()
def mean_iou(outputs: EvalPrediction) -> dict[str, float]:
    """Scales the logits up to the labels, then compares, 255 left out."""
    truth = torch.from_numpy(outputs.label_ids)
    logits = torch.nn.functional.interpolate(torch.from_numpy(outputs.predictions), truth.shape[-2:], mode="bilinear")
    answers, counted = logits.argmax(1), truth != 255
    of_class = []
    for label in range(3):
        found, wanted = (answers == label) & counted, truth == label
        of_class.append(float((found & wanted).sum() / (found | wanted).sum()))
    return {"mean_iou": float(np.mean(of_class))}


# ------------------------------------------------------------------------------------------ object detection


def image_with_boxes(generator: torch.Generator) -> Sample:
    count = int(torch.randint(1, 4, (), generator=generator))
    labels = {
        "class_labels": torch.randint(3, (count,), generator=generator),
        "boxes": 0.3 + 0.2 * torch.rand(count, 4, generator=generator),
        "orig_size": torch.tensor([SIDE, SIDE]),
    }
    return {"pixel_values": pixels(generator), "labels": labels}


def found_boxes(outputs: EvalPrediction, threshold: float) -> dict[str, float]:
    """Batches come one by one, with a dict of losses before logits and boxes."""
    shares = []
    for batch, targets in zip(outputs.predictions, outputs.label_ids, strict=True):
        logits, boxes = torch.as_tensor(batch[1]), torch.as_tensor(batch[2])
        scores = logits.softmax(-1)[..., :-1].max(-1).values
        for of_image, score, target in zip(boxes, scores, targets, strict=True):
            distances = torch.cdist(torch.as_tensor(target["boxes"]), of_image[score > threshold], p=1)
            shares.append(float((distances.min(-1).values < 0.5).float().mean()))
    return {"map": float(np.mean(shares))}


# ------------------------------------------------------------------------------------- instance segmentation


def image_with_masks(generator: torch.Generator) -> Sample:
    count = int(torch.randint(1, 4, (), generator=generator))
    return {
        "pixel_values": pixels(generator),
        "class_labels": torch.randint(3, (count,), generator=generator),
        "mask_labels": (torch.rand(count, SIDE, SIDE, generator=generator) < 0.5).float(),
        "pixel_mask": torch.ones(SIDE, SIDE, dtype=torch.long),
    }


class MaskEvaluator:
    """Gets one batch after the other, and answers after the last: `batch_eval_metrics=True`."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def __call__(self, outputs: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        masks, _ = outputs.label_ids
        for queries, wanted in zip(outputs.predictions[1], masks, strict=True):
            found = torch.nn.functional.interpolate(queries[None].float(), (SIDE, SIDE))[0] > 0
            overlap = torch.einsum("qhw,nhw->nq", found.float(), wanted.float()).max(-1).values
            self.shares.append(float((overlap / wanted.sum((-1, -2))).mean()))
        if not compute_result:
            return {}
        mean, self.shares = float(np.mean(self.shares)), []
        return {"map": mean}


# ------------------------------------------------------------------------------------------ CLIP-like training


def captioned_image(generator: torch.Generator) -> Sample:
    tokens = torch.randint(3, 50, (6,), generator=generator)
    return {"pixel_values": pixels(generator), "input_ids": tokens, "attention_mask": torch.ones(6, dtype=torch.long)}


def collate_pairs(samples: list[Sample]) -> dict[str, Any]:
    return {**stack(samples), "return_loss": True}


# ----------------------------------------------------------------------------------------------------- scripts


def vit() -> transformers.PretrainedConfig:
    return transformers.ViTConfig(**VIT, num_labels=2)


def segformer() -> transformers.PretrainedConfig:
    return transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=2,
    )


def yolos() -> transformers.PretrainedConfig:
    return transformers.YolosConfig(**{**VIT, "image_size": [SIDE, SIDE]}, num_detection_tokens=5, num_labels=2)


def detr(backbone: transformers.PretrainedConfig | None = None) -> transformers.PretrainedConfig:
    """DETR on a Swin Transformer, unless another backbone is given."""
    backbone = backbone or transformers.SwinConfig(**SWIN, out_features=["stage2"])
    return transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
        num_labels=2,
    )


def mask2former() -> transformers.PretrainedConfig:
    swin = {**SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "image_size": SIDE}
    return transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**swin, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        train_num_points=16,
        num_labels=2,
    )


def dual_encoder() -> transformers.PretrainedConfig:
    text = {**TEXT, "num_hidden_layers": 2, "max_position_embeddings": 8}
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**VIT), transformers.BertConfig(**text), projection_dim=16
    )


LISTS_OF_BATCHES = {"eval_do_concat_batches": False}
SCRIPTS = {
    "image_classification": Script(
        "AutoModelForImageClassification", vit, STRING_KEYS, labelled_image, collate_classes, accuracy
    ),
    "semantic_segmentation": Script(
        "AutoModelForSemanticSegmentation", segformer, INTEGER_KEYS, segmented_image, collate_maps, mean_iou
    ),
    "object_detection_detr": Script(
        "AutoModelForObjectDetection",
        detr,
        INTEGER_KEYS,
        image_with_boxes,
        stack,
        partial(found_boxes, threshold=0.0),
        LISTS_OF_BATCHES,
    ),
    "object_detection_yolos": Script(
        "AutoModelForObjectDetection",
        yolos,
        INTEGER_KEYS,
        image_with_boxes,
        stack,
        partial(found_boxes, threshold=0.0),
        LISTS_OF_BATCHES,
    ),
    "instance_segmentation": Script(
        "AutoModelForUniversalSegmentation",
        mask2former,
        INTEGER_KEYS,
        image_with_masks,
        stack,
        MaskEvaluator(),
        {**LISTS_OF_BATCHES, "batch_eval_metrics": True},
    ),
    "contrastive_image_text": Script("AutoModel", dual_encoder, {}, captioned_image, collate_pairs, None),
}


__all__ = ["NAMES", "SCRIPTS", "Script"]
