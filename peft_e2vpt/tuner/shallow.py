# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Shallow prompts: one set of visual prompts as tokens of the sequence, from the first block to the last."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.rows import visible_value
from ..backbones.sites import WeakModule
from .layer import E2VPTLayer


def _widen_block_mask(mask: Any, place: int, count: int) -> Any:
    """Rebuilds a flex attention `BlockMask` for `count` more tokens from index `place` on, seen by every token."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_queries, num_keys = mask.seq_lengths
    mask_mod = mask.mask_mod

    def token(index: Tensor) -> Tensor:
        return torch.where(index < place, index, (index - count).clamp(min=0))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_prompt = (key >= place) & (key < place + count)
        seen: Tensor = is_prompt | mask_mod(batch, head, token(query), token(key))
        return seen

    batch, heads = mask.shape[:2]
    device = mask.kv_num_blocks.device
    return create_block_mask(sees, batch, heads, num_queries + count, num_keys + count, device=device)


class ShallowInsertion:
    """Inserts the visual prompts of a layer before the first block and takes them out after the last (VPT-Shallow).

    Both ends are hooks on the blocks, inside what activation checkpointing recomputes. Nothing is kept between them.

    Args:
        adapter_name: name of the adapter whose prompts these are.
        layer: the layer that owns the prompts, that of the first block.
        blocks: all blocks that the prompts pass, the first and the last included.

    Attributes:
        prefix_tokens: class and register tokens, which stay before the prompts.
    """

    def __init__(self, adapter_name: str, layer: E2VPTLayer, blocks: list[nn.Module]) -> None:
        assert layer.site.prefix_tokens is not None
        self.adapter_name = adapter_name
        self._blocks = [WeakModule(block) for block in blocks]
        self.layer = layer
        self.prefix_tokens = layer.site.prefix_tokens
        self.handles = [
            blocks[0].register_forward_pre_hook(self._insert, with_kwargs=True),
            blocks[-1].register_forward_hook(self._remove),
        ]
        parameters = list(inspect.signature(blocks[0].forward).parameters)
        if "attention_mask" in parameters:  # blocks of older transformers take none
            self.mask_place = parameters.index("attention_mask")
            self.handles += [block.register_forward_pre_hook(self._widen_mask, with_kwargs=True) for block in blocks]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the prompts pass."""
        return [block() for block in self._blocks]

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()

    def is_active(self) -> bool:
        """Whether a forward pass now has the prompts in its sequence."""
        return self.adapter_name in self.layer.adapters_of_pass()

    def _insert(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_active():
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        prompts, _ = self.layer.visual_prompts(self.adapter_name, hidden.shape[0])
        prompts = prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        hidden = self._put_in(hidden, prompts, dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def count(self) -> int:
        """How many tokens are inserted: the prompts that have not been removed."""
        return self.layer.num_kept_prompts(self.adapter_name)

    def _widen_mask(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds the prompts to an attention mask that was made for the tokens alone: every token sees them."""
        place = self.mask_place
        mask = args[place] if len(args) > place else kwargs.get("attention_mask")
        if mask is None or not self.is_active():
            return None
        if isinstance(mask, Tensor):
            seen = mask.new_full((), visible_value(mask))
            mask = self._put_in(mask, seen.expand(*mask.shape[:-1], self.count()), dim=-1)
            if mask.dim() == 4 and mask.shape[-2] > 1:  # prompts see what the first token sees
                mask = self._put_in(mask, mask[:, :, :1].expand(-1, -1, self.count(), -1), dim=-2)
        else:
            mask = _widen_block_mask(mask, self.prefix_tokens, self.count())
        if len(args) > place:
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _put_in(self, tokens: Tensor, prompts: Tensor, dim: int) -> Tensor:
        num_behind = tokens.shape[dim] - self.prefix_tokens
        before, behind = tokens.split([self.prefix_tokens, num_behind], dim=dim)
        return torch.cat([before, prompts, behind], dim=dim)

    def _remove(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.is_active():
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        behind = self.prefix_tokens + self.count()
        hidden = torch.cat([hidden[:, : self.prefix_tokens], hidden[:, behind:]], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
