# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The private names of PEFT, transformers and torch that this package relies on, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from peft import PeftType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch._subclasses import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


__all__ = [
    "METHOD",
    "BatchNorm",
    "BufferDict",
    "ExcludedModule",
    "device_and_dtype",
    "has_values",
    "is_batched",
    "offload_device",
    "peft_type",
    "takes_processor",
]

METHOD = "E2VPT"


def takes_processor(pipeline_class: type, kind: str) -> bool | None:
    """Whether a pipeline of transformers needs a processor, such as an `"image_processor"`; `None`: it can use one."""
    flag: bool | None = getattr(pipeline_class, f"_load_{kind}", False)
    return flag


def _load_peft_type(name: str) -> PeftType:
    """Unpickles a `PeftType` member in a process that may not have imported this package yet."""
    return peft_type(name)


def peft_type(name: str = METHOD) -> PeftType:
    """Returns the member `name` of `peft.PeftType`, adding it first where it does not exist.

    PEFT has no plug-in mechanism that adds one, and an enum with members cannot be subclassed. So the member is added
    to the enum itself, in the way `enum.EnumMeta` would have done it; from Python 3.12 on the class attribute has to
    be set as well.
    """
    existing = PeftType.__members__.get(name)
    if existing is not None:
        return existing
    enum: Any = PeftType
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member.__reduce_ex__ = lambda protocol: (_load_peft_type, (name,))
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def offload_device(module: nn.Module) -> torch.device | None:
    """Where Accelerate runs a module whose weights it has offloaded, `None` where it has offloaded none."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if getattr(hook, "offload", False):
            return torch.device(hook.execution_device)
    return None


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The weights of a module: parameters, then buffers, then those that torch's quantised layers hold packed."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        packed: Any = getattr(part, "weight", None)
        if isinstance(packed, MethodType):
            yield packed()


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where a module runs, and the type of the numbers that it computes with, quantised or not.

    Returns:
        The device, that of its weights or the one to which Accelerate loads them, and the type of the first weight
        that is neither an integer nor of 8 bits; `None` where there is none, for instance because all are quantised.
    """
    tensors = list(_tensors_of(module))
    device = tensors[0].device if tensors else torch.get_default_device()
    if device.type == "meta":
        device = offload_device(module) or device
    dtypes = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1]
    return device, dtypes[0] if dtypes else None


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` has put several tensors into this one, so that no number can be read from it."""
    return bool(is_batchedtensor(tensor))


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to read from a tensor: not on the meta device, nor while torch only infers shapes."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
