# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The attention path through transformers' attention interface.

transformers asks `module.config._attn_implementation` which function computes an attention. An adapted attention
module gets, as its `config`, a view of the model's config that answers this one question with the name of
`attend_with_rows`; every other attention, and the model's config itself, stay as they are. `attend_with_rows` pulls
the rows from their owner, puts them beside keys and values and calls the implementation that the user chose.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .rows import AttentionFunction, RowOwner, causal_mask, join_rows


IMPLEMENTATION = "e2vpt"


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


@contextmanager
def running_eagerly(configs: Iterable[Any]) -> Iterator[None]:
    """Runs a block with the eager attention implementation, which gives weights.

    Args:
        configs: the configs of the towers that run with it; the same one may come again.
    """
    switched = {id(config): config for config in configs if config._attn_implementation != "eager"}
    before = {key: config._attn_implementation for key, config in switched.items()}
    try:
        for config in switched.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in switched.items():
            config._attn_implementation = before[key]


def eager_attention_of(attention: nn.Module, name: str | None) -> AttentionFunction | None:
    """The eager attention function in the model file of `attention`.

    A class that asks transformers' attention interface keeps the config that names the implementation, and its file
    has the function for `"eager"`. Nearly all files have one, `eager_attention_forward`; `BACKBONES` says where it
    has another name, and which class does its own arithmetic in such a file.

    Args:
        attention: the self-attention, adapted or not.
        name: of the function.

    Returns:
        The function, or `None` where the class does not ask transformers' attention interface for its attention.
    """
    if name is None or not hasattr(attention, "config"):
        return None
    cls = next(cls for cls in type(attention).__mro__ if "forward" in vars(cls))  # a subclass may stand elsewhere
    function: AttentionFunction | None = getattr(sys.modules[cls.__module__], name, None)
    return function


def _is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """As transformers' sdpa decides it for calls without a mask."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _dense(mask: Any, num_queries: int, num_keys: int, is_causal: bool, device: torch.device) -> Tensor | None:
    """A mask of flash (B, N) or of flex attention as sdpa takes it, boolean (B or 1, H or 1, N, N)."""
    if mask is None:
        return causal_mask(num_queries, num_keys, device) if is_causal else None
    if not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import create_mask

        batch, heads = mask.shape[:2]
        dense: Tensor = create_mask(mask.mask_mod, batch, heads, num_queries, num_keys, device=device)
        return dense
    if mask.dim() == 2:
        seen = mask[:, None, None].bool()
        return seen & causal_mask(num_queries, num_keys, device) if is_causal else seen
    return mask


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
    by every query. Without rows the call goes through untouched. Rows with a bias on their scores, which flash and
    flex attention do not take, are computed by sdpa there.
    """
    view = module.config.__dict__
    config, owner = view["_e2vpt_source"], view["_e2vpt_owner"]
    implementation = config._attn_implementation
    num_sequences, _, num_keys, _ = key.shape
    rows = owner.rows(num_sequences, key.dtype)
    if rows is not None and rows.score_bias is not None and ("flash" in implementation or "flex" in implementation):
        causal = "flash" in implementation and _is_causal(module, kwargs)
        attention_mask = _dense(attention_mask, query.shape[2], num_keys, causal, key.device)
        kwargs, implementation = {**kwargs, "is_causal": False}, "sdpa"
    attend: AttentionFunction = (
        owner.eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    )
    if "flash" in implementation:
        module = ModuleView(module, config)
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
