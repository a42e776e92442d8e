# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How rows join the keys and values of one attention call.

transformers asks `module.config._attn_implementation` which function computes an attention. An adapted attention
module gets, as its `config`, a view of the model's config that answers this one question with the name of
`attend_with_rows`; every other attention, and the model's config itself, stay as they are. `attend_with_rows` pulls
the rows from their owner, puts them beside keys and values and calls the implementation that the user chose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


IMPLEMENTATION = "e2vpt"
AttentionFunction = Callable[..., "tuple[Tensor, Tensor | None]"]


class Rows(NamedTuple):
    """Key and value rows of one attention; the first dimension B is 1 where all samples have the same rows.

    Attributes:
        key: (B, H, P, d).
        value: (B, H, P, d).
        num_behind: how many of the P rows, the last ones, go behind keys and values instead of before them.
        score_bias: (B, P), added to the attention scores of the rows before the softmax; `None` adds nothing.
    """

    key: Tensor
    value: Tensor
    num_behind: int = 0
    score_bias: Tensor | None = None


class RowOwner(Protocol):
    """Whoever gives an attention its rows."""

    eager_attention: AttentionFunction | None

    def rows(self, num_sequences: int, dtype: torch.dtype) -> Rows | None:
        """The rows for a batch of `num_sequences` token sequences; `None` leaves the attention as it is."""


