# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Gates of visual prompts: stored ones, those that are measured, and what they mean for the values of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compat import BufferDict


BY_TRANSFORMERS = (
    "The adapter is pruned, and transformers' own load_adapter and from_pretrained cannot load pruned prompts: use "
    "peft_e2vpt.load(...).get_base_model(), which gives the same model."
)


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
            raise ValueError(BY_TRANSFORMERS)
        super().__setattr__(name, value)


@dataclass
class GateOverride:
    """Gates of every sample of a batch, in place of the stored ones, while importance or candidates are measured.

    Attributes:
        token: (B, M).
        segment: (B, M, R).
        on: whether the token gate multiplies the prompt's `"attention"` weight or its `"embedding"`.
    """

    token: Tensor
    segment: Tensor
    on: str


def expand_segments(gates: Tensor, width: int, layout: str) -> Tensor:
    """Spreads segment gates (..., R) over the dimensions of a prompt: (..., D) (paper equation 8)."""
    repeats = width // gates.shape[-1]
    if layout == "contiguous":
        return gates.repeat_interleave(repeats, dim=-1)
    return gates.repeat(*[1] * (gates.dim() - 1), repeats)


def kept_values(token: Tensor, segment: Tensor, width: int, layout: str) -> Tensor:
    """Which values of prompts take part, given their gates (M,) and (M, R): a boolean tensor (M, D)."""
    return expand_segments(segment * token[:, None], width, layout) != 0


def check_gates(what: str, gates: Tensor, shape: torch.Size, binary: bool) -> None:
    """Checks new gates.

    Args:
        what: names the gates in messages.
        gates: the new ones.
        shape: the shape they should have.
        binary: whether nothing but 0 and 1 is possible.

    Raises:
        ValueError: the shape is wrong, or a gate is neither 0 nor 1.
    """
    if gates.shape != shape:
        raise ValueError(f"{what} have shape {tuple(shape)}, got {gates.shape}.")
    if binary and not ((gates == 0) | (gates == 1)).all():
        raise ValueError(f"{what} must be 0 or 1 with pruned_prompts='remove'.")


def effect_of(
    token: Tensor, segment: Tensor, width: int, layout: str, pruned_prompts: str
) -> tuple[Tensor | None, Tensor | None]:
    """What gates (M,) and (M, R) do to prompts (M, D) in a forward pass.

    Returns:
        The numbers (M',) of the prompts that are not removed, `None` where all stay; and what their values are
        multiplied by, (M', D), `None` where that is 1.
    """
    kept = None
    if pruned_prompts == "zero":
        segment = segment * token[:, None]
    elif (token == 0).any():
        kept = token.nonzero().flatten()
        segment = segment[kept]
    return kept, expand_segments(segment, width, layout) if (segment != 1).any() else None
