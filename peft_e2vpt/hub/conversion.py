# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the authors' released code, read and turned into adapters: `read_checkpoint`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..tuner.config import E2VPTConfig
from ..tuner.layer import E2VPTLayer
from ..tuner.prompt_layers import prompt_layers


# A checkpoint is {"model": tensors}. The tensors lie under `enc.transformer.` in the supervised ViT, and under `enc.`
# in MoCo v3, MAE and Swin: visual prompts of the first block, those of the others stacked (Swin: a stack a stage), the
# masks of tokens and pieces, and the key-value prompts of every attention.
FIRST = "prompt_embeddings"
TOKEN_MASK = "prompt_soft_tokens_mask_cls_token"
SEGMENT_MASK = "prompt_soft_tokens_pieces_mask_cls_token"
HEAD = ("head.last_layer.weight", "head.last_layer.bias")
VISUAL = re.compile(rf"enc\.(?:transformer\.)?({FIRST}|deep_{FIRST}(?:_\d)?|{TOKEN_MASK}|{SEGMENT_MASK})")
BLOCK = r"(enc\.(?:transformer\.encoder\.layer|blocks|layers)\.(\d+)(?:\.blocks\.(\d+))?)"
# one tensor for keys and values, or one of each; prompts "shared across" layers are copies in every layer
KV = re.compile(rf"{BLOCK}\.attn\.(deep_QKV_embeddings(?:_[KV])?|inherited_layer(?:_K)?)")
NORM = re.compile(rf"{BLOCK}\.(attention_norm|norm1)\.weight")
UNUSED = re.compile(r"enc\.transformer\.encoder\.deep_QKV_embeddings(?:_[KV])?")  # what the copies were made from
TRAINED = re.compile(r"^head\.|^side|prompt|QKV|inherited_layer|adapter")
MASKED_AUTOENCODER = "enc.fc_norm.weight"
EPSILON = 1e-6  # of the norms of the released ViTs


