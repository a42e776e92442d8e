# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Layers that learn on standardised features compute the same, and their state dict is that of the plain layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from peft_e2vpt import fold_heads
from peft_e2vpt.training.standardise import is_standardised, standardise


LAYERS = {
    "linear": (lambda: nn.Linear(6, 3), (8, 6)),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), (8, 6)),
    "linear over tokens": (lambda: nn.Linear(6, 3), (2, 5, 6)),
    "convolution": (lambda: nn.Conv2d(6, 3, 1), (2, 6, 4, 4)),
}


def standardised(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer, its standardised copy and features with a large mean."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().to(dtype)
    features = 50 + 3 * torch.randn(shape, dtype=dtype)
    mean = 50 + torch.randn(6) if plain.bias is not None else torch.zeros(6)
    layer = copy.deepcopy(plain)
    standardise(layer, mean, torch.rand(6) + 0.1)
    return plain, layer, features


@pytest.mark.parametrize("name", LAYERS)
def test_standardising_and_folding_keep_the_function(name):
    plain, layer, features = standardised(name)
    parameters = list(layer.parameters())
    torch.testing.assert_close(layer(features), plain(features), rtol=1e-12, atol=1e-12)
    assert not torch.equal(layer.weight, plain.weight)
    fold_heads(layer)
    assert not is_standardised(layer) and not list(layer.buffers())
    assert all(one is other for one, other in zip(layer.parameters(), parameters, strict=True))
    torch.testing.assert_close(dict(layer.named_parameters()), dict(plain.named_parameters()), rtol=1e-12, atol=1e-12)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(layer(features), plain(features), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_state_dicts_are_those_of_the_plain_layer(name):
    plain, layer, features = standardised(name)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    other = LAYERS[name][0]().double()
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(features), other(features), rtol=1e-12, atol=1e-12)
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(features), plain(features), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_stay_standardised_and_fold_alone(copied):
    plain, layer, features = standardised("linear")
    twin = copied(layer)
    with torch.no_grad():
        layer.weight.zero_()
    torch.testing.assert_close(twin(features), plain(features), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    fold_heads(twin)
    torch.testing.assert_close(twin(features), plain(features), rtol=1e-12, atol=1e-12)
    assert is_standardised(layer)


def test_a_state_dict_of_another_shape_is_refused_by_torch():
    _, layer, _ = standardised("linear")
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.Linear(6, 4).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_standardised_in_float32(dtype):
    plain, layer, features = standardised("linear", torch.float32)
    half = features.to(dtype)
    torch.testing.assert_close(layer(half), plain(half.float()), rtol=1e-4, atol=1e-3)


def test_gradients_are_those_of_the_standardised_parametrisation():
    plain, layer, features = standardised("linear")
    layer(features).square().sum().backward()
    mean, scale = layer._feature_mean, layer._feature_scale
    weight = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    nn.functional.linear((features - mean) * scale, weight, bias).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-12, atol=1e-9)
