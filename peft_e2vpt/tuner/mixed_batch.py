# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Mixed batches: one forward pass in which every sample has its own adapter and its own head."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..attention.rows import MixedBatch
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


def _with_adapter_names(
    head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _check_sizes(path: str, head: ModulesToSaveWrapper, names: set[str]) -> None:
    modules = {name: head.original_module if name == BASE else head.modules_to_save[name] for name in names}
    shapes = {name: [tuple(p.shape) for p in module.parameters()] for name, module in sorted(modules.items())}
    if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
        found = ", ".join(f"{name!r} has {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"The heads {path} of the adapters in the batch differ in size ({found}), so their outputs are no one "
            "tensor: put only adapters with equally many classes into one batch."
        )


def _choose_heads(path: str, head: ModulesToSaveWrapper, adapter_names: list[str], stack: ExitStack) -> None:
    """Lets PEFT's wrapper give every sample the head of its adapter, or the original one where that has none."""
    names = [name if name in head.modules_to_save else BASE for name in adapter_names]
    _check_sizes(path, head, set(names))
    hook = head.register_forward_pre_hook(partial(_with_adapter_names, adapter_names=names), with_kwargs=True)
    stack.callback(hook.remove)


@contextmanager
def one_adapter_per_sample(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
    """Gives, in the forward passes of a block of code, every sample of the batch its own adapter and head.

    Samples with different numbers of rows need a bias on their attention scores, which flash and flex attention do
    not take: such a batch runs as sdpa there.

    Args:
        model: the adapted model, in eval mode.
        adapter_names: one per sample, names of adapters in the model in deep mode, or `"__base__"` for none.

    Raises:
        ValueError: the heads of the adapters differ in size.
    """
    layers = prompt_layers(model)
    names = tuple(dict.fromkeys(adapter_names))
    choice = torch.tensor([names.index(name) for name in adapter_names], device=next(model.parameters()).device)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                _choose_heads(path, module, adapter_names, stack)
        if any(len({layer.num_rows(name) for name in names}) > 1 for layer in layers):
            stack.enter_context(gates_on("attention", layers))
        for layer in layers:
            stack.callback(setattr, layer, "mixed_batch", None)
            layer.mixed_batch = MixedBatch(names, choice)
        yield
