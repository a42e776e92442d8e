# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""An adapter whose rows and heads are weighted sums of those of others."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .._compat import is_quantised
from .config import E2VPTConfig
from .heads import resize
from .prompt_layers import prompt_layers


def _heads(model: nn.Module, adapter_names: list[str]) -> list[ModulesToSaveWrapper]:
    """Lists where the adapters have heads of their own.

    Raises:
        ValueError: the adapters do not have the same heads, in the same sizes.
    """
    heads = []
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            owners = [name for name in adapter_names if name in module.modules_to_save]
            if any(is_quantised(module.modules_to_save[name]) for name in owners):
                raise ValueError(f"The head {path} is quantised: combine adapters before the model is quantised.")
            states = [module.modules_to_save[name].state_dict() for name in owners]
            shapes = {tuple((key, value.shape) for key, value in state.items()) for state in states}
            if owners and (owners != adapter_names or len(shapes) > 1):
                raise ValueError(
                    f"The adapters {', '.join(adapter_names)} cannot be combined: {', '.join(owners)} have the head "
                    f"{path}, in {len(shapes)} different sizes; all need the same heads with equally many classes."
                )
            if owners:
                heads.append(module)
    return heads


def check_weights(adapter_names: list[str], weights: list[float]) -> None:
    """Checks that every adapter has a weight.

    Raises:
        ValueError: there are more or fewer, or no adapters.
    """
    if not adapter_names or len(adapter_names) != len(weights):
        raise ValueError(
            f"add_weighted_adapter needs one weight per adapter, got {len(adapter_names)} adapters and {len(weights)} "
            "weights."
        )


def combined_config(model: nn.Module, configs: list[E2VPTConfig], adapter_names: list[str]) -> E2VPTConfig:
    """Returns the configuration of an adapter that holds the sums of rows of others.

    Args:
        model: the adapted model.
        configs: configurations of the adapters.
        adapter_names: their names.

    Raises:
        ValueError: the adapters differ in the attentions they adapt, their numbers of rows or their heads, or have
            different numbers of rows in different attentions, as pruned ones do.
    """
    _heads(model, adapter_names)
    counts = {
        name: [layer.num_rows(name) for layer in prompt_layers(model) if name in layer.e2vpt_config]
        for name in adapter_names
    }
    adapted = {tuple(layer.index for layer in prompt_layers(model) if n in layer.e2vpt_config) for n in adapter_names}
    different = {count for rows in counts.values() for count in rows}
    if len(adapted) > 1 or len(different) > 1:
        found = "; ".join(f"{name!r} has {rows}" for name, rows in counts.items())
        raise ValueError(
            f"Only adapters with equally many rows in the same attentions can be combined, but {found} rows."
        )
    return replace(
        configs[0],
        num_visual_prompts=0,
        num_kv_prompts=different.pop(),
        share_kv_prompts=False,
        share_kv_prompts_across_layers=False,
    )


@torch.no_grad()
def combine(model: nn.Module, adapter_names: list[str], weights: list[float], new_name: str) -> None:
    """Writes the weighted sums of the rows and heads of adapters into a new one.

    Args:
        model: the adapted model.
        adapter_names: names of the adapters.
        weights: one per adapter.
        new_name: name of the adapter made with `combined_config`.
    """
    for layer in prompt_layers(model):
        if new_name in layer.e2vpt_config:
            prompts = layer.e2vpt_kv_prompts[new_name]
            rows = [layer.computed_rows(name).squeeze(1).to(prompts.dtype) for name in adapter_names]
            prompts.copy_(_weighted_sum(rows, weights))
    for head in _heads(model, adapter_names):
        states = [head.modules_to_save[name].state_dict() for name in adapter_names]
        for key, tensor in head.modules_to_save[new_name].state_dict().items():
            if tensor.shape != states[0][key].shape:  # other classes than the base model's
                resize(head.modules_to_save[new_name], key, states[0][key])
        for key, tensor in head.modules_to_save[new_name].state_dict().items():
            tensors = [state[key] for state in states]
            tensor.copy_(_weighted_sum(tensors, weights) if tensor.is_floating_point() else tensors[0])


def _weighted_sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)
