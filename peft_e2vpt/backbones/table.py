# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Where each family of backbones keeps its pre-attention norm and its key and value projections: `BACKBONES`.

A line of the table names, for one class of self-attention, the attributes that a visual prompt passes on its way to a
key and a value row: `key(norm(prompt))` and `value(norm(prompt))`. Nothing else in the package knows a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


PrefixTokens = int | None | Callable[[Any], int | None]


@dataclass(frozen=True)
class Backbone:
    """One class of self-attention and the block around it.

    Attributes:
        norm: name of the norm before the attention, an attribute of the attention or of the nearest ancestor that has
            it; `None` where the block has none (its norm comes after the attention, or is part of the projection).
        key: name of the key projection, an attribute of the attention.
        value: name of the value projection; the same name where one projection gives both, keys before values.
        parts: how many of queries, keys and values a common projection gives: 3, or 2 without queries.
        per_head: whether a common projection has its parts side by side in every head, instead of all heads of a part.
        prefix_tokens: class and register tokens at the front of the sequence, or a function of the model's config that
            counts them; `None` where tokens cannot be inserted into the sequence (windows, relative position bias,
            padding masks).
        windows: whether the block gets whole images and the attention sees each as several windows, in the order
            (image, window).
        head_dim: name of the attribute of the attention that holds the size of a head.
        heads: name of the attribute that holds the number of heads, for attentions that do not have the former.
        value_dim: name of the attribute that holds the width of all value heads, where it differs from that of the
            keys and both come from one projection.
        key_norm: name of the norm of the projected keys.
        value_norm: name of the norm of the projected values.
        bias: name of the bias of a common projection that is a bare weight.
        value_bias: name of a bias of the values that is kept outside their projection.
        cosine: whether scores are those of normalised queries and keys.
        adds_mask: a function of the model's config, whether a model sums position bias and attention mask before it
            calls its attentions.
        score_bias: what the position bias adds to the score of a token on average, where it is not about 0.
        one_graph: whether torch.compile sees the attention as one graph; where it breaks inside, the attention stays
            uncompiled.
        where: regular expression that the path of the attention contains.
        eager: name of the function in the model file that computes the attention where transformers' attention
            interface gives none; `None` where the attention does its own arithmetic although its file has one.

    A class with several kinds of attention has several lines; the first serves whose `where` and `key` fit, and an
    attention that none fits is left alone.
    """

    norm: str | None
    key: str = "k_proj"
    value: str = "v_proj"
    parts: int = 3
    per_head: bool = False
    prefix_tokens: PrefixTokens = None
    windows: bool = False
    head_dim: str = "head_dim"
    heads: str | None = None
    value_dim: str | None = None
    key_norm: str | None = None
    value_norm: str | None = None
    bias: str | None = None
    value_bias: str | None = None
    cosine: bool = False
    adds_mask: Callable[[Any], bool] | None = None
    score_bias: float = 0.0
    one_graph: bool = True
    where: str = ""
    eager: str | None = "eager_attention_forward"


def _class_and_registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


def _has_position_bias(config: Any) -> bool:
    return bool(config.use_relative_position_bias or config.use_shared_relative_position_bias)


def _class_without_bias(config: Any) -> int | None:
    return None if _has_position_bias(config) else 1


def _qkv(norm: str | None, heads: str = "num_heads", **others: Any) -> Backbone:
    """A line for an attention with one projection `qkv` of queries, keys and values."""
    return Backbone(norm, "qkv", "qkv", heads=heads, **others)


def _text(norm: str | None = None) -> Backbone:
    """A line for a text encoder in the manner of BERT, whose norms come after the attention."""
    return Backbone(norm, "key", "value", head_dim="attention_head_size")


def _named(norm: str | None, **others: Any) -> Backbone:
    """A line for an attention with projections `key` and `value`."""
    return Backbone(norm, "key", "value", head_dim="attention_head_size", **others)


_SWIN_V2: dict[str, Any] = {"windows": True, "cosine": True, "score_bias": 8.0}  # the bias is 16 sigmoid(.)

