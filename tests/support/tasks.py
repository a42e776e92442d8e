# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Tiny models of tasks other than plain classification, with samples that give each a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_e2vpt import E2VPTConfig

from .models import ENCODER, TEXT, VIT, draw_parameters


SMALL = {**VIT, "num_hidden_layers": 2}
Sample = dict[str, Any]


class Task(NamedTuple):
    """A model class with its config, and what one sample holds."""

    model: str
    config: Callable[[], Any]
    sample: Callable[[torch.Generator], Sample]
    collate: Callable[[list[Sample]], dict[str, Any]]
    head: tuple[str, ...] = ()

    def adapted(self, **settings: Any) -> PeftModel:
        """The model with prompts, drawn with ordinary sizes."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(self.config())
        draw_parameters(model, torch.Generator().manual_seed(1))
        config = {"num_visual_prompts": 4, "num_kv_prompts": 2, "num_segments": 4, "modules_to_save": list(self.head)}
        return get_peft_model(model, E2VPTConfig(**{**config, "seed": 0, **settings}))

    def samples(self, count: int) -> list[Sample]:
        generator = torch.Generator().manual_seed(2)
        return [self.sample(generator) for _ in range(count)]


def stacked(samples: list[Sample]) -> dict[str, Any]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def boxes(samples: list[Sample]) -> dict[str, Any]:
    """Images in one tensor, boxes in a list: every image has as many as it shows."""
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}


def pairs(samples: list[Sample]) -> dict[str, Any]:
    return {**stacked(samples), "return_loss": True}


def image(generator: torch.Generator, *frames: int, size: int = 32) -> Tensor:
    return torch.randn(*frames, 3, size, size, generator=generator)


def with_labels(make: Callable[[torch.Generator], Any], *frames: int) -> Callable[[torch.Generator], Sample]:
    return lambda generator: {"pixel_values": image(generator, *frames), "labels": make(generator)}


def whole(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(high, shape, generator=generator)


def detection(generator: torch.Generator) -> Sample:
    count = int(torch.randint(1, 3, (), generator=generator))
    found = {
        "class_labels": torch.randint(3, (count,), generator=generator),
        "boxes": 0.2 + 0.5 * torch.rand(count, 4, generator=generator),
    }
    return {"pixel_values": image(generator), "labels": found}


def masked(generator: torch.Generator) -> Sample:
    return {
        "pixel_values": image(generator),
        "bool_masked_pos": torch.rand(16, generator=generator) > 0.5,
        "labels": torch.randint(50, (), generator=generator),
    }


def simmim(generator: torch.Generator) -> Sample:
    mask = torch.zeros(16, dtype=torch.bool)
    mask[torch.randperm(16, generator=generator)[:8]] = True
    return {"pixel_values": image(generator), "bool_masked_pos": mask}


def pair(generator: torch.Generator) -> Sample:
    text = torch.randint(3, 50, (6,), generator=generator)
    text[-1] = 2
    return {"pixel_values": image(generator), "input_ids": text}


def caption(generator: torch.Generator) -> Sample:
    return {"pixel_values": image(generator), "labels": torch.randint(3, 50, (6,), generator=generator)}


def _captioner() -> Any:
    encoder = transformers.ViTConfig(**SMALL)
    decoder = transformers.BertConfig(**{**ENCODER, "num_hidden_layers": 1}, intermediate_size=64, vocab_size=50)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def _two_towers(kind: str) -> Callable[[], Any]:
    return lambda: getattr(transformers, kind)(vision_config=SMALL, text_config={**TEXT, "num_hidden_layers": 1})


TASKS = {
    "regression": Task(
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**SMALL, num_labels=1, problem_type="regression"),
        with_labels(lambda generator: torch.randn((), generator=generator)),
        stacked,
        ("classifier",),
    ),
    "multi-label": Task(
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**SMALL, num_labels=3, problem_type="multi_label_classification"),
        with_labels(lambda generator: torch.randint(2, (3,), generator=generator).float()),
        stacked,
        ("classifier",),
    ),
    "segmentation (SegFormer)": Task(
        "SegformerForSemanticSegmentation",
        lambda: transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[4, 1],
            hidden_sizes=[16, 32],
            num_attention_heads=[2, 4],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=3,
        ),
        with_labels(whole(3, 32, 32)),
        stacked,
    ),
    "segmentation (DPT)": Task(
        "DPTForSemanticSegmentation",
        lambda: transformers.DPTConfig(
            **{**SMALL, "num_hidden_layers": 4},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16] * 4,
            fusion_hidden_size=16,
            num_labels=3,
        ),
        with_labels(whole(3, 32, 32)),
        stacked,
    ),
    "detection": Task(
        "YolosForObjectDetection",
        lambda: transformers.YolosConfig(
            **{**SMALL, "image_size": [32, 32]}, num_detection_tokens=5, num_labels=3, auxiliary_loss=False
        ),
        detection,
        boxes,
    ),
    "contrastive": Task("CLIPModel", _two_towers("CLIPConfig"), pair, pairs),
    "sigmoid contrastive": Task("SiglipModel", _two_towers("SiglipConfig"), pair, pairs),
    "masked image modelling": Task(
        "ViTForMaskedImageModeling", lambda: transformers.ViTConfig(**SMALL, encoder_stride=8), simmim, stacked
    ),
    "captioning": Task("VisionEncoderDecoderModel", _captioner, caption, stacked),
    "video classification": Task(
        "VideoMAEForVideoClassification",
        lambda: transformers.VideoMAEConfig(**SMALL, num_frames=4, tubelet_size=2, num_labels=3),
        with_labels(whole(3), 4),
        stacked,
        ("classifier",),
    ),
}
