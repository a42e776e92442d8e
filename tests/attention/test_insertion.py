# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Rows are tokens: E2VPT gives what true insertion of prompt tokens gives, in every family and attention.

The reference, written here with hooks on the blocks of an untouched model, knows nothing of the package: prompt tokens
enter the sequence before a block and leave it after; masks and position biases get columns and rows that hide and
add nothing; key-value prompts join the projected keys and values inside a plain softmax attention.

Measured in float64: outputs at most 4e-15 apart, gradients at most 3e-15 of their largest entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.tuner.prompt_layers import prompt_layers
from tests.support.models import NAMES, build, output_of


M, N = 3, 2
PREFIX_TOKENS = {
    "vit": 1,
    "deit": 2,
    "deit_with_teacher": 2,
    "msn": 1,
    "ijepa": 0,
    "dinov2": 1,
    "dinov2_with_registers": 3,
    "dinov3": 3,
    "beit_relative_bias": 1,
    "beit_shared_bias": 1,
    "beit_absolute_positions": 1,
    "clip": 1,
    "clip_vision": 1,
    "siglip": 0,
    "siglip2": 0,
}
ONLY_DEEP = ("beit_relative_bias", "beit_shared_bias", "siglip2", "swin")
SHALLOW = [name for name in NAMES if name not in ONLY_DEEP]
FLEX = [name for name in NAMES if build(name)[0]._supports_flex_attn]
VARIANTS = {
    "shared": {},
    "separate-after": {"share_kv_prompts": False, "kv_prompt_position": "after"},
    "visual-only": {"num_kv_prompts": 0},
    "kv-only": {"num_visual_prompts": 0},
}


def config(**changes: Any) -> E2VPTConfig:
    settings = {
        "num_visual_prompts": M,
        "num_kv_prompts": N,
        "visual_prompt_dropout": 0.0,
        "num_segments": 4,
        "seed": 0,
    }
    return E2VPTConfig(**{**settings, **changes})


def adapt(model: nn.Module, **changes: Any) -> PeftModel:
    return get_peft_model(model, config(**changes)).eval()


# ---------------------------------------------------------------------------------------------------------- reference
def blocks_of(model: nn.Module) -> list[Any]:
    """The transformer blocks; a stage of Swin is no block, but of the same class."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if not type(layer).__name__.endswith("Stage")]


def attention_of(block: nn.Module) -> Any:
    (attention,) = (child for child in block.children() if type(child).__name__.endswith("Attention"))
    return attention


def put_in(tokens: Tensor, at: int, prompts: Tensor) -> Tensor:
    return torch.cat([tokens[:, :at], prompts.expand(len(tokens), -1, -1), tokens[:, at:]], dim=1)


def cut_out(output: Any, at: int, count: int) -> Any:
    if isinstance(output, tuple):
        return cut_out(output[0], at, count), *output[1:]
    return torch.cat([output[:, :at], output[:, at + count :]], dim=1)


def widen(mask: Tensor | None, at: int, count: int, dims: Iterable[int] = (-2, -1)) -> Tensor | None:
    """Gives a mask or bias `count` rows and columns that hide nothing and add nothing."""
    if mask is None:
        return None
    for dim in dims:
        before, behind = mask.split([at, mask.shape[dim] - at], dim=dim)
        new = before.new_full((1,), mask.dtype == torch.bool)
        shape = [count if d == dim % mask.dim() else size for d, size in enumerate(mask.shape)]
        mask = torch.cat([before, new.expand(shape), behind], dim=dim)
    return mask


def insert_before(block: nn.Module, at: int, prompts: Tensor) -> None:
    block.register_forward_pre_hook(lambda module, args: (put_in(args[0], at, prompts), *args[1:]))


def cut_after(block: nn.Module, at: int, count: int) -> None:
    block.register_forward_hook(lambda module, args, output: cut_out(output, at, count))


def widen_mask(attention: nn.Module, at: int, count: int) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        args = (*args[:1], *(widen(mask, at, count) for mask in args[1:]))
        if "attention_mask" in kwargs:
            kwargs = {**kwargs, "attention_mask": widen(kwargs["attention_mask"], at, count)}
        return args, kwargs

    attention.register_forward_pre_hook(hook, with_kwargs=True)


def insert_into_windows(block: Any, prompts: Tensor) -> None:
    """Puts the prompts, normed like the tokens, in front of every window of a Swin block."""
    attention, count = block.attention, prompts.shape[0]
    attention.register_forward_pre_hook(
        lambda module, args: (put_in(args[0], 0, block.layernorm_before(prompts)), *args[1:])
    )
    attention.relative_position_bias.register_forward_hook(lambda module, args, output: widen(output, 0, count))
    cut_after(attention, 0, count)


def insert(model: nn.Module, name: str, visual_prompts: list[Tensor], mode: str = "deep") -> None:
    """Inserts prompts (M, D) as tokens: one set for each block, or one set from the first block to the last."""
    blocks = blocks_of(model)
    if mode == "shallow":
        insert_before(blocks[0], PREFIX_TOKENS[name], visual_prompts[0])
        cut_after(blocks[-1], PREFIX_TOKENS[name], len(visual_prompts[0]))
        return
    for block, prompts in zip(blocks, visual_prompts, strict=True):
        widen_mask(attention_of(block), PREFIX_TOKENS.get(name, 0), len(prompts))
        if name == "swin":
            insert_into_windows(block, prompts)
        else:
            insert_before(block, PREFIX_TOKENS[name], prompts)
            cut_after(block, PREFIX_TOKENS[name], len(prompts))


def join(model: nn.Module, kv_prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Joins key-value prompts (1 or 2, H, n, d) to the projected keys and values of each block, K' = [P_K; K]."""
    running: list[Tensor] = []
    for block, prompts in zip(blocks_of(model), kv_prompts, strict=True):
        attention_of(block).register_forward_pre_hook(lambda module, args, prompts=prompts: running.append(prompts))
        attention_of(block).register_forward_hook(lambda module, args, output: running.clear())

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None, **kwargs: Any
    ) -> Tensor:
        if running:
            prompts = running[0][:, None].expand(-1, len(key), -1, -1, -1)
            key, value = torch.cat([prompts[0], key], dim=2), torch.cat([prompts[-1], value], dim=2)
            attn_mask = widen(attn_mask, 0, prompts.shape[3], dims=(-1,))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(dim=-1) @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


