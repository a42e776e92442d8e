# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How the prompts of one self-attention become key and value rows, computed in a forward pass or once as constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.rows import Rows, side_by_side
from ..backbones.sites import AttentionSite
from .prompts import Prompts


def computed(prompts: Prompts, adapter_name: str, num_samples: int | None, dtype: torch.dtype) -> list[Rows]:
    """The rows of an adapter: `k_proj(norm(P))` and `v_proj(norm(P))` of visual prompts, and key-value prompts.

    Args:
        prompts: the prompts of the attention.
        adapter_name: name of the adapter.
        num_samples: B, the samples of the batch, each with a dropout of its own; `None` drops nothing.
        dtype: type of the attention's keys.

    Returns:
        Rows (1 or B, H, P_i, d) of each kind of prompts that the adapter has.
    """
    parts = []
    if prompts.has_visual_rows(adapter_name):
        visual_prompts, bias = prompts.visual_prompts(adapter_name, num_samples)
        parts.append(Rows(*prompts.site.project(visual_prompts, dtype), score_bias=bias))
    kv_prompts = prompts.kv_prompts(adapter_name)
    if kv_prompts is not None:
        kv_prompts = kv_prompts.to(dtype)
        key, value = kv_prompts.split(1) if len(kv_prompts) == 2 else (kv_prompts, kv_prompts)
        parts.append(_in_heads(prompts, key, value, adapter_name))
    return parts


@torch.no_grad()
def to_constants(prompts: Prompts, adapter_name: str, dtype: torch.dtype) -> Tensor:
    """The rows of an adapter without dropout and gradient: keys and values, a tensor (2, 1, H, P, d)."""
    rows = side_by_side(computed(prompts, adapter_name, None, dtype))
    assert rows is not None  # an adapter in deep mode has rows
    width = prompts.site.head_dim
    return torch.stack([F.pad(part, (0, width - part.shape[-1])) for part in (rows.key, rows.value)])


def of_constants(prompts: Prompts, adapter_name: str, constants: Tensor) -> Rows:
    """The rows that `to_constants` gave as a tensor (2, 1, H, P, d)."""
    key, value = constants.unbind()
    return _in_heads(prompts, key, value, adapter_name)


def _in_heads(prompts: Prompts, key: Tensor, value: Tensor, adapter_name: str) -> Rows:
    """Rows (1, H, P, d), cut where keys or values are narrower than d; key-value prompts may go behind."""
    if prompts.site.key_dim != prompts.site.value_dim:
        key, value = key[..., : prompts.site.key_dim], value[..., : prompts.site.value_dim]
    before = prompts.e2vpt_config[adapter_name].kv_prompt_position == "before"
    return Rows(key, value, 0 if before else prompts.num_kv_rows(adapter_name))


def as_scored(site: AttentionSite, rows: Rows) -> Rows:
    """Rows as the scores of an attention take them: of length 1 for a cosine, and with its average position bias."""
    backbone = site.backbone
    if not (backbone.cosine or backbone.score_bias):
        return rows
    bias = rows.key.new_zeros(1, rows.key.shape[2]) if rows.score_bias is None else rows.score_bias
    return rows._replace(key=site.normalise(rows.key), score_bias=bias + backbone.score_bias)
