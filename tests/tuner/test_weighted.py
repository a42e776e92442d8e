# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A weighted adapter has, in every attention, weighted sums of the rows of others, and such sums of their heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.support.adapted import SHALLOW, config_of, layers_of, predict, prune, trainable
from tests.support.models import build
from tests.support.several import ALIKE, add, with_adapters


families = pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip"])
WEIGHTS = {"a": 0.5, "b": 2.0, "c": -0.75}


def rows_of(model: PeftModel, adapter_name: str) -> list[Tensor]:
    return [layer.computed_rows(adapter_name) for layer in layers_of(model)]


def weighted(name: str, adapters: dict[str, dict[str, Any]], weights: dict[str, float]) -> tuple[PeftModel, Tensor]:
    model, pixels = with_adapters(name, adapters, dtype=torch.float64)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    return model.eval(), pixels


@pytest.mark.parametrize(
    "settings", [{}, {"kv_prompt_position": "after"}, {"num_kv_prompts": 0}, {"num_visual_prompts": 0}], ids=str
)
@families
def test_its_rows_and_head_are_weighted_sums(name, settings):
    model, _ = weighted(name, {key: {**seed, **settings} for key, seed in ALIKE.items()}, WEIGHTS)
    heads = model.get_base_model().classifier.modules_to_save
    for part in ("weight", "bias"):
        expected = sum(weight * getattr(heads[key], part) for key, weight in WEIGHTS.items())
        torch.testing.assert_close(getattr(heads["sum"], part), expected, atol=1e-12, rtol=0)
    parts = {key: rows_of(model, key) for key in WEIGHTS}
    for index, rows in enumerate(rows_of(model, "sum")):
        expected = sum(weight * parts[key][index] for key, weight in WEIGHTS.items())
        torch.testing.assert_close(rows, expected, atol=1e-12, rtol=0)


@families
def test_with_all_weight_on_one_adapter_it_answers_as_that_adapter(name):
    model, pixels = weighted(name, ALIKE, {"a": 0.0, "b": 1.0})
    model.set_adapter("b")
    expected = predict(model, {"pixel_values": pixels})
    model.set_adapter("sum")
    torch.testing.assert_close(predict(model, {"pixel_values": pixels}), expected, atol=1e-12, rtol=0)


def test_rows_of_different_kinds_are_summed_where_their_numbers_agree():
    adapters = {"a": {"num_visual_prompts": 3}, "b": {"num_visual_prompts": 1, "num_kv_prompts": 4}}
    model, _ = weighted("vit", adapters, {"a": 0.5, "b": 0.5})
    for a, b, both in zip(*[rows_of(model, key) for key in ("a", "b", "sum")], strict=True):
        torch.testing.assert_close(both, (a + b) / 2, atol=1e-12, rtol=0)


def test_it_is_an_adapter_like_others_not_active_and_not_trained_until_it_is_set(tmp_path):
    model, pixels = with_adapters("vit", ALIKE)
    before, names = predict(model, {"pixel_values": pixels}), [name for name, _ in trainable(model)]
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert model.active_adapters == ["a"] and [name for name, _ in trainable(model)] == names
    assert torch.equal(predict(model.eval(), {"pixel_values": pixels}), before)
    model.set_adapter("sum")
    expected = predict(model, {"pixel_values": pixels})
    assert {key.split(".")[-1] for key, _ in trainable(model) if ".e2vpt_" in key} == {"sum"}
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(build("vit")[0], tmp_path / "sum").eval()
    assert torch.equal(predict(again, {"pixel_values": pixels}), expected)
    model.set_adapter("a")
    model.delete_adapter("sum")
    assert torch.equal(predict(model, {"pixel_values": pixels}), before)


def test_on_a_half_precision_base_it_is_float32_as_others_are():
    model, _ = with_adapters("vit", ALIKE, dtype=torch.bfloat16)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    assert {parameter.dtype for _, parameter in trainable(model)} == {torch.float32}


def pruned(model: PeftModel) -> None:
    prune(model, "b")


def other_head(model: PeftModel) -> None:
    model.get_base_model().classifier.modules_to_save["b"] = nn.Linear(32, 7)


MISTAKES: list[tuple[Any, list[str], list[float], str, str]] = [
    (None, ["a", "d"], [1, 1], "sum", "Adapter d does not exist; the model has a, b, c"),
    (None, ["a", "b"], [1], "sum", "one weight per adapter, got 2 adapters and 1 weights"),
    (None, [], [], "sum", "one weight per adapter, got 0 adapters"),
    (None, ["a", "b"], [1, 1], "c", "Adapter with name 'c' already exists"),
    (lambda model: add(model, "d", SHALLOW), ["a", "d"], [1, 1], "sum", "'d' has visual_prompt_mode='shallow'"),
    (lambda model: add(model, "d", {"num_kv_prompts": 1}), ["a", "d"], [1, 1], "sum", r"'d' has \[4, 4, 4\] rows"),
    (lambda model: add(model, "d", {"layers_to_transform": [1]}), ["a", "d"], [1, 1], "sum", r"'d' has \[5\] rows"),
    (
        lambda model: add(model, "d", {"modules_to_save": []}),
        ["a", "d"],
        [1, 1],
        "sum",
        "a have the head",
    ),
    (pruned, ["b"], [1], "sum", r"'b' has \[2, 4, 4\] rows"),
    (other_head, ["a", "b"], [1, 1], "sum", "classifier, in 2 different sizes"),
]


@pytest.mark.parametrize(
    "change, adapters, weights, name, message", MISTAKES, ids=[mistake[-1] for mistake in MISTAKES]
)
def test_what_cannot_be_summed_is_refused_and_adds_nothing(change, adapters, weights, name, message):
    model, _ = with_adapters("vit", ALIKE)
    if change is not None:
        change(model)
    before = list(model.peft_config), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert (list(model.peft_config), list(model.state_dict())) == before


def test_the_config_says_what_the_adapter_is():
    model, _ = weighted("vit", ALIKE, WEIGHTS)
    config, first = model.peft_config["sum"], config_of()
    assert (config.num_visual_prompts, config.num_kv_prompts, config.share_kv_prompts) == (0, 5, False)
    assert first.num_visual_prompts + first.num_kv_prompts == 5
