# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The private names of PEFT, transformers and torch that this package relies on, in one place."""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule


__all__ = ["METHOD", "BufferDict", "ExcludedModule", "peft_type", "takes_processor"]

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
