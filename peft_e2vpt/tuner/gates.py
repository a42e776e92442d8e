# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Gates of visual prompts: stored ones, those that are measured, and what they mean for the values of a prompt.

Gates start at 1, and pruning sets some to 0. They are buffers, so whoever copies or averages a model copies them too:
what they do (`GateEffect`) is no buffer, is never copied as such, and is worked out anew where the gates have changed.

An average of models (EMA, SWA, a soup) has gates between 0 and 1 where some of the models had pruned a prompt and
others had not. With `pruned_prompts="remove"` such a gate counts as 0: the prompt is pruned in the average as soon as
it is in one of the models. Else it would come back half trained, and in full: its values shrink with every step of an
average, but the norm behind them makes them large again. With `pruned_prompts="zero"` gates are factors, as in the
released code, and those between 0 and 1 stay as they are, with a warning where a copy brings them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compat import BufferDict, is_batched


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
        kept: (M',), the numbers of the prompts that stay, in place of those that the stored gates keep.
    """

    token: Tensor
    segment: Tensor
    on: str
    kept: Tensor | None = None


class Seen(NamedTuple):
    """A tensor as it was when something was worked out from it.

    torch counts what is written to a tensor, also through the tensors of a `state_dict()`. It does not count what is
    written through `.data`, and counts nothing for tensors that were made in inference mode.

    Attributes:
        tensor: the tensor itself; another one in its place is a change.
        version: how often it had been written to; `None` where torch does not count.
        values: a copy; `None` where values are not compared.
    """

    tensor: Tensor
    version: int | None
    values: Tensor | None

    @classmethod
    def now(cls, tensor: Tensor, compare_values: bool = False) -> Seen:
        """Notes the state of a tensor; values are compared where there is no version, too."""
        version = None if tensor.is_inference() else tensor._version
        return cls(tensor, version, tensor.detach().clone() if compare_values or version is None else None)

    def is_now(self, tensor: Tensor | None) -> bool:
        """Whether this is the tensor, unchanged."""
        if tensor is not self.tensor:
            return False
        if self.values is not None:
            return torch.equal(self.tensor, self.values)
        return self.tensor._version == self.version


@dataclass(frozen=True, eq=False)
class GateEffect:
    """What the gates of an adapter do to its visual prompts in a forward pass; made once and never changed.

    Attributes:
        kept: (M',), the numbers of the prompts that are not removed; `None` where all stay.
        values: (M', D), what the values of those are multiplied by; `None` where that is 1.
        bias: (1, M), added to the attention scores where prompts differ between the models of a `torch.func.vmap`.
        seen: the gates that it was worked out from; a copy of the effect has seen none.
    """

    kept: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None
    seen: tuple[Seen, ...] = ()

    def is_of(self, token: Tensor, segment: Tensor) -> bool:
        """Whether it was worked out from these gates, as they are."""
        seen = self.seen
        return bool(seen) and seen[0].is_now(token) and seen[1].is_now(segment)

    def moved(self, fn: Callable[[Tensor], Tensor]) -> GateEffect:
        """The effect with its tensors moved, as of gates that have no values."""
        kept, values = (None if tensor is None else fn(tensor) for tensor in (self.kept, self.values))
        return GateEffect(kept, values)

    def has_other_fractions_than(self, other: GateEffect) -> bool:
        """Whether it has factors between 0 and 1, and they are not those of another effect."""
        ours, theirs = self.values, other.values
        if ours is None or not ((ours != 0) & (ours != 1)).any():
            return False
        return theirs is None or not torch.equal(ours.to(theirs), theirs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": ()}


def expand_segments(gates: Tensor, width: int, layout: str) -> Tensor:
    """Spreads segment gates (..., R) over the dimensions of a prompt: (..., D) (paper equation 8)."""
    repeats = width // gates.shape[-1]
    if layout == "contiguous":
        return gates.repeat_interleave(repeats, dim=-1)
    return gates.repeat(*[1] * (gates.dim() - 1), repeats)


def as_switches(gates: Tensor, pruned_prompts: str) -> Tensor:
    """Gates as 0 and 1, those of an average as 1 where they are 1 up to rounding; with `"zero"` they stay factors."""
    if pruned_prompts == "zero":
        return gates
    tolerance = max(1e-6, 8 * torch.finfo(gates.dtype).eps)  # weights of a sum such as 10 x 0.1
    return (gates >= 1 - tolerance).to(gates.dtype)


def kept_values(token: Tensor, segment: Tensor, width: int, layout: str, pruned_prompts: str) -> Tensor:
    """Which values of prompts take part, given their gates (M,) and (M, R): a boolean tensor (M, D)."""
    token, segment = as_switches(token, pruned_prompts), as_switches(segment, pruned_prompts)
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


@torch.inference_mode(False)
@torch.no_grad()
def effect_of(token: Tensor, segment: Tensor, width: int, layout: str, pruned_prompts: str) -> GateEffect:
    """What gates (M,) and (M, R) do to prompts (M, D) in a forward pass."""
    if is_batched(token) or is_batched(segment):  # by torch.func.vmap: no number of rows can depend on them
        token, segment = as_switches(token, pruned_prompts), as_switches(segment, pruned_prompts)
        if pruned_prompts == "zero":
            return GateEffect(values=expand_segments(segment * token[:, None], width, layout))
        return GateEffect(values=expand_segments(segment, width, layout), bias=token.log()[None])
    compare = token.device.type == "cpu"  # elsewhere it would wait for the device
    seen = (Seen.now(token, compare), Seen.now(segment, compare))
    token, segment, kept = as_switches(token, pruned_prompts), as_switches(segment, pruned_prompts), None
    if pruned_prompts == "zero":
        segment = segment * token[:, None]
    elif (token == 0).any():
        kept = token.nonzero().flatten()
        segment = segment[kept]
    values = expand_segments(segment, width, layout) if (segment != 1).any() else None
    return GateEffect(kept, values, None, seen)
