# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in the layout of the released code, made of the numbers in `golden/`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.test_golden import BACKBONES, Case


SWIN_DEPTHS = (2, 2)


def blocks_of(case: Case) -> list[tuple[str, str]]:
    """The paths of the transformer blocks in transformers and in the released code."""
    if case.family == "swin":
        places = [(stage, block) for stage, depth in enumerate(SWIN_DEPTHS) for block in range(depth)]
        return [(f"swin.encoder.layers.{s}.blocks.{b}", f"enc.layers.{s}.blocks.{b}") for s, b in places]
    theirs = "enc.transformer.encoder.layer" if case.family == "vit" else "enc.blocks"
    return [(f"vit.layers.{index}", f"{theirs}.{index}") for index in range(3)]


def backbone_of(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """Norms and projections of every block, under the names of the released code."""
    tensors = {}
    for ours, theirs in blocks_of(case):
        block: Any = model.get_submodule(ours)
        norm = "attention_norm" if case.family == "vit" else "norm1"
        attention = block.attention
        parts = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        for end in ("weight", "bias"):
            tensors[f"{theirs}.{norm}.{end}"] = getattr(block.layernorm_before, end)
            if case.family == "vit":
                tensors |= {f"{theirs}.attn.{name}.{end}": getattr(part, end) for name, part in parts.items()}
            else:
                tensors[f"{theirs}.attn.qkv.{end}"] = torch.cat([getattr(part, end) for part in parts.values()])
    return tensors


def prompts_of(case: Case) -> dict[str, Tensor]:
    """Visual and key-value prompts and masks of a case, under the names of the released code."""
    given, names = case.given, [theirs for _, theirs in blocks_of(case)]
    enc = "enc.transformer" if case.family == "vit" else "enc"
    visual = [given[f"visual_prompt.{index}"] for index in range(len(names)) if f"visual_prompt.{index}" in given]
    tensors = {f"{enc}.prompt_embeddings": visual[0][None]}
    if case.family == "swin":
        tensors[f"{enc}.deep_prompt_embeddings_0"] = torch.stack(visual[1:2])
        tensors[f"{enc}.deep_prompt_embeddings_1"] = torch.stack(visual[2:])
    elif len(visual) > 1:
        tensors[f"{enc}.deep_prompt_embeddings"] = torch.stack(visual[1:])
    if case.has_gates:
        tensors[f"{enc}.prompt_soft_tokens_mask_cls_token"] = given["token_mask"]
        tensors[f"{enc}.prompt_soft_tokens_pieces_mask_cls_token"] = given["piece_mask"]
    across = case.settings["SHARED_ACCROSS"]
    ends = {
        (True, False): {"kv_prompt": "deep_QKV_embeddings"},
        (False, False): {"k_prompt": "deep_QKV_embeddings_K", "v_prompt": "deep_QKV_embeddings_V"},
        (True, True): {"kv_prompt": "inherited_layer"},
        (False, True): {"k_prompt": "inherited_layer_K", "v_prompt": "inherited_layer"},
    }[case.settings["SHARE_PARAM_KV"], across]
    for index, name in enumerate(names):
        for ours, end in ends.items():
            owner = "shared" if across else index
            if f"{ours}.{owner}" in given:
                tensors[f"{name}.attn.{end}"] = given[f"{ours}.{owner}"]
    if across:
        tensors["enc.transformer.encoder.deep_QKV_embeddings"] = torch.zeros(4, 1, 8)
    return tensors


def base_of(case: Case) -> Any:
    """The backbone of a case with its head, in float32."""
    model_cls, config_cls, settings = BACKBONES[case.family]
    base = model_cls(config_cls(**settings)).eval()
    base.load_state_dict({name: tensor.float() for name, tensor in case.tensors(f"s{case.settings['seed']}/").items()})
    return base


def checkpoint_of(case: Case) -> dict[str, Tensor]:
    """Tensors by name, float32, as the released code saves a case."""
    base = base_of(case)
    tensors = {**backbone_of(case, base), **prompts_of(case)}
    tensors["head.last_layer.weight"], tensors["head.last_layer.bias"] = base.classifier.weight, base.classifier.bias
    return {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
