# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The self-attentions of a model that can take prompts, each with the block around it: `find_attention_sites`."""

from __future__ import annotations

import copy
import inspect
import math
import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._compat import has_packed_layers, is_for_inference, is_watched, unwatched
from .table import BACKBONES, Backbone


def _widths(projection: nn.Module | Tensor) -> tuple[int, int]:
    """Width of what goes into a projection, a module or a bare weight, and of what comes out."""
    if isinstance(projection, Tensor):
        return projection.shape[1], projection.shape[0]
    for module in projection.modules():
        if isinstance(module, Conv1D):
            return int(module.weight.shape[0]), int(module.weight.shape[1])
        if isinstance(module, nn.Conv2d):
            return module.in_channels, module.out_channels
        if hasattr(module, "in_features"):
            return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    raise ValueError(f"{type(projection).__name__} holds no linear layer, so it cannot project visual prompts.")


def _has_shards(module: nn.Module) -> bool:
    """Whether parameters lie in parts (FSDP2, DeepSpeed's ZeRO-3), which hooks of the module put together."""
    return any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in module.parameters())


def _on_prompts(module: nn.Module, prompts: Tensor) -> Tensor:
    """Applies a norm or projection to prompts.

    Hooks that somebody has put there, to look at features or gradients or to measure ranges of values, see the tokens
    of images alone, and running statistics are those of images. Where parameters are in parts, hooks put them
    together, so all hooks see prompts too.
    """
    if is_watched(module):
        if _has_shards(module):
            return module(prompts)  # type: ignore[no-any-return]
        module = unwatched(module)
    return module.forward(prompts)  # type: ignore[no-any-return]


