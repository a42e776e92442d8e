# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A zoo of tiny, randomly initialised vision models for acceptance tests.

Every entry is instantiated from a config (no download), has hidden sizes of about 32, two or three blocks, and
32-64 pixel inputs.  It depends on nothing but ``torch``, ``transformers`` and (for the ``timm`` family) ``timm``.

    from tests.support.zoo import ZOO, build, names, output_of
    model, inputs = build("vit")           # model.eval(), float32, all parameters randomised (seeded)
    out = output_of(model(**inputs))       # one float tensor that depends on every block
    names(family="window")                 # names of one family
    names(attention=True)                  # everything that has softmax attention over key/value rows

``python zoo.py [name ...]`` runs forward + backward over the zoo and prints one line per model.

A model whose class does not exist in the installed transformers is reported by ``missing(name)``.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
import transformers


B = 2  # batch size of the example inputs
D = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)  # a plain encoder
IMG = dict(image_size=32, patch_size=8, num_channels=3)  # 16 patches
SMALL = dict(D, **IMG)
LABELS = dict(num_labels=5)


# ----------------------------------------------------------------------------------------------------------------
# example inputs
# ----------------------------------------------------------------------------------------------------------------
def pixels(size=32, channels=3, key="pixel_values"):
    h, w = size if isinstance(size, tuple) else (size, size)
    return lambda m: {key: torch.randn(B, channels, h, w)}


def video(frames=4, size=32, key="pixel_values"):
    return lambda m: {key: torch.randn(B, frames, 3, size, size)}


def siglip2_inputs(m):
    # 16 patch slots; the second image uses 12 of them -> a real padding mask
    mask = torch.ones(B, 16, dtype=torch.long)
    mask[1, 12:] = 0
    return dict(
        pixel_values=torch.randn(B, 16, 3 * 8 * 8),
        pixel_attention_mask=mask,
        spatial_shapes=torch.tensor([[4, 4], [3, 4]]),
    )


def masked_grid_inputs(m):  # idefics2/3, smolvlm: NaViT style, second image is partly padding
    mask = torch.ones(B, 4, 4, dtype=torch.bool)
    mask[1, 3:] = False
    return dict(pixel_values=torch.randn(B, 3, 32, 32), patch_attention_mask=mask)


def packed_inputs(key="hidden_states", dim=3 * 2 * 8 * 8, grid=((1, 4, 4), (1, 4, 8)), grid_key="grid_thw"):
    """Qwen-VL style: all images packed in one sequence, no batch dimension."""

    def make(m):
        n = sum(t * h * w for t, h, w in grid)
        return {key: torch.randn(n, dim), grid_key: torch.tensor(grid)}

    return make


def flattened_patches(hidden=3 * 8 * 8, n=16):
    def make(m):  # pix2struct: (row, col, *pixels); second image is partly padding
        x = torch.randn(B, n, hidden + 2)
        rc = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(-1, 2) + 1
        x[:, :, :2] = rc.float()
        mask = torch.ones(B, n)
        mask[1, 12:] = 0
        return dict(flattened_patches=x, attention_mask=mask)

    return make


def mllama_inputs(m):
    return dict(
        pixel_values=torch.randn(B, 1, 2, 3, 32, 32),
        aspect_ratio_ids=torch.tensor([[2], [1]]),
        aspect_ratio_mask=torch.tensor([[[1, 1]], [[1, 0]]]),
    )


def gemma4_inputs(m):
    pos = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).reshape(1, 36, 2)
    pos = pos.expand(B, -1, -1).clone()
    return dict(pixel_values=torch.rand(B, 36, 3 * 8 * 8), pixel_position_ids=pos)


def mae_inputs(m):
    return dict(pixel_values=torch.randn(B, 3, 32, 32), noise=torch.rand(B, 16))


def text_image_inputs(m):
    return dict(
        input_ids=torch.randint(1, 50, (B, 6)),
        attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        pixel_values=torch.randn(B, 3, 32, 32),
    )


def layoutlmv3_inputs(m):
    return dict(
        input_ids=torch.randint(2, 50, (B, 6)),
        bbox=torch.randint(0, 50, (B, 6, 4)),
        attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        pixel_values=torch.randn(B, 3, 32, 32),
    )


def seggpt_inputs(m):
    return dict(
        pixel_values=torch.randn(B, 3, 32, 32),
        prompt_pixel_values=torch.randn(B, 3, 32, 32),
        prompt_masks=torch.randn(B, 3, 32, 32),
    )


# ----------------------------------------------------------------------------------------------------------------
# the list
# ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spec:
    name: str
    family: str  # plain | bias | rope | window | pyramid | latent | causal | video | audio | tower | timm | none
    model: str  # transformers class
    config: str  # transformers config class
    kwargs: dict = field(default_factory=dict)
    inputs: Callable[[Any], dict] = pixels()
    attention: bool = True  # softmax attention with key/value rows
    needs: tuple[str, ...] = ()  # extra python packages
    note: str = ""


