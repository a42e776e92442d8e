# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Saved, loaded and the same bit by bit; what does not fit is an error that names the tensor."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_e2vpt import E2VPTConfig
from tests.support.adapted import (
    KV_ONLY,
    SHALLOW,
    adapt,
    config_of,
    gradients,
    layers_of,
    predict,
    prune,
    trainable,
    trained,
)
from tests.support.models import NAMES, VIT, build, draw_parameters


KINDS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": SHALLOW,
    "kv only": KV_ONLY,
    "no kv": {"num_kv_prompts": 0},
    "separate kv": {"share_kv_prompts": False, "kv_prompt_position": "after"},
    "kv across layers": {"share_kv_prompts_across_layers": True},
    "some layers": {"layers_to_transform": [0, 2]},
}
PRUNED: dict[str, dict[str, Any]] = {
    "removed": {},
    "zeroed": {"pruned_prompts": "zero"},
    "strided": {"segment_layout": "strided"},
    "shallow": SHALLOW,
}
kinds = pytest.mark.parametrize("kind", KINDS)
pruned = pytest.mark.parametrize("kind", PRUNED)


def other_base(name: str = "vit", **settings: Any) -> nn.Module:
    """The same backbone under another head, as when a user starts from the same checkpoint."""
    base, _ = build(name, **settings)
    for child, module in base.named_children():
        if "classifier" in child:
            draw_parameters(module, torch.Generator().manual_seed(99))
    return base


def file_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def load(folder: Path, base: nn.Module | None = None, **settings: Any) -> PeftModel:
    return PeftModel.from_pretrained(other_base() if base is None else base, folder, **settings).eval()


# ------------------------------------------------------------------------------------------------------------ the same
@pytest.mark.parametrize("adapter_name", ["default", "birds"])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_adapter_answers_as_the_saved_one(tmp_path, name, adapter_name):
    model, inputs = adapt(name, adapter_name)
    base = other_base(name)
    before = predict(base, inputs)
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    loaded = load(folder, base)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    assert torch.equal(predict(loaded.unload(), inputs), before)


@kinds
def test_every_kind_of_prompts_comes_back(tmp_path, kind):
    model, inputs = adapt(**KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, adapter_name="again")
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    theirs = {key.replace(".again", ""): value for key, value in loaded.state_dict().items()}
    ours = {key.replace(".default", ""): value for key, value in model.state_dict().items()}
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert theirs.keys() == ours.keys()
    # the head that an adapter leaves aside is that of the base model
    assert all("original_module" in key for key in different) and different


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", [*PRUNED, "unpruned"])
def test_an_adapter_loads_without_memory_for_its_initial_values(tmp_path, kind, low_cpu_mem_usage):
    model, inputs = adapt(**PRUNED.get(kind, {}))
    if kind in PRUNED:
        prune(model)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.is_meta for parameter in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_is_trained_only_on_request(tmp_path, is_trainable):
    model, inputs = adapt()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, is_trainable=is_trainable)
    assert [name for name, _ in trainable(loaded)] == ([name for name, _ in trainable(model)] if is_trainable else [])
    if is_trainable:
        expected, found = gradients(model, inputs), gradients(loaded, inputs)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_second_adapter_to_train_leaves_the_first_frozen(tmp_path):
    for name, settings in (("a", {}), ("b", {"num_visual_prompts": 5})):
        adapt(adapter_name=name, **settings)[0].save_pretrained(tmp_path)
    model = load(tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b", is_trainable=True)
    model.set_adapter("b")
    names = [name for name, _ in trainable(model)]
    assert len(names) == 8 and all(name.endswith(".b") or ".modules_to_save.b." in name for name in names)
    _, inputs = build("vit")
    assert torch.equal(predict(model, inputs), predict(load(tmp_path / "b", adapter_name="b"), inputs))


# ----------------------------------------------------------------------------------------------------- what is on disk
@kinds
def test_names_on_disk_number_the_attentions_and_do_not_depend_on_module_paths(tmp_path, kind):
    adapt(**KINDS[kind])[0].save_pretrained(tmp_path)
    inside = re.compile(
        r"base_model\.model\.(e2vpt\.[0-2]\.e2vpt_(visual_prompts|kv_prompts|token_gates|segment_gates)"
        r"|classifier\.(weight|bias))"
    )
    names = file_of(tmp_path).keys()
    assert names and all(inside.fullmatch(name) for name in names), names


def test_prompts_fit_a_model_with_other_module_paths(tmp_path):
    """`ViTModel` calls `layers.0.attention` what `ViTForImageClassification` calls `vit.layers.0.attention`."""
    backbone = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).eval()
    classifier, inputs = build("vit")
    backbone.load_state_dict(classifier.vit.state_dict())
    model = trained(get_peft_model(backbone, config_of())).eval()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, classifier)
    with torch.no_grad():
        features = loaded.get_base_model().vit(**inputs).last_hidden_state
    assert torch.equal(features, predict(model, inputs))


