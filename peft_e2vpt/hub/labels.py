# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What an adapter has to know of the model around it, so that it can be built again: classes, base model, task."""

from __future__ import annotations

import warnings

from torch import nn

from ..tuner.config import E2VPTConfig
from ..tuner.prompt_layers import CONTAINER, PromptLayers
from ..tuner.summary import summarise
from .card import AdapterFacts, task_of


def _adapted(model: nn.Module) -> nn.Module:
    """The adapted model inside of what wraps it."""
    for module in model.modules():
        if isinstance(dict(module.named_children()).get(CONTAINER), PromptLayers):
            return module
    raise ValueError(f"{type(model).__name__} has no E2VPT adapter.")


def labels_of(model: nn.Module) -> list[str] | None:
    """Names of the classes of a model in the order of its logits; `None` where it is no classifier."""
    config = getattr(model, "config", None)
    if config is None or task_of(model) is None:
        return None
    names = config.id2label or {}  # PVT has a number of classes without names
    return [str(names.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]


def are_generic(labels: list[str]) -> bool:
    """Whether labels are those that transformers gives to classes without names."""
    return labels == [f"LABEL_{index}" for index in range(len(labels))]


def describe(model: nn.Module, config: E2VPTConfig, adapter_name: str) -> None:
    """Tells the config of an adapter the classes of its model, and what its card will say.

    Labels that came with the adapter stay where the model has only generic ones.
    """
    base = _adapted(model)
    labels = labels_of(base)
    known = config.labels
    if labels is None or known is None or len(known) != len(labels) or not are_generic(labels):
        config.labels = labels
    name: str = getattr(base, "name_or_path", None) or config.base_model_name_or_path or ""
    config.card = AdapterFacts(summarise(base, adapter_name), name, task_of(base))


def warn_of_other_labels(model: nn.Module, config: E2VPTConfig) -> None:
    """Warns where an adapter brings other names of classes than its model has."""
    labels, known = labels_of(model), config.labels
    if labels is None or known is None or len(labels) != len(known) or are_generic(labels) or labels == known:
        return
    different = next(index for index, name in enumerate(labels) if name != known[index])
    warnings.warn(
        f"The adapter's class {different} is {known[different]!r}, the model's is {labels[different]!r}: the logits "
        "are in the order of the adapter. peft_e2vpt.load(...) names them rightly.",
        stacklevel=2,
    )
