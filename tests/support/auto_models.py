# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The models of every auto class of transformers for images, video, sound and several of them, on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


TASKS = (
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "MASK_GENERATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "NORMAL_ESTIMATION",
    "POINTMAP_ESTIMATION",
    "POSE_ESTIMATION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "IMAGE_MATTING",
    "IMAGE_TO_IMAGE",
    "MASKED_IMAGE_MODELING",
    "CAUSAL_IMAGE_MODELING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "RETRIEVAL",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "VISUAL_QUESTION_ANSWERING",
    "DOCUMENT_QUESTION_ANSWERING",
    "TABLE_RECOGNITION",
    "TEXT_RECOGNITION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_FRAME_CLASSIFICATION",
    "AUDIO_XVECTOR",
)  # MODEL_FOR_..._MAPPING_NAMES
SWIN = {"model_type": "swin", "out_features": ["stage2", "stage3", "stage4"]}
DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": SWIN}
RT_DETR = {**DETR, "encoder_in_channels": [192, 384, 768]}
PERCEIVER = {"qk_channels": 256, "v_channels": 256, "num_cross_attention_heads": 1}
SAPIENS = {  # the head of the paper has more layers
    "head_config": {
        "upsample_out_channels": [768, 512],
        "upsample_kernel_sizes": [4, 4],
        "use_pixel_shuffle": False,
        "conv_out_channels": [256],
        "conv_kernel_sizes": [1],
        "scale_conv_out_channels": [128],
        "scale_conv_kernel_sizes": [1],
        "scale_final_hidden_sizes": [64, 1],
    }
}
SETTINGS: dict[str, dict[str, Any]] = {  # of models that cannot be built, or have no attention, by default
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11]},
    "ConditionalDetrForObjectDetection": DETR,
    "DeformableDetrForObjectDetection": {**DETR, "with_box_refine": True, "two_stage": True},
    "DFineForObjectDetection": RT_DETR,
    "DabDetrForObjectDetection": DETR,
    "DetrForObjectDetection": DETR,
    "DetrForSegmentation": DETR,
    "PerceiverForImageClassificationConvProcessing": PERCEIVER,
    "PerceiverForImageClassificationFourier": PERCEIVER,
    "RTDetrForObjectDetection": RT_DETR,
    "RTDetrV2ForObjectDetection": RT_DETR,
    "Sapiens2ForImageMatting": SAPIENS,
    "Sapiens2ForNormalEstimation": SAPIENS,
    "Sapiens2ForPointmapEstimation": SAPIENS,
    "Sapiens2ForPoseEstimation": SAPIENS,
    "Sapiens2ForSemanticSegmentation": SAPIENS,
    "TableTransformerForObjectDetection": DETR,
    "VitMatteForImageMatting": {
        "backbone_config": {"model_type": "vitdet", "out_features": ["stage12"], "num_channels": 4},
        "convstream_hidden_sizes": [48, 96, 192],
        "fusion_hidden_sizes": [256, 128, 64, 32],
    },
    "UperNetForSemanticSegmentation": {
        "backbone_config": {"model_type": "swin", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    },
}
BROKEN = {  # models that their own default config does not build in transformers 5.24
    "AyaVisionForConditionalGeneration": "its default width is not divisible by its default number of heads",
    "ChameleonForConditionalGeneration": "needs the token map of a vocabulary",
    "CohereCompassForConditionalGeneration": "its default config lacks the kinds of its layers",
    "DeepseekOcr2ForConditionalGeneration": "its default config lacks sizes",
    "DiffusionGemmaForBlockDiffusion": "its default config lacks sizes",
    "Emu3ForConditionalGeneration": "needs the token map of a vocabulary",
    "Granite4VisionForConditionalGeneration": "its default config lacks the layers it reads",
    "HunYuanVLForConditionalGeneration": "its default config lacks sizes",
    "MoonshineStreamingForConditionalGeneration": "its default config lacks sizes",
    "PPOCRV5ServerDetForObjectDetection": "its default config lacks sizes",
    "PPOCRV6MediumDetForObjectDetection": "its default config lacks sizes",
    "Qwen3OmniMoeForConditionalGeneration": "its default config lacks sizes",
    "Qwen4ExpForConditionalGeneration": "its default config lacks sizes",
    "Wav2Vec2BertForCTC": "its default config lacks a vocabulary",
    "Wav2Vec2ConformerForCTC": "its default config lacks a vocabulary",
}


def _of_all_tasks() -> dict[str, tuple[str, list[str]]]:
    found: dict[str, tuple[str, dict[str, None]]] = {}  # a dict for an ordered set
    for task in TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, (model_type, {}))[1][task.lower().replace("_", " ")] = None
    return {name: (model_type, list(of_tasks)) for name, (model_type, of_tasks) in found.items()}


MODELS = _of_all_tasks()
"""The names of the classes, each with the type of its config and its tasks."""


def build(name: str) -> Any:
    """The model of this class on the meta device, of default size.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    model_class = getattr(transformers, name)
    config_class = CONFIG_MAPPING[MODELS[name][0]]
    if not issubclass(config_class, model_class.config_class or object):
        config_class = model_class.config_class
    config = config_class(**copy.deepcopy(SETTINGS.get(name, {})))
    with torch.device("meta"):
        return model_class(config)