def test_an_adapter_on_disk_is_small_and_holds_nothing_of_the_base_model(tmp_path):
    model, _ = adapt()
    model.save_pretrained(tmp_path)
    values = sum(tensor.numel() for tensor in file_of(tmp_path).values())
    gates = 3 * (3 + 3 * 4)
    assert values == sum(parameter.numel() for _, parameter in trainable(model)) + gates
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_head_that_was_found_is_written_into_the_config(tmp_path):
    adapt("deit_with_teacher")[0].save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "adapter_config.json").read_text())
    assert on_disk["modules_to_save"] == ["cls_classifier", "distillation_classifier"]
    assert on_disk["peft_type"] == "E2VPT"


def test_key_value_prompts_shared_across_layers_are_stored_once_and_shared_after_loading(tmp_path):
    model, _ = adapt(share_kv_prompts_across_layers=True)
    model.save_pretrained(tmp_path)
    assert [name for name in file_of(tmp_path) if "kv_prompts" in name] == [
        "base_model.model.e2vpt.0.e2vpt_kv_prompts"
    ]
    layers = layers_of(load(tmp_path))
    assert len({id(layer.kv_prompts("default")) for layer in layers}) == 1
    assert torch.equal(layers[2].kv_prompts("default"), layers_of(model)[0].kv_prompts("default"))


# -------------------------------------------------------------------------------------------------------------- pruned
@pruned
def test_a_pruned_adapter_stores_its_surviving_values_only(tmp_path, kind):
    model, inputs = adapt(num_visual_prompts=64, **PRUNED[kind])
    model.save_pretrained(tmp_path / "whole")
    prune(model)
    model.save_pretrained(tmp_path / "pruned")
    sizes = [(tmp_path / which / "adapter_model.safetensors").stat().st_size for which in ("whole", "pruned")]
    alive = lost = 0
    for layer in layers_of(model):
        if "default" in layer.e2vpt_visual_prompts:
            stored = file_of(tmp_path / "pruned")[f"base_model.model.e2vpt.{layer.index}.e2vpt_visual_prompts"]
            assert stored.shape == (int(layer.kept("default").sum()),)
            alive, lost = alive + stored.numel(), lost + int((~layer.kept("default")).sum())
    assert lost > 64 * 32 - 1 and abs(sizes[0] - sizes[1] - 4 * lost) < 100
    loaded = load(tmp_path / "pruned")
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))
    for ours, theirs in zip(layers_of(model), layers_of(loaded), strict=True):
        for key, value in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[key], value), key


@pruned
@pytest.mark.parametrize("first, second", [("pruned", "whole"), ("whole", "pruned")])
def test_a_checkpoint_loads_into_a_live_adapter_in_another_state_of_pruning(tmp_path, kind, first, second):
    """What `load_best_model_at_end` does when the best checkpoint lies on the other side of the pruning."""
    answers = {}
    for which in ("whole", "pruned"):
        model, inputs = adapt(**PRUNED[kind])
        if which == "pruned":
            prune(model)
        model.save_pretrained(tmp_path / which)
        answers[which] = predict(model, inputs)
    live = load(tmp_path / first, is_trainable=True)
    parameters = {name: id(parameter) for name, parameter in trainable(live)}
    live.load_adapter(tmp_path / second, adapter_name="default", is_trainable=True)
    live.eval()
    assert torch.equal(predict(live, inputs), answers[second])
    assert {name: id(parameter) for name, parameter in trainable(live)} == parameters
    hooks = [len(module._forward_pre_hooks) for module in live.modules()]
    live.load_adapter(tmp_path / second, adapter_name="default", is_trainable=True)
    assert [len(module._forward_pre_hooks) for module in live.modules()] == hooks
    assert not torch.allclose(answers["whole"], answers["pruned"], atol=1e-3)


