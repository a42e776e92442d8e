# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""Optimizers: what one holds before its first step, and the values that it lets a model be evaluated with.

Most optimizers keep what they learn in `state`, by parameter. Some keep more in `param_groups`: schedule-free ones
their step and the sum of their weights, Prodigy its estimate of the step size. Schedule-free ones also train other
values than those that are to be evaluated and saved, and swap them in `train()` and `eval()`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from ..distributed import reshard


if TYPE_CHECKING:
    from transformers import Trainer


_NOT_KEPT = ("params", "lr", "initial_lr")  # the schedule rules the learning rate


def _optimizers(optimizer: Any) -> list[Any]:
    """An optimizer and those that it wraps, each once: Accelerate, DeepSpeed, Lookahead and others wrap one."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        one = waiting.pop()
        if any(one is other for other in found) or not hasattr(one, "param_groups"):
            continue
        found.append(one)
        for value in vars(one).values():
            several = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            held = (value, *several) if value is not getattr(one, "state", None) else ()
            waiting += [v for v in held if isinstance(v, torch.optim.Optimizer) or v is getattr(one, "optimizer", one)]
    return found


def clear_state(optimizer: Any) -> None:
    """Empties what an optimizer, and any that it wraps, has learned by parameter."""
    for one in _optimizers(optimizer):
        one.state.clear()


class OptimizerStart:
    """What the optimizer of a Trainer holds before its first step, parameters and learning rates left out.

    Args:
        groups: for each optimizer that is wrapped in the Trainer's, what its groups hold.
        scaler: the state of the scaler of float16 gradients, where there is one.
    """

    def __init__(self, groups: list[list[dict[str, Any]]], scaler: dict[str, Any] | None) -> None:
        self.groups = groups
        self.scaler = scaler

    @classmethod
    def of(cls, trainer: Trainer) -> OptimizerStart:
        """Copies what the optimizer of a Trainer holds."""
        groups = [
            [{key: copy.deepcopy(value) for key, value in group.items() if key not in _NOT_KEPT} for group in groups]
            for groups in (one.param_groups for one in _optimizers(trainer.optimizer))
        ]
        scaler = getattr(trainer.accelerator, "scaler", None)
        return cls(groups, None if scaler is None else scaler.state_dict())

    def restore(self, trainer: Trainer) -> None:
        """Makes the optimizer of a Trainer as it was, with the learning rates that it has now."""
        clear_state(trainer.optimizer)
        for one, groups in zip(_optimizers(trainer.optimizer), self.groups, strict=True):
            for group, start in zip(one.param_groups, groups, strict=True):
                for key in [key for key in group if key not in start and key not in _NOT_KEPT]:
                    del group[key]  # added by a step
                for key, value in start.items():
                    group[key] = _on_device_of(group.get(key), copy.deepcopy(value))
        if self.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(self.scaler)

    def save(self, path: Path) -> None:
        """Writes it in the format of the optimizer of a checkpoint."""
        torch.save({"groups": self.groups, "scaler": self.scaler}, path)

    @classmethod
    def load(cls, path: Path) -> OptimizerStart:
        """Reads what `save` has written."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))


def _on_device_of(current: Any, value: Any) -> Any:
    both = isinstance(current, Tensor) and isinstance(value, Tensor)
    return value.to(current.device) if both else value


def _swaps(optimizer: Any) -> bool:
    own = [one for one in _optimizers(optimizer) if not isinstance(one, AcceleratedOptimizer)]
    return any(callable(getattr(one, "eval", None)) for one in own)


def show_evaluated_values(trainer: Trainer) -> None:
    """Lets an optimizer that trains other values than are evaluated put those into the model; they stay there."""
    if _swaps(trainer.optimizer):
        reshard(trainer.model)
        trainer.optimizer.eval()


@contextmanager
def evaluated_values(trainer: Trainer) -> Iterator[None]:
    """As `show_evaluated_values`, but afterwards the model has its values back to the bit: swapping twice rounds."""
    if not _swaps(trainer.optimizer):
        yield
        return
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    reshard(trainer.model)
    trained = [_local(p).clone() for p in parameters]
    show_evaluated_values(trainer)
    swapped = any(not torch.equal(_local(p), values) for p, values in zip(parameters, trained, strict=True))
    try:
        yield
    finally:
        if swapped:  # otherwise the Trainer swaps before its next step, if that is needed
            reshard(trainer.model)
            trainer.optimizer.train()
            for p, values in zip(parameters, trained, strict=True):
                _local(p).copy_(values)


def _local(parameter: Any) -> Tensor:
    values: Tensor = parameter.detach()
    return values.to_local() if hasattr(values, "to_local") else values
