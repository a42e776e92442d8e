# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""One forward pass of a batch in which every sample has its own adapter and head gives what separate passes give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_e2vpt.tuner.mixed_batch import current_choice, one_adapter_per_sample
from tests.support.adapted import SHALLOW, layers_of, predict
from tests.support.models import build
from tests.support.several import ALIKE, BASE, DIFFERENT, add, at_once, one_by_one, with_adapters


families = pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip"])
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
KINDS: dict[str, tuple[dict[str, dict[str, Any]], list[str]]] = {
    "rows alike": (ALIKE, ["b", "a", "c", "b"]),
    "rows alike and none": (ALIKE, ["b", BASE, "c", BASE]),
    "every sample another": (DIFFERENT, ["b", "a", BASE, "kv", "pruned", "zeroed"]),
    "some adapters twice": (DIFFERENT, ["zeroed", "a", "pruned", "pruned", "a", "b"]),
}
kinds = pytest.mark.parametrize("kind", KINDS)


# ------------------------------------------------------------------------------------------------------- what it gives
@kinds
@families
def test_a_mixed_batch_gives_what_separate_forwards_give(name, kind):
    adapters, adapter_names = KINDS[kind]
    model, pixels = with_adapters(name, adapters, **DOUBLE)
    expected = one_by_one(model, pixels, adapter_names)
    found = at_once(model, pixels, adapter_names)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    active = predict(model, {"pixel_values": pixels})
    differing = [sample for sample, adapter in enumerate(adapter_names) if adapter != "a"]
    assert ((found - active).abs().amax(1) > 1e-2).nonzero().flatten().tolist() == differing


@families
def test_merged_adapters_take_part_with_their_constants(name):
    adapters, adapter_names = KINDS["every sample another"]
    model, pixels = with_adapters(name, adapters, **DOUBLE)
    expected = one_by_one(model, pixels, adapter_names)
    model.merge_adapter(["b", "pruned", "kv"])
    torch.testing.assert_close(at_once(model, pixels, adapter_names), expected, atol=1e-12, rtol=0)


@families
def test_a_batch_of_one_adapter_or_none_gives_the_same_bits_as_without_names(name):
    model, pixels = with_adapters(name, DIFFERENT)
    for adapter in ("b", BASE):
        adapter_names = [adapter] * len(pixels)
        assert torch.equal(at_once(model, pixels, adapter_names), one_by_one(model, pixels, adapter_names))


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning", "ignore::DeprecationWarning")
@kinds
@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
@torch.compiler.set_stance("force_eager")  # transformers compiles flex attention
def test_other_attention_implementations_give_the_same(attn_implementation, kind):
    adapters, adapter_names = KINDS[kind]
    model, pixels = with_adapters("vit", adapters, attn_implementation=attn_implementation)
    found = at_once(model, pixels, adapter_names)
    torch.testing.assert_close(found, one_by_one(model, pixels, adapter_names), atol=1e-5, rtol=1e-5)
    assert model.get_base_model().config._attn_implementation == attn_implementation


def test_hidden_patches_stay_hidden_in_a_mixed_batch():
    adapters, adapter_names = KINDS["every sample another"]
    model, pixels = with_adapters("vit", adapters, **DOUBLE)
    mask = torch.ones(len(pixels), 17, dtype=torch.long)
    mask[::2, -4:] = 0
    found = at_once(model, pixels, adapter_names, attention_mask=mask)
    expected = one_by_one(model, pixels, adapter_names, attention_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert (found - at_once(model, pixels, adapter_names)).abs().max() > 1e-2


@torch.no_grad()
def test_rows_that_a_sample_lacks_have_an_attention_weight_of_exactly_zero():
    model, pixels = with_adapters("vit", {"a": {}, "b": {"num_visual_prompts": 6}}, attn_implementation="eager")
    outputs = model(pixel_values=pixels, adapter_names=["a", "b", BASE], output_attentions=True)
    for weights in outputs.attentions:
        seen = (weights[..., : 6 + 2] > 0).all(dim=(1, 2))
        assert seen.tolist() == [[True] * 5 + [False] * 3, [True] * 8, [False] * 8]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_half_precision_backbones_with_float32_heads_take_mixed_batches():
    adapters, adapter_names = KINDS["every sample another"]
    model, pixels = with_adapters("vit", adapters, dtype=torch.bfloat16)
    found = at_once(model, pixels, adapter_names)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(model, pixels, adapter_names), atol=0.1, rtol=0.05)


