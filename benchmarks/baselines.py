# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The models that the benchmarks measure side by side, all on one ViT with random weights."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from peft_e2vpt import E2VPTConfig


BACKBONES = {
    "tiny": {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80},
    "vit-s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-b": {},
    "vit-l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "vit-h": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120},
}
# "class token" trains it and the head: the least that a step can cost whose gradient reaches the first layer.
METHODS = ("plain", "class token", "e2vpt", "inserted", "lora", "full")
PLAIN_FORWARD = ("class token", "full")


class InsertedPrompts(nn.Module):
    """VPT-Deep as its authors wrote it: prompts are tokens of the sequence, replaced before every block."""

    def __init__(self, model: ViTForImageClassification, num_prompts: int) -> None:
        super().__init__()
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        self.model = model
        width = model.config.hidden_size
        self.prompts = nn.ParameterList(
            torch.empty(num_prompts, width).uniform_(-0.06, 0.06) for _ in model.vit.layers
        )
        for block, prompts in zip(model.vit.layers, self.prompts, strict=True):
            block.register_forward_pre_hook(lambda module, args, prompts=prompts: self._replace(args, prompts))
        model.vit.layers[-1].register_forward_hook(lambda module, args, output: self._cut(output))

    def _replace(self, args: tuple[Any, ...], prompts: Tensor) -> tuple[Any, ...]:
        hidden, patches = args[0], self.num_patches
        prompts = prompts.expand(len(hidden), -1, -1)
        return (torch.cat([hidden[:, :1], prompts, hidden[:, -patches:]], dim=1), *args[1:])

    def _cut(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :1], hidden[:, -self.num_patches :]], dim=1)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.model.config.image_size // self.model.config.patch_size) ** 2

    def forward(self, **batch: Any) -> Any:
        """Runs the model."""
        return self.model(**batch)


def build(
    method: str,
    backbone: str,
    image_size: int,
    num_visual_prompts: int,
    num_kv_prompts: int,
    visual_prompt_dropout: float = 0.1,
) -> nn.Module:
    """Builds a model in float32 with 100 classes; the backbone's weights are the same for every method."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=image_size, num_labels=100, **BACKBONES[backbone])
    model = ViTForImageClassification(config)
    if method == "plain":
        return model.requires_grad_(False)
    if method == "full":
        return model
    if method == "class token":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        model.vit.embeddings.cls_token.requires_grad_(True)
        return model
    if method == "inserted":
        return InsertedPrompts(model, num_visual_prompts)
    if method == "lora":
        return get_peft_model(
            model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        )
    config = E2VPTConfig(
        num_visual_prompts=num_visual_prompts,
        num_kv_prompts=num_kv_prompts,
        visual_prompt_dropout=visual_prompt_dropout,
    )
    return get_peft_model(model, config)