class ConfigView:
    """What an adapted attention sees as its config: the model's own, but for the attention implementation."""

    def __init__(self, source: Any, owner: RowOwner) -> None:
        self.__dict__.update(_e2vpt_source=source, _e2vpt_owner=owner)

    @property
    def _attn_implementation(self) -> str:
        return IMPLEMENTATION

    def __getattr__(self, name: str) -> Any:
        if "_e2vpt_source" not in self.__dict__:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.__dict__["_e2vpt_source"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_e2vpt_source"], name, value)


class ModuleView:
    """An attention module with the model's own config, for implementations that read it (flash attention)."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attach(attention: Any, owner: RowOwner) -> None:
    """Lets `owner` give rows to every later call of `attention`."""
    detach(attention)
    attention.config = ConfigView(attention.config, owner)


def detach(attention: Any) -> None:
    """Gives `attention` the config object back that it had before `attach`."""
    attention.config = config_of(attention)


def config_of(attention: Any) -> Any:
    """The model's own config of an attention, adapted or not."""
    config = attention.config
    return config.__dict__["_e2vpt_source"] if isinstance(config, ConfigView) else config


def eager_attention_of(attention: nn.Module) -> AttentionFunction | None:
    """Finds the eager attention function that the model file of `attention` falls back to.

    Returns:
        The function, or `None` where the class does not ask transformers' attention interface for its attention.
    """
    forward = inspect.unwrap(type(attention).forward)
    used = forward.__code__.co_names
    names = [name for name in used if "eager" in name]
    asks = "get_interface" in used or ("ALL_ATTENTION_FUNCTIONS" in used and "getattr" not in used)  # before 5.1
    if not asks or len(names) != 1:
        return None
    function: AttentionFunction = forward.__globals__[names[0]]
    return function


def per_sequence(rows: Tensor, num_sequences: int) -> Tensor:
    """Repeats rows (B, ...) for sequences in the order (sample, window): (num_sequences, ...)."""
    if rows.shape[0] == 1:
        return rows.expand(num_sequences, *rows.shape[1:])
    if rows.shape[0] == num_sequences:
        return rows
    if num_sequences % rows.shape[0]:
        raise ValueError(
            f"Prompts differ between the {rows.shape[0]} samples of the batch, but the attention sees {num_sequences} "
            "sequences, which is no multiple: samples that share one packed sequence need equal prompts."
        )
    return rows.repeat_interleave(num_sequences // rows.shape[0], dim=0)


def _beside(rows: Tensor, middle: Tensor, num_behind: int, dim: int) -> Tensor:
    if not num_behind:
        return torch.cat([rows, middle], dim=dim)
    num_before = rows.shape[dim] - num_behind
    before, behind = rows.narrow(dim, 0, num_before), rows.narrow(dim, num_before, num_behind)
    return torch.cat([before, middle, behind], dim=dim)


def _extend_block_mask(mask: Any, before: int, behind: int) -> Any:
    """Rebuilds a flex attention `BlockMask` so that every query sees the rows."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_queries, num_keys = mask.seq_lengths
    mask_mod = mask.mask_mod

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inner = (key - before).clamp(0, num_keys - 1)
        seen: Tensor = (key < before) | (key >= before + num_keys) | mask_mod(batch, head, query, inner)
        return seen

    batch, heads = mask.shape[:2]
    device = mask.kv_num_blocks.device
    return create_block_mask(sees, batch, heads, num_queries, before + num_keys + behind, device=device)


def visible_value(mask: Tensor) -> int:
    """What lets a query see a key: 1 in a mask that selects (boolean, or (B, N)), 0 in one that is added."""
    return 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0


def _extend_mask(mask: Any, rows: Rows, num_keys: int, dtype: torch.dtype, num_sequences: int) -> Any:
    """Adds the columns of the rows to an attention mask: visible to every query, biased by `rows.score_bias`."""
    behind = rows.num_behind
    before = rows.key.shape[2] - behind
    if mask is not None and not isinstance(mask, Tensor):
        mask = _extend_block_mask(mask, before, behind)
    elif mask is not None:
        mask = F.pad(mask, (before, behind), value=visible_value(mask))
    if rows.score_bias is None:
        return mask
    bias = per_sequence(rows.score_bias.to(dtype), num_sequences)
    bias = _beside(bias, bias.new_zeros(num_sequences, num_keys), behind, dim=1)[:, None, None, :]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask + bias


def join_rows(rows: Rows, key: Tensor, value: Tensor, mask: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """Puts rows beside keys and values (B, H, N, d), and adds their columns to the mask.

    Args:
        rows: the rows.
        key: keys without them.
        value: values without them.
        mask: attention mask in one of the forms of `attend_with_rows`.
        dtype: type of the queries, which an added mask shares.
    """
    num_sequences, _, num_keys, _ = key.shape
    mask = _extend_mask(mask, rows, num_keys, dtype, num_sequences)
    key = _beside(per_sequence(rows.key.to(key.dtype), num_sequences), key, rows.num_behind, dim=2)
    value = _beside(per_sequence(rows.value.to(value.dtype), num_sequences), value, rows.num_behind, dim=2)
    return key, value, mask


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """What sdpa hides without a mask where it is causal, (1, 1, N, N): it aligns queries with the first keys."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()[None, None]


def _is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """As transformers' sdpa decides it for calls without a mask."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def attend_with_rows(
    module: nn.Module | ModuleView,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes the attention of an adapted module, `K' = [P_K; K]` and `V' = [P_V; V]` (paper equation 5).

    The signature is that of transformers' attention functions: query (B, H, N, d), key and value (B, H, N, d), a mask
    that is `None`, (B or 1, H or 1, N, N), (B, N) or a flex attention `BlockMask`. Rows carry no position and are seen
    by every query. Without rows the call goes through untouched.
    """
    view = module.config.__dict__
    config, owner = view["_e2vpt_source"], view["_e2vpt_owner"]
    implementation = config._attn_implementation
    attend: AttentionFunction = (
        owner.eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    )
    if "flash" in implementation:
        module = ModuleView(module, config)
    num_sequences, _, num_keys, _ = key.shape
    rows = owner.rows(num_sequences, key.dtype)
    if rows is not None:
        if "flash" in implementation:  # aligns a causal mask with the last keys
            rows = rows._replace(num_behind=0)
        elif implementation == "sdpa" and attention_mask is None and _is_causal(module, kwargs):
            attention_mask = causal_mask(num_keys, num_keys, key.device)  # made before rows become the first keys
        if kwargs.get("position_bias") is not None:
            columns = (rows.key.shape[2] - rows.num_behind, rows.num_behind)
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], columns)
        key, value, attention_mask = join_rows(rows, key, value, attention_mask, query.dtype)
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, attend_with_rows)
