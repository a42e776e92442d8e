# Copyright 2026 The peft_e2vpt authors. Licensed under the Apache License, Version 2.0.
"""The recipe: heads that start as linear probes on standardised features, and learning rates by part."""

from .callback import RecipeCallback
from .head_start import HeadStart, fold_heads, start_heads
from .optimizer import create_e2vpt_optimizer, parameter_groups
from .prefix import cache_frozen_prefix, uncache_frozen_prefix


__all__ = [
    "HeadStart",
    "RecipeCallback",
    "cache_frozen_prefix",
    "create_e2vpt_optimizer",
    "fold_heads",
    "parameter_groups",
    "start_heads",
    "uncache_frozen_prefix",
]
