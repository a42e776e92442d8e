# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What `attention_maps` and `prompt_attention` promise: the weights of a softmax by hand, and no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_e2vpt import E2VPTConfig
from peft_e2vpt.attention_maps import attention_maps, prompt_attention
from tests.support import zoo_checks
from tests.support.adapted import KV_ONLY, SHALLOW, adapt, layers_of, predict, prune
from tests.support.models import BATCH, NAMES


SAYS_NO_PREFIX = {"beit_relative_bias", "beit_shared_bias", "siglip2"}
HAS_NO_CLASS_TOKEN = {"ijepa", "siglip", "siglip2", "swin"}


def prefix_of(name: str) -> int | None:
    """What a user has to say, because tokens cannot be inserted into these sequences."""
    return (0 if name == "siglip2" else 1) if name in SAYS_NO_PREFIX else None


def softmax_by_hand(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The weights of every ViT attention in float64, from its input and the keys of its rows, by plain torch."""
    seen: list[Tensor] = []
    layers = layers_of(model)
    hooks = [
        layer.site.attention.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        for layer in layers
    ]
    predict(model, inputs)
    for hook in hooks:
        hook.remove()
    found = []
    for layer, hidden in zip(layers, seen, strict=True):
        attention = layer.site.attention

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (4, 8)).transpose(1, 2)

        prompts = layer.e2vpt_visual_prompts["default"] * layer.kept("default")
        prompts = prompts[layer.e2vpt_token_gates["default"] > 0][None]
        visual = heads(attention.k_proj(layer.site.block.layernorm_before(prompts.double())))
        key_value = layer.e2vpt_kv_prompts["default"][:1].double()
        tokens = heads(attention.k_proj(hidden))
        keys = torch.cat([visual.expand(BATCH, -1, -1, -1), key_value.expand(BATCH, -1, -1, -1), tokens], dim=2)
        scores = heads(attention.q_proj(hidden)) @ keys.transpose(-2, -1) / 8**0.5
        found.append(torch.softmax(scores, dim=-1))
    return found


@pytest.mark.parametrize("pruned", [False, True])
@torch.no_grad()
def test_the_maps_are_the_softmax_by_hand(pruned: bool) -> None:
    model, inputs = adapt(dtype=torch.float64)
    if pruned:
        prune(model)
    expected = softmax_by_hand(model, inputs)
    maps = attention_maps(model, inputs)
    assert [found.weights.shape for found in maps] == [weights.shape for weights in expected]
    for found, weights in zip(maps, expected, strict=True):
        torch.testing.assert_close(found.weights, weights, atol=1e-6, rtol=0)  # eager takes its softmax in float32


@pytest.mark.parametrize("name", NAMES)
def test_shares_are_the_sums_of_the_columns_of_each_kind(name: str) -> None:
    model, inputs = adapt(name, dtype=torch.float64)
    prune(model)  # 0 visual prompts in the first layer, 2 in the others
    prefix = prefix_of(name)
    maps = attention_maps(model, inputs, num_prefix_tokens=prefix)
    found = prompt_attention(model, inputs, num_prefix_tokens=prefix)
    assert found.layers == [one.layer for one in maps] == list(range(len(maps)))
    assert (found.class_token is None) == (name in HAS_NO_CLASS_TOKEN)
    for index, one in enumerate(maps):
        visual = 0 if index == 0 else 2
        num_tokens = one.weights.shape[-1] - visual - 2
        parts = one.weights.mean(1).split([visual, 2, num_tokens], dim=-1)
        shares = torch.stack([part.sum(-1) for part in parts], dim=-1)  # (samples and windows, queries, kinds)
        shares = shares.reshape(BATCH, -1, *shares.shape[1:])
        torch.testing.assert_close(found.patches[index], shares[:, :, one.num_prefix_tokens :].mean((1, 2)))
        assert found.num_keys[index].tolist() == [visual, 2, num_tokens]
        if found.class_token is not None:
            torch.testing.assert_close(found.class_token[index], shares[:, 0, 0])


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_prompt_that_scores_far_above_all_tokens_takes_all_attention(name: str) -> None:
    model, inputs = adapt(name, dtype=torch.float64, **KV_ONLY)
    layer = layers_of(model)[1]
    attention = layer.site.attention
    with torch.no_grad():  # all queries are 1, all keys 0 but the first prompt's
        for projection, bias in ((attention.q_proj, 1.0), (attention.k_proj, 0.0)):
            projection.weight.zero_()
            projection.bias.fill_(bias)
        layer.e2vpt_kv_prompts["default"].zero_()
        layer.e2vpt_kv_prompts["default"][:, :, 0] = 1000.0
    shares = prompt_attention(model, inputs).patches
    torch.testing.assert_close(shares[1], torch.tensor([[0.0, 1.0, 0.0]] * BATCH).double(), atol=1e-6, rtol=0)
    assert (shares[0, :, 1] < 0.9).all()


@pytest.mark.parametrize("position", ["before", "after"])
def test_columns_are_told_apart_wherever_they_stand(position: str) -> None:
    model, inputs = adapt(kv_prompt_position=position)
    kinds = attention_maps(model, inputs)[0].kinds.tolist()
    tokens = [2] * 17
    assert kinds == ([0, 0, 0, 1, 1, *tokens] if position == "before" else [0, 0, 0, *tokens, 1, 1])
    before = prompt_attention(adapt()[0], inputs)
    torch.testing.assert_close(prompt_attention(model, inputs).patches, before.patches)


def test_two_active_adapters_have_the_columns_of_both() -> None:
    model, inputs = adapt("clip_vision")  # heads cannot both be active
    model.add_adapter("other", E2VPTConfig(num_visual_prompts=1, num_kv_prompts=4))
    model.base_model.set_adapter(["default", "other"])
    assert attention_maps(model, inputs)[0].kinds.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 1, 1, *[2] * 17]


def test_merged_rows_get_the_attention_that_they_had() -> None:
    model, inputs = adapt()
    before = prompt_attention(model, inputs)
    model.merge_adapter()
    after = prompt_attention(model, inputs)
    assert torch.equal(after.patches, before.patches) and torch.equal(after.num_keys, before.num_keys)


@pytest.mark.parametrize("settings", [{}, SHALLOW])
def test_without_the_adapter_no_attention_goes_to_prompts(settings: dict[str, Any]) -> None:
    model, inputs = adapt(**settings)
    with model.disable_adapter():
        found = prompt_attention(model, inputs)
    assert found.class_token is not None
    for shares in (found.class_token, found.patches):
        assert (shares[..., :2] == 0).all()
        torch.testing.assert_close(shares[..., 2], torch.ones(3, BATCH))


def test_shallow_prompts_are_columns_and_no_queries() -> None:
    model, inputs = adapt(**SHALLOW)
    for one in attention_maps(model, inputs):
        assert one.weights.shape == (BATCH, 4, 17, 2 + 3 + 17)
        assert one.kinds.tolist() == [1, 1, 2, 0, 0, 0, *[2] * 16]


def test_attentions_without_prompts_have_maps_but_no_shares() -> None:
    model, inputs = adapt(layers_to_transform=[1])
    assert [one.is_adapted for one in attention_maps(model, inputs)] == [False, True, False]
    assert [one.weights.shape[-1] for one in attention_maps(model, inputs)] == [17, 22, 17]
    assert prompt_attention(model, inputs).layers == [1]


def test_between_tokens_sums_to_one_without_the_prompts() -> None:
    model, inputs = adapt()
    one = attention_maps(model, inputs)[0]
    assert one.between_tokens().shape == (BATCH, 4, 17, 17)
    torch.testing.assert_close(one.between_tokens().sum(-1), torch.ones(BATCH, 4, 17))


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision", "swin"])
def test_measuring_leaves_no_trace(name: str) -> None:
    model, inputs = adapt(name)
    model.train()
    layer = layers_of(model)[0]
    expected = predict(model, inputs)
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    implementation, state = layer.attention_config._attn_implementation, torch.get_rng_state()
    prompt_attention(model, inputs)
    assert layer.attention_config._attn_implementation == implementation == "sdpa"
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(predict(model, inputs), expected)


def test_a_failing_forward_pass_leaves_no_trace_either() -> None:
    model, inputs = adapt()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="size"):
        attention_maps(model, {"pixel_values": torch.zeros(1, 3, 8, 8)})
    assert layers_of(model)[0].attention_config._attn_implementation == "sdpa"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_what_cannot_be_measured_is_refused() -> None:
    model, inputs = adapt()
    with pytest.raises(ValueError, match="has no E2VPT adapter: wrap it"):
        attention_maps(model.unload(), inputs)
    model, inputs = adapt()
    with pytest.raises(ValueError, match="leave adapter_names out"):
        attention_maps(model, {**inputs, "adapter_names": ["default", "__base__"]})
    model, inputs = adapt("beit_relative_bias")
    with pytest.raises(ValueError, match="of BeitLayer is not known: pass num_prefix_tokens"):
        attention_maps(model, inputs)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hiera", "computes its own attention"),
        ("sam2_hiera", r"\(Sam2MultiScaleAttention\) does not return its attention weights"),
        ("qwen2_vl_vision", "does not return its attention weights"),
    ],
)
def test_an_attention_whose_weights_cannot_be_read_is_refused(name: str, reason: str) -> None:
    model, inputs = zoo_checks.adapt(name)
    with pytest.raises(ValueError, match=reason):
        attention_maps(model, inputs, num_prefix_tokens=0)
