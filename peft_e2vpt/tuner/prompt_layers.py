# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`PromptLayers`: where an adapted model keeps the prompt layers of its self-attentions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .layer import E2VPTLayer
from .shallow import ShallowInsertion


CONTAINER = "e2vpt"


def _before(blocks: Iterable[nn.Module], model: nn.Module) -> list[nn.Module]:
    """Lists what has weights and comes before the blocks in the order of the model, such as its embeddings."""
    inner = set(blocks)
    before = []
    for module in model.modules():
        if module in inner or inner.isdisjoint(module.modules()):
            continue
        for child in module.children():
            if not inner.isdisjoint(child.modules()):
                break
            if any(True for _ in child.parameters()):
                before.append(child)
    return [module for module in before if not _lies_in_one_of(module, inner)]


def _lies_in_one_of(module: nn.Module, blocks: set[nn.Module]) -> bool:
    return any(module in block.modules() for block in blocks)


def _requiring_gradient(value: Any) -> Any:
    """The output of a module with every tensor in it asking for a gradient."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.requires_grad_()
    if isinstance(value, tuple):
        return tuple(_requiring_gradient(part) for part in value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _requiring_gradient(part) for name, part in value.items()})
    return value


class PromptLayers(nn.ModuleDict):
    """The child `e2vpt` of an adapted model: an `E2VPTLayer` per self-attention, by the number of the attention.

    Args:
        model: the base model.
        blocks: the transformer blocks of its self-attentions.

    Attributes:
        base_requires_grad: which parameters of the base model required a gradient before it was adapted.
        insertions: where shallow prompts enter and leave the sequence, by adapter.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.base_requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.insertions: dict[str, ShallowInsertion] = {}
        self._handles = [module.register_forward_hook(self._require_gradient) for module in _before(blocks, model)]
        self._checkpointing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def _require_gradient(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Lets a gradient into the first block: reentrant checkpoints give none to what is inside without it."""
        if not module.training or not torch.is_grad_enabled():
            return None
        checkpointing = any(module.gradient_checkpointing for module in self._checkpointing)
        if checkpointing and any(not layer.disable_adapters for layer in prompt_layers(self)):
            return _requiring_gradient(output)
        return None

    def detach(self) -> None:
        """Leaves the base model: its modules are as they were before."""
        for layer in prompt_layers(self):
            layer.detach()
        for insertion in self.insertions.values():
            insertion.detach()
        for handle in self._handles:
            handle.remove()


def prompt_layers(model: nn.Module) -> list[E2VPTLayer]:
    """Lists the prompt layers of a model in the order of their attentions, whatever wraps the model."""
    layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
    return sorted(layers, key=lambda layer: layer.index)


def visual_prompt_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, list[E2VPTLayer]]:
    """Returns the name of the adapter, by default the active one, and the layers with visual prompts of it.

    Raises:
        ValueError: the model has no E2VPT adapter, or none of this name, or the adapter has no visual prompts.
    """
    layers = prompt_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no E2VPT adapter: wrap it with get_peft_model(model, E2VPTConfig()) first."
        )
    adapter_name = adapter_name or layers[0].active_adapters[0]
    present = dict.fromkeys(name for layer in layers for name in layer.e2vpt_config)
    if adapter_name not in present:
        raise ValueError(f"Adapter {adapter_name} does not exist; the model has {', '.join(present)}.")
    prompted = [layer for layer in layers if adapter_name in layer.e2vpt_visual_prompts]
    if not prompted:
        raise ValueError(
            f"The adapter {adapter_name!r} has no visual prompts to score or prune: it needs num_visual_prompts of at "
            "least 1."
        )
    return adapter_name, prompted
