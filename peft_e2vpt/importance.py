# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""How much every visual prompt and every segment of it matters: `score_prompts` (paper section 3.3, equations 7-9)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, nn
from transformers.utils import logging

from .config import E2VPTConfig
from .container import prompt_layers
from .layer import E2VPTLayer, GateOverride


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


def visual_prompt_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, list[E2VPTLayer]]:
    """Returns the name of the adapter, by default the active one, and the layers with visual prompts of it.

    Raises:
        ValueError: the model has no E2VPT adapter, or the adapter has no visual prompts.
    """
    layers = prompt_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no E2VPT adapter: wrap it with get_peft_model(model, E2VPTConfig()) first."
        )
    adapter_name = adapter_name or layers[0].active_adapters[0]
    prompted = [layer for layer in layers if adapter_name in layer.e2vpt_visual_prompts]
    if not prompted:
        raise ValueError(
            f"The adapter {adapter_name!r} has no visual prompts to score or prune: it needs num_visual_prompts of at "
            "least 1."
        )
    return adapter_name, prompted


def active_prompt_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, list[E2VPTLayer]]:
    """The same as `visual_prompt_layers`, of an adapter that takes part in the forward pass, and alone.

    Raises:
        ValueError: as there, or the adapter is switched off, or others are active too.
    """
    adapter_name, layers = visual_prompt_layers(model, adapter_name)
    if layers[0].disable_adapters or layers[0].active_adapters != [adapter_name]:
        raise ValueError(
            f"The adapter {adapter_name!r} is not the active one: call model.set_adapter({adapter_name!r}) first."
        )
    return adapter_name, layers


def reshard(model: nn.Module) -> None:
    """Puts sharded parameters back in place where FSDP2 has left gathered copies after a forward pass.

    A change in place would be lost with the copies.
    """
    for module in model.modules():
        if hasattr(type(module), "reshard"):
            module.reshard()  # type: ignore[operator]


@contextmanager
def no_trace(model: nn.Module, dataloader: Iterable[Any], seed: int | None = None) -> Iterator[None]:
    """Runs a block in eval mode and leaves modes, random number generators and the dataloader as they were.

    Args:
        model: the model whose modules return to the mode that each had.
        dataloader: what the block reads; its own generators and what Accelerate notes of a running epoch are kept.
        seed: makes what the block draws (augmentations of its data, for instance) repeatable.
    """
    modes = {module: module.training for module in model.modules()}
    holders = (dataloader, getattr(dataloader, "sampler", None))
    owned = [getattr(holder, name, None) for holder in holders for name in ("generator", "synchronized_generator")]
    generators = {g: g.get_state() for g in owned if isinstance(g, torch.Generator)}
    names = ("end_of_dataloader", "remainder", "iteration")
    notes = {name: getattr(dataloader, name) for name in names if hasattr(dataloader, name)}
    gradient_state = GradientState()
    running = gradient_state.dataloader_references
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for generator, state in generators.items():
                generator.set_state(state)
            for name, value in notes.items():
                setattr(dataloader, name, value)
            gradient_state.dataloader_references = running
            reshard(model)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def gates_on(place: str, layers: list[E2VPTLayer]) -> Iterator[None]:
    """Lets attentions that cannot add to their scores (flash, flex) run as sdpa where gates are on the `"attention"`.

    Args:
        place: `"attention"` or `"embedding"`.
        layers: the layers whose gates are measured.
    """
    sources = [layer.site.attention.config.__dict__["_e2vpt_source"] for layer in layers]
    configs = {id(source): source for source in sources}
    before = {key: config._attn_implementation for key, config in configs.items()}
    switched = [key for key, name in before.items() if place == "attention" and ("flash" in name or "flex" in name)]
    try:
        for key in switched:
            configs[key]._attn_implementation = "sdpa"
        yield
    finally:
        for key in switched:
            configs[key]._attn_implementation = before[key]


def batches(dataloader: Iterable[dict[str, Any]], max_batches: int | None, description: str) -> Iterator[Any]:
    """Yields batches with transformers' own progress bar, on the main process."""
    total = len(dataloader) if isinstance(dataloader, Sized) else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    state = torch.distributed
    is_main = not (state.is_available() and state.is_initialized()) or state.get_rank() == 0
    yield from logging.tqdm(
        islice(dataloader, max_batches), total=total, desc=description, leave=False, disable=None if is_main else True
    )


def _labelled(batch: dict[str, Any], num_samples: int) -> int:
    """How many samples of a batch count: all but those that padding marked with an ignored label."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
        return int((labels != IGNORED_LABEL).sum())
    return num_samples


def _total_loss(model: nn.Module, batch: dict[str, Any], loss_fn: LossFunction | None, num_counted: int) -> Tensor:
    """The loss summed over the samples of a batch."""
    loss: Any = loss_fn(model, batch) if loss_fn is not None else getattr(model(**batch), "loss", None)
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
        token, segment = layer.e2vpt_token_gates[adapter_name], layer.e2vpt_segment_gates[adapter_name]
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
    of the data, all get the scores of the whole.

    Args:
        model: a PEFT model with E2VPT, also wrapped in DDP or compiled.
        dataloader: batches as the model takes them, with labels; moved to the model's device.
        adapter_name: which adapter, by default the active one.
        loss_fn: a function of the model and a batch that returns the mean loss of the samples, or one loss per sample
            (B,). By default `model(**batch).loss`, the mean over the samples.
        max_batches: how many batches to use, by default all.
        signed: the released code's score, the mean of the signed gradients of batch means, instead of the paper's.
        seed: makes random augmentations of the data repeatable.

    Raises:
        ValueError: there is nothing to score, no batch, or no loss.
        FloatingPointError: a gradient is not finite.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    adapter_name, layers = active_prompt_layers(model, adapter_name)
    config = layers[0].e2vpt_config[adapter_name]
    assert config.token_gate is not None
    device = layers[0].e2vpt_visual_prompts[adapter_name].device
    shape = (1 if config.gate_scope == "model" else len(layers), config.num_visual_prompts)
    token = torch.zeros(shape, dtype=torch.float64)
    segment = torch.zeros(*shape, config.num_segments, dtype=torch.float64)
    num_samples = num_batches = 0
    with no_trace(model, dataloader, seed), gates_on(config.token_gate, layers), torch.enable_grad():
        try:
            for batch in batches(dataloader, max_batches, "Scoring prompts"):
                batch = send_to_device(dict(batch), device)
                batch_size = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
                counted = _labelled(batch, batch_size)
                if not counted:
                    continue
                leaves = _leaves(layers, adapter_name, config, batch_size)
                for layer, pair in zip(layers, leaves * (len(layers) // len(leaves)), strict=True):
                    layer.gate_override = GateOverride(*pair, config.token_gate)
                loss = _total_loss(model, batch, loss_fn, counted)
                gradients = _gradients(loss, leaves)
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


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """Adds up what all processes hold; every process gets the same bits."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    summed = tensor.to(device)
    torch.distributed.all_reduce(summed)
    return summed.cpu()
