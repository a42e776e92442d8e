# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Heads of adapters: modules that an adapter trains in full, and the classes that its head tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .head_wrapper import HeadWrapper


def wrappers(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """The modules of a model of which adapters have copies of their own, by their first path."""
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield path, module


def wrap(model: nn.Module, paths: Iterable[str], adapter_name: str, active: bool, inference_mode: bool) -> None:
    """Gives an adapter copies of modules.

    PEFT itself would wrap every module whose path *ends* like one of the names, and a module that is used in several
    places once for each of them.

    Args:
        model: the adapted model.
        paths: the modules.
        adapter_name: the adapter.
        active: whether it is the active one: its copies are used from now on, and those of others are not.
        inference_mode: whether its copies stay frozen.
    """
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name)
        else:
            wrapper = HeadWrapper(module, adapter_name, path)
            _replace(model, module, wrapper)
            wrapper.set_adapter([])
    _tie_copies(model, adapter_name)
    if active:
        for _, wrapper in wrappers(model):
            own = [adapter_name] if adapter_name in wrapper.modules_to_save else []
            wrapper.modules_to_save.requires_grad_(False)
            wrapper.set_adapter(own, inference_mode=inference_mode)


def _tie_copies(model: nn.Module, adapter_name: str) -> None:
    """Lets an adapter's copies share the parameters that their originals share."""
    copies: dict[int, nn.Parameter] = {}
    for _, wrapper in wrappers(model):
        if adapter_name not in wrapper.modules_to_save:
            continue
        copy = wrapper.modules_to_save[adapter_name]
        for name, original in wrapper.original_module.named_parameters(remove_duplicate=False):
            path, _, kind = name.rpartition(".")
            owner = copy.get_submodule(path)
            setattr(owner, kind, copies.setdefault(id(original), getattr(owner, kind)))


def unwrap_unused(model: nn.Module) -> None:
    """Puts modules of which no adapter has a copy any more back in their places."""
    for _, wrapper in list(wrappers(model)):
        if not wrapper.modules_to_save:
            unwrap(model, wrapper)


def unwrap(model: nn.Module, wrapper: ModulesToSaveWrapper) -> None:
    """Puts the original module back in all places of its wrapper."""
    _replace(model, wrapper, wrapper.original_module)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old and not path.endswith(".original_module"):
            model.set_submodule(path, new)


def can_resize(head: nn.Module, names: Iterable[str]) -> bool:
    """Whether parameters of a head are of layers whose number of outputs can be changed."""
    layers = [head.get_submodule(name.rpartition(".")[0]) for name in names]
    return all(isinstance(layer, (nn.Linear, nn.Conv2d)) and getattr(layer, "groups", 1) == 1 for layer in layers)


def resize(head: nn.Module, name: str, tensor: Tensor) -> int:
    """Makes room for a tensor with another number of outputs in a linear or convolutional layer of a head.

    Args:
        head: an adapter's copy of a head; changed in place.
        name: a parameter of it.
        tensor: what it is about to take.

    Returns:
        How many outputs the layer has gained; negative where it lost some.
    """
    path, _, kind = name.rpartition(".")
    layer = head.get_submodule(path)
    old: Tensor = getattr(layer, kind)
    values = torch.empty(tensor.shape, dtype=old.dtype, device=old.device)
    setattr(layer, kind, nn.Parameter(values, requires_grad=old.requires_grad))
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(tensor))
    return len(tensor) - len(old)


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
