# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What an adapter has to know of the model around it, so that it can be built again: classes, base model, task."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from .._compat import Origin
from ..tuner.config import E2VPTConfig
from ..tuner.prompt_layers import adapted_model
from ..tuner.summary import summarise
from .base_model import class_mapping, settings_of
from .card import WITH_CLASSES, AdapterFacts, task_of
from .files import checked_tensors


def labels_of(model: nn.Module, num_labels: int | None = None) -> list[str] | None:
    """Names of the classes of a model in the order of its logits; `None` if its task has no classes.

    Args:
        model: a model without wrapper.
        num_labels: how many classes there are, by default as many as its config says.
    """
    config = getattr(model, "config", None)
    num_labels = getattr(config, "num_labels", None) if num_labels is None else num_labels
    if num_labels is None or task_of(model) not in WITH_CLASSES:
        return None
    names = _by_number((getattr(config, "id2label", None) or {}).items())
    labels = [names.get(index, f"LABEL_{index}") for index in range(num_labels)]
    if are_generic(labels):  # perhaps only the other way round is set
        names = _by_number((index, name) for name, index in (getattr(config, "label2id", None) or {}).items())
        if names.keys() == set(range(num_labels)):
            return [names[index] for index in range(num_labels)]
    return labels


def _by_number(pairs: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    """Names by their numbers, which are strings in scripts that think of JSON; what is no number names no logit."""
    return {int(index): str(name) for index, name in pairs if str(index).isdecimal()}


def num_logits(model: nn.Module, adapter_name: str) -> int | None:
    """How many logits the head of an adapter gives; `None` if the adapter has none of a classifier.

    A head may have been replaced, or `id2label` set to another length, so that the model's config does not tell.
    """
    if not (task_of(model) or "").endswith("classification"):
        return None
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    layers = [
        layer
        for head in heads
        if adapter_name in head.modules_to_save
        for layer in head.modules_to_save[adapter_name].modules()
    ]
    rows = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
    return rows[-1] if rows else None


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
    name: str = config.base_model_name_or_path or getattr(base, "name_or_path", None) or ""
    mapping = class_mapping(base)
    is_own = mapping["parent_library"].split(".")[0] != "transformers"
    own_class = mapping["base_model_class"] if is_own else None
    return AdapterFacts(summarise(base, adapter_name), name, task_of(base), own_class)


class AdapterCompanion:
    """Describes the model in the files of every adapter that is saved; see `tuner.config.Companion`."""

    def bind(self, config: E2VPTConfig, model: nn.Module) -> None:
        """Warns where an adapter brings other classes or another kind of output than its model has."""
        name = config.base_model_name_or_path
        if name and Path(name).is_dir():  # a relative one would later be looked for elsewhere, or on the Hub
            config.base_model_name_or_path = os.path.abspath(name)
        labels, known = labels_of(model), config.labels
        if labels and known and len(labels) == len(known) and not are_generic(labels) and labels != known:
            different = next(index for index, name in enumerate(labels) if name != known[index])
            warnings.warn(
                f"The adapter's class {different} is {known[different]!r}, the model's is {labels[different]!r}: the "
                "logits are in the order of the adapter. peft_e2vpt.load(...) names them rightly.",
                stacklevel=2,
            )
        kind = (config.base_model_settings or {}).get("problem_type")
        found = getattr(getattr(model, "config", None), "problem_type", None)
        if kind not in (None, found) and (kind, found) != ("single_label_classification", None):
            warnings.warn(
                f"The adapter was trained with problem_type={kind!r}, and the model has {found!r}: loss and pipelines "
                f"would take its outputs for something else. Set model.config.problem_type = {kind!r}, or build the "
                "model with peft_e2vpt.load(...).",
                stacklevel=2,
            )

    def tensors(self, origin: Origin) -> Path:
        """The file with the tensors of an adapter.

        Raises:
            ValueError: there is no such file, only a pickle, or it is damaged.
        """
        return checked_tensors(origin.where, **origin.download)

    def settings(self, config: E2VPTConfig, model: nn.Module) -> dict[str, Any]:
        """How the model is built again: its class, its classes, and what sets it apart from its checkpoint.

        What came with the adapter stays where the model does not know better: where it has only generic names, or
        where it is described by another one of its adapters.
        """
        base = adapted_model(model)
        adapters: dict[str, E2VPTConfig] = getattr(model, "peft_config", {})
        names = [name for name, own in adapters.items() if own is config]
        mapping, labels = class_mapping(base), labels_of(base, num_logits(base, names[0]) if names else None)
        known, earlier = config.labels, config.base_model_settings
        if earlier is not None and len(adapters) > 1:
            return {"auto_mapping": mapping, "base_model_settings": earlier, "labels": known}
        if labels and known and len(known) == len(labels) and are_generic(labels):
            labels = known
        settings = settings_of(base, config.base_model_name_or_path, config.revision)
        if settings is not None and earlier is not None and settings.get("problem_type") is None:
            settings |= {name: value for name, value in earlier.items() if name == "problem_type"}
        return {"auto_mapping": mapping, "base_model_settings": settings, "labels": labels}

    def write(self, config: E2VPTConfig, model: nn.Module, adapter_name: str, folder: str) -> None:
        """Writes the card of the adapter that is being saved; one that somebody has changed stays."""
        facts_of(model, config, adapter_name).save(folder)
