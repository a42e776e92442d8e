# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a task model trains besides prompts: `find_heads`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .sites import AttentionSite


def find_heads(model: nn.Module, sites: list[AttentionSite]) -> list[str]:
    """Names the head of a task model: its direct children with weights that hold no self-attention of a backbone.

    A model without a task (its class name has no "For", as `ViTModel`) has no head: the list is empty. Neither whole
    towers (a language model, a Q-Former) nor the output embeddings of a language model are heads.
    """
    if isinstance(model, PreTrainedModel) and type(model).__name__ == "TimmWrapperForImageClassification":
        return ["timm_model." + name for name in _timm_heads(model.timm_model)]
    if "For" not in type(model).__name__:
        return []
    backbones = {site.name.split(".")[0] for site in sites}
    language_head = getattr(model, "lm_head", None)
    return [
        name
        for name, child in model.named_children()
        if name not in backbones
        and child is not language_head
        and any(True for _ in child.parameters())
        and not any(isinstance(module, PreTrainedModel) for module in child.modules())
    ]


def _timm_heads(model: Any) -> list[str]:
    """Names the classifiers of a timm model, by timm's own account."""
    classifiers = model.default_cfg["classifier"]
    names = [classifiers] if isinstance(classifiers, str) else list(classifiers)
    modules = dict(model.named_modules())
    return [name for name in names if name in modules and any(True for _ in modules[name].parameters())]
