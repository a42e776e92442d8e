# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Frozen means frozen: statistics stay, hooks see image tokens, and the base model comes back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from torch import nn

from tests.support import zoo
from tests.support import zoo_checks as checks
from tests.support.adapted import adapt, config_of, gradients, layers_of, predict
from tests.support.models import build
from tests.support.zoo_marks import marks_of


def skip_if_missing(name: str) -> None:
    reason = checks.missing(name)
    if reason:
        pytest.skip(f"not in this environment: {reason}")


def with_statistics(name: str) -> bool:
    return any(buffer.is_floating_point() for buffer in zoo.build(name)[0].buffers())


TRANSFORMERS = [name for name in zoo.names(attention=True) if not zoo.is_timm(name)]


# -------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in TRANSFORMERS])
def test_no_buffer_of_the_backbone_moves_while_prompts_train(name: str) -> None:
    skip_if_missing(name)
    model, inputs = checks.adapt(name, modules_to_save=None)
    model.train()
    model.get_base_model().train()
    before = {key: value.clone() for key, value in model.named_buffers() if ".modules_to_save." not in key}
    for tensor in checks.tensors_in(model(**inputs)):
        if tensor.requires_grad:
            tensor.float().square().sum().backward()
            break
    after = dict(model.named_buffers())
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []


def test_the_batch_norms_of_a_trained_head_and_the_modes_of_others_stay_as_they_were() -> None:
    model, inputs = checks.adapt("levit", modules_to_save=None)
    model.train()
    heads = [buffer for key, buffer in model.named_buffers() if ".modules_to_save." in key and "running_mean" in key]
    before = [buffer.clone() for buffer in heads]
    checks.run(model, inputs)
    assert heads and not any(torch.equal(*pair) for pair in zip(heads, before, strict=True))
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    base = model.unload()
    assert all(module.training for module in base.modules())
    assert all(not module.training for module in base.eval().modules())


# ------------------------------------------------------------------------------------------------------------- hooks
@pytest.mark.parametrize("name", ["vit", "swin", "dinov3", "siglip"])
def test_hooks_on_norms_and_projections_see_image_tokens_only(name: str) -> None:
    base, inputs = build(name)
    counts: list[list[str]] = []
    for model in (base, get_peft_model(base, config_of()).eval()):
        seen: list[str] = []
        handles = []
        for path, module in build(name)[0].named_modules():
            if not isinstance(module, (nn.Linear, nn.LayerNorm)) or "classifier" in path:
                continue

            def note(module: nn.Module, args: Any, output: Any, path: str = path, seen: list[str] = seen) -> None:
                seen.append(f"{path} {args[0].shape}")

            handles.append(base.get_submodule(path).register_forward_hook(note))
        predict(model, inputs)
        for handle in handles:
            handle.remove()
        counts.append(seen)
    assert counts[0] and counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------ the base comes back
@pytest.mark.parametrize("removed", ["before unloading", "after unloading", "never"])
@pytest.mark.parametrize("name", ["hiera", "swinv2", "sam_vision", "vit", "levit"])
def test_the_base_model_comes_back_from_under_a_hook_of_accelerate(name: str, removed: str) -> None:
    model, inputs = checks.build(name)
    base = checks.run(model, inputs)
    adapted = get_peft_model(model, checks.config()).eval()
    attentions = [layer.site.attention for layer in layers_of(adapted)]
    for attention in attentions:
        add_hook_to_module(attention, ModelHook())
    assert not torch.equal(checks.run(adapted, inputs), base)
    with adapted.disable_adapter():
        assert torch.equal(checks.run(adapted, inputs), base)
    if removed == "before unloading":
        for attention in attentions:
            remove_hook_from_module(attention)
    model = adapted.unload()
    if removed == "after unloading":
        for attention in attentions:
            remove_hook_from_module(attention)
    assert torch.equal(checks.run(model, inputs), base)


# ------------------------------------------------------------------------------------------------------- checkpoints
def checkpoint(model: nn.Module, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


ORDERS = ["before", "after", "before, with gradients of inputs", "after, with gradients of inputs"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["vit", "swin", "segformer", "beit"])
def test_checkpoints_leave_gradients_equal_in_every_order(name: str, order: str, reentrant: bool) -> None:
    model, inputs = checks.adapt(name)
    expected = checks.gradients(model.train(), inputs)
    base, inputs = checks.build(name)
    if order.startswith("before"):
        checkpoint(base, reentrant)
    adapted = get_peft_model(base, checks.config())
    if order.startswith("after"):
        checkpoint(base, reentrant)
    if "inputs" in order:
        base.enable_input_require_grads()
    found = checks.gradients(adapted.train(), inputs)
    assert expected.keys() == found.keys()
    assert max(checks.apart(found[key], expected[key]) for key in expected) < 1e-4
    plain = checks.run(checks.build(name)[0].eval(), inputs)
    assert torch.equal(checks.run(adapted.unload().eval(), inputs), plain)


def test_a_gradient_reaches_every_prompt_of_a_model_with_tuples_in_its_embeddings() -> None:
    model, inputs = adapt("swin")
    model.get_base_model().enable_input_require_grads()
    found: dict[str, Any] = gradients(model.train(), inputs)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())
