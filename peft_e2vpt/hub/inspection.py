# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What is in the files of a saved adapter, without its base model: `inspect_adapter`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..tuner.config import E2VPTConfig
from .card import CARD_NAME, stated_percentage
from .loading import adapter_file, read_config


PREFIX = "base_model.model.e2vpt."


@dataclass(frozen=True)
class LayerContent:
    """What is stored of one adapted self-attention.

    Attributes:
        index: number of the self-attention.
        segments_kept: for every visual prompt whether each of its segments is alive, (M, R); empty where the layer has
            no visual prompts of its own.
        num_kv_prompts: key-value prompts of its own.
        num_values: trained values that take part.
    """

    index: int
    segments_kept: list[list[bool]]
    num_kv_prompts: int
    num_values: int

    @property
    def num_visual_prompts(self) -> int:
        """Visual prompts alive; one without a live segment is not."""
        return sum(any(prompt) for prompt in self.segments_kept)

    @property
    def num_segments(self) -> int:
        """Segments alive."""
        return sum(sum(prompt) for prompt in self.segments_kept)


@dataclass(frozen=True)
class AdapterContent:
    """What the files of an adapter hold.

    Attributes:
        config: of `adapter_config.json`.
        layers: one `LayerContent` per self-attention with prompts.
        num_head_values: trained values of the head.
        file_size: of the file of tensors, in bytes.
        tuned_percentage: tuned values in percent of the model, as the card beside the adapter says; `None` where there
            is no card that counts the same values. The files alone do not tell, because they do not have the size of
            the base model.
    """

    config: E2VPTConfig
    layers: list[LayerContent]
    num_head_values: int
    file_size: int
    tuned_percentage: float | None

    @property
    def num_prompt_values(self) -> int:
        """Trained prompt values that take part."""
        return sum(layer.num_values for layer in self.layers)

    @property
    def num_tuned_values(self) -> int:
        """Prompt values and head values."""
        return self.num_prompt_values + self.num_head_values

    def as_dict(self) -> dict[str, Any]:
        """Everything in types that JSON has."""
        config = self.config
        return {
            "base_model": config.base_model_name_or_path,
            "format_version": config.format_version,
            "file_size": self.file_size,
            "visual_prompt_mode": config.visual_prompt_mode,
            "num_visual_prompts": config.num_visual_prompts,
            "num_segments": config.num_segments,
            "segment_layout": config.segment_layout,
            "num_kv_prompts": config.num_kv_prompts,
            "labels": config.labels,
            "modules_to_save": config.modules_to_save,
            "prompt_values": self.num_prompt_values,
            "head_values": self.num_head_values,
            "tuned_values": self.num_tuned_values,
            "tuned_percentage": self.tuned_percentage,
            "layers": [
                {
                    "index": layer.index,
                    "visual_prompts": layer.num_visual_prompts,
                    "segments": layer.num_segments,
                    "kv_prompts": layer.num_kv_prompts,
                    "values": layer.num_values,
                    "segments_kept": [[int(kept) for kept in prompt] for prompt in layer.segments_kept],
                }
                for layer in self.layers
            ],
        }


def inspect_adapter(where: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> AdapterContent:
    """Reads what is in an adapter from its own files, a few hundred kilobytes; the base model is not needed.

    Args:
        where: a repository of the Hub, or a folder.
        revision: branch, tag or commit of the repository.
        subfolder: where in the repository or folder the adapter lies.

    Raises:
        ValueError: there is no adapter, it is not one of E2VPT, or its file of tensors is damaged.
    """
    config = read_config(str(where), revision, subfolder)
    path = adapter_file(str(where), SAFETENSORS_WEIGHTS_NAME, revision, subfolder)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    prompts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            index, _, kind = name.removeprefix(PREFIX).partition(".")
            prompts.setdefault(int(index), {})[kind] = tensor
    num_head_values = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith(PREFIX))
    layers = [_content(index, prompts[index]) for index in sorted(prompts)]
    num_tuned = sum(layer.num_values for layer in layers) + num_head_values
    percentage = _percentage_of_card(str(where), revision, subfolder, num_tuned)
    return AdapterContent(config, layers, num_head_values, path.stat().st_size, percentage)


def _content(index: int, tensors: dict[str, Tensor]) -> LayerContent:
    kept = torch.zeros(0, 0, dtype=torch.bool)
    num_values = num_kv_prompts = 0
    if "e2vpt_visual_prompts" in tensors:
        kept = (tensors["e2vpt_segment_gates"] * tensors["e2vpt_token_gates"][:, None]) != 0
        num_values = tensors["e2vpt_visual_prompts"].numel()  # pruned values are not stored
    if "e2vpt_kv_prompts" in tensors:
        num_kv_prompts = tensors["e2vpt_kv_prompts"].shape[2]
        num_values += tensors["e2vpt_kv_prompts"].numel()
    return LayerContent(index, kept.tolist(), num_kv_prompts, num_values)


def _percentage_of_card(
    where: str, revision: str | None, subfolder: str | None, num_tuned_values: int
) -> float | None:
    try:
        card = adapter_file(where, CARD_NAME, revision, subfolder)
    except ValueError:
        return None
    stated = stated_percentage(card.read_text(encoding="utf-8"))
    return stated[1] if stated is not None and stated[0] == num_tuned_values else None