def prompts_of(model: PeftModel) -> tuple[list[Tensor], list[Tensor]]:
    """The visual and the key-value prompts of all layers that own some, in the order of the layers."""
    layers = prompt_layers(model)
    visual_prompts = [prompts for layer in layers for prompts in layer.e2vpt_visual_prompts.values()]
    kv_prompts = [prompts for layer in layers for prompts in layer.e2vpt_kv_prompts.values()]
    return visual_prompts, kv_prompts


def output_and_gradients(model: nn.Module, inputs: dict[str, Tensor], prompts: list[Tensor]) -> tuple[Tensor, Any]:
    output = output_of(model(**inputs))
    return output, torch.autograd.grad(output.square().sum(), prompts)


def assert_equals_insertion(
    model: PeftModel,
    name: str,
    inputs: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    mode: str = "deep",
    visual_prompts: list[Tensor] | None = None,
) -> None:
    """Compares a model with an untouched one into which `visual_prompts`, by default the model's own, are inserted."""
    own = prompts_of(model)
    output, measured = output_and_gradients(model, inputs, [*own[0], *own[1]])

    reference, _ = build(name, dtype=torch.float64)
    plain = output_of(reference(**inputs))
    if own[0]:
        insert(reference, name, visual_prompts or own[0], mode)
    if own[1]:
        join(reference, own[1], monkeypatch)
    expected_output, expected = output_and_gradients(reference, inputs, [*own[0], *own[1]])

    assert (output - plain).abs().max() > 1e-2
    torch.testing.assert_close(output, expected_output, rtol=0, atol=1e-12)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-10 * largest)


