# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Mixed batches: one forward pass in which every sample has its own adapter and its own head."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..attention.rows import MixedBatch
from .heads import wrappers
from .prompt_layers import gates_on, prompt_layers


BASE = "__base__"  # PEFT's name for no adapter


def check_adapter_names(adapter_names: Any, present: Collection[str]) -> None:
    """Checks the `adapter_names` of a forward pass.

    Args:
        adapter_names: one per sample.
        present: the adapters of the model.

    Raises:
        TypeError: they are no list.
        ValueError: one of them is neither in the model nor `"__base__"`.
    """
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    unknown = set(adapter_names) - {*present, BASE}
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; the model has "
            f"{', '.join(present)}, and {BASE} stands for none."
        )


def _part_of(value: Any, samples: Tensor, batch: int) -> Any:
    """The samples' part of an argument, where it is a tensor of the whole batch or holds such tensors."""
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value[samples]
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_part_of(part, samples, batch) for part in value)
    return value


def _joined(path: str, parts: dict[str, Any], samples: list[Tensor]) -> Any:
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
        found = ", ".join(f"{name!r} gives {tuple(part.shape[1:])}" for name, part in parts.items())
        raise ValueError(
            f"The outputs of the heads {path} differ in more than their last dimension ({found}), so they are no one "
            "tensor. Run one forward pass for each adapter."
        )
    rows = torch.cat([F.pad(part, (0, widest - part.shape[-1]), value=float("-inf")) for part in parts.values()])
    return rows[torch.cat(samples).argsort()]


def _one_head_per_sample(
    path: str, wrapper: ModulesToSaveWrapper, adapter_names: list[str], *args: Any, **kwargs: Any
) -> Any:
    """The forward of a wrapper of PEFT in a mixed batch: every adapter's head sees the samples of that adapter."""
    batch = len(adapter_names)
    sizes = {len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()}
    if batch not in sizes:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {batch} and "
            f"{', '.join(map(str, sorted(sizes)))} respectively."
        )
    parts: dict[str, Any] = {}
    samples: list[Tensor] = []
    for name in dict.fromkeys(adapter_names):
        head = wrapper.original_module if name == BASE else wrapper.modules_to_save[name]
        device = next(head.parameters()).device
        samples.append(torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=device))
        parts[name] = head(
            *(_part_of(value, samples[-1], batch) for value in args),
            **{key: _part_of(value, samples[-1], batch) for key, value in kwargs.items()},
        )
    return _joined(path, parts, samples)


def _choose_heads(path: str, wrapper: ModulesToSaveWrapper, adapter_names: list[str], stack: ExitStack) -> None:
    """Gives every sample the head of its adapter, or the original one where that has none."""
    names = [name if name in wrapper.modules_to_save else BASE for name in adapter_names]
    wrapper.forward = partial(_one_head_per_sample, path, wrapper, names)
    stack.callback(delattr, wrapper, "forward")


@contextmanager
def one_adapter_per_sample(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
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
    layers = prompt_layers(model)
    names = tuple(dict.fromkeys(adapter_names))
    choice = torch.tensor([names.index(name) for name in adapter_names], device=next(model.parameters()).device)
    with ExitStack() as stack:
        for path, wrapper in wrappers(model):
            _choose_heads(path, wrapper, adapter_names, stack)
        if any(len({layer.num_rows(name) for name in names}) > 1 for layer in layers):
            stack.enter_context(gates_on("attention", layers))
        for layer in layers:
            stack.callback(setattr, layer, "mixed_batch", None)
            layer.mixed_batch = MixedBatch(names, choice)
        yield
