# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The life of an adapter in memory: what it finds, what it refuses, switching, and giving the base model back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_e2vpt import E2VPTConfig
from tests.support.adapted import (
    CHECKPOINTING,
    KV_ONLY,
    SHALLOW,
    adapt,
    checkpoint_activations,
    config_of,
    gradients,
    layers_of,
    predict,
    trainable,
    trained,
)
from tests.support.models import NAMES, TEXT, VIT, build, draw_parameters


HEADS: dict[str, list[str]] = {
    **dict.fromkeys(NAMES, ["classifier"]),
    "deit_with_teacher": ["cls_classifier", "distillation_classifier"],
    "dinov3": [],
    "clip_vision": [],
}
ATTENTIONS = {
    "vit": "vit.layers.{}.attention",
    "dinov2": "dinov2.encoder.layer.{}.attention",
    "dinov3": "model.layer.{}.attention",
    "clip": "vision_model.encoder.layers.{}.self_attn",
    "siglip2": "vision_model.encoder.layers.{}.self_attn",
}
SWIN_ATTENTIONS = [f"swin.encoder.layers.{stage}.blocks.{block}.attention" for stage in (0, 1) for block in (0, 1)]
TOWERS = {
    "CLIPModel": {"vision_config": {**VIT, "projection_dim": 16}, "text_config": TEXT, "projection_dim": 16},
    "SiglipModel": {"vision_config": VIT, "text_config": TEXT},
}


def two_towers(name: str, attn_implementation: str = "sdpa") -> tuple[Any, dict[str, Tensor]]:
    config = getattr(transformers, name.replace("Model", "Config"))(
        **TOWERS[name], attn_implementation=attn_implementation
    )
    model = getattr(transformers, name)(config)
    generator = torch.Generator().manual_seed(0)
    draw_parameters(model.text_model, generator)
    draw_parameters(model.vision_model, generator)
    inputs = {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(3, 48, (2, 7), generator=generator),
    }
    return model.eval(), inputs


