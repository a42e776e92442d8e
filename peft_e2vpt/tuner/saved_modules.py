# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Modules that an adapter trains in full, such as heads: PEFT's wrapper around exactly those that were chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


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
            wrapper = ModulesToSaveWrapper(module, adapter_name)
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
