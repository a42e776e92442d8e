# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What the files of a saved adapter hold, read without its base model and without torch: `inspect_adapter`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from .files import CARD_NAME, METADATA_KEY, WEIGHTS_NAME, damaged, find_file, read_config


PREFIX = "base_model.model.e2vpt."
DIMENSIONS = {  # of the tensors of a layer; pruned visual prompts have one
    "e2vpt_visual_prompts": (1, 2),
    "e2vpt_kv_prompts": (4,),
    "e2vpt_token_gates": (1,),
    "e2vpt_segment_gates": (2,),
}
TOLD = (  # settings of the configuration that are shown
    "visual_prompt_mode",
    "num_visual_prompts",
    "num_segments",
    "segment_layout",
    "num_kv_prompts",
    "labels",
    "modules_to_save",
)


@dataclass(frozen=True)
class LayerContent:
    """What is stored of one adapted self-attention.

    Attributes:
        index: number of the self-attention.
        segments_kept: for every visual prompt whether each of its segments is kept, (M, R); empty if the layer has no
            visual prompts of its own.
        num_kv_prompts: key-value prompts of its own.
        num_values: trained parameters that take part.
    """

    index: int
    segments_kept: list[list[bool]]
    num_kv_prompts: int
    num_values: int

    @property
    def num_visual_prompts(self) -> int:
        """Visual prompts kept; one without any segment is not."""
        return sum(any(prompt) for prompt in self.segments_kept)

    @property
    def num_segments(self) -> int:
        """Segments kept."""
        return sum(sum(prompt) for prompt in self.segments_kept)


@dataclass(frozen=True)
class AdapterContent:
    """What the files of an adapter hold.

    Attributes:
        config: what `adapter_config.json` says.
        layers: one `LayerContent` per self-attention with prompts.
        num_head_values: trained parameters of the head.
        file_size: of the file of tensors, in bytes.
        tuned_percentage: trained parameters in percent of the model, as the card beside the adapter says; `None` if
            there is no card that counts the same parameters. The files alone do not tell, because they do not hold the
            size of the base model.
    """

    config: dict[str, Any]
    layers: list[LayerContent]
    num_head_values: int
    file_size: int
    tuned_percentage: float | None

    @property
    def num_prompt_values(self) -> int:
        """Trained parameters of the prompts that take part."""
        return sum(layer.num_values for layer in self.layers)

    @property
    def num_tuned_values(self) -> int:
        """Trained parameters of prompts and head."""
        return self.num_prompt_values + self.num_head_values

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "base_model": self.config.get("base_model_name_or_path"),
            "format_version": self.config.get("format_version"),
            "file_size": self.file_size,
            **{name: self.config.get(name) for name in TOLD},
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


@dataclass(frozen=True)
class _Tensor:
    """A tensor as bytes: neither torch nor numpy is needed to count values and to compare them with 0."""

    shape: list[int]
    data: bytes

    @property
    def count(self) -> int:
        return prod(self.shape)

    def nonzero(self) -> list[bool]:
        """Which of its values are not 0, in the order of memory, whatever their type."""
        width = len(self.data) // max(self.count, 1)
        return [any(self.data[start : start + width]) for start in range(0, len(self.data), width)]


def inspect_adapter(where: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> AdapterContent:
    """Reads what is in an adapter from its own files, a few hundred kilobytes; the base model is not needed.

    Args:
        where: a repository on the Hub, or a folder.
        revision: branch, tag or commit of the repository.
        subfolder: where in the repository or folder the adapter lies.

    Raises:
        ValueError: there is no adapter, it is not one of E2VPT, or one of its files is damaged.
    """
    config = read_config(str(where), revision, subfolder)
    path = find_file(str(where), WEIGHTS_NAME, revision, subfolder)
    content = path.read_bytes()
    try:
        tensors = {name: _Tensor(info["shape"], info["data"]) for name, info in deserialize(content)}
    except SafetensorError as error:
        raise ValueError(damaged(path, error)) from error
    prompts: dict[int, dict[str, _Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            index, _, kind = name.removeprefix(PREFIX).partition(".")
            if not index.isdecimal() or len(tensor.shape) not in DIMENSIONS.get(kind, ()):
                raise ValueError(
                    f"{path} is damaged: {name} with the shape {tensor.shape} is no tensor of an adapter."
                )
            prompts.setdefault(int(index), {})[kind] = tensor
    num_head_values = sum(tensor.count for name, tensor in tensors.items() if not name.startswith(PREFIX))
    layers = [_layer(path, index, prompts[index]) for index in sorted(prompts)]
    num_tuned = sum(layer.num_values for layer in layers) + num_head_values
    percentage = _percentage_of_card(str(where), revision, subfolder, num_tuned)
    return AdapterContent(config, layers, num_head_values, len(content), percentage)


def _layer(path: Path, index: int, tensors: dict[str, _Tensor]) -> LayerContent:
    kept: list[list[bool]] = []
    num_values = num_kv_prompts = 0
    if "e2vpt_visual_prompts" in tensors:
        gates, token_gates = tensors.get("e2vpt_segment_gates"), tensors.get("e2vpt_token_gates")
        if gates is None or token_gates is None or gates.shape[0] != token_gates.shape[0] or not gates.shape[1]:
            raise ValueError(f"{path} is damaged: the visual prompts of layer {index} do not have their gates.")
        segments, width = gates.nonzero(), gates.shape[1]
        tokens = token_gates.nonzero()
        kept = [
            [token and segment for segment in segments[number * width : (number + 1) * width]]
            for number, token in enumerate(tokens)
        ]
        num_values = tensors["e2vpt_visual_prompts"].count  # pruned values are not stored
    if "e2vpt_kv_prompts" in tensors:
        num_kv_prompts = tensors["e2vpt_kv_prompts"].shape[2]
        num_values += tensors["e2vpt_kv_prompts"].count
    return LayerContent(index, kept, num_kv_prompts, num_values)


def _percentage_of_card(where: str, revision: str | None, subfolder: str | None, num_tuned: int) -> float | None:
    try:
        path = find_file(where, CARD_NAME, revision, subfolder)
    except ValueError:  # an adapter need not have a card
        return None
    counted, percentage = _counts_of_card(path)
    return percentage if counted == num_tuned else None


def _counts_of_card(path: Path) -> tuple[int | None, float | None]:
    """The trained parameters, and their percentage of the model, that a card states."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        stated = (metadata_load(path) or {}).get(METADATA_KEY)
    except (YAMLError, ValueError):  # somebody has edited it
        return None, None
    if isinstance(stated, dict):
        return stated.get("trained_parameters"), stated.get("tuned_percentage")
    # cards of version 0.1.0 say it in their text only
    found = re.search(r"\*\*([\d,]+) values, ([\d.]+) % of the model\*\*", path.read_text(encoding="utf-8"))
    return (int(found[1].replace(",", "")), float(found[2])) if found is not None else (None, None)