# -------------------------------------------------------------------------------------------------- rows are insertion
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_deep_prompts_equal_inserted_tokens(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = build(name, dtype=torch.float64)
    assert_equals_insertion(adapt(base, **VARIANTS[variant]), name, inputs, monkeypatch)


@pytest.mark.parametrize("name", SHALLOW)
def test_shallow_prompts_equal_tokens_inserted_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = build(name, dtype=torch.float64)
    model = adapt(base, visual_prompt_mode="shallow")
    assert_equals_insertion(model, name, inputs, monkeypatch, "shallow")


@pytest.mark.parametrize("name", ONLY_DEEP)
def test_shallow_prompts_are_refused_where_no_token_can_be_inserted(name: str) -> None:
    with pytest.raises(ValueError, match="pass visual_prompt_mode='deep'"):
        adapt(build(name)[0], visual_prompt_mode="shallow")


def test_a_padding_mask_hides_patches_but_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = build("vit", dtype=torch.float64)
    assert_equals_insertion(adapt(base), "vit", {**inputs, "attention_mask": padding_mask()}, monkeypatch)


@pytest.mark.parametrize("name", ["vit", "beit_relative_bias", "swin"])
def test_a_pruned_prompt_is_one_that_is_not_inserted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = build(name, dtype=torch.float64)
    model = adapt(base)
    token, segment = torch.tensor([1, 0, 1]), torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    for layer in prompt_layers(model):
        layer.set_gates("default", token, segment)
    survivors = [
        (prompts * segment.repeat_interleave(prompts.shape[1] // 4, dim=1))[token.bool()]
        for prompts in prompts_of(model)[0]
    ]
    assert_equals_insertion(model, name, inputs, monkeypatch, visual_prompts=survivors)


# ---------------------------------------------------------------------------------------- the model's outputs are kept
def shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.shape
    return [shapes(part) for part in output]


@pytest.mark.parametrize("name", NAMES)
def test_every_output_has_the_shape_that_the_base_model_gives(name: str) -> None:
    model, inputs = build(name)
    tower = model.base_model if "For" in type(model).__name__ else model
    before = tower(**inputs, output_hidden_states=True)
    adapt(model)
    after = tower(**inputs, output_hidden_states=True)
    assert after.keys() == before.keys()
    assert shapes(after.to_tuple()) == shapes(before.to_tuple())
    assert (after[0] - before[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("position", ["before", "after"])
def test_attention_maps_show_the_prompts_as_extra_columns(name: str, position: str) -> None:
    base, inputs = build(name, attn_implementation="eager")
    plain = base(**inputs, output_attentions=True).attentions
    maps = adapt(base, kv_prompt_position=position)(**inputs, output_attentions=True).attentions
    assert len(maps) == len(plain)
    for weights, without in zip(maps, plain, strict=True):
        assert weights.shape == (*without.shape[:3], without.shape[3] + M + N)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))
    num_before = M + N if position == "before" else M
    among_tokens = maps[0][..., num_before : num_before + plain[0].shape[3]]
    if name != "swin":  # whose maps are those of the last block of a stage
        torch.testing.assert_close(among_tokens / among_tokens.sum(dim=-1, keepdim=True), plain[0])


# --------------------------------------------------------------------------------------- all attention implementations
def padding_mask() -> Tensor:
    """Hides the last 5 patches of the second image from all 17 tokens."""
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 12:] = 0
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_eager_and_sdpa_agree_also_when_chosen_after_wrapping(name: str) -> None:
    base, inputs = build(name, attn_implementation="sdpa")
    model = adapt(base)
    sdpa = output_of(model(**inputs))
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True)
    torch.testing.assert_close(output_of(eager), sdpa, rtol=0, atol=1e-5)
    assert all(weights is not None for weights in eager.attentions)
    chosen_before, _ = build(name, attn_implementation="eager")
    torch.testing.assert_close(output_of(adapt(chosen_before)(**inputs)), output_of(eager), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_agrees(name: str) -> None:
    model, inputs = build(name)
    model = adapt(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # transformers compiles flex attention
        sdpa = output_of(model(**inputs))
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(output_of(model(**inputs)), sdpa, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_a_padding_mask_means_the_same_to_every_implementation(implementation: str, position: str) -> None:
    model, inputs = build("vit")
    model, inputs = adapt(model, kv_prompt_position=position), {**inputs, "attention_mask": padding_mask()}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        sdpa = output_of(model(**inputs))
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(output_of(model(**inputs)), sdpa, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- dropout of prompts
def equal_images(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[:1].repeat(2, *[1] * (tensor.dim() - 1)) for key, tensor in inputs.items()}


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_prompt_dropout_differs_between_the_samples_of_a_batch(mode: str) -> None:
    base, inputs = build("vit", dtype=torch.float64)
    model = adapt(base, visual_prompt_mode=mode, visual_prompt_dropout=0.5)
    first, second = output_of(model(**equal_images(inputs)))
    torch.testing.assert_close(first, second)
    first, second = output_of(model.train()(**equal_images(inputs)))
    assert (first - second).abs().max() > 1e-3


def test_prompts_of_a_base_in_eval_mode_are_not_dropped_until_it_trains() -> None:
    base, inputs = build("vit", dtype=torch.float64)
    model = get_peft_model(base, config(visual_prompt_dropout=0.5))
    torch.testing.assert_close(output_of(model(**inputs)), output_of(model(**inputs)), rtol=0, atol=0)
    model.train()
    assert (output_of(model(**inputs)) - output_of(model(**inputs))).abs().max() > 1e-3


def test_all_windows_of_a_image_get_the_same_dropped_prompts() -> None:
    base, _ = build("swin", dtype=torch.float64)
    model = get_peft_model(base, config(visual_prompt_dropout=0.5)).train()
    seen: list[Tensor] = []
    blocks_of(model)[0].register_forward_hook(lambda block, args, output: seen.append(output[0]))
    model(pixel_values=torch.ones(2, 3, 32, 32, dtype=torch.float64))  # in the first block, all windows are equal
    first, second = seen[0].view(2, 4, 4, 4, 4, -1).transpose(2, 3).reshape(2, 16, 16, -1)
    torch.testing.assert_close(first, first[:1].expand_as(first))
    torch.testing.assert_close(second, second[:1].expand_as(second))
    assert (first - second).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ counting
def test_vit_b16_with_the_defaults_of_the_paper_trains_215140_values() -> None:
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=100))
    model = get_peft_model(base, E2VPTConfig(num_visual_prompts=10, num_kv_prompts=5))
    visual_prompts, kv_prompts = prompts_of(model)
    assert sum(prompts.numel() for prompts in visual_prompts) == 92_160
    assert sum(prompts.numel() for prompts in kv_prompts) == 46_080
    assert model.get_nb_trainable_parameters()[0] == 92_160 + 46_080 + 76_900 == 215_140
