# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What to say where a saved head does not fit a model."""

from __future__ import annotations

from torch import Size, nn

from .config import E2VPTConfig


def head_mismatch(model: nn.Module, name: str, found: Size, needed: Size, config: E2VPTConfig) -> str:
    """What is wrong with a tensor of a head, and which base model it needs.

    Args:
        model: the adapted model.
        name: of the tensor in the adapter's file.
        found: its shape.
        needed: the shape in the model.
        config: configuration of the adapter.
    """
    if found[1:] != needed[1:]:
        advice = "load it on the backbone it was trained on."
    else:
        classes = _classes(model, found, needed, config)
        advice = (
            f"load the base model with the number of classes of the adapter, num_labels={classes}."
            if classes is not None
            else "give the base model the head that the adapter was trained with, as peft_e2vpt.load(...) does."
        )
    return f"The adapter's tensor {name} has shape {tuple(found)}, but the model needs {tuple(needed)}: {advice}"


def _classes(model: nn.Module, found: Size, needed: Size, config: E2VPTConfig) -> int | None:
    """The number of classes to ask for; `None` if that is not what differs."""
    num_labels: int | None = getattr(getattr(model, "config", None), "num_labels", None)
    if config.labels is not None:
        classes = len(config.labels)
    elif num_labels is not None and 0 <= needed[0] - num_labels <= 1:  # detectors have a row for "no object"
        classes = found[0] - (needed[0] - num_labels)
    else:
        return None
    return None if classes == num_labels else classes
