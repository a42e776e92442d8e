# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""E2VPT, effective and efficient visual prompt tuning, as a PEFT method. Importing this package registers it."""

from .config import E2VPTConfig
from .layer import E2VPTLayer
from .model import E2VPTModel, PromptSummary
from .registration import register
from .version import __version__


__all__ = ["E2VPTConfig", "E2VPTLayer", "E2VPTModel", "PromptSummary", "__version__"]

register(E2VPTConfig, E2VPTModel)
