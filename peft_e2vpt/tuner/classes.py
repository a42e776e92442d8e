# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Adapters of one model that tell different classes apart: the model's config names those of the active adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn


class Classes(NamedTuple):
    """What the config of a model says of its classes.

    Attributes:
        id2label: their names by the number of the logit.
        label2id: the other way round.
        problem_type: which loss goes with them; `None` leaves that to the labels.
    """

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None


def named(labels: list[str], problem_type: str | None = None) -> Classes:
    """Classes with these names, in the order of the logits."""
    return Classes(dict(enumerate(labels)), {label: index for index, label in enumerate(labels)}, problem_type)


def _read(model: Any) -> Classes:
    config = model.config
    names = config.id2label or {index: f"LABEL_{index}" for index in range(config.num_labels)}  # PVT has none
    return Classes(dict(names), dict(config.label2id or {}), getattr(config, "problem_type", None))


def _write(model: Any, classes: Classes) -> None:
    model.config.id2label, model.config.label2id = dict(classes.id2label), dict(classes.label2id)
    model.config.problem_type = classes.problem_type
    if hasattr(model, "num_labels"):
        model.num_labels = len(classes.id2label)


class ClassesOfAdapters:
    """The classes of every adapter that brings its own; the others have those of the base model.

    `config.num_labels`, `id2label`, `label2id` and `problem_type` of the model are those of the adapter that is
    active, which is what pipelines and losses read. Where adapters are switched off, they are the base model's.
    """

    def __init__(self) -> None:
        self._own: dict[str, Classes] = {}
        self._base: Classes | None = None  # while others are shown
        self._shown: str | None = None

    def add(self, model: nn.Module, adapter_name: str, classes: Classes) -> None:
        """Notes that an adapter has classes of its own."""
        self.remove(model, adapter_name)
        self._own[adapter_name] = classes

    def share(self, model: nn.Module, adapter_name: str, new_name: str) -> None:
        """Gives a new adapter the classes of another one."""
        if adapter_name in self._own:
            self.add(model, new_name, _read(model) if self._shown == adapter_name else self._own[adapter_name])

    def remove(self, model: nn.Module, adapter_name: str) -> None:
        """Forgets the classes of an adapter."""
        if self._shown == adapter_name:
            self.show(model, None)
        self._own.pop(adapter_name, None)

    def show(self, model: nn.Module, adapter_name: str | None) -> None:
        """Makes the config of the model that of an adapter, or for `None` that of the base model.

        What somebody wrote into the config meanwhile is kept for when the former adapter is active again.
        """
        name = adapter_name if adapter_name in self._own else None
        if name == self._shown:
            return
        if self._shown is None:
            self._base = _read(model)
        else:
            self._own[self._shown] = _read(model)
        classes = self._base if name is None else self._own[name]
        assert classes is not None
        _write(model, classes)
        self._shown = name

    def of_base(self, model: nn.Module) -> Classes:
        """The classes of the base model."""
        return self._base if self._shown is not None and self._base is not None else _read(model)

    @property
    def shown(self) -> str | None:
        """The adapter whose classes the config names; `None` for those of the base model."""
        return self._shown


@contextmanager
def classes_shown(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Shows the classes of an adapter, active or not, in a block of code that saves it.

    Args:
        model: the adapted model, or what wraps it.
        adapter_name: the adapter.
    """
    base, classes = next(
        (module, found)
        for module in model.modules()
        for child in module.children()
        if isinstance(found := getattr(child, "classes", None), ClassesOfAdapters)
    )
    before = classes.shown
    classes.show(base, adapter_name)
    try:
        yield
    finally:
        classes.show(base, before)
