# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How much every visual prompt and every segment of it matters: `score_prompts` (paper section 3.3, equations 7-9)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..distributed import is_sharded, refuse_flat_parameters, sum_over_processes
from ..evaluation import batches, no_trace
from ..tuner.config import E2VPTConfig
from ..tuner.gates import GateOverride
from ..tuner.layer import E2VPTLayer
from ..tuner.prompt_layers import active_prompt_layers
from ..tuner.targets import check_gradients
from .quality import loss_of


LossFunction = Callable[[nn.Module, dict[str, Any]], Tensor]
IGNORED_LABEL = -100
LOSS_SCALE = 2.0**10  # exact in other types; in float16 it keeps the gradients of a small loss from vanishing


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of the visual prompts of one adapter; a higher score means that removing it changes the loss more.

    L is the number of prompted layers, or 1 where one set of gates serves the whole model.

    Attributes:
        token: (L, M) in float64.
        segment: (L, M, R) in float64.
        num_samples: samples that the scores average over.
    """

    token: Tensor
    segment: Tensor
    num_samples: int


def zero_scores(layers: list[E2VPTLayer], config: E2VPTConfig) -> ImportanceScores:
    """Scores of no sample, in the shapes that an adapter's have."""
    shape = (1 if config.gate_scope == "model" else len(layers), config.num_visual_prompts)
    token = torch.zeros(shape, dtype=torch.float64)
    return ImportanceScores(token, torch.zeros(*shape, config.num_segments, dtype=torch.float64), 0)


def _labelled(batch: dict[str, Any], num_samples: int) -> int:
    """How many samples of a batch count: all but those that padding marked with an ignored label."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
        return int((labels != IGNORED_LABEL).sum())
    return num_samples


def _total_loss(model: nn.Module, batch: dict[str, Any], loss_fn: LossFunction | None, num_counted: int) -> Tensor:
    """The loss summed over the samples of a batch."""
    loss: Any = loss_fn(model, batch) if loss_fn is not None else loss_of(model(**batch))
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss for a batch of {', '.join(batch)}: let the batches hold labels, "
            "or pass loss_fn(model, batch)."
        )
    if loss.dim() > 1:
        raise ValueError(f"A loss is a mean (one number) or one number per sample, got shape {tuple(loss.shape)}.")
    total: Tensor = loss.sum() if loss.dim() else loss * num_counted
    return total


def _gradients(loss: Tensor, leaves: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Gradients of all gates; zeros for a layer that the loss does not depend on."""
    gates = [gate for pair in leaves for gate in pair]
    found = torch.autograd.grad(loss * LOSS_SCALE, gates, allow_unused=True) if loss.requires_grad else [None]
    if all(gradient is None for gradient in found):
        raise ValueError("The loss does not depend on the prompts: compute it with the given model, with gradients.")
    return [torch.zeros_like(gate) if g is None else g / LOSS_SCALE for gate, g in zip(gates, found, strict=True)]


def _leaves(
    layers: list[E2VPTLayer], adapter_name: str, config: E2VPTConfig, num_samples: int
) -> list[tuple[Tensor, Tensor]]:
    """Gates of every sample as leaves of the graph, (B, M) and (B, M, R); one pair where all layers share them."""
    first_only = config.gate_scope == "model"
    pairs = []
    for layer in layers[:1] if first_only else layers:
        token, segment = layer.gates(adapter_name)
        if config.token_gate == "attention":  # removed prompts take no part, all others start at a weight of 1
            token = torch.ones_like(token)
        pair = tuple(gate.expand(num_samples, *gate.shape).clone().requires_grad_() for gate in (token, segment))
        pairs.append((pair[0], pair[1]))
    return pairs


def score_prompts(
    model: nn.Module,
    dataloader: Iterable[dict[str, Any]],
    *,
    adapter_name: str | None = None,
    loss_fn: LossFunction | None = None,
    max_batches: int | None = None,
    signed: bool = False,
    seed: int | None = None,
) -> ImportanceScores:
    """Scores every visual prompt k and every segment r of it by `S = E_x |dL(x) / d rho|`, rho its gate.

    The absolute value stands inside the expectation, per sample. One backward pass per batch gives the gradients of
    all gates of all samples, because every sample has gates of its own. Nothing of the model changes: parameters,
    their gradients, modes and random number generators stay as they are. Run by several processes, each on its share
    of the data, all get the scores of the whole; where the model is sharded, each needs a batch at least.

    Example:

        >>> scores = score_prompts(model, train_loader, max_batches=50)
        >>> scores.token  # (layers, prompts)
        >>> apply_gates(model, prune(scores, prune_tokens=0.5))

    Args:
        model: a PEFT model with E2VPT, also wrapped in DDP or compiled.
        dataloader: batches as the model takes them, with labels; moved to the model's device.
        adapter_name: which adapter, by default the active one.
        loss_fn: a function of the model and a batch that returns the mean loss of the samples, or one loss per sample
            (B,). By default the loss that the model returns: by name, or first in a tuple.
        max_batches: how many batches to use, by default all.
        signed: the released code's score, the mean of the signed gradients of batch means, instead of the paper's.
        seed: makes random augmentations of the data repeatable.

    Raises:
        ValueError: there is nothing to score, no batch (of a sharded model, in one process), or no loss; or FSDP1
            shards the model.
        TypeError: a batch is not a dictionary.
        FloatingPointError: a gradient is not finite.
    """
    refuse_flat_parameters(model)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    adapter_name, layers = active_prompt_layers(model, adapter_name)
    check_gradients(model)
    config = layers[0].e2vpt_config[adapter_name]
    assert config.token_gate is not None
    device, sharded = layers[0].e2vpt_token_gates[adapter_name].device, is_sharded(model)
    sums = zero_scores(layers, config)
    token, segment = sums.token, sums.segment
    num_samples = num_batches = 0
    with no_trace(model, dataloader, seed), torch.enable_grad():
        try:
            for batch in batches(dataloader, device, "Scoring prompts", max_batches, in_step=sharded):
                counted = _labelled(batch.inputs, batch.size) if batch.counts else 0
                if not counted and not sharded:
                    continue
                leaves = _leaves(layers, adapter_name, config, batch.size)
                for layer, pair in zip(layers, leaves * (len(layers) // len(leaves)), strict=True):
                    layer.gate_override = GateOverride(*pair, config.token_gate)
                loss = _total_loss(model, batch.inputs, loss_fn, counted)
                gradients = _gradients(loss, leaves)
                if not counted:
                    continue
                if signed:
                    per_batch = [gradient.sum(0) / counted for gradient in gradients]
                else:
                    per_batch = [gradient.abs().sum(0) for gradient in gradients]
                token += torch.stack(per_batch[0::2]).cpu()
                segment += torch.stack(per_batch[1::2]).cpu()
                num_samples += counted
                num_batches += 1
        finally:
            for layer in layers:
                layer.gate_override = None
    count = torch.tensor([num_samples, num_batches], dtype=torch.float64)
    token, segment, count = (sum_over_processes(tensor, device) for tensor in (token, segment, count))
    num_samples, num_batches = int(count[0]), int(count[1])
    if not num_samples:
        raise ValueError("The dataloader gave no labelled sample to score the prompts with.")
    if not (token.isfinite().all() and segment.isfinite().all()):
        raise FloatingPointError(
            "The gradient of a gate is not finite, so prompts cannot be scored: score in float32 or bfloat16, or look "
            "for a loss that is not finite."
        )
    divisor = num_batches if signed else num_samples
    return ImportanceScores(token / divisor, segment / divisor, num_samples)
