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
    """Prompts and trained parameters of one adapter, counted with the head and without pruned values.

    This is the one definition of what is trained and of its percentage, which tables, logs, cards and the command line
    show. It is `PeftModel.get_nb_trainable_parameters()` of a model with this adapter alone, but for pruned values:
    they keep their place in the tensors of a model, so PEFT goes on counting them.

    Attributes:
        layers: one `PromptCount` per adapted self-attention.
        num_prompt_values: trained parameters of the prompts that take part.
        num_head_values: trained parameters of the head (`modules_to_save`).
        num_backbone_values: parameters of the model without the adapter's, the head left out.
        num_replaced_values: parameters of the frozen head that the trained one stands in for; PEFT keeps it.
        num_pruned_values: values of visual prompts that are pruned.
    """

    layers: list[PromptCount]
    num_prompt_values: int
    num_head_values: int
    num_backbone_values: int
    num_replaced_values: int = 0
    num_pruned_values: int = 0

    @property
    def num_tuned_values(self) -> int:
        """Trained parameters of prompts and head together."""
        return self.num_prompt_values + self.num_head_values

    @property
    def num_frozen_values(self) -> int:
        """All other parameters of the model."""
        return self.num_backbone_values + self.num_replaced_values

    @property
    def tuned_percentage(self) -> float:
        """Trained parameters in percent of all parameters of the model, prompts and head included."""
        return self.percentage_of(self.num_tuned_values)

    def percentage_of(self, num_tuned_values: int) -> float:
        """The percentage of the model if as many parameters of it were trained."""
        return 100.0 * num_tuned_values / (num_tuned_values + self.num_frozen_values)

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
        if self.num_pruned_values:
            lines.append(
                f"{self.num_pruned_values:,} pruned values are not among them; PEFT's print_trainable_parameters() "
                "goes on counting them."
            )
        return "\n".join(lines)


def summarise(model: nn.Module, adapter_name: str) -> PromptSummary:
    """Counts what is kept of an adapter of a model."""
    layers: list[PromptCount] = []
    seen: set[int] = set()
    num_pruned = 0
    for layer in prompt_layers(model):
        config = layer.e2vpt_config.get(adapter_name)
        if config is None:
            continue
        tokens = segments = values = 0
        if adapter_name in layer.e2vpt_visual_prompts:
            token, segment = layer.gates(adapter_name)
            tokens = int((token != 0).sum())
            segments = int(((segment * token[:, None]) != 0).sum())
            kept = layer.kept(adapter_name)
            values = int(kept.sum())
            num_pruned += kept.numel() - values
        if adapter_name in layer.e2vpt_kv_prompts:
            values += numel(layer.e2vpt_kv_prompts[adapter_name])
        layers.append(
            PromptCount(
                layer.index, layer.site.name, tokens, segments, config.num_kv_prompts, values, layer.attention_path
            )
        )
    num_head = num_replaced = 0
    num_packed = sum(tensor.numel() for tensor in packed_weights(model))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            seen.update(id(parameter) for parameter in module.parameters())
            num_replaced += _num_values(module.original_module)
            if adapter_name in module.modules_to_save:
                num_head += _num_values(module.modules_to_save[adapter_name])
            num_packed -= sum(tensor.numel() for tensor in packed_weights(module))
        elif isinstance(module, PromptLayers):
            seen.update(id(parameter) for parameter in module.parameters())
    num_backbone = num_packed + sum(numel(p) for p in model.parameters() if id(p) not in seen)
    num_prompts = sum(layer.num_values for layer in layers)
    return PromptSummary(layers, num_prompts, num_head, num_backbone, num_replaced, num_pruned)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters of a model are trained, and how many it has, as `PeftModel.get_nb_trainable_parameters()`.

    Of a model with E2VPT these are the counts of its active adapter alone, pruned values not among them. Any other
    model, with or without PEFT, is counted as PEFT does.
    """
    layers = prompt_layers(model)
    if layers:
        summary = summarise(model, next(iter((*layers[0].active_adapters, *layers[0].e2vpt_config))))
        return summary.num_tuned_values, summary.num_tuned_values + summary.num_frozen_values
    trained = sum(numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(map(numel, model.parameters()))


def _num_values(module: nn.Module) -> int:
    return sum(map(numel, module.parameters())) + sum(tensor.numel() for tensor in packed_weights(module))
