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
        layer: the layer that owns the prompts, that of the first block.
        last_block: the block after which the prompts leave the sequence.
        prefix_tokens: class and register tokens that stay before the prompts.
    """

    def __init__(self, layer: E2VPTLayer, last_block: nn.Module, prefix_tokens: int) -> None:
        self.layer = layer
        self.prefix_tokens = prefix_tokens
        self.handles = [
            layer.site.block.register_forward_pre_hook(self._insert, with_kwargs=True),
            last_block.register_forward_hook(self._remove),
        ]

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()

    def _prompts(self, num_samples: int) -> list[Tensor]:
        layer = self.layer
        if layer.disable_adapters:
            return []
        return [
            layer.visual_prompts(adapter_name, num_samples)[0]
            for adapter_name in layer.active_adapters
            if adapter_name in layer.e2vpt_visual_prompts
            and layer.e2vpt_config[adapter_name].visual_prompt_mode == "shallow"
        ]

    def _insert(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        prompts = [p.to(hidden.dtype).expand(hidden.shape[0], -1, -1) for p in self._prompts(hidden.shape[0])]
        if not prompts:
            return None
        hidden = torch.cat([hidden[:, : self.prefix_tokens], *prompts, hidden[:, self.prefix_tokens :]], dim=1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _remove(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        layer, count = self.layer, 0
        if layer.disable_adapters:
            return None
        for adapter_name in layer.active_adapters:
            config = layer.e2vpt_config.get(adapter_name)
            if config is not None and config.visual_prompt_mode == "shallow":
                kept = layer.e2vpt_kept_tokens
                count += len(kept[adapter_name]) if adapter_name in kept else config.num_visual_prompts
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.cat([hidden[:, : self.prefix_tokens], hidden[:, self.prefix_tokens + count :]], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