def test_a_plain_state_dict_carries_the_pruning_too():
    """What a loop of one's own, `accelerator.save_state` or an optimizer checkpoint does."""
    model, inputs = adapt()
    prune(model)
    other, _ = adapt()
    other.load_state_dict(model.state_dict())
    assert torch.equal(predict(other, inputs), predict(model, inputs))


# ----------------------------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_in_float32_loads_onto_a_half_precision_base(tmp_path, dtype, low_cpu_mem_usage):
    model, inputs = adapt(dtype=dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in file_of(tmp_path).values()} == {torch.float32}
    loaded = load(tmp_path, other_base(dtype=dtype), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


@pytest.mark.parametrize("autocast, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_whether_the_adapter_is_cast_up_is_followed_wherever_it_comes_from(tmp_path, autocast, dtype):
    base, inputs = build("vit", dtype=torch.bfloat16)
    model = get_peft_model(base, config_of(), autocast_adapter_dtype=autocast)
    model.add_adapter("added", config_of(), autocast_adapter_dtype=autocast)
    adapt()[0].save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=autocast)
    dtypes = {n: p.dtype for n, p in model.named_parameters() if "e2vpt_" in n or ".modules_to_save." in n}
    assert len(dtypes) == 3 * 8 and set(dtypes.values()) == {dtype}
    for name in ("default", "added", "loaded"):
        model.set_adapter(name)
        assert predict(model.eval(), inputs).isfinite().all()


# --------------------------------------------------------------------------------------------------- what does not fit
def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = file_of(folder)
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


PROMPTS = "base_model.model.e2vpt.1.e2vpt_visual_prompts"
KV = "base_model.model.e2vpt.2.e2vpt_kv_prompts"
VK = KV.replace("kv_", "vk_")
GATES = "base_model.model.e2vpt.0.e2vpt_token_gates"
HEAD = "base_model.model.classifier.weight"
DAMAGES = {
    "missing prompts": (lambda t: t.pop(PROMPTS), [PROMPTS, "missing"]),
    "missing gates": (lambda t: t.pop(GATES), [GATES, "missing"]),
    "misspelt": (
        lambda t: t.update({KV.replace("kv_", "vk_"): t.pop(KV)}),
        [KV, "misspelt", KV.replace("kv_", "vk_")],
    ),
    "one more": (lambda t: t.update({KV.replace(".2.", ".7."): t[KV].clone()}), [KV.replace(".2.", ".7."), "unknown"]),
    "other shape": (lambda t: t.update({KV: t[KV][:, :, :1].clone()}), [KV, r"(1, 4, 1, 8)", r"(1, 4, 2, 8)"]),
    "wider prompts": (lambda t: t.update({PROMPTS: torch.zeros(3, 48)}), [PROMPTS, "(3, 48)", "(3, 32)"]),
    "too few values": (lambda t: t.update({PROMPTS: torch.zeros(7)}), [PROMPTS, "7 values", "96"]),
    "head missing": (lambda t: t.pop(HEAD), [HEAD]),
    "head misspelt": (lambda t: t.update({HEAD.replace("fier", "feir"): t.pop(HEAD)}), [HEAD]),
    "head of other width": (lambda t: t.update({HEAD: torch.zeros(5, 48)}), [HEAD, "(5, 48)", "(5, 32)"]),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_an_error_that_names_the_tensor(tmp_path, damage, low_cpu_mem_usage):
    edit, words = DAMAGES[damage]
    adapt()[0].save_pretrained(tmp_path)
    change(tmp_path, edit)
    with pytest.raises((ValueError, KeyError)) as error:
        load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    message = str(error.value).replace(".default", "")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_a_base_model_with_another_number_of_classes_is_told_the_right_number(tmp_path, ignore_mismatched_sizes):
    adapt()[0].save_pretrained(tmp_path)
    base = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=7))
    with pytest.raises(ValueError, match=rf"{HEAD} has shape \(5, 32\).*\(7, 32\).*num_labels=5"):
        load(tmp_path, base, ignore_mismatched_sizes=ignore_mismatched_sizes)