def S(name, family, model, config, kwargs=None, inputs=None, **kw):
    return Spec(name, family, model, config, kwargs or {}, inputs or pixels(), **kw)


def nested(vision, **top):  # CLIP-like: a full config with a tiny text tower
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50,
                bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return dict(vision_config=vision, text_config=text, **top)


SWIN = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, mlp_ratio=2.0,
            drop_path_rate=0.0)
PYR = dict(num_encoder_blocks=2, depths=[1, 2], hidden_sizes=[16, 32], strides=[4, 2], num_attention_heads=[1, 2],
           mlp_ratios=[2, 2], drop_path_rate=0.0)
SAM = dict(SMALL, output_channels=16, window_size=2, global_attn_indexes=[1], mlp_dim=64, mlp_ratio=2.0)
ROPE_HD = dict(D, num_attention_heads=2)  # head_dim 16, enough for 2-D / 3-D rotary embeddings
DINOV2 = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, **IMG)
QWEN = dict(depth=2, num_heads=2, patch_size=8, in_channels=3, spatial_merge_size=2, temporal_patch_size=2)


def timm_args(arch, img=32, inputs=None, note="", suffix="", **model_args):
    return S(f"timm_{arch.split('_patch')[0]}{suffix}", "timm", "TimmWrapperForImageClassification",
             "TimmWrapperConfig", dict(architecture=arch, model_args=model_args, num_labels=5),
             inputs or pixels(img), needs=("timm", "torchvision"), note=note)


T = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
NO = dict(attention=False)

