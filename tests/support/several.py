# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A model with several trained adapters that differ in everything that adapters may differ in."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from tests.support.adapted import config_of, predict, prune, trained
from tests.support.models import build


BASE = "__base__"
ALIKE: dict[str, dict[str, Any]] = {name: {"seed": seed} for seed, name in enumerate("abc")}
DIFFERENT: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"num_visual_prompts": 5, "num_kv_prompts": 1, "kv_prompt_position": "after", "seed": 1},
    "pruned": {"num_visual_prompts": 4, "share_kv_prompts": False, "seed": 2},
    "kv": {"num_visual_prompts": 0, "num_kv_prompts": 4, "seed": 3},
    "zeroed": {"pruned_prompts": "zero", "num_segments": 8, "share_kv_prompts_across_layers": False, "seed": 4},
}


def add(model: PeftModel, name: str, settings: dict[str, Any]) -> None:
    """Adds an adapter whose prompts and head have values as after a training."""
    model.add_adapter(name, config_of(**settings))
    model.set_adapter(name)
    trained(model)
    if name in ("pruned", "zeroed"):
        prune(model, name)


def with_adapters(name: str, adapters: dict[str, dict[str, Any]], **of_base: Any) -> tuple[PeftModel, Tensor]:
    """The tiny model `name` with these adapters, the first of them active, and as many images and one more."""
    base, _ = build(name, **of_base)
    first, *others = adapters
    model = trained(get_peft_model(base, config_of(**adapters[first]), first))
    for other in others:
        add(model, other, adapters[other])
    model.set_adapter(first)
    generator = torch.Generator().manual_seed(5)
    dtype = next(base.parameters()).dtype
    return model.eval(), torch.randn(len(adapters) + 1, 3, 32, 32, generator=generator).to(dtype)


def one_by_one(model: PeftModel, pixels: Tensor, adapter_names: list[str], **inputs: Tensor) -> Tensor:
    """The answers of separate forward passes, one per adapter."""
    active, answers = model.active_adapter, {}
    for name in dict.fromkeys(adapter_names):
        if name == BASE:
            with model.disable_adapter():
                answers[name] = predict(model, {"pixel_values": pixels, **inputs})
        else:
            model.set_adapter(name)
            answers[name] = predict(model, {"pixel_values": pixels, **inputs})
    model.set_adapter(active)
    return torch.stack([answers[name][sample] for sample, name in enumerate(adapter_names)])


@torch.no_grad()
def at_once(model: PeftModel, pixels: Tensor, adapter_names: list[str], **inputs: Tensor) -> Tensor:
    """The answers of one forward pass of a mixed batch."""
    answers: Tensor = model(pixel_values=pixels, adapter_names=adapter_names, **inputs).logits
    return answers
