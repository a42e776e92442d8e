# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Shallow prompts: one set of visual prompts as tokens of the sequence, from the first block to the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layer import E2VPTLayer


class ShallowInsertion:
    """Inserts the visual prompts of a layer before the first block and takes them out after the last (VPT-Shallow).

    Both ends are hooks on the blocks, inside what activation checkpointing recomputes. Nothing is kept between them.

    Args:
        adapter_name: name of the adapter whose prompts these are.
        layer: the layer that owns the prompts, that of the first block.
        last_block: the block after which the prompts leave the sequence.
    """

    def __init__(self, adapter_name: str, layer: E2VPTLayer, last_block: nn.Module) -> None:
        assert layer.site.prefix_tokens is not None
        self.adapter_name = adapter_name
        self.layer = layer
        self.prefix_tokens = layer.site.prefix_tokens  # class and register tokens, which stay before the prompts
        self.handles = [
            layer.site.block.register_forward_pre_hook(self._insert, with_kwargs=True),
            last_block.register_forward_hook(self._remove),
        ]

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()

    def _is_active(self) -> bool:
        return not self.layer.disable_adapters and self.adapter_name in self.layer.active_adapters

    def _insert(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._is_active():
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        prompts, _ = self.layer.visual_prompts(self.adapter_name, hidden.shape[0])
        prompts = prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        hidden = torch.cat([hidden[:, : self.prefix_tokens], prompts, hidden[:, self.prefix_tokens :]], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _remove(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._is_active():
            return None
        name, kept = self.adapter_name, self.layer.e2vpt_kept_tokens
        count = len(kept[name]) if name in kept else self.layer.e2vpt_config[name].num_visual_prompts
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat([hidden[:, : self.prefix_tokens], hidden[:, self.prefix_tokens + count :]], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