def test_a_base_model_of_another_width_is_told_apart_from_one_with_other_classes(tmp_path):
    adapt()[0].save_pretrained(tmp_path)
    base = transformers.ViTForImageClassification(transformers.ViTConfig(**{**VIT, "hidden_size": 64}, num_labels=5))
    with pytest.raises(ValueError, match=r"\(5, 32\).*\(5, 64\): load it on the backbone it was trained on"):
        load(tmp_path, base)


def test_a_shorter_backbone_is_refused(tmp_path):
    adapt()[0].save_pretrained(tmp_path)
    config = transformers.ViTConfig(**{**VIT, "num_hidden_layers": 2}, num_labels=5)
    with pytest.raises(ValueError, match=r"unknown base_model\.model\.e2vpt\.2\.e2vpt_kv_prompts"):
        load(tmp_path, transformers.ViTForImageClassification(config))


def test_a_failed_load_into_a_live_adapter_leaves_it_as_it_was(tmp_path):
    model, inputs = adapt()
    expected = predict(model, inputs)
    adapt(num_kv_prompts=3)[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="e2vpt_kv_prompts"):
        model.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(predict(model, inputs), expected)


def test_a_key_that_this_version_does_not_know_is_left_out_with_a_warning(tmp_path):
    model, inputs = adapt()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompt_shape": "round"}))
    with pytest.warns(UserWarning, match="prompt_shape"):
        loaded = load(tmp_path)
    assert torch.equal(predict(loaded, inputs), predict(model, inputs))


# ------------------------------------------------------------------------------------- the other doors of Hugging Face
def by_auto_peft(base: Path, adapter: Path) -> nn.Module:
    return AutoPeftModel.from_pretrained(adapter)


def by_transformers_load_adapter(base: Path, adapter: Path) -> nn.Module:
    model = transformers.AutoModelForImageClassification.from_pretrained(base)
    model.load_adapter(str(adapter))
    return model


def by_transformers_auto_model(base: Path, adapter: Path) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_pretrained(adapter)


DOORS = (by_auto_peft, by_transformers_load_adapter, by_transformers_auto_model)


def saved_base_and_adapter(folder: Path, name: str, **settings: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    base, inputs = build(name)
    base.save_pretrained(folder / "base")
    base = transformers.AutoModelForImageClassification.from_pretrained(folder / "base")
    model = trained(get_peft_model(base, config_of(**settings))).eval()
    return model, inputs


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["vit", "dinov2", "beit_shared_bias", "siglip", "swin"])
def test_an_adapter_enters_by_every_door(tmp_path, name, door):
    model, inputs = saved_base_and_adapter(tmp_path, name)
    model.save_pretrained(tmp_path / "adapter")
    entered = door(tmp_path / "base", tmp_path / "adapter").eval()
    assert torch.equal(predict(entered, inputs), predict(model, inputs))


@pytest.mark.parametrize("door", DOORS)
def test_a_pruned_adapter_enters_whole_or_not_at_all(tmp_path, door):
    model, inputs = saved_base_and_adapter(tmp_path, "vit")
    prune(model)
    model.save_pretrained(tmp_path / "adapter")
    if door is by_auto_peft:
        assert torch.equal(predict(door(tmp_path / "base", tmp_path / "adapter"), inputs), predict(model, inputs))
    else:  # transformers puts tensors into place by itself, without asking the method
        with pytest.raises(ValueError, match=r"use peft_e2vpt\.load"):
            door(tmp_path / "base", tmp_path / "adapter")


def test_loading_says_nothing_when_all_is_well(tmp_path):
    adapt()[0].save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(tmp_path)


def test_a_saved_adapter_can_be_continued_with_the_config_that_lies_beside_it(tmp_path):
    model, inputs = adapt(visual_prompt_dropout=0.25, seed=11)
    model.save_pretrained(tmp_path)
    config = E2VPTConfig.from_pretrained(tmp_path)
    assert (config.visual_prompt_dropout, config.seed, config.inference_mode) == (0.25, 11, True)
    config.inference_mode = False
    fresh = trained(get_peft_model(other_base(), config)).eval()
    prompts = [parameter for name, parameter in trainable(fresh) if "e2vpt_" in name]
    expected = [parameter for name, parameter in trainable(model) if "e2vpt_" in name]
    assert all(torch.equal(a, b) for a, b in zip(prompts, expected, strict=True))
