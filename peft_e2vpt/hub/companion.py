# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What an adapter has to know of the model around it, so that it can be built again: classes, base model, task."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..tuner.config import E2VPTConfig
from ..tuner.prompt_layers import adapted_model
from ..tuner.summary import summarise
from .card import AdapterFacts, task_of


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


def facts_of(model: nn.Module, config: E2VPTConfig, adapter_name: str) -> AdapterFacts:
    """What the card of an adapter tells.

    Args:
        model: the adapted model, or what wraps it.
        config: configuration of the adapter.
        adapter_name: its name in the model.
    """
    base = adapted_model(model)
    name: str = getattr(base, "name_or_path", None) or config.base_model_name_or_path or ""
    return AdapterFacts(summarise(base, adapter_name), name, task_of(base))


class AdapterCompanion:
    """Writes the classes of the model and a card with every adapter that is saved; see `tuner.config.Companion`."""

    def compare(self, config: E2VPTConfig, model: nn.Module) -> None:
        """Warns where an adapter brings other names of classes than its model has."""
        labels, known = labels_of(model), config.labels
        if labels is None or known is None or len(labels) != len(known) or are_generic(labels) or labels == known:
            return
        different = next(index for index, name in enumerate(labels) if name != known[index])
        warnings.warn(
            f"The adapter's class {different} is {known[different]!r}, the model's is {labels[different]!r}: the "
            "logits are in the order of the adapter. peft_e2vpt.load(...) names them rightly.",
            stacklevel=2,
        )

    def settings(self, config: E2VPTConfig, model: nn.Module) -> dict[str, Any]:
        """The classes of the model; labels that came with the adapter stay where the model has only generic ones."""
        labels, known = labels_of(adapted_model(model)), config.labels
        if labels is not None and known is not None and len(known) == len(labels) and are_generic(labels):
            return {}
        return {"labels": labels}

    def write(self, config: E2VPTConfig, model: nn.Module, adapter_name: str, folder: str) -> None:
        """Writes the card of the adapter that is being saved; one that somebody has changed stays."""
        facts_of(model, config, adapter_name).save(folder)