# ------------------------------------------------------------------------------------------------------- what it costs
def test_the_backbone_runs_once():
    adapters, adapter_names = KINDS["every sample another"]
    model, pixels = with_adapters("vit", adapters)
    batches: list[int] = []
    mlp = model.get_base_model().vit.layers[0].layernorm_after
    mlp.register_forward_hook(lambda module, args, output: batches.append(len(output)))
    at_once(model, pixels, adapter_names)
    assert batches == [len(pixels)]


@kinds
def test_only_samples_with_different_numbers_of_rows_cost_a_mask(kind):
    adapters, adapter_names = KINDS[kind]
    model, _ = with_adapters("vit", adapters)
    with one_adapter_per_sample(model, adapter_names):
        rows = layers_of(model)[1].rows(len(adapter_names), torch.float32)
    assert (rows.score_bias is None) == (kind == "rows alike")


# ---------------------------------------------------------------------------------------------- which heads and layers
@pytest.mark.parametrize("order", [["a", "headless"], ["headless", "a"]])
@pytest.mark.parametrize("active", ["a", "headless"])
def test_an_adapter_without_a_head_has_the_original_head(order, active):
    kinds: dict[str, dict[str, Any]] = {"a": {}, "headless": {"modules_to_save": [], "seed": 3}}
    model, pixels = with_adapters("vit", {name: kinds[name] for name in order}, **DOUBLE)
    model.set_adapter(active)
    adapter_names = ["headless", "a", BASE]
    expected = one_by_one(model, pixels, adapter_names)
    torch.testing.assert_close(at_once(model, pixels, adapter_names), expected, atol=1e-12, rtol=0)


def test_adapters_of_different_layers_can_be_in_one_batch():
    adapters = {"a": {"layers_to_transform": [0]}, "b": {"layers_to_transform": [1, 2], "seed": 3}}
    model, pixels = with_adapters("vit", adapters, **DOUBLE)
    adapter_names = ["b", "a", BASE]
    expected = one_by_one(model, pixels, adapter_names)
    torch.testing.assert_close(at_once(model, pixels, adapter_names), expected, atol=1e-12, rtol=0)


def test_the_tokens_of_an_active_shallow_adapter_stay_out_of_a_mixed_batch():
    model, pixels = with_adapters("vit", ALIKE, **DOUBLE)
    adapter_names = ["b", "a", BASE, "c"]
    expected = one_by_one(model, pixels, adapter_names)
    add(model, "shallow", {**SHALLOW, "seed": 8})
    assert model.active_adapter == "shallow"
    torch.testing.assert_close(at_once(model.eval(), pixels, adapter_names), expected, atol=1e-12, rtol=0)


def test_a_disabled_model_gives_the_base_model_for_every_name():
    model, pixels = with_adapters("vit", ALIKE)
    with model.disable_adapter():
        found = at_once(model, pixels, ["b", "a", BASE, "c"])
    assert torch.equal(found, one_by_one(model, pixels, [BASE] * 4))


# ----------------------------------------------------------------------------------------------------- what it refuses
def test_wrong_names_and_modes_are_refused_as_peft_refuses_them():
    model, pixels = with_adapters("vit", ALIKE)
    with pytest.raises(
        ValueError, match=r"Trying to infer with non-existing adapter\(s\): d, e; the model has .*, and __base__"
    ):
        at_once(model, pixels, ["e", "a", "d", BASE])
    with pytest.raises(TypeError, match="Got adapter names of type <class 'str'>, expected a list of str"):
        at_once(model, pixels, "abca")
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        at_once(model.train(), pixels, ["a"] * 4)


