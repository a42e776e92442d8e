# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What is kept of an adapter, layer by layer, and how much of the model is trained."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from peft.utils import ModulesToSaveWrapper
from torch import nn

from .._compat import packed_weights
from ..distributed import numel
from .prompt_layers import PromptLayers, prompt_layers


@dataclass(frozen=True)
class PromptCount:
    """What is kept in one adapted self-attention.

    Attributes:
        index: number of the self-attention.
        name: path of the self-attention.
        num_visual_prompts: visual prompts kept.
        num_segments: segments kept in them.
        num_kv_prompts: key-value prompts.
        num_values: trained parameters that take part.
        attention_path: how its rows reach it: `"interface"` where it asks transformers for its attention,
            `"interception"` where it computes one of its own.
    """

    index: int
    name: str
    num_visual_prompts: int
    num_segments: int
    num_kv_prompts: int
    num_values: int
    attention_path: str

    @property
    def socket(self) -> str:
        """The former name of `attention_path`; the next release drops it."""
        warnings.warn("socket is now called attention_path.", DeprecationWarning, stacklevel=2)
        return self.attention_path


@dataclass(frozen=True)
class PromptSummary:
    """Prompts and trained parameters of one adapter, counted as in the paper: with the head, without pruned values.

    Attributes:
        layers: one `PromptCount` per adapted self-attention.
        num_prompt_values: trained parameters of the prompts that take part.
        num_head_values: trained parameters of the head (`modules_to_save`).
        num_backbone_values: parameters of the model without the adapter's, the head left out.
    """

    layers: list[PromptCount]
    num_prompt_values: int
    num_head_values: int
    num_backbone_values: int

    @property
    def num_tuned_values(self) -> int:
        """Trained parameters of prompts and head together."""
        return self.num_prompt_values + self.num_head_values

    @property
    def tuned_percentage(self) -> float:
        """Trained parameters in percent of all parameters of the model, prompts and head included."""
        return 100.0 * self.num_tuned_values / (self.num_tuned_values + self.num_backbone_values)

    def __str__(self) -> str:
        counts = f"{'layer':>5}  {'prompts':>7}  {'segments':>8}  {'kv prompts':>10}  {'parameters':>10}"
        lines = [f"{counts}  {'attention path':<14}  attention"]
        lines += [
            f"{layer.index:>5}  {layer.num_visual_prompts:>7}  {layer.num_segments:>8}  {layer.num_kv_prompts:>10}  "
            f"{layer.num_values:>10,}  {layer.attention_path:<14}  {layer.name}"
            for layer in self.layers
        ]
        lines.append(
            f"prompts {self.num_prompt_values:,} + head {self.num_head_values:,} = {self.num_tuned_values:,} trained "
            f"parameters, {self.tuned_percentage:.3f} % of the model"
        )
        return "\n".join(lines)


def summarise(model: nn.Module, adapter_name: str) -> PromptSummary:
    """Counts what is kept of an adapter of a model."""
    layers: list[PromptCount] = []
    seen: set[int] = set()
    for layer in prompt_layers(model):
        config = layer.e2vpt_config.get(adapter_name)
        if config is None:
            continue
        tokens = segments = values = 0
        if adapter_name in layer.e2vpt_visual_prompts:
            token, segment = layer.gates(adapter_name)
            tokens = int((token != 0).sum())
            segments = int(((segment * token[:, None]) != 0).sum())
            values = int(layer.kept(adapter_name).sum())
        if adapter_name in layer.e2vpt_kv_prompts:
            values += numel(layer.e2vpt_kv_prompts[adapter_name])
        layers.append(
            PromptCount(
                layer.index, layer.site.name, tokens, segments, config.num_kv_prompts, values, layer.attention_path
            )
        )
    num_head = 0
    num_packed = sum(tensor.numel() for tensor in packed_weights(model))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            seen.update(id(parameter) for parameter in module.parameters())
            if adapter_name in module.modules_to_save:
                num_head += _num_values(module.modules_to_save[adapter_name])
            num_packed -= sum(tensor.numel() for tensor in packed_weights(module))
        elif isinstance(module, PromptLayers):
            seen.update(id(parameter) for parameter in module.parameters())
    num_backbone = num_packed + sum(numel(p) for p in model.parameters() if id(p) not in seen)
    return PromptSummary(layers, sum(layer.num_values for layer in layers), num_head, num_backbone)


def _num_values(module: nn.Module) -> int:
    return sum(map(numel, module.parameters())) + sum(tensor.numel() for tensor in packed_weights(module))
