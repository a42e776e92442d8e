# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The tensors of an adapter as they are on disk: pruned values left out, and everything checked on the way back."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Size, Tensor, nn

from .config import E2VPTConfig
from .gates import kept_values
from .prompt_layers import prompt_layers


def without_pruned_values(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Turns every pruned tensor of visual prompts (M, D) into its kept values, a tensor (values,)."""
    layers = {str(layer.index): layer for layer in prompt_layers(model)}
    for key, tensor in tensors.items():
        if f".e2vpt_visual_prompts.{adapter_name}" in key:
            kept = layers[key.split(".")[-3]].kept(adapter_name)
            if not kept.all():
                tensors[key] = tensor[kept.to(tensor.device)]
    return tensors


def fit_to_model(
    model: nn.Module, tensors: dict[str, Tensor], config: E2VPTConfig, adapter_name: str
) -> dict[str, Tensor]:
    """Checks the tensors of a file against the model and spreads pruned visual prompts to full shape.

    Args:
        model: the adapted model.
        tensors: those of the file, by their names in the model.
        config: configuration of the adapter.
        adapter_name: its name in the model.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names it.
    """
    values = model.state_dict()
    for name, tensor in tensors.items():
        if f".modules_to_save.{adapter_name}." in name and name in values and tensor.shape != values[name].shape:
            path = name.replace(f".modules_to_save.{adapter_name}", "")
            raise ValueError(_head_mismatch(model, path, tensor.shape, values[name].shape, config))
    live = {name: tensor for name, tensor in values.items() if ".e2vpt_" in name and name.endswith(f".{adapter_name}")}
    given = {name: tensor for name, tensor in tensors.items() if ".e2vpt_" in name}
    missing, unknown = sorted(live.keys() - given.keys()), sorted(given.keys() - live.keys())
    if missing or unknown:
        _refuse_names(missing, unknown, adapter_name)
    for name, tensor in given.items():
        if name.endswith(f".e2vpt_visual_prompts.{adapter_name}") and tensor.dim() == 1:
            tensors[name] = _spread(name, tensor, live[name], given, config, adapter_name)
        elif tensor.shape != live[name].shape:
            raise ValueError(
                f"The adapter's tensor {name} has shape {tuple(tensor.shape)}, but the model needs "
                f"{tuple(live[name].shape)}: was it trained on another backbone or with another E2VPTConfig?"
            )
    return tensors


def _head_mismatch(model: nn.Module, name: str, found: Size, needed: Size, config: E2VPTConfig) -> str:
    """What is wrong with a tensor of a head, and which base model it needs.

    Args:
        model: the adapted model.
        name: of the tensor in the adapter's file.
        found: its shape.
        needed: the shape in the model.
        config: configuration of the adapter.
    """
    if found[1:] != needed[1:]:
        advice = "load it on the backbone it was trained on."
    else:
        classes = _classes(model, found, needed, config)
        advice = (
            f"load the base model with the number of classes of the adapter, num_labels={classes}."
            if classes is not None
            else "give the base model the head that the adapter was trained with, as peft_e2vpt.load(...) does."
        )
    return f"The adapter's tensor {name} has shape {tuple(found)}, but the model needs {tuple(needed)}: {advice}"


def _classes(model: nn.Module, found: Size, needed: Size, config: E2VPTConfig) -> int | None:
    """The number of classes to ask for; `None` if that is not what differs."""
    num_labels: int | None = getattr(getattr(model, "config", None), "num_labels", None)
    if config.labels is not None:
        classes = len(config.labels)
    elif num_labels is not None and 0 <= needed[0] - num_labels <= 1:  # detectors have a row for "no object"
        classes = found[0] - (needed[0] - num_labels)
    else:
        return None
    return None if classes == num_labels else classes


def _refuse_names(missing: list[str], unknown: list[str], adapter_name: str) -> None:
    suffix = f".{adapter_name}"
    lines = [f"missing {name.removesuffix(suffix)}" for name in missing]
    for name in unknown:
        close = get_close_matches(name, [m.removesuffix(suffix) for m in missing], n=1)
        lines.append(f"unknown {name.removesuffix(suffix)}" + (f" (misspelt {close[0]}?)" if close else ""))
    shown = "; ".join(lines[:6]) + ("; ..." if len(lines) > 6 else "")
    raise ValueError(
        f"The adapter's file does not fit the model: {shown}. Load it on the backbone it was trained on, and with "
        "the adapter_config.json that was saved beside it."
    )


def _spread(
    name: str,
    values: Tensor,
    live: Tensor,
    given: dict[str, Tensor],
    config: E2VPTConfig,
    adapter_name: str,
) -> Tensor:
    token = given[name.replace("visual_prompts", "token_gates")]
    segment = given[name.replace("visual_prompts", "segment_gates")]
    kept = kept_values(token, segment, live.shape[-1], config.segment_layout)
    if kept.shape != live.shape or int(kept.sum()) != values.numel():
        raise ValueError(
            f"The adapter's tensor {name} holds {values.numel()} values, but its gates keep {int(kept.sum())}: "
            "the file is damaged."
        )
    prompts = torch.zeros(live.shape, dtype=values.dtype, device=values.device)
    prompts[kept.to(values.device)] = values
    return prompts
