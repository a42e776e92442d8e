# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`StoredGates`: the gates of a layer by adapter, which notice being loaded by what cannot load pruned prompts."""

from __future__ import annotations

from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor


class StoredGates(BufferDict):
    """Gates by adapter, persistent buffers.

    PEFT and torch load them with `load_state_dict`, after the tensors of the file have been fitted to the model.
    transformers' own `load_adapter` and `from_pretrained` set them one by one, and leave visual prompts of another
    shape as they are, which with `ignore_mismatched_sizes=True` is no error there: a pruned adapter would run with
    prompts that nobody has trained.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self._is_loading_state_dict = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._is_loading_state_dict = True
        super()._load_from_state_dict(*args, **kwargs)
        self._is_loading_state_dict = False

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_meta and not self._is_loading_state_dict and (value != 1).any():
            raise ValueError(
                "The adapter is pruned, and transformers' own load_adapter and from_pretrained cannot load pruned "
                "prompts: use peft_e2vpt.load(...).get_base_model(), which gives the same model."
            )
        super().__setattr__(name, value)
