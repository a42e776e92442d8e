# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What a backbone makes of images: `class_token_embeddings`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor, nn

from ._compat import device_and_dtype
from .evaluation import no_trace


@torch.no_grad()
def class_token_embeddings(model: nn.Module, inputs: dict[str, Any], *, has_class_token: bool = True) -> Tensor:
    """Returns the class token of every sample in the last hidden state of the backbone.

    Args:
        model: an image model of transformers, adapted or not; it runs in eval mode and is left as it was.
        inputs: a batch of B samples as the model takes it; moved to the model's device.
        has_class_token: whether the first token is one; otherwise the mean over all tokens is returned.

    Returns:
        (B, D) on the CPU, in float32 or, of a float64 model, in float64.

    Raises:
        ValueError: the model returns no hidden states of tokens.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    with no_trace(model, ()):
        inputs = send_to_device(dict(inputs), device_and_dtype(model)[0])
        states = model(**inputs, output_hidden_states=True).hidden_states
    if not states or states[-1].dim() != 3:
        raise ValueError(f"{type(model).__name__} returns no hidden states of tokens (B, N, D).")
    found: Tensor = states[-1][:, 0] if has_class_token else states[-1].mean(1)
    return found.to(torch.promote_types(found.dtype, torch.float32)).cpu()
