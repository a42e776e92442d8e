# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Refuses a frozen prefix that gives an image other hidden states whenever it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._compat import keeps_statistics
from ...tuner.layer import E2VPTLayer
from ...tuner.prompt_layers import PromptLayers
from .data import Data
from .passing import FrozenPrefix
from .trace import modules_in


def refuse_random(model: nn.Module, prefix: FrozenPrefix, data: Data, tried: dict[str, Any], plain: Tensor) -> None:
    """Refuses a prefix that is another for the same image while training.

    Raises:
        ValueError: it has dropout, or statistics of batches, or whatever else changes.
    """
    paths = {module: path for path, module in model.named_modules()}
    parts = modules_in(prefix.skipped)
    rates = {
        part: getattr(part, "p", getattr(part, "drop_prob", 0.0)) for part in parts if "Drop" in type(part).__name__
    }
    dropping = [f"{paths[part]} ({rate:g})" for part, rate in rates.items() if rate]
    if dropping:
        raise ValueError(
            f"{len(dropping)} modules before the first that trains drop values at random while training, such as "
            f"{dropping[0]}: set their rates to 0, for instance in the config that the model is loaded with "
            "(hidden_dropout_prob=0.0, drop_path_rate=0.0), or train on the images."
        )
    inputs = data.for_model(tried)
    _train_all_but_prompts(model)
    try:
        counting = [paths[part] for part in parts if part.training and keeps_statistics(part)]
        if counting:
            raise ValueError(
                f"{counting[0]} comes before the first module that trains and computes statistics of each batch while "
                "training, so an image has no hidden states of its own: keep it in eval mode, or train on the images."
            )
        for _ in range(2):
            if not torch.equal(prefix.hidden_states(lambda: model(**inputs)), plain):
                raise ValueError(
                    f"What comes before the first module that trains, up to {prefix.last_module}, is random while "
                    "training (attention dropout, layer dropout, shifted positions, masks): switch that off in the "
                    "config that the model is loaded with, or train on the images."
                )
    finally:
        model.eval()


def _train_all_but_prompts(model: nn.Module) -> None:
    """Training mode for all that may come before the first trained module; prompt layers would count a pass."""
    ours = {part for module in model.modules() if isinstance(module, PromptLayers) for part in module.modules()}
    for module in model.modules():
        stays = "train" in module.__dict__  # in eval mode, whoever trains the model
        if module not in ours and not isinstance(module, E2VPTLayer) and not stays:
            module.training = True
