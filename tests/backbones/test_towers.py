# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Models of several parts: the vision tower is adapted, the rest is left alone; and text encoders by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import TaskType, get_peft_model

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.tuner.prompt_layers import prompt_layers


SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURES: dict[str, Any] = {"image_size": 32, "patch_size": 8}
WORDS: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CONFIG: dict[str, Any] = {
    "num_visual_prompts": 3,
    "num_kv_prompts": 2,
    "num_segments": 4,
    "visual_prompt_dropout": 0.0,
}


def config(**changes: Any) -> E2VPTConfig:
    return E2VPTConfig(**{**CONFIG, **changes})


def llava() -> Any:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**SIZES, **PICTURES),
            text_config=transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2),
            image_token_index=5,
        )
    )


def blip() -> Any:
    text = {**SIZES, **WORDS, "encoder_hidden_size": 32}
    parts = {"text_config": text, "vision_config": {**SIZES, **PICTURES}, "projection_dim": 16}
    return transformers.BlipModel(transformers.BlipConfig(**parts, image_text_hidden_size=32))


def clip() -> Any:
    parts = {"text_config": {**SIZES, **WORDS}, "vision_config": {**SIZES, **PICTURES}, "projection_dim": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(**parts))


def siglip() -> Any:
    parts = {"text_config": {**SIZES, **WORDS}, "vision_config": {**SIZES, **PICTURES}}
    return transformers.SiglipModel(transformers.SiglipConfig(**parts))


def upernet() -> Any:
    backbone = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=3)
    )


def depth_anything() -> Any:
    backbone = transformers.Dinov2Config(
        **{**SIZES, "num_hidden_layers": 4},
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8
        )
    )


@pytest.mark.parametrize(
    ("build", "tower"),
    [(llava, "vision_tower"), (blip, "vision_model"), (clip, "vision_model"), (siglip, "vision_model")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_of_a_model_of_images_and_text_only_the_vision_tower_is_adapted(build: Any, tower: str) -> None:
    model = get_peft_model(build(), config())
    layers = prompt_layers(model)
    assert len(layers) == 2
    assert all(tower in layer.site.name for layer in layers)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".e2vpt." in name for name in trained), trained


@pytest.mark.parametrize("build", [clip, siglip], ids=lambda build: build.__name__)
def test_a_text_tower_is_adapted_where_it_is_named(build: Any) -> None:
    model = get_peft_model(build(), config(target_modules=r"text_model\..*"))
    assert all(layer.site.name.startswith("text_model") for layer in prompt_layers(model))


@pytest.mark.parametrize(
    ("build", "heads", "size"),
    [(upernet, {"decode_head", "auxiliary_head"}, 64), (depth_anything, {"neck", "head"}, 56)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_backbone_in_a_dense_model_trains_with_the_heads_of_that_model(build: Any, heads: Any, size: int) -> None:
    model = get_peft_model(build(), config())
    assert set(model.peft_config["default"].modules_to_save) == heads
    output = model(pixel_values=torch.randn(2, 3, size, size))
    (output.logits if "logits" in output else output.predicted_depth).square().mean().backward()
    for layer in prompt_layers(model):
        assert layer.e2vpt_visual_prompts["default"].grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ text encoders
TEXT: dict[str, Any] = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, SIZES),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, SIZES),
    "xlm_roberta": (transformers.XLMRobertaForSequenceClassification, transformers.XLMRobertaConfig, SIZES),
    "camembert": (transformers.CamembertForSequenceClassification, transformers.CamembertConfig, SIZES),
    "electra": (transformers.ElectraForSequenceClassification, transformers.ElectraConfig, SIZES),
    "data2vec_text": (transformers.Data2VecTextForSequenceClassification, transformers.Data2VecTextConfig, SIZES),
    "distilbert": (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig,
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
}


def text_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model_class, config_class, sizes = TEXT[name]
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, **WORDS, num_labels=3)).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TEXT)
def test_a_text_encoder_takes_prompts_and_hides_its_padding(name: str, implementation: str) -> None:
    model = get_peft_model(text_model(name, torch.float64), config(task_type=TaskType.SEQ_CLS)).double().eval()
    model.get_base_model().set_attn_implementation(implementation)
    words = torch.randint(3, 60, (2, 7))
    plain = model(input_ids=words).logits
    padded = torch.cat([words, torch.full((2, 3), WORDS["pad_token_id"])], dim=1)
    mask = (padded != WORDS["pad_token_id"]).long()
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, plain, rtol=0, atol=1e-6)
    with model.disable_adapter():
        assert (model(input_ids=words).logits - plain).abs().max() > 1e-3
    plain.square().sum().backward()
    for layer in prompt_layers(model):
        assert layer.e2vpt_visual_prompts["default"].grad.abs().sum() > 0
        assert layer.e2vpt_kv_prompts["default"].grad.abs().sum() > 0
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None)


# --------------------------------------------------------------------------------------------------------- input sizes
SIZED: dict[str, Any] = {
    "vit": (transformers.ViTModel, transformers.ViTConfig(**SIZES, **PICTURES), {"interpolate_pos_encoding": True}),
    "deit": (transformers.DeiTModel, transformers.DeiTConfig(**SIZES, **PICTURES), {"interpolate_pos_encoding": True}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**SIZES, **PICTURES), {}),
    "dinov3": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig(**SIZES, **PICTURES), {}),
    "clip": (
        transformers.CLIPVisionModel,
        transformers.CLIPVisionConfig(**SIZES, **PICTURES),
        {"interpolate_pos_encoding": True},
    ),
    "swin": (
        transformers.SwinModel,
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
        ),
        {"interpolate_pos_encoding": True},
    ),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "channels last"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 48), (32, 64)], ids=str)
@pytest.mark.parametrize("name", SIZED)
def test_any_image_that_the_backbone_takes_gives_every_prompt_a_gradient(
    name: str, shape: tuple[int, int], precision: str
) -> None:
    model_class, model_config, arguments = SIZED[name]
    base = model_class(model_config).eval()
    pixels = torch.randn(2, 3, *shape)
    if precision == "channels last":
        base, pixels = base.to(memory_format=torch.channels_last), pixels.to(memory_format=torch.channels_last)
    expected = base(pixels, **arguments).last_hidden_state.shape
    model = get_peft_model(base, config())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16 autocast"):
        output = model(pixel_values=pixels, **arguments).last_hidden_state
    assert output.shape == expected
    output.float().square().mean().backward()
    for layer in prompt_layers(model):
        for prompts in (layer.e2vpt_visual_prompts["default"], layer.e2vpt_kv_prompts["default"]):
            assert prompts.grad.dtype == torch.float32 and prompts.grad.abs().sum() > 0
