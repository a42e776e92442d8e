# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Makes E2VPT a PEFT method.

PEFT keeps its methods in an enum, `peft.PeftType`, and in four mappings from enum members to classes.
`peft.utils.register_peft_method` fills the mappings but needs the enum member to exist.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from ._compat import METHOD, peft_type


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
