# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What could end a comparison after hours is tried before it starts, on models without weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification


if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def load_config(model_name: str, num_labels: int) -> PretrainedConfig:
    """
    Reads what a backbone is, without its weights.

    Raises:
        ValueError: There is no such model, or transformers has no image classifier of its kind.
    """
    try:
        config = AutoConfig.from_pretrained(model_name, num_labels=num_labels)
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no backbone {model_name}: {str(error).strip().splitlines()[0]}") from error
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise ValueError(
            f"{model_name} is a {config.model_type} model, of which transformers has no image classifier: choose a "
            "vision transformer, such as facebook/dinov2-base."
        )
    return config


def try_image_size(config: PretrainedConfig, pixel_values: torch.Tensor, model_name: str) -> None:
    """
    Makes sure that a backbone takes images of this size.

    Raises:
        ValueError: It does not.
    """

    def forward(device: str) -> str | None:
        try:
            model = build(config, device).eval()
            with torch.no_grad():
                model(pixel_values=torch.empty_like(pixel_values[:1], device=device))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            return str(error).strip().splitlines()[0].rstrip(".")
        return None

    if forward("meta") is None:
        return
    reason = forward("cpu")  # some models cannot run without weights
    if reason is not None:
        height, width = pixel_values.shape[-2:]
        own = getattr(config, "image_size", None)
        own = own if isinstance(own, int) else own[0] if isinstance(own, (list, tuple)) else None
        advice = f"pass --image_size {own}" if own and own != height else "leave --image_size out"
        raise ValueError(f"{model_name} cannot take images of {height} x {width} pixels ({reason}): {advice}.")


def try_methods(
    methods: list[str], config: PretrainedConfig, prepare: Callable[[str, nn.Module], Any], model_name: str
) -> None:
    """
    Makes sure that every method works on a backbone.

    Raises:
        ValueError: One does not. The message says which, and which do.
    """
    refused: dict[str, str] = {}
    for method in methods:
        try:
            prepare(method, build(config, "meta"))
        except ValueError as error:
            refused[method] = str(error)
        except (RuntimeError, NotImplementedError):
            continue  # needs weights: it is tried when its turn comes
    if refused:
        method, reason = next(iter(refused.items()))
        others = [name for name in methods if name not in refused]
        advice = f" These work: --method {' '.join(others)}." if others else ""
        raise ValueError(f"{method} does not work on {model_name}: {reason}{advice}")


def count_layers(config: PretrainedConfig) -> int:
    """How many self-attentions a backbone has, each of which prompts may stand in."""
    from peft_e2vpt.backbones.sites import find_attention_sites

    try:
        model = build(config, "meta")
    except (RuntimeError, NotImplementedError):
        model = build(config, "cpu")  # some models cannot be built without weights
    return len(find_attention_sites(model))


def build(config: PretrainedConfig, device: str) -> nn.Module:
    """A classifier of this kind, with random weights or none."""
    with torch.device(device):
        return AutoModelForImageClassification.from_config(config)