@torch.no_grad()
def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    output = model(**inputs)
    return {"image": output.image_embeds, "text": output.text_embeds}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model, outside of its values, that an adapter could change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "configs": {
            name: id(vars(module)["config"]) for name, module in model.named_modules() if "config" in vars(module)
        },
        "hooks": {name: [len(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()},
        "parameters": [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
    }


# ------------------------------------------------------------------------------------------------------- what it finds
@pytest.mark.parametrize("name", NAMES)
def test_attentions_and_head_are_found_and_nothing_else_is_trained(name):
    base, _ = build(name)
    num_values = sum(parameter.numel() for parameter in base.parameters())
    model = get_peft_model(base, E2VPTConfig(num_segments=4))

    assert model.peft_config["default"].modules_to_save == HEADS[name]
    names = [layer.site.name for layer in layers_of(model)]
    if name in ATTENTIONS:
        assert names == [ATTENTIONS[name].format(layer) for layer in range(3)]
    elif name == "swin":
        assert names == SWIN_ATTENTIONS
    assert len(names) == (4 if name == "swin" else 3)

    prompts = {
        f"e2vpt.{index}.e2vpt_{kind}_prompts.default" for index in range(len(names)) for kind in ("visual", "kv")
    }
    heads = {f"{h}.modules_to_save.default.{w}" for h in HEADS[name] for w in ("weight", "bias")}
    assert {key.removeprefix("base_model.model.") for key, _ in trainable(model)} == prompts | heads
    backbone = [p for key, p in model.named_parameters() if "e2vpt" not in key and ".modules_to_save." not in key]
    assert sum(parameter.numel() for parameter in backbone) == num_values


@pytest.mark.parametrize(
    "choice, layers",
    [
        ({"target_modules": ["layers.0.attention", "layers.2.attention"]}, [0, 2]),
        ({"target_modules": ["attention"]}, [0, 1, 2]),
        ({"target_modules": r".*\.[12]\.attention"}, [1, 2]),
        ({"exclude_modules": ["layers.1.attention"]}, [0, 2]),
        ({"exclude_modules": r".*\.0\..*"}, [1, 2]),
        ({"target_modules": r".*[01]\.attention", "exclude_modules": ["layers.0.attention"]}, [1]),
        ({"layers_to_transform": [2, 0, 2]}, [0, 2]),
        ({"layers_to_transform": 1}, [1]),
        ({"exclude_modules": ["layers.0.attention"], "layers_to_transform": [0]}, [1]),
    ],
    ids=str,
)
def test_the_layers_to_adapt_can_be_named(choice, layers):
    model, inputs = adapt(**choice)
    assert [layer.index for layer in layers_of(model)] == layers
    assert [layer.site.name for layer in layers_of(model)] == [f"vit.layers.{layer}.attention" for layer in layers]
    # only these layers have a part in the answer: those before them give what the base model gives
    base, _ = build("vit")
    ours = model(**inputs, output_hidden_states=True).hidden_states
    plain = base(**inputs, output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(ours, plain, strict=True)] == [i <= layers[0] for i in range(4)]


@pytest.mark.parametrize("name", TOWERS)
def test_of_two_towers_the_vision_tower_is_adapted(name):
    base, inputs = two_towers(name)
    plain = embeddings(base, inputs)
    model = trained(get_peft_model(base, config_of())).eval()
    assert model.peft_config["default"].modules_to_save == []
    assert [layer.site.name for layer in layers_of(model)] == [
        f"vision_model.encoder.layers.{layer}.self_attn" for layer in range(3)
    ]
    adapted = embeddings(model, inputs)
    torch.testing.assert_close(adapted["text"], plain["text"])
    assert not torch.allclose(adapted["image"], plain["image"], atol=1e-3)


@pytest.mark.parametrize("name", TOWERS)
def test_the_text_tower_is_adapted_when_it_is_named(name):
    base, inputs = two_towers(name)
    plain = embeddings(base, inputs)
    model = trained(get_peft_model(base, config_of(target_modules=r"text_model\..*self_attn"))).eval()
    adapted = embeddings(model, inputs)
    torch.testing.assert_close(adapted["image"], plain["image"])
    assert not torch.allclose(adapted["text"], plain["text"], atol=1e-3)
    with pytest.raises(ValueError, match=f"shallow.*{name}"):
        get_peft_model(two_towers(name)[0], config_of(target_modules=r"text_model\..*self_attn", **SHALLOW))


@pytest.mark.parametrize("name", TOWERS)
def test_both_towers_can_be_adapted_and_share_key_value_prompts(name):
    base, inputs = two_towers(name)
    plain = embeddings(base, inputs)
    config = config_of(target_modules=["self_attn"], share_kv_prompts_across_layers=True)
    model = trained(get_peft_model(base, config)).eval()
    names = [f"{tower}.encoder.layers.{n}.self_attn" for tower in ("vision_model", "text_model") for n in range(3)]
    assert [layer.site.name for layer in layers_of(model)] == names
    assert len({id(layer.kv_prompts("default")) for layer in layers_of(model)}) == 1
    adapted = embeddings(model, inputs)
    assert all((adapted[tower] - plain[tower]).abs().max() > 1e-3 for tower in plain)


@pytest.mark.parametrize("position", ["before", "after"])
def test_rows_leave_a_causal_text_tower_causal(position):
    """The embedding of a token does not depend on later tokens, whatever the implementation."""
    outputs = []
    for implementation in ("sdpa", "eager"):
        base, inputs = two_towers("CLIPModel", implementation)
        model = get_peft_model(base, config_of(target_modules=r"text_model\..*", kv_prompt_position=position))
        tokens = inputs["input_ids"]
        model = trained(model).eval()
        text = model.get_base_model().text_model
        whole = text(tokens).last_hidden_state
        torch.testing.assert_close(text(tokens[:, :4]).last_hidden_state, whole[:, :4])
        outputs.append(whole)
    torch.testing.assert_close(*outputs)


# ----------------------------------------------------------------------------------------------------- what it refuses
MISTAKES = [
    ("vit", {"modules_to_save": ["cls_token"]}, "cls_token.*single parameter"),
    ("vit", {"modules_to_save": ["clasifier"]}, "clasifier.*Its parts are vit, classifier"),
    ("vit", {"modules_to_save": ["classifier", "layers.1"]}, "layers.1.*self-attention"),
    ("vit", {"target_modules": ["self_attn"]}, "self_attn.*matches none.*vit.layers.0.attention"),
    ("vit", {"target_modules": r".*\.q_proj"}, "q_proj.*matches none"),
    ("vit", {"exclude_modules": ["self_attn"]}, "self_attn.*leaves out none"),
    ("vit", {"exclude_modules": ".*"}, "leaves out all of the 3"),
    ("vit", {"layers_to_transform": [0, 3]}, r"layers_to_transform names \[3\].*0 to 2"),
    ("vit", {"num_segments": 7}, r"32.*vit.layers.0.attention.*num_segments=7.*1, 2, 4, 8, 16, 32"),
    ("swin", {"num_segments": 32}, r"16.*swin.encoder.layers.0.blocks.0.attention.*num_segments=32"),
    ("swin", SHALLOW, "SwinForImageClassification.*SwinAttention.*deep"),
    ("beit_relative_bias", SHALLOW, "BeitForImageClassification.*BeitAttention.*deep"),
    ("siglip2", SHALLOW, "Siglip2ForImageClassification.*Siglip2Attention.*deep"),
    ("swin", {"share_kv_prompts_across_layers": True}, "share_kv_prompts_across_layers.*2 heads.*4"),
]


@pytest.mark.parametrize("name, choice, message", MISTAKES, ids=str)
def test_what_cannot_be_is_refused_and_leaves_the_base_model_as_it_was(name, choice, message):
    base, inputs = build(name)
    before, logits = state_of(base), predict(base, inputs)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config_of(**choice))
    assert state_of(base) == before
    assert torch.equal(predict(base, inputs), logits)


@pytest.mark.parametrize("choice", [{"num_segments": 7}, {"target_modules": ["query"]}, {"modules_to_save": ["hed"]}])
def test_a_second_adapter_that_cannot_be_leaves_the_first_as_it_was(choice):
    model, inputs = adapt()
    before, logits = state_of(model), predict(model, inputs)
    with pytest.raises(ValueError):
        model.add_adapter("second", config_of(**choice))
    assert list(model.peft_config) == ["default"]
    assert state_of(model) == before
    assert torch.equal(predict(model, inputs), logits)


def test_a_model_without_self_attention_is_refused_with_the_names_that_are_known():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    with pytest.raises(
        ValueError, match="ResNetForImageClassification has no self-attention.*It knows ViTAttention, .*BACKBONES"
    ):
        get_peft_model(transformers.ResNetForImageClassification(config), E2VPTConfig())


def test_an_adapter_that_does_not_exist_is_not_counted():
    model, _ = adapt()
    with pytest.raises(ValueError, match="Adapter other does not exist; the model has default"):
        model.prompt_summary("other")


def test_copies_for_data_parallel_threads_are_refused():
    model, _ = adapt()
    with pytest.raises(RuntimeError, match="does not work in torch.nn.DataParallel.*torchrun"):
        for module in model.modules():  # as torch.nn.parallel.replicate
            module._replicate_for_data_parallel()


def test_an_attention_that_is_not_known_is_named():
    config = transformers.SwiftFormerConfig(embed_dims=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="has no self-attention that E2VPT knows .found .*EfficientAdditiveAttention"):
        get_peft_model(transformers.SwiftFormerForImageClassification(config), E2VPTConfig())


def test_a_backbone_that_reads_inner_layers_is_refused_in_shallow_mode():
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(**{**VIT, "out_indices": [1, 2]}))
    with pytest.raises(ValueError, match="Dinov2Backbone"):
        get_peft_model(backbone, config_of(**SHALLOW))


