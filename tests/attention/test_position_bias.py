# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""A mask that a model adds to its position bias hides tokens, and shifts neither those it shows nor the prompts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.support.adapted import adapt, predict
from tests.support.models import BATCH, build


SHOWN = torch.ones(BATCH, 17, dtype=torch.long)
PADDED = SHOWN.clone()
PADDED[1, 9:] = 0


def added(mask: Tensor) -> Tensor:
    return torch.zeros(BATCH, 1, 1, 17, dtype=torch.float64).masked_fill(mask[:, None, None] == 0, -torch.inf)


families = pytest.mark.parametrize("name", ["beit_relative_bias", "beit_shared_bias"])
implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])
forms = pytest.mark.parametrize("form", [Tensor.long, Tensor.bool, lambda mask: mask.bool()[:, None, None]])


@families
@implementations
@forms
def test_a_mask_of_ones_and_zeros_is_one_of_zeros_and_minus_infinity(name, implementation, form):
    model, inputs = adapt(name, dtype=torch.float64, attn_implementation=implementation)
    for mask in (SHOWN, PADDED):
        expected = predict(model, {**inputs, "attention_mask": added(mask)})
        torch.testing.assert_close(predict(model, {**inputs, "attention_mask": form(mask)}), expected)
    torch.testing.assert_close(predict(model, {**inputs, "attention_mask": form(SHOWN)}), predict(model, inputs))


@families
def test_what_a_mask_means_to_the_base_model_is_left_alone(name):
    base, inputs = build(name)
    masked = {**inputs, "attention_mask": PADDED}
    expected = predict(base, masked)
    model, _ = adapt(name)
    with model.disable_adapter():
        assert torch.equal(predict(model, masked), expected)
    other = copy.deepcopy(model)
    assert torch.equal(predict(other.unload(), masked), expected)
    assert torch.equal(predict(model.unload(), masked), expected)


def test_a_model_without_position_bias_gets_its_mask_as_it_is():
    model, inputs = adapt("beit_absolute_positions", dtype=torch.float64)
    expected = predict(model, {**inputs, "attention_mask": added(PADDED)})
    torch.testing.assert_close(predict(model, {**inputs, "attention_mask": PADDED}), expected)
    torch.testing.assert_close(predict(model, {**inputs, "attention_mask": SHOWN}), predict(model, inputs))
