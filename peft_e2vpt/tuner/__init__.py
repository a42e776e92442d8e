# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The PEFT tuner: its config, its layers and the model around them."""

from .config import E2VPTConfig
from .gates import GateOverride
from .layer import E2VPTLayer
from .model import E2VPTModel
from .prompt_layers import PromptLayers, prompt_layers, visual_prompt_layers
from .summary import PromptCount, PromptSummary, summarise


__all__ = [
    "E2VPTConfig",
    "E2VPTLayer",
    "E2VPTModel",
    "GateOverride",
    "PromptCount",
    "PromptLayers",
    "PromptSummary",
    "prompt_layers",
    "summarise",
    "visual_prompt_layers",
]