ZOO: list[Spec] = [
    # --- plain pre-norm ViTs -------------------------------------------------------------------------------------
    S("vit", "plain", "ViTForImageClassification", "ViTConfig", dict(SMALL, **LABELS)),
    S("vit_mim", "plain", "ViTForMaskedImageModeling", "ViTConfig", dict(SMALL, encoder_stride=8)),
    S("deit", "plain", "DeiTForImageClassification", "DeiTConfig", dict(SMALL, **LABELS)),
    S("deit_teacher", "plain", "DeiTForImageClassificationWithTeacher", "DeiTConfig", dict(SMALL, **LABELS)),
    S("vit_msn", "plain", "ViTMSNForImageClassification", "ViTMSNConfig", dict(SMALL, **LABELS)),
    S("vit_mae", "plain", "ViTMAEModel", "ViTMAEConfig", dict(SMALL, mask_ratio=0.5), mae_inputs),
    S("ijepa", "plain", "IJepaForImageClassification", "IJepaConfig", dict(SMALL, **LABELS)),
    S("dinov2", "plain", "Dinov2ForImageClassification", "Dinov2Config", dict(DINOV2, **LABELS)),
    S("dinov2_swiglu", "plain", "Dinov2ForImageClassification", "Dinov2Config",
      dict(DINOV2, use_swiglu_ffn=True, **LABELS)),
    S("dinov2_with_registers", "plain", "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
      dict(DINOV2, num_register_tokens=2, **LABELS)),
    S("dinov2_backbone", "plain", "Dinov2Backbone", "Dinov2Config", dict(DINOV2, out_indices=[1, 2])),
    S("pixio", "plain", "PixioModel", "PixioConfig", dict(DINOV2, n_cls_tokens=2)),
    S("radio", "plain", "RadioModel", "RadioConfig",
      dict({**DINOV2, "mlp_ratio": 2.0}, patch_dim=192, max_img_size=64, num_cls_tokens=3, num_registers=2)),
    S("tipsv2", "plain", "Tipsv2VisionModel", "Tipsv2VisionConfig", dict(DINOV2, num_register_tokens=1)),
    S("yolos", "plain", "YolosForObjectDetection", "YolosConfig",
      dict(SMALL, image_size=[32, 32], num_detection_tokens=3, **LABELS)),
    S("dpt", "plain", "DPTForSemanticSegmentation", "DPTConfig",
      dict(SMALL, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
           fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5], **LABELS)),
    S("vitpose_backbone", "plain", "VitPoseBackbone", "VitPoseBackboneConfig",
      dict(D, mlp_ratio=2, image_size=[32, 32], patch_size=[8, 8])),
    S("depth_anything", "plain", "DepthAnythingForDepthEstimation", "DepthAnythingConfig",
      dict(backbone_config=dict(model_type="dinov2", reshape_hidden_states=False, apply_layernorm=True,
                                out_indices=[1, 2, 3, 4], **dict(DINOV2, num_hidden_layers=4)),
           reassemble_hidden_size=32, patch_size=8, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
           head_hidden_size=8)),
    S("eomt", "plain", "EomtForUniversalSegmentation", "EomtConfig",
      dict(D, mlp_ratio=2, **IMG, num_blocks=1, num_queries=3, num_register_tokens=1, num_upscale_blocks=1, **LABELS)),
    S("aimv2", "plain", "Aimv2VisionModel", "Aimv2VisionConfig", SMALL),
    S("clip", "plain", "CLIPForImageClassification", "CLIPConfig", nested(SMALL, **LABELS)),
    S("metaclip_2", "plain", "MetaClip2ForImageClassification", "MetaClip2Config", nested(SMALL, **LABELS)),
    S("siglip", "plain", "SiglipForImageClassification", "SiglipConfig", nested(SMALL, **LABELS)),
    S("siglip_vision_head", "plain", "SiglipVisionModel", "SiglipVisionConfig", SMALL),
    S("siglip2", "plain", "Siglip2ForImageClassification", "Siglip2Config",
      nested(dict(D, num_patches=16, patch_size=8), **LABELS), siglip2_inputs),
    # --- relative position bias added to the scores ---------------------------------------------------------------
    S("beit", "bias", "BeitForImageClassification", "BeitConfig",
      dict(SMALL, use_relative_position_bias=True, drop_path_rate=0.0, **LABELS)),
    S("beit_shared_bias", "bias", "BeitForImageClassification", "BeitConfig",
      dict(SMALL, use_shared_relative_position_bias=True, drop_path_rate=0.0, **LABELS)),
    S("beit_abs_pos", "plain", "BeitForImageClassification", "BeitConfig",
      dict(SMALL, use_absolute_position_embeddings=True, drop_path_rate=0.0, **LABELS)),
    S("data2vec_vision", "bias", "Data2VecVisionForImageClassification", "Data2VecVisionConfig",
      dict(SMALL, use_relative_position_bias=True, use_shared_relative_position_bias=True, drop_path_rate=0.0,
           **LABELS)),
    S("data2vec_vision_abs_pos", "plain", "Data2VecVisionForImageClassification", "Data2VecVisionConfig",
      dict(SMALL, use_absolute_position_embeddings=True, drop_path_rate=0.0, **LABELS)),
    # --- rotary position embedding ---------------------------------------------------------------------------------
    S("dinov3_vit", "rope", "DINOv3ViTModel", "DINOv3ViTConfig", dict(SMALL, num_register_tokens=2)),
    S("dinov3_vit_gated_backbone", "rope", "DINOv3ViTBackbone", "DINOv3ViTConfig",
      dict(SMALL, num_register_tokens=2, use_gated_mlp=True, out_indices=[1, 2])),
    S("eomt_dinov3", "rope", "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config",
      dict(SMALL, num_blocks=1, num_queries=3, num_register_tokens=1, num_upscale_blocks=1, **LABELS)),
    S("sapiens2", "rope", "Sapiens2Model", "Sapiens2Config",
      dict(SMALL, num_hidden_layers=3, num_register_tokens=2, num_key_value_attention_heads=2,
           num_first_full_attention_layers=1, num_last_full_attention_layers=1),
      note="GQA in the middle layers, q/k norm"),
    S("sapiens2_backbone", "rope", "Sapiens2Backbone", "Sapiens2Config",
      dict(SMALL, num_hidden_layers=3, num_register_tokens=2, num_key_value_attention_heads=2,
           num_first_full_attention_layers=1, num_last_full_attention_layers=1, out_indices=[1, 2, 3]),
      note="GQA in the middle layers, q/k norm"),
    S("mlcd", "rope", "MLCDVisionModel", "MLCDVisionConfig", dict(ROPE_HD, **IMG)),
    S("llama4_vision", "rope", "Llama4VisionModel", "Llama4VisionConfig",
      dict(ROPE_HD, **IMG, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
           intermediate_size=128)),
    S("pixtral", "rope", "PixtralVisionModel", "PixtralVisionConfig", dict(ROPE_HD, head_dim=16, **IMG),
      lambda m: dict(pixel_values=torch.randn(B, 3, 32, 32), image_sizes=torch.tensor([[32, 32], [24, 32]]))),
    S("gemma4_vision", "rope", "Gemma4VisionModel", "Gemma4VisionConfig",
      dict(ROPE_HD, num_key_value_heads=1, head_dim=16, patch_size=8, position_embedding_size=16,
           pooling_kernel_size=3), gemma4_inputs, note="GQA, q/k/v norm"),
    # --- windows -----------------------------------------------------------------------------------------------------
    S("swin", "window", "SwinForImageClassification", "SwinConfig", dict(SWIN, **LABELS)),
    S("swin_backbone", "window", "SwinBackbone", "SwinConfig", dict(SWIN, out_indices=[1, 2])),
    S("swinv2", "window", "Swinv2ForImageClassification", "Swinv2Config",
      dict(SWIN, pretrained_window_sizes=[0, 0], **LABELS), note="post-norm, cosine attention"),
    S("donut_swin", "window", "DonutSwinForImageClassification", "DonutSwinConfig", dict(SWIN, **LABELS)),
    S("maskformer_swin", "window", "MaskFormerSwinBackbone", "MaskFormerSwinConfig", dict(SWIN, out_indices=[1, 2])),
    S("swin2sr", "window", "Swin2SRForImageSuperResolution", "Swin2SRConfig",
      dict(image_size=16, patch_size=1, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, mlp_ratio=2.0,
           drop_path_rate=0.0), pixels(16)),
    S("hiera", "window", "HieraForImageClassification", "HieraConfig",
      dict(embed_dim=16, image_size=[32, 32], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1],
           mlp_ratio=2.0, depths=[1, 1, 2], num_heads=[2, 2, 4], num_query_pool=2, query_stride=[2, 2],
           masked_unit_size=[4, 4], masked_unit_attention=[True, True, False], **LABELS)),
    S("vitdet", "window", "VitDetBackbone", "VitDetConfig",
      dict(SMALL, mlp_ratio=2, pretrain_image_size=32, use_relative_position_embeddings=True, window_size=2,
           window_block_indices=[0])),
    S("sam_vision", "window", "SamVisionModel", "SamVisionConfig", SAM),
    S("sam_hq_vision", "window", "SamHQVisionModel", "SamHQVisionConfig", SAM),
    S("got_ocr2_vision", "window", "GotOcr2VisionEncoder", "GotOcr2VisionConfig", SAM),
    S("sam2_hiera", "window", "Sam2HieraDetModel", "Sam2HieraDetConfig",
      dict(hidden_size=16, num_attention_heads=1, image_size=[32, 32], patch_kernel_size=[3, 3], patch_stride=[2, 2],
           patch_padding=[1, 1], num_query_pool_stages=1, blocks_per_stage=[1, 2], embed_dim_per_stage=[16, 32],
           num_attention_heads_per_stage=[1, 2], window_size_per_stage=[4, 4], global_attention_blocks=[2],
           window_positional_embedding_background_size=[4, 4], mlp_ratio=2.0)),
    S("sam3_vit", "window", "Sam3ViTModel", "Sam3ViTConfig",
      dict(ROPE_HD, **IMG, window_size=2, global_attn_indexes=[1], pretrain_image_size=32)),
    S("rf_detr_dinov2", "window", "RfDetrDinov2Backbone", "RfDetrDinov2Config",
      dict(DINOV2, num_windows=2, window_block_indexes=[0], out_indices=[1, 2])),
    S("lw_detr_vit", "window", "LwDetrViTBackbone", "LwDetrViTConfig",
      dict(DINOV2, pretrain_image_size=32, num_windows=4, window_block_indices=[0], out_indices=[1, 2])),
    S("florence2_vision", "window", "Florence2VisionBackbone", "Florence2VisionConfig",
      dict(depths=[1, 1], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], patch_prenorm=[False, True],
           embed_dim=[16, 32], num_heads=[2, 4], num_groups=[2, 4], window_size=4, drop_path_rate=0.0, mlp_ratio=2.0,
           projection_dim=16), pixels(key="hidden_states"), note="DaViT: window blocks alternate with channel-attention blocks"),
    S("dinat", "window", "DinatForImageClassification", "DinatConfig",
      dict(patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], kernel_size=3, dilations=[[1], [1]], **LABELS),
      needs=("natten",)),
    # --- pyramids, key/value reduction ---------------------------------------------------------------------------------
    S("segformer", "pyramid", "SegformerForImageClassification", "SegformerConfig",
      dict(PYR, sr_ratios=[4, 1], patch_sizes=[7, 3], **LABELS)),
    S("pvt", "pyramid", "PvtForImageClassification", "PvtConfig",
      dict(PYR, image_size=32, sequence_reduction_ratios=[4, 1], patch_sizes=[4, 2], **LABELS)),
    S("pvt_v2", "pyramid", "PvtV2ForImageClassification", "PvtV2Config",
      dict(PYR, image_size=32, sr_ratios=[4, 1], patch_sizes=[7, 3], **LABELS)),
    S("pvt_v2_linear", "pyramid", "PvtV2ForImageClassification", "PvtV2Config",
      dict(PYR, image_size=32, sr_ratios=[4, 1], patch_sizes=[7, 3], linear_attention=True, **LABELS)),
    S("glpn", "pyramid", "GLPNModel", "GLPNConfig", dict(PYR, sr_ratios=[4, 1], patch_sizes=[7, 3])),
    S("cvt", "pyramid", "CvtForImageClassification", "CvtConfig",
      dict(patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], embed_dim=[16, 32], num_heads=[1, 2],
           depth=[1, 2], mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0],
           drop_path_rate=[0.0, 0.0], qkv_bias=[True, True], cls_token=[False, True],
           qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2],
           padding_q=[1, 1], stride_q=[1, 1], **LABELS)),
    S("levit", "pyramid", "LevitForImageClassification", "LevitConfig",
      dict(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
           key_dim=[8, 8, 8], **LABELS), pixels(64)),
    S("mobilevit", "pyramid", "MobileViTForImageClassification", "MobileViTConfig",
      dict(image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
           num_attention_heads=2, hidden_dropout_prob=0.0, **LABELS), pixels(64)),
    S("mobilevitv2", "pyramid", "MobileViTV2ForImageClassification", "MobileViTV2Config",
      dict(image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[32, 32, 32], **LABELS),
      pixels(64), attention=False, note="linear attention: no key/value rows"),
    S("swiftformer", "pyramid", "SwiftFormerForImageClassification", "SwiftFormerConfig",
      dict(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 32], **LABELS), pixels(64),
      attention=False, note="additive attention: no key/value rows"),
    # --- latents, causal -------------------------------------------------------------------------------------------------
    S("perceiver", "latent", "PerceiverForImageClassificationLearned", "PerceiverConfig",
      dict(num_latents=8, d_latents=32, d_model=32, num_blocks=1, num_self_attends_per_block=2,
           num_self_attention_heads=2, num_cross_attention_heads=2, image_size=16, attention_probs_dropout_prob=0.0,
           **LABELS), pixels(16)),
    S("imagegpt", "causal", "ImageGPTForImageClassification", "ImageGPTConfig",
      dict(vocab_size=17, n_positions=32, n_embd=32, n_layer=2, n_head=4, **LABELS),
      lambda m: dict(input_ids=torch.randint(0, 16, (B, 16)))),
    # --- video, audio ------------------------------------------------------------------------------------------------------
    S("videomae", "video", "VideoMAEForVideoClassification", "VideoMAEConfig",
      dict(SMALL, num_frames=4, tubelet_size=2, **LABELS), video(4)),
    S("vivit", "video", "VivitForVideoClassification", "VivitConfig",
      dict(D, image_size=32, num_frames=4, tubelet_size=[2, 8, 8], **LABELS), video(4)),
    S("timesformer", "video", "TimesformerForVideoClassification", "TimesformerConfig",
      dict(SMALL, num_frames=2, **LABELS), video(2)),
    S("timesformer_joint", "video", "TimesformerForVideoClassification", "TimesformerConfig",
      dict(SMALL, num_frames=2, attention_type="joint_space_time", **LABELS), video(2)),
    S("vjepa2", "video", "VJEPA2ForVideoClassification", "VJEPA2Config",
      dict(patch_size=8, crop_size=32, frames_per_clip=4, tubelet_size=2, hidden_size=32, num_attention_heads=2,
           num_hidden_layers=2, mlp_ratio=2.0, num_pooler_layers=1, pred_hidden_size=32, pred_num_attention_heads=2,
           pred_num_hidden_layers=1, pred_num_mask_tokens=2, **LABELS), video(4, key="pixel_values_videos")),
    S("videoprism", "video", "VideoPrismVisionModel", "VideoPrismVisionConfig",
      dict(D, image_size=32, num_frames=2, tubelet_size=[1, 8, 8], num_spatial_layers=2, num_temporal_layers=1,
           num_auxiliary_layers=1), video(2, key="pixel_values_videos"), note="logit soft-capping: eager only"),
    S("videomt", "video", "VideomtForUniversalSegmentation", "VideomtConfig",
      dict(D, mlp_ratio=2, **IMG, num_blocks=1, num_queries=3, num_register_tokens=1, num_upscale_blocks=1, **LABELS),
      video(2, key="pixel_values_videos")),
    S("x_clip_vision", "video", "XCLIPVisionModel", "XCLIPVisionConfig",
      dict(SMALL, num_frames=2, mit_hidden_size=32), lambda m: dict(pixel_values=torch.randn(2 * B, 3, 32, 32))),
    S("ast", "audio", "ASTForAudioClassification", "ASTConfig",
      dict(D, patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16, **LABELS),
      lambda m: dict(input_values=torch.randn(B, 32, 16))),
    # --- vision towers of multimodal models -------------------------------------------------------------------------------
    S("altclip_vision", "tower", "AltCLIPVisionModel", "AltCLIPVisionConfig", SMALL),
    S("chinese_clip_vision", "tower", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", SMALL),
    S("clipseg_vision", "tower", "CLIPSegVisionModel", "CLIPSegVisionConfig", SMALL),
    S("owlvit_vision", "tower", "OwlViTVisionModel", "OwlViTVisionConfig", SMALL),
    S("owlv2_vision", "tower", "Owlv2VisionModel", "Owlv2VisionConfig", SMALL),
    S("git_vision", "tower", "GitVisionModel", "GitVisionConfig", SMALL),
    S("blip_vision", "tower", "BlipVisionModel", "BlipVisionConfig", SMALL),
    S("blip_2_vision", "tower", "Blip2VisionModel", "Blip2VisionConfig", SMALL),
    S("instructblip_vision", "tower", "InstructBlipVisionModel", "InstructBlipVisionConfig", SMALL),
    S("flava_image", "tower", "FlavaImageModel", "FlavaImageConfig", SMALL),
    S("groupvit_vision", "tower", "GroupViTVisionModel", "GroupViTVisionConfig",
      dict(SMALL, num_hidden_layers=3, depths=[1, 1, 1], num_group_tokens=[4, 2, 0], num_output_groups=[4, 2, 2])),
    S("bridgetower_vision", "tower", "BridgeTowerVisionModel", "BridgeTowerVisionConfig",
      dict(hidden_size=64, num_hidden_layers=2, patch_size=8, image_size=32), pixels(key="image"),
      note="nn.MultiheadAttention"),
    S("kosmos2_vision", "tower", "Kosmos2VisionModel", "Kosmos2VisionConfig", SMALL),
    S("kosmos2_5_vision", "tower", "Kosmos2_5VisionModel", "Kosmos2_5VisionConfig",
      dict(D, head_dim=8, patch_embed_hidden_size=192, max_num_patches=16), flattened_patches()),
    S("pix2struct_vision", "tower", "Pix2StructVisionModel", "Pix2StructVisionConfig",
      dict(hidden_size=32, patch_embed_hidden_size=192, d_ff=64, d_kv=8, num_hidden_layers=2, num_attention_heads=4,
           seq_len=16), flattened_patches()),
    S("idefics2_vision", "tower", "Idefics2VisionTransformer", "Idefics2VisionConfig", SMALL, masked_grid_inputs),
    S("idefics3_vision", "tower", "Idefics3VisionTransformer", "Idefics3VisionConfig", SMALL, masked_grid_inputs),
    S("smolvlm_vision", "tower", "SmolVLMVisionTransformer", "SmolVLMVisionConfig", SMALL, masked_grid_inputs),
    S("internvl_vision", "tower", "InternVLVisionModel", "InternVLVisionConfig",
      dict(SMALL, image_size=[32, 32], patch_size=[8, 8], use_qk_norm=True)),
    S("janus_vision", "tower", "JanusVisionModel", "JanusVisionConfig", dict(SMALL, mlp_ratio=2.0)),
    S("mllama_vision", "tower", "MllamaVisionModel", "MllamaVisionConfig",
      dict(hidden_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=4, num_attention_heads=4,
           intermediate_size=64, image_size=32, patch_size=8, max_num_tiles=2, intermediate_layers_indices=[0, 1],
           supported_aspect_ratios=[[1, 1], [1, 2]], vision_output_dim=96), mllama_inputs),
    S("ovis2_vision", "tower", "Ovis2VisionModel", "Ovis2VisionConfig", dict(SMALL, vocab_size=16)),
    S("phi4_multimodal_vision", "tower", "Phi4MultimodalVisionModel", "Phi4MultimodalVisionConfig",
      dict(SMALL, crop_size=32),
      lambda m: dict(pixel_values=torch.randn(B, 3, 32, 32),
                     patch_attention_mask=torch.ones(B, 4, 4, dtype=torch.bool))),
    S("qwen2_vl_vision", "tower", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig",
      dict(QWEN, embed_dim=32, hidden_size=32, mlp_ratio=2), packed_inputs(), note="packed sequence"),
    S("qwen2_5_vl_vision", "tower", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig",
      dict(QWEN, hidden_size=32, intermediate_size=64, out_hidden_size=32, window_size=32, fullatt_block_indexes=[1]),
      packed_inputs(), note="packed sequence, windows"),
    S("qwen3_vl_vision", "tower", "Qwen3VLVisionModel", "Qwen3VLVisionConfig",
      dict(QWEN, hidden_size=32, intermediate_size=64, out_hidden_size=32, num_position_embeddings=16,
           deepstack_visual_indexes=[0]), packed_inputs(), note="packed sequence"),
    S("glm4v_vision", "tower", "Glm4vVisionModel", "Glm4vVisionConfig",
      dict(QWEN, hidden_size=32, intermediate_size=64, out_hidden_size=32, image_size=32),
      packed_inputs(), note="packed sequence"),
    S("mgp_str", "tower", "MgpstrForSceneTextRecognition", "MgpstrConfig",
      dict(image_size=[32, 32], patch_size=8, max_token_length=4, num_character_labels=5, num_bpe_labels=5,
           num_wordpiece_labels=5, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2.0)),
    S("vilt", "tower", "ViltForQuestionAnswering", "ViltConfig", dict(SMALL, vocab_size=50, **LABELS), text_image_inputs,
      note="permutes the patches at random: outputs agree up to rounding"),
    S("layoutlmv3", "tower", "LayoutLMv3ForSequenceClassification", "LayoutLMv3Config",
      dict(D, input_size=32, patch_size=8, vocab_size=50, coordinate_size=4, shape_size=8, hidden_dropout_prob=0.0,
           attention_probs_dropout_prob=0.0, **LABELS), layoutlmv3_inputs),
    S("seggpt", "tower", "SegGptModel", "SegGptConfig",
      dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=[64, 32], patch_size=8, mlp_dim=64,
           drop_path_rate=0.0, pretrain_image_size=32, decoder_hidden_size=8, merge_index=0,
           intermediate_hidden_state_indices=[1, 2, 3]), seggpt_inputs),
    # --- timm ------------------------------------------------------------------------------------------------------------
    timm_args("vit_base_patch16_224", **T),
    timm_args("vit_base_patch16_224", suffix="_qknorm", **T, qk_norm=True),
    timm_args("deit3_base_patch16_224", **T),
    timm_args("vit_base_patch16_siglip_224", suffix="_siglip", **T),
    timm_args("vit_base_patch14_reg4_dinov2", suffix="_reg4_dinov2", **T),
    timm_args("eva02_base_patch14_224", **dict(T, num_heads=2), note="rope, split q/k/v"),
    timm_args("vit_base_patch16_dinov3", suffix="_dinov3", **dict(T, num_heads=2), note="rope"),
    timm_args("vit_pe_core_base_patch16_224", **dict(T, num_heads=2), note="rope"),
    timm_args("beit_base_patch16_224", **T, note="relative position bias"),
    timm_args("vit_relpos_base_patch16_224", **T, note="relative position bias"),
    timm_args("swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2),
              num_heads=(2, 4)),
    timm_args("swinv2_tiny_window8_256", img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2),
              num_heads=(2, 4), note="cosine attention"),
    timm_args("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4), img=64),
    timm_args("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
              note="talking heads: scores are mixed across heads"),
    timm_args("xcit_nano_12_p16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
              note="cross-covariance (channel) attention"),
    timm_args("levit_128s", img_size=64, embed_dim=(16, 24, 32), num_heads=(2, 2, 2), depth=(1, 1, 1), img=64),
    # --- no attention (the tuner must refuse these with a clear message) ----------------------------------------------------
    S("resnet", "none", "ResNetForImageClassification", "ResNetConfig",
      dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **LABELS), **NO),
    S("bit", "none", "BitForImageClassification", "BitConfig",
      dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=1, **LABELS), **NO),
    S("regnet", "none", "RegNetForImageClassification", "RegNetConfig",
      dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, **LABELS), **NO),
    S("convnext", "none", "ConvNextForImageClassification", "ConvNextConfig",
      dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **LABELS), **NO),
    S("convnextv2", "none", "ConvNextV2ForImageClassification", "ConvNextV2Config",
      dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **LABELS), **NO),
    S("dinov3_convnext", "none", "DINOv3ConvNextModel", "DINOv3ConvNextConfig",
      dict(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]), **NO),
    S("efficientnet", "none", "EfficientNetForImageClassification", "EfficientNetConfig",
      dict(image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, **LABELS), **NO),
    S("focalnet", "none", "FocalNetForImageClassification", "FocalNetConfig",
      dict(image_size=32, embed_dim=16, hidden_sizes=[16, 32], depths=[1, 1], focal_levels=[2, 2],
           focal_windows=[3, 3], drop_path_rate=0.0, **LABELS), note="focal modulation", **NO),
    S("poolformer", "none", "PoolFormerForImageClassification", "PoolFormerConfig",
      dict(depths=[1, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1],
           num_encoder_blocks=2, **LABELS), note="pooling token mixer", **NO),
    S("mobilenet_v1", "none", "MobileNetV1ForImageClassification", "MobileNetV1Config",
      dict(image_size=32, depth_multiplier=0.25, **LABELS), **NO),
    S("mobilenet_v2", "none", "MobileNetV2ForImageClassification", "MobileNetV2Config",
      dict(image_size=32, depth_multiplier=0.25, **LABELS), **NO),
    S("hgnet_v2", "none", "HGNetV2ForImageClassification", "HGNetV2Config",
      dict(stem_channels=[3, 8, 8], stage_in_channels=[8, 16], stage_mid_channels=[8, 8],
           stage_out_channels=[16, 32], stage_num_blocks=[1, 1], stage_downsample=[False, True],
           stage_light_block=[False, False], stage_kernel_size=[3, 3], stage_numb_of_layers=[1, 1],
           hidden_sizes=[16, 32], depths=[1, 1], embedding_size=8, **LABELS), **NO),
    S("textnet", "none", "TextNetForImageClassification", "TextNetConfig", dict(
        stem_out_channels=8, hidden_sizes=[8, 8, 16, 16, 16], image_size=[32, 32],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]],
        conv_layer_strides=[[2], [2], [1], [1]], **LABELS), **NO),
    S("pp_lcnet", "none", "PPLCNetForImageClassification", "PPLCNetConfig", dict(scale=0.25, **LABELS), **NO),
]

