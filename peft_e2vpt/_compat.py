# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The private names of PEFT, transformers and torch that this package relies on, in one place."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


__all__ = [
    "METHOD",
    "BatchNorm",
    "BufferDict",
    "ExcludedModule",
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
