# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The adapters of one forward pass: those that are active when it begins, or in a mixed batch one per sample.

A forward pass keeps its adapters to the end, whatever another thread switches meanwhile, and threads share a model
without seeing each other's adapters. What a pass has chosen lies with its thread, not on the model.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .._compat import device_and_dtype
from ..attention.rows import MixedBatch


BASE = "__base__"  # PEFT's name for no adapter
SWITCHING = threading.RLock()  # held while layers are switched one after the other


class Choice(NamedTuple):
    """The adapters of a forward pass.

    Attributes:
        active: the adapters that all samples have.
        mixed: instead of them, which one every sample has.
    """

    active: tuple[str, ...] = ()
    mixed: MixedBatch | None = None


class _Passes(threading.local):
    choice: Choice | None = None


class RunningPasses:
    """Whether any thread runs a pass of a kind: torch.compile guards this, and nothing that is local to a thread."""

    def __init__(self) -> None:
        self.any = False
        self._count = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self._count += number
            self.any = self._count > 0


_passes, _mixed_passes = _Passes(), RunningPasses()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _choice_of_this_thread() -> Choice | None:
    return _passes.choice


def current_choice() -> Choice | None:
    """What the forward pass of this thread has chosen; `None` where it goes by what is active in each layer."""
    if torch.compiler.is_compiling():
        return _choice_of_this_thread() if _mixed_passes.any else None
    return _passes.choice


@contextmanager
def _chosen(choice: Choice | None) -> Iterator[None]:
    before, _passes.choice = _passes.choice, choice
    try:
        yield
    finally:
        _passes.choice = before


def active_adapters_kept(layers: Collection[Any]) -> Any:
    """Lets the forward passes of a block of code keep the adapters that are active now.

    Args:
        layers: layers of PEFT. Where they differ in what is active, each goes on by its own.

    Returns:
        A context manager.
    """
    with SWITCHING:
        states = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    return _chosen(Choice(states.pop()) if len(states) == 1 else None)


@contextmanager
def one_adapter_per_sample(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Gives, in the forward passes of a block of code, every sample of the batch its own adapter and head.

    Where the heads of the adapters tell different numbers of classes apart, the logits are as wide as the widest, and
    those that a sample's own head does not have are -inf: `argmax` and `softmax` are the same as without them.
    Samples with different numbers of rows need a bias on their attention scores, which flash and flex attention do
    not take: such a batch runs as sdpa there.

    Args:
        model: the adapted model, in eval mode.
        adapter_names: one per sample, names of adapters in the model in deep mode, or `"__base__"` for none.

    Raises:
        ValueError: the outputs of the adapters' heads differ in more than their last dimension.
    """
    names = tuple(dict.fromkeys(adapter_names))
    numbers = {name: number for number, name in enumerate(names)}
    device, _ = device_and_dtype(model)
    choice = torch.tensor([numbers[name] for name in adapter_names], device=device)
    _mixed_passes.add(1)
    try:
        with _chosen(Choice(mixed=MixedBatch(names, choice, tuple(adapter_names)))):
            yield
    finally:
        _mixed_passes.add(-1)


def check_adapter_names(adapter_names: Any, present: Mapping[str, Any]) -> None:
    """Checks the `adapter_names` of a forward pass.

    Args:
        adapter_names: one per sample.
        present: the adapters of the model and their configs.

    Raises:
        TypeError: they are no list.
        ValueError: one of them is neither in the model nor `"__base__"`, or its values are yet to be loaded.
    """
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    unknown = set(adapter_names) - {*present, BASE}
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; the model has "
            f"{', '.join(present)}, and {BASE} stands for none."
        )
    waiting = sorted(name for name in {*adapter_names} - {BASE} if present[name].waits_for_values)
    if waiting:
        raise ValueError(f"The values of adapter(s) {', '.join(waiting)} are yet to be loaded: wait for load_adapter.")
