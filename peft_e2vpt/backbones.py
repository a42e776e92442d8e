# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Where each family of backbones keeps its pre-attention norm and its key and value projections: `BACKBONES`.

A line of the table names, for one class of self-attention, the attributes that a visual prompt passes on its way to a
key and a value row: `key(norm(prompt))` and `value(norm(prompt))`. Nothing else in the package knows a family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


PrefixTokens = int | None | Callable[[Any], int | None]


@dataclass(frozen=True)
class Backbone:
    """One class of self-attention and the block around it.

    Attributes:
        norm: name of the norm before the attention, an attribute of the block: of the nearest ancestor that has it.
        key: name of the key projection, an attribute of the attention.
        value: name of the value projection, an attribute of the attention.
        prefix_tokens: class and register tokens at the front of the sequence, or a function of the model's config that
            counts them; `None` where tokens cannot be inserted into the sequence (windows, relative position bias,
            padding masks).
        windows: whether the attention sees every image as several windows, in the order (image, window).
        head_dim: name of the attribute of the attention that holds the size of a head.
    """

    norm: str
    key: str = "k_proj"
    value: str = "v_proj"
    prefix_tokens: PrefixTokens = None
    windows: bool = False
    head_dim: str = "head_dim"


def _class_and_registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


def _class_without_bias(config: Any) -> int | None:
    has_bias = config.use_relative_position_bias or config.use_shared_relative_position_bias
    return None if has_bias else 1


BACKBONES: dict[str, Backbone] = {
    # class of self-attention                block.norm                   tokens before the patches
    "ViTAttention": Backbone("layernorm_before", prefix_tokens=1),
    "ViTMSNAttention": Backbone("layernorm_before", prefix_tokens=1),
    "DeiTAttention": Backbone("layernorm_before", prefix_tokens=2),  # class and distillation token
    "IJepaAttention": Backbone("layernorm_before", prefix_tokens=0),
    "Dinov2Attention": Backbone("norm1", prefix_tokens=1),
    "Dinov2WithRegistersAttention": Backbone("norm1", prefix_tokens=_class_and_registers),
    "DINOv3ViTAttention": Backbone("norm1", prefix_tokens=_class_and_registers),
    "BeitAttention": Backbone("layernorm_before", prefix_tokens=_class_without_bias),
    "CLIPAttention": Backbone("layer_norm1", prefix_tokens=1),
    "SiglipAttention": Backbone("layer_norm1", prefix_tokens=0),
    "Siglip2Attention": Backbone("layer_norm1"),
    "SwinAttention": Backbone("layernorm_before", windows=True),
    # further encoders of images
    "ViTMAEAttention": Backbone("layernorm_before"),
    "PixioAttention": Backbone("layernorm_before"),
    "RadioAttention": Backbone("norm1"),
    "Tipsv2VisionAttention": Backbone("norm1"),
    "Aimv2Attention": Backbone("rms_norm1"),
    "MLCDAttention": Backbone("layer_norm1"),
    "MetaClip2Attention": Backbone("layer_norm1"),
    "AltCLIPAttention": Backbone("layer_norm1"),
    "ChineseCLIPVisionAttention": Backbone("layer_norm1"),
    "CLIPSegAttention": Backbone("layer_norm1"),
    "GitVisionAttention": Backbone("layer_norm1"),
    "Kosmos2VisionAttention": Backbone("layer_norm1"),
    "Idefics2VisionAttention": Backbone("layer_norm1"),
    "Idefics3VisionAttention": Backbone("layer_norm1"),
    "SmolVLMVisionAttention": Backbone("layer_norm1"),
    "JanusVisionAttention": Backbone("layer_norm1"),
    "Ovis2VisionAttention": Backbone("rms_norm1"),
    # detection, segmentation, pose
    "YolosSelfAttention": Backbone("layernorm_before", "key", "value", head_dim="attention_head_size"),
    "DPTSelfAttention": Backbone("layernorm_before", "key", "value", head_dim="attention_head_size"),
    "VitPoseBackboneSelfAttention": Backbone("layernorm_before", "key", "value", head_dim="attention_head_size"),
    "EomtAttention": Backbone("norm1"),
    "EomtDinov3Attention": Backbone("norm1"),
    "OwlViTAttention": Backbone("layer_norm1"),
    "Owlv2Attention": Backbone("layer_norm1"),
    "SegformerAttention": Backbone("layernorm_before"),  # rows join after the reduction of keys and values
    # video and audio
    "VideoMAESelfAttention": Backbone("layernorm_before", "key", "value", head_dim="attention_head_size"),
    "VivitAttention": Backbone("layernorm_before"),
    "VideoPrismAttention": Backbone("layernorm_before"),
    "VideomtAttention": Backbone("norm1"),
    "ASTAttention": Backbone("layernorm_before"),
}


