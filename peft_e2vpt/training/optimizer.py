# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Parameter groups: learning rates of their own for visual prompts, key-value prompts and head.

Prompts stand at the input of frozen layers and want rates a hundred times those of weights; the head, on standardised
features, wants one between. A scheduler scales all of them alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names
from transformers.utils import logging

from ..backbones.heads import find_heads
from ..backbones.sites import find_attention_sites
from ..tuner.layer import E2VPTLayer
from .running import trainer_around


logger = logging.get_logger(__name__)

LEARNING_RATE = 6e-3
"""The default of visual prompts and key-value prompts, for short and long training."""
HEAD_LEARNING_RATE = 3e-4
"""The default of the head, which starts as a linear probe on standardised features."""
TRAINER_LEARNING_RATE = 5e-5  # the default of TrainingArguments, which is for weights

VISUAL_PROMPTS, KV_PROMPTS, HEAD, OTHERS = PARTS = ("visual_prompts", "kv_prompts", "head", "others")
# what transformers leaves out of weight decay besides norms (`Trainer.get_decay_parameter_names`)
NOT_DECAYED = ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def part_of_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """What each trained parameter of a model is: `"visual_prompts"`, `"kv_prompts"`, `"head"` or `"others"`.

    The head of a model of PEFT is what `modules_to_save` names; that of a plain model is found as E2VPT finds it.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    parts: dict[nn.Parameter, str] = {}

    def note(parameters: Iterable[nn.Parameter], part: str) -> None:
        parts.update({parameter: part for parameter in parameters if parameter.requires_grad})

    note(model.parameters(), OTHERS)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            note(module.modules_to_save.parameters(), HEAD)
        elif isinstance(module, E2VPTLayer):
            note(module.e2vpt_visual_prompts.parameters(), VISUAL_PROMPTS)
            note(module.e2vpt_kv_prompts.parameters(), KV_PROMPTS)
    if not hasattr(model, "peft_config"):
        for path in _heads_of_plain_model(model):
            note(model.get_submodule(path).parameters(), HEAD)
    return parts


def _heads_of_plain_model(model: nn.Module) -> list[str]:
    try:
        sites = find_attention_sites(model)
    except ValueError:  # without attentions that E2VPT knows, nothing tells backbone and head apart
        return []
    return find_heads(model, sites)


def parameter_groups(
    model: nn.Module,
    lr: float = LEARNING_RATE,
    *,
    kv_lr: float | None = None,
    head_lr: float = HEAD_LEARNING_RATE,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trained parameters of a model in groups, as an optimizer takes them.

    Args:
        model: an adapted model.
        lr: of visual prompts, and of what is neither prompt nor head.
        kv_lr: of key-value prompts, by default `lr`.
        head_lr: of the head.
        weight_decay: of all but biases and norms, as in the Trainer.

    Raises:
        ValueError: the model trains nothing.
    """
    rates = {VISUAL_PROMPTS: lr, KV_PROMPTS: lr if kv_lr is None else kv_lr, HEAD: head_lr, OTHERS: lr}
    decayed = set(get_parameter_names(model, ALL_LAYERNORM_LAYERS, NOT_DECAYED))
    decays = {parameter: weight_decay * (name in decayed) for name, parameter in model.named_parameters()}
    groups = [
        {
            "params": [p for p in decays if p.requires_grad and (decays[p] > 0) == decay],
            "weight_decay": weight_decay * decay,
        }
        for decay in (True, False)
    ]
    split = split_groups(model, groups, rates)
    if not split:
        raise ValueError(f"{type(model).__name__} trains no parameter.")
    return split


def split_groups(
    model: nn.Module, groups: list[dict[str, Any]], rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Splits groups of an optimizer by what the parameters are; each notes as `"part"` which that is.

    Args:
        model: whose parameters they are.
        groups: without learning rates, or with those of parts that are not in `rates`.
        rates: learning rates by part; `None` leaves a group's own.
    """
    parts = part_of_parameters(model)
    split = []
    for group in groups:
        for part in PARTS:
            members = [p for p in group["params"] if parts.get(p, OTHERS) == part]
            if members:
                rate = rates.get(part)
                split.append({**group, "params": members, "part": part, **({} if rate is None else {"lr": rate})})
    return split


def create_e2vpt_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float = LEARNING_RATE,
    kv_lr: float | None = None,
    head_lr: float = HEAD_LEARNING_RATE,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Makes an optimizer with learning rates of their own for prompts and head.

    For a training loop, or `Trainer(optimizers=(optimizer, None))`; inside a Trainer, `RecipeCallback` does the same
    with the optimizer that its arguments name.

    Example:

        >>> optimizer = create_e2vpt_optimizer(model, weight_decay=1e-4)

    Args:
        model: an adapted model.
        optimizer_cls: the class of the optimizer.
        lr: of visual prompts, and of what is neither prompt nor head.
        kv_lr: of key-value prompts, by default `lr`.
        head_lr: of the head.
        weight_decay: of all but biases and norms, as in the Trainer.
        kwargs: what else the class takes.

    Raises:
        ValueError: the model trains nothing.
    """
    groups = parameter_groups(model, lr, kv_lr=kv_lr, head_lr=head_lr, weight_decay=weight_decay)
    return optimizer_cls(groups, **kwargs)


def warn_in_a_trainer() -> None:
    """The same as `warn_of_small_rates`, of the Trainer that runs a first training step, where one does."""
    trainer = trainer_around()
    if trainer is not None:
        warn_of_small_rates(trainer.model, trainer.optimizer)


def warn_of_small_rates(model: nn.Module, optimizer: Any) -> None:
    """Says so where prompts are about to train with the learning rate that the Trainer has by default."""
    parts = part_of_parameters(model)
    for group in getattr(optimizer, "param_groups", ()):
        rate = group.get("initial_lr", group["lr"])
        if rate == TRAINER_LEARNING_RATE and any(
            parts.get(p) in (VISUAL_PROMPTS, KV_PROMPTS) for p in group["params"]
        ):
            logger.warning_once(
                f"The prompts train with the learning rate {rate:g}, the Trainer's default, which is for weights; "
                "prompts hardly move with it. Pass peft_e2vpt.RecipeCallback() to the Trainer, which gives prompts "
                f"and head rates of their own, or TrainingArguments(learning_rate={LEARNING_RATE:g})."
            )
            return