class Block(NamedTuple):
    """What a transformer block of a checkpoint has before its attention: to tell whether a base model is the same."""

    norm_weight: Tensor
    norm_bias: Tensor
    key_weight: Tensor


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """The trained tensors of a checkpoint of the released code.

    Attributes:
        visual_prompts: (M, D) for every block; in shallow mode for the first only.
        kv_prompts: (1 or 2, H, n, d) for every block, keys first; empty where there are none.
        token_mask: (M,), `None` where there is none; also of numbers other than 0 and 1, because they are trained.
        segment_mask: (M, R), `None` where there is none.
        weight: of the head, (classes, D).
        bias: of the head, (classes,).
        blocks: of the backbone.
        has_windows: whether the backbone is a Swin, which masks the prompts of its first block only.
    """

    visual_prompts: list[Tensor]
    kv_prompts: list[Tensor]
    token_mask: Tensor | None
    segment_mask: Tensor | None
    weight: Tensor
    bias: Tensor
    blocks: list[Block]
    has_windows: bool

    @property
    def num_labels(self) -> int:
        """The number of classes."""
        return len(self.bias)

    @property
    def config(self) -> E2VPTConfig:
        """The configuration under which the package computes what the released code does."""
        settings: dict[str, Any] = {}
        if self.segment_mask is not None:
            settings["num_segments"] = self.segment_mask.shape[1]
        return E2VPTConfig(
            num_visual_prompts=len(self.visual_prompts[0]),
            num_kv_prompts=self.kv_prompts[0].shape[2] if self.kv_prompts else 0,
            visual_prompt_mode="deep" if len(self.visual_prompts) > 1 else "shallow",
            share_kv_prompts=not self.kv_prompts or len(self.kv_prompts[0]) == 1,
            visual_prompt_dropout=0.0,
            token_gate="embedding",
            segment_layout="strided",
            pruned_prompts="zero",
            gate_scope="layer" if self.has_windows else "model",
            **settings,
        )

    def adapt(self, base: nn.Module) -> PeftModel:
        """Gives a base model the adapter: prompts, gates and head of the checkpoint.

        Warns where the logits will not be those of the released code to the last digit.

        Args:
            base: the backbone that the checkpoint was trained on, with a head for `num_labels` classes.

        Raises:
            ValueError: the base model is another one, or it has not one linear head.
        """
        model = get_peft_model(base, self.config)
        layers = prompt_layers(model)
        self._check_backbone(base, layers)
        with torch.no_grad():
            for layer, prompts in zip(layers, self.visual_prompts, strict=False):  # shallow prompts are of one layer
                layer.e2vpt_visual_prompts["default"].copy_(prompts)
            for layer, prompts in zip(layers, self.kv_prompts, strict=False):
                layer.e2vpt_kv_prompts["default"].copy_(prompts)
            self._fill_head(model)
        masked = [layer for layer in layers if "default" in layer.e2vpt_visual_prompts]
        for layer in masked[:1] if self.has_windows else masked:
            stored = layer.e2vpt_token_gates["default"], layer.e2vpt_segment_gates["default"]
            token = stored[0] if self.token_mask is None else self.token_mask
            segment = stored[1] if self.segment_mask is None else self.segment_mask
            layer.set_gates("default", token, segment)
        self._warn_of_differences(layers[0].site.norms[0])
        return model.eval()

    def _check_backbone(self, base: nn.Module, layers: list[E2VPTLayer]) -> None:
        if len(layers) != len(self.blocks):
            raise ValueError(
                f"The checkpoint has {len(self.blocks)} transformer blocks, but {type(base).__name__} has "
                f"{len(layers)} self-attentions: pass the base model that it was trained on."
            )
        for layer, block in zip(layers, self.blocks, strict=True):
            site, line = layer.site, layer.site.backbone
            norm, projection = site.norms[0], getattr(site.attention, line.key)
            key: Any = projection.weight
            if line.key == line.value:
                key = key.chunk(line.parts)[-2]
            for name, theirs, ours in zip(block._fields, block, (norm.weight, norm.bias, key), strict=True):
                if theirs.shape != ours.shape:
                    found = f"has shape {tuple(theirs.shape)}, there {tuple(ours.shape)}"
                elif not torch.allclose(theirs.float(), ours.float(), rtol=1e-2, atol=1e-4):
                    found = f"differs by up to {float((theirs - ours).abs().max()):.2g}"
                else:
                    continue
                raise ValueError(
                    f"The checkpoint was trained on another backbone than {type(base).__name__}: the "
                    f"{name.replace('_', ' ')} of block {layer.index} {found}; pass the base model with those weights."
                )

    def _fill_head(self, model: nn.Module) -> None:
        wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        heads = [wrapper.modules_to_save["default"] for wrapper in wrappers]
        if len(heads) != 1 or not isinstance(heads[0], nn.Linear) or heads[0].weight.shape != self.weight.shape:
            found = ", ".join(str(head) for head in heads) or "none"
            raise ValueError(
                f"The checkpoint has one linear head of {self.num_labels} classes on {self.weight.shape[1]} features, "
                f"but the base model's is {found}: load it with num_labels={self.num_labels}."
            )
        heads[0].weight.copy_(self.weight)
        heads[0].bias.copy_(self.bias)

    def _warn_of_differences(self, norm: Any) -> None:
        if self.has_windows:
            warnings.warn(
                "The released Swin averages its last prompts into the features of the head; here only image tokens "
                "are averaged, so the logits differ.",
                stacklevel=3,
            )
        elif norm.eps != EPSILON:
            warnings.warn(
                f"The released ViT has layer_norm_eps={EPSILON}, the base model {norm.eps}: for the "
                f"same digits load the adapter with peft_e2vpt.load(..., layer_norm_eps={EPSILON}).",
                stacklevel=3,
            )