BY_NAME: dict[str, Spec] = {s.name: s for s in ZOO}
assert len(BY_NAME) == len(ZOO), "duplicate names"


# ----------------------------------------------------------------------------------------------------------------
# functions
# ----------------------------------------------------------------------------------------------------------------
def names(family: str | None = None, attention: bool | None = None) -> list[str]:
    return [s.name for s in ZOO
            if (family is None or s.family == family) and (attention is None or s.attention == attention)]


def is_timm(name: str) -> bool:
    return BY_NAME[name].family == "timm"


def missing(name: str) -> str | None:
    """Why the model cannot be built here (absent from this transformers, or a package is not installed)."""
    spec = BY_NAME[name]
    for pkg in spec.needs:
        if importlib.util.find_spec(pkg) is None:
            return f"needs {pkg}"
    for cls in (spec.model, spec.config):
        if _lookup(cls) is None:
            return f"{cls} is not in transformers {transformers.__version__}"
    return None


def _lookup(cls: str):
    obj = getattr(transformers, cls, None)
    if obj is None:  # a few vision towers are not exported at the top level
        import os
        import re

        root = os.path.join(os.path.dirname(transformers.__file__), "models")
        kind = "configuration" if cls.endswith("Config") else "modeling"
        for folder in os.listdir(root):
            if not os.path.isdir(os.path.join(root, folder)):
                continue
            for file in os.listdir(os.path.join(root, folder)):
                if file.startswith(kind + "_") and file.endswith(".py"):
                    with open(os.path.join(root, folder, file)) as f:
                        if re.search(rf"^class {cls}\b", f.read(), re.M):
                            mod = importlib.import_module(f"transformers.models.{folder}.{file[:-3]}")
                            return getattr(mod, cls)
        return None
    return obj


