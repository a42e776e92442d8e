# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Proves that a model does on hidden states what it does on images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .data import Data, part
from .outputs import NoCut, leaves_of
from .passing import FrozenPrefix


NUM_COMPARED = 4  # images whose loss and gradients are compared
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}


class Proof:
    """What a model gives on a few images, for a prefix to be held to.

    Raises:
        ValueError: nothing that it gives depends on what trains.
    """

    def __init__(self, model: nn.Module, data: Data, tried: dict[str, Any]) -> None:
        self._model, self._data = model, data
        self._images = part(tried, min(NUM_COMPARED, len(tried[data.name])))
        self._outputs, self._gradients = _outputs_and_gradients(model, data.for_model(self._images, with_labels=True))

    def why_wrong(self, prefix: FrozenPrefix) -> str | None:
        """Runs the model on hidden states; why it does not do what it does on images, if it does not."""
        try:
            hidden = prefix.hidden_states(lambda: self._model(**self._data.for_model(self._images)))
        except NoCut as reason:
            return str(reason)
        shape, raw_shape = tuple(hidden.shape[1:]), prefix.raw_shape
        if hidden.dim() < 2 or len(hidden) != len(self._images[self._data.name]):
            return f"what {prefix.last_module} gives has no entry an image"
        if len(shape) == len(raw_shape) and shape[0] == raw_shape[0]:
            return f"hidden states of shape {list(shape)} could be taken for images, which are {list(raw_shape)}"
        before, prefix.shape = prefix.shape, shape
        try:
            outputs, gradients = _outputs_and_gradients(
                self._model, self._data.for_model({**self._images, self._data.name: hidden}, with_labels=True)
            )
        except Exception as error:  # of whatever kind a model makes from numbers that are not there
            return f"without the modules before it fails ({type(error).__name__}: {error})"
        finally:
            prefix.shape = before
        if len(outputs) != len(self._outputs):
            return "it gives other outputs"
        for one, other in zip(outputs, self._outputs, strict=True):
            if one.shape != other.shape or (one.isnan() & ~other.isnan()).any():
                return "it reads what earlier modules give, beside the hidden states before the first that trains"
            if not close(one, other, [other]):
                return f"outputs differ by {float((one - other).abs().max()):.1e}"
        given = [gradient for gradient in self._gradients if gradient is not None]
        for gradient, expected in zip(gradients, self._gradients, strict=True):
            if gradient is None or expected is None:
                if gradient is not expected:
                    return "something trains before"
            elif not close(gradient, expected, given):
                return f"gradients differ by {float((gradient - expected).abs().max()):.1e}"
        return None


def _outputs_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """All numbers that a model gives, and the gradients of their squares for everything that trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = [x for x in leaves_of(model(**inputs)) if isinstance(x, Tensor) and x.is_floating_point()]
        losses = [
            x.to(torch.promote_types(x.dtype, torch.float32)).square().mean() for x in outputs if x.requires_grad
        ]
        if not losses:
            raise ValueError("Nothing that the model gives depends on what trains, so there is nothing to cache for.")
        gradients = torch.autograd.grad(losses, trained, allow_unused=True)
    return [x.detach() for x in outputs], list(gradients)


def close(one: Tensor, other: Tensor, scale: list[Tensor], factor: float = 1.0) -> bool:
    """Whether numbers are equal but for rounding, of the size of all the others."""
    if torch.equal(one, other):
        return True
    largest = max(float(tensor.detach().nan_to_num().abs().max()) for tensor in scale if tensor.numel())
    tolerance = factor * TOLERANCES.get(one.dtype, 3e-2)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def check_that_it_fits(prefix: FrozenPrefix, model: nn.Module, data: Data, tried: dict[str, Any]) -> None:
    """Refuses a dataset that does not fit the prefix that a model is cut at.

    Raises:
        ValueError: it does not.
    """
    advice = "Call uncache_frozen_prefix(model) first; what was cached before is then of no use."
    size = tuple(tried[data.name].shape[1:])
    if data.name != prefix.name or size != prefix.raw_shape:
        raise ValueError(
            f"The model has a cache already, for images of shape {list(prefix.raw_shape)}, and the dataset has images "
            f"of shape {list(size)}. {advice}"
        )
    reason = prefix.why_stale() or Proof(model, data, tried).why_wrong(prefix)
    if reason is not None:
        raise ValueError(f"The model has a cache already, which does not fit any more: {reason}. {advice}")
