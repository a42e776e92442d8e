# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What scoring and searching share: passes over data that leave no trace in the model, on one process or many."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils import logging

from .distributed import reshard
from .tuner.layer import E2VPTLayer
from .tuner.prompt_layers import visual_prompt_layers


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
def running_as(implementation: str, layers: list[E2VPTLayer], instead_of: Callable[[str], bool]) -> Iterator[None]:
    """Runs a block with another attention implementation.

    Args:
        implementation: its name.
        layers: the layers whose towers run with it.
        instead_of: which implementations give way to it, by their names.
    """
    configs = {id(source): source for layer in layers if (source := layer.attention_config) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    switched = [key for key, name in before.items() if instead_of(name)]
    try:
        for key in switched:
            configs[key]._attn_implementation = implementation
        yield
    finally:
        for key in switched:
            configs[key]._attn_implementation = before[key]


@contextmanager
def gates_on(place: str, layers: list[E2VPTLayer]) -> Iterator[None]:
    """Lets attentions that cannot add to their scores (flash, flex) run as sdpa where gates are on the `"attention"`.

    Args:
        place: `"attention"` or `"embedding"`.
        layers: the layers whose gates are measured.
    """
    with running_as("sdpa", layers, lambda name: place == "attention" and ("flash" in name or "flex" in name)):
        yield


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Batch(NamedTuple):
    """One batch of data on the device of the model.

    Attributes:
        inputs: what the model takes.
        size: its number of samples.
        largest: that of the largest batch among processes that keep step.
        counts: whether it is new; to keep step, a process without further batches repeats its last one.
    """

    inputs: dict[str, Any]
    size: int
    largest: int
    counts: bool


def batches(
    dataloader: Iterable[dict[str, Any]],
    device: torch.device,
    description: str,
    max_batches: int | None = None,
    in_step: bool = False,
) -> Iterator[Batch]:
    """Yields batches on a device, with transformers' progress bar on process 0.

    Args:
        dataloader: batches as the model takes them.
        device: where they go.
        description: of the progress bar.
        max_batches: how many to use, by default all.
        in_step: whether processes keep step, all with as many batches as the one with the most has.

    Raises:
        ValueError: processes keep step, and one has no batch at all.
        TypeError: a batch is not a dictionary.
    """
    total = len(dataloader) if isinstance(dataloader, Sized) else None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    hidden = True if _is_distributed() and torch.distributed.get_rank() else None
    bar = logging.tqdm(islice(dataloader, max_batches), total=total, desc=description, leave=False, disable=hidden)
    if not (in_step and _is_distributed()):
        for batch in bar:
            inputs = _inputs_of(batch, device)
            yield Batch(inputs, _size(inputs), _size(inputs), True)
        return
    inputs = {}
    for batch in chain(bar, repeat(None)):
        inputs = inputs if batch is None else _inputs_of(batch, device)
        found = torch.tensor([_size(inputs) if inputs else 0, batch is not None, not inputs], device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        largest, one_has_more, one_has_none = found.tolist()
        if not one_has_more:
            return
        if one_has_none:
            raise ValueError("The model is sharded, so every process needs a batch, but one has none: use more data.")
        yield Batch(inputs, _size(inputs), largest, batch is not None)


def _inputs_of(batch: Any, device: torch.device) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            "A batch is a dictionary of what the model takes, such as {'pixel_values': ..., 'labels': ...}, got a "
            f"{type(batch).__name__}: let the data set return dictionaries, or pass a collate_fn that makes one."
        )
    inputs: dict[str, Any] = send_to_device(dict(batch), device)
    return inputs


def _size(inputs: dict[str, Any]) -> int:
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """Adds up what all processes hold; every process gets the same bits.

    `accelerate.utils.reduce` would add nothing up in a process group that was made without Accelerate's launchers.
    """
    if not _is_distributed():
        return tensor
    summed = tensor.to(device)
    torch.distributed.all_reduce(summed)
    return summed.cpu()