@families
@pytest.mark.parametrize("adapter_names", [["a", "b"], ["a"], ["a", "b", "c", "a", "b"], ["a"] * 8], ids=len)
def test_a_wrong_number_of_names_is_refused_also_where_it_divides_the_windows(name, adapter_names):
    model, pixels = with_adapters(name, ALIKE)
    with pytest.raises(ValueError, match=rf"Length of `adapter_names`.* got {len(adapter_names)} and 4 respectively"):
        at_once(model, pixels, adapter_names)


def test_shallow_adapters_are_refused():
    model, pixels = with_adapters("vit", {"a": {}, "shallow": SHALLOW})
    with pytest.raises(ValueError, match="'shallow' has visual_prompt_mode='shallow'.*one of several in a batch"):
        at_once(model, pixels, ["a", "shallow", "a"])


def test_logits_of_narrower_heads_are_filled_up_with_minus_infinity():
    model, pixels = with_adapters("vit", ALIKE)
    model.get_base_model().classifier.modules_to_save["b"] = nn.Linear(32, 7)
    found = at_once(model, pixels, ["a", "b", "a", "c"])
    assert found.shape == (4, 7)
    assert torch.equal(found.isinf(), torch.tensor([[i != 1 and j > 4 for j in range(7)] for i in range(4)]))
    torch.testing.assert_close(found[[0, 2, 3], :5], at_once(model, pixels, ["a", "c", "a", "c"])[[0, 2, 3]])


def test_heads_of_any_class_take_mixed_batches():
    """PEFT's own wrapper splits batches for plain layers only."""
    model, pixels = with_adapters("vit", ALIKE)
    heads = model.get_base_model().classifier.modules_to_save
    for name in heads:
        heads[name] = nn.Sequential(heads[name], nn.Tanh())
    adapter_names = ["c", "a", BASE, "b"]
    found = at_once(model, pixels, adapter_names)
    torch.testing.assert_close(found, one_by_one(model, pixels, adapter_names), atol=1e-5, rtol=1e-5)


def test_outputs_that_are_no_one_tensor_are_refused_by_name():
    model, pixels = with_adapters("vit", ALIKE)
    model.get_base_model().classifier.modules_to_save["b"] = nn.Sequential(nn.Linear(32, 6), nn.Unflatten(1, (2, 3)))
    with pytest.raises(ValueError, match=r"heads classifier differ in more.*'a' gives \(5,\), 'b' gives \(2, 3\)"):
        at_once(model, pixels, ["a", "b", "a", "c"])


# ----------------------------------------------------------------------------------------------- what it leaves behind
@pytest.mark.parametrize("fails", [False, True])
@families
def test_nothing_of_a_mixed_batch_is_left_whether_or_not_it_fails(name, fails):
    adapters, adapter_names = KINDS["every sample another"]
    model, pixels = with_adapters(name, adapters)
    before, trained = predict(model, {"pixel_values": pixels}), requires_gradient(model)
    head = model.get_base_model().classifier
    if fails:
        hook = head.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            at_once(model, pixels, adapter_names)
        hook.remove()
    else:
        at_once(model, pixels, adapter_names)
    assert torch.equal(predict(model, {"pixel_values": pixels}), before)
    assert requires_gradient(model) == trained and head.active_adapters == ["a"]
    assert not head._forward_pre_hooks and current_choice() is None
    assert torch.equal(predict(copy.deepcopy(model), {"pixel_values": pixels}), before)


def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise RuntimeError("stopped")


def requires_gradient(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_training_goes_on_after_a_mixed_batch():
    model, pixels = with_adapters("swin", ALIKE)
    base, inputs = build("swin")
    at_once(model, pixels, ["b", "a", BASE, "c"])
    model.train()(**inputs).logits.sum().backward()  # 2 samples now, not 4
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
