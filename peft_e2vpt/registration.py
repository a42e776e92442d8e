# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Makes E2VPT a PEFT method: the one place that extends PEFT's registry.

PEFT keeps its methods in an enum, `peft.PeftType`, and in four mappings from enum members to classes.
`peft.utils.register_peft_method` fills the mappings but needs the enum member to exist, and PEFT has no plug-in
mechanism that adds one. An enum with members cannot be subclassed, so the member is added to the enum itself, in the
way `enum.EnumMeta` would have done it; from Python 3.12 on the class attribute has to be set as well.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


METHOD = "E2VPT"


def _load_peft_type(name: str) -> PeftType:
    """Unpickles a `PeftType` member in a process that may not have imported this package yet."""
    return peft_type(name)


def peft_type(name: str = METHOD) -> PeftType:
    """Returns the member `name` of `peft.PeftType`, adding it first where it does not exist."""
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


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Registers config and tuner with PEFT under the name E2VPT; safe to call again, also after a module reload.

    Raises:
        RuntimeError: another package has registered a PEFT method of this name.
    """
    member = peft_type()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is not None:
        if registered.__module__ != config_cls.__module__:
            raise RuntimeError(
                f"PEFT already knows a method called {METHOD}: {registered.__module__}.{registered.__qualname__}. "
                "Import either that one or peft_e2vpt in one process, not both."
            )
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop(member, None)
    register_peft_method(name=METHOD.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
