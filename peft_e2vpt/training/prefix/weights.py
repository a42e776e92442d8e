# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Whether a frozen prefix is still the one that hidden states were computed with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..._compat import packed_weights
from ...tuner.layer import E2VPTLayer
from .trace import modules_in


def checksum_of(modules: Iterable[nn.Module]) -> str:
    """Tells the weights and buffers of modules."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            for part in _plain_parts(tensor):
                digest.update(bytes_of(part))
        for tensor in packed_weights(module):
            digest.update(bytes_of(tensor.int_repr() if tensor.is_quantized else tensor))
    return digest.hexdigest()


def versions_of(modules: Iterable[nn.Module]) -> dict[Tensor, int]:
    """How often each parameter has been written to, which costs less than a checksum."""
    return {parameter: parameter._version for module in modules for parameter in module.parameters()}


def what_changes(model: nn.Module, skipped: Iterable[nn.Module], trains: bool = True) -> str | None:
    """Why a prefix gives other hidden states from step to step, or may: what trains in it, or adapters in it."""
    parts = set(modules_in(skipped))
    held = {p for part in parts for p in part._parameters.values() if p is not None and p.requires_grad}
    if held and trains:
        return f"{next(path for path, p in model.named_parameters() if p in held)} trains"
    for path, module in model.named_modules():
        inside = module.site.block in parts if isinstance(module, E2VPTLayer) else module in parts
        if inside and isinstance(module, BaseTunerLayer):
            return f"it has layers of an adapter ({path})"
    return None


def bytes_of(tensor: Tensor) -> Any:
    """What a tensor holds, as a buffer."""
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy().data if plain.numel() else b""


def _plain_parts(tensor: Any) -> Iterator[Tensor]:
    """A tensor, or those that one of a library of quantisation is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield from _plain_parts(part)