def randomise_(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of ordinary size: default inits are 1e-10, zero (biases, relative position tables,
    prompts) or 1e-5 (layer scale) in many of these models, and would hide errors."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=gen).to(p.dtype)
            if p.ndim >= 2 and not (p.ndim == 3 and p.shape[:2] == (1, 1)):
                fan_in = max(1, p[0].numel())
                p.copy_(noise / math.sqrt(fan_in) if fan_in < 10**5 else noise)
            else:
                base = p.detach().clone()
                p.copy_(torch.where(base.abs() < 1e-2, torch.full_like(base, 0.5 if p.ndim == 1 and base.abs().max() > 0
                                                                       else 0.0), base) + 0.2 * noise)


def build(name: str, seed: int = 0, attn_implementation: str | None = None, dtype=torch.float32):
    """-> (model in eval mode, example inputs). ``model(**inputs)`` is deterministic."""
    why = missing(name)
    if why:
        raise RuntimeError(f"{name}: {why}")
    spec = BY_NAME[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _lookup(spec.config)(**copy.deepcopy(spec.kwargs))
        cls = _lookup(spec.model)
        torch.manual_seed(seed)
        if attn_implementation is not None:
            model = cls._from_config(config, attn_implementation=attn_implementation)
        else:
            model = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    randomise_(model, seed)
    model = model.to(dtype).eval()
    torch.manual_seed(seed + 1)
    inputs = spec.inputs(model)
    inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return model, inputs


def output_of(out) -> torch.Tensor:
    """One float tensor of a model output: logits if there are any, else the last hidden state / feature map."""
    for key in ("logits", "last_hidden_state", "feature_maps", "predicted_depth", "class_queries_logits",
                "reconstruction", "image_embeds"):
        v = out.get(key) if hasattr(out, "get") else getattr(out, key, None)
        if v is None:
            continue
        if torch.is_tensor(v):
            return v
        if isinstance(v, (tuple, list)):
            return torch.cat([t.flatten() for t in v if torch.is_tensor(t)])
    if torch.is_tensor(out):
        return out
    if isinstance(out, (tuple, list)):
        return torch.cat([t.flatten() for t in out if torch.is_tensor(t) and t.is_floating_point()])
    raise TypeError(f"no float output in {type(out)}: {list(out.keys())}")


def check(name: str) -> str:
    model, inputs = build(name)
    out = output_of(model(**inputs))
    assert torch.isfinite(out).all(), "output is not finite"
    again = output_of(model(**inputs))
    assert torch.allclose(out, again, rtol=1e-4, atol=1e-5), "not deterministic"
    out.float().pow(2).sum().backward()
    n = sum(p.numel() for p in model.parameters())
    g = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    t = sum(1 for _ in model.parameters())
    return f"ok  {n:>8,} parameters, gradient in {g}/{t} tensors, output {tuple(out.shape)}"


if __name__ == "__main__":
    import sys
    import time

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    bad = skipped = 0
    for name in sys.argv[1:] or [s.name for s in ZOO]:
        start = time.time()
        why = missing(name)
        if why:
            skipped += 1
            print(f"{name:28s} {BY_NAME[name].family:8s} skip {why}")
            continue
        try:
            line = check(name)
        except Exception as e:
            bad += 1
            line = f"FAIL {type(e).__name__}: {str(e)[:300]}"
        print(f"{name:28s} {BY_NAME[name].family:8s} {line}  [{time.time() - start:.2f}s]", flush=True)
    print(f"{len(sys.argv[1:] or ZOO)} models, {bad} failed, {skipped} skipped")