def _project(projection: nn.Module | Tensor, hidden: Tensor) -> Tensor:
    """Applies a projection, linear, a 1x1 convolution or a bare weight, to tokens (B, M, D)."""
    if isinstance(projection, Tensor):
        return F.linear(hidden, projection)
    if type(projection) is not nn.Linear and is_for_inference(projection):
        hidden = hidden.detach()
    if type(projection) is not nn.Linear and any(isinstance(module, nn.Conv2d) for module in projection.modules()):
        return _on_prompts(projection, hidden.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
    return _on_prompts(projection, hidden)


class WeakModule:
    """A reference to a module that does not keep it alive, and that a copy of both points to the copied module.

    What hangs on a module of the base model and needs that module holds it by one of these: in a cycle of references,
    a deleted model would keep its memory until Python's garbage collector runs.
    """

    def __init__(self, module: nn.Module) -> None:
        self._reference = weakref.ref(module)

    def __call__(self) -> Any:
        """The module.

        Raises:
            ReferenceError: it is gone.
        """
        module = self._reference()
        if module is None:
            raise ReferenceError(
                "A module that prompts belong to is gone: it was replaced in the model or the model was deleted. Keep "
                "the adapted model while you use a part of it, and adapt a model after its modules were replaced."
            )
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakModule:
        return WeakModule(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[type[WeakModule], tuple[nn.Module]]:
        return WeakModule, (self(),)


@dataclass(eq=False)
class AttentionSite:
    """One self-attention of a model, with the block around it; it keeps neither alive.

    Attributes:
        name: path of the attention in the model.
        attention_reference: to the self-attention module.
        block_reference: to the transformer block that holds norm and attention.
        backbone: the line of `BACKBONES` that describes both.
        config: the config of the tower that the attention belongs to.
    """

    name: str
    attention_reference: WeakModule
    block_reference: WeakModule
    backbone: Backbone
    config: Any

    @property
    def attention(self) -> Any:
        """The self-attention module."""
        return self.attention_reference()

    @property
    def block(self) -> Any:
        """The transformer block that holds norm and attention."""
        return self.block_reference()

    @cached_property
    def width(self) -> int:
        """D, the width of the tokens that the attention sees."""
        return _widths(getattr(self.attention, self.backbone.key))[0]

    @cached_property
    def num_key_value_heads(self) -> int:
        """H, the heads of keys and values."""
        if self.backbone.heads is not None:
            return int(getattr(self.attention, self.backbone.heads))
        return _widths(getattr(self.attention, self.backbone.key))[1] // int(
            getattr(self.attention, self.backbone.head_dim)
        )

    @cached_property
    def key_dim(self) -> int:
        """The size of one head of the keys."""
        heads, out = self.num_key_value_heads, _widths(getattr(self.attention, self.backbone.key))[1]
        if not self._has_common_projection:
            return out // heads
        return (out // heads - self.value_dim) // (self.backbone.parts - 1)

    @cached_property
    def value_dim(self) -> int:
        """The size of one head of the values."""
        heads, out = self.num_key_value_heads, _widths(getattr(self.attention, self.backbone.value))[1]
        if not self._has_common_projection:
            return out // heads
        if self.backbone.value_dim is not None:
            return int(getattr(self.attention, self.backbone.value_dim)) // heads
        return out // self.backbone.parts // heads

    @property
    def head_dim(self) -> int:
        """d, the size of one head; where keys and values differ (LeViT), the larger of the two."""
        return max(self.key_dim, self.value_dim)

    @property
    def norms(self) -> list[nn.Module]:
        """The norm before the attention, in a list; an empty list where there is none."""
        return [] if self.backbone.norm is None else [getattr(self.block, self.backbone.norm)]

    @property
    def _has_common_projection(self) -> bool:
        return self.backbone.key == self.backbone.value

    @property
    def patch_area(self) -> int:
        """p^2, the pixels of a patch; 0 in a text tower and where the config does not tell."""
        if not self.is_vision:
            return 0
        patch_size = getattr(self.config, "patch_size", None)
        if patch_size is None:  # a pyramid has one per stage
            patch_size = getattr(self.config, "patch_sizes", [0])[0]
        return math.prod(patch_size) if isinstance(patch_size, (list, tuple)) else int(patch_size) ** 2

    @property
    def is_vision(self) -> bool:
        """Whether the attention belongs to a vision tower: one without a vocabulary, or with one and images."""
        return not hasattr(self.config, "vocab_size") or any(
            hasattr(self.config, name) for name in ("patch_size", "image_size")
        )

    @property
    def prefix_tokens(self) -> int | None:
        """Class and register tokens of the sequence; `None` where tokens cannot be inserted."""
        if not self.is_vision:  # a causal mask of fixed size
            return None
        tokens = self.backbone.prefix_tokens
        return tokens(self.config) if callable(tokens) else tokens

    def project(self, prompts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Turns prompts (B, M, D) into the key and value rows that inserted tokens would have, each (B, H, M, d).

        Args:
            prompts: visual prompts.
            dtype: what norm and projections are fed with where the norm has no floating point weight of its own.
        """
        backbone, attention, heads = self.backbone, self.attention, self.num_key_value_heads
        hidden = prompts.to(dtype)
        for norm in self.norms:
            weight = getattr(norm, "weight", None)
            hidden = _on_prompts(norm, prompts.to(weight.dtype if weight is not None else dtype))
        if not self._has_common_projection:
            key = _project(getattr(attention, backbone.key), hidden)
            value = _project(getattr(attention, backbone.value), hidden)
        elif backbone.per_head:
            parts = _project(getattr(attention, backbone.key), hidden).unflatten(-1, (heads, -1))
            key, value = parts[..., -self.key_dim - self.value_dim :].split([self.key_dim, self.value_dim], dim=-1)
        else:
            parts = _project(getattr(attention, backbone.key), hidden)
            bias = getattr(attention, backbone.bias) if backbone.bias is not None else None
            parts = parts if bias is None else parts + bias
            key, value = parts.tensor_split(backbone.parts, dim=-1)[-2:]
        bias = getattr(attention, backbone.value_bias) if backbone.value_bias is not None else None
        value = value if bias is None else value + bias
        key = self._rows(key, backbone.key_norm)
        return key.transpose(1, 2), self._rows(value, backbone.value_norm).transpose(1, 2)

    def lets_gradients_through(self, key: Tensor) -> bool:
        """Whether prompts that train have a gradient from the keys that `project` made of them."""
        projection = getattr(self.attention, self.backbone.key)
        if type(projection) is nn.Linear or isinstance(projection, Tensor):
            return key.requires_grad
        return bool(key.requires_grad and not has_packed_layers(projection))  # those seem to have one

    def _rows(self, projected: Tensor, norm: str | None) -> Tensor:
        """Cuts projected prompts (B, M, H d) into heads (B, M, H, d) and applies the norm, before or after the cut."""
        heads = self.num_key_value_heads
        module = None if norm is None else getattr(self.attention, norm)
        weight = getattr(module, "weight", None)
        if module is not None and weight is not None and weight.numel() == math.prod(projected.shape[2:]):
            normed = _on_prompts(module, projected)
            return normed.unflatten(-1, (heads, -1))  # type: ignore[no-any-return]
        rows = projected if projected.dim() == 4 else projected.unflatten(-1, (heads, -1))
        return rows if module is None else _on_prompts(module, rows)

    def normalise(self, keys: Tensor) -> Tensor:
        """Gives keys (B, H, P, d) the length that the scores of the attention expect: 1 for a cosine."""
        return F.normalize(keys, dim=-1) if self.backbone.cosine else keys


def _block_of(modules: dict[str, nn.Module], name: str, norm: str | None) -> nn.Module:
    """The nearest ancestor of the module `name` that has the norm; without a norm, the nearest that has an index."""

    def is_block(path: str) -> bool:
        return path.rpartition(".")[2].isdigit() if norm is None else hasattr(modules[path], norm)

    while name and not is_block(name):
        name = name.rpartition(".")[0]
    return modules[name]


def _config_of(modules: dict[str, nn.Module], name: str) -> Any:
    """The config of an attention, or of the nearest model around it."""
    if hasattr(modules[name], "config"):
        return modules[name].config
    return getattr(_tower_of(modules, name), "config", None)


def _tower_of(modules: dict[str, nn.Module], name: str) -> nn.Module:
    """The nearest model of transformers around the module `name`, or else the whole."""
    while name and not isinstance(modules[name], PreTrainedModel):
        name = name.rpartition(".")[0]
    return modules[name]


def towers_that_add_masks(model: nn.Module, sites: Iterable[AttentionSite]) -> list[nn.Module]:
    """The towers that sum position bias and attention mask, and take a mask."""
    modules = dict(model.named_modules())
    adding = [site for site in sites if site.backbone.adds_mask is not None and site.backbone.adds_mask(site.config)]
    towers = dict.fromkeys(_tower_of(modules, site.name) for site in adding)
    return [tower for tower in towers if "attention_mask" in inspect.signature(tower.forward).parameters]


def _describe(name: str, module: nn.Module) -> Backbone | None:
    for cls in type(module).__mro__:
        lines = BACKBONES.get(f"{cls.__module__}.{cls.__name__}", BACKBONES.get(cls.__name__))
        for line in (lines,) if isinstance(lines, Backbone) else lines or ():
            if re.search(line.where, name) and getattr(module, line.key, None) is not None:
                return line
    return None


def find_attention_sites(model: nn.Module) -> list[AttentionSite]:
    """Lists the self-attentions of `model` that can take prompts: vision towers first, then others, in model order.

    Raises:
        ValueError: there is none; the message names the attention classes that the model has.
    """
    modules = dict(model.named_modules())
    sites = []
    for name, module in modules.items():
        line = _describe(name, module)
        if line is not None:
            block = _block_of(modules, name, line.norm)
            config = _config_of(modules, name)
            sites.append(AttentionSite(name, WeakModule(module), WeakModule(block), line, config))
    if not sites:
        classes = sorted({type(module).__name__ for module in modules.values()})
        present = [cls for cls in classes if "Attention" in cls or "Attn" in cls]
        known = [name.rpartition(".")[2] for name in BACKBONES]
        raise ValueError(
            f"{type(model).__name__} has no self-attention that E2VPT knows (found "
            f"{', '.join(present) if present else 'no attention module at all'}). "
            f"It knows {', '.join(known[:3])} and others; docs/backbones.md lists the models, and a line in "
            "peft_e2vpt.backbones.BACKBONES adds another."
        )
    return sorted(sites, key=lambda site: not site.is_vision)
