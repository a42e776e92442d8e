# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""What is known of backbones: where their self-attentions take rows, and where the heads of task models are."""

from .heads import find_heads
from .sites import AttentionSite, find_attention_sites
from .table import BACKBONES, Backbone


__all__ = [
    "BACKBONES",
    "AttentionSite",
    "Backbone",
    "find_attention_sites",
    "find_heads",
]
