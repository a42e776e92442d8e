# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Last layers that learn on standardised features, while their state dict is that of the plain layer.

The features of a pretrained backbone share a mean that is much larger than their differences. On such features a step
of the head, or of a prompt below it, moves the logits of all images together, and training swings. So in training

    y = W (x - m) * s + b,        for a 1x1 convolution with W of shape (C, D, 1, 1) at every position,

with constants m and s of shape (D,). The parameters keep their identity: it is the input of the layer that changes, by
a hook. The same function on raw features has the weight `W' = W * s` and the bias `b' = b - W' m`; this is what hooks
of the state dict write and read, so that files, checkpoints and other models never see the difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._compat import remove_hooks


MEAN, SCALE = "_feature_mean", "_feature_scale"


def is_standardised(layer: Any) -> bool:
    """Whether a layer learns on standardised features."""
    return any(name == MEAN for name, _ in layer.named_buffers(recurse=False))  # a wrapper shows its module's


@torch.no_grad()
def standardise(layer: Any, mean: Tensor, scale: Tensor) -> None:
    """Lets a linear layer or 1x1 convolution learn on standardised features; the function it computes stays the same.

    Args:
        layer: the layer, with whole parameters (not sharded ones).
        mean: of its features, `(D,)`; zeros for a layer without a bias, which could not undo it.
        scale: one over their standard deviation, `(D,)`.
    """
    fold(layer)
    weight: Tensor = layer.weight
    for name, values in ((MEAN, mean), (SCALE, scale)):
        own = torch.empty_like(values, device=weight.device, dtype=_float_type(weight))  # aligned, unlike a file's
        layer.register_buffer(name, own.copy_(values), persistent=False)
    _write(layer, *_on_standardised(layer, weight, layer.bias))
    layer.register_forward_pre_hook(_standardise_input)
    layer.register_state_dict_post_hook(_fold_in_state_dict)
    layer.register_load_state_dict_pre_hook(_unfold_from_state_dict)


@torch.no_grad()
def fold(layer: Any) -> None:
    """Makes a layer plain again, in place; the function it computes stays the same."""
    if not is_standardised(layer):
        return
    weight: Tensor = layer.weight
    values = _on_raw(layer, weight, layer.bias)
    delattr(layer, MEAN)
    delattr(layer, SCALE)
    remove_hooks(layer, (_standardise_input, _fold_in_state_dict, _unfold_from_state_dict))
    _write(layer, *values)


def _write(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


def _float_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _along_inputs(vector: Tensor, weight: Tensor) -> Tensor:
    """Shapes a vector of features like one output's weight: `(1, D)` or `(1, D, 1, 1)`."""
    return vector.to(weight.device).view(1, -1, *(1,) * (weight.dim() - 2))


def _shift(weight: Tensor, mean: Tensor) -> Tensor:
    return weight.flatten(1) @ mean.to(weight.device, weight.dtype)


def _on_raw(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    mean, scale = getattr(layer, MEAN), getattr(layer, SCALE)
    plain = weight.detach().to(mean.dtype) * _along_inputs(scale, weight)
    shifted = None if bias is None else (bias.detach().to(mean.dtype) - _shift(plain, mean)).to(bias.dtype)
    return plain.to(weight.dtype), shifted


def _on_standardised(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    mean, scale = getattr(layer, MEAN), getattr(layer, SCALE)
    plain = weight.detach().to(mean.dtype)
    shifted = None if bias is None else (bias.detach().to(mean.dtype) + _shift(plain, mean)).to(bias.dtype)
    return (plain / _along_inputs(scale, weight)).to(weight.dtype), shifted


# ------------------------------------------------------------------------------- hooks, functions so that copies work
def _standardise_input(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    features, *others = inputs
    mean, scale = getattr(layer, MEAN), getattr(layer, SCALE)
    if layer.weight.dim() > 2:  # (B, D, H, W)
        mean, scale = mean.view(-1, 1, 1), scale.view(-1, 1, 1)
    standardised = (features.to(mean.dtype) - mean) * scale
    return standardised.to(layer.weight.dtype), *others


def _fold_in_state_dict(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    values = zip(("weight", "bias"), _on_raw(layer, layer.weight, layer.bias), strict=True)
    state_dict.update({prefix + name: value for name, value in values if prefix + name in state_dict})


def _unfold_from_state_dict(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    weight, bias = (state_dict.get(prefix + name) for name in ("weight", "bias"))
    if weight is None or weight.shape != layer.weight.shape:
        return  # PyTorch says what is wrong
    values = zip(("weight", "bias"), _on_standardised(layer, weight, bias), strict=True)
    state_dict.update({prefix + name: value for name, value in values if value is not None})
