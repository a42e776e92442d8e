# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Tiny vision models of every family that E2VPT knows, built from configs: hidden size 32, 4 heads, 32-pixel images.

All parameters are drawn anew, with ordinary sizes: transformers starts biases and position biases at 0 and layer
scales at 1e-5, which would hide a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn


BATCH = 2
NUM_LABELS = 5
PATCHES = {"image_size": 32, "patch_size": 8}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
VIT = {**ENCODER, "intermediate_size": 64, **PATCHES}
DINOV2 = {**ENCODER, "mlp_ratio": 2, **PATCHES}
SIGLIP2 = {**ENCODER, "intermediate_size": 64, "num_patches": 16, "patch_size": 8}
BEIT = {**VIT, "drop_path_rate": 0.0}
SWIN = {  # 16 and 4 windows, shifted in every second block
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
TEXT = {**ENCODER, "intermediate_size": 64, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def pixels(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator).to(dtype)}


def padded_patches(generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """16 patches an image, of which the second image fills only 12."""
    mask = torch.ones(BATCH, 16, dtype=torch.long)
    mask[1, 12:] = 0
    return {
        "pixel_values": torch.randn(BATCH, 16, 3 * 8 * 8, generator=generator).to(dtype),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }


class Family(NamedTuple):
    model: str
    config: str
    settings: dict[str, Any]
    inputs: Callable[[torch.Generator, torch.dtype], dict[str, Tensor]] = pixels


def two_towers(vision: dict[str, Any]) -> dict[str, Any]:
    return {"vision_config": vision, "text_config": TEXT}


FAMILIES = {
    "vit": Family("ViTForImageClassification", "ViTConfig", VIT),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", VIT),
    "deit_with_teacher": Family("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT),
    "msn": Family("ViTMSNForImageClassification", "ViTMSNConfig", VIT),
    "ijepa": Family("IJepaForImageClassification", "IJepaConfig", VIT),
    "dinov2": Family("Dinov2ForImageClassification", "Dinov2Config", DINOV2),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {**DINOV2, "num_register_tokens": 2}
    ),
    "dinov3": Family("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 2}),
    "beit_relative_bias": Family(
        "BeitForImageClassification", "BeitConfig", {**BEIT, "use_relative_position_bias": True}
    ),
    "beit_shared_bias": Family(
        "BeitForImageClassification", "BeitConfig", {**BEIT, "use_shared_relative_position_bias": True}
    ),
    "beit_absolute_positions": Family(
        "BeitForImageClassification", "BeitConfig", {**BEIT, "use_absolute_position_embeddings": True}
    ),
    "clip": Family("CLIPForImageClassification", "CLIPConfig", two_towers(VIT)),
    "clip_vision": Family("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "siglip": Family("SiglipForImageClassification", "SiglipConfig", two_towers(VIT)),
    "siglip2": Family("Siglip2ForImageClassification", "Siglip2Config", two_towers(SIGLIP2), padded_patches),
    "swin": Family("SwinForImageClassification", "SwinConfig", SWIN),
}
NAMES = tuple(FAMILIES)


@torch.no_grad()
def draw_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Gives every parameter of `model` a new value of ordinary size."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 0:  # a temperature
            continue
        if parameter.dim() == 1:
            parameter.copy_(0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise)
        elif parameter.dim() == 3:  # class tokens and positions
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> tuple[Any, dict[str, Tensor]]:
    """Builds the model `name` in eval mode, and a batch of two inputs for it; equal seeds give equal values."""
    family = FAMILIES[name]
    if attn_implementation == "sdpa" and not getattr(transformers, family.model)._supports_sdpa:
        attn_implementation = "eager"  # Swin before transformers 5.9
    config = getattr(transformers, family.config)(
        **family.settings, num_labels=NUM_LABELS, attn_implementation=attn_implementation
    )
    model = getattr(transformers, family.model)(config)
    generator = torch.Generator().manual_seed(seed)
    draw_parameters(model, generator)
    return model.to(dtype).eval(), family.inputs(generator, dtype)


def output_of(output: Any) -> Tensor:
    """What a model is used for: its logits, or the last hidden state where it has no head."""
    return output.logits if "logits" in output else output.last_hidden_state
