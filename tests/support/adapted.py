# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Small adapted models, and what the tests ask of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_e2vpt import E2VPTConfig, E2VPTLayer
from tests.support.models import build, output_of


SMALL: dict[str, Any] = {
    "num_visual_prompts": 3,
    "num_kv_prompts": 2,
    "num_segments": 4,
    "visual_prompt_dropout": 0.0,
    "seed": 0,
}
# transformers before 5.22 or so calls it by another name
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(PreTrainedModel, f"{name}_enable")
)
# torch 2.6 warns of checkpoints inside checkpoints too, which Swin has
SEES_NESTED_CHECKPOINTS = not torch.__version__.startswith("2.6.")
WITHOUT_GRADIENT = ("error" if SEES_NESTED_CHECKPOINTS else "ignore") + ":None of the inputs have requires_grad"
SHALLOW = {"visual_prompt_mode": "shallow"}
KV_ONLY = {"num_visual_prompts": 0}


def config_of(**settings: Any) -> E2VPTConfig:
    return E2VPTConfig(**{**SMALL, **settings})


def adapt(name: str = "vit", adapter_name: str = "default", **settings: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """Adapts the tiny model `name`; its prompts and its head have values as after a training."""
    of_base = {key: settings.pop(key) for key in ("dtype", "attn_implementation") if key in settings}
    base, inputs = build(name, **of_base)
    return trained(get_peft_model(base, config_of(**settings), adapter_name)).eval(), inputs


def save_with_base(folder: Path, **settings: Any) -> tuple[nn.Module, PeftModel, dict[str, Tensor]]:
    """Saves a tiny ViT in `base` and an adapter in `adapter`, and gives the model, an adapted copy and inputs."""
    base, inputs = build("vit")
    base.save_pretrained(folder / "base")
    base = transformers.ViTForImageClassification.from_pretrained(folder / "base")
    model = trained(get_peft_model(copy.deepcopy(base), config_of(**settings)))
    model.save_pretrained(folder / "adapter")
    return base, model, inputs


@torch.no_grad()
def trained(model: PeftModel) -> PeftModel:
    """Gives everything trainable another value, as a training would."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in trainable(model):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def checkpoint_activations(model: nn.Module, kwargs: dict[str, bool] | None = None) -> None:
    getattr(model, f"{CHECKPOINTING}_enable")(kwargs)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def predict(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return output_of(model(**inputs))


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradient of a loss with respect to everything trainable; dropout and jitter are those of one seed."""
    torch.manual_seed(0)
    model.zero_grad()
    output_of(model(**inputs)).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in trainable(model)}


def layers_of(model: nn.Module) -> list[E2VPTLayer]:
    """The prompt layers in the order of their numbers."""
    return sorted((m for m in model.modules() if isinstance(m, E2VPTLayer)), key=lambda layer: layer.index)


def prune(model: nn.Module, adapter_name: str = "default") -> None:
    """Prunes prompt 0 of every layer, all prompts of the first layer, and segment 1 of prompt 2."""
    for index, layer in enumerate(layers_of(model)):
        if adapter_name in layer.e2vpt_visual_prompts:
            token = torch.ones_like(layer.e2vpt_token_gates[adapter_name])
            segment = torch.ones_like(layer.e2vpt_segment_gates[adapter_name])
            token[: len(token) if index == 0 else 1] = 0
            segment[2, 1] = 0
            layer.set_gates(adapter_name, token, segment)
