# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What pruning candidates are compared by: `Quality`, `ModelQuality` and what is measured where nothing is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


Quality = Callable[[Any, dict[str, Any]], Tensor]
"""A function of the model's output and the batch: one number per sample (B,), or one for the batch."""

Forward = Callable[[nn.Module, dict[str, Any]], "tuple[Tensor | None, Any]"]
"""Runs a model on a batch: the loss, where there is one, and the output."""


def loss_of(outputs: Any) -> Tensor | None:
    """The loss that a model returned: by name, or the first part of a tuple; `None` where there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, tuple):
        first = outputs[0] if outputs else None
        return first if isinstance(first, Tensor) and first.dim() == 0 else None
    return getattr(outputs, "loss", None)


def logits_of(outputs: Any) -> Tensor | None:
    """The logits that a model returned: by name, or the first matrix in a tuple; `None` where there are none."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    if isinstance(outputs, tuple):
        return next((part for part in outputs if isinstance(part, Tensor) and part.dim() == 2), None)
    return getattr(outputs, "logits", None)


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Any]:
    """Calls a model: the loss that it returns, and its output."""
    outputs = model(**inputs)
    return loss_of(outputs), outputs


def accuracy(outputs: Any, batch: dict[str, Any]) -> Tensor:
    """Whether the label of every sample is right, (B,)."""
    logits = logits_of(outputs)
    if logits is None:
        raise ValueError(f"Accuracy needs logits, but the model returned a {type(outputs).__name__} without any.")
    correct: Tensor = logits.argmax(-1) == batch["labels"]
    return correct.float()


def has_single_labels(outputs: Any, batch: dict[str, Any]) -> bool:
    """Whether a batch has one class (B,) per sample and the output scores of classes (B, C)."""
    labels, logits = batch.get("labels"), logits_of(outputs)
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor):
        return False
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return whole and labels.dim() == 1 and logits.dim() == 2 and len(logits) == len(labels) and logits.shape[1] > 1


@dataclass(frozen=True)
class ModelQuality:
    """A quality of the model as a whole, such as a metric over all predictions for a dataset.

    Candidates are measured one after the other: `function` is called once for each, with its gates in the model.

    Example:

        >>> search_pruning(model, scores, (), quality=ModelQuality(lambda model: mean_iou(model, loader)))

    Attributes:
        function: measures the model it is given.
        greater_is_better: whether a higher number is better.
    """

    function: Callable[[nn.Module], float]
    greater_is_better: bool = True

    def __call__(self, model: nn.Module) -> float:
        """The quality of a model, the higher the better."""
        value = float(self.function(model))
        return value if self.greater_is_better else -value


@dataclass(frozen=True)
class BatchQuality:
    """A quality that is a mean over batches, and how the model runs on one.

    Attributes:
        quality: what is measured; `None` takes accuracy where every sample has a single label, else minus the loss.
        forward: runs the model.
        greater_is_better: whether a higher number is better.
    """

    quality: Quality | None = None
    forward: Forward = run
    greater_is_better: bool = True

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Measures a batch: numbers per sample (B,) or of the batch (), the higher the better, and the output.

        Raises:
            ValueError: nothing is said to measure, and a batch has neither labels nor loss.
        """
        loss, outputs = self.forward(model, inputs)
        if self.quality is not None:
            values = self.quality(outputs, inputs)
        elif not self._is_regression(model) and has_single_labels(outputs, inputs):
            values = accuracy(outputs, inputs)
        elif loss is None:
            raise ValueError(
                "Pruning candidates are compared by accuracy or by the loss, but a validation batch holds only "
                f"{', '.join(inputs)}: let it hold labels, or pass a quality that needs none."
            )
        else:
            values = -loss
        values = torch.as_tensor(values, dtype=torch.float64).detach()
        return (values if self.greater_is_better else -values), outputs

    @staticmethod
    def _is_regression(model: nn.Module) -> bool:
        return getattr(getattr(model, "config", None), "problem_type", None) == "regression"


TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 3e-2


def _tensors(outputs: Any) -> list[Tensor]:
    """All floating tensors of an output, however deep they lie."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    elif not isinstance(outputs, (list, tuple)):
        return []
    return [tensor for part in outputs for tensor in _tensors(part)]


def _close(found: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    tolerance = TOLERANCE.get(expected.dtype, LOW_PRECISION_TOLERANCE)
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * max(scale, 1e-6), equal_nan=True)


def is_joined(joined: Any, parts: list[Any], size: int) -> bool:
    """Whether an output for several batches in one is what the batches give alone, one under the other.

    Args:
        joined: the output for all.
        parts: the output for each.
        size: samples in each.
    """
    together, apart = _tensors(joined), [_tensors(part) for part in parts]
    if any(len(tensors) != len(together) for tensors in apart):
        return False
    for whole, *pieces in zip(together, *apart, strict=True):
        if whole.dim() == 0:
            continue  # a mean over the batch
        if any(len(piece) != size for piece in pieces):  # of no sample: the same for every batch
            if any(piece.shape != whole.shape for piece in pieces):
                return False
        elif whole.shape != (size * len(pieces), *pieces[0].shape[1:]) or not _close(whole, torch.cat(pieces)):
            return False
    return True
