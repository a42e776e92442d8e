# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Rewinding: giving the trained tensors the values back that training starts from (paper section 3.3)."""

from __future__ import annotations

import torch
from accelerate.utils import extract_model_from_parallel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..distributed import assign, full_shape, reshard, whole
from ..tuner.prompt_layers import prompt_layers


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: trained parameters, and the buffers (running means) of trained heads.

    Their names do not depend on what wraps the model, DDP or a compiled module.
    """
    reshard(model)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    heads = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, buffer in model.named_buffers():
        if any(name.startswith(f"{head}.modules_to_save.") for head in heads):
            trained[name] = buffer
    return trained


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies all tensors that training changes, of prompts and head, by name; in every process all of each.

    Raises:
        ValueError: FSDP1 shards the model, and hides its parameters.
    """
    return {name: whole(tensor) for name, tensor in _trained(model).items()}


def check_rewindable(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Sees to it that a model trains the given tensors, by name and shape.

    Raises:
        ValueError: it trains others.
    """
    _check_match(_trained(model), tensors)


def _check_match(trained: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if trained.keys() != tensors.keys():
        differing = sorted(trained.keys() ^ tensors.keys())
        raise ValueError(f"The model trains other parameters than those to rewind to: {', '.join(differing[:4])}.")
    for name, tensor in trained.items():
        if full_shape(tensor) != tensors[name].shape:
            raise ValueError(
                f"The model trains {name} of shape {tuple(full_shape(tensor))}, but the values to rewind to are of "
                f"shape {tuple(tensors[name].shape)}."
            )


@torch.no_grad()
def rewind(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives the trained tensors, in place, the values of an earlier `trained_tensors`; pruned values stay zero.

    Raises:
        ValueError: the model trains other parameters than those given, or FSDP1 shards it.
    """
    trained = _trained(model)
    _check_match(trained, tensors)
    for name, tensor in trained.items():
        assign(tensor, tensors[name])
    _clear_pruned_values(model)


@torch.no_grad()
def redraw(model: nn.Module, adapter_name: str, seed: int) -> None:
    """Draws prompts and head of an adapter anew from their initial distributions; pruned values stay zero.

    Raises:
        ValueError: a module of the head has weights but no `reset_parameters`.
    """
    reshard(model)
    for layer in prompt_layers(model):
        if adapter_name in layer.e2vpt_config:
            layer.draw_prompts(adapter_name, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                _reset_parameters(module.modules_to_save[adapter_name], model)
    _clear_pruned_values(model)


class _Reset(nn.Module):
    """Draws a module anew when called, so that `functional_call` can put whole tensors in place of sharded ones."""

    def __init__(self, module: nn.Module, base: PreTrainedModel | None) -> None:
        super().__init__()
        self.module, self._base = module, (base,)  # in a tuple, the base is no child

    def forward(self) -> None:
        self.module.reset_parameters()  # type: ignore[operator]
        if self._base[0] is not None:
            self._base[0]._init_weights(self.module)


def _reset_parameters(head: nn.Module, model: nn.Module) -> None:
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    for module in head.modules():
        parameters = dict(module.named_parameters(recurse=False))
        if callable(getattr(module, "reset_parameters", None)):
            drawn = {f"module.{name}": whole(parameter) for name, parameter in parameters.items()}
            functional_call(_Reset(module, base), drawn, ())
            for name, parameter in parameters.items():
                assign(parameter, drawn[f"module.{name}"])
        elif parameters:
            raise ValueError(f"{type(module).__name__} in the head cannot be drawn anew: rewind to 'init' instead.")


def _clear_pruned_values(model: nn.Module) -> None:
    for layer in prompt_layers(model):
        for adapter_name in layer.e2vpt_visual_prompts:
            layer.clear_pruned_values(adapter_name)
        layer.refresh_merged_rows()
