# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Every model of every auto class of transformers that sees or hears: prompts and a named head train, nothing else.

The models have their default sizes and lie on the meta device, which holds no values. What needs values is shown by
the tiny models of `test_heads.py`.
"""

from __future__ import annotations

import warnings

import pytest
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper

from peft_e2vpt import E2VPTConfig
from tests.support import auto_models


QUICK = (  # one of each kind of task, and of each kind of difficulty
    "ViTForImageClassification",
    "PerceiverForImageClassificationLearned",
    "VideoMAEForVideoClassification",
    "ASTForAudioClassification",
    "DPTForSemanticSegmentation",
    "DPTForDepthEstimation",
    "MaskFormerForInstanceSegmentation",
    "EomtForUniversalSegmentation",
    "OneFormerForUniversalSegmentation",
    "YolosForObjectDetection",
    "DeformableDetrForObjectDetection",
    "LwDetrForObjectDetection",
    "OwlViTForObjectDetection",
    "VitPoseForPoseEstimation",
    "Swin2SRForImageSuperResolution",
    "SwinForMaskedImageModeling",
    "ViltForQuestionAnswering",
    "GitForCausalLM",
    "BlipForConditionalGeneration",
    "CLIPModel",
    "SamModel",
)
LARGE = {  # per cent of the model, where more than 5 are trained: decoders of maps and pools with attention
    "BeitForSemanticSegmentation": 48,
    "Data2VecVisionForSemanticSegmentation": 48,
    "UperNetForSemanticSegmentation": 56,
    "MobileViTForSemanticSegmentation": 25,
    "DPTForSemanticSegmentation": 24,
    "DPTForDepthEstimation": 23,
    "Tipsv2DptForSemanticSegmentation": 22,
    "Tipsv2DptForDepthEstimation": 22,
    "Tipsv2DptForNormalEstimation": 22,
    "VJEPA2ForVideoClassification": 14,
    "PromptDepthAnythingForDepthEstimation": 13,
    "DepthAnythingForDepthEstimation": 12,
    "SegformerForSemanticSegmentation": 12,
    "CHMv2ForDepthEstimation": 11,
    "GLPNForDepthEstimation": 10,
    "ZoeDepthForDepthEstimation": 9,
    "SwinForMaskedImageModeling": 9,
    "Swinv2ForMaskedImageModeling": 9,
    "VideoPrismForVideoClassification": 8,
    "DepthProForDepthEstimation": 7,
}


def adapted(name: str) -> PeftModel:
    if name in auto_models.BROKEN:
        pytest.skip(auto_models.BROKEN[name])
    try:
        model = auto_models.build(name)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a head that was not found
        warnings.filterwarnings("ignore", "Initializing zero-element")
        return get_peft_model(model, E2VPTConfig(num_segments=1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in auto_models.MODELS]
)
def test_only_prompts_and_named_heads_train(name: str) -> None:
    try:
        model = adapted(name)
    except ValueError as error:
        assert name not in QUICK
        assert "has no self-attention that E2VPT knows" in str(error)
        return
    base, heads = model.get_base_model(), model.peft_config["default"].modules_to_save
    wrapped = {path: module for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert set(heads) == set(wrapped)
    for path in wrapped:
        assert not [other for other in wrapped if other.startswith(f"{path}.")]
        assert len([other for other in wrapped if other == path]) == 1
    trained = {key: parameter.numel() for key, parameter in base.named_parameters() if parameter.requires_grad}
    copies = tuple(f"{path}.modules_to_save.default." for path in wrapped)
    assert all(key.startswith("e2vpt.") or key.startswith(copies) for key in trained)
    frozen = sum(parameter.numel() for parameter in base.parameters() if not parameter.requires_grad)
    share = 100 * sum(trained.values()) / frozen  # the original head is among what is frozen
    assert share < LARGE.get(name, 5) and (name not in LARGE or share > LARGE[name] - 3)