def read_checkpoint(path: str | Path) -> ReleasedCheckpoint:
    """Reads a checkpoint of the released code (github.com/ChengHan111/E2VPT), or of VPT, on which it builds.

    Only tensors are read (`weights_only`): a file cannot run code.

    Args:
        path: a `.pth` file, such as `last_model.pth`.

    Raises:
        ValueError: the file is no such checkpoint, or one that no adapter can express; the message names what is
            missing or not known.
        OSError: there is no such file.
    """
    tensors = _tensors_of(path)
    visual = {match[1]: tensors[key] for key in tensors if (match := VISUAL.fullmatch(key))}
    missing = [key for key in HEAD if key not in tensors]
    missing += [] if FIRST in visual else [f"enc.transformer.{FIRST}"]
    extra = [
        key
        for key in tensors
        if TRAINED.search(key) and key not in HEAD and not any(p.fullmatch(key) for p in (VISUAL, KV, UNUSED))
    ]
    for name, tensor in visual.items():
        wanted = 1 if name == TOKEN_MASK else 2 if name == SEGMENT_MASK else 3
        if tensor.dim() != wanted or not tensor.numel():
            raise ValueError(f"{path} is damaged: {name} has shape {tuple(tensor.shape)}, not {wanted} dimensions.")
    blocks = _blocks(path, tensors)
    missing += [] if blocks else ["enc.transformer.encoder.layer.0.attention_norm.weight"]
    if missing or extra:
        raise ValueError(
            f"{path} is no checkpoint of E2VPT's released code that can be converted: "
            + "; ".join(filter(None, (_listed("missing", missing), _listed("not known", extra or _others(tensors)))))
            + "."
        )
    if MASKED_AUTOENCODER in tensors:
        raise ValueError(
            f"{path} is of a masked autoencoder (it has {MASKED_AUTOENCODER}), whose head reads the mean of all "
            "tokens: no model of transformers does that, so it cannot be converted."
        )
    deep = sorted(name for name in visual if name.startswith("deep_"))
    visual_prompts = [visual[FIRST][0], *(prompts for name in deep for prompts in visual[name])]
    if len(visual_prompts) not in (1, len(blocks)):
        raise ValueError(
            f"{path} has visual prompts for {len(visual_prompts)} of {len(blocks)} transformer blocks; an adapter has "
            "them in all of them, or in the first."
        )
    return ReleasedCheckpoint(
        visual_prompts=visual_prompts,
        kv_prompts=_kv_prompts(path, tensors, len(blocks)),
        token_mask=visual.get(TOKEN_MASK),
        segment_mask=visual.get(SEGMENT_MASK),
        weight=tensors[HEAD[0]],
        bias=tensors[HEAD[1]],
        blocks=blocks,
        has_windows=any(key.startswith("enc.layers.") for key in tensors),
    )


def _tensors_of(path: str | Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no pickle has the unpickler raise whatever it stumbles over
        raise ValueError(f"{path} is no file of tensors that torch.load(weights_only=True) can read.") from error
    content = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f'{path} holds no tensors by name, neither at its top nor under "model".')
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def _others(tensors: dict[str, Tensor]) -> list[str]:
    """The names in a file that has nothing of a checkpoint."""
    return [] if any(key.startswith("enc.") for key in tensors) else list(tensors)


def _listed(what: str, names: list[str]) -> str:
    return f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}" if names else ""


def _position(match: re.Match[str]) -> tuple[int, int]:
    """Stage and block of a Swin, block and 0 of others."""
    return int(match[2]), int(match[3] or 0)


def _blocks(path: str | Path, tensors: dict[str, Tensor]) -> list[Block]:
    blocks = {}
    for match in filter(None, map(NORM.fullmatch, tensors)):
        apart = match[4] == "attention_norm"  # queries, keys and values
        names = f"{match[1]}.{match[4]}.bias", f"{match[1]}.attn.{'key' if apart else 'qkv'}.weight"
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"{path} is no whole checkpoint of E2VPT's released code: {_listed('missing', missing)}.")
        bias, key = (tensors[name] for name in names)
        blocks[_position(match)] = Block(tensors[match[0]], bias, key if apart else key.chunk(3)[1])
    return [blocks[position] for position in sorted(blocks)]


def _kv_prompts(path: str | Path, tensors: dict[str, Tensor], num_blocks: int) -> list[Tensor]:
    """Key-value prompts (1 or 2, H, n, d) by block."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for match in filter(None, map(KV.fullmatch, tensors)):
        found.setdefault(_position(match), {})[match[4]] = tensors[match[0]]
    if len(found) not in (0, num_blocks):
        raise ValueError(
            f"{path} has key-value prompts in {len(found)} of {num_blocks} transformer blocks; an adapter has them in "
            "all of them, or in none."
        )
    # keys before values; of copies, the one without a letter is that of the values
    keys, values = ("deep_QKV_embeddings_K", "inherited_layer_K"), ("deep_QKV_embeddings_V", "inherited_layer")
    order = (*keys, "deep_QKV_embeddings", *values)
    return [torch.stack([found[p][name] for name in order if name in found[p]]) for p in sorted(found)]