BACKBONES: dict[str, Backbone | tuple[Backbone, ...]] = {
    # class of self-attention                block.norm                   tokens before the patches
    "ViTAttention": Backbone("layernorm_before", prefix_tokens=1),
    "ViTMSNAttention": Backbone("layernorm_before", prefix_tokens=1),
    "DeiTAttention": Backbone("layernorm_before", prefix_tokens=2),  # class and distillation token
    "IJepaAttention": Backbone("layernorm_before", prefix_tokens=0),
    "Dinov2Attention": Backbone("norm1", prefix_tokens=1),
    "Dinov2WithRegistersAttention": Backbone("norm1", prefix_tokens=_class_and_registers),
    "DINOv3ViTAttention": Backbone("norm1", prefix_tokens=_class_and_registers),
    "BeitAttention": Backbone("layernorm_before", prefix_tokens=_class_without_bias, adds_mask=_has_position_bias),
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
    "YolosSelfAttention": _named("layernorm_before"),
    "DPTSelfAttention": _named("layernorm_before"),
    "VitPoseBackboneSelfAttention": _named("layernorm_before"),
    "EomtAttention": Backbone("norm1"),
    "EomtDinov3Attention": Backbone("norm1"),
    "OwlViTAttention": Backbone("layer_norm1"),
    "Owlv2Attention": Backbone("layer_norm1"),
    "SegformerAttention": Backbone("layernorm_before"),  # rows join after the reduction of keys and values
    "Sapiens2Attention": Backbone("norm1", key_norm="k_norm"),
    "Llama4VisionAttention": Backbone("input_layernorm", eager="vision_eager_attention_forward"),
    "MllamaVisionAttention": Backbone("input_layernorm"),
    "Gemma4VisionAttention": Backbone("input_layernorm", key_norm="k_norm", value_norm="v_norm"),
    "InternVLVisionAttention": Backbone("layernorm_before", key_norm="k_norm"),
    "PixtralAttention": Backbone("attention_norm"),
    "Phi4MultimodalVisionAttention": Backbone("layer_norm1", eager="simple_eager_attention_forward"),
    "Pix2StructVisionAttention": Backbone("pre_attention_layer_norm", "key", "value", heads="n_heads"),
    "Kosmos2_5VisionAttention": Backbone("pre_attention_layer_norm", "key", "value", eager=None),
    "BlipAttention": _qkv("layer_norm1"),
    "Blip2Attention": _qkv("layer_norm1"),
    "InstructBlipAttention": _qkv("layer_norm1"),
    "MgpstrAttention": _qkv("norm1"),
    "transformers.models.qwen2_vl.modeling_qwen2_vl.VisionAttention": _qkv("norm1"),
    "Qwen2_5_VLVisionAttention": _qkv("norm1"),
    "Qwen3VLVisionAttention": _qkv("norm1"),
    "Glm4vVisionAttention": _qkv("norm1"),
    "FlavaSelfAttention": _named("layernorm_before"),
    "ViltSelfAttention": _named("layernorm_before"),
    "LayoutLMv3SelfAttention": _named(None),
    "Data2VecVisionSelfAttention": _named("layernorm_before"),
    "MobileViTSelfAttention": _named("layernorm_before"),
    "SegGptAttention": _qkv("layernorm_before", "num_attention_heads", one_graph=False),
    "ImageGPTAttention": Backbone("ln_1", "c_attn", "c_attn", heads="num_heads"),
    "PerceiverSelfAttention": Backbone("layernorm1", "key", "value", heads="num_heads", where=r"self_attends\."),
    "GroupViTAttention": Backbone("layer_norm1", one_graph=False, where=r"\.self_attn$"),
    "LevitAttention": Backbone(
        None,
        "queries_keys_values",
        "queries_keys_values",
        per_head=True,
        heads="num_attention_heads",
        value_dim="out_dim_projection",
    ),
    "LevitAttentionSubsample": Backbone(
        None,
        "keys_values",
        "keys_values",
        parts=2,
        per_head=True,
        heads="num_attention_heads",
        value_dim="out_dim_projection",
    ),
    "torch.nn.modules.activation.MultiheadAttention": Backbone(
        "ln_1",
        "in_proj_weight",
        "in_proj_weight",
        heads="num_heads",
        bias="in_proj_bias",
        where=r"resblocks\.\d+\.attn$",
    ),  # of BridgeTower
    # windows
    "Swinv2SelfAttention": _named(None, **_SWIN_V2),
    "Swin2SRSelfAttention": _named(None, **_SWIN_V2),
    "DonutSwinSelfAttention": _named("layernorm_before", windows=True),
    "MaskFormerSwinSelfAttention": _named("layernorm_before", windows=True),
    "HieraMaskUnitAttention": _qkv("layernorm_before"),
    "VitDetAttention": _qkv("norm1", windows=True, one_graph=False),
    "SamVisionAttention": _qkv("layer_norm1", "num_attention_heads", windows=True),
    "SamHQVisionAttention": _qkv("layer_norm1", "num_attention_heads", windows=True),
    "GotOcr2VisionAttention": _qkv("layer_norm1", "num_attention_heads", windows=True),
    "Sam2MultiScaleAttention": _qkv("layer_norm1", "num_attention_heads", windows=True),
    "Sam3ViTRoPEAttention": Backbone("layer_norm1", windows=True),
    "RfDetrDinov2Attention": Backbone("norm1"),
    "LwDetrViTAttention": Backbone("layernorm_before"),
    "Florence2VisionWindowAttention": _qkv("norm1", windows=True),
    # keys and values of fewer tokens: rows join after the reduction and do not pass it
    "PvtEfficientSelfAttention": _named("layer_norm_1", one_graph=False),
    "PvtV2SelfAttention": _named("layer_norm_1"),
    "GLPNEfficientSelfAttention": _named("layer_norm_1", one_graph=False),
    "CvtSelfAttention": Backbone("layernorm_before", "projection_key", "projection_value", heads="num_heads"),
    # video and audio
    "VideoMAESelfAttention": _named("layernorm_before"),
    "VivitAttention": Backbone("layernorm_before"),
    "VideoPrismAttention": Backbone("layernorm_before"),
    "VideomtAttention": Backbone("norm1"),
    "ASTAttention": Backbone("layernorm_before"),
    "TimesformerSelfAttention": (
        _qkv("temporal_layernorm", where="temporal_attention"),
        _qkv("layernorm_before"),
    ),
    "VJEPA2RopeAttention": _named(
        "norm1", where=r"(^|\.)encoder\."
    ),  # the predictor takes no part in a classification
    "XCLIPAttention": (Backbone("message_ln", where=r"message_attn$"), Backbone("layer_norm1")),
    # timm, through transformers' TimmWrapper
    "timm.layers.attention.Attention": _qkv("norm1", key_norm="k_norm"),
    "timm.layers.attention.AttentionRope": (
        _qkv("norm1", key_norm="k_norm"),
        Backbone("norm1", key_norm="k_norm"),
    ),
    "timm.models.eva.EvaAttention": (
        _qkv("norm1", key_norm="k_norm", value_bias="v_bias"),
        Backbone("norm1", key_norm="k_norm"),
    ),
    "timm.models.beit.Attention": _qkv("norm1", value_bias="v_bias"),
    "timm.models.vision_transformer_relpos.RelPosAttention": _qkv("norm1", key_norm="k_norm"),
    "timm.models.swin_transformer.WindowAttention": _qkv("norm1", windows=True),
    "timm.models.swin_transformer_v2.WindowAttention": _qkv(None, value_bias="v_bias", **_SWIN_V2),
    "timm.models.pvt_v2.Attention": Backbone("norm1", "kv", "kv", parts=2, heads="num_heads"),
    "timm.models.cait.TalkingHeadAttn": _qkv("norm1", one_graph=False),
    "timm.models.cait.ClassAttn": Backbone("norm1", "k", "v", heads="num_heads"),
    "timm.models.levit.Attention": _qkv(None, per_head=True, value_dim="val_attn_dim"),
    "timm.models.levit.AttentionDownsample": Backbone(
        None, "kv", "kv", parts=2, per_head=True, heads="num_heads", value_dim="val_attn_dim"
    ),
    # before transformers 5.9 (DINOv2: 5.18) the projections were one module further inside
    "ViTSelfAttention": _named("layernorm_before", prefix_tokens=1),
    "ViTMSNSelfAttention": _named("layernorm_before", prefix_tokens=1),
    "DeiTSelfAttention": _named("layernorm_before", prefix_tokens=2),
    "IJepaSelfAttention": _named("layernorm_before", prefix_tokens=0),
    "Dinov2SelfAttention": _named("norm1", prefix_tokens=1),
    "Dinov2WithRegistersSelfAttention": _named("norm1", prefix_tokens=_class_and_registers),
    "BeitSelfAttention": _named("layernorm_before", prefix_tokens=_class_without_bias),
    "SwinSelfAttention": _named("layernorm_before", windows=True),
    "ViTMAESelfAttention": _named("layernorm_before"),
    "PixioSelfAttention": _named("norm1"),
    "SegformerEfficientSelfAttention": _named("layer_norm_1"),
    "VivitSelfAttention": _named("layernorm_before"),
    "ASTSelfAttention": _named("layernorm_before"),
    "LwDetrViTSelfAttention": _named("layernorm_before"),
    # text encoders, in models without a vision tower
    "BertSelfAttention": _text(),
    "RobertaSelfAttention": _text(),
    "XLMRobertaSelfAttention": _text(),
    "CamembertSelfAttention": _text(),
    "ElectraSelfAttention": _text(),
    "Data2VecTextSelfAttention": _text(),
    "DistilBertSelfAttention": Backbone(None, "k_lin", "v_lin", heads="n_heads"),
}
