# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`HeadWrapper`: a module of which every adapter has a copy of its own, and which copy a forward pass takes."""

from __future__ import annotations

from typing import Any

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