def test_adapting_an_adapted_model_is_refused_and_leaves_it_as_it_was():
    model, inputs = adapt()
    config, before, logits = model.peft_config["default"], state_of(model), predict(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns, and goes on
        with pytest.raises(ValueError, match="PeftModel already.*add_adapter"):
            get_peft_model(model, config_of())
    assert model.peft_config["default"] is config
    assert state_of(model) == before
    assert torch.equal(predict(model, inputs), logits)


def test_merging_into_plain_weights_is_refused_with_the_ways_out():
    model, inputs = adapt()
    before, logits = state_of(model), predict(model, inputs)
    with pytest.raises(NotImplementedError, match=r"cannot be merged.*merge_adapter\(\).*unload\(\)"):
        model.merge_and_unload()
    assert state_of(model) == before and torch.equal(predict(model, inputs), logits)


# ----------------------------------------------------------------------------------------------------------- switching
KINDS: dict[str, dict[str, Any]] = {"deep": {}, "shallow": SHALLOW, "kv only": KV_ONLY}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(
    "name, choice", [*[(name, {}) for name in NAMES], ("vit", SHALLOW), ("swin", KV_ONLY)], ids=str
)
def test_a_disabled_adapter_gives_the_base_model_bit_by_bit(name, choice):
    base, inputs = build(name)
    expected = predict(base, inputs)
    model, _ = adapt(name, **choice)
    adapted = predict(model, inputs)
    with model.disable_adapter():
        assert torch.equal(predict(model, inputs), expected)
        assert not trainable(model)
    assert torch.equal(predict(model, inputs), adapted)
    assert not torch.allclose(adapted, expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the teacher, rightly
@pytest.mark.parametrize("checkpoints", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@kinds
def test_a_disabled_forward_between_forward_and_backward_changes_no_gradient(kind, checkpoints):
    """Distillation: student, teacher (the adapter switched off), one loss, backward outside of the context."""
    model, inputs = adapt(**KINDS[kind])
    model.train()
    if checkpoints is not None:
        checkpoint_activations(model, checkpoints)
    with model.disable_adapter():
        teacher = predict(model, inputs)

    def distill(*, inside: bool) -> dict[str, Tensor]:
        model.zero_grad()
        target, student = teacher, model(**inputs).logits
        if inside:
            with model.disable_adapter():
                target = model(**inputs).logits
        (student - target).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in trainable(model)}

    expected, found = distill(inside=False), distill(inside=True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        assert torch.equal(found[name], gradient), name


def test_pixels_get_the_gradient_of_the_base_model_from_a_disabled_forward():
    def of(model, **context):
        pixels = inputs["pixel_values"].clone().requires_grad_()
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                loss = model(pixel_values=pixels).logits.square().sum()
        else:
            loss = model(pixel_values=pixels).logits.square().sum()
        return torch.autograd.grad(loss, pixels)[0]  # outside of the context

    base, inputs = build("vit")
    expected = of(base)
    assert torch.equal(of(adapt("vit")[0]), expected)


SECOND = {
    "deep": {"num_visual_prompts": 5, "num_kv_prompts": 1, "kv_prompt_position": "after"},
    "shallow": {**SHALLOW, "num_visual_prompts": 4},
    "kv only": {**KV_ONLY, "num_kv_prompts": 4, "share_kv_prompts": False},
}
pairs = pytest.mark.parametrize("first, second", [(a, b) for a in KINDS for b in SECOND])


def adapter_of(key: str) -> str:
    """The name of the adapter that owns a parameter or buffer."""
    return key.split(".modules_to_save.")[1].split(".")[0] if ".modules_to_save." in key else key.split(".")[-1]


def two_adapters(first: str, second: str) -> tuple[PeftModel, dict[str, Tensor]]:
    model, inputs = adapt(adapter_name="a", **KINDS[first])
    before = [name for name, _ in trainable(model)]
    model.add_adapter("b", config_of(**SECOND[second]))
    assert [name for name, _ in trainable(model)] == before
    model.set_adapter("b")
    trained(model)
    model.set_adapter("a")
    return model, inputs


@pairs
def test_each_of_two_adapters_answers_as_if_it_were_alone(first, second):
    model, inputs = two_adapters(first, second)
    alone_a = predict(adapt(adapter_name="a", **KINDS[first])[0], inputs)
    base, _ = build("vit")
    alone = get_peft_model(base, config_of(**SECOND[second]), "b")
    alone.load_state_dict(
        {key: value for key, value in model.state_dict().items() if adapter_of(key) == "b"}, strict=False
    )
    alone_b = predict(alone.eval(), inputs)
    for name, expected in (("a", alone_a), ("b", alone_b), ("a", alone_a)):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert {adapter_of(key) for key, _ in trainable(model)} == {name}
        assert torch.equal(predict(model, inputs), expected)


@pairs
def test_deleting_one_of_two_adapters_leaves_the_other(first, second):
    model, inputs = two_adapters(first, second)
    answers = {}
    for name in ("b", "a"):
        model.set_adapter(name)
        answers[name] = predict(model, inputs)
    model.delete_adapter("b")
    assert torch.equal(predict(model, inputs), answers["a"])
    assert list(model.peft_config) == ["a"] and "b" not in map(adapter_of, model.state_dict())

    model, _ = two_adapters(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says which adapter is active now
        model.delete_adapter("a")  # the active one
    assert model.active_adapters == ["b"]
    assert torch.equal(predict(model, inputs), answers["b"])


def test_adapters_of_different_layers_do_not_meet():
    model, inputs = adapt(adapter_name="a", layers_to_transform=[0])
    alone = predict(model, inputs)
    before = [name for name, _ in trainable(model)]
    model.add_adapter("b", config_of(layers_to_transform=[1, 2]))
    assert [name for name, _ in trainable(model)] == before
    assert torch.equal(predict(model, inputs), alone)
    model.set_adapter("b")
    with_b = predict(model, inputs)
    assert not torch.allclose(with_b, alone, atol=1e-3)
    model.delete_adapter("a")
    assert torch.equal(predict(model, inputs), with_b)


# ------------------------------------------------------------------------------------------ giving the base model back
def partly_frozen(name: str) -> tuple[Any, dict[str, Tensor]]:
    base, inputs = build(name)
    for index, parameter in enumerate(base.parameters()):
        parameter.requires_grad = index % 3 != 0
    return base, inputs


def unload(model: PeftModel) -> nn.Module:
    return model.unload()


def delete_the_last(model: PeftModel) -> nn.Module:
    model.delete_adapter("default")
    return model.base_model.model


@pytest.mark.parametrize("give_back", [unload, delete_the_last])
@pytest.mark.parametrize("name, choice", [*[(name, {}) for name in NAMES], ("vit", SHALLOW), ("dinov3", KV_ONLY)])
def test_the_base_model_comes_back_exactly(name, choice, give_back):
    base, inputs = partly_frozen(name)
    before, logits = state_of(base), predict(base, inputs)
    values = {key: value.clone() for key, value in base.state_dict().items()}
    model = trained(get_peft_model(base, config_of(**choice)))
    gradients(model.train(), inputs)
    back = give_back(model)
    assert back is base
    assert state_of(back) == before
    assert all(torch.equal(value, values[key]) for key, value in back.state_dict().items())
    assert torch.equal(predict(back.eval(), inputs), logits)


def test_two_adapters_and_gradient_checkpointing_leave_nothing_behind():
    base, inputs = partly_frozen("vit")
    before, logits = state_of(base), predict(base, inputs)
    model = get_peft_model(base, config_of(**SHALLOW))
    model.add_adapter("b", config_of())
    checkpoint_activations(model)
    gradients(model.train(), inputs)
    back = model.unload()
    getattr(back, f"{CHECKPOINTING}_disable")()
    after = state_of(back)
    assert {key: after[key] for key in after if key != "attributes"} == {
        key: before[key] for key in before if key != "attributes"
    }
    assert torch.equal(predict(back.eval(), inputs), logits)


@kinds
def test_adapting_again_after_unload_is_like_the_first_time(kind):
    model, inputs = adapt(**{**KINDS[kind], "num_kv_prompts": 4})
    base = model.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = trained(get_peft_model(base, config_of(**KINDS[kind]))).eval()
    assert torch.equal(predict(again, inputs), predict(adapt(**KINDS[kind])[0], inputs))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("first", [*KINDS.values(), {"layers_to_transform": [1]}], ids=str)
@kinds
def test_adapting_a_base_model_again_without_unload_starts_afresh(first, kind):
    """Running a notebook cell twice: PEFT warns; nothing of the first adapter may stay."""
    base, inputs = build("vit")
    trained(get_peft_model(base, config_of(**first)))
    with pytest.warns(UserWarning, match="for a second time"):
        again = get_peft_model(base, config_of(**KINDS[kind])).eval()
    assert again.peft_config["default"].modules_to_save == ["classifier"]
    fresh = get_peft_model(build("vit")[0], config_of(**KINDS[kind])).eval()
    assert torch.equal(predict(again, inputs), predict(fresh, inputs))
    assert {name for name, _ in trainable(again)} == {name for name, _ in trainable(fresh)}


def test_an_adapter_can_be_added_after_the_last_one_was_deleted():
    model, inputs = adapt(seed=0)
    model.delete_adapter("default")
    model.add_adapter("again", config_of(seed=5))
    model.set_adapter("again")
    fresh = get_peft_model(build("vit")[0], config_of(seed=5)).eval()
    assert torch.equal(predict(model, inputs), predict(fresh, inputs))
    assert len(trainable(model)) == len(trainable(fresh))


def test_the_task_type_of_text_models_changes_nothing():
    expected = predict(adapt(seed=0)[0], build("vit")[1])
    for task_type in ("SEQ_CLS", "FEATURE_EXTRACTION"):
        model, inputs = adapt(task_type=task_type)
        assert torch.equal(predict(model, inputs), expected)
        assert model.peft_config["default"].modules_to_save == ["classifier"]


# --------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind, attn_implementation",
    [*[(kind, name) for kind in KINDS for name in ("sdpa", "eager")], ("shallow", "flex_attention")],
)
@torch.compiler.set_stance("force_eager")  # transformers compiles flex attention
def test_hidden_patches_stay_hidden_and_prompts_stay_seen(kind, attn_implementation):
    model, inputs = adapt(attn_implementation=attn_implementation, **KINDS[kind])
    plain, pixels = predict(model, inputs), inputs["pixel_values"]
    torch.testing.assert_close(plain, predict(adapt(**KINDS[kind])[0], inputs))
    mask = torch.ones(2, 17, dtype=torch.long)
    torch.testing.assert_close(predict(model, {**inputs, "attention_mask": mask}), plain)
    mask[:, -4:] = 0  # the lowest row of patches
    changed = pixels.clone()
    changed[:, :, -8:] = 3.0
    expected = predict(model, {**inputs, "attention_mask": mask})
    torch.testing.assert_close(predict(model, {"pixel_values": changed, "attention_mask": mask}), expected)
    assert (predict(model, {"pixel_values": changed}) - plain).abs().max() > 1e-2
    assert (expected - plain).abs().max() > 1e-2
