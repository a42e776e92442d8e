# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What scoring and searching share: passes over data that leave no trace in the model, on one process or many."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.state import GradientState
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils import logging

from .distributed import is_distributed, reshard


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
    hidden = True if is_distributed() and torch.distributed.get_rank() else None
    bar = logging.tqdm(islice(dataloader, max_batches), total=total, desc=description, leave=False, disable=hidden)
    if not (in_step and is_distributed()):
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
            f"{type(batch).__name__}: let the dataset return dictionaries, or pass a collate_fn that makes one."
        )
    inputs: dict[str, Any] = send_to_device(dict(batch), device)
    return inputs


def _size(inputs: dict[str, Any]) -> int:
    """How many samples a batch holds: as many as labels, where it has them; images may come packed as patches."""
    labels = inputs.get("labels")
    for value in (labels, *inputs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.size(0)
        if value is labels and isinstance(value, (list, tuple)):
            return len(value)
    raise ValueError(f"A batch of {', '.join(inputs)} holds no tensor with an entry per sample.")
