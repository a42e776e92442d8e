# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""`fit_probe`: the linear layer of least regularised loss on given features, for the labels of every kind of task."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


BIAS_DECAY = 1e-4  # keeps the bias of a class that no sample has finite


class Labels(NamedTuple):
    """What labels are.

    Attributes:
        task: `"classes"`, `"shares"` of classes (as mixed images have), `"several"` labels, or `"numbers"`.
        dense: whether every position of a map has one.
        num_outputs: how many outputs tell them.
    """

    task: str
    dense: bool
    num_outputs: int

    @classmethod
    def kind_of(cls, labels: Any, logits: Tensor | None, problem_type: str | None = None) -> Labels | None:
        """Tells what labels are, as the losses of transformers do; `None` where it cannot be told.

        Args:
            labels: of a batch.
            logits: `(B, C)` or `(B, C, H, W)`; without them, no more is said than whether labels may be of a kind.
            problem_type: what the config of the model says; by default labels tell by their type and values.
        """
        if not isinstance(labels, Tensor) or not 1 <= labels.dim() <= 4:
            return None
        if logits is None:
            return cls("unknown", labels.dim() > 2, 0)
        dense, outputs = logits.dim() == 4, logits.shape[1]
        if logits.dim() not in (2, 4) or dense != (labels.dim() > 2) or len(labels) != len(logits):
            return None
        whole = not labels.is_floating_point()
        if labels.dim() == 4 and labels.shape[1] != 1:
            return None
        if dense or labels.dim() == 1:
            if outputs > 1:
                return cls("classes", dense, outputs) if whole else None
            return cls("numbers", dense, 1)
        if labels.shape != logits.shape or whole:
            return None
        inside = bool(((labels >= 0) & (labels <= 1)).all())
        if outputs == 1 or problem_type == "regression" or not inside:
            return cls("numbers", False, outputs)
        fractions = bool((labels % 1 != 0).any()) and torch.allclose(labels.sum(1), torch.ones_like(labels[:, 0]))
        return cls(
            "shares" if fractions or problem_type == "single_label_classification" else "several", False, outputs
        )

    def resized(self, maps: Tensor, size: Any) -> Tensor:
        """Maps `(B, H, W)` or `(B, 1, H, W)` at the positions of another size: the nearest value."""
        maps = maps if maps.dim() == 4 else maps[:, None]
        # float64 holds every class
        return F.interpolate(maps.double(), size=tuple(size), mode="nearest-exact")[:, 0].to(maps.dtype)

    def without_ignored(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves out samples without a class, and numbers that are none."""
        if self.task == "classes":
            kept = (labels >= 0) & (labels < self.num_outputs)
        elif self.task == "numbers":
            labels = labels.reshape(len(labels), -1)
            kept = labels.isfinite().all(1)
        else:
            return features, labels
        return features[kept], labels[kept]


def fit_probe(
    features: Tensor, labels: Tensor, kind: Labels, num_outputs: int, weight_decay: float, with_bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Weight and bias of least loss, the mean over samples plus `weight_decay / 2` times the squared weights.

    Args:
        features: standardised, `(N, D)`, float64.
        labels: `(N,)` or `(N, C)`.
        kind: what they are.
        num_outputs: C.
        weight_decay: see above.
        with_bias: otherwise the bias is zero.

    Returns:
        Weight `(C, D)` and bias `(C,)`.
    """
    if kind.task == "numbers":
        return _ridge(features, labels.to(features.dtype).reshape(len(features), -1), weight_decay, with_bias)
    weight = features.new_zeros(num_outputs, features.shape[1]).requires_grad_()
    bias = features.new_zeros(num_outputs, requires_grad=with_bias)
    trained = [weight, bias] if with_bias else [weight]
    optimizer = torch.optim.LBFGS(trained, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(features, weight, bias)
        value = _loss(logits, labels, kind) + weight_decay / 2 * weight.square().sum()
        value = value + BIAS_DECAY / 2 * bias.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def _loss(logits: Tensor, labels: Tensor, kind: Labels) -> Tensor:
    if kind.task == "several":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)
    return F.cross_entropy(logits, labels.long() if kind.task == "classes" else labels.to(logits.dtype))


def _ridge(features: Tensor, targets: Tensor, weight_decay: float, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Ridge regression: half the squared error is the loss."""
    bias = targets.mean(0) if with_bias else torch.zeros_like(targets[0])
    identity = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    gram = features.T @ features / len(features) + weight_decay * identity
    weight = torch.linalg.solve(gram, features.T @ (targets - bias) / len(features)).T
    return weight, bias
