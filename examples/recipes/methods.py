# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The methods that a recipe compares: a frozen backbone with a trained head, LoRA, E2VPT, E2VPT pruned."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from peft_e2vpt import E2VPTConfig, PruneRewindCallback
from peft_e2vpt.backbones.heads import find_heads
from peft_e2vpt.backbones.sites import find_attention_sites
from peft_e2vpt.hub import facts_of, write_card


# learning rate of each method, and how many times the epochs that were asked for it trains
LEARNING_RATES = {"frozen-head": 5e-3, "lora": 1e-3, "e2vpt": 2e-3, "e2vpt-pruned": 2e-3}
LENGTHS = {"frozen-head": 2, "lora": 1, "e2vpt": 1, "e2vpt-pruned": 2}
LORA_TARGETS = ["q_proj", "v_proj", "query", "value"]  # the names of several architectures


def head_names(model: nn.Module) -> list[str]:
    """Names what a model trains besides prompts, as E2VPT finds it."""
    return find_heads(model, find_attention_sites(model))


def prepare(method: str, model: nn.Module, layers: list[int] | None, seed: int) -> nn.Module:
    """Freezes the backbone and adds what `method` trains besides the head, in `layers` (`None`: in all)."""
    if method.startswith("e2vpt"):
        config = E2VPTConfig(visual_prompt_dropout=0.0, layers_to_transform=layers, seed=seed)
        return get_peft_model(model, config)  # finds the head as well
    if method == "lora":
        heads = head_names(model)
        config = LoraConfig(r=8, target_modules=LORA_TARGETS, layers_to_transform=layers, modules_to_save=heads)
        return get_peft_model(model, config)
    model.requires_grad_(False)
    for head in head_names(model):
        model.get_submodule(head).requires_grad_(True)
    return model


def callbacks_of(method: str, reduced: bool) -> list[TrainerCallback]:
    """What the Trainer needs besides: for the pruned method the callback, which searches on the validation set."""
    if method != "e2vpt-pruned":
        return []
    tokens, segments = ((0.5,), (0.5,)) if reduced else ((0.2, 0.4, 0.6, 0.8), (0.25, 0.5))
    return [PruneRewindCallback(token_ratios=tokens, segment_ratios=segments)]


def save_card(folder: str, model: nn.Module, results: dict[str, float]) -> None:
    """Writes the model card of a saved adapter again, with its results."""
    write_card(folder, facts_of(model, model.peft_config["default"], "default"), metrics=results)


def state_of_head(model: nn.Module, heads: list[str]) -> dict[str, torch.Tensor]:
    """The values of a trained head, buffers too, to start another model's head from."""
    prefixes = tuple(f"{head}." for head in heads)
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(prefixes)}
