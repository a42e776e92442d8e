# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Heads of adapters: modules that an adapter trains in full, and the classes that its head tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .mixed_batch import BASE, current_choice


def _part_of(value: Any, samples: Tensor, batch: int) -> Any:
    """The samples' part of an argument, where it is a tensor of the whole batch or holds such tensors."""
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value[samples]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_part_of(part, samples, batch) for part in value)
    return value


def _joined(path: str, parts: dict[str | None, Any], samples: list[Tensor]) -> Any:
    """The outputs of the heads put together, each where its samples are; narrower ones are filled up with -inf."""
    first = next(iter(parts.values()))
    if isinstance(first, (list, tuple)):
        columns = zip(*parts.values(), strict=True)
        return type(first)(_joined(path, dict(zip(parts, column, strict=True)), samples) for column in columns)
    if not isinstance(first, Tensor):
        raise TypeError(
            f"The head {path} gives {type(first).__name__}, which cannot be put together for a mixed batch. Run one "
            "forward pass for each adapter."
        )
    widest = max(part.shape[-1] for part in parts.values())
    if any(part.shape[1:-1] != first.shape[1:-1] for part in parts.values()) or (first.dim() < 2 and len(parts) > 1):
        found = ", ".join(f"{name or BASE!r} gives {tuple(part.shape[1:])}" for name, part in parts.items())
        raise ValueError(
            f"The outputs of the heads {path} differ in more than their last dimension ({found}), so they are no one "
            "tensor. Run one forward pass for each adapter."
        )
    rows = torch.cat([F.pad(part, (0, widest - part.shape[-1]), value=float("-inf")) for part in parts.values()])
    return rows[torch.cat(samples).argsort()]


class OwnerOfHooks:
    """Whose hooks on a module of the base model stay behind when an adapter gets a copy of that module."""


@contextmanager
def _hooks_left_out(module: nn.Module) -> Iterator[None]:
    """Takes hooks off that a copy of the module would take along, and with them a copy of the whole model."""
    hooks = [kind for part in module.modules() for kind in (part._forward_hooks, part._forward_pre_hooks)]
    ours = [
        {key: hook for key, hook in kind.items() if isinstance(getattr(hook, "__self__", None), OwnerOfHooks)}
        for kind in hooks
    ]
    for kind, taken in zip(hooks, ours, strict=True):
        for key in taken:
            del kind[key]
    try:
        yield
    finally:
        for kind, taken in zip(hooks, ours, strict=True):
            kind.update(taken)


class HeadWrapper(ModulesToSaveWrapper):
    """PEFT's wrapper of a trained module, whose forward pass goes by the adapters that the pass has chosen.

    Args:
        module: the module.
        adapter_name: the first adapter that has a copy of it.
        path: of the module in the model, for messages.
    """

    def __init__(self, module: nn.Module, adapter_name: str, path: str) -> None:
        super().__init__(module, adapter_name)
        self._path = path

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Makes the copy of an adapter."""
        with _hooks_left_out(self.original_module):
            super().update(adapter_name, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the adapter's copy, or of the original where an adapter has none.

        In a mixed batch every sample goes through the copy of its own adapter.
        """
        choice = current_choice()
        if choice is None or len(choice.active) > 1:
            return super().forward(*args, **kwargs)
        if choice.mixed is None:
            return self.of_adapter(choice.active[0] if choice.active else None)(*args, **kwargs)
        return self._one_per_sample(list(choice.mixed.of_samples), *args, **kwargs)

    def of_adapter(self, name: str | None) -> nn.Module:
        """The copy of an adapter, or the original where it has none."""
        module: nn.Module = self.modules_to_save[name] if name in self.modules_to_save else self.original_module
        return module

    def _one_per_sample(self, adapter_names: list[str], *args: Any, **kwargs: Any) -> Any:
        """Every copy sees the samples of its adapter."""
        batch = len(adapter_names)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        if batch not in {len(value) for value in tensors}:
            sizes = ", ".join(str(size) for size in sorted({len(value) for value in tensors}))
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {batch} and "
                f"{sizes} respectively."
            )
        owners = [name if name in self.modules_to_save else None for name in adapter_names]
        parts: dict[str | None, Any] = {}
        samples: list[Tensor] = []
        for owner in dict.fromkeys(owners):
            places = [i for i, other in enumerate(owners) if other == owner]
            samples.append(torch.tensor(places, device=tensors[0].device))
            parts[owner] = self.of_adapter(owner)(
                *(_part_of(value, samples[-1], batch) for value in args),
                **{key: _part_of(value, samples[-1], batch) for key, value in kwargs.items()},
            )
        return _joined(self._path, parts, samples)


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