@dataclass(eq=False)
class AttentionSite:
    """One self-attention of a model, with the block around it.

    Attributes:
        name: path of the attention in the model.
        attention: the self-attention module.
        block: the transformer block that holds norm and attention.
        backbone: the line of `BACKBONES` that describes both.
    """

    name: str
    attention: Any
    block: Any
    backbone: Backbone

    @property
    def width(self) -> int:
        """D, the width of the tokens that the attention sees."""
        return int(getattr(self.attention, self.backbone.key).in_features)

    @property
    def head_dim(self) -> int:
        """d, the size of one head."""
        return int(getattr(self.attention, self.backbone.head_dim))

    @property
    def num_key_value_heads(self) -> int:
        """H, the heads of keys and values."""
        return int(getattr(self.attention, self.backbone.key).out_features) // self.head_dim

    @property
    def patch_area(self) -> int:
        """p^2, the pixels of a patch; 0 in a text tower."""
        if not self.is_vision:
            return 0
        patch_size = self.attention.config.patch_size
        return math.prod(patch_size) if isinstance(patch_size, (list, tuple)) else int(patch_size) ** 2

    @property
    def is_vision(self) -> bool:
        """Whether the attention belongs to a vision tower."""
        return hasattr(self.attention.config, "patch_size")

    @property
    def prefix_tokens(self) -> int | None:
        """Class and register tokens of the sequence; `None` where tokens cannot be inserted."""
        if not self.is_vision:  # a causal mask of fixed size
            return None
        tokens = self.backbone.prefix_tokens
        return tokens(self.attention.config) if callable(tokens) else tokens

    def project(self, prompts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Turns prompts (B, M, D) into the key and value rows that inserted tokens would have, each (B, H, M, d).

        Args:
            prompts: visual prompts.
            dtype: what the norm is fed with where it has no floating point weight of its own.
        """
        norm = getattr(self.block, self.backbone.norm)
        weight = getattr(norm, "weight", None)
        hidden = norm(prompts.to(weight.dtype if weight is not None else dtype))
        shape = (*hidden.shape[:-1], self.num_key_value_heads, self.head_dim)
        key = getattr(self.attention, self.backbone.key)(hidden).view(shape).transpose(1, 2)
        value = getattr(self.attention, self.backbone.value)(hidden).view(shape).transpose(1, 2)
        return key, value


def _block_of(modules: dict[str, nn.Module], name: str, norm: str) -> nn.Module:
    """The nearest ancestor of the module `name` that has the norm."""
    while name and not hasattr(modules[name], norm):
        name = name.rpartition(".")[0]
    return modules[name]


def _describe(module: nn.Module) -> Backbone | None:
    for cls in type(module).__mro__:
        if cls.__name__ in BACKBONES:
            return BACKBONES[cls.__name__]
    return None


def find_attention_sites(model: nn.Module) -> list[AttentionSite]:
    """Lists the self-attentions of `model` that can take prompts: vision towers first, then others, in model order.

    Raises:
        ValueError: there is none; the message names the attention classes that the model has.
    """
    modules = dict(model.named_modules())
    sites = []
    for name, module in modules.items():
        backbone = _describe(module)
        if backbone is not None:
            sites.append(AttentionSite(name, module, _block_of(modules, name, backbone.norm), backbone))
    if not sites:
        classes = sorted({type(module).__name__ for module in modules.values()})
        present = [cls for cls in classes if "Attention" in cls]
        raise ValueError(
            f"{type(model).__name__} has no self-attention that E2VPT knows (found "
            f"{', '.join(present) if present else 'no attention module at all'}). "
            f"Known are {', '.join(BACKBONES)}; a line in peft_e2vpt.backbones.BACKBONES adds another."
        )
    return sorted(sites, key=lambda site: not site.is_vision)


def find_heads(model: nn.Module, sites: list[AttentionSite]) -> list[str]:
    """Names the head of a task model: its direct children with weights that hold no self-attention of a backbone.

    A model without a task (its class name has no "For", as `ViTModel`) has no head: the list is empty.
    """
    if "For" not in type(model).__name__:
        return []
    backbones = {site.name.split(".")[0] for site in sites}
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return [name for name in children if name not in backbones]
