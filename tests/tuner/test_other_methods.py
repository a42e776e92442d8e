# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""E2VPT beside other PEFT methods on the same backbone, and on quantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from peft_e2vpt import E2VPTConfig
from peft_e2vpt._compat import is_for_inference
from tests.support.models import build, output_of


PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
OTHERS = {
    "lora": LoraConfig(target_modules=PROJECTIONS, r=2),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
}
CONFIG: dict[str, Any] = {"num_segments": 4, "seed": 0, "visual_prompt_dropout": 0.0}


def both(name: str, other: str, e2vpt_first: bool) -> tuple[PeftModel, dict[str, Any]]:
    """A backbone with E2VPT on the attentions and another method on their very projections."""
    model, inputs = build(name, dtype=torch.float64)
    if not e2vpt_first:
        model = inject_adapter_in_model(OTHERS[other], model, adapter_name="other")
    adapted = get_peft_model(model, E2VPTConfig(**CONFIG))
    if e2vpt_first:
        inject_adapter_in_model(OTHERS[other], adapted.get_base_model(), adapter_name="other")
        adapted.set_adapter("default")  # the head of E2VPT, which the injection has switched off
    adapted = adapted.double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in others_of(adapted):
        nn.init.normal_(parameter, 1.0 if other == "ia3" else 0.0, 0.1, generator=generator)
    return adapted, inputs


def others_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name or "ia3_" in name]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip"])
def test_another_method_sits_on_the_projections_of_an_adapted_attention_in_either_order(name: str, other: str) -> None:
    answers = []
    for e2vpt_first in (False, True):
        model, inputs = both(name, other, e2vpt_first)
        answers.append(output_of(model(**inputs)))
        answers[-1].square().sum().backward()
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        assert any("e2vpt_" in key for key in trained) and others_of(model)
        vision = {key: p for key, p in trained.items() if "text_model" not in key}
        idle = [key for key, p in vision.items() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not idle
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-12)


def test_the_rows_of_prompts_pass_the_other_method_too() -> None:
    model, inputs = both("vit", "lora", e2vpt_first=False)
    together = output_of(model(**inputs))
    keys = {key for key, _ in model.named_modules() if key.endswith("k_proj")}
    for key in keys:
        weight = model.get_submodule(key)
        merged = weight.base_layer.weight + weight.get_delta_weight("other")
        weight.base_layer.weight.data, weight.scaling["other"] = merged, 0.0
    torch.testing.assert_close(output_of(model(**inputs)), together, rtol=0, atol=1e-12)


def test_only_the_prompts_and_the_head_are_saved_with_an_e2vpt_adapter(tmp_path: Path) -> None:
    model, _ = both("vit", "lora", e2vpt_first=True)
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "lora" in key]


def test_mixed_models_of_peft_are_refused_by_peft() -> None:
    model, _ = build("vit")
    with pytest.raises(ValueError, match="'E2VPT' is not compatible with the `PeftMixedModel`"):
        get_peft_model(model, E2VPTConfig(**CONFIG), mixed=True)


# ------------------------------------------------------------------------------------------------- weights elsewhere
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip"])
def test_a_backbone_on_a_device_map_trains_and_answers_as_a_whole_one(name: str, place: str, tmp_path: Path) -> None:
    whole, inputs = build(name)
    whole.save_pretrained(tmp_path / "base")
    children = [child for child, _ in whole.named_children()]
    device_map = {child: place if child != "classifier" else "cpu" for child in children}
    base = type(whole).from_pretrained(tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "disk")
    expected = output_of(get_peft_model(whole, E2VPTConfig(**CONFIG)).eval()(**inputs))
    model = get_peft_model(base, E2VPTConfig(**CONFIG)).eval()
    output = output_of(model(**inputs))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    output.square().sum().backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all(p.device.type == "cpu" and p.grad.abs().sum() > 0 for p in trained.values())


def test_the_classes_that_must_not_be_split_are_those_of_the_base_model() -> None:
    model, _ = build("vit")
    classes = model._no_split_modules
    assert classes and get_peft_model(model, E2VPTConfig(**CONFIG))._no_split_modules == classes


# --------------------------------------------------------------------------------------------------------- quantised
def quantised(tmp_path: Path, **settings: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    return transformers.ViTForImageClassification.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(**settings), device_map="cpu"
    )


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4 bit", "8 bit"])
def test_prompts_and_head_train_in_float32_on_a_quantised_backbone(settings: dict[str, Any], tmp_path: Path) -> None:
    base = quantised(tmp_path, **settings, llm_int8_skip_modules=["classifier"])
    model = get_peft_model(base, E2VPTConfig(**CONFIG))
    summary = model.prompt_summary()
    assert summary.num_backbone_values == sum(
        p.numel() for p in transformers.ViTModel(base.config, add_pooling_layer=False).parameters()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    losses = []
    model.train()
    for _ in range(5):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {p.dtype for p in trained} == {torch.float32}
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        quantised(tmp_path, **settings, llm_int8_skip_modules=["classifier"]), tmp_path / "adapter"
    )
    assert again.prompt_summary() == summary


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4 bit", "8 bit"])
def test_a_quantised_backbone_that_has_served_trains_on_or_says_that_it_cannot(settings, tmp_path: Path) -> None:
    base = quantised(tmp_path, **settings, llm_int8_skip_modules=["classifier"])
    model = get_peft_model(base, E2VPTConfig(**CONFIG)).eval()
    pixels = torch.randn(4, 3, 32, 32)
    served = model(pixel_values=pixels).logits  # without no_grad
    assert torch.equal(model(pixel_values=pixels).logits, served)
    model.train()
    if is_for_inference(base):  # on some CPUs in 4 bit
        with pytest.raises(RuntimeError, match="4-bit weights of bitsandbytes.*before it first runs in eval mode"):
            model(pixel_values=pixels)
        with pytest.raises(ValueError, match="no gradient passes through"):
            get_peft_model(model.unload(), E2VPTConfig(**CONFIG))
        return
    model(pixel_values=pixels).logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_quantised_head_is_refused_with_the_setting_that_leaves_it_out(tmp_path: Path) -> None:
    base = quantised(tmp_path, load_in_4bit=True)
    with pytest.raises(ValueError, match=r"'classifier' are quantised.*llm_int8_skip_modules=\['classifier'\]"):
        get_peft_model(base, E2VPTConfig(**CONFIG))
