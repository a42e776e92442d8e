# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What constants were computed from, and whether it has changed since: merged rows must not outlive their prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; torch does not count this for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class Sources:
    """The parameters and buffers of some modules as they are now.

    Args:
        modules: those whose own tensors are meant; submodules are listed too.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._seen: list[tuple[dict[str, Any], str, Tensor, int]] = []
        for module in modules:
            for store in (module._parameters, module._buffers):
                tensors = [(name, tensor) for name, tensor in store.items() if tensor is not None]
                self._seen += [(store, name, tensor, _version(tensor)) for name, tensor in tensors]

    def unchanged(self) -> bool:
        """Whether all are the same tensors as then, and none has been written to."""
        return all(store.get(name) is tensor and _version(tensor) == seen for store, name, tensor, seen in self._seen)
